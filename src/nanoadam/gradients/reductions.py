"""Reductions of a whole gradient of selected weights, from its entries and the number that it reads as elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanoadam.gradients.tensor import Box, SelectedGradient

aten: Any = torch.ops.aten


def _reduction(own: Callable[..., Any]) -> Callable[..., Any]:
    """Serve a reduction of all dimensions by `own(func, gradient, box, *args, **options)`."""

    def reduce(func: Any, gradient: Any, *args: Any, keepdim: bool = False, **options: Any) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = {"keepdim": keepdim, **dict(zip(names[1:], args, strict=False)), **options}
        keepdim, dim = given.pop("keepdim"), given.pop("dim", None)
        if type(gradient) is not SelectedGradient or isinstance(dim, int):
            return NotImplemented
        if dim and len({d % gradient.dim() for d in dim}) < gradient.dim():
            return NotImplemented
        result = own(func, gradient, gradient._box, **given)
        return result.reshape([1] * gradient.dim()) if keepdim and result is not NotImplemented else result

    return reduce


@_reduction
def _norm(func: Any, gradient: Tensor, box: Box, ord: float = 2, dtype: Any = None) -> Any:
    if box.fill != 0 or (ord < 0 and box.outside):
        return NotImplemented
    return torch.linalg.vector_norm(box.values, ord, dtype=dtype).to(dtype or gradient.dtype)


def _total(box: Box, dtype: torch.dtype) -> Tensor:
    return box.values.sum(dtype=dtype) + (box.fill * box.outside if box.fill else 0)


@_reduction
def _sum(func: Any, gradient: Tensor, box: Box, dtype: Any = None) -> Any:
    wanted = dtype or (gradient.dtype if gradient.is_floating_point() else torch.int64)
    return _total(box, torch.promote_types(wanted, box.values.dtype)).to(wanted)


@_reduction
def _mean(func: Any, gradient: Tensor, box: Box, dtype: Any = None) -> Any:
    return (_total(box, torch.promote_types(gradient.dtype, torch.float32)) / gradient.numel()).to(
        dtype or gradient.dtype
    )


@_reduction
def _variance(func: Any, gradient: Tensor, box: Box, correction: float | None = None) -> Any:
    mean = _total(box, torch.float64) / gradient.numel()
    squares = (box.values.double() - mean).square().sum() + box.outside * (box.fill - mean).square()
    result = squares / max(0, gradient.numel() - (1 if correction is None else correction))
    return (result.sqrt() if func is aten.std.correction else result).to(gradient.dtype)


@_reduction
def _extreme(func: Any, gradient: Tensor, box: Box) -> Any:
    """`max` and `min`; NaN wins, as in torch."""
    largest = func in (aten.max.default, aten.amax.default)
    result = box.values.amax() if largest else box.values.amin()
    if box.outside:
        result = result.clamp(min=box.fill) if largest else result.clamp(max=box.fill)
    return result.to(gradient.dtype)


@_reduction
def _every(func: Any, gradient: Tensor, box: Box) -> Any:
    """`all` and `any`."""
    if func is aten.all.default:
        return box.values.all() & (not box.outside or bool(box.fill))
    return box.values.any() | bool(box.outside and box.fill)


@_reduction
def _count_nonzero(func: Any, gradient: Tensor, box: Box) -> Any:
    return torch.count_nonzero(box.values) + (box.outside if box.fill else 0)


SERVES: dict[Callable[..., Any], tuple[Any, ...]] = {
    _norm: (aten.linalg_vector_norm.default,),
    _sum: (aten.sum.default, aten.sum.dim_IntList),
    _mean: (aten.mean.default, aten.mean.dim),
    _variance: (aten.std.correction, aten.var.correction),
    _extreme: (aten.max.default, aten.min.default, aten.amax.default, aten.amin.default),
    _every: (aten.all.default, aten.any.default),
    _count_nonzero: (aten.count_nonzero.default, aten.count_nonzero.dim_IntList),
}
"""Which of torch's operations each of them does."""
