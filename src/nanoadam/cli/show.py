"""What commands print: tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout; the first row is its head."""
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    stdout().print(table)


@contextlib.contextmanager
def training_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr with steps, loss, memory and time left, and nothing where that is no terminal."""
    from nanoadam.text import size

    console = Console(stderr=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading model and data", total=None)

        def tell(line: dict[str, Any]) -> None:
            bar.update(task, completed=line["step"], total=line["total"])
            if "loss" in line:
                memory = line["memory"].get("peak") or sum(line["memory"].values())
                bar.update(task, description=f"loss {line['loss']:.4g}, {size(memory)}")

        yield tell


def stdout() -> Console:
    """Standard output; as wide as a table needs where it is no terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def progress() -> Progress:
    """A bar on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
