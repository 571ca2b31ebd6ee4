"""Parameters whose weights lie on several processes (DTensor), as one of these processes sees them.

Whatever the optimizer does to such a parameter it does to the part that lies here, a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHARDED: tuple[type, ...] = ()
"""What parameters are whose weights lie on several processes."""

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    SHARDED = (DTensor,)


@dataclass(frozen=True)
class Part:
    """Where the part of this process lies in the whole of a parameter: a block of rows, or of pieces of rows."""

    shape: tuple[int, ...]  # of the part
    whole: tuple[int, ...]
    first: tuple[int, ...]  # row and place in that row at which the part begins, in weights

    @property
    def offset(self) -> int:
        """Position of its first weight in the flattened whole (row-major)."""
        return self.first[0] * math.prod(self.whole[1:]) + self.first[1]

    @property
    def row(self) -> int:
        """Weights in a row of the part."""
        return math.prod(self.shape[1:])

    def to_whole(self, position: Tensor) -> Tensor:
        """Positions in the flattened part as those in the flattened whole."""
        row, whole = max(1, self.row), math.prod(self.whole[1:])
        if row == whole:
            return position + self.offset
        return (position // row + self.first[0]) * whole + position % row + self.first[1]

    def to_part(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the flattened whole as those in the part, and which of them lie in it."""
        whole = math.prod(self.whole[1:])
        row, place = position // whole - self.first[0], position % whole - self.first[1]
        here = (row >= 0) & (row < self.shape[0]) & (place >= 0) & (place < self.row)
        return row * self.row + place, here


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process: all of it, unless it is sharded."""
    part: Tensor = tensor._local_tensor if isinstance(tensor, SHARDED) else tensor  # type: ignore[attr-defined]
    return part


def part_of(parameter: Tensor, name: str = "a parameter") -> Part | None:
    """Where this process's part of a parameter lies; None for one that is not sharded.

    Raises:
        TypeError: for a way of sharding that cannot be served.
    """
    if not isinstance(parameter, SHARDED):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = parameter
    for placement in sharded.placements:
        dim = getattr(placement, "dim", None)
        if not placement.is_replicate() and (placement.is_partial() or dim is None or dim > 1):
            raise TypeError(
                f"{name} is placed as {tuple(sharded.placements)}; NanoAdam trains DTensors that are replicated or "
                "sharded along dimension 0 or 1: redistribute it, or leave it to another optimizer"
            )
    shape, first = compute_local_shape_and_global_offset(parameter.shape, sharded.device_mesh, sharded.placements)
    inner = math.prod(parameter.shape[2:])
    places = (first[0] if first else 0, first[1] * inner if len(first) > 1 else 0)
    return Part(tuple(shape), tuple(parameter.shape), places)


def is_sharded_along(parameter: Tensor, dim: int) -> bool:
    """Whether it is cut along a dimension."""
    placements = parameter.placements if isinstance(parameter, SHARDED) else ()  # type: ignore[attr-defined]
    return any(getattr(placement, "dim", None) == dim for placement in placements)


def like(part: Tensor, parameter: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor that is sharded as a parameter is, and of which `part` lies here.

    Args:
        shape: of the whole; that of the parameter if None.
    """
    if not isinstance(parameter, SHARDED):
        return part
    whole = torch.empty(parameter.shape if shape is None else tuple(shape), device="meta")
    sharded: Any = parameter
    made: Tensor = DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return made


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What of `p.grad` lies here. It is brought to where the parameter lies, if it is somewhere else."""
    gradient = parameter.grad
    if gradient is None or not isinstance(gradient, SHARDED):
        return gradient
    sharded: Any = parameter
    if isinstance(parameter, SHARDED) and gradient.placements != sharded.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(sharded.device_mesh, sharded.placements)  # type: ignore[attr-defined]
        parameter.grad = gradient
    return local(gradient)


def set_gradient(parameter: Tensor, part: Tensor | None) -> None:
    """Let this be what of `p.grad` lies here."""
    if part is None or not isinstance(parameter, SHARDED):
        parameter.grad = part
    elif isinstance(parameter.grad, SHARDED):
        there: Any = parameter.grad
        there._local_tensor = part  # as FSDP2 does
    else:
        parameter.grad = like(part, parameter)


def sum_over_rows(parameter: Tensor, values: Tensor) -> Tensor:
    """Add up, in place, what processes have that hold different rows of a parameter."""
    sharded: Any = parameter
    for dim, placement in enumerate(sharded.placements if isinstance(parameter, SHARDED) else ()):
        if getattr(placement, "dim", None) == 0:
            torch.distributed.all_reduce(values, group=sharded.device_mesh.get_group(dim))
    return values
