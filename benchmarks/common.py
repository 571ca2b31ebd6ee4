"""What the benchmarks share: clocks, memory counters, tables and JSON."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nanoadam
from nanoadam.gradients import Box, SelectedGradient, gather
from nanoadam.state import state_bytes as state_bytes
from nanoadam.text import align

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GB = 1e9

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "numpy")
_AHEAD_MS = 25.0


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    versions = {"nanoadam": getattr(nanoadam, "__version__", None), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_gb": properties.total_memory / GB,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "backend": os.environ.get("NANOADAM_BACKEND", ""),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# Output --------------------------------------------------------------------------------------------------


def show(path: str | None, text: str) -> None:
    """Print a table; on stderr if the JSON is to go to stdout."""
    print(text, file=sys.stderr if path == "-" else sys.stdout, flush=True)


def save(path: str | None, data: dict[str, Any], *, finished: bool = True) -> None:
    """Write the JSON to a file, also while more is to come, or to stdout for "-" once it is finished."""
    if path == "-":
        if finished:
            print(json.dumps(data, indent=1))
    elif path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text columns; the first one flush left, numbers in three digits, None as a dash."""
    return align([list(header), *[[row[0], *map(digits, row[1:])] for row in rows]], left=1)


def digits(value: Any) -> str:
    """About three digits of a number."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def progress(text: str) -> None:
    """One line about what is under way, on stderr."""
    print(text, file=sys.stderr, flush=True)


def names(text: str) -> list[str]:
    """The parts of a comma-separated argument."""
    return [part.strip() for part in text.split(",") if part.strip()]


def first_line(error: BaseException) -> str:
    """One line that says what an error is about."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# Clocks --------------------------------------------------------------------------------------------------


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, until the device is done with it."""
    sync(device)
    start = time.perf_counter()
    work()
    sync(device)
    return 1e3 * (time.perf_counter() - start)


def host_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds until a call returns, whatever the device is still doing."""
    sync(device)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def device_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that the device itself needs for one call; wall time on a CPU.

    The device is kept waiting until the host has issued the whole call (as far as the launch queue holds it and
    the call does not synchronise), so gaps between launches are not counted.
    """
    if device.type != "cuda":
        return wall_ms(work, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    sync(device)
    torch.cuda._sleep(int(_AHEAD_MS * 2e6))  # about 2e6 cycles a millisecond
    start.record()
    work()
    end.record()
    sync(device)
    return float(start.elapsed_time(end))


def median(
    clock: Callable[[Callable[[], Any], torch.device], float],
    work: Callable[[], Any],
    device: torch.device,
    repeats: int,
    warmup: int = 0,
    before: Callable[[], Any] | None = None,
) -> float:
    """Median over `repeats` of one of the clocks; `before` runs ahead of each call and is not timed."""
    times = []
    for repeat in range(warmup + repeats):
        if before is not None:
            before()
        time_ = clock(work, device)
        if repeat >= warmup:
            times.append(time_)
    return statistics.median(times)


def launches(work: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the device; None where the profiler cannot see them.

    The profiler may slow down launches for the rest of the process: take times first.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            work()
            sync(device)
        calls = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "hipLaunchKernel")
        return sum(event.name.startswith(calls) for event in found.events()) or None
    except RuntimeError:
        return None


# Memory --------------------------------------------------------------------------------------------------


def free(device: torch.device) -> None:
    """Give back what is no longer referred to, and what libraries and kernels keep for the next call."""
    gc.collect()
    if (tables := sys.modules.get("nanoadam.ops.tables")) is not None:
        tables.block_rows.cache_clear()
    if device.type == "cuda":
        sync(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int | None:
    """Bytes of live tensors on a GPU; None on a CPU, which does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peak(device: torch.device) -> int | None:
    """The most bytes of live tensors on a GPU since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# NanoAdam ------------------------------------------------------------------------------------------------


def make_due(optimizer: nanoadam.NanoAdam) -> None:
    """Let the next `refresh()` (or first gradient) make a new selection, whatever the step."""
    for group in optimizer.param_groups:
        group["refreshed_at"] = -1
    for slot in optimizer._slots.values():
        slot.selected_for = -1


def take(optimizer: nanoadam.NanoAdam, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put what is selected of dense gradients into `p.grad`, as backward's hooks do where all of them gather."""
    boxes = []
    for parameter, gradient in pairs:
        slot, dtype = optimizer._arrives(parameter, gradient)
        box = Box(slot.selection, dtype=dtype, slot=slot, accumulator=optimizer._release)
        box.pending = gradient
        parameter.grad = SelectedGradient(box, parameter)
        boxes.append(box)
    gather.compact(boxes)


def drop(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Zero these gradients."""
    for parameter, _ in pairs:
        parameter.grad = None


@torch.no_grad()
def perturb(weights: Sequence[Tensor], share: float) -> None:
    """Multiply weights by 1 + share * normal noise, so that a refresh finds some entries changed."""
    for weight in weights:
        rows = max(1, 2**24 * weight.shape[0] // weight.numel())  # little extra memory
        for piece in weight.detach().split(rows):
            piece.mul_(torch.randn_like(piece).mul_(share).add_(1))
