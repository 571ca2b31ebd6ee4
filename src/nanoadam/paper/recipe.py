"""Recipes: one TOML file for each experiment, with everything that it takes, and the paper's figures beside it.

A recipe's keys are those of its full scale; `[scale.NAME]` holds what another scale has otherwise. What most have:

    title, tables       what it is, and where in the paper it stands
    kind                which code runs it, see `nanoadam.paper.reproduce`
    seeds               each run is repeated with each
    [config]            keys of `nanoadam finetune` that all runs share
    [models.NAME]       and those of each model
    [tasks.NAME]        and of each task; `files` are those that hold in a folder of data given with --data
    [variants.NAME]     and of each variant, with its learning_rates
    [paper.MODEL.VARIANT]  the paper's figures by task, and avg, GB, minutes where it gives them
    [select]            lists of models, tasks and variants: only these; rates: so many of each grid
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoadam.text import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"

SELECTED = ("models", "tasks", "variants")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An experiment at one scale."""

    name: str
    scale: str
    keys: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return str(self.keys["title"])

    @property
    def kind(self) -> str:
        """Which code runs it."""
        return str(self.keys["kind"])

    def table(self, name: str) -> dict[str, Any]:
        """One of its tables; of models, tasks and variants those that are selected."""
        found = self.keys.get(name, {})
        chosen = self.keys.get("select", {}).get(name)
        return {key: value for key, value in found.items() if chosen is None or key in chosen}

    def rates(self, grid: Sequence[float]) -> list[float]:
        """What is tried of a grid of learning rates."""
        return list(grid)[: self.keys.get("select", {}).get("rates")]

    def only(self, names: Sequence[str]) -> Recipe:
        """Of models, tasks and variants those that are named; of a kind that none is named of, all.

        Raises:
            ValueError: for a name that is none of them, or if there are none.
        """
        select = dict(self.keys.get("select", {}))
        known = {kind: self.table(kind) for kind in SELECTED}
        every = list(dict.fromkeys(name for found in known.values() for name in found))
        if not every:
            raise ValueError(f"{self.name} has no models, tasks or variants to choose from: leave out --only")
        for name in names:
            if name not in every:
                hint = nearest(name, every) or f". Known: {', '.join(every)}"
                raise ValueError(f"{self.name} has no {name!r}{hint}")
        for kind, found in known.items():
            named = [name for name in names if name in found]
            if named:
                select[kind] = named
        return dataclasses.replace(self, keys={**self.keys, "select": select})


def names() -> list[str]:
    """Every experiment that there is a recipe for."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, scale: str = "full") -> Recipe:
    """A recipe at one scale.

    Raises:
        ValueError: for a name or a scale that there is none of.
    """
    if name not in names():
        raise ValueError(f"there is no experiment {name!r}. There are: {', '.join(names())}")
    keys = read(FOLDER / f"{name}.toml")
    scales = keys.pop("scale", {})
    known = ["full", *scales] if "full" not in scales else list(scales)
    if scale not in known:
        raise ValueError(f"{name} has no scale {scale!r}{nearest(scale, known)}")
    return Recipe(name, scale, merged(keys, scales.get(scale, {})))


def read(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, those of other scales included."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def scales(name: str) -> list[str]:
    """The scales that an experiment can be run at."""
    keys = read(FOLDER / f"{name}.toml")
    return list(dict.fromkeys(["full", *keys.get("scale", {})]))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables into tables; anything else replaces what is there."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
