"""A patch: what a finetune made of a base model, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanoadam.delta import format as formats
from nanoadam.delta import ops
from nanoadam.delta.description import About
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError


@dataclass(frozen=True, eq=False)
class Patch(Mapping[str, Entry]):
    """What a finetune made of a base model: entries by name of the tensor. Tensors without an entry stay as they are.

    Attributes:
        entries: by name.
        base: the name of the base model, for people.
        prefix: what the names have in front that the base's own do not have (`bert.`, where the base is saved
            without a head).
        removed: tensors of the base that the finetuned model has not, under the base's own names.
        untouched: int64 [n, 2]: for each tensor without an entry, `name_key` of its name and its hash. `verify` holds
            a base against it. None where it is not known.
        notes: what else is to be said, as texts: versions of what made it, number of an update.
    """

    entries: Mapping[str, Entry]
    base: str = ""
    prefix: str = ""
    removed: tuple[str, ...] = ()
    untouched: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # a mapping's would compare tensors

    def __repr__(self) -> str:
        return f"Patch({len(self)} tensors, {self.count} weights, {self.nbytes / 1e6:.3g} MB)"

    @property
    def count(self) -> int:
        """Weights that the entries hold."""
        return sum(entry.count for entry in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, as they are kept now."""
        return sum(entry.nbytes for entry in self.values())

    def coded(self) -> Patch:
        """The same with all positions coded, which takes a third less memory than int32."""
        return replace(self, entries={name: ops.coded(entry) for name, entry in self.items()})

    def to(self, device: torch.device | str) -> Patch:
        """The same, read into memory, on a device."""
        if isinstance(self.entries, formats.Entries):
            return replace(self, entries=self.entries.to(device))
        return replace(self, entries={name: entry.to(device) for name, entry in self.items()})

    def pin_memory(self) -> Patch:
        """The same in page-locked memory of the host, from where a GPU fetches it several times faster."""
        entries = {
            name: replace(entry, parts={key: part.cpu().pin_memory() for key, part in entry.parts.items()})
            for name, entry in self.items()
        }
        return replace(self, entries=entries)

    def about(self) -> About:
        """All but the entries."""
        return About(self.base, self.prefix, self.removed, self.untouched, self.notes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file (docs/delta-format.md), whole or not at all.

        Raises:
            DeltaError: if it cannot be written; what stood there before stays.
        """
        entries = [ops.coded(entry) for entry in self.values()]
        sources = [source for entry in entries for source in formats.sources_of(entry)]
        formats.write(path, self.about(), entries, sources)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Patch:
        """Open a patch; its tensors are read when they are needed.

        Args:
            path: the file, or a folder with a `delta.safetensors`.
            verify: hold the file against its SHA-256.

        Raises:
            DeltaError: if it is no whole patch, naming what is wrong.
        """
        about, entries = formats.read(path, verify=verify)
        return cls(entries, about.base, about.prefix, about.removed, about.untouched, about.notes)


def as_patch(given: Any, *, verify: bool = True) -> Patch:
    """A patch, or the one in a file.

    Raises:
        DeltaError: as `Patch.load`.
    """
    if isinstance(given, Patch):
        return given
    if isinstance(given, (str, os.PathLike)):
        return Patch.load(given, verify=verify)
    raise DeltaError(f"a patch is a nanoadam.delta.Patch or the path of one, got {type(given).__name__}")
