"""Many finetunes over one base in memory: one of them at a time is in the model's weights, and changed in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanoadam.delta import ops
from nanoadam.delta.application import Application, replace_tensor
from nanoadam.delta.bits import bits
from nanoadam.delta.entry import Entry
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.jobs import Job
from nanoadam.delta.patch import Patch, as_patch
from nanoadam.delta.sources import tensors_of

_Request = TypeVar("_Request")


class Switch:
    """A base model and patches for it, held on the model's devices.

    A patch takes 1.1 bytes a changed weight for where it is and, twice, the weight itself: its value there and the
    base's. Switching writes the base's values back and the next patch's in: every weight is as exact as the patch says.

    ```python
    switch = Switch(model)
    switch.add("law", "law.safetensors")
    switch.add("medicine", "medicine.safetensors")
    for name, requests in switch.batches(waiting, key=lambda request: request.finetune):
        answer(model, requests)
    ```

    Args:
        model: the base. What is done to its weights by others goes unseen while a patch is in it.

    Attributes:
        current: the name of the patch that is in the weights; None for the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: str | None = None
        self._loaded: dict[str, _Loaded] = {}

    def add(self, name: str, patch: Patch | str | os.PathLike[str], *, verify: bool = True) -> None:
        """Hold one more patch; the weights are the base's afterwards.

        Raises:
            DeltaError: if the name is taken, or the patch does not fit the base. Nothing has changed then.
        """
        if name in self._loaded:
            raise DeltaError(f"there is a patch {name!r} already: remove it first")
        found = as_patch(patch, verify=verify)
        self.to(None)
        with torch.no_grad():
            application = Application(self.model, found, 1.0, verify)
            undo = application.run()
            loaded = _load(self.model, application.patch, undo)
            loaded.write(self.model, tuned=False)
        self._loaded[name] = loaded

    def remove(self, name: str) -> None:
        """Let go of a patch.

        Raises:
            DeltaError: if there is none of this name.
        """
        self._get(name)
        if self.current == name:
            self.to(None)
        del self._loaded[name]

    @property
    def names(self) -> list[str]:
        """Of the patches that are held."""
        return list(self._loaded)

    @property
    def nbytes(self) -> int:
        """Bytes that the patches take, beside the model."""
        return sum(loaded.nbytes for loaded in self._loaded.values())

    @torch.no_grad()
    def to(self, name: str | None) -> None:
        """Have the weights be those of a patch, or with None of the base.

        Raises:
            DeltaError: if there is none of this name; nothing has changed then.
        """
        coming = None if name is None else self._get(name)
        if name == self.current:
            return
        if self.current is not None:
            self._loaded[self.current].write(self.model, tuned=False)
            self.current = None
        if coming is not None:
            coming.write(self.model, tuned=True)
        self.current = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """The model with a patch within a `with`, as it was afterwards.

        Raises:
            DeltaError: as `to`.
        """
        before = self.current
        self.to(name)
        try:
            yield self.model
        finally:
            self.to(before)

    def batches(
        self, requests: Iterable[_Request], key: Callable[[_Request], str | None]
    ) -> Iterator[tuple[str | None, list[_Request]]]:
        """Requests by the patch that they want, the weights switched to it: each once, the present one first.

        Args:
            requests: in the order in which they came.
            key: the name of the patch that a request wants; None for the base.

        Raises:
            DeltaError: if a request wants a patch that is not held, before any of them is given out.
        """
        groups: dict[str | None, list[_Request]] = {}
        for request in requests:
            groups.setdefault(key(request), []).append(request)
        for name in groups:
            if name is not None:
                self._get(name)
        for name in sorted(groups, key=lambda name: name != self.current):
            self.to(name)
            yield name, groups[name]

    def _get(self, name: str) -> _Loaded:
        try:
            return self._loaded[name]
        except KeyError:
            known = ", ".join(self._loaded) or "none"
            raise DeltaError(f"there is no patch {name!r}; those that are held: {known}") from None


@dataclass
class _Loaded:
    """A patch that fits the model, and the base's values at its places."""

    jobs: list[Job] = field(default_factory=list)
    tuned: list[Tensor] = field(default_factory=list)
    base: list[Tensor] = field(default_factory=list)
    whole: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # name, tuned, base

    @property
    def nbytes(self) -> int:
        parts = [part for job in self.jobs for name, part in job.entry.parts.items() if name != "values"]
        return sum(each.nbytes for each in (*parts, *self.tuned, *self.base, *(t for w in self.whole for t in w[1:])))

    def write(self, model: nn.Module, *, tuned: bool) -> None:
        ops.write(self.jobs, self.tuned if tuned else self.base)
        if self.whole:
            tensors = tensors_of(model)
            for name, of_patch, of_base in self.whole:
                weight, values = tensors.tensor(name), of_patch if tuned else of_base
                if (weight.dtype, weight.shape) == (values.dtype, values.shape):
                    bits(weight).copy_(bits(values))
                else:
                    replace_tensor(model, name, values.clone())


def _load(model: nn.Module, patch: Patch, undo: Patch) -> _Loaded:
    tensors, loaded = tensors_of(model), _Loaded()
    for name, before in undo.items():
        entry = _entry_for(patch, name, before)
        weight = tensors.tensor(name)
        if entry.kind in ("sparse", "columns"):
            own = ops.coded(entry.to(weight.device))
            loaded.jobs.append(Job(own, weight))
            loaded.tuned.append(own.values)
            loaded.base.append(before.values)
        else:
            loaded.whole.append((name, entry.values.to(weight.device), before.values))
    return loaded


def _entry_for(patch: Patch, name: str, undo: Entry) -> Entry:
    """The entry that an undo takes back; it has the model's own name for the tensor."""
    names = {other: entry for entry in patch.values() for other in (entry.name, *entry.tied)}
    return next(names[each] for each in (name, *undo.tied, patch.prefix + name) if each in names)
