"""What travels between replicas, and in which flat buffers.

A gradient travels as its selected entries where the optimizer releases it, and whole otherwise. Which of the two, and
how many numbers, follows from options and shapes alone, never from what a batch has touched: so every process cuts the
same buffers, without asking.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoadam.gradients import SelectedGradient, is_zeroed
from nanoadam.ops import Slot, reference
from nanoadam.optimizer import NanoAdam

BUCKET_BYTES = 25 << 20
"""Of a buffer, as DDP has it: smaller ones begin to travel earlier, larger ones waste less on each collective."""


@dataclass(eq=False)
class Item:
    """The gradient of one parameter, as it travels."""

    name: str
    parameter: Tensor
    slot: Slot | None  # its selected entries travel; None: all of it
    dtype: torch.dtype  # as they travel
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_taken(self) -> bool:
        """Whether the optimizer has taken the selected entries already, where it will."""
        return self.slot is None or type(self.parameter.grad) is SelectedGradient

    def outgoing(self) -> Tensor | None:
        """What this process has to say: of `shape` and `dtype`; None for nothing.

        Raises:
            TypeError: for a sparse gradient.
        """
        gradient, slot = self.parameter.grad, self.slot
        if gradient is None or is_zeroed(gradient):
            return None
        if gradient.layout != torch.strided:
            raise TypeError(
                f"the gradient of {self.name!r} is sparse; replicas exchange dense ones: make its nn.Embedding with "
                "sparse=False"
            )
        if slot is None:
            return (gradient.to_dense() if type(gradient) is SelectedGradient else gradient).to(self.dtype)
        assert slot.selection is not None
        if type(gradient) is SelectedGradient:
            return gradient._box.moved_to(slot.selection).to(self.dtype)
        return reference.take(slot.selection, gradient).to(self.dtype)


def items_of(named: Iterable[tuple[str, Tensor]], optimizer: NanoAdam) -> list[Item]:
    """What travels of these parameters, about in the order in which backward makes it."""
    found = []
    for name, parameter in named:
        if parameter.requires_grad and parameter.numel():
            slot, dtype = optimizer._released(parameter)
            shape = parameter.shape if slot is None else torch.Size(slot.layout.shape)
            found.append(Item(name, parameter, slot, dtype, shape))
    return found[::-1]


def signature(items: Iterable[Item]) -> int:
    """A number of 32 bits that tells plans apart."""
    plan = [(item.name, item.slot is None, str(item.dtype), tuple(item.shape)) for item in items]
    return zlib.crc32(repr(plan).encode())


@dataclass(eq=False)
class Bucket:
    """Gradients of one device and dtype that travel together."""

    items: list[Item]
    waiting: set[int] = field(default_factory=set)  # parameters whose gradients are still to come in this backward
    absent: list[tuple[Item, Tensor]] = field(default_factory=list)  # those this process has none of, and the averages
    whole: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # dense ones, and the averages
    flat: Tensor | None = None  # on its way
    work: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether all its gradients are there."""
        return not self.waiting and all(item.is_taken for item in self.items)

    def launch(self, optimizer: NanoAdam, group: dist.ProcessGroup | None) -> int:
        """Begin to average them over the processes; the bytes that this sends."""
        outgoing = [item.outgoing() for item in self.items]
        first, alone = self.items[0], outgoing[0] if len(outgoing) == 1 else None
        if alone is not None and alone is first.parameter.grad and alone.is_contiguous():
            flat = alone.view(-1)  # a dense one, as large as a bucket maybe: where it is
        else:
            device = first.parameter.device
            parts = [
                torch.zeros(item.shape, dtype=item.dtype, device=device) if its is None else its
                for item, its in zip(self.items, outgoing, strict=True)
            ]
            flat = torch.cat([part.reshape(-1) for part in parts])
            averages = flat.split([part.numel() for part in parts])
            for item, its, average in zip(self.items, outgoing, averages, strict=True):
                self._land_in(item, its is not None, average.view(item.shape), optimizer)
        flat.div_(dist.get_world_size(group))  # before they are added: float16 would overflow
        self.flat, self.work = flat, dist.all_reduce(flat, group=group, async_op=True)
        return flat.nbytes

    def carries(self, parameter: Tensor) -> bool:
        """Whether its gradient is on its way."""
        gradient = parameter.grad
        if self.flat is None or gradient is None or any(gradient is mine for mine, _ in self.whole):
            return self.flat is not None and gradient is not None
        stored = gradient._box.stored if type(gradient) is SelectedGradient else gradient
        return stored is not None and stored.untyped_storage().data_ptr() == self.flat.untyped_storage().data_ptr()

    def _land_in(self, item: Item, present: bool, average: Tensor, optimizer: NanoAdam) -> None:
        """Where an average goes: selected entries become a part of the buffer, so that nothing is held twice."""
        if not present:
            self.absent.append((item, average))
        elif item.slot is not None:
            optimizer._put(item.slot, average)
        elif item.parameter.grad is not None:
            self.whole.append((item.parameter.grad, average))

    def land(self) -> None:
        """Wait until the averages are there."""
        if self.work is None:
            return
        self.work.wait()
        self.flat = self.work = None
        if self.whole:
            torch._foreach_copy_([mine for mine, _ in self.whole], [average for _, average in self.whole])
            self.whole = []

    def fill(self, optimizer: NanoAdam, touched: set[int]) -> None:
        """Give parameters that this process has no gradient of what others have, if they have."""
        for item, average in self.absent:
            if id(item.parameter) in touched:
                if item.slot is None:
                    item.parameter.grad = average.to(item.parameter.dtype).clone()
                else:
                    optimizer._put(item.slot, average)
        self.absent = []


def cut(items: Iterable[Item], bucket_bytes: int) -> list[Bucket]:
    """Items in buckets, in the order in which their last ones come."""
    full: list[Bucket] = []
    filling: dict[tuple[torch.device, torch.dtype], Bucket] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for item in items:
        kind = item.parameter.device, item.dtype
        if sizes.get(kind, 0) + item.nbytes > bucket_bytes and kind in filling:
            full.append(filling.pop(kind))
            sizes[kind] = 0
        filling.setdefault(kind, Bucket([])).items.append(item)
        sizes[kind] = sizes.get(kind, 0) + item.nbytes
    return [*full, *filling.values()]
