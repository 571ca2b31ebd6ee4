"""What becomes of one tensor: which of its weights change, and what they are afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoadam.delta import coding
from nanoadam.delta.bits import bits as as_bits
from nanoadam.delta.coding import Coded
from nanoadam.delta.errors import DeltaError

KINDS = ("sparse", "columns", "dense", "new")
"""Single weights; whole columns of a matrix; all weights; a tensor that the base lacks or has in another form."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What becomes of one tensor. Values are absolute: what the weights are afterwards, not by how much they differ.

    Attributes:
        name: of the tensor in the model.
        kind: one of KINDS.
        dtype: of the tensor and of the values.
        shape: of the tensor.
        parts: `values`, and where they go. sparse: values [count] and either `positions` (ascending, row-major, int32
            or int64) or their code, `gaps`, `low` and `blocks` (coding.py). columns: values [rows, columns] and
            `columns` (int32, ascending) of the tensor seen as a matrix of shape[-1] columns. dense, new: values
            [*shape].
        count: weights that the entry holds.
        bits: low bits of coded positions.
        base: hash of the tensor before, None where it is not known or does not matter (new).
        result: hash of the tensor afterwards, None where it is not known.
        tied: other names that the model has for the same tensor.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    count: int
    bits: int = 0
    base: int | None = None
    result: int | None = None
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts, as they are kept now."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def values(self) -> Tensor:
        """What the weights are afterwards."""
        return self.parts["values"]

    @property
    def is_coded(self) -> bool:
        """Whether the positions of a sparse entry are coded."""
        return "gaps" in self.parts

    def code(self) -> Coded:
        """The code of an entry whose positions are coded."""
        low = self.parts["low"] if self.bits else self.parts["gaps"].new_empty(0)
        return Coded(self.parts["gaps"], low, self.parts["blocks"], self.bits, self.count)

    def with_code(self, code: Coded) -> Entry:
        """The same with its positions coded, as files hold them."""
        parts = {"values": self.values, "gaps": code.gaps, "blocks": code.blocks}
        if code.bits:
            parts["low"] = code.low
        return replace(self, parts=parts, bits=code.bits)

    def positions(self) -> Tensor:
        """Row-major positions of all weights that the entry holds: int64 [count], in the order of the values.

        Raises:
            DeltaError: if they are out of order or out of range.
        """
        if self.kind == "sparse":
            if self.is_coded:
                return coding.decode(self.code(), self.numel, self.name)
            positions = self.parts["positions"].to(torch.int64)
            if not is_ascending(positions, self.numel):
                raise coding.damaged(self.name)
            return positions
        if self.kind == "columns":
            columns, width = self.columns(), self.shape[-1]
            rows = torch.arange(self.numel // width, device=columns.device)
            return (rows[:, None] * width + columns).view(-1)
        return torch.arange(self.numel, device=self.values.device)

    def columns(self) -> Tensor:
        """Columns of a columns entry: int64.

        Raises:
            DeltaError: if they are out of order or out of range.
        """
        columns = self.parts["columns"].to(torch.int64)
        if not is_ascending(columns, self.shape[-1]):
            raise DeltaError(f"{self.name}: its columns are out of order or out of range: the patch is damaged")
        return columns

    def to(self, device: torch.device | str) -> Entry:
        """The same with its parts on a device."""
        ahead = torch.device(device).type != "cpu"  # to the host, nobody would wait for the end of the copy
        return replace(self, parts={name: part.to(device, non_blocking=ahead) for name, part in self.parts.items()})

    def with_values(self, values: Tensor, *, base: int | None, result: int | None) -> Entry:
        """Other values for the same weights."""
        return replace(self, parts={**self.parts, "values": values}, base=base, result=result)


def is_ascending(positions: Tensor, below: int) -> bool:
    """Whether int64 positions ascend strictly from 0 on and stay below a limit."""
    if not positions.numel():
        return True
    inside = (positions[0] >= 0) & (positions[-1] < below)
    return bool(inside & (positions[1:] > positions[:-1]).all())


def check_values(entry: Entry) -> None:
    """Refuse a bool that is neither 0 nor 1: what torch makes of one is not defined.

    Raises:
        DeltaError: naming the tensor.
    """
    if entry.dtype == torch.bool and bool((as_bits(entry.values) > 1).any()):
        raise DeltaError(f"{entry.name}: a bool that is neither 0 nor 1: the patch is damaged")
