"""What a view of a gradient of selected weights is."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from nanoadam.gradients import tensor


class DenseCopy(Tensor):
    """A view of a gradient: a dense copy that refuses to be written to, since the gradient would not change."""

    _dense: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, dense: Tensor) -> DenseCopy:
        """Refuse to be written to from now on."""
        size, stride = dense.shape, dense.stride()
        made = torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dense.dtype, device=dense.device)
        torch._C._set_throw_on_mutable_data_ptr(made)  # for what would read memory that is not there
        made._dense = dense
        return made

    def __init__(self, _: Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return tensor.dispatch[0](func, args, kwargs or {})

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """A dense tensor of one's own."""
        return self._dense.to(dtype or self.dtype, copy=True)

    def numpy(self, **options: Any) -> Any:
        """A copy, which refuses to be written to."""
        return tensor.read_only(self.to_dense(), **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        return array.astype(dtype or array.dtype) if copy or dtype else array

    def __dlpack__(self, **options: Any) -> Any:
        return self.to_dense().__dlpack__(**options)

    def tolist(self) -> Any:
        """As in torch."""
        return self._dense.tolist()

    def data_ptr(self) -> int:
        """Of the copy."""
        return self._dense.data_ptr()

    def share_memory_(self) -> NoReturn:
        """It would be the copy that is shared.

        Raises:
            TypeError: always.
        """
        tensor.refuse("share_memory_()", self)

    def is_shared(self) -> bool:
        """Whether the copy is in shared memory."""
        return bool(self._dense.is_shared())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.to_dense()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"read-only view of a SelectedGradient: {self._dense!r}"


def dense_of(value: Any) -> Tensor:
    """A dense tensor with what a gradient reads as."""
    dense: Tensor = value._dense if isinstance(value, DenseCopy) else value.to_dense()
    return dense
