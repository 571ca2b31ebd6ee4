"""A finetune at strengths between the base and itself: what it learned against what is left of what was known."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoadam import delta
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import models, patches, training
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import Job, prepare
from nanoadam.reports import page as pages
from nanoadam.reports.charts import Chart, Series, draw
from nanoadam.reports.verdict import METRICS, number

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

Progress = Callable[[str, int, int], None]
"""Called with what is measured, how many strengths are done, and how many there are."""


def front(
    run: Path, strengths: Sequence[float] = STRENGTHS, retain: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Measure base + strength * (tuned - base) of a finished run.

    Args:
        run: its folder.
        strengths: 0 is the base (with the finetuned head, where that is new), 1 the finetuned model.
        retain: what must not be forgotten; by default what the run was told.
        progress: called with how far it is.

    Returns:
        `{"run", "metric", "higher_is_better", "rows"}`; a row has `strength`, `metrics` and `retained`.

    Raises:
        ValueError: if the folder holds no finished run with a model or a patch, its base is not what it was, or for
            what cannot be retained.
    """
    config = _config(run, retain)
    job = prepare(config)
    model: Any = job.task.model
    patch = _patch(run, job)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.RunTrainer.of(job, training.arguments_for(job, Path(folder), 1), [])
        for done, strength in enumerate(strengths):
            if progress is not None:
                progress(f"strength {strength:g}", done, len(strengths))
            with delta.applied(model, patch, strength):
                rows.append({"strength": strength, **_measured(trainer, job, model)})
    return {
        "run": str(run), "metric": job.task.metric, "higher_is_better": job.task.higher_is_better, "rows": rows,
    }  # fmt: skip


def _config(run: Path, retain: Sequence[str]) -> Config:
    path = run / "config.toml"
    if not path.is_file() or not (run / "manifest.json").is_file():
        raise ValueError(f"{run} is no run folder: it holds no config.toml with a manifest.json")
    if not (run / "delta").is_dir() and not (run / "model").is_dir():
        raise ValueError(
            f"{run} holds neither delta/ nor model/: the run is not finished, or was told to save no model"
        )
    own = {"optimizer": "adamw", "optimizer_options": (), "save": "model"}  # nothing is trained
    written = Config(**{**configs.read(path), **own})
    return dataclasses.replace(written, retain=tuple(retain)) if retain else written


def _patch(run: Path, job: Job) -> delta.Patch:
    """What the run has made of the base that the job has loaded anew."""
    model = job.task.model
    if (run / "delta").is_dir():
        return delta.Patch.load(run / "delta")
    options: dict[str, Any] = {"model": str(run / "model"), "tokenizer": None, "revision": None, "new_head": False}
    config = dataclasses.replace(job.config, **options)
    head = {"num_labels": model.config.num_labels} if config.task != "causal-lm" else {}
    tuned = models.load_model(config, **head)
    return delta.diff(model, tuned, new=patches.new_tensors(model))


@torch.no_grad()
def _measured(trainer: training.RunTrainer, job: Job, model: nn.Module) -> dict[str, Any]:
    found = {
        key.removeprefix("eval_"): value
        for key, value in trainer.evaluate().items()
        if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_preparation_time"))
    }
    retained: dict[str, float] = {}
    for name, measure in job.measures.items():
        retained |= {f"{name}: {kind}": value for kind, value in measure(model).items()}
    return {"metrics": found, "retained": retained}


def page(found: dict[str, Any]) -> str:
    """One HTML file with the table and the charts."""
    rows, metric = found["rows"], found["metric"]
    shown = METRICS.get(metric, metric)
    kept = list(rows[0]["retained"]) if rows else []
    head = ("strength", shown, *kept)
    table = [head, *((f"{row['strength']:g}", *map(number, (row["metrics"][metric], *row["retained"].values())))
                     for row in rows)]  # fmt: skip
    learned = [(row["strength"], row["metrics"][metric]) for row in rows]
    charts = [draw(Chart(f"How much of the new task is there? ({shown})", [Series(shown, learned)], x="strength"))]
    for name in kept:
        left = [(row["strength"], row["retained"][name]) for row in rows]
        points = sorted((row["retained"][name], row["metrics"][metric]) for row in rows)
        charts.append(draw(Chart("How much is left of what was known?", [Series(name, left)], x="strength")))
        charts.append(
            draw(Chart(f"What does {shown} cost?", [Series(shown, points)], x=name, words="A point for each strength."))
        )
    return pages.whole(
        f"{Path(found['run']).name} at several strengths",
        "",
        [pages.table(table), pages.section("The front", pages.charts(charts))],
        ["Weights are base + strength * (tuned - base). A head that is new is the finetuned one at every strength."],
        "One model, not trained again: only its weights are moved between base and finetune.",
    )


def as_json(found: dict[str, Any]) -> str:
    """The measures as text."""
    return json.dumps(found, indent=2) + "\n"
