"""Triton kernels of patches. Each program finds its tensor in a table of addresses and sizes, as in `nanoadam.ops`.

Written for the GPU, for Triton's interpreter and for readers of `hashing.py`, `coding.py` and `reference.py`, which
define every result here. Weights are integers of their size: nothing is ever computed with them as numbers.
"""

# mypy: ignore-errors
# Kernels are not Python: decorators and bodies mean something else.

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(4096)  # words that share one A
CODE = tl.constexpr(2048)  # bytes of gaps in a block

# How positions are given.
CODED = tl.constexpr(0)
LISTED = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


# The hash: hashing.py.


@triton.jit
def _odd(number):
    """SplitMix64's mixer of an uint64, made odd."""
    value = number * 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return (value ^ (value >> 31)) | 1


@triton.jit
def _key(word):
    """The odd number of each word, uint64."""
    high = (word >> 12).to(tl.uint64)
    low = (word & 4095).to(tl.uint64)
    return _odd(2 * high + 1) * _odd(2 * low + 2)


# Columns of the table of tensors to hash.
H_ADDRESS = tl.constexpr(0)
H_WORDS = tl.constexpr(1)
H_FIRST = tl.constexpr(2)
H_COLUMNS = tl.constexpr(3)


@triton.jit
def _add_words(low, high, word, block):
    """Words times their block's odd number: one wide product, and one whose upper half nobody needs."""
    key = _odd(2 * block.to(tl.uint64) + 1)
    low += word.to(tl.uint64) * (key & 0xFFFFFFFF)
    high += word * (key >> 32).to(tl.uint32)
    return low, high


@triton.jit
def hash_words(table, block_rows, within, out, PARTS: tl.constexpr, ALIGNED: tl.constexpr):
    """What PARTS blocks of 4,096 words add to the hash of their tensor: one int64 a program."""
    program = tl.program_id(0)
    row = table + tl.load(block_rows + program) * H_COLUMNS
    words = tl.load(row + H_WORDS)
    address = tl.load(row + H_ADDRESS).to(tl.pointer_type(tl.uint32))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    first = (program - tl.load(row + H_FIRST)) * PARTS
    whole = words // WORDS
    lane = tl.arange(0, WORDS)
    low = tl.zeros([WORDS], tl.uint64)
    high = tl.zeros([WORDS], tl.uint32)
    for number in range(tl.minimum(PARTS, whole - first)):  # without a mask, which would take wide loads apart
        block = first + number
        word = tl.load(address + block * WORDS + lane)
        low, high = _add_words(low, high, word, block)
    if whole < first + PARTS:
        word = tl.load(address + whole * WORDS + lane, mask=whole * WORDS + lane < words, other=0)
        low, high = _add_words(low, high, word, whole)
    total = low + (high.to(tl.uint64) << 32)
    factor = tl.load(within + lane).to(tl.uint64, bitcast=True)
    tl.store(out + program, tl.sum((total * factor).to(tl.int64, bitcast=True), 0))


# Columns of the table of entries.
POSITIONS = tl.constexpr(0)  # gaps, positions or columns
LOW = tl.constexpr(1)
BLOCKS = tl.constexpr(2)
VALUES = tl.constexpr(3)
WEIGHT = tl.constexpr(4)
OLD = tl.constexpr(5)
BITS = tl.constexpr(6)  # of a coded entry; of a columns entry how many columns
COUNT = tl.constexpr(7)
SIZE = tl.constexpr(8)  # bytes of gaps; of a columns entry the width of the matrix
NUMEL = tl.constexpr(9)
FIRST = tl.constexpr(10)
FIELDS = tl.constexpr(11)


@triton.jit
def _unpack(low, entry, bits, size, mask):
    """The low bits of entries."""
    at = entry * bits
    byte = at >> 3
    word = tl.zeros_like(entry).to(tl.int64)
    for i in tl.static_range(4):
        part = tl.load(low + byte + i, mask=mask & (byte + i < size), other=0)
        word |= part.to(tl.int64) << (8 * i)
    return (word >> (at & 7)) & ((1 << bits.to(tl.int64)) - 1)


@triton.jit
def _coded(row, block, CHECK: tl.constexpr, WIDE: tl.constexpr):
    """Positions of one block of gaps: entry, position, where there is one, and whether the block is damaged."""
    gaps = tl.load(row + POSITIONS).to(tl.pointer_type(tl.uint8))
    low = tl.load(row + LOW).to(tl.pointer_type(tl.uint8))
    blocks = tl.load(row + BLOCKS).to(tl.pointer_type(tl.int64))
    bits = tl.load(row + BITS).to(tl.int32)
    count = tl.load(row + COUNT)
    size = tl.load(row + SIZE)
    place = block.to(tl.int64) * CODE + tl.arange(0, CODE)
    inside = place < size
    byte = tl.load(gaps + place, mask=inside, other=255).to(tl.int32)
    ends = byte < 255
    is_end = ends.to(tl.int32)
    entry0 = tl.load(blocks + 2 * block)
    cursor0 = tl.load(blocks + 2 * block + 1)
    entry = entry0 + tl.cumsum(is_end, 0) - is_end
    known = ends & (entry >= 0) & (entry < count)
    # The sum of a block stays below 2**31 while bits <= 11.
    move = tl.where(inside, byte, 0)
    if WIDE:
        move = move.to(tl.int64)
    move = move << bits
    if bits > 0:
        fine = _unpack(low, entry, bits, (count * bits + 7) >> 3, known)
        move += tl.where(ends, fine, 0).to(move.dtype)
    move += is_end
    position = cursor0 + tl.cumsum(move, 0) - 1
    bad = entry0 < 0
    if CHECK:
        entry1 = entry0 + tl.sum(is_end, 0)
        cursor1 = cursor0 + tl.sum(move, 0)
        last = tl.cdiv(size, CODE) - 1
        following = blocks + 2 * tl.minimum(block + 1, last)
        if block == last:
            bad |= entry1 != count
            bad |= tl.load(gaps + size - 1) == 255
        else:
            bad |= entry1 != tl.load(following)
            bad |= cursor1 != tl.load(following + 1)
        if block == 0:
            bad |= entry0 != 0
            bad |= cursor0 != 0
        bad |= cursor1 > tl.load(row + NUMEL)
    return entry, position, known, bad


@triton.jit
def _listed(row, block, CHECK: tl.constexpr, TYPE: tl.constexpr):
    """Positions from a list, as `_coded`."""
    positions = tl.load(row + POSITIONS).to(tl.pointer_type(TYPE))
    count = tl.load(row + COUNT)
    entry = block.to(tl.int64) * CODE + tl.arange(0, CODE)
    known = entry < count
    position = tl.load(positions + entry, mask=known, other=0).to(tl.int64)
    bad = count < 0
    if CHECK:
        before = tl.load(positions + entry - 1, mask=known & (entry > 0), other=-1).to(tl.int64)
        wrong = known & ((position <= before) | (position >= tl.load(row + NUMEL)))
        bad = tl.sum(wrong.to(tl.int32), 0) > 0
    return entry, position, known, bad


@triton.jit
def _of_columns(row, block, CHECK: tl.constexpr):
    """Positions of whole columns, as `_coded`."""
    columns = tl.load(row + POSITIONS).to(tl.pointer_type(tl.int32))
    chosen = tl.load(row + BITS)
    width = tl.load(row + SIZE)
    count = tl.load(row + COUNT)
    entry = block.to(tl.int64) * CODE + tl.arange(0, CODE)
    known = entry < count
    number = entry // chosen
    which = entry - number * chosen
    column = tl.load(columns + which, mask=known, other=0).to(tl.int64)
    bad = count < 0
    if CHECK:
        before = tl.load(columns + which - 1, mask=known & (which > 0), other=-1).to(tl.int64)
        bad = tl.sum((known & ((column <= before) | (column >= width))).to(tl.int32), 0) > 0
    return entry, number * width + column, known, bad


@triton.jit
def _positions(row, block, CHECK: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr):
    if KIND == CODED:
        entry, position, known, bad = _coded(row, block, CHECK, WIDE)
    elif KIND == LISTED:
        if WIDE:
            entry, position, known, bad = _listed(row, block, CHECK, tl.int64)
        else:
            entry, position, known, bad = _listed(row, block, CHECK, tl.int32)
    else:
        entry, position, known, bad = _of_columns(row, block, CHECK)
    return entry, position, known, bad


@triton.jit
def _unsigned(value):
    if value.dtype == tl.int16:
        value = value.to(tl.uint16, bitcast=True)
    elif value.dtype == tl.int32:
        value = value.to(tl.uint32, bitcast=True)
    elif value.dtype == tl.int64:
        value = value.to(tl.uint64, bitcast=True)
    return value.to(tl.uint64)


@triton.jit
def _moved(position, old, new):
    """What changed elements add to the hash, each for itself: uint64."""
    BITS: tl.constexpr = old.dtype.primitive_bitwidth
    before, after = _unsigned(old), _unsigned(new)
    if BITS == 64:
        lower = (after & 0xFFFFFFFF) - (before & 0xFFFFFFFF)
        moved = lower * _key(2 * position) + ((after >> 32) - (before >> 32)) * _key(2 * position + 1)
    elif BITS == 32:
        moved = (after - before) * _key(position)
    else:
        byte = position * (BITS // 8)
        moved = ((after - before) << ((byte & 3) * 8).to(tl.uint64)) * _key(byte >> 2)
    return moved


@triton.jit
def inspect(
    table,
    block_rows,
    damaged,
    changes,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    HASHED: tl.constexpr,
):
    """Save the weights as they are, and say what writing would add to the hash if HASHED; nothing is changed.

    damaged: int32, changes: int64, one each a program.
    """
    program = tl.program_id(0)
    row = table + tl.load(block_rows + program) * FIELDS
    entry, position, known, bad = _positions(row, program - tl.load(row + FIRST), True, KIND, WIDE)
    known = known & (position >= 0) & (position < tl.load(row + NUMEL))
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(TYPE))
    values = tl.load(row + VALUES).to(tl.pointer_type(TYPE))
    old = tl.load(weight + position, mask=known, other=0)
    tl.store(tl.load(row + OLD).to(tl.pointer_type(TYPE)) + entry, old, mask=known)
    if HASHED:
        new = tl.load(values + entry, mask=known, other=0)
        moved = tl.where(known, _moved(position, old, new), 0)
        tl.store(changes + program, tl.sum(moved.to(tl.int64, bitcast=True), 0))
    else:
        tl.store(changes + program, 0)
    tl.store(damaged + program, bad.to(tl.int32))


@triton.jit
def write(table, block_rows, KIND: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Write values to the places of entries that were inspected."""
    program = tl.program_id(0)
    row = table + tl.load(block_rows + program) * FIELDS
    entry, position, known, _bad = _positions(row, program - tl.load(row + FIRST), False, KIND, WIDE)
    values = tl.load(row + VALUES).to(tl.pointer_type(TYPE))
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(TYPE))
    tl.store(weight + position, tl.load(values + entry, mask=known, other=0), mask=known)


# Which weights differ.


@triton.jit
def count_changed(before, after, numel, counts, BLOCK: tl.constexpr):
    """Differing elements of each block."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    differ = tl.load(before + place, mask=inside, other=0) != tl.load(after + place, mask=inside, other=0)
    tl.store(counts + program, tl.sum(differ.to(tl.int32), 0))


@triton.jit
def list_changed(before, after, numel, starts, positions, BLOCK: tl.constexpr):
    """Positions of differing elements, ascending; `starts` (int64): how many come before each block."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    differ = tl.load(before + place, mask=inside, other=0) != tl.load(after + place, mask=inside, other=0)
    number = differ.to(tl.int32)
    at = tl.load(starts + program) + tl.cumsum(number, 0) - number
    tl.store(positions + at, place.to(positions.dtype.element_ty), mask=differ)


# Gaps from positions: coding.py.


@triton.jit
def _gap(positions, entry, known):
    """The gap before each position, and the cursor that it starts from."""
    before = tl.load(positions + entry - 1, mask=known & (entry > 0), other=-1).to(tl.int64)
    start = before + 1
    return tl.load(positions + entry, mask=known, other=0).to(tl.int64) - start, start


@triton.jit
def measure(positions, count, bits, sizes, BLOCK: tl.constexpr):
    """Bytes that BLOCK positions take."""
    program = tl.program_id(0)
    entry = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = entry < count
    gap, _ = _gap(positions, entry, known)
    size = tl.where(known, (gap >> bits) // 255 + 1, 0)
    tl.store(sizes + program, tl.sum(size, 0))


@triton.jit
def encode(positions, count, bits, starts, gaps, low, low_size, blocks, BLOCK: tl.constexpr):
    """Last bytes of BLOCK positions into `gaps` (which is 255 everywhere), low bits, and rows of `blocks`."""
    program = tl.program_id(0)
    entry = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = entry < count
    gap, start = _gap(positions, entry, known)
    high = gap >> bits
    size = tl.where(known, high // 255 + 1, 0)
    end = tl.load(starts + program) + tl.cumsum(size, 0)
    tl.store(gaps + end - 1, (high % 255).to(tl.uint8), mask=known)
    # A row for each block of gaps that begins within the bytes of a position.
    begin = end - size
    row = (begin + 2047) >> 11
    open_ = known & (row * 2048 < end)
    while tl.sum(open_.to(tl.int32), 0) > 0:
        cursor = start + (((row * 2048 - begin) * 255) << bits)
        tl.store(blocks + 2 * row, entry, mask=open_)
        tl.store(blocks + 2 * row + 1, cursor, mask=open_)
        row += 1
        open_ = known & (row * 2048 < end)
    if bits > 0:
        # BLOCK positions fill whole bytes: BLOCK * bits / 8 of them, 128 at a time, bit by bit.
        base = program.to(tl.int64) * (BLOCK // 8) * bits
        for part in range(bits):
            byte = base + part * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            packed = tl.zeros([BLOCK // 8], tl.int64)
            for i in tl.static_range(8):
                bit = byte * 8 + i
                whose = bit // bits
                fine, _ = _gap(positions, whose, whose < count)
                packed |= tl.where(whose < count, (fine >> (bit - whose * bits)) & 1, 0) << i
            tl.store(low + byte, packed.to(tl.uint8), mask=byte < low_size)


# What a selection moved.

# Columns of the table of selections.
C_INDEX = tl.constexpr(0)
C_WEIGHT = tl.constexpr(1)
C_POSITIONS = tl.constexpr(2)
C_VALUES = tl.constexpr(3)
C_LINE = tl.constexpr(4)
C_CHUNK = tl.constexpr(5)
C_FULL = tl.constexpr(6)
C_KEEP = tl.constexpr(7)
C_KEPT_PER_LINE = tl.constexpr(8)
C_SELECTED = tl.constexpr(9)
C_FIRST = tl.constexpr(10)
C_FIELDS = tl.constexpr(11)


@triton.jit
def collect(table, block_rows, empty, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Row-major positions (int32) and values of selected weights, from their indices within chunks (chunks.py).

    empty: int32, one a program: places whose index is -1.
    """
    program = tl.program_id(0)
    row = table + tl.load(block_rows + program) * C_FIELDS
    entry = (program - tl.load(row + C_FIRST)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    known = entry < tl.load(row + C_SELECTED).to(tl.int32)
    index = tl.load(tl.load(row + C_INDEX).to(tl.pointer_type(tl.int16)) + entry, mask=known, other=0).to(tl.int32)
    kept = tl.load(row + C_KEPT_PER_LINE).to(tl.int32)
    tl.store(empty + program, tl.sum((known & (index < 0)).to(tl.int32), 0))
    line = entry // kept
    within = entry - line * kept
    chunk = tl.minimum(within // tl.maximum(tl.load(row + C_KEEP).to(tl.int32), 1), tl.load(row + C_FULL).to(tl.int32))
    position = line * tl.load(row + C_LINE).to(tl.int32) + chunk * tl.load(row + C_CHUNK).to(tl.int32) + index
    value = tl.load(tl.load(row + C_WEIGHT).to(tl.pointer_type(TYPE)) + position, mask=known & (index >= 0), other=0)
    tl.store(tl.load(row + C_POSITIONS).to(tl.pointer_type(tl.int32)) + entry, position, mask=known)
    tl.store(tl.load(row + C_VALUES).to(tl.pointer_type(TYPE)) + entry, value, mask=known)
