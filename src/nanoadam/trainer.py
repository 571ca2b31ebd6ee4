"""NanoAdam under transformers' Trainer, without importing transformers.

The Trainer makes the optimizer when training begins, from the model as it is then: with its adapters, from `model_init`
or from a model's name. Its schedule, clipping (`max_grad_norm`), accumulation and loss scaling work as with AdamW.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from nanoadam import checks
from nanoadam.checks import several_processes
from nanoadam.distributed import prepare_ddp
from nanoadam.groups import Overrides, check_head_lr, param_groups
from nanoadam.optimizer import NanoAdam

OF_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
"""Options that TrainingArguments has under another name; betas it has as two."""


class TrainerFactory:
    """What makes the optimizer. transformers calls `TrainerFactory()(model, **kwargs)`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.0,
        dense: Overrides = (),
        selected: Overrides = (),
        head_lr: float | None = None,
        granularity: str = "weight",
        **options: Any,
    ) -> NanoAdam:
        """NanoAdam on `param_groups(model)`. If the model is wrapped in DDP next, only selected entries travel."""
        sorting: dict[str, Any] = {"weight_decay": weight_decay, "dense": dense, "selected": selected}
        groups = param_groups(model, **sorting, head_lr=head_lr, granularity=granularity)
        optimizer = NanoAdam(groups, **options)
        if several_processes() and not isinstance(model, nn.parallel.DistributedDataParallel):
            prepare_ddp(model, optimizer)
        return optimizer


def for_trainer(
    *,
    args: Any = None,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    dense: Overrides = (),
    selected: Overrides = (),
    head_lr: float | None = None,
    **options: Any,
) -> tuple[type[TrainerFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes. It names no model, so one may serve several Trainers.

    Args:
        args: TrainingArguments, to take learning rate, weight decay, betas and epsilon from, unless given here.
        lr: the learning rate at the top of the Trainer's schedule; 1e-4 without `args`, which is warned of.
        weight_decay: for matrices, embeddings and heads; as in `param_groups`.
        dense, selected: as in `param_groups`.
        head_lr: of the newly made head, at the top of the same schedule; as in `param_groups`.
        options: of `NanoAdam`: density, mask_interval, ...

    Returns:
        `(TrainerFactory, {"lr": lr, ...})`.

    Raises:
        ValueError, TypeError: for an option that cannot be served, at once and not when training begins.
    """
    if isinstance(args, nn.Module):
        raise TypeError("for_trainer takes no model any more, the Trainer gives it its own: for_trainer(density=...)")
    given = dict(options)
    if lr is not None:
        given["lr"] = lr
    if weight_decay is not None:
        given["weight_decay"] = weight_decay
    if args is not None:
        theirs = {ours: getattr(args, name) for ours, name in OF_ARGUMENTS.items()}
        given = {**theirs, "betas": (args.adam_beta1, args.adam_beta2), **given}
    known = inspect.signature(NanoAdam).parameters
    unknown = sorted(given.keys() - known.keys() | given.keys() & {"params"})
    if unknown:
        raise TypeError(f"NanoAdam has no option {unknown[0]!r}: see help(nanoadam.NanoAdam) for those it has")
    if "lr" not in given:
        given["lr"] = known["lr"].default
        warnings.warn(
            f"nanoadam.for_trainer was given no learning rate: it uses {given['lr']:g}, whatever TrainingArguments "
            "say. Pass args=training_args, or lr=",
            UserWarning,
            stacklevel=2,
        )
    complete = {name: given.get(name, option.default) for name, option in known.items() if name != "params"}
    checks.check_release(*(complete[name] for name in ("gradient_release", "release_bytes", "local")))
    checks.check_options({**complete, "dense": False, "transposed": False}, "every group")
    check_head_lr(head_lr)
    return TrainerFactory, {**given, "dense": dense, "selected": selected, "head_lr": head_lr}
