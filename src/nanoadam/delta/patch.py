"""A patch: what a finetune made of a base model, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
        """The positions of a sparse entry, coded."""
        if not self.is_coded:
            from nanoadam.delta.ops import backend  # which knows entries

            return backend(self.values.device).encode(self.parts["positions"], self.numel)
        low = self.parts["low"] if self.bits else self.parts["gaps"].new_empty(0)
        return Coded(self.parts["gaps"], low, self.parts["blocks"], self.bits, self.count)

    def coded(self) -> Entry:
        """The same with its positions coded, as files hold them."""
        if self.kind != "sparse" or self.is_coded:
            return self
        code = self.code()
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
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

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


@dataclass(frozen=True, eq=False)
class Patch(Mapping[str, Entry]):
    """What a finetune made of a base model: entries by name of the tensor. Tensors without an entry stay as they are.

    Attributes:
        entries: by name.
        base: the name of the base model, for people.
        prefix: what the names have in front that the base's own do not have (`bert.`, where the base is saved
            without a head).
        removed: tensors of the base that the finetuned model has not, under the base's own names.
        untouched: int64 [n, 2]: for each tensor without an entry, `name_key` of its name and its hash. `verify` holds
            a base against it. None where it is not known.
        notes: what else is to be said, as texts: versions of what made it, number of an update.
    """

    entries: Mapping[str, Entry]
    base: str = ""
    prefix: str = ""
    removed: tuple[str, ...] = ()
    untouched: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # a mapping's would compare tensors

    def __repr__(self) -> str:
        return f"Patch({len(self)} tensors, {self.count} weights, {self.nbytes / 1e6:.3g} MB)"

    @property
    def count(self) -> int:
        """Weights that the entries hold."""
        return sum(entry.count for entry in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, as they are kept now."""
        return sum(entry.nbytes for entry in self.values())

    def coded(self) -> Patch:
        """The same with all positions coded, which takes a third less memory than int32."""
        return replace(self, entries={name: entry.coded() for name, entry in self.items()})

    def to(self, device: torch.device | str) -> Patch:
        """The same, read into memory, on a device."""
        whole = getattr(self.entries, "to", None)
        if whole is not None:
            return replace(self, entries=whole(device))
        return replace(self, entries={name: entry.to(device) for name, entry in self.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file (docs/delta-format.md), whole or not at all.

        Raises:
            DeltaError: if it cannot be written; what stood there before stays.
        """
        from nanoadam.delta.format import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Patch:
        """Open a patch; its tensors are read when they are needed.

        Args:
            path: the file, or a folder with a `delta.safetensors`.
            verify: hold the file against its SHA-256.

        Raises:
            DeltaError: if it is no whole patch, naming what is wrong.
        """
        from nanoadam.delta.format import load

        return load(path, verify=verify)


def as_patch(given: Any, *, verify: bool = True) -> Patch:
    """A patch, or the one in a file.

    Raises:
        DeltaError: as `Patch.load`.
    """
    if isinstance(given, Patch):
        return given
    if isinstance(given, (str, os.PathLike)):
        return Patch.load(given, verify=verify)
    raise DeltaError(f"a patch is a nanoadam.delta.Patch or the path of one, got {type(given).__name__}")
