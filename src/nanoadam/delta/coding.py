"""Positions as gaps: one byte each, with 255 as continuation, in blocks that can be decoded by themselves.

The code of a list of positions p_0 < p_1 < ... has three parts:

- `gaps`, bytes. A cursor starts at 0. A byte b moves it on by b << bits. If b is below 255, the next entry of
  `low` is added, the cursor is the next position, and moves on by one more.
- `low`, `bits` bits for each position, packed little-endian: what is too fine for the bytes in a sparse tensor.
- `blocks`, two int64 for every 2,048 bytes of `gaps`: the positions before this block and the cursor there.

With bits = 0 a density of 1 % takes 1.08 bytes a position and 10 % take one; below, `bits` keeps it near the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoadam.delta.errors import DeltaError

BLOCK = 2048
"""Bytes of `gaps` in a block."""

MAX_BITS = 24
_SPACING = 125
"""The mean gap up to which a byte alone is shortest: there 1.16 bytes with 0 bits equal 1.14 with one."""

_ENTRIES = 1 << 20
"""Positions coded at a time, so that a large tensor needs little beside its positions."""


@dataclass(frozen=True)
class Coded:
    """Positions, coded.

    Attributes:
        gaps: uint8 [bytes].
        low: uint8 [ceil(count * bits / 8)].
        blocks: int64 [ceil(bytes / 2048), 2].
        bits: low bits of each gap that are in `low`.
        count: positions.
    """

    gaps: Tensor
    low: Tensor
    blocks: Tensor
    bits: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the three parts."""
        return self.gaps.nbytes + self.low.nbytes + self.blocks.nbytes

    def to(self, device: torch.device | str) -> Coded:
        """The same on another device."""
        return Coded(self.gaps.to(device), self.low.to(device), self.blocks.to(device), self.bits, self.count)


def low_bits(count: int, numel: int) -> int:
    """How many low bits are split off, for `count` positions in a tensor of `numel` elements."""
    bits = 0
    while (count * _SPACING) << bits < numel and bits < MAX_BITS:
        bits += 1
    return bits


def encode(positions: Tensor, numel: int) -> Coded:
    """Code ascending positions.

    Args:
        positions: int32 or int64 [n], strictly ascending, from 0 to numel - 1.
        numel: elements of the tensor.
    """
    count, bits = positions.numel(), low_bits(positions.numel(), numel)
    gaps: list[Tensor] = []
    lows: list[Tensor] = []
    blocks: list[Tensor] = []
    before, written = 0, 0  # cursor and bytes at the start of a piece
    for first in range(0, count, _ENTRIES):
        piece = positions[first : first + _ENTRIES].to(torch.int64)
        start = torch.cat([piece.new_tensor([before]), piece[:-1] + 1])
        gap = piece - start
        high = gap >> bits
        if bits:
            lows.append(gap & ((1 << bits) - 1))
        runs = torch.div(high, 255, rounding_mode="floor")
        ends = (runs + 1).cumsum(0)  # bytes up to and including each position's last
        code = torch.full((int(ends[-1]),), 255, dtype=torch.uint8, device=piece.device)
        code[ends - 1] = (high - runs * 255).to(torch.uint8)
        gaps.append(code)
        blocks.append(_rows(first, start, ends, written, bits))
        before, written = int(piece[-1]) + 1, written + code.numel()
    low = _pack(torch.cat(lows), bits) if lows else torch.empty(0, dtype=torch.uint8, device=positions.device)
    return Coded(torch.cat(gaps), low, torch.cat(blocks), bits, count)


def _rows(first: int, start: Tensor, ends: Tensor, written: int, bits: int) -> Tensor:
    """The rows of `blocks` whose first byte lies in a piece: int64 [blocks, 2].

    Args:
        first: positions before the piece.
        start: the cursor before each position of the piece.
        ends: bytes of the piece up to and including each position.
        written: bytes before the piece.
        bits: low bits.
    """
    total = int(ends[-1])
    at = torch.arange(-(-written // BLOCK) * BLOCK, written + total, BLOCK, device=ends.device) - written
    done = torch.searchsorted(ends, at, right=True)  # positions whose last byte comes before
    begun = torch.where(done > 0, ends[(done - 1).clamp(min=0)], 0)
    cursor = start[done] + (at - begun) * (255 << bits)
    return torch.stack([first + done, cursor], dim=1)


def _pack(low: Tensor, bits: int) -> Tensor:
    """uint8: `bits` bits of each number, little-endian, one after the other."""
    size = -(-low.numel() * bits // 8)
    packed = torch.zeros(size + 4, dtype=torch.int32, device=low.device)
    at = torch.arange(low.numel(), device=low.device) * bits
    word, byte = low << (at & 7), at >> 3
    for i in range(4):  # 24 bits from bit 7 on reach into a fourth byte; sums are unions, no bit meets another
        packed.index_add_(0, byte + i, ((word >> (8 * i)) & 255).to(torch.int32))
    return packed[:size].to(torch.uint8)


def _unpack(low: Tensor, bits: int, first: int, count: int) -> Tensor:
    """int64 [count]: the low bits of positions `first` and on."""
    at = torch.arange(first, first + count, device=low.device) * bits
    byte, word = at >> 3, torch.zeros(count, dtype=torch.int64, device=low.device)
    last = low.numel() - 1
    for i in range(4):
        word |= low[(byte + i).clamp(max=last)].to(torch.int64) << (8 * i)
    return (word >> (at & 7)) & ((1 << bits) - 1)


def check(coded: Coded, numel: int, where: str) -> None:
    """Refuse parts that do not fit together, before they are decoded.

    Raises:
        DeltaError: naming what is wrong with the positions of the tensor `where`.
    """
    count, size = coded.count, coded.gaps.numel()
    if not 0 < count <= numel:
        raise DeltaError(f"{where}: {count} changed weights in a tensor of {numel}: the patch is damaged")
    if not 0 <= coded.bits <= MAX_BITS:
        raise DeltaError(f"{where}: {coded.bits} low bits, the format knows 0 to {MAX_BITS}: the patch is damaged")
    wanted = (-(-count * coded.bits // 8), -(-size // BLOCK))
    if size < count or (coded.low.numel(), coded.blocks.numel()) != (wanted[0], 2 * wanted[1]):
        raise DeltaError(
            f"{where}: {size} bytes of gaps, {coded.low.numel()} of low bits and {coded.blocks.numel() // 2} blocks "
            f"do not belong to {count} positions: the patch is damaged"
        )


def damaged(where: str) -> DeltaError:
    """The error for positions that do not decode."""
    return DeltaError(
        f"{where}: its positions are out of order or out of range: the patch is damaged, get it from its source again"
    )


def decode(coded: Coded, numel: int, where: str = "the tensor") -> Tensor:
    """The positions: int64 [count], strictly ascending, each below `numel`.

    Raises:
        DeltaError: if the parts contradict each other or `numel`.
    """
    check(coded, numel, where)
    found: list[Tensor] = []
    entry, cursor = 0, 0
    step = _ENTRIES // BLOCK
    for first in range(0, coded.blocks.shape[0], step):
        code = coded.gaps[first * BLOCK : (first + step) * BLOCK].to(torch.int64)
        is_end = code < 255
        ranks = is_end.cumsum(0)
        entries = int(ranks[-1])
        if entry + entries > coded.count:
            raise damaged(where)
        places = is_end.nonzero().view(-1)
        moves = code << coded.bits
        moves[places] += 1
        if coded.bits and entries:
            moves[places] += _unpack(coded.low, coded.bits, entry, entries)
        cursors = moves.cumsum(0) + cursor
        at = torch.arange(0, code.numel(), BLOCK, device=code.device)
        starts = torch.stack([entry + ranks[at] - is_end[at].long(), cursors[at] - moves[at]], dim=1)
        if not torch.equal(starts, coded.blocks[first : first + step]):
            raise damaged(where)
        found.append(cursors[places] - 1)
        entry, cursor = entry + entries, int(cursors[-1])
    if entry != coded.count or cursor > numel or coded.gaps[-1] == 255:
        raise damaged(where)
    return torch.cat(found)
