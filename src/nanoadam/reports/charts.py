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
        name: in the legend; "" for none there.
        points: x and y; a y of None leaves a gap.
        kind: "line"; "step" (a value holds until the next); "reach" (a value holds since the one before: what has been
            reached); "dots"; "cloud" (many small dots, which do not answer to the pointer); "arrows" from the origin;
            "level" (a dashed line all the way).
        labels: what to say of each point beside its values.
        color: its number, where series belong together; by default its place.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    kind: str = "line"
    labels: Sequence[str] = ()
    color: int | None = None


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
        y: name of the vertical axis, where the title does not say it.
        log_y: whether the vertical axis is logarithmic.
        square: both axes from this to that.
    """

    title: str
    series: Sequence[Series]
    x: str = "step"
    unit: str = ""
    words: str = ""
    log: bool = False
    zero: bool = False
    y: str = ""
    log_y: bool = False
    square: tuple[float, float] | None = None


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
    """Powers of ten between the two, with twice and five times them where they are few; or the ends."""
    powers = [10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5)):
        marks = [power * factor for power in powers for factor in factors]
        marks = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
        if len(marks) > 2:
            return marks
    return marks or [low, high]


def label(value: float, unit: str = "") -> str:
    """A tick or a value as people read it."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    if unit == "B":
        return size(value)
    if value == int(value) and 1000 <= abs(value) < 1e7:
        return f"{int(value):,}"
    return _shorter(f"{value:.4g}")


def _shorter(text: str) -> str:
    """1e-5 for 1e-05."""
    return text.replace("e-0", "e-").replace("e+0", "e")


def tick_labels(marks: Sequence[float], unit: str = "") -> list[str]:
    """The labels of ticks, with as many digits as tell them apart."""
    if unit:
        return [label(mark, unit) for mark in marks]
    step = min((b - a for a, b in itertools.pairwise(marks)), default=1.0)
    if step >= 1 or step <= 0:
        return [label(mark) for mark in marks]
    digits = math.ceil(-math.log10(step) - 1e-9)
    if digits > 4:
        return [_shorter(f"{mark:.2g}") for mark in marks]
    digits += 1 if abs(step * 10**digits - round(step * 10**digits)) > 1e-6 else 0  # steps of 2.5
    return [f"{mark:.{digits}f}" for mark in marks]


def draw(chart: Chart) -> str:
    """A figure: the chart, its legend, its words."""
    colored = [dataclasses.replace(one, color=i if one.color is None else one.color)
               for i, one in enumerate(chart.series)]  # fmt: skip
    series = [one for one in (_drawable(one, chart) for one in colored) if one.points]
    if not series:
        return ""
    ends = chart.square or ()
    xs = [x for s in series for x, _ in s.points if s.kind != "level"] or [0.0, 1.0]
    ys = [y for s in series for _, y in s.points if y is not None]
    right, at = _across([*xs, *ends], chart)
    marks, up = _upwards([*ys, *ends], chart)
    body = [_grid(chart, marks, up, right, at)]
    body += [_line(s, at, up) for s in series]
    hover = {
        "unit": chart.unit,
        "x": chart.x,
        "series": [
            {"name": s.name, "points": [
                [x, y, round(at(x), 1), round(up(y), 1), *([s.labels[i]] if s.labels else [])]
                for i, (x, y) in enumerate(s.points) if y is not None]}
            for s in series if s.kind not in ("level", "cloud")
        ],
    }  # fmt: skip
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(_spoken(chart, series))}" '
        f'data-hover="{html.escape(json.dumps(hover))}">{"".join(body)}</svg>'
    )
    return _figure(chart.title, svg, _legend([(s.name, s.color or 0) for s in series if s.name]), chart.words)


def _drawable(series: Series, chart: Chart) -> Series:
    """Without points that are not finite, or not positive where an axis is logarithmic."""

    def good(x: float, y: float | None) -> bool:
        if y is None or not math.isfinite(x) or not math.isfinite(y):
            return False
        return (x > 0 or not chart.log or series.kind == "level") and (y > 0 or not chart.log_y)

    kept = [i for i, point in enumerate(series.points) if good(*point)]
    labels = [series.labels[i] for i in kept] if series.labels else ()
    return dataclasses.replace(series, points=[series.points[i] for i in kept], labels=labels)


def _across(xs: Sequence[float], chart: Chart) -> tuple[list[float], Scale]:
    low, high = min(xs), max(xs)
    if chart.log:
        low, high = low / 1.3, high * 1.3
        inner = _scale(math.log10(low), math.log10(high), LEFT, WIDTH - RIGHT)
        return log_ticks(low, high), lambda x: inner(math.log10(x))
    whole = all(x == int(x) for x in xs)
    marks = [m for m in ticks(low, high, whole=whole) if low <= m <= high] or [low]
    return marks, _scale(low, high if high > low else low + 1, LEFT + 6, WIDTH - RIGHT - 6)


def _upwards(ys: Sequence[float], chart: Chart) -> tuple[list[float], Scale]:
    if chart.log_y:
        low, high = min(ys) / 1.3, max(ys) * 1.3
        inner = _scale(math.log10(low), math.log10(high), HEIGHT - BOTTOM, TOP)
        return log_ticks(low, high), lambda y: inner(math.log10(y))
    marks = ticks(0.0 if chart.zero else min(ys), max(ys))
    return marks, _scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)


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
    texts = [label(mark, chart.unit) for mark in marks] if chart.log_y else tick_labels(marks, chart.unit)
    for mark, text in zip(marks, texts, strict=True):
        y = up(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts += [f'<text x="{at(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(x)}</text>' for x in xs]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(chart.x)}</text>')
    if chart.y:
        place = f'x="12" y="{(TOP + HEIGHT - BOTTOM) / 2}" transform="rotate(-90 12 {(TOP + HEIGHT - BOTTOM) / 2})"'
        parts.append(f'<text {place} text-anchor="middle">{html.escape(chart.y)}</text>')
    return "".join(parts)


def _line(series: Series, at: Scale, up: Scale) -> str:
    points = [(at(x) if series.kind != "level" else 0.0, up(y)) for x, y in series.points if y is not None]
    tone = f"c{(series.color or 0) % COLORS}"
    if series.kind == "level":
        y = points[0][1]
        return f'<line class="{tone} level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if series.kind == "cloud":
        return f'<path class="{tone} cloud" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)}"/>'
    if series.kind == "arrows":
        x0, y0 = at(0.0), up(0.0)
        return f'<path class="{tone}" d="{"".join(_arrow(x0, y0, x, y) for x, y in points)}"/>'
    dots = "".join(f'<circle class="{tone}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
    if series.kind == "dots":
        return dots
    path = []
    for i, (x, y) in enumerate(points):
        if i and series.kind == "step":
            path.append(f"H{x:.1f}")
        if i and series.kind == "reach":
            path.append(f"V{y:.1f}")
        path.append(f"{'L' if i else 'M'}{x:.1f} {y:.1f}")
    return f'<path class="{tone}" d="{"".join(path)}"/>' + (dots if len(points) <= 30 else "")


def _arrow(x0: float, y0: float, x: float, y: float) -> str:
    """A line and the two of its head."""
    parts = [f"M{x0:.1f} {y0:.1f}L{x:.1f} {y:.1f}"]
    for turn in (2.7, -2.7):
        angle = math.atan2(y - y0, x - x0) + turn
        parts.append(f"M{x:.1f} {y:.1f}l{7 * math.cos(angle):.1f} {7 * math.sin(angle):.1f}")
    return "".join(parts)


def _legend(names: Sequence[tuple[str, int]]) -> str:
    if not names:
        return ""
    entries = "".join(f'<li><i class="b{i % COLORS}"></i>{html.escape(name)}</li>' for name, i in names)
    return f'<ul class="legend">{entries}</ul>'


def _figure(title: str, svg: str, legend: str, words: str) -> str:
    note = f"<p>{html.escape(words)}</p>" if words else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{legend}{note}</figure>"


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    """What stands for the picture: each line's first and last value."""
    parts = []
    for s in series:
        points = [(x, y) for x, y in s.points if y is not None]
        if not s.name:
            continue
        if s.kind in ("dots", "cloud", "arrows"):
            parts.append(f"{s.name}: {len(points)} points")
        elif s.kind == "level" or len(points) == 1:
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


def heat(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    x: str = "",
    words: str = "",
) -> str:
    """A rectangle for each value, darker for larger ones; a value of None leaves a gap.

    Args:
        title: the question that it answers.
        columns: their names.
        rows: a name, and a value for each column.
        x: what the columns are.
        words: under the chart.
    """
    values = [v for _, row in rows for v in row if v is not None and math.isfinite(v)]
    if not values or not columns:
        return ""
    low, high = min(values), max(values)
    left = min(170.0, 14 + 7.2 * max(len(name) for name, _ in rows))
    wide, step = (WIDTH - left - 4) / len(columns), 20 if len(rows) > 3 else 34
    height = 8 + step * len(rows) + (34 if x else 20)
    body = []
    for number, (name, row) in enumerate(rows):
        y = 6 + number * step
        body.append(f'<text x="{left - 6:.1f}" y="{y + step / 2 + 4:.1f}" text-anchor="end">{html.escape(name)}</text>')
        for i, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            share = (value - low) / ((high - low) or 1.0)
            tip = html.escape(f"{name}, {x} {columns[i]}: {label(value)}")
            body.append(f'<rect class="b0" x="{left + i * wide:.1f}" y="{y}" width="{wide:.2f}" height="{step - 2}" '
                        f'fill-opacity="{0.06 + 0.94 * share:.2f}"><title>{tip}</title></rect>')  # fmt: skip
    every = math.ceil(len(columns) / max(1, (WIDTH - left) / (7.5 * max(map(len, columns)) + 8)))
    body += [f'<text x="{left + (i + 0.5) * wide:.1f}" y="{height - (20 if x else 6)}" text-anchor="middle">'
             f"{html.escape(columns[i])}</text>" for i in range(0, len(columns), every)]  # fmt: skip
    if x:
        body.append(f'<text x="{(left + WIDTH) / 2:.1f}" y="{height - 4}" text-anchor="middle">{html.escape(x)}</text>')
    spoken = f"{title} {len(rows)} rows, {len(columns)} columns, from {label(low)} to {label(high)}."
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(spoken)}">{"".join(body)}</svg>'
    scale = f"From {label(low)} (light) to {label(high)} (dark)."
    return _figure(title, svg, "", f"{words} {scale}".strip())
