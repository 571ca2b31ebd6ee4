"""A model spread over the processes of a run by PyTorch's FSDP2, and what is read and written of it as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from nanoadam.distributed.agreement import checksum
from nanoadam.finetuning import processes
from nanoadam.finetuning.config import Config
from nanoadam.shards import SHARDED, local

OPTIMIZERS = ("nanoadam", "adamw", "sgd")
"""Those whose state follows the weights' shards."""


def wanted(config: Config) -> bool:
    """Whether a run is to be spread; one process keeps all of it."""
    return config.shard and processes.count() > 1


def check(config: Config) -> None:
    """Refuse what does not go with it.

    Raises:
        ValueError: names the key.
    """
    if not wanted(config):
        return
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"shard spreads the state of {', '.join(OPTIMIZERS)}, not of {config.optimizer}: leave out --shard"
        )
    if config.autocast == "fp16":
        raise ValueError("shard does not go with autocast fp16: use --autocast bf16")
    if config.retain and config.task not in ("causal-lm", None):
        raise ValueError(f"retain measures {config.task} models that are whole: leave out --shard or --retain")


def shard(model: nn.Module) -> None:
    """Spread the weights, in place: block by block, as the model names its blocks."""
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(PartialState().device.type, (processes.count(),))
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    # What is outside of blocks would stay whole after a forward pass, and who reads weights would meet plain tensors.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate would wrap it in DDP


def sharded(model: nn.Module) -> bool:
    """Whether a model has been spread."""
    return any(isinstance(parameter, SHARDED) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process that calls it, which all must do."""
    if not isinstance(tensor, SHARDED):
        return tensor
    found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found.clone()  # it may be a part of something longer, which cannot be saved


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a spread model, whole, in the first process's memory; nothing on the others."""
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights are one tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            every = whole(tensor.detach())
            seen[id(tensor)] = every.cpu() if processes.first() else torch.empty(0)
        found[name] = seen[id(tensor)]
    return found if processes.first() else {}


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Give a tensor new values, of which each process has all."""
    if isinstance(target, SHARDED):
        value = _spread(value, target)
    target.copy_(value.to(target.device))


def _spread(value: Tensor, target: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    device = target.to_local().device
    return distribute_tensor(value.to(device), target.device_mesh, target.placements, src_data_rank=None)


def broken_weight(model: nn.Module) -> str | None:
    """The name of a weight that is not finite, on any process."""
    here = next((name for name, p in model.named_parameters() if not torch.isfinite(local(p)).all()), None)
    if not sharded(model):
        return here
    return next((name for name in processes.gathered(here) if name is not None), None)


def drifted(model: nn.Module) -> bool:
    """Whether replicas have other weights than each other."""
    if not processes.joined():
        return False
    found = [int(checksum(p)) for p in model.parameters() if p.requires_grad]
    return any(theirs != found for theirs in processes.gathered(found))


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer whose parameters are spread, as one process would save it."""
    state = optimizer.state_dict()
    return {**state, "state": {key: _whole_of(value) for key, value in state["state"].items()}}


def _whole_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: whole(part).cpu() if isinstance(part, Tensor) else part for name, part in state.items()}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take up a state that one process, replicas or shards have saved."""
    from nanoadam import NanoAdam

    if not isinstance(optimizer, NanoAdam):  # NanoAdam finds its own part
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {**state, "state": {key: _part_of(value, parameters[key]) for key, value in state["state"].items()}}
    optimizer.load_state_dict(state)


def _part_of(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {
        name: _spread(part, parameter)
        if isinstance(part, Tensor) and part.shape == parameter.shape and isinstance(parameter, SHARDED)
        else part
        for name, part in state.items()
    }
