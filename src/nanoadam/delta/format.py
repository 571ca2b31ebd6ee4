"""The file of a patch, version 1: docs/delta-format.md says it byte by byte."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanoadam.delta import files
from nanoadam.delta.bits import dtype_name
from nanoadam.delta.description import UNTOUCHED, About, damaged, describe, parse
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import SafeFile, Source

FILE = "delta.safetensors"
"""The name of a patch in a folder."""

KEY = "nanoadam.delta"
"""Where the metadata of a file says what the patch holds."""


# Writing


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
    text = describe(about, entries)
    sources = list(sources)
    if about.untouched is not None and about.untouched.numel():
        sources.append(_source(UNTOUCHED, about.untouched))
    files.write(path, sources, {"format": "pt", KEY: text}, seal=True)


# Reading


class _Parts(Mapping[str, Tensor]):
    """The parts of an entry, read from the file when they are asked for."""

    def __init__(self, file: SafeFile, entry: Entry) -> None:
        self._file, self._name, self._parts = file, entry.name, tuple(entry.parts)

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
    text = file.metadata.get(KEY)
    if text is None:
        raise DeltaError(f"{file.path} is a safetensors file, but no patch: make one with nanoadam delta diff")
    about, described = parse(text, file.items, f"{file.path}")
    entries = Entries((entry.name, replace(entry, parts=_Parts(file, entry))) for entry in described)
    entries.file = file
    return replace(about, untouched=_untouched(file)), entries


def _untouched(file: SafeFile) -> Tensor | None:
    item = file.items.get(UNTOUCHED)
    if item is None:
        return None
    if item.dtype != "I64" or len(item.shape) != 2 or item.shape[1] != 2:
        raise damaged(str(file.path), f"{UNTOUCHED!r} is {item.dtype} {list(item.shape)}")
    return file.tensor(UNTOUCHED)
