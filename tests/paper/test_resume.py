"""`nanoadam reproduce --resume`: an experiment that was interrupted ends as one that never was."""

import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("filelock")
pytest.importorskip("transformers")

from crossed import crossed
from nanoadam import cli
from nanoadam.finetuning import folders
from nanoadam.finetuning import run as finetune
from nanoadam.paper import experiments, front, recipe, reproduce
from nanoadam.paper.recipe import Recipe
from nanoadam.paper.toy import experiment as toy
from nanoadam.paper.toy import report as toy_report

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CHANGES: dict[str, dict[str, Any]] = {
    "forgetting": {"config": {"max_steps": 3, "save_every": 1}},
    "gsm8k": {"config": {"max_steps": 3, "save_every": 1}},
}
"""To have checkpoints in the middle of a run."""


def smoke(name: str) -> Recipe:
    chosen = recipe.load(name, "smoke")
    return dataclasses.replace(chosen, keys=recipe.merged(chosen.keys, CHANGES.get(name, {})))


def timeless(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{key: value for key, value in row.items() if key != "minutes"} for row in results["rows"]]
    return json.loads(json.dumps([row for row in rows if row["measure"] not in ("hours", "minutes")]))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of the experiment, never interrupted."""
    found: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in found:
            out = tmp_path_factory.mktemp("whole") / name
            reproduce.run(smoke(name), out)
            found[name] = out
        return found[name]

    return run


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def interrupt(monkeypatch: pytest.MonkeyPatch, out: Path, file: str, line: int) -> None:
    """Ctrl-C where half of a line of some file is written."""
    append, seen = folders.append, []

    def stop(path: Path, record: dict[str, Any]) -> None:
        if fnmatch.fnmatch(str(path.relative_to(out)), file):
            seen.append(path)
            if len(seen) == line:
                with path.open("a") as torn:
                    torn.write(json.dumps(record)[:9])
                raise KeyboardInterrupt
        append(path, record)

    monkeypatch.setattr(folders, "append", stop)


def watch(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[tuple[str, str]]:
    """What is run and gone on with, in which folder."""
    seen = []

    def told(what: str) -> None:
        work = getattr(finetune, what)

        def watched(*given: Any, **more: Any) -> Any:
            folder = given[-1] if what == "run" else given[0]
            seen.append((what, str(folder.relative_to(out))))
            return work(*given, **more)

        monkeypatch.setattr(finetune, what, watched)

    told("run")
    told("resume")
    return seen


# (experiment, where it is interrupted, line there, what is run after that, what stays as it is)
CASES = [
    # The run is finished, its line is not whole: it is read from the run's own folder.
    ("glue", "bert-base/COLA/metrics.jsonl", 2,
     ["run bert-base/STSB/runs/adamw-*", "run bert-base/STSB/runs/nanoadam-*"], ["bert-base/COLA/runs/*"]),
    # The first comparison is finished, its manifest too.
    ("glue", "bert-base/STSB/runs/nanoadam-*/metrics.jsonl", 2,
     ["run bert-base/STSB/runs/nanoadam-*"], ["bert-base/COLA/*", "bert-base/STSB/runs/adamw-*"], pytest.mark.slow),
    ("forgetting", "resnet-18/nanoadam-0/task2/metrics.jsonl", 3,
     ["resume resnet-18/nanoadam-0/task2"], ["resnet-18/adamw-0/*", "resnet-18/nanoadam-0/task1/*"]),
    # Everything of the first run is finished but its line.
    ("forgetting", "metrics.jsonl", 1,
     ["run resnet-18/nanoadam-0/task1", "run resnet-18/nanoadam-0/task2"], ["resnet-18/adamw-0/task?/*"],
     pytest.mark.slow),
    ("gsm8k", "llama-2-7b/nanoadam-0/metrics.jsonl", 3,
     ["resume llama-2-7b/nanoadam-0"], ["llama-2-7b/microadam-0/*"], pytest.mark.slow),
    # It is trained, and among its answers: where test_a_killed_experiment_ends_as_one_that_was_not is killed.
    ("gsm8k", "llama-2-7b/nanoadam-0/answers.jsonl", 2, [], ["llama-2-7b/microadam-0/*"], pytest.mark.slow),
    ("gradient-weight", "vit-tiny/CIFAR-10/finetuned-0/metrics.jsonl", 2,
     ["run vit-tiny/CIFAR-10/finetuned-0", "run vit-tiny/CIFAR-10/scratch-0"], ["bert-base/*"], pytest.mark.slow),
    ("gradient-weight", "runs.jsonl", 4, ["run vit-tiny/CIFAR-10/scratch-0"],
     ["bert-base/*", "vit-tiny/CIFAR-10/finetuned-0/*"], pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "line", "again", "kept"),
    [pytest.param(*case[:5], marks=case[5:], id=f"{case[0]}-{case[1]}-{case[2]}") for case in CASES],
)
def test_an_interrupted_experiment_ends_as_one_that_was_not(
    name: str, file: str, line: int, again: list[str], kept: list[str],
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected, out = whole(name), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, out, file, line)
        with pytest.raises(KeyboardInterrupt):
            reproduce.run(smoke(name), out)
    assert manifest(out)["results"] is None
    before, times = content(out), written(out)
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch, out)
        capsys.readouterr()
        assert cli.main(["reproduce", "--resume", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(seen) == len(again)
    assert all(fnmatch.fnmatch(" ".join(one), pattern) for one, pattern in zip(seen, again, strict=True)), seen
    after = content(out)
    unchanged = [path for path in before if any(fnmatch.fnmatch(path, pattern) for pattern in kept)]
    assert len(unchanged) > 3
    assert all(after[path] == before[path] and written(out)[path] == times[path] for path in unchanged)
    inner = [path for path in after if fnmatch.fnmatch(path, "*/manifest.json")]
    assert inner and all(json.loads(after[path])["results"] for path in inner)
    assert timeless(results) == timeless(manifest(expected)["results"])
    assert results["notes"] == manifest(expected)["results"]["notes"]
    assert list(manifest(out)) == list(manifest(expected))
    assert manifest(out)["results"]["rows"] == results["rows"]
    assert set(after) == set(content(expected))
    if name == "gradient-weight":
        assert after["gradients.jsonl"] == content(expected)["gradients.jsonl"]
    if name == "gsm8k":
        for path in ("llama-2-7b/microadam-0/answers.jsonl", "llama-2-7b/nanoadam-0/answers.jsonl"):
            assert after[path] == content(expected)[path]


def test_a_config_in_an_experiment_that_was_changed_is_refused(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, out, "bert-base/COLA/metrics.jsonl", 2)
        with pytest.raises(KeyboardInterrupt):
            reproduce.run(smoke("glue"), out)
    config = out / "bert-base" / "COLA" / "config.toml"
    config.write_text(config.read_text().replace("max_steps = 2", "max_steps = 3"))
    before = content(out)
    assert cli.main(["reproduce", "--resume", str(out)]) == 2
    assert f"{config} is not what it was" in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.parametrize(
    ("name", "runs", "optimizers"),
    [
        ("gsm8k", "llama-2-7b/{}-0", {"microadam", "nanoadam"}),
        ("forgetting", "resnet-18/{}-0/task1", {"adamw", "nanoadam"}),
    ],
)
def test_each_variant_is_trained_by_the_optimizer_of_its_name(
    name: str, runs: str, optimizers: set[str], whole: Callable[[str], Path]
) -> None:
    out = whole(name)
    assert {row["variant"] for row in manifest(out)["results"]["rows"]} == optimizers
    for optimizer in optimizers:
        assert manifest(out / runs.format(optimizer))["settings"]["optimizer"] == optimizer
    for each in ("commonsense", "forgetting", "glue", "gsm8k", "learning-rate"):
        chosen = recipe.load(each)
        for model in chosen.table("models"):
            for variant, own in experiments.variants(chosen, model, "").items():
                assert own["optimizer"] in variant  # "lora-nanoadam" has lora


def test_the_model_of_a_finished_run_is_not_kept(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Nor that of one whose process was killed between its line and this."""
    out = shutil.copytree(whole("gsm8k"), tmp_path / "run")
    parts = [out / "llama-2-7b" / "microadam-0" / part for part in ("model", "checkpoints")]
    for folder in parts:
        assert not folder.exists()
        folder.mkdir()
        (folder / "model.safetensors").touch()
    folders.write(out / "manifest.json", json.dumps({**manifest(out), "results": None}))
    reproduce.resume(out)
    assert not any(folder.exists() for folder in parts)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from nanoadam.finetuning import folders
from nanoadam.paper import recipe, reproduce
append, out = folders.append, Path(sys.argv[1])
def die(path, record):
    append(path, record)
    if path == out / "llama-2-7b" / "nanoadam-0" / "answers.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
folders.append = die
reproduce.run(recipe.Recipe(**json.loads(sys.argv[2])), out)
"""


def test_a_killed_experiment_ends_as_one_that_was_not(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, out = whole("gsm8k"), tmp_path / "run"
    same = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums over more threads round otherwise
    killed = [sys.executable, "-W", "ignore", "-c", KILLED, str(out), json.dumps(dataclasses.asdict(smoke("gsm8k")))]
    assert subprocess.run(killed, check=False, capture_output=True, env=same).returncode == -signal.SIGKILL
    assert (out / folders.LOCK).exists()
    seen = watch(monkeypatch, out)
    resumed = reproduce.resume(out)
    assert seen == []  # it was killed among its answers
    monkeypatch.undo()
    assert timeless(resumed) == timeless(manifest(never)["results"])
    assert content(out).keys() == content(never).keys()  # no lock, no model


# Fronts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "gone"), crossed([2, 6, 9], [False, True]))
def test_a_front_goes_on(
    line: int, gone: bool, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out, run_one, names = whole("forgetting-front"), tmp_path / "run", front.run_one, []
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, out, "metrics.jsonl", line)
        with pytest.raises(KeyboardInterrupt):
            reproduce.run(smoke("forgetting-front"), out)
    before = (out / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    if gone:
        shutil.rmtree(out / "starts")

    def watched(job: Any, one: front.Job, *more: Any) -> dict[str, Any]:
        names.append(("task1" if one.start is None else "task2", one.method))
        return run_one(job, one, *more)

    monkeypatch.setattr(front, "run_one", watched)
    results = reproduce.resume(out)
    every = [(row["kind"], row["method"]) for row in folders.read_lines(expected / "metrics.jsonl")]
    assert names == every[:gone] + every[line - 1 :]
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    lines = [{**row, "seconds": 0} for row in folders.read_lines(out / "metrics.jsonl")]
    assert lines == [{**row, "seconds": 0} for row in folders.read_lines(expected / "metrics.jsonl")]
    assert timeless(results) == timeless(manifest(expected)["results"])


def test_a_front_without_its_weights_is_whole_if_nothing_needs_them(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole("forgetting-front"), tmp_path / "run")
    folders.write(out / "manifest.json", json.dumps({**manifest(out), "results": None}))  # killed before it was written
    shutil.rmtree(out / "starts")
    monkeypatch.setattr(front, "run_one", lambda *_: pytest.fail("nothing is left to run"))
    assert timeless(reproduce.resume(out)) == timeless(manifest(whole("forgetting-front"))["results"])


# The toy -----------------------------------------------------------------------------------------------------


def test_the_toy_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy.SIZES, "smoke", {"seeds": (0,), "steps": 2})
    monkeypatch.setattr(toy, "GRID", {name: values[:1] for name, values in toy.GRID.items()})
    monkeypatch.setattr(toy_report, "write_folder", lambda results, folder, *_: (folder / "report.html").touch())
    out = tmp_path / "run"

    def stop(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce.run(recipe.load("toy", "smoke"), out, progress=stop)
    (out / "toy").mkdir(exist_ok=True)
    (out / "toy" / "half").touch()
    resumed = reproduce.resume(out)
    assert not (out / "toy" / "half").exists()
    assert timeless(resumed) == timeless(reproduce.run(recipe.load("toy", "smoke"), tmp_path / "whole"))


# The pieces --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_one_whose_line_is_there(tmp_path: Path) -> None:
    """What diverged diverges again; what a missing library or a full device stopped is tried again."""
    cases = [{"variant": name, "seed": seed} for name in ("good", "wild", "missing", "large") for seed in (0, 1)]
    causes = {"wild": finetune.Diverged("nan"), "missing": ImportError("no"), "large": torch.OutOfMemoryError("full")}
    told, done = [], []

    def work(variant: str, seed: int) -> dict[str, Any]:
        done.append((variant, seed))
        if variant in causes:
            raise causes[variant]
        return {"value": seed + 0.1}

    def lines() -> list[dict[str, Any]]:
        done.clear()
        return list(experiments.each(cases, tmp_path / "runs.jsonl", work, lambda what, *_: told.append(what)))

    first = lines()
    assert [(line["variant"], line["seed"]) for line in first] == [tuple(case.values()) for case in cases] == done
    assert told[1] == "good, seed 1"
    assert [line.get("stopped") for line in first] == [None, None, "nan", "nan", "no", "no", "full", "full"]
    causes.pop("large")
    again = lines()
    assert done == [("missing", 0), ("missing", 1), ("large", 0), ("large", 1)]
    assert again[:6] == first[:6]
    assert [line["value"] for line in again[6:]] == [0.1, 1.1]
    lines()
    assert done == [("missing", 0), ("missing", 1)]
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text("".join(text.splitlines(keepends=True)[:2])[:-5])
    assert lines() == again
    assert done[0] == ("good", 1) and len(done) == 7


def test_a_model_that_is_made_is_whole_or_not_there(tmp_path: Path) -> None:
    def make(folder: Path, killed: bool) -> None:
        (folder / "config.json").touch()
        if killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments._once(tmp_path / "pruned", lambda folder: make(folder, True))
    assert not (tmp_path / "pruned").exists()
    assert (experiments._once(tmp_path / "pruned", lambda folder: make(folder, False)) / "config.json").exists()


# What is refused ---------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment with local data and a local model, interrupted before its first run."""
    for file in ("CoLA/train.tsv", "CoLA/dev.tsv", "SST-2/train.tsv", "SST-2/dev.tsv"):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).write_text("rows")
    (tmp_path / "models" / "minilm-l6").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "models" / "minilm-l6" / file).write_text("{}")
    monkeypatch.setitem(reproduce.KINDS, "comparison", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.chdir(tmp_path)
    options = ["--scale", "small", "--data", "data", "--model", "models", "--only", "COLA,adamw", "--jobs", "3"]
    assert cli.main(["reproduce", "glue", *options, "--out", "run"]) == 130
    monkeypatch.chdir("/")
    return tmp_path / "run"


def refused(out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    before = content(out) if out.is_dir() else None
    capsys.readouterr()
    assert cli.main(["reproduce", "--resume", str(out), *more]) == 2
    assert before == (content(out) if out.is_dir() else None)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_all_that_was_told_is_kept(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, too."""
    seen: list[tuple[Recipe, experiments.Setting]] = []

    def see(chosen: Recipe, setting: experiments.Setting) -> reproduce.Found:
        seen.append((chosen, setting))
        raise KeyboardInterrupt

    monkeypatch.setitem(reproduce.KINDS, "comparison", see)
    assert cli.main(["reproduce", "--resume", str(begun)]) == 130
    assert cli.main(["reproduce", "--resume", str(begun), "--jobs", "2"]) == 130
    assert [setting.jobs for _, setting in seen] == [3, 2]
    for chosen, setting in seen:
        assert chosen == recipe.load("glue", "small").only(["COLA", "adamw"])
        assert (setting.data, setting.model) == (begun.parent / "data", begun.parent / "models")


@pytest.mark.parametrize(
    "told",
    [["glue"], ["--scale", "full"], ["--data", "."], ["--model", "."], ["--only", "COLA"], ["--out", "x"], ["--list"]],
    ids=lambda told: told[0],
)
def test_resume_takes_no_other_options(told: list[str], begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(begun, capsys, *told)
    name = told[0] if told[0].startswith("--") else "the name"
    assert error == f"nanoadam: --resume goes on with the experiment's own recipe: leave out {name}\n"


@pytest.mark.parametrize(
    "file", ["data/CoLA/dev.tsv", "models/minilm-l6/model.safetensors", "models/minilm-l6/config.json"]
)
def test_other_data_and_models_are_refused(file: str, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun.parent / file).write_text("[]")
    assert f"{begun.parent / file} is not what it was when {begun} began" in refused(begun, capsys)
    (begun.parent / file).unlink()
    assert str(begun.parent / Path(file).parts[0]) in refused(begun, capsys)


def test_a_file_more_in_the_models_folder_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers may read it instead of one that was there."""
    (begun.parent / "models" / "minilm-l6" / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is not what it was" in refused(begun, capsys)


def test_files_that_it_does_not_read_may_change(begun: Path) -> None:
    (begun.parent / "data" / "SST-2" / "dev.tsv").write_text("other")
    (begun.parent / "models" / "other").mkdir()
    assert cli.main(["reproduce", "--resume", str(begun)]) == 130


def test_another_recipe_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (begun / "recipe.toml").read_text()
    (begun / "recipe.toml").write_text(text.replace("max_length = 128", "max_length = 64"))
    assert f"recipe.toml in {begun} is not what it was" in refused(begun, capsys)
    (begun / "recipe.toml").write_text(text[: len(text) // 2] + "[")
    assert f"in {begun} cannot be read" in refused(begun, capsys)


def test_a_folder_of_something_else_is_refused(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no experiment" in refused(tmp_path / "nowhere", capsys)
    assert not (tmp_path / "nowhere").exists()
    (begun / "recipe.toml").rename(begun / "config.toml")  # as of a comparison
    assert "holds no experiment: there is no recipe.toml" in refused(begun, capsys)
    (begun / "config.toml").rename(begun / "recipe.toml")
    for text in ("{", "[]", "{}", '{"command": "nanoadam finetune"}'):
        (begun / "manifest.json").write_text(text)
        assert str(begun) in refused(begun, capsys)


def test_a_finished_experiment_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun / "manifest.json").write_text(json.dumps({**manifest(begun), "results": {"rows": []}}))
    assert f"{begun} is finished: its results are in manifest.json and report.html" in refused(begun, capsys)


def test_a_folder_that_is_written_to_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folders.alone(begun):
        assert f"another process is writing to {begun}" in refused(begun, capsys)
