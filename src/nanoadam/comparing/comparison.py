"""What is compared: variants of one job, each with its grid of learning rates, and the runs that these make."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from nanoadam.baselines import BASELINES
from nanoadam.finetuning import optimizers
from nanoadam.finetuning.config import FIELDS, Config
from nanoadam.text import nearest

OPTIMIZERS = ("adamw", "nanoadam")
AROUND = (1 / 3, 1.0, 3.0)
"""Times what is typical of an optimizer: the rates that are tried where none are given."""

# What a variant may not set: these belong to the comparison, or would make one metric of two.
SHARED = ("learning_rate", "seed", "task", "metric", "validation", "validation_share", "validation_rows")

Key: TypeAlias = tuple[str, float, int]
"""Of a run: variant, learning rate, seed."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of the table.

    Args:
        name: letters, digits and `._+-`; it names folders.
        learning_rates: its grid.
        overrides: keys of the config that it sets. A variant called like an optimizer has that one unless told
            otherwise.

    Raises:
        ValueError: for a name that is none, an empty grid, a rate twice, or a key that a variant cannot set.
    """

    name: str
    learning_rates: tuple[float, ...]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.name):
            raise ValueError(f"the variant {self.name!r} needs a name of letters, digits and . _ + -")
        object.__setattr__(self, "learning_rates", _rates(self.name, self.learning_rates))
        for key in self.overrides:
            if key not in FIELDS:
                raise ValueError(f"variant {self.name}: there is no key {key!r}{nearest(key, FIELDS)}")
            if key in SHARED:
                raise ValueError(f"variant {self.name} cannot set {key}: it is the same for all variants")
        if "optimizer" not in self.overrides and self.name in BASELINES:
            object.__setattr__(self, "overrides", {"optimizer": self.name, **self.overrides})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a TOML file."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.overrides.items()}
        return {**plain, "learning_rates": list(self.learning_rates)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: the job; its learning rate and seed give way to these.
        variants: see `Variant`, and `variants` for a short form.
        seeds: each run is repeated with each.

    Raises:
        ValueError: for an empty list, something twice, or a variant that is no valid config.
    """

    config: Config
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        seeds: Any = self.seeds
        if not isinstance(seeds, (list, tuple)) or not all(isinstance(seed, int) for seed in seeds):
            raise ValueError(f"seeds must be a list of whole numbers, got {seeds!r}")
        names = tuple(variant.name for variant in self.variants)
        for what, values in (("variants", names), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{what} is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{what} holds something twice: {', '.join(map(str, values))}")
        for variant in self.variants:
            try:
                config = self._config(variant, variant.learning_rates[0], self.seeds[0])
                optimizers.options(config)
            except ValueError as error:
                raise ValueError(f"variant {variant.name}: {error}") from error
            optimizers.method(config.optimizer)

    def _config(self, variant: Variant, learning_rate: float, seed: int) -> Config:
        keys = {**variant.overrides, "learning_rate": learning_rate, "seed": seed}
        if "density" in keys:  # a constant one, unless the variant says where it ends
            keys.setdefault("density_end", None)
        config = dataclasses.replace(self.config, **keys)
        own = tuple(text for text in config.optimizer_options if config.optimizer in optimizers.parse([text]))
        return dataclasses.replace(config, optimizer_options=own)

    def refuse_idle(self) -> None:
        """Refuse options of optimizers that are not compared.

        Raises:
            ValueError: names the option.
        """
        used = [variant.overrides.get("optimizer", self.config.optimizer) for variant in self.variants]
        optimizers.refuse_idle(self.config.optimizer_options, used)
        for variant, name in zip(self.variants, used, strict=True):
            try:
                optimizers.refuse_idle(variant.overrides.get("optimizer_options", ()), [name])
            except ValueError as error:
                raise ValueError(f"variant {variant.name}: {error}") from error

    def resolved(self) -> Comparison:
        """With whole paths, so that it can be gone on with from anywhere."""
        made = []
        for variant in self.variants:
            whole = self._config(variant, variant.learning_rates[0], self.seeds[0]).resolved()
            own = {key: getattr(whole, key) for key in variant.overrides}
            made.append(dataclasses.replace(variant, overrides=own))
        return dataclasses.replace(self, config=self.config.resolved(), variants=tuple(made))

    def cases(self) -> list[Case]:
        """Every run there is, variant by variant."""
        return [
            Case(variant.name, self._config(variant, lr, seed))
            for variant in self.variants
            for lr in variant.learning_rates
            for seed in self.seeds
        ]

    def to_toml(self) -> str:
        """The job's keys and those of [compare]; reading it gives the same comparison."""
        import tomli_w

        own = {variant.name: variant.to_dict() for variant in self.variants}
        section = {"seeds": list(self.seeds), "variants": own}
        text = self.config.to_toml().replace("nanoadam finetune", "nanoadam compare")
        return f"{text}\n{tomli_w.dumps({'compare': section})}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a comparison: a variant at one learning rate with one seed."""

    variant: str
    config: Config

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        assert self.config.learning_rate is not None
        return self.variant, self.config.learning_rate, self.config.seed

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant}-{self.config.learning_rate:g}-{self.config.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.config.learning_rate:g}, seed {self.config.seed}"


KEYS = ("optimizers", "learning_rates", "seeds", "variants")
"""What may stand in the section [compare] of a TOML file."""


def variants(
    names: Sequence[str] | None = None,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    sections: Any = None,
    task: str | None = None,
) -> tuple[Variant, ...]:
    """Variants from what may stand in [compare].

    Args:
        names: of optimizers, the short form: each is a variant without keys of its own.
        learning_rates: for variants without a grid of their own; or grids by name, with that of all others under
            "", which win over the variants' own.
        sections: overrides by name, with a grid under `learning_rates` where it has one.
        task: what is learned, if that is known: images take larger steps.

    Raises:
        ValueError: for both forms at once, or a grid for a name that there is none of.
    """
    if names is not None and sections is not None:
        raise ValueError("give either optimizers or variants: a variant says with optimizer = ... which it has")
    if not isinstance(sections or {}, dict) or not all(isinstance(own, dict) for own in (sections or {}).values()):
        raise ValueError("variants must be sections like [compare.variants.NAME]")
    if names is not None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"optimizers must be a list of names, got {names!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"optimizers holds something twice: {', '.join(names)}")
        for name in names:
            optimizers.method(name)
    found = {name: {} for name in names or OPTIMIZERS} if sections is None else sections
    grids = learning_rates if isinstance(learning_rates, Mapping) else {}
    rest = None if isinstance(learning_rates, Mapping) else learning_rates
    for name in grids:
        if name and name not in found:
            raise ValueError(f"learning_rates has a grid for {name!r}, which is no variant{nearest(name, found)}")
    made = []
    for name, own in found.items():
        overrides = {key: value for key, value in own.items() if key != "learning_rates"}
        grid = grids.get(name, grids.get("", own.get("learning_rates", rest)))
        if grid is None:
            grid = _around(own.get("optimizer", name), own.get("density"), task)
        made.append(Variant(name, grid, overrides))
    return tuple(made)


def _around(optimizer: str, density: Any, task: str | None) -> tuple[float, ...]:
    """A grid about what is typical of an optimizer, at a density where it has one."""
    known = optimizer if optimizer in BASELINES else OPTIMIZERS[0]
    share = density if isinstance(density, float) and 0 < density <= 1 else None
    middle = optimizers.typical(Config(model="-", train="-", optimizer=known, density=share, task=task))
    return tuple(float(f"{middle * factor:.2g}") for factor in AROUND)


def _rates(name: str, values: Any) -> tuple[float, ...]:
    good = isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf for value in values
    )
    if not good or not values:
        raise ValueError(f"learning_rates of {name} must be a list of numbers, got {values!r}")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(f"learning_rates of {name} holds something twice: {', '.join(map(str, values))}")
    return tuple(float(value) for value in values)


def made(keys: dict[str, Any]) -> Comparison:
    """A comparison from the keys of a TOML file: those of a config and those of [compare]."""
    own = {key: keys[key] for key in KEYS if key in keys}
    task = keys.get("task")
    names, grids, sections = (own.pop(key, None) for key in ("optimizers", "learning_rates", "variants"))
    chosen = variants(names, grids, sections, task if isinstance(task, str) else None)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    return Comparison(Config(**{key: value for key, value in keys.items() if key not in KEYS}), chosen, **own)
