"""What users can get wrong with the optimizer: each with a sentence that names the thing, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoadam.ops import Slot
from nanoadam.schedules import Schedule

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
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0.0 <= float(b) < 1.0 for b in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r} for {where}")
    density = options["density"]
    if not isinstance(density, Schedule) and not (
        isinstance(density, (int, float)) and not isinstance(density, bool) and 0.0 < density <= 1.0
    ):
        raise ValueError(
            f"density must be in (0, 1] or a schedule such as nanoadam.linear(...), got {density!r} for {where}"
        )
    interval = options["mask_interval"]
    if (
        isinstance(interval, bool)
        or not isinstance(interval, (int, tuple))
        or (isinstance(interval, int) and interval < 1)
    ):
        raise ValueError(f"mask_interval must be a whole number of at least 1, got {interval!r} for {where}")
    for name, choices in (("criterion", CRITERIA), ("moments", MOMENTS)):
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {options[name]!r} for {where}")
    for name, dtypes in (("state_dtype", STATE_DTYPES), ("grad_dtype", GRAD_DTYPES)):
        if options[name] not in dtypes:
            raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {options[name]!r} for {where}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r} for {where}")


def check_norm(max_grad_norm: object) -> None:
    """Raise ValueError unless it is None or a positive number."""
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be positive, or None for no clipping; got {max_grad_norm!r}")


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


def check_state(slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]], loaded: Mapping[str, Any]) -> None:
    """Raise ValueError if a `state_dict` was not made by NanoAdam for these parameters.

    `slots` are those of the present optimizer, by their ordinal; `groups` its groups.
    """
    from nanoadam.chunks import layout

    sizes = [len(group["params"]) for group in groups]
    theirs = [len(group["params"]) for group in loaded["param_groups"]]
    if sizes != theirs:
        raise ValueError(f"the state was saved for groups of {theirs} parameters, but this optimizer has {sizes}")
    by_ordinal = {slot.ordinal: slot for slot in slots}
    ordinal = 0
    for group in loaded["param_groups"]:
        if "active_density" not in group:
            raise ValueError("the state was not saved by NanoAdam: 'active_density' is missing from its groups")
        for key in group["params"]:
            ordinal += 1
            slot, state = by_ordinal.get(ordinal), loaded["state"].get(key)
            if slot is None or state is None:
                continue
            count = slot.weight.numel()
            if "index" in state:
                count = layout(slot.weight.shape, group["active_density"]).selected
            wrong = {
                n: tuple(state[n].shape)
                for n in ("exp_avg", "exp_avg_sq", "index")
                if n in state and state[n].numel() != count
            }
            if "exp_avg" not in state or "step" not in state or wrong:
                raise ValueError(
                    f"the saved state of {slot.name!r} does not fit its shape {tuple(slot.weight.shape)}: expected "
                    f"{count} entries, got {wrong or sorted(state)}; load it into the model it was saved with"
                )
