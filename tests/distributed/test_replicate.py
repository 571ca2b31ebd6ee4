"""Replicas that exchange selected entries are one process with all the data, and bit for bit the same."""

import contextlib
import copy

import pytest
import torch
from networks import Network, batch, bits, loss_of
from torch import nn

import processes
from nanoadam import linear, param_groups
from nanoadam.distributed import Drifted, prepare_ddp, replicate
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.timeout(400),  # the first one waits for several processes
]

OPTIONS = {"lr": 1e-2, "density": 0.2, "mask_interval": 3, "state_dtype": torch.float32}
STEPS, ACCUMULATE = 8, 2

EQUAL = {  # model, groups, optimizer, clipping
    "weights": ({}, {}, {}, True),
    "columns": ({}, {"granularity": "column"}, {}, True),
    "all selected": ({"bias": False}, {"dense": ()}, {}, False),
    "schedule": ({}, {}, {"density": linear(0.5, 0.1, total_steps=6, interval=2)}, True),
    "dense gradients": ({}, {}, {"gradient_release": False}, True),
    "by gradient": ({}, {}, {"criterion": "gradient"}, False),
    "reentrant": ({"checkpointing": "reentrant"}, {}, {}, False),
    "checkpointing": ({"checkpointing": "plain"}, {"granularity": "column"}, {}, False),
    "half entries": ({}, {}, {"grad_dtype": torch.bfloat16}, False),
}


def setting(name, **more):
    model, groups, options, clip = EQUAL[name]
    model = Network(**model)
    return model, NanoAdam(param_groups(model, weight_decay=0.1, **groups), **{**OPTIONS, **options, **more}), clip


def clip_and_step(model, opt, clip, to_none):
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    opt.step()
    opt.zero_grad(set_to_none=to_none)


def equal(rank, size, name, bucket_bytes=3000):
    model, opt, clip = setting(name)
    if rank:  # the weights of the first process go to all
        with torch.no_grad():
            model.conv.weight.mul_(2)
    replica = replicate(model, opt, bucket_bytes=bucket_bytes)
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            with contextlib.nullcontext() if micro + 1 == ACCUMULATE else replica.no_sync():
                (loss_of(model, rank, ACCUMULATE * step + micro) / ACCUMULATE).backward()
        clip_and_step(model, opt, clip, to_none=step % 2 == 0)
    return bits(model), replica.sent_bytes


def on_one(size, name):
    model, opt, clip = setting(name, local=True)
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            for rank in range(size):
                (loss_of(model, rank, ACCUMULATE * step + micro) / (ACCUMULATE * size)).backward()
        clip_and_step(model, opt, clip, to_none=step % 2 == 0)
    return bits(model)


def long(rank, size, granularity, steps=80, how="replicas"):
    """Many steps with everything that could lead replicas apart; also where DDP exchanges, or leaves a part to them."""
    model = Network(norm="batch").to(torch.bfloat16)
    groups = param_groups(model, granularity=granularity)
    opt = NanoAdam(
        groups, lr=1e-2, density=linear(0.3, 0.1, total_steps=60, interval=15), mask_interval=7, weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    if how == "replicas":
        called, no_sync = model, replicate(model, opt, bucket_bytes=1500).no_sync
    else:
        beside = prepare_ddp(model, opt) if how == "prepared DDP" else None
        called = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        no_sync = called.no_sync

    def trained():
        """DDP sends the buffers of the first process before a forward: after it they differ."""
        return (
            bits(model) if how == "replicas" else torch.cat([p.detach().view(-1).double() for p in model.parameters()])
        )

    begun = trained()
    seen = []
    for step in range(steps):
        for micro in range(2 if step % 4 == 0 else 1):
            with no_sync() if micro == 0 and step % 4 == 0 else contextlib.nullcontext():
                loss_of(called, rank, 2 * step + micro).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if step % 10 == 0:
            seen += [norm.double().view(1), trained()]
        opt.step()
        opt.zero_grad(set_to_none=step % 2 == 0)
        scheduler.step()
    assert not torch.equal(begun, trained())
    if how == "prepared DDP":
        assert beside.names
    return torch.cat([*seen, trained()])


LONG = [("weight", "replicas"), ("column", "replicas"), ("weight", "prepared DDP"), ("weight", "DDP")]


def two_hundred(rank, size):
    return [long(rank, size, granularity, steps=200, how=how) for granularity, how in LONG]


def caught(function, *errors):
    try:
        function()
    except errors as error:
        return f"{type(error).__name__}: {error}"
    return None


def silence(rank, size):
    model, opt, _ = setting("weights")
    replica = replicate(model, opt)
    before = replica.sent_bytes
    with replica.no_sync():
        loss_of(model, rank, 0).backward()
    silent = replica.sent_bytes - before, bits_of_gradients(model)
    said = caught(opt.step, RuntimeError)
    loss_of(model, rank, 1).backward()
    opt.step()
    return silent, said, replica.sent_bytes > before


def closure(rank, size):
    """The last backward before a step is within its closure, as Lightning makes it; and forgets to exchange."""
    ends = []
    for how in ("plain", "closure"):
        model, opt, _ = setting("weights")
        replica = replicate(model, opt)
        for step in range(3):
            with replica.no_sync():
                loss_of(model, rank, 2 * step).backward()
            if how == "plain":
                loss_of(model, rank, 2 * step + 1).backward()
                opt.step()
            else:
                opt.step(closure=lambda: loss_of(model, rank, 2 * step + 1).backward())  # noqa: B023
            opt.zero_grad()
        ends.append(bits(model))

    def silently():
        with replica.no_sync():
            loss_of(model, rank, 0).backward()

    return ends, caught(lambda: opt.step(silently), RuntimeError)


def bits_of_gradients(model):
    return torch.cat([p.grad.to_dense().reshape(-1) for p in model.parameters() if p.grad is not None])


def untouched(rank, size):
    """By nobody, by one, and by one after the other."""
    model, opt, _ = setting("weights")
    replica = replicate(model, opt)
    model(batch(rank, 0)).square().mean().backward()
    nobody = model.seldom.weight.grad is None and model.seldom.bias.grad is None
    opt.step()
    opt.zero_grad()
    before = bits(model.seldom)
    model(batch(rank, 1)).square().mean().backward()
    opt.step()
    still = torch.equal(before, bits(model.seldom))
    opt.zero_grad()
    model(batch(rank, 2), seldom=rank == 1).square().mean().backward()
    one = model.seldom.weight.grad.entries.clone(), model.seldom.bias.grad.clone()
    opt.step()
    replica.remove()
    return nobody, still, one, type(model.seldom.weight.grad) is SelectedGradient, bits(model)


def twice(rank, size):
    """Two backward passes outside of no_sync: each is exchanged."""
    model, opt, _ = setting("weights")
    replicate(model, opt)
    for number in (0, 1):
        loss_of(model, rank, number).backward()
    return bits_of_gradients(model)


def drift(rank, size, how):
    model, opt, _ = setting("weights")
    replica = replicate(model, opt)
    loss_of(model, rank, 0).backward()
    opt.step()
    opt.zero_grad()
    if rank == 1 and how == "weights":
        with torch.no_grad():
            model.inner.weight[3, 3] += 1
    elif rank == 1 and how == "options":
        opt.param_groups[0]["density"] = 0.3
    elif rank == 1 and how == "steps":
        opt.step()

    def go_on():
        for number in range(1, 5):
            loss_of(model, rank, number).backward()
            opt.step()
            opt.zero_grad()

    said = caught(go_on, Drifted)
    replica.remove()
    return said


def refusals(rank, size):
    model, opt, _ = setting("weights")
    said = {
        "optimizer": caught(lambda: replicate(model, torch.optim.AdamW(model.parameters())), TypeError),
        "wrapped": caught(lambda: replicate(nn.parallel.DistributedDataParallel(model), opt), TypeError),
        "foreign": caught(lambda: replicate(Network(), opt), ValueError),
    }
    other = Network()
    other.inner.weight.requires_grad_(rank == 0)
    said["model"] = caught(lambda: replicate(other, NanoAdam(param_groups(other), **OPTIONS)), ValueError)
    opt.param_groups[0]["density"] = 0.1 + 0.1 * rank
    said["options"] = caught(lambda: replicate(model, opt), ValueError)
    model, opt, _ = setting("weights")
    if rank:
        opt.state[model.inner.weight]["exp_avg"][0] = 1
    said["state"] = caught(lambda: replicate(model, opt), ValueError)
    model, opt, _ = setting("weights")
    model.embedding.sparse = True
    groups = [group for group in param_groups(model) if group["role"] != "embedding"]
    replicate(model, NanoAdam(groups, **OPTIONS))
    said["sparse"] = caught(lambda: loss_of(model, rank, 0).backward(), TypeError)
    return said


def others(rank, size):
    """Parameters of another optimizer, gradients made by hand, weights unfrozen in mid-run, loss scaling."""
    model = Network()
    model.conv.weight.requires_grad_(False)
    mine = [p for name, p in model.named_parameters() if not name.startswith("head")]
    opt = NanoAdam(mine, **OPTIONS)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    replica = replicate(model, opt)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=8.0)
    for step in range(6):
        if step == 3:
            model.conv.weight.requires_grad_(True)
        scaler.scale(loss_of(model, rank, step)).backward()
        scaler.step(opt)
        scaler.step(head)
        scaler.update()
        opt.zero_grad()
        head.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(trained, torch.autograd.grad(loss_of(model, rank, 2), trained), strict=True):
        p.grad = g
    replica.exchange()
    opt.step()
    copied = copy.deepcopy(model)  # hooks and groups of processes stay behind
    return bits(copied), bits(model)


def buffers(rank, size):
    model = Network(norm="batch")
    opt = NanoAdam(param_groups(model), **OPTIONS)
    replicate(model, opt)
    loss_of(model, rank, 0).backward()
    return model.norm.running_mean.clone()


def on_two(rank, size):
    found = {("equal", name): equal(rank, size, name) for name in EQUAL}
    found["long"] = long(rank, size, "weight")
    found |= {("drift", how): drift(rank, size, how) for how in ("weights", "options", "steps")}
    for function in (silence, closure, untouched, twice, refusals, others, buffers):
        found[function.__name__] = function(rank, size)
    return found


def on_four(rank, size):
    return {"long": long(rank, size, "column", steps=20), "equal": equal(rank, size, "weights", bucket_bytes=1 << 20)}


@pytest.mark.parametrize("name", EQUAL)
def test_two_replicas_are_one_process_with_both_batches(two, name):
    first, second = (end["equal", name][0] for end in two)
    assert torch.equal(first, second)
    tolerance = 2e-2 if name == "half entries" else 1e-4
    torch.testing.assert_close(first, on_one(2, name), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_four_replicas_are_one_process_with_four_batches(four):
    ends = [end["equal"][0] for end in four]
    assert all(torch.equal(ends[0], end) for end in ends)
    torch.testing.assert_close(ends[0], on_one(4, "weights"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_replicas_stay_the_same_bit_for_bit(ends, request):
    """For 80 steps of two, 20 of four."""
    first, *others = (end["long"] for end in request.getfixturevalue(ends))
    assert first.isfinite().all()
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_stay_the_same_bit_for_bit_for_200_steps(size):
    first, *others = processes.run(size, two_hundred)
    for other in others:
        for (granularity, how), mine, theirs in zip(LONG, first, other, strict=True):
            assert mine.isfinite().all()
            assert torch.equal(mine, theirs), (granularity, how)


def test_no_sync_sends_nothing_and_its_gradients_go_with_the_next(two):
    (sent, first), said, later = two[0]["silence"]
    assert sent == 0
    assert not torch.equal(first, two[1]["silence"][0][1])
    assert "no_sync()" in said
    assert later


def test_gradients_that_a_closure_makes_are_exchanged_before_the_step(two):
    (plain, through), said = two[0]["closure"]
    assert torch.equal(plain, through)
    assert torch.equal(through, two[1]["closure"][0][1])
    assert "no_sync()" in said


def test_a_parameter_that_some_batches_do_not_touch(two):
    for nobody, still, _, kind, _ in (end["untouched"] for end in two):
        assert nobody, "who is touched by nobody has no gradient"
        assert still, "and keeps its bits under weight decay"
        assert kind
    (first, first_bias), (second, second_bias) = (end["untouched"][2] for end in two)
    assert first.any()
    assert first_bias.any()
    assert torch.equal(first, second)
    assert torch.equal(first_bias, second_bias)
    assert torch.equal(two[0]["untouched"][4], two[1]["untouched"][4])


def test_every_backward_outside_of_no_sync_is_exchanged(two):
    assert torch.equal(two[0]["twice"], two[1]["twice"])
    model, opt, _ = setting("weights")
    for number in (0, 1):
        for rank in range(2):
            (loss_of(model, rank, number) / 2).backward()
    torch.testing.assert_close(two[0]["twice"], bits_of_gradients(model), rtol=1e-4, atol=1e-6)
    del opt


@pytest.mark.parametrize(
    ("how", "words"),
    [("weights", "the weights of 'inner.weight' differ"), ("options", "density"), ("steps", "2 steps and another 1")],
)
def test_replicas_that_drift_apart_are_stopped_on_every_process(two, how, words):
    for end in two:
        assert end["drift", how] is not None
        assert words in end["drift", how]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("optimizer", "got AdamW"),
        ("wrapped", "model.module"),
        ("foreign", "not in the model"),
        ("model", "inner.weight is (32, 24) torch.float32, trained, and on process 1"),
        ("options", "density of group 0 is 0.1, and on process 1 density of group 0 is 0.2"),
        ("state", "load the same checkpoint"),
        ("sparse", "sparse=False"),
    ],
)
def test_what_cannot_be_replicated_is_refused_on_every_process(two, case, words):
    for end in two:
        assert words in (end["refusals"][case] or "")


def test_parameters_of_other_optimizers_and_gradients_by_hand(two):
    for copied, own in (end["others"] for end in two):
        assert torch.equal(copied, own)
    assert torch.equal(two[0]["others"][1], two[1]["others"][1])


def test_running_statistics_are_those_of_the_first_process(two):
    model = Network(norm="batch")
    loss_of(model, 0, 0)
    for end in two:
        assert torch.equal(end["buffers"], model.norm.running_mean)


def test_only_selected_entries_and_dense_tensors_travel(two):
    """Within 10 %, where there is more than a handful of weights: here those that are not selected would be four
    times as many."""
    model, opt, _ = setting("weights")
    loss_of(model, 0, 2).backward()
    entries = sum(p.grad.entries.nbytes for p in model.parameters() if type(p.grad) is SelectedGradient)
    dense = sum(p.grad.nbytes for p in model.parameters() if type(p.grad) is not SelectedGradient)
    sent = two[0]["equal", "weights"][1] / STEPS
    assert entries + dense <= sent <= entries + dense + 48 + 11
    assert opt.gradient_bytes() == entries + dense
