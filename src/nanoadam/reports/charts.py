"""Charts as SVG in a page: readable without scripts, on paper, on a phone and in the dark; values show on hover."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from nanoadam.text import size

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
Scale: TypeAlias = Callable[[float], float]
COLORS = 6
"""How many colours the page's style has; series take them in turn."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: in the legend.
        points: x and y; a y of None leaves a gap.
        kind: "line", "step" (a value holds until the next), "dots" or "level" (a dashed line all the way).
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    kind: str = "line"


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Args:
        title: the question that it answers.
        series: what is drawn.
        x: name of the horizontal axis.
        unit: "" for numbers, "%" for shares.
        words: under the chart.
        log: whether the horizontal axis is logarithmic.
        zero: whether the vertical axis begins at 0.
    """

    title: str
    series: Sequence[Series]
    x: str = "step"
    unit: str = ""
    words: str = ""
    log: bool = False
    zero: bool = False


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from one at or below `low` to one at or above `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the two, or the ends where there is none."""
    powers = [10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    return [p for p in powers if low * 0.999 <= p <= high * 1.001] or [low, high]


def label(value: float, unit: str = "") -> str:
    """A tick or a value as people read it."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    if unit == "B":
        return size(value)
    if value == int(value) and 1000 <= abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.4g}"


def tick_labels(marks: Sequence[float], unit: str = "") -> list[str]:
    """The labels of ticks, with as many digits as tell them apart."""
    if unit:
        return [label(mark, unit) for mark in marks]
    step = min((b - a for a, b in itertools.pairwise(marks)), default=1.0)
    if step >= 1 or step <= 0:
        return [label(mark) for mark in marks]
    digits = math.ceil(-math.log10(step) - 1e-9)
    if digits > 4:
        return [f"{mark:.2g}" for mark in marks]
    digits += 1 if abs(step * 10**digits - round(step * 10**digits)) > 1e-6 else 0  # steps of 2.5
    return [f"{mark:.{digits}f}" for mark in marks]


def draw(chart: Chart) -> str:
    """A figure: the chart, its legend, its words."""
    series = [s for s in chart.series if any(y is not None and math.isfinite(y) for _, y in s.points)]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points if s.kind != "level"] or [0.0, 1.0]
    ys = [y for s in series for _, y in s.points if y is not None and math.isfinite(y)]
    across = _axis(xs, chart.log, whole=not chart.log)
    marks = ticks(0.0 if chart.zero else min(ys), max(ys))
    up = _scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    right, at = across
    body = [_grid(chart, marks, up, right, at)]
    body += [_line(s, i, at, up, right) for i, s in enumerate(series)]
    hover = {
        "unit": chart.unit,
        "x": chart.x,
        "series": [{"name": s.name, "color": i % COLORS, "points": [[x, y, round(at(x), 1), round(up(y), 1)]
                    for x, y in s.points if y is not None and math.isfinite(y)]}
                   for i, s in enumerate(series) if s.kind != "level"],
    }  # fmt: skip
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(_spoken(chart, series))}" '
        f'data-hover="{html.escape(json.dumps(hover))}">{"".join(body)}</svg>'
    )
    return _figure(chart.title, svg, _legend([(s.name, i) for i, s in enumerate(series)]), chart.words)


def _axis(xs: Sequence[float], log: bool, whole: bool) -> tuple[list[float], Callable[[float], float]]:
    low, high = min(xs), max(xs)
    if log:
        low, high = low / 1.3, high * 1.3
        marks = log_ticks(low, high)
        inner = _scale(math.log10(low), math.log10(high), LEFT, WIDTH - RIGHT)
        return marks, lambda x: inner(math.log10(x))
    marks = [m for m in ticks(low, high, whole=whole) if low <= m <= high] or [low]
    return marks, _scale(low, high if high > low else low + 1, LEFT + 6, WIDTH - RIGHT - 6)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _grid(
    chart: Chart,
    marks: Sequence[float],
    up: Scale,
    xs: Sequence[float],
    at: Scale,
) -> str:
    parts = []
    for mark, text in zip(marks, tick_labels(marks, chart.unit), strict=True):
        y = up(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts += [f'<text x="{at(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(x)}</text>' for x in xs]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(chart.x)}</text>')
    return "".join(parts)


def _line(series: Series, color: int, at: Scale, up: Scale, xs: Sequence[float]) -> str:
    points = [(at(x) if series.kind != "level" else 0.0, up(y)) for x, y in series.points
              if y is not None and math.isfinite(y)]  # fmt: skip
    tone = f"c{color % COLORS}"
    if series.kind == "level":
        y = points[0][1]
        return f'<line class="{tone} level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    dots = "".join(f'<circle class="{tone}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
    if series.kind == "dots":
        return dots
    path = []
    for i, (x, y) in enumerate(points):
        if i and series.kind == "step":
            path.append(f"H{x:.1f}")
        path.append(f"{'L' if i else 'M'}{x:.1f} {y:.1f}")
    return f'<path class="{tone}" d="{"".join(path)}"/>' + (dots if len(points) <= 30 else "")


def _legend(names: Sequence[tuple[str, int]]) -> str:
    entries = "".join(f'<li><i class="b{i % COLORS}"></i>{html.escape(name)}</li>' for name, i in names)
    return f'<ul class="legend">{entries}</ul>'


def _figure(title: str, svg: str, legend: str, words: str) -> str:
    note = f"<p>{html.escape(words)}</p>" if words else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{legend}{note}</figure>"


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    """What stands for the picture: each line's first and last value."""
    parts = []
    for s in series:
        points = [(x, y) for x, y in s.points if y is not None and math.isfinite(y)]
        if s.kind == "level" or len(points) == 1:
            parts.append(f"{s.name}: {label(points[0][1], chart.unit)}")
        else:
            (x0, y0), (x1, y1) = points[0], points[-1]
            parts.append(f"{s.name}: {label(y0, chart.unit)} at {chart.x} {label(x0)}, {label(y1, chart.unit)} at "
                         f"{chart.x} {label(x1)}")  # fmt: skip
    return f"{chart.title} {'; '.join(parts)}."


def bars(title: str, rows: Sequence[tuple[str, Mapping[str, float]]], unit: str = "B", words: str = "") -> str:
    """Stacked bars on one scale: a row's name, and its parts by kind."""
    rows = [(name, {kind: value for kind, value in parts.items() if value}) for name, parts in rows]
    kinds = list(dict.fromkeys(kind for _, parts in rows for kind in parts))
    most = max((sum(parts.values()) for _, parts in rows), default=0.0)
    if not most:
        return ""
    step, top = 44, 8
    height = top + step * len(rows) + 4
    body, spoken = [], []
    for number, (name, parts) in enumerate(rows):
        total, x, y = sum(parts.values()), 4.0, top + number * step
        body.append(f'<text x="4" y="{y + 11}">{html.escape(name)}: {label(total, unit)}</text>')
        for kind, value in parts.items():
            width = value / most * (WIDTH - 8)
            tip = html.escape(f"{name}, {kind}: {label(value, unit)}")
            tone = f"b{kinds.index(kind) % COLORS}"
            body.append(f'<rect class="{tone}" x="{x:.1f}" y="{y + 17}" width="{max(width, 0.5):.1f}" height="16">'
                        f"<title>{tip}</title></rect>")  # fmt: skip
            x += width
        spoken.append(f"{name}: " + ", ".join(f"{kind} {label(value, unit)}" for kind, value in parts.items()))
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(f"{title} {chr(59).join(spoken)}")}">'
        f"{''.join(body)}</svg>"
    )
    return _figure(title, svg, _legend([(kind, i) for i, kind in enumerate(kinds)]), words)
