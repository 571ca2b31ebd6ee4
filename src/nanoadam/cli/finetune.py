"""`nanoadam finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoadam.cli.options import EXTRAS, ConfigFile, Json, config_options, need, new_folder
from nanoadam.cli.show import print_rows, stdout, training_progress
from nanoadam.finetuning.config import Config, read
from nanoadam.text import size

EXAMPLE = (
    "Example: nanoadam finetune --model bert-base-uncased --train train.csv --out runs/first Or: "
    "nanoadam finetune --model gpt2 --train chats.jsonl --density 0.01 --retain old.txt Or: "
    "nanoadam finetune --resume runs/first"
)


@config_options
def finetune(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; must be new or empty.", show_default="runs/finetune-TIME")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on from the last checkpoint of this run folder, with --learning-rate at another rate.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    keys: dict[str, Any] | None = None,
) -> None:
    """Finetune a model on your data: a run folder with config, manifest, metrics, report and model.

    Needs --model and --train alone: the task, the columns and the learning rate follow from them, and what was chosen
    is said first. Every option can stand in a TOML file instead, under its name with underscores.
    """  # fmt: skip
    if resume is not None and (config or out):
        given = "a config file" if config else "--out"
        raise ValueError(f"--resume goes on with the run's own config: leave out {given}")
    settings = None if resume is not None else Config(**{**(read(config) if config else {}), **(keys or {})})
    need(EXTRAS)
    from nanoadam.finetuning import processes
    from nanoadam.finetuning import run as single

    single.quiet()
    folder = resume or out or new_folder("finetune")
    with training_progress(silent=as_json or not processes.first()) as tell:
        results = single.resume(folder, tell, keys) if settings is None else single.run(settings, folder, tell)
    if not processes.first():
        return
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    _print(folder, results)


def _print(folder: Path, results: dict[str, Any]) -> None:
    """The last lines: the metric beside its baselines, what is odd, where the model is and how to use it."""
    from nanoadam.reports.run import retained_rows
    from nanoadam.reports.verdict import number, sentence, usage

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    before, level = results.get("before", {}), results.get("baseline", {})
    head = ["", "at the end", *(["before training"] if before else []), *(["one answer for all"] if level else [])]
    rows = [tuple(head)]
    for name, value in results["final"].items():
        cells = [f"validation {name}", number(value)]
        cells += [number(before[name]) if name in before else "-"] if before else []
        cells += [number(level[name]) if name in level else "-"] if level else []
        rows.append(tuple(cells))
    print_rows(rows)
    more = [(f"memory: {kind}", size(count)) for kind, count in results["memory"].items()]
    more += [
        ("time per step", f"{results['seconds_per_step']:.3g} s"),
        ("weights moved", f"{100 * results['touched']:.2f} %"),
    ]
    print_rows([("", ""), *more, *retained_rows(results)])
    console = stdout()
    lines = [sentence(manifest), *(f"Note: {note}." for note in results.get("notes", ()))]
    if (folder / "model").is_dir():
        lines += [f"Model: {folder / 'model'}. To use it:"]
        lines += [f"    {line}" for line in usage(manifest, str(folder / "model"))]
        lines += [f"Or: nanoadam predict {folder} --data FILE"]
    lines.append(f"Report: {folder / 'report.html'}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
