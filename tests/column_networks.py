"""A small network trained by columns, and what tests do with it."""

import torch
from torch import nn

from nanoadam.optimizer import NanoAdam

OPTIONS = {"lr": 1e-2, "density": 0.25, "mask_interval": 3, "granularity": "column"}


def network(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32, bias=bias),
        nn.ReLU(inplace=True),
        nn.Linear(32, 24, bias=bias),
        nn.Tanh(),
        nn.Linear(24, 4, bias=bias),
    ).to(dtype)


def optimizer_of(model, *, transposed=False, **options):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "roles": ["matrix"] * len(matrices), "transposed": transposed}]
    return NanoAdam([*groups, *([{"params": others, "dense": True}] if others else [])], **{**OPTIONS, **options})


def inputs(step, dtype=torch.float32, shape=(8, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def trained(model, opt, steps=50, accumulate=2, change=lambda model, opt, step: None, dtype=torch.float32):
    for step in range(steps):
        for micro in range(accumulate):
            model(inputs(10 * step + micro, dtype)).float().square().mean().backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        change(model, opt, step)
        opt.step()
        opt.zero_grad(set_to_none=step % 2 == 0)
    return bits(model)
