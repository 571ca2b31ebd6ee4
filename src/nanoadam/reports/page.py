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
