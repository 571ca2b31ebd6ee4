"""Gradient release is exact: whatever is done with gradients, the bits are those of ordinary ones."""

import copy
import gc
import warnings
import weakref

import pytest
import torch

from nanoadam import ops
from nanoadam.chunks import layout
from nanoadam.gradients import SelectedGradient, release
from nanoadam.optimizer import NanoAdam
from twins import batch, bits, both, loss_of, network


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


def test_a_gradient_set_by_hand_is_used():
    p, q = (torch.nn.Parameter(torch.ones(4, 50)) for _ in range(2))
    on, off = NanoAdam([p], density=0.1, lr=1e-2), NanoAdam([q], density=0.1, lr=1e-2, gradient_release=False)
    for parameter, opt in ((p, on), (q, off)):
        for scale in (1.0, -3.0, 2.0):
            parameter.grad = torch.full_like(parameter, scale)
            opt.step()
            opt.zero_grad()
    assert torch.equal(p, q)


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
