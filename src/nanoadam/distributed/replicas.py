"""Data parallel replicas that exchange the gradients of selected weights only, without DDP."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nanoadam import shards
from nanoadam.distributed import agreement, exchange
from nanoadam.distributed.agreement import Agreement
from nanoadam.distributed.exchange import Bucket
from nanoadam.optimizer import NanoAdam

_BROADCAST_BYTES = 64 << 20


def replicate(
    model: nn.Module,
    optimizer: NanoAdam,
    *,
    group: dist.ProcessGroup | None = None,
    bucket_bytes: int = exchange.BUCKET_BYTES,
    buffers: bool = True,
) -> Replica:
    """Train a model on several processes, each with a share of the data, as one process would with all of it.

    The weights and buffers of process 0 go to all, once. From then on `p.grad` is the average over the processes after
    every backward: of the selected entries where gradients are released, of the whole gradient for dense tensors and
    for parameters that another optimizer has. They travel in a few large collectives while backward goes on. Replicas
    select the same weights without talking, since they have the same ones; that they do is verified at every exchange.

    The model is trained as it is, not through a wrapper.

    Args:
        model: the same on every process, on the devices that it shall train on.
        optimizer: of this model. Parameters that it has not are averaged as well.
        group: the processes; None for all.
        bucket_bytes: gradients are collected until they are as many before they are sent.
        buffers: after each exchange all processes take over the buffers of process 0 (running statistics of
            BatchNorm), which under DDP happens at the next forward.

    Raises:
        TypeError: if the optimizer is no NanoAdam, or the model is wrapped or sharded.
        ValueError: if models or options differ between processes; says in what.
        RuntimeError: if torch.distributed was not initialised.
    """
    named = _check(model, optimizer, group)
    return Replica(named, list(model.buffers()), optimizer, group, bucket_bytes, buffers=buffers)


class Replica:
    """What `replicate` returns. It lives as long as the model, or until `remove()`.

    Args:
        named: the parameters that are exchanged.
        tensors: what else process 0 gives to all at the start, and, with `buffers`, after each exchange.
        ddp: who exchanges the others; its collectives are all begun before those of this one.

    Attributes:
        sent_bytes: bytes that this process has handed to collectives since then.
    """

    def __init__(
        self,
        named: list[tuple[str, Tensor]],
        tensors: Sequence[Tensor],
        optimizer: NanoAdam,
        group: dist.ProcessGroup | None,
        bucket_bytes: int = exchange.BUCKET_BYTES,
        *,
        buffers: bool = False,
        ddp: nn.parallel.DistributedDataParallel | None = None,
    ) -> None:
        self._named = named
        self._optimizer, self._group, self._bucket_bytes = optimizer, group, bucket_bytes
        self._buffers = tensors if buffers else []
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self.sent_bytes = 0
        self._lock = threading.RLock()  # autograd runs hooks in one thread per device
        self._backward = -1  # the one whose gradients are being collected
        self._silent = self._unsent = False  # in no_sync(); there are gradients that others have not seen
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._launched = 0
        self._agreement: Agreement | None = None
        self._sums: Tensor | None = None
        self._summed: tuple[Any, ...] = ()  # the selections and the exchange that the checksums are of
        self._exchanges = 0
        self._hooked: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._alone = dist.get_world_size(group) == 1
        if not self._alone:
            agreement.check_alike(agreement.description(self._named, optimizer), group)
            _broadcast([*(p for _, p in self._named), *tensors], group)
            agreement.check_state(optimizer, group, self._named[0][1].device)
            self._listen()
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def beside(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        """Follow the `no_sync()` of a wrapper, and begin after it."""
        if self._ddp is None or self._ddp() is not ddp:
            self._ddp = weakref.ref(ddp)

    def remove(self) -> None:
        """Exchange nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], set()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Collect gradients without exchanging them: they go along with those of the next backward outside of this."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    @torch.no_grad()
    def exchange(self) -> None:
        """Average `p.grad` over the processes now, for gradients that were not made by `backward()`.

        To be called on every process.
        """
        if not self._alone:
            with self._lock:
                self._land_rest()
                self._open()
                self._finish()

    # The course of one backward

    def _listen(self) -> bool:
        """Hear of the gradients of all parameters that are trained; whether some of them were not before."""
        new = [p for _, p in self._named if p.requires_grad and id(p) not in self._hooked]
        for parameter in new:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))
            self._hooked.add(id(parameter))
        return bool(new)

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """A gradient is there, or has grown."""
        with self._lock:
            ddp = None if self._ddp is None else self._ddp()
            if self._silent or (ddp is not None and not ddp.require_backward_grad_sync):
                self._unsent = True
                return
            backward = torch._C._current_graph_task_id()
            if backward != self._backward:  # a new one, or one within another (reentrant checkpointing)
                self._check_nested(parameter)
                self._land_rest()
                self._backward = backward
                if self._ddp is None:
                    self._open()
                torch.autograd.Variable._execution_engine.queue_callback(self._ended)
            if (bucket := self._bucket_of.get(id(parameter))) is not None:
                bucket.waiting.discard(id(parameter))
            while self._launched < len(self._buckets) and self._buckets[self._launched].is_ready:
                self._launch()

    def _open(self) -> None:
        """Decide what travels, alike on every process, and begin with whether they are still alike."""
        optimizer = self._optimizer
        optimizer._follow()
        optimizer._select_released()
        self._listen()
        items = exchange.items_of(self._named, optimizer)
        self._buckets, self._launched = exchange.cut(items, self._bucket_bytes), 0
        self._bucket_of = {id(item.parameter): bucket for bucket in self._buckets for item in bucket.items}
        for bucket in self._buckets:
            bucket.waiting = {id(item.parameter) for item in bucket.items}
        selections = [(id(item.slot), item.slot.version) for item in items if item.slot is not None]
        self._exchanges += 1
        period = self._exchanges // agreement.EVERY
        changed = self._summed != (selections, period)
        if changed or self._sums is None:
            self._sums, self._summed = agreement.checksums(items), (selections, period)
        steps = max(group["steps"] for group in optimizer.param_groups)
        self._agreement = Agreement(items, steps, self._sums, self._group)
        self.sent_bytes += agreement.BYTES
        # Buffers of unequal lengths would hang. A GPU is waited for only where what travels may have changed.
        if changed or self._sums.device.type == "cpu":
            self._agreement.check()

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        self._launched += 1
        self.sent_bytes += bucket.launch(self._optimizer, self._group)

    def _check_nested(self, parameter: Tensor) -> None:
        """Raise RuntimeError if a gradient has grown while it was on its way."""
        bucket = self._bucket_of.get(id(parameter))
        if bucket is not None and bucket.carries(parameter):
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a gradient within a backward that had sent its "
                "gradient already: a weight that is used inside and outside of reentrant checkpointing. Use "
                "use_reentrant=False"
            )

    def _land_rest(self) -> None:
        """Let what is on its way arrive, if a backward has begun within another or was broken off."""
        for bucket in self._buckets[: self._launched]:
            bucket.land()
        self._buckets, self._launched, self._backward = [], 0, -1

    @torch.no_grad()
    def _ended(self) -> None:
        with self._lock:
            if self._backward != -1:
                if self._ddp is not None:
                    self._open()
                self._finish()

    def _finish(self) -> None:
        """Send the rest, and wait for everything."""
        while self._launched < len(self._buckets):
            self._launch()
        items = [item for bucket in self._buckets for item in bucket.items]
        if not items:
            return
        absent = {id(item.parameter) for bucket in self._buckets for item, _ in bucket.absent}
        device = items[0].parameter.device
        flags = torch.tensor([id(item.parameter) not in absent for item in items], dtype=torch.uint8)
        flags = flags.to(device, non_blocking=True)
        work: Any = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self.sent_bytes += flags.nbytes
        for bucket in self._buckets:
            bucket.land()
        work.wait()
        if absent:  # which parameters some other process has touched: this waits for a GPU
            touched = {id(item.parameter) for item, flag in zip(items, flags.tolist(), strict=True) if flag}
            for bucket in self._buckets:
                bucket.fill(self._optimizer, touched)
        self.sent_bytes += _broadcast(self._buffers, self._group)
        self._backward, self._buckets, self._launched, self._unsent = -1, [], 0, False

    def _before_step(self, _: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Refuse to step on what would lead replicas apart; a closure makes the last gradients first."""
        closure = options.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._check_exchanged()
            return None

        def and_check() -> Any:
            loss = closure()
            with torch.no_grad():
                self._check_exchanged()
            return loss

        return (args[0], and_check), {}

    def _check_exchanged(self) -> None:
        if self._listen() and any(p.grad is not None for _, p in self._named):
            self.exchange()  # of parameters that were unfrozen
        if self._unsent and any(p.grad is not None for _, p in self._named):
            raise RuntimeError(
                "step() after a backward inside no_sync(): its gradients were not exchanged, so replicas would drift "
                "apart. Let the last backward before step() be outside of no_sync(), or call replica.exchange()"
            )
        if self._agreement is not None:
            self._agreement.check()
            self._agreement = None


def _check(model: nn.Module, optimizer: NanoAdam, group: dist.ProcessGroup | None) -> list[tuple[str, Tensor]]:
    """The model's parameters by name, each once.

    Raises:
        TypeError, ValueError, RuntimeError: for what cannot be replicated.
    """
    if not isinstance(optimizer, NanoAdam):
        raise TypeError(f"replicate() takes a NanoAdam, got {type(optimizer).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start with torchrun and call torch.distributed.init_process_group()"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "replicate() takes the place of DistributedDataParallel: give it model.module, the model inside"
        )
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    if not any(parameter.requires_grad for _, parameter in named):
        raise ValueError("the model has no parameter that is trained, so there is nothing to exchange")
    sharded = next((name for name, parameter in named if isinstance(parameter, shards.SHARDED)), None)
    if sharded is not None:
        raise TypeError(
            f"{sharded!r} is sharded (a DTensor): its gradients are exchanged by FSDP2. For replicas of shards give "
            "fully_shard a mesh of two dimensions"
        )
    known = {id(parameter) for _, parameter in named}
    theirs = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    foreign = next((parameter for parameter in theirs if id(parameter) not in known), None)
    if foreign is not None:
        raise ValueError(
            f"the optimizer has a parameter of shape {tuple(foreign.shape)} that is not in the model: make it from "
            "this model's parameters"
        )
    if dist.get_backend(group) == "nccl" and any(parameter.device.type == "cpu" for _, parameter in named):
        raise ValueError("NCCL exchanges what is on GPUs, but the model is on the CPU: move it there first")
    return named


@torch.no_grad()
def _broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> int:
    """Give every process what the first one has; the bytes that were sent."""
    source = dist.get_global_rank(group, 0) if group is not None else 0
    count = 0
    waiting: list[tuple[Any, Tensor, list[Tensor]]] = []
    for members in _batches(tensors):
        parts = [agreement.in_memory(tensor) for tensor in members]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        waiting.append((dist.broadcast(flat, source, group=group, async_op=True), flat, members))
        count += flat.nbytes
    for work, flat, members in waiting:
        work.wait()
        for tensor, part in zip(members, flat.split([tensor.nbytes for tensor in members]), strict=True):
            mine = agreement.in_memory(tensor)
            if mine.data_ptr() != part.data_ptr():
                mine.copy_(part)
            if mine.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():  # a copy: there are gaps
                tensor.copy_(mine.view(tensor.dtype).view(tensor.shape))
    return count


def _batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one device each, small ones together."""
    full: list[list[Tensor]] = []
    filling: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        mine = filling.setdefault(tensor.device, [])
        if mine and sum(each.nbytes for each in mine) + tensor.nbytes > _BROADCAST_BYTES:
            full.append(filling.pop(tensor.device))
            mine = filling.setdefault(tensor.device, [])
        mine.append(tensor)
    return [*full, *filling.values()]
