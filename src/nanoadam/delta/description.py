"""What a patch says of itself: JSON, the same in files and on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoadam.delta import coding, files
from nanoadam.delta.bits import DTYPES, dtype_name
from nanoadam.delta.entry import KINDS, Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import Item
from nanoadam.delta.hashing import as_hex

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


@dataclass(frozen=True)
class About:
    """What a file says besides its entries; the fields are those of `Patch`."""

    base: str
    prefix: str
    removed: tuple[str, ...]
    untouched: Tensor | None
    notes: Mapping[str, str]


def describe(about: About, entries: Iterable[Entry]) -> str:
    """The JSON that says what a patch holds; `parse` reads it."""
    return json.dumps(
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


def parse(text: str, items: Mapping[str, Item], where: str, *, listed: bool = False) -> tuple[About, list[Entry]]:
    """Read what `describe` has written, and hold it against the tensors that are there.

    Args:
        text: JSON.
        items: the tensors: parts by `name#part`.
        where: what is read, for errors.
        listed: positions are listed and not coded.

    Returns:
        All but `untouched`, and the entries, whose `parts` are empty tensors on the meta device: names alone.

    Raises:
        DeltaError: naming what does not fit.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"its description is no JSON ({error})") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is int and version != VERSION:
        raise DeltaError(f"{where} is a patch of version {version}, this nanoadam reads {VERSION}: update it")
    _check_types(where, fields, _FIELDS, "its description")
    if not all(isinstance(name, str) for name in fields["removed"]):
        raise damaged(where, "its list of removed tensors holds something else than names")
    if not all(isinstance(value, str) for value in fields["notes"].values()):
        raise damaged(where, "its notes are no texts")
    entries = [_entry(where, given, listed) for given in fields["entries"]]
    expected = {UNTOUCHED, files.SEAL}
    for entry in entries:
        _check_parts(where, entry, items)
        names = {f"{entry.name}#{part}" for part in entry.parts}
        if names & expected:
            raise damaged(where, f"the tensor {entry.name!r} stands twice in it")
        expected |= names
    strange = sorted(set(items) - expected)
    if strange:
        raise damaged(where, f"it holds {strange[0]!r}, which belongs to no tensor")
    return About(fields["base"], fields["prefix"], tuple(fields["removed"]), None, dict(fields["notes"])), entries


def damaged(where: str, what: str) -> DeltaError:
    """The error for a patch that contradicts itself."""
    return DeltaError(f"{where} is no patch that can be used: {what}")


def _check_types(source: str, fields: Any, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise damaged(source, f"{where} must have {', '.join(types)}")
    for name, wanted in types.items():
        if not isinstance(fields[name], wanted) or isinstance(fields[name], bool):
            raise damaged(source, f"{name} in {where} is {str(fields[name])[:40]!r}")


def _entry(where: str, given: Any, listed: bool) -> Entry:
    _check_types(where, given, _ENTRY, "an entry")
    name, shape = given["name"], given["shape"]
    if given["kind"] not in KINDS or given["dtype"] not in DTYPES:
        raise damaged(where, f"{name!r} is of kind {given['kind'][:40]!r} and dtype {given['dtype'][:40]!r}")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape) or not 0 <= given["count"] < 2**63:
        raise damaged(where, f"{name!r} has the shape {str(shape)[:80]}")
    if not 0 <= given["bits"] <= coding.MAX_BITS or not all(isinstance(other, str) for other in given["tied"]):
        raise damaged(where, f"bits or tied names of {name!r} are out of range")
    parts = ["values"]
    if given["kind"] == "columns":
        parts += ["columns"]
    elif given["kind"] == "sparse":
        parts += ["positions"] if listed else ["gaps", "blocks", *(["low"] if given["bits"] else [])]
    return Entry(
        name,
        given["kind"],
        DTYPES[given["dtype"]],
        tuple(shape),
        dict.fromkeys(parts, _NOTHING),
        given["count"],
        given["bits"],
        _hash(where, name, given["base"]),
        _hash(where, name, given["result"]),
        tuple(given["tied"]),
    )


_NOTHING = torch.empty(0, device="meta")


def _hash(where: str, name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise damaged(where, f"a hash of {name!r} is {text[:40]!r}")
    return int(text, 16)


def _check_parts(where: str, entry: Entry, items: Mapping[str, Item]) -> None:
    """That the parts are there, and have the dtypes and sizes that the entry says."""
    values: tuple[int, ...] = entry.shape
    expected: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {}
    if entry.kind == "sparse":
        values = (entry.count,)
        low = -(-entry.count * entry.bits // 8)
        expected = {"gaps": (("U8",), (None,)), "blocks": (("I64",), (None, 2)), "low": (("U8",), (low,))}
        expected["positions"] = (("I32", "I64"), values)
    elif entry.kind == "columns":
        width = entry.shape[-1] if entry.shape else 0
        rows = entry.numel // width if width else 0
        if not rows or entry.count % rows:
            raise damaged(where, f"{entry.name!r} of shape {list(entry.shape)} has no {entry.count} weights in columns")
        values = (rows, entry.count // rows)
        expected = {"columns": (("I32",), (entry.count // rows,))}
    elif entry.count != entry.numel:
        raise damaged(where, f"{entry.name!r} of shape {list(entry.shape)} should hold {entry.count} weights")
    expected["values"] = ((dtype_name(entry.dtype, entry.name),), values)
    for part in entry.parts:
        item = items.get(f"{entry.name}#{part}")
        if item is None:
            raise damaged(where, f"the {part} of {entry.name!r} are missing")
        dtypes, shape = expected[part]
        fits = len(shape) == len(item.shape) and all(a in (None, b) for a, b in zip(shape, item.shape, strict=True))
        if item.dtype not in dtypes or not fits:
            raise damaged(where, f"the {part} of {entry.name!r} are {item.dtype} {list(item.shape)}")
