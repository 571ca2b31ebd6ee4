"""NanoAdam in a LightningModule: accumulation, clipping by what is applied, and a resume that is bit for bit.

Runs in a few seconds and downloads nothing: python examples/lightning_module.py (needs pip install lightning, which is
in none of nanoadam's extras: its test is skipped without it)
"""

import tempfile
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nanoadam


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x)), y)
        if self.global_step % 20 == 0 and index % 2 == 0:
            print(f"step {self.global_step:2}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> nanoadam.NanoAdam:
        return nanoadam.NanoAdam(nanoadam.param_groups(self), lr=1e-2, density=0.10, mask_interval=10)


def make_rows() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


def make_trainer(folder: str, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Classifier()
        make_trainer(folder, 10).fit(model, make_rows())

        # At the end of an epoch: Lightning does not go back to where in the data it stopped.
        stopped, checkpoint = make_trainer(folder, 5), Path(folder) / "half.ckpt"
        stopped.fit(Classifier(), make_rows())
        stopped.save_checkpoint(checkpoint)
        resumed = Classifier()
        make_trainer(folder, 10).fit(resumed, make_rows(), ckpt_path=checkpoint)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print(f"resumed bit for bit: {same}")


if __name__ == "__main__":
    main()
