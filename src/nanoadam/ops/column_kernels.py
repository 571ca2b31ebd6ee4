"""Triton kernels for whole columns. `reference.py` defines every result here; written as `kernels.py` is.

What belongs to selected weights is stored column after column, [keep, outputs]. So a program serves a tile of columns
and outputs, and a column that stays keeps its moments by moving a row.
"""

# mypy: ignore-errors
# Kernels are not Python: decorators and bodies mean something else.

from __future__ import annotations

import triton
import triton.language as tl

from nanoadam.ops.kernels import MAX_AGE, NEVER, _adam, _field, _number, _random_words, _store, _tensor_key
from nanoadam.ops.selection import _magnitude

# Columns of the table (int64), as `column_triton.py` writes them.
WEIGHT = tl.constexpr(0)
INDEX = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
ENTRY_STEP = tl.constexpr(4)
ENTRY_STEP_STRIDE = tl.constexpr(5)
STEP = tl.constexpr(6)
ORDINAL = tl.constexpr(7)
KEEP = tl.constexpr(8)
OUTPUTS = tl.constexpr(9)
INPUTS = tl.constexpr(10)
COLUMN_STRIDE = tl.constexpr(11)  # from one column to the next, in weights
OUTPUT_STRIDE = tl.constexpr(12)
FIRST = tl.constexpr(13)  # number of its first program in the launch
# Of a selection: where it goes (old places may be the same ones), and scratch memory.
NEW_INDEX = tl.constexpr(14)
NEW_EXP_AVG = tl.constexpr(15)
NEW_EXP_AVG_SQ = tl.constexpr(16)
NEW_ENTRY_STEP = tl.constexpr(17)
OLD_KEEP = tl.constexpr(18)
SUMS = tl.constexpr(19)  # where its sums begin in `memory`
PARTS = tl.constexpr(20)
SCRATCH = tl.constexpr(21)  # where its numbers begin in `scratch`
FIRST_SUM = tl.constexpr(22)
FIRST_CARRY = tl.constexpr(23)
OFFSET = tl.constexpr(24)  # position of its first weight in the full tensor, if this is a part
COLUMNS = tl.constexpr(25)

# And of what changes from one selection to the next.
SOURCE = tl.constexpr(0)  # what columns go by: the weight, or a dense gradient
STEPS = tl.constexpr(1)
CHANGING = tl.constexpr(2)


@triton.jit
def _tile(row, block, WIDE: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_OUTPUTS: tl.constexpr):
    """What a program serves: its entries [TILE_COLUMNS, TILE_OUTPUTS], which there are, and their positions."""
    outputs, keep = _number(row, OUTPUTS), _number(row, KEEP)
    number = block - _number(row, FIRST)
    across = tl.cdiv(outputs, TILE_OUTPUTS)
    place = (number // across) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    output = (number % across) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    column = tl.load(_field(row, INDEX, tl.int32) + place, mask=place < keep, other=-1)
    live = (place < keep)[:, None] & (output < outputs)[None, :]
    used = live & (column >= 0)[:, None]
    if WIDE:
        position = output[None, :] * tl.load(row + OUTPUT_STRIDE) + column[:, None] * tl.load(row + COLUMN_STRIDE)
    else:
        position = output[None, :] * _number(row, OUTPUT_STRIDE) + column[:, None] * _number(row, COLUMN_STRIDE)
    entry = place[:, None].to(tl.int64) * outputs + output[None, :]
    return place, entry, live, used, position


@triton.jit
def gather(
    table,  # int64 [tensors, COLUMNS]
    block_rows,  # int32 [programs]: which tensor
    addresses,  # int64 [tensors, 2]: of the dense gradient, of its entries
    GRADIENT_TYPE: tl.constexpr,
    ENTRIES_TYPE: tl.constexpr,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    _, entry, live, used, position = _tile(row, block, WIDE, TILE_COLUMNS, TILE_OUTPUTS)
    value = tl.load(_field(addresses, 2 * tensor, GRADIENT_TYPE) + position, mask=used, other=0.0).to(tl.float32)
    mine = _field(addresses, 2 * tensor + 1, ENTRIES_TYPE) + entry
    if ADD:
        value += tl.load(mine, mask=live, other=0.0).to(tl.float32)
    _store(mine, value, 0, live, False)


@triton.jit(do_not_specialize=["key", "step"])
def update(
    table,  # int64 [tensors, COLUMNS]
    block_rows,  # int32 [programs]: which tensor
    addresses,  # int64 [tensors]: of the gradients' entries
    corrections,  # float32 [2, MAX_AGE + 1], as for kernels.update
    lr,
    lr_pointer,
    scale_pointer,
    weight_decay,
    weight1,
    beta2,
    weight2,
    eps,
    key,
    step,
    KEEP_ZEROS: tl.constexpr,
    LR_POINTER: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    STEP_POINTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    ENTRIES_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    if LR_POINTER:
        lr = tl.load(lr_pointer).to(tl.float32)
    if STEP_POINTER:
        step = tl.load(_field(row, STEP, tl.float32)).to(tl.int32)
    place, entry, _, used, position = _tile(row, block, WIDE, TILE_COLUMNS, TILE_OUTPUTS)
    pointer = _field(row, WEIGHT, WEIGHT_TYPE) + position
    weight = tl.load(pointer, mask=used, other=0.0).to(tl.float32)
    if KEEP_ZEROS:
        used = used & (weight != 0.0)
    gradient = tl.load(_field(addresses, tensor, ENTRIES_TYPE) + entry, mask=used, other=0.0).to(tl.float32)
    if SCALE_POINTER:
        gradient = gradient * tl.load(scale_pointer)
    if MAXIMIZE:
        gradient = -gradient
    average = _field(row, EXP_AVG, STATE_TYPE) + entry
    average_sq = _field(row, EXP_AVG_SQ, STATE_TYPE) + entry
    exp_avg = tl.load(average, mask=used, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(average_sq, mask=used, other=0.0).to(tl.float32)
    entered = _field(row, ENTRY_STEP, tl.int16) + place * _number(row, ENTRY_STEP_STRIDE)
    entered = tl.load(entered, mask=place < _number(row, KEEP), other=0).to(tl.int32)
    age = tl.minimum((step - entered) & 0xFFFF, MAX_AGE)
    step_size = (lr * tl.load(corrections + age))[:, None]
    correction2 = tl.load(corrections + (MAX_AGE + 1) + age)[:, None]
    decay = 1.0 - lr * weight_decay
    weight, exp_avg, exp_avg_sq = _adam(
        weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps
    )
    if WIDE:
        position += tl.load(row + OFFSET)
    else:
        position += _number(row, OFFSET)
    first, second = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
    _store(average, exp_avg, first, used, STOCHASTIC)
    _store(average_sq, exp_avg_sq, first >> 16, used, STOCHASTIC)
    _store(pointer, weight, second, used, STOCHASTIC)


# Selection: sums of squares by parts of the outputs, the choice among their totals, and the move of what is kept.


@triton.jit
def sums(
    table,
    block_rows,  # int32 [programs]: which tensor
    changing,  # int64 [tensors, CHANGING]
    memory,  # float64, for each tensor [parts, inputs]
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,  # outputs of a part
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
):
    """float64, so that the order of the sum does not show in float32."""
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    inputs, outputs = _number(row, INPUTS), _number(row, OUTPUTS)
    number = block - _number(row, FIRST_SUM)
    across = tl.cdiv(inputs, TILE_INPUTS)
    part = number // across
    column = (number % across) * TILE_INPUTS + tl.arange(0, TILE_INPUTS)
    source = _field(changing, tensor * CHANGING + SOURCE, TYPE)
    total = tl.zeros([TILE_OUTPUTS, TILE_INPUTS], tl.float64)
    for first in range(0, tl.minimum(PART, outputs - part * PART), TILE_OUTPUTS):
        output = part * PART + first + tl.arange(0, TILE_OUTPUTS)
        if WIDE:
            place = output[:, None] * tl.load(row + OUTPUT_STRIDE) + column[None, :] * tl.load(row + COLUMN_STRIDE)
        else:
            place = output[:, None] * _number(row, OUTPUT_STRIDE) + column[None, :] * _number(row, COLUMN_STRIDE)
        live = (output < outputs)[:, None] & (column < inputs)[None, :]
        value = tl.load(source + place, mask=live, other=0.0).to(tl.float32).to(tl.float64)
        total += value * value
    target = memory + tl.load(row + SUMS) + part.to(tl.int64) * inputs + column
    tl.store(target, tl.sum(total, axis=0), mask=column < inputs)


@triton.jit
def _ranks(row, memory, column, key, step, CRITERION: tl.constexpr, KEEP_ZEROS: tl.constexpr):
    """int32: the lower, the sooner selected; NEVER where it must not be."""
    inputs = _number(row, INPUTS)
    live = column < inputs
    if CRITERION == 2:  # random
        words, _ = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), column)
        ranks = (words >> 2).to(tl.int32)
    else:
        total = tl.zeros(column.shape, tl.float64)
        for part in range(_number(row, PARTS)):
            total += tl.load(memory + tl.load(row + SUMS) + part * tl.load(row + INPUTS) + column, mask=live, other=0.0)
        norm = total.to(tl.float32)
        ranks = _magnitude(norm)
        if CRITERION != 0:  # largest, of weights or of gradients
            ranks = 0x7F800001 - ranks
        if KEEP_ZEROS:
            ranks = tl.where(norm == 0.0, NEVER, ranks)
    return tl.where(live, ranks, NEVER)


@triton.jit(do_not_specialize=["key", "step"])
def choose(
    table,
    changing,  # int64 [tensors, CHANGING]
    memory,  # as of `sums`
    scratch,  # int32, for each tensor [2 * inputs + 3 * keep]
    key,
    step,
    CRITERION: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a tensor: its `keep` columns of lowest rank, equal ranks by number, and where each was before."""
    tensor = tl.program_id(0)
    row = table + tensor * COLUMNS
    inputs, keep, old_keep = _number(row, INPUTS), _number(row, KEEP), _number(row, OLD_KEEP)
    steps = _number(changing + tensor * CHANGING, STEPS)
    lane = tl.arange(0, BLOCK)
    ranked = scratch + tl.load(row + SCRATCH)
    where = ranked + inputs
    chosen = where + inputs
    source = chosen + keep
    entry = source + keep
    possible = tl.full((), 0, tl.int32)
    for first in range(0, inputs, BLOCK):
        ranks = _ranks(row, memory, first + lane, key, step, CRITERION, KEEP_ZEROS)
        tl.store(ranked + first + lane, ranks, mask=first + lane < inputs)
        possible += tl.sum((ranks != NEVER).to(tl.int32), axis=0)
    tl.debug_barrier()
    wanted = tl.minimum(keep, possible)
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0, tl.int32)
    high = tl.full((), 0x7FFFFFFE, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.full((), 0, tl.int32)
        for first in range(0, inputs, BLOCK):
            ranks = tl.load(ranked + first + lane, mask=first + lane < inputs, other=NEVER)
            count += tl.sum((ranks <= middle).to(tl.int32), axis=0)
        enough = count >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
        below = tl.where(enough, below, count)
    ties = wanted - below
    members = tl.full((), 0, tl.int32)
    tied = tl.full((), 0, tl.int32)
    for first in range(0, inputs, BLOCK):
        column = first + lane
        ranks = tl.load(ranked + column, mask=column < inputs, other=NEVER)
        tie = (ranks == high).to(tl.int32)
        taken = (ranks <= low) | ((tie == 1) & (tied + tl.cumsum(tie, axis=0) - tie < ties))
        ones = taken.to(tl.int32)
        tl.store(chosen + members + tl.cumsum(ones, axis=0) - ones, column, mask=taken)
        members += tl.sum(ones, axis=0)
        tied += tl.sum(tie, axis=0)
    old_index = _field(row, INDEX, tl.int32)
    if CARRY:
        for first in range(0, old_keep, BLOCK):
            old = tl.load(old_index + first + lane, mask=first + lane < old_keep, other=-1)
            tl.store(where + old, first + lane, mask=old >= 0)
        tl.debug_barrier()
        for first in range(0, keep, BLOCK):
            place = first + lane
            column = tl.load(chosen + place, mask=place < wanted, other=-1)
            before = tl.load(where + column, mask=column >= 0, other=-1)  # or whatever lay there
            kept = (before >= 0) & (before < old_keep)
            kept = kept & (tl.load(old_index + before, mask=kept, other=-1) == column)
            stamp = _field(row, ENTRY_STEP, tl.int16) + before * _number(row, ENTRY_STEP_STRIDE)
            age = tl.minimum((steps - tl.load(stamp, mask=kept, other=0).to(tl.int32)) & 0xFFFF, MAX_AGE)
            tl.store(source + place, tl.where(kept, before, -1), mask=place < keep)
            tl.store(entry + place, tl.where(kept, steps - age, steps), mask=place < keep)
    tl.debug_barrier()  # all of the old selection is read before any of the new one is written
    for first in range(0, keep, BLOCK):
        place = first + lane
        column = tl.load(chosen + place, mask=place < wanted, other=-1)
        tl.store(_field(row, NEW_INDEX, tl.int32) + place, column, mask=place < keep)
        if CARRY:
            stamp = tl.load(entry + place, mask=place < keep, other=0)
            tl.store(_field(row, NEW_ENTRY_STEP, tl.int16) + place, stamp.to(tl.int16), mask=place < keep)


@triton.jit
def carry(
    table,
    block_rows,  # int32 [programs]: which tensor
    scratch,  # as `choose` leaves it
    STATE_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,  # outputs that a program serves
):
    """Move the moments of columns that stay to their new places, which may be the places of others.

    Both lists ascend. So those that move down do so in ascending order without treading on one another, then those
    that move up in descending order, then newcomers get zero.
    """
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    outputs, keep = _number(row, OUTPUTS), _number(row, KEEP)
    output = (block - _number(row, FIRST_CARRY)) * BLOCK + tl.arange(0, BLOCK)
    live = output < outputs
    long = tl.load(row + OUTPUTS)  # 64 bits
    source = scratch + tl.load(row + SCRATCH) + 2 * _number(row, INPUTS) + keep
    old, old_sq = _field(row, EXP_AVG, STATE_TYPE) + output, _field(row, EXP_AVG_SQ, STATE_TYPE) + output
    new, new_sq = _field(row, NEW_EXP_AVG, STATE_TYPE) + output, _field(row, NEW_EXP_AVG_SQ, STATE_TYPE) + output
    apart = tl.load(row + EXP_AVG) != tl.load(row + NEW_EXP_AVG)
    for place in range(keep):
        before = tl.load(source + place)
        if (before > place) | ((before == place) & apart):
            here, there = place * long, before * long
            tl.store(new + here, tl.load(old + there, mask=live), mask=live)
            tl.store(new_sq + here, tl.load(old_sq + there, mask=live), mask=live)
    for turn in range(keep):
        place = keep - 1 - turn
        before = tl.load(source + place)
        if (before >= 0) & (before < place):
            here, there = place * long, before * long
            tl.store(new + here, tl.load(old + there, mask=live), mask=live)
            tl.store(new_sq + here, tl.load(old_sq + there, mask=live), mask=live)
    nothing = tl.zeros([BLOCK], STATE_TYPE)
    for place in range(keep):
        if tl.load(source + place) < 0:
            here = place * long
            tl.store(new + here, nothing, mask=live)
            tl.store(new_sq + here, nothing, mask=live)
