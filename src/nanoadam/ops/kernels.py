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
    """Positions in 32 bits are not negative."""
    if position.dtype == tl.int64:
        high = (position >> 32).to(tl.uint32)
        first = _mix(high ^ key)
    else:
        first = _mix(key)
    first = _mix(first ^ position.to(tl.uint32))
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


# Columns of the table of selected tensors (int64), as `triton.py` writes them. Addresses of gradients change from
# step to step and come apart from it.
WEIGHT = tl.constexpr(0)
INDEX = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
ENTRY_STEP = tl.constexpr(4)
ENTRY_STEP_STRIDE = tl.constexpr(5)
STEP = tl.constexpr(6)
ORDINAL = tl.constexpr(7)
LINE = tl.constexpr(8)
CHUNK = tl.constexpr(9)
FULL = tl.constexpr(10)
KEEP = tl.constexpr(11)
KEPT_PER_LINE = tl.constexpr(12)
SELECTED = tl.constexpr(13)
ROW = tl.constexpr(14)
SPATIAL = tl.constexpr(15)
FIRST = tl.constexpr(16)
GRADIENT_SPATIAL = tl.constexpr(17)
OFFSET = tl.constexpr(18)  # position of its first weight in the full tensor, if this is a part
COLUMNS = tl.constexpr(19)


# Where things are.


@triton.jit
def _storage_offset(position, row, spatial, CHANNELS_LAST: tl.constexpr):
    """Storage offset of a row-major position in a tensor of `row` weights per row, `spatial` per channel."""
    offset = position
    if CHANNELS_LAST:
        number = position // row
        within = position - number * row
        channel = within // spatial
        offset = number * row + (within - channel * spatial) * (row // spatial) + channel
    return offset


@triton.jit
def _row_major(offset, row, spatial, CHANNELS_LAST: tl.constexpr):
    """The inverse of `_storage_offset`."""
    position = offset
    if CHANNELS_LAST:
        number = offset // row
        within = offset - number * row
        channels = row // spatial
        place = within // channels
        position = number * row + (within - place * channels) * spatial + place
    return position


@triton.jit
def _count(row, at: tl.constexpr, WIDE: tl.constexpr):
    """A number from the table that may be beyond 31 bits in a tensor of that many weights."""
    if WIDE:
        number = tl.load(row + at)
    else:
        number = tl.load(row + at).to(tl.int32)
    return number


@triton.jit
def _entries(row, block, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The entries that a block serves: their places in the list, and which there are."""
    number = block - _number(row, FIRST)
    if WIDE:
        number = number.to(tl.int64)
    entry = number * BLOCK + tl.arange(0, BLOCK)
    return entry, entry < _count(row, SELECTED, WIDE)


@triton.jit
def _entry_position(row, entry, index, WIDE: tl.constexpr):
    """Row-major position of a selected entry from its place in the list and its index within its chunk."""
    kept_per_line = _count(row, KEPT_PER_LINE, WIDE)
    number = entry // kept_per_line
    within = entry - number * kept_per_line
    of_line = tl.minimum(within // tl.maximum(_number(row, KEEP), 1), _number(row, FULL))
    if WIDE:  # a chunk's number fits 31 bits, where it begins does not
        of_line = of_line.to(tl.int64)
    return number * _count(row, LINE, WIDE) + of_line * _number(row, CHUNK) + index


@triton.jit
def _field(row, at, TYPE: tl.constexpr):
    """A pointer from the table."""
    return tl.load(row + at).to(tl.pointer_type(TYPE))


@triton.jit
def _list(row, at, TYPE: tl.constexpr):
    """A pointer to a multiple of 16 bytes: 8 weights of 16 bits can be read from there at once."""
    return tl.multiple_of(tl.load(row + at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _number(row, at: tl.constexpr):
    return tl.load(row + at).to(tl.int32)


@triton.jit
def gather(
    table,
    block_rows,
    addresses,  # int64 [tensors, 2]: of the dense gradient, of its entries
    GRADIENT_TYPE: tl.constexpr,
    ENTRIES_TYPE: tl.constexpr,
    ADD: tl.constexpr,  # to the entries that are there
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of selected entries; `block_rows` int32 says of which tensor."""
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    entry, live = _entries(row, block, WIDE, BLOCK)
    index = tl.load(_field(row, INDEX, tl.int16) + entry, mask=live, other=-1).to(tl.int32)
    used = index >= 0
    position = _entry_position(row, entry, index, WIDE)
    offset = _storage_offset(position, _number(row, ROW), _number(row, GRADIENT_SPATIAL), CHANNELS_LAST)
    value = tl.load(_field(addresses, 2 * tensor, GRADIENT_TYPE) + offset, mask=used, other=0.0).to(tl.float32)
    mine = _field(addresses, 2 * tensor + 1, ENTRIES_TYPE) + entry
    if ADD:
        value += tl.load(mine, mask=live, other=0.0).to(tl.float32)
    _store(mine, value, 0, live, False)


@triton.jit
def row_entries(
    row,  # int64 [COLUMNS]: of the table that was looked up in
    starts,  # int64 [rows + 1]: where each row's tokens begin in `order`
    order,  # int64 [tokens]: tokens by row
    gradient,  # [tokens, ROW]: of what was looked up
    entries,  # float32 [SELECTED]
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program a block of selected entries: each sums over the tokens that looked its row up, in their order."""
    entry, live = _entries(row, tl.program_id(0), WIDE, BLOCK)
    index = tl.load(_field(row, INDEX, tl.int16) + entry, mask=live, other=-1).to(tl.int32)
    used = index >= 0
    position = tl.where(used, _entry_position(row, entry, index, WIDE), 0)
    width = _number(row, ROW)
    which = position // width
    column = position - which * width
    first = tl.load(starts + which, mask=used, other=0)
    count = tl.load(starts + which + 1, mask=used, other=0) - first
    total = tl.zeros([BLOCK], tl.float32)
    most = tl.max(count, axis=0)
    for number in range(0, most, TOKENS):
        turn = number + tl.arange(0, TOKENS)
        more = turn[None, :] < count[:, None]
        token = tl.load(order + first[:, None] + turn[None, :], mask=more, other=0)
        value = tl.load(gradient + token * width + column[:, None], mask=more, other=0.0)
        total += tl.sum(value.to(tl.float32), axis=1)
    tl.store(entries + entry, total, mask=live)


@triton.jit
def _adam(weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps):
    exp_avg = exp_avg + weight1 * (gradient - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + weight2 * gradient * gradient
    weight = weight * decay - step_size * (exp_avg / (tl.sqrt_rn(exp_avg_sq) / correction2 + eps))
    return weight, exp_avg, exp_avg_sq


@triton.jit(do_not_specialize=["key", "step"])
def update(
    table,
    block_rows,
    addresses,  # int64 [tensors]: of the gradients
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
    ENTRIES_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of selected entries; `block_rows` int32 says of which tensor."""
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    if LR_POINTER:
        lr = tl.load(lr_pointer).to(tl.float32)
    if STEP_POINTER:
        step = tl.load(_field(row, STEP, tl.float32)).to(tl.int32)
    entry, live = _entries(row, block, WIDE, BLOCK)
    index = tl.load(_field(row, INDEX, tl.int16) + entry, mask=live, other=-1).to(tl.int32)
    used = index >= 0
    position = _entry_position(row, entry, index, WIDE)
    pointer = _field(row, WEIGHT, WEIGHT_TYPE)
    pointer += _storage_offset(position, _number(row, ROW), _number(row, SPATIAL), CHANNELS_LAST)
    weight = tl.load(pointer, mask=used, other=0.0).to(tl.float32)
    gradient = tl.load(_field(addresses, tensor, ENTRIES_TYPE) + entry, mask=used, other=0.0).to(tl.float32)
    if SCALE_POINTER:
        gradient = gradient * tl.load(scale_pointer)
    if MAXIMIZE:
        gradient = -gradient
    average = _field(row, EXP_AVG, STATE_TYPE) + entry
    average_sq = _field(row, EXP_AVG_SQ, STATE_TYPE) + entry
    exp_avg = tl.load(average, mask=used, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(average_sq, mask=used, other=0.0).to(tl.float32)
    entered = _field(row, ENTRY_STEP, tl.int16) + entry * _number(row, ENTRY_STEP_STRIDE)
    age = tl.minimum((step - tl.load(entered, mask=used, other=0).to(tl.int32)) & 0xFFFF, MAX_AGE)
    step_size = lr * tl.load(corrections + age)
    correction2 = tl.load(corrections + (MAX_AGE + 1) + age)
    decay = 1.0 - lr * weight_decay
    weight, exp_avg, exp_avg_sq = _adam(
        weight, gradient, exp_avg, exp_avg_sq, step_size, correction2, decay, weight1, beta2, weight2, eps
    )
    position += _count(row, OFFSET, WIDE)
    first, second = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
    _store(average, exp_avg, first, used, STOCHASTIC)
    _store(average_sq, exp_avg_sq, first >> 16, used, STOCHASTIC)
    _store(pointer, weight, second, used, STOCHASTIC)


@triton.jit(do_not_specialize=["key", "step"])
def update_dense(
    table,
    block_rows,
    addresses,  # int64 [tensors]: of the gradients
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
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of weights in the order of their storage; SELECTED is the number of weights."""
    block = tl.program_id(0)
    tensor = tl.load(block_rows + block)
    row = table + tensor * COLUMNS
    if LR_POINTER:
        lr = tl.load(lr_pointer).to(tl.float32)
    if STEP_POINTER:
        step = tl.load(_field(row, STEP, tl.float32)).to(tl.int32)
    offset, live = _entries(row, block, WIDE, BLOCK)
    if ALIGNED:
        live = offset < tl.multiple_of(tl.load(row + SELECTED), 8)  # 8 of them are then loaded and stored together
        pointer = _list(row, WEIGHT, WEIGHT_TYPE) + offset
        gradients = _list(addresses, tensor, GRADIENT_TYPE) + offset
    else:
        pointer = _field(row, WEIGHT, WEIGHT_TYPE) + offset
        gradients = _field(addresses, tensor, GRADIENT_TYPE) + offset
    average = _list(row, EXP_AVG, STATE_TYPE) + offset
    average_sq = _list(row, EXP_AVG_SQ, STATE_TYPE) + offset
    weight = tl.load(pointer, mask=live, other=0.0).to(tl.float32)
    gradient = tl.load(gradients, mask=live, other=0.0).to(tl.float32)
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
    position = _row_major(offset, _number(row, ROW), _number(row, SPATIAL), CHANNELS_LAST)
    position += _count(row, OFFSET, WIDE)
    first, second = _random_words(_tensor_key(key, step, _number(row, ORDINAL)), position)
    _store(average, exp_avg, first, live, STOCHASTIC)
    _store(average_sq, exp_avg_sq, first >> 16, live, STOCHASTIC)
    _store(pointer, weight, second, live, STOCHASTIC)
