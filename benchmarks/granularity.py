"""Whether it matters over how many weights the smallest are chosen: chunks of 64 weights to whole tensors.

The task of `nanoadam demo` (scikit-learn's digits, 0 to 4 and then 5 to 9), every learning rate, and for each size of
chunk the front of task 2's accuracy against what is left of task 1's, from the same pretrained weights.

Example: python benchmarks/granularity.py --seeds 10 --json granularity.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any
from unittest import mock

import common
import torch

from nanoadam import chunks
from nanoadam.comparing import fronts
from nanoadam.demo import experiment as demo

REFERENCE = (0.5, 0.0)
"""Accuracy of task 2 and of task 1 from which areas are measured."""


def runs(settings: demo.Settings, sizes: list[int]) -> list[dict[str, Any]]:
    """One line for each seed, size of chunk, density and learning rate."""
    images, labels, _ = demo.load_data()
    lines = []
    for seed in settings.seeds:
        common.progress(f"seed {seed}")
        old, new = demo.split_task(images, labels, 0, seed), demo.split_task(images, labels, 5, seed)
        pretrained = demo.pretrain(settings, old, seed)
        for size in sizes:
            with mock.patch.object(chunks, "MAX_CHUNK", size):
                for density in settings.densities:
                    for rate in settings.learning_rates:
                        name = f"{size} at {100 * density:g} %"
                        outcome = demo.finetune(settings, pretrained, old, new, name, density, rate, seed)
                        kept = ("learning_rate", "task1_before", "task1_after", "task2", "touched", "l2_moved")
                        values = {key: getattr(outcome, key) for key in kept}
                        lines.append({"chunk": size, "density": density, "seed": seed, **values})
    return lines


def areas(lines: list[dict[str, Any]]) -> dict[tuple[int, float], dict[int, float]]:
    """Under each front, by size of chunk and density, and by seed."""
    found: dict[tuple[int, float], dict[int, float]] = {}
    for key in dict.fromkeys((line["chunk"], line["density"]) for line in lines):
        own = [line for line in lines if (line["chunk"], line["density"]) == key]
        for seed in dict.fromkeys(line["seed"] for line in own):
            points = [(line["task2"], line["task1_after"]) for line in own if line["seed"] == seed]
            found.setdefault(key, {})[seed] = fronts.area(points, REFERENCE)
    return found


def text(lines: list[dict[str, Any]], default: int) -> str:
    """A row for each density and size: the area, and its difference from the default's, seed by seed."""

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):+.4f}{deviation}"

    found = areas(lines)
    rows = []
    for (size, density), own in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        base = found.get((default, density), {})
        pairs = [own[seed] - base[seed] for seed in own if seed in base]
        rows.append(
            [f"{100 * density:g} %", size, spread(list(own.values())).lstrip("+"), spread(pairs) if pairs else "-"]
        )
    return common.table(["density", "chunk", "area", f"- that of {default}"], rows)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="width; a matrix is its square (default: %(default)s)")
    parser.add_argument("--chunks", default="64,256,1024,4096,16384", help="most weights in one (default: %(default)s)")
    parser.add_argument("--learning-rates", default="3e-4,1e-3,3e-3,1e-2,3e-2", help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help='write the results there; "-" for stdout')
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one runs these small matrices faster than several, and always alike
    rates = tuple(float(rate) for rate in common.names(arguments.learning_rates))
    settings = demo.Settings(seeds=tuple(range(arguments.seeds)), hidden=arguments.hidden, learning_rates=rates)
    lines = runs(settings, [int(size) for size in common.names(arguments.chunks)])
    common.show(arguments.json, text(lines, chunks.MAX_CHUNK))
    results = {"benchmark": "granularity", "machine": common.machine()}
    common.save(arguments.json, {**results, "settings": dataclasses.asdict(settings), "runs": lines})


if __name__ == "__main__":
    main()
