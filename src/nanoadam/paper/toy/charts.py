"""The charts of the toy experiment's page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from nanoadam.paper.toy import runs as toy_runs
from nanoadam.reports.charts import Chart, Series, draw
from nanoadam.reports.page import table

MEASURES = (("test_loss", "test loss"), ("distance", "l2 distance / 60"))
COLORS = dict(zip(toy_runs.RULES, (0, 1), strict=True))


def charts(results: dict[str, Any]) -> list[str]:
    """What agrees with the paper, the rates, neurons (figures 3 and 7) and the course of the runs; as HTML."""
    found = [*_choices(results["grid"]), *_rates(results)]
    found += [figure for portrait in results["portraits"] for figure in _neurons(portrait)]
    return found + [figure for name, both in results["readings"].items() for figure in _curves(name, both)]


def _neurons_more(extra: int) -> str:
    return f"{extra} more neuron{'s' * (extra > 1)}"


def agreement(result: dict[str, Any]) -> str:
    """Both, loss, distance or neither."""
    agreed = toy_runs.agrees(result)
    return "both" if all(agreed.values()) else next((name for name, value in agreed.items() if value), "neither")


def _choices(grid: list[dict[str, Any]]) -> list[str]:
    """A cell for every choice: what of the paper's order appears, and how often runs diverged."""
    found = []
    for extra in toy_runs.PAPER:
        own = {
            (c["loss_scale"], c["density"], c["neurons"], c["once"]): result
            for result in grid
            if (c := result["config"])["extra"] == extra
        }
        kinds = sorted({key[2:] for key in own})
        rows: list[Sequence[str]] = [
            ("loss, density", *(f"{'neurons' if n else 'weights'}, {'once' if o else 'every step'}" for n, o in kinds))
        ]
        for scale, density in sorted({key[:2] for key in own}):
            cells = [_agreed(own.get((scale, density, *kind))) for kind in kinds]
            rows.append((f"{scale:g} x MSE, {100 * density:g} %", *cells))
        title = f"Does the paper's order appear, with {_neurons_more(extra)}?"
        note = "Which of loss and distance are in the paper's order; in brackets how many runs diverged."
        inner = f"<figcaption>{html.escape(title)}</figcaption>{table(rows, words=True)}<p>{note}</p>"
        found.append(f'<figure class="across">{inner}</figure>')
    return found


def _agreed(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    text = agreement(result)
    lost = sum(result[rule]["diverged"] for rule in toy_runs.RULES)
    return f"{text} ({lost})" if lost else text


def _rates(results: dict[str, Any]) -> list[str]:
    """Loss and distance over the rate of descent on half the MSE."""
    found = []
    for extra in toy_runs.PAPER:
        own = [result for result in results["rates"] if result["config"]["extra"] == extra]
        rates = [2 * r["config"]["loss_scale"] * r["config"]["finetune_rate"] for r in own]
        critical = results["critical_rate"][str(extra)]
        for key, name in MEASURES:
            series = []
            for rule in toy_runs.RULES:
                means = [result[rule][key]["mean"] for result in own]
                series.append(Series(rule, list(zip(rates, means, strict=True)), color=COLORS[rule]))
                paper = toy_runs.PAPER[extra][rule][key][0]
                series.append(Series(f"paper: {rule}", [(0, paper)], "level", color=COLORS[rule]))
            words = (
                f"Over the seeds, rates up to {min(critical):.3g} to {max(critical):.3g} are stable for all weights."
            )
            found.append(draw(Chart(f"Which rate gives the paper's {name}, with {_neurons_more(extra)}?", series,
                                    x="rate x 2 x loss scale", log=min(rates) > 0, log_y=key == "test_loss",
                                    zero=key != "test_loss", words=words)))  # fmt: skip
    return found


def _neurons(portrait: dict[str, Any]) -> list[str]:
    """Teacher neurons as arrows, the student's as points |a| w, by the sign of a."""
    found, old = [], len(portrait["teacher"]) - portrait["extra"]
    for name in ("pretrained", *toy_runs.RULES):
        teacher = portrait["teacher"][:old] if name == "pretrained" else portrait["teacher"]
        series = []
        for color, what, positive in ((0, "a > 0", True), (1, "a < 0", False)):
            arrows = [(x, y) for sign, x, y in teacher if (sign > 0) == positive]
            points = [(x, y) for sign, x, y in portrait[name] if (sign > 0) == positive]
            series.append(Series(f"teacher, {what}", arrows, "arrows", color=color))
            series.append(Series(f"student, {what}", points, "dots", color=color))
        title = f"Where are the neurons? {name}, {portrait['reading']}, +{portrait['extra']}"
        found.append(draw(Chart(title, series, x="first input", y="second input", square=(-1.5, 1.5),
                                words="First seed; the student's neurons are drawn at |a| w.")))  # fmt: skip
    return found


def _curves(name: str, results: list[dict[str, Any]]) -> list[str]:
    """Test loss and distance while finetuning, mean over the seeds that did not diverge."""
    found = []
    for result in results:
        for key, label in MEASURES:
            series = [
                Series(rule, list(zip(result[rule]["curves"]["steps"], result[rule]["curves"][key], strict=True)),
                       color=COLORS[rule])
                for rule in toy_runs.RULES
            ]  # fmt: skip
            title = f"How does the {label} go? {name}, {_neurons_more(result['config']['extra'])}"
            found.append(draw(Chart(title, series, log=True, log_y=key == "test_loss")))
    return found
