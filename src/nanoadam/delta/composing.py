"""compose: two patches, one after the other, as one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nanoadam.delta import ops
from nanoadam.delta.bits import flat
from nanoadam.delta.diffing import name_key, versions
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.hashing import signed
from nanoadam.delta.patch import Patch, as_patch


def compose(first: Patch | str | os.PathLike[str], second: Patch | str | os.PathLike[str]) -> Patch:
    """The patch that does what `first` and then `second` do.

    `second` was made on what `first` makes (ordered), or on the same base and changes other weights (disjoint);
    tensor by tensor, one or the other.

    Returns:
        A patch with hashes of its own; applying it is checked like any other.

    Raises:
        DeltaError: if a tensor is neither: the result would depend on more than the two patches.
    """
    a, b = as_patch(first), as_patch(second)
    if b.prefix:
        raise DeltaError(f"the second patch gives its tensors the prefix {b.prefix!r}: only the first one may")
    names = {other: entry.name for entry in a.values() for other in (entry.name, *entry.tied)}
    entries = dict(a.items())
    for entry in b.values():
        own = next((names[each] for each in (entry.name, *entry.tied) if each in names), None)
        if own is None:
            _check_untouched(a, entry, entry.base)
            entries[entry.name] = entry
        else:
            entries[own] = _both(a[own], entry.to(a[own].values.device))
    for entry in a.values():
        _check_untouched(b, entry, entry.base, entry.result)
    gone = set(b.removed)
    kept = {name: entry for name, entry in entries.items() if not gone.intersection((name, *entry.tied))}
    names_kept = {other.removeprefix(a.prefix) for entry in kept.values() for other in (entry.name, *entry.tied)}
    lost = dict.fromkeys((*a.removed, *(name.removeprefix(a.prefix) for name in b.removed)))
    removed = tuple(name for name in lost if name not in names_kept)
    return Patch(kept, a.base, a.prefix, removed, _untouched(a, b), versions())


def _table(patch: Patch) -> dict[int, int]:
    return {} if patch.untouched is None else dict(patch.untouched.tolist())


def _check_untouched(other: Patch, entry: Entry, *allowed: int | None) -> None:
    """Hold an entry of one patch against what the other says of a tensor that it leaves alone."""
    known = _table(other).get(name_key(entry.name))
    hashes = [signed(value) for value in allowed if value is not None]
    if known is not None and entry.kind != "new" and hashes and known not in hashes:
        raise _strangers(entry)


def _strangers(entry: Entry) -> DeltaError:
    return DeltaError(
        f"{entry.name}: the second patch was made neither on what the first one makes nor on the same base: the two "
        "do not belong together"
    )


def _untouched(a: Patch, b: Patch) -> Tensor | None:
    if a.untouched is None or b.untouched is None or a.prefix:
        return None
    both = set(map(tuple, a.untouched.tolist())) & set(map(tuple, b.untouched.tolist()))
    return torch.tensor(sorted(both), dtype=torch.int64).view(-1, 2)


def _both(a: Entry, b: Entry) -> Entry:
    """What two patches make of one tensor."""
    if b.kind == "new":
        return replace(b, name=a.name)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        raise DeltaError(
            f"{a.name} is {a.dtype} {list(a.shape)} in the first patch, {b.dtype} {list(b.shape)} in the second"
        )
    if a.base is not None and (a.base, a.result) == (b.base, b.result):
        return a
    if a.result is None or b.base is None or a.result == b.base:
        merged, result = _merge(a, b)[0], b.result
    elif a.base == b.base and a.kind != "new" and "dense" not in (a.kind, b.kind):
        merged, overlap = _merge(a, b)
        if overlap:
            raise DeltaError(
                f"{a.name}: both patches change {overlap} of the same weights, each of them on the base: make the "
                "second one on what the first one makes"
            )
        assert a.base is not None  # the hash is a sum: each patch adds its own part to it
        result = None if b.result is None else (a.result + b.result - a.base) % 2**64
    elif a.base == b.base:
        raise DeltaError(
            f"{a.name}: both patches change it, each of them on the base, and it is held whole: make the second one on "
            "what the first one makes"
        )
    else:
        raise _strangers(a)
    return replace(merged, name=a.name, base=a.base, result=result, tied=a.tied or b.tied)


def _merge(a: Entry, b: Entry) -> tuple[Entry, int]:
    """One entry of both, where b has the last word, and how many weights both hold."""
    if b.kind == "dense":
        return replace(b, kind=a.kind if a.kind == "new" else "dense"), b.count
    if a.kind in ("dense", "new"):
        values = a.values.clone(memory_format=torch.contiguous_format)
        flat(values)[b.positions()] = flat(b.values)
        return replace(a, parts={"values": values}), b.count
    if a.kind == b.kind == "columns":
        columns, order, overlap = _union(a.columns(), b.columns())
        values = torch.cat([flat(a.values).view(a.values.shape), flat(b.values).view(b.values.shape)], 1)[:, order]
        parts: Mapping[str, Tensor] = {"values": values.view(a.dtype), "columns": columns.to(torch.int32)}
        return replace(a, parts=parts, count=values.numel()), overlap * values.shape[0]
    positions, order, overlap = _union(a.positions(), b.positions())
    values = torch.cat([flat(a.values), flat(b.values)])[order].view(a.dtype)
    kept = positions.to(torch.int32) if a.numel < 2**31 else positions
    merged = replace(a, kind="sparse", parts={"values": values, "positions": kept}, count=kept.numel(), bits=0)
    return ops.coded(merged), overlap


def _union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Ascending numbers of both lists, where each is in a followed by b (in b if in both), and how many are in both."""
    numbers, order = torch.cat([a, b]).sort(stable=True)
    last = torch.ones_like(numbers, dtype=torch.bool)
    last[:-1] = numbers[1:] != numbers[:-1]
    return numbers[last], order[last], int(numbers.numel() - last.sum())
