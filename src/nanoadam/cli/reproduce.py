"""`nanoadam reproduce`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nanoadam.cli.options import EXTRAS, Json, listed, need, new_folder
from nanoadam.cli.show import counting, print_rows, stdout

EXAMPLE = "Example: nanoadam reproduce forgetting --scale small --model mobilenet --data vision --out runs/first"


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
    need(EXTRAS)
    from nanoadam.finetuning import run as single
    from nanoadam.paper import recipe as recipes
    from nanoadam.paper import reproduce as lab

    single.quiet()
    if show:
        print(json.dumps({n: recipes.scales(n) for n in recipes.names()})) if as_json else print_rows(lab.listing())
        return
    if name is None and resume is None:
        raise ValueError(f"say which experiment: {', '.join(recipes.names())}")
    chosen = None if name is None else recipes.load(name, scale or "full")
    if chosen is not None and only is not None:
        chosen = chosen.only(listed("only", only, str))
    folder = resume or out or new_folder(str(name))
    with counting("reading model and data", silent=as_json) as tell:
        if chosen is None:
            results = lab.resume(folder, jobs=jobs, progress=tell)
        else:
            results = lab.run(chosen, folder, data=data, model=model, jobs=jobs or 1, progress=tell)
    if as_json:
        print(json.dumps({"out": str(folder), **results}))
        return
    print_rows(lab.lines(results))
    for line in results["notes"]:
        stdout().print(line, soft_wrap=True)
    stdout().print(f"Report: {folder / 'report.html'}", soft_wrap=True)
