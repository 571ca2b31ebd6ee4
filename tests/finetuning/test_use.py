"""A finished run is used: predictions, a test set, its model card; and it says what is odd about its result."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import folders, use
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.reports.verdict import usage

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


def test_a_run_whose_training_data_is_gone_says_what_that_is_needed_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run.parent / "train.jsonl"
    hidden = rows.rename(tmp_path / "elsewhere")
    try:
        error = printed(["evaluate", run, "--data", hidden], capsys, 2)
        printed(["predict", run, "--text", "the film"], capsys)
    finally:
        hidden.rename(rows)
    assert f"was trained on {rows}, which is not there any more" in error


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


def test_what_is_written_fits_the_positions_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = GPT2Config(vocab_size=24, n_positions=32, n_embd=32, n_layer=1, n_head=2, eos_token_id=3)
    GPT2LMHeadModel(made).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    rows = tiny.jsonl(tmp_path / "a.jsonl", [{"prompt": "the film is", "completion": "good"}] * 12)
    finetune.run(Config(model=str(tmp_path / "gpt2"), train=str(rows), device="cpu", max_steps=1, learning_rate=1e-3,
                        samples=0), tmp_path / "run")  # fmt: skip
    for text in ("the book is", "the book is " * 30):
        line = json.loads(printed(["predict", tmp_path / "run", "--text", text], capsys))
        assert 1 <= len(line["written"].split()) <= 32


def test_a_text_that_is_too_long_is_cut_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import RobertaConfig, RobertaModel

    made = RobertaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=20, pad_token_id=1)  # fmt: skip
    RobertaModel(made).save_pretrained(tmp_path / "roberta")
    tiny.tokenizer().save_pretrained(tmp_path / "roberta")
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(20))
    finetune.run(Config(model=str(tmp_path / "roberta"), train=str(rows),
                        device="cpu", max_steps=1, learning_rate=1e-3), tmp_path / "run")  # fmt: skip
    texts = tiny.jsonl(tmp_path / "b.jsonl", [{"text": "the film"}, {"text": "the film " * 20}])
    short, long = json.loads(printed(["predict", tmp_path / "run", "--data", texts, "--json"], capsys))
    assert long["cut"] is True and "cut" not in short


def test_conversations_are_asked_as_they_were_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "good"}]
    rows = tiny.jsonl(tmp_path / "a.jsonl", [{"dialog": talk}] * 12)
    config = Config(model=str(tiny.causal_folder(tmp_path / "llama", chat=True)), train=str(rows), device="cpu",
                    max_steps=1, learning_rate=1e-3, samples=0, messages_column="dialog")  # fmt: skip
    finetune.run(config, tmp_path / "run")
    asked = tiny.jsonl(tmp_path / "b.jsonl", [{"dialog": talk}, {"dialog": talk[:1]}])
    options = ["--new-tokens", "3", "--json"]
    found = json.loads(printed(["predict", tmp_path / "run", "--data", asked, *options], capsys))
    (said,) = json.loads(printed(["predict", tmp_path / "run", "--text", "the film", *options], capsys))
    assert found == [said, said] and said["prompt"] == "the film"
    empty = tiny.jsonl(tmp_path / "c.jsonl", [{"dialog": talk}, {"dialog": None}])
    error = printed(["predict", tmp_path / "run", "--data", empty], capsys, 2)
    assert "row 2 of c.jsonl must be a list of {role, content} in 'dialog'" in error


def test_a_text_is_tagged_word_by_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.jsonl(tmp_path / "a.jsonl", [{"tokens": ["the", "film"], "tags": ["O", "B-X"]}] * 12)
    finetune.run(Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), device="cpu", max_steps=1,
                        learning_rate=1e-3), tmp_path / "run")  # fmt: skip
    line = json.loads(printed(["predict", tmp_path / "run", "--text", "the good film"], capsys))
    assert line["tokens"] == ["the", "good", "film"] and len(line["predicted"]) == 3
    for wrong in (None, "the", []):
        data = tiny.jsonl(tmp_path / "b.jsonl", [{"tokens": ["a"]}, {"tokens": wrong}][wrong == "the" :])
        assert "must have a list of words in 'tokens'" in printed(
            ["predict", tmp_path / "run", "--data", data], capsys, 2
        )


@pytest.mark.parametrize("kind", ["pair", "chat"])
def test_the_lines_that_use_a_model_read_all_that_it_reads(kind: str, tmp_path: Path) -> None:
    pair = {"sentence1": "the first of a pair", "sentence2": "the second"}
    talk = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "good"}]}
    rows = [pair | {"label": "yn"[i % 2]} if kind == "pair" else talk for i in range(12)]
    model = (tiny.bert_folder if kind == "pair" else lambda f: tiny.causal_folder(f, chat=True))(tmp_path / "model")
    run = tmp_path / "run"
    finetune.run(Config(model=str(model), train=str(tiny.jsonl(tmp_path / "a.jsonl", rows)), device="cpu", max_steps=1,
                        learning_rate=1e-3, samples=0), run)  # fmt: skip
    *code, last = usage(json.loads((run / "manifest.json").read_text()), str(run / "model"))
    names: dict[str, Any] = {"print": lambda said: names.update(said=said)}
    exec("\n".join([*code, last.replace("50", "5, do_sample=False")]), names)
    (ours,) = use.predict(run, str(tiny.jsonl(tmp_path / "b.jsonl", rows[:1])), [], 1, 5, lambda *_: None)
    if kind == "pair":
        assert names["said"]["score"] == pytest.approx(ours["score"], abs=1e-4)
    else:
        assert names["said"][0]["generated_text"][-1]["content"].split() == ours["written"].split()


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


def test_what_to_try_is_said_of_one_answer_that_is_not_the_commonest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tiny.jsonl(tmp_path / "a.jsonl", [{"text": "the", "label": "good" if i % 3 else "bad"} for i in range(40)])
    other = tiny.jsonl(tmp_path / "b.jsonl", [{"text": "the", "label": "bad" if i % 9 else "good"} for i in range(20)])
    folder = tiny.bert_folder(tmp_path / "bert")
    for seed in range(8):  # until an untrained head says the rarer class
        out = printed(["finetune", "--model", folder, "--train", train, "--validation", other, "--max-steps", 1,
                       "--learning-rate", "0", "--out", tmp_path / f"run{seed}", "--no-save-model", "--seed", seed],
                      capsys)  # fmt: skip
        if "the model predicts 'bad' for every row" in out:
            break
    assert "is no better than" not in out
    assert "the model predicts 'bad' for every row: try another rate" in out


def test_how_long_it_takes_is_said_where_no_rate_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(40))
    model = tiny.bert_folder(tmp_path / "bert")
    assert cli.main(["finetune", "--model", str(model), "--train", str(rows), "--max-steps", "12",
                     "--learning-rate", "1e-3", "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Time: about")]
    assert len(said) == 1 and said[0].endswith("s a step")


def test_the_best_weights_are_kept_if_asked_for(tmp_path: Path) -> None:
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(40))
    config = Config(model=str(tiny.bert_folder(tmp_path / "bert")), train=str(rows), device="cpu", max_steps=8,
                    learning_rate=0.3, optimizer="sgd", eval_every=2, metric="loss", best=True, warmup=0.0)  # fmt: skip
    results = finetune.run(config, tmp_path / "run")
    lines = [line for line in folders.read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "evaluation"]
    best = min(line["metrics"]["loss"] for line in lines if line["step"])
    assert results["final"]["loss"] == pytest.approx(best, rel=1e-5)
