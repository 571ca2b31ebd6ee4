"""The command analyze: a pair, a run folder, a model with data; and what it refuses, in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config


def weights(layers: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"encoder.layer.{i}.{kind}.weight": torch.randn(8, 8) for i in range(layers) for kind in ("query", "dense")}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The arguments for a pair of which 16 of 256 weights have moved by 0.25."""
    before, after = weights(), weights()
    after["encoder.layer.1.dense.weight"][:2] += 0.25
    return ["--before", str(saved(tmp_path / "before", before)), "--after", str(saved(tmp_path / "after", after))]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["analyze", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_pair_is_reported_by_layer_and_in_all(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert cli.main(["analyze", *folders, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["total"]["numel"] == 256 and printed["total"]["touched"] == 1 / 16
    assert printed["total"]["l2"] == pytest.approx(1.0, rel=1e-6)  # sqrt(16) * 0.25
    assert [(row["layer"], row["touched"]) for row in printed["layers"]] == [(0, 0.0), (1, 0.125)]
    assert printed["heatmap"]["kinds"] == ["dense", "query"]
    assert {p.name for p in out.iterdir()} == {"manifest.json", "report.html", "results.json"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "src=" not in page and "6.25 %" in page


def test_a_pair_is_a_table_on_the_terminal(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["analyze", *folders, "--out", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    for text in ("smallest 30 %", "layer 1", "12.50 %", "all", "Report:"):
        assert text in out


def test_a_missing_tensor_is_named_and_can_be_left_out(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "after" / "model.safetensors").unlink()
    save_file({**weights(), "classifier.weight": torch.ones(2, 8)}, tmp_path / "after" / "model.safetensors")
    error = refused(folders, capsys)
    assert "classifier.weight is in" in error and "--skip-missing" in error
    assert cli.main(["analyze", *folders, "--skip-missing", "--out", str(tmp_path / "report")]) == 0
    assert "Only after, and left out: classifier.weight (1)." in capsys.readouterr().out


def test_other_shapes_are_named(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "after" / "model.safetensors").unlink()
    save_file({**weights(), "encoder.layer.0.query.weight": torch.ones(2, 8)}, tmp_path / "after" / "model.safetensors")
    assert "encoder.layer.0.query.weight has another shape than before: [2, 8], was [8, 8]" in refused(folders, capsys)


def test_weights_that_are_not_finite_are_named(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mean over them would be no JSON."""
    broken = weights()
    broken["encoder.layer.1.query.weight"][3, 4] = torch.nan
    out = tmp_path / "report"
    pair = [*folders[:2], "--after", str(saved(tmp_path / "broken", broken)), "--out", str(out)]
    assert "encoder.layer.1.query.weight holds weights that are not finite" in refused(pair, capsys)
    assert not out.exists()


def test_pickled_weights_are_refused(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "after" / "model.safetensors").rename(tmp_path / "after" / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refused(folders, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of three"),
        (["somewhere", "--before", "a", "--after", "b"], "one of three"),
        (["--before", "a"], "--after is missing"),
        (["--after", "a"], "--before is missing"),
        (["nowhere"], "there is no run folder nowhere"),
        (["--before", "nowhere", "--after", "nowhere"], "there is no folder nowhere"),
        (["--model", "nowhere/m/x", "--train", "t.jsonl"], "there is no file t.jsonl"),
        (["--model", "m"], "there is no train"),
        (["--model", "m", "--train", "t", "--batches", "0"], "batches must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused_before_the_work(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not empty" in refused([*folders, "--out", str(tmp_path)], capsys)


def test_a_model_with_data_is_measured_tensor_by_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.bert_folder(tmp_path / "model")
    rows = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(40))
    arguments = ["analyze", "--model", str(model), "--train", str(rows), "--batch-size", "8", "--device", "cpu"]
    found = []
    for name, batches in (("one", 1), ("again", 1), ("two", 2)):
        out = tmp_path / name
        assert cli.main([*arguments, "--batches", str(batches), "--out", str(out), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tensors"])
        assert "<svg" in (out / "report.html").read_text()
    assert found[0] == found[1] != found[2]
    roles = {row["name"]: row["role"] for row in found[0]}
    assert roles["classifier.weight"] == "head" and roles["bert.embeddings.word_embeddings.weight"] == "embedding"
    assert all(row["ratio"] >= 0 and 0 <= row["overlap"] <= 1 for row in found[0])
    assert cli.main([*arguments, "--out", str(tmp_path / "table")]) == 0
    out = capsys.readouterr().out
    assert "attention.self.query" in out and "all but heads" in out and "1 x 8 rows" in out


def test_a_run_is_compared_with_the_model_it_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.bert_folder(tmp_path / "model")  # the encoder alone: its names lack the prefix of the finetuned ones
    rows = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(40))
    config = Config(model=str(model), train=str(rows), max_steps=2, density=0.1, learning_rate=1e-2, device="cpu")
    results = finetune.run(config, tmp_path / "run")
    assert cli.main(["analyze", str(tmp_path / "run"), "--out", str(tmp_path / "report"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["only_after"]) == {"classifier.weight", "classifier.bias"}
    assert [row["layer"] for row in printed["layers"]] == [0, 1]
    assert 0 < printed["total"]["touched"] < 0.3
    assert printed["total"]["l2"] < results["l2_moved"] * 1.001
    assert "pass one of them" in _comparison(tmp_path, capsys)


def _comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (tmp_path / "compared" / "runs").mkdir(parents=True)
    (tmp_path / "run").rename(tmp_path / "compared" / "runs" / "nanoadam-0")
    return refused([str(tmp_path / "compared")], capsys)
