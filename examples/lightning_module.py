"""NanoAdam in a LightningModule: accumulation, clipping by what is applied, and a resume that is bit for bit.

Runs in a few seconds and downloads nothing: python examples/lightning_module.py [--model NAME]
(needs pip install lightning, which is in none of nanoadam's extras: its test is skipped without it)
"""

import argparse
import tempfile
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nanoadam


class Logits(nn.Module):
    """A classifier of transformers as a module from token ids to logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


class Classifier(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if name:
            self.net = Logits(name).eval()  # eval: no dropout, so that both trainings are the same
        else:
            self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.global_step % 20 == 0 and index % 2 == 0:
            print(f"step {self.global_step:2}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> nanoadam.NanoAdam:
        return nanoadam.NanoAdam(nanoadam.param_groups(self), lr=1e-2, density=0.10, mask_interval=10)


def make_rows(name: str) -> DataLoader[tuple[Tensor, ...]]:
    """Which of the first four numbers is the largest? With a model's name these are token ids."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, 20, (512, 16), generator=generator) if name else torch.randn(512, 32, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


def make_trainer(folder: str, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: a tiny one with random weights")
    return parser.parse_args()


def main() -> None:
    name = parse().model
    with tempfile.TemporaryDirectory() as folder:
        model = Classifier(name)
        make_trainer(folder, 10).fit(model, make_rows(name))

        # At the end of an epoch: Lightning does not go back to where in the data it stopped.
        stopped, checkpoint = make_trainer(folder, 5), Path(folder) / "half.ckpt"
        stopped.fit(Classifier(name), make_rows(name))
        stopped.save_checkpoint(checkpoint)
        resumed = Classifier(name)
        make_trainer(folder, 10).fit(resumed, make_rows(name), ckpt_path=checkpoint)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print(f"resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
