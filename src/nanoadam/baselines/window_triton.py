"""MicroAdam's step on GPUs: `window.update` for a list of tensors, two launches for those alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nanoadam.baselines import window_kernels as kernels
from nanoadam.baselines.window import BUCKET, Blocks, Step
from nanoadam.ops import tables
from nanoadam.ops.tables import TYPES, block_rows, on, signed, upload

MAX_BLOCK = 8192
"""Weights in a block that a program can hold in registers."""

# Programs per core: more hide latency better, until their scratch memory no longer fits the L2 cache.
_COMPRESSING = 4
_MOVING_FEW = 16
_MOVING_ALL = 4
_COMPRESSING_REGISTERS = 128  # a thread: two programs a core
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
    kinds: dict[_Kind, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(_kind(job), []).append(job)
    for kind, members in kinds.items():
        with on(members[0].weight.device):
            _launch(kind, members, step, key)


@dataclass(frozen=True)
class _Kind:
    """What the tensors of a launch have in common."""

    weight: torch.dtype
    gradient: torch.dtype
    size: int  # a power of 2, at least the weights of a block
    wide: bool  # positions beyond 31 bits
    aligned: bool  # what is read several at a time lies at multiples of 16 bytes, and there are whole buckets of it


def _kind(job: Job) -> _Kind:
    return _Kind(
        weight=job.weight.dtype,
        gradient=job.gradient.dtype,
        size=max(BUCKET, triton.next_power_of_2(job.blocks.block)),
        wide=job.blocks.numel >= tables.WIDE_FROM,
        aligned=job.blocks.numel % BUCKET == 0
        and job.gradient.data_ptr() % 16 == 0
        and job.state["error"].data_ptr() % 16 == 0,
    )


def _launch(kind: _Kind, jobs: Sequence[Job], step: Step, key: int | None) -> None:
    rows: list[list[int]] = []
    counts: list[int] = []
    for job in jobs:
        rows.append(_row(job, sum(counts)))
        counts.append(job.blocks.full + (job.blocks.keep_tail > 0))
    device, blocks = jobs[0].weight.device, sum(counts)
    table, tensor_of = upload(rows, device), block_rows(tuple(counts), device)
    common = {"BLOCK": kind.size, "WIDE": kind.wide, "enable_fp_fusion": False}  # fused: rounded once, not twice
    many = max(1, min(16, kind.size // 512))
    kernels.compress[(_programs(device, blocks, _COMPRESSING),)](
        table,
        tensor_of,
        blocks,
        (step.number - 1) % step.window,
        (step.number - 2) % step.window if step.number > 1 else -1,
        GRADIENT_TYPE=TYPES[kind.gradient],
        ALIGNED=kind.aligned,
        INTERPRETED=_INTERPRETED,
        num_warps=many,
        **common,
        **_registers(device, _COMPRESSING_REGISTERS),
    )
    most = max(max(job.blocks.keep, job.blocks.keep_tail) for job in jobs)
    entries = triton.next_power_of_2(step.window * most)
    few = step.weight_decay == 0 and entries <= kind.size // 4
    common |= {"WEIGHT_TYPE": TYPES[kind.weight], "STOCHASTIC": key is not None}
    window = _factors(step).to(device)
    shared = (
        blocks,
        min(step.number, step.window),
        (1 - step.beta1) / (1 - step.beta1**step.number),
        (1 - step.beta2) / (1 - step.beta2**step.number),
        step.lr,
        1 - step.lr * step.weight_decay,
        step.eps,
        signed(key or 0),
        step.number,
    )
    if few:
        programs = _programs(device, blocks, _MOVING_FEW)
        scratch = torch.empty(programs, 2, entries, dtype=torch.float32, device=device)
        owners = torch.empty(programs, kind.size, dtype=torch.int16, device=device)
        few_warps = max(1, entries // 128)
        kernels.move_few[(programs,)](
            table, tensor_of, window, scratch, owners, *shared, ENTRIES=entries, num_warps=few_warps, **common
        )
    else:
        programs = _programs(device, blocks, _MOVING_ALL)
        scratch = torch.empty(programs, 2, kind.size, dtype=torch.float32, device=device)
        lanes = triton.next_power_of_2(most)
        kernels.move_all[(programs,)](table, tensor_of, window, scratch, *shared, LANES=lanes, num_warps=many, **common)


def _registers(device: torch.device, most: int) -> dict[str, int]:
    """The option that limits registers of a thread, where there is one."""
    return {"maxnreg": most} if device.type == "cuda" and torch.version.cuda else {}


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


def _programs(device: torch.device, blocks: int, per_core: int) -> int:
    if device.type != "cuda":
        return min(blocks, _INTERPRETED_PROGRAMS)
    return min(blocks, per_core * int(torch.cuda.get_device_properties(device).multi_processor_count))
