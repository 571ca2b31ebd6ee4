"""MicroAdam's step on GPUs: `window.update` for a list of tensors, one launch for those alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nanoadam.baselines import window_kernels as kernels
from nanoadam.baselines.window import BUCKET, Blocks, Step
from nanoadam.ops.tables import TYPES, block_rows, on, signed, upload

MAX_BLOCK = 8192
"""Weights in a block that a program can hold in registers."""

_PROGRAMS_PER_CORE = 4  # more hide latency better, until their scratch memory no longer fits the L2 cache
_INTERPRETED_PROGRAMS = 2
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Job:
    """One tensor: what `window.update` takes, and its ordinal in the optimizer."""

    weight: Tensor  # contiguous
    gradient: Tensor  # contiguous
    state: dict[str, Tensor]
    blocks: Blocks
    ordinal: int


def serves(weight: Tensor, blocks: Blocks) -> bool:
    """Whether the kernel can: contiguous weights, blocks of a size that fits."""
    return weight.is_contiguous() and blocks.block <= MAX_BLOCK


def update(jobs: Sequence[Job], step: Step, key: int | None) -> None:
    """One step of Algorithm 1.

    Args:
        jobs: tensors of one device that have had the same number of steps.
        step: as in `window.update`, but for its `key`.
        key: of the optimizer's random bits; None rounds to nearest.
    """
    kinds: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        size = max(BUCKET, triton.next_power_of_2(job.blocks.block))
        kinds.setdefault((job.weight.dtype, job.gradient.dtype, size, job.weight.numel() >= 2**31), []).append(job)
    for (weight_type, gradient_type, size, wide), members in kinds.items():
        rows: list[list[int]] = []
        counts: list[int] = []
        for job in members:
            rows.append(_row(job, sum(counts)))
            counts.append(job.blocks.full + (job.blocks.keep_tail > 0))
        device = members[0].weight.device
        blocks = sum(counts)
        programs = min(blocks, _programs(device))
        registers = {"maxnreg": 128} if device.type == "cuda" and torch.version.cuda else {}  # two programs a core
        rows_of_window = triton.next_power_of_2(step.window)
        lanes = triton.next_power_of_2(max(max(job.blocks.keep, job.blocks.keep_tail) for job in members))
        small = rows_of_window * lanes <= size // 4
        with on(device):
            kernels.step[(programs,)](
                upload(rows, device),
                block_rows(tuple(counts), device),
                _factors(step).to(device),
                torch.empty(programs, 2, size, dtype=torch.float32, device=device),
                torch.empty(programs, size, dtype=torch.int16, device=device),
                blocks,
                (step.number - 1) % step.window,
                min(step.number, step.window),
                (1 - step.beta1) / (1 - step.beta1**step.number),
                (1 - step.beta2) / (1 - step.beta2**step.number),
                step.lr,
                1 - step.lr * step.weight_decay,
                step.eps,
                signed(key or 0),
                step.number,
                WEIGHT_TYPE=TYPES[weight_type],
                GRADIENT_TYPE=TYPES[gradient_type],
                STOCHASTIC=key is not None,
                BLOCK=size,
                LANES=lanes,
                ROWS=rows_of_window,
                SMALL=small,
                DENSE=step.weight_decay != 0 or not small,
                WIDE=wide,
                INTERPRETED=_INTERPRETED,
                num_warps=max(1, min(16, size // 512)),
                enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
                **registers,
            )


def _row(job: Job, first: int) -> list[int]:
    names = ("error", "error_min", "error_max", "index", "value")
    return [
        job.weight.data_ptr(),
        job.gradient.data_ptr(),
        *(job.state[name].data_ptr() for name in names),
        job.ordinal,
        job.blocks.numel,
        job.blocks.block,
        job.blocks.keep,
        job.blocks.keep_tail,
        job.blocks.kept,
        first,
    ]


def _factors(step: Step) -> Tensor:
    """float32 [window, 2]: what an entry weighs in the two moments, by the row of the window it is in."""
    ages = [(step.number - 1 - row) % step.window for row in range(step.window)]
    return torch.tensor([[step.beta1**age, step.beta2**age] for age in ages], dtype=torch.float32)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_PER_CORE * int(torch.cuda.get_device_properties(device).multi_processor_count)
