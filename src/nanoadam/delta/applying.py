"""apply and revert: a patch put on a model in memory, and taken back.

Everything is looked at before anything is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from nanoadam.delta.application import Application
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.folders import apply_to_files
from nanoadam.delta.patch import Patch, as_patch
from nanoadam.delta.sources import Progress, is_path

_undone: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()
"""What takes back the patches on each module, the last one last."""

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def apply(
    model: Any,
    patch: Patch | str | os.PathLike[str],
    strength: float = 1.0,
    *,
    out: str | os.PathLike[str] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Patch:
    """Make the finetuned model of its base.

    A module or state dict is changed in place; the folder of a saved model, or one safetensors file, is copied to
    `out` with the changes in it, one tensor at a time. A tensor that is the finetuned one already is left alone.

    Args:
        model: a module, a state dict, or the path of a saved model.
        patch: a patch, or its path.
        strength: 1 gives the finetuned weights, bit for bit, and 0 those of the base. What is between, or beyond, is
            base + strength * (tuned - base), in float32, rounded once. What is no floating point number is
            the finetuned one from 0.5 on; new tensors always are.
        out: where the copy goes; for paths only.
        verify: hold the file against its SHA-256, each tensor against the hash of the base, and what would come out
            against the hash of the result. Without it a wrong base is noticed by its shapes only.
        progress: called with how far it is, for paths.

    Returns:
        What takes it back: `apply(model, that)`, or `revert(model)` for a module. For paths the patch itself.

    Raises:
        DeltaError: if the patch is damaged, was made on another base, or does not fit. Not one weight is changed then.
    """
    if not math.isfinite(strength):
        raise DeltaError(f"strength must be a number, 1 for the finetuned model and 0 for the base; got {strength}")
    if is_path(model):
        if out is None:
            raise DeltaError(f"{model} is copied, not changed: say with out=... where the finetuned model goes")
        return apply_to_files(model, patch, out, strength, verify=verify, progress=progress)
    if out is not None:
        raise DeltaError("out is for saved models: a model in memory is changed in place")
    patch = as_patch(patch, verify=verify)
    undo = Application(model, patch, strength, verify).run()
    if isinstance(model, nn.Module) and (undo.entries or undo.removed):
        _undone.setdefault(model, []).append(undo)
    return undo


def revert(model: nn.Module, *, verify: bool = True) -> None:
    """Take back the patch that was applied to a module last: every weight has the bits that it had before.

    Raises:
        DeltaError: if there is none, or if the weights have been changed since (by training, for one).
    """
    stack = _undone.get(model)
    if not stack:
        raise DeltaError(
            "there is no patch to take back: revert is for modules that apply() was called on in this process. "
            "For state dicts, apply what apply() gave back"
        )
    _take_back(model, stack[-1], verify)


@torch.no_grad()
def _take_back(model: nn.Module, undo: Patch, verify: bool) -> None:
    Application(model, undo, 1.0, verify).run()
    stack = _undone.get(model, [])
    stack[:] = [other for other in stack if other is not undo]


@contextlib.contextmanager
def applied(
    model: _Module, patch: Patch | str | os.PathLike[str], strength: float = 1.0, *, verify: bool = True
) -> Iterator[_Module]:
    """The finetuned model within a `with`, what it was before again afterwards.

    Raises:
        DeltaError: as `apply` and `revert`.
    """
    undo = apply(model, patch, strength, verify=verify)
    try:
        yield model
    finally:
        _take_back(model, undo, verify)
