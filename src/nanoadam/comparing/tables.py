"""What a comparison came to: the table, its lines as text, its page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from nanoadam.finetuning import optimizers
from nanoadam.reports.charts import Chart, Series, bars, draw
from nanoadam.reports.page import render
from nanoadam.text import size

CHOICE = "best mean of the validation metric over the seeds"

Outcome = dict[str, Any]
"""One run's line: variant, optimizer, learning_rate, seed, metric (None if it has none, and `stopped` says why), ..."""

# The rows of the table: key of an outcome, what it says, unit.
ROWS: tuple[tuple[str, str, str], ...] = (
    ("memory_weights", "memory: weights", "B"),
    ("memory_gradients", "memory: gradients", "B"),
    ("memory_state", "memory: optimizer state", "B"),
    ("memory_rest", "memory: rest", "B"),
    ("memory_peak", "memory: peak", "B"),
    ("seconds_per_step", "time per step", "s"),
    ("touched", "weights moved", "%"),
    ("l2_moved", "l2 distance moved", ""),
)


RETAINED = ("before", "after", "forgetting")


def table(outcomes: Sequence[Outcome], higher_is_better: bool) -> list[dict[str, Any]]:
    """One entry per variant at its chosen rate: `{"variant", "optimizer", "learning_rate", <key>: {"mean", "std"}}`.

    A rate at which a run has no finite metric is not chosen. A variant without any other has a learning rate of
    None, and `stopped` holds the reasons. With one seed there is no deviation.
    """
    sign = 1 if higher_is_better else -1
    rows = []
    for name in dict.fromkeys(o["variant"] for o in outcomes):
        own = [o for o in outcomes if o["variant"] == name]
        row: dict[str, Any] = {"variant": name, "optimizer": own[0]["optimizer"]}

        def merit(lr: float, own: list[Outcome] = own) -> float:
            values = [o["metric"] for o in own if o["learning_rate"] == lr]
            good = all(value is not None and math.isfinite(value) for value in values)
            return sign * statistics.mean(values) if good else -math.inf

        best = max(dict.fromkeys(o["learning_rate"] for o in own), key=merit)
        if merit(best) == -math.inf:
            reasons = dict.fromkeys(o["stopped"] for o in own if o.get("stopped"))
            rows.append({**row, "learning_rate": None, "stopped": list(reasons)})
            continue
        chosen = [o for o in own if o["learning_rate"] == best]
        keys = [key for key in ("metric", "forgetting", *(key for key, _, _ in ROWS)) if all(key in o for o in chosen)]
        spreads = {key: _spread([float(o[key]) for o in chosen]) for key in keys}
        retained = {
            label: {key: _spread([o["retained"][label][key] for o in chosen]) for key in RETAINED}
            for label in chosen[0].get("retained") or {}
        }
        rows.append({**row, "learning_rate": best, "runs": len(chosen), **spreads, "retained": retained})
    return rows


def verdict(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], metric: str, better: bool) -> list[str]:
    """What the table says in words: the best variant, what may be as good, and what the grid leaves open."""
    sign = 1 if better else -1
    good = [row for row in rows if row["learning_rate"] is not None]
    if not good:
        return []
    best = max(good, key=lambda row: sign * row["metric"]["mean"])
    lines = [f"Best: {best['variant']} at a learning rate of {best['learning_rate']:g}, {metric} "
             f"{_cell(best['metric'], '')}"]  # fmt: skip
    if best["metric"]["std"] is None:
        lines.append("One seed each proves nothing: differences may be chance, --seeds 0,1,2 tells more")
    else:
        near = [row["variant"] for row in good if row is not best and _level(best, row)]
        if near:
            lines.append(f"Within the spread of the seeds (two standard errors) of it: {', '.join(near)}")
        elif len(good) > 1:
            lines.append(f"No other is within the spread of its {best['runs']} seeds (two standard errors)")
    for row in good:
        tried = sorted({o["learning_rate"] for o in outcomes if o["variant"] == row["variant"]})
        if len(tried) > 1 and row["learning_rate"] in (tried[0], tried[-1]):
            side = "lower" if row["learning_rate"] == tried[0] else "higher"
            lines.append(f"{row['variant']}: its best rate, {row['learning_rate']:g}, is at the edge of its grid; try "
                         f"{side} ones too")  # fmt: skip
    return lines


def _standing(rows: Sequence[dict[str, Any]], better: bool) -> dict[str, str]:
    """Of each variant that has a result: whether it is the best, or as good within the spread of the seeds."""
    good = [row for row in rows if row["learning_rate"] is not None]
    if not good:
        return {}
    best = max(good, key=lambda row: (1 if better else -1) * row["metric"]["mean"])
    if best["metric"]["std"] is None:  # one seed proves nothing of the others
        return {best["variant"]: "best"}
    return {row["variant"]: "best" if row is best else "as good" if _level(best, row) else "behind" for row in good}


def _level(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two means are within two standard errors of their difference."""
    error = math.sqrt(sum((row["metric"]["std"] or 0.0) ** 2 / row["runs"] for row in (a, b)))
    return bool(abs(a["metric"]["mean"] - b["metric"]["mean"]) <= 2 * error)


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, the head first: one column per variant."""
    rows = results["table"]
    text: list[tuple[str, ...]] = [("", *(row["variant"] for row in rows))]
    standing = _standing(rows, results["higher_is_better"])
    if len(rows) > 1 and standing:
        text.append(("", *(standing.get(row["variant"], "") for row in rows)))
    text.append(("learning rate (chosen)", *("none" if r["learning_rate"] is None else f"{r['learning_rate']:g}"
                                             for r in rows)))  # fmt: skip
    for key, label, unit in (("metric", results["metric"], ""), *ROWS):
        if any(key in row for row in rows):
            shared = results["runs_at_once"] if key == "seconds_per_step" else 1
            said = label if shared == 1 else f"{label} ({shared} runs at once)"
            text.append((said, *(_cell(row.get(key), unit) for row in rows)))
    for label in dict.fromkeys(label for row in rows for label in row.get("retained", ())):
        for key in RETAINED:
            cells = (_cell(row.get("retained", {}).get(label, {}).get(key), "") for row in rows)
            text.append((f"{label}, {key}", *cells))
    return text


def foot(results: dict[str, Any]) -> list[str]:
    """What stands under the table: why a variant has no result, and what optimizers cannot do, or do otherwise."""
    stopped = [f"{row['variant']} has no result: {'; '.join(row['stopped'])}" for row in results["table"]
               if row["learning_rate"] is None]  # fmt: skip
    if results["unfinished"]:
        stopped.insert(0, f"{results['unfinished']} runs are not finished")
    if any(row.get("retained") for row in results["table"]):
        stopped.append("forgetting is before - after, of a loss after - before: positive where it has become worse")
    return [*results.get("verdict", ()), *stopped, *optimizers.limit_lines(results["limits"])]


def _cell(spread: dict[str, float | None] | None, unit: str) -> str:
    if spread is None:
        return "-"
    scale = 100 if unit == "%" else 1
    parts = [value for value in (spread["mean"], spread["std"]) if value is not None]
    if unit == "B":
        return " ± ".join(size(value) for value in parts if value)
    return " ± ".join(f"{scale * value:.4g}" for value in parts) + (f" {unit}" if unit else "")


def page(title: str, lead: str, manifest: dict[str, Any]) -> str:
    """One HTML file that needs no other, from a manifest with its results."""
    results = manifest["results"]
    short = {**manifest, "results": {key: value for key, value in results.items() if key != "runs"}}
    words = results.get("verdict") or ()
    one = "One seed each: this page proves nothing about which is better." if len(manifest["seeds"]) == 1 else ""
    verdict = f"{words[0]}." if words else ""
    under = [line for line in foot(results) if line not in words[:1]]
    return render(title, lead, lines(results), _drawn(results), short, under, [one] if one else (), verdict)


def _drawn(results: dict[str, Any]) -> list[str]:
    """The metric, and what was forgotten where that was measured, over learning rates; memory by kind."""
    drawn = []
    for key in ["metric"] + ["forgetting"] * any("forgetting" in run for run in results["runs"]):
        series = []
        for name in dict.fromkeys(one["variant"] for one in results["runs"]):
            found: dict[float, list[float]] = {}
            for one in results["runs"]:
                value = one.get(key)
                if one["variant"] == name and value is not None and one["learning_rate"] > 0:
                    found.setdefault(one["learning_rate"], []).append(value)
            series.append(Series(name, [(rate, statistics.mean(values)) for rate, values in sorted(found.items())]))
        what = results["metric"] if key == "metric" else key
        drawn.append(draw(Chart(f"Which learning rate: {what}, mean over seeds", series, x="learning rate", log=True)))
    kinds = ("weights", "gradients", "state", "rest")
    rows = [
        (row["variant"], {kind: row[f"memory_{kind}"]["mean"] for kind in kinds if f"memory_{kind}" in row})
        for row in results["table"]
        if row["learning_rate"] is not None
    ]
    drawn.append(bars("Where does the memory go?", rows))
    times = [(row["variant"], {"seconds": row["seconds_per_step"]["mean"]}) for row in results["table"]
             if "seconds_per_step" in row]  # fmt: skip
    drawn.append(bars("How long does a step take, in seconds?", times, unit=""))
    return [figure for figure in drawn if figure]
