"""`nanoadam memory`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nanoadam import memory as costs
from nanoadam.cli.options import Json

EXAMPLE = "Example: nanoadam memory --params 6.275e9"


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
    granularity: Annotated[
        str | None,
        typer.Option(
            help=f"What NanoAdam selects: {' or '.join(costs.GRANULARITIES)} (whole input columns of linear layers).",
            show_default="weight, and with --model both",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and gradients: bfloat16, float32 or float16.", show_default="the model's, or bfloat16"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What finetuning takes with each optimizer, by formula: state, weights and gradients.

    Give --params or --model. Activations are not counted.
    """
    if (params is None) == (model is None):
        raise ValueError("give either --params (a number of weights) or --model (a folder or a hub id)")
    if method is None:
        rows = costs.table(params=params, model=model, density=density, granularity=granularity, weight_dtype=dtype)
    else:
        rows = [
            costs.estimate(
                method,
                params=params,
                model=model,
                density=density,
                weight_dtype=dtype,
                granularity=granularity or "weight",
            )
        ]
    assumed = model is None and dtype is None
    print(json.dumps([row.to_dict() for row in rows]) if as_json else costs.render(rows, assumed=assumed))
