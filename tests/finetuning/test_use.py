"""A finished run is used: predictions, a test set, its model card; and it says what is odd about its result."""

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import folders
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("use")
    train = tiny.jsonl(root / "train.jsonl", tiny.sentences(40))
    finetune.run(Config(model=str(tiny.bert_folder(root / "bert")), train=str(train), device="cpu", max_steps=4,
                        learning_rate=1e-3, samples=6), root / "run")  # fmt: skip
    return root / "run"


def printed(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert cli.main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_rows_and_texts_are_predicted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.jsonl(tmp_path / "new.jsonl", [{"text": "the film is good"}, {"text": "the book is bad"}])
    rows = json.loads(printed(["predict", run, "--data", data, "--json"], capsys))
    assert [row["text"] for row in rows] == ["the film is good", "the book is bad"]
    assert all(row["predicted"] in ("bad", "good") and 0.5 <= row["score"] <= 1 for row in rows)
    line = json.loads(printed(["predict", run, "--text", "the film is good"], capsys))
    assert line == rows[0]
    printed(["predict", run, "--data", data, "--out", tmp_path / "said.jsonl"], capsys)
    assert folders.read_lines(tmp_path / "said.jsonl") == rows
    error = printed(["predict", run, "--data", data, "--out", tmp_path / "said.jsonl"], capsys, 2)
    assert "is there already: choose another name with --out" in error


def test_predictions_are_what_transformers_gives(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import pipeline

    line = json.loads(printed(["predict", run, "--text", "a great book"], capsys))
    (found,) = pipeline("text-classification", model=str(run / "model"))("a great book")
    assert found["label"] == line["predicted"]
    assert found["score"] == pytest.approx(line["score"], abs=1e-4)


def test_a_test_set_is_measured_as_the_validation_split_was(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    rows = tiny.jsonl(tmp_path / "t.jsonl", tiny.sentences(20))
    found = json.loads(printed(["evaluate", run, "--data", rows, "--json"], capsys))
    assert found["rows"] == 20
    assert found["metrics"].keys() == manifest["results"]["final"].keys()
    assert found["validation"] == manifest["results"]["final"]
    assert sum(row["rows"] for row in found["details"]["classes"]) == 20


def test_what_cannot_be_used_says_why(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in printed(["predict", tmp_path, "--text", "a"], capsys, 2)
    assert "give either --data" in printed(["predict", run], capsys, 2)
    data = tiny.jsonl(tmp_path / "new.jsonl", [{"words": "the film"}])
    assert "has no column 'text'" in printed(["predict", run, "--data", data], capsys, 2)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text("")
    (bare / "manifest.json").write_text('{"results": {}}')
    assert "holds no model/" in printed(["evaluate", bare, "--data", data], capsys, 2)


def test_a_language_model_writes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "the film is", "completion": "good"}] * 12
    config = Config(model=str(tiny.causal_folder(tmp_path / "llama")), device="cpu", max_steps=2, learning_rate=1e-3,
                    train=str(tiny.jsonl(tmp_path / "train.jsonl", rows)), samples=2)  # fmt: skip
    finetune.run(config, tmp_path / "run")
    details = json.loads((tmp_path / "run" / "manifest.json").read_text())["details"]
    assert [row["label"] for row in details["samples"]] == ["good"]
    line = json.loads(printed(["predict", tmp_path / "run", "--text", "the book is", "--new-tokens", "3"], capsys))
    assert line["prompt"] == "the book is" and len(line["written"].split()) <= 3


# What it says of itself ------------------------------------------------------------------------------------


def test_the_model_card_has_the_manifests_facts(run: Path) -> None:
    import yaml

    card = (run / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-classification"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["train"]["sha256_of_rows"] in card
    assert f"| accuracy | {manifest['results']['before']['accuracy']:.4g} |" in card


def test_examples_are_wrong_and_right_ones(run: Path) -> None:
    details = json.loads((run / "manifest.json").read_text())["details"]
    samples = details["samples"]
    assert len(samples) == min(6, sum(sum(row) for row in details["confusion"]["counts"]))
    assert [row["right"] for row in samples] == sorted(row["right"] for row in samples)
    assert all((row["label"] == row["predicted"]) == row["right"] for row in samples)


def test_a_model_that_has_learned_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "the film", "label": "bad" if i % 4 else "good"} for i in range(40)]
    arguments = ["finetune", "--model", tiny.bert_folder(tmp_path / "bert"), "--train",
                 tiny.jsonl(tmp_path / "a.jsonl", rows), "--max-steps", 2, "--learning-rate", "0", "--out",
                 tmp_path / "run", "--no-save-model"]  # fmt: skip
    out = printed(arguments, capsys)
    assert "is no better than always saying the commonest class" in out
    assert "--learning-rate" in out
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]["notes"]
    assert any("the model predicts" in note and "for every row" in note for note in notes)


def test_the_best_weights_are_kept_if_asked_for(tmp_path: Path) -> None:
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(40))
    config = Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), device="cpu", max_steps=8,
                    learning_rate=0.3, optimizer="sgd", eval_every=2, metric="loss", best=True, warmup=0.0)  # fmt: skip
    results = finetune.run(config, tmp_path / "run")
    lines = [line for line in folders.read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "evaluation"]
    best = min(line["metrics"]["loss"] for line in lines if line["step"])
    assert results["final"]["loss"] == pytest.approx(best, rel=1e-5)
