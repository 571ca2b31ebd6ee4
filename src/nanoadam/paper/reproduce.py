"""The paper's experiments, each from a recipe: run, and its figures beside what came out here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoadam.finetuning import folders
from nanoadam.paper import recipe as recipes
from nanoadam.paper.recipe import Recipe
from nanoadam.reports.charts import Chart, Series, draw, heat
from nanoadam.text import duration

if TYPE_CHECKING:
    from nanoadam.paper.experiments import Setting

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """What an experiment gave.

    Args:
        rows: see `nanoadam.paper.experiments`.
        figures: in HTML, for the report.
        notes: lines under the table.
    """

    rows: list[Row]
    figures: Sequence[str] = ()
    notes: Sequence[str] = ()


def run(
    recipe: Recipe,
    out: Path,
    *,
    data: Path | None = None,
    model: Path | None = None,
    jobs: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run an experiment, and write one folder: recipe.toml, manifest.json, report.html, and what its runs write.

    Args:
        recipe: what to do.
        out: new or empty.
        data: a folder of local copies of its data, laid out as its recipe says.
        model: a folder with its model, or with a folder for each of its models.
        jobs: runs at once, where the experiment can be spread over processes.
        progress: called with how far it is.

    Returns:
        `{"name", "scale", "title", "rows": [...], "notes": [...], "seconds"}`; seconds since it was begun or last
        gone on with.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError: for a folder that is not there or does not hold what it should.
        RunError: if another process is writing to `out`.
    """
    import tomli_w

    if out.exists():
        folders.prepare_folder(out)
    setting, inputs = _prepared(recipe, out, data, model, jobs, progress)
    manifest = {
        "command": f"nanoadam reproduce {recipe.name} --scale {recipe.scale}",
        "kind": recipe.title,
        "pseudocode": folders.PSEUDOCODE,
        **folders.environment(runs_at_once=jobs),
        "name": recipe.name,
        "scale": recipe.scale,
        "recipe": recipe.keys,
        "folders": {"data": data and str(setting.data), "model": model and str(setting.model)},
        "inputs": inputs,
        "results": None,
    }
    with folders.new_folder(out, derived=("data", "smoke")):
        folders.write(out / "recipe.toml", tomli_w.dumps(dict(recipe.keys)))
        folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return _run(recipe, setting, manifest)


def resume(
    out: Path, *, jobs: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Go on with an experiment: what is finished is read, what was begun goes on from its checkpoint or begins again.

    On a CPU the figures are those of an experiment that was never interrupted, bit for bit, except times.

    Args:
        out: its folder.
        jobs: as many at once as when it was begun by default.
        progress: as in `run`.

    Returns:
        As `run`.

    Raises:
        ValueError: if `out` holds none or one that is finished, or its recipe, data or model are not what they were.
        RunError: if another process is writing to `out`.
    """
    _begun(out)  # a folder of something else is left as it is
    with folders.alone(out):
        recipe, manifest = _begun(out)
        data, model = (folder and Path(folder) for folder in map(manifest["folders"].get, ("data", "model")))
        jobs = jobs or int(manifest["hardware"]["runs_at_once"])
        setting, inputs = _prepared(recipe, out, data, model, jobs, progress)
        for path in {**manifest["inputs"], **inputs}:
            if inputs.get(path) != manifest["inputs"].get(path):
                raise ValueError(f"{path} is not what it was when {out} began: the table would mix two experiments")
        return _run(recipe, setting, {**manifest, **folders.environment(runs_at_once=jobs)})


def _begun(out: Path) -> tuple[Recipe, dict[str, Any]]:
    """The experiment in a folder that can be gone on with, and its manifest."""
    if not (out / "recipe.toml").is_file() or not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds no experiment: there is no recipe.toml with a manifest.json in it")
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        keys = recipes.read(out / "recipe.toml")
    except ValueError as error:
        raise ValueError(f"recipe.toml or manifest.json in {out} cannot be read: {error}") from error
    if isinstance(manifest, dict) and manifest.get("results") is not None:
        raise ValueError(f"the experiment in {out} is finished: its results are in manifest.json and report.html")
    if not isinstance(manifest, dict) or not {"name", "scale", "recipe", "inputs"} <= manifest.keys():
        raise ValueError(f"{out} holds no experiment that can be gone on with: begin anew with --out")
    if keys != manifest["recipe"]:
        raise ValueError(
            f"recipe.toml in {out} is not what it was when the experiment began: the table would mix two experiments; "
            "set it back, or begin anew with --out"
        )
    return Recipe(manifest["name"], manifest["scale"], manifest["recipe"]), manifest


def _prepared(
    recipe: Recipe, out: Path, data: Path | None, model: Path | None, jobs: int, progress: Any
) -> tuple[Setting, dict[str, str]]:
    """Where it runs, and a digest of each local file that it reads; refuses what is not there."""
    from nanoadam.paper.experiments import Setting

    for name, folder in (("data", data), ("model", model)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} {folder} is no folder")
    data, model = (folder and folder.resolve() for folder in (data, model))
    setting = Setting(out, data, model, jobs, progress or (lambda what, done, total: None))
    paths = dict.fromkeys(_check(recipe, setting))
    files = [file for path in paths for file in (sorted(path.glob("[!.]*")) if path.is_dir() else [path])]
    digests = {}
    for number, file in enumerate(file for file in files if file.is_file()):
        setting.tell(f"reading {file.name}", number, len(files))
        digests[str(file)] = _digest(file)
    return setting, digests


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()


def _run(recipe: Recipe, setting: Setting, manifest: dict[str, Any]) -> dict[str, Any]:
    from nanoadam.reports.page import render

    out, began = setting.out, time.time()
    found = KINDS[recipe.kind](recipe, setting)
    results: dict[str, Any] = {
        "name": recipe.name, "scale": recipe.scale, "title": recipe.title, "rows": found.rows,
        "notes": [*found.notes, *_notes(recipe)], "seconds": round(time.time() - began, 1),
    }  # fmt: skip
    manifest = {**manifest, "results": results}
    lead = f"{recipe.title}. In the paper: {recipe.keys.get('tables', 'nowhere')}. Scale: {recipe.scale}."
    page = render(
        f"reproduce: {recipe.name}", lead, lines(results), found.figures, manifest, found.notes,
        _warnings(recipe, results), _verdict(recipe, results),
    )  # fmt: skip
    folders.write(out / "report.html", page)
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return results


def _verdict(recipe: Recipe, results: Mapping[str, Any]) -> str:
    """How much of what the paper prints came out here."""
    rows = results["rows"]
    if recipe.scale == "smoke":
        return f"It runs from end to end: {len(rows)} rows, in {duration(results['seconds'])}."
    beside = [row for row in rows if row["paper"] is not None and row["here"] is not None]
    lost = sum(row["here"] is None for row in rows)
    spread = [row for row in beside if row["here"]["std"]]
    near = sum(abs(row["here"]["mean"] - row["paper"]) <= 2 * row["here"]["std"] for row in spread)
    text = f"{len(rows) - lost} of {len(rows)} rows have a result; {len(beside)} have a figure of the paper beside it"
    return text + (f", and {near} of {len(spread)} are within two deviations of it." if spread else ".")


def _warnings(recipe: Recipe, results: Mapping[str, Any]) -> list[str]:
    """What must be known before the figures are read."""
    found = []
    if recipe.scale == "small":
        found.append("A local stand-in for the paper's model or data: its figures are not to be compared one by one.")
    if recipe.scale == "smoke":
        found.append(
            "Every figure here is of a tiny model with random weights: it shows that the program runs, and says "
            "nothing of the paper's."
        )
    runs = [row["runs"] for row in results["rows"] if row.get("runs")]
    if runs and max(runs) == 1:
        found.append("One seed: a difference from the paper's figure proves nothing by itself.")
    return found


def _check(recipe: Recipe, setting: Any) -> list[Path]:
    """Refuse what is not there before anything is written; the local files and model folders that are read."""
    from nanoadam.paper import experiments

    if recipe.kind == "front":
        return _check_front(recipe, setting)
    return [] if recipe.kind == "toy" else experiments.check(recipe, setting)


def _notes(recipe: Recipe) -> list[str]:
    words = {
        "smoke": "tiny random models and generated data: these figures say only that it runs from end to end",
        "small": "a local stand-in for the paper's model or data: its figures are not to be compared one by one",
    }
    return [words[recipe.scale]] if recipe.scale in words else []


# What each kind does --------------------------------------------------------------------------------------


def _comparison(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper import experiments

    rows = experiments.comparisons(recipe, setting)
    return Found(rows, _by_rate(rows) if any(len(row.get("by_rate", ())) > 1 for row in rows) else [])


def _sequence(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper import experiments

    rows = experiments.sequences(recipe, setting)
    done = [line for line in folders.read_lines(setting.out / "metrics.jsonl") if "stopped" not in line]
    return Found(rows, _moved(done))


def _answers(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper import experiments

    return Found(experiments.written(recipe, setting))


def _check_front(recipe: Recipe, setting: Any) -> list[Path]:
    if recipe.scale == "smoke":
        return []
    if setting.data is None:
        raise ValueError(f"{recipe.name} reads local files: --data names the folder that vision_files.py has made")
    keys = recipe.keys["front"]
    model = setting.model or setting.data / keys["model"]
    files = [setting.data / name for name in (*keys["task1"], *keys["task2"])]
    for path in (model / "config.json", *files):
        if not path.is_file():
            raise ValueError(f"there is no {path}: benchmarks/vision_files.py makes it")
    return [model, *files]


def _front(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper import front, smoke

    data, model = setting.data, setting.model
    if recipe.scale == "smoke":
        data, model = setting.out / "smoke", smoke.model("mobilenet", setting.out / "smoke" / "mobilenet")
        for task, classes in (("task1", 3), ("task2", 2)):
            for name, count in zip(recipe.keys["front"][task], (32, 12), strict=True):
                smoke.images(data / name, count, classes)
    job = front.from_recipe(recipe.keys, data, model)
    lines = front.run(
        job, setting.out / "metrics.jsonl", setting.out / "starts", processes=setting.jobs, progress=setting.tell
    )
    return fronts_of(job, lines)


def fronts_of(job: Any, lines: Sequence[Mapping[str, Any]]) -> Found:
    """Areas and figures from the lines of a front: one figure for each condition, a row for each method under it."""
    from nanoadam.comparing import fronts
    from nanoadam.paper import front

    reference = job.reference or (0.0, 0.0)
    rows, figures = [], []
    for norms in dict.fromkeys(part.norms for part in job.parts):
        for start in dict.fromkeys(None if part.start == "own" else part.start for part in job.parts):
            table = front.table(lines, norms, start, reference)
            if table:
                what = f"BatchNorm {norms}, {'each its own task 1' if start is None else f'task 1 by {start}'}"
                rows += [_area(row, what, lines, norms, start) for row in table]
                labels = "task 2, test accuracy", "task 1 afterwards, test accuracy"
                figures.append(fronts.chart(table, labels, f"{what}; areas from {reference}"))
    return Found(
        rows, figures, [f"area under the front, from {reference[0]:g} of task 2 and {reference[1]:g} of task 1"]
    )


def _area(row: Mapping[str, Any], what: str, lines: Sequence[Mapping[str, Any]], norms: str, start: str | None) -> Row:
    here, method = {"mean": row["area_mean"], "std": row["area_std"]}, row["method"]
    points = [{key: None if v != v else v for key, v in point.items()} for point in row["points"]]  # JSON has no NaN
    where = ("task2", method, norms, start or method)
    own = [line for line in lines if (line["kind"], line["method"], line["norms"], line["start"]) == where]
    lost = sum("stopped" in line for line in own)
    return {
        "model": what, "task": "both", "measure": "area", "variant": method, "rate": None, "paper": None,
        "here": here, "runs": row["seeds"], "of_means": row["area"], "points": points,
        **({"stopped": [f"{lost} of {len(own)} runs stopped"]} if lost else {}),
    }  # fmt: skip


def _toy(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper.toy import experiment as toy

    shutil.rmtree(setting.out / "toy", ignore_errors=True)  # it writes at its end, and takes minutes: it begins again
    results = toy.reproduce(recipe.scale, setting.out / "toy", setting.tell)
    rows = []
    for reading, by_extra in results["readings"].items():
        for extra, result in zip(toy.PAPER, by_extra, strict=True):
            for rule in toy.RULES:
                for measure in ("test_loss", "distance"):
                    found, lost = result[rule][measure], result[rule]["diverged"]
                    good = {key: found[key] for key in ("mean", "std")} if math.isfinite(found["mean"]) else None
                    rows.append({
                        "model": f"{extra} extra", "task": "toy", "measure": f"{measure}, {rule}", "variant": reading,
                        "rate": None, "paper": toy.PAPER[extra][rule][measure][0], "here": good,
                        "runs": len(found["values"]), **({"stopped": [f"{lost} diverged"]} if lost else {}),
                    })  # fmt: skip
    return Found(rows, notes=["every choice that the paper leaves open, figures and verdict: toy/report.html"])


def _gradients(recipe: Recipe, setting: Any) -> Found:
    from nanoadam.paper import hyperbola

    rows, figures = hyperbola.run(recipe, setting)
    return Found(rows, figures)


KINDS: dict[str, Callable[[Recipe, Any], Found]] = {
    "comparison": _comparison,
    "sequence": _sequence,
    "answers": _answers,
    "front": _front,
    "toy": _toy,
    "gradients": _gradients,
}
"""What runs a recipe, by its kind."""


# What is printed ------------------------------------------------------------------------------------------


def listing() -> list[tuple[str, ...]]:
    """Every experiment, its scales and what it is; the head first."""
    head = ("name", "scales", "what", "in the paper")
    rows = [(name, ", ".join(recipes.scales(name)), recipes.load(name)) for name in recipes.names()]
    return [head, *((name, scales, r.title, str(r.keys.get("tables", "-"))) for name, scales, r in rows)]


def lines(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, the head first: the paper's figure beside ours."""
    head = ("model", "measure", "method", "paper", "here", "learning rate", "runs")
    return [head, *(_line(row) for row in results["rows"])]


def _line(row: Row) -> tuple[str, ...]:
    here = row["here"]
    cell = "" if here is None else f"{here['mean']:.4g}" + ("" if here["std"] is None else f" ± {here['std']:.2g}")
    cell = "; ".join(part for part in (cell, *row.get("stopped", ())) if part) or "no result"
    return (
        row["model"], row["measure"], row["variant"], "-" if row["paper"] is None else f"{row['paper']:g}", cell,
        "-" if row["rate"] is None else f"{row['rate']:g}", str(row["runs"]),
    )  # fmt: skip


# Charts ---------------------------------------------------------------------------------------------------


def _by_rate(rows: list[Row]) -> list[str]:
    """The metric over learning rates, a chart for each model and task."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "by_rate" in row:
            found.setdefault((row["model"], row["task"]), []).append(row)
    drawn = []
    for (model, task), own in found.items():
        series = [
            Series(row["variant"], [(float(rate), value) for rate, value in row["by_rate"].items()]) for row in own
        ]
        title = f"Which learning rate? {model}, {task}: {own[0]['metric']} (%)"
        drawn.append(draw(Chart(title, series, x="learning rate", log=True)))
    return [chart for chart in drawn if chart]


def _moved(done: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far each tensor has moved from the pretrained weights, a row for each method, seeds averaged."""
    found = []
    for model in dict.fromkeys(line["model"] for line in done):
        rows, names = [], list[str]()
        for variant in dict.fromkeys(line["variant"] for line in done if line["model"] == model):
            own = [
                line["pretrained"]["tensors"] for line in done if (line["model"], line["variant"]) == (model, variant)
            ]
            names = list(own[0])
            rows.append((variant, [sum(one[name] for one in own) / len(own) for name in names]))
        found.append(heat(f"How far has each tensor of {model} moved? (l2)", list(map(str, range(1, len(names) + 1))),
                          rows, "tensor, in the order of the network"))  # fmt: skip
    return found
