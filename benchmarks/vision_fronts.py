"""What came out of the front of forgetting: areas, what is lost at levels of task 2, pairs by seed, who dominates whom.

Example: python benchmarks/vision_fronts.py docs/results/forgetting.json --pair "gradient 1 %" "NanoAdam 1 %, static"

Task 1 is also taken from each run's own start: kept = accuracy afterwards - accuracy before task 2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_fronts import shown, spread
from scipy import stats

from nanoadam.comparing import fronts
from nanoadam.paper import front

Run = dict[str, Any]
Row = dict[str, Any]

AXES = ("task2", "kept")
LEVELS = (0.85, 0.90, 0.93)
COLORS = (
    "AdamW", "NanoAdam 1 %", "NanoAdam 10 %", "NanoAdam 0.1 %", "MicroAdam 1 %", "SGD", "largest 1 %", "random 1 %",
    "head only",
)  # fmt: skip
VARIANTS = (
    (
        "NanoAdam 1 %", "NanoAdam 1 %, static", "NanoAdam 1 %, reset", "NanoAdam 1 %, refreshed every 10",
        "largest 1 %", "random 1 %", "gradient 1 %",
    ),
    (
        "NanoAdam 10 %", "largest 10 %", "random 10 %", "NanoAdam 1 %", "NanoAdam 0.1 %", "largest 0.1 %",
        "random 0.1 %",
    ),
)  # fmt: skip


def read(path: Path, epoch: int | None) -> list[Run]:
    """Lines of `nanoadam.paper.front.run`, or a JSON file with them under "runs"; after an epoch if asked."""
    text = path.read_text()
    lines = json.loads(text)["runs"] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]
    runs = [line for line in lines if line["kind"] == "task2"]
    for run in runs:
        if epoch is not None:
            found = [point for point in run.get("course", []) if point[0] == epoch]
            run["task2"], run["task1_after"] = found[0][1:] if found else (None, None)
        after = run.get("task1_after")
        run["task2"], run["task1_after"] = run.get("task2"), after
        run["kept"] = None if after is None else after - run["task1"]
    return runs


def of(runs: Sequence[Run], norms: str, start: str | None) -> list[Run]:
    return [run for run in runs if run["norms"] == norms and run["start"] == (start or run["method"])]


def kept(runs: Sequence[Run], reference: fronts.Point) -> list[Row]:
    """The fronts of task 2 and of what is kept of task 1."""
    return fronts.table(runs, AXES, reference, lambda run: str(run["method"]), lambda run: run["rate"])


def starts(runs: Sequence[Run], method: str) -> dict[int, set[Any]]:
    """By seed, which trainings of task 1 a method's runs began with (the key "series")."""
    own = [run for run in runs if run["method"] == method]
    return {seed: {run.get("series", 1) for run in own if run["seed"] == seed} for seed in {run["seed"] for run in own}}


def areas(runs: Sequence[Run], norms: str, start: str | None, reference: fronts.Point, low: fronts.Point) -> str:
    """Every method under one condition, the largest area first."""
    mine = of(runs, norms, start)
    by_kept = {row["method"]: row for row in kept(mine, low)}
    lines = []
    for row in sorted(front.table(runs, norms, start, reference), key=lambda row: -by_kept[row["method"]]["area_mean"]):
        own = by_kept[row["method"]]
        means = [(point["x"], point["y"]) for point in own["points"]]
        reached = [fronts.at_least(means, level) for level in LEVELS]
        series = sorted(set().union(*starts(mine, row["method"]).values()))
        lines.append(
            [
                row["method"],
                ", ".join(map(str, series)),
                area(row),
                area(own),
                *("-" if value is None else f"{0 - 100 * value:.1f}" for value in reached),
            ]
        )
    head = ["method", "start", "area", "area of kept", *(f"lost at >= {100 * level:g} %" for level in LEVELS)]
    return shown(head, lines, True)


def best(runs: Sequence[Run], methods: Sequence[str], start: str | None) -> str:
    """Each method at the rate with the highest mean of task 2 and of task 1 afterwards, and how far it went."""
    lines = []
    for norms in front.NORMS:
        for method in methods:
            own = [run for run in of(runs, norms, start) if run["method"] == method]
            by_rate = [[run for run in own if run["rate"] == rate] for rate in dict.fromkeys(r["rate"] for r in own)]
            whole = [some for some in by_rate if all(run["kept"] is not None for run in some)]
            if whole:
                some = max(whole, key=lambda some: statistics.mean(run["task2"] + run["kept"] for run in some))
                lines.append(
                    [
                        norms,
                        method,
                        f"{some[0]['rate']:g}",
                        spread([100 * run["task2"] for run in some], ".1f"),
                        spread([-100 * run["kept"] for run in some], ".1f"),
                        spread([moved(run, "l2") for run in some], ".1f"),
                        f"{statistics.mean(100 * moved(run, 'touched') for run in some):.1f} %",
                    ]
                )
    return shown(["BatchNorm", "method", "rate", "task 2", "lost", "l2 moved", "moved"], lines, True)


def moved(run: Run, what: str) -> float:
    return float(run[what] if what in run else run["shift"][what])


def area(row: Row) -> str:
    return f"{row['area_mean']:.3f}" + ("" if row["area_std"] is None else f" ± {row['area_std']:.3f}")


def student(freedom: int, seeds: int) -> float:
    """Deviations of one difference that the mean over seeds must exceed to be beyond 95 % of chance."""
    return float(stats.t.ppf(0.975, freedom)) / math.sqrt(seeds)


def by_seed(runs: Sequence[Run], method: str, reference: fronts.Point) -> dict[int, float]:
    """The area of what is kept, of each seed's runs alone."""
    own = [run for run in runs if run["method"] == method]
    return {
        seed: kept([run for run in own if run["seed"] == seed], reference)[0]["area_mean"]
        for seed in sorted({run["seed"] for run in own})
    }


def pair(runs: Sequence[Run], one: str, other: str, reference: fronts.Point) -> list[str]:
    """Difference of areas: by seed where both began with the same training of task 1, else of the means."""
    first, second = by_seed(runs, one, reference), by_seed(runs, other, reference)
    if not first or first.keys() != second.keys():
        return ["-", "-"]
    begun = starts(runs, one), starts(runs, other)
    differences = [first[seed] - second[seed] for seed in first]
    seeds, mean, deviation, factor = len(differences), statistics.mean(differences), math.nan, math.inf
    if begun[0] == begun[1] and all(len(series) == 1 for series in begun[0].values()):
        shown_by_seed = ", ".join(f"{value:+.3f}" for value in differences)
        if seeds > 1:
            deviation, factor = statistics.stdev(differences), student(seeds - 1, seeds)
    else:
        shown_by_seed = "other start"
        if seeds > 1:
            deviation = math.hypot(statistics.stdev(first.values()), statistics.stdev(second.values()))
            factor = student(2 * (seeds - 1), seeds)
    text = f"{mean:+.3f} ± {deviation:.3f}"
    return [shown_by_seed, f"**{text}**" if abs(mean) > factor * deviation else text]


def covered(runs: Sequence[Run], one: str, other: str, reference: fronts.Point) -> str:
    """How many points of the other's front one's front reaches in both coordinates, of how many; means over seeds."""
    rows = {row["method"]: row for row in kept(runs, reference)}
    if one not in rows or other not in rows:
        return "-"
    first, second = ([(p["x"], p["y"]) for p in rows[name]["front"]] for name in (one, other))
    second = [point for point in second if point[0] > reference[0] and point[1] > reference[1]]
    return f"{sum(any(x >= a and y >= b for x, y in first) for a, b in second)} of {len(second)}"


def compared(runs: Sequence[Run], pairs: Sequence[Sequence[str]], start: str | None, low: fronts.Point) -> str:
    lines = []
    for one, other in pairs:
        cells = []
        for norms in front.NORMS:
            mine = of(runs, norms, start)
            cells += [*pair(mine, one, other, low), covered(mine, one, other, low), covered(mine, other, one, low)]
        lines.append([f"{one} - {other}", *cells])
    head = [f"{norms}: {what}" for norms in front.NORMS for what in ("by seed", "mean", "covers", "is covered")]
    return shown(["pair", *head], lines, True)


# Pictures ----------------------------------------------------------------------------------------------------


def draw(
    axes: Any, rows: Sequence[Row], colors: Sequence[str], title: str, limits: Sequence[tuple[float, float]]
) -> None:
    """Each method's points, joined in the order of their rates."""
    for row in sorted(rows, key=lambda row: colors.index(colored(row, colors))):
        name = colored(row, colors)
        points = sorted((point["setting"], point["x"], point["y"]) for point in row["points"])
        axes.plot(
            [100 * x for _, x, _ in points],
            [100 * y for _, _, y in points],
            "o--" if "paper" in row["method"] else "o-",
            ms=3,
            lw=1.1,
            color=f"C{colors.index(name)}",
            label=f"{row['method']} ({row['area_mean']:.3f})",
        )
    axes.set(xlabel="task 2 (flowers), test accuracy (%)", xlim=limits[0], ylim=limits[1])
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=6.5, loc="lower left", title="area under the front", title_fontsize=6.5)
    axes.grid(lw=0.3)


def colored(row: Row, colors: Sequence[str]) -> str:
    """The method that gives a row its colour: itself, or the one that it is a variation of."""
    return row["method"] if row["method"] in colors else row["method"].split(",")[0]


def pictures(runs: Sequence[Run], start: str, reference: fronts.Point, low: fronts.Point) -> dict[str, Any]:
    """By name: fronts from a common start, with each method's own task 1, and those of the variants."""
    from matplotlib.figure import Figure

    after = "task 1 (CIFAR-10) afterwards (%)"
    common = Figure(figsize=(13, 9.5), layout="constrained")
    for norms, (left, right) in zip(front.NORMS, common.subplots(2, 2), strict=True):
        rows = [row for row in front.table(runs, norms, start, reference) if colored(row, COLORS) in COLORS]
        rows = [row for row in rows if row["method"] in COLORS or ", head" in row["method"]]
        for axes, what, some in (
            (left, "one learning rate for everything", [row for row in rows if ", head" not in row["method"]]),
            (right, "head and norms at a rate of their own", [row for row in rows if "head" in row["method"]]),
        ):
            draw(axes, some, COLORS, f"BatchNorm {norms}; {what}", ((70, 96.5), (20, 90)))
            axes.set_ylabel(after)
    own = Figure(figsize=(13, 4.8), layout="constrained")
    for norms, axes in zip(front.NORMS, own.subplots(1, 2), strict=True):
        rows = front.table(runs, norms, None, reference)
        draw(axes, rows, COLORS, f"BatchNorm {norms}; each method trains both tasks", ((60, 96.5), (5, 90)))
        axes.set_ylabel(after)
    variants = Figure(figsize=(13, 9.5), layout="constrained")
    for norms, panels in zip(front.NORMS, variants.subplots(2, 2), strict=True):
        rows = kept(of(runs, norms, start), low)
        for axes, names, what in zip(panels, VARIANTS, ("1 %: when, which, moments", "densities"), strict=True):
            some = [row for row in rows if row["method"] in names]
            draw(axes, some, names, f"BatchNorm {norms}; {what}", ((75, 96.5), (-40, 3)))
            axes.set_ylabel("task 1, afterwards - before (points)")
    return {"fronts": common, "own": own, "variants": variants}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="forgetting.json, or the metrics.jsonl of a run of the recipe")
    parser.add_argument("--start", default="AdamW", help="the method whose task 1 the others begin with")
    parser.add_argument(
        "--reference", type=float, nargs=2, default=(0.5, 0.1), help="task 2, task 1: areas begin there"
    )
    parser.add_argument(
        "--lost", type=float, default=0.7, help="the loss of task 1 that areas of what is kept begin at"
    )
    parser.add_argument("--epoch", type=int, help="of task 2, of those that were evaluated; the last by default")
    parser.add_argument("--pair", nargs=2, action="append", default=[], help="two methods; any number of times")
    parser.add_argument("--pictures", type=Path, help="folder for the figures")
    options = parser.parse_args(arguments)
    runs = read(options.file, options.epoch)
    reference, low = tuple(options.reference), (options.reference[0], -options.lost)
    missing = {name for both in options.pair for name in both} - {run["method"] for run in runs}
    if missing:
        parser.error(f"there is no method {', '.join(sorted(missing))}")
    for norms in front.NORMS:
        for start in (options.start, None):
            what = f"task 1 by {start}" if start else "each its own task 1"
            print(f"BatchNorm {norms}, {what}", areas(runs, norms, start, reference, low), "", sep="\n")
    if options.pair:
        names = list(dict.fromkeys(name for both in options.pair for name in both))
        print(best(runs, names, options.start), "", sep="\n")
        print(compared(runs, options.pair, options.start, low))
    if options.pictures:
        for name, figure in pictures(runs, options.start, reference, low).items():
            figure.savefig(options.pictures / f"forgetting_{name}.png", dpi=100)


if __name__ == "__main__":
    main()
