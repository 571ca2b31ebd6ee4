"""A run folder belongs to one process at a time, and a run that is refused leaves none behind."""

import errno
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("filelock")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.comparing import compare
from nanoadam.finetuning import folders, training
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.paper import recipe, reproduce

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WRITER = """
import sys
from pathlib import Path
from nanoadam.finetuning import folders
with folders.alone(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def small(tmp_path: Path) -> Config:
    rows = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12))
    return Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), max_steps=2, device="cpu")


def stop_at_once(line: dict[str, object]) -> None:
    if line["step"]:
        raise KeyboardInterrupt


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_process_is_refused_and_a_killed_one_blocks_nobody(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finetune.run(small, out, stop_at_once)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "locked\n"
        before = content(out)
        capsys.readouterr()
        assert cli.main(["finetune", "--resume", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"nanoadam: another process is writing to {out}: wait until it has ended, or choose another folder\n"
        )
        assert content(out) == before
    finally:
        writer.kill()
        writer.communicate()
    assert (out / folders.LOCK).exists()
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert not (out / folders.LOCK).exists()


def test_a_run_holds_its_folder_from_its_first_file_to_its_last(small: Config, tmp_path: Path) -> None:
    seen = []

    def look(line: dict[str, object]) -> None:
        if "about" in line:  # said before the first file is written
            return
        with pytest.raises(folders.RunError, match="another process is writing"):
            finetune.resume(tmp_path / "run")
        seen.append(line)

    with pytest.raises(KeyboardInterrupt):
        finetune.run(small, tmp_path / "run", lambda line: (look(line), stop_at_once(line)))
    finetune.resume(tmp_path / "run", look)
    assert len(seen) > 2
    assert folders.LOCK not in {path.name for path in (tmp_path / "run").rglob("*")}


def test_a_comparison_is_held_whole_and_each_of_its_runs(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, one, seen = tmp_path / "run", compare._one, []

    def look(task: compare._Task) -> compare.Outcome:
        with pytest.raises(folders.RunError, match=f"writing to {out}:"):
            compare.resume(out)
        seen.append(task)
        return one(task)

    monkeypatch.setattr(compare, "_one", look)
    comparison = compare.Comparison(small, compare.variants(["adamw", "sgd"], [1e-3]), seeds=(0,))
    compare.run(comparison, out)
    shutil.rmtree(out / "runs" / "sgd-0.001-0")
    (out / "metrics.jsonl").unlink()
    compare.resume(out)
    assert len(seen) == 3
    assert folders.LOCK not in {path.name for path in out.rglob("*")}


def test_a_folder_that_somebody_has_just_made_is_left_to_him(small: Config, tmp_path: Path) -> None:
    """Between making it and writing there it is empty."""
    out = tmp_path / "run"
    out.mkdir()
    with folders.alone(out):
        for begin in (
            lambda: finetune.run(small, out),
            lambda: compare.run(compare.Comparison(small, compare.variants(["sgd"], [1e-3]), seeds=(0,)), out),
            lambda: reproduce.run(recipe.load("pathmnist", "smoke"), out),
        ):
            with pytest.raises(folders.RunError, match="another process is writing"):
                begin()
            assert [path.name for path in out.iterdir()] == [folders.LOCK]


def test_of_many_who_begin_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    def begin(out: Path, start: threading.Barrier, won: list[int], number: int) -> None:
        start.wait()
        try:
            with folders.new_folder(out):
                inside.append(number)
                folders.write(out / "config.toml", f"{number}")
                assert inside == [number]
                won.append(number)
                inside.clear()
        except (folders.RunError, FileExistsError):
            pass

    inside: list[int] = []
    for attempt in range(20):
        out, won, start = tmp_path / f"{attempt}", [], threading.Barrier(6)
        threads = [threading.Thread(target=begin, args=(out, start, won, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (out / "config.toml").read_text() == f"{won[0]}"
        assert len(won) == 1


def test_what_a_killed_process_left_of_its_lock_is_no_content(tmp_path: Path) -> None:
    (tmp_path / folders.LOCK).touch()
    with folders.new_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.EOPNOTSUPP, "no")])
def test_where_the_file_system_has_no_locks_runs_go_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As NFS without its lock daemon."""

    import filelock

    def acquire(lock: filelock.FileLock, **_: object) -> None:
        Path(lock.lock_file).touch()
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="cannot be locked"), folders.new_folder(tmp_path / "run"):
        folders.write(tmp_path / "run" / "config.toml", "")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError), folders.alone(tmp_path / "run"):
        pass


# Refused after the folder was made -------------------------------------------------------------------------


def refuse(*_: object, **__: object) -> None:
    raise ValueError("the optimizer cannot be made")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_refused_before_its_first_step_leaves_what_it_found(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "a" / "run"
    if there:
        out.mkdir(parents=True)
    monkeypatch.setattr(training.RunTrainer, "create_optimizer", refuse)
    with pytest.raises(ValueError, match="cannot be made"):
        finetune.run(small, out, lambda line: None)
    assert out.exists() == there
    assert not there or list(out.iterdir()) == []


def test_what_a_run_has_measured_is_kept_whatever_ends_it(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        whole = training.RunTrainer.evaluate
        patch.setattr(
            training.RunTrainer, "evaluate", lambda self, *a, **k: refuse() if self.state.global_step else whole(self)
        )
        with pytest.raises(ValueError, match="cannot be made"):
            finetune.run(small, out)
    assert folders.read_lines(out / "metrics.jsonl")
    finetune.resume(out)


@pytest.mark.parametrize(
    "leave",
    [
        lambda out: folders.append(out / "metrics.jsonl", {"step": 1}),
        lambda out: (
            (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)
            or (out / "checkpoints" / "checkpoint-1" / "model.safetensors").touch()
        ),
        lambda out: (out / "notes.txt").write_text("mine"),
        lambda out: (out / "model").symlink_to(out.parent),
        lambda out: (out / "run" / "data").mkdir(parents=True) or (out / "run" / "data" / "x").touch(),
    ],
)
def test_only_a_folder_with_nothing_but_settings_is_removed(tmp_path: Path, leave) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="cannot be made"), folders.new_folder(out, derived=("data",)):
        folders.write(out / "config.toml", "")
        leave(out)
        before = {path.name for path in out.rglob("*")}
        refuse()
    assert {path.name for path in out.rglob("*")} == before - {folders.LOCK}


@pytest.mark.parametrize("error", [folders.RunError("the disk is full"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_what_is_not_bad_input_leaves_a_folder_to_go_on_with(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), folders.new_folder(tmp_path / "run"):
        folders.write(tmp_path / "run" / "config.toml", "")
        raise error
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_a_refused_run_holds_its_folder_until_all_that_it_wrote_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise somebody else begins there, whose lock the first one takes for its own and removes."""
    clear, seen = folders._clear, []

    def look(out: Path) -> None:
        clear(out)
        with pytest.raises(folders.RunError, match="another process is writing"), folders.alone(out):
            pass
        seen.extend(path.name for path in out.iterdir())

    monkeypatch.setattr(folders, "_clear", look)
    with pytest.raises(ValueError, match="cannot be made"), folders.new_folder(tmp_path / "run"):
        folders.write(tmp_path / "run" / "config.toml", "")
        refuse()
    assert seen == [folders.LOCK]
    assert not (tmp_path / "run").exists()


def test_an_experiment_whose_data_or_model_cannot_be_read_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model, out = tmp_path / "data", tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data.mkdir()
    np.savez(data / "pathmnist.npz", images=np.zeros(3))
    for split in ("train", "test"):
        tiny.jsonl(data / f"{split}.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 4)
    for name, words in (("pathmnist", "it is no MedMNIST file"), ("gsm8k", str(model))):
        arguments = ["reproduce", name, "--data", str(data), "--model", str(model), "--out", str(out)]
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
        assert not out.exists()
