"""Tables of learning rates from the lines of default_rates.py, in Markdown.

python benchmarks/default_tables.py docs/results/default_rates.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = {"cola": "matthews", "gsm8k": "loss", "math": "loss", "obqa": "loss"}
"""What counts in a task, where it is not accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    lines = [json.loads(line) for path in arguments.files for line in path.read_text().splitlines()]
    lines = [line for line in lines if "error" not in line]
    for title, rows in (("Grids", grids(lines)), ("The rule", rule(lines)), ("Trials", trials(lines))):
        print(f"\n## {title}\n")
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def grids(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each task and method; the best rate is bold."""
    rows = []
    for (task, method), own in _by(lines, lambda line: not line["steps"] and not line.get("rule")).items():
        found = _by_rate(own, task)
        best = _best(found, task)
        cells = [f"{'**' * (r == best)}{r:.2g}: {_cell(v, task)}{'**' * (r == best)}" for r, v in sorted(found.items())]
        rows.append((task, method, str(own[0]["total"]), "; ".join(cells)))
    return [("task", "method", "steps", "rate: result"), ("---",) * 4, *rows]


def rule(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What the command finds beside the best of the grid."""
    best = {}
    for key, own in _by(lines, lambda line: not line["steps"] and not line.get("rule")).items():
        found = _by_rate(own, key[0])
        best[key] = found[_best(found, key[0])], _best(found, key[0])
    rows = []
    for key, own in _by(lines, lambda line: bool(line.get("rule"))).items():
        values = [_value(line, key[0]) for line in own]
        rates = ", ".join(f"{line['rate']:.2g}" for line in own)
        grid, rate = best.get(key, ([math.nan], math.nan))
        rows.append((*key, rates, _cell(values, key[0]), _cell(grid, key[0]), f"{rate:.2g}",
                     _difference(values, grid, key[0])))  # fmt: skip
    head = ("task", "method", "rates found", "result", "best of the grid", "at", "difference")
    return [head, ("---",) * len(head), *rows]


def trials(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The loss after short runs, at each rate."""
    rows = []
    for length in sorted({line["steps"] for line in lines if line["steps"]}):
        for (task, method), own in _by(lines, lambda line, n=length: line["steps"] == n).items():
            found: dict[float, list[float]] = {}
            for line in own:
                found.setdefault(float(f"{line['lr']:.3g}"), []).append((line["final"] or {}).get("loss", math.nan))
            cells = "; ".join(f"{rate:.2g}: {statistics.mean(v):.4g}" for rate, v in sorted(found.items()))
            rows.append((task, method, str(length), cells))
    return [("task", "method", "steps", "rate: loss"), ("---",) * 4, *rows]


def _by(lines: Sequence[dict[str, Any]], wanted: Any) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if wanted(line):
            name = line["optimizer"]
            if name == "nanoadam":
                start, end = line["density"]
                name = f"{100 * start:g} %" + (f" to {100 * end:g} %" if end != start else "")
            if line["head_lr"] is not None:
                name += f", head {line['head_lr']:g}"
            found.setdefault((line["task"], name), []).append(line)
    return found


def _value(line: dict[str, Any], task: str) -> float:
    metric = METRICS.get(task, "accuracy")
    scale = 1 if metric == "loss" else 100
    return scale * line["final"][metric] if line["final"] else math.nan


def _by_rate(lines: Sequence[dict[str, Any]], task: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for line in lines:
        found.setdefault(float(f"{line['lr']:.3g}"), []).append(_value(line, task))
    return found


def _best(found: dict[float, list[float]], task: str) -> float:
    sign = -1 if METRICS.get(task) == "loss" else 1
    means = {rate: statistics.mean(values) for rate, values in found.items()}
    return max(means, key=lambda rate: sign * means[rate] if math.isfinite(means[rate]) else -math.inf)


def _cell(values: Sequence[float], task: str) -> str:
    digits = 3 if METRICS.get(task) == "loss" else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _difference(values: Sequence[float], grid: Sequence[float], task: str) -> str:
    digits = 3 if METRICS.get(task) == "loss" else 1
    return f"{statistics.mean(values) - statistics.mean(grid):+.{digits}f}"


if __name__ == "__main__":
    main()
