"""The learning rate of a run that names none: found by short trials on its own first batches.

The best rate differs by a factor of ten between models and tasks at the same density (docs/results/defaults.md), so no
formula gives it. A trial trains so many steps at a rate, with the run's own schedule shortened to them, and measures
the loss on training rows that no trial learned from. The search starts at what is typical of the optimizer and goes up
or down by `FACTOR` until the loss is worse. Weights are put back after each trial, so the run itself is the same as if
the rate had been given.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.finetuning import optimizers, training
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import Job
from nanoadam.finetuning.training import Progress

FACTOR = 3.0
MOST_TRIALS = 6
SHARE = 0.08
"""Of the run's steps, what a trial takes."""

STEPS = (30, 100)
"""A trial's least and most steps; a run that is too short for the least gets no trials."""

LEARNED = 0.99
"""With more than this share of the loss without any training, a trial has learned nothing."""

HELD = 256
"""Rows that the loss of a trial is measured on."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A learning rate and where it is from.

    Args:
        rate: at the top of the schedule.
        how: "given", "typical" or "tried".
        trials: pairs of a rate and the loss after its trial.
        steps: of each trial.
        seconds: that all of them took.
    """

    rate: float
    how: str
    trials: tuple[tuple[float, float], ...] = ()
    steps: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        found = dataclasses.asdict(self)
        return {**found, "trials": [list(pair) for pair in self.trials]}

    def written(self, config: Config) -> Config:
        """A config with everything that was found."""
        start, end = config.densities
        return dataclasses.replace(config, learning_rate=self.rate, density=start, density_end=end)

    def words(self) -> str:
        """Why this one."""
        if self.how == "typical":
            return f"Learning rate: {self.rate:g}, typical of the optimizer; the run is too short to try others"
        tried = ", ".join(f"{rate:g}: {loss:.3g}" for rate, loss in sorted(self.trials))
        return (
            f"Learning rate: {self.rate:g}, the best of {len(self.trials)} trials of {self.steps} steps in "
            f"{self.seconds:.0f} s (loss at each: {tried})"
        )


def chosen(job: Job, tell: Progress) -> Found:
    """The rate that was given, or the best of some trials; `job.optimizer` is made anew with it.

    Args:
        job: has its model on any device; its weights are what they were afterwards.
        tell: told of each trial.
    """
    if job.config.learning_rate is not None:
        return Found(job.config.learning_rate, "given")
    start = optimizers.typical(job.config)
    steps = trial_steps(job.plan.total_steps)
    count = len(job.task.train)
    held = min(HELD, count // 4)
    found = Found(start, "typical") if not steps or held < 8 else _tried(job, start, steps, held, tell)
    job.config = dataclasses.replace(job.config, learning_rate=found.rate)
    job.optimizer = optimizers.make(job.task.model, job.config, job.plan)
    tell({"step": 0, "total": job.plan.total_steps, "about": [found.words()]})
    return found


def trial_steps(total: int) -> int:
    """How long a trial is for a run of so many steps; 0 for no trials."""
    if total < 4 * STEPS[0]:
        return 0
    return min(STEPS[1], max(STEPS[0], round(SHARE * total)))


def _tried(job: Job, start: float, steps: int, held: int, tell: Progress) -> Found:
    clock = time.perf_counter()
    before = _weights(job.task.model)
    order = random.Random(job.config.seed).sample(range(len(job.task.train)), len(job.task.train))
    parts = [job.task.train.select(sorted(part)) for part in (order[held:], order[:held])]

    def loss_at(rate: float) -> float:
        tell({"step": 0, "total": job.plan.total_steps, "trying": rate})
        try:
            return _loss_after(job, rate, steps, *parts)
        finally:
            _put_back(job.task.model, before)

    trials = search(loss_at, start, _loss_before(job, parts[1]))
    rate = best_of(trials)
    return Found(rate, "tried", tuple(trials), steps, time.perf_counter() - clock)


def search(loss_at: Callable[[float], float], start: float, before: float = math.inf) -> list[tuple[float, float]]:
    """Rates by powers of `FACTOR` from a start, until the loss is worse on both sides of the best.

    Where nothing was learned yet, all losses are alike and their order is chance: then it goes up.

    Args:
        loss_at: the loss after a trial at a rate; infinite where it diverges.
        start: the first rate.
        before: the loss without any training.

    Returns:
        Pairs of rate and loss, in the order they were tried.
    """
    found: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in found:
            found[power] = loss_at(start * FACTOR**power)
        return found[power]

    at(0)
    while len(found) < MOST_TRIALS:
        best = min(found, key=lambda power: (found[power], power))
        if LEARNED * before < found[best] < math.inf and math.isfinite(found[max(found)]):
            at(max(found) + 1)
            continue
        missing = [power for power in (best + 1, best - 1) if power not in found]
        if not missing:
            break
        at(missing[0])
    return [(float(f"{start * FACTOR**power:.3g}"), loss) for power, loss in found.items()]


def best_of(trials: list[tuple[float, float]]) -> float:
    """The rate of the least loss; between it and its neighbours where a parabola through the three says so."""
    finite = sorted((rate, loss) for rate, loss in trials if math.isfinite(loss))
    if not finite:
        return min(rate for rate, _ in trials) / FACTOR
    place = min(range(len(finite)), key=lambda i: finite[i][1])
    rate = finite[place][0]
    if 0 < place < len(finite) - 1:
        (_, a), (_, b), (_, c) = finite[place - 1 : place + 2]
        curve = a - 2 * b + c
        if curve > 0:
            rate *= FACTOR ** max(-0.5, min(0.5, (a - c) / (2 * curve)))
    return float(f"{rate:.2g}")


def _loss_after(job: Job, rate: float, steps: int, rows: Any, held: Any) -> float:
    """The loss on held rows after a trial; infinite if it diverges."""
    config = dataclasses.replace(job.config, learning_rate=rate)
    plan = optimizers.Plan(steps, job.plan.steps_per_epoch)
    trial = dataclasses.replace(job, config=config, optimizer=optimizers.make(job.task.model, config, plan))
    with tempfile.TemporaryDirectory() as folder:
        arguments = training.arguments_for(trial, Path(folder), steps)
        trainer = training.RunTrainer.of(trial, arguments, [], rows, held)
        try:
            trainer.train()
        except training.Diverged:
            return math.inf
        measured = trainer.evaluate()
    del trainer  # the optimizer's hooks go with it
    gc.collect()
    loss = float(measured.get("eval_token_loss", measured["eval_loss"]))
    return loss if math.isfinite(loss) else math.inf


def _loss_before(job: Job, held: Any) -> float:
    """The loss on held rows without any training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.RunTrainer.of(job, training.arguments_for(job, Path(folder), 1), [], held, held)
        measured = trainer.evaluate()
    return float(measured.get("eval_token_loss", measured["eval_loss"]))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that training changes, on the CPU."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in before.items():
        now[name].copy_(tensor)
    for parameter in model.parameters():
        parameter.grad = None
