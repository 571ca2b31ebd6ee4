"""Gradients against weights in a model, one tensor's gradient at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam import columns
from nanoadam.analysis.measures import relation
from nanoadam.gradients import SelectedGradient
from nanoadam.groups import param_groups

__all__ = ["GradientRecorder", "measure_gradients", "tensors"]

Measure = Callable[[Tensor, Tensor], Any]
"""From a weight and its gradient, of one shape."""


def tensors(model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    """What is measured: every trained matrix, embedding and head, by name, with its role (see `param_groups`)."""
    return {
        name: (parameter, role)
        for group in param_groups(model)
        for parameter, name, role in zip(group["params"], group["param_names"], group["roles"], strict=True)
        if parameter.dim() > 1
    }


def measure_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    measure: Measure = relation,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Any]:
    """Measure the gradient of the mean loss over some batches against the weights, tensor by tensor.

    Of a single batch no more than one tensor's gradient is there at a time: it is measured when backward has made it,
    and freed. Of several batches the sums are kept until the last one has been added, as in gradient accumulation.

    Args:
        model: in whichever mode it is to be measured in; its parameters and their `grad` are as before in the end.
        batches: one or more; each is given to `loss`.
        measure: called with weight and gradient of each matrix, embedding and head that backward reaches.
        loss: `(model, batch) -> scalar`; by default `model(**batch).loss`.

    Returns:
        What `measure` returned, by parameter name in the model's order.

    Raises:
        ValueError: if there is no batch, or no gradient reaches anything.
    """
    taken = tensors(model)
    todo = list(batches)
    if not todo:
        raise ValueError("there is no batch to take gradients of")
    before = {name: p.grad for name, p in model.named_parameters()}
    found: dict[str, Any] = {}
    last = False

    def hook(name: str) -> Callable[[Tensor], None]:
        def measured(parameter: Tensor) -> None:
            if isinstance(parameter.grad, SelectedGradient):
                raise ValueError(
                    f"the gradient of {name} is cut down by a NanoAdam: measure before the optimizer is made, or use "
                    "optimizer.release(False)"
                )
            if last and parameter.grad is not None:
                with torch.no_grad():
                    found[name] = measure(parameter.detach(), parameter.grad)
                parameter.grad = None

        return measured

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [
        p.register_post_accumulate_grad_hook(hook(name) if name in taken else drop)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        for number, batch in enumerate(todo, start=1):
            last = number == len(todo)
            scalar = model(**batch).loss if loss is None else loss(model, batch)
            (scalar / len(todo)).backward()
    finally:
        for handle in hooks:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.grad = before[name]
    if not found:
        raise ValueError("no gradient reached a matrix: is anything of the model trained?")
    return {name: found[name] for name in taken if name in found}


class GradientRecorder:
    """Measures each tensor's gradient against its weights at chosen steps of any training run, during backward.

    To be made before the optimizer: NanoAdam cuts gradients down in a hook of its own, and hooks run in the order in
    which they were made. At these steps layers that would compute selected entries only compute whole gradients. Where
    several backward passes make a step, the last one counts, with what `grad` holds then; NanoAdam then needs
    `gradient_release=False`.

    Args:
        model: what is trained.
        steps: at which of them, counted from 0.
        measure: called with weight and gradient; by default ratio and overlap.

    Attributes:
        records: `{"step", "name", "role", "value"}` of each tensor at each of the steps.

    Call `advance()` after every optimizer step, and `close()` in the end.
    """

    def __init__(self, model: nn.Module, steps: Iterable[int], measure: Measure = relation) -> None:
        self.records: list[dict[str, Any]] = []
        self._step, self._steps, self._measure = 0, frozenset(steps), measure
        self._now: dict[str, dict[str, Any]] = {}
        found = tensors(model)
        self._identities = [id(parameter) for parameter, _ in found.values()]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name, role))
            for name, (parameter, role) in found.items()
        ]
        self._request: weakref.finalize[..., GradientRecorder] | None = None
        self._ask()

    def _ask(self) -> None:
        """For whole gradients, if they are measured in the present step; a recorder that is forgotten asks no more."""
        wanted = bool(self._hooks) and self._step in self._steps
        if self._request is not None and not wanted:
            self._request()
            self._request = None
        elif self._request is None and wanted:
            self._request = weakref.finalize(self, columns.whole(self._identities))

    def _hook(self, name: str, role: str) -> Callable[[Tensor], None]:
        def measured(parameter: Tensor) -> None:
            if self._step not in self._steps:
                return
            if parameter.grad is None or isinstance(parameter.grad, SelectedGradient):
                raise ValueError(
                    f"the gradient of {name} was cut down before it was measured: make the recorder before the "
                    "optimizer, which needs gradient_release=False if several backward passes make a step"
                )
            with torch.no_grad():
                value = self._measure(parameter.detach(), parameter.grad)
            self._now[name] = {"step": self._step, "name": name, "role": role, "value": value}

        return measured

    def advance(self) -> None:
        """The optimizer has made a step."""
        self.records += self._now.values()
        self._now = {}
        self._step += 1
        self._ask()

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        self._ask()
