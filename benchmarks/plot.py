"""Draw what finetune_memory.py has written: peak memory by kind and the time of an iteration, one row per method.

Example: python benchmarks/plot.py docs/results/mem_b1.json docs/results/mem_b8.json --out docs/results/llama-2-7b.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

KINDS = {
    "weights": "#9aa7b2",
    "gradients": "#d9822b",
    "held": "#f2b56b",
    "state": "#2b6ca3",
    "rest at peak": "#d7dde2",
}


def title(settings: dict[str, Any], machine: dict[str, Any]) -> str:
    how = "activations recomputed" if settings["checkpointing"] else "activations kept"
    gpu = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    return f"{settings['model']}, {settings['dtype']}, batch {settings['batch']} x {settings['sequence']}, {how}; {gpu}"


def size(row: dict[str, Any], kind: str) -> float:
    if kind == "rest at peak" and row["peak_bytes"]["after"]:  # a CPU has no peak, and so no rest
        return float(row["peak_bytes"]["after"] - sum(row["bytes"][other] for other in KINDS if other != kind))
    return float(row["bytes"].get(kind) or 0)


def draw(files: list[dict[str, Any]]) -> Figure:
    """One row of two axes per file: GB at the peak, by kind; milliseconds per iteration."""
    counts = [len(file["results"]) for file in files]
    figure = Figure(figsize=(9, 0.9 + sum(0.75 + 0.27 * count for count in counts)), layout="constrained")
    grid = figure.subplots(len(files), 2, squeeze=False, width_ratios=(3, 2), height_ratios=counts)
    for (memory, clock), file in zip(grid, files, strict=True):
        rows = sorted(file["results"], key=lambda row: sum(size(row, kind) for kind in KINDS))
        names = [row["method"] for row in rows]
        left = [0.0] * len(rows)
        for kind, color in KINDS.items():
            widths = [size(row, kind) / 1e9 for row in rows]
            memory.barh(
                names, widths, left=left, color=color, label="activations and rest" if kind == "rest at peak" else kind
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            memory.text(total, y, f" {total:.1f}", va="center", fontsize=8)
        times = [row["ms"] for row in rows]
        clock.barh(names, times, color=["#2b6ca3" if name.startswith("NanoAdam") else "#9aa7b2" for name in names])
        for y, milliseconds in enumerate(times):
            clock.text(milliseconds, y, f" {milliseconds:.0f}", va="center", fontsize=8)
        memory.set(xlabel="GB at the peak", xlim=(0, 1.1 * max(left)))
        clock.set(xlabel="ms per iteration", xlim=(0, 1.15 * max(times)), yticklabels=[])
        memory.set_title(title(file["settings"], file["machine"]), fontsize=9, loc="left")
        for axes in (memory, clock):
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="e" + __doc__.strip().split("\nE")[1])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of finetune_memory.py")
    parser.add_argument("--out", required=True, type=Path, help="an .svg or .png file")
    arguments = parser.parse_args()
    figure = draw([json.loads(file.read_text()) for file in arguments.files])
    figure.savefig(arguments.out, dpi=150, metadata={"Date": None} if arguments.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
