"""The k smallest magnitudes of a tensor, exactly, in pieces: extra memory that does not grow with the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 2**19
"""Elements looked at at once: what is made of them stays in a CPU's cache."""

_HIGH = 15  # bits below the upper 16 of a float32 magnitude, which are all of a bfloat16


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same part of each tensor, flat and in float32, one after the other."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(tensor[start : start + PIECE].float() for tensor in flat)


def bits(values: Tensor) -> Tensor:
    """Float32 as int32 that are ordered like the magnitudes; NaN comes last."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


class Smallest:
    """Which elements of a tensor are its k smallest by magnitude; of equal ones the first, NaN last.

    Call it with one piece after the other, in the order of `pieces`. Made by `smallest`.
    """

    def __init__(self, edge: int, room: int) -> None:
        self._edge, self._room = edge, room  # below the edge all are in, and the first `room` of those at it

    @property
    def largest(self) -> float:
        """The magnitude of the largest of them; 0 of none."""
        return float(torch.tensor(max(self._edge, 0), dtype=torch.int32).view(torch.float32))

    def __call__(self, piece: Tensor) -> Tensor:
        """Bool, in the shape of the next piece (flat, float32)."""
        found = bits(piece)
        chosen = found < self._edge
        if self._room > 0:
            level = found == self._edge
            count = int(level.sum())
            if count > self._room:
                level &= level.cumsum(0) <= self._room
            self._room -= min(count, self._room)
            chosen |= level
        return chosen


def smallest(tensor: Tensor, counts: Sequence[int]) -> list[Smallest]:
    """For each k of `counts` the k smallest elements, k from 0 to all of them.

    Args:
        tensor: any shape and float dtype; compared in float32.
        counts: how many, once or several times: they share the first pass over the tensor.
    """
    high = _histogram(tensor, None)
    found = []
    for k in counts:
        if k == 0:
            found.append(Smallest(-1, 0))
            continue
        bucket, before = _bucket(high, k)
        low, below = _bucket(_histogram(tensor, bucket), k - before)
        found.append(Smallest((bucket << _HIGH) + low, k - before - below))
    return found


def _histogram(tensor: Tensor, within: int | None) -> Tensor:
    """How many magnitudes have which upper bits; or, of those with the upper bits `within`, which lower ones."""
    size = 2**16 if within is None else 2**_HIGH
    counts = torch.zeros(size, dtype=torch.int64, device=tensor.device)
    for (values,) in pieces(tensor):
        found = bits(values)
        found = found >> _HIGH if within is None else found[found >> _HIGH == within] & (size - 1)
        counts += torch.bincount(found, minlength=size)
    return counts


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest, and how many elements the buckets before it hold."""
    up_to = counts.cumsum(0)
    bucket = int((up_to < k).sum())
    return bucket, int(up_to[bucket] - counts[bucket])
