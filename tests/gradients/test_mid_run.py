"""What changes in mid run: release, masks, frozen tensors, states, models and optimizers that come and go."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam
from twins import bits, both, loss_of, network


@pytest.mark.parametrize("first", [True, False])
def test_release_can_be_switched_in_mid_run_and_in_mid_window(first):
    results = []
    for switch in (True, False):
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=3, gradient_release=first)
        now = itertools.cycle([not first, first])
        for step in range(12):
            for micro in range(3):
                loss_of(model, 10 * step + micro).backward()
                if switch and (step + micro) % 4 == 1:
                    opt.release(next(now))
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    assert torch.equal(*results)


def test_a_refresh_does_not_happen_within_an_accumulation_window():
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2, mask_interval=1)
    loss_of(model, 0).backward()
    mask = opt.selected(model[2].weight)
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight))
    loss_of(model, 1).backward()
    assert torch.equal(opt.selected(model[2].weight), mask)
    before = model[2].weight.detach().clone()
    opt.step()
    assert torch.equal(model[2].weight != before, mask)
    assert not torch.equal(opt.selected(model[2].weight), mask)


def test_a_deleted_optimizer_leaves_gradients_alone():
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2)
    loss_of(model, 0).backward()
    opt.step()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    model.zero_grad()
    loss_of(model, 0).backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())


@pytest.mark.parametrize("release_bytes", [0, 10**7])
def test_gradients_outlive_their_optimizer(release_bytes):
    model = network(bias=False)
    opt = NanoAdam(model.parameters(), density=0.2, release_bytes=release_bytes)
    mask = opt.selected(model[0].weight)
    loss_of(model, 0).backward()
    before = model[0].weight.grad.to_dense()
    del opt
    gc.collect()
    loss_of(model, 0).backward()
    torch.testing.assert_close(model[0].weight.grad.to_dense(), 2 * before)
    assert not model[0].weight.grad.to_dense()[~mask].any()


def test_a_deep_copy_of_model_and_optimizer_goes_on_alike_and_apart():
    model = network()
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2)
    loss_of(model, 0).backward()
    opt.step()
    opt.zero_grad()
    twin_model, twin = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (twin_model, twin)):
        for step in range(5):
            loss_of(m, step).backward()
            assert type(m[0].weight.grad) is SelectedGradient
            o.step()
            o.zero_grad()
    assert torch.equal(bits(model), bits(twin_model))
    assert twin.state[twin_model[0].weight]["index"] is not opt.state[model[0].weight]["index"]


def test_freezing_and_unfreezing_in_mid_run_is_as_with_ordinary_gradients():
    def run(model, opt):
        for step in range(12):
            model[0].weight.requires_grad_(step % 2 == 0)
            model[2].weight.requires_grad_(step % 3 != 0)
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


def test_weights_loaded_after_a_warm_up_backward_are_the_ones_selected_from():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    (p * p).sum().backward()
    opt.zero_grad()
    with torch.no_grad():
        p.copy_(torch.randn(4, 100))
    expected, before = opt.selected(p), p.detach().clone()
    (p * p).sum().backward()
    opt.step()
    assert torch.equal(p != before, expected)


def test_a_criterion_changed_to_gradient_keeps_the_dense_gradients():
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2, mask_interval=1)
    opt.param_groups[0]["criterion"] = "gradient"
    loss_of(model, 0).backward()
    assert model[2].weight.grad is not None
    largest = model[2].weight.grad.abs().view(-1).topk(10).indices
    opt.step()
    assert opt.selected(model[2].weight).view(-1)[largest].all()


def test_switching_release_off_makes_gradients_dense_and_on_again_goes_on():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    (3 * p).sum().backward()
    opt.release(False)
    assert torch.equal(p.grad, 3.0 * opt.selected(p))
    opt.release()
    p.sum().backward()
    assert torch.equal(p.grad.to_dense(), 4.0 * opt.selected(p))


@pytest.mark.parametrize("shared", [True, False])
def test_a_tensor_unfrozen_in_mid_run_is_trained_from_its_first_gradient_on(shared):
    """`shared`: with a tensor in its group that is trained all along."""

    def run(model, opt):
        if not shared:
            model[0].requires_grad_(False)
            model[4].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        for step in range(8):
            if step == 3:
                model[2].weight.requires_grad_(True)
                assert opt.selected(model[2].weight).any()
            before = model[2].weight.detach().clone()
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
            assert (model[2].weight != before).sum() == (320 if step >= 3 else 0)

    assert torch.equal(*both(run, mask_interval=100))


def test_a_gradient_kept_over_a_refresh_keeps_what_it_has_for_weights_that_stay():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], lr=0.3, density=0.1, mask_interval=2)
    kept, gone = [], 0
    for step in range(6):  # never zeroed
        p.sum().backward()
        before = p.grad.to_dense()
        kept.append((p.grad.clone(), before))
        opt.step()
        if step % 2 == 0:  # it is step() that refreshes here
            assert torch.equal(p.grad.to_dense(), before * (p.grad.to_dense() != 0))
            gone += int((before != 0).sum() - p.grad.to_dense().count_nonzero())
        else:
            assert torch.equal(p.grad.to_dense(), before)
    assert gone > 0
    for gradient, before in kept:
        assert torch.equal(gradient.to_dense(), before)


def test_a_state_loaded_while_gradients_are_there_leaves_them_there():
    results = []
    for load in (True, False):
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=3)
        for step in range(6):
            loss_of(model, step).backward()
            if load:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            assert model[0].weight.grad is not None
            loss_of(model, step + 10).backward()
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    assert torch.equal(*results)


def test_a_model_that_is_converted_while_it_has_gradients_keeps_them():
    for swap in (False, True):
        model = network()
        opt = NanoAdam(model.parameters(), density=0.2)
        loss_of(model, 0).backward()
        before = model[0].weight.grad.to_dense()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.to(torch.bfloat16)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert model[0].weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(model[0].weight.grad.to_dense().float(), before, rtol=0.01, atol=1e-6)
        opt.step()
        opt.zero_grad()
        for step in (1, 2):  # swapping takes hooks away; step() finds out
            loss_of(model, step).backward()
            assert type(model[0].weight.grad) is (SelectedGradient if step == 2 or not swap else torch.Tensor)
            opt.step()
            opt.zero_grad()
