"""Figures and the self-contained report of a demo run."""

from __future__ import annotations

import io
import statistics
from typing import Any

from matplotlib.figure import Figure

import nanoadam
from nanoadam.demo.experiment import METRICS, Demo, Digits
from nanoadam.reports.page import inline, render
from nanoadam.text import size

__all__ = ["cell", "figures", "report"]


def cell(spread: dict[str, float | None], unit: str) -> str:
    """Mean and standard deviation; a size that does not vary stands alone."""
    mean, std = spread["mean"], spread["std"]
    if unit == "B":
        return size(mean or 0) if not std else f"{size(mean or 0)} ± {size(std)}"
    scaled = f"{100 * (mean or 0):.1f} %"
    return scaled if std is None else f"{scaled[:-2]} ± {100 * std:.1f} %"


def figures(demo: Demo) -> dict[str, dict[str, bytes]]:
    """Name to `{"png": ..., "svg": ...}`."""
    drawn = {"front": _front(demo), "course": _course(demo), "memory": _memory(demo)}
    result: dict[str, dict[str, bytes]] = {}
    for name, figure in drawn.items():
        result[name] = {}
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            # Without the date the same numbers give the same file.
            figure.savefig(buffer, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
            result[name][suffix] = buffer.getvalue()
    return result


def _front(demo: Demo) -> Figure:
    """What is lost of the old task against what is not learned of the new one, over learning rates."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (method, chosen) in enumerate(demo.chosen.items()):
        errors = [_errors(demo, method, lr) for lr in demo.settings.learning_rates]
        axes.plot(*zip(*errors, strict=True), "o-", color=f"C{index}", ms=4, lw=1, label=method)
        for error, lr in zip(errors, demo.settings.learning_rates, strict=True):
            axes.annotate(f"{lr:g}", error, textcoords="offset points", xytext=(4, 4), fontsize=6, color=f"C{index}")
            if lr == chosen:
                axes.plot(*error, "o", ms=11, mfc="none", mec=f"C{index}")
    axes.set(xscale="log", yscale="log", xlabel="task 2, test error (%)", ylabel="task 1 after, test error (%)")
    axes.set_title("Every learning rate of the grid, lower left is better; rings: chosen on validation", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _errors(demo: Demo, method: str, lr: float) -> tuple[float, float]:
    """Task 2 and task 1 after, per cent, mean over seeds; at least 0.1, since the axes are logarithmic."""
    runs = [o for o in demo.outcomes if o.method == method and o.learning_rate == lr]
    task1, task2 = (statistics.mean(values) for values in zip(*((o.task1_after, o.task2) for o in runs), strict=True))
    return max(0.1, 100 * (1 - task2)), max(0.1, 100 * (1 - task1))


def _course(demo: Demo) -> Figure:
    """Both accuracies per epoch at the chosen learning rates, mean over seeds."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, index, title in zip(
        figure.subplots(1, 2), (0, 1), ("task 1 (old head)", "task 2 (validation)"), strict=True
    ):
        for method in demo.chosen:
            by_epoch = zip(*(o.curve for o in demo.rows(method)), strict=True)
            means = [100 * statistics.mean(point[index] for point in points) for points in by_epoch]
            axes.plot(range(1, len(means) + 1), means, lw=1.2, label=method)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="epoch on task 2", ylabel="accuracy (%)")
    figure.axes[0].legend(fontsize=8)
    return figure


def _memory(demo: Demo) -> Figure:
    """Optimizer state and held gradients, to scale."""
    figure = Figure(figsize=(6, 0.7 + 0.5 * len(demo.chosen)), layout="constrained")
    axes = figure.subplots()
    names = list(demo.chosen)
    state = [demo.rows(n)[0].state_bytes / 1e6 for n in names]
    gradients = [demo.rows(n)[0].gradient_bytes / 1e6 for n in names]
    axes.barh(names, state, label="optimizer state")
    axes.barh(names, gradients, left=state, label="gradients held for the step")
    axes.set(xlabel="MB (1e6 bytes)")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


def report(demo: Demo, manifest: dict[str, Any], svgs: dict[str, bytes]) -> str:
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
    drawn = [f'<figure class="drawn">{inline(svg)}</figure>' for svg in svgs.values()]
    plain = {key: value for key, value in manifest.items() if key != "results"}
    one = ["One seed: this page proves nothing about which is better."] if len(settings.seeds) == 1 else []
    return render(
        "demo: what does finetuning on new digits do to old ones?", lead, rows, drawn, plain, foot, one, _verdict(found)
    )


def _verdict(rows: list[dict[str, Any]]) -> str:
    """What came of it: the new task, the old one, the memory."""
    parts = [
        f"{row['method']} {cell(row['task2'], '%')} on the new digits, {cell(row['task1_after'], '%')} left on the old "
        f"ones, {cell(row['state_bytes'], 'B')} of optimizer state"
        for row in rows
    ]
    return f"{'; '.join(parts)}."
