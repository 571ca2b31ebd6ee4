"""All figures of time and memory in one table, docs/results/figures.csv, made from the JSON files beside it.

    python benchmarks/figures.py            # writes the table
    python benchmarks/figures.py --check    # exit code 1 where it is not what the files say

A row is one figure of one method. To add rows: run a benchmark with `--json docs/results/NAME.json`, its peers in the
same run, and run this program. Rows are never written by hand, and never compared across files: hosts differ.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results"
TABLE = RESULTS / "figures.csv"
HEAD = (
    "file",
    "benchmark",
    "model",
    "setting",
    "method",
    "figure",
    "value",
    "unit",
    "device",
    "torch",
    "date",
    "commit",
)


def figures(name: str, data: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float, str]]:
    """(model, setting, method, figure, value, unit) of one file."""
    kind = data.get("benchmark")
    if kind == "finetune_memory":
        for run in data.get("runs", [data]):
            options = run["settings"]
            setting = f"batch {options['batch']} x {options['sequence']}, {options['dtype']}"
            setting += ", checkpointing" if options["checkpointing"] else ""
            for row in run["results"]:
                yield options["model"], setting, row["method"], "iteration", row["ms_with_refresh"], "ms"
                yield options["model"], setting, row["method"], "peak", row["peak_bytes"]["after"] / 1e9, "GB"
    elif kind == "communication":
        options = data.get("settings", {})
        for row in data.get("results", []):
            if "error" in row:
                continue
            link = row["link"] or f"{options['gpus']} GPUs"
            setting = f"{link}, batch {options['batch']} x {options['sequence']} each"
            yield row["model"], setting, row["method"], "iteration", row["ms"], "ms"
            yield row["model"], setting, row["method"], "sent in a step", row["sent_bytes"] / 1e9, "GB"
            if row["peak_bytes"]:
                yield row["model"], setting, row["method"], "peak of a GPU", row["peak_bytes"] / 1e9, "GB"
    elif kind == "step":
        for model in data["models"]:
            for row in model["results"]:
                for part, times in row["ms"].items():
                    for clock in ("device", "wall"):
                        if times.get(clock) is not None:
                            yield model["model"], part, row["method"], f"{clock} time", times[clock], "ms"
    elif kind == "cpu_step":
        for row in data["results"]:
            yield "MiniLM's shapes", "a step", row["method"], "wall time", row["per_step_ms"], "ms"
    elif kind == "delta":
        options = data["options"]
        for what, ms in data.get("sync_ms", {}).items():
            yield options["model"], f"{options['density']:g}, to a second device", what, "sync", ms, "ms"
        for row in data.get("times", []):
            yield options["model"], f"{options['density']:g}, on one device", row["what"], "wall time", row["ms"], "ms"


def table() -> str:
    """The rows of all files, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or "machine" not in data:
            continue
        machine = data["machine"]
        device = (machine.get("gpu") or {}).get("name") or machine.get("cpu")
        where = (device, machine["versions"]["torch"], machine["date"][:10], (machine["commit"] or "")[:7])
        for model, setting, method, figure, value, unit in figures(path.name, data):
            writer.writerow(
                (path.name, data["benchmark"], model, setting, method, figure, f"{value:.4g}", unit, *where)
            )
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the table is another one"
    )
    arguments = parser.parse_args()
    made = table()
    if arguments.check:
        return int(not TABLE.is_file() or TABLE.read_text() != made)
    TABLE.write_text(made)
    print(f"{TABLE.relative_to(RESULTS.parent.parent)}: {made.count(chr(10)) - 1} figures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
