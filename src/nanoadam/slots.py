"""A tensor's slot: made with empty state, emptied again, and taken along when its weight moves to another device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoadam.chunks import AnyLayout, ColumnLayout, Layout, column_layout, keep_count, layout
from nanoadam.ops import Selection, Slot
from nanoadam.schedules import Schedule
from nanoadam.shards import local, part_of

_NOTHING = Layout(lines=1, line=0, chunk=1, keep=0, keep_tail=0)
"""Of a sharded tensor of which nothing lies on this process."""


def by_device(
    slots: Sequence[Slot], beside: Sequence[Any] = (), *, choosing: bool = False
) -> Iterable[tuple[torch.device, Sequence[Slot], Sequence[Any]]]:
    """Slots of each device, in their order, with their state on it, and what belongs to each of them.

    Sharded tensors of which nothing lies on this process are left out; but all processes that share its columns
    choose from them together (`choosing`).
    """
    if slots and _all_lie_on(home := slots[0].weight.device, slots):
        return [(home, slots, beside)]
    empty = [slot.part is not None and 0 in slot.part.shape for slot in slots]
    if any(empty):
        here = [
            i
            for i, (slot, nothing) in enumerate(zip(slots, empty, strict=True))
            if not nothing or (choosing and (slot.selection is None or isinstance(slot.layout, ColumnLayout)))
        ]
        slots, beside = [slots[i] for i in here], [beside[i] for i in here] if beside else beside
    devices = [slot.weight.device for slot in slots]
    for slot, device in zip(slots, devices, strict=True):
        if slot.state["exp_avg"].device != device:
            _follow(slot, device)
    kinds = set(devices)
    if len(kinds) < 2:
        return [(device, slots, beside) for device in kinds]
    parts = []
    for device in dict.fromkeys(devices):
        mine = [i for i, its in enumerate(devices) if its == device]
        parts.append((device, [slots[i] for i in mine], [beside[i] for i in mine] if beside else beside))
    return parts


def _all_lie_on(device: torch.device, slots: Sequence[Slot]) -> bool:
    """Whether all of them lie on this device, and whole on this process. Each step asks: a loop is the quickest."""
    for slot in slots:
        if slot.part is not None or slot.parameter.device != device or slot.state["exp_avg"].device != device:
            return False
    return True


def _follow(slot: Slot, device: torch.device) -> None:
    """The weight has moved since the optimizer was made (`model.to(device)`): so does what belongs to it."""
    for name, value in slot.state.items():
        if name != "step" or value.device.type != "cpu":
            slot.state[name] = value.to(device)
    if slot.selection is not None:
        slot.selection = Selection(slot.state["index"], slot.selection.layout)
    slot.version += 1
    slot.cache.clear()  # addresses on the old device


def empty(slot: Slot, group: Mapping[str, Any]) -> None:
    """Nothing selected, at the present density, and no moments."""
    lay = layout_of(slot.parameter, group, group["active_density"])
    device, dtype = slot.weight.device, group["state_dtype"]
    state = {name: torch.zeros(lay.shape, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}
    numbers = torch.int32 if isinstance(lay, ColumnLayout) else torch.int16
    state["index"] = torch.full((lay.places,), -1, dtype=numbers, device=device)
    own_ages = lay.places if group["moments"] == "carry" else 1
    state["entry_step"] = torch.zeros(own_ages, dtype=torch.int16, device=device)
    slot.take(state, lay, in_place=False)
    slot.unselected = True
    slot.version += 1


def is_dense(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter gets ordinary AdamW."""
    return bool(group["dense"]) or parameter.dim() < 2


def by_column(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a tensor of a group is selected from by whole columns: where it has two dimensions."""
    return bool(group["granularity"] == "column") and parameter.dim() == 2


def layout_of(parameter: Tensor, group: Mapping[str, Any], density: float) -> AnyLayout:
    """How a tensor of a group is selected from at some density.

    Of a sharded tensor, what lies on this process: its chunks are those of the full tensor where shards end between
    chunks; its columns are those of the full tensor, a part of each.
    """
    shape = local(parameter).shape
    if by_column(parameter, group):
        if 0 in shape:
            return ColumnLayout(0, shape[1], keep_count(shape[1], density), group["transposed"])
        return column_layout(shape, density, transposed=group["transposed"])
    return _NOTHING if 0 in shape else layout(shape, density)


def density_at(group: Mapping[str, Any], step: int) -> float:
    """The density that a group has at a step."""
    density = group["density"]
    return density(step) if isinstance(density, Schedule) else float(density)


def saved_layout(parameter: Tensor, group: Mapping[str, Any]) -> AnyLayout | None:
    """The layout that a parameter's state has; None for a dense one."""
    return None if is_dense(parameter, group) else layout_of(parameter, group, group["active_density"])


def make_slot(parameter: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], ordinal: int, name: str) -> Slot:
    """A parameter's slot, with empty state unless it has some."""
    slot = Slot(parameter, state, ordinal, name=name, part=part_of(parameter, name))
    lay = saved_layout(parameter, group)
    if not state:
        device, dtype = parameter.device, group["state_dtype"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=device if group["capturable"] else "cpu")
        if lay is None:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(local(parameter), dtype=dtype, memory_format=torch.preserve_format)
        else:
            empty(slot, group)
    elif lay is not None:
        slot.selection = Selection(state["index"], lay)
    slot.steps = int(state["step"].item())
    if lay is not None:
        # It may never have been selected from: no gradient at a refresh that goes by gradients.
        slot.unselected = bool((state["index"] < 0).all())
    return slot
