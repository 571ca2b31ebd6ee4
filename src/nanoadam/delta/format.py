"""The file of a patch, version 1: docs/delta-format.md says it byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoadam.delta import coding, files
from nanoadam.delta.bits import DTYPES, dtype_name
from nanoadam.delta.entry import KINDS, Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import SafeFile, Source
from nanoadam.delta.hashing import as_hex

FILE = "delta.safetensors"
"""The name of a patch in a folder."""

KEY = "nanoadam.delta"
VERSION = 1
UNTOUCHED = "#untouched"

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "base": str,
    "prefix": str,
    "removed": list,
    "notes": dict,
    "entries": list,
}
_ENTRY: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "kind": str,
    "dtype": str,
    "shape": list,
    "count": int,
    "bits": int,
    "base": (str, type(None)),
    "result": (str, type(None)),
    "tied": list,
}


# Writing


@dataclass(frozen=True)
class About:
    """What a file says besides its entries; the fields are those of `Patch`."""

    base: str
    prefix: str
    removed: tuple[str, ...]
    untouched: Tensor | None
    notes: Mapping[str, str]


def sources_of(entry: Entry) -> list[Source]:
    """The parts of an entry as a file holds them."""
    return [_source(f"{entry.name}#{part}", tensor) for part, tensor in entry.parts.items()]


def _source(name: str, tensor: Tensor) -> Source:
    return Source(
        name, dtype_name(tensor.dtype, name), tuple(tensor.shape), tensor.nbytes, lambda: files.pieces_of(tensor)
    )


def write(path: str | os.PathLike[str], about: About, entries: Iterable[Entry], sources: Iterable[Source]) -> None:
    """Write a patch whose parts may lie elsewhere.

    Args:
        path: replaced if it exists.
        about: everything but the entries.
        entries: coded; of them all but `parts`.
        sources: the parts.

    Raises:
        DeltaError: if it cannot be written.
    """
    text = json.dumps(
        {
            "version": VERSION,
            "base": about.base,
            "prefix": about.prefix,
            "removed": list(about.removed),
            "notes": dict(about.notes),
            "entries": [_describe(entry) for entry in entries],
        },
        separators=(",", ":"),
        ensure_ascii=False,
    )
    sources = list(sources)
    if about.untouched is not None and about.untouched.numel():
        sources.append(_source(UNTOUCHED, about.untouched))
    files.write(path, sources, {"format": "pt", KEY: text}, seal=True)


def _describe(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "dtype": dtype_name(entry.dtype, entry.name),
        "shape": list(entry.shape),
        "count": entry.count,
        "bits": entry.bits,
        "base": None if entry.base is None else as_hex(entry.base),
        "result": None if entry.result is None else as_hex(entry.result),
        "tied": list(entry.tied),
    }


# Reading


class _Parts(Mapping[str, Tensor]):
    """The parts of an entry, read from the file when they are asked for."""

    def __init__(self, file: SafeFile, name: str, parts: tuple[str, ...]) -> None:
        self._file, self._name, self._parts = file, name, parts

    def __getitem__(self, part: str) -> Tensor:
        if part not in self._parts:
            raise KeyError(part)
        return self._file.tensor(f"{self._name}#{part}")

    def __contains__(self, part: object) -> bool:
        return part in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class Entries(dict[str, Entry]):
    """Entries that lie in a file; they go to a device in one piece."""

    file: SafeFile

    def to(self, device: torch.device | str) -> dict[str, Entry]:
        """All of them, read and sent at once."""
        content = self.file.everything().to(device)
        return {
            name: replace(entry, parts={part: self._part(content, f"{name}#{part}") for part in entry.parts})
            for name, entry in self.items()
        }

    def _part(self, content: Tensor, name: str) -> Tensor:
        item = self.file.items[name]
        return files.view(content[item.begin : item.end], item, name)


def read(path: str | os.PathLike[str], *, verify: bool = True) -> tuple[About, Entries]:
    """As `Patch.load`."""
    path = Path(path)
    file = SafeFile(path / FILE if path.is_dir() else path)
    if verify and KEY in file.metadata:
        file.check_seal()
    fields = _metadata(file)
    entries = Entries()
    entries.file = file
    for given in fields["entries"]:
        entry = _entry(file, given)
        if entry.name in entries:
            raise _damaged(file, f"the tensor {entry.name!r} stands twice in it")
        entries[entry.name] = entry
    expected = {f"{name}#{part}" for name, entry in entries.items() for part in entry.parts}
    strange = sorted(set(file.items) - expected - {UNTOUCHED, files.SEAL})
    if strange:
        raise _damaged(file, f"it holds {strange[0]!r}, which belongs to no tensor")
    about = About(fields["base"], fields["prefix"], tuple(fields["removed"]), _untouched(file), dict(fields["notes"]))
    return about, entries


def _damaged(file: SafeFile, what: str) -> DeltaError:
    return DeltaError(f"{file.path} is no patch that can be used: {what}")


def _metadata(file: SafeFile) -> dict[str, Any]:
    text = file.metadata.get(KEY)
    if text is None:
        raise DeltaError(f"{file.path} is a safetensors file, but no patch: make one with nanoadam delta diff")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its description is no JSON ({error})") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is int and version != VERSION:
        raise DeltaError(
            f"{file.path} is a patch of version {version}, this nanoadam reads version {VERSION}: update it"
        )
    _check_types(file, fields, _FIELDS, "its description")
    if not all(isinstance(name, str) for name in fields["removed"]):
        raise _damaged(file, "its list of removed tensors holds something else than names")
    if not all(isinstance(value, str) for value in fields["notes"].values()):
        raise _damaged(file, "its notes are no texts")
    return dict(fields)


def _check_types(file: SafeFile, fields: Any, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise _damaged(file, f"{where} must have {', '.join(types)}")
    for name, wanted in types.items():
        if not isinstance(fields[name], wanted) or isinstance(fields[name], bool):
            raise _damaged(file, f"{name} in {where} is {str(fields[name])[:40]!r}")


def _entry(file: SafeFile, given: Any) -> Entry:
    _check_types(file, given, _ENTRY, "an entry")
    name = given["name"]
    shape = given["shape"]
    if given["kind"] not in KINDS or given["dtype"] not in DTYPES:
        raise _damaged(file, f"{name!r} is of kind {given['kind'][:40]!r} and dtype {given['dtype'][:40]!r}")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape) or not 0 <= given["count"] < 2**63:
        raise _damaged(file, f"{name!r} has the shape {str(shape)[:80]}")
    if not 0 <= given["bits"] <= coding.MAX_BITS or not all(isinstance(other, str) for other in given["tied"]):
        raise _damaged(file, f"bits or tied names of {name!r} are out of range")
    parts = {"sparse": ("values", "gaps", "blocks"), "columns": ("values", "columns")}.get(given["kind"], ("values",))
    if given["kind"] == "sparse" and given["bits"]:
        parts = (*parts, "low")
    entry = Entry(
        name,
        given["kind"],
        DTYPES[given["dtype"]],
        tuple(shape),
        _Parts(file, name, parts),
        given["count"],
        given["bits"],
        _hash(file, name, given["base"]),
        _hash(file, name, given["result"]),
        tuple(given["tied"]),
    )
    _check_parts(file, entry)
    return entry


def _hash(file: SafeFile, name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise _damaged(file, f"a hash of {name!r} is {text[:40]!r}")
    return int(text, 16)


def _check_parts(file: SafeFile, entry: Entry) -> None:
    """That the parts are there, and have the dtypes and sizes that the entry says."""
    values: tuple[int, ...] = entry.shape
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    if entry.kind == "sparse":
        values = (entry.count,)
        low = -(-entry.count * entry.bits // 8)
        expected = {"gaps": ("U8", (None,)), "blocks": ("I64", (None, 2)), "low": ("U8", (low,))}
    elif entry.kind == "columns":
        width = entry.shape[-1] if entry.shape else 0
        rows = entry.numel // width if width else 0
        if not rows or entry.count % rows:
            raise _damaged(file, f"{entry.name!r} of shape {list(entry.shape)} has no {entry.count} weights in columns")
        values = (rows, entry.count // rows)
        expected = {"columns": ("I32", (entry.count // rows,))}
    elif entry.count != entry.numel:
        raise _damaged(file, f"{entry.name!r} of shape {list(entry.shape)} should hold {entry.count} weights")
    expected["values"] = (dtype_name(entry.dtype, entry.name), values)
    for part in entry.parts:
        item = file.items.get(f"{entry.name}#{part}")
        if item is None:
            raise _damaged(file, f"the {part} of {entry.name!r} are missing")
        dtype, shape = expected[part]
        fits = len(shape) == len(item.shape) and all(a in (None, b) for a, b in zip(shape, item.shape, strict=True))
        if item.dtype != dtype or not fits:
            raise _damaged(file, f"the {part} of {entry.name!r} are {item.dtype} {list(item.shape)}")


def _untouched(file: SafeFile) -> Tensor | None:
    item = file.items.get(UNTOUCHED)
    if item is None:
        return None
    if item.dtype != "I64" or len(item.shape) != 2 or item.shape[1] != 2:
        raise _damaged(file, f"{UNTOUCHED!r} is {item.dtype} {list(item.shape)}")
    return file.tensor(UNTOUCHED)
