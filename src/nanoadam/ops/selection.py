"""The Triton kernel that selects: the exact k smallest of every chunk, in one launch for a list of tensors.

Like `kernels.py`, whose table and helpers it uses; `reference.py` defines the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanoadam.ops.kernels import (
    CHUNK,
    ENTRY_STEP,
    ENTRY_STEP_STRIDE,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST,
    FULL,
    GRADIENT_SPATIAL,
    INDEX,
    KEEP,
    KEPT_PER_LINE,
    LINE,
    MAX_AGE,
    NEVER,
    ORDINAL,
    ROW,
    SPATIAL,
    WEIGHT,
    _field,
    _list,
    _number,
    _random_words,
    _storage_offset,
    _tensor_key,
)

# More columns: where the new selection goes (the old ones may be the same places), and what it keeps.
TAIL = tl.constexpr(18)
KEEP_TAIL = tl.constexpr(19)
NEW_KEEP = tl.constexpr(20)
NEW_KEEP_TAIL = tl.constexpr(21)
NEW_KEPT_PER_LINE = tl.constexpr(22)
NEW_INDEX = tl.constexpr(23)
NEW_EXP_AVG = tl.constexpr(24)
NEW_EXP_AVG_SQ = tl.constexpr(25)
NEW_ENTRY_STEP = tl.constexpr(26)
PART_OFFSET = tl.constexpr(27)  # position of its first weight in the full tensor
SELECT_COLUMNS = tl.constexpr(28)

# And of what changes from one selection to the next: the address of a dense gradient, and the updates so far.
GRADIENT = tl.constexpr(0)
STEPS = tl.constexpr(1)
CHANGING = tl.constexpr(2)


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
def _search(ranks, least, most, SHIFT: tl.constexpr, INTERPOLATE: tl.constexpr):
    """The lowest known rank with at least `least` at or below it, once they are at most `most` or it is exact.

    Small weights lie about evenly around zero, so the next probe is found by interpolating between the counts at
    both ends; every third one halves the interval, which bounds the search whatever the weights.

    Returns `low` with `below` < least at or below it, and `high` with `upto` of them.
    """
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0, tl.int32)
    high = tl.max(tl.where(ranks == NEVER, -1, ranks), axis=0)
    upto = tl.sum((ranks != NEVER).to(tl.int32), axis=0)
    aim = 0.5 * (least + most).to(tl.float32) - 0.5
    turn = tl.full((), 0, tl.int32)
    while (upto > most) & (high - low > 1):
        probe = low + (high - low) // 2
        if INTERPOLATE:
            bottom = _as_value(low, SHIFT)
            share = (aim - below.to(tl.float32)) / (upto - below).to(tl.float32)
            value = bottom + (_as_value(high, SHIFT) - bottom) * share
            guess = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True) >> SHIFT, low + 1), high - 1)
            probe = tl.where(turn % 3 == 2, probe, guess)
        count = tl.sum((ranks <= probe).to(tl.int32), axis=0)
        enough = count >= least
        high = tl.where(enough, probe, high)
        upto = tl.where(enough, count, upto)
        low = tl.where(enough, low, probe)
        below = tl.where(enough, below, count)
        turn += 1
    return low, below, high, upto


@triton.jit
def _values(pointers, at: tl.constexpr, row, spatial: tl.constexpr, start, lane, live, TYPE, CHANNELS_LAST, ALIGNED):
    """Weights or gradients of a chunk that begins at position `start`."""
    if CHANNELS_LAST:
        offset = _storage_offset(start + lane, tl.load(row + ROW), tl.load(row + spatial), True)
        pointer = _field(pointers, at, TYPE) + offset
    elif ALIGNED:
        pointer = tl.multiple_of(_list(pointers, at, TYPE) + tl.multiple_of(start, 8), 16) + lane
    else:
        pointer = _field(pointers, at, TYPE) + start + lane
    return tl.load(pointer, mask=live, other=0.0)


@triton.jit
def _ranks(
    row,
    now,
    start,
    lane,
    live,
    key,
    step,
    CRITERION: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """int32 like `lane`: the lower, the sooner selected; NEVER where it must not be.

    Its constants are spelt out at each call: the compiler of Triton 3.2 (torch 2.6) has no tuple to bundle them in.
    """
    if CRITERION == 2:  # random
        position = tl.load(row + PART_OFFSET) + start + lane
        words, _ = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
        ranks = (words >> 2).to(tl.int32)
    elif CRITERION == 3:  # gradient
        slopes = _values(now, GRADIENT, row, GRADIENT_SPATIAL, start, lane, live, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED)
        ranks = 0x7F800001 - _magnitude(slopes)
    else:
        ranks = _magnitude(_values(row, WEIGHT, row, SPATIAL, start, lane, live, WEIGHT_TYPE, CHANNELS_LAST, ALIGNED))
        if CRITERION == 1:  # largest
            ranks = 0x7F800001 - ranks
    if KEEP_ZEROS:
        values = _values(row, WEIGHT, row, SPATIAL, start, lane, live, WEIGHT_TYPE, CHANNELS_LAST, ALIGNED)
        ranks = tl.where(values == 0.0, NEVER, ranks)
    return tl.where(live, ranks, NEVER)


@triton.jit
def _near_pairs(row, start, first, length, limit, PART: tl.constexpr):
    """Bits, 8 weights to a word, that say which 16-bit weights have a magnitude of at most `limit`.

    Two weights at a time: 0x8000 + limit - magnitude keeps its top bit if the magnitude is not above the limit,
    and nothing is borrowed from the neighbour. NaN is always above: `limit` must be below it.
    """
    pair = tl.arange(0, PART // 2)
    pointer = tl.multiple_of(_list(row, WEIGHT, tl.int32) + tl.multiple_of((start + first) // 2, 4), 16)
    two = tl.load(pointer + pair, mask=pair < (length - first) // 2, other=0x7FFF7FFF)
    two = (limit * 0x10001 | -0x7FFF8000) - (two & 0x7FFF7FFF)
    two = (two >> 15) & 0x10001
    two = (two | (two >> 15)) & 3
    return tl.sum(tl.reshape(two, (PART // 8, 4)) << (2 * tl.arange(0, 4)[None, :]), axis=1)


@triton.jit
def _write_down(bits, target, first, members, PART: tl.constexpr, CANDIDATES: tl.constexpr):
    """Append the places (counted from `first`) whose bits are set to a list of `members` places; how many they are.

    Few are, so each thread takes its bits off one by one.
    """
    group = tl.arange(0, PART // 8)
    pairs = bits - ((bits >> 1) & 0x55)
    count = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    count = (count + (count >> 4)) & 0x0F
    upto = tl.cumsum(count, axis=0)
    place = members + upto - count
    while tl.max(bits, axis=0) > 0:
        lowest = bits & -bits
        which = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # its number, 0 to 7
        there = first + group * 8 + which
        tl.store(target + place, there.to(tl.int16), mask=(bits != 0) & (place < CANDIDATES))
        place += (bits != 0).to(tl.int32)
        bits = bits & (bits - 1)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["chunks", "key", "step"])
def select(
    table,
    chunk_rows,
    changing,  # int64 [tensors, CHANGING]
    scratch,  # int16 [programs, 2 * CANDIDATES + PLACES]
    chunks,
    key,
    step,
    CRITERION: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    CARRY: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,  # chunks and their lengths are multiples of 8
    SIFT: tl.constexpr,  # whether chunks may be longer than CANDIDATES, and so have to be sifted first
    CANDIDATES: tl.constexpr,
    KEPT: tl.constexpr,  # at least the most kept in a chunk
    OLD_KEPT: tl.constexpr,  # and the most kept in the old selection
    PLACES: tl.constexpr,  # at least the longest chunk, if anything is carried over
    SAMPLE: tl.constexpr,
    PART: tl.constexpr,  # weights of a chunk looked at together
):
    """Programs take chunks in turn; `chunk_rows` int32 says of which tensor each is.

    Most of a chunk is nowhere near the limit. So a sample guesses a rank with a few more weights at or below it
    than are kept, one pass over the chunk writes down which these are, and the exact search runs among them.
    """
    lane = tl.arange(0, CANDIDATES)
    part = tl.arange(0, PART)
    sample = tl.arange(0, SAMPLE)
    entry = tl.arange(0, KEPT)
    # Triton 3.2 takes two operands of `and` at a time.
    PACKED: tl.constexpr = (ALIGNED and CRITERION == 0) and (not KEEP_ZEROS and tl.float32 != WEIGHT_TYPE)
    BITS: tl.constexpr = 31 if (CRITERION != 0 or tl.float32 == WEIGHT_TYPE) else 15
    SHIFT: tl.constexpr = 0 if tl.float32 == WEIGHT_TYPE else (13 if tl.float16 == WEIGHT_TYPE else 16)
    mine = scratch + tl.program_id(0) * (2 * CANDIDATES + PLACES)
    for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_rows + number)
        row = table + tensor * SELECT_COLUMNS
        now = changing + tensor * CHANGING
        number = number - _number(row, FIRST)
        full = _number(row, FULL)
        tail = _number(row, TAIL)
        per_line = full + (tail > 0).to(tl.int32)
        line = number // per_line
        of_line = number - line * per_line
        is_tail = of_line == full
        chunk = _number(row, CHUNK)
        length = tl.where(is_tail, tail, chunk)
        keep = tl.where(is_tail, _number(row, NEW_KEEP_TAIL), _number(row, NEW_KEEP))
        target = line.to(tl.int64) * tl.load(row + NEW_KEPT_PER_LINE) + of_line.to(tl.int64) * _number(row, NEW_KEEP)
        start = line.to(tl.int64) * tl.load(row + LINE) + of_line.to(tl.int64) * chunk
        if ALIGNED:
            length = tl.multiple_of(length, 8)

        members = length
        index = lane
        if SIFT:
            # Pieces from all over the chunk, 64 weights each, as many as make up the sample.
            piece = sample // 64
            where = piece * (length // (SAMPLE // 64)) + sample % 64
            where = tl.where(length < SAMPLE * 2, sample, where)
            taken = tl.minimum(length, SAMPLE)
            sampled = _ranks(
                row, now, start, where, where < length, key, step,
                CRITERION, KEEP_ZEROS, WEIGHT_TYPE, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED,
            )  # fmt: skip
            expected = keep.to(tl.float32) * taken.to(tl.float32) / length.to(tl.float32)
            least = (expected + 3.0 * tl.sqrt(expected) + 2.0).to(tl.int32)
            _, _, limit, upto = _search(sampled, least, least + least // 4, SHIFT, CRITERION == 0)
            limit = tl.where(upto < least, (1 << BITS) - 1, limit)  # too few may be selected: look at all
            members = tl.full((), 0, tl.int32)
            for first in range(0, length, PART):
                if PACKED:
                    bits = _near_pairs(row, start, tl.multiple_of(first, PART), length, limit, PART)
                else:
                    there = tl.multiple_of(first, PART) + part
                    part_ranks = _ranks(
                        row, now, start, there, there < length, key, step,
                        CRITERION, KEEP_ZEROS, WEIGHT_TYPE, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED,
                    )  # fmt: skip
                    near = (part_ranks <= tl.minimum(limit, NEVER - 1)).to(tl.int32)
                    bits = tl.sum(tl.reshape(near, (PART // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
                members += _write_down(bits, mine, first, members, PART, CANDIDATES)
            if PACKED:
                missed = (members < keep) | (limit > 0x7C00)
            else:
                missed = (members < keep) & (limit < (1 << BITS) - 1)
            if missed | (members > CANDIDATES):
                # The sample misled, or many weights are equal. Halve the interval with counts of the whole chunk
                # until the candidates fit, or only one rank is left: then its first ones are taken and no others.
                low = tl.full((), -1, tl.int32)
                below = tl.full((), 0, tl.int32)
                high = tl.full((), 0x7FFFFFFE, tl.int32)
                upto = tl.full((), 0x7FFFFFFF, tl.int32)
                while (upto > CANDIDATES) & (high - low > 1):
                    middle = low + (high - low) // 2
                    count = tl.full((), 0, tl.int32)
                    for first in range(0, length, PART):
                        there = tl.multiple_of(first, PART) + part
                        part_ranks = _ranks(
                            row, now, start, there, there < length, key, step,
                            CRITERION, KEEP_ZEROS, WEIGHT_TYPE, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED,
                        )  # fmt: skip
                        count += tl.sum((part_ranks <= middle).to(tl.int32), axis=0)
                    enough = count >= keep
                    high = tl.where(enough, middle, high)
                    upto = tl.where(enough, count, upto)
                    low = tl.where(enough, low, middle)
                    below = tl.where(enough, below, count)
                sure_upto = tl.where(upto <= CANDIDATES, high, low)
                wanted_ties = tl.where(upto <= CANDIDATES, 0, keep - below)
                members = tl.full((), 0, tl.int32)
                ties = tl.full((), 0, tl.int32)
                tl.debug_barrier()
                for first in range(0, length, PART):
                    there = tl.multiple_of(first, PART) + part
                    part_ranks = _ranks(
                        row, now, start, there, there < length, key, step,
                        CRITERION, KEEP_ZEROS, WEIGHT_TYPE, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED,
                    )  # fmt: skip
                    tie = ((part_ranks == high) & (part_ranks > sure_upto)).to(tl.int32)
                    tie_place = ties + tl.cumsum(tie, axis=0) - tie
                    near = ((part_ranks <= sure_upto) | ((tie == 1) & (tie_place < wanted_ties))).to(tl.int32)
                    place = members + tl.cumsum(near, axis=0) - near
                    tl.store(mine + place, there.to(tl.int16), mask=near == 1)
                    members += tl.sum(near, axis=0)
                    ties += tl.sum(tie, axis=0)
            tl.debug_barrier()
            index = tl.load(mine + lane, mask=lane < members, other=0).to(tl.int32)

        ranks = _ranks(
            row, now, start, index, lane < members, key, step,
            CRITERION, KEEP_ZEROS, WEIGHT_TYPE, GRADIENT_TYPE, CHANNELS_LAST, ALIGNED,
        )  # fmt: skip
        wanted = tl.minimum(keep, tl.sum((ranks != NEVER).to(tl.int32), axis=0))
        low, below, high, upto = _search(ranks, wanted, wanted, SHIFT, CRITERION == 0)
        # All up to `low` are taken, and of those at `high`, which are equal, the first `ties`.
        low = tl.where(upto == wanted, high, low)
        ties = tl.where(upto == wanted, 0, wanted - below)
        # One running count for both: weights surely taken in the low half, ties in the high half.
        sure = (ranks <= low).to(tl.int32)
        tie = ((ranks == high) & (ranks > low)).to(tl.int32)
        seen = tl.cumsum(sure + (tie << 16), axis=0)
        ties_before = (seen >> 16) - tie
        taken = (sure == 1) | ((tie == 1) & (ties_before < ties))
        place = (seen & 0xFFFF) - sure + tl.minimum(ties_before, ties)
        index_target = _field(row, NEW_INDEX, tl.int16) + target
        if CARRY:
            final = mine + CANDIDATES
            tl.store(final + place, index.to(tl.int16), mask=taken)
            # Where each weight was in the old list. What was not in it finds whatever lay there, and is not taken in.
            places = final + CANDIDATES
            old_entry = tl.arange(0, OLD_KEPT)
            old_keep = tl.where(is_tail, _number(row, KEEP_TAIL), _number(row, KEEP))
            source = line.to(tl.int64) * tl.load(row + KEPT_PER_LINE) + of_line.to(tl.int64) * _number(row, KEEP)
            old_index = _field(row, INDEX, tl.int16) + source
            old = tl.load(old_index + old_entry, mask=old_entry < old_keep, other=-1).to(tl.int32)
            tl.store(places + old, old_entry.to(tl.int16), mask=old >= 0)
            tl.debug_barrier()
            index = tl.load(final + entry, mask=entry < wanted, other=-1).to(tl.int32)
            place = tl.load(places + index, mask=index >= 0, other=-1).to(tl.int32)
            kept = (place >= 0) & (place < old_keep)
            kept = kept & (tl.load(old_index + place, mask=kept, other=-1).to(tl.int32) == index)
            exp_avg = tl.load(_field(row, EXP_AVG, STATE_TYPE) + source + place, mask=kept, other=0.0)
            exp_avg_sq = tl.load(_field(row, EXP_AVG_SQ, STATE_TYPE) + source + place, mask=kept, other=0.0)
            entered = _field(row, ENTRY_STEP, tl.int16) + (source + place) * _number(row, ENTRY_STEP_STRIDE)
            steps = _number(now, STEPS)
            age = tl.minimum((steps - tl.load(entered, mask=kept, other=0).to(tl.int32)) & 0xFFFF, MAX_AGE)
            entry_step = tl.where(kept, steps - age, steps)
            tl.debug_barrier()  # all of the old chunk is read before any of the new one is written
            live = entry < keep
            tl.store(index_target + entry, index.to(tl.int16), mask=live)
            tl.store(_field(row, NEW_EXP_AVG, STATE_TYPE) + target + entry, exp_avg, mask=live)
            tl.store(_field(row, NEW_EXP_AVG_SQ, STATE_TYPE) + target + entry, exp_avg_sq, mask=live)
            tl.store(_field(row, NEW_ENTRY_STEP, tl.int16) + target + entry, entry_step.to(tl.int16), mask=live)
        else:
            tl.store(index_target + place, index.to(tl.int16), mask=taken)
            empty = (entry >= wanted) & (entry < keep)
            tl.store(index_target + entry, tl.full((KEPT,), -1, tl.int16), mask=empty)
            tl.debug_barrier()  # the next chunk writes over what this one has read
