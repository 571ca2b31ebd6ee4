"""What there is to say of a run: as it begins, what it expects to take, what it came to, what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nanoadam import memory as costs
from nanoadam import param_groups
from nanoadam.baselines.adapters import of_adapters, pretrained
from nanoadam.finetuning import optimizers, processes
from nanoadam.finetuning.config import ADAPTERS, Config
from nanoadam.finetuning.job import Job
from nanoadam.finetuning.tasks.base import NONE, SAME
from nanoadam.reports.verdict import BASELINES, COMMONEST, METRICS, number
from nanoadam.text import size

FEW_ROWS = 200
SHOWN = 10
WHICH = {"smallest": "the smallest {}", "largest": "the largest {}", "random": "{} at random",
         "gradient": "{} with the largest gradients"}  # fmt: skip


def beginning(job: Job) -> list[str]:
    """The first lines of a run: what is read, and what will be done with it."""
    config, about, task = job.config, job.task.description, job.task
    train, validation = task.splits
    lines = [f"Task: {config.task}, measured by {METRICS.get(task.metric, task.metric)}"]
    learned = f"{len(train):,} rows to learn from" + (f", packed {about['packed']}" if "packed" in about else "")
    share = f": {validation.source['split']}" if config.validation is None else f" of {validation.name}"
    lines.append(f"Data: {train.name}, {learned}; {len(validation):,} to measure on{share}")
    lines.append(f"Read: {_read(job)}")
    if about.get("ignored"):
        lines.append(f"Not read: {', '.join(about['ignored'][:SHOWN])}")
    if "classes" in about:
        lines.append(f"Classes: {_classes(about['classes'])}")
    if "numbers" in about:
        lines.append("Numbers: {least:.4g} to {most:.4g}, mean {mean:.4g}".format(**about["numbers"]))
    lines += [
        f"Note: {', '.join(map(repr, group))} are different classes here; do they mean the same?"
        for group in about.get("alike", ())
    ]
    lines += [
        f"Note: {name!r} is learned as a class; if it says that a row has no label, remove such rows"
        for name in about.get("unlabelled", ())
    ]
    if "comma" in about:
        lines.append(f"Note: {_comma(about)}")
    if "tokens" in about:
        lines.append(f"Length: {about['tokens']['median']} tokens in the middle, {about['tokens']['most']} at most; "
                     f"the model takes {about['most_tokens']}")  # fmt: skip
    count = sum(p.numel() for p in task.model.parameters())
    head = {"new": ", with a new head", "kept": ", with the head that it has"}.get(task.head, "")
    lines.append(f"Model: {config.model}, {count:,} weights in {config.dtype}{head}")
    lines.append(f"Optimizer: {_optimizer(job)}")
    found = expected(job)
    if found:
        own, adamw = sum(found["own"].values()), sum(found["adamw"].values())
        than = "" if config.optimizer == "adamw" else f", where AdamW's take {size(adamw)}"
        lines.append(f"Memory: {size(own)} for weights, gradients and state{than} (by formula, without activations)")
        lines += _fits(job)
    plan, batch = job.plan, config.batch_size * config.accumulate
    lines.append(f"Steps: {plan.total_steps:,} of {batch} rows, {plan.steps_per_epoch:,} an epoch")
    if processes.count() > 1:
        lines.append(f"Processes: {processes.count()}, which share out each batch of {config.batch_size} rows")
    return lines


def _read(job: Job) -> str:
    about = job.task.description
    if "columns" in about:
        *prompt, last = about["columns"]
        what = f"{' and '.join(prompt)}, then {last}" if prompt else last
        return f"{what}; the loss is {about['loss']}"
    if "image" in about:
        return f"images from {about['image']}, label from {about['label']}"
    if "words" in about:
        return f"words from {about['words']}, tags from {about['tags']}"
    texts = about["text"]
    return (
        f"{' and '.join(texts)} as {'a pair of texts' if len(texts) > 1 else 'the text'}, {about['label']} as the label"
    )


def _comma(about: dict[str, Any]) -> str:
    if "numbers" in about:
        return (
            f"the comma in {about['comma']!r} is read as a decimal one; if it parts several labels, use --task "
            "multi-label-classification"
        )
    return (
        f"{about['comma']!r} is learned as a class; if the labels are numbers, write them with points and use --task "
        "text-regression, and if the comma parts several labels, --task multi-label-classification"
    )


def _classes(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def _optimizer(job: Job) -> str:
    config = job.config
    name = optimizers.method(config.optimizer).title
    if config.optimizer != "nanoadam":
        return name
    groups = param_groups(job.task.model, granularity=config.granularity)

    def share_of(kind: str) -> float:
        counted: list[int] = [sum(p.numel() for p in g["params"]) for g in groups
                   if not g["dense"] and g.get("granularity", "weight") == kind]  # fmt: skip
        every = sum(int(p.numel()) for g in groups for p in g["params"])
        return 100 * sum(counted) / max(1, every)

    start, end = config.densities
    share = f"{100 * start:g} %" + (f" falling to {100 * end:g} %" if end is not None and end < start else "")
    where, rest = f"{share_of('weight'):.3g} %", "the rest (norms, biases, head) in full"
    weights = WHICH[config.criterion or "smallest"]
    if config.granularity == "column":
        columns = WHICH[config.criterion or "largest"].format("whole columns")
        columns += f" in {share_of('column'):.3g} % of the weights"
        return f"{name}, {share}: {columns}, {weights.format('single weights')} in {where}; {rest}"
    return f"{name}, {weights.format(share)} of {where} of the weights; {rest}"


def expected(job: Job) -> dict[str, dict[str, int]]:
    """Bytes by kind, by formula, of this optimizer (`own`) and of AdamW on all weights; nothing without a formula."""
    config, model = job.config, job.task.model
    adapted, (name, own) = config.optimizer in ADAPTERS, _estimated(config)
    if name not in costs.METHODS:
        return {}
    whole: Any = [(key, tuple(w.shape)) for key, w in pretrained(model).items()] if adapted else model
    try:
        found = _kinds(costs.estimate(name, model=model, **own))
        adamw = _kinds(costs.estimate("adamw", model=whole, state_dtype=config.dtype, weight_dtype=config.dtype))
    except ValueError:  # a model that the formulas do not cover
        return {}
    if adapted:
        found["weights"] += sum(buffer.nbytes for buffer in of_adapters(model))
        if name == "adamw":  # moments as wide as what they are of: adapters are float32, whatever the head is
            found["state"] = 2 * found["gradients"]
    return {"own": found, "adamw": adamw}


def _estimated(config: Config) -> tuple[str, dict[str, Any]]:
    """The method of `memory.estimate` that stands for a run's optimizer, and its arguments; of adapters, who trains."""
    given, adapted = optimizers.options(config), config.optimizer in ADAPTERS
    own: dict[str, Any] = {}
    if optimizers.by_nanoadam(config):
        own = {"density": max(share for share in config.densities if share is not None),
               "state_dtype": config.state_dtype, "grad_dtype": config.grad_dtype,
               "carried": config.moments == "carry", "granularity": config.granularity}  # fmt: skip
    elif adapted or config.optimizer in ("adamw", "galore"):
        own = {"state_dtype": config.dtype, "rank": given.get("rank") if config.optimizer == "galore" else None}
    elif config.optimizer == "sgd":
        own = {"momentum": bool(given["momentum"])}
    elif config.optimizer == "microadam":
        own = {key: given[key] for key in ("density", "window") if key in given}
    return config.optimizer if not adapted else "nanoadam" if optimizers.by_nanoadam(config) else "adamw", own


def _fits(job: Job) -> list[str]:
    """The peak of an iteration on a GPU, and whether it fits; nothing on a CPU or where that cannot be known."""
    config, about, room = job.config, job.task.description, gpu_bytes(job.config)
    (name, own), count = _estimated(config), processes.count()
    if room is None or config.autocast != "no" or config.packing or (config.shard and count > 1):
        return []
    rows, tokens = -(-config.batch_size // count), about["tokens"]["most"] if "tokens" in about else 1
    try:
        peak = costs.estimate(
            name, model=job.task.model, batch=rows, sequence=tokens, checkpointing=config.checkpoint_activations, **own
        ).total
    except ValueError:
        return []
    long = f" of {tokens} tokens" if "tokens" in about else ""
    lines = [f"Peak: {size(peak)} with the activations of {rows} rows{long}; the GPU has {size(room)}"]
    if peak > room:
        less = "a lower --density" if optimizers.by_nanoadam(config) else "--optimizer nanoadam"
        lines.append(
            "Note: that does not fit: take fewer rows with --batch-size (and --accumulate), --checkpoint-activations, "
            f"--dtype bfloat16, or {less}"
        )
    return lines


def gpu_bytes(config: Config) -> int | None:
    """What the GPU of this process has; None on a CPU."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _kinds(cost: costs.Estimate) -> dict[str, int]:
    return {"weights": cost.weights, "gradients": cost.gradients + cost.held + cost.transient, "state": cost.state}


def measured(job: Job, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics at the end, before, and of the answer that is the same for all rows."""
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    first: dict[str, float] = next((line["metrics"] for line in evaluations if line["step"] == 0), {})
    return {
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        "steps": job.plan.total_steps,
        "final": evaluations[-1]["metrics"],
        "before": first,
        "baseline": job.task.baseline(),
    }


def notes(job: Job, results: dict[str, Any], lines: list[dict[str, Any]], odd: Sequence[str] = ()) -> list[str]:
    """What is odd about a result, with what to try.

    Args:
        job: what was done.
        results: of the run.
        lines: of metrics.jsonl.
        odd: what is odd about what the model says of the validation split.
    """
    found, metric, sign = [], results["metric"], 1 if results["higher_is_better"] else -1
    final, rate = results["final"][metric], job.config.learning_rate or 0.0
    level = results["baseline"].get(metric)
    remedy = f"try another rate (--learning-rate {3 * rate:.2g} or {rate / 3:.2g}), more epochs, or look at the labels"
    if level is not None and sign * final <= sign * level + 1e-12:
        how = BASELINES.get(str(job.config.task), COMMONEST)
        found.append(
            f"{METRICS.get(metric, metric)} {number(final)} is no better than {how} ({number(level)}): nothing was "
            f"learned that counts; {remedy}"
        )
    else:
        odd = [f"{note}: {remedy}" if note.endswith((SAME, NONE)) else note for note in odd]
    best = max((line for line in lines if line["event"] == "evaluation" and line["step"]),
               key=lambda line: sign * line["metrics"][metric])  # fmt: skip
    if sign * best["metrics"][metric] > sign * final and not job.config.best:
        found.append(f"the best evaluation was at step {best['step']:,} ({number(best['metrics'][metric])}): --best "
                     "keeps those weights")  # fmt: skip
    rows = len(job.task.validation)
    if rows < FEW_ROWS and job.config.task != "causal-lm":
        found.append(f"the validation split has {rows} rows, so one row is {100 / rows:.2g} points of accuracy")
    return [*found, *odd]
