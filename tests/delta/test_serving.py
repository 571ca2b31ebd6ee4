"""Many patches over one base: each is there in every bit when its turn comes, and the base is never lost."""

import copy

import pytest
import torch
from cases import same
from torch import nn

from nanoadam import delta
from nanoadam.delta import DeltaError, Switch


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 50, bias=False))
    made[3].weight = made[0].weight
    return made


def tuned(base, seed, labels=None):
    generator = torch.Generator().manual_seed(seed)
    made = copy.deepcopy(base)
    with torch.no_grad():
        chosen = torch.rand(made[0].weight.shape, generator=generator) < 0.05
        made[0].weight[chosen] = float(seed)
        made[1].weight[:, seed] += 1
        made[2].bias += seed
    if labels:
        made.add_module("4", nn.Linear(50, labels))
    return made


@pytest.fixture
def served():
    base = model()
    finetunes = {f"task {seed}": tuned(base, seed) for seed in (1, 2, 3)}
    switch = Switch(copy.deepcopy(base))
    for name, finetune in finetunes.items():
        switch.add(name, delta.diff(base, finetune))
    return base, finetunes, switch


def test_switching_in_any_order(served):
    base, finetunes, switch = served
    assert same(switch.model.state_dict(), base.state_dict())
    for name in ("task 2", "task 1", "task 1", None, "task 3", "task 2", None):
        switch.to(name)
        wanted = base if name is None else finetunes[name]
        assert same(switch.model.state_dict(), wanted.state_dict())
        assert switch.current == name


def test_with_using(served):
    base, finetunes, switch = served
    switch.to("task 1")
    with pytest.raises(RuntimeError, match="boom"), switch.using("task 2") as inside:
        assert same(inside.state_dict(), finetunes["task 2"].state_dict())
        raise RuntimeError("boom")
    assert same(switch.model.state_dict(), finetunes["task 1"].state_dict())
    with switch.using(None):
        assert same(switch.model.state_dict(), base.state_dict())


def test_batches_of_requests(served):
    base, finetunes, switch = served
    requests = [("task 2", 1), (None, 2), ("task 1", 3), ("task 2", 4), (None, 5)]
    switch.to("task 1")
    seen = []
    for name, batch in switch.batches(requests, key=lambda request: request[0]):
        wanted = base if name is None else finetunes[name]
        assert same(switch.model.state_dict(), wanted.state_dict())
        seen.append((name, [number for _, number in batch]))
    assert seen[0] == ("task 1", [3])
    assert sorted(seen, key=str) == sorted([("task 1", [3]), ("task 2", [1, 4]), (None, [2, 5])], key=str)
    with pytest.raises(DeltaError, match="no patch 'task 9'"):
        next(switch.batches([("task 1", 1), ("task 9", 2)], key=lambda request: request[0]))


def test_adding_and_removing(served):
    base, finetunes, switch = served
    switch.to("task 1")
    switch.add("task 4", delta.diff(base, tuned(base, 4)))  # the base, whatever is in the weights
    assert switch.current is None
    switch.to("task 4")
    size = switch.nbytes
    switch.remove("task 4")
    assert switch.nbytes < size
    assert same(switch.model.state_dict(), base.state_dict())
    assert switch.names == ["task 1", "task 2", "task 3"]
    for call in (lambda: switch.remove("task 4"), lambda: switch.to("task 4")):
        with pytest.raises(DeltaError, match="no patch 'task 4'"):
            call()
    with pytest.raises(DeltaError, match="already"):
        switch.add("task 1", delta.diff(base, finetunes["task 1"]))


def test_a_patch_of_another_base_is_refused(served):
    base, finetunes, switch = served
    other = tuned(base, 5)
    with pytest.raises(DeltaError, match="neither"):
        switch.add("foreign", delta.diff(other, tuned(other, 6)))
    assert same(switch.model.state_dict(), base.state_dict())
    switch.to("task 3")
    assert same(switch.model.state_dict(), finetunes["task 3"].state_dict())


def test_heads_of_several_sizes():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    switch, finetunes = Switch(copy.deepcopy(base)), {}
    for labels in (2, 3, 5):
        finetunes[str(labels)] = nn.Sequential(copy.deepcopy(base[0]), nn.Linear(4, labels))
        switch.add(str(labels), delta.diff(base, finetunes[str(labels)], new=["1.weight", "1.bias"]))
    for name in ("3", "5", "2", "3", None):
        switch.to(name)
        wanted = base if name is None else finetunes[name]
        assert same(switch.model.state_dict(), wanted.state_dict())
        assert switch.model(torch.ones(1, 4)).shape[1] == wanted[1].out_features


def test_memory_is_that_of_what_changed():
    base = nn.Linear(1000, 1000, bias=False).bfloat16()
    finetune = copy.deepcopy(base)
    with torch.no_grad():
        finetune.weight.view(-1)[::100] = 1.0
    switch = Switch(copy.deepcopy(base))
    switch.add("a", delta.diff(base, finetune))
    assert switch.nbytes <= 10_000 * 5.2


def test_by_kernels(monkeypatch, device):
    pytest.importorskip("nanoadam.delta.triton", exc_type=ImportError)
    monkeypatch.setenv("NANOADAM_BACKEND", "triton")
    base = model().to(device)
    finetune = tuned(base.cpu(), 2).to(device)
    base = base.to(device)
    switch = Switch(copy.deepcopy(base))
    switch.add("a", delta.diff(base, finetune))
    switch.to("a")
    assert same(switch.model.state_dict(), finetune.state_dict())
    switch.to(None)
    assert same(switch.model.state_dict(), base.state_dict())
