"""The self-contained report of a finetuning run: its results, its course in plots, and how it was run."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nanoadam.reports import charts
from nanoadam.text import size

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .3em .9em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em }
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanoadam: $title</title><style>$style</style></head><body>
<h1>$title</h1>
<p>$lead</p>
$table
$figures
<h2>How it was run</h2>
<pre>$manifest</pre>
</body></html>
""")


def page(manifest: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """One HTML file that needs no other.

    Args:
        manifest: with its settings and results.
        lines: of metrics.jsonl.
    """
    results, settings = manifest["results"], manifest["settings"]
    rows: list[tuple[str, ...]] = [("", "at the end")]
    rows += [(name, f"{value:.4g}") for name, value in results["final"].items()]
    rows += [(f"memory: {kind}", size(count)) for kind, count in results["memory"].items()]
    rows += [
        ("time per step", f"{results['seconds_per_step']:.3g} s"),
        ("weights moved", f"{100 * results['touched']:.2f} %"),
        ("l2 distance moved", f"{results['l2_moved']:.4g}"),
    ]
    rows += retained_rows(results)
    head = "" if settings["head_learning_rate"] is None else f" (head: {settings['head_learning_rate']:g})"
    lead = (
        f"{settings['model']} ({manifest['model']['parameters']:,} weights), {settings['task']} on "
        f"{settings['train']}, {settings['optimizer']}, learning rate {settings['learning_rate']:g}{head}, "
        f"seed {settings['seed']}, {results['steps']} steps."
    )
    return render(f"finetune: {settings['task']}", lead, rows, charts.figures(lines, results["metric"]), manifest)


def retained_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What is left of what was to be retained, and how much that is less."""
    rows = []
    for label, found in results["retained"].items():
        rows.append((f"{label}, after (before: {found['before']:.4g})", f"{found['after']:.4g}"))
        rows.append((f"{label}, forgetting", f"{found['forgetting']:.4g}"))
    return rows


def render(
    title: str,
    lead: str,
    rows: list[tuple[str, ...]],
    drawn: list[Figure],
    manifest: dict[str, Any],
    foot: Sequence[str] = (),
) -> str:
    """A page from its parts; the first row is the table's head, `foot` has a line each under the table."""
    table = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    )
    return _PAGE.substitute(
        title=html.escape(title),
        style=STYLE,
        lead=html.escape(lead),
        table=f"<table>{table}</table>" + "".join(f"<p>{html.escape(line)}</p>" for line in foot),
        figures="".join(f"<figure>{_svg(figure)}</figure>" for figure in drawn),
        manifest=html.escape(json.dumps(manifest, indent=2)),
    )


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text that can be searched and read aloud
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue())


def inline(svg: bytes) -> str:
    """Without the XML prologue, which has no place inside HTML."""
    text = svg.decode()
    return text[text.index("<svg") :]
