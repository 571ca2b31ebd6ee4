"""What came out of comparisons: every setting, the rate chosen for each variant, and fronts over all rates.

Example: python benchmarks/compare_fronts.py cola/metrics.jsonl ablations/metrics.jsonl --left "gsm8k: recall@1" \
    --svg fronts.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import matplotlib

from nanoadam.lab import fronts, tables


def rate(run: dict[str, Any]) -> float:
    return float(run["learning_rate"])


def variant(run: dict[str, Any]) -> str:
    return str(run["variant"])


def spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + deviation


def settings(runs: Sequence[dict[str, Any]]) -> str:
    """Each variant at each rate: means and standard deviations over seeds."""
    labels = list(runs[0]["retained"])
    rows = []
    for key in dict.fromkeys((variant(run), rate(run)) for run in runs):
        own = [run for run in runs if (variant(run), rate(run)) == key]
        lost = [spread([run["retained"][label]["forgetting"] for run in own], ".3f") for label in labels]
        rows.append(
            [
                key[0],
                f"{key[1]:g}",
                len(own),
                spread([100 * run["metric"] for run in own], ".1f"),
                spread([run["l2_moved"] for run in own], ".1f"),
                f"{statistics.mean(100 * run['touched'] for run in own):.1f} %",
                *lost,
            ]
        )
    head = ["variant", "rate", "seeds", "metric x 100", "l2 moved", "moved", *(f"lost {label}" for label in labels)]
    return common.table(head, rows)


def found(runs: Sequence[dict[str, Any]], left: str, reference: fronts.Point) -> list[dict[str, Any]]:
    """`fronts.table` of the metric and of what is left of a measure."""
    points = [{**run, "left": None if run["metric"] is None else run["retained"][left]["after"]} for run in runs]
    return fronts.table(points, ("metric", "left"), reference, variant, rate)


def summary(runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], left: str, levels: Sequence[float]) -> str:
    """The rate that each variant is given, its area, and the most that is left where the metric reaches a level."""
    chosen = {row["variant"]: row for row in tables.table(runs, True)}
    lines = []
    for row in rows:
        best = chosen[row["method"]]
        if best["learning_rate"] is None:  # every rate has a run that diverged
            lines.append([row["method"], len(row["points"]), "none", "", "", "", *["-"] * (2 + len(levels))])
            continue
        means = [(point["x"], point["y"]) for point in row["points"]]
        rates = sorted(point["setting"] for point in row["points"])
        edge = "lower" if best["learning_rate"] == rates[0] else "upper" if best["learning_rate"] == rates[-1] else ""
        deviation = "" if row["area_std"] is None else f" ± {row['area_std']:.3f}"
        reached = [fronts.at_least(means, level) for level in levels]
        lines.append(
            [
                row["method"],
                len(rates),
                f"{best['learning_rate']:g}",
                edge if len(rates) > 1 else "",
                f"{100 * best['metric']['mean']:.1f}",
                f"{best['retained'][left]['after']['mean']:.3f}",
                f"{row['area']:.3f}",
                f"{row['area_mean']:.3f}{deviation}",
                *("-" if value is None else f"{value:.3f}" for value in reached),
            ]
        )
    head = ["variant", "rates", "chosen", "edge", "metric x 100", "left", "area", "area by seed"]
    return common.table([*head, *(f"left at {100 * level:g}" for level in levels)], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="metrics.jsonl of comparisons of the same job")
    parser.add_argument("--left", required=True, help='a measure of --retain, like "gsm8k: recall@1"')
    parser.add_argument(
        "--reference", type=float, nargs=2, default=(0.0, 0.0), help="metric and measure; areas begin there"
    )
    parser.add_argument("--level", type=float, action="append", default=[], help="of the metric; any number of them")
    parser.add_argument("--svg", type=Path, help="where to draw")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for file in options.files for line in file.read_text().splitlines()]
    runs = [line for line in lines if line["metric"] is not None]
    if not runs or any(options.left not in run["retained"] for run in runs):
        parser.error(
            f"not every run has {options.left!r}; there is {', '.join(runs[0]['retained']) if runs else 'no run'}"
        )
    rows = found(lines, options.left, tuple(options.reference))  # with those that diverged: their rates have no mean
    print(settings(runs), summary(lines, rows, options.left, options.level), sep="\n\n")
    if options.svg:
        figure = fronts.figure(rows, ("metric of the new task", f"left of {options.left}"), options.title)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fronts"}):
            figure.savefig(options.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
