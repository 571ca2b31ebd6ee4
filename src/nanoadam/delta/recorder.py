"""Recorder: the patch of each step, or of many, from what the optimizer has selected, without a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanoadam.chunks import ColumnLayout, Layout
from nanoadam.delta import ops
from nanoadam.delta.bits import extent, offsets
from nanoadam.delta.diffing import versions
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.patch import Patch
from nanoadam.delta.sources import Memory, tensors_of
from nanoadam.ops import Selection
from nanoadam.optimizer import NanoAdam


class Recorder:
    """Yields the patch from the last call to this one: whatever the optimizer may have moved, and nothing else.

    It keeps a hash of each tensor, and of weights that were selected before a refresh where they lie (2 bytes each, at
    most one bit for every weight of the tensor): no copy of the base. Patches applied one after the other make the
    trainer's weights, bit for bit.

    What may move: weights that were selected in a step since the last call; dense tensors and buffers, which are
    held whole where their hash has changed. What others do to selected weights (loading a checkpoint, averaging) is
    not seen by it: call `reseed` afterwards.

    Args:
        model: the model that is trained.
        optimizer: its NanoAdam.
        base: the name of the base model, for people.
        verify: hash every tensor that is sent, before and after, so that whoever applies the patch notices a wrong
            base. Without it dense tensors and buffers are sent at every call.

    Raises:
        DeltaError: if the optimizer is no NanoAdam, or holds parameters that are not the model's.
    """

    def __init__(self, model: nn.Module, optimizer: Any, *, base: str = "", verify: bool = True) -> None:
        if not isinstance(optimizer, NanoAdam):
            raise DeltaError(
                f"a Recorder goes by what NanoAdam has selected, got {type(optimizer).__name__}: use delta.diff"
            )
        self.model, self.optimizer, self.base, self.verify = model, optimizer, base, verify
        self._touched: dict[Tensor, _Touched] = {}
        self._columns: dict[Tensor, Tensor] = {}  # of replaced selections: bool [columns]
        self._trained: set[Tensor] = set()
        self._steps: list[int] = []
        self._hashes: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._handles = [
            optimizer.register_selection_pre_hook(lambda _, parameters: self._note(parameters)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self.reseed()),
        ]
        self._check()
        self._forget()
        if verify:
            tensors = self._tensors()
            moving = self._sort(tensors)
            names = [*moving.selected, *moving.whole]
            self._hashes = dict(zip(names, ops.hash_all([tensors.tensor(name) for name in names]), strict=True))

    def close(self) -> None:
        """Stop watching the optimizer."""
        for handle in self._handles:
            handle.remove()

    def reseed(self) -> None:
        """Have the next patch hold every tensor whole, whatever its receiver has.

        For weights that were changed by others than the optimizer, and for receivers that have missed a patch.
        """
        self._unknown = set(self._tensors().names())

    @torch.no_grad()
    def patch(self, *, reset: bool = True, copy: bool = True) -> Patch:
        """What has moved since the last call, on the model's devices.

        Args:
            reset: begin anew. Without it the next patch starts where this one did.
            copy: tensors that are held whole are copied. Without it they are the model's own, good until its next
                step.

        Raises:
            DeltaError: if the model holds something that is not served.
        """
        tensors = self._tensors()
        moving = self._sort(tensors)
        moved = self._moved()
        touched = [n for n, p in moving.selected.items() if p in moved or p in self._touched or p in self._columns]
        sent = [*touched, *moving.whole, *sorted(self._unknown - set(touched) - set(moving.whole))]
        hashing = ops.hash_later([tensors.tensor(name) for name in sent]) if self.verify else None
        places = self._places({name: moving.selected[name] for name in touched})  # while the device hashes
        found: Sequence[int | None] = [None] * len(sent) if hashing is None else hashing()
        hashes = dict(zip(sent, found, strict=True))
        entries = {}
        for name in sent:
            before, after = self._hashes.get(name), hashes[name]
            if after is not None and before == after and name not in self._unknown:
                continue
            given = places.get(name) if name not in self._unknown else None
            base = None if name in self._unknown else before
            entries[name] = _entry(name, tensors, given, base, after, copy)
        if reset:
            self._forget()
            self._hashes |= {name: value for name, value in hashes.items() if value is not None}
            self._unknown = set()
        return Patch(entries, base=self.base, notes=versions())

    # What may have moved

    def _tensors(self) -> Memory:
        tensors = tensors_of(self.model)
        assert isinstance(tensors, Memory)
        return tensors

    def _check(self) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        strange = [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in own]
        if strange:
            raise DeltaError(
                f"the optimizer holds a parameter of shape {list(strange[0].shape)} that is not the model's: give the "
                "Recorder the model that is trained"
            )

    def _sort(self, tensors: Memory) -> _Moving:
        """The tensors of the model by how they may have moved; what is frozen has not, unless it was trained before."""
        moving = _Moving()
        for name in tensors.names():
            tensor = tensors.own(name)
            if isinstance(tensor, nn.Parameter) and not (tensor.requires_grad or tensor in self._trained):
                continue
            if "index" in self.optimizer.state.get(tensor, {}):
                moving.selected[name] = tensor
            else:
                moving.whole.append(name)
        return moving

    def _after_step(self) -> None:
        """Note what was trained, in case it is frozen before the next call."""
        self._trained.update(p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad)

    def _forget(self) -> None:
        self._touched.clear()
        self._columns.clear()
        self._trained.clear()
        self._steps = [group["steps"] for group in self.optimizer.param_groups]

    def _has_moved(self, i: int) -> bool:
        """Whether a step has been made since the last call, by group; replays of a captured step do not count."""
        group = self.optimizer.param_groups[i]
        return i >= len(self._steps) or group["steps"] != self._steps[i] or bool(group["capturable"])

    def _moved(self) -> dict[Tensor, Selection]:
        """The present selections of what steps have moved since the last call."""
        found: dict[Tensor, Selection] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"] if self._has_moved(i) else ():
                selection = self.optimizer.selection(parameter)
                if selection is not None:
                    found[parameter] = selection
        return found

    def _note(self, parameters: Sequence[Tensor]) -> None:
        """Keep the selections of parameters that are about to be replaced."""
        moved = self._moved()
        for parameter in parameters:
            old = moved.get(parameter)
            if old is not None and isinstance(old.layout, ColumnLayout):
                self._columns[parameter] = self._marked(parameter, old)
            elif old is not None:
                kept = Selection(old.index.clone(), old.layout)
                self._touched.setdefault(parameter, _Touched()).add(kept, parameter.detach())

    def _marked(self, parameter: Tensor, selection: Selection | None) -> Tensor:
        """The columns that were selected before, and these: bool [columns]."""
        marks = self._columns.get(parameter)
        if selection is None:
            assert marks is not None
            return marks
        lay = selection.layout
        assert isinstance(lay, ColumnLayout)
        if marks is None:
            marks = torch.zeros(lay.columns, dtype=torch.bool, device=parameter.device)
        found = torch.zeros(lay.columns + 1, dtype=torch.bool, device=parameter.device)  # the last for empty places
        return marks.to(parameter.device) | found.index_fill_(0, selection.index.long() % (lay.columns + 1), True)[:-1]

    def _places(self, selected: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What may have moved, as parts of entries, by name."""
        moved = self._moved()
        found: dict[str, dict[str, Tensor]] = {}
        alone: dict[torch.device, dict[str, Selection]] = {}
        columns: dict[str, Tensor] = {}
        for name, parameter in selected.items():
            weight, present = parameter.detach(), moved.get(parameter)
            if parameter in self._columns or (present is not None and isinstance(present.layout, ColumnLayout)):
                columns[name] = self._marked(parameter, present)
            elif parameter in self._touched:
                positions = self._touched[parameter].positions(weight, present)
                values = extent(weight)[offsets(positions.to(torch.int64), weight)].view(weight.dtype)
                found[name] = {"positions": positions, "values": values}
            elif present is not None:
                alone.setdefault(weight.device, {})[name] = present
        for device, mine in alone.items():
            weights = [selected[name].detach() for name in mine]
            indices, layouts = [each.index for each in mine.values()], [each.layout for each in mine.values()]
            collected = ops.backend(device).collect(weights, indices, cast(list[Layout], layouts))
            found |= {name: {"positions": p, "values": v} for name, (p, v) in zip(mine, collected, strict=True)}
        for name, marked in _numbers(columns).items():
            present = self.optimizer.selection(selected[name])
            assert present is not None
            assert isinstance(present.layout, ColumnLayout)
            transposed = present.layout.transposed
            found[name] = _column_parts(selected[name].detach(), marked, transposed)
        return {name: found[name] for name in selected if name in found}


def _numbers(marks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which are marked: int32, ascending, by name. The host waits once a device."""
    found: dict[str, Tensor] = {}
    for device in {each.device for each in marks.values()}:
        names = [name for name, each in marks.items() if each.device == device]
        joined = torch.cat([torch.arange(marks[name].numel(), dtype=torch.int32, device=device) for name in names])
        counts = torch.stack([marks[name].sum() for name in names]).tolist()
        chosen = joined[torch.cat([marks[name] for name in names])]
        found |= dict(zip(names, chosen.split(counts), strict=True))
    return found


def _column_parts(weight: Tensor, chosen: Tensor, transposed: bool) -> dict[str, Tensor]:
    """Parts of an entry for whole columns, which are rows of a weight that is kept transposed."""
    if not transposed:
        return {"columns": chosen, "values": weight.reshape(-1, weight.shape[-1]).index_select(1, chosen)}
    width = weight.shape[1]
    positions = chosen.long()[:, None] * width + torch.arange(width, device=weight.device)
    small = weight.numel() < 2**31
    values = weight.index_select(0, chosen).view(-1)
    return {"positions": positions.view(-1).to(torch.int32 if small else torch.int64), "values": values}


@dataclass
class _Moving:
    selected: dict[str, Tensor] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)


@dataclass
class _Touched:
    """Selections of a tensor that were replaced: as they were while they are few, as one bit a weight when many."""

    selections: list[Selection] = field(default_factory=list)
    mask: Tensor | None = None  # uint8 [ceil(numel / 8)]

    def add(self, selection: Selection, weight: Tensor) -> None:
        """Note one more."""
        self.selections.append(selection)
        if sum(kept.index.nbytes for kept in self.selections) > weight.numel() // 8:
            self.mask, self.selections = _pack(self._marks(weight)), []

    def _marks(self, weight: Tensor, *more: Selection) -> Tensor:
        """Bool [numel]."""
        numel = weight.numel()
        marks = torch.zeros(numel, dtype=torch.bool, device=weight.device)
        if self.mask is not None:
            marks = _unpack(self.mask.to(weight.device), numel)
        own = ops.backend(weight.device)
        for each in (*self.selections, *more):
            assert isinstance(each.layout, Layout)
            ((positions, _),) = own.collect([weight], [each.index.to(weight.device)], [each.layout])
            marks[positions.to(torch.int64)] = True
        return marks

    def positions(self, weight: Tensor, present: Selection | None) -> Tensor:
        """All of them and the present one, ascending: int32 where they fit."""
        found = self._marks(weight, *([] if present is None else [present])).nonzero().view(-1)
        return found.to(torch.int32) if weight.numel() < 2**31 else found


def _pack(marks: Tensor) -> Tensor:
    whole = torch.nn.functional.pad(marks.view(torch.uint8), (0, -marks.numel() % 8)).view(-1, 8)
    return (whole << torch.arange(8, dtype=torch.uint8, device=marks.device)).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, numel: int) -> Tensor:
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(torch.bool).view(-1)[:numel].contiguous()


def _entry(
    name: str, tensors: Memory, parts: dict[str, Tensor] | None, before: int | None, after: int | None, copy: bool
) -> Entry:
    """What a tensor has become. Positions stay as they are: they are coded when the patch is saved."""
    tensor = tensors.tensor(name)
    common: dict[str, Any] = {"base": before, "result": after, "tied": tensors.tied.get(name, ())}
    form = (tensor.dtype, tuple(tensor.shape))
    if parts is not None:
        count = parts["values"].numel()
        kind, per_weight = ("columns", 0.0) if "columns" in parts else ("sparse", 1.1)
        if count * (tensor.element_size() + per_weight) < tensor.nbytes:
            return Entry(name, kind, *form, parts, count, **common)
    values = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor.contiguous()
    return Entry(name, "dense", *form, {"values": values}, values.numel(), **common)
