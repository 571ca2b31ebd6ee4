"""Zeroing released gradients, by whatever way and at whatever time, means what it always means."""

import copy

import pytest
import torch

from nanoadam.optimizer import NanoAdam
from twins import batch, bits, both, loss_of, network


@pytest.mark.parametrize(
    "zero", ["optimizer", "optimizer in place", "model", "model in place", "never", "before backward"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_zeroing_through_model_or_optimizer_or_not_at_all_means_what_it_always_means(zero, bias):
    results = []
    for released in (True, False):
        model = network(bias=bias)
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=100, gradient_release=released)
        for step in range(6):
            if zero == "before backward":
                model.zero_grad()
            for micro in range(2):
                loss_of(model, 10 * step + micro).backward()
            opt.step()
            if zero.startswith("optimizer"):
                opt.zero_grad(set_to_none="in place" not in zero)
            elif zero.startswith("model"):
                model.zero_grad(set_to_none="in place" not in zero)
        results.append(bits(model))
    assert torch.equal(*results)


def test_a_step_that_the_user_skips_loses_nothing():
    def run(model, opt):
        for step in range(8):
            loss_of(model, step).backward()
            if step % 3 == 2:
                opt.zero_grad()  # thrown away
            if step % 2:
                opt.step()
                opt.zero_grad()

    assert torch.equal(*both(run))


def test_zeroing_the_model_between_two_backwards_of_a_step_throws_the_first_away():
    def run(model, opt):
        for step in range(5):
            (loss_of(model, step) * float("nan")).backward()
            model.zero_grad()
            loss_of(model, 10 + step).backward()
            opt.step()
            opt.zero_grad()
        loss_of(model, 99).backward()
        model.zero_grad()
        before = bits(model)
        opt.step()
        assert torch.equal(before, bits(model))

    on, off = both(run)
    assert on.isfinite().all()
    assert torch.equal(on, off)


def test_zeroing_the_model_in_place_leaves_zero_gradients_that_count():
    def run(model, opt):
        for step in range(6):
            x, _ = batch(step)
            (model[:2](x).square().mean() if step % 2 else loss_of(model, step)).backward()
            opt.step()
            model.zero_grad(set_to_none=False)
        assert opt.state[model[4].weight]["step"] == 6

    assert torch.equal(*both(run))


class Fails(torch.autograd.Function):
    """The identity, whose backward can fail as if memory had run out."""

    on = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Fails.on:
            raise RuntimeError("out of memory")
        return gradient


@pytest.mark.parametrize("zero", ["model", "optimizer"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("release_bytes", [0, 10**7])
def test_the_half_gradient_of_a_backward_that_failed_is_zeroed_with_the_rest(zero, in_place, release_bytes):
    def run(model, opt):
        for step in range(8):
            x, y = batch(step)
            Fails.on = step in (1, 4)
            try:
                torch.nn.functional.cross_entropy(model[2:](Fails.apply(model[:2](x))), y).backward()
            except RuntimeError:
                (model if zero == "model" else opt).zero_grad(set_to_none=not in_place)
                continue
            finally:
                Fails.on = False
            opt.step()
            opt.zero_grad(set_to_none=not in_place)

    assert torch.equal(*both(run, release_bytes=release_bytes))


def test_zeroing_some_gradients_zeroes_those_alone():
    def run(model, opt):
        for step in range(6):
            loss_of(model, step).backward()
            (model[4] if step % 2 else model[0]).zero_grad()
            loss_of(model, 10 + step).backward()
            model[2].bias.grad = None
            if step == 4:
                model[2].weight.grad = None
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


def test_gradients_zeroed_in_place_let_the_mask_be_refreshed():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], lr=0.3, density=0.1, mask_interval=1)
    masks = []
    for _ in range(4):
        expected = opt.selected(p)
        p.sum().backward()
        assert torch.equal(p.grad.to_dense() != 0, expected)
        masks.append(expected)
        opt.step()
        opt.zero_grad(set_to_none=False)
    assert len({tuple(mask.view(-1).tolist()) for mask in masks}) > 1


def test_a_partly_zeroed_group_keeps_the_selection_of_what_was_not_zeroed():
    model = network(bias=False)
    opt = NanoAdam(model.parameters(), density=0.2, mask_interval=1)
    loss_of(model, 0).backward()
    masks = [opt.selected(p) for p in model.parameters()]
    model[4].zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    loss_of(model, 1).backward()
    same = [torch.equal(opt.selected(p), mask) for p, mask in zip(model.parameters(), masks, strict=True)]
    assert same == [True, True, False]


def test_entries_written_after_a_gradient_was_zeroed_in_place_count():
    ends = []
    for write in (
        lambda p, earlier: p.grad.copy_(torch.ones_like(p)),
        lambda p, earlier: p.grad.entries.fill_(1.0),
        lambda p, earlier: earlier.fill_(1.0),
        lambda p, earlier: None,
    ):
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=1)
        loss_of(model, 0).backward()
        entries = model[0].weight.grad.entries
        opt.step()
        opt.zero_grad(set_to_none=False)
        write(model[0].weight, entries)
        opt.step()
        ends.append(bits(model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3])


@pytest.mark.parametrize("replace", [torch.clone, lambda gradient: gradient * 1.0, copy.deepcopy])
def test_a_gradient_that_a_user_has_replaced_and_zeroed_in_place_lets_the_mask_be_refreshed(replace):
    def run(model, opt):
        for step in range(6):
            loss_of(model, step).backward()
            for p in model.parameters():
                p.grad = replace(p.grad)
            opt.step()
            opt.zero_grad(set_to_none=False)

    assert torch.equal(*both(run, mask_interval=1))
