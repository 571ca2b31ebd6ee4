"""`SelectedGradient`: the selected entries of a gradient, as a tensor of the parameter's shape.

What torch does to it is in `operations.py`, who puts it into `p.grad` in `release.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from nanoadam.chunks import AnyLayout, ColumnLayout, Layout
from nanoadam.ops import Selection, Slot, reference

dispatch: list[Callable[[Any, Any, Any], Any]] = []
"""The one function that does torch's operations; `operations.py`, which knows this module, puts it here."""


class Accumulator(Protocol):
    """Who adds dense gradients to those it has put into `p.grad`, several in one launch."""

    def add(self, box: Box, gradient: Tensor) -> None:
        """Add a dense gradient, now or when enough have gathered."""

    def flush(self) -> None:
        """Add all that have gathered."""


class Box:
    """The entries of a gradient. Tensors that are views of each other share it.

    Args:
        selection: where the entries are.
        values: [selected]; None for zero.
        dtype: of the values.
        fill: what the gradient reads as elsewhere; other than zero only in results of operations.
        slot, accumulator: of the optimizer that has put it into `p.grad`.
    """

    __slots__ = (
        "__weakref__", "_loan", "_shown", "_zeroed", "accumulator", "dtype", "exchanged", "fill", "pending",
        "selection", "slot", "stored",
    )  # fmt: skip

    def __init__(
        self,
        selection: Selection,
        values: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        fill: float = 0.0,
        slot: Slot | None = None,
        accumulator: Accumulator | None = None,
    ) -> None:
        self.dtype = dtype if values is None else values.dtype
        self.fill, self.slot, self.accumulator = fill, slot, accumulator
        self.pending: Tensor | None = None  # a dense gradient that is still to be added
        self._zeroed = False
        self._shown = -1  # version of the entries that a user has, who may write to them
        self.exchanged = ""  # how other processes' gradients have come into it
        self.place(selection, values)

    def place(self, selection: Selection, values: Tensor | None) -> None:
        """Give it other positions, where nothing is lost by it."""
        self.selection, self._loan, self.stored, self._shown = selection, selection.borrow(), values, -1

    @property
    def zeroed(self) -> bool:
        """Whether it was zeroed in place, and nothing was added since, nor written to its entries."""
        return self._zeroed and (self.stored is None or self._shown in (-1, self.stored._version))

    @zeroed.setter
    def zeroed(self, zeroed: bool) -> None:
        self._zeroed = zeroed
        if self._shown >= 0 and self.stored is not None:
            self._shown = self.stored._version

    @property
    def values(self) -> Tensor:
        """The entries, [selected], with everything added that has gathered.

        Raises:
            RuntimeError: if the selection was written over since (`refresh()` with `capturable=True`).
        """
        if self.pending is not None and self.accumulator is not None:
            self.accumulator.flush()
        if self.pending is not None:
            self.compact()
        if self.selection.stale:
            raise RuntimeError(
                "this gradient belongs to a selection that refresh() has written over, as capturable=True needs it: "
                "read gradients before refresh(), or zero them"
            )
        if self.stored is None:
            self.stored = self.room().zero_()
        return self.stored

    def show(self) -> Tensor:
        """The entries, for a user who may write to them at any time from now on."""
        values = self.values
        self._zeroed, self._shown = self.zeroed, values._version
        return values

    def room(self) -> Tensor:
        """Where the entries are, or can be put: of the layout's shape."""
        shape, device = self.selection.layout.shape, self.selection.index.device
        return torch.empty(shape, dtype=self.dtype, device=device) if self.stored is None else self.stored

    def compact(self) -> None:
        """Add what is pending, by itself."""
        assert self.pending is not None
        new = reference.take(self.selection, self.pending).float()
        self.stored = (new if self.stored is None else self.stored.float() + new).to(self.dtype)
        self.pending = None

    def moved_to(self, selection: Selection) -> Tensor:
        """The entries of another selection of the same tensor: zero for weights that this one has not."""
        mine = self.selection
        if selection is mine or (selection.index is mine.index and selection.layout == mine.layout):
            return self.values
        return reference.move(self.values, mine, selection)

    @property
    def outside(self) -> int:
        """Weights that have no entry."""
        return self.selection.layout.numel - self.selection.layout.selected


def _in_place(name: str) -> Callable[[Tensor, Any], Tensor]:
    def operator(self: Tensor, other: Any) -> Tensor:
        result: Tensor = getattr(self, name)(other)
        return result

    return operator


class SelectedGradient(Tensor):
    """The selected entries of a gradient, as a tensor of the parameter's shape, dtype and device.

    It reads as the dense gradient that is zero elsewhere. In place it takes all that leaves zero there: `mul_`,
    `div_`, `clamp_`, `zero_`, ... and their foreach forms; scalars that are not finite leave zero there too. `add_` and
    `copy_` take the selected entries of a dense gradient, which is how autograd accumulates. A view of the same
    shape is the gradient itself; any other view is a dense copy that refuses to be written to.

    Raises:
        TypeError: in place of a write that would be lost.
    """

    _box: Box

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, box: Box, like: Tensor, dtype: torch.dtype | None = None) -> SelectedGradient:
        """Entries as a tensor of the shape, strides and device of `like`."""
        return cls._make(box, like.shape, like.stride(), dtype or like.dtype, like.device)

    @classmethod
    def _make(cls, box: Box, size: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> SelectedGradient:
        made = torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(made)  # for what would write to memory that is not there
        made._box = box
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch[0](func, args, kwargs or {})

    @property
    def entries(self) -> Tensor:
        """The selected entries themselves, to be read or written: `grad_dtype`, [selected], or [columns, outputs]."""
        return self._box.show()

    def positions(self) -> Tensor:
        """Where they are in the flattened parameter (row-major): int64, like `entries`, -1 at empty places."""
        selection = self._box.selection
        return torch.where(reference.used(selection), reference.positions(selection.index, selection.layout), -1)

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """The dense tensor that it reads as: a new one, of the parameter's strides."""
        values = self._box.values
        dense = torch.empty_strided(self.shape, self.stride(), dtype=dtype or self.dtype, device=self.device)
        reference.put(self._box.selection, values, dense.fill_(self._box.fill))
        return dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        layout = self._box.selection.layout
        return (
            f"SelectedGradient({layout.selected} entries of {layout.numel}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device={str(self.device)!r}, entries={self._box.values!r})"
        )

    # What torch would do in C++ without asking.

    @property
    def data(self) -> Tensor:
        """The gradient itself."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:  # how a module converts its gradients
        if type(value) is not SelectedGradient:
            refuse(".data = ...", self)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._box = value._box

    def numpy(self, **options: Any) -> Any:
        """A dense copy, which refuses to be written to."""
        return read_only(self.to_dense(), **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        return array.astype(dtype or array.dtype) if copy or dtype else array

    def __dlpack__(self, **options: Any) -> Any:
        return self.to_dense().__dlpack__(**options)

    def tolist(self) -> Any:
        """Of the dense tensor."""
        return self.to_dense().tolist()

    def data_ptr(self) -> NoReturn:
        """There is no dense tensor to point to.

        Raises:
            TypeError: always.
        """
        refuse("data_ptr()", self)

    def _cannot(self, *_: Any, **__: Any) -> NoReturn:
        refuse("this method", self)

    apply_ = map_ = map2_ = set_ = resize_ = resize_as_ = _cannot

    # `x += 1` would otherwise become `x = x + 1` where `add_` raises.
    __iadd__, __isub__, __imul__ = map(_in_place, ("add_", "sub_", "mul_"))
    __itruediv__, __ipow__ = map(_in_place, ("div_", "pow_"))  # type: ignore[assignment]

    def share_memory_(self) -> SelectedGradient:
        """Move the entries to shared memory, as in torch."""
        box, values = self._box, self._box.values
        index = box.selection.index.clone().share_memory_()
        box.place(Selection(index, box.selection.layout), values.share_memory_())
        return self

    def is_shared(self) -> bool:
        """Whether the entries are in shared memory."""
        return bool(self._box.values.is_shared())

    # Copies. They have an index of their own: the optimizer writes over its index at the next refresh.

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectedGradient:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(*copy.deepcopy(self._parts(), memo))
        made: SelectedGradient = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self._parts()

    def _parts(self) -> tuple[Any, ...]:
        selection, values = self._box.selection, self._box.values
        shape = (tuple(self.shape), self.stride(), self.dtype)
        return selection.index.clone(), selection.layout, values, self._box.fill, shape


def _rebuild(index: Tensor, layout: AnyLayout, values: Tensor, fill: float, shape: tuple[Any, ...]) -> SelectedGradient:
    size, stride, dtype = shape
    return SelectedGradient._make(Box(Selection(index, layout), values, fill=fill), size, stride, dtype, values.device)


torch.serialization.add_safe_globals([_rebuild, ColumnLayout, Layout])


def read_only(dense: Tensor, **options: Any) -> Any:
    """A numpy array that cannot be written to."""
    array = dense.numpy(**options)
    array.flags.writeable = False
    return array


def refuse(what: str, gradient: Tensor) -> NoReturn:
    """Say that a write would be lost, and what to do instead."""
    box = getattr(gradient, "_box", None)
    if box is None:
        kind = "a view of a gradient of selected weights, which is a copy of it,"
    else:
        kind = f"a gradient of {box.selection.layout.selected} selected weights out of {box.selection.layout.numel}"
    raise TypeError(
        f"{what} on {kind} would be lost: write to p.grad.entries, or make the gradient dense with "
        "p.grad = p.grad.to_dense(), or use NanoAdam(gradient_release=False)"
    )


def is_zeroed(gradient: Tensor | None) -> bool:
    """Whether there is no gradient: None, or zeroed in place and nothing added since."""
    return gradient is None or (type(gradient) is SelectedGradient and gradient._box.zeroed)


def gradient_bytes(gradient: Tensor) -> int:
    """Bytes that a gradient takes."""
    if type(gradient) is not SelectedGradient:
        parts = (gradient,) if gradient.layout == torch.strided else (gradient._indices(), gradient._values())
        return sum(part.nbytes for part in parts)
    return sum(part.nbytes for part in (gradient._box.stored, gradient._box.pending) if part is not None)
