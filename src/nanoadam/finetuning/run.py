"""One finetuning run over transformers' Trainer: its folder, its checkpoints, and going on from one bit for bit.

The folder holds `config.toml` (complete: it reruns the run), `manifest.json`, `metrics.jsonl`, `report.html`,
`checkpoints/` while it runs and `model/` at the end. Nothing is ever half there: each file and each checkpoint
takes its name when it is complete.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from nanoadam import delta
from nanoadam.baselines.adapters import merged, pretrained
from nanoadam.finetuning import (
    card,
    checkpoints,
    folders,
    optimizers,
    outcome,
    patches,
    processes,
    rates,
    retain,
    shards,
    training,
)
from nanoadam.finetuning import config as configs
from nanoadam.finetuning.checkpoints import last_checkpoint
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.folders import RunError
from nanoadam.finetuning.job import Job, prepare, rows, with_task
from nanoadam.finetuning.training import CURE, Diverged, Progress
from nanoadam.reports import run as report

__all__ = ["Diverged", "Job", "Progress", "RunError", "ensure", "last_checkpoint", "prepare", "quiet", "resume", "rows",
           "run", "with_task"]  # fmt: skip

APPLIED = ("learning_rate", "head_learning_rate", "eps", "max_grad_norm")
"""Keys that may be changed before a run goes on, and hold from then on."""

FREE = (
    "eval_batch_size", "eval_every", "save_every", "save_model", "save", "keep_checkpoints", "log_every", "samples",
    "device", "shard", "threads", "metric", "trust_remote_code", "allow_pickle",
)  # fmt: skip
"""Keys that may be changed, and change nothing of what is learned."""

Watch = Callable[[nn.Module], TrainerCallback]
"""Makes a callback for a model, before there is an optimizer."""


def quiet() -> None:
    """What a run has to say it says itself, and errors as one sentence."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


def run(config: Config, out: Path, progress: Progress | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Finetune, and write a run folder.

    Args:
        config: what to do.
        out: the folder; new or empty.
        progress: called with every line of metrics.
        watch: makes one more callback of the Trainer.

    Returns:
        The results that stand in the manifest.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError: for whatever a config can get wrong, before `out` holds anything.
        RunError: if the loss or a weight is no longer finite, or the disk is full; the last checkpoint is whole. Or
            if another process is writing to `out`.
    """
    config = config.resolved()
    optimizers.refuse_idle(config.optimizer_options, [config.optimizer])
    join(config)
    out, first = processes.shared(out), processes.first()  # its name may hold the time
    if first and out.exists():
        folders.prepare_folder(out)
    with _threads(config.threads):
        job = prepare(config)
        with folders.new_folder(out) if first else contextlib.nullcontext():
            _check_seen(out)
            tell = progress or (lambda _: None)
            tell({"step": 0, "total": job.plan.total_steps, "about": outcome.beginning(job)})
            found = rates.chosen(job, tell)
            job.config = found.written(job.config)
            if first:
                folders.write(out / "config.toml", job.config.to_toml())
            return _run(job, out, None, progress, watch, {"learning_rate": found.to_dict()})


def resume(out: Path, progress: Progress | None = None, keys: dict[str, Any] | None = None) -> dict[str, Any]:
    """Go on from the last checkpoint of a run folder; on a CPU bit for bit as if it had never stopped.

    Args:
        out: the run folder.
        progress: as in `run`.
        keys: of the config that are to be others from now on, see `APPLIED` and `FREE`; as if they had been changed
            in config.toml.

    Raises:
        ValueError: if `out` is no run folder, its run is finished, its data is not what it was, or a key was changed
            that would make two runs of it.
        RunError: as in `run`.
    """
    if not (out / "config.toml").is_file():
        raise ValueError(f"{out} is no run folder: it holds no config.toml")
    join(configs.of_run(out))
    with folders.alone(out) if processes.first() else contextlib.nullcontext():
        return _resume(out, progress, keys or {})


def join(config: Config) -> None:
    """Meet the other processes of this run, if there are any.

    Raises:
        ValueError: for what several processes cannot do.
    """
    processes.join(config.device == "cpu")
    shards.check(config)
    if processes.count() > 1 and optimizers.options(config).get("release"):
        raise ValueError(
            f"{config.optimizer} with release steps before the processes have exchanged gradients: leave out "
            f"{config.optimizer}.release, or use one process"
        )
    if config.batch_size < processes.count():
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared out among {processes.count()} processes: give a "
            "--batch-size that has a row for each of them"
        )


def _check_seen(out: Path) -> None:
    """Wait for the first process's folder, which all read checkpoints from."""
    processes.wait()
    if not out.is_dir():
        raise ValueError(
            f"{out} is there on the first process's machine only: give --out a folder that all machines see"
        )


def ensure(config: Config, out: Path) -> dict[str, Any]:
    """The results of a run: read if it is finished, gone on with if it was begun, else run.

    Args:
        config: what to do.
        out: a folder of its own: what else is there, or a run of another config, is deleted.
    """
    begun = (out / "config.toml").is_file()
    if not begun or differences(config.resolved(), configs.of_run(out)):
        shutil.rmtree(out, ignore_errors=True)
        return run(config, out)
    results: dict[str, Any] | None = _begun(out).get("results")
    return resume(out) if results is None else results


def differences(asked: Config, written: Config) -> list[str]:
    """Keys in which a run is not as asked; what was not given then was found and written."""
    values = ((key, getattr(asked, key), getattr(written, key)) for key in configs.FIELDS)
    found = [key for key, a, b in values if a != b and not (a is None and key in configs.FOUND)]
    same = "optimizer" not in found and optimizers.options(asked) == optimizers.options(written)
    return [key for key in found if key != "optimizer_options" or not same]  # those of other methods do nothing


def _begun(out: Path) -> dict[str, Any]:
    path = out / "manifest.json"
    if not path.is_file():
        return {}
    return folders.read_manifest(
        path,
        "remove it to go on by config.toml alone, without a look at whether that and the data are what they were, or "
        "begin anew with --out",
    )


def _resume(out: Path, progress: Progress | None, keys: dict[str, Any]) -> dict[str, Any]:
    manifest = _begun(out)
    if manifest.get("results"):
        raise ValueError(f"the run in {out} is finished: its results are in manifest.json, its model in model/")
    config = dataclasses.replace(configs.of_run(out), **keys)
    if config.learning_rate is None:
        raise ValueError(
            "a run that goes on tries no learning rates: give --learning-rate a number, or leave config.toml as it was"
        )
    checkpoint = last_checkpoint(out / "checkpoints")
    changed = _changed(out, config, manifest) if checkpoint is not None else {}
    if checkpoint is not None:
        checkpoints.check(checkpoint, out, config.best)
    processes.wait()  # all have read the folder before the first one writes to it
    with _threads(config.threads):
        job = prepare(config)
        for split in ("train", "validation"):
            before, now = (s.get(split, {}).get("sha256_of_rows") for s in (manifest.get("data", {}), job.sources))
            if before not in (None, now):
                raise ValueError(
                    f"the {split} data is not what it was when {out} began: a resumed run would be neither"
                )
        ended = checkpoint is not None and checkpoints.step_of(checkpoint) >= job.plan.total_steps
        if ended and not any(line.get("event") == "train" for line in folders.read_lines(out / "metrics.jsonl")):
            raise ValueError(
                f"{out / 'metrics.jsonl'} has no line of training that can be read, and all steps are done: the "
                f"weights are in {checkpoint}; for a report begin anew with --out"
            )
        if processes.first():
            folders.write(out / "config.toml", job.config.to_toml())
        about = outcome.beginning(job)
        if changed:
            about += [f"from step {checkpoints.step_of(checkpoint)} on: {key} {new}, was {old}" if checkpoint else ""
                      for key, (old, new) in changed.items()]  # fmt: skip
        (progress or (lambda _: None))({"step": 0, "total": job.plan.total_steps, "about": about})
        log = [*manifest.get("changed", ()),
               *({"step": checkpoints.step_of(checkpoint) if checkpoint else 0, "key": key, "was": old, "is": new}
                 for key, (old, new) in changed.items())]  # fmt: skip
        more = {"learning_rate": manifest.get("learning_rate"), **({"changed": log} if log else {})}
        return _run(job, out, checkpoint, progress, None, more, changed)


def _changed(out: Path, config: Config, manifest: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that hold from now on and did not before.

    Raises:
        ValueError: for a key that the steps so far were made with.
    """
    before = {key: tuple(value) if isinstance(value, list) else value
              for key, value in manifest.get("settings", {}).items()}  # fmt: skip
    now = {key: getattr(config, key) for key in configs.FIELDS}
    other = {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}
    kept = ("metric",) if config.best else ()  # by which the best weights so far were chosen
    fixed = [key for key in other if key not in (*APPLIED, *FREE) or key in kept]
    if fixed:
        key = fixed[0]
        raise ValueError(
            f"{key} was {before[key]!r} when the run in {out} began and is {now[key]!r} now: the steps so far were "
            "made with it, so set it back in config.toml, or begin anew with --out (may be changed: "
            f"{', '.join(APPLIED)}, and what is saved or shown)"
        )
    return {key: values for key, values in other.items() if key in APPLIED}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    job: Job,
    out: Path,
    checkpoint: Path | None,
    progress: Progress | None,
    watch: Watch | None = None,
    more: dict[str, Any] | None = None,
    changed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, measure, write."""
    config, model = job.config, job.task.model
    first = processes.first()
    base = delta.snapshot(model) if first and config.save_model and config.save != "model" else None
    before = {
        name: p.detach().to("cpu", copy=True) if base is None else base[name]
        for name, p in (pretrained(model) if first else {}).items()
    }
    timed = bool(((more or {}).get("learning_rate") or {}).get("trials")) and checkpoint is None  # then it is known
    own_head = config.head_learning_rate is not None
    metrics = training.Metrics(out / "metrics.jsonl", checkpoint, progress, own_head, timed)
    trainer = training.trainer_for(job, out, metrics, changed)
    if base is not None:
        trainer.keep_patches_of(config.model, base, patches.new_tensors(model))
    if watch is not None:
        trainer.add_callback(watch(model))
    known = _spread(job, trainer, checkpoint) if trainer.spread else retain.before(job.measures, config, model)
    manifest = {**_manifest(job, trainer), **(more or {}), "started": _now(), "results": None}
    if first:
        folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _train(job, trainer, checkpoint)
    processes.wait()  # the best weights are on the disk
    if config.best and training.put_best(model, out / "checkpoints"):
        trainer.evaluate()
    if trainer.seen is None:
        trainer.evaluate()
    assert trainer.seen is not None
    job.task.finish()
    whole = merged(model)
    after = {name: measure(whole) for name, measure in job.measures.items()}
    details = job.task.details(trainer.seen, config.samples)
    gathered = shards.tensors(model) if trainer.spread else None

    def write() -> dict[str, Any]:
        lines = folders.read_lines(out / "metrics.jsonl")
        results = {
            **outcome.measured(job, lines),
            **distance(dict(whole.named_parameters()) if gathered is None else gathered, before),
            "memory": _memory(lines),
            "seconds_per_step": _seconds_per_step([line for line in lines if line["event"] == "train"]),
            "retained": retain.compared(known, after),
        }
        results["notes"] = outcome.notes(job, results, lines, details.pop("notes", ()))
        done = {**manifest, "results": results, "details": details, "finished": _now()}
        if config.save_model and config.save != "delta":
            with folders.whole_folder(out / "model") as folder:
                whole.save_pretrained(str(folder), state_dict=gathered)
                job.task.processor.save_pretrained(str(folder))
                folders.write(folder / "README.md", card.card(done))
        if base is not None:
            with folders.whole_folder(out / "delta") as folder:
                new, processor = patches.new_tensors(model), job.task.processor
                patches.save(folder, model, base, name=config.model, new=new, processor=processor, tensors=gathered)
        folders.write(out / "report.html", report.page(done, lines))
        folders.write(out / "manifest.json", json.dumps(done, indent=2) + "\n")
        return results

    return processes.by_first(write)


def _spread(job: Job, trainer: training.RunTrainer, checkpoint: Path | None) -> dict[str, dict[str, float]]:
    """Shard the model, with the weights of a checkpoint if there is one; what is measured of it before training."""
    model = job.task.model
    begun = model if checkpoint is None or not job.measures else copy.deepcopy(model)
    if checkpoint is not None:
        trainer._load_from_checkpoint(str(checkpoint))
    shards.shard(model)
    if begun is not model and job.measures:
        shards.shard(begun)
    return {name: measure(begun) for name, measure in job.measures.items()}


def _train(job: Job, trainer: training.RunTrainer, checkpoint: Path | None) -> None:
    """All steps that are left, after one evaluation of what it begins from.

    Raises:
        Diverged: if a weight is not finite at the end.
    """
    if checkpoint is None:
        trainer.evaluate()
        trainer.train()
    elif checkpoints.step_of(checkpoint) >= job.plan.total_steps:
        trainer._load_from_checkpoint(str(checkpoint))  # killed after its last step: there is nothing left to train
        trainer.seen = None
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    broken = shards.broken_weight(job.task.model)
    if broken is not None:
        raise Diverged(f"the weight {broken} is not finite after step {job.plan.total_steps}: {trainer.kept()}. {CURE}")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _memory(lines: list[dict[str, Any]]) -> dict[str, int]:
    trained = [line for line in lines if line["event"] == "train"]
    return {kind: max(line["memory"][kind] for line in trained) for kind in trained[-1]["memory"]}


def _seconds_per_step(trained: list[dict[str, Any]]) -> float:
    """The mean over the second half of the run, new selections included; the first half compiles and warms up."""
    spans = [
        (line["step"] - before, line["seconds_per_step"])
        for line, before in zip(trained, [0, *(line["step"] for line in trained)], strict=False)
        if 2 * before >= trained[-1]["step"]
    ]
    spans = [span for span in spans if span[0] > 0] or [(1, trained[-1]["seconds_per_step"])]
    return float(sum(steps * seconds for steps, seconds in spans) / sum(steps for steps, _ in spans))


def distance(now: Mapping[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    """How far from where it began: share of the trained weights whose bits differ, and the l2 norm of the change."""
    changed, total, square = 0, 0, 0.0
    for name, parameter in now.items():
        if name in before:
            value = parameter.detach()
            then = before[name].to(value.device)
            changed += int((value != then).sum())
            total += value.numel()
            square += float((value.float() - then.float()).square().sum(dtype=torch.float64))
    return {"touched": changed / max(1, total), "l2_moved": math.sqrt(square)}


def _manifest(job: Job, trainer: training.RunTrainer) -> dict[str, Any]:
    model, about = job.task.model, optimizers.about(job.config)
    return {
        "command": "nanoadam finetune",
        "kind": "finetuning run: one model, one data set, one optimizer, one seed",
        "pseudocode": folders.PSEUDOCODE if optimizers.by_nanoadam(job.config) else about["source"],
        "optimizer": about,
        **folders.environment(device=str(trainer.args.device), processes=processes.count()),
        "data": job.sources,
        "model": {
            "name": job.config.model,
            "class": type(model).__name__.removeprefix("FSDP"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "commit": getattr(model.config, "_commit_hash", None),
            "head": job.task.head,
        },
        "plan": dataclasses.asdict(job.plan),
        "expected": outcome.expected(job),
        "settings": dataclasses.asdict(job.config),
        "seeds": [job.config.seed],
    }
