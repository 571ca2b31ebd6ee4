"""What is checked before anything is written, in memory and in files, and what strengths between 0 and 1 give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoadam.delta import ops
from nanoadam.delta.bits import bits
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.hashing import as_hex


def check_form(entry: Entry, form: tuple[torch.dtype, tuple[int, ...]] | None, label: str) -> None:
    """Refuse a tensor that is missing, or of another dtype or shape.

    Raises:
        DeltaError: naming both.
    """
    if form is None:
        raise DeltaError(f"{label} has no tensor {entry.name!r}: the patch was made for another model")
    dtype, shape = form
    if shape != entry.shape:
        raise DeltaError(
            f"{entry.name} has shape {list(shape)} in {label} and {list(entry.shape)} in the patch: it was made for "
            "another model"
        )
    if dtype != entry.dtype:
        own, wanted = (str(each).removeprefix("torch.") for each in (dtype, entry.dtype))
        raise DeltaError(
            f"{entry.name} is {own} in {label} and {wanted} in the patch: load the model with dtype=torch.{wanted}"
        )


def refuse_wrong(found: Sequence[tuple[Entry, int | None]], base: str, label: str) -> None:
    """Refuse tensors that are neither the base's nor the finetuned ones.

    Raises:
        DeltaError: naming the first, and how many there are.
    """
    wrong = [
        (entry, value)
        for entry, value in found
        if entry.kind != "new" and entry.base is not None and value not in (None, entry.base, entry.result)
    ]
    if wrong:
        entry, value = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        named = f", {base}" if base else ""
        raise DeltaError(
            f"{entry.name}{more} in {label} is neither what the patch was made on nor what it makes: hash "
            f"{as_hex(value or 0)}, expected {as_hex(entry.base or 0)}. Apply it to its base{named}"
        )


def check_result(entry: Entry, before: int | None, change: int) -> None:
    """Refuse a patch that would make something else than it says.

    Raises:
        DeltaError: naming the tensor.
    """
    if before is not None and entry.result is not None and (before + change) % 2**64 != entry.result:
        raise _other_result(entry)


def check_whole(entries: Sequence[Entry]) -> None:
    """The same for entries that hold whole tensors.

    Raises:
        DeltaError: naming the tensor.
    """
    known = [entry for entry in entries if entry.result is not None]
    for entry, found in zip(known, ops.hash_all([entry.values for entry in known]), strict=True):
        if found != entry.result:
            raise _other_result(entry)


def _other_result(entry: Entry) -> DeltaError:
    return DeltaError(
        f"{entry.name}: what the patch holds does not make the tensor that it announces: it is damaged, get it again"
    )


def between(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """Base + strength * (tuned - base), in float32 (float64 for that), rounded once; `tuned` from 0.5 on for others."""
    if not base.dtype.is_floating_point:
        return tuned if strength >= 0.5 else base
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = base.to(wide)
    moved = torch.add(start, tuned.to(wide) - start, alpha=strength).to(base.dtype)
    same = bits(base) == bits(tuned)  # infinity minus infinity
    return torch.where(same, bits(base), bits(moved)).view(base.dtype)
