"""What the operations on patches work on and give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nanoadam.delta.entry import Entry


@dataclass(eq=False)
class Job:
    """A sparse or columns entry, and the tensor that it is for: same dtype, shape and device."""

    entry: Entry
    weight: Tensor
    cache: dict[str, Any] = field(default_factory=dict)  # for an implementation's own use between inspect and write


@dataclass(frozen=True)
class Found:
    """What an entry found: the weights as they are (of its values' shape), and what it would do to the hash."""

    old: Tensor
    change: int
