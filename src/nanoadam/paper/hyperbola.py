"""Gradients against weights in the course of runs: figures 1, 2, 5, 6 and 12c, tables 1, 6 and 7.

The measures are those of `nanoadam.analysis`; each run is `finetune`, with a recorder that sees every gradient before
the optimizer does.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from nanoadam import analysis
from nanoadam.analysis.gradients import tensors
from nanoadam.callback import unwrap
from nanoadam.finetuning import folders
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.paper import experiments
from nanoadam.paper.experiments import Row, Setting
from nanoadam.paper.recipe import Recipe
from nanoadam.reports.charts import Chart, Series, draw

LEAST = 1000
"""Tensors with fewer weights are left out: 0.01 % of them is less than a weight."""


class Recorder(TrainerCallback):
    """Ratio and overlap of each matrix at some steps, the effective learning rate there, and the shift by group.

    Args:
        model: before there is an optimizer.
        steps: counted from 0.
        points: of the plane of |weight| and |gradient|, for each of the tensors that are drawn.

    Attributes:
        gradients: `{"step", "name", "role", "value": {"ratio", "independent", "overlap", "points"}}`.
        rates: effective learning rate by step; none of optimizers without second moments.
        shift: of all matrices together, when the run has ended.
    """

    def __init__(self, model: nn.Module, steps: Iterable[int], points: int = 1000) -> None:
        self.steps, self.rates = frozenset(steps), dict[int, float]()
        found = {name: p for name, (p, role) in tensors(model).items() if role == "matrix" and p.numel() >= LEAST}
        names = list(found)
        drawn = {found[names[i]].data_ptr() for i in {0, len(names) // 2, len(names) - 1}}
        self._before = {name: p.detach().to("cpu", copy=True) for name, p in found.items()}

        def measure(weight: Tensor, gradient: Tensor) -> dict[str, Any]:
            value: dict[str, Any] = dict(analysis.relation(weight, gradient))
            if weight.data_ptr() in drawn:
                value["points"] = analysis.scatter(weight, gradient, points=points)
            return value

        self._recorder = analysis.GradientRecorder(model, self.steps, measure)
        self.shift = analysis.Shift()

    @property
    def gradients(self) -> list[dict[str, Any]]:
        """Of the matrices that are large enough."""
        return [record for record in self._recorder.records if record["name"] in self._before]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made a step, and the schedule has not yet moved on."""
        self._recorder.advance()
        if state.global_step in self.steps:
            optimizer = unwrap(kwargs["optimizer"])
            if any("exp_avg_sq" in own for own in optimizer.state.values()):
                self.rates[state.global_step] = analysis.effective_learning_rate(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What has moved where."""
        self._recorder.close()
        now = dict(kwargs["model"].named_parameters())
        for name, before in self._before.items():
            self.shift += analysis.shift(before, now[name].detach().cpu())


def run(recipe: Recipe, setting: Setting) -> tuple[list[Row], list[str]]:
    """Every variant on every model and task, with each seed: rows beside the paper's, and the plane of each.

    A line of `runs.jsonl` is all that rows and planes take of a run; `gradients.jsonl` is made of it at the end.
    """
    cases = [
        {"model": model, "task": task, "variant": variant, "seed": seed}
        for model, task in experiments.pairs(recipe)
        for variant in experiments.variants(recipe, model, task)
        for seed in recipe.keys["seeds"]
    ]

    def work(model: str, task: str, variant: str, seed: int) -> dict[str, Any]:
        own = experiments.variants(recipe, model, task)[variant]
        options = {key: value for key, value in own.items() if key != "learning_rates"}
        keys = {**experiments.keys(recipe, model, task, setting), **options, "save_model": False}
        config = Config(**{**keys, "learning_rate": own["learning_rates"][0], "seed": seed})
        folder = setting.out / model / task / f"{variant}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed: nothing was saved to go on from
        return _line(_record(config, folder, recipe.keys["steps"]))

    found: dict[tuple[str, str, str], list[Row]] = {}
    stopped: dict[tuple[str, str, str], list[str]] = {}
    flat = []
    for line in experiments.each(cases, setting.out / "runs.jsonl", work, setting.tell):
        key = line["model"], line["task"], line["variant"]
        if "stopped" in line:
            stopped.setdefault(key, []).append(line["stopped"])
            continue
        found.setdefault(key, []).append(line)
        for record in line["gradients"]:
            value = {name: v for name, v in record["value"].items() if name != "points"}
            flat.append({**{name: line[name] for name in cases[0]}, **record, "value": value})
    folders.write(setting.out / "gradients.jsonl", "".join(json.dumps(record) + "\n" for record in flat))
    rows = [row for key, lines in found.items() for row in _rows(recipe, *key, lines)]
    rows += [_stopped(*key, reasons) for key, reasons in stopped.items()]
    return rows, [drawn for key, lines in found.items() for drawn in planes(", ".join(key), lines[0]["gradients"])]


def _line(recorder: Recorder) -> dict[str, Any]:
    """What is kept of a run; JSON has no NaN, and no numbers as keys."""
    return {
        "gradients": [
            {**record, "value": {name: None if v != v else v for name, v in record["value"].items()}}
            for record in recorder.gradients
        ],
        "rates": {str(step): rate for step, rate in recorder.rates.items()},
        "moved": recorder.shift.to_dict(),
    }


def _stopped(model: str, task: str, variant: str, reasons: list[str]) -> Row:
    return {
        "model": model, "task": task, "measure": "r", "variant": variant, "rate": None, "paper": None, "here": None,
        "runs": 0, "stopped": reasons,
    }  # fmt: skip


def _record(config: Config, out: Path, steps: Sequence[int]) -> Recorder:
    made: list[Recorder] = []

    def watch(model: nn.Module) -> TrainerCallback:
        made.append(Recorder(model, steps))
        return made[0]

    finetune.run(config, out, watch=watch)
    return made[0]


def _rows(recipe: Recipe, model: str, task: str, variant: str, lines: Sequence[Row]) -> list[Row]:
    values: dict[str, list[float]] = {}

    def add(measure: str, numbers: Sequence[float | None]) -> None:
        known = [number for number in numbers if number is not None]
        if known:
            values.setdefault(measure, []).append(statistics.mean(known))

    for line in lines:
        for step in sorted({record["step"] for record in line["gradients"]}):
            now = [record for record in line["gradients"] if record["step"] == step]
            for measure, key in (("r", "ratio"), ("r if independent", "independent"), ("overlap", "overlap")):
                add(f"{measure}, step {step}", [record["value"][key] for record in now])
            if str(step) in line["rates"]:
                add(f"effective learning rate, step {step}", [line["rates"][str(step)]])
        if "layers" in recipe.keys:
            by_layer = _by_layer(line["gradients"], recipe.keys["layers"], recipe.keys["early"])
            for layer, ratios in sorted(by_layer.items()):
                add(f"r, layer {layer}", ratios)
        for group in ("smallest", "largest", "rest"):
            add(f"moved, {group}", [line["moved"][group]])
        add("touched", [line["moved"]["touched"]])
    return [
        {
            "model": model, "task": task, "measure": measure, "variant": variant, "rate": None,
            "paper": experiments.paper(recipe, model, variant, measure), "here": experiments.spread(numbers),
            "runs": len(numbers),
        }
        for measure, numbers in values.items()
    ]  # fmt: skip


def _by_layer(records: Iterable[Mapping[str, Any]], pattern: str, early: int) -> dict[int, list[float | None]]:
    """Ratios of the tensors whose names fit, by layer, at one step."""
    found: dict[int, list[float | None]] = {}
    for record in records:
        layer, kind = analysis.place(record["name"])
        if record["step"] == early and layer is not None and re.search(pattern, kind):
            found.setdefault(layer, []).append(record["value"]["ratio"])
    return found


def planes(title: str, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """|gradient| over |weight|: a chart for each tensor that is drawn and each step.

    Args:
        title: of all.
        records: `Recorder.gradients`, or others like them; those without points are left out.

    Returns:
        Figures in HTML.
    """
    found = []
    for record in (record for record in records if "points" in record["value"]):
        points, ratio = record["value"]["points"], record["value"]["ratio"]
        name = f"{title}: {record['name'].split('.', 1)[-1]}, step {record['step']}"
        where = list(zip(points["weight"], points["gradient"], strict=True))
        series = [Series("a weight", where, "cloud")]
        words = "" if ratio is None else f"r = {ratio:.3g}; smaller is more hyperbolic."
        found.append(draw(Chart(name, series, x="|weight|", y="|gradient|", zero=True, words=words)))
    return [figure for figure in found if figure]
