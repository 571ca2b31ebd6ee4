"""What finetuning moved in a pair of checkpoints, and where gradients fall in a model: tables, plots and a report."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoadam import analysis
from nanoadam.analysis import gradients
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import folders
from nanoadam.finetuning.config import Config
from nanoadam.reports.charts import Chart, Series, draw, heat
from nanoadam.reports.page import render

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
Results = dict[str, Any]
GROUPS = ("smallest", "largest", "rest")
DRAWN = 6


def pair(before: Path, after: Path, skip_missing: bool = False, progress: Progress | None = None) -> Results:
    """What finetuning changed: shift by group, touched share and l2 distance, by tensor, by layer and in all.

    Args:
        before: folder of the pretrained weights, in safetensors.
        after: folder of the finetuned ones.
        skip_missing: leave out what only one of them has, a new head for instance, instead of refusing it.
        progress: called before each tensor.

    Returns:
        `{"kind": "pair", "before", "after", "tensors": [...], "layers": [...], "total", "heatmap", "only_before",
        "only_after"}`; the entries of tensors, layers and total are those of `Shift.to_dict`.

    Raises:
        ValueError: if one of them is no checkpoint, the two do not fit, or a weight is not finite; names what.
    """
    tell = progress or (lambda what, done, total: None)
    old, new = analysis.Checkpoint(before), analysis.Checkpoint(after)
    matched = analysis.match(old.shapes, new.shapes)
    for missing, has, lacks in ((matched.only_before, before, after), (matched.only_after, after, before)):
        if missing and not skip_missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{missing[0]} is in {has} and not in {lacks}{more}: pass --skip-missing to leave out what only one has"
            )
    shifts: dict[str, analysis.Shift] = {}
    tell("comparing", 0, len(matched.names))
    for done, (name, shift) in enumerate(analysis.changes(old, new, matched), start=1):
        if not math.isfinite(shift.square):
            raise ValueError(
                f"{name} holds weights that are not finite in {before} or {after}: there is no distance to it"
            )
        shifts[name] = shift
        tell(name, done, len(matched.names))
    layers: dict[int, analysis.Shift] = {}
    for name, shift in shifts.items():
        layer, _ = analysis.place(name)
        if layer is not None:
            layers[layer] = layers.get(layer, analysis.Shift()) + shift
    return {
        "kind": "pair",
        "before": str(before),
        "after": str(after),
        "tensors": [{"name": name, "shape": list(new.shapes[name]), **s.to_dict()} for name, s in shifts.items()],
        "layers": [{"layer": layer, **layers[layer].to_dict()} for layer in sorted(layers)],
        "total": sum(shifts.values(), analysis.Shift()).to_dict(),
        "heatmap": analysis.heatmap({name: s.l2 for name, s in shifts.items() if len(new.shapes[name]) > 1}),
        "only_before": matched.only_before,
        "only_after": matched.only_after,
    }


def run_folder(folder: Path, progress: Progress | None = None) -> Results:
    """The same for a run of `finetune`: from the model that it started from to the one it saved.

    Raises:
        ValueError: if `folder` is no finished run, or its model cannot be had.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    inner = sorted(p.name for p in (folder / "runs").glob("*") if (p / "model").is_dir())
    if not (folder / "model").is_dir():
        if inner:
            raise ValueError(f"{folder} holds several runs: pass one of them, like {folder / 'runs' / inner[0]}")
        raise ValueError(f"{folder} is no finished run of finetune: it holds no model/")
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} is no run folder: it holds no config.toml")
    config = Config(**configs.read(folder / "config.toml"))
    if config.init_from_config:
        raise ValueError(f"the run in {folder} started from random weights: there is nothing to compare its model with")
    return pair(_local(config), folder / "model", skip_missing=True, progress=progress)


def _local(config: Config) -> Path:
    """The folder of a model, from the hub if it is none here."""
    if Path(config.model).is_dir():
        return Path(config.model)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the library raises dozens of kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the model {config.model!r} that the run started from is no folder here and could not be had from the hub "
            f"({reason[:150]})"
        ) from error


def model(config: Config, batches: int = 1, progress: Progress | None = None) -> Results:
    """Where gradients fall in a model at the first step of finetuning: ratio, overlap and points of the plane.

    Args:
        config: which model and data; its task, batch size, seed and device.
        batches: the gradient is that of the mean loss over so many.
        progress: called with what is being done.

    Returns:
        `{"kind": "model", "model", "data", "batches", "batch_size", "tensors": [{"name", "role", "numel", "ratio",
        "independent", "overlap"}], "heatmap" (of the ratio), "scatter": {name: {"weight", "gradient"}}}`.

    Raises:
        ValueError: for whatever a config can get wrong, or if `batches` is not at least 1.
    """
    import torch
    from transformers import set_seed

    from nanoadam.finetuning import job, tasks

    tell = progress or (lambda what, done, total: None)
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    config = job.with_task(config)
    train, validation = job.rows(config)
    set_seed(config.seed)
    task = tasks.make(config, train, validation)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    net = task.model.to(device)  # type: ignore[arg-type]
    rows = task.train if task.keeps_columns else task.train.select_columns(_inputs(net, task.train.column_names))
    order = torch.Generator().manual_seed(config.seed)
    loader = torch.utils.data.DataLoader(
        rows, config.batch_size, shuffle=True, generator=order, collate_fn=task.collator
    )
    todo = [{k: v.to(device) for k, v in batch.items()} for _, batch in zip(range(batches), loader, strict=False)]
    measured = gradients.tensors(net)
    drawn = {
        measured[name][0].data_ptr() for name in _spread([n for n, (_, role) in measured.items() if role != "head"])
    }
    tell("gradients", 0, 1)

    def measure(weight: torch.Tensor, gradient: torch.Tensor) -> dict[str, Any]:
        value: dict[str, Any] = dict(analysis.relation(weight, gradient))
        value = {key: None if math.isnan(number) else number for key, number in value.items()}
        if weight.data_ptr() in drawn:
            value["points"] = analysis.scatter(weight, gradient, points=1500)
        return value

    found = analysis.measure_gradients(net, todo, measure)
    points = {name: value.pop("points") for name, value in found.items() if "points" in value}
    tell("done", 1, 1)
    tensors = [
        {"name": name, "role": measured[name][1], "numel": measured[name][0].numel(), **value}
        for name, value in found.items()
    ]
    return {
        "kind": "model",
        "model": config.model,
        "data": config.train,
        "batches": len(todo),
        "batch_size": config.batch_size,
        "tensors": tensors,
        "heatmap": analysis.heatmap(
            {n: value["ratio"] for n, value in found.items() if value["ratio"] is not None}, "mean"
        ),
        "scatter": points,
    }


def _inputs(net: Any, columns: Sequence[str]) -> list[str]:
    """The columns that the model takes."""
    taken = inspect.signature(net.forward).parameters
    return [name for name in columns if name in taken or name in ("label", "labels")]


def _spread(names: list[str]) -> list[str]:
    """At most DRAWN of them, evenly from first to last."""
    last = len(names) - 1
    return [names[round(i * last / (DRAWN - 1))] for i in range(DRAWN)] if last >= DRAWN else names


# What is shown ------------------------------------------------------------------------------------------


def lines(results: Results) -> list[tuple[str, ...]]:
    """The table as cells; the first row is its head."""
    return _pair_lines(results) if results["kind"] == "pair" else _model_lines(results)


def _pair_lines(results: Results) -> list[tuple[str, ...]]:
    """By layer, or by tensor where there are no layers."""
    head = ("", "weights", "smallest 30 %", "largest 30 %", "rest", "touched", "l2")
    parts = [(f"layer {row['layer']}", row) for row in results["layers"]]
    parts = parts or [(row["name"], row) for row in results["tensors"]]

    def cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
        means = ["-" if row[group] is None else f"{row[group]:.3g}" for group in GROUPS]
        return (name, f"{row['numel']:,}", *means, f"{100 * row['touched']:.2f} %", f"{row['l2']:.4g}")

    return [head, *(cells(name, row) for name, row in parts), cells("all", results["total"])]


def _model_lines(results: Results) -> list[tuple[str, ...]]:
    """By what a tensor is, over the layers that have it."""
    head = ("", "tensors", "r: median", "least", "most", "if independent", "overlap: mean")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results["tensors"]:
        _, kind = analysis.place(row["name"])
        kinds.setdefault(f"{kind} (head)" if row["role"] == "head" else kind, []).append(row)
    kinds["all but heads"] = [row for row in results["tensors"] if row["role"] != "head"]
    rows: list[tuple[str, ...]] = [head]
    for kind, found in kinds.items():
        ratios, free = ([row[key] for row in found if row[key] is not None] for key in ("ratio", "independent"))
        numbers = [f"{f(ratios):.3g}" if ratios else "-" for f in (statistics.median, min, max)]
        numbers.append(f"{statistics.median(free):.3g}" if free else "-")
        overlaps = [row["overlap"] for row in found]
        rows.append((kind, str(len(found)), *numbers, f"{100 * statistics.mean(overlaps):.1f} %" if overlaps else "-"))
    return rows


def foot(results: Results) -> list[str]:
    """What the numbers mean, and what they leave out."""
    if results["kind"] == "model":
        return [
            "r: median |weight| of the 0.01 % largest gradients over the largest |weight| of the 80 % smallest ones; "
            "smaller is more hyperbolic.",
            "If independent: r if gradients did not depend on the weights, about: median over largest |weight|.",
            "Overlap: share of the 0.001 % largest gradients on the 10 % smallest weights; 10 % if independent.",
            f"Gradient of the mean loss over {results['batches']} x {results['batch_size']} rows, in training mode.",
        ]
    said = ["Mean |change| by group of |weight| before; groups are made in each tensor."]
    for key, where in (("only_before", "before"), ("only_after", "after")):
        if results[key]:
            names = ", ".join(results[key][:4]) + (", ..." if len(results[key]) > 4 else "")
            said.append(f"Only {where}, and left out: {names} ({len(results[key])}).")
    return said


def charts(results: Results) -> list[str]:
    """Shift by layer and group and l2 distances, or r and the plane of some tensors; as HTML."""
    heats = results["heatmap"]
    if results["kind"] == "pair":
        rows = results["layers"] or [{"layer": row["name"], **row} for row in results["tensors"][:40]]
        return [_shift(rows), *_heats(heats, "How far has each tensor moved? (l2 distance)")]
    return [*_heats(heats, "Where do gradients fall? (r, smaller is more hyperbolic)"), *_planes(results)]


def _shift(rows: list[dict[str, Any]]) -> str:
    """The mean change of the smallest, the largest and the other weights, layer by layer."""
    series = [Series(group, [(i, row[group]) for i, row in enumerate(rows)]) for group in GROUPS]
    first, last = rows[0]["layer"], rows[-1]["layer"]
    words = f"Groups by |weight| before, made in each tensor; from {first} to {last}."
    x = "layer, in the order of the model"
    return draw(Chart("Which weights have moved? (mean |change|)", series, x=x, zero=True, words=words))


def _heats(found: dict[str, Any], title: str) -> list[str]:
    rows = list(zip(found["kinds"], found["values"], strict=True))
    return [heat(title, list(map(str, found["layers"])), rows, "layer")] if found["layers"] else []


def _planes(results: Results) -> list[str]:
    """|gradient| over |weight|, as in figures 1, 5 and 6."""
    ratios = {row["name"]: row["ratio"] for row in results["tensors"]}
    drawn = []
    for name, points in results["scatter"].items():
        where = list(zip(points["weight"], points["gradient"], strict=True))
        words = "" if ratios[name] is None else f"r = {ratios[name]:.3g}"
        drawn.append(draw(Chart(f"|gradient| over |weight|: {name}", [Series("a weight", where, "cloud")], x="|weight|",
                                y="|gradient|", zero=True, words=words)))  # fmt: skip
    return drawn


def write_folder(results: Results, out: Path, settings: dict[str, Any] | None = None) -> None:
    """results.json and report.html, and last the manifest: where it is, the folder is complete.

    Raises:
        FileExistsError: `out` is a file or holds files.
    """
    folders.prepare_folder(out)
    manifest = {
        "command": "nanoadam analyze",
        "kind": "measurement: what finetuning moved, or where gradients fall",
        "pseudocode": "arXiv 2506.21374, sections 2.1 and 2.2, appendices B to D; in the code: nanoadam.analysis",
        **folders.environment(),
        **({"settings": settings} if settings else {}),
        "results": {key: value for key, value in results.items() if key not in ("tensors", "scatter", "heatmap")},
    }
    if results["kind"] == "pair":
        title, lead = "What finetuning moved", f"From {results['before']} to {results['after']}."
    else:
        title, lead = "Where gradients fall", f"{results['model']} on {results['data']}."
    page = render(f"analyze: {title}", lead, lines(results), charts(results), manifest, foot(results))
    folders.write(out / "results.json", json.dumps(results) + "\n")
    folders.write(out / "report.html", page)
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
