"""What torch's operations do to a gradient of selected weights. All of them arrive at `dispatch`.

1.  Those that training is made of stand in `_OWN` and never make anything dense.
2.  Other pointwise ones run on the entries, and once on the number that the gradient reads as elsewhere.
3.  All others that read run on a dense copy.
4.  All others that write raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map_only

from nanoadam.gradients import tensor
from nanoadam.gradients.tensor import Box, SelectedGradient, refuse
from nanoadam.ops import Selection, reference

aten: Any = torch.ops.aten


class DenseCopy(Tensor):
    """A view of a gradient: a dense copy that refuses to be written to, since the gradient would not change."""

    _dense: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, dense: Tensor) -> DenseCopy:
        """Refuse to be written to from now on."""
        size, stride = dense.shape, dense.stride()
        made = torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dense.dtype, device=dense.device)
        made._dense = dense
        return made

    def __init__(self, _: Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch(func, args, kwargs or {})

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """A dense tensor of one's own."""
        return self._dense.to(dtype or self.dtype, copy=True)

    def numpy(self, **options: Any) -> Any:
        """A copy."""
        return self.to_dense().numpy(**options)

    def __array__(self, *args: Any, **options: Any) -> Any:
        return self.to_dense().__array__(*args, **options)

    def tolist(self) -> Any:
        """As in torch."""
        return self._dense.tolist()

    def data_ptr(self) -> int:
        """Of the copy."""
        return self._dense.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"read-only view of a SelectedGradient: {self._dense!r}"


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
    args, kwargs = tree_map_only((SelectedGradient, DenseCopy), _dense, (args, kwargs))
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


def _dense(value: Any) -> Tensor:
    dense: Tensor = value._dense if isinstance(value, DenseCopy) else value.to_dense()
    return dense


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    source, *rest = args
    if type(source) is SelectedGradient and not func._schema.name.startswith("aten::_"):
        stands_for = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        seen = func(stands_for, *rest, **kwargs)
        parts = [(each.shape, each.stride(), each.dtype) for each in (stands_for, seen) if isinstance(each, Tensor)]
        if len(parts) == 2 and parts[0] == parts[1]:
            return SelectedGradient(source._box, source)
    result = func(_dense(source), *rest, **kwargs)
    return DenseCopy(result) if isinstance(result, Tensor) else [DenseCopy(each) for each in result]


_SINGLE = {"maximum": "clamp_min", "minimum": "clamp_max"}
"""Foreach operations that go by another name alone."""


def _one_by_one(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A foreach operation as what it stands for."""
    stem = name.removesuffix("_")
    single = getattr(aten, name.replace(stem, _SINGLE.get(stem, stem), 1), None)
    if single is None and not _written(func):
        return func(*tree_map_only((SelectedGradient, DenseCopy), _dense, args), **kwargs)
    if single is None:
        refuse(f"_foreach_{name}()", next(each for each in args[0] if isinstance(each, (SelectedGradient, DenseCopy))))
    count = len(args[0])
    columns = [value if isinstance(value, (list, tuple)) and len(value) == count else [value] * count for value in args]
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
        gradient._box.selection, (_dense(other) if isinstance(other, DenseCopy) else other).expand(gradient.shape)
    )


def _add_in_place(func: Any, gradient: Any, other: Any, *, alpha: float = 1) -> Any:
    """Of a dense gradient the selected entries: this is how autograd accumulates."""
    if type(gradient) is not SelectedGradient or not isinstance(other, Tensor) or other.shape != gradient.shape:
        return NotImplemented
    box, factor = gradient._box, -alpha if func is aten.sub_.Tensor else alpha
    if box.accumulator is not None and factor == 1 and (type(other) is Tensor or box.zeroed):
        box.accumulator.add(box, other)
    else:
        box.values.add_(_take(gradient, other), alpha=factor)
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
    box.pending, box.fill, box.zeroed = None, 0.0, True
    box.values.zero_()
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


# Reductions of the whole tensor


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


# Lists of gradients, dense ones among them. A launch serves tensors of one dtype, and entries have another one than
# dense gradients: so each dtype is done by itself.


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
    _norm: (aten.linalg_vector_norm.default,),
    _sum: (aten.sum.default, aten.sum.dim_IntList),
    _mean: (aten.mean.default, aten.mean.dim),
    _variance: (aten.std.correction, aten.var.correction),
    _extreme: (aten.max.default, aten.min.default, aten.amax.default, aten.amin.default),
    _every: (aten.all.default, aten.any.default),
    _count_nonzero: (aten.count_nonzero.default, aten.count_nonzero.dim_IntList),
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
_OWN = {func: own for own, functions in _SERVES.items() for func in functions}
if torch.distributed.is_available():
    _OWN[torch.ops.c10d.allreduce_.default] = _OWN[torch.ops.c10d.broadcast_.default] = _collective

# torch's clipping loops over tensors of types that it does not know, which takes the host ten times as long: 19 ms
# for the 291 tensors of LLaMA-2-7B, where its lists take 2.
_foreach_utils._foreach_supported_types.append(SelectedGradient)
