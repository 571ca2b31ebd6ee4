"""Random bits are a function of their counters; rounding is unbiased."""

import torch

from nanoadam.ops.rounding import mix, random_words, round_stochastically, seed_key, tensor_key


def words(seed=0, step=0, tensor=0, count=1 << 16, first=0):
    return random_words(tensor_key(seed_key(seed), step, tensor), torch.arange(first, first + count))


def test_bits_depend_on_counters_alone_not_on_the_order_or_cut_of_the_work():
    whole = torch.stack(words())
    parts = torch.cat([torch.stack(words(first=a, count=1 << 14)) for a in range(0, 1 << 16, 1 << 14)], dim=1)
    assert torch.equal(whole, parts)
    shuffled = torch.randperm(1 << 16)
    again = torch.stack(random_words(tensor_key(seed_key(0), 0, 0), shuffled))
    assert torch.equal(again, whole[:, shuffled])


def test_bits_are_those_of_plain_integer_arithmetic():
    key = tensor_key(seed_key(12345678901234), 77, 3)
    for position in (0, 1, 4095, 2**31 + 5, 2**40 + 123):
        first = mix(mix((position >> 32) ^ key) ^ (position & 0xFFFFFFFF))
        got = random_words(key, torch.tensor([position]))
        assert [int(w) for w in got] == [first, mix(first ^ 0x6A09E667)]


def test_seed_step_tensor_and_position_each_change_the_bits():
    base = words()[0]
    for other in (
        words(seed=1)[0],
        words(seed=1 << 40)[0],
        words(step=1)[0],
        words(tensor=1)[0],
        words(first=2**32)[0],
        words()[1],
    ):
        assert (base == other).float().mean() < 1e-3


def test_every_bit_is_fair_and_uncorrelated_with_its_neighbour():
    for word in words(count=1 << 18):
        bits = (word[:, None] >> torch.arange(32)) & 1
        # 2**18 fair coins: the mean of one lies within 5 standard deviations (0.005) of a half.
        assert (bits.double().mean(0) - 0.5).abs().max() < 0.005
        same = (bits[1:] == bits[:-1]).double().mean(0)
        assert (same - 0.5).abs().max() < 0.005


def test_stochastic_rounding_is_unbiased():
    value = torch.full((1 << 18,), 1.0 + 0.3 * 2**-7)
    rounded = round_stochastically(value, words(count=1 << 18)[0])
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    share_up = (rounded > 1).double().mean().item()
    assert abs(share_up - 0.3) < 5 * (0.21 / (1 << 18)) ** 0.5


def test_rounding_keeps_what_bfloat16_holds_exactly_and_what_is_not_finite():
    value = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf")])
    noise = torch.full((6,), 0xFFFF)
    assert torch.equal(round_stochastically(value, noise).float(), value)
    assert round_stochastically(torch.tensor([float("nan")]), torch.tensor([0xFFFF])).isnan().all()
