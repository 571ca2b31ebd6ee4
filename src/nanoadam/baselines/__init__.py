"""The optimizers that NanoAdam is compared with, each made the same way: `make(name, model, lr, ...)`.

All get the same groups, those of `nanoadam.param_groups(model)`: where a method tells tensors apart, the head, norms
and biases are trained in full, whatever it does to the rest. `BASELINES[name].limits` says what a method cannot do,
for tables. Importing this imports none of the libraries behind it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from nanoadam.baselines import builders
from nanoadam.baselines.adapters import ADAPTERS, apply_lora, apply_oft, apply_rslora, apply_shira
from nanoadam.baselines.builders import Build, Common
from nanoadam.baselines.microadam import MicroAdam
from nanoadam.groups import param_groups
from nanoadam.optimizer import NanoAdam

__all__ = [
    "ADAPTERS", "BASELINES", "Baseline", "MicroAdam", "apply_lora", "apply_oft", "apply_rslora", "apply_shira",
    "baseline", "for_trainer", "make",
]  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """One method: how it is made, where it is from, and what it can do."""

    name: str
    title: str
    """For tables."""
    source: str
    """The paper, and the code that runs."""
    build: Build
    package: str | None = None
    """What has to be installed besides torch: the module's name."""
    release: bool = False
    """Gradients can be freed during the backward pass."""
    released_accumulation: bool = False
    """Several backward passes a step give the sum of their gradients with that, too. Without release all methods do."""
    cpu: bool = True
    """Runs without a GPU."""
    safe_checkpoint: bool = True
    """Its state goes through `torch.load(weights_only=True)` and continues bit for bit, which a test shows."""
    decay: str = "decoupled"
    """Weight decay: "decoupled" (each step takes the share lr * weight_decay off), or in words."""
    dense: str = "head, norms and biases"
    """Which tensors it trains in full, with the optimizer state of AdamW."""
    remark: str = ""
    """Whatever else a reader of a table has to know."""

    @property
    def limits(self) -> tuple[str, ...]:
        """What it cannot do, in words for a table's foot; empty if there is nothing."""
        said = [
            "" if self.release else "keeps all dense gradients until step()",
            "no accumulation with gradient release" if self.release and not self.released_accumulation else "",
            "" if self.cpu else "GPU only",
            "" if self.safe_checkpoint else "exact resume not shown",
            "" if self.decay == "decoupled" else f"weight decay is {self.decay}",
            self.remark,
        ]
        return tuple(text for text in said if text)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its own options, besides those of every method."""
        own = [p for p in inspect.signature(self.build).parameters.values() if p.name != "common"]
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):  # handed on to NanoAdam
            own += inspect.signature(NanoAdam).parameters.values()
        return tuple(p.name for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY)


_ALL = (
    Baseline(
        "nanoadam",
        "NanoAdam",
        "Zhou et al. 2025, arXiv 2506.21374; this library",
        builders.nanoadam,
        release=True,
        released_accumulation=True,
        decay="decoupled, on selected weights",
    ),
    Baseline("adamw", "AdamW", "Loshchilov & Hutter 2019; torch.optim.AdamW, fused", builders.adamw, dense="all"),
    Baseline("sgd", "SGD", "torch.optim.SGD", builders.sgd, decay="added to the gradient", dense="none"),
    Baseline(
        "adafactor",
        "Adafactor",
        "Shazeer & Stern 2018; torch.optim.Adafactor",
        builders.adafactor,
        dense="biases and other vectors, second moment only",
        remark="steps are relative to the size of the weights: needs a learning-rate grid of its own",
    ),
    Baseline(
        "adamw8bit",
        "AdamW 8-bit",
        "Dettmers et al. 2022; bitsandbytes, or torchao with backend='torchao'",
        builders.adamw8bit,
        package="bitsandbytes",
        dense="head, and tensors under 4096 weights; with torchao the latter only",
    ),
    Baseline(
        "galore",
        "GaLore",
        "Zhao et al. 2024; pytorch_optimizer.GaLore",
        builders.galore,
        package="pytorch_optimizer",
        dense="all but the matrices of linear layers",
        remark="eps is added before bias correction",
    ),
    Baseline(
        "apollo",
        "APOLLO",
        "Zhu et al. 2024; pytorch_optimizer.APOLLO",
        builders.apollo,
        package="pytorch_optimizer",
        decay="decoupled, times the bias correction",
        dense="all but the matrices of linear layers",
        remark="this implementation scales the projected gradient and projects it back, the paper scales the full one; "
        "an exact resume needs torch's random state restored",
    ),
    Baseline(
        "microadam",
        "MicroAdam",
        "Modoranu et al. 2024, arXiv 2405.15593; this library",
        builders.microadam,
    ),
    *(
        Baseline(
            name,
            title,
            f"{source}; peft",
            builders.adapters(name),
            package="peft",
            dense="a newly made head; with AdamW all that it trains",
            remark=f"trains adapters beside frozen weights, which `apply_{name}(model)` puts there",
        )
        for name, title, source in (
            ("lora", "LoRA", "Hu et al. 2022"),
            ("rslora", "rsLoRA", "Kalajdzievski 2023, arXiv 2312.03732"),
            ("shira", "SHiRA", "Bhardwaj et al. 2024, arXiv 2406.13175"),
            ("oft", "OFT", "Qiu et al. 2023, arXiv 2306.07280"),
        )
    ),
    Baseline(
        "flashadamw",
        "FlashAdamW",
        "Databricks AI Research 2026, arXiv 2602.23349; flashoptim.FlashAdamW",
        builders.flashadamw,
        package="flashoptim",
        release=True,
        cpu=False,
        safe_checkpoint=False,
        dense="none",
        remark="moments in 8 bits for all tensors, weights kept to 24 bits",
    ),
)

BASELINES: dict[str, Baseline] = {entry.name: entry for entry in _ALL}
"""Every method by its name."""


def baseline(name: str) -> Baseline:
    """A method by its name.

    Raises:
        ValueError: if it is unknown.
    """
    if name not in BASELINES:
        raise ValueError(f"optimizer {name!r} is unknown: choose from {', '.join(BASELINES)}")
    return BASELINES[name]


def make(
    name: str,
    params: nn.Module | Iterable[dict[str, Any]],
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    head_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer of `BASELINES` for a model, configured as the NanoAdam paper does unless told otherwise.

    Args:
        name: in `BASELINES`.
        params: the model, on the device it will be trained on; or groups as from `nanoadam.param_groups(model)`.
        lr: learning rate.
        betas: decay of the first and second moment, for Adam's relatives (not `sgd` and `adafactor`).
        eps: added to the root of the second moment, likewise.
        weight_decay: for matrices, embeddings and heads of a model; groups bring their own.
        head_lr: learning rate of a model's head, as in `nanoadam.param_groups`; groups bring their own. Every method
            takes it; with LoRA it is that of the head beside the adapters.
        options: of that method, see `BASELINES[name].options`.

    Raises:
        ValueError: for an unknown name or option, parameters that the method cannot train, or `head_lr` for groups
            or for a model without a head.
        ImportError: if a library is missing; says how to get it.
    """
    chosen = _checked(name, options)
    model: nn.Module | None = None
    if isinstance(params, nn.Module):
        model, groups = params, list(param_groups(params, weight_decay=weight_decay, head_lr=head_lr))
    elif head_lr is None:
        groups = list(params)
    else:
        raise ValueError(f"head_lr={head_lr!r} is for a model: for groups say param_groups(model, head_lr=...)")
    # Optimizers write into the dicts they are given.
    return chosen.build(Common([dict(group) for group in groups], model, lr, betas, eps, weight_decay), **options)


def for_trainer(name: str, lr: float | Tensor, **options: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What transformers' `Trainer(optimizer_cls_and_kwargs=...)` takes, with everything `make` takes.

    The Trainer calls the first part without arguments, and what that returns with its model, once the model is on its
    device. For NanoAdam, `nanoadam.for_trainer` checks more, and earlier.

    Raises:
        ValueError: for an unknown name or option.
    """
    common = inspect.signature(make).parameters
    _checked(name, {option: value for option, value in options.items() if option not in common})
    return functools.partial(functools.partial, make, name), {"lr": lr, **options}


def _checked(name: str, options: Mapping[str, Any]) -> Baseline:
    chosen = baseline(name)
    unknown = sorted(options.keys() - set(chosen.options))
    if unknown:
        takes = f"it takes {', '.join(chosen.options)}" if chosen.options else "it has none of its own"
        raise ValueError(f"{name} has no option {unknown[0]!r}: {takes}")
    return chosen
