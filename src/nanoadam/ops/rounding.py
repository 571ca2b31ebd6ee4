"""Counter-based random bits and stochastic rounding: the same bits on every device.

A word of random bits is a hash of (seed, step, tensor, position in the full tensor), so it depends neither on
the device, nor on the number of processes, nor on what was drawn before. `ops/triton.py` computes the same
function in 32-bit arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_SECOND = 0x6A09E667  # separates the second word of a position from the first


def mix(x: int) -> int:
    """A bijection of 32-bit words in which every input bit moves every output bit about half the time.

    Chris Wellons' `lowbias32` (public domain, https://nullprogram.com/blog/2018/07/31/).
    """
    x &= _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def seed_key(seed: int) -> int:
    """The 32-bit key of a seed of up to 64 bits."""
    return mix(mix(seed) ^ mix((seed >> 32) ^ 0x9E3779B9))


def tensor_key(key: int, step: int, tensor: int) -> int:
    """The 32-bit key of one tensor at one step; `tensor` is its ordinal in the optimizer."""
    return mix(mix(key ^ (step & _WORD)) ^ (tensor & _WORD))


def _mix_words(x: Tensor) -> Tensor:
    # int64 holding 32-bit words: products wrap modulo 2**64, which leaves their low 32 bits right.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def random_words(key: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each position.

    Args:
        key: from `tensor_key`.
        position: int64, any shape; place of the weight in the flattened full tensor (row-major).

    Returns:
        Two int64 tensors of that shape with values in [0, 2**32).
    """
    first = _mix_words(_mix_words((position >> 32) ^ key) ^ (position & _WORD))
    return first, _mix_words(first ^ _SECOND)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with a probability equal to the part that is cut off: unbiased.

    Args:
        value: float32. Infinities and NaN are kept.
        noise: integer, same shape; its low 16 bits are used.
    """
    bits = value.view(torch.int32)
    rounded = (bits + (noise & 0xFFFF).to(torch.int32)) & -0x10000
    return torch.where(value.isfinite(), rounded.view(torch.float32), value).to(torch.bfloat16)
