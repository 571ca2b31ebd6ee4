"""`nanoadam demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from nanoadam.cli.options import DEMO_EXTRA, Json, need, new_folder
from nanoadam.cli.show import counting, stdout

if TYPE_CHECKING:
    from nanoadam.demo.experiment import Demo

EXAMPLE = "Example: nanoadam demo --seeds 5 --out runs/first"


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; must be new or empty.", show_default="runs/demo-TIME")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds, counted from 0.")] = 3,
    as_json: Json = False,
) -> None:
    """Finetune on new digits, measure what is forgotten of the old ones: AdamW against NanoAdam.

    Real images that come with scikit-learn, no download, about a minute. Prints one table and writes a run folder.
    """
    need(DEMO_EXTRA)
    from nanoadam.demo import experiment as lab
    from nanoadam.demo.folder import write_folder
    from nanoadam.finetuning import folders

    out = out or new_folder("demo")
    folders.prepare_folder(out)
    with counting("starting", silent=as_json) as tell:
        result = lab.run(lab.Settings(seeds=tuple(range(seeds))), tell)
    write_folder(result, out)
    if as_json:
        print(json.dumps({"out": str(out), "seconds": round(result.seconds, 1), "methods": result.table()}))
    else:
        _print_demo(result, out)


def _print_demo(result: Demo, out: Path) -> None:
    from nanoadam.demo.experiment import METRICS
    from nanoadam.demo.figures import cell

    rows: list[dict[str, Any]] = result.table()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right", no_wrap=True)
    table.add_row("learning rate (chosen)", *(f"{row['learning_rate']:g}" for row in rows))
    for key, label, unit in METRICS:
        table.add_row(label, *(cell(row[key], unit) for row in rows))
    console = stdout()
    console.print(table)
    seeds = len(result.settings.seeds)
    console.print(f"{seeds} seed{'s: mean ± standard deviation' if seeds > 1 else ''}; {result.seconds:.0f} s")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
