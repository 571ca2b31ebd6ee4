"""`--resume` of a run with a damaged file: one sentence with file, fault and remedy, and nothing changed."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.comparing import compare
from nanoadam.finetuning import checkpoints
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "zero bytes": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "flipped": flipped,
    "deleted": None,
}
NOT_READ = {"README.md", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
"""Of a checkpoint: for people, and for whoever loads its model."""


@pytest.fixture(scope="module", params=["model", pytest.param("delta", marks=pytest.mark.slow)])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its second checkpoint."""
    root = tmp_path_factory.mktemp(request.param)
    rows = tiny.jsonl(root / "train.jsonl", tiny.sentences(32))

    def stop(line: dict[str, object]) -> None:
        if line["step"] == 5 and "event" not in line:
            raise KeyboardInterrupt

    config = Config(model=str(tiny.bert_folder(root / "bert")), train=str(rows), device="cpu", batch_size=4,
                    max_steps=7, save_every=2, eval_every=2, log_every=1, learning_rate=1e-3, density=0.2, best=True,
                    keep_checkpoints=2, save=request.param)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config, root / "run", stop)
    return root / "run"


@pytest.fixture
def begun(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path, how: str) -> None:
    change = DAMAGE[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


def refused(run: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a run with this file damaged is refused with."""
    before = content(run)
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", str(run)]) == 2, path
    error = capsys.readouterr().err
    assert error.startswith("nanoadam: ") and error.count("\n") == 1, error
    assert str(path) in error
    assert content(run) == before
    return error


def each_damaged(run: Path, paths: list[Path], capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], str]:
    """Every file in every way, one at a time: the sentences by file and damage."""
    found = {}
    for path in paths:
        whole = path.read_bytes()
        for how in DAMAGE:
            damage(path, how)
            if (path.name, how) not in LEFT_OUT:
                found[path.name, how] = refused(run, path, capsys)
            path.write_bytes(whole)
    return found


# Checkpoints of earlier versions have no checksums, so what is gone without them is no sign; config.toml makes a folder
# a run's, and the manifest is what is not looked at without it.
LEFT_OUT = {
    ("checksums.json", "deleted"), ("config.toml", "deleted"), ("config.toml", "truncated"),
    ("manifest.json", "deleted"), ("best.safetensors", "deleted"),
}  # fmt: skip


def test_every_damaged_file_of_the_last_checkpoint_is_named(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, earlier = begun / "checkpoints" / "checkpoint-4", begun / "checkpoints" / "checkpoint-2"
    paths = [path for path in sorted(last.iterdir()) if path.name not in NOT_READ]
    weights = "delta.safetensors" if (last / "delta.safetensors").is_file() else "model.safetensors"
    names = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "touched.safetensors", weights}
    assert {path.name for path in paths} == names | {"config.json", checkpoints.SEAL}
    for sentence in each_damaged(begun, paths, capsys).values():
        assert f"remove {last}, and --resume goes on from {earlier}" in sentence
        assert "is damaged" in sentence or "is missing" in sentence
    damage(earlier / "optimizer.pt", "flipped")
    damage(last / "optimizer.pt", "deleted")
    sentence = refused(begun, last / "optimizer.pt", capsys)
    assert f"no earlier checkpoint that is whole: begin anew with nanoadam finetune {begun / 'config.toml'}" in sentence


def test_the_advice_to_go_on_from_an_earlier_checkpoint_holds(
    begun: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is not read of a checkpoint, or is a record only, stops nobody."""
    whole = shutil.copytree(stopped, tmp_path / "whole")
    for path in (whole / "checkpoints" / "checkpoint-4").iterdir():
        if path.name in NOT_READ:
            damage(path, "zero bytes")
    damage(whole / "metrics.jsonl", "flipped")
    assert cli.main(["finetune", "--resume", str(whole)]) == 0
    shutil.rmtree(begun / "checkpoints" / "checkpoint-4")
    assert cli.main(["finetune", "--resume", str(begun)]) == 0
    last = "checkpoints/checkpoint-6/optimizer.pt"
    assert (whole / last).read_bytes() == (begun / last).read_bytes()


def test_a_checkpoint_without_checksums_is_looked_at_as_far_as_it_can_be(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = begun / "checkpoints" / "checkpoint-4"
    (last / checkpoints.SEAL).unlink()
    for path in sorted(last.iterdir()):
        if path.name in NOT_READ:
            continue
        needed = path.suffix == ".pt" or path.name in ("trainer_state.json", "model.safetensors", "delta.safetensors")
        whole = path.read_bytes()
        for how in ("truncated", "zero bytes", "empty", *(["deleted"] if needed else [])):
            damage(path, how)
            named = last if how == "deleted" else path
            assert "--resume goes on from" in refused(begun, named, capsys)
            path.write_bytes(whole)
    assert cli.main(["finetune", "--resume", str(begun)]) == 0


def test_damaged_best_weights_are_named_before_the_run_goes_on(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = begun / "checkpoints" / checkpoints.BEST
    for sentence in each_damaged(begun, [best], capsys).values():
        assert "Remove it, and --resume keeps the best of the evaluations that are left" in sentence
    best.unlink()
    assert cli.main(["finetune", "--resume", str(begun)]) == 0
    assert best.is_file()


def test_a_damaged_manifest_or_config_is_named_with_the_way_on(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = each_damaged(begun, [begun / "manifest.json", begun / "config.toml"], capsys)
    for (name, _), sentence in sentences.items():
        way = "remove it to go on by config.toml alone" if name == "manifest.json" else "manifest.json under settings"
        assert way in sentence
        assert "begin anew with --out" in sentence
    for text in ("[]", "null", '"x"'):
        (begun / "manifest.json").write_text(text)
        assert "it holds no JSON object" in refused(begun, begun / "manifest.json", capsys)
    (begun / "manifest.json").unlink()
    assert cli.main(["finetune", "--resume", str(begun)]) == 0
    for command in (["predict", str(begun), "--data", "x.csv"], ["evaluate", str(begun), "--data", "x.csv"]):
        (begun / "manifest.json").write_text("{")
        assert cli.main(command) == 2
        assert f"{begun / 'manifest.json'} is damaged" in capsys.readouterr().err


def test_a_comparison_names_the_damaged_manifest_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12))
    job = Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), max_steps=1, device="cpu")
    out = tmp_path / "compared"
    compare.run(compare.Comparison(job, compare.variants(["adamw"], [1e-3]), seeds=(0,)), out)
    one = out / "runs" / "adamw-0.001-0"
    for path, way in ((one / "manifest.json", f"remove {one}"), (out / "manifest.json", "begin anew with --out")):
        whole = path.read_text()
        for text in (whole[: len(whole) // 2], "[]"):
            path.write_text(text)
            assert cli.main(["compare", "--resume", str(out)]) == 2
            error = capsys.readouterr().err
            assert f"{path} is damaged" in error and way in error
        path.write_text(whole)
    assert json.loads((out / "manifest.json").read_text())["results"]


def test_lost_metrics_of_a_run_whose_steps_are_done_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(lines: list[dict[str, object]]) -> None:
        raise KeyboardInterrupt

    rows = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12))
    job = Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), max_steps=1, device="cpu",
                 learning_rate=1e-3)  # fmt: skip
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "_memory", stop)
        finetune.run(job, run)
    lines = (run / "metrics.jsonl").read_bytes()
    for lost in (b"", bytes(len(lines))):
        (run / "metrics.jsonl").write_bytes(lost)
        assert str(run / "checkpoints" / "checkpoint-1") in refused(run, run / "metrics.jsonl", capsys)
    (run / "metrics.jsonl").write_bytes(lines)
    assert cli.main(["finetune", "--resume", str(run)]) == 0
