"""What the hosts of the kernels share: launches for lists of tensors, kept while no tensor moves, and their numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanoadam.ops import MAX_AGE, Adam, Slot
from nanoadam.ops.tables import block_rows, captured, capturing, partition, signed, upload


@functools.lru_cache(maxsize=8)
def corrections_of(beta1: float, beta2: float, device: torch.device) -> Tensor:
    """float32 [2, MAX_AGE + 1]: bias corrections by age, computed in float64."""
    age = torch.arange(MAX_AGE + 1, dtype=torch.float64, device=device)
    age[0] = 1  # no weight has this age when it is updated
    return torch.stack([1 / (1 - beta1**age), (1 - beta2**age).sqrt()]).float()


@dataclass
class Launch:
    """Tensors that one launch serves, by their places in a list, and what they have in common."""

    kind: tuple[Any, ...]
    places: list[int]
    table: Tensor
    block_rows: Tensor
    blocks: int
    numbers: list[int] = field(default_factory=list)
    uploaded: Tensor | None = None

    def addresses(self, numbers: list[int]) -> Tensor:
        """What changes from step to step: int64, on the device; sent only if it has changed."""
        if self.uploaded is None or numbers != self.numbers:
            self.numbers, self.uploaded = numbers, upload(numbers, self.table.device)
        return self.uploaded


def launches(
    name: str,
    slots: list[Slot],
    signature: list[Any],
    kind: Callable[[int], tuple[Any, ...]],
    row: Callable[[int], list[int]],
    programs: Callable[[list[int]], int],
    first_column: int,
) -> list[Launch]:
    """How a list is launched; worked out anew only when something in `signature` has changed.

    `kind` and `row` take a place in the list; `programs` says how many serve what a row describes, and `first_column`
    of the row is where the first of them is written. A graph that is captured gets tables of its own: what is uploaded
    for it holds nothing until it is replayed, and what it reads must outlive the next change.
    """
    own = capturing(slots[0].weight.device)
    cached = None if own else slots[0].cache.get(name)
    if cached is not None and cached[0] == signature and cached[1] == slots:
        known: list[Launch] = cached[2]
        return known
    found = []
    device = slots[0].weight.device
    for what, places in partition(range(len(slots)), kind):
        rows, blocks, first = [row(place) for place in places], [], 0
        for numbers in rows:
            numbers[first_column] = first
            blocks.append(programs(numbers))
            first += blocks[-1]
        found.append(Launch(what, places, upload(rows, device), block_rows(tuple(blocks), device), first))
    if own:
        captured.append(found)
    else:
        slots[0].cache[name] = (signature, slots, found)
    return found


def scalars(adam: Adam, anything: Tensor) -> dict[str, Any]:
    """Arguments that both updates share; pointers that are not used point to `anything`."""
    device = anything.device
    lr_pointer = adam.lr if isinstance(adam.lr, Tensor) and adam.lr.device == device else None
    corrections = corrections_of(adam.beta1, adam.beta2, device)
    if capturing(device):
        captured.append(corrections)  # the cache may let go of it
    scale = adam.grad_scale
    if isinstance(scale, Tensor):
        scale = scale.to(device, non_blocking=True)
    return {
        "corrections": corrections,
        "lr": 0.0 if lr_pointer is not None else float(adam.lr),
        "lr_pointer": anything if lr_pointer is None else lr_pointer,
        "scale_pointer": scale if isinstance(scale, Tensor) else anything,
        "weight_decay": float(adam.weight_decay),
        "weight1": 1 - adam.beta1,
        "beta2": float(adam.beta2),
        "weight2": 1 - adam.beta2,
        "eps": float(adam.eps),
        "key": signed(adam.key),
        "LR_POINTER": lr_pointer is not None,
        "SCALE_POINTER": isinstance(scale, Tensor),
        "STEP_POINTER": adam.capturable,
        "MAXIMIZE": adam.maximize,
        "STOCHASTIC": adam.stochastic_rounding,
    }


def by_steps(
    slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam
) -> Iterable[tuple[list[Slot], list[Tensor]]]:
    """Slots that have had the same number of updates, which a launch takes from the host unless captured."""
    if adam.capturable or len({slot.steps for slot in slots}) == 1:
        return [(list(slots), list(gradients))]
    parts = partition(zip(slots, gradients, strict=True), lambda pair: pair[0].steps)
    return [([slot for slot, _ in pairs], [gradient for _, gradient in pairs]) for _, pairs in parts]
