"""Several processes that make one run, as torchrun or `accelerate launch` start them: the first writes and speaks.

With one process everything here does nothing. The command imports it, so torch is imported where it is needed.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""As long the others wait while the first process writes; transformers' own."""


def count() -> int:
    """How many there are, before anything of torch.distributed is initialized too."""
    found = os.environ.get("WORLD_SIZE", "1")
    return int(found) if found.isdecimal() and "LOCAL_RANK" in os.environ else 1  # clusters set the one alone


def rank() -> int:
    """Which one this is."""
    found = os.environ.get("RANK", "0")
    return int(found) if count() > 1 and found.isdecimal() else 0


def first() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def joined() -> bool:
    """Whether this process has met the others."""
    if count() < 2:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def join(cpu: bool) -> None:
    """Meet the other processes, each with its own GPU, unless that has been done.

    Raises:
        ValueError: for a launcher that wants to shard the model in its own way.
    """
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate is set to use {what}: start the command with torchrun, or with accelerate launch "
                "--multi_gpu, and say --shard to spread model and state over the processes (PyTorch's FSDP2, which "
                "does what DeepSpeed ZeRO-3 does)"
            )
    if count() > 1 and not joined():
        import torch
        from accelerate import PartialState

        cpu = cpu or not torch.accelerator.is_available()
        PartialState(cpu=cpu, **({} if cpu else {"timeout": TIMEOUT}))


def wait() -> None:
    """Go on when all have come here."""
    if joined():
        shared(None)  # a barrier needs to be told the device


def shared(value: T) -> T:
    """What the first process has, on all."""
    if not joined():
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def gathered(value: T) -> list[T]:
    """What each process has, on all, in their order."""
    if not joined():
        return [value]
    import torch.distributed as dist

    box: list[Any] = [None] * count()
    dist.all_gather_object(box, value)
    return box


def total(value: Tensor) -> Tensor:
    """The sum over all processes, on all."""
    found = value.detach().clone()
    if joined():
        import torch.distributed as dist

        dist.all_reduce(found)
    return found


def by_first(make: Callable[[], T]) -> T:
    """What the first process makes while the others wait, on all."""
    return shared(make() if first() else None)  # type: ignore[return-value]


def leave(code: int) -> int:
    """End this process with an exit code, if it is one of several: torch's threads now and then abort one that ends."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
