"""What a run starts from: data and model read and checked, the task, the plan, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformers import set_seed

from nanoadam.finetuning import columns, data, models, norms, optimizers, retain, tasks
from nanoadam.finetuning.config import Config


@dataclasses.dataclass
class Job:
    """A config with its data and its model: what a run starts from."""

    config: Config
    task: tasks.Task
    plan: optimizers.Plan
    optimizer: optimizers.Made
    sources: dict[str, Any]
    measures: dict[str, retain.Measure]


def rows(config: Config) -> tuple[data.Split, data.Split]:
    """The training and the validation split, read once in a process.

    Raises:
        ValueError: as `data.load`.
    """
    return data.remembered(("rows", data.key(config)), lambda: data.load(config))


def with_task(config: Config) -> Config:
    """A config that names its task: as told, or as data and model say.

    Raises:
        ValueError: as `data.load`, or if they do not say it.
    """
    if config.task is not None:
        return config
    train, _ = rows(config)
    architecture = models.architecture(config)
    return dataclasses.replace(config, task=columns.task_of(train.rows, config, architecture))


def prepare(config: Config) -> Job:
    """Read data and model; everything random comes from the config's seed.

    Raises:
        ValueError: for whatever a config can get wrong, in one sentence.
    """
    optimizers.check(config)
    config = with_task(config)
    train, validation = rows(config)
    set_seed(config.seed)
    task = tasks.make(config, train, validation)
    if config.norm_momentum is not None:
        norms.set_momentum(task.model, config.norm_momentum)
    if config.freeze_norms:
        norms.freeze_norms(task.model)
    plan = _plan(config, len(task.train))
    measures = retain.measures(config, task.processor)
    task.model = optimizers.adapt(task.model, config)
    sources = {"train": train.source, "validation": validation.source, "read_as": task.description}
    return Job(config, task, plan, optimizers.make(task.model, config, plan), sources, measures)


def _plan(config: Config, count: int) -> optimizers.Plan:
    per_epoch = max(1, math.ceil(math.ceil(count / config.batch_size) / config.accumulate))
    total = config.max_steps or math.ceil(config.epochs * per_epoch)
    if total < 1:
        raise ValueError(f"epochs {config.epochs:g} is not a single step: give more epochs, or max_steps")
    return optimizers.Plan(total, per_epoch)
