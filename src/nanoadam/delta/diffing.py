"""diff: the patch that makes a finetuned model of its base."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nanoadam.delta import format as formats
from nanoadam.delta import ops
from nanoadam.delta.bits import flat, nbytes
from nanoadam.delta.coding import low_bits
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import Source, memory
from nanoadam.delta.hashing import signed
from nanoadam.delta.patch import Patch
from nanoadam.delta.sources import Memory, Progress, Tensors, tensors_of

_PIECE = 1 << 24
"""Weights compared at a time."""

_PART = 90
"""Bytes that one more part takes in a file's header."""


def diff(
    base: Any,
    tuned: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    new: Iterable[str] = (),
    progress: Progress | None = None,
) -> Patch:
    """The patch that makes `tuned` of `base`.

    Each may be a module, a state dict, a safetensors file or the folder of a saved model; files are read one tensor
    at a time.

    Args:
        base: what the finetune started from.
        tuned: what came out.
        out: write the patch there as it is made; it takes memory for one tensor then.
        name: the name of the base model, for people; by default what the base says of itself.
        new: tensors whose values in `base` are nobody's (a head that was drawn at random): held whole, and applied
            to whatever stands there.
        progress: called with how far it is.

    Returns:
        The patch; with `out` the one in the file.

    Raises:
        DeltaError: if a model cannot be read or holds something that is not served, or `out` cannot be written.
    """
    before, after = tensors_of(base), tensors_of(tuned)
    prefix = find_prefix(before, after)
    pairs = list(_pairs(before, after, prefix, frozenset(new)))
    used = {own for *_, own in pairs} | {before.find(each.removeprefix(prefix)) for each in new}
    patch = Patch(
        {},
        base=_name_of(base) if name is None else name,
        prefix=prefix,
        removed=tuple(each for each in before.names() if each not in used),
        notes=versions(),
    )
    compared = _compare_all(before, after, pairs, progress)
    if out is None:
        return _collect(patch, compared)
    _stream(patch, compared, Path(out))
    return Patch.load(out, verify=False)


def versions() -> dict[str, str]:
    """What makes a patch, and in which versions."""
    import nanoadam

    return {"nanoadam": nanoadam.__version__, "torch": torch.__version__}


def _name_of(base: Any) -> str:
    if isinstance(base, torch.nn.Module):
        said = getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
    elif isinstance(base, (str, os.PathLike)):
        said = str(Path(base).resolve())
    else:
        return ""
    return Path(said).name if os.path.isabs(said) else said  # a path on this machine tells nobody anything


def find_prefix(base: Tensors, tuned: Tensors) -> str:
    """What the tuned names have in front that the base's do not: a model saved without its head, `bert.` for one."""
    known, names = base.known(), tuned.names()
    if any(each in known for each in names):
        return ""
    counts: Counter[str] = Counter()
    for each in names:
        at = each.find(".")
        while at >= 0:
            if each[at + 1 :] in known:
                counts[each[: at + 1]] += 1
            at = each.find(".", at + 1)
    return counts.most_common(1)[0][0] if counts else ""


def _pairs(
    base: Tensors, tuned: Tensors, prefix: str, new: frozenset[str]
) -> Iterator[tuple[str, tuple[str, ...], str | None]]:
    """For each tuned tensor: its names, and the one that it has in the base, None if it is not there.

    One that stands for several of the base (weights that were tied since) comes once for each of them.
    """
    for name in tuned.names():
        names = (name, *tuned.tied.get(name, ()))
        own = {each: base.find(each.removeprefix(prefix)) for each in names if each.startswith(prefix)}
        found = [] if new.intersection(names) else [each for each in dict.fromkeys(own.values()) if each is not None]
        for each in found[1:]:
            mine = tuple(other for other in names if own.get(other) == each)
            names = tuple(other for other in names if other not in mine)
            yield mine[0], mine[1:], each
        yield names[0], names[1:], found[0] if found else None


def name_key(name: str) -> int:
    """The name of an untouched tensor, as int64: the first 8 bytes of its SHA-256, little-endian."""
    return signed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _compare_all(
    base: Tensors, tuned: Tensors, pairs: list[tuple[str, tuple[str, ...], str | None]], progress: Progress | None
) -> Iterator[tuple[str, Entry | int]]:
    """For each tuned tensor, by its name in the base if it has one: its entry, or its hash if it has not changed."""
    first = tuned.known()
    sizes = {name: nbytes(*tuned.form(first[name])) for name, *_ in pairs}
    done, all_of_it = 0, sum(sizes.values())
    for name, tied, own in pairs:
        after = tuned.tensor(first[name])
        if own is None or base.form(own) != tuned.form(first[name]):
            yield name, replace(whole(name, after, "new"), tied=tied)
        else:
            before = base.tensor(own).to(after.device)
            found = compare(name, before, after)
            if isinstance(tuned, Memory) and isinstance(found, Entry):
                found = replace(found, parts={part: _own(tensor, after) for part, tensor in found.parts.items()})
            yield (own, found) if isinstance(found, int) else (name, replace(found, tied=tied))
        done += sizes[name]
        if progress is not None:
            progress(done, all_of_it)


def _own(part: Tensor, tensor: Tensor) -> Tensor:
    """A part that does not share the memory of the model's own tensor."""
    return part.clone() if part.numel() and part.data_ptr() == tensor.data_ptr() else part


def whole(name: str, tensor: Tensor, kind: str, *, base: int | None = None) -> Entry:
    """An entry that holds all of a tensor, copied."""
    values = tensor.detach().clone(memory_format=torch.contiguous_format)
    (result,) = ops.hash_all([values])
    return Entry(name, kind, tensor.dtype, tuple(tensor.shape), {"values": values}, tensor.numel(), 0, base, result)


def compare(name: str, before: Tensor, after: Tensor) -> Entry | int:
    """What became of a tensor of the same dtype and shape on the same device; its hash if no bit has changed."""
    pieces = zip(flat(before).split(_PIECE), flat(after).split(_PIECE), strict=True)
    count = sum(int(torch.count_nonzero(a != b)) for a, b in pieces)
    if count == 0:
        return ops.hash_all([after])[0]
    was, result = ops.hash_all([before, after])
    entry = Entry(name, "dense", after.dtype, tuple(after.shape), {"values": after}, after.numel(), 0, was, result)
    dense = float(after.nbytes)
    sparse = count * (after.element_size() + 1.1 + low_bits(count, after.numel()) / 8) + 3 * _PART
    if dense <= count * after.element_size() or (dense <= sparse and after.dim() < 2):
        return entry
    positions = ops.backend(after.device).changed(before, after)
    columns = _columns(positions, after)
    in_columns = columns.numel() * (after.numel() / after.shape[-1] * after.element_size() + 4) + _PART
    if in_columns < min(dense, sparse):
        # As integers: older torches do not index float8.
        values = flat(after).reshape(-1, after.shape[-1])[:, columns].contiguous().view(after.dtype)
        parts = {"values": values, "columns": columns.to(torch.int32)}
        return replace(entry, kind="columns", parts=parts, count=values.numel())
    if dense <= sparse:
        return entry
    values = flat(after)[positions.to(torch.int64)].view(after.dtype)
    return ops.coded(replace(entry, kind="sparse", parts={"values": values, "positions": positions}, count=count))


def _columns(positions: Tensor, tensor: Tensor) -> Tensor:
    """The columns that positions lie in: int64, ascending."""
    touched = torch.zeros(tensor.shape[-1], dtype=torch.bool, device=tensor.device)
    for piece in positions.split(_PIECE):
        touched[piece.to(torch.int64) % tensor.shape[-1]] = True
    return touched.nonzero().view(-1)


# What becomes of the entries


def _collect(patch: Patch, compared: Iterable[tuple[str, Entry | int]]) -> Patch:
    entries: dict[str, Entry] = {}
    untouched: list[list[int]] = []
    for name, found in compared:
        if isinstance(found, Entry):
            entries[name] = found
        else:
            untouched.append([name_key(name), signed(found)])
    return replace(patch, entries=entries, untouched=torch.tensor(untouched, dtype=torch.int64).view(-1, 2))


def _stream(patch: Patch, compared: Iterable[tuple[str, Entry | int]], out: Path) -> None:
    """Write entries to a file as they come; the parts wait beside it until the header is known."""
    sources: list[Source] = []
    with _spool(out) as spool:

        def kept() -> Iterator[tuple[str, Entry | int]]:
            for name, found in compared:
                if isinstance(found, Entry):
                    entry = ops.coded(found)
                    sources.extend(_set_aside(source, spool) for source in formats.sources_of(entry))
                    found = replace(entry, parts={})
                yield name, found

        described = _collect(patch, kept())
        formats.write(out, described.about(), described.values(), sources)


def _spool(out: Path) -> BinaryIO:
    try:
        return tempfile.TemporaryFile(dir=out.parent)
    except OSError as error:
        raise DeltaError(f"{out} cannot be written: {error.strerror or error}") from error


def _set_aside(source: Source, spool: BinaryIO) -> Source:
    begin = spool.tell()
    try:
        for piece in source.pieces():
            spool.write(memory(piece))
    except OSError as error:
        raise DeltaError(f"no room for {source.name!r}: {error.strerror or error}") from error

    def pieces() -> Iterator[Tensor]:
        spool.seek(begin)
        left = source.nbytes
        while left:
            content = bytearray(spool.read(min(left, 1 << 24)))
            left -= len(content)
            yield torch.frombuffer(content, dtype=torch.uint8)

    return replace(source, pieces=pieces)
