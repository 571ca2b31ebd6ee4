"""Images that are all in memory, and a plain training loop over them.

For experiments with hundreds of short runs. A step of a small network takes a GPU some 3 ms; decoding, collating and
the Trainer's own work for each batch take longer, and so does loading weights from a disk for each run. Here images are
uint8 tensors on the device, resized once, and a batch is one indexing operation. `finetune` is for everything else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer

from nanoadam.finetuning.arrays import read_arrays


@dataclasses.dataclass(frozen=True)
class Images:
    """One split, all of it in memory.

    Args:
        pixels: uint8 [n, side, side, 3].
        labels: int64 [n], on the same device.
        classes: how many there are.
    """

    pixels: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Scale:
    """What turns pixels into inputs: (pixel / 255 - mean) / deviation, for each channel.

    Args:
        mean: of each channel.
        deviation: of each channel.
        channels_last: in memory; which is faster depends on GPU and network.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    channels_last: bool = True

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 [n, 3, side, side] of uint8 [n, side, side, 3]."""
        mean, deviation = (_levels(values, pixels.device) for values in (self.mean, self.deviation))
        inputs = ((pixels.float() - mean) / deviation).permute(0, 3, 1, 2)
        return inputs if self.channels_last else inputs.contiguous()


@functools.lru_cache
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once: a copy in each step would have the host wait for the GPU."""
    return torch.tensor(values, device=device) * 255.0


def read_scale(folder: Path) -> Scale:
    """As the image processor of a model's folder says; half and half where there is none."""
    file = folder / "preprocessor_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Scale(tuple(found.get("image_mean", Scale.mean)), tuple(found.get("image_std", Scale.deviation)))


def load(path: Path, side: int, device: torch.device, rows: int | None = None, order: int = 0) -> Images:
    """A split from an npz file, on a device, resized to `side` with antialiasing.

    Args:
        path: as `read_arrays` takes it; grey images get three equal channels.
        side: in pixels.
        device: where the images shall be.
        rows: the first so many of the rows, shuffled by the seed `order`; all by default.
        order: that seed.

    Raises:
        ValueError: for a file of anything else.
    """
    images, labels = read_arrays(path)
    classes = int(labels.max()) + 1
    if rows is not None:
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(order))[:rows].numpy()
        images, labels = images[chosen], labels[chosen]
    parts = []
    for part in torch.from_numpy(images).split(2000):
        whole = part[..., None].expand(-1, -1, -1, 3) if part.ndim == 3 else part
        pixels = whole.to(device).permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        parts.append(pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous())
    return Images(torch.cat(parts), torch.from_numpy(labels).long().reshape(-1).to(device), classes)


def batches(images: Images, size: int, generator: torch.Generator, shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image once in a random order, mirrored or not, and shifted with its border repeated.

    Args:
        images: to go through.
        size: of a batch; the last one may be smaller.
        generator: on the CPU, so that every device sees the same batches.
        shift: at most so many pixels each way.

    Yields:
        uint8 [size, side, side, 3], int64 [size].
    """
    count, side, device = len(images), images.pixels.shape[1], images.pixels.device
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(-shift, shift + 1, (count, 2, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    places = (torch.arange(side) + offsets).clamp_(0, side - 1)  # [count, 2, side]
    rows, columns = places[:, 0], torch.where(mirrored, places[:, 1].flip(1), places[:, 1])
    order, rows, columns = (t.to(device, non_blocking=True) for t in (order, rows, columns))
    for start in range(0, count, size):
        part = slice(start, start + size)
        chosen = order[part]
        index = (chosen[:, None, None], rows[part][:, :, None], columns[part][:, None, :])
        yield images.pixels[index], images.labels[chosen]


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    scale: Scale,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    shift: int = 0,
    label_smoothing: float = 0.0,
    scheduler: str = "constant",
    after_epoch: Callable[[int], None] | None = None,
) -> bool:
    """Train by cross-entropy; the modules keep the mode they are in.

    Args:
        model: a classifier of transformers, on the device of the images.
        optimizer: over its parameters.
        images: to train on.
        scale: makes inputs of pixels.
        epochs: times through the images.
        batch_size: of each step.
        seed: of order and augmentation.
        shift: see `batches`.
        label_smoothing: as in torch.
        scheduler: "constant", "linear" or "cosine", without warm-up.
        after_epoch: called with how many epochs are done.

    Returns:
        Whether the loss of the last step of every epoch was finite; training stops at the first that was not.
    """
    from transformers import get_scheduler

    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // batch_size)
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
    for epoch in range(epochs):
        loss = torch.zeros(())
        for pixels, labels in batches(images, batch_size, generator, shift):
            loss = F.cross_entropy(model(pixel_values=scale(pixels)).logits, labels, label_smoothing=label_smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not torch.isfinite(loss):
            return False
        if after_epoch is not None:
            after_epoch(epoch + 1)
    return True


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, scale: Scale, batch_size: int = 1000) -> float:
    """Share of the images whose class comes first; the modules' modes are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=images.labels.device)
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        right += (model(pixel_values=scale(pixels)).logits.argmax(dim=1) == labels).sum()
    for module, mode in modes.items():
        module.training = mode
    return float(right) / len(images)
