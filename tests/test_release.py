"""Gradient release is exact: whatever is done with gradients, the bits are those of ordinary ones."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch

from nanoadam.chunks import layout
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
        assert all(weight.grad is None for weight in weights)
    assert len(most) == 20
    assert max(most) <= 3
    assert opt.gradient_bytes() == sum(4 * layout(weight.shape, 0.1).selected for weight in weights)
    opt.step()
    opt.zero_grad()
    assert opt.gradient_bytes() == 0


def test_held_gradients_are_float32_sums_of_bf16_ones():
    model = network(dtype=torch.bfloat16)
    opt = NanoAdam(model.parameters(), density=0.2)
    weight = model[2].weight
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.float()))
    mask = opt.selected(weight)
    for step in range(8):
        loss_of(model, step).backward()
    held = next(h for h in opt.held() if h.numel() == layout(weight.shape, 0.2).selected)
    assert held.dtype == torch.float32
    assert torch.equal(held, torch.stack(seen).sum(0)[mask]) or torch.allclose(
        held, torch.stack(seen).sum(0)[mask], rtol=1e-6
    )


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5, 1e3])
def test_clipping_is_by_the_norm_of_what_is_applied(max_grad_norm):
    """Clipped by hand over the selected entries and the dense tensors, then applied without clipping."""

    def clipped(model, opt):
        for step in range(10):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()

    on, off = both(clipped, max_grad_norm=max_grad_norm)
    assert torch.equal(on, off)

    model = network()
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2, mask_interval=3, gradient_release=False)
    for step in range(10):
        masks = [opt.selected(p) for p in model.parameters()]
        loss_of(model, step).backward()
        for p, mask in zip(model.parameters(), masks, strict=True):
            p.grad.masked_fill_(~mask, 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(bits(model), on, rtol=1e-4, atol=1e-6)


def test_torchs_own_clipping_works_with_release_off():
    def run(model, opt):
        opt.release(False)
        for step in range(5):
            loss_of(model, step).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0
            opt.step()
            opt.zero_grad()

    assert torch.equal(*both(run))


@pytest.mark.parametrize("explicit_unscale", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_grad_scaler_skips_lowers_its_scale_and_goes_on_exactly(explicit_unscale, bias):
    results = []
    for released in (True, False):
        model = network(bias=bias)
        opt = NanoAdam(
            model.parameters(), lr=1e-2, density=0.2, mask_interval=3, gradient_release=released, max_grad_norm=1.0
        )
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


def test_a_scaler_that_does_not_pass_itself_is_served_or_told_why_not():
    model = network()
    opt = NanoAdam(model.parameters(), lr=1e-2, density=0.2)
    before = bits(model)
    (loss_of(model, 0) * 1024).backward()
    opt.grad_scale, opt.found_inf = None, torch.zeros(())
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        opt.step()
    assert torch.equal(before, bits(model))
    opt.grad_scale = torch.tensor(1024.0)
    opt.step()
    plain = network()
    other = NanoAdam(plain.parameters(), lr=1e-2, density=0.2)
    loss_of(plain, 0).backward()
    other.step()
    assert torch.equal(bits(model), bits(plain))


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
                loss_of(model, step).backward()
                first.step()
                second.step()
                model.zero_grad()
                first.zero_grad()
                second.zero_grad()
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
                assert model[2].weight.grad is None
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
    assert all(p.grad is not None for p in model.parameters())


def test_a_deleted_optimizer_leaves_no_trace_on_parameters_that_have_only_released_gradients():
    model = network(bias=False)
    opt = NanoAdam(model.parameters(), density=0.2)
    loss_of(model, 0).backward()
    opt.step()
    del opt
    gc.collect()
    assert all(p.grad is None for p in model.parameters())


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
            assert m[0].weight.grad is None
            o.step()
            o.zero_grad()
    assert torch.equal(bits(model), bits(twin_model))
    assert twin.state[twin_model[0].weight]["index"] is not opt.state[model[0].weight]["index"]


def test_a_compiled_models_gradients_are_released():
    model = network()
    compiled = torch.compile(model, backend="eager")
    opt = NanoAdam(compiled.parameters(), lr=1e-2, density=0.2)
    x, y = batch(0)
    torch.nn.functional.cross_entropy(compiled(x), y).backward()
    assert model[0].weight.grad is None
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


def test_clipping_dense_gradients_in_place_before_a_step_is_not_taken_for_zeroing():
    def run(model, opt):
        for step in range(5):
            for micro in range(2):
                loss_of(model, 10 * step + micro).backward()
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.dim() == 1], 0.01)
            opt.step()
            opt.zero_grad()

    with pytest.warns(UserWarning, match="3 selected tensors"):
        on, off = both(run)
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


def test_switching_release_off_adds_to_gradients_that_are_already_there():
    p = torch.nn.Parameter(torch.randn(4, 100))
    opt = NanoAdam([p], density=0.1)
    (3 * p).sum().backward()
    p.grad = torch.ones_like(p)
    opt.release(False)
    assert torch.equal(p.grad, torch.where(opt.selected(p), 4.0, 1.0))


def test_many_optimizers_on_one_model_leave_nothing_behind():
    from nanoadam import release

    model = network()
    for step in range(10):
        opt = NanoAdam(model.parameters(), density=0.2)
        loss_of(model, step).backward()
        opt.step()
        opt.zero_grad()
    del opt
    gc.collect()
    last = NanoAdam(model.parameters(), density=0.2)
    for p in model.parameters():
        assert len(p._backward_hooks or ()) == 0
        assert p not in release._hooks or len(release._hooks[p].releases) == 1
    assert last.gradient_bytes() == 0


def clip(model, opt):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


ALTERED = {
    "clipping": clip,
    "clipping without foreach": lambda m, _: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3, foreach=False),
    "clipping that changes nothing": lambda m, _: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e6),
    "clipping of values": lambda m, _: torch.nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "scaling": lambda m, _: [p.grad.mul_(0.5) for p in m.parameters() if p.grad is not None],
    "zeroing in place": lambda m, _: m.zero_grad(set_to_none=False),
    "replacing": lambda m, _: [setattr(p, "grad", p.grad / 2) for p in m.parameters() if p.grad is not None],
}


def steps_of(model, opt, alter=lambda model, opt: None, steps=3):
    for step in range(steps):
        for micro in range(2):
            loss_of(model, 10 * step + micro).backward()
        alter(model, opt)
        opt.step()
        opt.zero_grad()


def silently(run, *args, **kwargs):
    """A warning fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(*args, **kwargs)


@pytest.mark.parametrize("what", ALTERED)
def test_gradients_changed_while_others_are_held_are_warned_of_once(what):
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2)
    with pytest.warns(UserWarning, match=r"those of 3 selected tensors, .* NanoAdam\(max_grad_norm") as told:
        steps_of(model, opt, ALTERED[what])
    assert [warning.filename for warning in told] == [__file__]
    opt.load_state_dict(opt.state_dict())
    silently(steps_of, model, opt, ALTERED[what])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_an_optimizer_warns_anew_whether_the_first_has_or_not(again):
    for first in (lambda *_: None, clip):
        model = network()
        opt = NanoAdam(model.parameters(), density=0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps_of(model, opt, first)
        with pytest.warns(UserWarning, match="selected tensors"):
            steps_of(*again((model, opt)), clip)


def test_clipping_in_a_closure_or_between_two_backwards_is_warned_of():
    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        clip(model, opt)
        return loss

    model = network()
    opt = NanoAdam(model.parameters(), density=0.2)
    with pytest.warns(UserWarning, match="selected tensors"):
        opt.step(closure)
    opt = NanoAdam(model.parameters(), density=0.2)
    model.zero_grad()
    loss_of(model, 0).backward()
    clip(model, opt)
    loss_of(model, 1).backward()
    with pytest.warns(UserWarning, match="selected tensors"):
        opt.step()


def test_a_warning_made_an_error_leaves_the_step_to_be_taken():
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2)
    loss_of(model, 0).backward()
    clip(model, opt)
    before = bits(model)
    with pytest.raises(UserWarning, match="selected tensors"):
        silently(opt.step)
    assert torch.equal(before, bits(model))
    opt.step()
    assert opt.param_groups[0]["steps"] == 1
    assert not torch.equal(before, bits(model))


@pytest.mark.parametrize("clipped", [True, False])
def test_unscaling_is_no_change_to_be_warned_of_and_clipping_after_it_is(clipped):
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def run():
        for step in range(3):
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(opt)
            if clipped:
                clip(model, opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    if clipped:
        with pytest.warns(UserWarning, match="selected tensors"):
            run()
    else:
        silently(run)


def dense_loss(model):
    return sum(p.square().sum() for p in model.parameters() if p.dim() == 1)


def through_checkpoints(model, step):
    from torch.utils.checkpoint import checkpoint

    x, y = batch(step)
    hidden = torch.tanh(model[0](x))
    for _ in range(2):
        hidden = checkpoint(lambda h: torch.tanh(model[2](h)), hidden, use_reentrant=True)
    torch.nn.functional.cross_entropy(model[4](hidden), y).backward()


ORDINARY = {
    "dense tensors alone": lambda model, opt: dense_loss(model).backward(),
    "autograd.grad": lambda model, opt: torch.autograd.grad(loss_of(model, 7), list(model.parameters())),
    "reentrant checkpoints": lambda model, opt: through_checkpoints(model, 7),
    "a graph of gradients": lambda model, opt: loss_of(model, 7).backward(create_graph=True),
    "zeroing the model": lambda model, opt: model.zero_grad(),
    "zeroing the optimizer in place": lambda model, opt: opt.zero_grad(set_to_none=False),
    "clipping what is then thrown away": lambda model, opt: (clip(model, opt), opt.zero_grad()),
    "clipping what the model throws away": lambda model, opt: (clip(model, opt), model.zero_grad()),
    "stepping twice": lambda model, opt: opt.step(),
    "zeroing the model in place after a step": lambda model, opt: (opt.step(), model.zero_grad(set_to_none=False)),
    "what was clipped in a step long past": lambda model, opt: (
        clip(model, opt),
        opt.release(False),
        opt.step(),
        model.zero_grad(),
        opt.release(),
    ),
    "switching release": lambda model, opt: (opt.release(False), clip(model, opt), opt.release()),
}


@pytest.mark.parametrize("what", ORDINARY)
def test_what_changes_no_gradient_is_not_warned_of(what):
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2, max_grad_norm=1e-3)

    def between(model, opt):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward")
            ORDINARY[what](model, opt)
        loss_of(model, 8).backward()
        ORDINARY["dense tensors alone"](model, opt)

    silently(steps_of, model, opt, between)


def test_clipping_is_not_warned_of_where_it_is_right_or_where_nothing_shows_it():
    for bias, options in ((True, {"gradient_release": False}), (True, {"criterion": "gradient"}), (False, {})):
        model = network(bias=bias)
        silently(steps_of, model, NanoAdam(model.parameters(), density=0.2, **options), clip)


@pytest.mark.parametrize(
    "between",
    [
        lambda model: dense_loss(model).backward(),
        lambda model: torch.autograd.grad(loss_of(model, 1), list(model.parameters())),
    ],
)
def test_zeroing_the_model_is_seen_after_a_backward_that_releases_nothing(between):
    model = network()
    opt = NanoAdam(model.parameters(), density=0.2)
    loss_of(model, 0).backward()
    between(model)
    model.zero_grad()
    before = bits(model)
    opt.step()
    assert torch.equal(before, bits(model))


@pytest.mark.parametrize("bias", [True, False])
def test_a_tensor_frozen_while_it_has_a_gradient_stops_nobody_and_zeroing_is_still_seen(bias):
    for zeroed in (False, True):
        model = network(bias=bias)
        opt = NanoAdam(model.parameters(), density=0.2)
        if bias:
            dense_loss(model).backward()
            model[0].bias.requires_grad_(False)
        loss_of(model, 0).backward()
        model.requires_grad_(False)
        opt.step()
        if zeroed:
            model.zero_grad()
        before = bits(model)
        opt.step()
        assert torch.equal(before, bits(model)) == zeroed


def test_what_is_kept_to_notice_zeroing_is_the_smallest_gradient():
    model = network()
    opt = NanoAdam(
        [{"params": [model[4].weight], "dense": True}, {"params": [*model[:4].parameters(), model[4].bias]}],
        density=0.2,
    )
    for _ in range(2):
        loss_of(model, 0).backward()
        head = weakref.ref(model[4].weight.grad)
        opt.step()
        model.zero_grad()
        assert head() is None
