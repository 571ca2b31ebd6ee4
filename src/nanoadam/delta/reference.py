"""The operations in plain PyTorch, on any device: the definition that the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoadam.chunks import Layout
from nanoadam.delta import coding
from nanoadam.delta.bits import bits, extent, flat, offsets
from nanoadam.delta.coding import Coded
from nanoadam.delta.hashing import hash_change, hash_tensor, total
from nanoadam.delta.jobs import Found, Job
from nanoadam.ops.reference import positions as of_index

_PIECE = 1 << 24
"""Weights compared at a time."""


def hashes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([hash_tensor(tensor) for tensor in tensors])


def _places(job: Job) -> Tensor:
    """Row-major positions: int32 where they fit, since they are kept until they are written."""
    if "positions" not in job.cache:
        positions = job.entry.positions()
        job.cache["positions"] = positions.to(torch.int32) if job.entry.numel < 2**31 else positions
    places: Tensor = job.cache["positions"]
    return places


def inspect(jobs: Sequence[Job], *, hashed: bool) -> list[Found]:
    found = []
    for job in jobs:
        entry, positions = job.entry, _places(job)
        place = offsets(positions.to(torch.int64), job.weight)
        old = extent(job.weight)[place].view(entry.dtype)
        change = total(hash_change(positions, old, entry.values.reshape(-1), entry.numel)) if hashed else 0
        found.append(Found(old.view(entry.values.shape), change))
    return found


def write(jobs: Sequence[Job], values: Sequence[Tensor]) -> None:
    for job, new in zip(jobs, values, strict=True):
        place = offsets(_places(job).to(torch.int64), job.weight)
        extent(job.weight)[place] = bits(new.reshape(-1))


def changed(before: Tensor, after: Tensor) -> Tensor:
    dtype = torch.int32 if after.numel() < 2**31 else torch.int64
    pieces = zip(flat(before).split(_PIECE), flat(after).split(_PIECE), strict=True)
    return torch.cat([(a != b).nonzero().view(-1).add_(i * _PIECE).to(dtype) for i, (a, b) in enumerate(pieces)])


def encode(positions: Tensor, numel: int) -> Coded:
    return coding.encode(positions, numel)


def collect(
    weights: Sequence[Tensor], indices: Sequence[Tensor], layouts: Sequence[Layout]
) -> list[tuple[Tensor, Tensor]]:
    found = []
    for weight, index, layout in zip(weights, indices, layouts, strict=True):
        positions = of_index(index, layout)[index >= 0]
        values = extent(weight)[offsets(positions, weight)].view(weight.dtype)
        found.append((positions.to(torch.int32) if weight.numel() < 2**31 else positions, values))
    return found
