"""Released gradients are clipped, scaled and read as ordinary ones are."""

import math

import pytest
import torch

from nanoadam.optimizer import NanoAdam
from twins import batch, bits, both, cut_down, loss_of, network, plain

CLIPPINGS = {
    "norm": lambda ps, x: torch.nn.utils.clip_grad_norm_(ps, x),
    "norm without foreach": lambda ps, x: torch.nn.utils.clip_grad_norm_(ps, x, foreach=False),
    "norm with foreach": lambda ps, x: torch.nn.utils.clip_grad_norm_(ps, x, foreach=True),
    "norm of order 1": lambda ps, x: torch.nn.utils.clip_grad_norm_(ps, x, norm_type=1),
    "norm of order inf": lambda ps, x: torch.nn.utils.clip_grad_norm_(ps, x, norm_type=math.inf),
    "values": lambda ps, x: torch.nn.utils.clip_grad_value_(ps, x),
    "values without foreach": lambda ps, x: torch.nn.utils.clip_grad_value_(ps, x, foreach=False),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("how", CLIPPINGS)
def test_clipping_is_torchs_own_and_by_what_is_applied(how, limit, bias):
    norms, results = [], []
    for released in (True, False):
        model = network(bias=bias)
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=3, gradient_release=released)
        for step in range(8):
            for micro in range(2):
                loss_of(model, 10 * step + micro).backward()
            cut_down(model, opt)
            parameters = list(model.parameters())
            by_hand = torch.cat([plain(p.grad).view(-1) for p in parameters]).double().norm()
            norm = CLIPPINGS[how](parameters, limit)
            if how.startswith("norm w") or how == "norm":
                torch.testing.assert_close(norm.double(), by_hand, rtol=1e-6, atol=0)
            norms.append(norm)
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    if norms[0] is not None:
        torch.testing.assert_close(torch.stack(norms[:8]), torch.stack(norms[8:]), rtol=1e-4, atol=0)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_value_clipped_gradient_is_clipped_to_the_bit():
    def run(model, opt):
        for step in range(5):
            loss_of(model, step).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


def test_it_can_be_scaled_replaced_and_read_by_anybody():
    def run(model, opt):
        average = {p: torch.zeros_like(p) for p in model.parameters()}
        for step in range(6):
            loss_of(model, step).backward()
            for p, mean in average.items():
                mean.lerp_(plain(p.grad) * opt.selected(p), 0.5)
                mean.add_(p.grad * opt.selected(p), alpha=0.1)
                p.grad.mul_(0.5)
                p.grad *= 3
                p.grad = p.grad / 2
                p.grad = p.grad + 0.1 * p.grad
            if step == 3:
                for p in model.parameters():
                    p.grad = plain(p.grad).clone()
            opt.step()
            opt.zero_grad()
        run.averages.append(torch.cat([mean.view(-1) for mean in average.values()]))

    run.averages = []
    assert torch.equal(*both(run))
    assert torch.equal(*run.averages)


@pytest.mark.parametrize("explicit_unscale", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_grad_scaler_skips_lowers_its_scale_and_goes_on_exactly(explicit_unscale, clipped, bias):
    results = []
    for released in (True, False):
        model = network(bias=bias)
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=3, gradient_release=released)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        scales = []
        for step in range(12):
            loss = loss_of(model, step)
            if step in (0, 5):  # an infinity in one selected tensor alone
                loss = loss + (model[2].weight * float("inf")).sum()
            before = bits(model)
            scaler.scale(loss).backward()
            if explicit_unscale:
                scaler.unscale_(opt)
                cut_down(model, opt)
                if clipped:
                    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            scales.append(scaler.get_scale())
            assert torch.equal(before, bits(model)) == (step in (0, 5))
        results.append((bits(model), scales))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1][0] == 2.0**9


def test_accelerates_wrapper_around_step_still_lets_the_scaler_through():
    """accelerate replaces opt.step by a function of (*args, **kwargs) to see whether it was called."""
    model = network(bias=False)
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2)
    original, calls = opt.step, []

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(2):
        infinity = (model[2].weight * float("inf")).sum() if step == 0 else 0.0
        scaler.scale(loss_of(model, step) + infinity).backward()
        opt.step = patched
        scaler.step(opt)
        opt.step = original
        scaler.update()
        opt.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert len(calls) == 2


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_loss_scaling_does_not_depend_on_the_default_dtype(default):
    results = []
    for dtype in (torch.float32, default):
        model = network()
        torch.set_default_dtype(dtype)
        try:
            opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            for step in range(3):
                x, y = batch(step)
                scaler.scale(torch.nn.functional.cross_entropy(model(x.float()), y)).backward()
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(bits(model))
    if default == torch.float64:  # the batches above are drawn in the default dtype
        return
    assert all(r.isfinite().all() for r in results)


@pytest.mark.parametrize("released", [True, False])
def test_float16_models_train_with_a_grad_scaler(released):
    model = network(dtype=torch.float16)
    opt = NanoAdam(model.parameters(), lr=1e-3, density=0.2, gradient_release=released)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        before = bits(model)
        infinity = (model[2].weight * float("inf")).sum() if step == 1 else 0.0
        scaler.scale(loss_of(model, step) + infinity).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert torch.equal(before, bits(model)) == (step == 1)
    assert scaler.get_scale() == 2.0**7
