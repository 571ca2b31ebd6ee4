"""A refresh of the selection: whether it is due, the new one, and gradients that are kept over it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoadam.gradients import Box, SelectedGradient
from nanoadam.gradients.tensor import Accumulator
from nanoadam.ops import Rule, Selection, Slot, backend
from nanoadam.ops.rounding import seed_key
from nanoadam.slots import by_column, by_device, density_at, layout_of


def is_due(group: Mapping[str, Any]) -> bool:
    """Whether the coming step of a group makes its selection anew."""
    t = group["steps"]
    if group["refreshed_at"] in (-1, t) or density_at(group, t) != group["active_density"]:
        return True
    return bool(t % group["mask_interval"] == 0)


def select(slots: Iterable[Slot], group: Mapping[str, Any]) -> None:
    """New selections, by the group's criterion or, where that is None, by the one of each granularity."""
    slots = list(slots)
    if group["criterion"] is None:
        for criterion, whole in (("smallest", False), ("largest", True)):
            some = [slot for slot in slots if by_column(slot.weight, group) is whole]
            select(some, {**group, "criterion": criterion})
        return
    rule = Rule(
        criterion=group["criterion"],
        keep_zeros=group["keep_zeros"],
        carry=group["moments"] == "carry",
        key=seed_key(group["seed"]),
        step=group["steps"],
        in_place=group["capturable"],
    )
    for slot in slots:
        slot.unselected = slot.overdue = False
        slot.version += 1
    for device, members, _ in by_device(slots, choosing=True):
        gradients = None
        if rule.criterion == "gradient":
            gradients = [as_dense(slot.gradient) for slot in members if slot.gradient is not None]
        layouts = [layout_of(slot.parameter, group, density_at(group, rule.step)) for slot in members]
        backend(device).select(members, layouts, rule, gradients)
        for slot in members:
            if slot.served is not None:
                slot.served.renew()


@contextlib.contextmanager
def on_their_stream(slots: Sequence[Slot], streams: Mapping[torch.device, torch.cuda.Stream]) -> Iterator[None]:
    """Select from sharded parameters on the stream that step() was called on.

    FSDP2 hands gradients over on a stream of its own; state that is freed there would be written over too early.
    """
    device = next((slot.weight.device for slot in slots if slot.part is not None), torch.device("cpu"))
    if device.type != "cuda":
        yield
        return
    now = torch.cuda.current_stream(device)
    home = streams.get(device, torch.cuda.default_stream(device))
    home.wait_stream(now)
    with torch.cuda.stream(home):
        yield
    now.wait_stream(home)


def kept(slot: Slot, group: Mapping[str, Any]) -> tuple[Box, Box] | None:
    """A gradient that the optimizer has put into `p.grad`, and where its entries are before a refresh."""
    gradient = slot.gradient
    if type(gradient) is not SelectedGradient or gradient._box.slot is not slot:
        return None
    box = gradient._box
    if box.zeroed or not group["capturable"]:
        return box, box
    return box, Box(Selection(box.selection.index.clone(), box.selection.layout), box.values)


def keep(slot: Slot, box: Box, before: Box, accumulator: Accumulator) -> None:
    """A gradient that was kept over a refresh: what it has for weights that stay. Newcomers have none."""
    assert slot.selection is not None
    if box.zeroed:
        box.place(slot.selection, None)
    elif before is not box:  # a graph goes on writing to these addresses
        assert box.stored is not None
        box.place(slot.selection, box.stored.copy_(before.moved_to(slot.selection)))
    else:
        box = Box(slot.selection, box.moved_to(slot.selection), slot=slot, accumulator=accumulator)
        slot.gradient = SelectedGradient(box, slot.weight)


def as_dense(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor."""
    return gradient.to_dense() if isinstance(gradient, SelectedGradient) else gradient
