"""What commands print: tables on stdout, and on stderr what they are at: as a bar, or in lines without a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
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

from nanoadam.text import duration, size

EVERY = 30.0
"""Seconds between lines of progress in a file."""

Tell = Callable[[dict[str, Any]], None]


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """A table on stdout; the first row is its head."""
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    stdout().print(table)


def say(lines: Sequence[str]) -> None:
    """Lines on stderr, as they are."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def training_progress(silent: bool = False) -> Iterator[Tell]:
    """Tells of a run on stderr: what it begins with, then steps, loss, memory and time left."""
    console = Console(stderr=True)
    if silent:
        yield lambda line: None
    elif console.is_terminal:
        with _bar(console) as tell:
            yield tell
    else:
        yield _Lines()


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Tell]:
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading model and data", total=None)

        def tell(line: dict[str, Any]) -> None:
            for text in line.get("about", ()):
                bar.console.print(text, soft_wrap=True, highlight=False, markup=False)
            if "trying" in line:
                bar.update(task, description=f"trying a learning rate of {line['trying']:.2g}")
                return
            bar.update(task, completed=line["step"], total=line["total"])
            if "loss" in line:
                memory = line["memory"].get("peak") or sum(line["memory"].values())
                bar.update(task, description=f"loss {line['loss']:.4g}, {size(memory)}")

        yield tell


class _Lines:
    """Progress as lines: the first steps, then one now and then, and each evaluation."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._loss = ""

    def __call__(self, line: dict[str, Any]) -> None:
        say(line.get("about", ()))
        now, step = time.monotonic(), line["step"]
        if "trying" in line or "about" in line:
            return
        if "loss" in line:
            self._loss = f", loss {line['loss']:.4g}"
        if self._first is None and step:
            self._first = (step, now)
        if line.get("event") == "evaluation" and step:
            measured = ", ".join(f"{name} {value:.4g}" for name, value in line["metrics"].items())
            say([f"step {step:,} of {line['total']:,}: {measured}"])
        elif self._first is not None and step > self._first[0] and now - self._said >= EVERY:
            seconds = (now - self._first[1]) / (step - self._first[0])
            left = duration(seconds * (line["total"] - step))
            say([f"step {step:,} of {line['total']:,}{self._loss}, {left} left"])
            self._said = now


@contextlib.contextmanager
def counting(start: str, silent: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Tells on stderr what is being done and how much of it is done; in lines where there is no terminal."""
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        said = [time.monotonic()]

        def line(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if not silent and now - said[0] >= EVERY:
                say([f"{done:,} of {total:,} done; now {what}"])
                said[0] = now

        yield line
        return
    with progress() as bar:
        task = bar.add_task(start, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def stdout() -> Console:
    """Standard output; as wide as a table needs where it is no terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def progress() -> Progress:
    """A bar on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
