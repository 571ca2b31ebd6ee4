"""The operations in plain PyTorch, on any device: the definition that the kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoadam.delta.bits import bits, extent, offsets
from nanoadam.delta.hashing import hash_change, hash_tensor, total
from nanoadam.delta.ops import Found, Job


def hash_all(tensors: Sequence[Tensor]) -> list[int]:
    hashes = [hash_tensor(tensor) for tensor in tensors]
    return [total(value) for value in torch.stack(hashes).tolist()] if hashes else []


def _places(job: Job) -> Tensor:
    """Row-major positions: int32 where they fit, since they are kept until they are written."""
    if "positions" not in job.cache:
        positions = job.entry.positions()
        job.cache["positions"] = positions.to(torch.int32) if job.entry.numel < 2**31 else positions
    places: Tensor = job.cache["positions"]
    return places


def inspect(jobs: Sequence[Job]) -> list[Found]:
    found = []
    for job in jobs:
        entry, positions = job.entry, _places(job)
        place = offsets(positions.to(torch.int64), job.weight)
        old = extent(job.weight)[place].view(entry.dtype)
        change = hash_change(positions, old, entry.values.reshape(-1), entry.numel)
        found.append(Found(old.view(entry.values.shape), total(change)))
    return found


def write(jobs: Sequence[Job], values: Sequence[Tensor]) -> None:
    for job, new in zip(jobs, values, strict=True):
        place = offsets(_places(job).to(torch.int64), job.weight)
        extent(job.weight)[place] = bits(new.reshape(-1))
