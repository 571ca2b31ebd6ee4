"""Embeddings that compute the gradient of their selected entries only."""

import copy

import pytest
import torch
from torch import nn

import nanoadam
from column_networks import OPTIONS
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam


class Words(nn.Module):
    """A small language model, its embedding selected from weight by weight."""

    def __init__(self, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 12, padding_idx=3)
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 50)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def ids(step, shape=(4, 7)):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embeddings_gradient_is_made_at_the_selected_entries(dtype, compiler, tied):
    torch._dynamo.reset()
    model = Words(tied, dtype)
    optimizer = NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight"})
    forward = torch.compile(model, backend=compiler, fullgraph=True) if compiler else model
    table = model.embed.weight
    for step in range(5):
        dense = copy.deepcopy(model)
        dense(ids(step)).float().square().mean().backward()
        forward(ids(step)).float().square().mean().backward()
        mask = optimizer.selected(table)
        expected = dense.embed.weight.grad * mask
        if dtype is torch.float32 or tied:
            torch.testing.assert_close(table.grad.to_dense(), expected)
        else:  # ours is summed in float32, torch's in bfloat16
            torch.testing.assert_close(table.grad.to_dense().float(), expected.float(), rtol=0.03, atol=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    # A tied table's gradient comes whole from the head: from then on its lookup is torch's own.
    assert optimizer._slots[table].served.needs_whole == tied


def test_no_gradient_of_a_tables_size_is_made():
    model = nn.Sequential(nn.Embedding(4000, 16), nn.Linear(16, 2))
    optimizer = NanoAdam(nanoadam.param_groups(model), density=0.01, lr=1e-2)  # noqa: F841 - it is what selects
    loss = model(torch.randint(0, 4000, (3, 5))).square().mean()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < model[0].weight.nbytes / 2
    assert isinstance(model[0].weight.grad, SelectedGradient)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_that_torch_treats_in_their_own_way_are_left_alone(options):
    model = Words()
    model.embed = nn.Embedding(50, 12, **options)
    if options.get("sparse"):
        optimizer = NanoAdam(nanoadam.param_groups(model), lr=1e-2)
        with pytest.raises(TypeError, match="sparse"):
            model(ids(0)).square().mean().backward()
        return
    optimizer = NanoAdam(nanoadam.param_groups(model), lr=1e-2, density=0.25)
    dense = copy.deepcopy(model)
    for each in (dense, model):
        each(ids(0)).square().mean().backward()
    expected = dense.embed.weight.grad * optimizer.selected(model.embed.weight)
    torch.testing.assert_close(model.embed.weight.grad.to_dense(), expected)


def test_gradients_of_gradients_of_an_embedding():
    def penalty(model):
        table = model.embed.weight
        (first,) = torch.autograd.grad(model(ids(0)).square().mean(), table, create_graph=True)
        return first

    model = Words()
    optimizer = NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight"})
    dense = copy.deepcopy(model)
    first, expected = penalty(model), penalty(dense)
    mask = optimizer.selected(model.embed.weight)
    torch.testing.assert_close(first, expected * mask)
    (second,) = torch.autograd.grad(first.square().sum(), model.inner.weight)
    (expected,) = torch.autograd.grad((expected * mask).square().sum(), dense.inner.weight)
    torch.testing.assert_close(second, expected)


def test_a_state_loaded_between_two_backwards_of_a_step_is_accumulated_over():
    ends = []
    for load in (True, False):
        model = Words()
        opt = NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight", "mask_interval": 2})
        for step in range(6):
            for micro in range(2):
                if load and micro:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(10 * step + micro))
                model(ids).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_a_copy_put_in_place_of_the_gradient_and_zeroed_takes_the_next_backward():
    model, ids = Words(), torch.arange(9)
    NanoAdam(nanoadam.param_groups(model), **{**OPTIONS, "granularity": "weight"})
    for _ in range(2):
        model(ids).square().mean().backward()
        found = model.embed.weight.grad.to_dense()
        model.embed.weight.grad = model.embed.weight.grad.clone()
        model.zero_grad(set_to_none=False)
    assert torch.equal(model.embed.weight.grad.to_dense(), torch.zeros_like(found))
    model(ids).square().mean().backward()
    assert torch.equal(model.embed.weight.grad.to_dense(), found)
