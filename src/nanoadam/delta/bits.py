"""Tensors as bits: every dtype that safetensors stores is copied and compared as integers of its size.

Floating point would lose what this room promises to keep: the payload of a NaN, the sign of a zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanoadam.delta.errors import DeltaError

_OPTIONAL = {  # newer than the oldest torch that is served
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **{name: getattr(torch, own) for name, own in _OPTIONAL.items() if hasattr(torch, own)},
}
"""The dtypes that are served, under the names that safetensors gives them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The name of a dtype in safetensors.

    Raises:
        DeltaError: for a dtype that no safetensors file holds, naming the tensor.
    """
    try:
        return NAMES[dtype]
    except KeyError:
        raise DeltaError(
            f"{where} has dtype {str(dtype).removeprefix('torch.')}, which a patch cannot hold: it can hold "
            f"{', '.join(str(known).removeprefix('torch.') for known in NAMES)}"
        ) from None


def integer(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype that has the size of `dtype`."""
    return _INTEGERS[dtype.itemsize]


def bits(tensor: Tensor) -> Tensor:
    """The same memory, each element seen as an integer of its size."""
    return tensor.detach().view(integer(tensor.dtype))


def flat(tensor: Tensor) -> Tensor:
    """The elements in row-major order as bits, one dimension, one after the other: a view where they lie so."""
    row = tensor.detach().reshape(-1).contiguous()
    return bits(row.as_strided(row.shape, (1,)))  # a single element may have any stride and count as contiguous


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; they may be on different devices."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(flat(a), flat(b).to(a.device))


def extent(tensor: Tensor) -> Tensor:
    """All of a tensor's memory from its first element on, as one dimension of bits: writable whatever the strides."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        reach = 0
    return bits(tensor.detach().as_strided((reach,), (1,)))


def offsets(position: Tensor, tensor: Tensor) -> Tensor:
    """Where the elements at row-major positions (int64) lie in `extent(tensor)`."""
    if tensor.is_contiguous():
        return position
    offset, rest = torch.zeros_like(position), position
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offset += rest % size * stride
        rest = rest // size
    return offset


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
