"""Patches as PEFT's SHiRA adapters, where that format can hold them.

SHiRA (Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024) keeps positions in linear layers and what is *added*
there: r * (in + out) of them in every layer, with one r for all. Other modules that change are kept whole. Where base +
(tuned - base) is not tuned in the layer's dtype, the adapter misses it by a bit, and is refused unless asked for.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.delta import DeltaError, Entry, Patch
from nanoadam.delta.patch import as_patch


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        rank: r of all layers.
        layers: linear layers with an adapter.
        whole: modules that are kept whole.
        inexact: weights that the adapter does not reach in every bit.
        weights: that the adapter holds.
    """

    rank: int
    layers: int
    whole: int
    inexact: int
    weights: int


@torch.no_grad()
def export(model: Any, patch: Patch | str | Path, folder: str | Path, *, exact: bool = True) -> Exported:
    """Write a patch as a PEFT adapter: `PeftModel.from_pretrained(base, folder)` is the finetuned model then.

    Args:
        model: the base, a transformers model; the same afterwards.
        patch: a patch or its path, under the model's own names.
        folder: where the adapter goes.
        exact: refuse a patch that the adapter would not reach in every bit.

    Raises:
        ImportError: without peft.
        DeltaError: if the format cannot hold the patch, naming what.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("export needs peft: pip install 'nanoadam[baselines]'") from error
    found = as_patch(patch)
    sparse, whole = _sort(model, found)
    if not sparse:
        raise DeltaError("there is no linear layer with single changed weights: SHiRA has nothing to hold")
    rank = max(_rank(model.get_submodule(path), entry) for path, entry in sparse.items())
    crowded = [path for path in sparse if not _fits(model.get_submodule(path), rank)]
    whole |= dict.fromkeys(crowded)
    sparse = {path: entry for path, entry in sparse.items() if path not in crowded}
    if not sparse:
        raise DeltaError("too many weights are changed: SHiRA would hold more of them than the layers have")
    added = {path: _added(model.get_submodule(path), entry) for path, entry in sparse.items()}
    inexact = sum(count for _, _, count in added.values())
    if inexact and exact:
        raise DeltaError(
            f"{inexact} weights are not base + (tuned - base) in their dtype, so the adapter would miss them by a bit: "
            "pass exact=False (--no-exact) if that will do"
        )
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    trained = {tensor: tensor.requires_grad for tensor in model.parameters()}
    shadow = copy.deepcopy(model, own)  # modules that peft may take apart, with the model's own weights in them
    masks = {id(shadow.get_submodule(path)): _mask(shadow.get_submodule(path), added[path][0], rank) for path in sparse}
    config = peft.ShiraConfig(
        r=rank,
        mask_type="nanoadam",
        target_modules="|".join(map(re.escape, sparse)),
        modules_to_save=list(whole) or None,
        inference_mode=True,  # else it warns of the mask's name
    )
    config.inference_mode = False
    config.mask_fn = lambda layer, r, **_: masks[id(layer)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(shadow, config)
        for path in sparse:
            _fill(adapted.base_model.model.get_submodule(path), *added[path][:2])
        for path in whole:
            _keep(adapted.base_model.model.get_submodule(path), path, found)
        adapted.save_pretrained(str(folder))
    for parameter, was_trained in trained.items():
        parameter.requires_grad_(was_trained)
    return Exported(rank, len(sparse), len(whole), inexact, sum(entry.count for entry in sparse.values()))


def _sort(model: nn.Module, patch: Patch) -> tuple[dict[str, Entry], dict[str, None]]:
    """Linear layers whose weight alone changes, by path, and modules to be kept whole."""
    by_module: dict[str, list[Entry]] = {}
    for entry in patch.values():
        if entry.tied:
            raise DeltaError(f"{entry.name} is tied to {entry.tied[0]}: an adapter would change one of the two")
        by_module.setdefault(entry.name.rpartition(".")[0], []).append(entry)
    sparse: dict[str, Entry] = {}
    whole: dict[str, None] = {}
    for path, entries in by_module.items():
        module = model.get_submodule(path)
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        for entry in entries:
            if entry.name.rpartition(".")[2] in buffers:
                raise DeltaError(f"{entry.name} is a buffer, and adapters hold parameters only")
        alone = len(entries) == 1 and entries[0].name.endswith("weight")
        if isinstance(module, nn.Linear) and alone and entries[0].kind in ("sparse", "columns"):
            sparse[path] = entries[0]
        else:
            whole[path] = None
    return sparse, whole


def _rank(layer: Any, entry: Entry) -> int:
    return -(-entry.count // int(layer.in_features + layer.out_features))


def _fits(layer: Any, rank: int) -> bool:
    return bool(rank * (layer.in_features + layer.out_features) <= layer.weight.numel())


def _added(layer: nn.Linear, entry: Entry) -> tuple[Tensor, Tensor, int]:
    """Positions, what is to be added there, and how many weights that does not reach exactly."""
    entry = entry.to(layer.weight.device)
    positions, base = entry.positions(), layer.weight.detach().reshape(-1)
    before, tuned = base[positions], entry.values.reshape(-1)
    if entry.dtype != base.dtype:
        raise DeltaError(f"{entry.name} is {entry.dtype} in the patch and {base.dtype} in the model: load the base so")
    difference = (tuned.double() - before.double()).to(before.dtype)
    for step in (1, -1):  # a neighbour may do where the nearest one does not
        missed = before + difference != tuned
        near = torch.nextafter(difference, torch.full_like(difference, step * torch.inf))
        difference = torch.where(missed & (before + near == tuned), near, difference)
    return positions, difference, int((before + difference != tuned).sum())


def _mask(layer: Any, positions: Tensor, rank: int) -> Tensor:
    """R * (in + out) places: those that change, and the first others."""
    mask = torch.zeros(layer.weight.numel(), dtype=torch.bool, device=layer.weight.device)
    mask[positions] = True
    spare = rank * (layer.in_features + layer.out_features) - len(positions)
    mask[(~mask).nonzero().view(-1)[:spare]] = True
    return mask.view(layer.weight.shape)


def _fill(adapter: Any, positions: Tensor, difference: Tensor) -> None:
    (weight,) = adapter.shira_weight.values()
    rows, columns = next(iter(adapter.shira_indices.values())).to(torch.int64)
    places = rows * adapter.in_features + columns
    weight.zero_()
    weight[torch.searchsorted(places, positions)] = difference.to(weight.dtype)


def _keep(wrapper: Any, path: str, patch: Patch) -> None:
    (copy,) = wrapper.modules_to_save.values()
    for name, parameter in copy.named_parameters():
        entry = patch.get(f"{path}.{name}")
        if entry is None:
            continue
        if tuple(parameter.shape) != entry.shape:
            raise DeltaError(f"{entry.name} has another shape in the base: load it with the finetuned configuration")
        flat = parameter.detach().view(-1)
        flat[entry.positions().to(flat.device)] = entry.values.reshape(-1).to(flat.device)


__all__ = ["Exported", "export"]
