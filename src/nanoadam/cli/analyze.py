"""`nanoadam analyze`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoadam.cli.options import EXTRAS, Json, config_options, need, new_folder
from nanoadam.cli.show import counting, print_rows, stdout
from nanoadam.finetuning.config import FIELDS, Config

_ANALYZED = frozenset(
    name for name, field in FIELDS.items() if field.metadata["section"] in ("model", "data") and name != "metric"
) | {"batch_size", "seed", "device"}


EXAMPLE = (
    "Example: nanoadam analyze runs/first. Or: nanoadam analyze --before base --after finetuned. "
    "Or: nanoadam analyze --model bert-base-uncased --train train.jsonl --batch-size 32"
)


@functools.partial(config_options, only=_ANALYZED)
def analyze(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a finetune run: its model against what it started from.", show_default=False),
    ] = None,
    before: Annotated[Path | None, typer.Option(help="Folder with safetensors.", show_default=False)] = None,
    after: Annotated[Path | None, typer.Option(help="Folder with safetensors.", show_default=False)] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out tensors that only one of the two has.")
    ] = False,
    batches: Annotated[int, typer.Option(help="Of the data, to take the gradient of.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; must be new or empty.", show_default="runs/analyze-TIME")
    ] = None,
    as_json: Json = False,
    keys: dict[str, Any] | None = None,
) -> None:
    """What finetuning moved, or where the gradients of a model fall.

    Takes one of three: a run folder, a pair of checkpoints (--before, --after), or a model and data (--model, --train).
    """
    ways = [run is not None, before is not None or after is not None, bool(keys)]
    if sum(ways) != 1:
        raise ValueError("give one of three: a run folder, --before with --after, or --model with --train")
    if ways[1] and (before is None or after is None):
        raise ValueError(f"--{'after' if after is None else 'before'} is missing: a pair needs both")
    need(EXTRAS if ways[2] else ("numpy",))
    from nanoadam.finetuning import analyze as lab
    from nanoadam.finetuning import folders

    folder = out or new_folder("analyze")
    if folder.exists():
        folders.prepare_folder(folder)
    with counting("reading", silent=as_json) as tell:
        if keys:
            from nanoadam.finetuning import run as single

            single.quiet()
            results = lab.model(Config(**keys), batches, tell)
        elif run is not None:
            results = lab.run_folder(run, tell)
        else:
            results = lab.pair(Path(str(before)), Path(str(after)), skip_missing, tell)
    lab.write_folder(results, folder, {**keys, "batches": batches} if keys else None)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    print_rows(lab.lines(results))
    for line in lab.foot(results):
        stdout().print(line, soft_wrap=True)
    stdout().print(f"Report: {folder / 'report.html'}", soft_wrap=True)
