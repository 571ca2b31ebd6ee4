"""The Triton kernels of MicroAdam's step: two launches for a list of tensors.

Held to `window.py`: state bit for bit, weights within the rounding of a quotient and a root.

`compress` renews error and window, `move_few` or `move_all` then moves weights by what the window holds. Programs work
through blocks one after another, and read what a block needs of HBM once. What has to be scattered goes through
scratch memory that belongs to the program and stays in the L2 cache, since Triton cannot scatter within registers.
"""

# mypy: ignore-errors
# Kernels are not Python: decorators and bodies mean something else.

from __future__ import annotations

import triton
import triton.language as tl

from nanoadam.ops.kernels import _even, _field, _list, _random_words, _tensor_key, _to_bf16

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
def _threshold(magnitude, keep, guess):
    """What the `keep` largest are larger than, and how many of those that equal it are taken as well.

    The search begins at `guess`, which changes nothing but its length, and widens its steps until it has passed.
    """
    low = tl.maximum(guess, 0)
    count = _count(magnitude, low)
    high, above = low, count
    upwards = count >= keep
    passed = count < 0
    width = tl.full((), 4, tl.int32)
    while not passed:
        probe = tl.maximum(tl.where(upwards, low + width, low - width), 0)
        there = _count(magnitude, probe)
        enough = there >= keep
        passed = enough != upwards
        high = tl.where(enough, tl.where(upwards, high, low), probe)
        above = tl.where(enough, tl.where(upwards, above, count), there)
        lower = enough | (not upwards)
        low = tl.where(lower, probe, low)
        count = tl.where(lower, there, count)
        width *= 4
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
def _as_bf16(value):
    """Float32 that bfloat16 can hold."""
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _ratio(part, whole, INTERPRETED: tl.constexpr):
    """`part / whole[:, None]`, correctly rounded wherever it is not tiny; `whole` is positive.

    With the inverse correctly rounded, one corrected product is the quotient correctly rounded (Markstein 1990), as
    long as nothing underflows: powers of 2 see to that.
    """
    if INTERPRETED:  # which has no fused multiply-add
        quotient = part / whole[:, None]
    else:
        power = tl.where(whole < 2.0**-60, 2.0**90, tl.where(whole > 2.0**60, 2.0**-60, 1.0))
        part = part * power[:, None]
        whole = whole * power
        inverse = tl.math.div_rn(tl.full(whole.shape, 1.0, tl.float32), whole)[:, None]
        quotient = part * inverse
        rest = tl.fma(-quotient, tl.broadcast_to(whole[:, None], part.shape), part)
        quotient = tl.fma(rest, tl.broadcast_to(inverse, part.shape), quotient)
    return quotient


@triton.jit
def _block(table, tensor_of, block, WIDE: tl.constexpr):
    """Of a block: its tensor's row of the table, where it starts, its length, its entries and where they start."""
    tensor = table + tl.load(tensor_of + block).to(tl.int64) * COLUMNS
    size = tl.load(tensor + SIZE)
    within = block - tl.load(tensor + FIRST)
    start = within * size
    if not WIDE:
        start = start.to(tl.int32)
    start = tl.multiple_of(start, BUCKET)
    length = tl.minimum(size, tl.load(tensor + NUMEL) - start).to(tl.int32)
    full = tl.load(tensor + KEEP)
    keep = tl.where(length == size, full, tl.load(tensor + KEEP_TAIL)).to(tl.int32)
    return tensor, start, length, keep, within * full


@triton.jit
def _window(tensor, entry):
    return _field(tensor, INDEX, tl.int16) + entry, _field(tensor, VALUE, tl.bfloat16) + entry


@triton.jit(do_not_specialize=["blocks", "row", "last"])
def compress(
    table,  # int64 [tensors, COLUMNS]
    tensor_of,  # int32 [blocks]: which tensor a block belongs to
    blocks,
    row,  # of the window that is written now
    last,  # the one written before, -1 if there is none
    GRADIENT_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # positions beyond 31 bits
    ALIGNED: tl.constexpr,  # addresses to 16 bytes, sizes to buckets
    INTERPRETED: tl.constexpr,
):
    """Lines 4 to 9 of Algorithm 1 on every block of every tensor in the table."""
    bucket = tl.arange(0, BLOCK // BUCKET)
    place = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    pair = bucket[:, None] * (BUCKET // 2) + tl.arange(0, BUCKET // 2)[None, :]
    some = tl.arange(0, 64)  # entries of the last row: the least of them is near enough to the last threshold

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tensor, start, length, keep, entry = _block(table, tensor_of, block, WIDE)
        kept = tl.load(tensor + KEPT)
        index, value = _window(tensor, entry)
        known = (some < keep) & (last >= 0)
        earlier = (
            tl.load(value + kept * last + some, mask=known, other=0).to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        )

        # The gradient plus the decoded error, in bfloat16.
        if ALIGNED:
            length = tl.multiple_of(length, BUCKET)
            gradient = _list(tensor, GRADIENT, GRADIENT_TYPE) + start
            error = _list(tensor, ERROR, tl.uint8) + start // 2
        else:
            gradient = _field(tensor, GRADIENT, GRADIENT_TYPE) + start
            error = _field(tensor, ERROR, tl.uint8) + start // 2
        lows = _field(tensor, LOW, tl.bfloat16) + start // BUCKET + bucket
        highs = _field(tensor, HIGH, tl.bfloat16) + start // BUCKET + bucket
        started = bucket * BUCKET < length
        valid = place < length
        if ALIGNED:  # the same, with one answer for a bucket
            valid = tl.broadcast_to(started[:, None], [BLOCK // BUCKET, BUCKET])
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
        guess = tl.min(tl.where(known, earlier, 0x7FFF))
        guess = tl.where(last < 0, tl.max(magnitude) - 255, guess)
        threshold, wanted_ties = _threshold(magnitude, keep, guess)
        sure = (magnitude > threshold).to(tl.int32)
        tie = ((magnitude == threshold) & valid).to(tl.int32)
        both = sure + (tie << 16)
        in_bucket = tl.sum(both, 1)
        before = (tl.cumsum(in_bucket, 0) - in_bucket)[:, None] + tl.cumsum(both, 1) - both
        ties_before = before >> 16
        taken = (sure == 1) | ((tie == 1) & (ties_before < wanted_ties))
        spot = (before & 0xFFFF) + tl.minimum(ties_before, wanted_ties)
        tl.store(index + kept * row + spot, place.to(tl.int16), mask=taken)
        tl.store(value + kept * row + spot, _as_bf16(total), mask=taken)

        # The rest is the new error.
        rest = tl.where(taken, 0.0, total)
        low = tl.where(started, tl.min(tl.where(valid, rest, float("inf")), 1), 0.0)
        high = tl.where(started, tl.max(tl.where(valid, rest, float("-inf")), 1), 0.0)
        scale = tl.math.div_rn(high - low, tl.full([BLOCK // BUCKET], 15.0, tl.float32))
        scale = tl.where(scale == 0, 1.0, scale)
        steps = _ratio(rest - low[:, None], scale, INTERPRETED) + 0.5
        code = tl.where(valid, steps, 0.0).to(tl.int32)
        pairs = tl.reshape(code, [BLOCK // BUCKET, BUCKET // 2, 2]) << (4 * tl.arange(0, 2))[None, None, :]
        tl.store(error + pair, tl.sum(pairs, 2).to(tl.uint8), mask=started[:, None])
        tl.store(lows, _as_bf16(low), mask=started)
        tl.store(highs, _as_bf16(high), mask=started)


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


@triton.jit(do_not_specialize=["blocks", "filled", "key", "number"])
def move_few(
    table,
    tensor_of,
    factors,  # float32 [window, 2]: powers of beta1 and beta2 by row of the window
    scratch,  # float32 [programs, 2, ENTRIES]
    owners,  # int16 [programs, BLOCK]
    blocks,
    filled,  # rows that hold a gradient
    correction1,
    correction2,
    lr,
    shrink,  # 1 - lr * weight_decay
    eps,
    key,
    number,  # of this step, from 1
    WEIGHT_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,  # at least the entries of a block in all rows, at most 2**15
    WIDE: tl.constexpr,
):
    """Lines 10 to 13 where no weight moves but those in the window, which are few."""
    signature = tl.arange(0, ENTRIES)
    owner = owners + tl.program_id(0).to(tl.int64) * BLOCK
    first_moment = scratch + tl.program_id(0).to(tl.int64) * 2 * ENTRIES
    second_moment = first_moment + ENTRIES

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tensor, start, _, keep, entry = _block(table, tensor_of, block, WIDE)
        index, value = _window(tensor, entry)
        row = ((signature.to(tl.float32) + 0.5) / keep.to(tl.float32)).to(tl.int32)  # never near a whole number
        used = row < filled
        entries = tl.load(tensor + KEPT) * row + (signature - row * keep)
        where = tl.load(index + entries, mask=used, other=0).to(tl.int32)
        held = tl.load(value + entries, mask=used, other=0).to(tl.float32)
        first_part = held * tl.load(factors + 2 * row, mask=used, other=0)
        second_part = held * held * tl.load(factors + 2 * row + 1, mask=used, other=0)

        # A weight may be in several rows: all of them sign for it, and its moments lie where the signature that
        # stays says, the same whoever it is.
        tl.store(owner + where, signature.to(tl.int16), mask=used)
        tl.debug_barrier()
        home = tl.load(owner + where, mask=used, other=0).to(tl.int32)
        tl.store(first_moment + home, tl.zeros_like(first_part), mask=used)
        tl.store(second_moment + home, tl.zeros_like(second_part), mask=used)
        tl.debug_barrier()
        for i in range(filled):  # no weight twice in a row, so threads meet only between rows
            turn = used & (row == i)
            first = tl.load(first_moment + home, mask=turn, other=0) + first_part
            second = tl.load(second_moment + home, mask=turn, other=0) + second_part
            tl.store(first_moment + home, first, mask=turn)
            tl.store(second_moment + home, second, mask=turn)
            tl.debug_barrier()
        mine = used & (home == signature)
        first = tl.load(first_moment + signature, mask=mine, other=0)
        second = tl.load(second_moment + signature, mask=mine, other=0)
        weights = _field(tensor, WEIGHT, WEIGHT_TYPE) + start
        tensor_key = _tensor_key(key, number, tl.load(tensor + ORDINAL))
        first *= correction1
        second *= correction2
        _step(weights, where, start, mine, first, second, lr, shrink, eps, tensor_key, WEIGHT_TYPE, STOCHASTIC)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["blocks", "filled", "key", "number"])
def move_all(
    table,
    tensor_of,
    factors,  # as for `move_few`
    scratch,  # float32 [programs, 2, BLOCK]
    blocks,
    filled,
    correction1,
    correction2,
    lr,
    shrink,
    eps,
    key,
    number,
    WEIGHT_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # at least the entries of a block in one row
    WIDE: tl.constexpr,
):
    """Lines 10 to 13 where every weight moves: by weight decay, or because many are in the window."""
    place = tl.arange(0, BLOCK)
    nothing = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, LANES)
    first_moment = scratch + tl.program_id(0).to(tl.int64) * 2 * BLOCK
    second_moment = first_moment + BLOCK
    tl.store(first_moment + place, nothing)
    tl.store(second_moment + place, nothing)
    tl.debug_barrier()

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tensor, start, length, keep, entry = _block(table, tensor_of, block, WIDE)
        index, value = _window(tensor, entry)
        kept = tl.load(tensor + KEPT)
        used = lane < keep
        next_where = tl.load(index + lane, mask=used, other=0)
        next_held = tl.load(value + lane, mask=used, other=0)
        for i in range(filled):  # no weight twice in a row, so threads meet only between rows
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
        first = tl.load(first_moment + place) * correction1
        second = tl.load(second_moment + place) * correction2
        tl.store(first_moment + place, nothing)
        tl.store(second_moment + place, nothing)
        weights = _field(tensor, WEIGHT, WEIGHT_TYPE) + start
        tensor_key = _tensor_key(key, number, tl.load(tensor + ORDINAL))
        valid = place < length
        _step(weights, place, start, valid, first, second, lr, shrink, eps, tensor_key, WEIGHT_TYPE, STOCHASTIC)
        tl.debug_barrier()
