"""Which weights are selected: exactly the promised ones, whatever the values, shapes and dtypes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossed import crossed
from nanoadam.chunks import layout
from nanoadam.ops import Rule, Slot, reference
from oracle import smallest_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (1, 1), (9, 700), (2, 4097), (3, 2, 3, 3)]
LONG = [(130, 33), (1, 9000)]  # seconds each in the interpreter


def rule(**changes):
    return Rule(**{"criterion": "smallest", "keep_zeros": False, "carry": True, "key": 1, "step": 0, **changes})


def fresh_slot(weight):
    return Slot(weight, {"exp_avg": torch.empty(0), "exp_avg_sq": torch.empty(0)}, ordinal=1)


def selected(ops, weight, density, **changes):
    slot = fresh_slot(weight)
    ops.select([slot], [layout(weight.shape, density)], rule(**changes), None)
    return reference.mask(slot.selection, weight.shape)


def awkward(shape, dtype, seed=0):
    """Values with many ties, both zeros, NaN of several payloads, infinities and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(shape, generator=generator) * 4).round() / 4
    pick = torch.rand(shape, generator=generator)
    w[pick < 0.05] = -0.0
    w[(pick > 0.05) & (pick < 0.1)] = float("nan")
    w[(pick > 0.1) & (pick < 0.12)] = -float("nan")
    w[(pick > 0.12) & (pick < 0.15)] = -float("inf")
    w[(pick > 0.15) & (pick < 0.2)] = 1e-40 if dtype != torch.float16 else 1e-7
    return w.to(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "density"),
    [
        *crossed(SHAPES, DTYPES, [0.01, 0.3, 1.0]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(LONG, DTYPES, [0.01, 0.3, 1.0])),
    ],
)
def test_the_smallest_of_each_chunk_are_selected(ops, device, shape, dtype, density):
    for weight in (torch.randn(shape).to(dtype), awkward(shape, dtype)):
        expected = smallest_mask(weight.double().numpy(), density)
        assert torch.equal(selected(ops, weight.to(device), density).cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_each_chunk_are_selected_by_that_criterion(ops, device, dtype):
    weight = awkward((37, 129), dtype)
    expected = smallest_mask(weight.double().numpy(), 0.1, criterion="largest")
    assert torch.equal(selected(ops, weight.to(device), 0.1, criterion="largest").cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize(("zeros", "dtype", "density"), crossed([0.0, 0.5, 0.995, 1.0], DTYPES, [0.02, 0.5, 1.0]))
def test_keep_zeros_never_selects_an_exact_zero(ops, device, dtype, zeros, density):
    torch.manual_seed(0)
    weight = torch.randn(50, 170).masked_fill(torch.rand(50, 170) < zeros, 0.0).to(dtype)
    weight[0, :5] = -0.0
    expected = smallest_mask(weight.double().numpy(), density, keep_zeros=True)
    got = selected(ops, weight.to(device), density, keep_zeros=True).cpu()
    assert torch.equal(got, torch.from_numpy(expected))
    assert not got[weight == 0].any()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    density=st.floats(0.001, 1),
    levels=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_selection_agrees_with_the_definition_on_drawn_cases(rows, cols, density, levels, seed):
    torch.manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, cols)) / levels
    for dtype in DTYPES:
        expected = smallest_mask(weight.to(dtype).double().numpy(), density)
        assert torch.equal(selected(reference, weight.to(dtype), density), torch.from_numpy(expected))


def test_all_equal_weights_select_the_first_places(ops, device):
    mask = selected(ops, torch.ones(8, 1000, device=device), 0.1)  # chunks of 4 rows
    assert mask.view(2, 4000)[:, :400].all()
    assert not mask.view(2, 4000)[:, 400:].any()


def test_random_selection_depends_on_seed_step_and_tensor_and_has_the_right_count(ops, device):
    weight = torch.randn(8, 640, device=device)  # a chunk of six lines and one of two
    base = selected(ops, weight, 0.1, criterion="random")
    assert torch.equal(base, selected(ops, weight, 0.1, criterion="random"))
    assert int(base.sum()) == layout(weight.shape, 0.1).selected
    for other in ({"key": 2}, {"step": 5}):
        overlap = (base & selected(ops, weight, 0.1, criterion="random", **other)).sum() / base.sum()
        assert 0.05 < overlap < 0.15  # one in ten by chance


def test_random_selection_is_the_same_on_every_backend(ops, device):
    weight = torch.randn(8, 640)
    expected = selected(reference, weight, 0.1, criterion="random")
    assert torch.equal(selected(ops, weight.to(device), 0.1, criterion="random").cpu(), expected)


def test_channels_last_weights_are_selected_by_their_logical_order(ops, device):
    weight = awkward((40, 16, 3, 3), torch.float32)
    last = weight.to(device).contiguous(memory_format=torch.channels_last)
    assert torch.equal(selected(ops, last, 0.1).cpu(), selected(reference, weight, 0.1))


def test_a_transposed_weight_is_selected_by_its_logical_order(ops, device):
    weight = awkward((300, 40), torch.bfloat16).to(device).t()
    assert not weight.is_contiguous()
    assert torch.equal(selected(ops, weight, 0.1).cpu(), selected(reference, weight.cpu().contiguous(), 0.1))


CHANGES = [(0.1, 0.1), (0.2, 0.04), (0.03, 0.3), (0.1, 1.0), (1.0, 0.1)]


@pytest.mark.parametrize(("densities", "keep_zeros", "shape"), [
    *(pytest.param(*case.values, (11, 700), marks=case.marks) for case in crossed(CHANGES, [False, True])),
    *(pytest.param(*case, (2, 4500), marks=pytest.mark.slow) for case in itertools.product(CHANGES, [False, True])),
])  # fmt: skip
def test_a_refresh_carries_moments_of_survivors_and_forgets_the_rest(ops, device, shape, densities, keep_zeros):
    torch.manual_seed(1)
    weight = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, 0.0).to(device)
    slot = fresh_slot(weight)
    ops.select([slot], [layout(shape, densities[0])], rule(keep_zeros=keep_zeros), None)
    before = reference.mask(slot.selection, shape)
    dense = {n: torch.randn(shape, device=device) for n in ("exp_avg", "exp_avg_sq")}
    used = slot.state["index"] >= 0
    for name, values in dense.items():
        packed = torch.zeros(used.numel(), device=device).masked_scatter(used, values[before])
        slot.state[name] = packed
    slot.steps = 70000  # beyond 16 bits
    slot.state["entry_step"] = torch.tensor([60000 - 65536], dtype=torch.int16, device=device)

    weight += 0.3 * torch.randn(shape, device=device) * (weight != 0)
    ops.select([slot], [layout(shape, densities[1])], rule(keep_zeros=keep_zeros), None)
    after = reference.mask(slot.selection, shape)
    assert torch.equal(
        after.cpu(), torch.from_numpy(smallest_mask(weight.cpu().double().numpy(), densities[1], keep_zeros=keep_zeros))
    )
    used = slot.state["index"] >= 0
    for name, values in dense.items():
        packed = slot.state[name]
        assert torch.equal(packed[used], torch.where(before, values, 0.0)[after])
        assert not packed[~used].any()
    age = (slot.steps - slot.state["entry_step"].int()) & 0xFFFF
    assert torch.equal(age.expand(used.numel())[used], torch.where(before, 10000, 0)[after].int())


def test_reset_starts_every_weight_over(ops, device):
    slot = fresh_slot(torch.randn(8, 500, device=device))
    lay = layout((8, 500), 0.1)
    ops.select([slot], [lay], rule(), None)
    slot.state["exp_avg"] = torch.ones(lay.selected, device=device)
    slot.state["exp_avg_sq"] = torch.ones(lay.selected, device=device)
    slot.steps = 9
    ops.select([slot], [lay], rule(carry=False), None)
    assert not slot.state["exp_avg"].any()
    assert not slot.state["exp_avg_sq"].any()
    assert ((slot.steps - slot.state["entry_step"].int()) & 0xFFFF == 0).all()


def test_selection_by_gradient_takes_the_largest_gradients(ops, device):
    weight, gradient = torch.randn(20, 300, device=device), torch.randn(20, 300, device=device)
    slot = fresh_slot(weight)
    ops.select([slot], [layout(weight.shape, 0.05)], rule(criterion="gradient"), [gradient])
    expected = smallest_mask(gradient.cpu().double().numpy(), 0.05, criterion="largest")
    assert torch.equal(reference.mask(slot.selection, weight.shape).cpu(), torch.from_numpy(expected))
