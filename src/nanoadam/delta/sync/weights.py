"""Patches as vLLM's `sparse_nccl` weight transfer takes them: flat indices and values in checkpoint coordinates.

Source: vllm/distributed/weight_transfer/sparse_nccl_engine.py, class SparseWeightPatch (vLLM 0.33). vLLM takes
contiguous one-dimensional tensors, int32 indices without repeats, floating dtypes, no NaN, and no dense patch beside a
sparse one: what is whole goes as all of its indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoadam.delta.application import Application
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.patch import Patch


@dataclass
class SparseWeightPatch:
    """A sparse patch in checkpoint coordinates, with the fields of vLLM's class of this name.

    Attributes:
        name: in the checkpoint.
        indices: int32 [n], row-major, ascending.
        values: [n], contiguous, of the weight's dtype.
        full_shape: of the checkpoint's tensor.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def weight_patches(patch: Patch) -> list[SparseWeightPatch]:
    """A patch in the form of vLLM, on the patch's devices.

    Args:
        patch: under checkpoint names (`Coordinates.patch` where the model has fused tensors).

    Raises:
        DeltaError: for a tensor of 2**31 weights or more, whose indices int32 does not hold.
    """
    return [_weight_patch(entry) for entry in patch.values()]


def _weight_patch(entry: Entry) -> SparseWeightPatch:
    if entry.numel >= 2**31:
        raise DeltaError(f"{entry.name} has {entry.numel} weights: flat int32 indices end at 2**31")
    listed = entry.parts.get("positions") if entry.kind == "sparse" else None
    positions = entry.positions() if listed is None else listed
    return SparseWeightPatch(
        entry.name, positions.to(torch.int32).contiguous(), entry.values.reshape(-1).contiguous(), entry.shape
    )


def apply_weight_patches(model: Any, patches: Iterable[SparseWeightPatch]) -> None:
    """Write patches to a module or state dict. All are checked first.

    Raises:
        DeltaError: if one does not fit the model: its name, shape or dtype, indices that are out of range, repeated or
            out of order, strided tensors. Not one weight is changed then.
    """
    entries = {}
    for patch in patches:
        if patch.name in entries:
            raise DeltaError(f"{patch.name} comes twice: give one patch a tensor")
        entries[patch.name] = _entry(patch)
    with torch.no_grad():
        Application(model, Patch(entries), 1.0, verify=False, keep=False).run()


def _entry(patch: SparseWeightPatch) -> Entry:
    indices, values, shape = patch.indices, patch.values, tuple(patch.full_shape)
    if indices.dtype != torch.int32:
        raise DeltaError(f"{patch.name}: indices must be int32, got {indices.dtype}")
    if indices.dim() != 1 or values.dim() != 1 or len(indices) != len(values):
        raise DeltaError(
            f"{patch.name}: indices and values must be one-dimensional and equally long, got {list(indices.shape)} "
            f"and {list(values.shape)}"
        )
    if not indices.is_contiguous() or not values.is_contiguous():
        raise DeltaError(f"{patch.name}: indices and values must be contiguous: send .contiguous() ones")
    if math.prod(shape) < len(indices):
        raise DeltaError(f"{patch.name}: {len(indices)} indices for a tensor of shape {list(shape)}")
    return Entry(patch.name, "sparse", values.dtype, shape, {"positions": indices, "values": values}, len(indices))
