"""What the code blocks of the docs are given: tiny models and data, made in the block's folder, for a reader's own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tiny

Given = dict[str, Any]
STANDINS: dict[str, Callable[[Path, pytest.MonkeyPatch, Given], Any]] = {}


def standin(make: Callable[[Path, pytest.MonkeyPatch, Given], Any]) -> Callable[..., Any]:
    STANDINS[make.__name__] = make
    return make


@standin
def model(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> nn.Module:
    return tiny.bert(dropout=0.0)


@standin
def rows(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, 24, (32, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


@standin
def batch(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> dict[str, torch.Tensor]:
    found = rows(folder, monkeypatch, given)[:4]
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


@standin
def loader(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> DataLoader[Any]:
    return DataLoader(rows(folder, monkeypatch, given), batch_size=4)  # type: ignore[arg-type]


@standin
def loader_of_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> DataLoader[Any]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16)


@standin
def in_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """Trainers write beside the block, on the CPU."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@standin
def arguments(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments("out", learning_rate=1e-3, max_steps=2, report_to="none")


@standin
def trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    from transformers import Trainer

    given["model"] = model(folder, monkeypatch, given)
    made = arguments(folder, monkeypatch, given)
    return Trainer(given["model"], made, train_dataset=rows(folder, monkeypatch, given))  # type: ignore[arg-type]


@standin
def optimizer(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    import nanoadam

    made = nanoadam.NanoAdam(nanoadam.param_groups(given["model"]), lr=1e-3)
    given["model"](**batch(folder, monkeypatch, given)).loss.backward()
    made.step()
    made.zero_grad()
    return made


@standin
def causal_model(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.causal_folder(folder / "causal"))


STANDINS["reference_model"] = causal_model


@standin
def causal_batch(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 24, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@standin
def tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    return tiny.tokenizer()


@standin
def text_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "the film is", "completion": f" {word}"} for word in tiny.WORDS[:4] * 4])


@standin
def preference_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "the film is", "chosen": " good", "rejected": " bad"}] * 16)


@standin
def sentence_model(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    import sentence_transformers
    from sentence_transformers import models

    word = models.Transformer(str(tiny.bert_folder(folder / "encoder")), max_seq_length=16)
    return sentence_transformers.SentenceTransformer(
        modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu"
    )


@standin
def pair_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"anchor": "a good film", "positive": "a fine book"}] * 16)


@standin
def gpt(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> nn.Module:
    """A model whose forward gives logits and a loss, its head tied to its embedding."""

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(24, 32)
            self.block = nn.Linear(32, 32)
            self.lm_head = nn.Linear(32, 24, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.lm_head(self.block(self.wte(ids)))
            return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    return GPT()


@standin
def tokens(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> torch.Tensor:
    return torch.randint(0, 24, (2, 8), generator=torch.Generator().manual_seed(0))


@standin
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """Local folders under the names of the hub, and its datasets as rows made on the spot."""
    import datasets

    tiny.bert_folder(folder / "google-bert" / "bert-base-uncased")

    def load_dataset(name: str, *arguments: Any, split: str | None = None, **named: Any) -> Any:
        assert name == "stanfordnlp/sst2", f"{name} has no stand-in"
        found = [
            {"idx": i, "sentence": row["text"], "label": int(row["label"] == "good")}
            for i, row in enumerate(tiny.sentences(96))
        ]
        return datasets.Dataset.from_list(found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@standin
def pair_of_models(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """Folders base-model and finetuned-model: of the latter, every hundredth weight of a matrix has moved."""
    from transformers import AutoModelForCausalLM

    base = tiny.causal_folder(folder / "base-model")
    moved = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in itertools.islice(moved.parameters(), 4):
            parameter.view(-1)[::100] += 0.01
    moved.save_pretrained(folder / "finetuned-model")
    tiny.tokenizer().save_pretrained(folder / "finetuned-model")
    given["model"] = AutoModelForCausalLM.from_pretrained(base)


@standin
def base_of_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """A classifier under the name org/base-model."""
    tiny.bert().save_pretrained(folder / "org" / "base-model")
    tiny.tokenizer().save_pretrained(folder / "org" / "base-model")


@standin
def two_patches(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """Patches law and medicine of one model, requests that name them, and something that answers."""
    from dataclasses import dataclass

    from nanoadam import delta

    pair_of_models(folder, monkeypatch, given)
    for name in ("law", "medicine"):
        delta.diff("base-model", "finetuned-model", out=f"{name}.safetensors")

    @dataclass
    class Request:
        finetune: str

    given["waiting"] = [Request(name) for name in ("law", "medicine", "law")]
    given["answer"] = lambda model, requests: len(requests)


@standin
def finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """A finetune, as RUN and as runs/first; two models before and after one."""
    from nanoadam import cli

    tiny.bert_folder(folder / "bert-base")
    tiny.jsonl(folder / "train.jsonl", tiny.sentences(48))
    words = "finetune --model bert-base --train train.jsonl --max-steps 3 --learning-rate 1e-3 --out RUN --json"
    assert cli.main(words.split()) == 0
    (folder / "runs").mkdir()
    (folder / "runs" / "first").symlink_to(folder / "RUN")
    (folder / "my-finetune").symlink_to(folder / "RUN" / "model")


@standin
def new_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    found = tiny.sentences(8, first=100)
    (folder / "new.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in found))
    (folder / "test.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in found))


@standin
def for_analysis(folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    """A weight and its gradient, before and after, an optimizer that has made a step, two folders of models."""
    import nanoadam

    pair_of_models(folder, monkeypatch, given)
    (folder / "base").symlink_to(folder / "base-model")
    (folder / "finetuned").symlink_to(folder / "finetuned-model")
    given["model"] = model(folder, monkeypatch, given)
    generator = torch.Generator().manual_seed(0)
    for name in ("weight", "gradient", "before", "after"):
        given[name] = torch.randn(64, 64, generator=generator)
    given["batches"] = [batch(folder, monkeypatch, given)]
    trained = model(folder, monkeypatch, given)
    given["optimizer"] = nanoadam.NanoAdam(nanoadam.param_groups(trained), lr=1e-3)
    trained(**given["batches"][0]).loss.backward()
    given["optimizer"].step()


def give(names: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, given: Given) -> None:
    for name in names:
        if name not in STANDINS:
            raise KeyError(f"no stand-in {name!r}: there are {', '.join(sorted(STANDINS))}")
        made = STANDINS[name](folder, monkeypatch, given)
        if made is not None:
            given[name] = made


assert os.environ.get("HF_HUB_OFFLINE", "1") == "1", "a test that reaches the hub would pass for the wrong reason"
