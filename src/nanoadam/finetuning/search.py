"""How a learning rate is searched for: what is typical, unless short trials say clearly otherwise.

The best rate differs by a factor of ten between models and tasks at the same density (docs/results/defaults.md), so no
formula gives it. A trial trains so many steps at a rate, with the run's own schedule shortened to them, and measures
the loss on training rows that no trial learned from. What is found is a multiple of what is typical of an optimizer in
so many steps; the run's rate is that multiple of what is typical of its own length. Where trials hardly differ, which
is common on hard tasks, their order is chance: a loss counts as 1 % more for each factor of 3 from what is typical,
squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

FACTOR = 3.0
MOST_TRIALS = 6
DOUBT = 0.01
"""Share of the loss that a trial at `FACTOR` from what is typical must be better by."""

SHARE = 0.065
"""Of the run's steps, what a trial takes."""

STEPS = (30, 200)
"""A trial's least and most steps; a run of less than `SHORTEST` times the least gets no trials."""

SHORTEST = 8


def trial_steps(total: int) -> int:
    """How long a trial is for a run of so many steps; 0 for no trials."""
    if total < SHORTEST * STEPS[0]:
        return 0
    return min(STEPS[1], max(STEPS[0], round(SHARE * total)))


def search(loss_at: Callable[[float], float], typical: float) -> list[tuple[float, float]]:
    """What is typical and its neighbours by powers of `FACTOR`, further on the side where the loss is least.

    Args:
        loss_at: the loss after a trial at a rate; infinite where it diverges.
        typical: the first rate.

    Returns:
        Pairs of rate and loss, in the order they were tried.
    """
    found: dict[int, float] = {}
    for power in (0, 1, -1):
        found[power] = loss_at(typical * FACTOR**power)
    while len(found) < MOST_TRIALS:
        best = min(found, key=lambda power: (doubted(found[power], power), abs(power)))
        further = next((power for power in (best + 1, best - 1) if power not in found), None)
        if further is None:
            break
        found[further] = loss_at(typical * FACTOR**further)
    return [(typical * FACTOR**power, loss) for power, loss in found.items()]


def doubted(loss: float, power: float) -> float:
    """A loss as it counts at so many factors from what is typical."""
    return loss + abs(loss) * DOUBT * power * power


def best_of(trials: list[tuple[float, float]], typical: float) -> float:
    """The rate whose loss counts least; between it and its neighbours where a parabola through the three says so."""
    finite = []
    for rate, loss in sorted(trials):
        if math.isfinite(loss):
            power = math.log(rate / typical, FACTOR)
            finite.append((power, doubted(loss, power)))
    if not finite:
        return min(rate for rate, _ in trials) / FACTOR
    place = min(range(len(finite)), key=lambda i: finite[i][1])
    power = finite[place][0]
    if 0 < place < len(finite) - 1:
        (_, a), (_, b), (_, c) = finite[place - 1 : place + 2]
        curve = a - 2 * b + c
        if curve > 0:
            power += max(-0.5, min(0.5, (a - c) / (2 * curve)))
    return float(typical * FACTOR**power)
