"""Fronts: what can be had of one thing for how much of another, over all settings of a method.

A point has two coordinates of which more is better (accuracy on the new task, what is left of the old one). A method's
front is those of its points that no other of its points beats in both; the area under it, from a stated reference
point, is one number for the whole of it (the hypervolume in two dimensions).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Point: TypeAlias = tuple[float, float]


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats or equals in both coordinates, by the first coordinate, ascending; each once.

    Points with a coordinate that is not finite (runs that diverged) are left out.
    """
    front: list[Point] = []
    best = -math.inf
    for point in sorted({p for p in points if all(map(math.isfinite, p))}, reverse=True):
        if point[1] > best:
            front.append(point)
            best = point[1]
    return front[::-1]


def area(points: Iterable[Point], reference: Point) -> float:
    """The area that the points dominate above and right of a reference point: the hypervolume.

    Between its points a front is a staircase: only what was reached counts. Points that do not beat the reference
    point in both coordinates add nothing.

    Source: Zitzler & Thiele 1998, for two dimensions.
    """
    front = [p for p in pareto(points) if p[0] > reference[0] and p[1] > reference[1]]
    left, total = reference[0], 0.0
    for x, y in front:  # the second coordinate falls from one to the next
        total += (x - left) * (y - reference[1])
        left = x
    return total


def at_least(points: Iterable[Point], level: float) -> float | None:
    """The most of the second coordinate that goes with at least `level` of the first; None if nothing reaches it."""
    reached = [y for x, y in pareto(points) if x >= level]
    return max(reached, default=None)


def table(
    runs: Sequence[Mapping[str, Any]],
    axes: tuple[str, str],
    reference: Point,
    method: Callable[[Mapping[str, Any]], str],
    setting: Callable[[Mapping[str, Any]], Any],
) -> list[dict[str, Any]]:
    """The front of each method and its area.

    Args:
        runs: one for each method, setting and seed: `{"seed", <axes>, ...}`. None stands for a run that diverged.
        axes: the keys of the two coordinates.
        reference: the point that areas are measured from.
        method: of a run.
        setting: of a run, whatever its method varies: runs that differ in their seed only have the same.

    Returns:
        For each method, in the order of their first runs: `{"method", "seeds", "points", "front", "area", "area_mean",
        "area_std"}`. `points` are means over seeds (`{"setting", "x", "y", "seeds"}`), `front` those of them on the
        front. `area` is that of the means; `area_mean` and `area_std` are over areas of the seeds, each from its runs
        alone (std None for one seed). A setting that diverged with one seed has no mean.
    """
    rows = []
    for name in dict.fromkeys(map(method, runs)):
        own = [run for run in runs if method(run) == name]
        points = []
        for key in dict.fromkeys(map(setting, own)):
            found = [_point(run, axes) for run in own if setting(run) == key]
            x, y = (statistics.mean(values) for values in zip(*found, strict=True))
            points.append({"setting": key, "x": x, "y": y, "seeds": len(found)})
        means = [(p["x"], p["y"]) for p in points]
        seeds = sorted({run["seed"] for run in own})
        areas = [area([_point(run, axes) for run in own if run["seed"] == seed], reference) for seed in seeds]
        front = set(pareto(means))
        rows.append(
            {
                "method": name,
                "seeds": len(seeds),
                "points": points,
                "front": [p for p in points if (p["x"], p["y"]) in front],
                "area": area(means, reference),
                "area_mean": statistics.mean(areas),
                "area_std": statistics.stdev(areas) if len(areas) > 1 else None,
            }
        )
    return rows


def _point(run: Mapping[str, Any], axes: tuple[str, str]) -> Point:
    x, y = (math.nan if run[key] is None else float(run[key]) for key in axes)
    return x, y


def chart(rows: Sequence[Mapping[str, Any]], labels: tuple[str, str], title: str) -> str:
    """All fronts in one chart: their points, and the staircase of what each method reached.

    Args:
        rows: as from `table`.
        labels: of the two axes.
        title: above the chart.

    Returns:
        A figure in HTML.
    """
    from nanoadam.reports.charts import Chart, Series, draw

    series = []
    for color, row in enumerate(rows):
        series.append(Series("", [(p["x"], p["y"]) for p in row["points"]], "dots", color=color))
        front = sorted((p["x"], p["y"]) for p in row["front"])
        series.append(Series(f"{row['method']} ({row['area']:.3f})", front, "reach", color=color))
    words = "Every point of the grids, and what each method has reached; in brackets the area under the front."
    return draw(Chart(title, series, x=labels[0], y=labels[1], words=words))
