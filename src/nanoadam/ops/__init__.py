"""The few operations on chunked weights, each with one signature and several implementations.

`reference` is plain PyTorch, runs on any device and is the definition. `triton` does the same on GPUs, one
launch for a whole list of tensors. `backend(device)` picks; `NANOADAM_BACKEND=reference|triton` forces one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nanoadam.chunks import AnyLayout
from nanoadam.shards import Part, gradient_of, local, set_gradient

MAX_AGE = 32768
"""Updates after which the age of a selected weight stops counting: its bias correction has long become 1."""


class _Loan:
    """What a borrower of a selection holds."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False)
class Selection:
    """Which weights of one tensor are selected. It never changes while somebody has borrowed it, but may go stale.

    index: int16 [selected]; position within its chunk of each selected weight, ascending within a chunk. Of columns:
        int32 [keep]; their numbers, ascending. -1 for a place left empty (`keep_zeros` with fewer nonzero candidates
        than places).
    """

    index: Tensor
    layout: AnyLayout
    stale: bool = False
    """`index` was written over by a later selection, as CUDA graphs need it."""
    _loan: weakref.ref[_Loan] | None = None

    def borrow(self) -> _Loan:
        """Keep `index` from being written over for as long as the result lives."""
        loan = self._loan() if self._loan is not None else None
        if loan is None:
            loan = _Loan()
            self._loan = weakref.ref(loan)
        return loan

    @property
    def borrowed(self) -> bool:
        """Whether some gradient has these positions."""
        return self._loan is not None and self._loan() is not None


@dataclass(eq=False)
class Slot:
    """One parameter and what the optimizer keeps for it.

    `state` is the very dict that `optimizer.state[parameter]` holds:
        step: float32 scalar; updates this parameter has had.
        exp_avg, exp_avg_sq: state dtype; first and second moment, of `layout.shape` ([selected], or [keep, outputs] of
            columns), or of the parameter's shape if dense.
        index: that of `selection`, one for each weight or column. Not for dense ones.
        entry_step: int16, like `index`, or [1] where moments are not carried and all that is selected enters together;
            the low 16 bits of `step` when it entered. Not for dense ones.
    """

    parameter: Tensor
    state: dict[str, Tensor]
    ordinal: int  # which tensor of the optimizer: its own stream of random bits
    selection: Selection | None = None  # None: a dense tensor
    name: str = ""
    steps: int = 0  # state["step"] as a Python number
    unselected: bool = True  # nothing has been selected yet
    selected_for: int = -1  # the step of its group that the selection stands for
    arrived_in: int = -1  # the step of its group in which its last first gradient arrived
    forward_in: int = -1  # the step of its group in which a layer last asked for its columns
    weight_version: int = -1  # how often the weight had been written to when it was selected from
    overdue: bool = False  # a refresh was due while a backward was on its way
    served: Any = None  # see columns.py
    version: int = 0  # counts selections and moves
    restamped: int = 0  # the update at which entry steps were last kept from wrapping around
    cache: dict[str, Any] = field(default_factory=dict)  # for a backend's own use
    part: Part | None = None  # what of the parameter lies on this process, if it is sharded

    @property
    def weight(self) -> Tensor:
        """The parameter, or what of it lies on this process."""
        return self.parameter if self.part is None else local(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """`p.grad`, or what of it lies on this process."""
        return self.parameter.grad if self.part is None else gradient_of(self.parameter)

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        set_gradient(self.parameter, gradient)

    @property
    def offset(self) -> int:
        """Position of its first weight in the full tensor."""
        return 0 if self.part is None else self.part.offset

    @property
    def reach(self) -> int:
        """Positions that its random bits go by are below this."""
        return self.weight.numel() + self.offset

    @property
    def layout(self) -> AnyLayout:
        """Of the present selection."""
        assert self.selection is not None
        return self.selection.layout

    def take(self, state: dict[str, Tensor], layout: AnyLayout, *, in_place: bool) -> None:
        """A new selection: its state, in new tensors or, `in_place`, in those that were there."""
        before = self.selection
        if in_place and before is not None and before.layout == layout:
            for name, value in state.items():
                if value is not self.state[name]:
                    self.state[name].copy_(value)
        else:
            self.state.update(state)
        if before is None or before.borrowed or before.index is not self.state["index"] or before.layout != layout:
            if before is not None and before.index is self.state["index"]:
                before.stale = True
            self.selection = Selection(self.state["index"], layout)


@dataclass(frozen=True)
class Rule:
    """Which weights of a chunk are selected. `criterion` is one of `optimizer.CRITERIA`."""

    criterion: str
    keep_zeros: bool
    carry: bool  # weights that stay selected keep their moments; otherwise all start over
    key: int  # random bits for criterion "random"
    step: int
    in_place: bool = False  # state keeps its addresses, whoever has borrowed the selection: for CUDA graphs


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
    keep_zeros: bool = False  # of a selected column, weights that are exactly zero stay so
    grad_scale: float | Tensor = 1.0  # gradients are multiplied by this: the inverse of a loss scale


class Backend(Protocol):
    """The operations. All slots of a call are on one device; lists may be empty."""

    def select(
        self, slots: Sequence[Slot], layouts: Sequence[AnyLayout], rule: Rule, gradients: Sequence[Tensor] | None
    ) -> None:
        """Select anew from the present weights; `layouts` replace the slots' own.

        `gradients` (dense, one a slot) only for criterion "gradient". Replaces `selection` and `index`, and carries
        or resets `exp_avg`, `exp_avg_sq` and `entry_step`.
        """

    def gather(
        self, slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]
    ) -> None:
        """Write the selected entries of dense gradients into `entries`, or add them to what is there."""

    def row_entries(self, selection: Selection, ids: Tensor, gradient: Tensor) -> Tensor:
        """The selected entries of an embedding's gradient, float32, from the gradient of what was looked up.

        `ids` int64 [tokens], -1 for none; `gradient` [tokens, width]. The same bits every time.
        """

    def update(self, slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
        """One AdamW step on the selected weights; `entries` are their gradients.

        `steps` and `state["step"]` already count it.
        """

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
