"""`nanoadam compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from nanoadam.cli.options import EXTRAS, ConfigFile, Json, config_options, listed, need, new_folder
from nanoadam.cli.show import counting, stdout
from nanoadam.finetuning.config import read

EXAMPLE = (
    "Example: nanoadam compare --optimizers adamw,nanoadam --learning-rates 1e-5,1e-4,1e-3 --seeds 0,1,2 "
    "--model bert-base-uncased --train train.jsonl --out runs/compared"
)


@config_options
def compare(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; must be new or empty.", show_default="runs/compare-TIME")
    ] = None,
    optimizers: Annotated[str | None, typer.Option(help="Separated by commas.", show_default="adamw,nanoadam")] = None,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            help="Tried for each optimizer or variant; NAME=1e-5,1e-4 for that one alone, as often as needed.",
            show_default="a third of, once and three times what is typical of each",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Each run is repeated with each.", show_default="0,1,2")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own, over all visible GPUs.")] = 1,
    keep: Annotated[str, typer.Option(help="best: makes the best run again and keeps its model.")] = "none",
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with this comparison: finished runs are read, others begin again.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    keys: dict[str, Any] | None = None,
) -> None:
    """Several optimizers or variants of one job, each at its best learning rate: one table.

    Takes the options of finetune; --optimizer, --learning-rate and --seed give way to the lists here. Variants stand
    in the TOML file, each in a section compare.variants.NAME with the keys it sets and its learning_rates.
    """
    own = {"--optimizers": optimizers, "--learning-rates": learning_rates, "--seeds": seeds}
    if resume is not None:
        given = [name for name, value in {"a config file": config, "--out": out, **own}.items() if value]
        given += [f"--{name.replace('_', '-')}" for name in keys or ()]
        if given:
            raise ValueError(f"--resume goes on with the comparison's own config: leave out {given[0]}")
    if keep not in ("none", "best"):
        raise ValueError(f"--keep must be none or best, got {keep!r}")
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    need(EXTRAS)
    from nanoadam.comparing import compare as lab
    from nanoadam.finetuning import processes
    from nanoadam.finetuning import run as single

    single.quiet()
    # A grid's models are not what is asked for, and its times should be the optimizer's.
    chosen: dict[str, Any] = {"save_model": False, "log_touched": False}
    chosen |= {**(read(config, {"compare": lab.KEYS}) if config else {}), **(keys or {})}
    if optimizers is not None:
        chosen |= {"optimizers": listed("optimizers", optimizers, str), "variants": None}
    if learning_rates:
        chosen["learning_rates"] = _grids(learning_rates)
    if seeds is not None:
        chosen["seeds"] = listed("seeds", seeds, int)
    comparison = None if resume is not None else lab.made(chosen)
    folder = resume or out or new_folder("compare")
    with counting("reading model and data", silent=as_json or not processes.first()) as tell:
        if comparison is None:
            results = lab.resume(folder, tell, jobs)
        else:
            results = lab.run(comparison, folder, tell, jobs, keep)
    if as_json and processes.first():
        print(json.dumps({"out": str(folder), **results}))
    elif processes.first():
        _print_comparison(results, folder)
    if all(row["learning_rate"] is None for row in results["table"]):
        why = next((reason for row in results["table"] for reason in row["stopped"]), "no run is finished")
        raise ValueError(f"no variant has a result: {why}")


def _print_comparison(results: dict[str, Any], folder: Path) -> None:
    from nanoadam.comparing import tables

    console = stdout()
    lines = tables.lines(results)
    for first in range(1, len(lines[0]), 6):  # as many columns as fit
        head, *rows = [(row[0], *row[first : first + 6]) for row in lines]
        table = Table(*head, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in tables.foot(results):
        console.print(line, soft_wrap=True)
    if results.get("kept"):
        console.print(f"Model of the best run: {folder / 'runs' / results['kept'] / 'model'}", soft_wrap=True)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _grids(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Grids by name, "" for the rest, from texts like "1e-5,1e-4" and "adamw=1e-5,1e-4"."""
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, equals, values = text.rpartition("=")
        if equals and not name:
            raise ValueError(f"--learning-rates must be like 1e-5,1e-4 or adamw=1e-5,1e-4, got {text!r}")
        if name.strip() in found:
            whose = f" for {name.strip()}" if name else ""
            raise ValueError(f"--learning-rates{whose} is given twice: put all rates into one, like 1e-5,1e-4")
        found[name.strip()] = listed("learning_rates", values, float)
    return found
