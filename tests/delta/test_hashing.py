"""The hash of a tensor: as the document says it, linear, and blind to no accident within a word."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoadam.delta import bits, hashing

MASK = 2**64 - 1


def odd(number):
    """SplitMix64's mixer in Python's own numbers."""
    value = number * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return (value ^ value >> 31) | 1


def plain(content: bytes) -> int:
    """The hash, from its description alone."""
    content += bytes(-len(content) % 4)
    words = [int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)]
    return sum(odd(2 * (w // 4096) + 1) * odd(2 * (w % 4096) + 2) * word for w, word in enumerate(words)) & MASK


def content(tensor: torch.Tensor) -> bytes:
    return bytes(bits.flat(tensor).view(torch.uint8).tolist())


def tensor_of(dtype, numel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw & 1).view(torch.bool) if dtype == torch.bool else raw.view(dtype)


@pytest.mark.parametrize("dtype", sorted(bits.DTYPES.values(), key=str))
@pytest.mark.parametrize("numel", [0, 1, 3, 17, 4096 * 5 + 3])
def test_it_is_what_is_written(dtype, numel):
    tensor = tensor_of(dtype, numel)
    assert hashing.total(hashing.hash_tensor(tensor)) == plain(content(tensor))


def test_it_sees_values_and_not_how_they_lie():
    tensor = torch.randn(8, 6, 5, 4)
    assert hashing.hash_tensor(tensor) == hashing.hash_tensor(tensor.contiguous(memory_format=torch.channels_last))
    assert hashing.hash_tensor(tensor) == hashing.hash_tensor(torch.cat([tensor[:1], tensor])[1:])
    assert hashing.hash_tensor(tensor[:, 1:]) == hashing.hash_tensor(tensor[:, 1:].clone())


def test_a_view_that_begins_between_words():
    tensor = tensor_of(torch.bfloat16, 1001)
    assert hashing.hash_tensor(tensor[1:]) == hashing.hash_tensor(tensor[1:].clone())


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]),
    st.integers(1, 20_000),
    st.integers(0, 2**31),
)
def test_a_change_adds_its_own_part(dtype, numel, seed):
    before, after = tensor_of(dtype, numel, seed), tensor_of(dtype, numel, seed + 1)
    picker = random.Random(seed)
    positions = torch.tensor(sorted(picker.sample(range(numel), min(numel, 50))))
    after = torch.where(torch.isin(torch.arange(numel), positions), bits.flat(after), bits.flat(before)).view(dtype)
    change = hashing.hash_change(positions, before[positions], after[positions], numel)
    assert hashing.hash_tensor(before) + change == hashing.hash_tensor(after)


def test_each_of_10_000_flipped_bits_is_found():
    tensor = tensor_of(torch.uint8, 200_003)
    before, picker = hashing.hash_tensor(tensor), random.Random(0)
    for _ in range(10_000):
        at, bit = picker.randrange(tensor.numel()), 1 << picker.randrange(8)
        old = tensor[at : at + 1].clone()
        change = hashing.hash_change(torch.tensor([at]), old, old ^ bit, tensor.numel())
        assert change != 0
    for _ in range(100):  # and through the whole tensor
        at, bit = picker.randrange(tensor.numel()), 1 << picker.randrange(8)
        tensor[at] ^= bit
        assert hashing.hash_tensor(tensor) != before
        tensor[at] ^= bit
    assert hashing.hash_tensor(tensor) == before


def test_what_changes_in_many_places_is_found():
    """Swaps of words, rows and blocks, and runs of zeros: the accidents of copying."""
    tensor = tensor_of(torch.float32, 4096 * 6).view(24, 1024)
    seen = {hashing.total(hashing.hash_tensor(tensor))}
    count = 1
    for i in range(24):
        for j in range(i):
            order = list(range(24))
            order[i], order[j] = j, i
            seen.add(hashing.total(hashing.hash_tensor(tensor[order])))
            count += 1
        zeroed = tensor.clone()
        zeroed[i] = 0
        seen.add(hashing.total(hashing.hash_tensor(zeroed)))
        seen.add(hashing.total(hashing.hash_tensor(tensor.roll(i + 1, 1))))
        count += 2
    assert len(seen) == count
