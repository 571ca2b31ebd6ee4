"""Gradient release: a gradient is cut down to its selected entries as soon as autograd has made it.

A hook on each selected parameter puts a `SelectedGradient` into `p.grad` in place of the dense gradient, which lives
until it is compacted: at once, or, where a launch costs more than the memory, when `budget` bytes have gathered.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanoadam.gradients.gather import compact
from nanoadam.gradients.tensor import Box, SelectedGradient
from nanoadam.ops import Slot
from nanoadam.shards import gradient_of, local, set_gradient

GPU_SHARE, GPU_BYTES = 0.7, 64 * 2**20
"""Dense gradients alive together on a GPU: so much of the largest one, which has to be alive at some time anyway, and
no more than so many bytes: where gradients are large one launch for each is time enough, and memory is what counts."""


class Owner(Protocol):
    """What a release asks of its optimizer."""

    def _arrives(self, parameter: Tensor, gradient: Tensor) -> tuple[Slot, torch.dtype] | None:
        """The slot of a parameter whose first gradient arrives, selected from if that is due, and the entries' dtype.

        None if its gradient stays dense.

        Raises:
            TypeError: if the gradient cannot be used at all.
        """


class _Hook:
    """Of one parameter, for all optimizers that select from it. It lies among the parameter's own hooks.

    (A weak table of parameters would keep `torch.utils.swap_tensors` from them.)
    """

    def __init__(self, parameter: Tensor) -> None:
        self.holders: list[weakref.ref[GradientRelease]] = []
        self.warned = False
        self.handle = parameter.register_post_accumulate_grad_hook(self)

    @staticmethod
    def of(parameter: Tensor) -> _Hook | None:
        """The one that a parameter has."""
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        return next((hook for hook in hooks.values() if type(hook) is _Hook), None)

    def alive(self) -> list[GradientRelease]:
        """The optimizers that hold the parameter."""
        return [holder for ref in self.holders if (holder := ref()) is not None]

    def __call__(self, parameter: Tensor) -> None:
        """`p.grad` is complete now, or has been added to."""
        gradient = gradient_of(parameter)
        if len(self.holders) > 1 and self._is_shared(parameter):
            if isinstance(gradient, SelectedGradient):
                set_gradient(parameter, gradient.to_dense())
        elif gradient is not None and not (type(gradient) is SelectedGradient and gradient._box.accumulator):
            for holder in self.alive():
                holder.receive(parameter, gradient)

    def _is_shared(self, parameter: Tensor) -> bool:
        """Whether several optimizers in use hold it: then its gradient stays dense, since one cannot serve both."""
        if len(self.alive()) > 1 and not self.warned:
            gc.collect()  # a scheduler keeps an optimizer alive in a circle, though nobody uses it any more
        self.holders = [*map(weakref.ref, self.alive())]
        if len(self.holders) > 1 and not self.warned:
            warnings.warn(
                f"a parameter of shape {tuple(parameter.shape)} is in {len(self.holders)} NanoAdam optimizers: its "
                "gradient stays dense, since one selection cannot serve both. Delete the one that is done with",
                UserWarning,
                stacklevel=2,
            )
            for hook in (_Hook.of(other) for release in self.alive() for other in release.held):
                if hook is not None:
                    hook.warned = True
        return len(self.holders) > 1


class GradientRelease:
    """The hooks of one optimizer, and the dense gradients waiting to be compacted.

    Args:
        owner: the optimizer; referred to weakly, so that it is freed when its user lets it go.
        budget: bytes of dense gradients that may be alive together, the one that comes next included; 0 compacts
            each at once. None: 0 on the CPU, elsewhere `GPU_SHARE` of the largest gradient, at most `GPU_BYTES`.
    """

    def __init__(self, owner: Owner, budget: int | None) -> None:
        self._owner = weakref.ref(owner)
        self._budget = budget
        self.held: list[Tensor] = []
        self._gathered: list[weakref.ref[Box]] = []
        self._bytes = 0
        self._task = -1  # the backward whose end we shall hear of
        self._largest = 0  # bytes of the largest gradient, as far as parameters tell
        self._latest: Slot | None = None
        self._next_bytes: dict[Slot, int] = {}  # what came after it last time
        self._lock = threading.RLock()  # autograd runs hooks in one thread per device

    def hold(self, parameter: Tensor) -> None:
        """Hear of every gradient of a leaf from now on."""
        hook = _Hook.of(parameter) or _Hook(parameter)
        # Autograd forgets hooks where swap_tensors has been; setting them makes it know them again.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
        if self not in hook.alive():
            hook.holders = [*map(weakref.ref, hook.alive()), weakref.ref(self)]
            self.held.append(parameter)
            self._largest = max(self._largest, local(parameter).nbytes)

    def let_go(self, parameters: Sequence[Tensor]) -> None:
        """Leave the gradients of these alone from now on."""
        self.flush()
        for parameter in parameters:
            hook = _Hook.of(parameter)
            if hook is not None and self in hook.alive():
                hook.holders = [weakref.ref(holder) for holder in hook.alive() if holder is not self]
                if not hook.holders:
                    hook.handle.remove()
        gone = set(map(id, parameters))
        self.held = [parameter for parameter in self.held if id(parameter) not in gone]
        self._next_bytes = {}

    @torch.no_grad()
    def receive(self, parameter: Tensor, gradient: Tensor) -> None:
        """Put what is selected of a dense gradient in its place."""
        owner = self._owner()
        with self._lock:
            found = owner._arrives(parameter, gradient) if owner is not None else None
            if found is None:
                return
            slot, dtype = found
            assert slot.selection is not None
            self._wait_for_end()
            if type(gradient) is SelectedGradient:
                box = gradient._box
                if box.selection is slot.selection and box.values.dtype == dtype and box.fill == 0:  # a layer made it
                    box.slot, box.accumulator = slot, self
                    return
            box = Box(slot.selection, dtype=dtype, slot=slot, accumulator=self)
            box.exchanged = "" if slot.part is None else "shards"
            slot.gradient = SelectedGradient(box, slot.weight)
            self._gather(box, gradient.detach())

    def adopt(self, slot: Slot, gradient: SelectedGradient) -> None:
        """Add to this one, which a user has put into `p.grad` and a step was made with, from now on."""
        box, hook = gradient._box, _Hook.of(slot.parameter)
        if box.fill == 0 and hook is not None and hook.alive() == [self]:
            box.slot, box.accumulator = slot, self

    def add(self, box: Box, gradient: Tensor) -> None:
        """See `Accumulator`. The first gradient after one was zeroed in place is the first of its step."""
        owner = self._owner()
        with self._lock:
            if box.pending is not None:
                self.flush()
            if box.zeroed and owner is not None and box.slot is not None:
                found = owner._arrives(box.slot.parameter, gradient)
                if found is not None and found[0].selection is not None:
                    box.slot = found[0]
                    box.place(found[0].selection, None)
            box.zeroed = False
            self._gather(box, gradient)

    def _gather(self, box: Box, gradient: Tensor) -> None:
        slot = box.slot
        assert slot is not None
        if type(gradient) is SelectedGradient:  # a layer has made it, or a user
            new = gradient._box.moved_to(box.selection).to(box.dtype)
            box.stored = new if box.stored is None else box.stored.add_(new)
            return
        box.pending = gradient
        self._gathered.append(weakref.ref(box))
        self._bytes += gradient.nbytes
        if self._latest is not None:
            self._next_bytes[self._latest] = gradient.nbytes
        self._latest = slot
        task = self._wait_for_end()
        budget = self._budget
        if budget is None:
            budget = 0 if gradient.device.type == "cpu" else min(int(GPU_SHARE * self._largest), GPU_BYTES)
        # FSDP2 hands gradients over on a stream of its own, and writes over their memory soon afterwards.
        if task == -1 or slot.part is not None or self._bytes + self._next_bytes.get(slot, self._largest) > budget:
            self.flush()

    def _wait_for_end(self) -> int:
        """Hear of the end of the backward that is on its way; its number, -1 for none."""
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):  # a backward within a backward (reentrant checkpointing) is one of its own
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        return task

    def _backward_ended(self) -> None:
        with self._lock:
            self._task, self._latest = -1, None
            self.flush()
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # DDP's own callback comes first
            torch.autograd.Variable._execution_engine.queue_callback(self._take_averages)

    @torch.no_grad()
    def _take_averages(self) -> None:
        """Where others had a gradient and this process none, DDP has put a dense one: as the others', it is selected.

        Otherwise clipping would round it, or count it, as on no other process, and they would drift apart.
        """
        with self._lock:
            gradients = [(parameter, parameter.grad) for parameter in self.held]
            if any(type(g) is SelectedGradient and g._box.exchanged == "copied" for _, g in gradients):
                for parameter, gradient in gradients:
                    if type(gradient) is Tensor:
                        self.receive(parameter, gradient)
                        if type(parameter.grad) is SelectedGradient:
                            parameter.grad._box.exchanged = "copied"
                self.flush()
            self._task, self._latest = -1, None

    def flush(self) -> None:
        """See `Accumulator`. Gradients that were thrown away meanwhile are gone."""
        with self._lock:
            boxes = [box for ref in self._gathered if (box := ref()) is not None and box.pending is not None]
            self._gathered, self._bytes = [], 0
            owner = self._owner()
            if owner is not None and boxes:
                compact(boxes)
            else:
                for box in boxes:
                    box.compact()
