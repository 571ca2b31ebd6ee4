"""What is retained: each measure on models and data whose answer is known, and before and after a run."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.baselines import apply_lora
from nanoadam.finetuning import models, retain
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("retain")
    tiny.bert_folder(root / "bert")
    tiny.jsonl(root / "train.jsonl", tiny.sentences(24))
    texts = [" ".join(tiny.WORDS[i : i + 1 + i % 3]) for i in range(10)]
    tiny.jsonl(root / "same.jsonl", [{"question": text, "answer": text} for text in texts])
    tiny.jsonl(root / "pairs.jsonl", [{"question": a, "answer": b} for a, b in itertools.pairwise(texts)])
    tiny.jsonl(root / "alike.jsonl", [{"question": text, "answer": "the film"} for text in texts])
    tiny.jsonl(root / "probe.jsonl", tiny.sentences(60))
    return root


def config(root: Path, *names: str, **keys: object) -> Config:
    base = {"task": "text-classification", "model": str(root / "bert"), "train": str(root / "train.jsonl"),
            "device": "cpu", "max_steps": 3,
            "batch_size": 8, "save_model": False, "learning_rate": 1e-2, "density": 0.2,
            "retain": tuple(str(root / name) for name in names)}  # fmt: skip
    return Config(**{**base, **keys})


def measured(config: Config, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    measures = retain.measures(config, models.load_tokenizer(config))
    return {name: measure(model) for name, measure in measures.items()}


def test_retrieval_finds_what_is_the_same_and_not_what_is_all_alike(root: Path) -> None:
    own = config(root, "same.jsonl", "alike.jsonl")
    found = measured(own, models.load_model(own))
    assert found["same"] == {"recall@1": 1.0, "mrr": 1.0}
    assert found["alike"] == {"recall@1": 0.0, "mrr": pytest.approx(0.1)}  # every answer is as near as the right one


def test_retrieval_is_what_one_text_at_a_time_gives(root: Path) -> None:
    own = config(root, "pairs.jsonl")
    model, tokenizer = models.load_model(own), models.load_tokenizer(own)
    model.train(False)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():
            states = model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(dim=0).numpy()
        return mean / np.linalg.norm(mean)

    asked, answers = (np.stack([embed(row[key]) for row in rows]) for key in ("question", "answer"))
    likeness = asked @ answers.T
    ranks = (likeness >= np.diag(likeness)[:, None] - 1e-6).sum(axis=1)
    found = measured(own, model)["pairs"]
    assert found["recall@1"] == pytest.approx((ranks == 1).mean())
    assert found["mrr"] == pytest.approx((1 / ranks).mean())


def test_a_probe_reads_what_features_hold_and_nothing_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [i % 2 for i in range(400)]
    signal = torch.randn(400, 8, generator=generator)
    noise = signal.clone()
    signal[:, 3] += 8 * torch.tensor(labels)
    assert retain._probe(signal, labels)["probe accuracy"] == 1.0
    assert 0.35 < retain._probe(noise, labels)["probe accuracy"] < 0.65
    assert retain._probe(signal, labels) == retain._probe(signal, labels)
    assert np.isnan(retain._probe(signal * float("nan"), labels)["probe accuracy"])


def test_measuring_changes_neither_the_model_nor_the_run(root: Path, tmp_path: Path) -> None:
    files = ("pairs.jsonl", "probe.jsonl")
    own = config(root, *files, save_model=True)
    model = models.load_model(own)
    model.bert.encoder.train(False)  # as a user may have frozen a part
    flags = [module.training for module in model.modules()]
    measured(own, model)
    assert [module.training for module in model.modules()] == flags
    finetune.run(own, tmp_path / "with")
    finetune.run(dataclasses.replace(own, retain=()), tmp_path / "without")
    name = "model/model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_run_tells_before_after_and_the_difference(root: Path, tmp_path: Path) -> None:
    own = config(root, "pairs.jsonl", "probe.jsonl", save_model=True)
    results = finetune.run(own, tmp_path / "run")
    labels = ["pairs: recall@1", "pairs: mrr", "probe: probe accuracy"]
    assert list(results["retained"]) == labels
    before = measured(own, models.load_model(own))
    after = measured(own, models.load_model(dataclasses.replace(own, model=str(tmp_path / "run" / "model"))))
    for label, found in results["retained"].items():
        name, what = label.split(": ")
        assert found["before"] == pytest.approx(before[name][what])
        assert found["after"] == pytest.approx(after[name][what])
        assert found["forgetting"] == found["before"] - found["after"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(label in page for label in labels)


def test_rows_are_retained_as_the_text_that_they_hold(root: Path, tmp_path: Path) -> None:
    tiny.causal_folder(tmp_path / "llama")
    texts = ["the film is good", "a very dull book", "not bad"]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    tiny.jsonl(tmp_path / "rows.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])
    tiny.jsonl(tmp_path / "halves.jsonl", [{"prompt": text[:3], "completion": text[3:]} for text in texts])
    names = ("plain.txt", "rows.jsonl", "halves.jsonl")
    own = config(root, model=str(tmp_path / "llama"), task="causal-lm",
                 retain=tuple(str(tmp_path / name) for name in names))  # fmt: skip
    found = measured(own, models.load_model(own))
    assert found["rows"] == found["plain"]
    assert found["halves"] != found["plain"]


def test_more_loss_is_forgetting_too() -> None:
    found = retain.compared({"old": {"token loss": 2.0}}, {"old": {"token loss": 2.5}})
    assert found == {"old: token loss": {"before": 2.0, "after": 2.5, "forgetting": 0.5}}


def test_adapters_are_measured_where_they_are(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    own = config(root, "pairs.jsonl", optimizer="lora", optimizer_options=("lora.rank=4",), learning_rate=0.3)
    plain = measured(own, models.load_model(own))
    assert measured(own, apply_lora(models.load_model(own), rank=4)) == plain  # they begin at zero
    results = finetune.run(own, tmp_path / "run")
    assert results["retained"]["pairs: mrr"]["before"] == plain["pairs"]["mrr"]
    assert results["retained"]["pairs: mrr"]["after"] != plain["pairs"]["mrr"]


def test_images_have_a_probe(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
                      patch_size=4, num_labels=2)  # fmt: skip
    ViTForImageClassification(shape).save_pretrained(tmp_path / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).integers(0, 60, (40, 8, 8, 3), dtype=np.uint8)
    images[::2] += 150
    np.savez(tmp_path / "old.npz", images=images, labels=np.arange(40) % 2)
    own = Config(
        task="image-classification", model=str(tmp_path / "vit"), train=str(tmp_path / "old.npz"), device="cpu",
        max_steps=1, save_model=False, retain=(str(tmp_path / "old.npz"),),
    )  # fmt: skip
    results = finetune.run(own, tmp_path / "run")
    assert results["retained"]["old: probe accuracy"]["before"] == 1.0  # light and dark


def test_what_was_known_is_measured_once_for_models_that_are_the_same(root: Path) -> None:
    own = config(root, "pairs.jsonl")
    measures = retain.measures(own, models.load_tokenizer(own))
    model = models.load_model(own)
    first = retain.before(measures, own, model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)  # a new head is no other model
    assert retain.before(measures, own, model) is first
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.normal_()
    assert retain.before(measures, own, model) is not first
    assert retain.before(measures, own, model) == {"pairs": measures["pairs"](model)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("none.jsonl",), ["there is no file", "none.jsonl"]),
        (("old.txt",), ["old.txt: a text file is for language models"]),
        (("bare.jsonl",), ["bare.jsonl has no column called"]),
        (("pairs.jsonl", "copy/pairs.jsonl"), ["two files called pairs"]),
        (("single.jsonl",), ["single.jsonl has one row only with label 'bad'"]),
        (("few.jsonl",), ["few.jsonl has 10 rows for 5 labels"]),
        (("latin.jsonl",), ["line 1 of", "latin.jsonl is no UTF-8 text"]),
    ],
    ids=str,
)
def test_what_cannot_be_retained_is_one_sentence(
    files: tuple[str, ...], words: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "old.txt").write_text("the film was good")
    (root / "copy").mkdir(exist_ok=True)
    (root / "copy" / "pairs.jsonl").write_text((root / "pairs.jsonl").read_text())
    tiny.jsonl(root / "bare.jsonl", [{"x": "y"}])
    tiny.jsonl(root / "single.jsonl", [{"text": "good", "label": "bad" if i == 3 else "good"} for i in range(9)])
    tiny.jsonl(root / "few.jsonl", [{"text": "good", "label": i // 2} for i in range(10)])
    (root / "latin.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 1}\n')
    arguments = ["--model", str(root / "bert"), "--train", str(root / "train.jsonl"), "--out", str(tmp_path / "run")]
    retained = ",".join(str(root / name) for name in files)
    assert cli.main(["finetune", *arguments, "--retain", retained]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()
