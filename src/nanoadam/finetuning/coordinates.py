"""Where a transformers model's weights lie in its checkpoint: experts fused in memory, tensors with other names.

Servers that load checkpoints (vLLM for one) know weights by the checkpoint's names. transformers has functions that get
from the one to the other; here they are run on tensors without memory, and what they do is read off the views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanoadam.delta import DeltaError
from nanoadam.delta.sources import tensors_of
from nanoadam.delta.sync import Coordinates, Piece


class _Views(TorchDispatchMode):
    """Leaves out copies that only lay memory out anew, so that every result is still a view of what it was made of."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def coordinates(model: Any) -> Coordinates:
    """The checkpoint coordinates of a transformers model, for `nanoadam.delta.sync.Sender`.

    Raises:
        DeltaError: if its checkpoint is made in a way that is no mere rearranging, naming a tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = tensors_of(model)
    shapes: dict[str, Tensor] = {
        name: torch.empty(tensors.form(name)[1], dtype=tensors.form(name)[0], device="meta") for name in tensors.names()
    }
    owner = {_storage(tensor): name for name, tensor in shapes.items()}
    with _Views(), torch.no_grad():  # type: ignore[no-untyped-call]
        saved: dict[str, Tensor] = revert_weight_conversion(model, dict(shapes))
    pieces: dict[str, list[Piece]] = {}
    for name, view in saved.items():
        own = owner.get(_storage(view))
        if own is None:
            raise DeltaError(
                f"{name} of the checkpoint is computed from {type(model).__name__}'s weights, not cut out of them: it "
                "cannot be patched in checkpoint coordinates. Send patches under the model's own names"
            )
        pieces.setdefault(own, []).append(Piece(name, tuple(view.shape), int(view.storage_offset()), view.stride()))
    return Coordinates({
        own: found
        for own, found in pieces.items()
        if len(found) > 1 or found[0].name != own or found[0].shape != tuple(shapes[own].shape)
    })  # fmt: skip


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
