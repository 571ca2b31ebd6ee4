"""The operations as Triton kernels: one launch for a list of tensors, no waiting for the device.

Every launch reads a table of addresses and sizes. Tables are rebuilt only when an address changes. What a kernel
cannot address (strides other than contiguous and channels-last) goes through `reference`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.ops import MAX_AGE, Adam, Slot, kernels, reference, tables
from nanoadam.ops.select_triton import select
from nanoadam.ops.tables import (
    TYPES,
    block_rows,
    captured,
    capturing,
    is_aligned,
    on,
    partition,
    signed,
    spatial,
    upload,
)

__all__ = ["gather", "select", "update", "update_dense"]

BLOCK = 1024
"""Selected entries a program updates."""


@functools.lru_cache(maxsize=8)
def _corrections(beta1: float, beta2: float, device: torch.device) -> Tensor:
    """float32 [2, MAX_AGE + 1]: bias corrections by age, computed in float64."""
    age = torch.arange(MAX_AGE + 1, dtype=torch.float64, device=device)
    age[0] = 1  # no weight has this age when it is updated
    return torch.stack([1 / (1 - beta1**age), (1 - beta2**age).sqrt()]).float()


def _row(slot: Slot) -> list[int]:
    """The table's columns that stay the same until the next selection."""
    cached = slot.cache.get("row")
    address, count = slot.weight.data_ptr(), slot.state["step"].data_ptr()
    if cached is not None and cached[0] == (slot.version, address, count):
        row: list[int] = cached[1]
        return row
    state, lay, weight = slot.state, slot.layout, slot.weight
    row = [
        address,
        state["index"].data_ptr(),
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        state["entry_step"].data_ptr(),
        int(state["entry_step"].numel() > 1),
        count,
        slot.ordinal,
        lay.line,
        lay.chunk,
        lay.full,
        lay.keep,
        lay.kept_per_line,
        lay.selected,
        weight.numel() // weight.shape[0],
        spatial(weight),
        0,
        1,
    ]
    slot.cache["row"] = ((slot.version, address, count), row)
    return row


@dataclass
class _Launch:
    """Tensors that one launch serves, by their places in a list, and what they have in common."""

    kind: tuple[Any, ...]
    places: list[int]
    table: Tensor
    block_rows: Tensor
    blocks: int
    numbers: list[int] = field(default_factory=list)
    uploaded: Tensor | None = None

    def addresses(self, numbers: list[int]) -> Tensor:
        """What changes from step to step: int64, on the device; sent only if it has changed."""
        if self.uploaded is None or numbers != self.numbers:
            self.numbers, self.uploaded = numbers, upload(numbers, self.table.device)
        return self.uploaded


def _launches(
    name: str,
    slots: list[Slot],
    signature: list[Any],
    kind: Callable[[int], tuple[Any, ...]],
    row: Callable[[int], list[int]],
) -> list[_Launch]:
    """How a list is launched; worked out anew only when something in `signature` has changed.

    `kind` and `row` take a place in the list. A graph that is captured gets tables of its own: what is uploaded for it
    holds nothing until it is replayed, and what it reads must outlive the next change.
    """
    own = capturing(slots[0].weight.device)
    cached = None if own else slots[0].cache.get(name)
    if cached is not None and cached[0] == signature and cached[1] == slots:
        known: list[_Launch] = cached[2]
        return known
    launches = []
    device = slots[0].weight.device
    for what, places in partition(range(len(slots)), kind):
        rows, blocks, first = [row(place) for place in places], [], 0
        for numbers in rows:
            numbers[kernels.FIRST.value] = first
            blocks.append(triton.cdiv(numbers[kernels.SELECTED.value], BLOCK))
            first += blocks[-1]
        launches.append(_Launch(what, places, upload(rows, device), block_rows(tuple(blocks), device), first))
    if own:
        captured.append(launches)
    else:
        slots[0].cache[name] = (signature, slots, launches)
    return launches


def gather(slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]) -> None:
    members = list(slots)
    signature = [
        (slot.version, spatial(gradient), gradient.dtype, mine.dtype, more)
        for slot, gradient, mine, more in zip(members, gradients, entries, add, strict=True)
    ]

    def kind(place: int) -> tuple[Any, ...]:
        _, strides, gradient_type, entries_type, more = signature[place]
        return min(strides, 2), gradient_type, entries_type, more, gradients[place].numel() >= tables.WIDE_FROM

    def row(place: int) -> list[int]:
        numbers = _row(members[place]).copy()
        numbers[kernels.GRADIENT_SPATIAL.value] = signature[place][1]
        return numbers

    for launch in _launches("gather", members, signature, kind, row):
        strides, gradient_type, entries_type, more, wide = launch.kind
        if strides == 0:
            some = launch.places
            dense, room = [gradients[i] for i in some], [entries[i] for i in some]
            reference.gather([members[i] for i in some], dense, room, [add[i] for i in some])
            continue
        numbers = [each.data_ptr() for i in launch.places for each in (gradients[i], entries[i])]
        with on(launch.table.device):
            kernels.gather[(launch.blocks,)](
                launch.table,
                launch.block_rows,
                launch.addresses(numbers),
                GRADIENT_TYPE=TYPES[gradient_type],
                ENTRIES_TYPE=TYPES[entries_type],
                ADD=more,
                CHANNELS_LAST=strides == 2,
                WIDE=wide,
                BLOCK=BLOCK,
            )


def _scalars(adam: Adam, anything: Tensor) -> dict[str, Any]:
    """Arguments that both updates share; pointers that are not used point to `anything`."""
    device = anything.device
    lr_pointer = adam.lr if isinstance(adam.lr, Tensor) and adam.lr.device == device else None
    corrections = _corrections(adam.beta1, adam.beta2, device)
    if capturing(device):
        captured.append(corrections)  # the cache may let go of it
    scale = adam.grad_scale
    if isinstance(scale, Tensor):
        scale = scale.to(device, non_blocking=True)
    return {
        "corrections": corrections,
        "lr": 0.0 if lr_pointer is not None else float(adam.lr),
        "lr_pointer": anything if lr_pointer is None else lr_pointer,
        "scale_pointer": scale if isinstance(scale, Tensor) else anything,
        "weight_decay": float(adam.weight_decay),
        "weight1": 1 - adam.beta1,
        "beta2": float(adam.beta2),
        "weight2": 1 - adam.beta2,
        "eps": float(adam.eps),
        "key": signed(adam.key),
        "LR_POINTER": lr_pointer is not None,
        "SCALE_POINTER": isinstance(scale, Tensor),
        "STEP_POINTER": adam.capturable,
        "MAXIMIZE": adam.maximize,
        "STOCHASTIC": adam.stochastic_rounding,
        "BLOCK": BLOCK,
    }


def _by_steps(
    slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam
) -> Iterable[tuple[list[Slot], list[Tensor]]]:
    """Slots that have had the same number of updates, which a launch takes from the host unless captured."""
    if adam.capturable or len({slot.steps for slot in slots}) == 1:
        return [(list(slots), list(gradients))]
    parts = partition(zip(slots, gradients, strict=True), lambda pair: pair[0].steps)
    return [([slot for slot, _ in pairs], [gradient for _, gradient in pairs]) for _, pairs in parts]


def update(slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
    for members, gradients in _by_steps(slots, entries, adam):
        signature: list[Any] = [
            (slot.version, slot.weight.data_ptr(), slot.state["exp_avg"].data_ptr(), mine.dtype)
            for slot, mine in zip(members, gradients, strict=True)
        ]
        if adam.capturable:
            signature.extend(slot.state["step"].data_ptr() for slot in members)

        def kind(place: int, members: list[Slot] = members, gradients: list[Tensor] = gradients) -> tuple[Any, ...]:
            weight, state = members[place].weight, members[place].state
            return (
                min(spatial(weight), 2),
                weight.dtype,
                state["exp_avg"].dtype,
                gradients[place].dtype,
                weight.numel() >= tables.WIDE_FROM,
            )

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _row(members[place]).copy()

        for launch in _launches("update", members, signature, kind, row):
            strides, weight_type, state_type, entries_type, wide = launch.kind
            if strides == 0:
                reference.update([members[i] for i in launch.places], [gradients[i] for i in launch.places], adam)
                continue
            with on(launch.table.device):
                kernels.update[(launch.blocks,)](
                    launch.table,
                    launch.block_rows,
                    launch.addresses([gradients[i].data_ptr() for i in launch.places]),
                    step=members[0].steps & 0x7FFFFFFF,
                    WEIGHT_TYPE=TYPES[weight_type],
                    ENTRIES_TYPE=TYPES[entries_type],
                    STATE_TYPE=TYPES[state_type],
                    CHANNELS_LAST=strides == 2,
                    WIDE=wide,
                    **_scalars(adam, launch.table),
                )


def update_dense(slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam) -> None:
    for members, dense in _by_steps(slots, gradients, adam):
        for i, (slot, gradient) in enumerate(zip(members, dense, strict=True)):
            if gradient.stride() != slot.weight.stride():
                dense[i] = torch.empty_like(slot.weight, dtype=gradient.dtype).copy_(gradient)
        pointers = [gradient.data_ptr() for gradient in dense]
        signature: list[Any] = [
            (slot.weight.data_ptr(), slot.state["exp_avg"].data_ptr(), gradient.dtype, pointer % 16)
            for slot, gradient, pointer in zip(members, dense, pointers, strict=True)
        ]
        if adam.capturable:
            signature.extend(slot.state["step"].data_ptr() for slot in members)

        def kind(place: int, members: list[Slot] = members, dense: list[Tensor] = dense) -> tuple[Any, ...]:
            weight, gradient = members[place].weight, dense[place]
            aligned = is_aligned(weight, weight.numel()) and is_aligned(gradient)
            state = members[place].state["exp_avg"].dtype
            return (
                min(spatial(weight), 2),
                weight.dtype,
                state,
                gradient.dtype,
                weight.numel() >= tables.WIDE_FROM,
                aligned,
            )

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _dense_row(members[place])

        for launch in _launches("dense", members, signature, kind, row):
            strides, weight_type, state_type, gradient_type, wide, aligned = launch.kind
            if strides == 0:
                reference.update_dense([members[i] for i in launch.places], [dense[i] for i in launch.places], adam)
                continue
            with on(launch.table.device):
                kernels.update_dense[(launch.blocks,)](
                    launch.table,
                    launch.block_rows,
                    launch.addresses([pointers[i] for i in launch.places]),
                    step=members[0].steps & 0x7FFFFFFF,
                    log_beta1=math.log2(max(adam.beta1, 1e-30)),
                    log_beta2=math.log2(max(adam.beta2, 1e-30)),
                    WEIGHT_TYPE=TYPES[weight_type],
                    GRADIENT_TYPE=TYPES[gradient_type],
                    STATE_TYPE=TYPES[state_type],
                    CHANNELS_LAST=strides == 2,
                    ALIGNED=aligned,
                    WIDE=wide,
                    **_scalars(adam, launch.table),
                )


def _dense_row(slot: Slot) -> list[int]:
    weight, numbers = slot.weight, [0] * kernels.COLUMNS.value
    for column, number in (
        (kernels.WEIGHT, weight.data_ptr()),
        (kernels.EXP_AVG, slot.state["exp_avg"].data_ptr()),
        (kernels.EXP_AVG_SQ, slot.state["exp_avg_sq"].data_ptr()),
        (kernels.STEP, slot.state["step"].data_ptr()),
        (kernels.ORDINAL, slot.ordinal),
        (kernels.SELECTED, weight.numel()),
        (kernels.ROW, weight.numel() // weight.shape[0] if weight.dim() else 1),
        (kernels.SPATIAL, spatial(weight)),
    ):
        numbers[column.value] = number
    return numbers
