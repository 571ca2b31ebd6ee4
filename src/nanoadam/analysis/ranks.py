"""The k smallest magnitudes of a tensor, exactly, in pieces: extra memory that does not grow with the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**22
"""Elements looked at at once."""


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

    Args:
        tensor: any shape and float dtype; compared in float32.
        k: how many, from 0 to all of them.

    Call it with one piece after the other, in the order of `pieces`.
    """

    def __init__(self, tensor: Tensor, k: int) -> None:
        self._edge, self._room = -1, 0  # magnitudes below the edge are in, and the first `room` of those at it
        if k > 0:
            high, before = self._find(tensor, k, shift=15, within=None)
            low, below = self._find(tensor, k - before, shift=0, within=high)
            self._edge, self._room = (high << 15) + low, k - before - below

    @staticmethod
    def _find(tensor: Tensor, k: int, shift: int, within: int | None) -> tuple[int, int]:
        """The bucket that holds the k-th smallest, and how many elements the buckets before it hold."""
        counts = torch.zeros(2**16, dtype=torch.int64, device=tensor.device)
        for (values,) in pieces(tensor):
            found = bits(values)
            if within is not None:
                found = found[found >> 15 == within] & 0x7FFF
            counts += torch.bincount(found >> shift, minlength=2**16)
        up_to = counts.cumsum(0)
        bucket = int((up_to < k).sum())
        return bucket, int(up_to[bucket] - counts[bucket])

    def __call__(self, piece: Tensor) -> Tensor:
        """Bool, in the shape of the next piece (flat, float32)."""
        found = bits(piece)
        level = found == self._edge
        chosen = (found < self._edge) | (level & (level.cumsum(0) <= self._room))
        self._room -= int((level & chosen).sum())
        return chosen
