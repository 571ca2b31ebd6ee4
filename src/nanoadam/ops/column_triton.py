"""Hosts of the kernels for whole columns: the same few launches for a list of tensors, whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoadam.chunks import ColumnLayout
from nanoadam.ops import Adam, Rule, Slot, reference, tables
from nanoadam.ops import column_kernels as kernels
from nanoadam.ops.launches import Launch, by_steps, launches, scalars
from nanoadam.ops.tables import TYPES, block_rows, on, partition, signed, upload

TILE = {"TILE_COLUMNS": 16, "TILE_OUTPUTS": 64}
"""Entries that a program updates or gathers."""

_PART, _SUM_OUTPUTS, _SUM_INPUTS = 1024, 16, 128  # of a program that sums squares
_CHOICE = 1024  # columns that a program looks at together
_CARRIED = 256  # outputs whose moments a program moves
_CRITERIA = {"smallest": 0, "largest": 1, "random": 2, "gradient": 3}
_RELAYOUT_BYTES = 512 * 2**20  # new state allocated beside the old at a time, when the density changes


def serves(weight: Tensor) -> bool:
    """Whether the kernels can address it."""
    return weight.is_contiguous()


def layout_of(slot: Slot) -> ColumnLayout:
    """Of a slot that selects columns."""
    assert isinstance(slot.layout, ColumnLayout)
    return slot.layout


def row(slot: Slot, lay: ColumnLayout) -> list[int]:
    """A line of the table."""
    state, numbers = slot.state, [0] * kernels.COLUMNS.value
    for column, number in (
        (kernels.WEIGHT, slot.weight.data_ptr()),
        (kernels.INDEX, state["index"].data_ptr() if "index" in state else 0),
        (kernels.EXP_AVG, state["exp_avg"].data_ptr()),
        (kernels.EXP_AVG_SQ, state["exp_avg_sq"].data_ptr()),
        (kernels.ENTRY_STEP, state["entry_step"].data_ptr() if "entry_step" in state else 0),
        (kernels.ENTRY_STEP_STRIDE, int("entry_step" in state and state["entry_step"].numel() > 1)),
        (kernels.STEP, state["step"].data_ptr() if "step" in state else 0),
        (kernels.ORDINAL, slot.ordinal),
        (kernels.KEEP, lay.keep),
        (kernels.OUTPUTS, lay.outputs),
        (kernels.INPUTS, lay.columns),
        (kernels.COLUMN_STRIDE, lay.outputs if lay.transposed else 1),
        (kernels.OUTPUT_STRIDE, 1 if lay.transposed else lay.columns),
        (kernels.OFFSET, slot.offset),
    ):
        numbers[column.value] = number
    return numbers


# Selection


@dataclass
class _Plan:
    """What a selection needs on the device, the same every time until a tensor moves."""

    table: Tensor
    sum_rows: Tensor
    carry_rows: Tensor
    sum_programs: int
    carry_programs: int
    sums: int  # float64 numbers that it needs while it runs
    scratch: int  # and int32 ones


def select(
    slots: Sequence[Slot], layouts: Sequence[ColumnLayout], rule: Rule, gradients: Sequence[Tensor] | None
) -> None:
    """See `Backend`; of slots that select columns."""
    sources = [slot.weight for slot in slots] if gradients is None else gradients

    def kind(i: int) -> Hashable:
        slot, source = slots[i], sources[i]
        by_others = rule.keep_zeros and rule.criterion in ("random", "gradient")  # which do not see the zeros
        if by_others or slot.part is not None or not serves(slot.weight) or not serves(source):
            return None
        carry = rule.carry and slot.steps > 0
        return carry, source.dtype, slot.state["exp_avg"].dtype, slot.weight.numel() >= tables.WIDE_FROM

    for what, members in partition(range(len(slots)), kind):
        if what is None:
            some = [gradients[i] for i in members] if gradients is not None else None
            reference.select([slots[i] for i in members], [layouts[i] for i in members], rule, some)
            continue
        batch: list[int] = []
        size = 0
        for i in members:
            slot, lay = slots[i], layouts[i]
            batch.append(i)
            if slot.steps and slot.selection is not None and slot.layout != lay:
                size += lay.selected * 2 * slot.state["exp_avg"].element_size()
            if size > _RELAYOUT_BYTES:
                _select(
                    [slots[i] for i in batch], [layouts[i] for i in batch], [sources[i] for i in batch], rule, *what
                )
                batch, size = [], 0
        if batch:
            _select([slots[i] for i in batch], [layouts[i] for i in batch], [sources[i] for i in batch], rule, *what)


def _select(
    slots: Sequence[Slot],
    layouts: Sequence[ColumnLayout],
    sources: Sequence[Tensor],
    rule: Rule,
    carry: bool,
    source_type: torch.dtype,
    state_type: torch.dtype,
    wide: bool,
) -> None:
    device = slots[0].weight.device
    results = [_room(slot, lay, rule, carry) for slot, lay in zip(slots, layouts, strict=True)]
    if not carry:
        _start_over(slots, results)
    signature = [
        (slot.weight.data_ptr(), lay, *(value.data_ptr() for value in (*slot.state.values(), *new.values())))
        for slot, lay, new in zip(slots, layouts, results, strict=True)
    ]
    cached = slots[0].cache.get("select columns")
    if cached is None or cached[0] != signature:
        cached = slots[0].cache["select columns"] = signature, _plan(slots, layouts, results)
    plan: _Plan = cached[1]
    memory = torch.empty(plan.sums, dtype=torch.float64, device=device)
    scratch = torch.empty(plan.scratch, dtype=torch.int32, device=device)
    changing = upload([[source.data_ptr(), slot.steps] for slot, source in zip(slots, sources, strict=True)], device)
    with on(device):
        if rule.criterion != "random":
            kernels.sums[(plan.sum_programs,)](
                plan.table,
                plan.sum_rows,
                changing,
                memory,
                TYPE=TYPES[source_type],
                WIDE=wide,
                PART=_PART,
                TILE_OUTPUTS=_SUM_OUTPUTS,
                TILE_INPUTS=_SUM_INPUTS,
            )
        kernels.choose[(len(slots),)](
            plan.table,
            changing,
            memory,
            scratch,
            signed(rule.key),
            rule.step,
            CRITERION=_CRITERIA[rule.criterion],
            KEEP_ZEROS=rule.keep_zeros,
            CARRY=carry,
            BLOCK=_CHOICE,
        )
        if carry:
            kernels.carry[(plan.carry_programs,)](
                plan.table, plan.carry_rows, scratch, STATE_TYPE=TYPES[state_type], BLOCK=_CARRIED
            )
    for slot, lay, new in zip(slots, layouts, results, strict=True):
        torch.autograd.graph.increment_version(new["index"])  # a backward that was to use the old one then says so
        slot.take(new, lay, in_place=False)


def _room(slot: Slot, lay: ColumnLayout, rule: Rule, carry: bool) -> dict[str, Tensor]:
    """Where the state of a new selection goes: the old places where the counts stay the same."""
    state, device = slot.state, slot.weight.device
    in_place = slot.selection is not None and slot.layout == lay
    borrowed = slot.selection is not None and slot.selection.borrowed and not rule.in_place

    def room(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if in_place and tuple(state[name].shape) == shape and not (name == "index" and borrowed):
            return state[name]
        return torch.empty(shape, dtype=dtype, device=device)

    new = {name: room(name, state[name].dtype, lay.shape) for name in ("exp_avg", "exp_avg_sq")}
    new["index"] = room("index", torch.int32, (lay.keep,))
    new["entry_step"] = room("entry_step", torch.int16, (lay.keep if rule.carry else 1,))
    return new


def _start_over(slots: Sequence[Slot], results: Sequence[dict[str, Tensor]]) -> None:
    """Moments of zero, all entered at the present step."""
    torch._foreach_zero_([new[name] for new in results for name in ("exp_avg", "exp_avg_sq", "entry_step")])
    stamps = [slot.steps & 0xFFFF for slot in slots]
    if any(stamps):
        signed_stamps = [stamp - 2**16 if stamp >= 2**15 else stamp for stamp in stamps]
        torch._foreach_add_([new["entry_step"] for new in results], signed_stamps)


def _plan(slots: Sequence[Slot], layouts: Sequence[ColumnLayout], results: Sequence[dict[str, Tensor]]) -> _Plan:
    device = slots[0].weight.device
    parts = [math.ceil(lay.outputs / _PART) for lay in layouts]
    sums = [part * lay.columns for part, lay in zip(parts, layouts, strict=True)]
    scratch = [2 * lay.columns + 3 * lay.keep for lay in layouts]
    sum_programs = [part * math.ceil(lay.columns / _SUM_INPUTS) for part, lay in zip(parts, layouts, strict=True)]
    carry_programs = [math.ceil(lay.outputs / _CARRIED) for lay in layouts]
    rows = []
    for i, (slot, lay, new) in enumerate(zip(slots, layouts, results, strict=True)):
        line = row(slot, lay)
        for column, number in (
            (kernels.NEW_INDEX, new["index"].data_ptr()),
            (kernels.NEW_EXP_AVG, new["exp_avg"].data_ptr()),
            (kernels.NEW_EXP_AVG_SQ, new["exp_avg_sq"].data_ptr()),
            (kernels.NEW_ENTRY_STEP, new["entry_step"].data_ptr()),
            (kernels.OLD_KEEP, layout_of(slot).keep if slot.selection is not None else 0),
            (kernels.SUMS, sum(sums[:i])),
            (kernels.PARTS, parts[i]),
            (kernels.SCRATCH, sum(scratch[:i])),
            (kernels.FIRST_SUM, sum(sum_programs[:i])),
            (kernels.FIRST_CARRY, sum(carry_programs[:i])),
        ):
            line[column.value] = number
        rows.append(line)
    return _Plan(
        upload(rows, device),
        block_rows(tuple(sum_programs), device),
        block_rows(tuple(carry_programs), device),
        sum(sum_programs),
        sum(carry_programs),
        sum(sums),
        sum(scratch),
    )


# Gradients and updates


def _signature(slot: Slot) -> tuple[Any, ...]:
    state = slot.state
    return slot.version, slot.weight.data_ptr(), state["exp_avg"].data_ptr(), state["index"].data_ptr()


def gather(slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]) -> None:
    """See `Backend`; of slots that select columns."""
    members = list(slots)
    signature = [
        (*_signature(slot), gradient.is_contiguous(), gradient.dtype, mine.dtype, more)
        for slot, gradient, mine, more in zip(members, gradients, entries, add, strict=True)
    ]

    def kind(i: int) -> tuple[Any, ...]:
        wide = gradients[i].numel() >= tables.WIDE_FROM
        return gradients[i].is_contiguous(), gradients[i].dtype, entries[i].dtype, add[i], wide

    for launch in _launches("gather columns", members, signature, kind):
        served, gradient_type, entries_type, more, wide = launch.kind
        some = launch.places
        if not served:
            dense, room = [gradients[i] for i in some], [entries[i] for i in some]
            reference.gather([members[i] for i in some], dense, room, [add[i] for i in some])
            continue
        with on(launch.table.device):
            kernels.gather[(launch.blocks,)](
                launch.table,
                launch.block_rows,
                launch.addresses([each.data_ptr() for i in some for each in (gradients[i], entries[i])]),
                GRADIENT_TYPE=TYPES[gradient_type],
                ENTRIES_TYPE=TYPES[entries_type],
                ADD=more,
                WIDE=wide,
                **TILE,
            )


def update(slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
    """See `Backend`; of slots that select columns."""
    for members, gradients in by_steps(slots, entries, adam):
        contiguous = [mine.contiguous() for mine in gradients]
        signature: list[Any] = [(*_signature(slot), mine.dtype) for slot, mine in zip(members, contiguous, strict=True)]
        if adam.capturable:
            signature.extend(slot.state["step"].data_ptr() for slot in members)

        def kind(i: int, members: list[Slot] = members, contiguous: list[Tensor] = contiguous) -> tuple[Any, ...]:
            weight, state = members[i].weight, members[i].state["exp_avg"].dtype
            return serves(weight), weight.dtype, state, contiguous[i].dtype, members[i].reach >= tables.WIDE_FROM

        for launch in _launches("update columns", members, signature, kind):
            served, weight_type, state_type, entries_type, wide = launch.kind
            some = launch.places
            if not served:
                reference.update([members[i] for i in some], [contiguous[i] for i in some], adam)
                continue
            with on(launch.table.device):
                kernels.update[(launch.blocks,)](
                    launch.table,
                    launch.block_rows,
                    launch.addresses([contiguous[i].data_ptr() for i in some]),
                    step=members[0].steps & 0x7FFFFFFF,
                    KEEP_ZEROS=adam.keep_zeros,
                    WEIGHT_TYPE=TYPES[weight_type],
                    ENTRIES_TYPE=TYPES[entries_type],
                    STATE_TYPE=TYPES[state_type],
                    WIDE=wide,
                    **TILE,
                    **scalars(adam, launch.table),
                )


def _launches(
    name: str, slots: list[Slot], signature: list[Any], kind: Callable[[int], tuple[Any, ...]]
) -> list[Launch]:
    return launches(
        name, slots, signature, kind, lambda i: row(slots[i], layout_of(slots[i])), _programs, kernels.FIRST.value
    )


def _programs(line: list[int]) -> int:
    """Tiles of a tensor's entries."""
    columns = math.ceil(line[kernels.KEEP.value] / TILE["TILE_COLUMNS"])
    return int(columns * math.ceil(line[kernels.OUTPUTS.value] / TILE["TILE_OUTPUTS"]))
