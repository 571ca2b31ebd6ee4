"""Triton kernels. Each program finds its tensor in a table of addresses and sizes, so one launch serves a whole list.

Written for three readers: the GPU, Triton's interpreter (which truncates float32 -> bfloat16 and has no inline
assembly) and people who know `reference.py`, which defines every result here.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(0x7FFFFFFF)  # rank of a weight that may not be selected
MAX_AGE = tl.constexpr(32768)


# Random bits and rounding: ops/rounding.py in 32-bit arithmetic.


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _tensor_key(key, step, ordinal):
    return _mix(_mix(key.to(tl.uint32) ^ step.to(tl.uint32)) ^ ordinal.to(tl.uint32))


@triton.jit
def _random_words(key, position):
    high = (position >> 32).to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    first = _mix(_mix(high ^ key) ^ low)
    return first, _mix(first ^ 0x6A09E667)


@triton.jit
def _to_bf16(value, noise):
    """Float32 to bfloat16 by adding 16 bits of noise below the cut: random ones, or those that round to even."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    quiet = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, bits)  # a NaN must not become infinity
    rounded = tl.where(finite, bits + (noise & 0xFFFF), quiet)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _even(value):
    """The noise that makes `_to_bf16` round to nearest, ties to even."""
    return 0x7FFF + ((value.to(tl.uint32, bitcast=True) >> 16) & 1)


@triton.jit
def _store(pointer, value, noise, mask, STOCHASTIC: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        if STOCHASTIC:
            tl.store(pointer, _to_bf16(value, noise), mask=mask)
        else:
            tl.store(pointer, _to_bf16(value, _even(value)), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


# Where things are.


@triton.jit
def _storage_offset(position, row, spatial):
    """Storage offset of a row-major position; `spatial` > 1 in channels-last tensors of `row` weights per row."""
    offset = position
    if spatial > 1:
        number = position // row
        within = position - number * row
        channel = within // spatial
        offset = number * row + (within - channel * spatial) * (row // spatial) + channel
    return offset


@triton.jit
def _row_major(offset, row, spatial):
    """The inverse of `_storage_offset`."""
    position = offset
    if spatial > 1:
        number = offset // row
        within = offset - number * row
        channels = row // spatial
        place = within // channels
        position = number * row + (within - place * channels) * spatial + place
    return position


@triton.jit
def _entry_position(entry, index, line, chunk, full, keep, kept_per_line):
    """Row-major position of a selected entry from its place in the list and its index within its chunk."""
    number = entry // kept_per_line
    within = entry - number * kept_per_line
    of_line = tl.minimum(within // tl.maximum(keep, 1), full)
    return number.to(tl.int64) * line + (of_line * chunk + index)


@triton.jit
def _field(row, at: tl.constexpr, TYPE: tl.constexpr):
    """A pointer from the table."""
    return tl.load(row + at).to(tl.pointer_type(TYPE))


@triton.jit
def _number(row, at: tl.constexpr):
    return tl.load(row + at).to(tl.int32)


# Columns of the table of selected tensors (int64), as `triton.py` writes them.
WEIGHT = tl.constexpr(0)
INDEX = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
BORN = tl.constexpr(4)
BORN_STRIDE = tl.constexpr(5)
HELD = tl.constexpr(6)
STEP = tl.constexpr(7)
ORDINAL = tl.constexpr(8)
LINE = tl.constexpr(9)
CHUNK = tl.constexpr(10)
FULL = tl.constexpr(11)
KEEP = tl.constexpr(12)
KEPT_PER_LINE = tl.constexpr(13)
SELECTED = tl.constexpr(14)
ROW = tl.constexpr(15)
SPATIAL = tl.constexpr(16)
FIRST = tl.constexpr(17)
GRADIENT = tl.constexpr(18)
GRADIENT_SPATIAL = tl.constexpr(19)
ACCUMULATE = tl.constexpr(20)
COLUMNS = tl.constexpr(21)


@triton.jit
def gather(table, GRADIENT_TYPE: tl.constexpr, HELD_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of the largest tensor, tensors)."""
    row = table + tl.program_id(1) * COLUMNS
    selected = _number(row, SELECTED)
    first = tl.program_id(0) * BLOCK
    if first < selected:
        entry = first + tl.arange(0, BLOCK)
        live = entry < selected
        index = tl.load(_field(row, INDEX, tl.int16) + entry, mask=live, other=-1).to(tl.int32)
        used = index >= 0
        position = _entry_position(
            entry,
            index,
            tl.load(row + LINE),
            _number(row, CHUNK),
            _number(row, FULL),
            _number(row, KEEP),
            _number(row, KEPT_PER_LINE),
        )
        offset = _storage_offset(position, tl.load(row + ROW), tl.load(row + GRADIENT_SPATIAL))
        value = tl.load(_field(row, GRADIENT, GRADIENT_TYPE) + offset, mask=used, other=0.0).to(tl.float32)
        held = _field(row, HELD, HELD_TYPE) + entry
        if _number(row, ACCUMULATE) != 0:
            value += tl.load(held, mask=live, other=0.0).to(tl.float32)
        _store(held, value, 0, live, False)


@triton.jit
def _adam(weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps):
    exp_avg = exp_avg + weight1 * (gradient - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + weight2 * gradient * gradient
    weight = weight * decay - step_size * (exp_avg / (tl.sqrt_rn(exp_avg_sq) / correction2 + eps))
    return weight, exp_avg, exp_avg_sq


@triton.jit
def update(
    table,
    block_rows,
    corrections,  # float32 [2, MAX_AGE + 1]: 1 / (1 - beta1**age), then sqrt(1 - beta2**age)
    lr,
    lr_pointer,
    scale_pointer,
    weight_decay,
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    eps,
    key,
    step,
    LR_POINTER: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    STEP_POINTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    HELD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of selected entries; `block_rows` int32 says of which tensor."""
    block = tl.program_id(0)
    row = table + tl.load(block_rows + block) * COLUMNS
    if LR_POINTER:
        lr = tl.load(lr_pointer).to(tl.float32)
    if STEP_POINTER:
        step = tl.load(_field(row, STEP, tl.float32)).to(tl.int32)
    entry = (block - _number(row, FIRST)) * BLOCK + tl.arange(0, BLOCK)
    live = entry < _number(row, SELECTED)
    index = tl.load(_field(row, INDEX, tl.int16) + entry, mask=live, other=-1).to(tl.int32)
    used = index >= 0
    position = _entry_position(
        entry,
        index,
        tl.load(row + LINE),
        _number(row, CHUNK),
        _number(row, FULL),
        _number(row, KEEP),
        _number(row, KEPT_PER_LINE),
    )
    pointer = _field(row, WEIGHT, WEIGHT_TYPE)
    pointer += _storage_offset(position, tl.load(row + ROW), tl.load(row + SPATIAL))
    weight = tl.load(pointer, mask=used, other=0.0).to(tl.float32)
    gradient = tl.load(_field(row, HELD, HELD_TYPE) + entry, mask=used, other=0.0).to(tl.float32)
    if SCALE_POINTER:
        gradient = gradient * tl.load(scale_pointer)
    if MAXIMIZE:
        gradient = -gradient
    average = _field(row, EXP_AVG, STATE_TYPE) + entry
    average_sq = _field(row, EXP_AVG_SQ, STATE_TYPE) + entry
    exp_avg = tl.load(average, mask=used, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(average_sq, mask=used, other=0.0).to(tl.float32)
    born = tl.load(_field(row, BORN, tl.int16) + entry * _number(row, BORN_STRIDE), mask=used, other=0).to(tl.int32)
    age = tl.minimum((step - born) & 0xFFFF, MAX_AGE)
    step_size = lr * tl.load(corrections + age)
    correction2 = tl.load(corrections + (MAX_AGE + 1) + age)
    decay = 1.0 - lr * weight_decay
    weight, exp_avg, exp_avg_sq = _adam(
        weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps
    )
    first, second = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
    _store(average, exp_avg, first, used, STOCHASTIC)
    _store(average_sq, exp_avg_sq, first >> 16, used, STOCHASTIC)
    _store(pointer, weight, second, used, STOCHASTIC)


@triton.jit
def update_dense(
    table,
    block_rows,
    corrections,
    lr,
    lr_pointer,
    scale_pointer,
    weight_decay,
    weight1,
    beta2,
    weight2,
    eps,
    log_beta1,  # base 2
    log_beta2,
    key,
    step,
    LR_POINTER: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    STEP_POINTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of weights in the order of their storage; SELECTED is the number of weights."""
    block = tl.program_id(0)
    row = table + tl.load(block_rows + block) * COLUMNS
    if LR_POINTER:
        lr = tl.load(lr_pointer).to(tl.float32)
    if STEP_POINTER:
        step = tl.load(_field(row, STEP, tl.float32)).to(tl.int32)
    offset = (block - _number(row, FIRST)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offset < tl.load(row + SELECTED)
    pointer = _field(row, WEIGHT, WEIGHT_TYPE) + offset
    average = _field(row, EXP_AVG, STATE_TYPE) + offset
    average_sq = _field(row, EXP_AVG_SQ, STATE_TYPE) + offset
    weight = tl.load(pointer, mask=live, other=0.0).to(tl.float32)
    gradient = tl.load(_field(row, GRADIENT, GRADIENT_TYPE) + offset, mask=live, other=0.0).to(tl.float32)
    if SCALE_POINTER:
        gradient = gradient * tl.load(scale_pointer)
    if MAXIMIZE:
        gradient = -gradient
    exp_avg = tl.load(average, mask=live, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(average_sq, mask=live, other=0.0).to(tl.float32)
    age = tl.minimum(step, MAX_AGE)
    step_size = lr * tl.load(corrections + age)
    correction2 = tl.load(corrections + (MAX_AGE + 1) + age)
    if step > MAX_AGE:  # the difference from 1 is small here, and so is its rounding
        step_size = lr / (1.0 - tl.exp2(log_beta1 * step))
        correction2 = tl.sqrt_rn(1.0 - tl.exp2(log_beta2 * step))
    decay = 1.0 - lr * weight_decay
    weight, exp_avg, exp_avg_sq = _adam(
        weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps
    )
    position = _row_major(offset, tl.load(row + ROW), tl.load(row + SPATIAL))
    first, second = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
    _store(average, exp_avg, first, live, STOCHASTIC)
    _store(average_sq, exp_avg_sq, first >> 16, live, STOCHASTIC)
    _store(pointer, weight, second, live, STOCHASTIC)


# Selection. More columns: where the new selection goes (the old ones may be the same places), and what it keeps.
TAIL = tl.constexpr(21)
KEEP_TAIL = tl.constexpr(22)
NEW_KEEP = tl.constexpr(23)
NEW_KEEP_TAIL = tl.constexpr(24)
NEW_KEPT_PER_LINE = tl.constexpr(25)
NEW_INDEX = tl.constexpr(26)
NEW_EXP_AVG = tl.constexpr(27)
NEW_EXP_AVG_SQ = tl.constexpr(28)
NEW_BORN = tl.constexpr(29)
NEW_HELD = tl.constexpr(30)
STEPS = tl.constexpr(31)
SELECT_COLUMNS = tl.constexpr(32)


@triton.jit
def _magnitude(values):
    if values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rank = tl.minimum(bits, 0x7F800001)
    elif values.dtype == tl.bfloat16:
        rank = tl.minimum(values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7F81)
    else:
        rank = tl.minimum(values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7C01)
    return rank


@triton.jit
def _as_value(rank, SHIFT: tl.constexpr):
    return (tl.maximum(rank, 0) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _limits(ranks, keep, SHIFT: tl.constexpr, INTERPOLATE: tl.constexpr):
    """Ranks up to `low` are taken, and of rank `high` (the next one up) as many as are still wanted.

    A search for the rank with `keep` at or below it. Small weights lie about evenly around zero, so the next
    probe is found by interpolating between the counts at both ends; every third one halves the interval, which
    bounds the search whatever the weights.
    """
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0, tl.int32)
    high = tl.max(tl.where(ranks == NEVER, -1, ranks), axis=0)
    upto = tl.sum((ranks != NEVER).to(tl.int32), axis=0)
    wanted = tl.minimum(keep, upto)
    turn = tl.full((), 0, tl.int32)
    while (upto != wanted) & (high - low > 1):
        probe = low + (high - low) // 2
        if INTERPOLATE:
            bottom = _as_value(low, SHIFT)
            share = ((wanted - below).to(tl.float32) - 0.5) / (upto - below).to(tl.float32)
            value = bottom + (_as_value(high, SHIFT) - bottom) * share
            guess = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> SHIFT, low + 1), high - 1)
            probe = tl.where(turn % 3 == 2, probe, guess)
        count = tl.sum((ranks <= probe).to(tl.int32), axis=0)
        enough = count >= wanted
        high = tl.where(enough, probe, high)
        upto = tl.where(enough, count, upto)
        low = tl.where(enough, low, probe)
        below = tl.where(enough, below, count)
        turn += 1
    low = tl.where(upto == wanted, high, low)
    below = tl.where(upto == wanted, wanted, below)
    return low, high, wanted - below, wanted


@triton.jit
def _find(old, index, keep, SEARCH: tl.constexpr):
    """Place of each index in an ascending list of `keep` (unsigned, so empty places come last)."""
    start = tl.zeros_like(index)
    stop = start + keep
    for _ in tl.static_range(SEARCH):
        middle = (start + stop) // 2
        open_ = start < stop
        value = tl.load(old + middle, mask=open_, other=0).to(tl.int32) & 0xFFFF
        start = tl.where(open_ & (value < index), middle + 1, start)
        stop = tl.where(open_ & (value >= index), middle, stop)
    return start


@triton.jit
def select(
    table,
    chunk_rows,
    scratch,  # int16 [programs, BLOCK]
    chunks,
    key,
    step,
    CRITERION: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    CARRY: tl.constexpr,
    CARRY_HELD: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    HELD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the longest chunk
    KEPT: tl.constexpr,  # at least the most kept in a chunk
    SEARCH: tl.constexpr,  # halvings that search the longest old list
):
    """Programs take chunks in turn; `chunk_rows` int32 says of which tensor each is."""
    lane = tl.arange(0, BLOCK)
    kept_lane = tl.arange(0, KEPT)
    for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
        row = table + tl.load(chunk_rows + number).to(tl.int64) * SELECT_COLUMNS
        number = number - _number(row, FIRST)
        full = _number(row, FULL)
        per_line = full + (_number(row, TAIL) > 0).to(tl.int32)
        line = number // per_line
        of_line = number - line * per_line
        is_tail = of_line == full
        chunk = _number(row, CHUNK)
        length = tl.where(is_tail, _number(row, TAIL), chunk)
        keep = tl.where(is_tail, _number(row, NEW_KEEP_TAIL), _number(row, NEW_KEEP))
        target = line.to(tl.int64) * _number(row, NEW_KEPT_PER_LINE) + of_line * _number(row, NEW_KEEP)
        position = line.to(tl.int64) * tl.load(row + LINE) + of_line.to(tl.int64) * chunk + lane
        live = lane < length
        row_length = tl.load(row + ROW)
        if CRITERION == 2:  # random
            words, _ = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
            ranks = (words >> 2).to(tl.int32)
        elif CRITERION == 3:  # gradient
            offset = _storage_offset(position, row_length, tl.load(row + GRADIENT_SPATIAL))
            ranks = 0x7F800001 - _magnitude(
                tl.load(_field(row, GRADIENT, GRADIENT_TYPE) + offset, mask=live, other=0.0)
            )
        else:
            offset = _storage_offset(position, row_length, tl.load(row + SPATIAL))
            ranks = _magnitude(tl.load(_field(row, WEIGHT, WEIGHT_TYPE) + offset, mask=live, other=0.0))
        if KEEP_ZEROS:
            offset = _storage_offset(position, row_length, tl.load(row + SPATIAL))
            size = tl.load(_field(row, WEIGHT, WEIGHT_TYPE) + offset, mask=live, other=0.0)
            zero = size == 0.0
        else:
            zero = ~live
        if CRITERION == 1:  # largest
            ranks = 0x7F800001 - ranks
        ranks = tl.where(zero | ~live, NEVER, ranks)

        low, high, ties, wanted = _limits(
            ranks, keep, 0 if tl.float32 == WEIGHT_TYPE else (13 if tl.float16 == WEIGHT_TYPE else 16), CRITERION == 0
        )
        # One running count for both: weights surely taken in the low half, ties in the high half.
        sure = (ranks <= low).to(tl.int32)
        tie = ((ranks == high) & (ranks > low)).to(tl.int32)
        seen = tl.cumsum(sure + (tie << 16), axis=0)
        ties_before = (seen >> 16) - tie
        taken = (sure == 1) | ((tie == 1) & (ties_before < ties))
        rank = (seen & 0xFFFF) - sure + tl.minimum(ties_before, ties)
        index_target = _field(row, NEW_INDEX, tl.int16) + target
        if CARRY or CARRY_HELD:
            mine = scratch + tl.program_id(0) * BLOCK
            tl.store(mine + rank, lane.to(tl.int16), mask=taken)
            tl.debug_barrier()
            entry = kept_lane
            kept_live = entry < keep
            index = tl.load(mine + entry, mask=entry < wanted, other=-1).to(tl.int32)
            old_keep = tl.where(is_tail, _number(row, KEEP_TAIL), _number(row, KEEP))
            source = line.to(tl.int64) * _number(row, KEPT_PER_LINE) + of_line * _number(row, KEEP)
            old_index = _field(row, INDEX, tl.int16) + source
            place = _find(old_index, index & 0xFFFF, old_keep, SEARCH)
            kept = (index >= 0) & (place < old_keep)
            kept = kept & (tl.load(old_index + place, mask=kept, other=-1).to(tl.int32) == index)
            if CARRY:
                exp_avg = tl.load(_field(row, EXP_AVG, STATE_TYPE) + source + place, mask=kept, other=0.0)
                exp_avg_sq = tl.load(_field(row, EXP_AVG_SQ, STATE_TYPE) + source + place, mask=kept, other=0.0)
                born_place = (source + place) * _number(row, BORN_STRIDE)
                steps = _number(row, STEPS)
                old_born = tl.load(_field(row, BORN, tl.int16) + born_place, mask=kept, other=0).to(tl.int32)
                age = tl.minimum((steps - old_born) & 0xFFFF, MAX_AGE)
                born = tl.where(kept, steps - age, steps)
            if CARRY_HELD:
                held = tl.load(_field(row, HELD, HELD_TYPE) + source + place, mask=kept, other=0.0)
            tl.debug_barrier()  # all of the old chunk is read before any of the new one is written
            tl.store(index_target + entry, index.to(tl.int16), mask=kept_live)
            if CARRY:
                tl.store(_field(row, NEW_EXP_AVG, STATE_TYPE) + target + entry, exp_avg, mask=kept_live)
                tl.store(_field(row, NEW_EXP_AVG_SQ, STATE_TYPE) + target + entry, exp_avg_sq, mask=kept_live)
                tl.store(_field(row, NEW_BORN, tl.int16) + target + entry, born.to(tl.int16), mask=kept_live)
            if CARRY_HELD:
                tl.store(_field(row, NEW_HELD, HELD_TYPE) + target + entry, held, mask=kept_live)
        else:
            tl.store(index_target + rank, lane.to(tl.int16), mask=taken)
            empty = (kept_lane >= wanted) & (kept_lane < keep)
            tl.store(index_target + kept_lane, tl.full((KEPT,), -1, tl.int16), mask=empty)
