"""Text for people: tables, sizes, and what a message says after an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["align", "duration", "nearest", "short", "size", "unit"]


def align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Text columns, a rule under the first line; the first `left` columns start flush, the others end flush."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [text[0], "-" * len(text[0]), *text[1:]])


def unit(largest: int) -> tuple[str, int]:
    """The unit for a table whose largest entry is that many bytes, and its size in bytes."""
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next(((name, size) for name, size in units if largest >= size), ("B", 1))


def short(number: float) -> str:
    """Two decimals, or four digits below one, without trailing zeros."""
    text = f"{number:.2f}" if number >= 1 else f"{number:.4f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(count: float) -> str:
    """Bytes as people read them, powers of 1,000."""
    for name in ("B", "kB", "MB"):
        if abs(count) < 1_000:
            return f"{count:.3g} {name}"
        count /= 1_000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Time as people say it."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message says after an unknown name: the nearest known one, then all of them if they are few."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(map(str, names))}" if len(names) <= 16 else hint.rstrip(".")
