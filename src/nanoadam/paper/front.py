"""The front of forgetting: accuracy on a new task against what is left of an old one, over methods and settings.

Runs share their first task: for each start (a method, its rate, a seed, BatchNorm trained or frozen) task 1 is trained
once, and every run of task 2 begins from those weights. So runs of one start differ in task 2 alone, and hundreds of
them take minutes. They are spread over processes, most important first; each one's line is on the disk when it ends.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanoadam import baselines
from nanoadam.comparing import fronts, pool
from nanoadam.finetuning import folders, norms
from nanoadam.paper import forgetting, vision
from nanoadam.state import state_bytes
from nanoadam.text import nearest

AXES = ("task2", "task1_after")
NORMS = ("trained", "frozen")

Progress = Callable[[str, int, int], None]
"""Called with what has been done, how many runs are done, how many there are."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with its settings.

    Args:
        optimizer: a name of `nanoadam.baselines`.
        task1: its learning rate for task 1.
        task2: its grid of learning rates for task 2.
        options: of that optimizer.
        dense_rate: learning rate of head and norms in task 2, where it is not that of the rest.
        only_head: the backbone is not trained in task 2 (linear probing).
    """

    optimizer: str
    task1: float
    task2: tuple[float, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense_rate: float | None = None
    only_head: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the methods under one condition.

    Args:
        methods: by name.
        start: the method whose task 1 all begin with, or "own": each its own.
        norms: BatchNorm is "trained", or "frozen" in both tasks: statistics, scale and shift.
        seeds: each run is repeated with each.
    """

    methods: tuple[str, ...]
    start: str = "own"
    norms: str = "trained"
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Front:
    """An experiment.

    Args:
        model: folder of a transformers image classifier.
        task1: npz files of its training and test images, see `vision.load`.
        task2: likewise.
        methods: by name.
        parts: in the order of their importance.
        side: of the images, pixels.
        rows: of task 1, how many training images; all by default.
        test_rows: of task 1, how many test images.
        batch_size: of every step.
        epochs: of task 1 and of task 2.
        evaluate_every: epochs of task 2 between evaluations, for the course of a run.
        shift: augmentation, see `vision.batches`.
        label_smoothing: as in torch.
        scheduler: of the learning rate.
        channels_last: layout of the activations.
        momentum: of BatchNorm's running statistics, see `norms.set_momentum`.
        reference: accuracies of task 2 and task 1 from which areas are measured; those of guessing by default.

    Raises:
        ValueError: for a part that names what is not there.
    """

    model: str
    task1: tuple[str, str]
    task2: tuple[str, str]
    methods: Mapping[str, Method]
    parts: tuple[Part, ...]
    side: int = 96
    rows: int | None = None
    test_rows: int | None = None
    batch_size: int = 128
    epochs: tuple[int, int] = (5, 30)
    evaluate_every: int = 10
    shift: int = 8
    label_smoothing: float = 0.0
    scheduler: str = "constant"
    channels_last: bool = True
    momentum: float = 0.1
    reference: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot run before anything does."""
        for part in self.parts:
            named = [*part.methods, *([] if part.start == "own" else [part.start])]
            for name in named:
                if name not in self.methods:
                    raise ValueError(f"there is no method {name!r}{nearest(name, self.methods)}")
            if part.norms not in NORMS:
                raise ValueError(f"norms must be {' or '.join(NORMS)}, got {part.norms!r}")
        for method in self.methods.values():
            baselines.baseline(method.optimizer)

    def jobs(self) -> list[Job]:
        """Every run, in the order of the parts; each start before the first run that needs it."""
        found: dict[Job, None] = {}
        for part in self.parts:
            for seed in part.seeds:
                for name in part.methods:
                    first = name if part.start == "own" else part.start
                    start = Job(first, self.methods[first].task1, part.norms, seed)
                    found.setdefault(start)
                    found.update(dict.fromkeys(Job(name, r, part.norms, seed, start) for r in self.methods[name].task2))
        return list(found)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: of task 1 if it has no start, of task 2 otherwise."""

    method: str
    rate: float
    norms: str
    seed: int
    start: Job | None = None

    @property
    def name(self) -> str:
        """For files and messages."""
        own = f"{self.method} {self.rate:g} {self.norms} {self.seed}"
        return own if self.start is None else f"{own} from {self.start.method} {self.start.rate:g}"


@functools.lru_cache(maxsize=1)
def _bench(front: _Same, device: str) -> _Bench:
    return _Bench(front.value, torch.device(device))


class _Same:
    """Compares by what it says, so that a process reads model and images once."""

    def __init__(self, value: Front) -> None:
        self.value, self._text = value, repr(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


class _Bench:
    """What all runs of a process share: the pretrained model and the images, on the device."""

    def __init__(self, front: Front, device: torch.device) -> None:
        from transformers import AutoModelForImageClassification

        torch.set_float32_matmul_precision("high")  # TF32 in matrix products, as in convolutions by default
        read = functools.partial(vision.load, side=front.side, device=device)
        self.task1 = read(Path(front.task1[0]), rows=front.rows), read(Path(front.task1[1]), rows=front.test_rows)
        self.task2 = read(Path(front.task2[0])), read(Path(front.task2[1]))
        scale = vision.read_scale(Path(front.model))
        self.scale = dataclasses.replace(scale, channels_last=front.channels_last)
        self.device = device
        self.model = AutoModelForImageClassification.from_pretrained(front.model).to(device).train()
        norms.set_momentum(self.model, front.momentum)
        self.starts = functools.lru_cache(maxsize=8)(functools.partial(torch.load, map_location=device))

    def new_model(self, job: Job) -> Any:
        """A model of its own, in training mode."""
        model = copy.deepcopy(self.model)
        if job.norms == "frozen":
            norms.freeze_norms(model)
        return model


def run_one(front: Front, job: Job, device: str, folder: Path) -> dict[str, Any]:
    """One run: its line, or why there is none. A start's weights are left in `folder` for the runs that begin there."""
    began = time.perf_counter()
    line = _key(job)
    try:
        bench = _bench(_Same(front), device)
        torch.manual_seed(2 * job.seed + (job.start is not None))  # dropout must not depend on the runs before
        line |= _task1(front, job, bench, folder) if job.start is None else _task2(front, job, bench, folder)
    except Exception as error:  # one run's failure is no reason to lose the others
        line |= {"stopped": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "failed": True}
    return {**line, "seconds": round(time.perf_counter() - began, 3)}


_KEY = ("kind", "method", "rate", "norms", "seed", "start", "start_rate")


def _key(job: Job) -> dict[str, Any]:
    start = job.start
    return {
        "kind": "task1" if start is None else "task2",
        **dataclasses.asdict(job),
        "start": start and start.method,
        "start_rate": start and start.rate,
    }


def _optimizer(method: Method, model: Any, rate: float, seed: int) -> torch.optim.Optimizer:
    options = dict(method.options)
    if "seed" in baselines.baseline(method.optimizer).options:
        options["seed"] = seed
    optimizer = baselines.make(method.optimizer, model, rate, **options)
    for group in optimizer.param_groups:
        if method.dense_rate is not None and group.get("dense"):
            group["lr"] = method.dense_rate
    return optimizer


def _fit(front: Front, bench: _Bench, model: Any, optimizer: Any, task: int, seed: int, after: Any = None) -> bool:
    return vision.fit(
        model, optimizer, (bench.task1, bench.task2)[task][0], bench.scale,
        epochs=front.epochs[task], batch_size=front.batch_size, seed=2 * seed + task, shift=front.shift,
        label_smoothing=front.label_smoothing, scheduler=front.scheduler, after_epoch=after,
    )  # fmt: skip


def _task1(front: Front, job: Job, bench: _Bench, folder: Path) -> dict[str, Any]:
    method, model = front.methods[job.method], bench.new_model(job)
    before = forgetting.backbone(model)
    forgetting.put_head(model, forgetting.new_head(model, bench.task1[0].classes, seed=2 * job.seed))
    optimizer = _optimizer(dataclasses.replace(method, dense_rate=None), model, job.rate, job.seed)
    finite = _fit(front, bench, model, optimizer, 0, job.seed)
    accuracy = vision.accuracy(model, bench.task1[1], bench.scale)
    moved = forgetting.shift(model, before)
    moved.pop("tensors")
    part = folder / f".{job.name}.{os.getpid()}"
    torch.save({"state": model.state_dict(), "accuracy": accuracy}, part)
    os.replace(part, _weights(folder, job))
    return {"task1": accuracy if finite else None, "task1_shift": moved}


def _task2(front: Front, job: Job, bench: _Bench, folder: Path) -> dict[str, Any]:
    assert job.start is not None
    method, model = front.methods[job.method], bench.new_model(job)
    pretrained = forgetting.backbone(model)
    start = bench.starts(_weights(folder, job.start))
    old = forgetting.new_head(model, bench.task1[0].classes, seed=0)
    forgetting.put_head(model, old)
    model.load_state_dict(start["state"])
    before = forgetting.backbone(model)
    new = forgetting.new_head(model, bench.task2[0].classes, seed=2 * job.seed + 1)
    forgetting.put_head(model, new)
    if method.only_head:
        norms.freeze_norms(model)
        model.base_model.requires_grad_(False)
    optimizer = _optimizer(method, model, job.rate, job.seed)
    course: list[list[float]] = []

    def measure(epochs: int) -> None:
        if epochs % front.evaluate_every == 0 or epochs == front.epochs[1]:
            task2 = vision.accuracy(model, bench.task2[1], bench.scale)
            forgetting.put_head(model, old)
            course.append([epochs, task2, vision.accuracy(model, bench.task1[1], bench.scale)])
            forgetting.put_head(model, new)

    if not _fit(front, bench, model, optimizer, 1, job.seed, measure):
        return {"task1": start["accuracy"], "task2": None, "task1_after": None, "stopped": "the loss is not finite"}
    return {
        **forgetting.scores(start["accuracy"], course[-1][1], course[-1][2]),
        "course": course,
        "shift": forgetting.shift(model, before),
        "pretrained_l2": forgetting.shift(model, pretrained)["mean_l2"],
        "state_bytes": state_bytes(optimizer),
    }


# Many runs ---------------------------------------------------------------------------------------------------


def run(
    front: Front,
    out: Path,
    scratch: Path,
    *,
    processes: int = 1,
    seconds: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """All runs of an experiment, as far as the time goes; those that have a line in `out` are finished.

    Args:
        front: the experiment.
        out: a JSONL file; each run's line is added as soon as it is done.
        scratch: a folder for the weights after task 1. What begins with weights that are gone has them made again.
        processes: how many runs at once, each in a process of its own and on one of the visible GPUs in turn; 1 runs
            everything in this process.
        seconds: no run begins later than this.
        device: "auto" or "cpu".
        progress: called after each run.

    Returns:
        The lines, in the order of the jobs.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    until = time.time() + (math.inf if seconds is None else seconds)
    every = {tuple(_key(job)[key] for key in _KEY): job for job in front.jobs()}
    lines = {name: line for name, line in folders.finished(out, _KEY).items() if name in every}
    left = [job for name, job in every.items() if name not in lines]
    needed = {job.start for job in left if job.start is not None and not _weights(scratch, job.start).is_file()}
    jobs = [job for job in every.values() if job in needed or job in left]
    work = [_Work(front, job, device, scratch, until) for job in jobs]
    places = {job: i for i, job in enumerate(jobs)}
    after = [None if job.start is None else places.get(job.start) for job in jobs]
    for _, line in pool.each(_work, work, processes, _lost, after=after):
        name = () if line is None else tuple(line[key] for key in _KEY)
        if line is not None and name not in lines:
            folders.append(out, line)
            lines[name] = line
            if progress is not None:
                progress(f"{line['method']}, {line['kind']}, learning rate {line['rate']:g}", len(lines), len(every))
    return [lines[name] for name in every if name in lines]


def _weights(folder: Path, start: Job) -> Path:
    return folder / f"{start.name}.pt"


@dataclasses.dataclass(frozen=True)
class _Work:
    """A run and what its process has to know."""

    front: Front
    job: Job
    device: str
    scratch: Path
    until: float


def _work(work: _Work) -> dict[str, Any] | None:
    if time.time() > work.until:
        return None
    cuda = work.device == "auto" and torch.cuda.is_available()
    return run_one(work.front, work.job, "cuda" if cuda else "cpu", work.scratch)


def _lost(work: _Work, why: str) -> dict[str, Any]:
    return {**_key(work.job), "stopped": why, "failed": True}


# What came out -----------------------------------------------------------------------------------------------


def table(lines: Sequence[Mapping[str, Any]], norms: str, start: str | None, reference: fronts.Point) -> list[Any]:
    """The fronts of all methods under one condition, see `fronts.table`.

    Args:
        lines: of `run`.
        norms: "trained" or "frozen".
        start: the method that all began with, or None where each had its own.
        reference: accuracies of task 2 and of task 1.
    """
    mine = [
        line
        for line in lines
        if line["kind"] == "task2" and line["norms"] == norms and line["start"] == (start or line["method"])
    ]
    rated = [{**line, **{axis: line.get(axis) for axis in AXES}} for line in mine]
    return fronts.table(rated, AXES, reference, lambda line: str(line["method"]), lambda line: line["rate"])


def from_recipe(recipe: Mapping[str, Any], data: Path, model: Path | None = None) -> Front:
    """The experiment that a recipe states.

    Args:
        recipe: with the tables `front` (keys of `Front`; for less of it `first_parts` and `first_rates`, how many of
            each, and `seeds`), `methods` and `parts`, and in `grids` the learning rates that methods name.
        data: the folder that its files are in.
        model: in place of the recipe's.

    Raises:
        ValueError: for a key or a name that is not known.
    """
    keys = dict(recipe["front"])
    parts, rates, seeds = (keys.pop(key, None) for key in ("first_parts", "first_rates", "seeds"))
    methods = {}
    for name, given in recipe["methods"].items():
        grid = recipe["grids"][given["task2"]] if isinstance(given["task2"], str) else given["task2"]
        methods[name] = Method(**{**given, "task2": tuple(grid[:rates])})
    own = {} if seeds is None else {"seeds": seeds}
    chosen = [_tuples({**part, **own}) for part in recipe["parts"][:parts]]
    for task in ("task1", "task2"):
        keys[task] = tuple(str(data / file) for file in keys[task])
    keys["model"] = str(data / keys["model"] if model is None else model)
    return Front(**_tuples(keys), methods=methods, parts=tuple(Part(**part) for part in chosen))


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
