"""Several variants of one job, each over its own grid of learning rates, with the same seeds and order of data.

A variant is a name, keys of the config that it sets, and its learning rates. Each run is a finetuning run with a
folder of its own. A learning rate is chosen for each variant by the mean of the validation metric over the seeds;
what is measured of forgetting takes no part in the choice.

Where several processes have been started (torchrun), all of them make each run together, and the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nanoadam.comparing import pool, tables
from nanoadam.comparing.comparison import KEYS, Case, Comparison, Key, Variant, made, variants
from nanoadam.comparing.tables import CHOICE, Outcome
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import folders, optimizers, processes
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

__all__ = [
    "KEYS", "Case", "Comparison", "Outcome", "Progress", "Variant", "ensure", "finished", "load", "made", "resume",
    "run", "variants",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many runs are done, how many there are."""


def run(
    comparison: Comparison, out: Path, progress: Progress | None = None, jobs: int = 1, keep: str = "none"
) -> dict[str, Any]:
    """Run all of it, and write one folder with a folder for each run in it.

    A run that fails for whatever reason has a line that says why, and the others go on: so does a variant whose
    library is missing or that this device cannot run. Each line is written as soon as its run is done.

    Args:
        comparison: what to compare.
        out: new or empty.
        progress: called when a run begins, and at the end.
        jobs: how many runs at once, each in a process of its own and on one of the visible GPUs in turn; 1 where
            several processes make each run together.
        keep: "best" keeps the model of the best run, "none" none.

    Returns:
        `{"metric", "runs": [...], "table": [...], ...}`; see `tables.table`.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError, ImportError: for whatever the job can get wrong, before the first run.
        RunError: if another process is writing to `out`.
    """
    comparison.refuse_idle()
    comparison = comparison.resolved()
    _meet(comparison, jobs)
    out, first = processes.shared(out), processes.first()  # its name may hold the time
    comparison = dataclasses.replace(comparison, config=finetune.with_task(comparison.config))
    if first and out.exists():
        folders.prepare_folder(out)
    job = {**_prepared(comparison, jobs), "keep": keep}
    with folders.new_folder(out) if first else contextlib.nullcontext():
        if first:
            folders.write(out / "config.toml", comparison.to_toml())
            folders.write(out / "manifest.json", json.dumps(job, indent=2) + "\n")
        return _go(comparison, out, job, progress, jobs)


def _meet(comparison: Comparison, jobs: int) -> None:
    """Meet the other processes, if there are any.

    Raises:
        ValueError: if each of them were to start several more.
    """
    if jobs > 1 and processes.count() > 1:
        raise ValueError(
            f"--jobs {jobs} is for one process, and {processes.count()} have been started, which make each run "
            "together: leave out --jobs, or start compare by itself"
        )
    finetune.join(comparison.config)


def resume(out: Path, progress: Progress | None = None, jobs: int = 1) -> dict[str, Any]:
    """Go on with a comparison: runs that are finished are read, all others begin again.

    Raises:
        ValueError: if `out` holds no comparison, or the data or the config of a finished run is not what it was.
        RunError: as in `run`.
    """
    comparison, _ = load(out)  # a folder of something else is left as it is
    _meet(comparison, jobs)
    with folders.alone(out) if processes.first() else contextlib.nullcontext():
        return _resume(out, progress, jobs)


def ensure(comparison: Comparison, out: Path, progress: Progress | None = None, jobs: int = 1) -> dict[str, Any]:
    """The results of a comparison: read if it is finished, gone on with if it was begun, else run; see `run`.

    Args:
        comparison: what to compare.
        out: a folder of its own: what else is there is deleted.
        progress: as in `run`.
        jobs: as in `run`.

    Raises:
        ValueError: as in `resume`, and if another comparison is in `out`.
    """
    if not (out / "manifest.json").is_file():
        shutil.rmtree(out, ignore_errors=True)  # killed before its first run
        return run(comparison, out, progress, jobs)
    begun, manifest = load(out)
    asked = comparison.resolved()
    if asked.config.task is None:  # it was found, and written
        asked = dataclasses.replace(asked, config=dataclasses.replace(asked.config, task=begun.config.task))
    if begun != asked:
        raise ValueError(
            f"{out / 'config.toml'} is not what it was when it was written, or the folder has been moved: set it back, "
            "or begin anew with --out"
        )
    results: dict[str, Any] = manifest["results"]
    ended = _read(out / "manifest.json").get("results") is not None
    return results if ended and not results["unfinished"] else resume(out, progress, jobs)


def _resume(out: Path, progress: Progress | None, jobs: int) -> dict[str, Any]:
    comparison, before = load(out)
    job = _prepared(comparison, jobs)
    for split in ("train", "validation"):
        then, now = (found["data"].get(split, {}).get("sha256_of_rows") for found in (before, job))
        if then != now:
            raise ValueError(f"the {split} data is not what it was when {out} began: the table would mix two jobs")
    done = finished(comparison, out)
    for case in comparison.cases():
        folder = out / "runs" / case.name
        written = folder / "config.toml"
        if case.key in done and written.is_file():
            changed = finetune.differences(case.config, Config(**configs.read(written)))
            changed = [key for key in changed if key != "save_model"]
            if changed:
                raise ValueError(
                    f"{changed[0]} in {out / 'config.toml'} is not what it was when the run {case.name} was made: the "
                    "table would mix two jobs; set it back, or begin anew with --out"
                )
        if case.key in done and (folder / "manifest.json").is_file():
            _check_rows(case, _read(folder / "manifest.json").get("data", {}))
    return _go(comparison, out, {**job, "keep": before.get("keep", "none")}, progress, jobs)


def _check_rows(case: Case, then: Mapping[str, Any]) -> None:
    """Refuse a finished run whose rows would be others now: a variant or a seed may have rows of its own."""
    try:
        splits = finetune.rows(case.config)
    except ValueError:  # they cannot be read any more: nobody else will read others
        return
    for name, split in zip(("train", "validation"), splits, strict=True):
        if then.get(name, {}).get("sha256_of_rows") not in (None, split.source["sha256_of_rows"]):
            raise ValueError(
                f"the {name} data of the run {case.name} is not what it was when it was made: the table would mix two "
                "jobs; begin anew with --out"
            )


def load(out: Path) -> tuple[Comparison, dict[str, Any]]:
    """The comparison in a folder, and its manifest, whose `results` are of the runs that are finished so far.

    Raises:
        ValueError: if `out` holds none.
    """
    if not (out / "config.toml").is_file() or not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds no comparison: there is no config.toml with a manifest.json in it")
    manifest = _read(out / "manifest.json")
    if manifest.get("command") != "nanoadam compare":
        raise ValueError(f"{out} holds no comparison, but a folder of {manifest.get('command', 'something else')}")
    comparison = made(configs.read(out / "config.toml", {"compare": KEYS}))
    return comparison, {**manifest, "results": _results(comparison, manifest, finished(comparison, out))}


def _read(path: Path) -> dict[str, Any]:
    run = path.parent.parent.name == "runs"
    remedy = f"remove {path.parent}, and --resume does without it" if run else "begin anew with --out"
    return folders.read_manifest(path, remedy)


def finished(comparison: Comparison, out: Path) -> dict[Key, Outcome]:
    """The outcomes that are on the disk, in the order of the cases; not those of runs that failed."""
    lines = {_key(line): line for line in folders.read_lines(out / "metrics.jsonl")}
    found = {}
    for case in comparison.cases():
        line = lines.get(case.key)
        manifest = out / "runs" / case.name / "manifest.json"
        if line is None and manifest.is_file():  # killed between the end of the run and its line
            results = _read(manifest).get("results")
            line = None if results is None else _outcome(case, results)
        if line is not None and not line.get("failed"):
            found[case.key] = line
    return found


def _key(line: Outcome) -> Key:
    return line["variant"], line["learning_rate"], line["seed"]


def _prepared(comparison: Comparison, jobs: int) -> dict[str, Any]:
    """What the manifest says before the first run; refuses what no variant could run with."""
    plain = dataclasses.replace(comparison.config, optimizer="adamw", optimizer_options=(), seed=comparison.seeds[0])
    job = finetune.prepare(plain)
    wrong: list[Exception] = []
    for variant in comparison.variants:
        config = next(case.config for case in comparison.cases() if case.variant == variant.name)
        try:
            optimizers.check(config)
            if config.optimizer == "nanoadam":
                optimizers.make(job.task.model, config, job.plan)
        except ImportError as error:
            wrong.append(error)
        except (ValueError, TypeError) as error:
            wrong.append(ValueError(f"variant {variant.name}: {error}"))
    if len(wrong) == len(comparison.variants):  # otherwise the others run, and these say in the table why they cannot
        raise wrong[0]
    return {
        "command": "nanoadam compare",
        "kind": "comparison of variants of one job, each at its own learning rate",
        "pseudocode": folders.PSEUDOCODE,
        **folders.environment(runs_at_once=jobs),
        "data": job.sources,
        "metric": {"name": job.task.metric, "higher_is_better": job.task.higher_is_better},
        "settings": dataclasses.asdict(comparison),
        "seeds": list(comparison.seeds),
        "results": None,
    }


def _go(
    comparison: Comparison, out: Path, manifest: dict[str, Any], progress: Progress | None, jobs: int
) -> dict[str, Any]:
    tell, first = progress or (lambda what, done, total: None), processes.first()
    done = processes.by_first(lambda: finished(comparison, out))
    cases = [case for case in comparison.cases() if case.key not in done]
    total = len(done) + len(cases)
    known = {_key(line) for line in folders.read_lines(out / "metrics.jsonl")} if first else set(done)
    for key, outcome in done.items():
        if key not in known:
            folders.append(out / "metrics.jsonl", outcome)
    tasks = [_Task(case, out / "runs" / case.name, manifest["metric"]["name"]) for case in cases]
    for _, outcome in pool.each(_one, tasks, jobs, _lost, lambda task: tell(str(task.case), len(done), total)):
        if first:
            folders.append(out / "metrics.jsonl", outcome)
        done[_key(outcome)] = outcome
    results = _results(comparison, manifest, done)
    if manifest.get("keep") == "best":
        tell("the best run again, to keep its model", total, total)
        results["kept"] = _keep_best(comparison, out, manifest, results)
    tell("done", total, total)
    if not first:
        return results
    manifest = {**manifest, "results": results}
    page = tables.page(f"compare: {comparison.config.task}", _lead(comparison), manifest)
    folders.write(out / "report.html", page)
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return results


def _keep_best(comparison: Comparison, out: Path, manifest: dict[str, Any], results: dict[str, Any]) -> str | None:
    """The run of the best variant, at its rate, with the best seed: made again, with its model. Its name.

    Models of all runs would fill a disk, and which one is wanted is known at the end only.
    """
    sign = 1 if results["higher_is_better"] else -1
    good = [row for row in results["table"] if row["learning_rate"] is not None]
    if not good:
        return None
    row = max(good, key=lambda row: sign * row["metric"]["mean"])
    best = max(
        (o for o in results["runs"] if (o["variant"], o["learning_rate"]) == (row["variant"], row["learning_rate"])),
        key=lambda o: sign * o["metric"],
    )
    case = next(case for case in comparison.cases() if case.key == _key(best))
    folder = out / "runs" / case.name
    if not processes.by_first((folder / "model").is_dir):
        again = _one(_Task(case, folder, manifest["metric"]["name"], keep=True))
        if again.get("metric") is None:
            raise ValueError(f"the best run, {case.name}, could not be made again: {again.get('stopped')}")
        if processes.first():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return case.name


def _results(comparison: Comparison, manifest: dict[str, Any], done: Mapping[Key, Outcome]) -> dict[str, Any]:
    cases = comparison.cases()
    outcomes = [done[case.key] for case in cases if case.key in done]
    better = manifest["metric"]["higher_is_better"]
    return {
        "metric": manifest["metric"]["name"],
        "higher_is_better": better,
        "learning_rate_choice": CHOICE,
        "runs_at_once": manifest["hardware"]["runs_at_once"],
        "unfinished": len(cases) - len(outcomes),
        "table": tables.table(outcomes, better),
        "verdict": tables.verdict(outcomes, tables.table(outcomes, better), manifest["metric"]["name"], better),
        "limits": optimizers.limits(dict.fromkeys(case.config.optimizer for case in cases)),
        "runs": outcomes,
    }


def _lead(comparison: Comparison) -> str:
    config = comparison.config
    grids = "; ".join(f"{v.name}: {', '.join(f'{lr:g}' for lr in v.learning_rates)}" for v in comparison.variants)
    return (
        f"{config.model}, {config.task} on {config.train}, seeds {', '.join(map(str, comparison.seeds))}: mean ± "
        f"standard deviation over them. Learning rate of each variant: {CHOICE}, from its grid ({grids})."
    )


# One run, in whatever process -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A case, the folder of its run, and which metric counts."""

    case: Case
    out: Path
    metric: str
    keep: bool = False


EVERYWHERE = (ValueError, ImportError, torch.OutOfMemoryError)
"""What all processes that make a run together raise alike."""


def _one(task: _Task) -> Outcome:
    """One run's line: its key, and its results or why it has none."""
    case, out = task.case, task.out
    finetune.quiet()
    gc.collect()  # the model of the run before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if processes.first():
        shutil.rmtree(out, ignore_errors=True)  # of a run that was not finished
    processes.wait()
    try:
        config = dataclasses.replace(case.config, save_model=True) if task.keep else case.config
        return _outcome(case, {**finetune.run(config, out), "metric": task.metric})
    except finetune.Diverged as error:
        return {**_outcome(case, None), "stopped": str(error)}
    except Exception as error:  # libraries raise what they like: the other runs are to go on
        if processes.joined() and not isinstance(error, EVERYWHERE):
            raise  # the others may be in the middle of the run: this process ends, and whoever started it ends them
        with contextlib.suppress(OSError):  # the disk may be full
            if processes.first():
                out.mkdir(parents=True, exist_ok=True)
                (out / "error.txt").write_text(traceback.format_exc())
        reason = next(iter(str(error).strip().splitlines()), "")
        what = reason if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {reason}"
        return {**_outcome(case, None), "stopped": what, "failed": True}


def _lost(task: _Task, why: str) -> Outcome:
    return {**_outcome(task.case, None), "stopped": why, "failed": True}


def _outcome(case: Case, results: dict[str, Any] | None) -> Outcome:
    variant, learning_rate, seed = case.key
    key: Outcome = {
        "variant": variant,
        "optimizer": case.config.optimizer,
        "learning_rate": learning_rate,
        "seed": seed,
        "metric": None,
    }
    if results is None:
        return key
    found = {
        **key,
        "metric": results["final"][results["metric"]],
        "final": results["final"],
        "steps": results["steps"],
        **{f"memory_{kind}": count for kind, count in results["memory"].items()},
        **{name: results[name] for name in ("seconds_per_step", "touched", "l2_moved", "retained")},
    }
    if results["retained"]:
        found["forgetting"] = next(iter(results["retained"].values()))["forgetting"]
    return found
