"""What models learn from rows: heads, classes, tags, packed sequences; what would go wrong in silence is refused."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam.finetuning import models, outcome
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import prepare
from nanoadam.finetuning.tasks.tokens import spans

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.bert_folder(root / "bert")
    tiny.causal_folder(root / "llama")
    tiny.causal_folder(root / "chat", chat=True)
    return root


def config(model: Path, train: Path, **keys: object) -> Config:
    base = {"model": str(model), "train": str(train), "device": "cpu", "max_steps": 2, "learning_rate": 1e-3,
            "batch_size": 4, "eval_batch_size": 3, "samples": 4}  # fmt: skip
    return Config(**{**base, **keys})


def classifier(folder: Path, names: list[str], **options: object) -> Path:
    model = tiny.bert(labels=len(names), id2label=dict(enumerate(names)), **options)
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# Heads -----------------------------------------------------------------------------------------------------


def test_a_head_is_used_with_its_own_order_of_classes(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", ["Good", "Bad"])
    task = prepare(config(model, tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(20)))).task
    assert (task.head, task.names) == ("kept", ["good", "bad"])
    assert task.train[0]["labels"] == ["good", "bad"].index(str(task.splits[0].rows["label"][0]))


@pytest.mark.parametrize("names", [["no", "yes"], ["LABEL_0", "LABEL_1"]])
def test_a_head_with_other_classes_is_not_renamed(names: list[str], tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", names)
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(20))
    with pytest.raises(
        ValueError, match=rf"knows the classes {', '.join(names)}, and the data have bad, good.*--new-head"
    ):
        prepare(config(model, rows))
    old = models.load_model(Config(task="text-classification", model=str(model), train="-")).classifier.weight.clone()
    task = prepare(config(model, rows, new_head=True)).task
    assert task.head == "new"
    assert not torch.equal(task.model.classifier.weight, old)
    assert 0.01 < task.model.classifier.weight.std() < 0.04


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_classes_are_learned_by_cross_entropy_whatever_the_head_was_for(kind: str, tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", ["only"] if kind == "regression" else ["a", "b"], problem_type=kind)
    rows = tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(20))
    finetune.run(config(model, rows, new_head=True), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["problem_type"] == "single_label_classification"


def test_a_checkpoint_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = load_file(root / "bert" / "model.safetensors")
    folder = tiny.bert_folder(tmp_path / "half")
    save_file(
        {name: t for name, t in whole.items() if "layer.1" not in name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks 16 weights of a BertForSequenceClassification"):
        prepare(config(folder, tiny.jsonl(tmp_path / "a.jsonl", tiny.sentences(20))))


def test_a_class_that_says_that_there_is_none_is_named_first(root: Path, tmp_path: Path) -> None:
    rows = [*tiny.sentences(20), *({"text": "the film", "label": "-"},) * 4]
    job = prepare(config(root / "bert", tiny.jsonl(tmp_path / "a.jsonl", rows)))
    assert any(line.startswith("Note: '-' is learned as a class") for line in outcome.beginning(job))


# Kinds -----------------------------------------------------------------------------------------------------


def test_several_classes_a_row(root: Path, tmp_path: Path) -> None:
    rows = [{"text": "the film", "labels": [["good", "long"], ["bad"], []][i % 3]} for i in range(24)]
    results = finetune.run(config(root / "bert", tiny.jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["task"] == "multi-label-classification"
    assert results["metric"] == "micro_f1"
    assert {"micro_f1", "macro_f1", "exact"} <= results["baseline"].keys()
    assert [row["name"] for row in manifest["details"]["classes"]] == ["bad", "good", "long"]
    row = prepare(config(root / "bert", tmp_path / "a.jsonl")).task.train[0]
    assert len(row["labels"]) == 3 and set(row["labels"]) <= {0.0, 1.0}


def test_tags_are_on_the_first_token_of_each_word(root: Path, tmp_path: Path) -> None:
    words = ["the", "good", "film", "is", "great"]
    rows = [{"tokens": words, "ner_tags": ["O", "B-X", "I-X", "O", "B-Y"]}] * 20
    results = finetune.run(config(root / "bert", tiny.jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "run")
    assert results["metric"] == "f1" and results["baseline"]["f1"] == 0.0
    task = prepare(config(root / "bert", tmp_path / "a.jsonl")).task
    assert [task.names[i] if i >= 0 else None for i in task.train[0]["labels"]] == [
        None,
        "O",
        "B-X",
        "I-X",
        "O",
        "B-Y",
        None,
    ]


def test_spans_are_read_as_conlleval_reads_them() -> None:
    tags = ["B-X", "I-X", "O", "I-Y", "B-Y", "I-X", "B-X"]
    assert spans(tags, [0, 0, 0, 0, 0, 0, 1]) == [
        (0, 0, 2, "X"), (0, 3, 4, "Y"), (0, 4, 5, "Y"), (0, 5, 6, "X"), (1, 6, 7, "X")
    ]  # fmt: skip


def test_plain_text_is_cut_into_sequences_as_long_as_the_model_takes(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join("the film is good and the book is dull" for _ in range(40)))
    task = prepare(config(root / "llama", tmp_path / "a.txt")).task
    assert task.kind == "text"
    rows = task.train["input_ids"]
    assert {len(row) for row in rows[:-1]} == {32}
    assert task.train["labels"][:] == rows[:]
    text = task.processor("\n\n".join(task.splits[0].rows["text"]), add_special_tokens=False)["input_ids"]
    start = [2] if task.processor.bos_token_id is not None else []
    assert [token for row in rows for token in row] == [*start, *text, 3]
    finetune.run(config(root / "llama", tmp_path / "a.txt"), tmp_path / "run")


def test_packed_rows_have_the_loss_of_rows_alone(root: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the film is " + "very " * (i % 5), "completion": ["good", "bad"][i % 2]} for i in range(24)]
    path = tiny.jsonl(tmp_path / "a.jsonl", rows)
    found = []
    for packing in (False, True):
        task = prepare(config(root / "llama", path, packing=packing)).task
        batch = task.collator([task.train[i] for i in range(6)])
        assert batch["input_ids"].shape[0] == (1 if packing else 6)
        logits = task.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        found.append(task.preprocess_logits(logits, batch["labels"]).sum(dim=0))
    torch.testing.assert_close(found[0], found[1])
    results = finetune.run(config(root / "llama", path, packing=True), tmp_path / "run")
    assert results["final"]["token_loss"] > 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["use_cache"] is True


def test_an_encoder_is_no_language_model(root: Path, tmp_path: Path) -> None:
    path = tiny.jsonl(tmp_path / "a.jsonl", [{"prompt": "the film", "completion": "is good"}] * 8)
    with pytest.raises(ValueError, match="no language model: .* depends on the tokens after it"):
        prepare(config(root / "bert", path))


def test_a_conversation_in_sharegpts_words(root: Path, tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "the film"}, {"from": "gpt", "value": "good"}]}] * 12
    task = prepare(config(root / "chat", tiny.jsonl(tmp_path / "a.jsonl", rows))).task
    assert task.processor.decode(task.train[0]["input_ids"]) == "<|user|> the film <|assistant|> good [SEP]"
    manifest_like = task.description
    assert manifest_like["loss"] == "on the last message of each conversation"


# What would end in mid-training ----------------------------------------------------------------------------


def test_a_template_that_refuses_a_row_names_it(root: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + tokenizer.chat_template + "{% endfor %}"
    )  # fmt: skip
    folder = tiny.causal_folder(tmp_path / "model")
    tokenizer.save_pretrained(folder)
    good = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "good"}]
    rows = [{"messages": good}] * 3 + [{"messages": [{"role": "system", "content": "a"}, *good]}]
    path = tiny.jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 4 of a.jsonl: the chat template of .* refuses it: no system here"):
        prepare(config(folder, path, validation=str(path)))


def test_a_token_without_an_embedding_is_named(root: Path, tmp_path: Path) -> None:
    for number, added in enumerate(({"additional_special_tokens": ["<new>"]}, {"pad_token": "<pad2>"})):
        folder = tiny.bert_folder(tmp_path / f"model{number}")
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens([f"filler{i}" for i in range(8)])
        tokenizer.add_special_tokens(added)
        tokenizer.save_pretrained(folder)
        rows = [*tiny.sentences(11), {"text": "the <new> film", "label": "good"}]
        path = tiny.jsonl(tmp_path / "a.jsonl", rows)
        words = "row 12 of a.jsonl has the token '<new>'" if number == 0 else "pads with '<pad2>'"
        with pytest.raises(ValueError, match=rf"{words}.*embeddings for 24 tokens"):
            prepare(config(folder, path, validation=str(path)))


def test_positions_begin_after_the_paddings_in_roberta(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    made = RobertaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(made).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": "the film " * 20, "label": ["good", "bad"][i % 2]} for i in range(12)]
    path = tiny.jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="42 tokens where 18 are allowed"):
        prepare(config(tmp_path / "model", path))
    finetune.run(config(tmp_path / "model", path, truncate=True), tmp_path / "run")


def test_an_answer_that_is_empty_is_nothing_to_learn(tmp_path: Path) -> None:
    folder = tiny.causal_folder(tmp_path / "model")
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": ""}]
    path = tiny.jsonl(tmp_path / "a.jsonl", [{"messages": messages}] * 12)
    with pytest.raises(ValueError, match=r"row 1 of a.jsonl has nothing to learn from"):
        prepare(config(folder, path, validation=str(path)))


@pytest.mark.parametrize("task", ["text-regression", "multi-label-classification"])
def test_label_smoothing_is_for_one_class_a_row(task: str, root: Path, tmp_path: Path) -> None:
    path = tiny.jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": i / 2} for i in range(12)])
    with pytest.raises(ValueError, match=f"label_smoothing is for one class a row, not for {task}"):
        prepare(config(root / "bert", path, task=task, label_smoothing=0.1))


@pytest.mark.parametrize("missing", [-1, None, -100])
def test_a_word_without_a_tag_is_named(missing: int | None, root: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    rows = {"tokens": [["the", "film"]] * 12, "tags": [[0, missing if i == 5 else 1] for i in range(12)]}
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "X"]))})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 6 of a.parquet has a word without a tag"):
        prepare(config(root / "bert", tmp_path / "a.parquet"))
    if missing is None:
        path = tiny.jsonl(tmp_path / "a.jsonl", [{"text": "a", "labels": ["x", None if i == 5 else "y"]}
                                                 for i in range(12)])  # fmt: skip
        with pytest.raises(ValueError, match="row 6 of a.jsonl has a label that 'labels' has no name for"):
            prepare(config(root / "bert", path))


@pytest.mark.parametrize("label", [-1, None])
def test_a_row_without_a_class_in_parquet_is_named(label: int | None, root: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = {"text": ["a b"] * 12, "label": [label if i == 5 else i % 2 for i in range(12)]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["n", "y"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 6 of a.parquet has no label"):
        prepare(config(root / "bert", tmp_path / "a.parquet"))
