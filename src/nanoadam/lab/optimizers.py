"""The optimizers that `finetune` and `compare` know: a name, and how it is made from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

import nanoadam
from nanoadam.lab.config import Config
from nanoadam.lab.runs import nearest
from nanoadam.schedules import Schedule

Made: TypeAlias = "tuple[type[Optimizer], dict[str, Any]]"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long the run is, in optimizer steps."""

    total_steps: int
    steps_per_epoch: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an optimizer is made, and whether it clips by itself (otherwise the Trainer does)."""

    make: Callable[[nn.Module, Config, Plan], Made]
    clips: bool = False


def _nanoadam(model: nn.Module, config: Config, plan: Plan) -> Made:
    recommended = nanoadam.recommended_intervals(plan.steps_per_epoch)
    density: float | Schedule = config.density
    if config.density_end is not None and config.density_schedule != "constant":
        shape = nanoadam.cosine if config.density_schedule == "cosine" else nanoadam.linear
        interval = config.density_interval or recommended.density_interval
        density = shape(config.density, config.density_end, total_steps=plan.total_steps, interval=interval)
    return nanoadam.for_trainer(
        model,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        density=density,
        mask_interval=config.mask_interval or recommended.mask_interval,
        moments=config.moments,
        state_dtype=getattr(torch, config.state_dtype),
        stochastic_rounding=config.stochastic_rounding,
        gradient_release=config.gradient_release,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )


def _adamw(model: nn.Module, config: Config, plan: Plan) -> Made:
    groups = nanoadam.param_groups(model, weight_decay=config.weight_decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW, {"params": groups, "lr": config.learning_rate, "betas": betas, "eps": config.eps}


def _sgd(model: nn.Module, config: Config, plan: Plan) -> Made:
    groups = nanoadam.param_groups(model, weight_decay=config.weight_decay)
    return torch.optim.SGD, {"params": groups, "lr": config.learning_rate, "momentum": config.beta1}


OPTIMIZERS: dict[str, Recipe] = {
    "nanoadam": Recipe(_nanoadam, clips=True),
    "adamw": Recipe(_adamw),
    "sgd": Recipe(_sgd),
}
"""By the name that `optimizer` takes."""


def recipe(name: str) -> Recipe:
    """An optimizer by its name.

    Raises:
        ValueError: if it is unknown; names the nearest.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown{nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]
