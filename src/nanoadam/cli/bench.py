"""`nanoadam bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich import box
from rich.table import Column, Table

from nanoadam.cli.options import Json, listed, need
from nanoadam.cli.show import counting, stdout
from nanoadam.comparing.shapes import MODELS
from nanoadam.finetuning.config import GRANULARITIES, OPTIMIZERS

EXAMPLE = "Example: nanoadam bench --shapes bert-base --optimizers adamw,microadam,nanoadam"


def bench(
    shapes: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with a config.json, or a hub id: only the config is read.", show_default=False),
    ] = None,
    optimizers: Annotated[str, typer.Option(help="Separated by commas.", show_default="all")] = ",".join(OPTIMIZERS),
    optimizer_options: Annotated[
        str | None, typer.Option(help="Like galore.rank=64, separated by commas.", show_default=False)
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the weights that NanoAdam selects.")] = 0.01,
    granularity: Annotated[
        str, typer.Option(help=f"What NanoAdam selects: {' or '.join(GRANULARITIES)} (whole input columns).")
    ] = "weight",
    mask_interval: Annotated[int, typer.Option(help="Steps between NanoAdam's selections.")] = 100,
    dtype: Annotated[str, typer.Option(help="Of weights and gradients: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed steps of each.")] = 5,
    as_json: Json = False,
) -> None:
    """Every optimizer alone on random tensors of a model's shapes: state, time of a step, peak, and ratio to AdamW."""
    need(("numpy",))
    from nanoadam.comparing import bench as lab

    settings = lab.Settings(
        shapes, model, listed("optimizers", optimizers, str),
        () if optimizer_options is None else listed("optimizer_options", optimizer_options, str),
        density, mask_interval, dtype, device, repeats, granularity,
    )  # fmt: skip
    with counting("starting", silent=as_json) as tell:
        results = lab.run(settings, tell)
    if as_json:
        print(json.dumps(results))
        return
    head, *rows = lab.lines(results)
    table = Table(head[0], *(Column(name, justify="right", no_wrap=True) for name in head[1:]), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = stdout()
    console.print(table)
    for line in lab.foot(results):
        console.print(line, soft_wrap=True)
