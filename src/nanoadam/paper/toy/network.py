"""Two-layer ReLU networks in the plane, many at once, and gradient descent on some of their weights.

`f(x) = sum_i a_i relu(w_i x)` with `x` in two dimensions and standard normal. The mean over all inputs has a closed
form for such networks (the arc-cosine kernel of Cho and Saul 2009), so loss and gradient are exact and no sample is
needed: with theta the angle between w and v,

    E relu(w x) relu(v x)        = |w| |v| (sin theta + (pi - theta) cos theta) / 2 pi
    E relu(v x) 1[w x > 0] x     = ((pi - theta) v + |v| sin theta w / |w|) / 2 pi

Setting of Zhou et al. 2025 (arXiv 2506.21374), section 2.3 and appendix E.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Choice", "Course", "Nets", "critical_rate", "descend", "distance", "draw", "gradient", "test_loss"]

NEURONS = 20
"""Of a student; half of them start as the other half's opposite."""

PARAMETERS = 3 * NEURONS
TEACHERS = ("unit", "sqrt", "mean")
"""How a teacher neuron's standard normal w is normalised over the input dimension d: w / |w|, w / sqrt(d), w / d."""


class Nets(NamedTuple):
    """B networks of n neurons, float64."""

    a: Tensor  # (B, n)
    w: Tensor  # (B, n, 2)

    def repeat(self, times: int) -> Nets:
        """All of them `times` over: (times * B, n)."""
        return Nets(self.a.repeat(times, 1), self.w.repeat(times, 1, 1))

    def first(self, neurons: int) -> Nets:
        """The first neurons of each."""
        return Nets(self.a[:, :neurons], self.w[:, :neurons])

    def part(self, index: slice | Tensor) -> Nets:
        """Some of the networks."""
        return Nets(self.a[index], self.w[index])


class Choice(NamedTuple):
    """What may change, network by network: the entries of each layer with the lowest scores, or whole neurons."""

    by_gradient: Tensor  # (B,) bool: the largest gradients, else the smallest weights
    keep: Tensor  # (B,) integer: how many neurons, which is as many of a and twice as many of w
    neurons: bool  # whole neurons, by |a| |w| or by the norm of their gradient, instead of each layer's weights
    once: bool  # chosen at the first step and kept, instead of anew at every step


class Course(NamedTuple):
    """Where descent ended, and what it passed."""

    end: Nets
    steps: list[int]
    test_loss: Tensor  # (len(steps), B)
    distance: Tensor  # (len(steps), B), l2


def draw(
    seeds: Iterable[int], extra: int, teacher: str, init_scale: float, samples: int | None
) -> tuple[Nets, Nets, Tensor | None]:
    """Students, teachers of 2 + `extra` neurons, and inputs, one of each per seed and the same whatever else is drawn.

    Args:
        seeds: one network each.
        extra: neurons that the teacher has more for finetuning.
        teacher: one of TEACHERS. a is -1 or 1.
        init_scale: times N(0, 1/n) for both layers of the student; a_i = -a_(i+n/2) and w_i = w_(i+n/2).
        samples: how many inputs; None for the exact mean over all.
    """
    students, teachers, inputs = [], [], []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        scale, half = init_scale / math.sqrt(NEURONS), NEURONS // 2
        a = scale * torch.randn(half, generator=g, dtype=torch.float64)
        w = scale * torch.randn(half, 2, generator=g, dtype=torch.float64)
        students.append((torch.cat([a, -a]), torch.cat([w, w])))
        a = 2.0 * torch.randint(0, 2, (2 + 2,), generator=g) - 1  # always two extra, so that tables 8 and 9 share one
        w = torch.randn(2 + 2, 2, generator=g, dtype=torch.float64)
        w = w / {"unit": w.norm(dim=1, keepdim=True), "sqrt": math.sqrt(2), "mean": 2.0}[teacher]
        teachers.append((a.double()[: 2 + extra], w[: 2 + extra]))
        if samples is not None:
            inputs.append(torch.randn(samples, 2, generator=g, dtype=torch.float64))
    stacked = [Nets(*(torch.stack(part) for part in zip(*nets, strict=True))) for nets in (students, teachers)]
    return stacked[0], stacked[1], torch.stack(inputs) if inputs else None


def gradient(student: Nets, teacher: Nets, inputs: Tensor | None = None) -> Nets:
    """Of half the mean squared error, over all inputs, or over `inputs` of shape (B, samples, 2)."""
    if inputs is not None:
        return _sample_gradient(student, teacher, inputs)
    a, w = student
    weight, v = torch.cat([a, -teacher.a], dim=1), torch.cat([w, teacher.w], dim=1)
    angle = torch.atan2(v[..., 1], v[..., 0])
    # pi - theta, for every pair: the difference of two angles, folded into [0, pi]
    rest = (math.pi - (angle[:, : a.shape[1], None] - angle[:, None, :]).abs_()).abs_()
    turned = torch.stack([v[..., 1], -v[..., 0]], dim=-1)
    sines = (w @ turned.transpose(1, 2)).abs_().matmul(weight[..., None])[..., 0]  # sum_j weight_j |w_i| |v_j| sin
    toward = (rest * weight[:, None, :]) @ v
    for_a = (sines + (w * toward).sum(-1)) / (2 * math.pi)
    for_w = (toward + (sines / w.square().sum(-1).clamp_min(1e-300))[..., None] * w) / (2 * math.pi)
    return Nets(for_a, a[..., None] * for_w)


def _sample_gradient(student: Nets, teacher: Nets, inputs: Tensor) -> Nets:
    before = inputs @ student.w.transpose(1, 2)  # (B, samples, n)
    active = before.clamp_min(0)
    targets = (inputs @ teacher.w.transpose(1, 2)).clamp_min_(0) @ teacher.a[..., None]
    error = (active @ student.a[..., None] - targets) / inputs.shape[1]  # (B, samples, 1)
    for_w = ((before > 0) * error).transpose(1, 2) @ inputs
    return Nets((active * error).sum(1), student.a[..., None] * for_w)


def test_loss(student: Nets, teacher: Nets) -> Tensor:
    """Mean squared error over all inputs, exactly: (B,)."""
    a, v = torch.cat([student.a, -teacher.a], dim=1), torch.cat([student.w, teacher.w], dim=1)
    dot = v @ v.transpose(1, 2)
    cross = (v[:, :, None, 0] * v[:, None, :, 1] - v[:, :, None, 1] * v[:, None, :, 0]).abs()
    kernel = (cross + (math.pi - torch.atan2(cross, dot)) * dot) / (2 * math.pi)
    return (a[:, None, :] @ kernel @ a[..., None]).flatten().clamp_min(0)


def distance(one: Nets, other: Nets) -> Tensor:
    """The l2 distance between the parameters of each pair: (B,)."""
    square: Tensor = (one.a - other.a).square().sum(1) + (one.w - other.w).square().sum((1, 2))
    return square.sqrt()


def descend(
    start: Nets,
    teacher: Nets,
    rate: Tensor,
    steps: int,
    choice: Choice | Nets | None = None,
    inputs: Tensor | None = None,
    record: Iterable[int] = (),
) -> Course:
    """Gradient descent on half the mean squared error.

    Args:
        start: where from; not changed.
        teacher: what to learn.
        rate: (B,), a learning rate for each.
        steps: how many.
        choice: which weights change, as a rule or as 0 and 1 in the shape of the networks; all without one.
        inputs: (B, samples, 2) to learn from; all possible ones without.
        record: after which numbers of steps test loss and distance from `start` are kept.
    """
    now, kept = start, choice if isinstance(choice, Nets) else None
    wanted, losses, moved = sorted(set(record)), [], []
    for step in range(steps + 1):
        if step in wanted:
            losses.append(test_loss(now, teacher))
            moved.append(distance(now, start))
        if step == steps:
            break
        slope = gradient(now, teacher, inputs)
        if isinstance(choice, Choice) and (kept is None or not choice.once):
            kept = _chosen(now, slope, choice)
        if kept is not None:
            slope = Nets(slope.a * kept.a, slope.w * kept.w)
        now = Nets(now.a - rate[:, None] * slope.a, now.w - rate[:, None, None] * slope.w)
    empty = torch.empty(0, len(start.a), dtype=torch.float64)
    return Course(now, wanted, torch.stack(losses) if losses else empty, torch.stack(moved) if moved else empty)


def _chosen(now: Nets, slope: Nets, choice: Choice) -> Nets:
    by_gradient = choice.by_gradient[:, None]
    if choice.neurons:
        size = now.a.abs() * now.w.norm(dim=2)
        pull = slope.a.square() + slope.w.square().sum(2)
        neurons = _lowest(torch.where(by_gradient, -pull, size), choice.keep)
        return Nets(neurons, neurons[..., None])
    of_a = _lowest(torch.where(by_gradient, -slope.a.abs(), now.a.abs()), choice.keep)
    of_w = _lowest(torch.where(by_gradient, -slope.w.abs().flatten(1), now.w.abs().flatten(1)), 2 * choice.keep)
    return Nets(of_a, of_w.view_as(now.w))


def _lowest(score: Tensor, keep: Tensor) -> Tensor:
    """(B, p) scores, (B,) how many: which entries of a row are its lowest; of equal ones the first."""
    rank = torch.arange(score.shape[1]) < keep[:, None]
    return torch.zeros_like(rank).scatter_(1, score.argsort(dim=1, stable=True), rank)


def critical_rate(student: Nets, samples: int = 4096) -> Tensor:
    """The rate above which descent on half the mean squared error leaves a minimum at `student`: 2 over the sharpness.

    Where the error is zero the Hessian is the mean of the products of the network's derivatives by its parameters; its
    largest eigenvalue is the sharpness. The mean is over `samples` evenly spread directions, exact up to their number.

    Returns:
        (B,), not a number where the network is not finite.
    """
    finite = student.a.isfinite().all(1) & student.w.isfinite().all(2).all(1)
    angle = torch.arange(samples, dtype=torch.float64) * (2 * math.pi / samples)
    inputs = torch.stack([angle.cos(), angle.sin()], dim=1) * math.sqrt(2)  # E |x|^2 = 2
    before = inputs @ student.w.nan_to_num(0, 0, 0).transpose(1, 2)  # (B, samples, n)
    by_w = ((before > 0) * student.a.nan_to_num(0, 0, 0)[:, None, :])[..., None] * inputs[:, None, :]
    derivatives = torch.cat([before.clamp_min(0), by_w.flatten(2)], dim=2)
    sharpness = torch.linalg.eigvalsh(derivatives.transpose(1, 2) @ derivatives / samples)[:, -1]
    return torch.where(finite, 2 / sharpness, torch.nan)
