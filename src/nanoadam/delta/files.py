"""safetensors files, read with suspicion and written whole or not at all.

The library's own reader leaves things open that a patch may not: names that stand twice in the header, files that
change while they are mapped. Its own writer wants all tensors in memory. The format itself is theirs:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nanoadam.delta.bits import DTYPES
from nanoadam.delta.errors import DeltaError

MAX_HEADER = 100_000_000
"""Bytes of a header that safetensors accepts."""

SEAL = "#sha256"
"""The last tensor of a sealed file: SHA-256 of all bytes before it."""

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Item:
    """One tensor of a file: dtype by its name in safetensors, and where its bytes lie, from the data's start on."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.end - self.begin


class SafeFile:
    """A safetensors file, open for reading; its header is checked to the last byte.

    Raises:
        DeltaError: if it is no whole safetensors file, naming it and what is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=0)
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            raise DeltaError(f"{self.path} cannot be read: {error}") from error
        weakref.finalize(self, self._file.close)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.start, header = self._header()
        except OSError as error:  # a folder, a disk that fails
            raise DeltaError(f"{self.path} cannot be read: {error.strerror or error}") from error
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.items = {name: self._item(name, fields) for name, fields in header.items()}
        self._check_extent()

    def _fail(self, what: str) -> DeltaError:
        return DeltaError(f"{self.path} is not a whole safetensors file: {what}")

    def _header(self) -> tuple[int, dict[str, Any]]:
        if self.size < 8:
            raise self._fail(f"it has {self.size} bytes")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(MAX_HEADER, self.size - 8):
            raise self._fail(f"its header should have {length} bytes, the file has {self.size}")
        try:
            header = json.loads(bytes(self._read(8, length)).decode(), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            if isinstance(error, DeltaError):
                raise
            raise self._fail(f"its header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._fail("its header is no table")
        return 8 + length, header

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise self._fail(f"the name {twice!r} stands twice in its header")
        return found

    def _metadata(self, given: Any) -> dict[str, str]:
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise self._fail("its metadata is no table of texts")
        return given

    def _item(self, name: str, fields: Any) -> Item:
        wanted = {"dtype", "shape", "data_offsets"}
        if not isinstance(fields, dict) or set(fields) != wanted or not isinstance(fields["dtype"], str):
            raise self._fail(f"the entry of {name!r} must have dtype, shape and data_offsets")
        shape, span = fields["shape"], fields["data_offsets"]
        if not (_counts(shape) and _counts(span) and len(span) == 2 and span[0] <= span[1]):
            raise self._fail(f"shape or data_offsets of {name!r} are not counts")
        item = Item(fields["dtype"], tuple(shape), span[0], span[1])
        dtype = DTYPES.get(item.dtype)
        if dtype is not None and math.prod(item.shape) * dtype.itemsize != item.nbytes:
            raise self._fail(
                f"{name!r} has {item.nbytes} bytes, its shape {list(shape)} in {item.dtype} another number"
            )
        return item

    def _check_extent(self) -> None:
        at = 0
        for name, item in sorted(self.items.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
            if item.begin != at:
                raise self._fail(
                    f"{name!r} begins at byte {item.begin} of the data, not where the one before ends, {at}"
                )
            at = item.end
        if self.start + at != self.size:
            raise self._fail(f"it should have {self.start + at} bytes, it has {self.size}")

    def _read(self, begin: int, count: int) -> bytearray:
        content = bytearray(count)
        self._file.seek(begin)
        view = memoryview(content)
        done = 0
        while done < count:
            got = self._file.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
            if not got:
                raise self._fail(f"it ends at byte {begin + done}, {begin + count} were expected")
            done += got
        return content

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes: uint8."""
        item = self.items[name]
        return _as_tensor(self._read(self.start + item.begin, item.nbytes))

    def tensor(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            DeltaError: if its dtype is not known here.
        """
        return view(self.bytes_of(name), self.items[name], f"{name!r} in {self.path}")

    def everything(self) -> Tensor:
        """All data behind the header: uint8. Items lie in it from `begin` to `end`."""
        return _as_tensor(self._read(self.start, self.size - self.start))

    def check_seal(self) -> None:
        """Hold the file against the SHA-256 that ends it.

        Raises:
            DeltaError: if it has none, or another.
        """
        item = self.items.get(SEAL)
        if item is None or item.nbytes != 32 or self.start + item.end != self.size:
            raise DeltaError(f"{self.path} does not end with its SHA-256: it is no patch, or a damaged one")
        digest, at, end = hashlib.sha256(), 0, self.size - 32
        while at < end:
            piece = self._read(at, min(_CHUNK, end - at))
            digest.update(piece)
            at += len(piece)
        if digest.digest() != bytes(self._read(end, 32)):
            raise DeltaError(f"{self.path} is damaged: its SHA-256 is not the one it ends with. Get it again")


def _counts(given: Any) -> bool:
    return isinstance(given, list) and all(type(count) is int and 0 <= count < 2**63 for count in given)


def _as_tensor(content: bytearray) -> Tensor:
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def view(content: Tensor, item: Item, where: str) -> Tensor:
    """Bytes (uint8) as the tensor that they are.

    Raises:
        DeltaError: for a dtype that is not known here.
    """
    dtype = DTYPES.get(item.dtype)
    if dtype is None:
        raise DeltaError(f"{where} has dtype {item.dtype}, which this version of torch or nanoadam does not know")
    if not content.numel():
        return torch.empty(item.shape, dtype=dtype, device=content.device)
    if content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(dtype).view(item.shape)


@dataclass(frozen=True)
class Source:
    """One tensor to be written: what the header says, and who gives its bytes (tensors of any dtype, in order)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[Tensor]]


def memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous and on the CPU. Valid while the tensor is."""
    size = tensor.nbytes
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's content as contiguous tensors on the CPU, one after the other."""
    content = tensor.detach().reshape(-1)
    for part in content.split(max(1, _CHUNK // tensor.element_size())):
        yield part.to("cpu").contiguous()


def write(
    path: str | os.PathLike[str], sources: Iterable[Source], metadata: Mapping[str, str], *, seal: bool = False
) -> None:
    """Write a safetensors file that is there whole, or not at all.

    Args:
        path: replaced if it exists.
        sources: tensors; those of large elements are moved to the front, so that every one is aligned.
        metadata: texts.
        seal: end the file with its SHA-256.

    Raises:
        DeltaError: if it cannot be written; what was there before is still there.
    """
    ordered = sorted(sources, key=lambda source: -_itemsize(source.dtype))
    if seal:
        ordered.append(Source(SEAL, "U8", (32,), 32, tuple))
    header = _encode_header(ordered, metadata)
    with replacing(path) as file:
        digest = hashlib.sha256()
        for chunk in _chunks(header, ordered):
            digest.update(chunk) if seal else None
            file.write(chunk)
        if seal:
            file.write(digest.digest())


def _itemsize(dtype: str) -> int:
    known = DTYPES.get(dtype)
    return 1 if known is None else known.itemsize


def _encode_header(sources: list[Source], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for source in sources:
        if source.name in header or source.name == "__metadata__":
            raise DeltaError(f"the name {source.name!r} stands twice: rename one of the tensors")
        header[source.name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [at, at + source.nbytes],
        }
        at += source.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise DeltaError(f"a header of {len(text)} bytes: safetensors accepts {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _chunks(header: bytes, sources: list[Source]) -> Iterator[bytes | memoryview]:
    yield header
    for source in sources:
        written = 0
        for piece in source.pieces():
            yield memory(piece)
            written += piece.nbytes
        if written != source.nbytes and source.name != SEAL:
            raise DeltaError(f"{source.name!r} gave {written} bytes where {source.nbytes} were announced")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes its name once it is whole and on the disk.

    Raises:
        DeltaError: if it cannot be written.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with staged.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            with contextlib.suppress(OSError):
                staged.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise DeltaError(f"{path} cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Have a new name in a folder survive a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
