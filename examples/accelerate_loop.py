"""NanoAdam in a loop of accelerate: accumulation, clipping, a scheduler, and a checkpoint that goes on bit for bit.

Runs in a few seconds and downloads nothing: python examples/accelerate_loop.py (needs pip install 'nanoadam[finetune]')
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import nanoadam

EPOCHS, ACCUMULATE = 4, 2


def make_data() -> DataLoader:
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(dim=1)), batch_size=32)


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


def make_parts(accelerator: Accelerator) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    optimizer = nanoadam.NanoAdam(nanoadam.param_groups(model), lr=1e-2, density=0.05, mask_interval=5)
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * 16 // ACCUMULATE)
    return accelerator.prepare(model, optimizer, make_data(), scheduler)


def make_accelerator() -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):  # only because one process runs two trainings
        state._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)


def main() -> None:
    accelerator = make_accelerator()
    parts = make_parts(accelerator)
    first = train(accelerator, parts, EPOCHS // 2)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        last = train(accelerator, parts, EPOCHS - EPOCHS // 2)

        accelerator = make_accelerator()
        resumed = make_parts(accelerator)
        accelerator.load_state(folder)
        train(accelerator, resumed, EPOCHS - EPOCHS // 2)

    pairs = zip(parts[0].parameters(), resumed[0].parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    print(f"loss {first:.3f} half-way, {last:.3f} at the end; resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
