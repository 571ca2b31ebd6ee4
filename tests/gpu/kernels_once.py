"""Run every kernel on small, awkward tensors, for a memory or race checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/kernels_once.py
compute-sanitizer --tool racecheck python tests/gpu/kernels_once.py

Names of cases behind it run these alone: `weights`, `columns` or `microadam` all of a kind. Run it once without the
checker before: Triton's compiler is then done.
"""

import sys
import time

import torch

from nanoadam.baselines.microadam import MicroAdam
from nanoadam.optimizer import NanoAdam
from nanoadam.schedules import linear

SHAPES = [(40, 130), (3, 4500), (1, 1), (64, 700), (8, 4, 3, 3), (5000,)]


def awkward(dtype, device):
    torch.manual_seed(0)
    parameters = []
    for shape in SHAPES:
        weight = torch.randn(shape, device=device)
        weight[torch.rand(shape, device=device) < 0.3] = 0.0  # ties
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        parameters.append(torch.nn.Parameter(weight.to(dtype)))
    return parameters


def train(dtype, density, device="cuda", **options):
    parameters = awkward(dtype, device)
    opt = NanoAdam(parameters, lr=1e-3, density=density, mask_interval=2, **options)
    for _ in range(5):
        for _ in range(2):
            sum((p.float() * torch.randn_like(p.float())).sum() for p in parameters).backward()
        opt.step()
        if opt.param_groups[0]["steps"] % 2:  # a refresh then finds held gradients to carry
            opt.zero_grad()


def train_columns(dtype, density, device="cuda", transposed=False, **options):
    torch.manual_seed(0)
    shapes = [(40, 130), (3, 4500), (1, 1), (64, 700), (2100, 33)]
    model = torch.nn.ModuleList(torch.nn.Linear(i, o, device=device, dtype=dtype) for o, i in shapes)
    words = torch.nn.Embedding(90, 24, device=device, dtype=dtype)
    groups = [
        {"params": [m.weight for m in model], "granularity": "column", "transposed": transposed},
        {"params": [words.weight], "roles": ["embedding"]},
        {"params": [m.bias for m in model], "dense": True},
    ]
    opt = NanoAdam(groups, lr=1e-3, density=density, mask_interval=2, **options)
    for _ in range(5):
        loss = words(torch.randint(0, 90, (40,), device=device)).float().square().sum()
        for m in model:
            if transposed:  # by a layer that is not nn.Linear: its gradient comes whole
                loss = loss + (torch.randn(7, m.out_features, device=device, dtype=dtype) @ m.weight).float().sum()
            else:
                loss = loss + m(torch.randn(7, m.in_features, device=device, dtype=dtype)).float().square().sum()
        loss.backward()
        opt.step()
        opt.zero_grad()


def train_microadam(dtype, device="cuda", **options):
    parameters = awkward(dtype, device)
    opt = MicroAdam(parameters, lr=1e-3, density=0.05, window=3, **options)
    for _ in range(5):  # the window fills, and turns over
        for p in parameters:
            p.grad = torch.randn_like(p)
        opt.step()


CASES = {
    "weights float32": lambda: train(torch.float32, 0.01),
    "weights bfloat16": lambda: train(torch.bfloat16, 0.01),
    "weights float16": lambda: train(torch.float16, 0.01),
    "weights schedule": lambda: train(torch.bfloat16, linear(0.4, 0.05, total_steps=4, interval=1)),
    "weights all": lambda: train(torch.bfloat16, 1.0, state_dtype=torch.float32, grad_dtype=torch.bfloat16),
    "weights random, zeros kept": lambda: train(torch.float32, 0.1, criterion="random", keep_zeros=True),
    "weights largest, reset": lambda: train(torch.bfloat16, 0.1, criterion="largest", moments="reset"),
    "weights by gradient": lambda: train(torch.float16, 0.1, criterion="gradient"),
    "columns float32": lambda: train_columns(torch.float32, 0.1),
    "columns bfloat16": lambda: train_columns(torch.bfloat16, 0.1),
    "columns float16": lambda: train_columns(torch.float16, 0.1),
    "columns schedule": lambda: train_columns(
        torch.bfloat16, linear(0.4, 0.05, total_steps=4, interval=1), state_dtype=torch.float32
    ),
    "columns transposed, random": lambda: train_columns(torch.float32, 0.2, transposed=True, criterion="random"),
    "columns largest, zeros kept": lambda: train_columns(
        torch.float32, 0.2, keep_zeros=True, criterion="largest", grad_dtype=torch.bfloat16
    ),
    "columns reset, not released": lambda: train_columns(torch.float32, 0.2, moments="reset", gradient_release=False),
    "microadam bfloat16": lambda: train_microadam(torch.bfloat16),
    "microadam float32, rounded": lambda: train_microadam(torch.float32, stochastic_rounding=False),
    "microadam float16, every weight": lambda: train_microadam(torch.float16, weight_decay=0.1),
}

if __name__ == "__main__":
    for name, case in CASES.items():
        if len(sys.argv) == 1 or any(name.startswith(wanted) for wanted in sys.argv[1:]):
            begun = time.perf_counter()
            case()
            torch.cuda.synchronize()
            print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)
    print("done")
