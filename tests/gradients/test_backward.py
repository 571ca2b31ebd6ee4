"""Whatever backward does, released gradients have the bits of ordinary ones: checkpoints, hooks, errors, graphs."""

import warnings

import pytest
import torch

from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam
from twins import batch, bits, both, loss_of, network


def test_reentrant_checkpointing_releases_every_gradient():
    from torch.utils.checkpoint import checkpoint

    results = []
    for released in (True, False):
        model = network()
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, gradient_release=released, release_bytes=10**6)
        for step in range(4):
            x, y = batch(step)
            hidden = checkpoint(model[:4], x.requires_grad_(), use_reentrant=True)
            torch.nn.functional.cross_entropy(model[4](hidden), y).backward()
            if released:
                assert type(model[2].weight.grad) is SelectedGradient
            opt.step()
            opt.zero_grad()
        results.append(bits(model))
    assert torch.equal(*results)


def test_a_compiled_models_gradients_are_released():
    model = network()
    compiled = torch.compile(model, backend="eager")
    opt = NanoAdam(compiled.parameters(), lr=1e-2, density=0.2)
    x, y = batch(0)
    for _ in range(2):  # the second is compiled with a gradient in place
        torch.nn.functional.cross_entropy(compiled(x), y).backward()
        torch._dynamo.reset()
        assert type(model[0].weight.grad) is SelectedGradient
    opt.step()


@pytest.mark.parametrize("release_bytes", [0, 10**7])
def test_a_weight_used_in_several_reentrant_checkpoints_gets_all_its_gradients(release_bytes):
    from torch.utils.checkpoint import checkpoint

    def run(model, opt):
        for step in range(3):
            x, y = batch(step)
            hidden = torch.tanh(model[0](x))
            for _ in range(3):
                hidden = checkpoint(lambda h: torch.tanh(model[2](h)), hidden, use_reentrant=True)
            torch.nn.functional.cross_entropy(model[4](hidden), y).backward()
            opt.step()
            opt.zero_grad()

    on, off = both(run, release_bytes=release_bytes)
    torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-6)  # summed in another order


def test_an_exception_in_backward_loses_no_later_gradient():
    def run(model, opt):
        def fail(_):
            raise ArithmeticError

        hook = model[0].weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            loss_of(model, 0).backward()
        hook.remove()
        for step in range(1, 4):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run, release_bytes=10**7))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_computed_in_between_leave_p_grad_alone(bias, in_place):
    results = []
    for released in (True, False):
        model = network(bias=bias)
        opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=2, gradient_release=released)
        for step in range(5):
            loss_of(model, step).backward()
            torch.autograd.grad(loss_of(model, 7), list(model.parameters()))
            opt.step()
            torch.autograd.grad(loss_of(model, 8), list(model.parameters()))
            model.zero_grad(set_to_none=not in_place)
        results.append(bits(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_graph_of_gradients_is_accumulated_like_any_other(when):
    def run(model, opt):
        for step in range(4):
            for micro in range(2):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Using backward")
                    loss_of(model, 10 * step + micro).backward(create_graph=micro == (when == "later"))
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


def test_several_losses_and_closures_and_non_reentrant_checkpoints():
    from torch.utils.checkpoint import checkpoint

    def run(model, opt):
        for step in range(4):
            x, y = batch(step)

            def closure(x=x, y=y):
                opt.zero_grad()
                hidden = checkpoint(model[:4], x, use_reentrant=False)
                output = model[4](hidden)
                loss = torch.nn.functional.cross_entropy(output, y)
                loss.backward(retain_graph=True)
                output.square().mean().backward()
                return loss

            assert opt.step(closure) > 0

    assert torch.equal(*both(run))


def test_hooks_of_users_see_and_change_gradients():
    def run(model, opt):
        seen = []
        weight = model[2].weight

        def quarter(p):
            p.grad.div_(4)

        weight.register_hook(lambda gradient: gradient * 2)
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        weight.register_post_accumulate_grad_hook(quarter)
        for step in range(4):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
        assert len(seen) == 4
        assert all(norm > 0 for norm in seen)

    assert torch.equal(*both(run))
