"""The operations as Triton kernels: one launch for a list of tensors, no waiting for the device.

Every launch reads a table of addresses and sizes. Tables are rebuilt only when an address changes. What a kernel
cannot address (strides other than contiguous and channels-last) goes through `reference`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.chunks import Layout
from nanoadam.ops import MAX_AGE, Adam, Selection, Slot, kernels, reference, selection

BLOCK = 1024
"""Selected entries a program updates."""

# How selection is cut for the GPU, as measured on an H200 (docs/design.md). None of it changes a result.
_SAMPLE = 512  # weights of a chunk that the first guess is made from
_PART = 512  # weights of a chunk looked at together
_CANDIDATES_PER_WARP = 512
_PROGRAMS_PER_PROCESSOR = 32
_REGISTERS = 64  # a thread; waiting for memory is what takes the time, so many warps beat fast ones

_CRITERIA = {"smallest": 0, "largest": 1, "random": 2, "gradient": 3}
_TYPES = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}
_RELAYOUT_BYTES = 512 * 2**20  # new state allocated beside the old at a time, when the density changes


def _spatial(tensor: Tensor) -> int:
    """1 if contiguous, the weights per channel if channels-last, 0 for other strides."""
    if tensor.is_contiguous():
        return 1
    if (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)) or (
        tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        return math.prod(tensor.shape[2:])
    return 0


def _aligned(tensor: Tensor, *counts: int) -> bool:
    """Whether 8 weights at a time can be read: of 16-bit ones, 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(count % 8 == 0 for count in counts)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel whatever the word."""
    return word - 2**32 if word >= 2**31 else word


def _partition(items: Iterable[Any], key: Callable[[Any], Hashable]) -> Iterable[tuple[Any, list[Any]]]:
    parts: dict[Hashable, list[Any]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts.items()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _upload(rows: Sequence[Sequence[int]] | Sequence[int], device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = table.pin_memory()
        _captured.append(table)
    return table.to(device, non_blocking=True)


_captured: list[Tensor] = []
"""Tables that a CUDA graph copies from the host whenever it is replayed."""


@functools.lru_cache(maxsize=64)
def _block_rows(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sum of blocks]: which tensor each block belongs to."""
    counts = torch.tensor(blocks, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), counts).to(device)


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
    assert lay is not None
    row = [
        address,
        state["index"].data_ptr(),
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        state["born"].data_ptr(),
        int(state["born"].numel() > 1),
        count,
        slot.ordinal,
        lay.line,
        lay.chunk,
        lay.full,
        lay.keep,
        lay.kept_per_line,
        lay.selected,
        weight.numel() // weight.shape[0],
        _spatial(weight),
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
            self.numbers, self.uploaded = numbers, _upload(numbers, self.table.device)
        return self.uploaded


def _launches(
    name: str,
    slots: list[Slot],
    signature: list[Any],
    kind: Callable[[int], tuple[Any, ...]],
    row: Callable[[int], list[int]],
) -> list[_Launch]:
    """How a list is launched; worked out anew only when something in `signature` has changed.

    `kind` and `row` take a place in the list.
    """
    cached = slots[0].cache.get(name)
    if cached is not None and cached[0] == signature and cached[1] == slots:
        known: list[_Launch] = cached[2]
        return known
    launches = []
    device = slots[0].weight.device
    for what, places in _partition(range(len(slots)), kind):
        rows, blocks, first = [row(place) for place in places], [], 0
        for numbers in rows:
            numbers[kernels.FIRST.value] = first
            blocks.append(triton.cdiv(numbers[kernels.SELECTED.value], BLOCK))
            first += blocks[-1]
        launches.append(_Launch(what, places, _upload(rows, device), _block_rows(tuple(blocks), device), first))
    slots[0].cache[name] = (signature, slots, launches)
    return launches


def gather(slots: Sequence[Slot], gradients: Sequence[Tensor], dtype: torch.dtype) -> None:
    members = list(slots)
    signature = [
        (
            slot.version,
            _spatial(gradient),
            gradient.dtype,
            dtype if slot.held is None else slot.held.dtype,
            slot.held is None,
        )
        for slot, gradient in zip(members, gradients, strict=True)
    ]

    def kind(place: int) -> tuple[Any, ...]:
        _, spatial, gradient_type, held_type, new = signature[place]
        return min(spatial, 2), gradient_type, held_type, not new, gradients[place].numel() >= 2**31

    def row(place: int) -> list[int]:
        numbers = _row(members[place]).copy()
        numbers[kernels.GRADIENT_SPATIAL.value] = signature[place][1]
        return numbers

    for launch in _launches("gather", members, signature, kind, row):
        strides, gradient_type, held_type, accumulate, wide = launch.kind
        if strides == 0:
            reference.gather([members[i] for i in launch.places], [gradients[i] for i in launch.places], dtype)
            continue
        numbers = []
        for i in launch.places:
            slot = members[i]
            assert slot.layout is not None
            if slot.held is None:
                slot.held = torch.empty(slot.layout.selected, dtype=held_type, device=slot.weight.device)
            numbers += [gradients[i].data_ptr(), slot.held.data_ptr()]
        with _on(launch.table.device):
            kernels.gather[(launch.blocks,)](
                launch.table,
                launch.block_rows,
                launch.addresses(numbers),
                GRADIENT_TYPE=_TYPES[gradient_type],
                HELD_TYPE=_TYPES[held_type],
                ACCUMULATE=accumulate,
                CHANNELS_LAST=strides == 2,
                WIDE=wide,
                BLOCK=BLOCK,
            )


def _scalars(adam: Adam, anything: Tensor) -> dict[str, Any]:
    """Arguments that both updates share; pointers that are not used point to `anything`."""
    device = anything.device
    lr_pointer = adam.lr if isinstance(adam.lr, Tensor) and adam.lr.device == device else None
    scale = adam.grad_scale
    if isinstance(scale, Tensor):
        scale = scale.to(device, non_blocking=True)
    return {
        "corrections": _corrections(adam.beta1, adam.beta2, device),
        "lr": 0.0 if lr_pointer is not None else float(adam.lr),
        "lr_pointer": anything if lr_pointer is None else lr_pointer,
        "scale_pointer": scale if isinstance(scale, Tensor) else anything,
        "weight_decay": float(adam.weight_decay),
        "weight1": 1 - adam.beta1,
        "beta2": float(adam.beta2),
        "weight2": 1 - adam.beta2,
        "eps": float(adam.eps),
        "key": _signed(adam.key),
        "LR_POINTER": lr_pointer is not None,
        "SCALE_POINTER": isinstance(scale, Tensor),
        "STEP_POINTER": adam.capturable,
        "MAXIMIZE": adam.maximize,
        "STOCHASTIC": adam.stochastic_rounding,
        "BLOCK": BLOCK,
    }


def _by_steps(slots: Sequence[Slot], adam: Adam) -> Iterable[list[Slot]]:
    """Slots that have had the same number of updates, which a launch takes from the host unless captured."""
    if adam.capturable or all(slot.steps == slots[0].steps for slot in slots):
        return [list(slots)] if slots else []
    return [members for _, members in _partition(slots, lambda slot: slot.steps)]


def update(slots: Sequence[Slot], adam: Adam) -> None:
    for members in _by_steps(slots, adam):
        held = [slot.held for slot in members if slot.held is not None]
        signature: list[Any] = [
            (slot.version, slot.weight.data_ptr(), mine.dtype) for slot, mine in zip(members, held, strict=True)
        ]
        if adam.capturable:
            signature.extend(slot.state["step"].data_ptr() for slot in members)

        def kind(place: int, members: list[Slot] = members, held: list[Tensor] = held) -> tuple[Any, ...]:
            weight, state = members[place].weight, members[place].state
            return (
                min(_spatial(weight), 2),
                weight.dtype,
                state["exp_avg"].dtype,
                held[place].dtype,
                weight.numel() >= 2**31,
            )

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _row(members[place]).copy()

        for launch in _launches("update", members, signature, kind, row):
            strides, weight_type, state_type, held_type, wide = launch.kind
            if strides == 0:
                reference.update([members[i] for i in launch.places], adam)
                continue
            with _on(launch.table.device):
                kernels.update[(launch.blocks,)](
                    launch.table,
                    launch.block_rows,
                    launch.addresses([held[i].data_ptr() for i in launch.places]),
                    step=members[0].steps & 0x7FFFFFFF,
                    WEIGHT_TYPE=_TYPES[weight_type],
                    HELD_TYPE=_TYPES[held_type],
                    STATE_TYPE=_TYPES[state_type],
                    CHANNELS_LAST=strides == 2,
                    WIDE=wide,
                    **_scalars(adam, launch.table),
                )


def update_dense(slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam) -> None:
    of = dict(zip(slots, gradients, strict=True))
    for slot, gradient in of.items():
        if gradient.stride() != slot.weight.stride():
            of[slot] = torch.empty_like(slot.weight, dtype=gradient.dtype).copy_(gradient)
    for members in _by_steps(slots, adam):
        dense = [of[slot] for slot in members]
        pointers = [gradient.data_ptr() for gradient in dense]
        signature: list[Any] = [
            (slot.weight.data_ptr(), gradient.dtype, pointer % 16)
            for slot, gradient, pointer in zip(members, dense, pointers, strict=True)
        ]
        if adam.capturable:
            signature.extend(slot.state["step"].data_ptr() for slot in members)

        def kind(place: int, members: list[Slot] = members, dense: list[Tensor] = dense) -> tuple[Any, ...]:
            weight, gradient = members[place].weight, dense[place]
            aligned = _aligned(weight, weight.numel()) and _aligned(gradient)
            state = members[place].state["exp_avg"].dtype
            return min(_spatial(weight), 2), weight.dtype, state, gradient.dtype, weight.numel() >= 2**31, aligned

        def row(place: int, members: list[Slot] = members) -> list[int]:
            return _dense_row(members[place])

        for launch in _launches("dense", members, signature, kind, row):
            strides, weight_type, state_type, gradient_type, wide, aligned = launch.kind
            if strides == 0:
                reference.update_dense([members[i] for i in launch.places], [dense[i] for i in launch.places], adam)
                continue
            with _on(launch.table.device):
                kernels.update_dense[(launch.blocks,)](
                    launch.table,
                    launch.block_rows,
                    launch.addresses([pointers[i] for i in launch.places]),
                    step=members[0].steps & 0x7FFFFFFF,
                    log_beta1=math.log2(max(adam.beta1, 1e-30)),
                    log_beta2=math.log2(max(adam.beta2, 1e-30)),
                    WEIGHT_TYPE=_TYPES[weight_type],
                    GRADIENT_TYPE=_TYPES[gradient_type],
                    STATE_TYPE=_TYPES[state_type],
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
        (kernels.SPATIAL, _spatial(weight)),
    ):
        numbers[column.value] = number
    return numbers


def select(
    slots: Sequence[Slot], layouts: Sequence[Layout], rule: Selection, gradients: Sequence[Tensor] | None
) -> None:
    dense: Sequence[Tensor | None] = [None] * len(slots) if gradients is None else gradients
    items = list(zip(slots, layouts, dense, strict=True))

    def kind(item: tuple[Slot, Layout, Tensor | None]) -> Hashable:
        slot, lay, gradient = item
        strides = min(_spatial(slot.weight), 2)
        if strides == 0 or (gradient is not None and min(_spatial(gradient), 2) != strides):
            return None
        held = None if slot.held is None else slot.held.dtype
        carry = rule.carry and slot.steps > 0
        state = slot.state["exp_avg"].dtype
        aligned = _aligned(slot.weight, lay.line, lay.chunk, lay.tail) and (gradient is None or _aligned(gradient))
        return (
            slot.weight.dtype,
            None if gradient is None else gradient.dtype,
            held,
            carry,
            state,
            strides == 2,
            aligned,
        )

    for what, members in _partition(items, kind):
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
            if slot.layout != lay and slot.steps:
                size += lay.selected * (4 + 2 * slot.state["exp_avg"].element_size())
            if size > _RELAYOUT_BYTES:  # the old state of this batch is freed before the next is made
                _select_batch(batch, rule, *what)
                batch, size = [], 0
        if batch:
            _select_batch(batch, rule, *what)


def _select_batch(
    batch: Sequence[tuple[Slot, Layout, Tensor | None]],
    rule: Selection,
    weight_type: torch.dtype,
    gradient_type: torch.dtype | None,
    held_type: torch.dtype | None,
    carry: bool,
    state_type: torch.dtype,
    channels_last: bool,
    aligned: bool,
) -> None:
    device = batch[0][0].weight.device
    rows, chunks, first, results = [], [], 0, []
    for slot, lay, gradient in batch:
        state, in_place = slot.state, slot.layout == lay and "index" in slot.state

        def room(name: str, state: dict[str, Tensor] = state, lay: Layout = lay, in_place: bool = in_place) -> Tensor:
            return state[name] if in_place else torch.empty(lay.selected, dtype=state[name].dtype, device=device)

        index = state["index"] if in_place else torch.empty(lay.selected, dtype=torch.int16, device=device)
        new = {"index": index, "exp_avg": room("exp_avg"), "exp_avg_sq": room("exp_avg_sq")}
        ages = lay.selected if rule.carry else 1
        own = in_place and "born" in state and state["born"].numel() == ages
        new["born"] = state["born"] if own else torch.empty(ages, dtype=torch.int16, device=device)
        if not carry:
            new["exp_avg"].zero_()
            new["exp_avg_sq"].zero_()
            stamp = slot.steps & 0xFFFF
            new["born"].fill_(stamp - 2**16 if stamp >= 2**15 else stamp)
        held = slot.held
        if held is not None and not in_place:
            held = torch.empty(lay.selected, dtype=held.dtype, device=device)
        results.append((slot, lay, new, held))
        old = slot.layout or lay
        row = [0] * selection.SELECT_COLUMNS.value
        for column, tensor in (
            (kernels.WEIGHT, slot.weight),
            (kernels.INDEX, state.get("index")),
            (kernels.EXP_AVG, state["exp_avg"]),
            (kernels.EXP_AVG_SQ, state["exp_avg_sq"]),
            (kernels.BORN, state.get("born")),
            (selection.HELD, slot.held),
            (selection.GRADIENT, gradient),
            (selection.NEW_INDEX, new["index"]),
            (selection.NEW_EXP_AVG, new["exp_avg"]),
            (selection.NEW_EXP_AVG_SQ, new["exp_avg_sq"]),
            (selection.NEW_BORN, new["born"]),
            (selection.NEW_HELD, held),
        ):
            row[column.value] = 0 if tensor is None else tensor.data_ptr()
        for column, number in (
            (kernels.BORN_STRIDE, int("born" in state and state["born"].numel() > 1)),
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
            (kernels.SPATIAL, _spatial(slot.weight)),
            (kernels.GRADIENT_SPATIAL, 1 if gradient is None else _spatial(gradient)),
            (kernels.FIRST, first),
            (selection.STEPS, slot.steps),
        ):
            row[column.value] = number
        rows.append(row)
        chunks.append(lay.chunks)
        first += lay.chunks
    lays = [lay for _, lay, _ in batch]
    longest = max(min(lay.chunk, lay.line) for lay in lays)
    most = max(max(lay.keep, lay.keep_tail) for lay in lays)
    old_most = max(max(lay.keep, lay.keep_tail) for lay in (slot.layout or coming for slot, coming, _ in batch))
    # Twice what is kept, and some: a limit guessed from a sample then seldom misses, see selection.select.
    candidates = triton.next_power_of_2(min(longest, max(128, 2 * most + 64)))
    programs = min(first, _PROGRAMS_PER_PROCESSOR * _processors(device))
    places = triton.next_power_of_2(longest) if carry or held_type is not None else 0
    scratch = torch.empty((programs, 2 * candidates + places), dtype=torch.int16, device=device)
    with _on(device):
        selection.select[(programs,)](
            _upload(rows, device),
            _block_rows(tuple(chunks), device),
            scratch,
            first,
            _signed(rule.key),
            rule.step,
            CRITERION=_CRITERIA[rule.criterion],
            KEEP_ZEROS=rule.keep_zeros,
            CARRY=carry,
            CARRY_HELD=held_type is not None,
            WEIGHT_TYPE=_TYPES[weight_type],
            GRADIENT_TYPE=_TYPES[gradient_type or weight_type],
            HELD_TYPE=_TYPES[held_type or torch.float32],
            STATE_TYPE=_TYPES[state_type],
            CHANNELS_LAST=channels_last,
            ALIGNED=aligned,
            SIFT=candidates < longest,
            CANDIDATES=candidates,
            KEPT=triton.next_power_of_2(most),
            OLD_KEPT=triton.next_power_of_2(old_most),
            PLACES=places,
            SAMPLE=_SAMPLE,
            PART=_PART,
            num_warps=max(1, candidates // _CANDIDATES_PER_WARP),
            maxnreg=_REGISTERS,
        )
    for slot, lay, new, held in results:
        slot.state.update(new)
        slot.layout, slot.held = lay, held


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 1
