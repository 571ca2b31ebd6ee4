"""Measures of one tensor: its gradient against its weights, and what finetuning did to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from nanoadam.analysis.ranks import pieces
from nanoadam.analysis.ranks import smallest as smallest_of

__all__ = ["Shift", "effective_learning_rate", "independent_ratio", "overlap", "ratio", "relation", "scatter", "shift"]


def _count(share: float, numel: int) -> int:
    return min(numel, max(1, round(share * numel)))


def _check(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"{name} needs two tensors of one shape, got {list(first.shape)} and {list(second.shape)}")
    if first.numel() == 0:
        raise ValueError(f"{name} of a tensor without elements is not defined")


def relation(
    weight: Tensor, gradient: Tensor, *, top: float = 1e-4, bottom: float = 0.8, overlap_top: float = 1e-5,
    smallest: float = 0.1,
) -> dict[str, float]:  # fmt: skip
    """How large gradients and small weights go together in one tensor: ratio, independent ratio and overlap at once.

    Args:
        weight: any shape and float dtype.
        gradient: the same shape; only its magnitude counts.
        top: share of the elements, those with the largest gradients, for the ratio.
        bottom: share of the elements, those with the smallest gradients, for the ratio.
        overlap_top: share with the largest gradients, for the overlap.
        smallest: share with the smallest weights, for the overlap.

    Returns:
        `{"ratio": ..., "independent": ..., "overlap": ...}`.

    Raises:
        ValueError: if the shapes differ, or there are no elements.
    """
    return {
        "ratio": ratio(weight, gradient, top=top, bottom=bottom),
        "independent": independent_ratio(weight),
        "overlap": overlap(weight, gradient, top=overlap_top, smallest=smallest),
    }


def ratio(weight: Tensor, gradient: Tensor, *, top: float = 1e-4, bottom: float = 0.8) -> float:
    """Table 1's r: median |w| of the largest gradients over the largest |w| among the smallest gradients.

    Smaller means more hyperbolic: large gradients fall on small weights. At least one element is taken of each.

    Args:
        weight: any shape and float dtype.
        gradient: the same shape.
        top: share of the elements with the largest |gradient|; the paper takes 0.01 %.
        bottom: share of the elements with the smallest |gradient|; the paper takes 80 %.

    Returns:
        r >= 0; not a number if all weights with small gradients are zero.

    Raises:
        ValueError: if the shapes differ, or there are no elements.
    """
    _check("ratio", weight, gradient)
    n = weight.numel()
    small, rest = smallest_of(gradient, [_count(bottom, n), n - _count(top, n)])
    largest, of_top = 0.0, []
    for w, g in pieces(weight, gradient):
        w = w.abs()
        chosen = w[small(g)]
        largest = max(largest, float(chosen.max())) if chosen.numel() else largest
        of_top.append(w[~rest(g)])
    ordered = torch.cat(of_top).sort().values
    median = float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return median / largest if largest > 0 else math.nan


def independent_ratio(weight: Tensor) -> float:
    """What `ratio` is about where gradients do not depend on the weights: median |w| over the largest |w|.

    The ratio has a maximum below the line, so a few large weights make it small whatever the gradients do: 0.16 for a
    million normal weights, far less for pretrained ones with outliers. Only a ratio below this one tells of gradients.

    Args:
        weight: any shape and float dtype.

    Returns:
        From 0 to 1; of an even number the lower median is taken; not a number if all weights are zero.

    Raises:
        ValueError: if there are no elements.
    """
    _check("independent_ratio", weight, weight)
    half, all_of_it = smallest_of(weight, [(weight.numel() + 1) // 2, weight.numel()])
    return half.largest / all_of_it.largest if all_of_it.largest > 0 else math.nan


def overlap(weight: Tensor, gradient: Tensor, *, top: float = 1e-5, smallest: float = 0.1) -> float:
    """Of the largest gradients, the share that falls on the smallest weights (figure 2).

    Args:
        weight: any shape and float dtype.
        gradient: the same shape.
        top: share of the elements with the largest |gradient|; the paper takes 0.001 %. At least one.
        smallest: share of the elements with the smallest |weight|; the paper takes 10 %.

    Returns:
        From 0 to 1. Independent of each other they would give `smallest`.

    Raises:
        ValueError: if the shapes differ, or there are no elements.
    """
    _check("overlap", weight, gradient)
    n = weight.numel()
    k = _count(top, n)
    (small,), (rest,) = smallest_of(weight, [_count(smallest, n)]), smallest_of(gradient, [n - k])
    return sum(int((small(w) & ~rest(g)).sum()) for w, g in pieces(weight, gradient)) / k


def scatter(weight: Tensor, gradient: Tensor, *, points: int = 2000) -> dict[str, list[float]]:
    """Points for the plane of |weight| and |gradient| (figures 1, 5 and 6), by a fixed rule.

    Every n-th element in row-major order, so that about `points` come out; and the 5 % of `points` with the largest
    gradients and with the largest weights, which such a sample would miss and which the hyperbola is made of.

    Args:
        weight: any shape and float dtype.
        gradient: the same shape.
        points: how many, about.

    Returns:
        `{"weight": [...], "gradient": [...]}`, magnitudes.

    Raises:
        ValueError: if the shapes differ, or there are no elements.
    """
    _check("scatter", weight, gradient)
    w, g = weight.detach().reshape(-1), gradient.detach().reshape(-1)
    n, extremes = w.numel(), min(w.numel(), max(1, points // 20))
    places = torch.arange(0, n, max(1, n // points), device=w.device)
    places = torch.cat([places, *(_largest(tensor, extremes) for tensor in (g, w))]).unique()
    return {name: t[places].float().abs().tolist() for name, t in (("weight", w), ("gradient", g))}


def _largest(flat: Tensor, k: int) -> Tensor:
    (rest,), found, start = smallest_of(flat, [flat.numel() - k]), [], 0
    for (piece,) in pieces(flat):
        found.append((~rest(piece)).nonzero().flatten() + start)
        start += piece.numel()
    return torch.cat(found)


@dataclasses.dataclass
class Shift:
    """What finetuning changed, in one tensor or, added up, in several.

    Attributes:
        sums: of |after - before| over the smallest, the largest and the remaining weights before.
        counts: how many weights these are.
        changed: weights that are not what they were.
        square: sum of the squared changes.
    """

    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    counts: tuple[int, int, int] = (0, 0, 0)
    changed: int = 0
    square: float = 0.0

    def __add__(self, other: Shift) -> Shift:
        """Of both together; groups stay those of each tensor."""
        a, b = self, other
        return Shift(
            (a.sums[0] + b.sums[0], a.sums[1] + b.sums[1], a.sums[2] + b.sums[2]),
            (a.counts[0] + b.counts[0], a.counts[1] + b.counts[1], a.counts[2] + b.counts[2]),
            a.changed + b.changed,
            a.square + b.square,
        )

    @property
    def numel(self) -> int:
        """How many weights."""
        return sum(self.counts)

    @property
    def touched(self) -> float:
        """The share that changed."""
        return self.changed / max(1, self.numel)

    @property
    def l2(self) -> float:
        """The distance from where it began."""
        return math.sqrt(self.square)

    def to_dict(self) -> dict[str, Any]:
        """`numel`, `touched`, `l2`, and the mean changes of `smallest`, `largest` and `rest`: None if empty."""
        means = [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]
        return {"numel": self.numel, "touched": self.touched, "l2": self.l2,
                **dict(zip(("smallest", "largest", "rest"), means, strict=True))}  # fmt: skip


def shift(before: Tensor, after: Tensor, *, share: float = 0.3) -> Shift:
    """Mean change by group (table 7), touched share and l2 distance (table 5) of one tensor.

    Args:
        before: the pretrained weights: any shape and float dtype.
        after: the finetuned ones, of the same shape; any float dtype. Both are compared in float32.
        share: of the weights, by |before|, in the groups of the smallest and of the largest; the paper takes 30 %.

    Returns:
        What changed; add up several to get a layer or a model.

    Raises:
        ValueError: if the shapes differ, or `share` is not between 0 and a half.
    """
    if before.shape != after.shape:
        raise ValueError(f"shift needs two tensors of one shape, got {list(before.shape)} and {list(after.shape)}")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5, got {share}")
    n = before.numel()
    k = min(round(share * n), n // 2)
    small, all_but_large = smallest_of(before, [k, n - k])
    total = Shift()
    for old, new in pieces(before, after):
        low, high = small(old), ~all_but_large(old)
        moved = (new - old).abs_()
        groups = (low, high, ~(low | high))
        sums = [float(torch.where(group, moved, 0.0).sum(dtype=torch.float64)) for group in groups]
        counts = [int(group.sum()) for group in groups]
        total += Shift(
            (sums[0], sums[1], sums[2]), (counts[0], counts[1], counts[2]),
            int((old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)).sum()),
            float(moved.double().square().sum()),
        )  # fmt: skip
    return total


@torch.no_grad()
def effective_learning_rate(optimizer: Optimizer) -> float:
    """Mean over the updated weights of lr / (sqrt(v_hat) + eps), from an optimizer's state (figure 12c).

    Args:
        optimizer: NanoAdam, or an Adam of torch's: what keeps `exp_avg_sq` and `step` for each parameter. To be called
            after `step()`. With NanoAdam the mean is over the selected weights and over dense tensors.

    Returns:
        In units of the weights per unit of the normalised first moment.

    Raises:
        ValueError: if no parameter has such a state.
    """
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        lr, beta2, eps = float(group["lr"]), float(group["betas"][1]) if "betas" in group else None, group.get("eps")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if beta2 is None or eps is None or "exp_avg_sq" not in state or "step" not in state:
                continue
            v, age = state["exp_avg_sq"].double().flatten(), torch.as_tensor(state["step"]).double()
            if "entry_step" in state:  # NanoAdam: every selected weight counts its own updates, in 16 bits
                steps = int(age.item())
                age = ((steps - state["entry_step"].to(torch.int32)) & 0xFFFF).double().expand(v.shape)
            used = (age.to(v.device) > 0).expand(v.shape)
            if "index" in state:
                used = used & (state["index"].flatten() >= 0)
            corrected = v / (1 - beta2 ** age.to(v.device).expand(v.shape))
            total += float((lr / (corrected[used].sqrt() + eps)).sum())
            count += int(used.sum())
    if not count:
        kind = type(optimizer).__name__
        raise ValueError(
            f"{kind} keeps no second moments to take the effective learning rate from, or made no step yet"
        )
    return total / count
