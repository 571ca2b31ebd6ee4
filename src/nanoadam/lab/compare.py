"""Several variants of one job, each over its own grid of learning rates, with the same seeds and order of data.

A variant is a name, keys of the config that it sets, and its learning rates. Each run is a finetuning run with a
folder of its own. A learning rate is chosen for each variant by the mean of the validation metric over the seeds;
what is measured of forgetting takes no part in the choice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoadam.baselines import BASELINES
from nanoadam.lab import finetune, models, runs, tables
from nanoadam.lab import optimizers as methods
from nanoadam.lab.config import FIELDS, Config
from nanoadam.lab.runs import nearest
from nanoadam.lab.tables import CHOICE, Outcome

OPTIMIZERS = ("adamw", "nanoadam")
LEARNING_RATES = (1e-5, 1e-4, 1e-3)

# What a variant may not set: these belong to the comparison, or would make one metric of two.
SHARED = ("learning_rate", "seed", "task", "metric", "validation", "validation_share", "validation_rows")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many runs are done, how many there are."""


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
        retain: a text file that a language model must not forget; measured as loss per token.

    Raises:
        ValueError: for an empty list, something twice, a variant that is no valid config, or `retain` with another
            kind of model.
    """

    config: Config
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    retain: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        names = tuple(variant.name for variant in self.variants)
        for what, values in (("variants", names), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{what} is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{what} holds something twice: {', '.join(map(str, values))}")
        for variant in self.variants:
            try:
                config = self._config(variant, variant.learning_rates[0], self.seeds[0])
                methods.options(config)
            except ValueError as error:
                raise ValueError(f"variant {variant.name}: {error}") from error
            methods.method(config.optimizer)
        if self.retain is not None and self.config.task != "causal-lm":
            raise ValueError(f"retain measures the loss of language models, and {self.config.task} trains none")
        if self.retain is not None and not Path(self.retain).is_file():
            raise ValueError(f"there is no text file {self.retain} to retain")

    def _config(self, variant: Variant, learning_rate: float, seed: int) -> Config:
        return dataclasses.replace(self.config, **variant.overrides, learning_rate=learning_rate, seed=seed)

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

        section: dict[str, Any] = {"seeds": list(self.seeds)} | ({"retain": self.retain} if self.retain else {})
        section["variants"] = {variant.name: variant.to_dict() for variant in self.variants}
        text = self.config.to_toml().replace("nanoadam finetune", "nanoadam compare")
        return f"{text}\n{tomli_w.dumps({'compare': section})}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a comparison: a variant at one learning rate with one seed."""

    variant: str
    config: Config

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it from all others."""
        return self.variant, self.config.learning_rate, self.config.seed

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant}-{self.config.learning_rate:g}-{self.config.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, learning rate {self.config.learning_rate:g}, seed {self.config.seed}"


KEYS = ("optimizers", "learning_rates", "seeds", "variants", "retain")
"""What may stand in the section [compare] of a TOML file."""


def variants(
    optimizers: Sequence[str] | None = None,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    sections: Any = None,
) -> tuple[Variant, ...]:
    """Variants from what may stand in [compare].

    Args:
        optimizers: the short form: each is a variant without keys of its own.
        learning_rates: for variants without a grid of their own; or grids by name, with that of all others under
            "", which win over the variants' own.
        sections: overrides by name, with a grid under `learning_rates` where it has one.

    Raises:
        ValueError: for both forms at once, or a grid for a name that there is none of.
    """
    if optimizers is not None and sections is not None:
        raise ValueError("give either optimizers or variants: a variant says with optimizer = ... which it has")
    if not isinstance(sections or {}, dict) or not all(isinstance(own, dict) for own in (sections or {}).values()):
        raise ValueError("variants must be sections like [compare.variants.NAME]")
    if optimizers is not None:
        if len(set(optimizers)) < len(optimizers):
            raise ValueError(f"optimizers holds something twice: {', '.join(optimizers)}")
        for name in optimizers:
            methods.method(name)
    found = {name: {} for name in optimizers or OPTIMIZERS} if sections is None else sections
    grids = learning_rates if isinstance(learning_rates, Mapping) else {}
    rest = LEARNING_RATES if learning_rates is None or isinstance(learning_rates, Mapping) else learning_rates
    for name in grids:
        if name and name not in found:
            raise ValueError(f"learning_rates has a grid for {name!r}, which is no variant{nearest(name, found)}")
    made = []
    for name, own in found.items():
        overrides = {key: value for key, value in own.items() if key != "learning_rates"}
        grid = grids.get(name, grids.get("", own.get("learning_rates", rest)))
        made.append(Variant(name, grid, overrides))
    return tuple(made)


def _rates(name: str, values: Any) -> tuple[float, ...]:
    good = isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf for value in values
    )
    if not good or not values:
        raise ValueError(f"learning_rates of {name} must be a list of numbers, got {values!r}")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError(f"learning_rates of {name} holds something twice: {', '.join(map(str, values))}")
    return tuple(float(value) for value in values)


def run(comparison: Comparison, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run all of it, and write one folder with a folder for each run in it.

    Args:
        comparison: what to compare.
        out: new or empty.
        progress: told before each run.

    Returns:
        `{"metric", "runs": [...], "table": [...]}`; see `tables.table`.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError: for whatever the job can get wrong, before the first run.
    """
    tell = progress or (lambda what, done, total: None)
    comparison = dataclasses.replace(
        comparison,
        config=comparison.config.resolved(),
        retain=comparison.retain and str(Path(comparison.retain).resolve()),
    )
    if out.exists():
        runs.prepare_folder(out)
    cases = comparison.cases()
    for variant in comparison.variants:
        case = next(case for case in cases if case.variant == variant.name)
        job = finetune.prepare(case.config)
    before = _retained(comparison, None) if comparison.retain else None
    runs.prepare_folder(out)
    runs.write(out / "config.toml", comparison.to_toml())
    outcomes = []
    for done, case in enumerate(cases):
        tell(str(case), done, len(cases))
        outcome = _one(comparison, case, out / "runs", job.task.metric, before)
        runs.append(out / "metrics.jsonl", outcome)
        outcomes.append(outcome)
    tell("done", len(cases), len(cases))
    results = {
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        "learning_rate_choice": CHOICE,
        "table": tables.table(outcomes, job.task.higher_is_better),
        "limits": methods.limits(dict.fromkeys(case.config.optimizer for case in cases)),
        "runs": outcomes,
    }
    manifest = {
        "command": "nanoadam compare",
        "kind": "comparison of variants of one job, each at its own learning rate",
        "pseudocode": runs.PSEUDOCODE,
        **runs.environment(),
        "data": job.sources,
        "settings": dataclasses.asdict(comparison),
        "seeds": list(comparison.seeds),
        "results": results,
    }
    runs.write(out / "report.html", tables.page(f"compare: {comparison.config.task}", _lead(comparison), manifest))
    runs.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return results


def _lead(comparison: Comparison) -> str:
    config = comparison.config
    grids = "; ".join(f"{v.name}: {', '.join(f'{lr:g}' for lr in v.learning_rates)}" for v in comparison.variants)
    return (
        f"{config.model}, {config.task} on {config.train}, seeds {', '.join(map(str, comparison.seeds))}: mean ± "
        f"standard deviation over them. Learning rate of each variant: {CHOICE}, from its grid ({grids})."
    )


def _one(comparison: Comparison, case: Case, folder: Path, metric: str, before: float | None) -> Outcome:
    """One run's line: its key, and its results or why it has none."""
    variant, learning_rate, seed = case.key
    key = {"variant": variant, "optimizer": case.config.optimizer, "learning_rate": learning_rate, "seed": seed}
    out = folder / case.name
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        results = finetune.run(case.config, out)
    except finetune.Diverged as error:
        return {**key, "metric": None, "stopped": str(error)}
    found = {
        **key,
        "metric": results["final"][metric],
        "final": results["final"],
        **{f"memory_{kind}": count for kind, count in results["memory"].items()},
        **{name: results[name] for name in ("seconds_per_step", "touched", "l2_moved")},
    }
    if before is not None:
        after = _retained(comparison, out / "model")
        found |= {"retained_before": before, "retained_after": after, "forgetting": after - before}
    return found


@torch.no_grad()
def _retained(comparison: Comparison, folder: Path | None) -> float:
    """Loss per token over the text to retain, of a saved model or of the one that all begin with."""
    config = comparison.config
    tokenizer = models.load_tokenizer(config)
    own = config if folder is None else dataclasses.replace(config, model=str(folder), init_from_config=False)
    torch.manual_seed(comparison.seeds[0])  # with init_from_config
    model: torch.nn.Module = models.load_model(own)
    model.train(False)
    text = Path(str(comparison.retain)).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    shape: Any = model.config
    limit = min(getattr(shape.get_text_config(), "max_position_embeddings", None) or 1024, 1024)
    total, count = 0.0, 0
    device = "cuda" if torch.cuda.is_available() and config.device == "auto" else "cpu"
    model.to(device)
    for block in ids.split(limit):
        if len(block) > 1:
            logits = model(block[None].to(device)).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, block[1:].to(device), reduction="sum"))
            count += len(block) - 1
    if not count:
        raise ValueError(f"{comparison.retain} holds fewer than two tokens: there is nothing to retain")
    return total / count
