"""NanoAdam under transformers' Trainer, without importing transformers.

The Trainer clips by `TrainingArguments.max_grad_norm`, 1.0 by default, and sees only `p.grad`: with gradient release
those are the dense tensors' alone. Pass `max_grad_norm=0` there, give NanoAdam its own, and add
`nanoadam.callback.NanoAdamCallback`, which refuses a run where the Trainer would clip the wrong thing.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from nanoadam import checks
from nanoadam.groups import Overrides, param_groups
from nanoadam.optimizer import NanoAdam


def for_trainer(
    model: nn.Module,
    lr: float | Tensor = 1e-4,
    *,
    weight_decay: float = 0.0,
    dense: Overrides = (),
    selected: Overrides = (),
    head_lr: float | None = None,
    **options: Any,
) -> tuple[type[NanoAdam], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, with the groups of `param_groups(model)`.

    The learning rate and weight decay are these; those of TrainingArguments are not used. The schedule is the
    Trainer's. One call serves one Trainer, which takes the groups out of the dict. The model is the one that
    the Trainer gets: not with `model_init`, which makes another.

    Args:
        model: the model to finetune.
        lr: the learning rate at the top of the Trainer's schedule.
        weight_decay: for matrices, embeddings and heads; as in `param_groups`.
        dense: as in `param_groups`.
        selected: as in `param_groups`.
        head_lr: of the newly made head, at the top of the same schedule; as in `param_groups`.
        options: of `NanoAdam`: density, mask_interval, max_grad_norm, ...

    Returns:
        `(NanoAdam, {"params": groups, "lr": lr, ...})`.

    Raises:
        ValueError, TypeError: for an option or a model that cannot be served, at once and not when training begins.
    """
    groups = param_groups(model, weight_decay=weight_decay, dense=dense, selected=selected, head_lr=head_lr)
    unknown = sorted(options.keys() - inspect.signature(NanoAdam).parameters.keys())
    if unknown:
        raise TypeError(f"NanoAdam has no option {unknown[0]!r}: see help(nanoadam.NanoAdam) for those it has")
    given = inspect.signature(NanoAdam).bind(groups, lr=lr, weight_decay=weight_decay, **options)
    given.apply_defaults()
    checks.check_release(*(given.arguments[key] for key in ("max_grad_norm", "gradient_release", "release_bytes")))
    for i, group in enumerate(groups):
        settings = {**given.arguments, **group}
        checks.check_options(settings, checks.label(group, i))
        checks.check_parameters(group["params"], settings, checks.label(group, i))
    return NanoAdam, {"params": groups, "lr": lr, **options}
