"""The selected entries of gradients: of those that have gathered in backward, and of whatever `p.grad` is in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanoadam.gradients.tensor import Box, SelectedGradient
from nanoadam.ops import Slot, backend
from nanoadam.slots import by_device


def compact(boxes: Sequence[Box]) -> None:
    """Take the selected entries of gradients that have gathered in backward."""
    ours: list[tuple[Slot, Box]] = []
    for box in boxes:
        if box.slot is not None and box.selection is box.slot.selection:
            ours.append((box.slot, box))
        else:  # kept over a refresh
            box.compact()
    for device, members, mine in by_device([slot for slot, _ in ours], [box for _, box in ours]):
        dense, add = [box.pending for box in mine], [box.stored is not None for box in mine]
        entries = [box.room() for box in mine]
        backend(device).gather(members, dense, entries, add)
        for box, values in zip(mine, entries, strict=True):
            box.stored, box.pending = values, None


def entries(slots: Sequence[Slot], gradients: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The selected entries of gradients, whatever they are: [selected] each."""
    found: list[Any] = [None] * len(slots)
    dense: list[int] = []
    for i, (slot, gradient) in enumerate(zip(slots, gradients, strict=True)):
        if type(gradient) is SelectedGradient:
            assert slot.selection is not None
            found[i] = gradient._box.moved_to(slot.selection)
        else:
            dense.append(i)
    for device, members, places in by_device([slots[i] for i in dense], dense):
        room = [torch.empty(slot.layout.shape, dtype=dtype, device=device) for slot in members]
        backend(device).gather(members, [gradients[i] for i in places], room, [False] * len(room))
        for i, values in zip(places, room, strict=True):
            found[i] = values
    return found
