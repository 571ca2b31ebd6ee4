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

from nanoadam.optimizer import NanoAdam
from nanoadam.state import state_bytes

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("nanoadam.callback needs transformers: pip install 'nanoadam[lab]'") from error

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
    """Bytes of weights, gradients and optimizer state at this moment, whatever the optimizer.

    On a GPU also `peak`, the most that was allocated there since the last
    `torch.cuda.reset_peak_memory_stats()`, and `rest`: what of it is none of the three.
    """
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None and not p.grad.is_sparse)
    if isinstance(optimizer, NanoAdam):
        gradients += optimizer.gradient_bytes()
    kinds = {
        "weights": sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        "gradients": gradients,
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
    """Adds to the Trainer's logs what NanoAdam does, and refuses a run in which the Trainer would clip wrongly.

    Added to each log of the training loss: `density` (of the first group that is selected from), `touched` (share
    of the weights selected from that were selected at least once), `memory_weights`, `memory_gradients` and
    `memory_state` in bytes, on a GPU also `memory_rest` and `memory_peak`. `grad_norm` is replaced by the
    norm of all gradients: the Trainer's own knows only the dense ones. A reporting integration, which the
    Trainer calls before all other callbacks, sees none of this; the log history, the progress bar and the printer do.

    Args:
        touched: keep the touched share; takes one bit of host memory a weight. It is written into each
            checkpoint as `touched.safetensors` and read back when the Trainer resumes from it.
    """

    def __init__(self, touched: bool = True) -> None:
        self.touched: Touched | None = None
        self._wanted = touched
        self._gradient_norm: float | None = None
        self._memory: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would go wrong in silence.

        Raises:
            ValueError: if the optimizer is no NanoAdam or was made for another model, or if gradients are released
                where the Trainer's clipping or DDP needs them.
        """
        inner, model = unwrap(kwargs["optimizer"]), kwargs["model"]
        if not isinstance(inner, NanoAdam):
            raise ValueError(
                f"NanoAdamCallback watches a NanoAdam, but this Trainer has {type(inner).__name__}: pass it "
                "optimizer_cls_and_kwargs=nanoadam.for_trainer(model, ...)"
            )
        own = {id(parameter) for parameter in model.parameters()}
        if not all(id(parameter) in own for group in inner.param_groups for parameter in group["params"]):
            raise ValueError(
                "the optimizer holds parameters that are not the Trainer's model's: call nanoadam.for_trainer with "
                "the model that the Trainer gets (model_init makes another one)"
            )
        if not any("role" in group for group in inner.param_groups) and len(inner.param_groups) == 2:
            raise ValueError(
                "the Trainer has made parameter groups of its own, in which heads are selected from: "
                "call nanoadam.for_trainer anew for each Trainer"
            )
        if inner.gradient_release and args.max_grad_norm and args.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm:g} in TrainingArguments would clip the gradients of dense tensors "
                "only, since those of selected weights are released: set max_grad_norm=0 there and clip with "
                f"NanoAdam(max_grad_norm={args.max_grad_norm:g})"
            )
        if inner.gradient_release and args.world_size > 1:
            raise ValueError(
                f"gradients are released before DDP has averaged them over {args.world_size} processes: "
                "use NanoAdam(gradient_release=False) under the Trainer's DDP"
            )
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
        self._gradient_norm = None
        coming = state.global_step + 1
        if coming % max(1, state.logging_steps) == 0 or (coming == 1 and args.logging_first_step):
            self._gradient_norm = _norm(inner, getattr(optimizer, "scaler", None))
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
            if self._gradient_norm is None:
                record.pop("grad_norm", None)
            else:
                record["grad_norm"] = self._gradient_norm
            record.update(more)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was touched into the checkpoint."""
        folder = self._folder(args, state)
        if self.touched is not None and state.is_world_process_zero and folder.is_dir():
            self.touched.save(folder / TOUCHED)


def _norm(optimizer: NanoAdam, scaler: Any) -> float:
    """The joint norm of held and dense gradients, before clipping.

    A scaler has unscaled what is in `p.grad` by now (accelerate does it before it takes its norm), but nothing held.
    """
    held = optimizer.held()
    seen = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None and not p.grad.is_sparse]
    squares = [
        float(torch.stack([n.cpu() for n in torch._foreach_norm(tensors, 2, dtype=torch.float32)]).square().sum())
        for tensors in (held, seen)
        if tensors
    ]
    if held and scaler is not None:
        squares[0] /= float(scaler.get_scale()) ** 2
    return float(sum(squares) ** 0.5)
