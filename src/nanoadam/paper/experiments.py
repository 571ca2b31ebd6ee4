"""What the recipes' kinds do: comparisons, two tasks in sequence, and answers that are written.

Each takes a recipe and gives rows: `{"model", "task", "measure", "variant", "rate", "paper", "here", "runs"}`, where
`here` is `{"mean", "std"}` over seeds in the paper's units or None, and `paper` its figure or None. All training is
`nanoadam.finetuning.run`, all searching of learning rates `nanoadam.comparing.compare`. What stands in the run folder
already is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoadam.baselines import BASELINES
from nanoadam.comparing import compare
from nanoadam.finetuning import arrays, folders, models
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import FIELDS, Config
from nanoadam.paper import answers, forgetting, smoke
from nanoadam.paper.recipe import Recipe, merged

Row = dict[str, Any]

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, how much there is."""

ADAPTERS = {"gsm8k": answers.gsm8k_prompt, "commonsense": answers.commonsense_prompt}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where an experiment runs.

    Args:
        out: its run folder, which is there.
        data: a folder of local copies; None takes everything from the hub.
        model: a folder with the model, or with one folder for each model of the recipe, by its name.
        jobs: runs at once, where they are spread over processes.
        tell: told how far it is.
    """

    out: Path
    data: Path | None = None
    model: Path | None = None
    jobs: int = 1
    tell: Tell = lambda what, done, total: None


# What a recipe says of one run ------------------------------------------------------------------------------


def pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """(model, task), of the selected ones; a model may name the tasks that it has."""
    return [
        (model, task)
        for model, own in recipe.table("models").items()
        for task in recipe.table("tasks")
        if task in own.get("tasks", [task])
    ]


def keys(recipe: Recipe, model: str, task: str, setting: Setting) -> dict[str, Any]:
    """Keys of a config for one model and one task, without those of variants.

    Raises:
        ValueError: if data or model are neither on the hub nor local.
    """
    own, job = recipe.table("models")[model], recipe.keys["tasks"][task]
    found = merged(merged(recipe.table("config"), own), job)
    if recipe.scale == "smoke":
        folder = setting.out / "smoke"
        found |= smoke.data(found, folder / task)
        found["model"] = str(_once(folder / model, lambda path: smoke.model(own["smoke"], path)))
    else:
        found |= _local_data(recipe, task, job, setting)
        if "medmnist" in found:
            found |= split_medmnist(Path(found["medmnist"]), setting.out / "data")
        found["model"] = _model(model, own, setting, alone=len(recipe.table("models")) == 1)
    if "prune" in recipe.keys:
        share = float(recipe.keys["prune"])
        pruned = setting.out / f"{model}-pruned"
        found["model"] = str(_once(pruned, lambda path: prune(found["model"], path, share)))
    return {"warmup": 0.0, **{key: value for key, value in found.items() if key in FIELDS}}  # the paper has none


def _once(path: Path, make: Callable[[Path], Any]) -> Path:
    if not path.exists():
        with folders.whole_folder(path) as folder:
            make(folder)
    return path


def _model(name: str, own: Mapping[str, Any], setting: Setting, alone: bool) -> str:
    if setting.model is None:
        if "model" not in own:
            raise ValueError(f"{name} is on no hub: --model names the folder it is in")
        return str(own["model"])
    if (setting.model / "config.json").is_file() and alone:
        return str(setting.model)
    if (setting.model / name / "config.json").is_file():
        return str(setting.model / name)
    hint = "" if alone else f", or say --only {name}"
    raise ValueError(f"{setting.model} holds no model folder {name}: a folder of models has one for each{hint}")


def _local_data(recipe: Recipe, task: str, job: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    if setting.data is None:
        if "train" not in job:
            raise ValueError(f"the data of {task} is on no hub: --data names the folder it is in")
        return {}
    found = dict(job.get("files", {}))
    for key in ("train", "validation", "medmnist"):
        if key in found:
            found[key] = str(_there(setting.data / found[key]))
    return found


def _there(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no {path}: --data names the folder that it is in")
    return path


def check(recipe: Recipe, setting: Setting) -> list[Path]:
    """Refuse, before anything is written, models and data that are neither on the hub nor where they should be.

    Returns:
        The files of data and the folders of models that are read here; not those on the hub.

    Raises:
        ValueError: naming the folder or the file; or if what is selected leaves nothing to run.
    """
    if not any(task != "train" and variants(recipe, model, task) for model, task in pairs(recipe)):
        raise ValueError(f"--only leaves nothing of {recipe.name}: no model that is named has the task and the method")
    if recipe.scale == "smoke":
        return []
    found = []
    for model, task in pairs(recipe):
        own, job = recipe.table("models")[model], recipe.keys["tasks"][task]
        name = _model(model, own, setting, alone=len(recipe.table("models")) == 1)
        found += [] if setting.model is None else [Path(name)]
        if "file" not in job:
            local = _local_data(recipe, task, job, setting)
            found += [Path(local[key]) for key in ("train", "validation", "medmnist") if key in local]
        elif setting.data is None:
            raise ValueError(f"{recipe.name} reads local files: --data names the folder with {recipe.keys['layout']}")
        else:
            file = setting.data / job["file"]
            found.append(next((path for path in answers.places(file) if path.is_file()), None) or _there(file))
    return found


def variants(recipe: Recipe, model: str, task: str) -> dict[str, dict[str, Any]]:
    """Keys of each variant for one model and one task, with its learning rates.

    One that is called like an optimizer has that one unless told otherwise, as in a comparison.
    """
    found = recipe.table("variants")
    for where in (recipe.table("models")[model], recipe.keys["tasks"].get(task, {})):
        wanted = where.get("only", list(found))
        found = {name: merged(own, where.get("variants", {}).get(name, {})) for name, own in found.items()
                 if name in wanted}  # fmt: skip
    named = {name: {"optimizer": name} if name in BASELINES else {} for name in found}
    return {
        name: {**named[name], **own, "learning_rates": recipe.rates(own["learning_rates"])}
        for name, own in found.items()
    }


def paper(recipe: Recipe, model: str, variant: str, what: str) -> float | None:
    """The paper's figure, if it gives one."""
    found = recipe.keys.get("paper", {}).get(model, {}).get(variant, {}).get(what)
    return None if found is None else float(found)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (None for one value)."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _row(recipe: Recipe, model: str, task: str, variant: str, values: Sequence[float], **more: Any) -> Row:
    measure = more.pop("measure", task)
    return {
        "model": model, "task": task, "measure": measure, "variant": variant, "rate": more.pop("rate", None),
        "paper": paper(recipe, model, variant, measure), "here": spread(values) if values else None,
        "runs": len(values), **more,
    }  # fmt: skip


# Comparisons -----------------------------------------------------------------------------------------------


def comparisons(recipe: Recipe, setting: Setting) -> list[Row]:
    """Each variant over its grid, for each model and task; then what the paper averages over tasks."""
    rows: list[Row] = []
    todo = pairs(recipe)
    for number, (model, task) in enumerate(todo):
        job = {**keys(recipe, model, task, setting), "save_model": False}
        job |= {"variants": variants(recipe, model, task), "seeds": recipe.keys["seeds"]}

        def tell(what: str, done: int, total: int, number: int = number, name: str = f"{model}, {task}") -> None:
            setting.tell(f"{name}: {what}", number * total + done, len(todo) * total)

        results = compare.ensure(compare.made(job), setting.out / model / task, tell, setting.jobs)
        for entry in results["table"]:
            rows.append(_chosen(recipe, model, task, entry, results))
            if paper(recipe, model, entry["variant"], "rate") is not None and entry["learning_rate"] is not None:
                rates = [entry["learning_rate"]]
                rows.append(_row(recipe, model, task, entry["variant"], rates, measure="rate"))
    return rows + [row for model in recipe.table("models") for row in _averages(recipe, model, rows)]


def _chosen(recipe: Recipe, model: str, task: str, entry: Mapping[str, Any], results: Mapping[str, Any]) -> Row:
    variant, rate = entry["variant"], entry["learning_rate"]
    own = [run for run in results["runs"] if run["variant"] == variant and run["learning_rate"] == rate]
    values = [100 * run["metric"] for run in own] if rate is not None else []
    more: dict[str, Any] = {"metric": results["metric"], "by_rate": _by_rate(variant, results)}
    if values:
        more["minutes"] = statistics.mean(run["seconds_per_step"] * run["steps"] / 60 for run in own)
        if all("memory_peak" in run for run in own):
            more["GB"] = statistics.mean(run["memory_peak"] / 1e9 for run in own)
    if "stopped" in entry:
        more["stopped"] = entry["stopped"]
    return _row(recipe, model, task, variant, values, rate=rate, **more)


def _by_rate(variant: str, results: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, list[float | None]] = {}
    for run in results["runs"]:
        if run["variant"] == variant:
            found.setdefault(f"{run['learning_rate']:g}", []).append(run["metric"])
    return {
        rate: None if None in values else 100 * statistics.mean(v for v in values if v is not None)
        for rate, values in found.items()
    }


def _averages(recipe: Recipe, model: str, rows: Sequence[Row]) -> Iterator[Row]:
    """Over tasks, where there are several: the metric, memory and time. Only if no task is without a result."""
    for variant in recipe.table("variants"):
        own = [row for row in rows if row["model"] == model and row["variant"] == variant and row["measure"] != "rate"]
        if len(own) < 2 or any(row["here"] is None for row in own):
            continue
        means = {"avg": [row["here"]["mean"] for row in own]}
        means |= {key: [row[key] for row in own] for key in ("GB", "minutes") if all(key in row for row in own)}
        for measure, values in means.items():
            row = _row(recipe, model, "all", variant, [statistics.mean(values)], measure=measure)
            told = row["paper"] if len(own) == len(recipe.keys["tasks"]) else None  # its mean is over all tasks
            yield {**row, "paper": told, "runs": sum(one["runs"] for one in own)}


def prune(model: str, folder: Path, share: float) -> None:
    """Save a model with so large a share of each weight matrix set to zero, the smallest by magnitude.

    Heads, norms, biases and embeddings are left alone, as `nanoadam.param_groups` tells them.
    """
    from transformers import AutoImageProcessor, AutoModel

    import nanoadam

    backbone: Any = AutoModel.from_pretrained(model)
    for group in nanoadam.param_groups(backbone):
        for weight, role in zip(group["params"], group["roles"], strict=True):
            if role == "matrix":
                flat = weight.data.view(-1)
                flat[flat.abs().argsort()[: round(share * flat.numel())]] = 0.0
    backbone.save_pretrained(folder)
    processor: Any = AutoImageProcessor
    processor.from_pretrained(model).save_pretrained(folder)


def split_medmnist(path: Path, folder: Path) -> dict[str, str]:
    """Training and test images of a MedMNIST file (`train_images`, `train_labels` [n, 1], ...) in files of their own.

    Source of the layout: Yang et al. 2023, medmnist.com.

    Raises:
        ValueError: if it holds something else.
    """
    import numpy as np

    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    stored = arrays.read_npz(path)
    for key, split in (("train", "train"), ("validation", "test")):
        if f"{split}_images" not in stored or f"{split}_labels" not in stored:
            raise ValueError(f"{path} holds no {split}_images and {split}_labels: it is no MedMNIST file")
        found[key] = str(folder / f"{path.stem}-{split}.npz")
        labels = stored[f"{split}_labels"].reshape(-1)
        np.savez(found[key], images=stored[f"{split}_images"], labels=labels.astype(np.int64))
    return found


# Two tasks in sequence -------------------------------------------------------------------------------------


def sequences(recipe: Recipe, setting: Setting) -> list[Row]:
    """Task 1, then task 2, then task 1 again with its own head: a run for each model, variant and seed."""
    first, second = recipe.keys["sequence"]
    cases = [
        {"model": model, "variant": variant, "seed": seed}
        for model in recipe.table("models")
        for variant in variants(recipe, model, first)
        for seed in recipe.keys["seeds"]
    ]

    def work(model: str, variant: str, seed: int) -> dict[str, Any]:
        own = variants(recipe, model, first)[variant]
        options = {key: value for key, value in own.items() if key != "learning_rates"}
        rates = own["learning_rates"]
        one, two = (
            Config(**{**keys(recipe, model, task, setting), **options, "learning_rate": rate, "seed": seed})
            for task, rate in ((first, rates[0]), (second, rates[-1]))
        )
        return forgetting.run(one, two, setting.out / model / f"{variant}-{seed}")

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in each(cases, setting.out / "metrics.jsonl", work, setting.tell):
        found.setdefault((line["model"], line["variant"]), []).append(line)
    rows = []
    for (model, variant), lines in found.items():
        done = [line for line in lines if "stopped" not in line]
        more = {"stopped": [line["stopped"] for line in lines if "stopped" in line]} if len(done) < len(lines) else {}
        for measure in ("task1", "task2", "task1_after", "average", "forgetting"):
            values = [100 * line[measure] for line in done]
            rows.append(_row(recipe, model, "sequence", variant, values, measure=measure, **more))
        values = [line["pretrained"]["mean_l2"] for line in done]
        rows.append(_row(recipe, model, "sequence", variant, values, measure="l2", **more))
    return rows


def each(
    cases: Sequence[dict[str, Any]], path: Path, work: Callable[..., dict[str, Any]], tell: Tell
) -> Iterator[dict[str, Any]]:
    """The line of each run, in order: those that stand in a file are read, the others run and written there.

    Args:
        cases: what names each run; the same keys in all.
        path: the JSONL file. A run is finished when its line is there.
        work: takes what names a run, and gives what is measured. Others go on where it diverges or cannot run here.
        tell: told when a run begins.
    """
    done = folders.finished(path, list(cases[0]))
    for number, case in enumerate(cases):
        line = done.get(tuple(case.values()))
        if line is None:
            tell(", ".join(f"seed {v}" if name == "seed" else str(v) for name, v in case.items()), number, len(cases))
            line = {**case, **_attempt(functools.partial(work, **case))}
            folders.append(path, line)
        yield line


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except (finetune.Diverged, ImportError, torch.OutOfMemoryError) as error:
        failed = {} if isinstance(error, finetune.Diverged) else {"failed": True}  # it may not fail the next time
        return {"stopped": str(error).strip().splitlines()[0], **failed}


# Answers that are written ----------------------------------------------------------------------------------


def written(recipe: Recipe, setting: Setting) -> list[Row]:
    """Finetune a language model on prompts and answers, let it answer the tests, and count what is right (%)."""
    tests, train = _tests(recipe, setting)
    cases = [
        {"model": model, "variant": variant, "seed": seed}
        for model in recipe.table("models")
        for variant in variants(recipe, model, "")
        for seed in recipe.keys["seeds"]
    ]

    def folder(model: str, variant: str, seed: int) -> Path:
        return setting.out / model / f"{variant}-{seed}"

    def work(model: str, variant: str, seed: int) -> dict[str, Any]:
        own = variants(recipe, model, "")[variant]
        job = keys(recipe, model, "train", setting) | {**train, "seed": seed, "save_model": True}
        options = {key: value for key, value in own.items() if key != "learning_rates"}
        config = Config(**{**job, **options, "learning_rate": own["learning_rates"][0]})
        return _answered(recipe, config, folder(model, variant, seed), tests)

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in each(cases, setting.out / "metrics.jsonl", work, setting.tell):
        if "stopped" not in line:  # its line is on the disk: 13 GB and more for each run of a 7B model
            for part in ("model", "checkpoints"):
                shutil.rmtree(folder(line["model"], line["variant"], line["seed"]) / part, ignore_errors=True)
        found.setdefault((line["model"], line["variant"]), []).append(line)
    return [row for (model, variant), lines in found.items() for row in _answer_rows(recipe, model, variant, lines)]


def _tests(recipe: Recipe, setting: Setting) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of each test, and files of prompts and completions to train on and to watch the loss of."""
    kind = recipe.keys["format"]
    folder = setting.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.scale == "smoke":
        rows = smoke.questions(kind, 16)
        tests = {name: smoke.questions(kind, 4, name) for name in recipe.table("tasks") if name != "train"}
    else:
        assert setting.data is not None  # see `check`
        columns = answers.COLUMNS[kind]
        rows = answers.read_rows(setting.data / recipe.keys["tasks"]["train"]["file"], columns)
        tests = {
            name: answers.read_rows(setting.data / own["file"], columns)
            for name, own in recipe.table("tasks").items()
            if name != "train"
        }
    limit = recipe.keys.get("rows")
    tests = {name: found[:limit] for name, found in tests.items()}
    watched = next(iter(tests.values()))[:100]
    files = {}
    for split, chosen in (("train", rows[:limit]), ("validation", watched)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(ADAPTERS[kind](row)) + "\n" for row in chosen), encoding="utf-8")
        files[split] = str(path)
    return tests, files


def _answered(recipe: Recipe, config: Config, folder: Path, tests: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """One run: the share of right answers of each test, each answer in `answers.jsonl`."""
    results = finetune.ensure(config, folder)
    (folder / "answers.jsonl").unlink(missing_ok=True)  # of a process that was killed among them
    saved = dataclasses.replace(config, model=str(folder / "model"), tokenizer=None, init_from_config=False)
    network: Any = models.load_model(saved)
    network.to("cuda" if torch.cuda.is_available() and config.device == "auto" else "cpu")
    tokenizer, kind = models.load_tokenizer(saved), recipe.keys["format"]
    shares = {}
    for name, rows in tests.items():
        prompts = [ADAPTERS[kind](row)["prompt"] for row in rows]
        texts = answers.write(
            network, tokenizer, prompts, new_tokens=recipe.keys["new_tokens"], batch_size=config.eval_batch_size
        )
        right = [
            answers.gsm8k_right(text, row) if kind == "gsm8k" else answers.commonsense_right(text, row, name)
            for text, row in zip(texts, rows, strict=True)
        ]
        for text, row, good in zip(texts, rows, right, strict=True):
            line = {"test": name, "expected": row["answer"], "right": good, "text": text}
            folders.append(folder / "answers.jsonl", line)
        shares[name] = sum(right) / len(right)
    return {"accuracy": shares, "results": results}


def _answer_rows(recipe: Recipe, model: str, variant: str, lines: Sequence[dict[str, Any]]) -> Iterator[Row]:
    done = [line for line in lines if "stopped" not in line]
    more = {"stopped": [line["stopped"] for line in lines if "stopped" in line]} if len(done) < len(lines) else {}
    tests = [name for name in recipe.table("tasks") if name != "train"]
    values = {name: [100 * line["accuracy"][name] for line in done] for name in tests}
    if len(tests) > 1:
        values["avg"] = [statistics.mean(column) for column in zip(*values.values(), strict=True)]
    else:
        for line in done:
            values[f"seed {line['seed']}"] = [100 * line["accuracy"][tests[0]]]
    values["hours"] = [line["results"]["seconds_per_step"] * line["results"]["steps"] / 3600 for line in done]
    if done and all("peak" in line["results"]["memory"] for line in done):
        values["GB"] = [line["results"]["memory"]["peak"] / 1e9 for line in done]
    for measure, found in values.items():
        yield _row(recipe, model, "tests", variant, found, measure=measure, **more)
