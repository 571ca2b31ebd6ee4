"""`nanoadam finetune`."""

from __future__ import annotations

import datetime
import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from nanoadam.cli.options import EXTRAS, ConfigFile, Json, config_options
from nanoadam.cli.show import stdout, training_progress
from nanoadam.finetuning.config import Config, read

EXAMPLE = (
    "Example: nanoadam finetune --model bert-base-uncased --train train.jsonl --validation dev.jsonl "
    "--density 0.1 --density-end 0.04 --out runs/first"
)


@config_options
def finetune(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; must be new or empty.", show_default="runs/finetune-TIME")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from the last checkpoint of this run folder.", show_default=False)
    ] = None,
    as_json: Json = False,
    keys: dict[str, Any] | None = None,
) -> None:
    """Finetune a model on your data: a run folder with config, manifest, metrics, report and model.

    Every option can stand in a TOML file instead, under its name with underscores.
    """
    if resume is not None and (keys or config or out):
        given = "a config file" if config else "--out" if out else f"--{next(iter(keys or ())).replace('_', '-')}"
        raise ValueError(f"--resume goes on with the run's own config: leave out {given}")
    settings = None if resume is not None else Config(**{**(read(config) if config else {}), **(keys or {})})
    for module in EXTRAS:
        importlib.import_module(module)
    from nanoadam.finetuning import run as lab

    lab.quiet()
    folder = resume or out or Path("runs") / f"finetune-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with training_progress() as tell:
        results = lab.resume(folder, tell) if settings is None else lab.run(settings, folder, tell)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    from nanoadam.reports.page import retained_rows
    from nanoadam.text import size

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in results["final"].items():
        table.add_row(f"validation {name}", f"{value:.4g}")
    for kind, count in results["memory"].items():
        table.add_row(f"memory: {kind}", size(count))
    table.add_row("time per step", f"{results['seconds_per_step']:.3g} s")
    table.add_row("weights moved", f"{100 * results['touched']:.2f} %")
    for row in retained_rows(results):
        table.add_row(*row)
    console = stdout()
    console.print(table)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)
