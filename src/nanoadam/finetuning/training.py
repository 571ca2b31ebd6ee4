"""transformers' Trainer as a run needs it: whole checkpoints, its lines of metrics, the best weights, changed rates."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from nanoadam.callback import TOUCHED, NanoAdamCallback, memory_by_kind, unwrap
from nanoadam.finetuning import checkpoints, folders, optimizers, processes, shards
from nanoadam.finetuning.checkpoints import BEST, last_checkpoint, step_of
from nanoadam.finetuning.folders import RunError
from nanoadam.finetuning.job import Job
from nanoadam.finetuning.patches import PatchCheckpoints
from nanoadam.finetuning.sharing import SharedTrainer
from nanoadam.text import duration

CURE = "Try a lower learning rate, warm-up or max_grad_norm; --resume RUN --learning-rate 1e-5 goes on with another"

_CHECKPOINTING = next(  # its name changed within transformers 5
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)

Progress = Callable[[dict[str, Any]], None]
"""Called with the newest of: step, total, loss, metric, memory; and with `about`, lines of text, as it begins."""


class Diverged(RunError):
    """The loss or a weight is no longer finite."""


def arguments_for(job: Job, folder: Path, total_steps: int, **options: Any) -> TrainingArguments:
    """What the Trainer is told, without logs, evaluations and checkpoints unless `options` say so."""
    config = job.config
    warmup = config.warmup * total_steps if config.warmup < 1 else min(config.warmup, total_steps)
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "max_steps": total_steps,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": math.ceil(warmup),
        "max_grad_norm": config.max_grad_norm or 0.0,
        "label_smoothing_factor": config.label_smoothing,
        "bf16": config.autocast == "bf16",
        "fp16": config.autocast == "fp16",
        _CHECKPOINTING: config.checkpoint_activations,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "seed": config.seed,
        # Said also where there is nothing else: transformers refuses bf16 on a CPU that it found by itself.
        "use_cpu": config.device == "cpu" or not torch.accelerator.is_available(),
        "dataloader_pin_memory": config.device != "cpu" and torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": not job.task.keeps_columns,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**chosen, **options})
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would be DataParallel, and batch_size no longer the batch
    return arguments


def trainer_for(job: Job, out: Path, metrics: Metrics, changed: dict[str, Any] | None = None) -> RunTrainer:
    """The Trainer of a run, with its callbacks.

    Args:
        job: what is trained.
        out: the run folder.
        metrics: writes metrics.jsonl.
        changed: keys of the config that are others than when the run began.
    """
    config, task, plan = job.config, job.task, job.plan
    arguments = arguments_for(
        job, out / "checkpoints", plan.total_steps,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would hide a loss of NaN
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=config.eval_every or plan.steps_per_epoch,
        save_strategy="steps" if config.save_model else "no",
        save_steps=config.save_every or plan.steps_per_epoch,
    )  # fmt: skip
    callbacks: list[TrainerCallback] = [Changed(job)] if changed else []  # before what compares options
    if optimizers.by_nanoadam(config):
        callbacks.append(NanoAdamCallback(config.log_touched and not shards.wanted(config)))
    if config.best:
        callbacks.append(Best(out / "checkpoints", task.metric, task.higher_is_better))
    trainer = RunTrainer.of(job, arguments, [*callbacks, metrics])
    trainer.keep = config.keep_checkpoints
    return trainer


class RunTrainer(PatchCheckpoints, SharedTrainer, Trainer):
    """Stops at a loss that is not finite, and writes checkpoints, or patches in them, whole or not at all."""

    keep = 1
    seen: EvalPrediction | None = None
    _staging: Path | None = None

    def __init__(self, *args: Any, spread: bool = False, **kwargs: Any) -> None:
        self.spread = spread  # over the processes: the model is sharded
        super().__init__(*args, **kwargs)

    @classmethod
    def of(
        cls,
        job: Job,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        rows: Any = None,
        held: Any = None,
    ) -> RunTrainer:
        """A Trainer of a job, by default on its rows; what it predicted last is kept in `seen`."""
        task = job.task

        def measure(prediction: EvalPrediction) -> dict[str, float]:
            trainer.seen = prediction
            return task.measure(prediction)

        trainer = cls(
            task.model,
            arguments,
            train_dataset=task.train if rows is None else rows,
            eval_dataset=task.validation if held is None else held,
            data_collator=task.collator,
            compute_metrics=measure,
            preprocess_logits_for_metrics=task.preprocess_logits,
            optimizer_cls_and_kwargs=job.optimizer,
            callbacks=callbacks,
            spread=shards.wanted(job.config),
        )
        if job.config.task != "causal-lm":
            # Classifiers swallow the count of items and divide by nothing, so accumulated gradients would be a sum.
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        return trainer

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
        logged = arguments.logging_strategy != "no" and step % arguments.logging_steps == 0
        if grad_norm is None and not (saved or logged or step in (1, self.state.max_steps)):
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.spread:  # otherwise it goes there block by block
            super()._move_model_to_device(model, device)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """In place of what accelerate puts into the model's forward pass where it is not spread."""
        return self.accelerator.autocast() if self.spread else super().autocast_smart_context_manager(cache_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights as one process would write them."""
        if not self.spread:
            super().save_model(output_dir, _internal_call)
            return
        state = shards.tensors(self.model)  # type: ignore[arg-type]
        if processes.first():
            self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = shards.optimizer_state(unwrap(self.optimizer))  # type: ignore[arg-type]
        if processes.first():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.spread or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        shards.load_optimizer_state(unwrap(self.optimizer), state)  # type: ignore[arg-type]
        self.lr_scheduler.load_state_dict(scheduler)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not shards.sharded(self.model):  # type: ignore[arg-type]  # they were loaded before they were spread
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
        broken = shards.broken_weight(model)
        if broken is not None:
            raise Diverged(f"the weight {broken} is not finite after step {step}: {self.kept()}. {CURE}")
        final = self._checkpoints() / f"checkpoint-{step}"
        if not self.spread and shards.drifted(self.model):  # type: ignore[arg-type]
            raise RunError(
                f"the processes' weights differ after step {step}: something changes them on each process by itself. "
                f"{self.kept()}, which one process can go on from"
            )
        self._staging = final.parent / ".writing"
        try:
            if processes.first():
                shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
            processes.wait()
            super()._save_checkpoint(model, trial)
            watcher = next((c for c in self.callback_handler.callbacks if isinstance(c, NanoAdamCallback)), None)
            if watcher is not None and watcher.touched is not None and processes.first():
                watcher.touched.save(self._staging / final.name / TOUCHED)
            processes.wait()  # each has written its random state
            if processes.first():
                checkpoints.seal(self._staging / final.name)
                folders.publish(self._staging / final.name, final)
        except Exception as error:  # torch, safetensors and the system each have a kind of their own for a full disk
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunError(
                f"the checkpoint of step {step} could not be written ({reason}); {self.kept()}. Make room on the "
                "disk, then go on with --resume"
            ) from error
        finally:
            if processes.first():
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if processes.first():
            rotate_checkpoints(str(final.parent), self.keep)


TIMED = 5
"""Steps after which a run that was not timed before says how long it takes."""


class Metrics(TrainerCallback):
    """Writes metrics.jsonl; what a resumed run writes continues what stood there at its checkpoint.

    Of several processes the first one writes.
    """

    def __init__(
        self, path: Path, checkpoint: Path | None, progress: Progress | None, own_head: bool, timed: bool = False
    ) -> None:
        self._path = path
        self._untimed = 0 if timed else TIMED
        self._began = 0.0
        self._own_head = own_head
        self._progress = progress or (lambda _: None)
        self._times: list[float] = []
        self._clock = 0.0
        self._memory: dict[str, int] = {}
        if not processes.first():
            return
        done = -1 if checkpoint is None else step_of(checkpoint)
        kept = [line for line in folders.read_lines(path) if "event" in line and line.get("step", math.inf) <= done]
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
        now = time.perf_counter()
        self._times.append(now - self._clock)
        self._say_time(now, state)
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # the Trainer forgets on resuming what it has not logged
        self._progress({"step": state.global_step, "total": state.max_steps})

    def _say_time(self, now: float, state: Any) -> None:
        """About how long the rest takes, from the steps after the first, which is slow."""
        if self._untimed == TIMED:
            self._began = now
        self._untimed -= 1
        left = state.max_steps - state.global_step
        if self._untimed == 0 and left > TIMED and processes.first():
            each = (now - self._began) / (TIMED - 1)
            self._progress({"step": state.global_step, "total": state.max_steps, "about": [
                f"Time: about {duration(each * left)} from here, at {each:.2g} s a step"]})  # fmt: skip

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
                by_head = {str(group["role"]).startswith(("head", "selected head")): float(rate)
                           for rate, group in zip(reversed(rates), reversed(groups), strict=True)}  # fmt: skip
                values["head_learning_rate"] = by_head[True]
                # The Trainer logs the first group's, which is the head's where nothing but vectors is trained beside.
                values["learning_rate"] = by_head.get(False, values["learning_rate"])
            line = {"event": "train", **line, **values, "seconds_per_step": seconds, "memory": dict(self._memory)}
            self._times = []
        else:
            return
        if processes.first():
            folders.append(self._path, line)
            self._progress({"total": state.max_steps, **line})


_SPEEDS = ("_runtime", "_per_second", "_preparation_time")


class Best(TrainerCallback):
    """Keeps the weights of the best evaluation on the disk."""

    def __init__(self, folder: Path, metric: str, higher_is_better: bool) -> None:
        self._path = folder / BEST
        self._metric, self._sign = metric, 1 if higher_is_better else -1
        self._best = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on knows what was best until then, if it still has it."""
        if not self._path.is_file():
            return
        for entry in state.log_history:
            if f"eval_{self._metric}" in entry:
                self._best = max(self._best, self._sign * entry[f"eval_{self._metric}"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them if they are better than any before."""
        merit = self._sign * kwargs["metrics"].get(f"eval_{self._metric}", math.nan)
        if state.global_step and merit > self._best:
            self._best = merit
            found = _trained(kwargs["model"])
            if processes.first():
                checkpoints.save_best(self._path, found, state.global_step)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Weights that training changes, and statistics, by name."""
    weights = {name: shards.whole(p.detach()).contiguous() for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    buffers = {name: b.contiguous() for name, b in model.named_buffers() if name in state}
    return {**weights, **buffers}


def put_best(model: nn.Module, folder: Path) -> bool:
    """Give a model the best weights; whether there were any."""
    path = folder / BEST
    if not path.is_file():
        return False
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in checkpoints.read_best(path).items():
        shards.put(now[name], value)
    return True


class Changed(TrainerCallback):
    """Gives an optimizer that was resumed the rates, decay and eps of a config that was changed meanwhile."""

    def __init__(self, job: Job) -> None:
        self._config = job.config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint was loaded, before the first step."""
        config, scheduler = self._config, kwargs["lr_scheduler"]
        groups = unwrap(kwargs["optimizer"]).param_groups
        now = []
        for i, group in enumerate(groups):
            own = config.head_learning_rate if group.get("role") == "head" else None
            rate = own if own is not None else config.learning_rate
            if rate is not None:
                factor = scheduler.lr_lambdas[i](scheduler.last_epoch) if hasattr(scheduler, "lr_lambdas") else 1.0
                scheduler.base_lrs[i] = group["initial_lr"] = rate
                group["lr"] = rate * factor
            if isinstance(group.get("eps"), float):  # adafactor has two, which are not the config's
                group["eps"] = config.eps
            if group.get("weight_decay"):
                group["weight_decay"] = config.weight_decay
            now.append(float(group["lr"]))
        scheduler._last_lr = now
