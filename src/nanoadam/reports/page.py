"""The page that every command writes: one HTML file that needs no other, no network and no script to be read."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanoadam: $title</title><style>$style</style></head><body>
<header><h1>$title</h1>$top</header>
<main>$body</main>
<script>$script</script>
</body></html>
""")


def whole(title: str, verdict: str, blocks: Sequence[str], notes: Sequence[str] = (), lead: str = "") -> str:
    """A page from its parts.

    Args:
        title: of the page.
        verdict: what came of it, in a sentence.
        blocks: of HTML.
        notes: what a reader must know before the figures.
        lead: what was done, in a sentence or two.
    """
    top = f'<p class="verdict">{html.escape(verdict)}</p>' if verdict else ""
    top += f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    top += f'<div class="note">{paragraphs(notes)}</div>' if notes else ""
    style, script = (resources.files(__package__).joinpath(name).read_text() for name in ("page.css", "page.js"))
    return _PAGE.substitute(title=html.escape(title), style=style, top=top, body="\n".join(blocks), script=script)


def section(title: str, *blocks: str) -> str:
    """Blocks under a heading; nothing where they are empty."""
    inner = "".join(blocks)
    return f"<section><h2>{html.escape(title)}</h2>{inner}</section>" if inner else ""


def paragraphs(lines: Sequence[str]) -> str:
    """A paragraph for each line."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def listing(lines: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def code(lines: Sequence[str]) -> str:
    """Lines to be copied."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def table(rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """A table whose first row is its head; of words rather than numbers if told so."""
    if len(rows) < 2:
        return ""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    ]
    return f'<div class="wide"><table{" class=words" if words else ""}>{"".join(lines)}</table></div>'


def charts(drawn: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    inner = "".join(figure for figure in drawn if figure)
    return f'<div class="charts">{inner}</div>' if inner else ""


def fold(title: str, *blocks: str) -> str:
    """What is there for those who look for it."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(blocks)}</details>"


def confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Rows are what is right, columns what was said; darker is a larger share of the row."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = []
    for name, row in zip(names, counts, strict=True):
        total = max(1, sum(row))
        cells = "".join(
            f'<td style="background: rgba(var(--heat), {0.6 * value / total:.2f})">{value:,}</td>' for value in row
        )
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><tr><th>right \\ said</th>{head}</tr>{"".join(lines)}</table></div>'
        "<p>A row for each class that is right, a column for each that the model said.</p>"
    )


def setup(manifest: dict[str, Any]) -> str:
    """How it was run, folded away."""
    plain = {key: value for key, value in manifest.items() if key not in ("results", "details", "versions")}
    parts = [f"<pre>{html.escape(json.dumps(_finite(plain), indent=2))}</pre>"]
    if manifest.get("versions"):
        rows = [("package", "version"), *sorted(manifest["versions"].items())]
        parts.append(fold("Version of everything installed", table(rows, words=True)))
    return fold("How it was run", *parts)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def render(
    title: str,
    lead: str,
    rows: Sequence[Sequence[str]],
    drawn: Sequence[str],
    manifest: dict[str, Any],
    foot: Sequence[str] = (),
    notes: Sequence[str] = (),
    verdict: str = "",
) -> str:
    """A page of one table and its figures; `foot` has a line each under the table.

    Args:
        title: of the page.
        lead: what was done.
        rows: of the table, its head first.
        drawn: figures in HTML.
        manifest: shown under the rest.
        foot: lines under the table.
        notes: what must be known before the table is read.
        verdict: what came of it, in a sentence.
    """
    blocks = [table(rows), paragraphs(foot), charts(drawn), section("Setup", setup(manifest))]
    return whole(title, verdict, blocks, notes, lead)
