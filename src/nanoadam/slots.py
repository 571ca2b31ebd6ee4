"""A tensor's slot: made with empty state, emptied again, and taken along when its weight moves to another device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanoadam.chunks import layout
from nanoadam.ops import Slot


def by_device(slots: Iterable[Slot]) -> Iterable[tuple[torch.device, list[Slot]]]:
    """Slots of each device, in their order, with their state on it."""
    slots = list(slots)
    devices = [slot.weight.device for slot in slots]
    for slot, device in zip(slots, devices, strict=True):
        if slot.state["exp_avg"].device != device:
            _follow(slot, device)
    return [
        (device, [slot for slot, its in zip(slots, devices, strict=True) if its == device])
        for device in dict.fromkeys(devices)
    ]


def _follow(slot: Slot, device: torch.device) -> None:
    """The weight has moved since the optimizer was made (`model.to(device)`): so does what belongs to it."""
    for name, value in slot.state.items():
        if name != "step" or value.device.type != "cpu":
            slot.state[name] = value.to(device)
    slot.held = None if slot.held is None else slot.held.to(device)
    slot.version += 1
    slot.cache.clear()  # addresses on the old device


def empty(slot: Slot, group: Mapping[str, Any]) -> None:
    """Nothing selected, at the present density, and no moments."""
    slot.layout = layout(slot.weight.shape, group["active_density"])
    device, dtype, count = slot.weight.device, group["state_dtype"], slot.layout.selected
    slot.state["exp_avg"] = torch.zeros(count, dtype=dtype, device=device)
    slot.state["exp_avg_sq"] = torch.zeros(count, dtype=dtype, device=device)
    slot.state["index"] = torch.full((count,), -1, dtype=torch.int16, device=device)
    own_ages = count if group["moments"] == "carry" else 1
    slot.state["born"] = torch.zeros(own_ages, dtype=torch.int16, device=device)
    slot.held, slot.fresh = None, True
    slot.version += 1


def make_slot(parameter: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], ordinal: int, name: str) -> Slot:
    """A parameter's slot, with empty state unless it has some."""
    slot = Slot(parameter, state, ordinal, name=name)
    if not group["dense"] and parameter.dim() >= 2:
        slot.layout = layout(parameter.shape, group["active_density"])
    if not state:
        device, dtype = parameter.device, group["state_dtype"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=device if group["capturable"] else "cpu")
        if slot.layout is None:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        else:
            empty(slot, group)
    slot.steps = int(state["step"].item())
    if slot.layout is not None:
        # It may never have been selected from: no gradient at a refresh that goes by gradients.
        slot.fresh = bool((state["index"] < 0).all())
    return slot
