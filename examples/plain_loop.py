"""A plain training loop: accumulation, clipping, a scheduler, and going on from a checkpoint bit for bit.

Runs in a few seconds with the core install alone: python examples/plain_loop.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import nanoadam

STEPS, ACCUMULATE, BATCH = 200, 4, 32


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def make_training(model: nn.Module) -> tuple[nanoadam.NanoAdam, LRScheduler]:
    optimizer = nanoadam.NanoAdam(
        nanoadam.param_groups(model),
        lr=3e-3,
        density=nanoadam.linear(0.10, 0.04, total_steps=STEPS, interval=20),
        mask_interval=5,
    )
    return optimizer, CosineAnnealingLR(optimizer, STEPS)


def train(model: nn.Module, optimizer: nanoadam.NanoAdam, scheduler: LRScheduler, first: int, last: int) -> float:
    loss = torch.tensor(0.0)
    for step in range(first, last):
        for part in range(ACCUMULATE):
            generator = torch.Generator().manual_seed(ACCUMULATE * step + part)
            inputs = torch.randn(BATCH, 32, generator=generator)
            labels = inputs[:, :4].argmax(dim=1)
            loss = functional.cross_entropy(model(inputs), labels)
            (loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return loss.item()


def main() -> None:
    model = make_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, scheduler = make_training(model)
    print(nanoadam.describe(optimizer.param_groups, density=0.10))

    train(model, optimizer, scheduler, 0, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        loss = train(model, optimizer, scheduler, STEPS // 2, STEPS)

        resumed = make_model()
        optimizer, scheduler = make_training(resumed)
        checkpoint = torch.load(path, weights_only=True)
        for name, part in {"model": resumed, "optimizer": optimizer, "scheduler": scheduler}.items():
            part.load_state_dict(checkpoint[name])
        train(resumed, optimizer, scheduler, STEPS // 2, STEPS)

    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    matrix = "2.weight"
    moved = (model.get_parameter(matrix) != start[matrix]).double().mean().item()
    print(f"\nlast loss {loss:.3f}; {matrix}: {moved:.1%} of the weights have moved; resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
