"""What an optimizer's state takes, whatever the optimizer keeps it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, each counted once, unless the optimizer counts for itself.

    Tensors made of tensors (torchao's 8-bit moments) count by their parts, objects that hold tensors (GaLore's
    projectors) by their attributes.
    """
    if callable(own := getattr(optimizer, "state_bytes", None)):
        return int(own())
    found: dict[int, int] = {}
    for state in optimizer.state.values():
        _collect(state, found)
    return sum(found.values())


def _collect(value: Any, found: dict[int, int]) -> None:
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            found[id(value)] = value.nbytes
        else:
            _collect([getattr(value, name) for name in flatten()[0]], found)
    elif isinstance(value, Mapping):
        _collect(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif hasattr(value, "__dict__"):
        _collect(vars(value), found)
