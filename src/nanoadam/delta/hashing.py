"""The hash of a tensor: a sum of its words, each times an odd number that belongs to its place.

    hash = sum over w of A(w // 4096) * B(w % 4096) * word(w)    mod 2**64

The words are the tensor's bytes in row-major order, four at a time, little-endian and unsigned, the last one filled up
with zeros. A and B are odd numbers of 64 bits from SplitMix64's mixer (Steele, Lea, Flood 2014). Three properties
are used all over this room:

- it is a sum, so any number of threads in any order make the same one, at the speed of reading memory;
- a change within one word, so any flipped bit, always shows: odd times nonzero below 2**32 is not zero mod 2**64;
- it is linear, so the hash after a change follows from the hash before and the changed weights alone.

It finds accidents, not forgers: for those the file carries SHA-256.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nanoadam.delta.bits import flat

GOLDEN = 0x9E3779B97F4A7C15
BLOCK = 4096
"""Words that share one A."""

_PIECE = 7
"""Blocks hashed at a time on a CPU. torch shares work of 32,768 elements and more out to its threads, which costs more
than it gives where others use the cores as well; below, each of our own threads has its part of the tensor."""

_CHANGES = 32_000
"""Changed elements looked at together on a CPU, for the same reason."""


def signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def _shift(value: Tensor, count: int) -> Tensor:
    return (value >> count) & ((1 << (64 - count)) - 1)  # torch shifts int64 with its sign


def _odd(number: Tensor) -> Tensor:
    """int64: SplitMix64's mixer of GOLDEN * number, made odd."""
    value = number * signed(GOLDEN)
    value = (value ^ _shift(value, 30)) * signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * signed(0x94D049BB133111EB)
    return (value ^ _shift(value, 31)) | 1


@functools.lru_cache(maxsize=8)
def within(device: torch.device) -> Tensor:
    """B: int64 [4096]."""
    return _odd(2 * torch.arange(BLOCK, device=device) + 2)


def of_blocks(first: int, count: int, device: torch.device) -> Tensor:
    """A: int64 [count]."""
    return _odd(2 * torch.arange(first, first + count, device=device) + 1)


def words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's whole words (uint32) and the bytes (uint8, up to three) that are left of it."""
    content = flat(tensor).view(torch.uint8)
    cut = content.numel() // 4 * 4
    if content.storage_offset() % 4:  # a view into a file
        content = content.clone()
    return content[:cut].view(torch.uint32), content[cut:]


def tail(rest: Tensor, word: int) -> Tensor:
    """int64 scalar: what the last, incomplete word adds. `rest` is uint8 [0..3]."""
    value = (rest.to(torch.int64) << (8 * torch.arange(rest.numel(), device=rest.device))).sum()
    last = torch.tensor([word], device=rest.device)
    return value * (of_blocks(word // BLOCK, 1, rest.device) * within(rest.device)[last % BLOCK]).sum()


def hash_tensor(tensor: Tensor) -> Tensor:
    """The hash as an int64 scalar on the tensor's device: the definition, on any device."""
    whole, rest = words(tensor)
    device, blocks = whole.device, whole.numel() // BLOCK
    content, factors = whole[: blocks * BLOCK].view(blocks, BLOCK), of_blocks(0, blocks, device)[:, None]
    if device.type == "cpu":
        parts = max(1, min(torch.get_num_threads(), blocks // (8 * _PIECE)))
        spans = list(zip(content.tensor_split(parts), factors.tensor_split(parts), strict=True))
        if parts == 1:
            total = _columns(content, factors, _PIECE)
        else:
            with ThreadPoolExecutor(parts) as pool:
                total = torch.stack(list(pool.map(lambda span: _columns(span[0], span[1], _PIECE), spans))).sum(0)
    else:
        total = _columns(content, factors, 4096)
    left = whole[blocks * BLOCK :].to(torch.int64)
    total[: left.numel()] += left * of_blocks(blocks, 1, device)
    result = (total * within(device)).sum()
    return result + tail(rest, whole.numel()) if rest.numel() else result


def _columns(content: Tensor, factors: Tensor, piece: int) -> Tensor:
    """The sum over blocks of A times each word: int64 [4096]; of uint32 [blocks, 4096] and int64 [blocks, 1]."""
    total, part = torch.zeros(2, BLOCK, dtype=torch.int64, device=content.device).unbind()
    buffer = torch.empty(min(piece, len(content)), BLOCK, dtype=torch.int64, device=content.device)
    for words_, numbers in zip(content.split(piece), factors.split(piece), strict=True):
        filled = buffer[: len(words_)].copy_(words_)
        total += torch.sum(filled.mul_(numbers), 0, out=part)
    return total


def _key(word: Tensor, blocks: Tensor) -> Tensor:
    """int64: the odd number of each word; `blocks` is A, int64 [blocks of the tensor]."""
    high = word >> 12
    return blocks[high] * within(word.device)[word & (BLOCK - 1)]


def hash_change(position: Tensor, old: Tensor, new: Tensor, numel: int) -> Tensor:
    """By how much a tensor's hash changes with some of its elements: int64 scalar.

    Args:
        position: int32 or int64 [n], row-major.
        old: [n], of the tensor's dtype: the elements before.
        new: [n], the same: the elements afterwards.
        numel: elements of the tensor.
    """
    size = old.element_size()
    blocks = of_blocks(0, -(-numel * size // (4 * BLOCK)), position.device)
    change = torch.zeros((), dtype=torch.int64, device=position.device)
    count = _CHANGES if position.device.type == "cpu" else 1 << 22
    pieces = zip(position.split(count), flat(old).split(count), flat(new).split(count), strict=True)
    for where, before, after in pieces:
        where = where.to(torch.int64)
        if size == 8:
            where = (2 * where[:, None] + torch.arange(2, device=where.device)).view(-1)
            before, after = before.view(torch.uint32), after.view(torch.uint32)
        mask = (1 << (8 * min(size, 4))) - 1
        moved = (after.to(torch.int64) & mask) - (before.to(torch.int64) & mask)
        if size < 4:
            byte = where * size
            moved, where = moved << (byte % 4 * 8), byte >> 2
        change += (moved * _key(where, blocks)).sum()
    return change


def as_hex(value: int) -> str:
    """16 hexadecimal digits of a hash, given as int64 or as 64 bits."""
    return f"{value & (2**64 - 1):016x}"


def total(value: Tensor | int) -> int:
    """A hash as a number from 0 to 2**64 - 1."""
    return int(value) & (2**64 - 1)
