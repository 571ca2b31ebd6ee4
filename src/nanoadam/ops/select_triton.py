"""Selection as a Triton kernel: what its launch needs, worked out once and kept while no tensor moves."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.chunks import Layout
from nanoadam.ops import Rule, Slot, kernels, reference, selection
from nanoadam.ops.tables import TYPES, block_rows, is_aligned, on, partition, signed, spatial, upload

# How selection is cut for the GPU, as measured on an H200 (docs/design.md). None of it changes a result.
_SAMPLE = 512  # weights of a chunk that the first guess is made from
_PART = 512  # weights of a chunk looked at together
_CANDIDATES_PER_WARP = 512
_PROGRAMS_PER_PROCESSOR = 32
_REGISTERS = 64  # a thread; waiting for memory is what takes the time, so many warps beat fast ones

_CRITERIA = {"smallest": 0, "largest": 1, "random": 2, "gradient": 3}
_STATE = ("index", "exp_avg", "exp_avg_sq", "entry_step")
_RELAYOUT_BYTES = 512 * 2**20  # new state allocated beside the old at a time, when the density changes


def select(slots: Sequence[Slot], layouts: Sequence[Layout], rule: Rule, gradients: Sequence[Tensor] | None) -> None:
    dense: Sequence[Tensor | None] = [None] * len(slots) if gradients is None else gradients
    items = list(zip(slots, layouts, dense, strict=True))

    def kind(item: tuple[Slot, Layout, Tensor | None]) -> Hashable:
        slot, lay, gradient = item
        strides = min(spatial(slot.weight), 2)
        if strides == 0 or (gradient is not None and min(spatial(gradient), 2) != strides):
            return None
        carry = rule.carry and slot.steps > 0
        state = slot.state["exp_avg"].dtype
        aligned = is_aligned(slot.weight, lay.line, lay.chunk, lay.tail) and (gradient is None or is_aligned(gradient))
        return (
            slot.weight.dtype,
            None if gradient is None else gradient.dtype,
            carry,
            state,
            strides == 2,
            aligned,
        )

    for what, members in partition(items, kind):
        if what is None:
            reference.select(
                [slot for slot, _, _ in members],
                [lay for _, lay, _ in members],
                rule,
                [gradient for _, _, gradient in members] if gradients is not None else None,
            )
            continue
        batch: list[Any] = []
        size = 0
        for item in members:
            slot, lay, _ = item
            batch.append(item)
            if slot.steps and slot.layout != lay:
                size += lay.selected * (4 + 2 * slot.state["exp_avg"].element_size())
            if size > _RELAYOUT_BYTES:  # the old state of this batch is freed before the next is made
                _select_batch(batch, rule, *what)
                batch, size = [], 0
        if batch:
            _select_batch(batch, rule, *what)


@dataclass
class _SelectLaunch:
    """What a selection in place needs, the same every time until a tensor moves."""

    table: Tensor
    chunk_rows: Tensor
    chunks: int
    sizes: dict[str, Any]


def _select_batch(
    batch: Sequence[tuple[Slot, Layout, Tensor | None]],
    rule: Rule,
    weight_type: torch.dtype,
    gradient_type: torch.dtype | None,
    carry: bool,
    state_type: torch.dtype,
    channels_last: bool,
    aligned: bool,
) -> None:
    device = batch[0][0].weight.device
    results = [_room(slot, lay, rule) for slot, lay, _ in batch]
    if not carry:
        _start_over(batch, results)
    signature = [
        (
            slot.weight.data_ptr(),
            *(slot.state[name].data_ptr() for name in _STATE if name in slot.state),
            *(new[name].data_ptr() for name in _STATE),
            slot.selection and slot.layout,
            lay,
            1 if gradient is None else spatial(gradient),
        )
        for (slot, lay, gradient), new in zip(batch, results, strict=True)
    ]
    first = batch[0][0]
    cached = first.cache.get("select")
    if cached is None or cached[0] != signature:
        cached = first.cache["select"] = signature, _plan_selection(batch, results)
    launch: _SelectLaunch = cached[1]
    changing: list[int] = []
    for slot, _, gradient in batch:
        changing += [0 if gradient is None else gradient.data_ptr(), slot.steps]
    places = launch.sizes["longest"] if carry else 0
    candidates = launch.sizes["candidates"]
    programs = min(launch.chunks, _PROGRAMS_PER_PROCESSOR * _processors(device))
    scratch = torch.empty((programs, 2 * candidates + places), dtype=torch.int16, device=device)
    with on(device):
        selection.select[(programs,)](
            launch.table,
            launch.chunk_rows,
            upload(changing, device),
            scratch,
            launch.chunks,
            signed(rule.key),
            rule.step,
            CRITERION=_CRITERIA[rule.criterion],
            KEEP_ZEROS=rule.keep_zeros,
            CARRY=carry,
            WEIGHT_TYPE=TYPES[weight_type],
            GRADIENT_TYPE=TYPES[gradient_type or weight_type],
            STATE_TYPE=TYPES[state_type],
            CHANNELS_LAST=channels_last,
            ALIGNED=aligned,
            SIFT=launch.sizes["sift"],
            CANDIDATES=candidates,
            KEPT=launch.sizes["kept"],
            OLD_KEPT=launch.sizes["old_kept"],
            PLACES=places,
            SAMPLE=_SAMPLE,
            PART=_PART,
            num_warps=max(1, candidates // _CANDIDATES_PER_WARP),
            maxnreg=_REGISTERS,
        )
    for (slot, lay, _), new in zip(batch, results, strict=True):
        slot.take(new, lay, in_place=False)  # where the old state may be written over, the kernel has done so


def _room(slot: Slot, lay: Layout, rule: Rule) -> dict[str, Tensor]:
    """Where the state of a new selection goes: the old places where the counts stay the same."""
    state, device = slot.state, slot.weight.device
    in_place = slot.selection is not None and slot.layout == lay
    borrowed = slot.selection is not None and slot.selection.borrowed and not rule.in_place

    def room(name: str, dtype: torch.dtype, count: int) -> Tensor:
        if in_place and state[name].numel() == count and not (name == "index" and borrowed):
            return state[name]
        return torch.empty(count, dtype=dtype, device=device)

    new = {name: room(name, state[name].dtype, lay.selected) for name in ("exp_avg", "exp_avg_sq")}
    new["index"] = room("index", torch.int16, lay.selected)
    new["entry_step"] = room("entry_step", torch.int16, lay.selected if rule.carry else 1)
    return new


def _start_over(batch: Sequence[tuple[Slot, Layout, Tensor | None]], results: Sequence[dict[str, Tensor]]) -> None:
    """Moments of zero, all entered at the present step."""
    for name in ("exp_avg", "exp_avg_sq", "entry_step"):
        torch._foreach_zero_([new[name] for new in results])
    stamps = [slot.steps & 0xFFFF for slot, _, _ in batch]
    if any(stamps):
        signed = [stamp - 2**16 if stamp >= 2**15 else stamp for stamp in stamps]
        torch._foreach_add_([new["entry_step"] for new in results], signed)


def _plan_selection(
    batch: Sequence[tuple[Slot, Layout, Tensor | None]], results: Sequence[dict[str, Tensor]]
) -> _SelectLaunch:
    device = batch[0][0].weight.device
    rows, chunks, first = [], [], 0
    for (slot, lay, gradient), new in zip(batch, results, strict=True):
        state, old = slot.state, _layout(slot, lay)
        row = [0] * selection.SELECT_COLUMNS.value
        for column, tensor in (
            (kernels.WEIGHT, slot.weight),
            (kernels.INDEX, state.get("index")),
            (kernels.EXP_AVG, state["exp_avg"]),
            (kernels.EXP_AVG_SQ, state["exp_avg_sq"]),
            (kernels.ENTRY_STEP, state.get("entry_step")),
            (selection.NEW_INDEX, new["index"]),
            (selection.NEW_EXP_AVG, new["exp_avg"]),
            (selection.NEW_EXP_AVG_SQ, new["exp_avg_sq"]),
            (selection.NEW_ENTRY_STEP, new["entry_step"]),
        ):
            row[column.value] = 0 if tensor is None else tensor.data_ptr()
        for column, number in (
            (kernels.ENTRY_STEP_STRIDE, int("entry_step" in state and state["entry_step"].numel() > 1)),
            (kernels.ORDINAL, slot.ordinal),
            (kernels.LINE, lay.line),
            (kernels.CHUNK, lay.chunk),
            (kernels.FULL, lay.full),
            (selection.TAIL, lay.tail),
            (kernels.KEEP, old.keep),
            (selection.KEEP_TAIL, old.keep_tail),
            (kernels.KEPT_PER_LINE, old.kept_per_line),
            (selection.NEW_KEEP, lay.keep),
            (selection.NEW_KEEP_TAIL, lay.keep_tail),
            (selection.NEW_KEPT_PER_LINE, lay.kept_per_line),
            (kernels.ROW, slot.weight.numel() // slot.weight.shape[0]),
            (kernels.SPATIAL, spatial(slot.weight)),
            (kernels.GRADIENT_SPATIAL, 1 if gradient is None else spatial(gradient)),
            (kernels.FIRST, first),
            (selection.PART_OFFSET, slot.offset),
        ):
            row[column.value] = number
        rows.append(row)
        chunks.append(lay.chunks)
        first += lay.chunks
    lays = [lay for _, lay, _ in batch]
    longest = max(min(lay.chunk, lay.line) for lay in lays)
    most = max(max(lay.keep, lay.keep_tail) for lay in lays)
    old_most = max(max(old.keep, old.keep_tail) for old in (_layout(slot, coming) for slot, coming, _ in batch))
    # Twice what is kept, and some: a limit guessed from a sample then seldom misses, see selection.select.
    candidates = triton.next_power_of_2(min(longest, max(128, 2 * most + 64)))
    sizes = {
        "sift": candidates < longest,
        "candidates": candidates,
        "kept": triton.next_power_of_2(most),
        "old_kept": triton.next_power_of_2(old_most),
        "longest": triton.next_power_of_2(longest),
    }
    return _SelectLaunch(upload(rows, device), block_rows(tuple(chunks), device), first, sizes)


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1


def _layout(slot: Slot, coming: Layout) -> Layout:
    """Of the present selection, if there is one."""
    return slot.layout if slot.selection is not None and isinstance(slot.layout, Layout) else coming
