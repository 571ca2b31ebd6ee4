"""NanoAdam in a loop of accelerate: accumulation, clipping, a scheduler, and a checkpoint that goes on bit for bit.

Runs in a few seconds and downloads nothing: python examples/accelerate_loop.py [--model NAME]
On several processes: torchrun --nproc-per-node 2 examples/accelerate_loop.py
(needs pip install 'nanoadam[finetune]')
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import nanoadam

EPOCHS, ACCUMULATE = 4, 2


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
    torch.manual_seed(0)
    if name:
        return Logits(name).eval()  # eval: no dropout, so that both trainings are the same
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def train(accelerator: Accelerator, parts: tuple, epochs: int) -> float:
    model, optimizer, data, scheduler = parts
    loss = torch.tensor(0.0)
    for _ in range(epochs):
        for inputs, labels in data:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return loss.item()


def make_parts(accelerator: Accelerator, name: str) -> tuple:
    model = make_model(name)
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), lr=1e-2, density=0.05, mask_interval=5)
    nanoadam.distributed.prepare_ddp(model, optimizer)  # with one process nothing happens
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * 16 // ACCUMULATE)
    return accelerator.prepare(
        model, optimizer, DataLoader(TensorDataset(*make_rows(512, 0, name)), batch_size=32), scheduler
    )


def make_accelerator() -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):  # only because one process runs two trainings
        state._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    accelerator = make_accelerator()
    parts = make_parts(accelerator, name)
    first = train(accelerator, parts, EPOCHS // 2)
    with tempfile.TemporaryDirectory() as folder:
        folder = broadcast_object_list([folder])[0]  # that of the first process, if there are several
        accelerator.save_state(folder)
        last = train(accelerator, parts, EPOCHS - EPOCHS // 2)

        accelerator = make_accelerator()
        resumed = make_parts(accelerator, name)
        accelerator.load_state(folder)
        train(accelerator, resumed, EPOCHS - EPOCHS // 2)
        accelerator.wait_for_everyone()

    pairs = zip(parts[0].parameters(), resumed[0].parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    accelerator.print(f"loss {first:.3f} half-way, {last:.3f} at the end; resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
