"""The learning rate of a run that names none: trials on its own rows, as `nanoadam.finetuning.search` has them.

Weights are put back after each trial, so the run itself is the same as if the rate had been given.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.finetuning import optimizers, search, shards, training
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import Job
from nanoadam.finetuning.training import Progress
from nanoadam.text import duration

HELD = 512
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
        return {**found, "trials": [[rate, loss if math.isfinite(loss) else None] for rate, loss in self.trials]}

    def written(self, config: Config) -> Config:
        """A config with everything that was found."""
        start, end = config.densities
        return dataclasses.replace(config, learning_rate=self.rate, density=start, density_end=end)

    def words(self) -> str:
        """Why this one."""
        if self.how == "typical":
            return (
                f"Learning rate: {self.rate:g}, typical of the optimizer; the run is too short to try others, or spread"
            )
        tried = ", ".join(f"{rate:.2g}: {loss:.4g}" for rate, loss in sorted(self.trials))
        return (
            f"Learning rate: {self.rate:g}, from {len(self.trials)} trials of {self.steps} steps in "
            f"{self.seconds:.0f} s (loss after each: {tried}; longer runs want smaller steps)"
        )


def chosen(job: Job, tell: Progress) -> Found:
    """The rate that was given, or what trials and what is typical come to; `job.optimizer` is made anew with it.

    Args:
        job: has its model on any device; its weights are what they were afterwards.
        tell: called with each trial.
    """
    if job.config.learning_rate is not None:
        return Found(job.config.learning_rate, "given")
    steps = search.trial_steps(job.plan.total_steps)
    held = min(HELD, len(job.task.train) // 4)
    if not steps or held < 8 or shards.wanted(job.config):
        found = Found(optimizers.typical(job.config, job.plan.total_steps), "typical")
    else:
        found = _tried(job, steps, held, tell)
    job.config = dataclasses.replace(job.config, learning_rate=found.rate)
    job.optimizer = optimizers.make(job.task.model, job.config, job.plan)
    tell({"step": 0, "total": job.plan.total_steps, "about": [found.words(), *_time(found, job.plan.total_steps)]})
    return found


def _time(found: Found, total: int) -> list[str]:
    """About how long the run takes, from the trials."""
    if not found.trials:
        return []
    each = found.seconds / (len(found.trials) * found.steps)
    return [f"Time: about {duration(each * total)}, at {each:.2g} s a step"]


def _tried(job: Job, steps: int, held: int, tell: Progress) -> Found:
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

    short, long = (optimizers.typical(job.config, count) for count in (steps, job.plan.total_steps))
    trials = search.search(loss_at, short)
    rate = float(f"{search.best_of(trials, short) * long / short:.2g}")
    return Found(rate, "tried", tuple(trials), steps, time.perf_counter() - clock)


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
