"""Every optimizer alone on the tensors of one model: state, time of a step and peak, and their ratio to AdamW's.

There is no forward pass: a backward pass hands each weight a random gradient, so that methods that release gradients
do so as in training, and what is measured beside weights and gradients is the optimizer's.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from nanoadam import NanoAdam
from nanoadam import memory as costs
from nanoadam.baselines import BASELINES
from nanoadam.comparing.shapes import MODELS, Shapes
from nanoadam.finetuning import folders, optimizers
from nanoadam.finetuning.config import Config
from nanoadam.gradients import gradient_bytes
from nanoadam.state import state_bytes
from nanoadam.text import nearest

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, how many are done, how many there are."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        shapes: the name of a model in `shapes.MODELS`; or else
        model: a folder or hub id, of which the config is read.
        optimizers: by name.
        optimizer_options: like "galore.rank=64".
        density: of NanoAdam.
        granularity: of NanoAdam: "weight" or "column".
        mask_interval: steps between NanoAdam's selections, over which the time of one is spread.
        dtype: of weights and gradients.
        device: "auto" or "cpu".
        repeats: timed steps of each.

    Raises:
        ValueError: for a name that is unknown, or not exactly one of shapes and model.
    """

    shapes: str | None = None
    model: str | None = None
    optimizers: tuple[str, ...] = tuple(BASELINES)
    optimizer_options: tuple[str, ...] = ()
    density: float = 0.01
    mask_interval: int = 100
    dtype: str = "bfloat16"
    device: str = "auto"
    repeats: int = 5
    granularity: str = "weight"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if (self.shapes is None) == (self.model is None):
            raise ValueError("give either --shapes (the name of a model) or --model (a folder or a hub id)")
        if self.shapes is not None and self.shapes not in MODELS:
            raise ValueError(f"shapes {self.shapes!r} are unknown{nearest(self.shapes, MODELS)}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        for name in self.optimizers:
            optimizers.method(name)
            self.config(name)
        optimizers.refuse_idle(self.optimizer_options, self.optimizers)

    def config(self, name: str) -> Config:
        """What `finetune` would be told to use this optimizer."""
        return Config(
            model=self.shapes or self.model or "",
            train="-",
            optimizer=name,
            optimizer_options=("sgd.momentum=0", *self.optimizer_options),
            density=self.density,
            granularity=self.granularity,
            mask_interval=self.mask_interval,
            dtype=self.dtype,
            device=self.device,
        )


def run(settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Measure one optimizer after the other, each on a model of its own.

    Returns:
        `{"settings", "weights", "table": [...], "left_out": {name: why}, "limits": {name: [...]}, ...}`; see `measure`.

    Raises:
        ValueError: if the model's config cannot be read, or not one of the optimizers runs here.
    """
    tell = progress or (lambda what, done, total: None)
    device = torch.device("cuda" if settings.device == "auto" and torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for done, name in enumerate(settings.optimizers):
        tell(name, done, len(settings.optimizers))
        config = settings.config(name)
        try:
            optimizers.check(config)
        except (ImportError, ValueError) as error:
            left_out[name] = str(error)
            continue
        model = make_model(settings, device)  # what is wrong with it is wrong with it for all
        try:
            rows.append(measure(model, config, settings.repeats))
        except (torch.OutOfMemoryError, ValueError) as error:
            left_out[name] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        del model
        _free(device)
    if not rows:
        raise ValueError(f"none of the optimizers runs here: {'; '.join(left_out.values())}")
    reference = next((row for row in rows if row["optimizer"] == "adamw"), None)
    if reference is not None:
        for row in rows:
            row["of_adamw"] = {key: row[key] / reference[key] for key in ("state_bytes", "peak_bytes", "ms")}
    return {
        "command": "nanoadam bench",
        **folders.environment(device=str(device)),
        "settings": dataclasses.asdict(settings),
        "peak": "most that was allocated" if device.type == "cuda" else "weights, gradients and state; nothing else",
        "table": rows,
        "left_out": left_out,
        "limits": optimizers.limits(row["optimizer"] for row in rows),
    }


def measure(model: nn.Module, config: Config, repeats: int) -> dict[str, Any]:
    """One optimizer's row.

    Its time of a step is that of `step()`, the median over `repeats`, of what it adds to the backward pass, the
    quickest with it against the quickest without (two numbers much larger than their difference, which other work on
    the machine would drown), and for NanoAdam the share of a selection that falls on one step. The first step, in
    which state and GaLore's and APOLLO's projections are made, stands apart.
    """
    model = optimizers.adapt(model, config)
    device = next(model.parameters()).device
    feed = _Feed(model)
    plain = min(_ms(feed, device) for _ in range(repeats + 1))
    model.zero_grad()
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    factory, arguments = optimizers.make(model, config, optimizers.Plan(10**6, 10**6))
    optimizer: Optimizer = factory()(model, **arguments)
    released = optimizers.by_nanoadam(config) or bool(optimizers.options(config).get("release"))
    gradients = 0

    def step() -> tuple[float, float]:
        nonlocal gradients
        backward = _ms(feed, device) - plain
        gradients = max(gradients, sum(gradient_bytes(p.grad) for p in model.parameters() if p.grad is not None))
        update = _ms(optimizer.step, device)
        optimizer.zero_grad()
        return update, max(0.0, backward) * released

    def steady() -> float:
        updates, added = zip(*(step() for _ in range(repeats)), strict=True)
        return float(statistics.median(updates) + min(added))

    row: dict[str, Any] = {
        "optimizer": config.optimizer,
        "title": BASELINES[config.optimizer].title,
        "first_ms": sum(step()),
        "ms": steady(),
    }
    if isinstance(optimizer, NanoAdam):
        for group in optimizer.param_groups:
            group["mask_interval"] = 1
        row["selection_ms"] = max(0.0, steady() - row["ms"])
        row["ms"] += row["selection_ms"] / (config.mask_interval or 1)
    weights, state = sum(p.nbytes for p in model.parameters()), state_bytes(optimizer)
    peak = torch.cuda.max_memory_allocated(device) - feed.nbytes if device.type == "cuda" else 0
    sizes = {"weight_bytes": weights, "gradient_bytes": gradients, "state_bytes": state}
    return {**row, **sizes, "peak_bytes": peak or sum(sizes.values()), "weights": _count(model)}


def _count(model: nn.Module) -> dict[str, int]:
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


class _Give(torch.autograd.Function):
    """Of a weight nothing, backward a copy of a given gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.clone(), None


class _Feed:
    """A backward pass that gives every trained weight a random gradient, the last weight first."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = [p for p in model.parameters() if p.requires_grad]
        most: dict[torch.dtype, int] = {}
        for p in self._weights:
            most[p.dtype] = max(most.get(p.dtype, 0), p.numel())
        device = self._weights[0].device
        self._source = {dtype: torch.randn(size, device=device).mul_(1e-3).to(dtype) for dtype, size in most.items()}
        self.nbytes = sum(source.nbytes for source in self._source.values())

    def __call__(self) -> None:
        apply: Callable[[Tensor, Tensor], Tensor] = _Give.apply
        given = [apply(p, self._source[p.dtype][: p.numel()].view(p.shape)) for p in self._weights]
        torch.stack(given).sum().backward()


def _ms(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Models --------------------------------------------------------------------------------------------------


def make_model(settings: Settings, device: torch.device) -> nn.Module:
    """The model of the settings, its weights random, its buffers not to be used."""
    if settings.model is None:
        model: nn.Module = Shaped(MODELS[str(settings.shapes)]())
    else:
        model = costs.from_config(settings.model)
    model = model.to(getattr(torch, settings.dtype)).to_empty(device=device)
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model


class Shaped(nn.Module):
    """Layers for the parameters of a shape table, without weights, and without a forward pass."""

    base_model_prefix = "base"  # what transformers' models have: heads are told by their names, not by their place

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, shape, _ in shapes:
            *path, leaf = name.split(".")
            parent: nn.Module = self
            for part in path[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if path[-1] not in parent._modules:
                parent.add_module(path[-1], _layer(path[-1], shape if leaf == "weight" else ()))
            parameter = nn.Parameter(torch.empty(shape, device="meta"))
            parent.get_submodule(path[-1]).register_parameter(leaf, parameter)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head of a language model, if it is not the embedding."""
        return self._modules.get("lm_head")


def _layer(name: str, shape: Sequence[int]) -> nn.Module:
    with torch.device("meta"):
        if len(shape) == 4:
            return nn.Conv2d(shape[1], shape[0], tuple(shape[2:]), bias=False)  # type: ignore[arg-type]
        if len(shape) == 2 and "embed" in name:
            return nn.Embedding(shape[0], shape[1])
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=False)
    return nn.Module()


# What is printed -----------------------------------------------------------------------------------------


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, the head first: a row per optimizer."""
    head = ("", "weights", "gradients", "state", "of AdamW", "peak", "of AdamW", "first step", "a step", "of AdamW")
    return [head, *(_line(row) for row in results["table"])]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    from nanoadam.text import size

    ratio = {key: f"{value:.2f}" for key, value in row.get("of_adamw", {}).items()}
    sizes = {key: size(row[key]) for key in ("weight_bytes", "gradient_bytes", "state_bytes", "peak_bytes")}
    return (
        row["optimizer"], sizes["weight_bytes"], sizes["gradient_bytes"],
        sizes["state_bytes"], ratio.get("state_bytes", "-"), sizes["peak_bytes"], ratio.get("peak_bytes", "-"),
        f"{row['first_ms']:.3g} ms", f"{row['ms']:.3g} ms", ratio.get("ms", "-"),
    )  # fmt: skip


def foot(results: dict[str, Any]) -> Iterable[str]:
    """What stands under the table: what the peak counts, what was left out and why, what each method cannot do."""
    yield f"peak: {results['peak']}"
    yield from (f"{name} left out: {why}" for name, why in results["left_out"].items())
    yield from optimizers.limit_lines(results["limits"])
