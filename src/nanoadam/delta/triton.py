"""The operations as Triton kernels: one launch for a list of tensors.

What a kernel cannot address (strides other than contiguous, words that begin between addresses) goes through
`reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.chunks import Layout
from nanoadam.delta import coding, kernels, reference
from nanoadam.delta.bits import flat
from nanoadam.delta.coding import Coded
from nanoadam.delta.hashing import hash_tensor, tail, total, within
from nanoadam.delta.jobs import Found, Job
from nanoadam.ops.tables import block_rows, on, partition, upload

PARTS = 32
"""Blocks of 4,096 words that a program hashes: half a megabyte."""

BLOCK = 1024
"""Positions that a program codes or collects, weights that it compares."""

_TYPES = {1: triton.language.uint8, 2: triton.language.int16, 4: triton.language.int32, 8: triton.language.int64}
_MAX_NARROW = 11  # low bits with which a block of gaps moves the cursor by less than 2**31


def _segments(values: Tensor, blocks: Sequence[int]) -> Tensor:
    """Sums of the programs of each tensor: int64 [tensors]."""
    rows = block_rows(tuple(blocks), values.device).to(torch.int64)
    return torch.zeros(len(blocks), dtype=torch.int64, device=values.device).index_add_(0, rows, values.to(torch.int64))


def _running(blocks: Sequence[int]) -> list[int]:
    firsts, at = [], 0
    for count in blocks:
        firsts.append(at)
        at += count
    return firsts


# The hash


def hashes(tensors: Sequence[Tensor]) -> Tensor:
    contents = [tensor.detach() if tensor.is_contiguous() else flat(tensor) for tensor in tensors]
    places = [(content.data_ptr(), content.nbytes) for content in contents]
    results = torch.zeros(len(contents), dtype=torch.int64, device=contents[0].device)
    whole = [i for i, (address, size) in enumerate(places) if address % 4 == 0 and size >= 4]
    for aligned, mine in partition(whole, lambda i: places[i][0] % 16 == 0):
        found = _hash_words([places[i] for i in mine], aligned, results.device)
        results = found if len(mine) == len(contents) else results.index_copy(0, upload(mine, results.device), found)
    for i, (address, size) in enumerate(places):
        if address % 4:
            results[i] = hash_tensor(contents[i])
        elif size % 4:
            rest = flat(contents[i]).view(torch.uint8)[size // 4 * 4 :]
            results[i] += tail(rest, size // 4)
    return results


def _hash_words(places: Sequence[tuple[int, int]], aligned: bool, device: torch.device) -> Tensor:
    """Of the whole words at addresses, with so many bytes: int64 [places]."""
    blocks = [triton.cdiv(size // 4, PARTS * kernels.WORDS.value) for _, size in places]
    rows = [[address, size // 4, at] for (address, size), at in zip(places, _running(blocks), strict=True)]
    out = torch.empty(sum(blocks), dtype=torch.int64, device=device)
    with on(device):
        kernels.hash_words[(len(out),)](
            upload(rows, device),
            block_rows(tuple(blocks), device),
            within(device),
            out,
            PARTS=PARTS,
            ALIGNED=aligned,
            num_warps=8,
        )
    return _segments(out, blocks)


# Looking and writing


def _kind(job: Job) -> Any:
    """What tensors of one launch have in common; None where a kernel does not serve."""
    entry, weight = job.entry, job.weight
    if not weight.is_contiguous() or not entry.values.is_contiguous():
        return None
    size = entry.dtype.itemsize
    if entry.kind == "columns":
        return kernels.COLUMNS.value, size, False
    if entry.is_coded:
        return kernels.CODED.value, size, entry.bits > _MAX_NARROW
    return kernels.LISTED.value, size, entry.parts["positions"].dtype == torch.int64


def _row(job: Job, values: Tensor, old: Tensor | None) -> tuple[list[int], int]:
    """A row of the table, and how many programs there are."""
    entry = job.entry
    row = [0] * kernels.FIELDS.value
    number, size, where = entry.bits, 0, "positions"
    if entry.kind == "columns":
        where, number, size = "columns", entry.values.shape[1], entry.shape[-1]
    elif entry.is_coded:
        where, size = "gaps", entry.parts["gaps"].numel()
        row[kernels.LOW.value] = entry.parts["low"].data_ptr() if entry.bits else 0
        row[kernels.BLOCKS.value] = entry.parts["blocks"].data_ptr()
    for column, value in (
        (kernels.POSITIONS, entry.parts[where].data_ptr()),
        (kernels.VALUES, values.data_ptr()),
        (kernels.WEIGHT, job.weight.data_ptr()),
        (kernels.OLD, 0 if old is None else old.data_ptr()),
        (kernels.BITS, number),
        (kernels.COUNT, entry.count),
        (kernels.SIZE, size),
        (kernels.NUMEL, entry.numel),
    ):
        row[column.value] = value
    return row, triton.cdiv(size if where == "gaps" else entry.count, kernels.CODE.value)


def _table(jobs: Sequence[Job], values: Sequence[Tensor], olds: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    made = [_row(*each) for each in zip(jobs, values, olds, strict=True)]
    blocks = [count for _, count in made]
    for (row, _), first in zip(made, _running(blocks), strict=True):
        row[kernels.FIRST.value] = first
    return upload([row for row, _ in made], jobs[0].weight.device), blocks


def inspect(jobs: Sequence[Job], *, hashed: bool) -> list[Found]:
    found: dict[int, Found] = {}
    waiting: list[tuple[list[int], list[Tensor], Tensor, Tensor]] = []
    for kind, places in partition(range(len(jobs)), lambda i: _kind(jobs[i])):
        mine = [jobs[i] for i in places]
        if kind is None:
            found.update(zip(places, reference.inspect(mine, hashed=hashed), strict=True))
            continue
        for job in mine:
            if job.entry.kind == "sparse" and job.entry.is_coded:
                coding.check(job.entry.code(), job.entry.numel, job.entry.name)
        olds = [torch.empty_like(job.entry.values) for job in mine]
        table, blocks = _table(mine, [job.entry.values for job in mine], olds)
        device = table.device
        damaged = torch.empty(sum(blocks), dtype=torch.int32, device=device)
        changes = torch.empty(sum(blocks), dtype=torch.int64, device=device)
        with on(device):
            kernels.inspect[(sum(blocks),)](
                table, block_rows(tuple(blocks), device), damaged, changes, *_constants(kind), hashed, num_warps=8
            )
        waiting.append((places, olds, _segments(damaged, blocks), _segments(changes, blocks)))
    for places, olds, damages, changes in waiting:  # the device is asked once everything is under way
        for i, old, damage, change in zip(places, olds, damages.tolist(), changes.tolist(), strict=True):
            if damage:
                raise coding.damaged(jobs[i].entry.name)
            found[i] = Found(old, total(change))
    return [found[i] for i in range(len(jobs))]


def _constants(kind: Any) -> tuple[Any, ...]:
    how, size, wide = kind
    return how, _TYPES[size], wide


def write(jobs: Sequence[Job], values: Sequence[Tensor]) -> None:
    for kind, places in partition(range(len(jobs)), lambda i: _kind(jobs[i])):
        mine, new = [jobs[i] for i in places], [values[i].contiguous() for i in places]
        if kind is None:
            reference.write(mine, new)
            continue
        table, blocks = _table(mine, new, [None] * len(mine))
        with on(table.device):
            kernels.write[(sum(blocks),)](
                table, block_rows(tuple(blocks), table.device), *_constants(kind), num_warps=8
            )


# Finding and coding what has changed


def changed(before: Tensor, after: Tensor) -> Tensor:
    old, now = flat(before), flat(after)
    programs = max(1, triton.cdiv(now.numel(), 4 * BLOCK))
    counts = torch.empty(programs, dtype=torch.int32, device=now.device)
    with on(now.device):
        kernels.count_changed[(programs,)](old, now, now.numel(), counts, BLOCK=4 * BLOCK, num_warps=8)
        ends = counts.to(torch.int64).cumsum(0)
        dtype = torch.int32 if now.numel() < 2**31 else torch.int64
        positions = torch.empty(int(ends[-1]), dtype=dtype, device=now.device)
        kernels.list_changed[(programs,)](old, now, now.numel(), ends - counts, positions, BLOCK=4 * BLOCK, num_warps=8)
    return positions


def encode(positions: Tensor, numel: int) -> Coded:
    count, low_bits = positions.numel(), coding.low_bits(positions.numel(), numel)
    positions, device = positions.contiguous(), positions.device
    programs = triton.cdiv(count, BLOCK)
    sizes = torch.empty(programs, dtype=torch.int64, device=device)
    with on(device):
        kernels.measure[(programs,)](positions, count, low_bits, sizes, BLOCK=BLOCK)
        ends = sizes.cumsum(0)
        size = int(ends[-1])
        gaps = torch.full((size,), 255, dtype=torch.uint8, device=device)
        low = torch.empty(-(-count * low_bits // 8), dtype=torch.uint8, device=device)
        blocks = torch.empty(-(-size // coding.BLOCK), 2, dtype=torch.int64, device=device)
        kernels.encode[(programs,)](
            positions, count, low_bits, ends - sizes, gaps, low, low.numel(), blocks, BLOCK=BLOCK
        )
    return Coded(gaps, low, blocks, low_bits, count)


def collect(
    weights: Sequence[Tensor], indices: Sequence[Tensor], layouts: Sequence[Layout]
) -> list[tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    others: list[int] = []

    def kind(i: int) -> Any:
        small = weights[i].numel() < 2**31 and weights[i].is_contiguous()
        return weights[i].dtype if small else None

    for dtype, places in partition(range(len(weights)), kind):
        if dtype is None:
            others += places
            continue
        collected, empty = _collect(weights, indices, layouts, places)
        found.update(zip(places, collected, strict=True))
        others += [i for i, count in zip(places, empty.tolist(), strict=True) if count]  # -1: no weight lies there
    rest = reference.collect([weights[i] for i in others], [indices[i] for i in others], [layouts[i] for i in others])
    found.update(zip(others, rest, strict=True))
    return [found[i] for i in range(len(weights))]


def _collect(
    weights: Sequence[Tensor], indices: Sequence[Tensor], layouts: Sequence[Layout], places: Sequence[int]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    dtype, device = weights[places[0]].dtype, weights[places[0]].device
    counts = [layouts[i].selected for i in places]
    positions = torch.empty(sum(counts), dtype=torch.int32, device=device).split(counts)
    values = torch.empty(sum(counts), dtype=dtype, device=device).split(counts)
    blocks = [triton.cdiv(count, BLOCK) for count in counts]
    rows = []
    for n, (i, first) in enumerate(zip(places, _running(blocks), strict=True)):
        lay = layouts[i]
        addresses = [each.data_ptr() for each in (indices[i], weights[i], positions[n], values[n])]
        rows.append([*addresses, lay.line, lay.chunk, lay.full, lay.keep, lay.kept_per_line, lay.selected, first])
    empty = torch.empty(sum(blocks), dtype=torch.int32, device=device)
    with on(device):
        kernels.collect[(sum(blocks),)](
            upload(rows, device), block_rows(tuple(blocks), device), empty, TYPE=_TYPES[dtype.itemsize], BLOCK=BLOCK
        )
    return list(zip(positions, values, strict=True)), _segments(empty, blocks)
