"""Checkpoint coordinates: where the weights of a fused tensor lie in the tensors that a checkpoint holds instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.patch import Patch


@dataclass(frozen=True)
class Piece:
    """A part of a model's tensor that is a checkpoint's tensor: the view of it with this offset and these strides.

    `fused.flatten().as_strided(shape, strides, offset)` is the checkpoint's tensor.

    Attributes:
        name: in the checkpoint.
        shape: in the checkpoint.
        offset: of its first element in the flattened (row-major) tensor of the model.
        strides: there, of each dimension.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the model's positions (int64) lie in it (bool), and where: int64, valid where so."""
        rest = positions - self.offset
        inside, place = rest >= 0, torch.zeros_like(rest)
        steps = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        for size, stride, step in sorted(zip(self.shape, self.strides, steps, strict=True), key=lambda of: -of[1]):
            if size == 1:
                continue
            number = torch.div(rest, stride, rounding_mode="floor")
            inside &= number < size
            rest, place = rest - number * stride, place + number * step
        return inside & (rest == 0), place


class Coordinates:
    """The tensors of a model that a checkpoint holds as others, and which.

    Args:
        pieces: for a tensor of the model, by its name: the checkpoint's tensors that it consists of. Names that are
            missing are the same in both.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.pieces = {name: tuple(own) for name, own in pieces.items()}
        self._checked: set[str] = set()

    def patch(self, patch: Patch) -> Patch:
        """The same patch in the checkpoint's names and positions.

        Tensors that are only renamed keep their hashes; those that are taken apart have none.

        Raises:
            DeltaError: if pieces do not make up a tensor.
        """
        entries: dict[str, Entry] = {}
        for entry in patch.values():
            name = next((each for each in (entry.name, *entry.tied) if each in self.pieces), None)
            for own in [entry] if name is None else self._split(entry, self.pieces[name]):
                entries[own.name] = own
        return replace(patch, entries=entries, untouched=None)

    def _split(self, entry: Entry, pieces: Sequence[Piece]) -> list[Entry]:
        self._check(entry, pieces)
        if len(pieces) == 1 and pieces[0].shape == entry.shape and pieces[0].strides == _contiguous(entry.shape):
            return [replace(entry, name=pieces[0].name, tied=())]
        if entry.kind in ("dense", "new"):
            return [_whole(entry, piece) for piece in pieces]
        positions, values = entry.positions(), entry.values.reshape(-1)
        split = [self._part(entry, piece, positions, values) for piece in pieces]
        return [part for part in split if part.count]

    def _check(self, entry: Entry, pieces: Sequence[Piece]) -> None:
        """Once a tensor: every weight lies in one piece."""
        if entry.name in self._checked:
            return
        there = torch.zeros(entry.numel, dtype=torch.bool)
        reach = max(p.offset + sum((n - 1) * s for n, s in zip(p.shape, p.strides, strict=True)) for p in pieces)
        if sum(math.prod(piece.shape) for piece in pieces) == entry.numel and reach < entry.numel:
            for piece in pieces:
                there.as_strided(piece.shape, piece.strides, piece.offset).fill_(True)
        if not there.all():
            raise DeltaError(f"{entry.name}: {', '.join(piece.name for piece in pieces)} do not make it up")
        self._checked.add(entry.name)

    def _part(self, entry: Entry, piece: Piece, positions: Tensor, values: Tensor) -> Entry:
        inside, places = piece.places(positions)
        chosen = inside.nonzero().view(-1)
        places, order = places[chosen].sort()
        parts = {"positions": places.to(torch.int32 if entry.numel < 2**31 else torch.int64)}
        parts["values"] = values[chosen[order]]
        return Entry(piece.name, "sparse", entry.dtype, piece.shape, parts, len(places))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _whole(entry: Entry, piece: Piece) -> Entry:
    values = entry.values.reshape(-1).as_strided(piece.shape, piece.strides, piece.offset).contiguous()
    return Entry(piece.name, entry.kind, entry.dtype, piece.shape, {"values": values}, values.numel())
