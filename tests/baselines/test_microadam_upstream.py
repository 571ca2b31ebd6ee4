"""MicroAdam against trajectories of its authors' CUDA code.

`data/microadam_upstream.safetensors` was recorded on an NVIDIA H200 (torch 2.11.0, CUDA 13.0) with the packages
ista-daslab-optimizers 1.1.15 and ista-daslab-optimizers-cuda 1.1.0. Three cases, settings in the file's metadata
(`block` set as `d_block_size`, null for as large as the GPU's shared memory allows; quantization bucket 64, alpha 0,
eps 1e-8): weights numpy.random.RandomState(seed).standard_normal(n), then gradients standard_normal((steps, n)) ** 3,
both in bfloat16. The seeds are the first ones with which no two entries tie at the edge of a top-k, where the authors'
choice is arbitrary. Stored: start, gradients, weights after every step, and the state after the last one.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanoadam.baselines.microadam import MicroAdam

FILE = Path(__file__).parent / "data" / "microadam_upstream.safetensors"


@pytest.fixture(params=["one_block", "two_blocks", "dense_window"])
def recorded(request):
    with safe_open(FILE, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(request.param)]  # noqa: SIM118 - not a dict
        tensors = {key.partition(".")[2]: file.get_tensor(key) for key in keys}
        return json.loads(file.metadata()[request.param]), tensors


def optimizer_of(settings, start, device):
    parameter = torch.nn.Parameter(start[None].clone().to(device))
    names = ("lr", "betas", "weight_decay", "density", "window")
    options = {name: settings[name] for name in names}
    block = settings["block"] or 32768
    return parameter, MicroAdam([parameter], block_size=block, stochastic_rounding=False, **options)


def starts_of_entries(settings):
    """The position in the tensor at which the block of each entry of a row of the window begins."""
    length, block = settings["numel"], settings["upstream_block"]
    starts = []
    for start in range(0, length, block):
        starts += [start] * math.ceil(settings["density"] * min(block, length - start))
    return torch.tensor(starts)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_window_and_error_are_the_authors_bit_for_bit(recorded, backend, device, monkeypatch):
    if backend == "triton":
        pytest.importorskip("nanoadam.ops.triton", exc_type=ImportError)
    monkeypatch.setenv("NANOADAM_BACKEND", backend)
    settings, theirs = recorded
    parameter, optimizer = optimizer_of(settings, theirs["start"], device)
    for gradient in theirs["gradients"]:
        parameter.grad = gradient[None].clone().to(device)
        optimizer.step()
    ours = {name: value.cpu() for name, value in optimizer.state[parameter].items()}
    starts = starts_of_entries(settings)
    sorted_theirs = (theirs["index"].long() + starts).sort(1)  # the authors leave them as topk does
    sorted_ours = (ours["index"].long() + starts).sort(1)
    assert torch.equal(sorted_ours.values, sorted_theirs.values)
    assert torch.equal(ours["value"].gather(1, sorted_ours.indices), theirs["value"].gather(1, sorted_theirs.indices))
    code = ours["error"].view(-1)[: theirs["error"].numel()]
    assert torch.equal(code >> 4 | code << 4, theirs["error"])  # the authors put the first of a pair in the high bits
    for name in ("error_min", "error_max"):
        assert torch.equal(ours[name], theirs[name][: len(ours[name])])


def test_every_step_is_the_authors_within_the_rounding_of_bfloat16(recorded, device):
    settings, theirs = recorded
    parameter, optimizer = optimizer_of(settings, theirs["start"], device)
    before = theirs["start"]
    for gradient, after in zip(theirs["gradients"], theirs["weights"], strict=True):
        parameter.data.copy_(before[None])  # the authors round the direction, the decay and the sum, we the sum alone
        parameter.grad = gradient[None].clone().to(device)
        optimizer.step()
        moved = (after.float() - before.float()).abs().max().item()
        torch.testing.assert_close(parameter.detach()[0].cpu(), after, rtol=2**-7, atol=2**-8 * moved)
        before = after
    assert (after != theirs["start"]).float().mean() > 0.2
