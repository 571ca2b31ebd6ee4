"""What NanoAdam does during a run of transformers' Trainer: density, touched share and memory in its logs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from nanoadam import checks
from nanoadam.gradients import gradient_bytes
from nanoadam.optimizer import NanoAdam
from nanoadam.shards import local
from nanoadam.state import state_bytes

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("nanoadam.callback needs transformers: pip install 'nanoadam[finetune]'") from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

TOUCHED = "touched.safetensors"
"""The file in a checkpoint that says which weights have been selected so far."""

_PACKED_AT_ONCE = 2**26


class Touched:
    """Which weights were ever selected: one bit each, on the CPU.

    Args:
        optimizer: the optimizer to watch.
    """

    def __init__(self, optimizer: NanoAdam) -> None:
        self._optimizer = optimizer
        self._bits: dict[str, Tensor] = {}  # name of the tensor: uint8 [ceil(weights / 8)]
        self._seen: dict[str, int] = {}  # name: the step of the selection that was counted last

    def _tensors(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and group of all that is selected from."""
        return [
            (f"{i}.{j}", parameter, group)
            for i, group in enumerate(self._optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
            if not group["dense"] and parameter.dim() > 1 and parameter.numel()
        ]

    @torch.no_grad()
    def count(self) -> None:
        """Add the present selection; to be called between backward and step."""
        due = []
        for name, parameter, group in self._tensors():
            if parameter.requires_grad and self._seen.get(name) != group["refreshed_at"]:
                self._seen[name] = group["refreshed_at"]
                due.append((name, parameter))
        packed: list[tuple[str, Tensor]] = []
        for i, (name, parameter) in enumerate(due):
            packed.append((name, _pack(self._optimizer.selected(parameter))))
            # Each way to the host waits for the GPU: few, but without much memory there.
            last = i + 1 == len(due) or due[i + 1][1].device != parameter.device
            if last or sum(bits.numel() for _, bits in packed) > _PACKED_AT_ONCE:
                parts = torch.cat([bits for _, bits in packed]).cpu().split([bits.numel() for _, bits in packed])
                for (own, _), bits in zip(packed, parts, strict=True):
                    self._bits[own] = self._bits[own] | bits if own in self._bits else bits.clone()
                packed = []

    def share(self) -> float:
        """Of the weights that are selected from, the share that was selected at least once."""
        total = sum(parameter.numel() for _, parameter, _ in self._tensors())
        return sum(_ones(bits) for bits in self._bits.values()) / max(1, total)

    def save(self, path: Path) -> None:
        """Write the bits, all or nothing."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(self._bits, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Go on from saved bits."""
        self._bits = load_file(path)
        self._seen = {}


def _pack(mask: Tensor) -> Tensor:
    """Bool of any shape to uint8 [ceil(n / 8)]."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    flat = flat << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return flat.sum(dim=1, dtype=torch.uint8)


def _ones(bits: Tensor) -> int:
    table = torch.tensor([bin(byte).count("1") for byte in range(256)])
    return int((torch.bincount(bits.int(), minlength=256) * table).sum())


def memory_by_kind(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on this process at this moment, whatever the optimizer.

    On a GPU also `peak`, the most that was allocated there since the last
    `torch.cuda.reset_peak_memory_stats()`, and `rest`: what of it is none of the three.
    """
    kinds = {
        "weights": sum(local(p).nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        "gradients": sum(gradient_bytes(local(p.grad)) for p in model.parameters() if p.grad is not None),
        "state": state_bytes(optimizer),
    }
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        kinds.update(rest=max(0, peak - sum(kinds.values())), peak=peak)
    return kinds


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrap(inner) if isinstance(inner, Optimizer) else optimizer


class NanoAdamCallback(TrainerCallback):
    """Adds to the Trainer's logs what NanoAdam does, and refuses a run that would train less than it seems to.

    Added to each log of the training loss: `density` (of the first group that is selected from), `touched` (share
    of the weights selected from that were selected at least once), `memory_weights`, `memory_gradients` and
    `memory_state` in bytes, on a GPU also `memory_rest` and `memory_peak`.

    The Trainer calls reporting integrations (wandb, TensorBoard) before the callbacks that it is given, so they see
    what is added only if this one comes first: `NanoAdamCallback().attach(trainer)`.

    Args:
        touched: keep the touched share; takes one bit of host memory a weight. It is written into each
            checkpoint as `touched.safetensors` and read back when the Trainer resumes from it.
    """

    def __init__(self, touched: bool = True) -> None:
        self.touched: Touched | None = None
        self._wanted = touched
        self._memory: dict[str, int] = {}

    def attach(self, trainer: Any) -> NanoAdamCallback:
        """Put it before all other callbacks of a Trainer, its reporting integrations included."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would go wrong in silence.

        Raises:
            ValueError: if the optimizer is no NanoAdam, was made for another model, lacks parameters that shall be
                trained, or goes on from a checkpoint with other options than it was given.
        """
        inner, model = unwrap(kwargs["optimizer"]), kwargs["model"]
        if not isinstance(inner, NanoAdam):
            raise ValueError(
                f"NanoAdamCallback watches a NanoAdam, but this Trainer has {type(inner).__name__}: pass it "
                "optimizer_cls_and_kwargs=nanoadam.for_trainer(...)"
            )
        _check_model(inner, model)
        if state.global_step:
            _check_options(inner)
        if self._wanted:
            self.touched = Touched(inner)
            saved = self._folder(args, state) / TOUCHED
            if state.global_step and saved.is_file():
                self.touched.load(saved)

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what is there between backward and step."""
        optimizer = kwargs["optimizer"]
        inner = unwrap(optimizer)
        assert isinstance(inner, NanoAdam)
        if self.touched is not None:
            self.touched.count()
        coming = state.global_step + 1
        if coming % max(1, state.logging_steps) == 0 or (coming == 1 and args.logging_first_step):
            self._memory = memory_by_kind(kwargs["model"], inner)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to what is logged."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        inner = unwrap(kwargs["optimizer"])
        selected = [group for group in inner.param_groups if not group["dense"]]
        more: dict[str, Any] = {f"memory_{kind}": size for kind, size in self._memory.items()}
        if selected:
            more["density"] = selected[0]["active_density"]
        if self.touched is not None:
            more["touched"] = self.touched.share()
        for record in (logs, *state.log_history[-1:]):
            record.update(more)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was touched into the checkpoint."""
        folder = self._folder(args, state)
        if self.touched is not None and state.is_world_process_zero and folder.is_dir():
            self.touched.save(folder / TOUCHED)


def _check_model(optimizer: NanoAdam, model: nn.Module) -> None:
    """Raise ValueError if the optimizer's parameters are not those of the model that shall be trained."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held <= names.keys():
        raise ValueError(
            "the optimizer holds parameters that are not the Trainer's model's: let the Trainer make it, with "
            "optimizer_cls_and_kwargs=nanoadam.for_trainer(...)"
        )
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.numel() and id(p) not in held]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} parameters that are to be trained ({missing[0]!r}...), an adapter or "
            "something unfrozen after it was made: let the Trainer make it, with "
            "optimizer_cls_and_kwargs=nanoadam.for_trainer(...)"
        )


def _check_options(optimizer: NanoAdam) -> None:
    """Raise ValueError if options that were given are not those that a loaded state goes on with."""
    for i, group in enumerate(optimizer.param_groups):
        for name in checks.WATCHED:
            if name not in checks.FIXED and group[name] != optimizer.made_with[i][name]:
                raise ValueError(
                    f"the checkpoint goes on with {name}={group[name]!r} for {checks.label(group, i)}, but this run "
                    f"was given {optimizer.made_with[i][name]!r}: give what the checkpoint has, or begin anew"
                )
