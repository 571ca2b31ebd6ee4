"""Updates through torch.distributed: a few broadcasts from the trainer to its servers, by NCCL or gloo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nanoadam.delta.bits import DTYPES, nbytes
from nanoadam.delta.bits import dtype_name as name_of
from nanoadam.delta.description import describe, parse
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import Item, memory
from nanoadam.delta.patch import Patch
from nanoadam.delta.sync.updates import Update

_MAGIC = 0x6E616E6F64656C74
_BUCKET = 64 << 20
"""Bytes of parts that are sent together, of one dtype."""


class GroupChannel:
    """A group of processes of which one is the trainer and all others are servers; every one calls for every update.

    Three broadcasts and more: sizes, what is sent (JSON), and the parts, in buckets of 64 MB. Then each server says
    which version it has, so that the trainer knows whether to reseed.

    Args:
        group: None for all processes.
        source: the trainer's rank, counted over all processes.
        device: of what is sent; by default the current GPU with NCCL, the CPU with gloo.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, source: int = 0, device: torch.device | str | None = None
    ) -> None:
        self.group, self.source = group, source
        if device is None:
            device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
        self.device = torch.device(device)
        self._latest = 0

    def latest(self) -> int:
        """As `Channel.latest`: groups do not outlive their processes."""
        return self._latest

    def send(self, update: Update) -> bool:
        """As `Channel.send`."""
        entries = [_listed(entry) for entry in update.patch.values()]
        parts = [(f"{e.name}#{part}", tensor) for e in entries for part, tensor in e.parts.items()]
        text = json.dumps({
            "version": update.version,
            "previous": update.previous,
            "parts": [[name, name_of(tensor.dtype, name), list(tensor.shape)] for name, tensor in parts],
            "patch": describe(replace(update.patch.about(), untouched=None), entries),
        }).encode()  # fmt: skip
        self._broadcast(torch.tensor([_MAGIC, len(text)], dtype=torch.int64))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for _, bucket in _buckets([(tensor.dtype, tensor.nbytes) for _, tensor in parts]):
            rows = [parts[i][1].to(self.device).reshape(-1) for i in bucket]
            content = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
            self._broadcast(content.view(torch.uint8))
        self._latest = update.version
        return self._confirmed(update.version) == update.version

    def receive(self, version: int) -> Update | None:
        """As `Channel.receive`: waits for the trainer."""
        magic, length = self._broadcast(torch.empty(2, dtype=torch.int64)).tolist()
        if magic != _MAGIC:
            raise DeltaError("what comes from the group is no update: trainer and servers must make the same calls")
        text = self._broadcast(torch.empty(length, dtype=torch.uint8)).cpu()
        given = json.loads(bytes(memory(text)))
        items = _items(given["parts"])
        names = list(items)
        contents: dict[str, Tensor] = {}
        for dtype, bucket in _buckets([(DTYPES[item.dtype], item.nbytes) for item in items.values()]):
            counts = [items[names[i]].nbytes // dtype.itemsize for i in bucket]
            content = torch.empty(sum(counts), dtype=dtype, device=self.device)
            self._broadcast(content.view(torch.uint8))
            rows = content.split(counts)
            contents |= {names[i]: row.view(items[names[i]].shape) for i, row in zip(bucket, rows, strict=True)}
        about, entries = parse(given["patch"], items, "the update", listed=True)
        filled = {
            entry.name: replace(entry, parts={part: contents[f"{entry.name}#{part}"] for part in entry.parts})
            for entry in entries
        }
        return Update(given["version"], given["previous"], Patch(filled, about.base, about.prefix, about.removed))

    def confirm(self, version: int) -> None:
        """As `Channel.confirm`."""
        self._confirmed(version)

    def _confirmed(self, version: int) -> int:
        lowest = torch.tensor([version], dtype=torch.int64, device=self.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.group)
        return int(lowest)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        if tensor.numel():
            dist.broadcast(tensor, self.source, group=self.group)
        return tensor


def _listed(entry: Entry) -> Entry:
    """With positions listed: on a fast wire coding them would take longer than sending them."""
    if entry.kind != "sparse" or not entry.is_coded:
        return entry
    positions = entry.positions()
    small = positions.to(torch.int32) if entry.numel < 2**31 else positions
    return replace(entry, parts={"positions": small, "values": entry.values}, bits=0)


def _buckets(parts: Sequence[tuple[torch.dtype, int]]) -> Iterator[tuple[torch.dtype, list[int]]]:
    """Which parts go together, by their dtypes and bytes: the same on both sides."""
    for dtype in dict.fromkeys(dtype for dtype, _ in parts):
        bucket: list[int] = []
        held = 0
        for i, (own, size) in enumerate(parts):
            if own != dtype:
                continue
            if bucket and held + size > _BUCKET:
                yield dtype, bucket
                bucket, held = [], 0
            bucket.append(i)
            held += size
        if bucket:
            yield dtype, bucket


def _items(parts: list[list[object]]) -> dict[str, Item]:
    items = {}
    for name, dtype, shape in parts:
        assert isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)
        items[name] = Item(dtype, tuple(shape), 0, nbytes(DTYPES[dtype], tuple(shape)))
    return items
