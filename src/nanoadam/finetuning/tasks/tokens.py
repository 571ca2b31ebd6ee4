"""Words with a tag each: names, parts of speech."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, EvalPrediction

from nanoadam.finetuning import columns, labels, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import (
    Task,
    class_details,
    label_options,
    lengths,
    logits_of,
    refuse_long,
    refuse_unknown_tokens,
    scores,
    sequence_limit,
    shortened,
)

Span = tuple[int, int, int, str]
"""Row, first word, word after the last, kind."""


class TokenClassification(Task):
    """F1 of whole spans where tags are like B-PER, and accuracy of tags."""

    metrics: ClassVar[dict[str, bool]] = {"f1": True, "accuracy": True, "loss": False}

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        self.roles = columns.of_tokens(train.name, train.rows, config)
        self._words, self._tags = self.roles.texts[0], str(self.roles.label)
        for name in self.roles.read:
            validation.column(name, name, ())
        self.splits = (train, validation)
        self.processor = models.load_tokenizer(config)
        if not self.processor.is_fast:
            raise ValueError(f"the tokenizer of {config.model} does not say which word a token is of: it is a slow one")
        self.names = labels.sets_of_names(train, self._tags)
        self.model, self.head, self.names = models.load_classifier(config, self.names, label_options)
        self._limit = sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = DataCollatorForTokenClassification(self.processor)
        found = [tag for row in self.train["labels"] for tag in row if tag >= 0]
        self.description = {
            "words": self._words,
            "tags": self._tags,
            "ignored": list(self.roles.ignored),
            "most_tokens": self._limit,
            "tokens": lengths(self.train["input_ids"]),
            "classes": labels.counts(found, self.names),
        }

    def encode(self, split: Split) -> Dataset:
        """Tokens; the first token of each word has its tag, the others none."""
        words, tags = self._rows(split)
        encoded = self.processor(
            words, is_split_into_words=True, truncation=self._config.truncate, max_length=self._limit, verbose=False
        )
        refuse_long([len(ids) for ids in encoded["input_ids"]], self._limit, split)
        refuse_unknown_tokens(encoded["input_ids"], self.model, self.processor, split)
        found = []
        for index, own in enumerate(tags):
            last, row = None, []
            for word in encoded.word_ids(index):
                row.append(-100 if word is None or word == last else own[word])
                last = word
            if all(tag < 0 for tag in row):
                raise ValueError(f"{split.where(index)} has no word that makes a token: there is nothing to learn")
            found.append(row)
        return Dataset.from_dict({**encoded, "labels": found})

    def _rows(self, split: Split) -> tuple[list[list[str]], list[list[int]]]:
        named = columns.names_of(split.rows.features[self._tags])
        position = {name: i for i, name in enumerate(self.names)}
        words, tags = [], []
        for index, (own, given) in enumerate(zip(split.rows[self._words], split.rows[self._tags], strict=True)):
            good = isinstance(own, list) and isinstance(given, list) and len(own) == len(given) > 0
            if not good or not all(isinstance(word, str) for word in own):
                raise ValueError(f"{split.where(index)} must have as many tags in {self._tags!r} as words in "
                                 f"{self._words!r}, and at least one")  # fmt: skip
            if any(tag is None or (named is not None and not 0 <= tag < len(named)) for tag in given):
                raise ValueError(f"{split.where(index)} has a word without a tag in {self._tags!r}: {given}")
            row = [labels.class_of(tag) if named is None else named[tag] for tag in given]
            unknown = next((tag for tag in row if tag not in position), None)
            if unknown is not None:
                raise ValueError(f"{split.where(index)} has the tag {unknown!r}, which is not in the training set")
            words.append(own)
            tags.append([position[tag] for tag in row])
        return words, tags

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Both, over the words."""
        guesses, true, rows = self._flat(prediction)
        return self._scores(guesses, true, rows)

    def _flat(self, prediction: EvalPrediction) -> tuple[Any, Any, Any]:
        """Guess, tag and row of each word that has a tag."""
        true = np.asarray(prediction.label_ids)
        kept = true >= 0
        return logits_of(prediction).argmax(axis=-1)[kept], true[kept], np.nonzero(kept)[0]

    def _scores(self, guesses: Any, true: Any, rows: Any) -> dict[str, float]:
        found = scores(guesses, true)
        if any(name.startswith("B-") for name in self.names):
            said, right = (set(spans([self.names[i] for i in tags], rows)) for tags in (guesses, true))
            both = len(said & right)
            found["f1"] = 2 * both / max(1, len(said) + len(right))
        return {"f1": found["f1"], "accuracy": found["accuracy"]}

    def baseline(self) -> dict[str, float]:
        """Of always saying the commonest tag."""
        tags = [tag for row in self.train["labels"] for tag in row if tag >= 0]
        rows = [(tag, i) for i, row in enumerate(self.validation["labels"]) for tag in row if tag >= 0]
        true, of = np.asarray([tag for tag, _ in rows]), np.asarray([i for _, i in rows])
        return self._scores(np.full(len(true), int(np.bincount(tags).argmax())), true, of)

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """Each tag, and some rows with the words that were tagged wrong."""
        guesses, true, rows = self._flat(prediction)
        shown = []
        for index in range(len(self.validation)):
            own = rows == index
            said = [f"{self.names[g]}" for g in guesses[own]]
            tags = [f"{self.names[t]}" for t in true[own]]
            words = self.splits[1].rows[self._words][index]
            shown.append({"text": shortened(" ".join(words)), "label": shortened(" ".join(tags)),
                          "predicted": shortened(" ".join(said)), "right": said == tags})  # fmt: skip
            if len(shown) > 200:
                break
        wrong = [row for row in shown if not row["right"]][: samples - samples // 2]
        right = [row for row in shown if row["right"]][: samples - len(wrong)]
        return {**class_details(guesses, true, self.names), "samples": [*wrong, *right]}


def spans(tags: list[str], rows: Any) -> list[Span]:
    """The spans of tags like B-PER, I-PER, O; an I- that follows nothing of its kind begins a span."""
    found: list[Span] = []
    begin, kind, row = 0, "", -1
    for place, (tag, own) in enumerate(zip([*tags, "O"], [*rows, -1], strict=True)):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind and own == row
        if kind and not goes_on:
            found.append((int(row), begin, place, kind))
            kind = ""
        if mark in ("B", "I") and name and not goes_on:
            begin, kind = place, name
        row = own
    return found
