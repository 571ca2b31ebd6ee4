"""What the hosts of the Triton kernels share: what a kernel can address, and tables of addresses on the device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

TYPES = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}

WIDE_FROM = 2**31
"""Weights of a tensor from which on its positions take 64 bits."""


def spatial(tensor: Tensor) -> int:
    """1 if contiguous, the weights per channel if channels-last, 0 for other strides."""
    if tensor.is_contiguous():
        return 1
    if (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)) or (
        tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        return math.prod(tensor.shape[2:])
    return 0


def is_aligned(tensor: Tensor, *counts: int) -> bool:
    """Whether 8 weights at a time can be read: of 16-bit ones, 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(count % 8 == 0 for count in counts)


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel whatever the word."""
    return word - 2**32 if word >= 2**31 else word


def partition(items: Iterable[Any], key: Callable[[Any], Hashable]) -> Iterable[tuple[Any, list[Any]]]:
    parts: dict[Hashable, list[Any]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts.items()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph and does not run yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(rows: Sequence[Sequence[int]] | Sequence[int], device: torch.device) -> Tensor:
    """int64, of the same shape, on the device."""
    table = torch.tensor(rows, dtype=torch.int64)
    if capturing(device):
        table = table.pin_memory()
        captured.append(table)
    return table.to(device, non_blocking=True)


captured: list[Any] = []
"""What CUDA graphs need whenever they are replayed: tables that they copy from the host, and those on the device."""


@functools.lru_cache(maxsize=64)
def block_rows(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sum of blocks]: which tensor each block belongs to."""
    counts = torch.tensor(blocks, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), counts).to(device)
