"""torch's DistributedDataParallel averages what is in `p.grad`, and a job that exchanges nothing is stopped."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nanoadam.distributed import prepare_ddp
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.timeout(400),  # the first one waits for several processes
]

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 3}


def network(bias):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias=bias), nn.Tanh(), nn.Linear(32, 4, bias=bias))


def batch(rank, step):
    numbers = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank), device="cpu")
    return numbers.to(torch.get_default_device())


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def under_ddp(rank, size, bias, view):
    ends = []
    for accumulate in (1, 2):
        model = network(bias)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        opt = NanoAdam(model.parameters(), **OPTIONS)
        kinds = set()
        for step in range(8):
            for micro in range(accumulate):
                with contextlib.nullcontext() if micro + 1 == accumulate else wrapped.no_sync():
                    (wrapped(batch(rank, 10 * step + micro)).square().mean() / accumulate).backward()
            kinds.add(type(model[0].weight.grad))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
        assert kinds == {torch.Tensor if view else SelectedGradient}
        ends.append(bits(model))
    return ends


def prepared(rank, size, bias):
    """The optimizer comes first, and DDP leaves to it what is selected from."""
    ends, sizes = [], None
    for accumulate in (1, 2):
        model = network(bias)
        if rank:  # the weights of the first process go to all
            with torch.no_grad():
                model[0].weight.mul_(2)
        opt = NanoAdam(model.parameters(), **OPTIONS)
        beside = prepare_ddp(model, opt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = DistributedDataParallel(model)
            for step in range(8):
                for micro in range(accumulate):
                    with contextlib.nullcontext() if micro + 1 == accumulate else wrapped.no_sync():
                        (wrapped(batch(rank, 10 * step + micro)).square().mean() / accumulate).backward()
                assert type(model[0].weight.grad) is SelectedGradient
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
        ends.append(bits(model))
        sizes = beside.names, [p.numel() for p in wrapped._module_parameters], beside.replica.sent_bytes
        copied = copy.deepcopy(model)
        copied(batch(rank, 0))
    return ends, sizes


def again(rank, size):
    """A model that has been trained before is trained by a second optimizer."""
    ends = []
    for times in (1, 2):
        model = network(True)
        for number in range(times):
            with torch.no_grad():
                for p, start in zip(model.parameters(), network(True).parameters(), strict=True):
                    p.copy_(start)
            opt = NanoAdam(model.parameters(), **OPTIONS)
            prepare_ddp(model, opt)
            wrapped = DistributedDataParallel(model)
            for step in range(8):
                wrapped(batch(rank, step + 50 * (times - number - 1))).square().mean().backward()
                opt.step()
                opt.zero_grad()
        ends.append(bits(model))
    return ends


def warned(rank, size):
    """What is said, once, where DDP holds gradients whole; and where names do not fit."""
    found = []
    for how in ("after", "view", "named"):
        model = network(True)
        opt = NanoAdam(model.parameters(), **OPTIONS)
        if how == "named":
            prepare_ddp(model, opt)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = DistributedDataParallel(
                model if how != "named" else Around(model), gradient_as_bucket_view=how == "view"
            )
            for step in range(3):
                wrapped(batch(rank, step)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        found.append([str(each.message) for each in said if "whole" in str(each.message)])
    try:
        prepare_ddp(wrapped, opt)
    except TypeError as error:
        found.append(str(error))
    return found


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        inner_names = getattr(inner, "_ddp_params_and_buffers_to_ignore", [])
        self._ddp_params_and_buffers_to_ignore = inner_names  # as torch.compile hands it on

    def forward(self, x):
        return self.inner(x)


def on_one(size, bias, accumulate):
    model = network(bias)
    opt = NanoAdam(model.parameters(), **OPTIONS, local=True)
    for step in range(8):
        for micro in range(accumulate):
            for rank in range(size):
                (model(batch(rank, 10 * step + micro)).square().mean() / (accumulate * size)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    return bits(model)


CASES = {  # each makes two processes once: that is what takes time
    **{(bias, view): (under_ddp, (bias, view)) for bias, view in ((True, False), (False, False), (True, True))},
    "not exchanged": (lambda *args: alone(*args), ({}, False)),
    "local": (lambda *args: alone(*args), ({"local": True}, False)),
    "not released": (lambda *args: alone(*args), ({"gradient_release": False}, False)),
    **{("prepared", bias): (prepared, (bias,)) for bias in (True, False)},
    "warned": (warned, ()),
    "again": (again, ()),
    "by hand": (lambda *args: alone(*args), ({}, True)),
}


def on_two(rank, size):
    return {name: function(rank, size, *arguments) for name, (function, arguments) in CASES.items()}


@pytest.mark.parametrize(("bias", "view"), [(True, False), (False, False), (True, True)])
def test_two_processes_under_ddp_are_one_with_both_batches(two, bias, view):
    first, second = (end[bias, view] for end in two)
    for number, accumulate in enumerate((1, 2)):
        assert torch.equal(first[number], second[number])
        expected = on_one(2, bias, accumulate)
        if not view:  # where p.grad is dense, what is not selected counts for the norm
            torch.testing.assert_close(first[number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_ddp_leaves_what_is_selected_from_to_replicas_beside_it(two, bias):
    """Without biases every tensor is selected from; DDP is left the smallest."""
    (first, sizes), (second, _) = (end["prepared", bias] for end in two)
    for number, accumulate in enumerate((1, 2)):
        assert torch.equal(first[number], second[number])
        torch.testing.assert_close(first[number], on_one(2, bias, accumulate), rtol=1e-4, atol=1e-5)
    names, left, sent = sizes
    assert names == (["0.weight", "2.weight"] if bias else ["0.weight"])
    assert left == ([32, 4] if bias else [128])
    selected = 128 + 32 if bias else 128  # of 512 and 128
    agreed = 48 + len(names)
    assert sent == 8 * (4 * selected + agreed)


def test_a_second_optimizer_does_not_meet_the_exchange_of_the_first(two):
    once, twice = two[0]["again"]
    assert torch.equal(once, twice)


def test_one_warning_says_what_whole_gradients_cost(two):
    after, view, named, refused = two[0]["warned"]
    assert len(after) == len(view) == 1
    assert "prepare_ddp(model, optimizer) before you wrap" in after[0]
    assert after == view
    assert len(named) == 2  # and that names do not fit
    assert "other names" in named[0]
    assert "comes before" in refused


def alone(rank, size, options, exchange):
    model = network(True)
    opt = NanoAdam(model.parameters(), **OPTIONS, **options)
    said = None
    for step in range(4):
        model(batch(rank, step)).square().mean().backward()
        if exchange:
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad.div_(size)
        try:
            opt.step()
        except RuntimeError as error:
            said = str(error)
            break
        opt.zero_grad()
    return said, bits(model)


def test_gradients_that_were_not_exchanged_are_refused_unless_that_is_wanted(two):
    for end in two:
        said, _ = end["not exchanged"]
        assert "2 processes" in said
        assert "DistributedDataParallel" in said
        assert "local=True" in said
        assert end["local"][0] is None
        assert end["not released"][0] is None
    assert not torch.equal(two[0]["local"][1], two[1]["local"][1])


def test_gradients_averaged_by_hand_are_averaged_entry_by_entry(two):
    (first_said, first), (second_said, second) = (end["by hand"] for end in two)
    assert first_said is None
    assert second_said is None
    assert torch.equal(first, second)
    model = network(True)
    opt = NanoAdam(model.parameters(), **OPTIONS)
    for step in range(4):
        for rank in range(2):
            (model(batch(rank, step)).square().mean() / 2).backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(first, bits(model), rtol=1e-4, atol=1e-5)
