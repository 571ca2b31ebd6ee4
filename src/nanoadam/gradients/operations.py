"""What torch's operations do to a gradient of selected weights. All of them arrive at `dispatch`.

1.  Those that training is made of stand in `_OWN` and never make anything dense: here, in `reductions.py` and in
    `lists.py`.
2.  Other pointwise ones run on the entries, and once on the number that the gradient reads as elsewhere.
3.  All others that read run on a dense copy.
4.  All others that write raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map_only

from nanoadam.gradients import lists, reductions, tensor
from nanoadam.gradients.dense_copy import DenseCopy, dense_of
from nanoadam.gradients.tensor import Box, SelectedGradient, refuse
from nanoadam.ops import Selection, reference

aten: Any = torch.ops.aten


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Do one of torch's operations, of which at least one argument is a gradient of selected weights."""
    own = _OWN.get(func)
    if own is not None and type(args[0]) is not DenseCopy:
        result = own(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if func._can_decompose():
        return func.decompose(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name.startswith("_foreach_"):
        return _one_by_one(func, name.removeprefix("_foreach_"), args, kwargs)
    for place, key in _written(func):
        target = args[place] if place < len(args) else kwargs.get(key)
        if type(target) is SelectedGradient and place == 0 and _pointwise_in_place(func, args, kwargs):
            return target
        for each in target if isinstance(target, (list, tuple)) else [target]:
            if isinstance(each, (SelectedGradient, DenseCopy)):
                refuse(f"{name}()", each)
    if not _written(func) and _is_pointwise(func):
        result = _pointwise(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if _is_view(func) and isinstance(args[0], (SelectedGradient, DenseCopy)):
        return _view(func, args, kwargs)
    args, kwargs = tree_map_only((SelectedGradient, DenseCopy), dense_of, (args, kwargs))
    return func(*args, **kwargs)


tensor.dispatch[:] = [dispatch]


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, arg.name) for i, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write)


@functools.cache
def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


@functools.cache
def _is_pointwise(func: Any) -> bool:
    """Whether it does the same to each weight by itself."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if torch.Tag.pointwise in func.tags:
        return True
    name = func._schema.name.removeprefix("aten::")  # torch.Tag.inplace is newer than torch 2.9
    in_place = name.endswith("_") and [place for place, _ in _written(func)] == [0]
    functional = getattr(aten, name.removesuffix("_"), None)
    return in_place and torch.Tag.pointwise in getattr(getattr(functional, func._overloadname, None), "tags", ())


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    source, *rest = args
    if type(source) is SelectedGradient and not func._schema.name.startswith("aten::_"):
        stands_for = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        seen = func(stands_for, *rest, **kwargs)
        parts = [(each.shape, each.stride(), each.dtype) for each in (stands_for, seen) if isinstance(each, Tensor)]
        if len(parts) == 2 and parts[0] == parts[1]:
            return SelectedGradient(source._box, source)
    result = func(dense_of(source), *rest, **kwargs)
    return DenseCopy(result) if isinstance(result, Tensor) else [DenseCopy(each) for each in result]


_SINGLE = {"maximum": "clamp_min", "minimum": "clamp_max"}
"""Foreach operations that go by another name alone."""


def _one_by_one(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A foreach operation as what it stands for."""
    stem = name.removesuffix("_")
    single = getattr(aten, name.replace(stem, _SINGLE.get(stem, stem), 1), None)
    if single is None and not _written(func):
        return func(*tree_map_only((SelectedGradient, DenseCopy), dense_of, args), **kwargs)
    if single is None:
        refuse(f"_foreach_{name}()", next(each for each in args[0] if isinstance(each, (SelectedGradient, DenseCopy))))
    count = next(len(value) for value in args if isinstance(value, (list, tuple)))
    if stem in ("addcmul", "addcdiv") and len(args) == 4 and isinstance(args[3], Tensor):
        args = (*args[:3], args[3].tolist())  # a number for each
    columns = [value if isinstance(value, (list, tuple)) and len(value) == count else [value] * count for value in args]
    if stem in ("addcmul", "addcdiv"):  # alone, they take the number by its name only
        results = [single(*each[:3], value=each[3] if len(each) > 3 else 1) for each in zip(*columns, strict=True)]
    else:
        results = [single(*each, **kwargs) for each in zip(*columns, strict=True)]
    return None if _written(func) else results


# Pointwise: on the entries, and once on what the gradient reads as elsewhere


def _same_selection(one: SelectedGradient, other: SelectedGradient) -> bool:
    a, b = one._box.selection, other._box.selection
    return one.shape == other.shape and (a is b or (a.index is b.index and a.layout == b.layout))


def _is_number(value: Any) -> bool:
    """Whether it is one number, which can be read without waiting for a GPU."""
    return not isinstance(value, Tensor) or (type(value) is Tensor and value.dim() == 0 and value.device.type == "cpu")


def _split(args: Any, kwargs: Any) -> tuple[SelectedGradient, Any, Any] | None:
    """The first gradient, and the arguments for the entries and for elsewhere; None if they do not split."""
    flat = [*args, *kwargs.values()]
    gradients = [value for value in flat if type(value) is SelectedGradient]
    others = [value for value in flat if type(value) is not SelectedGradient]
    if any(isinstance(value, (list, tuple)) or not _is_number(value) for value in others):
        return None
    if not all(_same_selection(gradients[0], other) for other in gradients):
        return None
    here = tree_map_only(SelectedGradient, lambda g: g._box.values, (args, kwargs))
    elsewhere = tree_map_only(
        SelectedGradient, lambda g: torch.full((1,), g._box.fill, dtype=g.dtype, device="cpu"), (args, kwargs)
    )
    return gradients[0], here, elsewhere


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    split = _split(args, kwargs)
    if split is None:
        return NotImplemented
    like, here, elsewhere = split
    fill = func(*elsewhere[0], **elsewhere[1])
    if not isinstance(fill, Tensor) or fill.numel() != 1:
        return NotImplemented
    return _result(like, func(*here[0], **here[1]), fill.dtype, fill.item())


def _pointwise_in_place(func: Any, args: Any, kwargs: Any) -> bool:
    """Do it if the gradient then reads as before elsewhere; whether it was done."""
    split = _split(args, kwargs) if _is_pointwise(func) else None
    if split is None:
        return False
    _, here, elsewhere = split
    box: Box = args[0]._box
    if box.outside and func(*elsewhere[0], **elsewhere[1]).item() != box.fill:
        return False
    func(*here[0], **here[1])
    box.zeroed = False
    return True


def _result(like: SelectedGradient, values: Tensor, dtype: torch.dtype, fill: float = 0.0) -> SelectedGradient:
    return SelectedGradient(Box(like._box.selection, values, fill=fill), like, dtype)


# Accumulation, scaling, zeroing, copies


def _alias(func: Any, gradient: SelectedGradient) -> SelectedGradient:
    return SelectedGradient(gradient._box, gradient)


def _clone(func: Any, gradient: SelectedGradient, **_: Any) -> SelectedGradient:
    return _result(gradient, gradient._box.values.clone(), gradient.dtype, gradient._box.fill)


def _to_copy(func: Any, gradient: SelectedGradient, **options: Any) -> Any:
    box, dtype = gradient._box, options.get("dtype") or gradient.dtype
    device = torch.device(options.get("device") or gradient.device)
    if options.get("layout") not in (None, torch.strided) or device.type == "meta":
        return NotImplemented
    exact = dtype in (gradient.dtype, torch.float32)  # entries may be exacter than the gradient's dtype: they stay so
    values = box.values.to(device, None if exact else dtype, bool(options.get("non_blocking")), copy=True)
    moved = Selection(box.selection.index.to(device), box.selection.layout)
    selection = box.selection if device == gradient.device else moved
    fill = torch.tensor(box.fill, dtype=gradient.dtype, device="cpu").to(dtype).item()
    return SelectedGradient._make(Box(selection, values, fill=fill), gradient.shape, gradient.stride(), dtype, device)


def _take(gradient: SelectedGradient, other: Tensor) -> Tensor:
    """What another tensor of the shape has at the entries of a gradient.

    Raises:
        TypeError: for a gradient of another selection, some of whose entries would be lost.
    """
    if type(other) is SelectedGradient:
        if not _same_selection(gradient, other):
            raise TypeError(
                "the two gradients have entries for different weights, so one cannot take the other's in place: "
                "use a.to_dense() and b.to_dense()"
            )
        return other._box.values
    return reference.take(
        gradient._box.selection, (dense_of(other) if isinstance(other, DenseCopy) else other).expand(gradient.shape)
    )


def _add_in_place(func: Any, gradient: Any, other: Any, *, alpha: float = 1) -> Any:
    """Of a dense gradient the selected entries: this is how autograd accumulates."""
    if type(gradient) is not SelectedGradient or not isinstance(other, Tensor) or other.shape != gradient.shape:
        return NotImplemented
    box, factor = gradient._box, -alpha if func is aten.sub_.Tensor else alpha
    by_autograd = torch._C._current_graph_task_id() != -1  # what a layer has made may be for a newer selection
    taken = type(other) is Tensor or box.zeroed or (by_autograd and type(other) is SelectedGradient)
    if box.accumulator is not None and factor == 1 and taken:
        box.accumulator.add(box, other)
    else:
        if by_autograd and isinstance(other, SelectedGradient):
            entries = other._box.moved_to(box.selection)
        else:
            entries = _take(gradient, other)
        box.values.add_(entries, alpha=factor)
        box.zeroed = False
    return gradient


def _add(func: Any, one: Any, other: Any, *, alpha: float = 1) -> Any:
    """Two gradients of one selection: a weight that was used twice."""
    if type(one) is not SelectedGradient or type(other) is not SelectedGradient or not _same_selection(one, other):
        return NotImplemented
    fill = one._box.fill + (-alpha if func is aten.sub.Tensor else alpha) * other._box.fill
    values = func(one._box.values, other._box.values, alpha=alpha)
    return _result(one, values, torch.promote_types(one.dtype, other.dtype), fill)


def _copy_in_place(func: Any, gradient: Any, other: Tensor, non_blocking: bool = False) -> Any:
    if type(gradient) is not SelectedGradient or other.shape != gradient.shape:
        return NotImplemented
    box = gradient._box
    box.values.copy_(_take(gradient, other.to(gradient.device, non_blocking=non_blocking)))
    box.zeroed = False
    box.exchanged = "copied"  # it is how DistributedDataParallel writes back what it has averaged
    return gradient


def _zero_in_place(func: Any, gradient: SelectedGradient) -> SelectedGradient:
    box = gradient._box
    if box.selection.stale and box.slot is not None and box.slot.selection is not None:
        box.place(box.slot.selection, None)  # it may be used again
    box.pending, box.fill = None, 0.0
    box.values.zero_()
    box.zeroed = True
    return gradient


def _fill_in_place(func: Any, gradient: Any, value: Any) -> Any:
    zero = type(gradient) is SelectedGradient and _is_number(value) and value == 0
    return _zero_in_place(func, gradient) if zero else NotImplemented


def _scale_in_place(func: Any, gradient: Any, other: Any, **options: Any) -> Any:
    """`mul_` and `div_` by a number, finite or not; `mul_` by a tensor such as a mask."""
    if type(gradient) is not SelectedGradient or gradient._box.fill != 0:
        return NotImplemented
    if isinstance(other, Tensor) and (other.numel() > 1 or type(other) is not Tensor):
        if func is not aten.mul_.Tensor:
            return NotImplemented
        other = _take(gradient, other)
    elif isinstance(other, Tensor):
        other = other.reshape(())
    func(gradient._box.values, other, **options)
    return gradient


def _scale(func: Any, one: Any, other: Any, **options: Any) -> Any:
    """`mul` and `div` by a number, finite or not."""
    if type(one) is not SelectedGradient and func is aten.mul.Tensor:
        one, other = other, one
    number = not isinstance(other, Tensor) or (other.dim() == 0 and type(other) is Tensor)
    if type(one) is not SelectedGradient or not number or one._box.fill != 0:
        return NotImplemented
    dtype = torch.result_type(torch.empty(1, dtype=one.dtype, device="cpu"), other)
    return _result(one, func(one._box.values, other, **options), dtype)


def _masked_fill_in_place(func: Any, gradient: Any, mask: Tensor, value: Any) -> Any:
    if type(gradient) is not SelectedGradient or not _is_number(value) or value != gradient._box.fill:
        return NotImplemented
    gradient._box.values.masked_fill_(_take(gradient, mask), value)
    return gradient


def _dense_like(func: Any, gradient: Tensor, *args: Any, **options: Any) -> Any:
    """`zeros_like` and its like: an ordinary tensor."""
    like = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device=gradient.device)
    return func(like, *args, **options)


_SERVES: dict[Callable[..., Any], tuple[Any, ...]] = {
    _alias: (aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default),
    _clone: (aten.clone.default,),
    _to_copy: (aten._to_copy.default,),
    _add_in_place: (aten.add_.Tensor, aten.sub_.Tensor),
    _add: (aten.add.Tensor, aten.sub.Tensor),
    _copy_in_place: (aten.copy_.default,),
    _zero_in_place: (aten.zero_.default,),
    _fill_in_place: (aten.fill_.Scalar, aten.fill_.Tensor),
    _scale_in_place: (
        aten.mul_.Tensor,
        aten.mul_.Scalar,
        aten.div_.Tensor,
        aten.div_.Scalar,
        aten.div_.Tensor_mode,
    ),
    _scale: (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    _masked_fill_in_place: (aten.masked_fill_.Scalar,),
    _dense_like: tuple(
        getattr(aten, name).default
        for name in (
            *(f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn")),
            *(f"new_{kind}" for kind in ("empty", "zeros", "ones", "full", "empty_strided")),
        )
    ),
}
_TABLES = (_SERVES, reductions.SERVES, lists.SERVES)
_OWN = {func: own for table in _TABLES for own, functions in table.items() for func in functions}

# torch's clipping loops over tensors of types that it does not know, which takes the host ten times as long: 19 ms
# for the 291 tensors of LLaMA-2-7B, where its lists take 2.
_foreach_utils._foreach_supported_types.append(SelectedGradient)
