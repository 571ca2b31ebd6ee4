"""`nanoadam predict` and `nanoadam evaluate`: a finetuned model on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nanoadam.cli.options import EXTRAS, Json, need
from nanoadam.cli.show import counting, print_rows, stdout

PREDICT_EXAMPLE = (
    "Example: nanoadam predict runs/first --data new.csv --out predictions.jsonl Or: "
    "nanoadam predict runs/first --text 'a text like those it was trained on'"
)
EVALUATE_EXAMPLE = "Example: nanoadam evaluate runs/first --data test.csv"

Run = Annotated[Path, typer.Argument(help="Folder of a finished finetune run.", show_default=False)]
Batch = Annotated[int, typer.Option(help="Rows per forward pass.", min=1)]


def predict(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Rows without labels, as finetune reads them.", show_default=False)
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; as often as needed.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to write, one a row; must be new.", show_default="stdout")
    ] = None,
    batch_size: Batch = 32,
    new_tokens: Annotated[int, typer.Option(help="Language models: most tokens to write.", min=1)] = 128,
    as_json: Json = False,
) -> None:
    """What a finetuned model says of rows or texts: one line of JSON for each."""
    if (data is None) == (not text):
        raise ValueError("give either --data (a file) or --text (a text, as often as needed)")
    if out is not None and out.exists():
        raise FileExistsError(f"{out} is there already: choose another name with --out, or delete it first")
    need(EXTRAS)
    from nanoadam.finetuning import use
    from nanoadam.finetuning.run import quiet

    quiet()
    with counting("reading model and data", silent=as_json) as tell:
        rows = use.predict(run, data, list(text or ()), batch_size, new_tokens, tell)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if out is not None:
        from nanoadam.finetuning import folders

        folders.write(out, "".join(line + "\n" for line in lines))
        if not as_json:
            print(f"{len(lines):,} predictions: {out}")
    elif as_json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        print("\n".join(lines))


def evaluate(
    run: Run,
    data: Annotated[str, typer.Option(help="Rows with labels, as finetune reads them.", show_default=False)],
    batch_size: Batch = 32,
    as_json: Json = False,
) -> None:
    """The metrics of a finetuned model on other rows with labels: a test set."""
    need(EXTRAS)
    from nanoadam.finetuning import use
    from nanoadam.finetuning.run import quiet
    from nanoadam.reports.verdict import number

    quiet()
    found = use.evaluate(run, data, batch_size)
    if as_json:
        print(json.dumps(found))
        return
    level = found["baseline"]
    rows: list[tuple[str, ...]] = [("", data, *(["one answer for all"] if level else []), "validation, at the end")]
    for name, value in found["metrics"].items():
        cells = [number(level[name]) if name in level else "-"] if level else []
        rows.append((name, number(value), *cells, number(found["validation"].get(name, float("nan")))))
    print_rows(rows)
    classes = found["details"].get("classes", ())
    if classes:
        print_rows([("class", "precision", "recall", "F1", "rows"),
                    *((row["name"], *(f"{row[k]:.3f}" for k in ("precision", "recall", "f1")), str(row["rows"]))
                      for row in classes)])  # fmt: skip
    for note in found["notes"]:
        stdout().print(f"Note: {note}.", soft_wrap=True, markup=False)
