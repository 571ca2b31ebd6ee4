"""One finetuning run over transformers' Trainer: its folder, its checkpoints, and going on from one bit for bit.

The folder holds `config.toml` (complete: it reruns the run), `manifest.json`, `metrics.jsonl`, `report.html`,
`checkpoints/` while it runs and `model/` at the end. Nothing is ever half there: each file and each checkpoint
takes its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from nanoadam.baselines.lora import merge_lora, pretrained
from nanoadam.callback import TOUCHED, NanoAdamCallback, memory_by_kind, unwrap
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import data, folders, norms, optimizers, retain, tasks
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.folders import RunError
from nanoadam.reports import page

CURE = "Try a lower learning rate, warm-up or max_grad_norm"

_CHECKPOINTING = next(  # its name changed within transformers 5
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)

Progress = Callable[[dict[str, Any]], None]
"""Called with the newest of: step, total, loss, metric, memory."""


@dataclasses.dataclass
class Job:
    """A config with its data and its model: what a run starts from."""

    config: Config
    task: tasks.Task
    plan: optimizers.Plan
    optimizer: optimizers.Made
    sources: dict[str, Any]
    measures: dict[str, retain.Measure]


def quiet() -> None:
    """What a run has to say it says itself, and errors as one sentence."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


def rows(config: Config) -> tuple[data.Split, data.Split]:
    """The training and the validation split, read once in a process.

    Raises:
        ValueError: as `data.load`.
    """
    return data.remembered(("rows", data.key(config)), lambda: data.load(config))


def prepare(config: Config) -> Job:
    """Read data and model; everything random comes from the config's seed.

    Raises:
        ValueError: for whatever a config can get wrong, in one sentence.
    """
    optimizers.check(config)
    train, validation = rows(config)
    set_seed(config.seed)
    task = tasks.make(config, train, validation)
    if config.norm_momentum is not None:
        norms.set_momentum(task.model, config.norm_momentum)
    if config.freeze_norms:
        norms.freeze_norms(task.model)
    per_epoch = max(1, math.ceil(math.ceil(len(task.train) / config.batch_size) / config.accumulate))
    total = config.max_steps or math.ceil(config.epochs * per_epoch)
    if total < 1:
        raise ValueError(f"epochs {config.epochs:g} is not a single step: give more epochs, or max_steps")
    sources = {"train": train.source, "validation": validation.source, "read_as": task.description}
    measures = retain.measures(config, task.processor)
    plan = optimizers.Plan(total, per_epoch)
    task.model = optimizers.adapt(task.model, config)
    return Job(config, task, plan, optimizers.make(task.model, config, plan), sources, measures)


Watch = Callable[[nn.Module], TrainerCallback]
"""Makes a callback for a model, before there is an optimizer."""


def run(config: Config, out: Path, progress: Progress | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Finetune, and write a run folder.

    Args:
        config: what to do.
        out: the folder; new or empty.
        progress: told about every line of metrics.
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
    if out.exists():
        folders.prepare_folder(out)
    with _threads(config.threads):
        job = prepare(config)
        with folders.new_folder(out):
            folders.write(out / "config.toml", config.to_toml())
            return _run(job, out, None, progress, watch)


def resume(out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Go on from the last checkpoint of a run folder; on a CPU bit for bit as if it had never stopped.

    Raises:
        ValueError: if `out` is no run folder, its run is finished, or its data is not what it was.
        RunError: as in `run`.
    """
    if not (out / "config.toml").is_file():
        raise ValueError(f"{out} is no run folder: it holds no config.toml")
    with folders.alone(out):
        return _resume(out, progress)


def ensure(config: Config, out: Path) -> dict[str, Any]:
    """The results of a run: read if it is finished, gone on with if it was begun, else run.

    Args:
        config: what to do.
        out: a folder of its own: what else is there, or a run of another config, is deleted.
    """
    begun = (out / "config.toml").is_file()
    if not begun or Config(**configs.read(out / "config.toml")) != config.resolved():
        shutil.rmtree(out, ignore_errors=True)
        return run(config, out)
    results: dict[str, Any] | None = _begun(out).get("results")
    return resume(out) if results is None else results


def _begun(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = {}
    if (out / "manifest.json").is_file():
        manifest = json.loads((out / "manifest.json").read_text())
    return manifest


def _resume(out: Path, progress: Progress | None) -> dict[str, Any]:
    manifest = _begun(out)
    if manifest.get("results"):
        raise ValueError(f"the run in {out} is finished: its results are in manifest.json, its model in model/")
    config = Config(**configs.read(out / "config.toml"))
    with _threads(config.threads):
        return _go_on(out, prepare(config), manifest, progress)


def _go_on(out: Path, job: Job, manifest: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    for split in ("train", "validation"):
        before, now = (s.get(split, {}).get("sha256_of_rows") for s in (manifest.get("data", {}), job.sources))
        if before not in (None, now):
            raise ValueError(f"the {split} data is not what it was when {out} began: a resumed run would be neither")
    return _run(job, out, last_checkpoint(out / "checkpoints"), progress)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    last: Any = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None  # type: ignore[no-untyped-call]
    return None if last is None else Path(last)


def _run(
    job: Job, out: Path, checkpoint: Path | None, progress: Progress | None, watch: Watch | None = None
) -> dict[str, Any]:
    config, model = job.config, job.task.model
    before = {name: p.detach().to("cpu", copy=True) for name, p in pretrained(model).items()}
    metrics = _Metrics(out / "metrics.jsonl", checkpoint, progress, config.head_learning_rate is not None)
    trainer = _trainer(job, out, metrics)
    if watch is not None:
        trainer.add_callback(watch(model))
    known = retain.before(job.measures, config, model)
    manifest = {**_manifest(job, trainer), "started": _now(), "results": None}
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if checkpoint is not None and _step(checkpoint) >= job.plan.total_steps:
        trainer._load_from_checkpoint(str(checkpoint))  # killed after its last step: there is nothing left to train
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    broken = _broken(model)
    if broken is not None:
        raise Diverged(f"the weight {broken} is not finite after step {job.plan.total_steps}: {trainer.kept()}. {CURE}")
    whole = merge_lora(model)
    lines = folders.read_lines(out / "metrics.jsonl")
    trained = [line for line in lines if line["event"] == "train"]
    results = {
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        "steps": job.plan.total_steps,
        "final": next(line["metrics"] for line in reversed(lines) if line["event"] == "evaluation"),
        **distance(whole, before),
        "memory": {kind: max(line["memory"][kind] for line in trained) for kind in trained[-1]["memory"]},
        "seconds_per_step": _seconds_per_step(trained),
        "retained": retain.compared(known, {name: measure(whole) for name, measure in job.measures.items()}),
    }
    if config.save_model:
        with folders.whole_folder(out / "model") as folder:
            whole.save_pretrained(str(folder))
            job.task.processor.save_pretrained(str(folder))
    manifest = {**manifest, "results": results, "finished": _now()}
    folders.write(out / "report.html", page.page(manifest, lines))
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return results


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _seconds_per_step(trained: list[dict[str, Any]]) -> float:
    """The mean over the second half of the run, new selections included; the first half compiles and warms up."""
    spans = [
        (line["step"] - before, line["seconds_per_step"])
        for line, before in zip(trained, [0, *(line["step"] for line in trained)], strict=False)
        if 2 * before >= trained[-1]["step"]
    ]
    spans = [span for span in spans if span[0] > 0] or [(1, trained[-1]["seconds_per_step"])]
    return float(sum(steps * seconds for steps, seconds in spans) / sum(steps for steps, _ in spans))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _broken(model: nn.Module) -> str | None:
    """The name of a weight that is not finite."""
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def distance(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    """How far from where it began: share of the trained weights whose bits differ, and the l2 norm of the change."""
    changed, total, square = 0, 0, 0.0
    for name, parameter in model.named_parameters():
        if name in before:
            now = parameter.detach()
            then = before[name].to(now.device)
            changed += int((now != then).sum())
            total += now.numel()
            square += float((now.float() - then.float()).square().sum(dtype=torch.float64))
    return {"touched": changed / max(1, total), "l2_moved": math.sqrt(square)}


def _trainer(job: Job, out: Path, metrics: _Metrics) -> _Trainer:
    config, task, plan = job.config, job.task, job.plan
    itself = optimizers.by_nanoadam(config)
    checkpointing: dict[str, Any] = {_CHECKPOINTING: config.checkpoint_activations}
    warmup = config.warmup * plan.total_steps if config.warmup < 1 else config.warmup
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulate,
        max_steps=plan.total_steps,
        lr_scheduler_type=config.scheduler,
        warmup_steps=math.ceil(warmup),
        max_grad_norm=config.max_grad_norm or 0.0,
        label_smoothing_factor=config.label_smoothing,
        bf16=config.autocast == "bf16",
        fp16=config.autocast == "fp16",
        **checkpointing,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would hide a loss of NaN
        eval_strategy="steps",
        logging_first_step=True,
        eval_steps=config.eval_every or plan.steps_per_epoch,
        save_strategy="steps" if config.save_model else "no",
        save_steps=config.save_every or plan.steps_per_epoch,
        seed=config.seed,
        # Said also where there is nothing else: transformers refuses bf16 on a CPU that it found by itself.
        use_cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=not task.keeps_columns,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would be DataParallel, and batch_size no longer the batch
    callbacks: list[TrainerCallback] = [NanoAdamCallback(config.log_touched)] if itself else []
    trainer = _Trainer(
        task.model,
        arguments,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator,
        compute_metrics=task.measure,
        preprocess_logits_for_metrics=task.preprocess_logits,
        optimizer_cls_and_kwargs=job.optimizer,
        callbacks=[*callbacks, metrics],
    )
    trainer.keep = config.keep_checkpoints
    if config.task != "causal-lm":
        # Classifiers swallow the count of items and divide by nothing, so accumulated gradients would be a sum.
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


class Diverged(RunError):
    """The loss or a weight is no longer finite."""


class _Trainer(Trainer):
    """Stops at a loss that is not finite, and writes checkpoints whole or not at all."""

    keep = 1
    _staging: Path | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One backward pass.

        Raises:
            Diverged: if its loss is not finite.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise Diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}: {self.kept()}. {CURE}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of all gradients, a pass over them, where it is logged; the Trainer takes it at every step."""
        step, arguments = self.state.global_step + 1, self.args
        saved = arguments.save_strategy != "no" and step % arguments.save_steps == 0  # which is logged as well
        if grad_norm is None and not (
            saved or step % arguments.logging_steps == 0 or step in (1, self.state.max_steps)
        ):
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _checkpoints(self) -> Path:
        return Path(str(self.args.output_dir))

    def kept(self) -> str:
        """What there is to go on from, in words."""
        last = last_checkpoint(self._checkpoints())
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        broken = _broken(model)
        if broken is not None:
            raise Diverged(f"the weight {broken} is not finite after step {step}: {self.kept()}. {CURE}")
        final = self._checkpoints() / f"checkpoint-{step}"
        self._staging = final.parent / ".writing"
        try:
            shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
            super()._save_checkpoint(model, trial)
            watcher = next((c for c in self.callback_handler.callbacks if isinstance(c, NanoAdamCallback)), None)
            if watcher is not None and watcher.touched is not None:
                watcher.touched.save(self._staging / final.name / TOUCHED)
            folders.publish(self._staging / final.name, final)
        except Exception as error:  # torch, safetensors and the system each have a kind of their own for a full disk
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunError(
                f"the checkpoint of step {step} could not be written ({reason}); {self.kept()}. Make room on the "
                "disk, then go on with --resume"
            ) from error
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        rotate_checkpoints(str(final.parent), self.keep)


class _Metrics(TrainerCallback):
    """Writes metrics.jsonl; what a resumed run writes continues what stood there at its checkpoint."""

    def __init__(self, path: Path, checkpoint: Path | None, progress: Progress | None, own_head: bool) -> None:
        self._path = path
        self._own_head = own_head
        self._progress = progress or (lambda _: None)
        self._times: list[float] = []
        self._clock = 0.0
        self._memory: dict[str, int] = {}
        done = 0 if checkpoint is None else _step(checkpoint)
        kept = [line for line in folders.read_lines(path) if line["step"] <= done]
        folders.write(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock of a step starts."""
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All gradients of the step are there."""
        if not self._memory or (state.global_step + 1) % args.logging_steps == 0:
            self._memory = memory_by_kind(kwargs["model"], unwrap(kwargs["optimizer"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of a step stops."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(time.perf_counter() - self._clock)
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # the Trainer forgets on resuming what it has not logged
        self._progress({"step": state.global_step, "total": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line of metrics.jsonl."""
        logs, line = kwargs["logs"], {"step": state.global_step, "epoch": state.epoch}
        if "eval_loss" in logs:
            names = [key for key in logs if key.startswith("eval_") and not key.endswith(_SPEEDS)]
            line = {"event": "evaluation", **line, "metrics": {key.removeprefix("eval_"): logs[key] for key in names}}
        elif "loss" in logs:
            # At its largest: the gradients before the step, and the state after it, which a step may have enlarged.
            self._memory["state"] = memory_by_kind(kwargs["model"], unwrap(kwargs["optimizer"]))["state"]
            seconds = sum(self._times) / len(self._times)
            values = {
                key: logs[key] for key in ("loss", "grad_norm", "learning_rate", "density", "touched") if key in logs
            }
            if self._own_head:
                rates, groups = kwargs["lr_scheduler"].get_last_lr(), unwrap(kwargs["optimizer"]).param_groups
                values["head_learning_rate"] = next(
                    float(rate) for rate, group in zip(rates, groups, strict=True) if group["role"] == "head"
                )
            line = {"event": "train", **line, **values, "seconds_per_step": seconds, "memory": dict(self._memory)}
            self._times = []
        else:
            return
        folders.append(self._path, line)
        self._progress({"total": state.max_steps, **line})


_SPEEDS = ("_runtime", "_per_second", "_preparation_time")


def _manifest(job: Job, trainer: _Trainer) -> dict[str, Any]:
    model, about = job.task.model, optimizers.about(job.config)
    return {
        "command": "nanoadam finetune",
        "kind": "finetuning run: one model, one data set, one optimizer, one seed",
        "pseudocode": folders.PSEUDOCODE if optimizers.by_nanoadam(job.config) else about["source"],
        "optimizer": about,
        **folders.environment(device=str(trainer.args.device)),
        "data": job.sources,
        "model": {
            "name": job.config.model,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "commit": getattr(model.config, "_commit_hash", None),
        },
        "plan": dataclasses.asdict(job.plan),
        "settings": dataclasses.asdict(job.config),
        "seeds": [job.config.seed],
    }
