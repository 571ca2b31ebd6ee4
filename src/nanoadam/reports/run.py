"""The page of a finetuning run."""

from __future__ import annotations

from typing import Any

from nanoadam.reports import charts
from nanoadam.reports.page import render
from nanoadam.text import size


def retained_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What is left of what was to be retained, and how much that is less."""
    rows = []
    for label, found in results["retained"].items():
        rows.append((f"{label}, after (before: {found['before']:.4g})", f"{found['after']:.4g}"))
        rows.append((f"{label}, forgetting", f"{found['forgetting']:.4g}"))
    return rows


def page(manifest: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """One HTML file that needs no other."""
    results, settings = manifest["results"], manifest["settings"]
    rows: list[tuple[str, ...]] = [("", "at the end")]
    rows += [(name, f"{value:.4g}") for name, value in results["final"].items()]
    rows += [(f"memory: {kind}", size(count)) for kind, count in results["memory"].items()]
    rows += retained_rows(results)
    return render(f"finetune: {settings['task']}", "", rows, charts.figures(lines, results["metric"]), manifest)
