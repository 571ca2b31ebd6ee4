"""The Triton kernel of MicroAdam's step: one launch for a list of tensors.

Held to `window.py`: state bit for bit, weights within the rounding of a quotient and a root.

A program works through blocks one after another. What a block needs of HBM it reads once: gradient, error, window
and weights. Positions of the window are scattered into two float32 rows of scratch memory that belong to the program
and stay in the L2 cache, since Triton cannot scatter within registers.
"""

# mypy: ignore-errors
# Kernels are not Python: decorators and bodies mean something else.

from __future__ import annotations

import triton
import triton.language as tl

from nanoadam.ops.kernels import _even, _random_words, _tensor_key, _to_bf16

BUCKET = tl.constexpr(64)

# Columns of the table of tensors (int64), as `window_triton.py` writes them.
WEIGHT = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
ERROR = tl.constexpr(2)
LOW = tl.constexpr(3)
HIGH = tl.constexpr(4)
INDEX = tl.constexpr(5)
VALUE = tl.constexpr(6)
ORDINAL = tl.constexpr(7)
NUMEL = tl.constexpr(8)
SIZE = tl.constexpr(9)  # of a full block
KEEP = tl.constexpr(10)
KEEP_TAIL = tl.constexpr(11)
KEPT = tl.constexpr(12)
FIRST = tl.constexpr(13)  # number of its first block in the launch
COLUMNS = tl.constexpr(14)


@triton.jit
def _nearest(value, INTERPRETED: tl.constexpr):
    """Float32, rounded to what bfloat16 can hold. The GPU does it in one instruction; the interpreter truncates."""
    rounded = _to_bf16(value, _even(value)) if INTERPRETED else value.to(tl.bfloat16)
    return rounded.to(tl.float32)


@triton.jit
def _count(magnitude, least):
    return tl.sum((magnitude >= least).to(tl.int32))


@triton.jit
def _threshold(magnitude, keep):
    """What the `keep` largest are larger than, and how many of those that equal it are taken as well.

    They usually lie within two powers of 2 of the largest, which is 256 bfloat16 values.
    """
    high = tl.max(magnitude) + 1
    low = tl.maximum(high - 256, 0)
    above = tl.full((), 0, tl.int32)
    count = _count(magnitude, low)
    while count < keep:
        above = count
        width = high - low
        high = low
        low = tl.maximum(low - 4 * width, 0)
        count = _count(magnitude, low)
    while (high - low > 1) & (count > keep):
        middle = low + (high - low) // 2
        there = _count(magnitude, middle)
        enough = there >= keep
        low = tl.where(enough, middle, low)
        count = tl.where(enough, there, count)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, there)
    exact = count == keep
    return tl.where(exact, low - 1, low), tl.where(exact, 0, keep - above)


@triton.jit
def _step(
    weights,
    place,
    start,
    valid,
    first,
    second,
    lr,
    shrink,
    eps,
    key,
    WEIGHT_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    weight = tl.load(weights + place, mask=valid, other=0).to(tl.float32)
    weight = weight * shrink - lr * (first / (tl.sqrt(second) + eps))
    if WEIGHT_TYPE == tl.bfloat16:  # noqa: SIM300
        noise = _even(weight)
        if STOCHASTIC:
            _, noise = _random_words(key, start + place)
        tl.store(weights + place, _to_bf16(weight, noise), mask=valid)
    else:
        tl.store(weights + place, weight.to(WEIGHT_TYPE), mask=valid)


@triton.jit(do_not_specialize=["blocks", "row", "filled", "key", "number"])
def step(
    table,  # int64 [tensors, COLUMNS]
    tensor_of,  # int32 [blocks]: which tensor a block belongs to
    factors,  # float32 [window, 2]: powers of beta1 and beta2 by row of the window
    scratch,  # float32 [programs, 2, BLOCK]
    owners,  # int16 [programs, BLOCK]
    blocks,
    row,  # of the window that is written now
    filled,  # rows that hold a gradient, this one included
    correction1,
    correction2,
    lr,
    shrink,  # 1 - lr * weight_decay
    eps,
    key,
    number,  # of this step, from 1
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # at least the entries of a block
    ROWS: tl.constexpr,  # at least the rows of the window; ROWS * LANES fits 15 bits
    SMALL: tl.constexpr,  # whether the window of a block fits a program's registers
    DENSE: tl.constexpr,  # whether every weight moves: by weight decay, or because many are in the window
    WIDE: tl.constexpr,  # positions beyond 31 bits
    INTERPRETED: tl.constexpr,
):
    """One step of Algorithm 1 on every block of every tensor in the table."""
    bucket = tl.arange(0, BLOCK // BUCKET)
    place = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    pair = bucket[:, None] * (BUCKET // 2) + tl.arange(0, BUCKET // 2)[None, :]
    nothing = tl.zeros([BLOCK // BUCKET, BUCKET], tl.float32)
    lane = tl.arange(0, LANES)
    rows = tl.arange(0, ROWS)
    owner = owners + tl.program_id(0).to(tl.int64) * BLOCK
    first_moment = scratch + tl.program_id(0).to(tl.int64) * 2 * BLOCK
    second_moment = first_moment + BLOCK
    tl.store(first_moment + place, nothing)
    tl.store(second_moment + place, nothing)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tensor = table + tl.load(tensor_of + block).to(tl.int64) * COLUMNS
        size = tl.load(tensor + SIZE)
        within = block - tl.load(tensor + FIRST)
        start = within * size
        if not WIDE:
            start = start.to(tl.int32)
        length = tl.minimum(size, tl.load(tensor + NUMEL) - start).to(tl.int32)
        full = tl.load(tensor + KEEP)
        keep = tl.where(length == size, full, tl.load(tensor + KEEP_TAIL)).to(tl.int32)
        entry = within * full
        valid = place < length
        started = bucket * BUCKET < length

        # The gradient plus the decoded error, in bfloat16.
        error = tl.load(tensor + ERROR).to(tl.pointer_type(tl.uint8)) + start // 2
        lows = tl.load(tensor + LOW).to(tl.pointer_type(tl.bfloat16)) + start // BUCKET + bucket
        highs = tl.load(tensor + HIGH).to(tl.pointer_type(tl.bfloat16)) + start // BUCKET + bucket
        gradient = tl.load(tensor + GRADIENT).to(tl.pointer_type(GRADIENT_TYPE)) + start
        code = tl.load(error + pair, mask=started[:, None], other=0).to(tl.int32)
        code = tl.reshape(tl.join(code & 15, code >> 4), [BLOCK // BUCKET, BUCKET])
        low = tl.load(lows, mask=started, other=0).to(tl.float32)
        scale = tl.load(highs, mask=started, other=0).to(tl.float32) - low
        scale = tl.math.div_rn(scale, tl.full([BLOCK // BUCKET], 15.0, tl.float32))
        decoded = _nearest(code.to(tl.float32) * scale[:, None] + low[:, None], INTERPRETED)
        total = _nearest(tl.load(gradient + place, mask=valid, other=0).to(tl.float32) + decoded, INTERPRETED)

        # Its largest entries go into the window. One running count for two: those surely taken in the low half, those
        # that equal the threshold in the high half.
        magnitude = tl.where(valid, (total.to(tl.int32, bitcast=True) >> 16) & 0x7FFF, -1)
        threshold, wanted_ties = _threshold(magnitude, keep)
        sure = (magnitude > threshold).to(tl.int32)
        tie = ((magnitude == threshold) & valid).to(tl.int32)
        both = sure + (tie << 16)
        in_bucket = tl.sum(both, 1)
        before = (tl.cumsum(in_bucket, 0) - in_bucket)[:, None] + tl.cumsum(both, 1) - both
        ties_before = before >> 16
        taken = (sure == 1) | ((tie == 1) & (ties_before < wanted_ties))
        spot = (before & 0xFFFF) + tl.minimum(ties_before, wanted_ties)
        kept = tl.load(tensor + KEPT)
        index = tl.load(tensor + INDEX).to(tl.pointer_type(tl.int16)) + entry
        value = tl.load(tensor + VALUE).to(tl.pointer_type(tl.bfloat16)) + entry
        tl.store(index + kept * row + spot, place.to(tl.int16), mask=taken)
        tl.store(value + kept * row + spot, _to_bf16(total, 0), mask=taken)

        # The rest is the new error.
        rest = tl.where(taken, 0.0, total)
        low = tl.where(started, tl.min(tl.where(valid, rest, float("inf")), 1), 0.0)
        high = tl.where(started, tl.max(tl.where(valid, rest, float("-inf")), 1), 0.0)
        scale = tl.math.div_rn(high - low, tl.full([BLOCK // BUCKET], 15.0, tl.float32))
        scale = tl.where(scale == 0, 1.0, scale)
        steps = tl.math.div_rn(rest - low[:, None], tl.broadcast_to(scale[:, None], [BLOCK // BUCKET, BUCKET])) + 0.5
        code = tl.where(valid, steps, 0.0).to(tl.int32)
        pairs = tl.reshape(code, [BLOCK // BUCKET, BUCKET // 2, 2]) << (4 * tl.arange(0, 2))[None, None, :]
        tl.store(error + pair, tl.sum(pairs, 2).to(tl.uint8), mask=started[:, None])
        tl.store(lows, _to_bf16(low, 0), mask=started)
        tl.store(highs, _to_bf16(high, 0), mask=started)

        # Moments from the window. No position twice in a row, so threads meet only between rows.
        used = lane < keep
        tl.debug_barrier()
        if SMALL:
            # All rows are read at once, so that memory is waited for once; then each takes its turn.
            in_window = (rows[:, None] < filled) & used[None, :]
            entries = kept * rows[:, None] + lane[None, :]
            where = tl.load(index + entries, mask=in_window, other=0).to(tl.int32)
            held = tl.load(value + entries, mask=in_window, other=0).to(tl.float32)
            first_part = held * tl.load(factors + 2 * rows, mask=rows < filled, other=0)[:, None]
            second_part = held * held * tl.load(factors + 2 * rows + 1, mask=rows < filled, other=0)[:, None]
            for i in range(filled):
                turn = in_window & (rows[:, None] == i)
                first = tl.load(first_moment + where, mask=turn, other=0) + first_part
                second = tl.load(second_moment + where, mask=turn, other=0) + second_part
                tl.store(first_moment + where, first, mask=turn)
                tl.store(second_moment + where, second, mask=turn)
                tl.debug_barrier()
        else:
            next_where = tl.load(index + lane, mask=used, other=0)
            next_held = tl.load(value + lane, mask=used, other=0)
            for i in range(filled):
                where, held = next_where.to(tl.int32), next_held.to(tl.float32)
                more = used & (i + 1 < filled)
                next_where = tl.load(index + kept * (i + 1) + lane, mask=more, other=0)
                next_held = tl.load(value + kept * (i + 1) + lane, mask=more, other=0)
                first = tl.load(first_moment + where, mask=used, other=0) + held * tl.load(factors + 2 * i)
                square = held * held * tl.load(factors + 2 * i + 1)
                second = tl.load(second_moment + where, mask=used, other=0) + square
                tl.store(first_moment + where, first, mask=used)
                tl.store(second_moment + where, second, mask=used)
                tl.debug_barrier()

        # Without weight decay only weights in the window move. A weight may be there in several rows: all of them
        # sign for it, and the one whose signature stays makes the step, the same whoever it is.
        weights = tl.load(tensor + WEIGHT).to(tl.pointer_type(WEIGHT_TYPE)) + start
        tensor_key = _tensor_key(key, number, tl.load(tensor + ORDINAL))
        if DENSE:
            first = tl.load(first_moment + place)
            second = tl.load(second_moment + place)
            tl.store(first_moment + place, nothing)
            tl.store(second_moment + place, nothing)
            _step(
                weights,
                place,
                start,
                valid,
                first * correction1,
                second * correction2,
                lr,
                shrink,
                eps,
                tensor_key,
                WEIGHT_TYPE,
                STOCHASTIC,
            )
        else:
            signature = rows[:, None] * LANES + lane[None, :]
            tl.store(owner + where, signature.to(tl.int16), mask=in_window)
            tl.debug_barrier()
            in_window = in_window & (tl.load(owner + where, mask=in_window, other=-1).to(tl.int32) == signature)
            first = tl.load(first_moment + where, mask=in_window, other=0)
            second = tl.load(second_moment + where, mask=in_window, other=0)
            tl.store(first_moment + where, tl.zeros_like(first), mask=in_window)
            tl.store(second_moment + where, tl.zeros_like(second), mask=in_window)
            _step(
                weights,
                where,
                start,
                in_window,
                first * correction1,
                second * correction2,
                lr,
                shrink,
                eps,
                tensor_key,
                WEIGHT_TYPE,
                STOCHASTIC,
            )
        tl.debug_barrier()
