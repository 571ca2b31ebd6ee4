"""What came out of comparisons: every setting, the rate chosen for each variant, fronts over all rates, and pairs.

Example: python benchmarks/compare_fronts.py cola/metrics.jsonl ablations/metrics.jsonl --left "gsm8k: recall@1" \
    --pair nanoadam adamw --svg fronts.svg
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import matplotlib

from nanoadam.comparing import fronts, tables


def rate(run: dict[str, Any]) -> float:
    return float(run["learning_rate"])


def variant(run: dict[str, Any]) -> str:
    return str(run["variant"])


def spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + deviation


def shown(head: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool) -> str:
    if not markdown:
        return common.table(head, rows)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def settings(runs: Sequence[dict[str, Any]], markdown: bool) -> str:
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
    return shown(head, rows, markdown)


def found(runs: Sequence[dict[str, Any]], left: str, reference: fronts.Point) -> list[dict[str, Any]]:
    """`fronts.table` of the metric and of what is left of a measure."""
    points = [{**run, "left": None if run["metric"] is None else run["retained"][left]["after"]} for run in runs]
    return fronts.table(points, ("metric", "left"), reference, variant, rate)


def pairs(runs: Sequence[dict[str, Any]], names: Sequence[Sequence[str]], left: str, markdown: bool) -> str:
    """One variant minus another, seed by seed: at each rate that both have, and at the rates chosen for them.

    The seeds of a comparison share data order and head, so that differences spread less than the runs do.
    """
    chosen = {row["variant"]: row["learning_rate"] for row in tables.table(runs, True)}
    good = [run for run in runs if run["metric"] is not None]
    lines = []
    for one, other in names:
        both = sorted({rate(r) for r in runs if variant(r) == one} & {rate(r) for r in runs if variant(r) == other})
        best = (chosen[one], chosen[other])
        for rates in dict.fromkeys([*((at, at) for at in both), best]):
            first, second = (
                {r["seed"]: r for r in good if (variant(r), rate(r)) == key}
                for key in zip((one, other), rates, strict=True)
            )
            seeds = sorted(first.keys() & second.keys())
            if not seeds:
                continue
            metric = [100 * (first[seed]["metric"] - second[seed]["metric"]) for seed in seeds]
            after = [first[seed]["retained"][left]["after"] - second[seed]["retained"][left]["after"] for seed in seeds]
            lines.append(
                [
                    f"{one} - {other}",
                    " and ".join(f"{at:g}" for at in dict.fromkeys(rates)) + " (chosen)" * (rates == best),
                    ", ".join(f"{value:+.1f}" for value in metric),
                    spread(metric, "+.1f").replace("± +", "± "),
                    ", ".join(f"{value:+.3f}" for value in after),
                    spread(after, "+.3f").replace("± +", "± "),
                ]
            )
    head = ["pair", "rate", "metric x 100 by seed", "mean", f"left of {left} by seed", "mean"]
    return shown(head, lines, markdown)


def summary(
    runs: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    left: str,
    levels: Sequence[float],
    markdown: bool,
) -> str:
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
                spread([100 * value for value in own(runs, best, lambda run: run["metric"])], ".1f"),
                spread(own(runs, best, lambda run: run["retained"][left]["after"]), ".3f"),
                f"{row['area']:.3f}",
                f"{row['area_mean']:.3f}{deviation}",
                *("-" if value is None else f"{value:.3f}" for value in reached),
            ]
        )
    head = ["variant", "rates", "chosen", "edge", "metric x 100", "left", "area", "area by seed"]
    return shown([*head, *(f"left at {100 * level:g}" for level in levels)], lines, markdown)


def own(runs: Sequence[dict[str, Any]], row: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> list[float]:
    """A value of each run of a variant at its chosen rate."""
    return [value(run) for run in runs if (variant(run), rate(run)) == (row["variant"], row["learning_rate"])]


def useless(runs: Sequence[dict[str, Any]], constant: float) -> str:
    """Runs that stopped, and those whose metric is that of one answer to everything."""
    found = []
    for said, that in (
        ("stopped", lambda run: run["metric"] is None),
        (f"metric at most {constant:g}", lambda run: run["metric"] is not None and run["metric"] <= constant),
    ):
        some = Counter(f"{variant(run)} at {rate(run):g}" for run in runs if that(run))
        found.append(f"{said}: " + (", ".join(f"{name} ({count})" for name, count in some.items()) or "none"))
    return "\n".join(found)


def drawn(rows: Sequence[Mapping[str, Any]], labels: tuple[str, str], title: str) -> Any:
    """All fronts in one figure: their points, and the staircase of what each method reached.

    Args:
        rows: as from `table`.
        labels: of the two axes.
        title: above the figure.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        color = f"C{index % 10}"
        style = "-" if index < 10 else "--"
        finite = [p for p in row["points"] if math.isfinite(p["x"]) and math.isfinite(p["y"])]
        axes.plot([p["x"] for p in finite], [p["y"] for p in finite], "o", ms=3, color=color, alpha=0.5)
        front = sorted((p["x"], p["y"]) for p in row["front"])
        if front:
            label = f"{row['method']} ({row['area']:.3f})"
            axes.step(*zip(*front, strict=True), style, where="pre", lw=1.3, color=color, label=label)
            axes.plot(*zip(*front, strict=True), "o", ms=5, color=color)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, title="area under the front", title_fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="metrics.jsonl of comparisons of the same job")
    parser.add_argument("--left", required=True, help='a measure of --retain, like "gsm8k: recall@1"')
    parser.add_argument(
        "--reference", type=float, nargs=2, default=(0.0, 0.0), help="metric and measure; areas begin there"
    )
    parser.add_argument("--level", type=float, action="append", default=[], help="of the metric; any number of them")
    parser.add_argument("--pair", nargs=2, action="append", default=[], help="two variants; any number of times")
    parser.add_argument("--only", type=common.names, help="variants, with commas between them, in the order wanted")
    parser.add_argument("--constant", type=float, default=0.0, help="the metric of one answer to everything")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument("--svg", type=Path, help="where to draw")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for file in options.files for line in file.read_text().splitlines()]
    names = list(dict.fromkeys(map(variant, lines)))
    missing = {*(options.only or []), *(name for pair in options.pair for name in pair)} - set(names)
    if missing:
        parser.error(f"there is no variant {', '.join(sorted(missing))}; there is {', '.join(names)}")
    # a variant's rates may come from several files
    lines.sort(key=lambda line: (names.index(variant(line)), rate(line)))
    wanted = options.only or names
    everything, lines = lines, [line for name in wanted for line in lines if variant(line) == name]
    runs = [line for line in lines if line["metric"] is not None]
    if not runs or any(options.left not in run["retained"] for run in runs):
        parser.error(
            f"not every run has {options.left!r}; there is {', '.join(runs[0]['retained']) if runs else 'no run'}"
        )
    rows = found(lines, options.left, tuple(options.reference))  # with those that diverged: their rates have no mean
    print(
        settings(runs, options.markdown),
        summary(lines, rows, options.left, options.level, options.markdown),
        sep="\n\n",
    )
    if options.pair:
        print("", pairs(everything, options.pair, options.left, options.markdown), sep="\n")
    print("", useless(lines, options.constant), sep="\n")
    if options.svg:
        figure = drawn(rows, ("metric of the new task", f"left of {options.left}"), options.title)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fronts"}):
            figure.savefig(options.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
