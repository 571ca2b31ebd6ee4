"""MicroAdam: Adam over a window of sparse gradients, with error feedback in 4 bits.

Source: Modoranu, Safaryan, Malinovsky, Kurtic, Robert, Richtarik, Alistarh, "MicroAdam: Accurate Adaptive
Optimization with Low Space Overhead and Provable Convergence", NeurIPS 2024, arXiv 2405.15593, Algorithm 1, written
from the paper. Where the paper leaves a choice, this takes the one of the authors' own implementation
(ista-daslab-optimizers), so that the two agree within rounding: the error is rounded to nearest, the smallest and the
largest value of each bucket are bfloat16, and the sum of gradient and error is bfloat16 as well, which makes the
values of the window exact. Two things differ, on purpose: a block has the same size on every device (the authors' is
as large as a GPU's shared memory allows), and ties go to the lower position, so a state means the same everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nanoadam import checks
from nanoadam.baselines.window import BUCKET, MAX_BLOCK, Step, blocks_of, update
from nanoadam.ops import Adam, Slot, backend
from nanoadam.ops.rounding import seed_key, tensor_key


class MicroAdam(Optimizer):
    """AdamW whose moments are recomputed from the last `window` sparse gradients.

    Gradients are read from `p.grad` and left as they are: accumulation, clipping and loss scaling work as with any
    optimizer, and need the dense gradient (nothing is released). State of a tensor with S weights, made when the
    optimizer is: `error` uint8 [S / 64, 32], `error_min` and `error_max` bfloat16 [S / 64], `index` int16 and `value`
    bfloat16 [window, kept], `step`. That is 0.5 S + 4 window density S bytes as in the paper, and 4 bytes for
    each bucket of 64 on top (0.0625 S).

    Args:
        params: parameters, `(name, parameter)` pairs, or groups as from `nanoadam.param_groups(model)`. Groups with
            `dense=True`, and tensors of dimension < 2, get ordinary AdamW with bfloat16 moments, as in NanoAdam.
        lr: learning rate.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment; more than 0.
        weight_decay: decoupled, on all weights.
        density: share of each block that goes into the window; a block gives `ceil(density * length)`.
        window: m, the gradients in the window.
        block_size: weights in a block, a multiple of 64, at most 32768.
        stochastic_rounding: of bfloat16 weights and of dense tensors' moments. The authors round weights to
            nearest, which loses every change smaller than half a unit in the last place.
        seed: of the random bits, which depend on it, the step, the tensor and the position alone.

    Raises:
        ValueError, TypeError: for an argument, a parameter, a gradient or a saved state that cannot be served.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.01,
        window: int = 10,
        block_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "window": window,
            "block_size": block_size,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "dense": False,
        }
        self._slots: dict[Tensor, Slot] = {}  # made anew from state and groups whenever those are replaced
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        Raises:
            ValueError, TypeError: for an option or a parameter that cannot be served.
        """
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        where = checks.label(group, len(self.param_groups))
        _check_options({**self.defaults, **group}, where)
        super().add_param_group(group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in checks.WEIGHT_DTYPES or parameter.layout != torch.strided:
                del self.param_groups[-1]
                raise TypeError(
                    f"MicroAdam trains dense float32, bfloat16 and float16 weights; {where} holds one of "
                    f"{parameter.dtype}, {parameter.layout}: convert it or leave it out"
                )
        for parameter in self.param_groups[-1]["params"]:
            if parameter.requires_grad and parameter.numel():
                self._make_state(parameter, self.param_groups[-1])

    def _make_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if parameter not in self.state:
            state = {"step": torch.zeros((), dtype=torch.float32)}
            for name, (shape, dtype) in _state_of(parameter, group).items():
                like = parameter if shape == tuple(parameter.shape) else parameter.new_empty(shape)
                state[name] = torch.zeros_like(like, dtype=dtype)  # dense moments: with the parameter's strides
            self.state[parameter] = state
        made: dict[str, Tensor] = self.state[parameter]
        return made

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's value.

        Raises:
            TypeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ordinal = 0
        for group in self.param_groups:
            dense: list[Slot] = []
            sparse: list[Slot] = []
            for parameter in group["params"]:
                ordinal += 1
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                if parameter.grad.layout != torch.strided:
                    raise TypeError(f"MicroAdam needs dense gradients; parameter {ordinal - 1} has a sparse one")
                slot = self._slots.get(parameter)
                if slot is None:
                    slot = self._slots[parameter] = Slot(parameter, self._make_state(parameter, group), ordinal)
                    slot.steps = int(slot.state["step"].item())
                slot.state["step"] += 1
                slot.steps += 1
                (dense if _is_dense(parameter, group) else sparse).append(slot)
            self._update(sparse, group)
            self._update_dense(dense, group)
        return loss

    @staticmethod
    def _update(slots: list[Slot], group: Mapping[str, Any]) -> None:
        """Algorithm 1: one launch for tensors that a kernel serves, one tensor after another otherwise."""
        key = seed_key(group["seed"]) if group["stochastic_rounding"] else None
        jobs: dict[tuple[torch.device, int], list[Any]] = {}
        for slot in slots:
            weight, gradient = slot.weight.detach(), slot.weight.grad
            assert gradient is not None
            blocks = blocks_of(weight.numel(), group["density"], group["block_size"])
            kernel = _kernel(weight.device)
            if kernel is not None and kernel.serves(weight, blocks):
                job = kernel.Job(weight, gradient.contiguous(), slot.state, blocks, slot.ordinal)
                jobs.setdefault((weight.device, slot.steps), []).append(job)
                continue
            flat = weight.reshape(-1)  # a copy unless it is contiguous
            own_key = None if key is None else tensor_key(key, slot.steps, slot.ordinal)
            update(flat, gradient.reshape(-1), slot.state, blocks, _step_of(group, slot.steps, own_key))
            if not weight.is_contiguous():
                weight.copy_(flat.view(weight.shape))
        for (device, number), members in jobs.items():
            _kernel(device).update(members, _step_of(group, number, None), key)

    @staticmethod
    def _update_dense(slots: list[Slot], group: Mapping[str, Any]) -> None:
        adam = Adam(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=False,
            stochastic_rounding=group["stochastic_rounding"],
            key=seed_key(group["seed"]),
        )
        for device in {slot.weight.device for slot in slots}:
            members = [slot for slot in slots if slot.weight.device == device]
            gradients = [slot.weight.grad for slot in members if slot.weight.grad is not None]
            backend(device).update_dense(members, gradients, adam)

    def state_bytes(self) -> int:
        """Bytes of optimizer state, bucket statistics, step counts and dense tensors' moments included."""
        return sum(value.nbytes for state in self.state.values() for value in state.values())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; nothing changes if it does not fit. Copies as NanoAdam's does.

        Raises:
            ValueError: if the state was not saved by MicroAdam for parameters of these shapes.
        """
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        groups = [group for group in state_dict["param_groups"] for _ in group["params"]]
        if len(keys) != len(parameters) or not all("window" in group for group in groups):
            raise ValueError(f"the state was not saved by MicroAdam for {len(parameters)} parameters")
        for key, parameter, group in zip(keys, parameters, groups, strict=True):
            saved = state_dict["state"].get(key, {})
            wanted = {name: tuple(shape) for name, (shape, _) in _state_of(parameter, group).items()}
            if saved and {name: tuple(saved[name].shape) for name in saved if name != "step"} != wanted:
                raise ValueError(f"the saved state of parameter {key} does not fit its shape {tuple(parameter.shape)}")
        own = {id(value) for state in self.state.values() for value in state.values()}
        # torch gets the groups only: it would cast every tensor to its parameter's dtype, indices too.
        super().load_state_dict({**state_dict, "state": {}})
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                home = torch.device("cpu") if name == "step" else parameter.device
                kept = id(value) in own and value.device == home
                self.state[parameter][name] = value if kept else value.detach().to(home, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._slots = {}


def _kernel(device: torch.device) -> Any:
    """The module of the Triton kernel where the operations of this project run on Triton, or None."""
    if not backend(device).__name__.endswith("triton"):  # type: ignore[attr-defined]
        return None
    return importlib.import_module("nanoadam.baselines.window_triton")


def _step_of(group: Mapping[str, Any], number: int, key: int | None) -> Step:
    return Step(
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        number=number,
        window=group["window"],
        key=key,
    )


def _is_dense(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    return bool(group["dense"]) or parameter.dim() < 2


def _state_of(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a parameter's state, besides `step`."""
    if _is_dense(parameter, group):
        return {name: (tuple(parameter.shape), torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    blocks = blocks_of(parameter.numel(), group["density"], group["block_size"])
    return {
        "error": ((blocks.buckets, BUCKET // 2), torch.uint8),
        "error_min": ((blocks.buckets,), torch.bfloat16),
        "error_max": ((blocks.buckets,), torch.bfloat16),
        "index": ((group["window"], blocks.kept), torch.int16),
        "value": ((group["window"], blocks.kept), torch.bfloat16),
    }


def _check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for an option out of range. `where` names the group."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    betas, block = options["betas"], options["block_size"]
    wanted = {
        "lr": (float(options["lr"]) >= 0, "at least 0"),
        "eps": (options["eps"] > 0, "more than 0"),  # most moments are 0, and 0 / 0 is no update
        "weight_decay": (options["weight_decay"] >= 0, "at least 0"),
        "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        "density": (0 < options["density"] <= 1, "in (0, 1]"),
        "window": (whole(options["window"]) and options["window"] >= 1, "a whole number of at least 1"),
        "block_size": (
            whole(block) and 0 < block <= MAX_BLOCK and block % BUCKET == 0,
            f"a multiple of {BUCKET} of at most {MAX_BLOCK}",
        ),
        "seed": (whole(options["seed"]) and 0 <= options["seed"] < 2**64, "a whole number in [0, 2**64)"),
    }
    for name, (valid, range_) in wanted.items():
        if not valid:
            raise ValueError(f"{name} must be {range_}, got {options[name]!r} for {where}")
