"""Whether replicas are still replicas: the same steps, the same selections, the same weights.

Masks agree by construction, as long as weights and options do. With each exchange 48 bytes travel that say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoadam import checks
from nanoadam.distributed.exchange import Item, signature
from nanoadam.optimizer import NanoAdam

EVERY = 100
"""Exchanges after which weights are compared even if no selection has changed."""

BYTES = 48
"""That one comparison sends."""

_POSITIVE = (1 << 62) - 1


class Drifted(RuntimeError):
    """Replicas are no longer the same, so their gradients cannot be averaged."""


def checksums(items: Sequence[Item]) -> Tensor:
    """Sums over the bits of the weights, and of what is selected: int64 [items, 2]. One pass over the weights."""
    found = []
    for item in items:
        selection = None if item.slot is None else item.slot.selection
        found.append(checksum(item.parameter))
        found.append(checksum(item.parameter[:0] if selection is None else selection.index))
    device = items[0].parameter.device
    return torch.stack([each.to(device) for each in found]).view(-1, 2)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Of all bits, as words of 64: torch would copy smaller ones to add them in 64."""
    bytes_ = in_memory(tensor)
    whole = bytes_.numel() // 8 * 8
    if bytes_.data_ptr() % 8 or bytes_.storage_offset() % 8:
        bytes_ = bytes_.clone()
    return bytes_[:whole].view(torch.int64).sum() + bytes_[whole:].sum(dtype=torch.int64)


def in_memory(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: uint8, one dimension; a view of it where its weights lie together in any order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach()
    if tensor.numel() and extent == tensor.numel():
        return flat.as_strided((extent,), (1,)).view(torch.uint8)
    return flat.contiguous().view(-1).view(torch.uint8)


class Agreement:
    """One comparison: begun before anything else is exchanged, looked at before that is used."""

    def __init__(self, items: Sequence[Item], steps: int, sums: Tensor, group: dist.ProcessGroup | None) -> None:
        self._items, self._steps, self._sums, self._group = items, steps, sums, group
        odd = torch.arange(1, 2 * sums.numel(), 2, device=sums.device).view(sums.shape)
        total = ((sums * odd).sum() & _POSITIVE).view(1)
        known = torch.tensor([steps, signature(items)]).to(sums.device, non_blocking=True)
        both = torch.cat([known, total, -known, -total])  # the largest of each, and the smallest
        work: Any = dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group, async_op=True)
        self._work, self._both, self._event = work, both, None
        if both.device.type == "cuda":
            side = torch.cuda.Stream(both.device)  # nothing else shall wait for it
            with torch.cuda.stream(side):
                work.wait()
                self._both = torch.empty(both.shape, dtype=torch.int64, pin_memory=True)
                self._both.copy_(both, non_blocking=True)
                both.record_stream(side)
                self._event = side.record_event()

    def check(self) -> None:
        """Wait for it.

        Raises:
            Drifted: if the replicas differ, on each of them.
        """
        if self._event is not None:
            self._event.synchronize()
        else:
            self._work.wait()
        most, least = self._both.view(2, 3).tolist()
        steps, plan, total = (a == -b for a, b in zip(most, least, strict=True))
        if not steps:
            raise Drifted(
                f"one replica has made {most[0]} steps and another {-least[0]}: call step() on every process, after "
                "the same backward passes"
            )
        if not plan:
            raise Drifted(
                f"at step {self._steps} replicas want to exchange different gradients: set options such as density, "
                "requires_grad and gradient_release on every process alike"
            )
        if not total:
            self._name()

    def _name(self) -> None:
        """Say which tensor it is."""
        everybody = [torch.empty_like(self._sums) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everybody, self._sums, group=self._group)
        differ = (torch.stack(everybody) != everybody[0]).cpu()
        places = differ.any(0).nonzero().tolist()
        item, kind = places[0]
        others = ", ".join(map(str, differ[:, item, kind].nonzero().view(-1).tolist()))
        raise Drifted(
            f"replicas have drifted apart: at step {self._steps} the {('weights', 'selection')[kind]} of "
            f"{self._items[item].name!r} differ between process 0 and process {others}, as do those of "
            f"{len({place[0] for place in places}) - 1} more tensors. Something has changed weights, rates or options "
            "on some processes only. nanoadam.distributed.replicate(...) sends those of process 0 to all"
        )


def description(named: Iterable[tuple[str, Tensor]], optimizer: NanoAdam) -> list[str]:
    """What has to be the same on every process, a line for each thing."""
    lines, names = [], {}
    for name, p in named:
        names[id(p)] = name
        lines.append(f"{name} is {tuple(p.shape)} {p.dtype}, {'trained' if p.requires_grad else 'frozen'}")
    options = (*checks.WATCHED, *checks.COUNTERS, "betas", "eps", "weight_decay")
    for i, group in enumerate(optimizer.param_groups):
        members = [names.get(id(parameter)) for parameter in group["params"]]
        lines.append(f"the parameters of group {i} are {members}")
        lines += [f"{name} of group {i} is {group[name]!r}" for name in options]
        lines.append(f"lr of group {i} is {float(group['lr'])!r}")
    return [*lines, f"gradient_release is {optimizer.gradient_release}"]


def check_alike(lines: list[str], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError, on every process, if a line differs between processes."""
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, lines, group=group)
    for rank, theirs in enumerate(everybody):
        for mine, other in zip(everybody[0], theirs, strict=False):
            if mine != other:
                raise ValueError(f"replicas must be alike, but on process 0 {mine}, and on process {rank} {other}")
        if len(theirs) != len(everybody[0]):
            raise ValueError(f"replicas must be alike, but processes 0 and {rank} have different numbers of parameters")


def check_state(optimizer: NanoAdam, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise ValueError, on every process, if the optimizer's state differs between processes."""
    parts = [value for slot in optimizer._slots.values() for value in slot.state.values()]
    found = torch.stack([checksum(value).to(device) for value in parts])
    both = torch.cat([found, -found])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(both[: len(parts)], -both[len(parts) :]):
        raise ValueError(
            "the optimizer's state differs between processes: load the same checkpoint on every process before "
            "replicate(model, optimizer), or make the optimizer after it"
        )
