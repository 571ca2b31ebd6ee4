"""Two checkpoints of one model, tensor by tensor: never more than one tensor of each in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoadam.analysis.measures import Shift, shift

__all__ = ["Checkpoint", "Pair", "changes", "heatmap", "match", "place"]

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Checkpoint:
    """The weights in a folder, opened one at a time.

    Args:
        folder: with one safetensors file, or several: those that `model.safetensors.index.json` names, or all.

    Raises:
        ValueError: if there is no such folder, it holds no safetensors or a broken one, or its index names a file that
            is not there. Pickled weights are never read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every floating-point tensor, by name."""
        self._files: dict[str, Path] = {}
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        part = file.get_slice(name)
                        if part.get_dtype() in _FLOATS:
                            self._files[name], self.shapes[name] = path, tuple(part.get_shape())
            except SafetensorError as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        self.shapes = dict(sorted(self.shapes.items(), key=lambda item: _natural(item[0])))

    def _shards(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is no index of safetensors files") from error
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(f"{index} names {missing[0]}, which is not there")
            return [self.folder / name for name in names]
        single = self.folder / "model.safetensors"
        found = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if found:
            return found
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise ValueError(f"{self.folder} holds pickled weights only ({pickled[0]}), which are not read: save it as "
                             "safetensors")  # fmt: skip
        raise ValueError(f"{self.folder} holds no safetensors")

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class Pair(NamedTuple):
    """Which tensor of the finetuned model is which of the pretrained one."""

    names: dict[str, str]  # after: before
    only_before: list[str]
    only_after: list[str]


def match(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> Pair:
    """Pair tensors by name; where one model is the other's base, with the prefix that the other one puts before it.

    Args:
        before: shapes by name.
        after: likewise.

    Raises:
        ValueError: if nothing pairs, or two of a pair have different shapes, which are named.
    """
    best: dict[str, str] = {}
    prefixes = {"", *(name.split(".", 1)[0] + "." for name in (*before, *after) if "." in name)}
    for prefix in sorted(prefixes, key=len):
        for names in (
            {name: name[len(prefix) :] for name in after if name.startswith(prefix) and name[len(prefix) :] in before},
            {name: prefix + name for name in after if prefix + name in before},
        ):
            best = names if len(names) > len(best) else best
    best.update({name: name for name in after if name in before and name not in best and name not in best.values()})
    if not best:
        raise ValueError(f"the two have no tensor in common: {next(iter(before), 'nothing')} is not in the second, "
                         f"{next(iter(after), 'nothing')} not in the first")  # fmt: skip
    for new, old in best.items():
        if tuple(before[old]) != tuple(after[new]):
            raise ValueError(f"{new} has another shape than before: {list(after[new])}, was {list(before[old])}")
    known = set(best.values())
    return Pair(best, [name for name in before if name not in known], [name for name in after if name not in best])


def changes(before: Checkpoint, after: Checkpoint, pair: Pair, *, share: float = 0.3) -> Iterator[tuple[str, Shift]]:
    """What finetuning changed, one tensor after the other: at no time more than one of each checkpoint in memory.

    Args:
        before: the pretrained weights.
        after: the finetuned ones.
        pair: of `match`.
        share: see `shift`.

    Yields:
        The name in `after`, and the change.
    """
    for new, old in pair.names.items():
        yield new, shift(before.load(old), after.load(new), share=share)


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block|encoder|decoder|stages?)\.(\d+)(?:\.|$)")


def place(name: str) -> tuple[int | None, str]:
    """The layer that a tensor belongs to, and what it is there: the name without the layer and without `.weight`.

    `bert.encoder.layer.3.output.dense.weight` -> `(3, "output.dense")`; what is in no layer has None.
    """
    found = _LAYER.search(name) or re.search(r"\.(\d+)\.", name)
    if found is None:
        return None, name.removesuffix(".weight")
    return int(found.group(1)), name[found.end() :].removesuffix(".weight") or name[: found.start()]


def heatmap(values: Mapping[str, float], combine: str = "l2") -> dict[str, Any]:
    """A value for each tensor as rows of kinds over layers (figure 18 and the layer-wise shifts of the appendix).

    Args:
        values: by name, for instance the l2 distance of each tensor.
        combine: what becomes of two tensors in one place: "l2" (root of the sum of squares) or "mean".

    Returns:
        `{"layers": [...], "kinds": [...], "values": [[...], ...]}`, a row for each kind, None where there is nothing.
        Tensors of no layer are left out.

    Raises:
        ValueError: for another `combine`.
    """
    if combine not in ("l2", "mean"):
        raise ValueError(f"combine must be l2 or mean, got {combine!r}")
    cells: dict[tuple[str, int], list[float]] = {}
    for name, value in values.items():
        layer, kind = place(name)
        if layer is not None:
            cells.setdefault((kind, layer), []).append(value)
    layers, kinds = sorted({layer for _, layer in cells}), list(dict.fromkeys(kind for kind, _ in cells))

    def cell(found: list[float] | None) -> float | None:
        if found is None:
            return None
        return sum(v * v for v in found) ** 0.5 if combine == "l2" else sum(found) / len(found)

    rows = [[cell(cells.get((kind, layer))) for layer in layers] for kind in kinds]
    return {"layers": layers, "kinds": kinds, "values": rows}
