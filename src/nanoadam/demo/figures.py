"""The charts and the page of a demo run."""

from __future__ import annotations

import statistics
from typing import Any

import nanoadam
from nanoadam.demo.experiment import METRICS, Demo, Digits
from nanoadam.reports.charts import Chart, Series, bars, draw
from nanoadam.reports.page import render
from nanoadam.text import size

__all__ = ["cell", "charts", "report"]


def cell(spread: dict[str, float | None], unit: str) -> str:
    """Mean and standard deviation; a size that does not vary stands alone."""
    mean, std = spread["mean"], spread["std"]
    if unit == "B":
        return size(mean or 0) if not std else f"{size(mean or 0)} ± {size(std)}"
    scaled = f"{100 * (mean or 0):.1f} %"
    return scaled if std is None else f"{scaled[:-2]} ± {100 * std:.1f} %"


def charts(demo: Demo) -> list[str]:
    """What each rate cost, the course of the runs, and the memory; as HTML."""
    return [_front(demo), *_course(demo), _memory(demo)]


def _front(demo: Demo) -> str:
    """What is lost of the old task against what is not learned of the new one, over learning rates."""
    rates, series = demo.settings.learning_rates, []
    for color, (method, chosen) in enumerate(demo.chosen.items()):
        points = [_errors(demo, method, rate) for rate in rates]
        labels = [f"learning rate {rate:g}{', chosen' * (rate == chosen)}" for rate in rates]
        series.append(Series(method, points, labels=labels, color=color))
    return draw(Chart(
        "What does the new task cost the old one?", series, x="error on the new digits (%)", log=True,
        y="error on the old ones (%)", log_y=True,
        words="Every learning rate of the grid, mean over seeds; lower left is better. Errors are at least 0.1 % here.",
    ))  # fmt: skip


def _errors(demo: Demo, method: str, lr: float) -> tuple[float, float]:
    """Task 2 and task 1 after, per cent, mean over seeds; at least 0.1, since the axes are logarithmic."""
    runs = [o for o in demo.outcomes if o.method == method and o.learning_rate == lr]
    task1, task2 = (statistics.mean(values) for values in zip(*((o.task1_after, o.task2) for o in runs), strict=True))
    return max(0.1, 100 * (1 - task2)), max(0.1, 100 * (1 - task1))


def _course(demo: Demo) -> list[str]:
    """Both accuracies per epoch at the chosen learning rates, mean over seeds."""
    found = []
    for index, title in ((0, "How much is left of the old digits?"), (1, "How fast are the new ones learned?")):
        series = []
        for method in demo.chosen:
            by_epoch = zip(*(o.curve for o in demo.rows(method)), strict=True)
            means = [statistics.mean(point[index] for point in points) for points in by_epoch]
            series.append(Series(method, list(enumerate(means, start=1))))
        words = "Accuracy with the old head." if index == 0 else "Accuracy on the validation split."
        found.append(draw(Chart(title, series, x="epoch on the new digits", unit="%", words=words)))
    return found


def _memory(demo: Demo) -> str:
    """Optimizer state and held gradients, to scale."""
    rows = [
        (name, {"optimizer state": float(run.state_bytes), "gradients held for the step": float(run.gradient_bytes)})
        for name in demo.chosen
        for run in demo.rows(name)[:1]
    ]
    return bars("What does the optimizer take?", rows)


def report(demo: Demo, manifest: dict[str, Any]) -> str:
    """One HTML file that needs no other."""
    found, settings = demo.table(), demo.settings
    rows = [
        ["", *(row["method"] for row in found)],
        ["learning rate (chosen)", *(f"{row['learning_rate']:g}" for row in found)],
    ]
    rows += [[label, *(cell(row[key], unit) for row in found)] for key, label, unit in METRICS]
    weights = sum(p.numel() for p in Digits(settings.hidden).parameters())
    lead = (
        f"A network of {weights:,} weights learned the digits 0 to 4 of scikit-learn's 1,797 real images, and was then "
        "finetuned on 5 to 9. After that the head for 0 to 4 was put back. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, settings.seeds))}; nanoadam {nanoadam.__version__}; {demo.seconds:.0f} s."
    )
    grid = ", ".join(f"{lr:g}" for lr in settings.learning_rates)
    foot = [
        f"Learning rate: {manifest['learning_rate_choice']}; the grid is the same for all ({grid}). Task 1 takes no "
        "part in the choice. One point per method proves little, so the first figure shows the whole grid. AdamW keeps "
        "two float32 moments per weight; the gradients counted are those alive between backward and step."
    ]
    plain = {key: value for key, value in manifest.items() if key != "results"}
    title = "demo: what does finetuning on new digits do to old ones?"
    one = ["One seed: this page proves nothing about which is better."] if len(settings.seeds) == 1 else []
    return render(
        title,
        lead,
        rows,
        charts(demo),
        plain,
        foot,
        one,
        _verdict(found),
    )


def _verdict(rows: list[dict[str, Any]]) -> str:
    """What came of it: the new task, the old one, the memory."""
    parts = [
        f"{row['method']} {cell(row['task2'], '%')} on the new digits, {cell(row['task1_after'], '%')} left on the old "
        f"ones, {cell(row['state_bytes'], 'B')} of optimizer state"
        for row in rows
    ]
    return f"{'; '.join(parts)}."
