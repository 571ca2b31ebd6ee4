"""torch's DistributedDataParallel averages what is in `p.grad`, and a job that exchanges nothing is stopped."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 3}


def network(bias):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias=bias), nn.Tanh(), nn.Linear(32, 4, bias=bias))


def batch(rank, step):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))


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


def on_one(size, bias, accumulate):
    model = network(bias)
    opt = NanoAdam(model.parameters(), **OPTIONS)
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
