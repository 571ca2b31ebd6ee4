"""Gradient release is exact: whatever is done with gradients, the bits are those of ordinary ones."""

import copy
import gc
import itertools
import math
import warnings
import weakref

import pytest
import torch

from nanoadam import ops
from nanoadam.chunks import layout
from nanoadam.gradients import SelectedGradient, release
from nanoadam.optimizer import NanoAdam


def network(seed=0, dtype=torch.float32, bias=True):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 40, bias=bias),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 40, bias=bias),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 4, bias=bias),
    ).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator).to(dtype), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model, step):
    x, y = batch(step, next(model.parameters()).dtype)
    return torch.nn.functional.cross_entropy(model(x).float(), y)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def plain(gradient):
    return gradient.to_dense() if type(gradient) is SelectedGradient else gradient


def both(run, **options):
    """The weights after `run(model, opt)` with release on and off."""
    results = []
    for released in (True, False):
        model = network()
        opt = NanoAdam(
            model.parameters(),
            **{"lr": 1e-2, "density": 0.2, "mask_interval": 3, "gradient_release": released, **options},
        )
        start = bits(model)
        run(model, opt)
        assert not torch.equal(bits(model), start)
        results.append(bits(model))
    return results


def cut_down(model, opt):
    """Dense gradients as released ones read: what is not applied counts for no norm."""
    for p in model.parameters():
        if p.grad is not None and type(p.grad) is torch.Tensor:
            p.grad.masked_fill_(~opt.selected(p), 0)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("release_bytes", [0, 1000, 10**9])
def test_release_on_and_off_give_the_same_bits(accumulate, release_bytes):
    def run(model, opt):
        for step in range(20):
            for micro in range(accumulate):
                loss_of(model, 10 * step + micro).backward()
            opt.step()
            opt.zero_grad()

    on, off = both(run, release_bytes=release_bytes)
    assert torch.equal(on, off)


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


def test_dense_gradients_are_gone_after_backward_and_few_at_any_time():
    """A chain of ten equal layers: count the dense gradients alive whenever one is made."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(10)])
    weights = [layer.weight for layer in model]
    opt = NanoAdam(model.parameters(), density=0.1)
    alive, most = [], []

    def note(gradient):
        alive.append(weakref.ref(gradient))
        most.append(sum(ref() is not None for ref in alive))

    for weight in weights:
        weight.register_hook(note)
    for _ in range(2):
        model(torch.randn(4, 64)).sum().backward()
        assert all(type(weight.grad) is SelectedGradient for weight in weights)
    assert len(most) == 20
    assert max(most) <= 3
    entries = sum(4 * layout(weight.shape, 0.1).selected for weight in weights)
    assert opt.gradient_bytes() == entries + sum(layer.bias.grad.nbytes for layer in model)
    opt.step()
    opt.zero_grad()
    assert opt.gradient_bytes() == 0


def test_entries_are_float32_sums_of_bf16_gradients():
    model = network(dtype=torch.bfloat16)
    opt = NanoAdam(model.parameters(), density=0.2)
    weight = model[2].weight
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.float()))
    mask = opt.selected(weight)
    for step in range(8):
        loss_of(model, step).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.entries.dtype == torch.float32
    torch.testing.assert_close(weight.grad.entries, torch.stack(seen).sum(0)[mask], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_entries_have_the_dtype_asked_for_and_one_backward_loses_nothing_in_the_gradients_own(grad_dtype):
    model = network(dtype=torch.bfloat16)
    opt = NanoAdam(model.parameters(), density=0.2, grad_dtype=grad_dtype)
    off = NanoAdam((twin := copy.deepcopy(model)).parameters(), density=0.2, gradient_release=False)
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        assert model[0].weight.grad.entries.dtype == grad_dtype
        for o in (opt, off):
            o.step()
            o.zero_grad()
    assert torch.equal(bits(model), bits(twin))


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


def test_a_parameter_without_a_gradient_is_left_alone_and_its_moments_do_not_decay():
    def run(model, opt):
        for step in range(9):
            x, _ = batch(step)
            (model[:2](x).square().mean() if step % 2 else loss_of(model, step)).backward()
            opt.step()
            opt.zero_grad()
        assert opt.state[model[0].weight]["step"] == 9
        assert opt.state[model[4].weight]["step"] == 5

    assert torch.equal(*both(run))


def test_two_optimizers_on_one_model_each_with_its_own_parameters_and_with_shared_ones():
    for shared in (False, True):
        results = []
        for released in (True, False):
            model = network(bias=False)
            options = {"density": 0.2, "gradient_release": released}
            first = NanoAdam(model.parameters() if shared else model[0].parameters(), lr=1e-2, **options)
            second = NanoAdam(model[2:].parameters(), lr=1e-3, criterion="largest", **options)
            for step in range(5):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*in 2 NanoAdam optimizers")
                    loss_of(model, step).backward()
                first.step()
                second.step()
                model.zero_grad()
            results.append(bits(model))
        assert torch.equal(*results)


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


def test_a_gradient_set_by_hand_is_used():
    p, q = (torch.nn.Parameter(torch.ones(4, 50)) for _ in range(2))
    on, off = NanoAdam([p], density=0.1, lr=1e-2), NanoAdam([q], density=0.1, lr=1e-2, gradient_release=False)
    for parameter, opt in ((p, on), (q, off)):
        for scale in (1.0, -3.0, 2.0):
            parameter.grad = torch.full_like(parameter, scale)
            opt.step()
            opt.zero_grad()
    assert torch.equal(p, q)


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


def test_freezing_and_unfreezing_in_mid_run_is_as_with_ordinary_gradients():
    def run(model, opt):
        for step in range(12):
            model[0].weight.requires_grad_(step % 2 == 0)
            model[2].weight.requires_grad_(step % 3 != 0)
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


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


def test_a_step_that_was_refused_can_be_repeated_without_counting_gradients_twice():
    results = []
    for fails in (True, False):
        torch.manual_seed(0)
        weight, table = torch.nn.Parameter(torch.randn(4, 50)), torch.nn.Embedding(5, 3, sparse=True)
        groups = [{"params": [weight]}, {"params": [table.weight], "dense": True}]
        opt = NanoAdam(groups, density=0.2, gradient_release=False, eps=1.0)
        weight.grad = torch.ones_like(weight)
        if fails:
            table(torch.arange(2)).sum().backward()
            with pytest.raises(TypeError, match="sparse"):
                opt.step()
            table.weight.grad = None
        opt.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


def test_switching_release_off_makes_gradients_dense_and_on_again_goes_on():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    (3 * p).sum().backward()
    opt.release(False)
    assert torch.equal(p.grad, 3.0 * opt.selected(p))
    opt.release()
    p.sum().backward()
    assert torch.equal(p.grad.to_dense(), 4.0 * opt.selected(p))


def test_many_optimizers_on_one_model_leave_nothing_behind():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(10):
            opt = NanoAdam(model.parameters(), density=0.2)
            scheduler = torch.optim.lr_scheduler.StepLR(opt, 5)  # holds its optimizer in a circle
            loss_of(model, step).backward()
            assert type(model[0].weight.grad) is SelectedGradient
            opt.step()
            scheduler.step()
            opt.zero_grad()
    del opt, scheduler
    gc.collect()
    last = NanoAdam(model.parameters(), density=0.2)
    for p in model.parameters():
        assert len(p._backward_hooks or ()) == 0
        assert p.dim() == 1 or len(release._Hook.of(p).alive()) == 1
    assert last.gradient_bytes() == 0


def test_two_optimizers_that_select_from_one_tensor_are_told_that_its_gradient_stays_dense():
    model = network(bias=False)
    first = NanoAdam(model.parameters(), density=0.2)
    loss_of(model, 0).backward()
    second = NanoAdam(model[2].parameters(), density=0.1, criterion="largest")
    with pytest.warns(UserWarning, match=r"\(40, 40\) is in 2 NanoAdam optimizers"):
        loss_of(model, 0).backward()
    assert type(model[0].weight.grad) is SelectedGradient
    assert type(model[2].weight.grad) is torch.Tensor
    del second
    gc.collect()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert type(model[2].weight.grad) is SelectedGradient
    first.step()


# What went wrong where held gradients were not p.grad.


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


def test_an_interrupted_step_can_be_repeated_and_counts_once(monkeypatch):
    from nanoadam.ops import reference

    results = []
    for fails in (True, False):
        for released in (True, False):
            torch.manual_seed(0)
            a, b = (torch.nn.Parameter(torch.randn(8, 16)) for _ in range(2))
            groups = [{"params": [a], "lr": 0.0}, {"params": [b]}]
            opt = NanoAdam(groups, lr=0.1, density=0.5, gradient_release=released, state_dtype=torch.float32)
            (a.square().sum() + b.square().sum()).backward()
            if fails:
                update, calls = reference.update, []

                def interrupted(*args, update=update, calls=calls):
                    calls.append(1)
                    if len(calls) == 2:
                        raise KeyboardInterrupt
                    update(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(reference, "update", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        opt.step()
            opt.step()
            assert opt.state[b]["step"] == 1
            results.append(b.detach().clone())
    assert all(torch.equal(results[0], other) for other in results)


def test_a_step_looks_at_each_gradient_a_few_times_however_many_there_are(monkeypatch):
    looked = []
    monkeypatch.setattr(
        ops.Slot, "gradient", property(lambda slot: looked.append(slot) or slot.parameter.grad, ops.Slot.gradient.fset)
    )

    def looks(layers):
        model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(layers)))
        opt = NanoAdam([{"params": model.parameters()}], lr=1e-3, density=0.2, mask_interval=100)
        for _ in range(3):
            looked.clear()
            model(torch.randn(2, 6)).sum().backward()
            opt.step()
            opt.zero_grad()
        return len(looked)

    assert looks(40) <= 5 * looks(10)
