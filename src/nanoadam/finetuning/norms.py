"""BatchNorm while finetuning: its momentum, and keeping it as it is."""

from __future__ import annotations

from torch import nn


def norm_modules(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Its BatchNorm layers."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Of the running statistics of BatchNorm: the weight of the newest batch.

    transformers builds MobileNets with 0.9997, which is TensorFlow's weight of the *old* statistics: in training,
    the statistics would be those of the last batch.
    """
    for module in norm_modules(model):
        module.momentum = momentum


def freeze_norms(model: nn.Module) -> None:
    """Keep BatchNorm as it is, statistics, scale and shift, whatever mode the model is put into later."""
    for module in norm_modules(model):
        module.eval()
        module.train = _stay  # type: ignore[method-assign,assignment]
        module.requires_grad_(False)


def _stay(mode: bool = True) -> None:
    """In place of `Module.train`, whose result its callers drop."""
