"""NanoAdam against the paper's algorithm, against torch's AdamW, and what it promises about every weight."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossed import crossed
from nanoadam.chunks import layout
from nanoadam.ops import reference
from nanoadam.optimizer import NanoAdam
from nanoadam.schedules import constant, cosine, linear
from nanoadam.slots import by_device
from oracle import Oracle

# One row longer than a chunk, a chunk of whole rows with a short tail, a single element, a convolution.
SHAPES = [(2, 4500), (37, 200), (1, 1), (12, 3, 3, 3)]
SCHEDULES = {
    "constant": constant(0.05),
    "linear": linear(0.2, 0.05, total_steps=200, interval=33),
    "cosine": cosine(0.05, 0.3, total_steps=150, interval=20),
}


def follow(
    shape,
    *,
    dtype=torch.float32,
    schedule=SCHEDULES["constant"],
    steps=200,
    seed=0,
    tolerance=1e-5,
    device="cpu",
    **options,
):
    """Train one tensor on noisy gradients beside the oracle; every weight agrees at every step."""
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "mask_interval": 7, **options}
    generator = torch.Generator().manual_seed(seed)
    weight = (0.3 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randn(shape, generator=generator)
    parameter = torch.nn.Parameter(weight.to(device))
    opt = NanoAdam([parameter], density=schedule, state_dtype=torch.float32, stochastic_rounding=False, **options)
    oracle = Oracle(weight.double().numpy(), density=schedule, **options)
    for _ in range(steps):
        now = parameter.detach().cpu().double().numpy()
        oracle.refresh(now)
        if dtype != torch.float32:
            oracle.w = now.copy()  # follow the rounded weights; each step is held to half a unit in the last place
        gradient = (parameter.detach().cpu().float() - target + 0.5 * torch.randn(shape, generator=generator)).to(dtype)
        parameter.grad = gradient.to(device)
        opt.step()
        opt.zero_grad()
        oracle.step(gradient.double().numpy())
        got = parameter.detach().cpu().double().numpy()
        assert np.array_equal(opt.state[parameter]["index"].numel(), layout(shape, oracle.k).selected)
        assert np.array_equal(got[~oracle.mask], now[~oracle.mask]), "an unselected weight changed"
        unit = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert np.allclose(got, oracle.w, rtol=1.01 * unit + tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "schedule", "moments"), crossed(SHAPES, list(SCHEDULES), ["carry", "reset"]))
def test_it_is_the_papers_algorithm_over_200_steps(shape, schedule, moments):
    follow(shape, schedule=SCHEDULES[schedule], moments=moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_it_to_the_last_place(dtype):
    follow((37, 200), dtype=dtype, schedule=SCHEDULES["linear"])


@settings(max_examples=25)
@given(
    rows=st.integers(1, 30),
    cols=st.integers(1, 250),
    density=st.floats(0.001, 1.0),
    mask_interval=st.integers(1, 60),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    moments=st.sampled_from(["carry", "reset"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    betas=st.sampled_from([(0.9, 0.999), (0.75, 0.999), (0.0, 0.9)]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_papers_algorithm_on_drawn_cases(
    rows, cols, density, mask_interval, schedule, moments, dtype, betas, seed
):
    make = {"linear": linear, "cosine": cosine}.get(schedule)
    densities = make(density, min(1.0, density * 2), total_steps=60, interval=20) if make else constant(density)
    follow(
        (rows, cols),
        dtype=dtype,
        schedule=densities,
        mask_interval=mask_interval,
        moments=moments,
        betas=betas,
        seed=seed,
        steps=80,
    )


def test_every_backend_is_the_papers_algorithm(backend, device):
    follow((9, 120), device=device, schedule=linear(0.3, 0.1, total_steps=20, interval=6), steps=20, mask_interval=3)


def train(model, opt, steps=20, accumulate=1, seed=0):
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            x, y = torch.randn(16, 12), torch.randint(0, 4, (16,))
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(12, 60), torch.nn.GELU(), torch.nn.Linear(60, 4)).to(dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_density_one_is_torchs_adamw(weight_decay, maximize):
    ours, theirs = network(), network()
    options = {"lr": 1e-2, "weight_decay": weight_decay, "maximize": maximize}
    train(ours, NanoAdam(ours.parameters(), density=1.0, mask_interval=5, state_dtype=torch.float32, **options), 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_dense_tensors_get_torchs_adamw():
    ours, theirs = network(), network()
    groups = [{"params": list(ours.parameters()), "dense": True}]
    train(ours, NanoAdam(groups, lr=1e-2, state_dtype=torch.float32), 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_never_selected_keep_their_bits_weight_decay_included(dtype):
    model = network(dtype)
    opt = NanoAdam(model.parameters(), lr=1e-2, weight_decay=0.5, density=0.05, mask_interval=3)
    before = {p: p.detach().clone() for p in model.parameters() if p.dim() == 2}
    touched = {p: torch.zeros_like(p, dtype=torch.bool) for p in before}
    for step in range(30):
        for p, mask in touched.items():
            mask |= opt.selected(p)
        torch.manual_seed(step)
        torch.nn.functional.cross_entropy(
            model(torch.randn(16, 12, dtype=dtype)).float(), torch.randint(0, 4, (16,))
        ).backward()
        opt.step()
        opt.zero_grad()
    for p, mask in touched.items():
        assert 0.05 < mask.float().mean() < 0.9
        assert torch.equal(p[~mask], before[p][~mask])
        assert not torch.equal(p[mask], before[p][mask])


@pytest.mark.parametrize("moments", ["carry", "reset"])
def test_the_first_step_of_a_newly_selected_weight_has_length_lr(moments):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(10, 400))
    opt = NanoAdam([p], lr=1e-3, density=0.1, mask_interval=10, state_dtype=torch.float32, moments=moments)
    before = None
    for step in range(41):
        mask = opt.selected(p)
        fresh = mask & ~before if before is not None else mask
        weights = p.detach().clone()
        if step and step % 10 == 0:
            with torch.no_grad():  # make room: the smallest half moves away, others take their place
                p[mask & (torch.rand_like(p) < 0.5)] = 3.0
            mask = opt.selected(p)
            fresh, weights = mask & ~before, p.detach().clone()
            assert fresh.any()
        p.grad = torch.randn_like(p)
        opt.step()
        opt.zero_grad()
        if fresh.any():
            torch.testing.assert_close(
                (p - weights).abs()[fresh], torch.full((int(fresh.sum()),), 1e-3), rtol=0.02, atol=0
            )
        before = mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_moments_with_stochastic_rounding_follow_float32_and_plain_rounding_freezes_the_second(dtype):
    """Gradients shrink tenfold: v must fall a hundredfold, which plain bf16 rounding of 0.999 v never does."""
    torch.manual_seed(0)
    second = {}
    noise = torch.randn(700, 8, 500)
    for name, options in {
        "float32": {"state_dtype": torch.float32},
        "stochastic": {"state_dtype": torch.bfloat16},
        "plain": {"state_dtype": torch.bfloat16, "stochastic_rounding": False},
    }.items():
        p = torch.nn.Parameter(torch.ones(8, 500, dtype=dtype))
        opt = NanoAdam([p], lr=0.0, density=0.5, **options)
        for step in range(700):
            p.grad = (noise[step] * (1.0 if step < 100 else 0.1)).to(dtype)
            opt.step()
            opt.zero_grad()
        second[name] = opt.state[p]["exp_avg_sq"].double().mean().item()
    assert second["stochastic"] == pytest.approx(second["float32"], rel=0.02)
    assert second["plain"] > 1.4 * second["float32"]


def test_stochastically_rounded_bf16_weights_move_where_plain_rounding_stands_still():
    moved = {}
    for stochastic in (True, False):
        p = torch.nn.Parameter(torch.ones(16, 256, dtype=torch.bfloat16))
        opt = NanoAdam([p], lr=1e-4, density=1.0, stochastic_rounding=stochastic)  # a step is 1/40 of a bf16 unit
        for _ in range(200):
            p.grad = torch.ones_like(p)
            opt.step()
            opt.zero_grad()
        moved[stochastic] = 1 - p.detach().double().mean().item()
    assert moved[True] == pytest.approx(200e-4, rel=0.1)
    assert moved[False] == 0.0


def test_the_selection_is_that_of_the_weights_at_the_start_of_the_step():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], lr=1e-3, density=0.1)
    asked_before_loading = opt.selected(p)
    with torch.no_grad():
        p.copy_(torch.randn(4, 100))
    expected = opt.selected(p)
    assert not torch.equal(asked_before_loading, expected)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p != before, expected)


def test_a_density_changed_by_hand_takes_effect_at_the_next_step_not_in_an_open_window():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    (p * p).sum().backward()
    opt.param_groups[0]["density"] = 0.2
    assert int(opt.selected(p).sum()) == 40
    (p * p).sum().backward()
    opt.step()
    assert int(opt.selected(p).sum()) == 80


@pytest.mark.parametrize("criterion", ["smallest", "largest", "random", "gradient"])
def test_every_criterion_trains(criterion):
    model = network()
    losses = train(model, NanoAdam(model.parameters(), lr=1e-2, density=0.2, criterion=criterion, mask_interval=4), 3)
    assert np.isfinite(losses).all()


def test_selection_by_gradient_updates_the_largest_gradients():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], criterion="gradient", density=0.1, mask_interval=2)
    assert not opt.selected(p).any()
    gradient = torch.randn(4, 100)
    p.grad = gradient.clone()
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p != before, opt.selected(p))
    assert set(gradient.abs().view(-1).topk(40).indices.tolist()) == set(
        opt.selected(p).view(-1).nonzero().view(-1).tolist()
    )


def test_nan_and_inf_gradients_stay_within_the_selection():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    mask, before = opt.selected(p), p.detach().clone()
    p.grad = torch.full_like(p, float("nan"))
    p.grad[::2] = float("inf")
    opt.step()
    assert torch.equal(p[~mask], before[~mask])


def test_pruned_weights_stay_pruned_through_a_training():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < p.abs().median()] = 0
    zeros = [p == 0 for p in model.parameters() if p.dim() == 2]
    train(model, NanoAdam(model.parameters(), lr=1e-2, density=0.6, keep_zeros=True, mask_interval=3, weight_decay=0.1))
    for p, zero in zip([p for p in model.parameters() if p.dim() == 2], zeros, strict=True):
        assert torch.equal(p[zero], torch.zeros_like(p[zero]))


def test_frozen_empty_unused_and_zero_dimensional_parameters_work():
    used, unused = torch.nn.Parameter(torch.randn(3, 8)), torch.nn.Parameter(torch.randn(3, 8))
    frozen = torch.nn.Parameter(torch.randn(3, 8), requires_grad=False)
    empty, scalar = torch.nn.Parameter(torch.empty(0, 4)), torch.nn.Parameter(torch.tensor(2.0))
    everything = [used, unused, frozen, empty, scalar]
    before = [p.detach().clone() for p in everything]
    opt = NanoAdam(everything, lr=0.1, density=0.5)
    for _ in range(3):
        ((used * scalar).sum() + empty.sum()).backward()
        opt.step()
        opt.zero_grad()
    changed = [not torch.equal(p, b) for p, b in zip(everything, before, strict=True)]
    assert changed == [True, False, False, False, True]
    assert opt.state[unused]["step"] == 0
    assert not opt.selected(frozen).any()
    frozen.requires_grad_()
    for _ in range(2):
        (frozen * frozen).sum().backward()
        opt.step()
        opt.zero_grad()
    assert not torch.equal(frozen, before[2])


def test_tied_weights_are_updated_once_with_the_sum_of_their_gradients():
    table = torch.nn.Embedding(30, 16)
    head = torch.nn.Linear(16, 30, bias=False)
    head.weight = table.weight
    model = torch.nn.Sequential(table, head)
    clone = copy.deepcopy(model)
    assert clone[0].weight is clone[1].weight
    for m, released in ((model, True), (clone, False)):
        opt = NanoAdam(m.parameters(), lr=1e-2, density=0.2, gradient_release=released)
        for _ in range(5):
            m(torch.arange(30)).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert torch.equal(model[0].weight, clone[0].weight)


@pytest.mark.parametrize("dense", [False, True])
def test_channels_last_and_other_strides_give_the_trajectory_of_contiguous_weights(backend, device, dense):
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 6, 3, 3, device=device), torch.randn(6, 8, 6, 3, 3, device=device)
    results = []
    for arrange in (
        lambda w: w.clone(),
        lambda w: w.clone(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: torch.stack([w, w], dim=-1)[..., 0],
    ):
        p = torch.nn.Parameter(arrange(start))
        opt = NanoAdam([{"params": [p], "dense": dense}], lr=1e-2, density=0.2, mask_interval=2)
        for gradient in gradients:
            (p * arrange(gradient)).sum().backward()
            opt.step()
            opt.zero_grad()
        results.append(p.detach().clone(memory_format=torch.contiguous_format))
    assert torch.equal(results[0], results[1])
    for other in results[2:]:  # which kernels leave to the reference
        if backend == "reference":
            assert torch.equal(results[0], other)
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_options_and_schedulers_drive_them():
    model = network()
    first, second = model[0].weight, model[2].weight
    opt = NanoAdam(
        [{"params": [first], "lr": 1e-2, "density": 0.5}, {"params": [second], "lr": 0.0}], lr=1.0, density=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    assert [g["lr"] for g in opt.param_groups] == [1e-2, 0.0]
    before = second.detach().clone()
    train(model, opt, 1)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 5e-3
    assert torch.equal(second, before)
    assert int(opt.selected(first).sum()) == layout(first.shape, 0.5).selected
    opt.add_param_group({"params": [model[0].bias]})
    train(model, opt, 1)
    assert opt.state[model[0].bias]["step"] == 1


def test_a_tensor_lr_and_one_cycle_with_changing_betas_work():
    model, twin = network(), network()
    tensor_lr = NanoAdam(model.parameters(), lr=torch.tensor(1e-2), density=0.3)
    float_lr = NanoAdam(twin.parameters(), lr=1e-2, density=0.3)
    assert train(model, tensor_lr, 5) == train(twin, float_lr, 5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(float_lr, max_lr=1e-2, total_steps=20)
    for _ in range(10):
        train(twin, float_lr, 1)
        cycle.step()
    assert float_lr.param_groups[0]["betas"][0] != 0.9


def test_closures_return_the_loss_and_compute_gradients():
    model = network()
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2)
    x = torch.randn(8, 12)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_named_parameters_name_the_state():
    model = network()
    opt = NanoAdam(model.named_parameters(), density=0.1)
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(("density", "state_dtype"), [(0.01, torch.bfloat16), (0.1, torch.float32)])
@pytest.mark.parametrize("moments", ["carry", "reset"])
def test_state_takes_eight_bytes_a_selected_weight_and_six_if_moments_are_reset(density, state_dtype, moments):
    p = torch.nn.Parameter(torch.randn(64, 4096))
    opt = NanoAdam([p], density=density, state_dtype=state_dtype, mask_interval=2, moments=moments)
    kept, moment = layout(p.shape, density).selected, state_dtype.itemsize
    expected = kept * (2 + 2 * moment) + (2 * kept if moments == "carry" else 2) + 4
    for _ in range(4):
        assert opt.state_bytes() == expected  # from the start: memory does not grow in mid-run
        p.grad = torch.randn_like(p)
        opt.step()
        opt.zero_grad()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    results = []
    for seed in (0, 0, 1):
        model = network(torch.bfloat16)
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.3, seed=seed)
        for step in range(5):
            torch.manual_seed(step)
            model(torch.randn(4, 12, dtype=torch.bfloat16)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        results.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("updates", [16383, 32767, 65535, 70000, 3 * 65536 - 1])
def test_ages_beyond_sixteen_bits_saturate_instead_of_starting_over(updates):
    """A static mask outlives 65,536 updates: the bias correction must not come back."""
    p = torch.nn.Parameter(torch.randn(2, 50))
    opt = NanoAdam([p], lr=1e-3, density=0.1, mask_interval=10**6, state_dtype=torch.float32)
    slot = opt._slots[p]
    opt.selected(p)
    at = 0
    while at < updates:  # pass time; only the multiples of 16,384 matter, and those are real steps
        at = min(updates, at - at % 16384 + 16383)
        slot.steps = at
        slot.state["step"].fill_(at)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            opt.step()
            opt.zero_grad()
        at = slot.steps
    assert int(reference._age(slot).min()) >= min(at, 32768) - 16384


def test_moments_and_weights_are_rounded_with_different_bits():
    from nanoadam.ops import Adam
    from nanoadam.ops.rounding import seed_key

    p = torch.nn.Parameter(torch.randn(16, 256, dtype=torch.bfloat16))
    opt = NanoAdam([p], density=1.0)
    adam = Adam(1e-3, 0.9, 0.999, 1e-8, 0.0, False, True, seed_key(0))
    noise = [n & 0xFFFF for n in reference._noise(opt._slots[p], adam, torch.arange(p.numel()))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (noise[a] == noise[b]).double().mean() < 0.01


def test_the_state_follows_a_weight_that_has_moved():
    parameter = torch.nn.Parameter(torch.randn(8, 64))
    opt = NanoAdam([parameter], density=0.1)
    parameter.sum().backward()
    slot = opt._slots[parameter]
    slot.parameter = torch.nn.Parameter(parameter.to("meta"))  # the only other device that is everywhere
    [(device, [slot], _)] = by_device([slot])
    assert device.type == "meta"
    assert {name: value.device.type for name, value in slot.state.items()} == {
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "index", "entry_step"), "meta"),
        "step": "cpu",
    }
    assert slot.selection.index.device.type == "meta"
