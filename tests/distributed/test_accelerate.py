"""accelerate's loop, launched with several processes, is one process with all batches."""

import warnings

import pytest
import torch
from test_shards import OPTIONS, Wide, loss_of, weights

from nanoadam import param_groups
from nanoadam.distributed import prepare_ddp
from nanoadam.optimizer import NanoAdam

pytest.importorskip("accelerate")
pytestmark = pytest.mark.timeout(400)  # the first one waits for several processes


def train(rank, plugin=None):
    """Accumulation, clipping and stepping are accelerate's."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, gradient_accumulation_steps=2, mixed_precision="no"
    )
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS)
    beside = prepare_ddp(model, opt) if plugin is None else None
    model, opt = accelerator.prepare(model, opt)
    for step in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, rank, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of the order of steps
                opt.step()
            opt.zero_grad()
    return weights(accelerator.unwrap_model(model)), beside


def on_two(rank, size):
    end, beside = train(rank)
    return end, beside.replica.sent_bytes


def on_one(size):
    model = Wide()
    opt = NanoAdam(param_groups(model), **OPTIONS, local=True)
    for step in range(6):
        for rank in range(size):
            (loss_of(model, rank, step) / size / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
    return weights(model)


def test_accelerate_with_two_processes(two):
    (first, sent), (second, _) = two
    assert torch.equal(first, second)
    torch.testing.assert_close(first, on_one(2), rtol=1e-4, atol=1e-5)
    selected = (
        sum(p.numel() for n, p in Wide().named_parameters() if p.dim() == 2 and "head" not in n) * OPTIONS["density"]
    )
    assert sent == pytest.approx(3 * 4 * selected, rel=0.02)
