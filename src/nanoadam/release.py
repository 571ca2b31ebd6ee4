"""Gradient release: a gradient is cut down to its selected entries as soon as autograd has made it.

A hook on each selected parameter takes `p.grad` the moment it is complete, so that dense gradients live only
until they are compacted: at once, or, where a launch costs more than the memory, `budget` bytes of them
together. What is left of them is held by the optimizer until it is zeroed, so accumulation, clipping, loss
scaling and skipped steps work as they do with ordinary gradients.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

GPU_BUDGET = 0.7
"""Bytes of dense gradients alive together on a GPU, as a multiple of the largest gradient. That one has to be
alive at some time anyway, so letting almost as much gather elsewhere costs no memory, and one launch serves several."""


def stands_in(gradient: Tensor) -> bool:
    """Whether it is the empty gradient that some optimizer has left as a witness, see `GradientRelease`."""
    return gradient.is_sparse and gradient._nnz() == 0


def _trained(parameters: Iterable[Tensor]) -> Tensor | None:
    """The first that is not frozen, or else the first."""
    first = None
    for parameter in parameters:
        if parameter.requires_grad:
            return parameter
        first = parameter if first is None else first
    return first


class _Hook:
    """The hook of a parameter. One for all optimizers that release its gradient: each must see it before it is gone."""

    def __init__(self, parameter: Tensor) -> None:
        self.releases: list[weakref.ref[GradientRelease]] = []
        self.handle = parameter.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter: Tensor) -> None:
        """Hand `p.grad`, which is complete now, over to those who take it."""
        gradient = parameter.grad
        if gradient is None:
            return
        takers = [release for ref in self.releases if (release := ref()) and release._takes(parameter, gradient)]
        if not takers:  # nobody is left who would: it stays where everybody looks for it
            return
        parameter.grad = None
        for release in takers:
            release._receive(self, parameter, gradient)


_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Owner(Protocol):
    """What a release asks of its optimizer."""

    def _takes(self, parameter: Tensor, gradient: Tensor) -> bool:
        """Whether this gradient is to be released; raises TypeError if it cannot be used at all."""

    def _collect(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compact (parameter, dense gradient) pairs, each parameter once; neither is kept afterwards."""

    def _drop_held(self, *, in_place: bool) -> None:
        """The gradients held so far have been zeroed through the model: set to None, or to zero in place."""

    def _witnesses(self) -> tuple[list[Tensor], list[Tensor]]:
        """Dense tensors, whose `p.grad` can be watched, and selected ones of which gradients are held."""


class GradientRelease:
    """The hooks of one optimizer, and the dense gradients waiting to be compacted.

    Args:
        owner: the optimizer; referred to weakly, so that it is freed when its user lets it go.
        budget: bytes of dense gradients that may be alive together, the one that comes next included; 0 compacts
            each at once. None: 0 on the CPU, a little more than the largest gradient elsewhere (GPU_BUDGET).
    """

    def __init__(self, owner: Owner, budget: int | None) -> None:
        self._owner = weakref.ref(owner)
        self._budget = budget
        self._attached = WeakTensorKeyDictionary()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_bytes = 0
        self._task = -1  # the backward whose end we shall hear of
        self._largest = 0  # bytes of the largest gradient, as far as parameters tell
        self._latest: _Hook | None = None
        self._next_bytes: dict[_Hook, int] = {}  # what came after it last time
        self._lock = threading.RLock()  # autograd runs hooks in one thread per device
        self._witness: tuple[Tensor, Tensor, int, bool] | None = None
        self._witness_hook: tuple[Tensor, RemovableHandle] | None = None
        self.altered = False  # dense gradients were changed since a backward of this step; held ones cannot have been
        self.told = False  # and the user knows

    def attach(self, parameter: Tensor) -> None:
        """Release the gradients of a leaf parameter from now on."""
        if parameter in self._attached:
            return
        self._attached[parameter] = True
        self._largest = max(self._largest, parameter.nbytes)
        if parameter not in _hooks:
            _hooks[parameter] = _Hook(parameter)
        releases = _hooks[parameter].releases
        releases[:] = [ref for ref in releases if ref() is not None]
        releases.append(weakref.ref(self))

    def detach(self) -> None:
        """Leave all gradients alone from now on."""
        self.flush()
        for parameter in list(self._attached.keys()):
            hook = _hooks[parameter]
            hook.releases[:] = [ref for ref in hook.releases if ref() not in (None, self)]
            if not hook.releases:
                hook.handle.remove()
                del _hooks[parameter]
        self._attached = WeakTensorKeyDictionary()
        self._next_bytes = {}
        self.altered = False
        self._remove_witness()

    def _takes(self, parameter: Tensor, gradient: Tensor) -> bool:
        owner = self._owner()
        return owner is not None and owner._takes(parameter, gradient)

    def _receive(self, hook: _Hook, parameter: Tensor, gradient: Tensor) -> None:
        with self._lock:
            self.settle()
            if any(parameter is other for other, _ in self._pending):  # once each, see Owner
                self.flush()
            self._pending.append((parameter, gradient))
            self._pending_bytes += gradient.nbytes
            if self._latest is not None:
                self._next_bytes[self._latest] = gradient.nbytes
            self._latest = hook
            self._await_end()
            budget = self._budget
            if budget is None:
                budget = 0 if gradient.device.type == "cpu" else int(GPU_BUDGET * self._largest)
            if self._pending_bytes + self._next_bytes.get(hook, self._largest) > budget:
                self.flush()

    def _await_end(self) -> None:
        """Have `_backward_ended` called when the present backward ends."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # a backward within a backward (reentrant checkpointing) is one of its own
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        with self._lock:
            self._task, self._latest = -1, None
            self.flush()
            owner = self._owner()
            if owner is not None:
                self._watch(owner, after_step=False)

    def flush(self) -> None:
        """Compact what is waiting."""
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            owner = self._owner()
            if pending and owner is not None:
                owner._collect(pending)

    def discard(self) -> None:
        """Forget what is waiting, and any question about older gradients: they have been zeroed."""
        with self._lock:
            self._pending, self._pending_bytes, self._task, self.altered = [], 0, -1, False
            self.forget_witness()

    # Gradients are zeroed through the optimizer, which says so, or through the model, which sets every p.grad to
    # None or zero and cannot know of held ones. So the gradient of one dense tensor stands witness, from the end of a
    # backward on. Between two backwards of one step only its absence says that gradients were zeroed: if it was
    # replaced or written to, somebody clips or scales what he finds in p.grad, and is told so. (GradScaler.unscale_
    # does not raise the version of a tensor.) After a step, being replaced or written to counts as zeroing; and where
    # no dense tensor has a gradient, an empty one is put on a selected tensor until the next backward.

    def stepped(self) -> None:
        """A step has used the held gradients; find out before the next backward whether they are to be kept."""
        self.altered = False
        owner = self._owner()
        if owner is not None:
            self._watch(owner, after_step=True)

    def _watch(self, owner: Owner, *, after_step: bool) -> None:
        self.forget_witness()
        dense, selected = owner._witnesses()
        if not selected:
            return
        # The smallest: its gradient lives on until the next backward, even if the model's are zeroed before.
        shown = (p for p in sorted(dense, key=Tensor.numel) if p.grad is not None and not stands_in(p.grad))
        parameter = _trained(shown)
        if parameter is None and after_step:
            parameter = _trained(sorted(selected, key=Tensor.numel))
        if parameter is None:
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, layout=torch.sparse_coo, requires_grad=False)
        gradient = parameter.grad
        assert gradient is not None
        self._witness = (parameter, gradient, gradient._version, after_step)
        hooked = self._witness_hook is not None and self._witness_hook[0] is parameter
        if parameter.requires_grad and not hooked:  # what is frozen accumulates nothing
            self._remove_witness_hook()
            this = weakref.ref(self)  # the parameter must not keep the optimizer alive

            def before_accumulation(_: Tensor) -> None:
                release = this()
                if release is not None:
                    with release._lock:
                        release.settle()
                        release._await_end()

            self._witness_hook = parameter, parameter.register_hook(before_accumulation)

    def settle(self) -> None:
        """Drop the held gradients if the model's were zeroed since they were taken; note if these were altered."""
        if self._witness is None:
            return
        parameter, gradient, version, after_step = self._witness
        replaced, written = parameter.grad is not gradient, gradient._version != version
        gone = replaced if after_step else parameter.grad is None
        in_place = after_step and written and not gone
        self.altered = not (gone or after_step) and (self.altered or replaced or written)
        self.forget_witness()
        owner = self._owner()
        if (gone or in_place) and owner is not None:
            owner._drop_held(in_place=in_place)

    def forget_witness(self) -> None:
        """Stop asking whether older gradients were zeroed."""
        if self._witness is not None:
            parameter, gradient, *_ = self._witness
            if stands_in(gradient) and parameter.grad is gradient:
                parameter.grad = None
            self._witness = None

    def _remove_witness_hook(self) -> None:
        if self._witness_hook is not None:
            self._witness_hook[1].remove()
            self._witness_hook = None

    def _remove_witness(self) -> None:
        self.forget_witness()
        self._remove_witness_hook()

    def __del__(self) -> None:
        self._remove_witness()
