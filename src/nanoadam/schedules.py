"""Density schedules, and mask and density intervals recommended from the steps per epoch.

Algorithm 1 lets the density change every `interval` steps; the paper's GLUE runs let it fall linearly from
10 % to 4 % over the run (section "Experiments").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The density as a function of the step: `schedule(step) -> float` in (0, 1].

    It changes only at multiples of `interval`, and at `total_steps`, from where on it stays at `end`. With an interval
    longer than `total_steps` it stays at `start`, as in the paper ("d > T switches it off").
    """

    kind: str
    start: float
    end: float
    total_steps: int
    interval: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"density schedule must be one of {', '.join(KINDS)}; got {self.kind!r}")
        densities: dict[str, object] = {"start": self.start, "end": self.end}
        for name, value in densities.items():
            if not (isinstance(value, (int, float)) and 0.0 < value <= 1.0):
                raise ValueError(f"density must be in (0, 1], got {name}={value!r} in the {self.kind} schedule")
        counts: dict[str, object] = {"total_steps": self.total_steps, "interval": self.interval}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} of a density schedule must be a whole number of at least 1, got {count!r}")

    def __call__(self, step: int) -> float:
        """The density at a step."""
        if self.kind == "constant" or self.interval > self.total_steps:
            return self.start
        changed_at = step - step % self.interval
        done = 1.0 if step >= self.total_steps else changed_at / self.total_steps
        if self.kind == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + (self.end - self.start) * done if done < 1.0 else self.end

    @property
    def largest(self) -> float:
        """The largest density it ever takes, which is what memory has to be planned for."""
        return max(self.start, self.end)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, so that a `state_dict` holding it loads with `weights_only=True`."""
        return dict(self.__dict__)


def constant(density: float) -> Schedule:
    """The same density throughout. `density=0.01` means the same as `density=constant(0.01)`."""
    return Schedule("constant", density, density, 1, 1)


def linear(start: float, end: float, *, total_steps: int, interval: int) -> Schedule:
    """From `start` to `end` in a straight line over `total_steps`, changing every `interval` steps (the paper's)."""
    return Schedule("linear", start, end, total_steps, interval)


def cosine(start: float, end: float, *, total_steps: int, interval: int) -> Schedule:
    """From `start` to `end` along half a cosine over `total_steps`, changing every `interval` steps."""
    return Schedule("cosine", start, end, total_steps, interval)


class Intervals(NamedTuple):
    """Steps between refreshes of the selection, and between changes of the density."""

    mask_interval: int
    density_interval: int


def recommended_intervals(steps_per_epoch: int) -> Intervals:
    """Intervals that the paper's sensitivity study found good: a 40th and an 8th of an epoch.

    Source: figure "mask interval" (good between 0.024 and 0.09 epochs) and "density interval" (good above
    0.092, best at 0.122 epochs), BERT-base on QNLI; 1/40 and 1/8 also give table 13's intervals for CoLA,
    SST-2, QNLI and MNLI.

    Raises:
        ValueError: if `steps_per_epoch` is not a whole number of at least 1.
    """
    given: object = steps_per_epoch
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"steps_per_epoch must be a whole number of at least 1, got {steps_per_epoch!r}")
    return Intervals(max(1, steps_per_epoch // 40), max(1, steps_per_epoch // 8))
