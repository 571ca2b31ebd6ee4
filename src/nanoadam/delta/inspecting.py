"""info and verify: what a patch holds, and whether a model is its base."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from nanoadam.delta import ops
from nanoadam.delta.bits import NAMES, nbytes
from nanoadam.delta.diffing import name_key
from nanoadam.delta.entry import KINDS, Entry
from nanoadam.delta.hashing import as_hex, signed
from nanoadam.delta.patch import Patch, as_patch
from nanoadam.delta.sources import Progress, Tensors, tensors_of


def info(patch: Patch | str | os.PathLike[str]) -> dict[str, Any]:
    """What a patch holds, in plain values that JSON can take.

    Raises:
        DeltaError: if it is no whole patch.
    """
    found = as_patch(patch)
    tensors = [_describe(entry) for entry in found.values()]
    return {
        "base": found.base,
        "prefix": found.prefix,
        "removed": list(found.removed),
        "notes": dict(found.notes),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "weights": found.count,
        "of_weights": sum(entry.numel for entry in found.values()),
        "untouched": None if found.untouched is None else len(found.untouched),
        "kinds": {
            kind: {
                "tensors": sum(tensor["kind"] == kind for tensor in tensors),
                "weights": sum(tensor["weights"] for tensor in tensors if tensor["kind"] == kind),
                "bytes": sum(tensor["bytes"] for tensor in tensors if tensor["kind"] == kind),
                "position_bytes": sum(tensor["position_bytes"] for tensor in tensors if tensor["kind"] == kind),
            }
            for kind in KINDS
        },
        "tensors": tensors,
    }


def _describe(entry: Entry) -> dict[str, Any]:
    parts = {name: part.nbytes for name, part in entry.parts.items()}
    return {
        "name": entry.name,
        "kind": entry.kind,
        "dtype": NAMES[entry.dtype],
        "shape": list(entry.shape),
        "weights": entry.count,
        "of_weights": entry.numel,
        "bytes": sum(parts.values()),
        "position_bytes": sum(parts.values()) - parts["values"],
        "base": None if entry.base is None else as_hex(entry.base),
        "result": None if entry.result is None else as_hex(entry.result),
        "tied": list(entry.tied),
    }


@dataclass(frozen=True)
class Verdict:
    """What a model is to a patch.

    Attributes:
        base: tensors that are the base's, and change.
        tuned: tensors that are the finetuned ones.
        same: tensors that the patch leaves alone, and that are the base's.
        other: tensors that are neither, by name; of another dtype or shape, or missing, included.
        unknown: tensors of which the patch says nothing.
    """

    base: int
    tuned: int
    same: int
    other: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def is_base(self) -> bool:
        """Whether the patch can be applied, and all else is the base's too."""
        return not self.other and not self.tuned

    @property
    def is_tuned(self) -> bool:
        """Whether it is the finetuned model."""
        return not self.other and not self.base


def verify(model: Any, patch: Patch | str | os.PathLike[str], *, progress: Progress | None = None) -> Verdict:
    """Hold every tensor of a model against a patch: those that it changes, and those that it leaves alone.

    Args:
        model: a module, a state dict or the path of a saved model.
        patch: a patch, or its path; the file is held against its SHA-256.
        progress: called with how far it is.

    Raises:
        DeltaError: if the patch or the model cannot be read.
    """
    found, tensors = as_patch(patch), tensors_of(model)
    sizes = [nbytes(*tensors.form(name)) for name in tensors.names()]
    states: dict[str, list[str]] = {state: [] for state in ("base", "tuned", "same", "other", "unknown")}
    entries = {other: entry for entry in found.values() for other in (entry.name, *entry.tied)}
    untouched = {} if found.untouched is None else dict(found.untouched.tolist())
    missing = dict(found)
    for i, name in enumerate(tensors.names()):
        every = (name, *tensors.tied.get(name, ()))
        names = (*every, *(found.prefix + each for each in every))
        entry = next((entries[each] for each in names if each in entries), None)
        if entry is None:
            own = (*every, *(each.removeprefix(found.prefix) for each in every))
            known = next((untouched[name_key(each)] for each in own if name_key(each) in untouched), None)
            state = _left_alone(tensors, name, known)
        else:
            state = _state(tensors, name, entry)
            missing.pop(entry.name, None)
        states[state].append(name)
        if progress is not None:
            progress(sum(sizes[: i + 1]), sum(sizes))
    for name, entry in missing.items():
        states["base" if entry.kind == "new" else "other"].append(name)
    base, tuned, same = (len(states[state]) for state in ("base", "tuned", "same"))
    return Verdict(base, tuned, same, tuple(states["other"]), tuple(states["unknown"]))


def _left_alone(tensors: Tensors, name: str, known: int | None) -> str:
    """What a tensor without an entry is; `known` is the base's hash."""
    if known is None:
        return "unknown"
    return "same" if signed(ops.hash_all([tensors.tensor(name)])[0]) == known else "other"


def _state(tensors: Tensors, name: str, entry: Entry) -> str:
    if tensors.form(name) != (entry.dtype, entry.shape):
        return "base" if entry.kind == "new" else "other"
    (value,) = ops.hash_all([tensors.tensor(name)])
    if value == entry.result:
        return "tuned"
    return "base" if entry.kind == "new" or entry.base in (value, None) else "other"
