"""One experiment of the toy: pretraining, and finetuning by either rule, for many settings and seeds at once.

Zhou et al. 2025 (arXiv 2506.21374), section 2.3 and appendix E. What the paper leaves open is a key of `ToyConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoadam.paper.toy import network
from nanoadam.paper.toy.network import Choice, Course, Nets

__all__ = ["PAPER", "RULES", "Progress", "ToyConfig", "agrees", "run", "run_many", "theorem"]

RULES = ("small weights", "large gradients")
DIVERGED = 10.0
"""A test loss above this, or none at all. The task starts at about 0.5 for each neuron added."""

RESOLUTION = 1e-3

PAPER: dict[int, dict[str, dict[str, tuple[float, float]]]] = {
    1: {
        "small weights": {"test_loss": (0.0094, 0.012), "distance": (0.027, 0.0040)},
        "large gradients": {"test_loss": (0.017, 0.015), "distance": (0.057, 0.032)},
    },
    2: {
        "small weights": {"test_loss": (0.038, 0.040), "distance": (0.042, 0.0077)},
        "large gradients": {"test_loss": (0.063, 0.033), "distance": (0.097, 0.071)},
    },
}
"""Tables 8 and 9 by the number of extra neurons: mean and standard deviation over 10 seeds."""

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

_TOGETHER = 128  # networks per batch: more of them leave the cache, which makes each slower


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """One experiment: both rules on the same students, teachers and inputs.

    Args:
        extra: neurons added to the teacher, 1 (table 8) or 2 (table 9).
        neurons: choose whole neurons by |a| |w|, instead of weights in each layer by magnitude.
        once: choose at the first step and keep to it, instead of anew at every step.
        density: share of each layer (or of the neurons) that changes.
        loss_scale: the loss is this times the mean squared error: 1 as torch's MSELoss, 0.5 as in most derivations.
        pretrain_loss_scale: likewise while pretraining; small enough that the rate of 2 is stable.
        teacher: how its neurons are normalised, one of `network.TEACHERS`.
        init_scale: of the student's weights, times N(0, 1/n).
        samples: inputs to learn from, the same for both tasks; None for the exact mean over all.
        seeds: one student, teacher and set of inputs each.
        steps: of pretraining, and again of finetuning.
        pretrain_rate: the paper's 2.
        finetune_rate: the paper's 1.

    Raises:
        ValueError: for a value out of range.
    """

    extra: int = 1
    neurons: bool = False
    once: bool = False
    density: float = 0.3
    loss_scale: float = 0.25
    pretrain_loss_scale: float = 0.125
    teacher: str = "unit"
    init_scale: float = 1.0
    samples: int | None = None
    seeds: tuple[int, ...] = tuple(range(10))
    steps: int = 10_000
    pretrain_rate: float = 2.0
    finetune_rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.extra not in PAPER:
            raise ValueError(f"extra must be 1 or 2, got {self.extra}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.teacher not in network.TEACHERS:
            raise ValueError(f"teacher must be one of {', '.join(network.TEACHERS)}, got {self.teacher!r}")
        if not self.seeds:
            raise ValueError("the toy needs at least one seed, got none")

    @property
    def count(self) -> int:
        """How many neurons, or how many of a and half as many as of w."""
        return max(1, round(self.density * network.NEURONS))


class Pretrained(NamedTuple):
    """What both rules start from."""

    student: Nets
    teacher: Nets  # with both extra neurons
    inputs: Tensor | None
    test_loss: Tensor


def run(config: ToyConfig, progress: Progress | None = None) -> dict[str, Any]:
    """One experiment; see `run_many`."""
    return run_many([config], progress)[0]


def run_many(
    configs: Sequence[ToyConfig], progress: Progress | None = None, record: Iterable[int] = ()
) -> list[dict[str, Any]]:
    """Experiments, those that can be done at once at once.

    Args:
        configs: what to run.
        progress: called before each batch.
        record: numbers of finetuning steps after which to keep loss and distance.

    Returns:
        One dict for each config: `config`; `pretrain` with the `test_loss` of each seed; and under each of RULES a dict
        with `test_loss` (mean squared error over all inputs) and `distance` (l2 over all 60 parameters, divided by 60),
        each as `{"mean", "std", "values"}`, and `diverged`, how many seeds did; those are not in mean and std. With
        `record` also `curves`: `steps`, `test_loss` and `distance` as means over the seeds that did not diverge.
    """
    tell = progress or (lambda what, done, total: None)
    starts: dict[tuple[Any, ...], list[int]] = {}
    for index, config in enumerate(configs):
        starts.setdefault(_key(config), []).append(index)
    total, done = sum(len(c.seeds) for c in configs) * len(RULES), 0
    results: dict[int, dict[str, Any]] = {}
    for indices in starts.values():
        tell("pretraining", done, total)
        pretrained = pretrain(configs[indices[0]])
        for same in _alike(configs, indices):
            for batch in _batches(configs, same):
                tell("finetuning", done, total)
                found = _finetune([configs[i] for i in batch], pretrained, record)
                results.update(zip(batch, found, strict=True))
                done += sum(len(configs[i].seeds) for i in batch) * len(RULES)
    tell("done", done, total)
    return [results[index] for index in range(len(configs))]


def _key(config: ToyConfig) -> tuple[Any, ...]:
    """What pretraining depends on."""
    c = config
    return c.teacher, c.init_scale, c.samples, c.seeds, c.steps, c.pretrain_rate * c.pretrain_loss_scale


def _alike(configs: Sequence[ToyConfig], indices: list[int]) -> list[list[int]]:
    """Parted by what a batch has in common."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in indices:
        groups.setdefault((configs[i].extra, configs[i].neurons, configs[i].once), []).append(i)
    return list(groups.values())


def _batches(configs: Sequence[ToyConfig], indices: list[int]) -> list[list[int]]:
    size = max(1, _TOGETHER // (len(RULES) * len(configs[indices[0]].seeds)))
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def pretrain(config: ToyConfig) -> Pretrained:
    """Students of all seeds after they learned the two first neurons of their teachers."""
    student, teacher, inputs = network.draw(config.seeds, 2, config.teacher, config.init_scale, config.samples)
    rate = torch.full((len(config.seeds),), 2 * config.pretrain_loss_scale * config.pretrain_rate, dtype=torch.float64)
    course = network.descend(student, teacher.first(2), rate, config.steps, inputs=inputs)
    return Pretrained(course.end, teacher, inputs, network.test_loss(course.end, teacher.first(2)))


def course_of(configs: list[ToyConfig], pretrained: Pretrained, record: Iterable[int]) -> tuple[Nets, Nets, Course]:
    """Starts, teachers and course; networks by config, then by rule, then by seed."""
    first, cells = configs[0], [(config, rule) for config in configs for rule in RULES]

    def each(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(len(first.seeds))

    choice = Choice(
        by_gradient=each([rule == RULES[1] for _, rule in cells], torch.bool),
        keep=each([config.count for config, _ in cells], torch.long),
        neurons=first.neurons,
        once=first.once,
    )
    rate = each([2 * config.loss_scale * config.finetune_rate for config, _ in cells], torch.float64)
    start, teacher = pretrained.student.repeat(len(cells)), pretrained.teacher.first(2 + first.extra).repeat(len(cells))
    inputs = None if pretrained.inputs is None else pretrained.inputs.repeat(len(cells), 1, 1)
    return start, teacher, network.descend(start, teacher, rate, first.steps, choice, inputs, record)


def _finetune(configs: list[ToyConfig], pretrained: Pretrained, record: Iterable[int]) -> list[dict[str, Any]]:
    start, teacher, course = course_of(configs, pretrained, record)
    cells, seeds = [rule for _ in configs for rule in RULES], len(configs[0].seeds)
    losses = network.test_loss(course.end, teacher).view(len(cells), seeds)
    moved = network.distance(course.end, start).view(len(cells), seeds) / network.PARAMETERS
    results: list[dict[str, Any]] = [
        {"config": dataclasses.asdict(config), "pretrain": {"test_loss": pretrained.test_loss.tolist()}}
        for config in configs
    ]
    for cell, rule in enumerate(cells):
        good = converged(losses[cell])
        found = {"diverged": seeds - int(good.sum()), "test_loss": _spread(losses[cell], good),
                 "distance": _spread(moved[cell], good)}  # fmt: skip
        if course.steps:
            part = slice(cell * seeds, (cell + 1) * seeds)
            found["curves"] = {
                "steps": course.steps,
                "test_loss": course.test_loss[:, part][:, good].mean(1).tolist(),
                "distance": (course.distance[:, part][:, good].mean(1) / network.PARAMETERS).tolist(),
            }
        results[cell // len(RULES)][rule] = found
    return results


def converged(losses: Tensor) -> Tensor:
    """Which runs did not diverge."""
    return losses.isfinite() & (losses <= DIVERGED)


def _spread(values: Tensor, good: Tensor) -> dict[str, Any]:
    kept = values[good].tolist()
    return {
        "mean": statistics.mean(kept) if kept else math.nan,
        "std": statistics.stdev(kept) if len(kept) > 1 else None,
        "values": [value if ok else None for value, ok in zip(values.tolist(), good.tolist(), strict=True)],
    }


def agrees(result: dict[str, Any]) -> dict[str, bool]:
    """Whether small weights end with the lower mean loss, and at the lower mean distance, as in the paper.

    Losses closer than 0.001 count as no difference: both rules have learned the task. A rule that diverges in more
    seeds than the other has the higher loss, whatever the mean of the rest.
    """
    small, large = (result[rule] for rule in RULES)
    loss = large["test_loss"]["mean"] - small["test_loss"]["mean"] > RESOLUTION
    if small["diverged"] != large["diverged"]:
        loss = small["diverged"] < large["diverged"]
    return {"loss": loss, "distance": small["distance"]["mean"] < large["distance"]["mean"]}


def theorem(
    seeds: Sequence[int] = tuple(range(10)), init_scale: float = 1.0, steps: int = 10_000, rate: float = 0.5
) -> list[dict[str, Any]]:
    """Theorem 2.2: the smallest neuron whose sign is that of the added one learns it, and nothing else has to move.

    The student has learned the teacher. Of its neurons one alone is trained, both a and w: the one with the smallest
    |a| |w| among those with the sign of the extra neuron; for contrast also the smallest with the other sign. With
    epsilon = a^2 at the start the theorem says |v - v*| < C epsilon at the end, for v = |a| w and v* that of the extra.

    Args:
        seeds: one student and teacher each; the teacher is normalised to unit length.
        init_scale: of the student before it learned the teacher; smaller leaves a smaller epsilon.
        steps: of pretraining, and of training the one neuron.
        rate: of descent on half the mean squared error.

    Returns:
        For each seed `epsilon`, `pretrain_loss`, `loss_before`, `loss`, `error` (|v - v*|), `distance` (l2, not
        divided), `others_moved` (the largest change of any other parameter), and `loss_other_sign`.
    """
    pretrained = pretrain(
        ToyConfig(seeds=tuple(seeds), init_scale=init_scale, steps=steps, pretrain_rate=rate, pretrain_loss_scale=0.5)
    )
    start, teacher = pretrained.student, pretrained.teacher.first(3)
    rates = torch.full((len(seeds),), rate, dtype=torch.float64)
    size = start.a.abs() * start.w.norm(dim=2)
    matching = start.a.sign() == teacher.a[:, 2:].sign()
    ends, chosen = [], []
    for allowed in (matching, ~matching):
        one = torch.nn.functional.one_hot(size.masked_fill(~allowed, math.inf).argmin(1), network.NEURONS).double()
        ends.append(network.descend(start, teacher, rates, steps, Nets(one, one[..., None])).end)
        chosen.append(one.bool())
    end, one = ends[0], chosen[0]
    v = end.a[one].abs()[:, None] * end.w[one]
    still = torch.maximum(
        (end.a - start.a).abs().masked_fill(one, 0).amax(1), (end.w - start.w).abs().amax(2).masked_fill(one, 0).amax(1)
    )
    columns = {
        "epsilon": start.a[one].square(),
        "pretrain_loss": pretrained.test_loss,
        "loss_before": network.test_loss(start, teacher),
        "loss": network.test_loss(end, teacher),
        "error": (v - teacher.a[:, 2].abs()[:, None] * teacher.w[:, 2]).norm(dim=1),
        "distance": network.distance(end, start),
        "others_moved": still,
        "loss_other_sign": network.test_loss(ends[1], teacher),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"seed": seed, **dict(zip(columns, row, strict=True))} for seed, row in zip(seeds, rows, strict=True)]
