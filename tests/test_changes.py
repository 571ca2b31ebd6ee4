"""What others do to an optimizer behind its back is followed or refused, never ignored."""

import copy
import subprocess
import sys
import warnings
from collections import defaultdict

import pytest
import torch

import nanoadam
from nanoadam import checks
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 2}


def weight(seed=0, shape=(8, 16)):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def advance(opt, parameters, steps=2):
    for _ in range(steps):
        sum(p.square().sum() for p in parameters).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("moved_state", [True, False])
def test_a_parameter_replaced_in_its_group_is_trained(released, moved_state):
    """As by 3D Gaussian splatting, and by accelerate for FSDP2."""
    p = weight()
    opt = NanoAdam([p], gradient_release=released, **OPTIONS)
    advance(opt, [p])
    q = torch.nn.Parameter(p.detach().clone())
    opt.param_groups[0]["params"][0] = q
    state = opt.state.pop(p)
    if moved_state:
        opt.state[q] = state
    twin_p = torch.nn.Parameter(p.detach().clone())
    twin = NanoAdam([twin_p], gradient_release=released, **OPTIONS)
    if moved_state:
        saved = opt.state_dict()
        twin.load_state_dict(copy.deepcopy(saved))
    else:
        for group in twin.param_groups:
            group["steps"] = 2
    advance(opt, [q], 3)
    advance(twin, [twin_p], 3)
    assert torch.equal(q, twin_p)
    assert p not in opt.state
    p.square().sum().backward()
    assert type(p.grad) is torch.Tensor, "what has left the optimizer is left alone"


def test_a_parameter_appended_to_its_group_is_trained():
    p, q = weight(), weight(1)
    opt = NanoAdam([p], **OPTIONS)
    advance(opt, [p])
    opt.param_groups[0]["params"].append(q)
    before = q.detach().clone()
    advance(opt, [p, q])
    assert (q != before).sum() > 30
    (q * q).sum().backward()
    assert type(q.grad) is SelectedGradient


def test_a_group_appended_by_hand_is_refused_and_one_removed_is_let_go():
    p, q = weight(), weight(1)
    opt = NanoAdam([{"params": [p]}, {"params": [q]}], **OPTIONS)
    opt.param_groups.append({"params": [weight(2)]})
    with pytest.raises(ValueError, match=r"'lr' is missing from group 2: add groups with optimizer.add_param_group"):
        opt.step()
    opt.param_groups.pop()
    opt.param_groups.pop(0)
    before = p.detach().clone()
    advance(opt, [p, q])
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "reset",
    [
        lambda opt: opt.state.clear(),
        lambda opt: setattr(opt, "state", defaultdict(dict)),
        lambda opt: [state.clear() for state in opt.state.values()],
    ],
)
def test_a_cleared_state_starts_afresh_as_in_torch(reset):
    p, q = weight(), weight()
    opt = NanoAdam([p], state_dtype=torch.float32, **OPTIONS)
    advance(opt, [p], 5)
    reset(opt)
    with torch.no_grad():
        q.copy_(p)
    fresh = NanoAdam([q], state_dtype=torch.float32, **OPTIONS)
    fresh.param_groups[0]["steps"] = opt.param_groups[0]["steps"]
    advance(opt, [p])
    advance(fresh, [q])
    assert torch.equal(p, q)
    assert opt.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("granularity", ["weight", "column"])
def test_a_cleared_state_starts_afresh_where_layers_compute_what_is_selected(granularity):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8))
    groups = nanoadam.param_groups(model, granularity=granularity, selected="1")
    opt = NanoAdam(groups, **OPTIONS)
    for _ in range(3):
        model(torch.arange(9)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        opt.state.clear()
    assert [int(state["step"]) for state in opt.state_dict()["state"].values()] == [0, 0, 0]


def test_a_state_that_lacks_an_entry_is_refused_by_its_name():
    p = weight()
    opt = NanoAdam([p], **OPTIONS)
    advance(opt, [p])
    del opt.state[p]["exp_avg"]
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*'exp_avg': None"):
        opt.step()


def test_moments_replaced_in_the_state_are_used():
    p = weight()
    opt = NanoAdam([p], state_dtype=torch.float32, **{**OPTIONS, "mask_interval": 100})
    advance(opt, [p])
    opt.state[p]["exp_avg"] = torch.full_like(opt.state[p]["exp_avg"], 5.0)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    opt.step()
    assert (before - p)[opt.selected(p)].min() > 0.01


@pytest.mark.parametrize(
    ("option", "value", "error", "words"),
    [
        ("dense", True, ValueError, "dense of group 0 was changed from False to True"),
        ("state_dtype", torch.float32, ValueError, "state_dtype of group 0 was changed"),
        ("mask_interval", 0, ValueError, "mask_interval must be .* got 0 for group 0"),
        ("density", 2.0, ValueError, r"density must be in \(0, 1\] .* got 2.0"),
        ("criterion", "small", ValueError, "criterion must be one of"),
        ("keep_zeros", 1, TypeError, "keep_zeros must be True or False"),
        ("seed", -1, ValueError, "seed must be a whole number"),
    ],
)
def test_an_option_changed_to_what_cannot_be_served_is_named(option, value, error, words):
    p = weight()
    opt = NanoAdam([p], **OPTIONS)
    advance(opt, [p])
    before = p.detach().clone()
    opt.param_groups[0][option] = value
    with pytest.raises(error, match=words):  # at the first gradient, which is selected for
        p.square().sum().backward()
    with pytest.raises(error, match=words):
        opt.step()
    assert torch.equal(p, before)


def test_a_criterion_changed_from_gradient_and_back_releases_again():
    p = weight()
    opt = NanoAdam([p], criterion="gradient", **OPTIONS)
    for criterion, kind in (("gradient", torch.Tensor), ("smallest", SelectedGradient), ("gradient", torch.Tensor)):
        opt.param_groups[0]["criterion"] = criterion
        opt.selected(p)
        p.square().sum().backward()
        assert type(p.grad) is kind
        opt.step()
        opt.zero_grad()


def test_moments_changed_from_reset_to_carry_in_mid_interval_are_saved_and_loaded():
    ends = []
    for interrupted in (True, False):
        p = weight()
        opt = NanoAdam([p], moments="reset", **{**OPTIONS, "mask_interval": 10})
        advance(opt, [p])
        opt.param_groups[0]["moments"] = "carry"
        advance(opt, [p])
        if interrupted:
            saved = copy.deepcopy(opt.state_dict())
            opt = NanoAdam([p], density=0.25)
            opt.load_state_dict(saved)
        advance(opt, [p], 20)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("dense", [True, False])
def test_a_state_saved_for_another_shape_of_the_same_size_is_refused(dense):
    p, q = weight(shape=(8, 16)), weight(shape=(16, 8))
    opt, other = (NanoAdam([{"params": [("w", x)], "dense": dense}], density=0.25) for x in (p, q))
    advance(opt, [p])
    with pytest.raises(ValueError, match=r"state of 'w' was saved for a parameter of shape \(8, 16\), but it has \(16"):
        other.load_state_dict(opt.state_dict())
    advance(other, [q])


def test_an_older_state_that_lacks_an_option_is_loaded_with_the_optimizers_own():
    p = weight()
    opt = NanoAdam([p], seed=7, **OPTIONS)
    advance(opt, [p])
    saved = opt.state_dict()
    counters = {name: saved["param_groups"][0][name] for name in checks.COUNTERS}
    for group in saved["param_groups"]:
        for option in (*checks.WATCHED, "lr", "betas", "eps", "weight_decay"):
            del group[option]
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["seed"], opt.param_groups[0]["density"]) == (7, 0.25)
    assert {name: opt.param_groups[0][name] for name in counters} == counters
    advance(opt, [p])


# Hooks and extra entries, as torch's own tests expect them


def test_load_hooks_get_the_whole_state_and_what_they_return_is_loaded():
    p, q = weight(), weight()
    opt, other = NanoAdam([p], **OPTIONS), NanoAdam([q], **OPTIONS)
    advance(opt, [p])
    seen = []

    def unpack(_, state):
        seen.append(len(state["inner"]["state"]))
        inner = copy.deepcopy(state["inner"])
        inner["state"][0]["exp_avg"].fill_(7.0)
        return inner

    def after(optimizer):
        seen.append(float(optimizer.state[q]["exp_avg"].float().mean()))
        optimizer.state[q]["exp_avg_sq"].zero_()

    other.register_load_state_dict_pre_hook(unpack)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict({"inner": opt.state_dict()})
    assert seen == [1, 7.0]
    assert not other.state[q]["exp_avg_sq"].any()


@pytest.mark.parametrize("entry", [1, {"step": 3}])
def test_entries_of_others_in_the_state_are_kept_saved_and_loaded(entry):
    p = weight()
    opt, other = NanoAdam([p], **OPTIONS), NanoAdam([weight()], **OPTIONS)
    opt.state["mine"] = entry
    advance(opt, [p])
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"]["mine"] == entry
    other.load_state_dict(saved)
    assert other.state["mine"] == entry
    assert len(other.state) == 2


# What would train nothing, or something else


def test_parameters_that_are_all_frozen_are_refused():
    p = weight()
    opt = NanoAdam([p], **OPTIONS)
    p.requires_grad_(False)
    with pytest.raises(ValueError, match="all 1 parameters of this optimizer are frozen"):
        opt.step()


def test_a_first_step_without_any_gradient_is_told():
    opt = NanoAdam([weight()], **OPTIONS)
    with pytest.warns(UserWarning, match="no gradient on any of the optimizer's 1 parameters"):
        opt.step()


@pytest.mark.filterwarnings("default::UserWarning")
def test_matrices_that_nobody_sorted_are_told_of_once(monkeypatch):
    monkeypatch.setattr(checks, "_warned", [])
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"all 2 matrices .* NanoAdam\(nanoadam.param_groups\(model\)\)") as told:
        NanoAdam(model.parameters())
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NanoAdam(model.parameters())
    monkeypatch.setattr(checks, "_warned", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NanoAdam(nanoadam.param_groups(model))
        NanoAdam([{"params": [model[0].weight]}, {"params": [model[1].weight], "dense": True}])
        NanoAdam([model[0].weight, model[0].bias])


def test_a_program_that_ends_with_an_optimizer_says_nothing():
    """Whoever holds it: a name, a scheduler, a module that goes late."""
    code = "import json, torch, nanoadam\n"
    for keep in ("o1 = o", "s = torch.optim.lr_scheduler.StepLR(o, 2)", "json.o = o"):
        code += "p = torch.nn.Parameter(torch.randn(8, 16)); o = nanoadam.NanoAdam([p])\n"
        code += f"{keep}\n(p * p).sum().backward(); o.step()\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""


# Seams for others


def test_a_selection_hook_sees_the_old_positions_before_each_refresh():
    p, bias = weight(), torch.nn.Parameter(torch.zeros(16))
    opt = NanoAdam([p, bias], density=nanoadam.linear(0.5, 0.1, total_steps=8, interval=3), lr=0.1, mask_interval=2)
    seen = []
    handle = opt.register_selection_pre_hook(lambda o, parameters: seen.append([o.positions(q) for q in parameters]))
    masks = []
    for step in range(7):
        assert opt.positions(bias) is None
        (p.square().sum() + bias.sum()).backward()
        if step in (2, 3, 4, 6):
            [[positions]] = seen
            assert torch.equal(positions, masks[-1])
        else:
            assert not seen
        seen.clear()
        opt.step()
        opt.zero_grad()
        masks.append(opt.positions(p))
        assert bool((masks[-1].diff() > 0).all())
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(seen[0][0], masks[-1])
    handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert len(seen) == 1
    with pytest.raises(ValueError, match="not in this optimizer"):
        opt.positions(weight())
