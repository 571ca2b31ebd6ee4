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

from nanoadam.lab.config import Config
from nanoadam.lab.plots import inline, size

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


def page(config: Config, manifest: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """One HTML file that needs no other.

    Args:
        config: what was run.
        manifest: with its results.
        lines: of metrics.jsonl.
    """
    results = manifest["results"]
    rows: list[tuple[str, ...]] = [("", "at the end")]
    rows += [(name, f"{value:.4g}") for name, value in results["final"].items()]
    rows += [(f"memory: {kind}", size(count)) for kind, count in results["memory"].items()]
    rows += [
        ("time per step", f"{results['seconds_per_step']:.3g} s"),
        ("weights moved", f"{100 * results['touched']:.2f} %"),
        ("l2 distance moved", f"{results['l2_moved']:.4g}"),
    ]
    rows += retained_rows(results)
    head = "" if config.head_learning_rate is None else f" (head: {config.head_learning_rate:g})"
    lead = (
        f"{config.model} ({manifest['model']['parameters']:,} weights), {config.task} on {config.train}, "
        f"{config.optimizer}, learning rate {config.learning_rate:g}{head}, seed {config.seed}, "
        f"{results['steps']} steps."
    )
    return render(f"finetune: {config.task}", lead, rows, figures(lines, results["metric"]), manifest)


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


def figures(lines: list[dict[str, Any]], metric: str) -> list[Figure]:
    """Loss, the metric, memory by kind, and where there is a density that and the share touched, over steps."""
    trained = [line for line in lines if line["event"] == "train"]
    evaluated = [line for line in lines if line["event"] == "evaluation"]
    first = Figure(figsize=(8, 3), layout="constrained")
    loss, measured = first.subplots(1, 2)
    loss.plot([line["step"] for line in trained], [line["loss"] for line in trained], lw=1, label="training")
    steps = [line["step"] for line in evaluated]
    loss.plot(steps, [line["metrics"]["loss"] for line in evaluated], "o-", ms=3, lw=1, label="validation")
    loss.legend(fontsize=8)
    loss.set(xlabel="step", ylabel="loss", title="Loss")
    measured.plot(steps, [line["metrics"][metric] for line in evaluated], "o-", ms=3, lw=1, color="C2")
    measured.set(xlabel="step", ylabel=metric, title=f"Validation: {metric}")
    drawn = [first, _memory(trained)]
    if any("density" in line for line in trained):
        drawn.append(_density([line for line in trained if "density" in line]))
    return drawn


def _memory(trained: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in ("weights", "gradients", "state", "rest") if kind in trained[-1]["memory"]]
    steps = [line["step"] for line in trained]
    axes.stackplot(
        steps, [[line["memory"][kind] / 1e6 for line in trained] for kind in kinds], labels=kinds, step="post"
    )
    axes.set(xlabel="step", ylabel="MB (1e6 bytes)", title="Memory by kind", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _density(trained: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in trained]
    axes.step(steps, [100 * line["density"] for line in trained], where="post", label="density")
    if all("touched" in line for line in trained):
        axes.plot(steps, [100 * line["touched"] for line in trained], label="selected at least once")
    axes.set(xlabel="step", ylabel="% of the weights selected from", title="Density and touched share", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
