"""How each optimizer is made from the same groups, with the settings of the NanoAdam paper as defaults."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from nanoadam.baselines.adapters import has_adapters
from nanoadam.baselines.microadam import MicroAdam
from nanoadam.optimizer import NanoAdam

Build: TypeAlias = Callable[..., Optimizer]
Group: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """What every method is given."""

    groups: list[Group]
    model: nn.Module | None
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def adam(self) -> dict[str, Any]:
        """The arguments that all relatives of Adam take by these names."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return [parameter for group in self.groups for parameter in group["params"]]


def _library(method: str, module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{method} needs {module.partition('.')[0]}: pip install {install}") from error


_EXTRA = "'nanoadam[baselines]'"


def nanoadam(common: Common, **options: Any) -> Optimizer:
    """NanoAdam; takes all of its options."""
    return NanoAdam(common.groups, **common.adam, **options)


def adamw(common: Common) -> Optimizer:
    """Torch's AdamW, fused where torch has a kernel for it. Moments in the weights' dtype."""
    fused = all(parameter.device.type in ("cuda", "cpu", "xpu") for parameter in common.parameters)
    return torch.optim.AdamW(common.groups, **common.adam, fused=fused)


def sgd(common: Common, *, momentum: float = 0.0) -> Optimizer:
    """Torch's SGD."""
    return torch.optim.SGD(common.groups, lr=common.lr, momentum=momentum, weight_decay=common.weight_decay)


def adafactor(common: Common, *, beta2_decay: float = -0.8, clip: float = 1.0) -> Optimizer:
    """Torch's Adafactor; `clip` is its d."""
    groups = common.groups
    return torch.optim.Adafactor(
        groups, lr=common.lr, weight_decay=common.weight_decay, beta2_decay=beta2_decay, d=clip
    )


def adamw8bit(common: Common, *, backend: str = "bitsandbytes") -> Optimizer:
    """AdamW with moments in 8 bits: bitsandbytes, dense groups in 32 bits; or torchao, all but small tensors."""
    if backend == "torchao":
        library = _library("adamw8bit with backend='torchao'", "torchao.optim", _EXTRA)
        return cast(Optimizer, library.AdamW8bit(common.groups, **common.adam))
    if backend != "bitsandbytes":
        raise ValueError(f"backend must be 'bitsandbytes' or 'torchao', got {backend!r}")
    _library("adamw8bit", "bitsandbytes", _EXTRA)
    return cast(Optimizer, _bitsandbytes()(common.groups, **common.adam))


@functools.cache
def _bitsandbytes() -> Any:
    """Bitsandbytes' AdamW8bit, with the state of dense groups in 32 bits.

    Its own way to that is a singleton that outlives the optimizer and takes parameters by their address.
    """
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]
        def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": 32} if group.get("dense") else config

    return AdamW8bit


def galore(common: Common, *, rank: int = 256, update_interval: int = 200, scale: float = 1.0) -> Optimizer:
    """GaLore on the matrices of linear layers, AdamW on the rest.

    rank: of the projection; a smaller side of a matrix limits it.
    update_interval: steps between new projectors.
    scale: of the update after it is projected back.
    """
    library = _pytorch_optimizer("galore")
    projection = {"rank": rank, "update_proj_gap": update_interval, "scale": scale, "projection_type": "std"}
    return cast(Optimizer, library.GaLore(_low_rank(common.groups, projection), **common.adam))


def apollo(
    common: Common,
    *,
    rank: int = 256,
    update_interval: int = 200,
    scale: float = 1.0,
    scale_type: str = "channel",
) -> Optimizer:
    """APOLLO on the matrices of linear layers, AdamW on the rest; options as for `galore`, and what shares a factor."""
    library = _pytorch_optimizer("apollo")
    projection = {"rank": rank, "update_proj_gap": update_interval, "scale": scale, "projection_type": "random"}
    groups = _low_rank(common.groups, projection)
    return cast(Optimizer, library.APOLLO(groups, **common.adam, scale_type=scale_type))


def _pytorch_optimizer(method: str) -> Any:
    library = _library(method, "pytorch_optimizer", _EXTRA)
    projector = importlib.import_module("pytorch_optimizer.optimizer.utils.galore").GaLoreProjector
    torch.serialization.add_safe_globals([projector])  # lies in the state: otherwise weights_only=True refuses it
    return library


def _low_rank(groups: list[Group], projection: dict[str, Any]) -> list[Group]:
    """The groups, with linear layers' matrices in groups of their own that carry the options of the projection.

    GaLore's and APOLLO's authors project attention and MLP only: embeddings and heads stay whole.
    """
    found: list[Group] = []
    for group in groups:
        roles = group.get("roles") or ["matrix"] * len(group["params"])
        chosen = [
            not group.get("dense", False) and role == "matrix" and parameter.dim() == 2
            for role, parameter in zip(roles, group["params"], strict=True)
        ]
        for wanted, own in ((True, projection), (False, {})):
            part = {**group, **own}
            for key in ("params", "param_names", "roles"):
                if key in group:
                    part[key] = [
                        item for item, is_chosen in zip(group[key], chosen, strict=True) if is_chosen == wanted
                    ]
            if part["params"]:
                found.append(part)
    return found


def microadam(
    common: Common,
    *,
    density: float = 0.01,
    window: int = 10,
    block_size: int = 4096,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> Optimizer:
    """MicroAdam with the paper's window of 10 gradients of 1 %."""
    return MicroAdam(
        common.groups,
        **common.adam,
        density=density,
        window=window,
        block_size=block_size,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
    )


def adapters(name: str) -> Build:
    """What trains the adapters of a method."""

    def build(common: Common, *, trainer: str = "adamw", **options: Any) -> Optimizer:
        """By "adamw" or "nanoadam"; options are that one's."""
        if common.model is not None and not has_adapters(common.model):
            raise ValueError(
                f"{name} trains adapters, and this model has none: pass it through apply_{name}(model) first"
            )
        if trainer == "adamw":
            if options:
                raise ValueError(f"{name} with AdamW has no option {next(iter(options))!r}")
            return adamw(common)
        if trainer == "nanoadam":
            return nanoadam(common, **options)
        raise ValueError(f"trainer must be 'adamw' or 'nanoadam', got {trainer!r}")

    return build


def flashadamw(common: Common, *, master_weight_bits: int | None = 24, release: bool = False) -> Optimizer:
    """Flashoptim's AdamW; with `release` it steps during the backward pass, and step() does nothing.

    master_weight_bits: of weights, their own 16 included; in float32 they have 32. None: no more than they have.
    """
    devices = {parameter.device.type for parameter in common.parameters}
    if devices != {"cuda"}:
        raise ValueError(f"flashadamw trains on CUDA devices only, and there are parameters on {', '.join(devices)}")
    library = _library("flashadamw", "flashoptim", "flashoptim")
    if all(parameter.dtype == torch.float32 for parameter in common.parameters):
        master_weight_bits = None  # flashoptim refuses to be asked for bits where no weight lacks any
    optimizer = library.FlashAdamW(common.groups, **common.adam, master_weight_bits=master_weight_bits)
    if release:
        if common.model is None:
            raise ValueError("flashadamw with release=True needs the model, not its groups")
        optimizer.release_handle = library.enable_gradient_release(common.model, optimizer)
    return cast(Optimizer, optimizer)
