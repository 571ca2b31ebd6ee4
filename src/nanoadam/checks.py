"""What users can get wrong with the optimizer: each with a sentence that names the thing, the value and the remedy."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from nanoadam.chunks import layout
from nanoadam.schedules import Intervals, Schedule

_SHARDED: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    _SHARDED = (DTensor,)

CRITERIA = ("smallest", "largest", "random", "gradient")
MOMENTS = ("carry", "reset")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.bfloat16, torch.float32)
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def label(group: Mapping[str, Any], i: int) -> str:
    """How messages call a parameter group: by its number and the name of its first parameter."""
    names = group.get("param_names")
    if not names:
        first = next(iter(group["params"]), None) if isinstance(group["params"], list) else None
        names = [first[0]] if isinstance(first, tuple) else None
    return f"group {i} ({names[0]!r}...)" if names else f"group {i}"


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError or TypeError for an option out of range. `where` names the group."""

    def number(name: str, low: float, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "cpu":
            return  # reading it would wait for the device
        valid = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)} for {where}")
        if not valid or not low <= float(value) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least {low:g}, got {value!r} for {where}")

    number("lr", 0.0, options["lr"])
    number("eps", 0.0, options["eps"])
    number("weight_decay", 0.0, options["weight_decay"])
    betas = options["betas"]
    if not (
        isinstance(betas, (tuple, list))
        and len(betas) == 2
        and all(isinstance(beta, (int, float, Tensor)) and 0.0 <= float(beta) < 1.0 for beta in betas)
    ):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r} for {where}")
    density = options["density"]
    if not isinstance(density, Schedule) and not (
        isinstance(density, (int, float)) and not isinstance(density, bool) and 0.0 < density <= 1.0
    ):
        raise ValueError(
            f"density must be in (0, 1] or a schedule such as nanoadam.linear(...), got {density!r} for {where}"
        )
    interval = options["mask_interval"]
    if isinstance(interval, Intervals):
        interval = interval.mask_interval
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"mask_interval must be a whole number of at least 1, got {interval!r} for {where}")
    for name in ("keep_zeros", "stochastic_rounding", "maximize", "capturable", "dense"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r} for {where}")
    for name, choices in (("criterion", CRITERIA), ("moments", MOMENTS)):
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {options[name]!r} for {where}")
    for name, dtypes in (("state_dtype", STATE_DTYPES), ("grad_dtype", GRAD_DTYPES)):
        if options[name] not in dtypes:
            raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {options[name]!r} for {where}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r} for {where}")


def check_release(max_grad_norm: object, gradient_release: object, release_bytes: object) -> None:
    """Raise ValueError or TypeError for an option of the optimizer as a whole that is out of range."""
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):  # type: ignore[operator]
        raise ValueError(f"max_grad_norm must be positive, or None for no clipping; got {max_grad_norm!r}")
    if not isinstance(gradient_release, bool):
        raise TypeError(f"gradient_release must be True or False, got {gradient_release!r}")
    count = isinstance(release_bytes, int) and not isinstance(release_bytes, bool)
    if release_bytes is not None and not (count and release_bytes >= 0):  # type: ignore[operator]
        raise ValueError(f"release_bytes must be a number of bytes of at least 0, or None; got {release_bytes!r}")


def check_parameters(parameters: Any, options: Mapping[str, Any], where: str) -> None:
    """Raise TypeError or ValueError for a parameter that the optimizer cannot serve."""
    if not isinstance(parameters, list):
        return  # torch refuses it
    names = options.get("param_names") or [None] * len(parameters)
    for i, (parameter, name) in enumerate(zip(parameters, names, strict=False)):
        if isinstance(parameter, tuple) and len(parameter) == 2:
            name, parameter = parameter
        if not isinstance(parameter, Tensor):
            continue  # torch refuses it
        called = f"parameter {name!r}" if name else f"parameter {i} of {where}"
        if isinstance(parameter, _SHARDED):
            raise TypeError(
                f"{called} is a DTensor; NanoAdam does not train sharded parameters yet: "
                "replicate them (DDP with gradient_release=False) or use another optimizer"
            )
        if isinstance(parameter, UninitializedParameter):
            raise TypeError(f"{called} has no shape yet; run the model once before making the optimizer")
        if parameter.layout != torch.strided:
            raise TypeError(f"{called} is stored as {parameter.layout}; make it dense: parameter.to_dense()")
        if parameter.dtype not in WEIGHT_DTYPES:
            kind = "complex" if parameter.is_complex() else str(parameter.dtype).removeprefix("torch.")
            raise TypeError(
                f"{called} is {kind}; NanoAdam trains float32, bfloat16 and float16 weights: "
                "convert it (model.to(torch.bfloat16)) or leave it out of the optimizer"
            )
        if options["capturable"] and parameter.device.type == "cpu":
            raise ValueError(f"{called} is on the CPU; capturable=True is for CUDA graphs: use capturable=False")


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raise TypeError for a sparse gradient."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name!r} is sparse; NanoAdam needs dense gradients: "
            "make its nn.Embedding with sparse=False, or train it with torch.optim.SparseAdam"
        )


def warn_of_altered_gradients(held: int) -> None:
    """Warn that gradients in `p.grad` were changed, but not those held for so many tensors; called by `step()`."""
    if _trainer_takes_the_norm():
        return
    warnings.warn(
        "the gradients of dense tensors were changed after backward, as torch.nn.utils.clip_grad_norm_ and "
        f"model.zero_grad(set_to_none=False) do, but not those of {held} selected tensor{'s' * (held > 1)}, which "
        "NanoAdam holds. To zero all of them, use optimizer.zero_grad(); to clip them, "
        "NanoAdam(max_grad_norm=...); under transformers' Trainer that is TrainingArguments(max_grad_norm=0) with "
        "nanoadam.for_trainer(..., max_grad_norm=...). Or leave them in p.grad: gradient_release=False",
        UserWarning,
        stacklevel=6,  # past step() and the wrappers that torch has around it
    )


def _trainer_takes_the_norm() -> bool:
    """Whether transformers' Trainer is stepping with max_grad_norm=0.

    It then clips to infinity to learn the norm: that writes to every gradient and changes none, which its user cannot
    help, and which nothing but the Trainer's arguments tells from clipping.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "transformers.trainer":
            arguments: Any = getattr(frame.f_locals.get("self"), "args", None)
            if hasattr(arguments, "max_grad_norm"):
                return not (arguments.max_grad_norm or 0) > 0
    return False


def check_state(groups: Sequence[Mapping[str, Any]], loaded: Mapping[str, Any]) -> None:
    """Raise ValueError if a `state_dict` was not made by NanoAdam for the parameters of these groups."""
    if not ("param_groups" in loaded and "state" in loaded):
        raise ValueError(f"an optimizer's state has 'state' and 'param_groups', got {sorted(loaded)}")
    sizes = [len(group["params"]) for group in groups]
    theirs = [len(group["params"]) for group in loaded["param_groups"]]
    if sizes != theirs:
        raise ValueError(f"the state was saved for groups of {theirs} parameters, but this optimizer has {sizes}")
    for i, (ours, group) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
        if "active_density" not in group:
            raise ValueError("the state was not saved by NanoAdam: 'active_density' is missing from its groups")
        names = ours.get("param_names") or [f"parameter {j} of group {i}" for j in range(sizes[i])]
        for parameter, name, key in zip(ours["params"], names, group["params"], strict=True):
            state = loaded["state"].get(key)
            if not state:
                continue
            dense = group["dense"] or parameter.dim() < 2
            count = parameter.numel() if dense else layout(parameter.shape, group["active_density"]).selected
            ages = {count} if group["moments"] == "carry" else {1, count}
            expected = {"step": {1}, "exp_avg": {count}, "exp_avg_sq": {count}}
            expected |= {} if dense else {"index": {count}, "born": ages}
            got = {part: state[part].numel() if part in state else None for part in expected}
            if any(got[part] not in sizes_ for part, sizes_ in expected.items()):
                raise ValueError(
                    f"the saved state of {name!r} does not fit its shape {tuple(parameter.shape)}: expected {count} "
                    f"entries, got {got}; load it into the model it was saved with"
                )
