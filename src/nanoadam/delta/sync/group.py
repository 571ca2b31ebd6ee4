"""Updates through torch.distributed: a few broadcasts from the trainer to its servers, by NCCL or gloo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nanoadam.delta.bits import DTYPES, flat, nbytes
from nanoadam.delta.bits import dtype_name as name_of
from nanoadam.delta.description import describe, parse
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import Item
from nanoadam.delta.patch import Patch
from nanoadam.delta.sync.updates import Update

_MAGIC = 0x6E616E6F64656C74
_BUCKET = 64 << 20
"""Bytes of small parts that are sent together."""

_ALIGN = 16


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
        parts = [(f"{e.name}#{part}", tensor.contiguous()) for e in entries for part, tensor in e.parts.items()]
        text = json.dumps({
            "version": update.version,
            "previous": update.previous,
            "parts": [[name, name_of(tensor.dtype, name), list(tensor.shape)] for name, tensor in parts],
            "patch": describe(replace(update.patch.about(), untouched=None), entries),
        }).encode()  # fmt: skip
        self._broadcast(torch.tensor([_MAGIC, len(text)], dtype=torch.int64))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        sizes = [tensor.nbytes for _, tensor in parts]
        for bucket in _buckets(sizes):
            if len(bucket) == 1:
                self._broadcast(flat(parts[bucket[0]][1]).view(torch.uint8))
                continue
            content = torch.empty(sum(_padded(sizes[i]) for i in bucket), dtype=torch.uint8, device=self.device)
            at = 0
            for i in bucket:
                content[at : at + sizes[i]].copy_(flat(parts[i][1]).view(torch.uint8), non_blocking=True)
                at += _padded(sizes[i])
            self._broadcast(content)
        self._latest = update.version
        return self._confirmed(update.version) == update.version

    def receive(self, version: int) -> Update | None:
        """As `Channel.receive`: waits for the trainer."""
        magic, length = self._broadcast(torch.empty(2, dtype=torch.int64)).tolist()
        if magic != _MAGIC:
            raise DeltaError("what comes from the group is no update: trainer and servers must make the same calls")
        text = bytes(self._broadcast(torch.empty(length, dtype=torch.uint8)).cpu().tolist())
        given = json.loads(text)
        items = _items(given["parts"])
        contents: dict[str, Tensor] = {}
        names = list(items)
        for bucket in _buckets([item.nbytes for item in items.values()]):
            mine = {names[i]: items[names[i]] for i in bucket}
            padded = sum(_padded(item.nbytes) for item in mine.values())
            size = next(iter(mine.values())).nbytes if len(mine) == 1 else padded
            contents |= _views(self._broadcast(torch.empty(size, dtype=torch.uint8, device=self.device)), mine)
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


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _buckets(sizes: list[int]) -> Iterator[list[int]]:
    """Which parts go together, in order: the same on both sides."""
    bucket: list[int] = []
    held = 0
    for i, size in enumerate(sizes):
        if bucket and held + size > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(i)
        held += size
    if bucket:
        yield bucket


def _items(parts: list[list[object]]) -> dict[str, Item]:
    items = {}
    for name, dtype, shape in parts:
        assert isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)
        items[name] = Item(dtype, tuple(shape), 0, nbytes(DTYPES[dtype], tuple(shape)))
    return items


def _views(content: Tensor, items: Mapping[str, Item]) -> dict[str, Tensor]:
    views, at = {}, 0
    for name, item in items.items():
        part = content[at : at + item.nbytes]
        dtype = DTYPES[item.dtype]
        views[name] = part.view(dtype).view(item.shape) if item.nbytes else part.new_empty(item.shape, dtype=dtype)
        at += _padded(item.nbytes)
    return views
