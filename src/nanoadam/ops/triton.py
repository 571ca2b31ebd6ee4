"""The operations as Triton kernels: one launch for a list of tensors, no waiting for the device.

Every launch reads a table of addresses and sizes. Tables are rebuilt only when an address changes. What a kernel
cannot address (strides other than contiguous and channels-last) goes through `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.chunks import AnyLayout, ColumnLayout, Layout
from nanoadam.ops import Adam, Rule, Selection, Slot, column_triton, kernels, reference, select_triton, tables
from nanoadam.ops.launches import by_steps, launches, scalars
from nanoadam.ops.tables import TYPES, is_aligned, on, spatial

__all__ = ["gather", "row_entries", "select", "update", "update_dense"]

BLOCK = 1024
"""Selected entries a program updates."""

ROW_BLOCK, TOKENS = 128, 16
"""Selected entries of an embedding that a program sums, and the tokens that it reads at a time for each."""


def _by_granularity(slots: Sequence[Any], layouts: Sequence[AnyLayout]) -> tuple[list[int], list[int]]:
    """Places of those that are selected from by weight, and by column."""
    columns = [i for i, layout in enumerate(layouts) if type(layout) is ColumnLayout]
    chosen = set(columns)
    return [i for i in range(len(slots)) if i not in chosen] if columns else list(range(len(slots))), columns


def select(slots: Sequence[Slot], layouts: Sequence[AnyLayout], rule: Rule, gradients: Sequence[Tensor] | None) -> None:
    served: Any = (select_triton.select, column_triton.select)
    for places, host in zip(_by_granularity(slots, layouts), served, strict=True):
        if places:
            some = None if gradients is None else [gradients[i] for i in places]
            host([slots[i] for i in places], [layouts[i] for i in places], rule, some)


def gather(slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]) -> None:
    for places, host in zip(
        _by_granularity(slots, [s.layout for s in slots]), (_gather, column_triton.gather), strict=True
    ):
        if places:
            dense, room = [gradients[i] for i in places], [entries[i] for i in places]
            host([slots[i] for i in places], dense, room, [add[i] for i in places])


def update(slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
    for places, host in zip(
        _by_granularity(slots, [s.layout for s in slots]), (_update, column_triton.update), strict=True
    ):
        if places:
            host([slots[i] for i in places], [entries[i] for i in places], adam)


def row_entries(selection: Selection, ids: Tensor, gradient: Tensor) -> Tensor:
    lay, width = selection.layout, gradient.shape[1]
    assert isinstance(lay, Layout)
    numbers = [0] * kernels.COLUMNS.value
    for column, number in (
        (kernels.INDEX, selection.index.data_ptr()),
        (kernels.LINE, lay.line),
        (kernels.CHUNK, lay.chunk),
        (kernels.FULL, lay.full),
        (kernels.KEEP, lay.keep),
        (kernels.KEPT_PER_LINE, lay.kept_per_line),
        (kernels.SELECTED, lay.selected),
        (kernels.ROW, width),
    ):
        numbers[column.value] = number
    row = tables.upload(numbers, gradient.device)
    by_row, order = ids.sort(stable=True)
    starts = torch.searchsorted(by_row, torch.arange(lay.numel // width + 1, device=gradient.device))
    entries = torch.empty(lay.selected, dtype=torch.float32, device=gradient.device)
    gradient = gradient.contiguous()
    with on(gradient.device):
        wide = lay.numel >= tables.WIDE_FROM
        programs = triton.cdiv(lay.selected, ROW_BLOCK)
        kernels.row_entries[(programs,)](
            row, starts, order, gradient, entries, WIDE=wide, BLOCK=ROW_BLOCK, TOKENS=TOKENS
        )
    return entries


def _programs(row: list[int]) -> int:
    return int(triton.cdiv(row[kernels.SELECTED.value], BLOCK))


def _row(slot: Slot) -> list[int]:
    """The table's columns that stay the same until the next selection."""
    cached = slot.cache.get("row")
    address, count = slot.weight.data_ptr(), slot.state["step"].data_ptr()
    if cached is not None and cached[0] == (slot.version, address, count):
        row: list[int] = cached[1]
        return row
    state, lay, weight = slot.state, slot.layout, slot.weight
    assert isinstance(lay, Layout)
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
        slot.offset,
    ]
    slot.cache["row"] = ((slot.version, address, count), row)
    return row


def _gather(slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]) -> None:
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

    for launch in launches("gather", members, signature, kind, row, _programs, kernels.FIRST.value):
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


def _update(slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
    for members, gradients in by_steps(slots, entries, adam):
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
                members[place].reach >= tables.WIDE_FROM,
            )

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _row(members[place]).copy()

        for launch in launches("update", members, signature, kind, row, _programs, kernels.FIRST.value):
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
                    BLOCK=BLOCK,
                    **scalars(adam, launch.table),
                )


def update_dense(slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam) -> None:
    for members, dense in by_steps(slots, gradients, adam):
        weights = [slot.weight for slot in members]
        for i, (weight, gradient) in enumerate(zip(weights, dense, strict=True)):
            if gradient.stride() != weight.stride():
                dense[i] = torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)
        pointers = [gradient.data_ptr() for gradient in dense]
        signature: list[Any] = [
            (weight.data_ptr(), slot.state["exp_avg"].data_ptr(), gradient.dtype, pointer % 16)
            for slot, weight, gradient, pointer in zip(members, weights, dense, pointers, strict=True)
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
                members[place].reach >= tables.WIDE_FROM,
                aligned,
            )

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _dense_row(members[place])

        for launch in launches("dense", members, signature, kind, row, _programs, kernels.FIRST.value):
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
                    BLOCK=BLOCK,
                    **scalars(adam, launch.table),
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
        (kernels.OFFSET, slot.offset),
    ):
        numbers[column.value] = number
    return numbers
