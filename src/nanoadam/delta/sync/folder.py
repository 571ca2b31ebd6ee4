"""Updates through a folder that trainer and servers see: a shared disk, or what an object store is mounted as."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import replacing
from nanoadam.delta.patch import Patch
from nanoadam.delta.sync.updates import OutOfStep, Update

_NAME = re.compile(r"(update|seed)-(\d{9})\.safetensors(\.zst)?")
_VERSION, _PREVIOUS = "version", "previous"


class FolderChannel:
    """A folder with a file for each update: a patch (docs/delta-format.md) whose notes say which.

    Files take their names when they are whole. Any number of servers reads them, in their own time; one that has
    fallen behind what is kept starts again from the newest seed.

    Args:
        folder: made if it is not there.
        compress: with zstd: a sixth less, at about 1 GB/s. Needs Python 3.14 or the package zstandard.
        keep: updates that are kept; seeds are kept while they are the newest.
        wait: seconds that `receive` waits for the next update.
        limit: most bytes of an update after decompression.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        compress: bool = False,
        keep: int = 100,
        wait: float = 0.0,
        limit: int = 1 << 40,
    ) -> None:
        self.folder, self.compress, self.keep, self.wait, self.limit = Path(folder), compress, keep, wait, limit
        if compress:
            zstd()
        self.folder.mkdir(parents=True, exist_ok=True)

    def latest(self) -> int:
        """As `Channel.latest`: of earlier trainers too."""
        return max((version for version, _ in self._files()), default=0)

    def _files(self) -> dict[tuple[int, str], Path]:
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match:
                    found[int(match[2]), match[1]] = Path(entry.path)
        return found

    def send(self, update: Update) -> bool:
        """As `Channel.send`. Nobody answers."""
        kind = "seed" if update.previous is None else "update"
        previous = "" if update.previous is None else str(update.previous)
        notes = {**update.patch.notes, _VERSION: str(update.version), _PREVIOUS: previous}
        path = self.folder / f"{kind}-{update.version:09}.safetensors"
        patch = replace(update.patch, notes=notes)
        if self.compress:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as folder:
                patch.save(Path(folder) / "plain")
                with (Path(folder) / "plain").open("rb") as plain, replacing(f"{path}.zst") as packed:
                    _compress(plain, packed)
        else:
            patch.save(path)
        self._prune()
        return True

    def _prune(self) -> None:
        files = self._files()
        seeds = [version for version, kind in files if kind == "seed"]
        updates = sorted(version for version, kind in files if kind == "update")
        gone = [(version, "seed") for version in seeds if version < max(seeds)]
        gone += [(version, "update") for version in updates[: max(0, len(updates) - self.keep)]]
        for each in gone:
            with contextlib.suppress(OSError):
                files[each].unlink()

    def receive(self, version: int) -> Update | None:
        """As `Channel.receive`."""
        end = time.monotonic() + self.wait
        while True:
            path = self._next(version)
            if path is not None:
                with contextlib.suppress(FileNotFoundError):  # pruned meanwhile: look again
                    return self._load(path)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(min(0.05, max(0.0, end - time.monotonic())))

    def _next(self, version: int) -> Path | None:
        files = self._files()
        if version >= 0 and (version + 1, "update") in files:
            return files[version + 1, "update"]
        seeds = [number for number, kind in files if kind == "seed" and number > version]
        if seeds:
            return files[max(seeds), "seed"]
        later = [number for number, _ in files if number > version]
        if later:
            raise OutOfStep(
                f"{self.folder} begins with update {min(later)}, and the model has {version}: have the sender reseed"
            )
        return None

    def _load(self, path: Path) -> Update:
        patch = self._unpacked(path) if path.suffix == ".zst" else Patch.load(_there(path))
        version, previous = patch.notes.get(_VERSION, ""), patch.notes.get(_PREVIOUS, "")
        if not version.isdecimal() or not (previous.isdecimal() or previous == ""):
            raise DeltaError(f"{path} does not say which update it is: it was not written by a FolderChannel")
        return Update(int(version), int(previous) if previous else None, patch)

    def _unpacked(self, path: Path) -> Patch:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain"
            with path.open("rb") as packed, plain.open("wb") as file:
                written = 0
                for piece in _decompress(packed, path):
                    written += len(piece)
                    if written > self.limit:
                        raise DeltaError(f"{path} unpacks to more than {self.limit} bytes: it is damaged")
                    file.write(piece)
            return Patch.load(plain).to("cpu")

    def confirm(self, version: int) -> None:
        """As `Channel.confirm`: a folder does not carry answers."""


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


# zstd, from Python 3.14's own library or from the package zstandard.


def zstd() -> Any:
    """The library that packs.

    Raises:
        DeltaError: if there is none.
    """
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise DeltaError("compress=True needs zstd: Python 3.14, or pip install 'nanoadam[sync]'")


def _compress(plain: Any, packed: Any) -> None:
    library = zstd()
    compressor = library.ZstdCompressor(level=1)
    if hasattr(compressor, "compressobj"):
        compressor = compressor.compressobj()
    while piece := plain.read(1 << 22):
        packed.write(compressor.compress(piece))
    packed.write(compressor.flush())


def _decompress(packed: Any, path: Path) -> Iterator[bytes]:
    library = zstd()
    decompressor = library.ZstdDecompressor()
    stream = decompressor.stream_reader(packed) if hasattr(decompressor, "stream_reader") else library.open(packed)
    try:
        while piece := stream.read(1 << 22):
            yield piece
    except (library.ZstdError, EOFError) as error:
        raise DeltaError(f"{path} cannot be unpacked: {error}") from error
