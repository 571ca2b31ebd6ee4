"""DistributedDataParallel without its dense buckets: it leaves the selected tensors to replicas beside it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.distributed.replicas import Replica
from nanoadam.optimizer import NanoAdam

_DDP = nn.parallel.DistributedDataParallel


def prepare_ddp(model: nn.Module, optimizer: NanoAdam) -> BesideDDP:
    """Have DistributedDataParallel leave the selected tensors alone, whose selected entries are exchanged beside it.

    To be called before the model is wrapped. DDP then has no buckets for these tensors, which would be as large as the
    weights. It goes on with dense tensors and buffers; `no_sync()` of the wrapped model holds for both. If the model is
    not wrapped after all, nothing happens. Under transformers' Trainer `nanoadam.for_trainer` does this.

    Raises:
        TypeError: if the model is wrapped already, or the optimizer is no NanoAdam.
    """
    if not isinstance(optimizer, NanoAdam):
        raise TypeError(f"prepare_ddp() takes a NanoAdam, got {type(optimizer).__name__}")
    if isinstance(model, _DDP):
        raise TypeError(
            "prepare_ddp() comes before DistributedDataParallel(model): it cannot free buckets that are there"
        )
    return BesideDDP(model, optimizer)


class BesideDDP:
    """What `prepare_ddp` returns.

    Attributes:
        names: of the parameters that DDP leaves alone.
        replica: who exchanges them, from the first forward pass of the wrapped model on.
    """

    def __init__(self, model: nn.Module, optimizer: NanoAdam) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        slots = [optimizer._released(p)[0] for _, p in trained]
        ours = [pair for pair, slot in zip(trained, slots, strict=True) if slot is not None and slot.part is None]
        if ours and len(ours) == len(trained):  # DDP refuses a model that has nothing for it
            ours.remove(min(ours, key=lambda pair: pair[1].numel()))
        self.names = [name for name, _ in ours]
        self.replica: Replica | None = None
        self._parameters: list[Tensor] = [p for _, p in ours]
        self._optimizer = optimizer
        self._others: Any = None  # a wrapper that has them all the same
        for earlier in list(model._forward_pre_hooks.values()):  # of an optimizer that has trained it before
            if isinstance(earlier, BesideDDP) and set(map(id, earlier._parameters)) & {id(p) for _, p in ours}:
                earlier.remove(model)
        if ours:
            before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
            _DDP._set_params_and_buffers_to_ignore_for_model(model, [*before, *self.names])
            self._handle = model.register_forward_pre_hook(self)

    def remove(self, model: nn.Module) -> None:
        """Exchange nothing from now on; wrappers that come have the tensors again."""
        self._handle.remove()
        if self.replica is not None:
            self.replica.remove()
        left = [name for name in model._ddp_params_and_buffers_to_ignore if name not in self.names]  # type: ignore[union-attr]
        _DDP._set_params_and_buffers_to_ignore_for_model(model, left)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, _: Any) -> None:
        """Before each forward pass: at the first one under DDP, begin."""
        ddp = _DDP._get_active_ddp_module()
        if ddp is None or ddp is self._others:
            return
        if self.replica is not None:
            self.replica.beside(ddp)  # it may be another wrapper than before
            return
        theirs = set(map(id, ddp._module_parameters))
        if any(id(parameter) in theirs for parameter in self._parameters):
            self._others = ddp
            warnings.warn(
                "DistributedDataParallel has wrapped the model under other names than prepare_ddp(model, optimizer) "
                "has seen, so it holds and sends gradients whole: call prepare_ddp with the very module that it wraps",
                UserWarning,
                stacklevel=2,
            )
            return
        named = list(zip(self.names, self._parameters, strict=True))
        self.replica = Replica(named, [], self._optimizer, ddp.process_group, ddp=ddp)

    # A copy of the model is not under DDP.

    def __deepcopy__(self, _: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return "_nothing"


def _nothing(*_: Any) -> None:
    """What a copy of the model does before its forward pass."""
