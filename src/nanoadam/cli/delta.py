"""`nanoadam delta`: finetunes as patches."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from nanoadam.cli.options import EXTRAS, Json, listed, need
from nanoadam.cli.show import counting, print_rows
from nanoadam.text import size

if TYPE_CHECKING:
    from nanoadam.delta import Patch
    from nanoadam.delta.sources import Progress as Told

EXAMPLE = "Example: nanoadam delta diff base-model finetuned-model finetuned.safetensors"

app = typer.Typer(
    name="delta",
    help="Finetunes as patches: small to keep, exact to apply.",
    epilog=EXAMPLE,
    rich_markup_mode=None,
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="Folder of a saved model, or a safetensors file.", metavar="MODEL")]
Base = Annotated[str, typer.Argument(help="Folder of the base model, or a safetensors file.", metavar="BASE")]
Of = Annotated[Path, typer.Argument(help="The patch, or the folder that it is in.", metavar="PATCH")]
Strength = Annotated[float, typer.Option(help="1 is the finetuned model, 0 the base; between them what lies between.")]


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Told]:
    """Bytes done, on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _new(out: Path) -> Path:
    if out.exists():
        raise ValueError(f"{out} exists already: choose another name, nothing is written over")
    return out


@app.command(epilog="Example: nanoadam delta diff base-model finetuned-model finetuned.safetensors")
def diff(
    base: Base,
    tuned: Annotated[
        str, typer.Argument(help="Folder of the finetuned model, or a safetensors file.", metavar="TUNED")
    ],
    out: Annotated[Path, typer.Argument(help="Where the patch goes.", metavar="OUT")],
    name: Annotated[
        str | None, typer.Option(help="Name of the base model, for people.", show_default="its folder's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the patch that makes a finetuned model of its base. Reads one tensor at a time."""
    from nanoadam import delta as patches

    with _bar("comparing") as told:
        patch = patches.diff(base, tuned, out=_new(out), name=name, progress=told)
    _show_info(patch, out, as_json)


@app.command(epilog="Example: nanoadam delta apply base-model finetuned.safetensors finetuned-model")
def apply(
    base: Base,
    patch: Of,
    out: Annotated[Path, typer.Argument(help="Where the finetuned model goes: a new folder, or file.", metavar="OUT")],
    strength: Strength = 1.0,
    verify: Annotated[bool, typer.Option(help="Hold file, base and result against their hashes.")] = True,
    as_json: Json = False,
) -> None:
    """Make the finetuned model of a base and a patch, in every bit. Reads one tensor at a time; the base stays."""
    from nanoadam import delta as patches

    with _bar("applying") as told:
        found = patches.apply(base, patch, strength, out=_new(out), verify=verify, progress=told)
    if as_json:
        print(json.dumps({"out": str(out), "tensors": len(found), "weights": found.count, "strength": strength}))
    else:
        print(f"{out}: {len(found):,} tensors changed, {found.count:,} weights")


@app.command(epilog="Example: nanoadam delta info finetuned.safetensors")
def info(
    patch: Of,
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for each tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a patch holds, and check that it is whole."""
    from nanoadam import delta as patches

    _show_info(patches.Patch.load(patch), patch, as_json, tensors=tensors)


def _show_info(patch: Patch, path: Path, as_json: bool, *, tensors: bool = False) -> None:
    from nanoadam import delta as patches

    about = patches.info(patch)
    file = path / patches.FILE if path.is_dir() else path
    about = {"file": str(file), "file_bytes": file.stat().st_size, **about}
    if as_json:
        print(json.dumps(about))
        return
    versions = ", ".join(f"{key} {value}" for key, value in about["notes"].items())
    print(f"{file}: {size(about['file_bytes'])}, made on {about['base'] or 'a base without a name'} ({versions})")
    print_rows(_rows(about, tensors))
    kept = "" if about["untouched"] is None else f"{about['untouched']:,} tensors stay as they are. "
    gone = f"Without {', '.join(about['removed'][:5])}. " if about["removed"] else ""
    print(f"{kept}{gone}{about['weights']:,} weights of {about['of_weights']:,} in the tensors that change")


def _rows(about: dict[str, Any], tensors: bool) -> list[tuple[str, ...]]:
    if tensors:
        rows: list[tuple[str, ...]]
        rows = [("tensor", "kind", "dtype", "weights", "share", "size", "bytes/position")]
        for each in about["tensors"]:
            share = f"{100 * each['weights'] / max(1, each['of_weights']):.3g} %"
            sizes = (size(each["bytes"]), _per(each["position_bytes"], each["weights"]))
            rows.append((each["name"], each["kind"], each["dtype"], f"{each['weights']:,}", share, *sizes))
        return rows
    rows = [("kind", "tensors", "weights", "size", "bytes/position", "bytes/weight")]
    for kind, found in about["kinds"].items():
        if found["tensors"]:
            per = (_per(found["position_bytes"], found["weights"]), _per(found["bytes"], found["weights"]))
            rows.append((kind, f"{found['tensors']:,}", f"{found['weights']:,}", size(found["bytes"]), *per))
    return rows


def _per(count: int, weights: int) -> str:
    return f"{count / weights:.3f}" if count and weights else "-"


@app.command(epilog="Example: nanoadam delta verify base-model finetuned.safetensors")
def verify(model: Model, patch: Of, as_json: Json = False) -> None:
    """Say whether a model is the base of a patch, the finetuned model, or neither (exit code 1).

    Looks at every tensor, also those that the patch leaves alone.
    """
    from nanoadam import delta as patches

    with _bar("reading") as told:
        found = patches.verify(model, patch, progress=told)
    state = "base" if found.is_base else "tuned" if found.is_tuned else "other"
    if as_json:
        counts = {"base": found.base, "tuned": found.tuned, "same": found.same}
        print(json.dumps({"state": state, **counts, "other": found.other, "unknown": found.unknown}))
    elif state == "other":
        what = (
            f"{len(found.other)} tensors are neither" if found.other else "some tensors are finetuned, others are not"
        )
        print(f"{model} is neither the base nor the finetuned model: {what}")
        for name in found.other[:10]:
            print(f"  {name}")
    else:
        is_what = "the base of this patch" if state == "base" else "the finetuned model"
        unknown = f"; of {len(found.unknown)} more the patch says nothing" if found.unknown else ""
        print(f"{model} is {is_what}: {found.base + found.tuned + found.same:,} tensors are as they should be{unknown}")
    if state == "other":
        sys.stdout.flush()
        raise typer.Exit(1)


@app.command(epilog="Example: nanoadam delta compose monday.safetensors tuesday.safetensors both.safetensors")
def compose(
    first: Annotated[Path, typer.Argument(help="A patch.", metavar="FIRST")],
    second: Annotated[
        Path, typer.Argument(help="Made on what the first makes, or of other weights of its base.", metavar="SECOND")
    ],
    out: Annotated[Path, typer.Argument(help="Where the patch of both goes.", metavar="OUT")],
    as_json: Json = False,
) -> None:
    """Make one patch of two."""
    from nanoadam import delta as patches

    patches.compose(first, second).save(_new(out))
    _show_info(patches.Patch.load(out, verify=False), out, as_json)


@app.command(epilog="Example: nanoadam delta export base-model finetuned.safetensors adapter")
def export(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base model.", metavar="BASE")],
    patch: Of,
    out: Annotated[Path, typer.Argument(help="Where the adapter goes.", metavar="OUT")],
    exact: Annotated[bool, typer.Option(help="Refuse an adapter that misses some weights by a bit.")] = True,
    as_json: Json = False,
) -> None:
    """Write a patch as a PEFT adapter (SHiRA), where that format can hold it."""
    import transformers

    from nanoadam.finetuning import patches as whole
    from nanoadam.finetuning import shira

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(str(patch if (patch / "config.json").is_file() else base))
    model = whole.model_class(config).from_pretrained(base, config=config, dtype=config.dtype or "auto")
    done = shira.export(model, patch, _new(out), exact=exact)
    if as_json:
        print(json.dumps({"out": str(out), **vars(done)}))
    else:
        print(f"{out}: {done.layers} layers with r = {done.rank}, {done.whole} modules whole, {done.weights:,} weights")


@app.command(epilog="Example: nanoadam delta front runs/first --retain pairs.tsv")
def front(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    strengths: Annotated[
        str, typer.Option(help="Separated by commas; 0 is the base, 1 the finetuned model.")
    ] = "0,0.25,0.5,0.75,1,1.25",
    retain: Annotated[
        str | None, typer.Option(help="What must not be forgotten, separated by commas.", show_default="the run's own")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Page to write, and a .json beside it.", show_default="in RUN")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a finetune at several strengths: the new task against what is left of what was known."""
    need(EXTRAS)
    from nanoadam.finetuning import folders
    from nanoadam.finetuning import strengths as fronts
    from nanoadam.finetuning.run import quiet
    from nanoadam.reports.verdict import METRICS, number

    quiet()
    chosen = listed("strengths", strengths, float)
    kept = listed("retain", retain, str) if retain else ()
    with counting("reading model and data", silent=as_json) as tell:
        found = fronts.front(run, chosen, kept, tell)
    path = out or run / "front.html"
    folders.write(path, fronts.page(found))
    folders.write(path.with_suffix(".json"), fronts.as_json(found))
    if as_json:
        print(json.dumps({**found, "page": str(path)}))
        return
    metric = found["metric"]
    print_rows([
        ("strength", METRICS.get(metric, metric), *found["rows"][0]["retained"]),
        *(
            (f"{row['strength']:g}", *map(number, (row["metrics"][metric], *row["retained"].values())))
            for row in found["rows"]
        ),
    ])  # fmt: skip
    print(f"Page: {path}")
