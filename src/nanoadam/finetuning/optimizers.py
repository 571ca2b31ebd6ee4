"""The optimizers that `finetune`, `compare` and `bench` know, those of `nanoadam.baselines`, made from a config."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

import nanoadam
from nanoadam import baselines
from nanoadam.baselines import ADAPTERS, BASELINES
from nanoadam.finetuning.config import Config
from nanoadam.schedules import Schedule
from nanoadam.text import nearest

Options: TypeAlias = dict[str, Any]
Made: TypeAlias = "tuple[Any, dict[str, Any]]"
"""What the Trainer takes as `optimizer_cls_and_kwargs`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long the run is, in optimizer steps."""

    total_steps: int
    steps_per_epoch: int


def method(name: str) -> baselines.Baseline:
    """An optimizer by its name.

    Raises:
        ValueError: if it is unknown; names the nearest.
    """
    if name not in BASELINES:
        raise ValueError(f"optimizer {name!r} is unknown{nearest(name, BASELINES)}")
    return BASELINES[name]


TYPICAL = {
    "nanoadam": 5e-4, "adamw": 4e-5, "adamw8bit": 4e-5, "flashadamw": 4e-5, "microadam": 4e-5, "galore": 1e-4,
    "apollo": 1e-4, "adafactor": 3e-4, "lora": 3e-4, "rslora": 2e-4, "shira": 5e-4, "oft": 5e-4, "sgd": 1e-2,
}  # fmt: skip
"""Learning rates that were about right in runs of `TYPICAL_STEPS`; that of nanoadam at a density of 10 %."""

TYPICAL_STEPS = 1500
SHORTENED = 1 / 3
"""A run of an eighth of the steps takes steps of twice the length."""


IMAGES = 9.0
"""Rates of image classifiers, as far as they were tried (MobileNetV1): so many times as large, at any length."""


def typical(config: Config, steps: int = TYPICAL_STEPS) -> float:
    """A learning rate that is about right for the optimizer, the length of a run and images or text.

    It goes with the inverse root of the density and, of text, the inverse cube root of the steps:
    docs/results/defaults.md.
    """
    rate = TYPICAL.get(config.optimizer, 1e-4)
    if config.task == "image-classification":
        rate *= IMAGES
    else:
        rate *= (TYPICAL_STEPS / min(max(steps, 20), 20_000)) ** SHORTENED
    if config.optimizer == "nanoadam":
        rate *= (0.1 / max(config.densities[0], 1e-3)) ** 0.5
    return float(f"{rate:.2g}")


def by_nanoadam(config: Config) -> bool:
    """Whether it is NanoAdam that trains, be it adapters: it clips by itself, and the keys of nanoadam count."""
    return config.optimizer == "nanoadam" or options(config).get("trainer") == "nanoadam"


def options(config: Config) -> Options:
    """The optimizer's own options, those given and those that follow from other keys."""
    given = parse(config.optimizer_options).get(config.optimizer, {})
    implied: dict[str, Options] = {
        "sgd": {"momentum": config.beta1},
        "microadam": {"seed": config.seed},
        **{name: {"trainer": "adamw"} for name in ADAPTERS},
        "shira": {"trainer": "adamw", "seed": config.seed},
    }
    return {**implied.get(config.optimizer, {}), **given}


def check(config: Config) -> None:
    """Refuse, before anything is read, an optimizer that could not be made later; tries it on a small layer.

    Raises:
        ValueError: for an unknown name or option, a value it does not take, or a device it does not run on.
        ImportError: if its library is missing; says how to get it.
    """
    chosen, own = method(config.optimizer), options(config)
    if own.get("release") and not chosen.released_accumulation and (config.accumulate > 1 or config.max_grad_norm):
        key = "max_grad_norm" if config.max_grad_norm else f"accumulate {config.accumulate}"
        raise ValueError(
            f"{chosen.name} with release steps in each backward pass, which rules out {key}: leave out one"
        )
    if by_nanoadam(config):
        adapt(_layers(config), config)
        return  # nanoadam.for_trainer checks its options itself
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    layer = _layers(config, device=device, dtype=getattr(torch, config.dtype))
    factory, arguments = _for_trainer(config)
    try:
        factory()(adapt(layer, config), **arguments)
    except (AssertionError, KeyError, TypeError) as error:  # whatever a library says to a value out of range
        raise ValueError(f"{chosen.name} cannot be made as configured: {error}") from error


def _layers(config: Config, **where: Any) -> nn.Module:
    """What a method is tried on: as wide as SHiRA's rank asks, which may not have more weights than a layer."""
    rank = options(config).get("rank") or 32
    wide = 4 if config.optimizer != "shira" or not 0 < rank < 512 else 2 * rank
    return nn.Sequential(nn.Linear(wide, wide, **where), nn.Linear(wide, wide, **where))


def adapt(model: nn.Module, config: Config) -> Any:
    """The model to be trained: with adapters where the method has them, otherwise as it is.

    Raises:
        ValueError: for a model that they cannot be put into.
    """
    if config.optimizer not in ADAPTERS:
        return model
    own = {key: value for key, value in options(config).items() if key in _of_adapters(config.optimizer)}
    return ADAPTERS[config.optimizer](model, **own)


def make(model: nn.Module, config: Config, plan: Plan) -> Made:
    """What the Trainer makes the optimizer from, for a model that went through `adapt`.

    Raises:
        ValueError: for what the model rules out: a learning rate for a head that it has not.
    """
    if config.head_learning_rate is not None:  # baselines would find out when the run has begun
        try:
            nanoadam.param_groups(model, head_lr=config.head_learning_rate)
        except ValueError as error:
            raise ValueError(str(error).replace("head_lr", "head_learning_rate")) from error
    return _nanoadam(config, plan) if by_nanoadam(config) else _for_trainer(config)


def _for_trainer(config: Config) -> Made:
    own = {key: value for key, value in options(config).items() if key not in _of_adapters(config.optimizer)}
    return baselines.for_trainer(
        config.optimizer,
        config.learning_rate if config.learning_rate is not None else typical(config),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        head_lr=config.head_learning_rate,
        **own,
    )


def _nanoadam(config: Config, plan: Plan) -> Made:
    recommended = nanoadam.recommended_intervals(plan.steps_per_epoch)
    start, end = config.densities
    density: float | Schedule = start
    if end is not None and config.density_schedule != "constant":
        shape = nanoadam.cosine if config.density_schedule == "cosine" else nanoadam.linear
        interval = config.density_interval or recommended.density_interval
        density = shape(start, end, total_steps=plan.total_steps, interval=interval)
    return nanoadam.for_trainer(
        lr=config.learning_rate if config.learning_rate is not None else typical(config, plan.total_steps),
        weight_decay=config.weight_decay,
        head_lr=config.head_learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        density=density,
        mask_interval=config.mask_interval or recommended.mask_interval,
        granularity=config.granularity,
        criterion=config.criterion,
        keep_zeros=config.keep_zeros,
        moments=config.moments,
        state_dtype=getattr(torch, config.state_dtype),
        stochastic_rounding=config.stochastic_rounding,
        gradient_release=config.gradient_release,
        grad_dtype=getattr(torch, config.grad_dtype),
        seed=config.seed,
    )


def about(config: Config) -> dict[str, Any]:
    """For the manifest: which method, whose code, with which options, and what it cannot do."""
    chosen = method(config.optimizer)
    return {
        "name": chosen.name,
        "title": chosen.title,
        "source": chosen.source,
        "options": options(config),
        "limits": list(chosen.limits),
    }


def limits(names: Iterable[str]) -> dict[str, list[str]]:
    """For the foot of a table: what each method cannot do, in words."""
    return {name: list(method(name).limits) for name in names}


def limit_lines(found: Mapping[str, list[str]]) -> list[str]:
    """The same, as text: a line for each method that there is something to say about."""
    return [f"{name}: {'; '.join(words)}" for name, words in found.items() if words]


# Options of a method as text: METHOD.OPTION=VALUE ---------------------------------------------------------


def _of_adapters(name: str) -> tuple[str, ...]:
    """Options of a method that are those of its adapters."""
    return tuple(inspect.signature(ADAPTERS[name]).parameters)[1:] if name in ADAPTERS else ()


def parse(texts: Iterable[str]) -> dict[str, Options]:
    """Options by method, from texts like "galore.rank=64".

    Raises:
        ValueError: for an unknown method or option, or a value that it does not take.
    """
    found: dict[str, Options] = {}
    for text in texts:
        whole, equals, value = text.partition("=")
        name, dot, option = whole.strip().partition(".")
        if not equals or not dot:
            raise ValueError(f"optimizer_options must be METHOD.OPTION=VALUE, like galore.rank=64, got {text!r}")
        known = _known(method(name))
        if name == "nanoadam":
            raise ValueError(f"{whole.strip()} is no optimizer option: nanoadam has keys of its own, like --density")
        if option not in known:
            has = nearest(option, known) if known else ": it has no options"
            raise ValueError(f"{name} has no option {option!r}{has}")
        found.setdefault(name, {})[option] = _value(whole.strip(), value.strip(), known[option])
    return found


def refuse_idle(texts: Iterable[str], used: Iterable[str]) -> None:
    """Refuse options of a method that is not run: they would change nothing, without a word.

    Args:
        texts: as `parse` takes them.
        used: the methods that are run.

    Raises:
        ValueError: names the option and what is run.
    """
    names = list(dict.fromkeys(used))
    for name, own in parse(texts).items():
        if name not in names:
            one = len(names) == 1
            run = f"the optimizer is {names[0]}" if one else f"the optimizers are {', '.join(names)}"
            way = f"take --optimizer {name}" if one else f"add {name} to them"
            raise ValueError(f"optimizer_options has {name}.{next(iter(own))}, and {run}: leave it out, or {way}")


def _known(chosen: baselines.Baseline) -> dict[str, tuple[type, ...]]:
    """What its options are called, and the types of values they take."""
    functions: list[Callable[..., Any]] = [chosen.build]
    if chosen.name in ADAPTERS:
        functions.append(ADAPTERS[chosen.name])
    found = {}
    for function in functions:
        for option, parameter in inspect.signature(function, eval_str=True).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and option not in ("common", "model"):
                kind = parameter.annotation
                found[option] = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return found


def _value(option: str, text: str, kinds: tuple[type, ...]) -> Any:
    if type(None) in kinds and text == "none":
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                number = kind(text)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
    if str in kinds:
        return text
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    raise ValueError(f"{option} must be {' or '.join(words[kind] for kind in kinds)}, got {text!r}")
