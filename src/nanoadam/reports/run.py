"""The page of a finetuning run: the verdict, charts that answer questions, examples, what to try next, the setup."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from nanoadam.reports import page as pages
from nanoadam.reports.charts import Chart, Series, bars, draw
from nanoadam.reports.verdict import BASELINES, COMMONEST, METRICS, advice, number, patch_usage, sentence, usage

Lines = list[dict[str, Any]]


def retained_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What is left of what was to be retained, and how much that is less."""
    rows = []
    for label, found in results["retained"].items():
        rows.append((f"{label}, after (before: {found['before']:.4g})", f"{found['after']:.4g}"))
        rows.append((f"{label}, forgetting", f"{found['forgetting']:.4g}"))
    return rows


def page(manifest: dict[str, Any], lines: Lines) -> str:
    """One HTML file that needs no other.

    Args:
        manifest: with its settings, results and details.
        lines: of metrics.jsonl.
    """
    results, settings = manifest["results"], manifest["settings"]
    name = Path(settings["model"]).name or settings["model"]
    title = f"{name} finetuned for {settings['task']}"
    notes = [f"{note[0].upper()}{note[1:]}." for note in results.get("notes", ())]
    notes.append("One seed: small differences between runs like this one are chance.")
    details = manifest.get("details", {})
    lines_of_code = usage(manifest, "RUN/model")
    if settings.get("save") == "delta":
        lines_of_code = patch_usage(Path(settings["model"]).name or settings["model"], "RUN/delta")
    use = pages.section("Use the model", pages.code(lines_of_code))
    blocks = [
        pages.table(_scores(manifest)),
        pages.section("The course of the run", pages.charts(_course(manifest, lines))),
        pages.section("What it takes", pages.charts(_costs(manifest, lines))),
        pages.section("What is left of what was known", pages.table(_retained(results)), pages.charts(_kept(results))),
        pages.section("Class by class", _classes(details)),
        pages.section("Examples", _examples(details)),
        pages.section("What to try next", pages.listing(advice(manifest))),
        use if settings["save_model"] else "",
        pages.section("Setup", pages.table(_settings(manifest), words=True), pages.setup(manifest)),
    ]
    return pages.whole(title, sentence(manifest), blocks, notes, _lead(manifest))


def _lead(manifest: dict[str, Any]) -> str:
    settings, data = manifest["settings"], manifest["data"]
    head = "" if settings["head_learning_rate"] is None else f" (head: {settings['head_learning_rate']:g})"
    return (
        f"{manifest['model']['parameters']:,} weights, {data['train']['rows']:,} rows of "
        f"{Path(settings['train']).name}, {settings['optimizer']}, learning rate {settings['learning_rate']:g}{head}, "
        f"seed {settings['seed']}, {manifest['results']['steps']:,} steps."
    )


def _scores(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    results = manifest["results"]
    before, level = results.get("before", {}), results.get("baseline", {})
    how = BASELINES.get(manifest["settings"]["task"], COMMONEST)
    rows: list[tuple[str, ...]] = [("validation", "at the end", "before training", *([how] if level else []))]
    for key, value in results["final"].items():
        cells = [METRICS.get(key, key), number(value), number(before[key]) if key in before else "-"]
        if level:
            cells.append(number(level[key]) if key in level else "-")
        rows.append(tuple(cells))
    return rows


def _course(manifest: dict[str, Any], lines: Lines) -> list[str]:
    results = manifest["results"]
    metric = results["metric"]
    trained = [line for line in lines if line["event"] == "train"]
    evaluated = [line for line in lines if line["event"] == "evaluation"]
    loss = [
        Series("training", [(line["step"], line["loss"]) for line in trained]),
        Series("validation", [(line["step"], line["metrics"].get("loss")) for line in evaluated]),
    ]
    measured = [Series("validation", [(line["step"], line["metrics"].get(metric)) for line in evaluated])]
    if metric in results.get("baseline", {}):
        how = BASELINES.get(manifest["settings"]["task"], COMMONEST)
        measured.append(Series(how, [(0, results["baseline"][metric])], "level"))
    rates = [Series("learning rate", [(line["step"], line["learning_rate"]) for line in trained])]
    if any("head_learning_rate" in line for line in trained):
        rates.append(Series("of the head", [(line["step"], line.get("head_learning_rate")) for line in trained]))
    found = [
        draw(Chart("Did the loss fall, and on rows it does not learn from too?", loss,
                   words="Validation rising while training falls: it learns the rows by heart.")),
        draw(Chart(f"Did the {METRICS.get(metric, metric)} get better?", measured)),
        draw(Chart("How large were the steps?", rates, zero=True)),
    ]  # fmt: skip
    trials = (manifest.get("learning_rate") or {}).get("trials") or []
    if len(trials) > 1:
        steps, chosen = manifest["learning_rate"]["steps"], manifest["settings"]["learning_rate"]
        points = sorted((rate, loss) for rate, loss in trials)
        found.append(draw(Chart(
            "Why this learning rate?", [Series("loss after a trial", points)], x="learning rate", log=True,
            words=f"Trials of {steps} steps, each from the same weights; {chosen:g} was chosen.",
        )))  # fmt: skip
    return found


def _costs(manifest: dict[str, Any], lines: Lines) -> list[str]:
    results, expected = manifest["results"], manifest.get("expected") or {}
    trained = [line for line in lines if line["event"] == "train"]
    kinds = {"weights": 0.0, "gradients": 0.0, "state": 0.0, "rest": 0.0}
    rows = [("measured", {kind: float(results["memory"][kind]) for kind in kinds if kind in results["memory"]})]
    if expected:
        rows.append((f"{manifest['settings']['optimizer']}, by formula", expected["own"]))
        if manifest["settings"]["optimizer"] != "adamw":
            rows.append(("AdamW, by formula", expected["adamw"]))
    memory = bars(
        "Where does the memory go?", rows,
        words="At their largest. Activations are in no formula; on a GPU they are in the rest that was measured.",
    )  # fmt: skip
    times = [Series("seconds", [(line["step"], line["seconds_per_step"]) for line in trained])]
    seconds = draw(Chart("How long did a step take, in seconds?", times, zero=True))
    density = [line for line in trained if "density" in line]
    if not density:
        return [memory, seconds]
    selected = [Series("selected now", [(line["step"], line["density"]) for line in density], "step")]
    if any("touched" in line for line in density):
        selected.append(Series("selected so far", [(line["step"], line.get("touched")) for line in density]))
    selected.append(Series("moved, at the end", [(0, results["touched"])], "level"))
    share = draw(Chart(
        "How many weights does it work on?", selected, unit="%", zero=True,
        words="Selected: those that steps move, chosen anew now and then within each chunk (of whole columns: each "
        "layer); selected so far counts each weight that ever was. Moved: weights of the whole model that differ from "
        "where they began; a weight that was selected need not move, and norms and heads move without being selected.",
    ))  # fmt: skip
    return [memory, share, seconds]


def _retained(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [(name, *(number(values[key]) for key in ("before", "after", "forgetting")))
            for name, values in results["retained"].items()]  # fmt: skip
    return [("", "before", "after", "forgetting"), *rows]


def _kept(results: dict[str, Any]) -> list[str]:
    found = []
    for name, values in results["retained"].items():
        rows = [(when, {name: values[when]}) for when in ("before", "after")]
        words = f"Forgetting: {number(values['forgetting'])}."
        found.append(bars(f"{name}: what is left?", rows, unit="", words=words))
    return found


def _classes(details: dict[str, Any]) -> str:
    found = details.get("classes")
    if not found:
        return ""
    rows = [("class", "precision", "recall", "F1", "rows")]
    rows += [(row["name"], *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['rows']:,}")
             for row in found]  # fmt: skip
    matrix = details.get("confusion")
    return pages.table(rows) + (pages.confusion(matrix["names"], matrix["counts"]) if matrix else "")


def _examples(details: dict[str, Any]) -> str:
    samples = details.get("samples")
    if not samples:
        return ""
    lines = []
    for row in samples:
        tone = {True: "right", False: "wrong"}.get(row.get("right"), "")
        sure = f" ({100 * row['sure']:.0f} %)" if "sure" in row else ""
        sure = f" (loss {row['loss']:.3g})" if "loss" in row else sure
        cells = (row["text"], row["label"], f"{row['predicted']}{sure}")
        shown = [html.escape(cell) for cell in cells]
        lines.append(f'<tr><td>{shown[0]}</td><td>{shown[1]}</td><td class="{tone}">{shown[2]}</td></tr>')
    head = "<tr><th>row</th><th>right</th><th>the model says</th></tr>"
    return f'<div class="wide"><table class="words">{head}{"".join(lines)}</table></div>'


def _settings(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    keys = ("model", "train", "validation", "task", "optimizer", "learning_rate", "head_learning_rate", "density",
            "density_end", "weight_decay", "epochs", "max_steps", "batch_size", "accumulate", "scheduler", "warmup",
            "dtype", "autocast", "seed")  # fmt: skip
    settings = manifest["settings"]
    return [("key", "value"), *((key, str(settings[key])) for key in keys if settings.get(key) is not None)]
