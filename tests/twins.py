"""A small network, its batches, and the same run with gradient release and without."""

import torch

from nanoadam.gradients import SelectedGradient
from nanoadam.optimizer import NanoAdam


def network(seed=0, dtype=torch.float32, bias=True):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 40, bias=bias),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 40, bias=bias),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 4, bias=bias),
    ).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator).to(dtype), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model, step):
    x, y = batch(step, next(model.parameters()).dtype)
    return torch.nn.functional.cross_entropy(model(x).float(), y)


def bits(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def plain(gradient):
    return gradient.to_dense() if type(gradient) is SelectedGradient else gradient


def both(run, **options):
    """The weights after `run(model, opt)` with release on and off."""
    results = []
    for released in (True, False):
        model = network()
        opt = NanoAdam(
            model.parameters(),
            **{"lr": 1e-2, "density": 0.2, "mask_interval": 3, "gradient_release": released, **options},
        )
        start = bits(model)
        run(model, opt)
        assert not torch.equal(bits(model), start)
        results.append(bits(model))
    return results


def cut_down(model, opt):
    """Dense gradients as released ones read: what is not applied counts for no norm."""
    for p in model.parameters():
        if p.grad is not None and type(p.grad) is torch.Tensor:
            p.grad.masked_fill_(~opt.selected(p), 0)
