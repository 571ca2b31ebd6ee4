"""One patch put on a model in memory: everything is looked at, then everything is written."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.delta import ops
from nanoadam.delta.bits import bits
from nanoadam.delta.checks import between, check_form, check_result, check_whole, refuse_wrong
from nanoadam.delta.diffing import name_key, whole
from nanoadam.delta.entry import Entry, check_values
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.jobs import Job
from nanoadam.delta.patch import Patch
from nanoadam.delta.sources import tensors_of


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


class Application:
    """One application: `run` looks at everything, then writes everything."""

    def __init__(self, model: Any, patch: Patch, strength: float, verify: bool, *, keep: bool = True) -> None:
        self.model, self.patch, self.strength, self.verify, self.keep = model, patch, strength, verify, keep
        self.tensors = tensors_of(model)

    def run(self) -> Patch:
        """Change the model.

        Returns:
            What takes it back; nothing unless that is kept.

        Raises:
            DeltaError: as `apply`; nothing is changed then.
        """
        devices = {self.tensors.tensor(name).device for name in self.tensors.names()}
        if len(devices) == 1:
            self.patch = self.patch.to(devices.pop())  # of a file: read and sent in one piece
        changes = [self._find(entry) for entry in self.patch.values()]
        self._check_apart(changes)
        self._hash(changes)
        changes = [change for change in changes if not self._is_done(change)]
        self._inspect([change for change in changes if change.entry.kind in ("sparse", "columns")])
        self._check_whole([change for change in changes if change.entry.kind in ("dense", "new")])
        for change in changes:
            if change.entry.kind == "dense":
                self._look_at_dense(change)
            elif change.entry.kind == "new":
                self._look_at_new(change)
        removed = self._removed()
        undo = self._undo(changes, removed) if self.keep else Patch({})
        self._write(changes, removed)
        return undo

    def _undo(self, changes: Sequence[_Change], removed: Sequence[str]) -> Patch:
        entries = {change.undo.name: change.undo for change in changes if change.undo is not None}
        entries |= {name: self._kept(name) for name in removed}
        added = tuple(change.name for change in changes if change.undo is None)
        return Patch(entries, base=self.patch.base, removed=added)

    # Looking

    def _find(self, entry: Entry) -> _Change:
        prefix = self.patch.prefix
        name = self.tensors.find(entry.name, *entry.tied, entry.name.removeprefix(prefix))
        weight = None if name is None else self.tensors.tensor(name)
        if entry.kind != "new":
            check_form(entry, None if name is None else self.tensors.form(name), self.tensors.label)
        return _Change(entry, entry.name if name is None else name, weight)

    def _check_apart(self, changes: Sequence[_Change]) -> None:
        """Refuse what would write two tensors into one, or one over itself."""
        untouched = set() if self.patch.untouched is None else set(self.patch.untouched[:, 0].tolist())
        found: dict[str, Entry] = {}
        for change in changes:
            entry, weight = change.entry, change.weight
            if weight is None:
                continue
            other = found.setdefault(change.name, entry)
            names = (change.name, *self.tensors.tied.get(change.name, ()))
            apart = [other.name] if None not in (entry.result, other.result) and entry.result != other.result else []
            if len(names) > 1:
                apart += [each for each in names if name_key(each.removeprefix(self.patch.prefix)) in untouched]
            if apart:
                raise DeltaError(
                    f"{entry.name} is tied in {self.tensors.label} ({', '.join(names)}), but the patch changes it in "
                    f"another way than {apart[0]}: give each a tensor of its own first"
                )
            if any(size > 1 and step == 0 for size, step in zip(weight.shape, weight.stride(), strict=True)):
                raise DeltaError(
                    f"{change.name} in {self.tensors.label} is expanded, so that several of its weights are one: "
                    "give it memory of its own, with .contiguous()"
                )

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
        for change, job, found in zip(changes, jobs, ops.inspect(jobs, hashed=self.verify), strict=True):
            entry = job.entry
            check_result(entry, change.hash, found.change)
            change.values, result = entry.values, entry.result
            if self.strength != 1:
                change.values, result = between(found.old, entry.values, self.strength), None
                job.entry = entry.with_values(change.values, base=None, result=None)
            change.undo = replace(entry, name=change.name).with_values(found.old, base=result, result=change.hash)
        hashed = [change for change in changes if change.hash is not None and self.strength != 1]
        between_jobs = [change.job for change in hashed if change.job is not None]
        for change, found in zip(hashed, ops.inspect(between_jobs, hashed=True), strict=True):
            assert change.undo is not None and change.hash is not None
            change.undo = replace(change.undo, base=(change.hash + found.change) % 2**64)

    def _check_whole(self, changes: Sequence[_Change]) -> None:
        for change in changes:
            device = torch.device("cpu") if change.weight is None else change.weight.device
            change.entry = change.entry.to(device)
            check_values(change.entry)
        if self.verify:
            check_whole([change.entry for change in changes])

    def _look_at_dense(self, change: _Change) -> None:
        entry, weight = change.entry, change.weight
        assert weight is not None
        old = weight.clone(memory_format=torch.contiguous_format) if self.keep else weight
        change.values, result = entry.values, entry.result
        if self.strength != 1:
            change.values = between(old, entry.values, self.strength)
            result = ops.hash_all([change.values])[0] if self.verify else None
        change.undo = replace(entry, name=change.name).with_values(old, base=result, result=change.hash)

    def _look_at_new(self, change: _Change) -> None:
        entry, weight = change.entry, change.weight
        change.values = entry.values.clone() if self.keep else entry.values
        if weight is not None and self.keep:
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
                replace_tensor(self.model, change.name, change.values)
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


def replace_tensor(model: nn.Module, name: str, values: Tensor) -> None:
    """Give a module a tensor of another form, and the sizes that go with it."""
    owner, own = _owner(model, name)
    if own in owner._parameters:
        owner.get_parameter(own).data = values
    else:
        owner._buffers[own] = values
    for kind, sizes in _SIZES.items():
        if isinstance(owner, kind):
            for size, given in zip(sizes.get(own, ()), values.shape, strict=False):
                setattr(owner, size, given)
