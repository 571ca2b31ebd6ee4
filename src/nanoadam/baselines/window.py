"""The mathematics of MicroAdam on one flat tensor, in plain PyTorch on any device.

Source: arXiv 2405.15593, Algorithm 1 and its quantizer Q; `microadam.py` says where the paper leaves a choice. Blocks
are independent of each other and segments are made of whole blocks, so no result depends on how much is done at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoadam.ops.rounding import random_words, round_stochastically

BUCKET = 64
"""Weights that share a smallest and a largest error (paper, appendix on quantization)."""

MAX_BLOCK = 32768
"""Most weights in a block: a position within it fits int16."""

SEGMENT_CPU, SEGMENT_GPU = 1 << 18, 1 << 22
"""Weights worked on at once: temporary tensors take about 50 bytes for each. Never changes a result."""


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of equal length: where they lie in the flat tensor and in a row of the window."""

    start: int
    stop: int
    length: int  # weights in a block
    keep: int  # of them taken
    first: int  # place of the first block's first entry

    @property
    def blocks(self) -> int:
        """How many."""
        return (self.stop - self.start) // self.length

    @property
    def entries(self) -> slice:
        """Their places in a row of the window."""
        return slice(self.first, self.first + self.blocks * self.keep)

    @property
    def buckets(self) -> slice:
        """Their buckets of quantized error."""
        return slice(self.start // BUCKET, -(-self.stop // BUCKET))


@dataclass(frozen=True)
class Blocks:
    """How the flattened tensor is cut: full blocks, then a shorter one. Follows from the size alone."""

    numel: int
    block: int
    keep: int
    keep_tail: int

    @property
    def full(self) -> int:
        """Full blocks."""
        return self.numel // self.block

    @property
    def kept(self) -> int:
        """Entries of one sparse gradient."""
        return self.full * self.keep + self.keep_tail

    @property
    def buckets(self) -> int:
        """Buckets of quantized error, the last one perhaps not full."""
        return -(-self.numel // BUCKET)

    def parts(self, weights: int) -> Iterator[Part]:
        """All blocks in order, at most about that many weights at a time."""
        step = max(1, weights // self.block)
        for i in range(0, self.full, step):
            end = min(i + step, self.full)
            yield Part(i * self.block, end * self.block, self.block, self.keep, i * self.keep)
        if self.keep_tail:
            start = self.full * self.block
            yield Part(start, self.numel, self.numel - start, self.keep_tail, self.full * self.keep)


def blocks_of(numel: int, density: float, block_size: int) -> Blocks:
    """The blocks of a tensor of `numel` weights; each gives `ceil(density * length)` entries, as upstream."""
    block = min(block_size, numel)
    tail = numel % block
    return Blocks(numel, block, math.ceil(density * block), math.ceil(density * tail))


def quantize(error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits a value, evenly spaced between the smallest and the largest of each bucket, to nearest.

    Args:
        error: bfloat16 [buckets, BUCKET].

    Returns:
        uint8 [buckets, BUCKET // 2], the even position of a pair in the low bits; bfloat16 [buckets], smallest;
        bfloat16 [buckets], largest.
    """
    low, high = error.amin(1), error.amax(1)
    scale = _scale(low, high)
    code = ((error.float() - low.float()[:, None]) / scale.masked_fill(scale == 0, 1)[:, None] + 0.5).to(torch.uint8)
    return code[:, ::2] | code[:, 1::2] << 4, low, high


def dequantize(code: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The inverse of `quantize`: bfloat16 [buckets, BUCKET]."""
    both = torch.stack([code & 15, code >> 4], dim=2).view(code.shape[0], BUCKET)
    return (both.float() * _scale(low, high)[:, None] + low.float()[:, None]).to(torch.bfloat16)


def _scale(low: Tensor, high: Tensor) -> Tensor:
    # By a tensor: torch divides by a number on GPUs by multiplying with its inverse, which rounds differently.
    return (high.float() - low.float()) / torch.full((), 15.0, dtype=torch.float32, device=low.device)


def largest(values: Tensor, keep: int) -> Tensor:
    """Positions of the `keep` largest magnitudes of each row, equal ones by position.

    Args:
        values: bfloat16 [rows, length], length at most MAX_BLOCK. NaN counts as largest.

    Returns:
        int64 [rows, keep], ascending.
    """
    place = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    # 15 bits of magnitude, 15 of position: no two keys are equal, so every device takes the same ones.
    key = (values.view(torch.int16) & 0x7FFF).to(torch.int32) << 15 | (MAX_BLOCK - 1 - place)
    taken = key.topk(keep, dim=1, sorted=False).values & (MAX_BLOCK - 1)
    return (MAX_BLOCK - 1 - taken).sort(1).values.long()


@dataclass(frozen=True)
class Step:
    """What one step needs to know besides the tensors."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    number: int  # of this step, from 1
    window: int
    key: int | None  # of the tensor's random bits; None rounds to nearest


def update(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], blocks: Blocks, step: Step) -> None:
    """One step of Algorithm 1 on one tensor.

    Args:
        weight: flat [numel], written to.
        gradient: flat [numel], left as it is.
        state: `error`, `error_min`, `error_max`, `index`, `value`, written to; see `MicroAdam`.
    """
    row = (step.number - 1) % step.window
    for part in blocks.parts(SEGMENT_CPU if weight.device.type == "cpu" else SEGMENT_GPU):
        here = slice(part.start, part.stop)
        entries = _compress(gradient[here], state, part)
        state["index"][row, part.entries], state["value"][row, part.entries] = entries
        direction = _direction(state, part, step)
        value = weight[here].float()
        value = value * (1 - step.lr * step.weight_decay) - step.lr * direction
        if step.key is not None and weight.dtype == torch.bfloat16:
            place = torch.arange(part.start, part.stop, device=weight.device)
            value = round_stochastically(value, random_words(step.key, place)[1])
        weight[here] = value.to(weight.dtype)


def _compress(gradient: Tensor, state: Mapping[str, Tensor], part: Part) -> tuple[Tensor, Tensor]:
    """Lines 4 to 9: take the largest of gradient plus error, and keep the rest as the new error."""
    error, low, high = (state[name][part.buckets] for name in ("error", "error_min", "error_max"))
    total = (gradient.float() + dequantize(error, low, high).view(-1)[: gradient.numel()]).to(torch.bfloat16)
    rows = total.view(part.blocks, part.length)
    place = largest(rows, part.keep)
    taken = rows.gather(1, place)
    rows.scatter_(1, place, 0)
    if last := total.numel() % BUCKET:  # filled up with its smallest, which moves neither end and has the code 0
        total = torch.cat([total, total[-last:].amin().expand(BUCKET - last)])
    for old, new in zip((error, low, high), quantize(total.view(-1, BUCKET)), strict=True):
        old.copy_(new)
    return place.to(torch.int16).view(-1), taken.view(-1)


def _direction(state: Mapping[str, Tensor], part: Part, step: Step) -> Tensor:
    """Lines 10 to 12: moments from the window, corrected for bias; float32, flat."""
    first = torch.zeros(part.blocks, part.length, dtype=torch.float32, device=state["index"].device)
    second = torch.zeros_like(first)
    for row in range(min(step.number, step.window)):
        age = (step.number - 1 - row) % step.window
        place = state["index"][row, part.entries].view(part.blocks, part.keep).long()
        value = state["value"][row, part.entries].view(part.blocks, part.keep).float()
        first.scatter_add_(1, place, value * step.beta1**age)  # no position twice in a row: any order gives the same
        second.scatter_add_(1, place, value * value * step.beta2**age)
    first *= (1 - step.beta1) / (1 - step.beta1**step.number)
    second *= (1 - step.beta2) / (1 - step.beta2**step.number)
    return (first / (second.sqrt_() + step.eps)).view(-1)
