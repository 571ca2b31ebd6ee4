"""The operations on patches, each with one signature and two implementations, as in `nanoadam.ops`.

`reference` is plain PyTorch, runs on any device and is the definition. `triton` does the same on GPUs with one launch
for a list of tensors. `NANOADAM_BACKEND=reference|triton` forces one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from nanoadam.chunks import Layout
from nanoadam.delta.coding import Coded
from nanoadam.delta.entry import Entry
from nanoadam.delta.hashing import total
from nanoadam.delta.jobs import Found, Job


class Backend(Protocol):
    """The operations. All tensors of a call are on one device; lists may be empty."""

    def hashes(self, tensors: Sequence[Tensor]) -> Tensor:
        """The hash of each tensor: int64 [tensors], on the device, which nobody waits for."""

    def inspect(self, jobs: Sequence[Job], *, hashed: bool) -> list[Found]:
        """Look at what would be changed, and change nothing.

        Args:
            jobs: what would be changed.
            hashed: work out what it would do to the hashes; else `change` is 0.

        Raises:
            DeltaError: if the positions of an entry are out of order or out of range.
        """

    def write(self, jobs: Sequence[Job], values: Sequence[Tensor]) -> None:
        """Write values (of each entry's values' shape) to the places of entries that were inspected."""

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Ascending positions of differing elements: int32 where they fit. Same dtype and shape."""

    def encode(self, positions: Tensor, numel: int) -> Coded:
        """As `coding.encode`."""

    def collect(
        self, weights: Sequence[Tensor], indices: Sequence[Tensor], layouts: Sequence[Layout]
    ) -> list[tuple[Tensor, Tensor]]:
        """Positions (as `changed`) and values of selected weights, from their indices within chunks; -1 is none."""


def backend(device: torch.device) -> Backend:
    """The implementation that serves a device.

    Raises:
        ValueError, RuntimeError: as `nanoadam.ops.backend`.
    """
    from nanoadam.ops import backend as core

    if core(device).__name__.endswith("triton"):  # type: ignore[attr-defined]
        from nanoadam.delta import triton

        return cast(Backend, triton)
    from nanoadam.delta import reference

    return cast(Backend, reference)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _by_device(
    items: Sequence[_Item],
    device_of: Callable[[_Item], torch.device],
    work: Callable[[Backend, list[int]], Iterable[_Result]],
) -> list[_Result]:
    """Do something on each device, and put the results into the order of the items."""
    places: dict[torch.device, list[int]] = {}
    for i, item in enumerate(items):
        places.setdefault(device_of(item), []).append(i)
    results: dict[int, _Result] = {}
    for device, mine in places.items():
        results.update(zip(mine, work(backend(device), mine), strict=True))
    return [results[i] for i in range(len(items))]


def hash_later(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """Have tensors hashed, whatever their devices; who calls the result waits for them."""
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    started = [(mine, backend(device).hashes([tensors[i] for i in mine])) for device, mine in places.items()]

    def results() -> list[int]:
        found = {i: total(value) for mine, values in started for i, value in zip(mine, values.tolist(), strict=True)}
        return [found[i] for i in range(len(tensors))]

    return results


def hash_all(tensors: Sequence[Tensor]) -> list[int]:
    """The hash of each tensor, from 0 to 2**64 - 1, whatever its device."""
    return hash_later(tensors)()


def inspect(jobs: Sequence[Job], *, hashed: bool) -> list[Found]:
    """As `Backend.inspect`, whatever the devices."""

    def work(own: Backend, mine: list[int]) -> list[Found]:
        return own.inspect([jobs[i] for i in mine], hashed=hashed)

    return _by_device(jobs, lambda job: job.weight.device, work)


def write(jobs: Sequence[Job], values: Sequence[Tensor]) -> None:
    """As `Backend.write`, whatever the devices."""

    def work(own: Backend, mine: list[int]) -> list[None]:
        own.write([jobs[i] for i in mine], [values[i] for i in mine])
        return [None] * len(mine)

    _by_device(jobs, lambda job: job.weight.device, work)


def coded(entry: Entry) -> Entry:
    """The entry with its positions coded, as files hold them."""
    if entry.kind != "sparse" or entry.is_coded:
        return entry
    return entry.with_code(backend(entry.values.device).encode(entry.parts["positions"], entry.numel))
