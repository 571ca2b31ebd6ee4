"""Layers that compute selected entries only, on a GPU: eager, compiled, captured; and what they allocate."""

import copy

import pytest
import torch
from torch import nn

import nanoadam
from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class Words(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(1000, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 1000)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def ids(step, shape=(4, 64)):
    return torch.randint(0, 1000, shape, device="cuda", generator=torch.Generator("cuda").manual_seed(step))


def trained(model, steps=12, forward=None, **options):
    groups = nanoadam.param_groups(model, granularity="column")
    options = {"lr": 1e-3, "density": 0.05, "mask_interval": 4, **options}
    optimizer = NanoAdam(groups, **options)
    forward = model if forward is None else forward  # a compiled model has no truth
    for step in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        loss = nn.functional.cross_entropy(forward(ids(step)).float().flatten(0, 1), ids(step).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().float().view(-1) for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_with_and_without_dense_gradients_agree(dtype):
    first = Words().to("cuda", dtype)
    second = copy.deepcopy(first)
    before = torch.cat([p.detach().float().view(-1) for p in first.parameters()])
    ours, dense = trained(first), trained(second, gradient_release=False)
    assert (ours != before).float().mean() < 0.4
    # Adam takes the sign of a first gradient: one that is nearly zero may go either way.
    assert ((ours - dense).abs() > 2e-3).float().mean() < 1e-3
    again = trained(Words().to("cuda", dtype))
    assert torch.equal(ours, again)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_the_same_columns(mode):
    eager = Words().to("cuda")
    model = copy.deepcopy(eager)
    expected = trained(eager)
    found = trained(model, forward=torch.compile(model, mode=mode, fullgraph=True))
    assert ((found - expected).abs() > 2e-3).float().mean() < 1e-3


def test_nothing_of_the_weights_size_is_allocated():
    model = nn.Sequential(nn.Embedding(4096, 2048), *(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    model.to("cuda", torch.bfloat16)
    optimizer = NanoAdam(
        nanoadam.param_groups(model, granularity="column", selected="8"),  # the last layer, too, which is no new head
        density=0.01,
        grad_dtype=torch.bfloat16,
        lr=1e-3,
    )
    batch = torch.randint(0, 4096, (2, 16), device="cuda")

    def iteration():
        model(batch).float().square().mean().backward()
        assert all(isinstance(layer.weight.grad, SelectedGradient) for layer in model)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        iteration()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    iteration()
    assert torch.cuda.max_memory_allocated() - before < model[1].weight.nbytes // 2


def test_nothing_of_a_training_step_waits_for_the_device():
    model = Words().to("cuda")
    optimizer = NanoAdam(nanoadam.param_groups(model, granularity="column"), density=0.05, mask_interval=2, lr=1e-3)
    batches = [ids(step) for step in range(6)]
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # libraries may wait when they are loaded
        try:
            model(batches[step]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
