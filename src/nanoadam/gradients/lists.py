"""What torch does to lists of gradients, those of selected weights and dense ones together.

A launch serves tensors of one dtype, and entries have another one than dense gradients: so each dtype is done by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoadam.gradients.dense_copy import DenseCopy
from nanoadam.gradients.tensor import SelectedGradient, refuse

aten: Any = torch.ops.aten


def _entries(gradients: Sequence[Tensor]) -> dict[torch.dtype, list[tuple[int, Tensor]]] | None:
    """What stands for each of them, by dtype, with its place in the list.

    None if one of them does not read as zero elsewhere or cannot be written to.
    """
    found: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for i, gradient in enumerate(gradients):
        values = gradient
        if type(gradient) is SelectedGradient:
            if gradient._box.fill != 0:
                return None
            values = gradient._box.values
        elif type(gradient) is DenseCopy:
            return None
        found.setdefault(values.dtype, []).append((i, values))
    return found


def _foreach_norm(func: Any, gradients: Any, ord: float = 2, dtype: Any = None) -> Any:
    entries = _entries(gradients)
    if ord < 0 or entries is None:
        return NotImplemented
    norms: list[Any] = [None] * len(gradients)
    for members in entries.values():
        found = func([values for _, values in members], ord, dtype=dtype)
        wanted = [dtype or gradients[i].dtype for i, _ in members]
        if {wanted[0]} == set(wanted) and found[0].dtype != wanted[0]:
            found = torch.stack(found).to(wanted[0]).unbind()  # one launch, not one each
        for (i, _), norm, kind in zip(members, found, wanted, strict=True):
            norms[i] = norm.to(kind)
    return norms


def _foreach_scale(func: Any, gradients: Any, factor: Any) -> Any:
    """`mul` and `div` in place, by a number or one for each."""
    entries = _entries(gradients)
    if entries is None:
        return NotImplemented
    for dtype, members in entries.items():
        mine = [factor[i] for i, _ in members] if isinstance(factor, (list, tuple)) else factor
        func([values for _, values in members], mine.to(dtype) if isinstance(mine, Tensor) else mine)
    return None


def _foreach_clamp(func: Any, gradients: Any, bound: float) -> Any:
    keeps_zero = bound <= 0 if func is aten._foreach_clamp_min_.Scalar else bound >= 0
    return _foreach_scale(func, gradients, bound) if keeps_zero else NotImplemented


def _foreach_zero(func: Any, gradients: Any) -> Any:
    for gradient in gradients:
        gradient.zero_()


def _unscale(func: Any, gradients: Any, found_inf: Tensor, inverse_scale: Tensor) -> Any:
    """GradScaler's."""
    entries = _entries(gradients)
    if entries is None:
        refuse("unscaling", next(g for g in gradients if type(g) is not Tensor))
    for members in entries.values():
        func([values for _, values in members], found_inf, inverse_scale)
    return None


def _collective(func: Any, gradients: Any, *args: Any, **options: Any) -> Any:
    """`all_reduce` and `broadcast`: of the entries, which are for the same weights on every replica."""
    if any(type(gradient) is DenseCopy for gradient in gradients):
        return NotImplemented
    entries = [g._box.values if type(g) is SelectedGradient else g for g in gradients]
    _, work = func(entries, *args, **options)
    for gradient in gradients:
        if type(gradient) is SelectedGradient:
            gradient._box.exchanged, gradient._box.zeroed = "reduced", False
    return gradients, work


SERVES: dict[Callable[..., Any], tuple[Any, ...]] = {
    _foreach_norm: (aten._foreach_norm.Scalar,),
    _foreach_scale: tuple(
        getattr(getattr(aten, name), kind)
        for name in ("_foreach_mul_", "_foreach_div_")
        for kind in ("Scalar", "Tensor", "ScalarList")
    ),
    _foreach_zero: (aten._foreach_zero_.default,),
    _foreach_clamp: (aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar),
    _unscale: (aten._amp_foreach_non_finite_check_and_unscale_.default,),
}
"""Which of torch's operations each of them does."""
if torch.distributed.is_available():
    SERVES[_collective] = (torch.ops.c10d.allreduce_.default, torch.ops.c10d.broadcast_.default)
