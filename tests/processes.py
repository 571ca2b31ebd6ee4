"""Run a function in several gloo processes on this machine, and get what each returned."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        result = function(rank, size, *arguments)
    except Exception:
        traceback.print_exc()
        raise
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, size, *arguments)` on each of `size` processes; a function of a module, results that pickle."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, args=(size, _free_port(), folder, function, arguments), nprocs=size)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(size)]
