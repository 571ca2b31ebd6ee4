"""Forgetting on real digit images, in a minute and without a download.

A small network learns the digits 0 to 4 (task 1). It is then finetuned on the digits 5 to 9 (task 2) with a new head,
once by AdamW and once by NanoAdam at each of two densities. After that the task-1 head is put back and task 1 is
measured again; the drop is the forgetting (Zhou et al. 2025, arXiv 2506.21374, section on catastrophic forgetting).

Every optimizer gets a learning rate of its own from one grid, the same for all: the one with the best accuracy on the
validation split of task 2, mean over seeds; where two are level, the one with the lower validation loss. Task 1 takes
no part in the choice. Rates are constant, without decay or schedule, as in the paper's runs with ResNets.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import nanoadam
from nanoadam.gradients import gradient_bytes

__all__ = ["METRICS", "Demo", "Outcome", "Settings", "run"]

CHOICE = "best mean accuracy on the validation split of task 2; if level, the lower validation loss"

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers."""

    seeds: tuple[int, ...] = (0, 1, 2)
    densities: tuple[float, ...] = (0.10, 0.01)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    mask_interval: int = 100
    hidden: int = 512
    batch_size: int = 64
    pretrain_epochs: int = 20
    pretrain_learning_rate: float = 1e-3
    finetune_epochs: int = 20
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not self.seeds:
            raise ValueError("the demo needs at least one seed, got none: use --seeds 1 or more")
        if not self.learning_rates:
            raise ValueError("the demo needs at least one learning rate, got none")


class Split(NamedTuple):
    """Images of shape (n, 64) in [-0.5, 0.5] and labels of shape (n,) in 0..4."""

    images: Tensor
    labels: Tensor


class Task(NamedTuple):
    """One half of the digits, 60 / 20 / 20 per cent."""

    train: Split
    validation: Split
    test: Split


@dataclasses.dataclass
class Outcome:
    """One finetuning run. Accuracies and shares are in [0, 1], sizes in bytes."""

    method: str
    learning_rate: float
    seed: int
    task1_before: float
    task2: float
    task1_after: float
    forgetting: float
    touched: float
    l2_moved: float
    state_bytes: int
    gradient_bytes: int
    task2_validation: float
    task2_validation_loss: float
    curve: list[tuple[float, float]] = dataclasses.field(repr=False)  # per epoch: task 1, task 2 on validation


# The rows of the table: key, what it says, per cent or bytes.
METRICS: tuple[tuple[str, str, str], ...] = (
    ("task1_before", "task 1 before (digits 0-4)", "%"),
    ("task2", "task 2 (digits 5-9)", "%"),
    ("task1_after", "task 1 after", "%"),
    ("forgetting", "forgetting (drop in task 1)", "%"),
    ("touched", "weights touched (matrices)", "%"),
    ("state_bytes", "optimizer state", "B"),
    ("gradient_bytes", "gradients held for the step", "B"),
)


@dataclasses.dataclass
class Demo:
    """All runs, and the learning rate that validation chose for each method."""

    settings: Settings
    outcomes: list[Outcome]
    chosen: dict[str, float]
    data_sha256: str
    seconds: float
    started: str

    def rows(self, method: str) -> list[Outcome]:
        """The runs of `method` at its chosen learning rate, one per seed."""
        return [o for o in self.outcomes if o.method == method and o.learning_rate == self.chosen[method]]

    def table(self) -> list[dict[str, Any]]:
        """One entry per method: `{"method", "learning_rate", <metric>: {"mean", "std"}, ...}`; one seed has no std."""
        return [
            {"method": method, "learning_rate": lr} | {key: _spread(self.rows(method), key) for key, _, _ in METRICS}
            for method, lr in self.chosen.items()
        ]


class Digits(nn.Module):
    """64 pixels, two hidden layers, five classes: far more weights than 540 training images need."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 5)

    def forward(self, images: Tensor) -> Tensor:  # (n, 64) -> (n, 5)
        """Logits of the five classes."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def load_data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]:
    """Scikit-learn's 1,797 images as float64 (n, 64) in 0..16, their labels, and the SHA-256 of both."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digest = hashlib.sha256(images.astype("<f8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return images, labels, digest


def split_task(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], first: int, seed: int) -> Task:
    """The digits first..first+4, split 60 / 20 / 20 with equal class shares."""
    from sklearn.model_selection import train_test_split

    own = np.flatnonzero((labels >= first) & (labels < first + 5))
    train, rest = train_test_split(own, train_size=0.6, stratify=labels[own], random_state=seed)
    validation, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=seed)

    def tensors(index: np.ndarray[Any, Any]) -> Split:
        pixels = torch.tensor(images[index] / 16 - 0.5, dtype=torch.float32)
        return Split(pixels, torch.tensor(labels[index] - first, dtype=torch.long))

    return Task(tensors(train), tensors(validation), tensors(test))


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """One epoch in random order."""
    for index in torch.randperm(len(split.labels), generator=generator).split(size):
        yield Split(split.images[index], split.labels[index])


@torch.no_grad()
def evaluate(model: Digits, split: Split, head: nn.Linear | None = None) -> tuple[float, float]:
    """Accuracy and mean cross-entropy; `head` stands in for the model's own."""
    logits = (head or model.head)(model.backbone(split.images))
    accuracy = (logits.argmax(dim=1) == split.labels).double().mean().item()
    return accuracy, functional.cross_entropy(logits, split.labels).item()


def pretrain(settings: Settings, task: Task, seed: int) -> Digits:
    """Task 1 from scratch, by AdamW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Digits(settings.hidden)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.pretrain_learning_rate, weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.pretrain_epochs):
        for images, labels in batches(task.train, settings.batch_size, generator):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def methods(settings: Settings) -> dict[str, float | None]:
    """Name to density; None is AdamW."""
    return {"AdamW": None} | {f"NanoAdam {density * 100:g} %": density for density in settings.densities}


def make_optimizer(
    settings: Settings, model: Digits, density: float | None, lr: float, seed: int
) -> torch.optim.AdamW | nanoadam.NanoAdam:
    """AdamW where `density` is None. Everything but the density and the rate is the same for all."""
    if density is None:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=settings.weight_decay)
    groups = nanoadam.param_groups(model, weight_decay=settings.weight_decay)
    return nanoadam.NanoAdam(groups, lr=lr, density=density, mask_interval=settings.mask_interval, seed=seed)


def bytes_of(tensors: Iterator[Tensor | None]) -> int:
    """What the tensors hold; None counts as nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def finetune(
    settings: Settings,
    pretrained: Digits,
    task1: Task,
    task2: Task,
    method: str,
    density: float | None,
    lr: float,
    seed: int,
) -> Outcome:
    """Task 2 from `pretrained` with a new head, and what it did to task 1."""
    model = copy.deepcopy(pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000 + seed)
        model.head.reset_parameters()
    matrices = [(p, p.detach().clone()) for p in model.backbone.parameters() if p.dim() == 2]
    touched = [torch.zeros_like(p, dtype=torch.bool) for p, _ in matrices]
    optimizer = make_optimizer(settings, model, density, lr, seed)
    generator = torch.Generator().manual_seed(1_000 + seed)
    most_gradients = 0
    curve: list[tuple[float, float]] = []
    for _ in range(settings.finetune_epochs):
        for images, labels in batches(task2.train, settings.batch_size, generator):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            held = sum(gradient_bytes(p.grad) for p in model.parameters() if p.grad is not None)
            most_gradients = max(most_gradients, held)
            optimizer.step()
        for (p, start), seen in zip(matrices, touched, strict=True):
            seen |= p.detach() != start
        curve.append((evaluate(model, task1.test, pretrained.head)[0], evaluate(model, task2.validation)[0]))
    if isinstance(optimizer, nanoadam.NanoAdam):
        state_bytes = optimizer.state_bytes()
    else:
        state_bytes = bytes_of(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    before, after = evaluate(pretrained, task1.test)[0], evaluate(model, task1.test, pretrained.head)[0]
    validation, validation_loss = evaluate(model, task2.validation)
    return Outcome(
        method=method,
        learning_rate=lr,
        seed=seed,
        task1_before=before,
        task2=evaluate(model, task2.test)[0],
        task1_after=after,
        forgetting=before - after,
        touched=sum(int(t.sum()) for t in touched) / sum(t.numel() for t in touched),
        l2_moved=math.sqrt(sum(float((p.detach() - start).double().square().sum()) for p, start in matrices)),
        state_bytes=state_bytes,
        gradient_bytes=most_gradients,
        task2_validation=validation,
        task2_validation_loss=validation_loss,
        curve=curve,
    )


def choose(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Per method the rate with the best mean validation accuracy on task 2; if level, the lower validation loss."""
    chosen: dict[str, float] = {}
    for method in dict.fromkeys(o.method for o in outcomes):
        own = [o for o in outcomes if o.method == method]

        def merit(lr: float, own: list[Outcome] = own) -> tuple[float, float]:
            runs = [o for o in own if o.learning_rate == lr]
            # A run that diverged has a loss of NaN, which would compare as neither better nor worse.
            losses = [o.task2_validation_loss if math.isfinite(o.task2_validation_loss) else math.inf for o in runs]
            return statistics.mean(o.task2_validation for o in runs), -statistics.mean(losses)

        chosen[method] = max(dict.fromkeys(o.learning_rate for o in own), key=merit)
    return chosen


def run(settings: Settings | None = None, progress: Progress | None = None) -> Demo:
    """Pretrain once per seed, finetune once per seed, method and learning rate, and choose the learning rates.

    Args:
        settings: what to run; the defaults are what `nanoadam demo` runs.
        progress: called after every training run with (what comes next, runs done, runs in all).

    Returns:
        All outcomes, written nowhere: see `write_folder`.
    """
    settings = settings or Settings()
    with _one_thread():
        return _run(settings, progress or (lambda what, done, total: None))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A second core gains nothing on matrices this small, and the numbers must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(settings: Settings, tell: Progress) -> Demo:
    started, clock = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    images, labels, digest = load_data()
    own = methods(settings)
    total = len(settings.seeds) * (1 + len(own) * len(settings.learning_rates))
    done = 0
    outcomes: list[Outcome] = []
    for seed in settings.seeds:
        tell(f"seed {seed}: pretraining on digits 0-4", done, total)
        task1, task2 = (split_task(images, labels, first, seed) for first in (0, 5))
        pretrained = pretrain(settings, task1, seed)
        done += 1
        for method, density in own.items():
            for lr in settings.learning_rates:
                tell(f"seed {seed}: {method} on digits 5-9, lr {lr:g}", done, total)
                outcomes.append(finetune(settings, pretrained, task1, task2, method, density, lr, seed))
                done += 1
    tell("done", done, total)
    return Demo(settings, outcomes, choose(outcomes), digest, time.perf_counter() - clock, started)


def _spread(outcomes: Sequence[Outcome], key: str) -> dict[str, float | None]:
    values = [float(getattr(o, key)) for o in outcomes]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
