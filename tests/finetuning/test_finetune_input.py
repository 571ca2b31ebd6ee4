"""What a user can get wrong about a run: one sentence, exit code 2, and no run folder."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import data, files
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert_folder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def refused(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run with a good config but for some options, and expect these words."""
    tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12))

    def check(options: dict[str, object], *words: str) -> None:
        given = {"model": bert, "train": tmp_path / "train.jsonl", "max-steps": 1, **options}
        arguments = ["finetune", "--out", str(tmp_path / "run")]
        for key, value in given.items():
            arguments += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("nanoadam: ")
        assert captured.err.count("\n") == 1
        for word in words:
            assert word in captured.err, captured.err
        assert not (tmp_path / "run").exists()

    return check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "text-clasification"}, ["task 'text-clasification' is unknown", "'text-classification'?"]),
        ({"metric": "mathews"}, ["text-classification has no metric 'mathews'", "did you mean 'matthews'?"]),
        ({"optimizer": "adanw"}, ["optimizer 'adanw' is unknown", "did you mean 'adamw'?"]),
        ({"scheduler": "cosin"}, ["scheduler 'cosin'", "'cosine'?"]),
        ({"text-column": "txt"}, ["train.jsonl has no column 'txt'", "did you mean 'text'?"]),
        ({"label-column": "lable"}, ["no column 'lable'", "did you mean 'label'?"]),
        ({"density": "1.5"}, ["density must be in (0, 1]", "1.5"]),
        ({"density": "0"}, ["density must be in (0, 1]"]),
        ({"learning-rate": "-1"}, ["learning_rate must be at least 0, got -1"]),
        ({"batch-size": "0"}, ["batch_size must be at least 1"]),
        ({"max-length": "100"}, ["max_length 100 is more than the 32 tokens"]),
        ({"validation-share": "1"}, ["validation_share must be between 0 and 1"]),
        ({"lerning-rate": "1"}, ["--lerning-rate"]),
        ({"task": "text-regression"}, ["row 1 of train.jsonl has", "which is no finite number"]),
        ({"task": "causal-lm", "prompt-column": "text"}, ["no column called completion", "--completion-column"]),
        ({"model": "/nowhere/at/all"}, ["there is no model folder /nowhere/at/all"]),
        ({"train": "hub-id-without-split"}, ["say which split", "hub-id-without-split@train"]),
        ({"max-grad-norm": "0"}, ["max_grad_norm must be positive"]),
    ],
    ids=str,
)
def test_a_bad_option(refused, options: dict[str, object], words: list[str]) -> None:
    refused(options, *words)


def test_an_unknown_model_folder_names_the_nearest(refused, bert: Path) -> None:
    refused({"model": bert.parent / "brt"}, "there is no model folder", "did you mean 'bert'?")


def test_an_unknown_file_names_the_nearest(refused, tmp_path: Path) -> None:
    refused({"train": tmp_path / "tran.jsonl"}, "there is no file", "did you mean 'train.jsonl'?")


@pytest.mark.parametrize("option", ["model", "train"])
def test_a_hub_id_without_network_says_what_to_do(refused, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load this file")

    import datasets
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    value = {"model": "someone/model", "train": "someone/data@train"}[option]
    refused({option: value}, value, "could not be had from the hub", "ithout network, pass")


def test_a_label_that_is_not_in_the_training_set(refused, tmp_path: Path) -> None:
    dev = tiny.jsonl(tmp_path / "dev.jsonl", [{"text": "the film", "label": "goood"}])
    refused(
        {"validation": dev}, "row 1 of dev.jsonl has the label 'goood'", "not in the training set", "there: bad, good"
    )


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_an_empty_split(refused, tmp_path: Path, content: str) -> None:
    (tmp_path / "dev.csv").write_text(content)
    refused({"validation": tmp_path / "dev.csv"}, "dev.csv is empty")


def test_a_broken_line_of_json_is_named_by_its_number(refused, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a", "label": 0}\n\n{"text": "b", "label": \n')
    refused({"train": path}, "line 3 of", "broken.jsonl is no JSON")
    path.write_text('{"text": "a", "label": 0}\n[1, 2]\n')
    refused({"train": path}, "line 2 of", "is no JSON object, but list")
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n{"text" "b"}]')
    refused({"train": tmp_path / "broken.json"}, "line 2 of", "is no JSON")


def test_files_that_are_not_what_they_are_called(refused, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("no parquet")
    refused({"train": tmp_path / "train.parquet"}, "is no Parquet file")
    (tmp_path / "train.docx").write_text("words")
    refused({"train": tmp_path / "train.docx"}, "unknown format, .docx", ".jsonl")
    (tmp_path / "ragged.csv").write_text('text,label\na,0\n"b,1\n')
    refused({"train": tmp_path / "ragged.csv"}, "line 3 of", "ragged.csv cannot be read as a table")
    (tmp_path / "four.tsv").write_text("g\t1\t*\tgood\n" * 4)
    refused({"train": tmp_path / "four.tsv", "columns": "text,label"}, "more columns than names (text, label)")
    (tmp_path / "latin.json").write_bytes(b'[{"text": "caf\xe9", "label": 1}]')
    refused({"train": tmp_path / "latin.json"}, "line 1 of", "latin.json is no UTF-8 text", "--encoding cp1252")
    (tmp_path / "mixed.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "bad"}\n')
    refused({"train": tmp_path / "mixed.jsonl"}, "mixes types within a column", "line 2 of", "text in 'label'")


def test_a_row_without_a_text_or_a_label(refused, tmp_path: Path) -> None:
    rows = [*tiny.sentences(3), {"text": None, "label": "good"}]
    refused({"train": tiny.jsonl(tmp_path / "a.jsonl", rows), "validation": tmp_path / "train.jsonl"},
            "row 4 of a.jsonl has None in 'text', which is no text")  # fmt: skip
    rows = [*tiny.sentences(3), {"text": "the film", "label": None}]
    refused({"train": tiny.jsonl(tmp_path / "b.jsonl", rows), "validation": tmp_path / "train.jsonl"},
            "row 4 of b.jsonl has no 'label'")  # fmt: skip


def test_a_single_class_is_nothing_to_learn(refused, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    refused({"train": tiny.jsonl(tmp_path / "one.jsonl", rows), "validation": tmp_path / "one.jsonl"}, "one class only")


def test_a_sequence_longer_than_the_model_takes(refused, tmp_path: Path) -> None:
    rows = [*tiny.sentences(3), {"text": "the " * 50, "label": "good"}]
    long = tiny.jsonl(tmp_path / "long.jsonl", rows)
    refused({"train": long, "validation": long}, "row 4 of long.jsonl has 52 tokens where 32 are allowed", "--truncate")


def test_a_model_that_needs_remote_code_is_not_run(refused, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    own = {"model_type": "something_new", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "model.safetensors").touch()
    refused({"model": folder, "tokenizer": bert}, "Python code of its own", "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused_unless_asked_for(refused, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    tiny.tokenizer().save_pretrained(folder)
    model = tiny.bert()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused({"model": folder}, "pickled weights only (pytorch_model.bin)", "--allow-pickle")
    arguments = ["--train", str(tmp_path / "train.jsonl"), "--max-steps", "1", "--out", str(tmp_path / "asked")]
    assert cli.main(["finetune", "--model", str(folder), *arguments, "--allow-pickle", "--new-head"]) == 0


def test_a_folder_without_weights_or_config(refused, bert: Path, tmp_path: Path) -> None:
    tiny.bert().config.save_pretrained(tmp_path / "bare")
    refused({"model": tmp_path / "bare", "tokenizer": bert}, "holds no weights", "--init-from-config")
    (tmp_path / "empty").mkdir()
    refused({"model": tmp_path / "empty"}, "holds no config.json")


def test_a_head_that_does_not_fit_the_classes(refused, tmp_path: Path) -> None:
    folder = tmp_path / "three"
    tiny.bert(labels=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    refused({"model": folder}, "does not fit the classes", "--new-head")


def test_config_files(refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(content: str, *words: str) -> None:
        path = tmp_path / "config.toml"
        path.write_text(content)
        assert cli.main(["finetune", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for word in words:
            assert word in error, error

    check("lerning_rate = 1", "there is no key 'lerning_rate'", "did you mean 'learning_rate'?")
    check("[optimiser]\nlearning_rate = 1", "no section [optimiser]", "did you mean 'optimizer'?")
    check("learning_rate = ", "is no TOML")
    check("learning_rate = 'high'", "learning_rate must be a number, got 'high'")
    check("batch_size = 1.5", "batch_size must be a whole number")
    check("truncate = 1", "truncate must be true or false")
    check("columns = 'a'", "columns must be a list of strings")
    check("density = 0.1", "there is no model: give --model")
    assert cli.main(["finetune", str(tmp_path / "none.toml")]) == 2
    assert "there is no config file" in capsys.readouterr().err
    assert cli.main(["finetune", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_folder_that_holds_another_run(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text("mine")
    arguments = ["finetune", "--model", str(bert), "--train", "x.jsonl", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "is not empty: choose another one with --out" in capsys.readouterr().err


def test_resume_refuses_what_it_cannot_go_on_with(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(arguments: list[str], *words: str) -> None:
        assert cli.main(["finetune", *arguments]) == 2
        error = capsys.readouterr().err
        for word in words:
            assert word in error, error

    train, out = tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12)), tmp_path / "run"
    check(["--resume", str(tmp_path)], "is no run folder")
    check(["--resume", str(out), "--out", str(tmp_path / "other")], "leave out --out")
    arguments = ["--model", str(bert), "--train", str(train), "--max-steps", "1", "--out", str(out)]
    assert cli.main(["finetune", *arguments]) == 0
    check(["--resume", str(out)], "is finished")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "results": None}))
    tiny.jsonl(train, tiny.sentences(13))
    check(["--resume", str(out)], "the train data is not what it was")


def test_a_glue_file_keeps_its_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "cola.tsv"
    path.write_text('gj04\t1\t\tThey said "no.\ngj04\t0\t*\t"Yes" said they.\n')
    rows = files.read(path, files.Reading(("source", "label", "star", "sentence"))).rows
    assert rows["sentence"][:] == ['They said "no.', '"Yes" said they.']
    assert rows["label"][:] == ["1", "0"]


def test_some_rows_are_drawn_from_a_file_that_is_sorted_by_label(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": i // 50} for i in range(100)]
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def some(seed: int) -> tuple[list[str], list[str]]:
        config = Config(
            model="-", train=str(tmp_path / "sorted.jsonl"), validation=str(tmp_path / "sorted.jsonl"), seed=seed,
            train_rows=20, validation_rows=10,
        )  # fmt: skip
        train, validation = data.load(config)
        return train.rows["text"][:], validation.rows["text"][:]

    train, validation = some(0)
    places = [int(text.split()[1]) for text in train]
    assert len(set(places)) == 20 and places == sorted(places)  # in their order
    assert 5 <= sum(place < 50 for place in places) <= 15  # of both labels
    assert len(validation) == 10
    assert some(1) == (train, validation)  # a comparison's seeds learn the same rows
