"""What users can get wrong with the optimizer: each with a sentence that names the thing, the value and the remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from nanoadam.gradients import SelectedGradient
from nanoadam.schedules import Intervals, Schedule
from nanoadam.shards import is_sharded_along, local, part_of
from nanoadam.slots import is_dense, saved_layout

FIXED = ("dense", "state_dtype", "capturable", "granularity", "transposed")
"""Options that state is made by: they stay what they are."""

WATCHED = (
    *FIXED, "density", "mask_interval", "criterion", "moments", "keep_zeros", "stochastic_rounding", "seed", "maximize",
    "grad_dtype",
)  # fmt: skip
"""Options that are checked when somebody has changed them. Schedulers change the others at every step."""

COUNTERS = ("steps", "refreshed_at", "active_density")
"""What a group keeps between steps."""

_warned: list[bool] = []

CRITERIA = ("smallest", "largest", "random", "gradient")
MOMENTS = ("carry", "reset")
GRANULARITIES = ("weight", "column")
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


def names(group: Mapping[str, Any], i: int) -> list[str]:
    """How messages call the parameters of a group."""
    own = group.get("param_names")
    if own and len(own) == len(group["params"]):
        return list(own)
    return [f"parameter {j} of group {i}" for j in range(len(group["params"]))]


def watched(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options of a group that are checked when they change."""
    return tuple(map(group.get, WATCHED))


def check_changes(group: Mapping[str, Any], before: tuple[Any, ...] | None, where: str) -> None:
    """Raise ValueError or TypeError for options that somebody has changed to what cannot be served."""
    missing = [name for name in ("lr", "betas", "eps", "weight_decay", *WATCHED, *COUNTERS) if name not in group]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing from {where}: add groups with optimizer.add_param_group(...)")
    if before is not None and before != watched(group):
        for name, old in zip(WATCHED, before, strict=True):
            if name in FIXED and group[name] != old:
                raise ValueError(
                    f"{name} of {where} was changed from {old!r} to {group[name]!r}, but its state was made by the old "
                    "value: make a new optimizer"
                )
        check_options(group, where)


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
    for name in ("keep_zeros", "stochastic_rounding", "maximize", "capturable", "dense", "transposed"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r} for {where}")
    for name, choices in (("criterion", CRITERIA), ("moments", MOMENTS), ("granularity", GRANULARITIES)):
        if options[name] not in choices and not (name == "criterion" and options[name] is None):
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {options[name]!r} for {where}")
    for name, dtypes in (("state_dtype", STATE_DTYPES), ("grad_dtype", GRAD_DTYPES)):
        if options[name] not in dtypes:
            raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {options[name]!r} for {where}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed!r} for {where}")


def check_release(gradient_release: object, release_bytes: object, local: object) -> None:
    """Raise ValueError or TypeError for an option of the optimizer as a whole that is out of range."""
    for name, value in (("gradient_release", gradient_release), ("local", local)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
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
        part_of(parameter, called)
        if options["granularity"] == "column" and is_sharded_along(parameter, 0 if options["transposed"] else 1):
            raise ValueError(
                f"{called} is sharded along its inputs, so no process has a whole column of it: use "
                "granularity='weight' for it"
            )
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "FlatParameter":
            raise TypeError(
                f"{called} was taken apart by DeepSpeed ZeRO-3 or FSDP1, which leave no rows to select from: shard the "
                "model with FSDP2 (fully_shard), or use nanoadam.distributed.replicate"
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


def check_flattened(before: Sequence[Tensor], group: Mapping[str, Any], where: str) -> None:
    """Raise TypeError if the matrices of a group were replaced by flat tensors, which would be dense ones."""
    now = group["params"]
    if before and now and not group["dense"] and all(parameter.dim() < 2 for parameter in now):
        known = {id(parameter) for parameter in before}
        if not any(id(parameter) in known for parameter in now) and sum(p.numel() for p in now) > 1:
            raise TypeError(
                f"somebody has replaced the {len(before)} matrices of {where} by flat tensors, as DeepSpeed ZeRO-1 and "
                "-2 do: there are no rows left to select from. Shard the model with FSDP2 (fully_shard), or use "
                "nanoadam.distributed.replicate"
            )


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raise TypeError for a sparse gradient."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name!r} is sparse; NanoAdam needs dense gradients: "
            "make its nn.Embedding with sparse=False, or train it with torch.optim.SparseAdam"
        )


def check_trained(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if all are frozen; warn if none has a gradient. Both train nothing."""
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"all {len(parameters)} parameters of this optimizer are frozen, so it would train nothing: "
            "set requires_grad on those to train, or make the optimizer after the model is as it shall be"
        )
    if parameters and all(parameter.grad is None for parameter in parameters):
        warnings.warn(
            f"step() found no gradient on any of the optimizer's {len(parameters)} parameters: are they those of the "
            "model that is trained, and was backward() called?",
            UserWarning,
            stacklevel=5,
        )


def several_processes() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def check_exchange(gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError if there are other processes and their gradients are not in the first of these.

    Warn where DistributedDataParallel has brought them, which then holds every gradient whole.
    """
    if not several_processes():
        return
    gradient = next((gradient for gradient in gradients if gradient is not None), None)
    if gradient is None:
        return
    exchanged = gradient._box.exchanged if isinstance(gradient, SelectedGradient) else None
    if exchanged == "copied" or (exchanged is None and gradient.untyped_storage().nbytes() > gradient.nbytes):
        size = sum(each.nbytes for each in gradients if each is not None)
        warnings.warn(
            f"DistributedDataParallel holds and sends gradients whole, {size / 1e9:.3g} GB of them for tensors that "
            "are selected from: call nanoadam.distributed.prepare_ddp(model, optimizer) before you wrap the model, or "
            "use nanoadam.distributed.replicate(model, optimizer) without the wrapper",
            UserWarning,
            stacklevel=6,
        )
    if exchanged == "":
        raise RuntimeError(
            f"there are {torch.distributed.get_world_size()} processes, but their gradients were not exchanged before "
            "step(), so their models would drift apart: use nanoadam.distributed.replicate(model, optimizer) or wrap "
            "the model in DistributedDataParallel; if each process shall step on its own gradients, or you exchange "
            "them yourself, use NanoAdam(local=True)"
        )


def warn_of_unsorted(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn, once in a process, where nobody has sorted the parameters: a new head may be among them."""
    if _warned:
        return
    matrices = [p for group in groups for p in group["params"] if not is_dense(p, group) and p.requires_grad]
    if len(matrices) > 1 and not any("roles" in group or group["dense"] for group in groups):
        _warned.append(True)
        warnings.warn(
            f"NanoAdam selects from all {len(matrices)} matrices it was given. A newly made head among them would stay "
            "mostly as it was drawn: use NanoAdam(nanoadam.param_groups(model)), which trains heads in full, or groups "
            "with dense=True",
            UserWarning,
            stacklevel=3,
        )


def check_parameter_state(name: str, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter's state does not fit it."""
    lay = saved_layout(parameter, group)
    each: tuple[int, ...] = tuple(local(parameter).shape) if lay is None else lay.shape
    expected: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": each, "exp_avg_sq": each}
    if lay is not None:
        expected |= {"index": (lay.places,), "entry_step": (lay.places,)}
    got = {part: tuple(state[part].shape) if part in state else None for part in expected}
    one = {**expected, "entry_step": (1,)}  # where moments are reset, all have entered together
    if got not in (expected, one):
        raise ValueError(
            f"the state of {name!r} does not fit its shape {tuple(parameter.shape)}: expected {expected}, got {got}; "
            "load it into the model that it was saved with"
        )


def check_state(groups: Sequence[Mapping[str, Any]], loaded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a `state_dict`, complete and with schedules, if it fits these groups.

    Raises:
        ValueError: if it was not made by NanoAdam for the parameters of these groups.
    """
    if not ("param_groups" in loaded and "state" in loaded):
        raise ValueError(f"an optimizer's state has 'state' and 'param_groups', got {sorted(loaded)}")
    sizes = [len(group["params"]) for group in groups]
    theirs = [len(group["params"]) for group in loaded["param_groups"]]
    if sizes != theirs:
        raise ValueError(f"the state was saved for groups of {theirs} parameters, but this optimizer has {sizes}")
    complete = []
    for i, (ours, saved) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
        for counter in COUNTERS:
            if counter not in saved:
                raise ValueError(f"the state was not saved by NanoAdam: {counter!r} is missing from its groups")
        group = {**{key: value for key, value in ours.items() if key not in ("params", *COUNTERS)}, **saved}
        if isinstance(group["density"], Mapping):
            group["density"] = Schedule(**group["density"])
        for option in ("state_dtype", "grad_dtype"):
            group[option] = getattr(torch, group[option], None) if isinstance(group[option], str) else group[option]
        check_options(group, f"group {i} of the saved state")
        shapes = group.pop("shapes", None) or [parameter.shape for parameter in ours["params"]]
        for parameter, name, key, shape in zip(ours["params"], names(ours, i), saved["params"], shapes, strict=True):
            if tuple(shape) != tuple(parameter.shape):
                raise ValueError(
                    f"the state of {name!r} was saved for a parameter of shape {tuple(shape)}, but it has "
                    f"{tuple(parameter.shape)}: load it into the model that it was saved with"
                )
            if loaded["state"].get(key):
                check_parameter_state(name, parameter, group, loaded["state"][key])
        complete.append(group)
    return complete
