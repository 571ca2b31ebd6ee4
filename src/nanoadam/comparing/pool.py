"""Work spread over processes, each with a GPU of its own choice and its share of the CPU's threads.

Processes are started anew (spawn), keep what they have imported and read, and are replaced when they die or when
their GPU no longer answers, so that one bad item costs that item alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Read by numerical libraries when they are imported, so that N processes do not start N times all cores.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_GPUS = "CUDA_VISIBLE_DEVICES"


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    jobs: int,
    lost: Callable[[Item, str], Result],
    started: Callable[[Item], None] = lambda item: None,
    after: Sequence[int | None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Do all items, in this process or in several, and yield each one's position and result as it is done.

    Args:
        work: a function at the top level of a module; raises nothing that it can help.
        items: can be pickled. They are started in order.
        jobs: how many processes; with 1 it is this one.
        lost: makes the result of an item whose process died; is given what is known of it.
        started: called when an item begins.
        after: for each item the position of an earlier one that has to be done before it begins, or None.

    Raises:
        ValueError: for less than one process.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    needed = [None] * len(items) if after is None else after
    done: set[int | None] = {None}
    if jobs == 1:
        for position, item in enumerate(items):
            started(item)
            yield position, work(item)
        return
    waiting = list(enumerate(items))
    workers: dict[Connection, _Worker] = {}

    def deal() -> None:
        for worker in workers.values():
            ready = (i for i, (position, _) in enumerate(waiting) if needed[position] in done)
            if worker.at is None and (index := next(ready, None)) is not None:
                worker.at, item = waiting.pop(index)
                started(item)
                with contextlib.suppress(OSError):  # it has died: reading from it will say so
                    worker.pipe.send(item)

    try:
        for number in range(min(jobs, len(items))):
            worker = _Worker(work, number, jobs)
            workers[worker.pipe] = worker
        deal()
        while any(worker.at is not None for worker in workers.values()):
            for pipe in wait([worker.pipe for worker in workers.values() if worker.at is not None]):
                assert isinstance(pipe, Connection)
                worker = workers[pipe]
                assert worker.at is not None
                position = worker.at
                try:
                    result, sound = pipe.recv()
                except (EOFError, ConnectionError):
                    worker.process.join()
                    result, sound = (
                        lost(items[position], f"its process ended with code {worker.process.exitcode}"),
                        False,
                    )
                worker.at = None
                done.add(position)
                if not sound and waiting:
                    worker.stop()
                    del workers[pipe]
                    worker = _Worker(work, worker.number, jobs)
                    workers[worker.pipe] = worker
                deal()
                yield position, result
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    """One process, and the position of the item it is at."""

    def __init__(self, work: Callable[[Any], Any], number: int, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.number = number
        self.at: int | None = None
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.process = context.Process(target=_serve, args=(theirs, work, threads), daemon=True)
        with _environment({**dict.fromkeys(_THREADS, str(threads)), **_gpu(number)}):
            self.process.start()
        theirs.close()

    def stop(self) -> None:
        """End it, whatever it is at."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _gpu(number: int) -> dict[str, str]:
    """The variable that shows a process its GPU: the visible ones in turn."""
    seen = os.environ.get(_GPUS)
    names = [str(i) for i in range(torch.cuda.device_count())] if seen is None else [n for n in seen.split(",") if n]
    return {_GPUS: names[number % len(names)]} if names else {}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Callable[[Any], Any], threads: int) -> None:
    """What a process does: items, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            result = work(pipe.recv())
            sound = _sound()
            pipe.send((result, sound))
            if not sound:
                return


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on writing where the next one begins again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _sound() -> bool:
    """Whether the GPU still answers: after some errors it never does again in the same process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
