"""The few operations on chunked weights, each with one signature and several implementations.

`reference` is plain PyTorch, runs on any device and is the definition. `triton` does the same on GPUs, one
launch for a whole list of tensors. `backend(device)` picks; `NANOADAM_BACKEND=reference|triton` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nanoadam.chunks import Layout

MAX_AGE = 32768
"""Updates after which the age of a selected weight stops counting: its bias correction has long become 1."""


@dataclass(eq=False)
class Slot:
    """One parameter and what the optimizer keeps for it.

    `state` is the very dict that `optimizer.state[parameter]` holds:
        step: float32 scalar; updates this parameter has had.
        exp_avg, exp_avg_sq: state dtype; first and second moment, [selected] or the parameter's shape if dense.
        index: int16 [selected]; position within its chunk of each selected weight, ascending within a chunk;
            -1 for a place left empty (`keep_zeros` with fewer nonzero weights than places). Not for dense ones.
        born: int16 [selected], or [1] where moments are not carried and all selected weights enter together; the
            low 16 bits of `step` when the weight entered. Not for dense ones.
    """

    weight: Tensor
    state: dict[str, Tensor]
    ordinal: int  # which tensor of the optimizer: its own stream of random bits
    layout: Layout | None = None  # None: a dense tensor
    name: str = ""
    steps: int = 0  # state["step"] as a Python number
    fresh: bool = True  # nothing has been selected yet
    version: int = 0  # counts selections
    cache: dict[str, Any] = field(default_factory=dict)  # for a backend's own use
    held: Tensor | None = None  # grad dtype [selected]: gradient of the selected weights so far


@dataclass(frozen=True)
class Selection:
    """Which weights of a chunk are selected. `criterion` is one of `optimizer.CRITERIA`."""

    criterion: str
    keep_zeros: bool
    carry: bool  # weights that stay selected keep their moments; otherwise all start over
    key: int  # random bits for criterion "random"
    step: int


@dataclass(frozen=True)
class Adam:
    """What one AdamW step needs to know besides the tensors."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    stochastic_rounding: bool
    key: int  # of the seed
    capturable: bool = False  # read the step from the device
    grad_scale: float | Tensor = 1.0  # gradients are multiplied by this: clipping, loss scaling


class Backend(Protocol):
    """The operations. All slots of a call are on one device; lists may be empty."""

    def select(
        self, slots: Sequence[Slot], layouts: Sequence[Layout], rule: Selection, gradients: Sequence[Tensor] | None
    ) -> None:
        """Select anew from the present weights; `layouts` replace the slots' own.

        `gradients` (dense, one a slot) only for criterion "gradient". Replaces `index`, and carries or resets
        `exp_avg`, `exp_avg_sq`, `born` and `held`.
        """

    def gather(self, slots: Sequence[Slot], gradients: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Add the selected entries of dense gradients to `held`, which is made (in `dtype`) where it is None."""

    def update(self, slots: Sequence[Slot], adam: Adam) -> None:
        """One AdamW step on the selected weights from `held`. `steps` and `state["step"]` already count it."""

    def update_dense(self, slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam) -> None:
        """One AdamW step on every weight of dense tensors."""


def backend(device: torch.device) -> Backend:
    """The implementation that serves a device.

    Raises:
        ValueError: if `NANOADAM_BACKEND` names no implementation.
        RuntimeError: if it names `triton` and triton cannot be imported.
    """
    wanted = os.environ.get("NANOADAM_BACKEND", "")
    if wanted not in ("", "reference", "triton"):
        raise ValueError(f"NANOADAM_BACKEND must be 'reference' or 'triton', got {wanted!r}")
    if wanted == "triton" or (wanted == "" and device.type in ("cuda", "xpu")):
        try:
            from nanoadam.ops import triton
        except ImportError as error:
            if wanted:
                raise RuntimeError(
                    "NANOADAM_BACKEND=triton, but triton is not installed: pip install triton"
                ) from error
        else:
            return cast(Backend, triton)
    from nanoadam.ops import reference

    return cast(Backend, reference)
