"""How a weight tensor is cut into chunks, and how many weights each chunk keeps; or how many of its columns are kept.

Everything here follows from the shape (and the density) alone, so two processes, two devices and two runs
that hold the same tensor always agree. Source: Algorithm 1 of the paper cuts each tensor into chunks and
takes the bottom k of each; chunk size and rounding are left open there and fixed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHUNK = 4096
"""Most weights in a chunk. One row of a 4096-wide model; 16 KB of float32, which fits a GPU block's registers."""

_PIECE_ALIGN = 64
"""Pieces of a long row start at multiples of this, so that a GPU reads them in whole cache lines."""


INDEX_BYTES = 2
"""Bytes of a selected weight's position in its chunk (int16)."""

ENTRY_BYTES = 2
"""Bytes of the step at which a selected weight entered, kept where moments are carried over."""


@dataclass(frozen=True)
class Layout:
    """The chunks of one tensor, as `lines` equal runs of `line` weights, each cut into chunks of `chunk`.

    The last chunk of a line is shorter where `chunk` does not divide `line`. Selected weights are stored
    chunk after chunk: `keep` for a full chunk, `keep_tail` for a short one.
    """

    lines: int
    line: int
    chunk: int
    keep: int
    keep_tail: int

    @property
    def full(self) -> int:
        """Full chunks in a line."""
        return self.line // self.chunk

    @property
    def tail(self) -> int:
        """Weights in the short last chunk of a line; 0 if there is none."""
        return self.line % self.chunk

    @property
    def per_line(self) -> int:
        """Chunks in a line, the short one included."""
        return self.full + (self.tail > 0)

    @property
    def chunks(self) -> int:
        """Chunks in the tensor."""
        return self.lines * self.per_line

    @property
    def kept_per_line(self) -> int:
        """Selected weights in a line."""
        return self.full * self.keep + self.keep_tail

    @property
    def selected(self) -> int:
        """Selected weights in the tensor."""
        return self.lines * self.kept_per_line

    @property
    def places(self) -> int:
        """Numbers that say which they are."""
        return self.selected

    @property
    def shape(self) -> tuple[int, ...]:
        """Of moments and gradients of the selected weights."""
        return (self.selected,)

    @property
    def numel(self) -> int:
        """Weights in the tensor."""
        return self.lines * self.line


def keep_count(length: int, density: float) -> int:
    """How many of `length` weights a density keeps: `round(density * length)`, but at least 1."""
    return min(length, max(1, round(density * length)))


def layout(shape: Sequence[int], density: float) -> Layout:
    """The chunks of a tensor of this shape, each keeping the share `density` of its weights.

    The tensor is seen as a matrix of `shape[0]` rows. A chunk is a block of whole rows, a power of two of
    them, so that sharding along dimension 0 falls between chunks in the usual cases. A row longer than
    `MAX_CHUNK` is cut into pieces of equal length, the last one shorter.

    Args:
        shape: at least one dimension, no empty one.
        density: share of the weights to keep, in (0, 1].

    Raises:
        ValueError: for an empty or zero-dimensional shape, or a density outside (0, 1].
    """
    numel = math.prod(shape)
    if len(shape) == 0 or numel == 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} has no chunks: treat it as dense")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    rows, cols = shape[0], numel // shape[0]
    if cols <= MAX_CHUNK:
        block = 1 << ((MAX_CHUNK // cols).bit_length() - 1)
        lines, line, chunk = 1, numel, min(numel, block * cols)
    else:
        pieces = -(-cols // MAX_CHUNK)
        piece = -(-cols // pieces)
        lines, line, chunk = rows, cols, min(MAX_CHUNK, -(-piece // _PIECE_ALIGN) * _PIECE_ALIGN)
    tail = line % chunk
    return Layout(lines, line, chunk, keep_count(chunk, density), keep_count(tail, density) if tail else 0)


def nanoadam_state(selected: int, dense: int, state_bytes: int = 2, *, carried: bool = False) -> int:
    """Bytes of NanoAdam's state for that many selected and dense weights.

    Args:
        selected: selected weights: an index and two moments each, and the entry step if `carried`.
        dense: weights under ordinary AdamW: two moments each.
        state_bytes: bytes of one moment.
        carried: whether moments are carried over at a refresh (`moments="carry"`, the optimizer's default).
    """
    return selected * (INDEX_BYTES + ENTRY_BYTES * carried + 2 * state_bytes) + dense * 2 * state_bytes


@dataclass(frozen=True)
class ColumnLayout:
    """Whole input columns of a linear layer's weight, as one chunk of `columns` candidates of `outputs` weights each.

    What belongs to the selected weights is stored column after column: [keep, outputs].
    """

    outputs: int
    columns: int
    keep: int
    transposed: bool = False
    """The weight is stored [columns, outputs], as transformers' Conv1D does, and not [outputs, columns]."""

    @property
    def selected(self) -> int:
        """Selected weights in the tensor."""
        return self.keep * self.outputs

    @property
    def places(self) -> int:
        """Numbers that say which they are."""
        return self.keep

    @property
    def numel(self) -> int:
        """Weights in the tensor."""
        return self.columns * self.outputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of moments and gradients of the selected weights."""
        return self.keep, self.outputs

    @property
    def input_dim(self) -> int:
        """The weight's dimension that counts columns."""
        return 0 if self.transposed else 1


def column_layout(shape: Sequence[int], density: float, *, transposed: bool = False) -> ColumnLayout:
    """The columns of a weight of two dimensions, of which the share `density` is kept, at least one.

    Raises:
        ValueError: for another number of dimensions, an empty one, or a density outside (0, 1].
    """
    if len(shape) != 2 or math.prod(shape) == 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} has no columns to select: select its weights one by one")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    columns, outputs = shape if transposed else (shape[1], shape[0])
    return ColumnLayout(outputs, columns, keep_count(columns, density), transposed)


AnyLayout = Layout | ColumnLayout
"""How a tensor is selected from: weight by weight, or by whole columns."""


def state_bytes(layout: AnyLayout, moment: int, *, carried: bool = True) -> int:
    """Bytes of NanoAdam's state for one tensor, its step count aside.

    Args:
        moment: bytes of one moment.
        carried: whether moments are carried over at a refresh, which takes the step at which each weight or column
            entered.
    """
    index = 4 if isinstance(layout, ColumnLayout) else INDEX_BYTES
    return 2 * moment * layout.selected + layout.places * (index + ENTRY_BYTES * carried)
