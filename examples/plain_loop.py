"""A plain training loop: accumulation, clipping, a scheduler, and going on from a checkpoint bit for bit.

Runs in a few seconds with the core install alone: python examples/plain_loop.py [--model NAME]
It is one process; a loop on several is examples/distributed_loop.py.
(with a model of transformers: pip install 'nanoadam[finetune]')
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import nanoadam

STEPS, ACCUMULATE, BATCH = 200, 4, 32


class Logits(nn.Module):
    """A classifier of transformers as a module from token ids to logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


def make_rows(count: int, seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the first four numbers is the largest? With a model's name these are token ids."""
    generator = torch.Generator().manual_seed(seed)
    if name:
        inputs = torch.randint(4, 20, (count, 16), generator=generator)
    else:
        inputs = torch.randn(count, 32, generator=generator)
    return inputs, inputs[:, :4].argmax(dim=1)


def make_model(name: str) -> nn.Module:
    if name:
        return Logits(name).eval()  # eval: no dropout, so that both trainings are the same
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def make_training(model: nn.Module, steps: int) -> tuple[nanoadam.NanoAdam, LRScheduler]:
    optimizer = nanoadam.NanoAdam(
        nanoadam.param_groups(model),
        lr=3e-3,
        density=nanoadam.linear(0.10, 0.04, total_steps=steps, interval=20),
        mask_interval=5,
    )
    return optimizer, CosineAnnealingLR(optimizer, steps)


def train(
    model: nn.Module, optimizer: nanoadam.NanoAdam, scheduler: LRScheduler, first: int, last: int, name: str
) -> float:
    loss = torch.tensor(0.0)
    for step in range(first, last):
        for part in range(ACCUMULATE):
            inputs, labels = make_rows(BATCH, ACCUMULATE * step + part, name)
            loss = functional.cross_entropy(model(inputs), labels)
            (loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return loss.item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    name, steps = arguments.model, arguments.steps
    model = make_model(name)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, scheduler = make_training(model, steps)
    print(nanoadam.describe(optimizer.param_groups, density=0.10))

    train(model, optimizer, scheduler, 0, steps // 2, name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        loss = train(model, optimizer, scheduler, steps // 2, steps, name)

        resumed = make_model(name)
        optimizer, scheduler = make_training(resumed, steps)
        checkpoint = torch.load(path, weights_only=True)
        for kind, part in {"model": resumed, "optimizer": optimizer, "scheduler": scheduler}.items():
            part.load_state_dict(checkpoint[kind])
        train(resumed, optimizer, scheduler, steps // 2, steps, name)

    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    matrix = [name for name, p in model.named_parameters() if p.dim() == 2][-2]
    moved = (model.get_parameter(matrix) != start[matrix]).double().mean().item()
    print(f"\nlast loss {loss:.3f}; {matrix}: {moved:.1%} of the weights have moved; resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
