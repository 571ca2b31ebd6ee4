"""The paper's toy: do small weights learn more and move less than those with the largest gradients?

A student of 20 neurons learns a teacher of 2 by gradient descent; then 1 or 2 neurons are added to the teacher, and the
student is finetuned by descent on part of its weights: in each layer the smallest, or those with the largest gradients.
Tables 8 and 9, figures 3 and 7, Theorem 2.2 of Zhou et al. 2025 (arXiv 2506.21374, section 2.3 and appendix E).

The paper leaves open how many weights change, whether the choice is made once or at every step, how the loss is scaled,
how the teacher is normalised and how many inputs there are. Each is a key of `ToyConfig`, and `reproduce` shows the
outcome as a function of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nanoadam.finetuning import folders
from nanoadam.paper.toy import network
from nanoadam.paper.toy import runs as toy_runs
from nanoadam.paper.toy.network import Nets
from nanoadam.paper.toy.runs import PAPER, RULES, Progress, ToyConfig, agrees, run, run_many, theorem

__all__ = ["PAPER", "RULES", "ToyConfig", "agrees", "reproduce", "run", "run_many", "theorem"]

READINGS: dict[str, dict[str, Any]] = {
    "weights, every step, MSE": {"loss_scale": 1.0},
    "weights, every step, MSE / 2": {"loss_scale": 0.5},
    "weights, every step, MSE / 4": {"loss_scale": 0.25},
    "weights, once, MSE / 4": {"once": True},
    "neurons, once, MSE / 4": {"once": True, "neurons": True, "density": 0.1},
}
"""Ways to read the paper, shown in full: what differs from the defaults of `ToyConfig`."""

GRID: dict[str, tuple[Any, ...]] = {
    "extra": (1, 2),
    "neurons": (False, True),
    "once": (False, True),
    "density": (0.1, 0.2, 0.3, 0.5),
    "loss_scale": (0.25, 0.5, 1.0),
}
SCALES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
OTHERS: tuple[dict[str, Any], ...] = (
    {"teacher": "sqrt"}, {"teacher": "mean"}, {"init_scale": 0.3}, {"samples": 20}, {"samples": 100},
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "full": {"seeds": tuple(range(10)), "steps": 10_000},
    "smoke": {"seeds": (0, 1), "steps": 40},
}


def reproduce(scale: str, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Tables 8 and 9, figures 3 and 7, Theorem 2.2, and the outcome under every choice the paper leaves open.

    Args:
        scale: "full" (10 seeds, 10,000 + 10,000 steps) or "smoke" (2 seeds, 40 + 40 steps: does it run).
        out: the run folder; new or empty.
        progress: called with what is done.

    Returns:
        `readings` (by name, a result of `run_many` for each number of extra neurons), `grid`, `rates` and `others`
        (lists of such results), `pretraining` (what is stable at the paper's rate), `critical_rate`, `theorem`,
        `portraits`, `verdict`.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError: for an unknown scale.
    """
    from nanoadam.paper.toy import report as toy_report

    if scale not in SIZES:
        raise ValueError(f"scale must be one of {', '.join(SIZES)}, got {scale!r}")
    folders.prepare_folder(out)
    started, clock = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    with _one_thread():
        results = _study(SIZES[scale], progress or (lambda what, done, total: None))
    seconds = time.perf_counter() - clock
    toy_report.write_folder(
        results, out, _settings(scale), {"scale": scale, "started": started, "seconds": round(seconds, 1)}
    )
    return results


def _settings(scale: str) -> dict[str, Any]:
    """What stands in config.toml."""
    keys = {**dataclasses.asdict(ToyConfig()), **SIZES[scale]}
    return {
        "toy": {
            key: list(value) if isinstance(value, tuple) else value for key, value in keys.items() if value is not None
        },
        "readings": READINGS,
        "grid": {name: list(values) for name, values in GRID.items()},
        "rates": {"loss_scale": list(SCALES)},
        "others": list(OTHERS),
    }


def _study(size: dict[str, Any], tell: Progress) -> dict[str, Any]:
    base = ToyConfig(**size)
    readings = [dataclasses.replace(base, extra=e, **keys) for keys in READINGS.values() for e in PAPER]
    grid = [dataclasses.replace(base, **dict(zip(GRID, values, strict=True))) for values in product(*GRID.values())]
    rates = [dataclasses.replace(base, extra=e, loss_scale=s) for e in PAPER for s in SCALES]
    others = [dataclasses.replace(base, extra=e, **keys) for keys in OTHERS for e in PAPER]
    plain = [dataclasses.replace(c, loss_scale=1.0) for c in others]
    parts = [("tables 8 and 9", readings), ("every choice", grid), ("rates", rates), ("other choices", others + plain)]
    total, done = sum(len(configs) for _, configs in parts), 0
    found = []
    for what, configs in parts:

        def told(step: str, part: int, whole: int, what: str = what, done: int = done, n: int = len(configs)) -> None:
            tell(f"{what}: {step}", done + n * part // max(1, whole), total)

        record = (
            sorted({0, base.steps, *(round(base.steps ** (i / 30)) for i in range(30))}) if configs is readings else ()
        )
        found.append(run_many(configs, told, record))
        done += len(configs)
    by_name = [found[0][i : i + len(PAPER)] for i in range(0, len(found[0]), len(PAPER))]
    tell("what is stable, and Theorem 2.2", total, total)
    return {
        "readings": dict(zip(READINGS, by_name, strict=True)),
        "grid": found[1],
        "rates": found[2],
        "others": found[3],
        "pretraining": _stability(base),
        "critical_rate": _critical(base),
        "theorem": theorem(base.seeds, steps=base.steps),
        "portraits": _portraits(base),
        "verdict": verdict(found[1]),
    }


def _stability(base: ToyConfig) -> list[dict[str, Any]]:
    """In how many seeds the paper's rate of 2 learns the first teacher, by the scale of the loss and of the teacher."""
    found = []
    for teacher in network.TEACHERS:
        for scale in (0.125, 0.25, 0.5, 1.0):
            losses = toy_runs.pretrain(dataclasses.replace(base, teacher=teacher, pretrain_loss_scale=scale)).test_loss
            found.append(
                {"teacher": teacher, "loss_scale": scale, "learned": int((losses < 1e-3).sum()), "seeds": len(losses),
                 "diverged": int((~toy_runs.converged(losses)).sum())}
            )  # fmt: skip
    return found


def _critical(base: ToyConfig) -> dict[str, list[float]]:
    """Largest stable rate of descent on half the MSE for each seed, where training all weights ends.

    By the number of extra neurons; "0" is the pretrained student.
    """
    pretrained = toy_runs.pretrain(base)
    found = {"0": network.critical_rate(pretrained.student).tolist()}
    rate = torch.full((len(base.seeds),), 0.25, dtype=torch.float64)
    for extra in PAPER:
        course = network.descend(pretrained.student, pretrained.teacher.first(2 + extra), rate, base.steps)
        found[str(extra)] = network.critical_rate(course.end).tolist()
    return found


def verdict(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many of the results agree with the paper, by the scale of the loss: cells, loss, distance, both, diverged."""
    found: dict[float, dict[str, Any]] = {}
    for result in results:
        agreed, scale = agrees(result), result["config"]["loss_scale"]
        counts = found.setdefault(scale, {"loss_scale": scale, **dict.fromkeys(COUNTED, 0)})
        added = (1, agreed["loss"], agreed["distance"], agreed["loss"] and agreed["distance"],
                 any(result[rule]["diverged"] for rule in RULES))  # fmt: skip
        for name, one in zip(COUNTED, added, strict=True):
            counts[name] += int(one)
    return list(found.values())


COUNTED = ("cells", "loss", "distance", "both", "diverged")


def _portraits(base: ToyConfig) -> list[dict[str, Any]]:
    """What figures 3 and 7 draw, for the first seed: each neuron as [sign of a, |a| w_1, |a| w_2]."""

    def points(nets: Nets) -> list[list[float]]:
        return torch.cat([nets.a.sign()[..., None], nets.a.abs()[..., None] * nets.w], dim=2)[0].tolist()

    found = []
    for name in ("weights, every step, MSE / 4", "neurons, once, MSE / 4"):
        for extra in PAPER:
            config = dataclasses.replace(base, seeds=base.seeds[:1], extra=extra, **READINGS[name])
            pretrained = toy_runs.pretrain(config)
            _, _, course = toy_runs.course_of([config], pretrained, ())
            ends = {rule: points(course.end.part(slice(i, i + 1))) for i, rule in enumerate(RULES)}
            found.append({"reading": name, "extra": extra, "teacher": points(pretrained.teacher.first(2 + extra)),
                          "pretrained": points(pretrained.student), **ends})  # fmt: skip
    return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second core, and the numbers must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
