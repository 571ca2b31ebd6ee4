"""The command `nanoadam`. What a user can get wrong ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import nanoadam
from nanoadam import memory as costs
from nanoadam.baselines import BASELINES
from nanoadam.lab.config import FIELDS, Config, read
from nanoadam.lab.shapes import MODELS

try:
    import typer
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
    from rich.table import Column, Table
except ModuleNotFoundError as missing:
    if missing.name not in {"typer", "rich"}:
        raise
    print(f"nanoadam: the command needs {missing.name}: pip install 'nanoadam[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from nanoadam.lab.demo import Demo

__all__ = ["main"]

# Which extra brings a module that a command wants.
EXTRAS = dict.fromkeys(("sklearn", "matplotlib", "numpy", "tomli_w"), "demo")
LAB_EXTRAS = dict.fromkeys(("transformers", "datasets", "accelerate", "scipy", "PIL", "filelock"), "lab")

app = typer.Typer(
    name="nanoadam",
    help="Finetune pretrained models with Adam moments for the smallest weights only.",
    epilog="Example: nanoadam demo",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        command = typer.main.get_command(app)
        result = command.main(args=None if argv is None else list(argv), prog_name="nanoadam", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except ImportError as error:
        if error.name is None:  # raised by this library, with the remedy
            return _refuse(str(error))
        module = error.name.partition(".")[0]
        extras = EXTRAS | LAB_EXTRAS
        if module not in extras or not isinstance(error, ModuleNotFoundError):
            raise
        return _refuse(f"this command needs {module}, which is not installed: pip install 'nanoadam[{extras[module]}]'")
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except Exception as error:
        # The parser's own errors; their class has moved between releases of typer, their method has not.
        if not hasattr(error, "format_message"):
            raise
        return _refuse(f"{str(error.format_message()).rstrip('.')} (see nanoadam --help)")
    if result == 130:
        print("nanoadam: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _refuse(sentence: str) -> int:
    print(f"nanoadam: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(nanoadam.__version__)
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog="Example: nanoadam memory --params 6.275e9")
def memory(
    params: Annotated[
        float | None, typer.Option(help="Number of weights, all of them selected from.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with a config.json, or a hub id: only the config is read.", show_default=False),
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the weights that NanoAdam and MicroAdam select.")] = 0.01,
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(costs.METHODS)}; all by default.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What finetuning takes with each optimizer, by formula: state, weights and gradients.

    Give --params or --model. Activations are not counted.
    """
    if (params is None) == (model is None):
        raise ValueError("give either --params (a number of weights) or --model (a folder or a hub id)")
    if method is None:
        rows = costs.table(params=params, model=model, density=density)
    else:
        rows = [costs.estimate(method, params=params, model=model, density=density)]
    print(json.dumps([row.to_dict() for row in rows]) if as_json else costs.render(rows))


@app.command(epilog="Example: nanoadam demo --seeds 5 --out runs/first")
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
    for module in EXTRAS:  # what is missing must be said before the work, not after it
        importlib.import_module(module)
    from nanoadam.lab import demo as lab
    from nanoadam.lab import runs

    out = out or Path("runs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    runs.prepare_folder(out)
    with _progress() as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = lab.run(lab.Settings(seeds=tuple(range(seeds))), tell)
    lab.write_folder(result, out)
    if as_json:
        print(json.dumps({"out": str(out), "seconds": round(result.seconds, 1), "methods": result.table()}))
    else:
        _print_demo(result, out)


def _print_demo(result: Demo, out: Path) -> None:
    from nanoadam.lab.demo import METRICS
    from nanoadam.lab.plots import cell

    rows: list[dict[str, Any]] = result.table()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right", no_wrap=True)
    table.add_row("learning rate (chosen)", *(f"{row['learning_rate']:g}" for row in rows))
    for key, label, unit in METRICS:
        table.add_row(label, *(cell(row[key], unit) for row in rows))
    console = _console()
    console.print(table)
    seeds = len(result.settings.seeds)
    console.print(f"{seeds} seed{'s: mean ± standard deviation' if seeds > 1 else ''}; {result.seconds:.0f} s")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def _config_options(command: Callable[..., None], only: frozenset[str] = frozenset(FIELDS)) -> Callable[..., None]:
    """Give a command an option for every key of a config, or only some; it gets those that were given as `keys`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "keys"]
    hints = typing.get_type_hints(Config)
    several_of = {name for name in FIELDS if typing.get_origin(hints[name]) is tuple}
    options = []
    for field in (field for name, field in FIELDS.items() if name in only):
        several = field.name in several_of
        words = field.metadata["help"] + (" Separated by commas." if several else "")
        choices = f" [{'|'.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
        about = typer.Option(
            help=words + choices,
            show_default=str(field.default) if field.default not in (None, "", ()) else False,
            rich_help_panel=field.metadata["section"].capitalize(),
        )
        kind: Any = Annotated[(str if several else hints[field.name]) | None, about]
        options.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def with_keys(**given: Any) -> None:
        mine = {parameter.name: given.pop(parameter.name) for parameter in own}
        keys = {name: value for name, value in given.items() if value is not None}
        for name in keys.keys() & several_of:
            keys[name] = tuple(part.strip() for part in keys[name].split(","))
        command(**mine, keys=keys)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_keys.__name__, with_keys.__doc__ = command.__name__, command.__doc__
    with_keys.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
    with_keys.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_keys


ConfigFile = Annotated[
    Path | None, typer.Argument(help="TOML file with keys; options win over it.", show_default=False)
]


@app.command(
    epilog="Example: nanoadam finetune --model bert-base-uncased --train train.jsonl --validation dev.jsonl "
    "--density 0.1 --density-end 0.04 --out runs/first"
)
@_config_options
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
    for module in EXTRAS | LAB_EXTRAS:
        importlib.import_module(module)
    from nanoadam.lab import finetune as lab

    lab.quiet()
    folder = resume or out or Path("runs") / f"finetune-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with _training_progress() as tell:
        results = lab.resume(folder, tell) if settings is None else lab.run(settings, folder, tell)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    from nanoadam.lab.plots import size
    from nanoadam.lab.report import retained_rows

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
    console = _console()
    console.print(table)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command(
    epilog="Example: nanoadam compare --optimizers adamw,nanoadam --learning-rates 1e-5,1e-4,1e-3 --seeds 0,1,2 "
    "--model bert-base-uncased --train train.jsonl --out runs/compared"
)
@_config_options
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
            show_default="1e-5,1e-4,1e-3",
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Each run is repeated with each.", show_default="0,1,2")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, each in a process of its own, over all visible GPUs.")] = 1,
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
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    for module in EXTRAS | LAB_EXTRAS:
        importlib.import_module(module)
    from nanoadam.lab import compare as lab
    from nanoadam.lab import finetune as single

    single.quiet()
    # A grid's models are not what is asked for, and its times should be the optimizer's.
    chosen: dict[str, Any] = {"save_model": False, "log_touched": False}
    chosen |= {**(read(config, {"compare": lab.KEYS}) if config else {}), **(keys or {})}
    if optimizers is not None:
        chosen |= {"optimizers": _list("optimizers", optimizers, str), "variants": None}
    if learning_rates:
        chosen["learning_rates"] = _grids(learning_rates)
    if seeds is not None:
        chosen["seeds"] = _list("seeds", seeds, int)
    comparison = None if resume is not None else lab.made(chosen)
    folder = resume or out or Path("runs") / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with _progress() as bar:
        task = bar.add_task("reading model and data", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        results = lab.resume(folder, tell, jobs) if comparison is None else lab.run(comparison, folder, tell, jobs)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
    else:
        _print_comparison(results, folder)
    if all(row["learning_rate"] is None for row in results["table"]):
        why = next((reason for row in results["table"] for reason in row["stopped"]), "no run is finished")
        raise ValueError(f"no variant has a result: {why}")


def _print_comparison(results: dict[str, Any], folder: Path) -> None:
    from nanoadam.lab import tables

    console = _console()
    lines = tables.lines(results)
    for first in range(1, len(lines[0]), 6):  # as many columns as fit
        head, *rows = [(row[0], *row[first : first + 6]) for row in lines]
        table = Table(*head, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in tables.foot(results):
        console.print(line, soft_wrap=True)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command(
    epilog="Example: nanoadam reproduce forgetting --scale small --model mobilenet --data vision --out runs/first"
)
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Of the experiment; see --list.", show_default=False)] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="full: the paper's; small: local stand-ins; smoke: tiny random models, only to see it run.",
            show_default="full",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of local copies of the data.", show_default="from the hub")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model, or with a folder for each model.", show_default="from the hub"),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Models, tasks and methods by name, separated by commas.", show_default="all")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at once, where they can be spread over processes.", min=1, show_default="1"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; must be new or empty.", show_default="runs/NAME-TIME")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the experiment in this run folder: what is finished is read.", show_default=False
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the experiments and leave.")] = False,
    as_json: Json = False,
) -> None:
    """The paper's experiments: run one, and print its figures beside the paper's."""
    if resume is not None:
        told = {"the name": name, "--scale": scale, "--data": data, "--model": model, "--only": only, "--out": out}
        given = [option for option, value in {**told, "--list": show or None}.items() if value is not None]
        if given:
            raise ValueError(f"--resume goes on with the experiment's own recipe: leave out {given[0]}")
    for module in EXTRAS | LAB_EXTRAS:
        importlib.import_module(module)
    from nanoadam.lab import finetune as single
    from nanoadam.lab import recipe as recipes
    from nanoadam.lab import reproduce as lab

    single.quiet()
    if show:
        print(json.dumps({n: recipes.scales(n) for n in recipes.names()})) if as_json else _print_rows(lab.listing())
        return
    if name is None and resume is None:
        raise ValueError(f"say which experiment: {', '.join(recipes.names())}")
    chosen = None if name is None else recipes.load(name, scale or "full")
    if chosen is not None and only is not None:
        chosen = chosen.only(_list("only", only, str))
    folder = resume or out or Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with _progress() as bar:
        task = bar.add_task("reading model and data", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if chosen is None:
            results = lab.resume(folder, jobs=jobs, progress=tell)
        else:
            results = lab.run(chosen, folder, data=data, model=model, jobs=jobs or 1, progress=tell)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    _print_rows(lab.lines(results))
    for line in results["notes"]:
        _console().print(line, soft_wrap=True)
    _console().print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    _console().print(table)


_ANALYZED = frozenset(
    name for name, field in FIELDS.items() if field.metadata["section"] in ("model", "data") and name != "metric"
) | {"batch_size", "seed", "device"}


@app.command(
    epilog="Example: nanoadam analyze runs/first. Or: nanoadam analyze --before base --after finetuned. "
    "Or: nanoadam analyze --model bert-base-uncased --train train.jsonl --batch-size 32"
)
@functools.partial(_config_options, only=_ANALYZED)
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
    for module in (*EXTRAS, *LAB_EXTRAS) if ways[2] else ("matplotlib", "numpy"):
        importlib.import_module(module)
    from nanoadam.lab import analyze as lab
    from nanoadam.lab import runs

    folder = out or Path("runs") / f"analyze-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        runs.prepare_folder(folder)
    with _progress() as bar:
        task = bar.add_task("reading", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if keys:
            from nanoadam.lab import finetune as single

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
    _print_rows(lab.lines(results))
    for line in lab.foot(results):
        _console().print(line, soft_wrap=True)
    _console().print(f"Report: {folder / 'report.html'}", soft_wrap=True)


@app.command(epilog="Example: nanoadam bench --shapes bert-base --optimizers adamw,microadam,nanoadam")
def bench(
    shapes: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with a config.json, or a hub id: only the config is read.", show_default=False),
    ] = None,
    optimizers: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(BASELINES),
    optimizer_options: Annotated[
        str | None, typer.Option(help="Like galore.rank=64, separated by commas.", show_default=False)
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the weights that NanoAdam selects.")] = 0.01,
    mask_interval: Annotated[int, typer.Option(help="Steps between NanoAdam's selections.")] = 100,
    dtype: Annotated[str, typer.Option(help="Of weights and gradients: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed steps of each.")] = 5,
    as_json: Json = False,
) -> None:
    """Every optimizer alone on random tensors of a model's shapes: state, time of a step, peak, and ratio to AdamW."""
    for module in ("matplotlib", "numpy"):
        importlib.import_module(module)
    from nanoadam.lab import bench as lab

    settings = lab.Settings(
        shapes, model, _list("optimizers", optimizers, str),
        () if optimizer_options is None else _list("optimizer_options", optimizer_options, str),
        density, mask_interval, dtype, device, repeats,
    )  # fmt: skip
    with _progress() as bar:
        task = bar.add_task("starting", total=None)
        results = lab.run(settings, lambda what, done, n: bar.update(task, description=what, completed=done, total=n))
    if as_json:
        print(json.dumps(results))
        return
    head, *rows = lab.lines(results)
    table = Table(head[0], *(Column(name, justify="right", no_wrap=True) for name in head[1:]), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = _console()
    console.print(table)
    for line in lab.foot(results):
        console.print(line, soft_wrap=True)


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
        found[name.strip()] = _list("learning_rates", values, float)
    return found


def _list(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} must be numbers separated by commas, got {text!r}") from None


@contextlib.contextmanager
def _training_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr with steps, loss, memory and time left, and nothing where that is no terminal."""
    from nanoadam.lab.plots import size

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


def _console() -> Console:
    """Standard output; as wide as a table needs where it is no terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def _progress() -> Progress:
    """A bar on stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
