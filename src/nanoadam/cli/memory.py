"""`nanoadam memory`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from nanoadam import memory as costs
from nanoadam.cli.options import Json

EXAMPLE = "Example: nanoadam memory --model DIR_OR_ID --density 0.1 --batch-size 8 --sequence 512"


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
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of a batch: activations are counted too (with --model).", show_default=False),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens of a row.", show_default="512, or what the model takes if that is less")
    ] = None,
    checkpoint_activations: Annotated[bool, typer.Option(help="They are recomputed in backward.")] = False,
    as_json: Json = False,
) -> None:
    """What finetuning takes with each optimizer: state, weights and gradients, by formula.

    Give --params or --model; with --batch-size the peak of an iteration, found by running the model without data.
    """
    if (params is None) == (model is None):
        raise ValueError("give either --params (a number of weights) or --model (a folder or a hub id)")
    if batch_size is not None and model is None:
        raise ValueError("--batch-size needs --model: a number of weights has no activations")
    shared: dict[str, Any] = {"params": params, "model": model, "density": density, "weight_dtype": dtype}
    shared |= {"batch": batch_size, "sequence": sequence, "checkpointing": checkpoint_activations}
    if method is None:
        rows = costs.table(**shared, granularity=granularity)
    else:
        rows = [costs.estimate(method, **shared, granularity=granularity or "weight")]
    assumed = model is None and dtype is None
    print(json.dumps([row.to_dict() for row in rows]) if as_json else costs.render(rows, assumed=assumed))
