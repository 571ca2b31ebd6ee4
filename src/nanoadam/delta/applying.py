"""apply and revert: a patch put on a model in memory, and taken back.

Everything is looked at before anything is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanoadam.delta import ops
from nanoadam.delta.bits import bits
from nanoadam.delta.diffing import Progress, whole
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.hashing import as_hex
from nanoadam.delta.ops import Job
from nanoadam.delta.patch import Entry, Patch, as_patch, check_values
from nanoadam.delta.sources import is_path, tensors_of

_undone: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()
"""What takes back the patches on each module, the last one last."""

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def apply(
    model: Any,
    patch: Patch | str | os.PathLike[str],
    strength: float = 1.0,
    *,
    out: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Patch:
    """Make the finetuned model of its base.

    A module or state dict is changed in place; the folder of a saved model, or one safetensors file, is copied to
    `out` with the changes in it, one tensor at a time. A tensor that is the finetuned one already is left alone.

    Args:
        model: a module, a state dict, or the path of a saved model.
        patch: a patch, or its path.
        strength: 1 gives the finetuned weights, bit for bit, and 0 those of the base. What is between, or beyond, is
            base + strength * (tuned - base), in float32, rounded once. What is no floating point number is
            the finetuned one from 0.5 on; new tensors always are.
        out: where the copy goes; for paths only.
        verify: hold the file against its SHA-256, each tensor against the hash of the base, and what would come out
            against the hash of the result. Without it a wrong base is noticed by its shapes only.
        progress: told how far it is, for paths.

    Returns:
        What takes it back: `apply(model, that)`, or `revert(model)` for a module. For paths the patch itself.

    Raises:
        DeltaError: if the patch is damaged, was made on another base, or does not fit. Not one weight is changed then.
    """
    if not math.isfinite(strength):
        raise DeltaError(f"strength must be a number, 1 for the finetuned model and 0 for the base; got {strength}")
    if is_path(model):
        from nanoadam.delta.folders import apply_to_files

        if out is None:
            raise DeltaError(f"{model} is copied, not changed: say with out=... where the finetuned model goes")
        return apply_to_files(model, patch, out, strength, verify=verify, progress=progress)
    if out is not None:
        raise DeltaError("out is for saved models: a model in memory is changed in place")
    patch = as_patch(patch, verify=verify)
    undo = _Apply(model, patch, strength, verify).run()
    if isinstance(model, nn.Module) and (undo.entries or undo.removed):
        _undone.setdefault(model, []).append(undo)
    return undo


def revert(model: nn.Module, *, verify: bool = True) -> None:
    """Take back the patch that was applied to a module last: every weight has the bits that it had before.

    Raises:
        DeltaError: if there is none, or if the weights have been changed since (by training, for one).
    """
    stack = _undone.get(model)
    if not stack:
        raise DeltaError(
            "there is no patch to take back: revert is for modules that apply() was called on in this process. "
            "For state dicts, apply what apply() gave back"
        )
    _take_back(model, stack[-1], verify)


@torch.no_grad()
def _take_back(model: nn.Module, undo: Patch, verify: bool) -> None:
    _Apply(model, undo, 1.0, verify).run()
    stack = _undone.get(model, [])
    stack[:] = [other for other in stack if other is not undo]


@contextlib.contextmanager
def applied(
    model: _Module, patch: Patch | str | os.PathLike[str], strength: float = 1.0, *, verify: bool = True
) -> Iterator[_Module]:
    """The finetuned model within a `with`, what it was before again afterwards.

    Raises:
        DeltaError: as `apply` and `revert`.
    """
    undo = apply(model, patch, strength, verify=verify)
    try:
        yield model
    finally:
        _take_back(model, undo, verify)


@dataclass
class _Change:
    """An entry and what it found in the model."""

    entry: Entry
    name: str  # in the model
    weight: Tensor | None  # None: the model has no such tensor
    hash: int | None = None
    values: Tensor | None = None  # what will be written
    undo: Entry | None = None
    job: Job | None = None


class _Apply:
    """One application: `run` looks at everything, then writes everything."""

    def __init__(self, model: Any, patch: Patch, strength: float, verify: bool) -> None:
        self.model, self.patch, self.strength, self.verify = model, patch, strength, verify
        self.tensors = tensors_of(model)

    def run(self) -> Patch:
        devices = {self.tensors.tensor(name).device for name in self.tensors.names()}
        if len(devices) == 1:
            self.patch = self.patch.to(devices.pop())  # of a file: read and sent in one piece
        changes = [self._find(entry) for entry in self.patch.values()]
        self._hash(changes)
        changes = [change for change in changes if not self._is_done(change)]
        self._inspect([change for change in changes if change.entry.kind in ("sparse", "columns")])
        for change in changes:
            if change.entry.kind == "dense":
                self._look_at_dense(change)
            elif change.entry.kind == "new":
                self._look_at_new(change)
        removed = self._removed()
        undo = {change.undo.name: change.undo for change in changes if change.undo is not None}
        undo |= {name: self._kept(name) for name in removed}
        added = tuple(change.name for change in changes if change.undo is None)
        self._write(changes, removed)
        return Patch(undo, base=self.patch.base, removed=added)

    # Looking

    def _find(self, entry: Entry) -> _Change:
        prefix = self.patch.prefix
        name = self.tensors.find(entry.name, *entry.tied, entry.name.removeprefix(prefix))
        weight = None if name is None else self.tensors.tensor(name)
        if entry.kind != "new":
            check_form(entry, None if name is None else self.tensors.form(name), self.tensors.label)
        return _Change(entry, entry.name if name is None else name, weight)

    def _hash(self, changes: Sequence[_Change]) -> None:
        if not self.verify:
            return
        known = [change for change in changes if change.weight is not None and _same_form(change)]
        hashes = ops.hash_all([change.weight for change in known if change.weight is not None])
        for change, value in zip(known, hashes, strict=True):
            change.hash = value
        refuse_wrong([(change.entry, change.hash) for change in known], self.patch.base, self.tensors.label)

    def _is_done(self, change: _Change) -> bool:
        done = change.hash is not None and change.hash == change.entry.result
        if done and self.strength != 1 and change.entry.kind != "new":
            raise DeltaError(
                f"{change.name} is the finetuned one already: go back to the base before you apply the patch at "
                f"strength {self.strength:g}"
            )
        return done or (self.strength == 0 and change.entry.kind != "new")

    def _inspect(self, changes: Sequence[_Change]) -> None:
        for change in changes:
            assert change.weight is not None
            change.job = Job(change.entry.to(change.weight.device), change.weight)
            check_values(change.job.entry)
        jobs = [change.job for change in changes if change.job is not None]
        for change, job, found in zip(changes, jobs, ops.inspect(jobs), strict=True):
            entry = job.entry
            check_result(entry, change.hash, found.change)
            change.values, result = entry.values, entry.result
            if self.strength != 1:
                change.values, result = between(found.old, entry.values, self.strength), None
                if change.hash is not None:
                    job.entry = entry.with_values(change.values, base=None, result=None)
                    result = (change.hash + ops.inspect([job])[0].change) % 2**64
            change.undo = replace(entry, name=change.name).with_values(found.old, base=result, result=change.hash)

    def _look_at_dense(self, change: _Change) -> None:
        weight = change.weight
        assert weight is not None
        entry = change.entry.to(weight.device)
        check_values(entry)
        if self.verify:
            check_whole(entry)
        old = weight.clone(memory_format=torch.contiguous_format)
        change.values, result = entry.values, entry.result
        if self.strength != 1:
            change.values = between(old, entry.values, self.strength)
            result = ops.hash_all([change.values])[0] if self.verify else None
        change.undo = replace(entry, name=change.name).with_values(old, base=result, result=change.hash)

    def _look_at_new(self, change: _Change) -> None:
        entry, weight = change.entry, change.weight
        device = torch.device("cpu") if weight is None else weight.device
        entry = entry.to(device)
        check_values(entry)
        if self.verify:
            check_whole(entry)
        change.values = entry.values.clone()
        if weight is not None:
            change.undo = whole(change.name, weight, "new")
        if isinstance(self.model, nn.Module):
            _check_place(self.model, change.name, weight, entry)

    def _removed(self) -> list[str]:
        """What the finetuned model does not have; a module keeps it, since it cannot do without."""
        if isinstance(self.model, nn.Module):
            return []
        return [name for name in self.patch.removed if self.tensors.find(name) is not None]

    def _kept(self, name: str) -> Entry:
        return replace(whole(name, self.tensors.tensor(name), "new"), tied=self.tensors.tied.get(name, ()))

    # Writing: nothing in here can refuse

    def _write(self, changes: Sequence[_Change], removed: Sequence[str]) -> None:
        jobs = [change for change in changes if change.job is not None]
        ops.write(
            [change.job for change in jobs if change.job is not None],
            [change.values for change in jobs if change.values is not None],
        )
        for change in changes:
            assert change.values is not None
            if change.job is not None:
                continue
            if change.weight is not None and _same_form(change):
                bits(change.weight).copy_(bits(change.values.view(change.weight.shape)))
            elif isinstance(self.model, nn.Module):
                _replace_tensor(self.model, change.name, change.values)
            else:
                others = change.entry.tied if change.weight is None else self.tensors.tied.get(change.name, ())
                names = (change.name, *others)
                self.model.update(dict.fromkeys(names, change.values))
        if isinstance(self.model, MutableMapping):
            for name in removed:
                for each in (name, *self.tensors.tied.get(name, ())):
                    self.model.pop(each, None)


def _same_form(change: _Change) -> bool:
    weight, entry = change.weight, change.entry
    return weight is not None and weight.dtype == entry.dtype and tuple(weight.shape) == entry.shape


# What is checked, here and for files


def check_form(entry: Entry, form: tuple[torch.dtype, tuple[int, ...]] | None, label: str) -> None:
    """Refuse a tensor that is missing, or of another dtype or shape.

    Raises:
        DeltaError: naming both.
    """
    if form is None:
        raise DeltaError(f"{label} has no tensor {entry.name!r}: the patch was made for another model")
    dtype, shape = form
    if shape != entry.shape:
        raise DeltaError(
            f"{entry.name} has shape {list(shape)} in {label} and {list(entry.shape)} in the patch: it was made for "
            "another model"
        )
    if dtype != entry.dtype:
        own, wanted = (str(each).removeprefix("torch.") for each in (dtype, entry.dtype))
        raise DeltaError(
            f"{entry.name} is {own} in {label} and {wanted} in the patch: load the model with dtype=torch.{wanted}"
        )


def refuse_wrong(found: Sequence[tuple[Entry, int | None]], base: str, label: str) -> None:
    """Refuse tensors that are neither the base's nor the finetuned ones.

    Raises:
        DeltaError: naming the first, and how many there are.
    """
    wrong = [
        (entry, value)
        for entry, value in found
        if entry.kind != "new" and entry.base is not None and value not in (None, entry.base, entry.result)
    ]
    if wrong:
        entry, value = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        named = f", {base}" if base else ""
        raise DeltaError(
            f"{entry.name}{more} in {label} is neither what the patch was made on nor what it makes: hash "
            f"{as_hex(value or 0)}, expected {as_hex(entry.base or 0)}. Apply it to its base{named}"
        )


def check_result(entry: Entry, before: int | None, change: int) -> None:
    """Refuse a patch that would make something else than it says.

    Raises:
        DeltaError: naming the tensor.
    """
    if before is not None and entry.result is not None and (before + change) % 2**64 != entry.result:
        raise _other_result(entry)


def check_whole(entry: Entry) -> None:
    """The same for an entry that holds a whole tensor.

    Raises:
        DeltaError: naming the tensor.
    """
    if entry.result is not None and ops.hash_all([entry.values])[0] != entry.result:
        raise _other_result(entry)


def _other_result(entry: Entry) -> DeltaError:
    return DeltaError(
        f"{entry.name}: what the patch holds does not make the tensor that it announces: it is damaged, get it again"
    )


def between(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """Base + strength * (tuned - base), in float32 (float64 for that), rounded once; `tuned` from 0.5 on for others."""
    if not base.dtype.is_floating_point:
        return tuned if strength >= 0.5 else base
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = base.to(wide)
    moved = torch.add(start, tuned.to(wide) - start, alpha=strength).to(base.dtype)
    same = bits(base) == bits(tuned)  # infinity minus infinity
    return torch.where(same, bits(base), bits(moved)).view(base.dtype)


# A module's tensors of another form


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


_SIZES: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    nn.Linear: {"weight": ("out_features", "in_features"), "bias": ("out_features",)},
    nn.Embedding: {"weight": ("num_embeddings", "embedding_dim")},
}
"""Modules that can take weights of another shape, and where they keep their sizes."""


def _check_place(model: nn.Module, name: str, weight: Tensor | None, entry: Entry) -> None:
    if weight is None:
        raise DeltaError(f"the model has no place for {name!r}: make it from the configuration of the finetuned model")
    owner, own = _owner(model, name)
    sizes = next((sizes for kind, sizes in _SIZES.items() if isinstance(owner, kind)), {})
    if tuple(weight.shape) != entry.shape and len(sizes.get(own, ())) != len(entry.shape):
        raise DeltaError(
            f"{name} has shape {list(weight.shape)} in the model and {list(entry.shape)} in the patch, and a "
            f"{type(owner).__name__} cannot change: make the model from the configuration of the finetuned one"
        )


def _replace_tensor(model: nn.Module, name: str, values: Tensor) -> None:
    owner, own = _owner(model, name)
    if own in owner._parameters:
        owner.get_parameter(own).data = values
    else:
        owner._buffers[own] = values
    for kind, sizes in _SIZES.items():
        if isinstance(owner, kind):
            for size, given in zip(sizes.get(own, ()), values.shape, strict=False):
                setattr(owner, size, given)
