"""Runs by columns: refreshes, schedules, saved states, pruned weights, groups and defaults."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import nanoadam
from column_networks import bits, inputs, network, optimizer_of, trained
from nanoadam.optimizer import NanoAdam


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "largest"}, {"criterion": "random"}, {"moments": "reset"}, {"transposed": True}]
)
def test_release_on_and_off_agree_over_refreshes_and_schedules(options):
    ends = []
    for released in (True, False):
        model = network()
        density = nanoadam.linear(0.5, 0.1, total_steps=40, interval=10)
        options = {**options, "density": density, "gradient_release": released, "state_dtype": torch.float32}
        options["eps"] = 1e-4  # or rounding of gradients near zero would turn into whole steps
        ends.append(trained(model, optimizer_of(model, **options)))
        if options.get("transposed"):  # the group takes the rows of its layers, which compute whole gradients then
            touched = (model[0].weight.detach() != network()[0].weight.detach()).any(1)
            assert 0 < touched.sum() < len(touched)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_an_exception_between_forward_and_backward_changes_nothing():
    ends = []
    for fails in (True, False):
        model = network()
        opt = optimizer_of(model)
        for step in range(4):
            if fails:
                with contextlib.suppress(ArithmeticError):
                    model(inputs(99 + step))
                    raise ArithmeticError
            model(inputs(step)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(bits(model))
    assert torch.equal(*ends)


def fail(_):
    raise ArithmeticError


@pytest.mark.parametrize("what", ["a backward that fails", "the head zeroed", "the head zeroed in place"])
def test_gradients_thrown_away_within_a_step_leave_other_layers_alone(what):
    ends = []
    for released in (True, False):
        model = network()
        opt = optimizer_of(model, gradient_release=released, state_dtype=torch.float32, eps=1e-4)
        for step in range(8):
            if what == "a backward that fails":
                handle = model[0].weight.register_hook(fail)
                with contextlib.suppress(ArithmeticError):
                    model(inputs(99 + step)).square().mean().backward()
                handle.remove()
                model.zero_grad()
            else:
                model(inputs(99 + step)).square().mean().backward()
                model[4].zero_grad(set_to_none="in place" not in what)
            model(inputs(step)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(bits(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_weights_loaded_after_a_forward_pass_are_the_ones_selected_from():
    model, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    opt, expected = optimizer_of(model), optimizer_of(other)
    model(inputs(0))
    model.load_state_dict(other.state_dict())
    model(inputs(1)).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(opt.selected(p), expected.selected(q))


@pytest.mark.parametrize("granularity", ["weight", "column"])
def test_a_layer_unfrozen_between_refreshes_is_trained(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    groups = nanoadam.param_groups(model, granularity=granularity, selected="2")
    opt = NanoAdam(groups, lr=1e-2, density=0.25)
    start = [p.detach().clone() for p in model.parameters()]
    model[:2].requires_grad_(False)
    for step in range(3):
        if step == 1:
            model.requires_grad_(True)
        model(torch.arange(9)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
        assert moved == [step > 0] * 3 + [True] * 2


def test_a_state_saved_between_forward_and_backward_can_be_loaded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    density = nanoadam.linear(0.5, 0.1, total_steps=4, interval=1)
    opt = NanoAdam(nanoadam.param_groups(model, selected="1"), lr=1e-2, density=density)
    for _ in range(3):
        loss = model(torch.arange(9)).square().sum()
        saved = copy.deepcopy(opt.state_dict())
        loss.backward()
        opt.step()
        opt.zero_grad()
        NanoAdam(nanoadam.param_groups(model, selected="1"), lr=1e-2, density=density).load_state_dict(saved)
        copy.deepcopy(opt)


@pytest.mark.parametrize("how", ["step", "refresh", "load"])
def test_a_refresh_between_forward_and_backward_is_refused(how):
    model = network()
    opt = optimizer_of(model, mask_interval=1)
    trained(model, opt, 2, 1)
    loss = model(inputs(0)).square().mean()
    state = copy.deepcopy(opt.state_dict())
    if how == "step":
        model(inputs(1)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        model(inputs(2))
    elif how == "load":
        opt.load_state_dict(state)
    else:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(torch.rand_like(p))
        opt.param_groups[0]["steps"] += 1
        opt.refresh()
    with pytest.raises(RuntimeError, match=r"refreshed between this layer's forward|modified by an inplace"):
        loss.backward()
    opt.zero_grad()
    trained(model, opt, 2)


def test_zeroing_between_forward_and_backward_is_the_usual_loop():
    ends = []
    for order in ("before", "between"):
        model = network()
        opt = optimizer_of(model, mask_interval=1)
        for step in range(6):
            if order == "before":
                opt.zero_grad()
            loss = model(inputs(step)).square().mean()
            if order == "between":
                opt.zero_grad()
            loss.backward()
            opt.step()
        ends.append(bits(model))
    assert torch.equal(*ends)


def test_weights_loaded_after_the_optimizer_was_made_are_the_ones_selected_from():
    model = network()
    opt = optimizer_of(model)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
    expected = opt.selected(model[2].weight)
    before = model[2].weight.detach().clone()
    trained(model, opt, 1)
    assert torch.equal(opt.columns(model[2].weight), expected.all(0).nonzero().view(-1))
    assert not (model[2].weight != before)[~expected].any()


def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped():
    options = {"density": nanoadam.linear(0.5, 0.1, total_steps=12, interval=4)}
    whole = network()
    expected = trained(whole, optimizer_of(whole, **options), 12)
    model = network()
    opt = optimizer_of(model, **options)
    trained(model, opt, 7)
    again = network()
    again.load_state_dict(model.state_dict())
    other = optimizer_of(again, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(7, 12):
        for micro in range(2):
            again(inputs(10 * step + micro)).float().square().mean().backward()
        torch.nn.utils.clip_grad_value_(again.parameters(), 1.0)
        other.step()
        other.zero_grad()
    assert torch.equal(bits(again), expected)


def test_pruned_weights_stay_pruned():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[p.abs() < p.abs().median()] = 0
                p[:, :3] = 0
    zeros = [p == 0 for p in model.parameters()]
    start = bits(model)
    end = trained(model, optimizer_of(model, keep_zeros=True, density=0.9, weight_decay=0.1), 6)
    assert not torch.equal(start, end)
    for p, zero in zip(model.parameters(), zeros, strict=True):
        assert p.dim() == 1 or torch.equal(p[zero], torch.zeros_like(p[zero]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_never_selected_keep_their_bits(dtype):
    model = network(dtype)
    opt = optimizer_of(model, weight_decay=0.5)
    before = {p: p.detach().clone() for p in model.parameters() if p.dim() == 2}
    touched = {p: torch.zeros_like(p, dtype=torch.bool) for p in before}

    def look(model, opt, step):
        for p, seen in touched.items():
            seen |= opt.selected(p)
            assert opt.columns(p).tolist() == opt.selected(p).all(0).nonzero().view(-1).tolist()

    trained(model, opt, 20, change=look, dtype=dtype)
    for p, seen in touched.items():
        assert torch.equal(p[~seen], before[p][~seen])
        assert not torch.equal(p[seen], before[p][seen])


def test_the_first_step_of_a_column_that_enters_has_length_lr():
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False)
    opt = optimizer_of(layer, lr=1e-3, density=0.2, mask_interval=10, state_dtype=torch.float32, criterion="smallest")
    before = None
    for step in range(31):
        if step and step % 10 == 0:
            with torch.no_grad():
                layer.weight[:, before[::2]] = 5.0  # make room
        weights = layer.weight.detach().clone()
        layer(inputs(step, shape=(8, 40))).square().mean().backward()
        opt.step()
        opt.zero_grad()
        now = opt.columns(layer.weight)
        if before is not None and step % 10 == 0:
            new = [c for c in now.tolist() if c not in before.tolist()]
            assert new
            torch.testing.assert_close(
                (layer.weight - weights).abs()[:, new], torch.full((30, len(new)), 1e-3), rtol=0.02, atol=0
            )
        before = now


def test_groups_by_column_hold_linear_layers_and_nothing_else():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Conv1d(5, 3, 1), nn.Linear(8, 2))
    groups = nanoadam.param_groups(model, granularity="column")
    assert {g["role"]: g["param_names"] for g in groups} == {
        "weights, by column": ["1.weight"],
        "weights": ["0.weight", "2.weight"],
        "head": ["3.weight"],
        "norms and biases": ["1.bias", "2.bias", "3.bias"],
    }
    assert [g.get("granularity") for g in groups] == ["column", None, None, None]
    selected = nanoadam.param_groups(model, granularity="column", selected="3")
    assert "3.weight" in selected[0]["param_names"]
    with pytest.raises(ValueError, match="granularity must be 'weight' or 'column', got 'row'"):
        nanoadam.param_groups(model, granularity="row")


def test_by_default_the_largest_columns_and_the_smallest_weights_are_selected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8))
    opt = NanoAdam([{"params": model.parameters()}], density=0.25, granularity="column", lr=1e-3)
    norms = model[1].weight.detach().square().sum(0)
    bare = NanoAdam([nn.Parameter(torch.randn(3, 8, 8))], density=0.25, granularity="column", lr=1e-3)
    for optimizer in (opt, bare):
        optimizer.refresh()
    assert set(opt.columns(model[1].weight).tolist()) == set(norms.topk(4).indices.tolist())
    (weight,) = bare.param_groups[0]["params"]
    assert weight.detach()[bare.selected(weight)].abs().max() < weight.detach()[~bare.selected(weight)].abs().max()
    assert opt.param_groups[0]["criterion"] is None  # saved as what it was
    saved = opt.state_dict()
    opt.load_state_dict(saved)
