"""Many small runs that share a GPU, each in a process that takes runs from a queue while there is time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

JOBS = "NANOADAM_BENCHMARK_JOBS"
"""The variable that tells a process how many share its GPU."""


def share_gpu() -> Any:
    """The device; of a GPU's memory this process takes its part and no more."""
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_per_process_memory_fraction(0.93 / int(os.environ.get(JOBS, "1")))
    return torch.device("cuda")


def work_through(
    folder: str,
    model: str,
    jobs: Any,
    results: Any,
    deadline: float,
    kind: Callable[..., Any],
    work: Callable[[Any, Any], Any],
) -> None:
    """Take runs while there are some and there is time; a `kind` of task is made once, `work` gives a run's line."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = share_gpu()
    tasks: dict[str, Any] = {}
    while time.time() < deadline:
        try:
            run = jobs.get(timeout=2)
        except queue.Empty:
            break
        try:
            if run.task not in tasks:
                tasks[run.task] = kind(Path(folder), model, run.task, device)
            results.put((run.name, work(tasks[run.task], run)))
        except Exception as error:  # the others are to go on
            results.put((run.name, {**dataclasses.asdict(run), "model": model, "error": repr(error)}))
    results.put(None)


def shared_run(arguments: Any, chosen: Callable[[str], Sequence[Any]], target: Callable[..., None]) -> None:
    """The runs of each model in turn, in processes that share a GPU; `target` is what each process does."""
    deadline = time.time() + arguments.seconds
    models = arguments.models.split(",")
    for number, model in enumerate(models):
        until = deadline - (deadline - time.time()) * (len(models) - number - 1) / (len(models) - number)
        runs = chosen(model)
        left = _many(arguments, model, runs, until, target)
        print(f"{model}: {len(runs) - left} of {len(runs)} runs done", flush=True)


def _many(arguments: Any, model: str, runs: Sequence[Any], until: float, target: Callable[..., None]) -> int:
    os.environ[JOBS] = str(arguments.jobs)
    context = multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for run in runs:
        jobs.put(run)
    workers = [
        context.Process(target=target, args=(str(arguments.data), model, jobs, results, until), daemon=True)
        for _ in range(arguments.jobs)
    ]
    for worker in workers:
        worker.start()
    ended, done = 0, 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        while ended < len(workers) and time.time() < until + 20:
            try:
                found = results.get(timeout=5)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    break
                continue
            if found is None:
                ended += 1
            elif found[1] is not None:
                file.write(json.dumps(found[1]) + "\n")
                file.flush()
                done += 1
                if "error" in found[1] or done % 25 == 0:
                    print(done, found[0], found[1].get("error", ""), found[1].get("final"), flush=True)
    for worker in workers:
        worker.terminate()
    return len(runs) - done
