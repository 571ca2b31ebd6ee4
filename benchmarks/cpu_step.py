"""Step and refresh of NanoAdam on MiniLM's shapes (22.7M weights), beside torch's AdamW, on a CPU.

Example: python benchmarks/cpu_step.py --threads 2 --json cpu_step.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import common
import torch
from torch import Tensor

from nanoadam import NanoAdam
from nanoadam.comparing.shapes import MODELS, Shapes, count

CPU = torch.device("cpu")
INTERVAL = 100
REFRESH_GOAL_MS = 250.0


class Model:
    """Random weights of given shapes, with a gradient each."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shapes = shapes
        self.weights = [torch.randn(shape).mul_(0.02).to(dtype).requires_grad_() for _, shape, _ in shapes]
        self.gradients = [torch.randn(shape).mul_(1e-3).to(dtype) for _, shape, _ in shapes]

    def groups(self) -> list[dict[str, Any]]:
        found = []
        for dense in (False, True):
            members = [(p.name, w) for p, w in zip(self.shapes, self.weights, strict=True) if p.dense == dense]
            found.append({"params": [w for _, w in members], "param_names": [n for n, _ in members], "dense": dense})
        return found

    def selected(self) -> list[tuple[Tensor, Tensor]]:
        rows = zip(self.shapes, self.weights, self.gradients, strict=True)
        return [(weight, gradient) for parameter, weight, gradient in rows if not parameter.dense]

    def give(self, *, selected: bool) -> None:
        """Set the gradients, of dense tensors alone or of all."""
        for parameter, weight, gradient in zip(self.shapes, self.weights, self.gradients, strict=True):
            weight.grad = gradient if selected or parameter.dense else None


class AdamW:
    """torch's AdamW."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, kind: str) -> None:
        self.name, self.times = f"AdamW {kind}", {"step": []}
        self.model = Model(shapes, dtype)
        self.optimizer = torch.optim.AdamW(self.model.weights, lr=1e-5, **{kind: True})
        self.model.give(selected=True)

    def once(self) -> None:
        self.times["step"].append(common.wall_ms(self.optimizer.step, CPU))


class Nano:
    """NanoAdam, in parts: a step with all gradients at hand, its gather and its update alone, and a refresh."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, density: float, change: float) -> None:
        self.name = f"NanoAdam k = {100 * density:g} %"
        self.times: dict[str, list[float]] = {"step": [], "gather": [], "update": [], "refresh": []}
        self.model, self.change = Model(shapes, dtype), change
        self.optimizer = NanoAdam(self.model.groups(), lr=1e-5, density=density, mask_interval=10**9)
        self.pairs = self.model.selected()

    def once(self) -> None:
        optimizer = self.optimizer
        self.model.give(selected=True)
        self.times["step"].append(common.wall_ms(optimizer.step, CPU))
        self.model.give(selected=False)
        with torch.no_grad():
            optimizer.refresh()
            common.drop(self.pairs)
            self.times["gather"].append(common.wall_ms(lambda: common.take(optimizer, self.pairs), CPU))
        self.times["update"].append(common.wall_ms(optimizer.step, CPU))
        common.perturb([weight for weight, _ in self.pairs], self.change)
        common.make_due(optimizer)
        self.times["refresh"].append(common.wall_ms(optimizer.refresh, CPU))


def measure(
    shapes: Shapes, dtype: torch.dtype, densities: list[float], repeats: int, change: float
) -> list[dict[str, Any]]:
    """Every method once per repeat, so that a drift of the machine hits all alike."""
    cases: list[AdamW | Nano] = [AdamW(shapes, dtype, "foreach"), AdamW(shapes, dtype, "fused")]
    cases += [Nano(shapes, dtype, density, change) for density in densities]
    for repeat in range(repeats + 2):
        for case in cases:
            case.once()
        if repeat == 1:  # two rounds to make state, caches and a first carried selection
            for case in cases:
                for times in case.times.values():
                    times.clear()
    results = []
    for case in cases:
        ms = {part: statistics.median(times) for part, times in case.times.items()}
        whole = ms["step"] + ms.get("refresh", 0.0) / INTERVAL
        state = common.state_bytes(case.optimizer) / 1e6
        results.append({"method": case.name, "ms": ms, "per_step_ms": whole, "state_mb": state, "times_ms": case.times})
    return results


def render(results: list[dict[str, Any]], shapes: Shapes, settings: dict[str, Any]) -> str:
    reference = results[0]["per_step_ms"]
    rows = [
        [
            result["method"],
            *(result["ms"].get(part) for part in ("step", "gather", "update", "refresh")),
            result["per_step_ms"],
            result["per_step_ms"] / reference,
            result["state_mb"],
        ]
        for result in results
    ]
    header = ["ms, median", "step", "gather", "update", "refresh", f"m = {INTERVAL}", "of foreach", "state MB"]
    lines = [
        f"{count(shapes):,} weights in {len(shapes)} tensors, {settings['dtype']}, {settings['threads']} threads, "
        f"{settings['repeats']} repeats",
        common.table(header, rows),
    ]
    goal = next((result for result in results if result["method"] == "NanoAdam k = 1 %"), None)
    if goal is not None:
        ratio, refresh = goal["per_step_ms"] / reference, goal["ms"]["refresh"]
        lines.append(
            f"Goals at k = 1 %, m = {INTERVAL}: {ratio:.2f} of AdamW foreach (at most 1: {_verdict(ratio <= 1)}); "
            f"refresh {refresh:.0f} ms (under {REFRESH_GOAL_MS:.0f} on 2 cores: {_verdict(refresh < REFRESH_GOAL_MS)})"
        )
    return "\n".join(lines)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/cpu_step.py --threads 2 --json cpu_step.json",
    )
    parser.add_argument("--model", default="minilm", choices=MODELS, help="whose shapes (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=common.DTYPES, help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--densities", default="0.001,0.01,0.1", help="of NanoAdam (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds (default: %(default)s)")
    parser.add_argument("--change", type=float, default=0.01, help="relative noise on weights between refreshes")
    parser.add_argument("--json", metavar="FILE", help='write the results there; "-" for stdout')
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    try:
        densities = [float(part) for part in common.names(options.densities)]
    except ValueError:
        parser.error(f"--densities must be numbers with commas between, got {options.densities!r}")
    shapes = MODELS[options.model]()
    settings = {**vars(options), "threads": torch.get_num_threads(), "interval": INTERVAL}
    try:
        results = measure(shapes, common.DTYPES[options.dtype], densities, options.repeats, options.change)
    except ValueError as error:
        parser.error(common.first_line(error))
    data = {"benchmark": "cpu_step", "machine": common.machine(), "settings": settings, "weights": count(shapes)}
    common.show(options.json, render(results, shapes, settings))
    common.save(options.json, {**data, "results": results})


if __name__ == "__main__":
    main()
