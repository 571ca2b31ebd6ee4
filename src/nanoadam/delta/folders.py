"""Patches on saved models: a folder, or one safetensors file, copied with the changes in it, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from nanoadam.delta import files, ops
from nanoadam.delta.bits import dtype_name
from nanoadam.delta.checks import between, check_form, check_result, check_whole, refuse_wrong
from nanoadam.delta.entry import Entry, check_values
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import SafeFile, Source
from nanoadam.delta.jobs import Job
from nanoadam.delta.patch import Patch, as_patch
from nanoadam.delta.sources import INDEX, SINGLE, Files, Progress

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
"""Files of a model's folder that are not copied: its weights, in whatever form."""


def apply_to_files(
    model: str | os.PathLike[str],
    patch: Patch | str | os.PathLike[str],
    out: str | os.PathLike[str],
    strength: float,
    *,
    verify: bool,
    progress: Progress | None,
) -> Patch:
    """As `apply`, for paths. Each tensor is checked as it is copied; what is refused leaves nothing behind."""
    path, target = Path(model).expanduser(), Path(out).expanduser()
    found = as_patch(patch, verify=verify)
    if target.exists():
        raise DeltaError(f"{target} exists already: say another name, nothing is written over")
    copy = _Copy(Files(path), found, strength, verify, progress)
    if path.is_file():
        file = copy.model.files[0]
        files.write(target, copy.sources(file, last=True), file.metadata)
        return found
    beside = Path(patch) if isinstance(patch, (str, os.PathLike)) and Path(patch).is_dir() else None
    with whole_folder(target) as staging:
        _write_shards(copy, staging)
        for source in (path, beside):
            if source is not None:
                _copy_rest(source, staging)
    return found


class _Copy:
    """A saved model on its way to become the finetuned one."""

    def __init__(self, model: Files, patch: Patch, strength: float, verify: bool, progress: Progress | None) -> None:
        self.model, self.patch, self.strength, self.verify = model, patch, strength, verify
        known = model.known()
        # What the names of the result have in front of the model's own.
        self.prefix = patch.prefix if not any(name.startswith(patch.prefix) for name in known) else ""
        self.entries = {own: entry for own, entry in map(self._place, patch.values()) if own is not None}
        self._progress, self._done = progress, 0
        self._total = sum(item.nbytes for file in model.files for item in file.items.values())

    def _place(self, entry: Entry) -> tuple[str | None, Entry]:
        names = (entry.name, *entry.tied)
        own = self.model.find(*names, *(name.removeprefix(self.prefix) for name in names))
        if entry.kind != "new":
            check_form(entry, None if own is None else self.model.form(own), self.model.label)
        return own, entry

    def sources(self, file: SafeFile, *, last: bool) -> Iterator[Source]:
        """The tensors of one file of the result; those that the base lacks come with the last one."""
        for own, item in file.items.items():
            if own in self.patch.removed:
                self._tell(item.nbytes)
                continue
            entry = self.entries.get(own)
            dtype, shape, size = item.dtype, item.shape, item.nbytes
            if entry is not None and entry.kind == "new":
                dtype, shape, size = dtype_name(entry.dtype, own), entry.shape, entry.numel * entry.dtype.itemsize
            yield Source(self.prefix + own, dtype, shape, size, partial(self._pieces, file, own, entry))
        if last:
            there = set(self.entries.values())
            for entry in self.patch.values():
                if entry.kind == "new" and entry not in there:
                    size = entry.numel * entry.dtype.itemsize
                    dtype = dtype_name(entry.dtype, entry.name)
                    yield Source(entry.name, dtype, entry.shape, size, partial(self._new, entry))

    def _tell(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _pieces(self, file: SafeFile, own: str, entry: Entry | None) -> Iterable[Tensor]:
        self._tell(file.items[own].nbytes)
        if entry is None:
            return [file.bytes_of(own)]
        return self._new(entry) if entry.kind == "new" else files.pieces_of(self._result(own, entry))

    def _new(self, entry: Entry) -> Iterable[Tensor]:
        check_values(entry)
        if self.verify:
            check_whole([entry])
        return files.pieces_of(entry.values)

    def _result(self, own: str, entry: Entry) -> Tensor:
        """What a tensor of the model becomes."""
        weight, strength = self.model.tensor(own), self.strength
        before = ops.hash_all([weight])[0] if self.verify else None
        refuse_wrong([(entry, before)], self.patch.base, self.model.label)
        if before is not None and before == entry.result:
            if strength != 1:
                raise DeltaError(
                    f"{own} in {self.model.label} is the finetuned one already: apply the patch to its base"
                )
            return weight
        if strength == 0:
            return weight
        check_values(entry)
        if entry.kind == "dense":
            if self.verify:
                check_whole([entry])
            return entry.values if strength == 1 else between(weight, entry.values, strength)
        job = Job(entry, weight)
        (found,) = ops.inspect([job], hashed=before is not None)
        check_result(entry, before, found.change)
        ops.write([job], [entry.values if strength == 1 else between(found.old, entry.values, strength)])
        return weight


def _write_shards(copy: _Copy, folder: Path) -> None:
    model = copy.model
    sharded = (model.path / INDEX).is_file()
    table: dict[str, str] = {}
    size = 0
    for file in model.files:
        name = file.path.name if sharded else SINGLE
        sources = list(copy.sources(file, last=file is model.files[-1]))
        files.write(folder / name, sources, file.metadata or {"format": "pt"})
        table |= {source.name: name for source in sources}
        size += sum(source.nbytes for source in sources)
    if sharded:
        _write_index(model.path / INDEX, folder / INDEX, table, size)


def _write_index(old: Path, new: Path, table: Mapping[str, str], size: int) -> None:
    content = json.loads(old.read_text(encoding="utf-8"))
    metadata = content.get("metadata")
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    content["weight_map"] = dict(sorted(table.items()))
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_rest(source: Path, target: Path) -> None:
    """Configuration, tokenizer and the like; the finetuned model's replace those of the base."""
    for entry in source.iterdir():
        weights = entry.suffix in _WEIGHTS or entry.name.endswith(".index.json")
        if entry.is_file() and not entry.name.startswith(".") and not weights:
            shutil.copyfile(entry, target / entry.name)


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is complete and on the disk, or not at all.

    Raises:
        DeltaError: if it cannot be written.
    """
    staging = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir()
        try:
            yield staging
            files.sync_folder(staging)
            staging.rename(final)
            files.sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise DeltaError(f"{final} cannot be written: {error.strerror or error}") from error
