"""Models and changes that Hypothesis draws: every dtype, any bits, tied, strided and new tensors."""

import torch
from hypothesis import strategies as st

from nanoadam.delta import bits

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SHAPES = [(), (1,), (0,), (7,), (3, 5), (40, 33), (2, 3, 4), (4, 6, 3, 5), (300, 400)]


def noise(dtype, shape, generator):
    """Any bits at all: NaN with payloads, negative zeros, infinities."""
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw & 1
    return raw.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)


def lay(tensor, how):
    """The same values, lying in memory in another way."""
    if how == "strided" and tensor.dim():
        wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))[..., ::2]
        bits.bits(wide).copy_(bits.bits(tensor))
        return wide
    if how == "transposed" and tensor.dim() >= 2:
        return bits.bits(tensor).transpose(0, 1).contiguous().view(tensor.dtype).transpose(0, 1)
    if how == "channels_last" and tensor.dim() == 4:
        return bits.bits(tensor).contiguous(memory_format=torch.channels_last).view(tensor.dtype)
    return tensor


def change(tensor, how, generator):
    """A changed copy of the tensor; always contiguous."""
    flat = bits.flat(tensor).clone()
    numel = flat.numel()
    other = bits.flat(noise(tensor.dtype, (numel,), generator))
    if how == "few":
        places = torch.randperm(numel, generator=generator)[: max(1, numel // 50)]
    elif how == "columns" and tensor.dim() >= 2:
        width = tensor.shape[-1]
        columns = torch.randperm(width, generator=generator)[: max(1, width // 8)]
        places = (torch.arange(0, numel, width)[:, None] + columns).view(-1) if numel else torch.arange(0)
    elif how == "all":
        places = torch.arange(numel)
    else:
        places = torch.arange(0)
    flat[places] = other[places]
    return flat.view(tensor.dtype).view(tensor.shape)


@st.composite
def models(draw):
    """A base and a finetuned state dict, and a note of what was drawn."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base, tuned = {}, {}
    for i in range(draw(st.integers(1, 4))):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
        how = draw(st.sampled_from(["none", "few", "columns", "all", "new", "reshaped", "removed", "retyped"]))
        name = f"layer.{i}.weight"
        plain = noise(dtype, shape, generator)
        if how != "new":
            base[name] = lay(plain, draw(st.sampled_from(["plain", "strided", "transposed", "channels_last"])))
        if how == "reshaped":
            tuned[name] = noise(dtype, (*shape, 2), generator)
        elif how == "retyped":
            tuned[name] = noise(torch.float32 if dtype != torch.float32 else torch.int32, shape, generator)
        elif how != "removed":
            tuned[name] = lay(change(plain, how, generator), draw(st.sampled_from(["plain", "strided"])))
    if base and draw(st.booleans()):
        name = next(iter(base))
        base["tied"] = base[name]
        if name in tuned:
            tuned["tied"] = tuned[name]
    return base, tuned


def copy(state):
    """A state dict of the same values, strides and ties."""
    done = {}
    for tensor in state.values():
        if id(tensor) not in done:
            fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            bits.bits(fresh).copy_(bits.bits(tensor))
            done[id(tensor)] = fresh
    return {name: done[id(tensor)] for name, tensor in state.items()}


def same(a, b):
    """Whether two state dicts have the same names and bits."""
    return set(a) == set(b) and all(bits.equal(a[name], b[name]) for name in a)
