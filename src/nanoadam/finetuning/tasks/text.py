"""Texts and pairs of texts with a class, several classes or a number."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from nanoadam.finetuning import columns, labels, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import (
    CLASSIFICATION,
    NONE,
    SAME,
    Task,
    class_details,
    classification_metrics,
    label_options,
    lengths,
    logits_of,
    majority,
    refuse_long,
    refuse_unknown_tokens,
    right_and_wrong,
    sequence_limit,
    shortened,
    softmax,
)


class _Text(Task):
    """One text or a pair, and what is to be said of it."""

    kind: ClassVar[str]

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        self.roles = columns.of_text(train.name, train.rows, config, self.kind)
        self._label = str(self.roles.label)
        for name in self.roles.read:
            validation.column(name, name, ())
        self.processor = models.load_tokenizer(config)
        self.splits = (train, validation)
        self.load(config, train)
        self.model.config.pad_token_id = self.processor.pad_token_id
        self._limit = sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = DataCollatorWithPadding(self.processor)
        self.description = {
            "text": list(self.roles.texts),
            "label": self._label,
            "ignored": list(self.roles.ignored),
            "most_tokens": self._limit,
            "tokens": lengths(self.train["input_ids"]),
            **self.about_labels(),
        }

    @abc.abstractmethod
    def load(self, config: Config, train: Split) -> None:
        """Set `model` and `head`, for the labels of the training set."""

    @abc.abstractmethod
    def labels(self, split: Split) -> list[Any]:
        """Each row's label as the model takes it."""

    def about_labels(self) -> dict[str, Any]:
        """What there is to say of the labels."""
        return {}

    def encode(self, split: Split) -> Dataset:
        """Tokens of one text or of a pair."""
        texts = [labels.texts(split, name) for name in self.roles.texts]
        encoded = self.processor(*texts, truncation=self._config.truncate, max_length=self._limit, verbose=False)
        refuse_long([len(ids) for ids in encoded["input_ids"]], self._limit, split)
        refuse_unknown_tokens(encoded["input_ids"], self.model, self.processor, split)
        return Dataset.from_dict({**encoded, "labels": self.labels(split)})

    def shown(self, index: int) -> str:
        """A row of the validation split as it stands in a table."""
        rows = self.splits[1].rows
        return " | ".join(shortened(str(rows[name][index])) for name in self.roles.texts)


class TextClassification(_Text):
    """Accuracy, F1 and Matthews correlation; the last is what CoLA is measured by."""

    kind = "text-classification"
    metrics = CLASSIFICATION

    def load(self, config: Config, train: Split) -> None:
        """A head for the classes of the training set."""
        self.names = labels.label_names(train, self._label)
        self.model, self.head, self.names = models.load_classifier(config, self.names, label_options)

    def labels(self, split: Split) -> list[Any]:
        """As numbers."""
        return list(labels.class_ids(split, self._label, self.names))

    def about_labels(self) -> dict[str, Any]:
        """Rows of each class, and classes that look like one."""
        found: dict[str, Any] = {"classes": labels.counts(self.train["labels"], self.names)}
        if doubles := labels.alike(self.names):
            found["alike"] = [list(group) for group in doubles]
        if none := labels.unlabelled(self.names):
            found["unlabelled"] = none
        if comma := labels.commas(self.names):
            found["comma"] = comma
        return found

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three."""
        return classification_metrics(prediction)

    def baseline(self) -> dict[str, float]:
        """Of always guessing the commonest class."""
        return majority(self.train["labels"], self.validation["labels"])

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """Each class, the confusion matrix, and some rows guessed right and wrong."""
        shares = softmax(logits_of(prediction))
        guesses, true = shares.argmax(axis=-1), np.asarray(prediction.label_ids)
        chosen = right_and_wrong(guesses, true, shares.max(axis=-1), samples)
        rows = [
            {"text": self.shown(i), "label": self.names[true[i]], "predicted": self.names[guesses[i]],
             "right": bool(guesses[i] == true[i]), "sure": float(shares[i].max())}
            for i in chosen
        ]  # fmt: skip
        return {**class_details(guesses, true, self.names), "samples": rows}


class MultiLabelClassification(_Text):
    """Any number of classes for each text: micro and macro F1, and the share of rows with all of them right."""

    kind = "multi-label-classification"
    metrics: ClassVar[dict[str, bool]] = {"micro_f1": True, "macro_f1": True, "exact": True, "loss": False}

    def load(self, config: Config, train: Split) -> None:
        """A head for the classes of the training set, each with a yes or no of its own."""
        self.names = labels.sets_of_names(train, self._label)
        self.model, self.head, self.names = models.load_classifier(
            config, self.names, lambda names: {**label_options(names), "problem_type": "multi_label_classification"}
        )

    def labels(self, split: Split) -> list[Any]:
        """A 1 or a 0 for each class."""
        return list(labels.class_sets(split, self._label, self.names))

    def about_labels(self) -> dict[str, Any]:
        """Rows of each class."""
        table = np.asarray(self.train["labels"])
        order = np.argsort(-table.sum(axis=0), kind="stable")
        return {"classes": {self.names[i]: int(table[:, i].sum()) for i in order}, "several": True}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three, a class being said where its probability is above a half."""
        return self._scores(logits_of(prediction) > 0, np.asarray(prediction.label_ids) > 0.5)

    @staticmethod
    def _scores(guesses: Any, true: Any) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {
            "micro_f1": float(f1_score(true, guesses, average="micro", zero_division=0.0)),
            "macro_f1": float(f1_score(true, guesses, average="macro", zero_division=0.0)),
            "exact": float((guesses == true).all(axis=1).mean()),
        }

    def baseline(self) -> dict[str, float]:
        """Of saying the same for all rows: the classes that more than half of the rows have, or the commonest one."""
        share = np.asarray(self.train["labels"]).mean(axis=0)
        said = share > 0.5
        if not said.any():
            said[share.argmax()] = True
        true = np.asarray(self.validation["labels"]) > 0.5
        return self._scores(np.tile(said, (len(true), 1)), true)

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """Each class, and some rows."""
        from sklearn.metrics import precision_recall_fscore_support

        guesses, true = logits_of(prediction) > 0, np.asarray(prediction.label_ids) > 0.5
        scores = precision_recall_fscore_support(true, guesses, average=None, zero_division=0.0)
        classes = [
            {"name": self.names[i], "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for i, (p, r, f, n) in enumerate(zip(*scores, strict=True))
        ]
        right = (guesses == true).all(axis=1)
        order = [*np.flatnonzero(~right)[: samples // 2], *np.flatnonzero(right)[: samples - samples // 2]]
        rows = [
            {"text": self.shown(int(i)), "label": self._said(true[i]), "predicted": self._said(guesses[i]),
             "right": bool(right[i])}
            for i in order
        ]  # fmt: skip
        notes = [] if guesses.any() else [f"the model predicts no class {NONE}"]
        return {"classes": classes, "samples": rows, "notes": notes}

    def _said(self, row: Any) -> str:
        return ", ".join(name for name, yes in zip(self.names, row, strict=True) if yes) or "none"


class TextRegression(_Text):
    """Pearson and Spearman correlation, which STS-B is measured by, and the mean squared error."""

    kind = "text-regression"
    metrics: ClassVar[dict[str, bool]] = {"pearson": True, "spearman": True, "mse": False, "loss": False}

    def load(self, config: Config, train: Split) -> None:
        """One output, squared error."""
        if config.label_smoothing:
            raise ValueError("label_smoothing is for classes, and text-regression has none: leave it out")
        values = train.rows[self._label]
        self._comma = columns.decimal_comma(values)
        self._example = next(filter(columns.has_comma, values), None) if self._comma else None
        labels.numbers(train, self._label, self._comma)
        options = {"num_labels": 1, "problem_type": "regression"}
        self.model, self.head = models.load_with_head(config, options)

    def labels(self, split: Split) -> list[Any]:
        """As numbers."""
        return list(labels.numbers(split, self._label, self._comma))

    def about_labels(self) -> dict[str, Any]:
        """Where the numbers lie."""
        values = np.asarray(self.train["labels"], dtype=np.float64)
        found = {"numbers": {"least": float(values.min()), "mean": float(values.mean()), "most": float(values.max())}}
        return found if self._example is None else {**found, "comma": self._example}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three; correlation with a constant counts as 0."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_squared_error

        guesses, targets = logits_of(prediction).squeeze(-1), np.asarray(prediction.label_ids)
        found = {"mse": float(mean_squared_error(targets, guesses))}
        constant = len(targets) < 2 or np.ptp(guesses) == 0 or np.ptp(targets) == 0  # correlation is undefined
        found["pearson"] = 0.0 if constant else float(pearsonr(targets, guesses).statistic)
        found["spearman"] = 0.0 if constant else float(spearmanr(targets, guesses).statistic)
        return found

    def baseline(self) -> dict[str, float]:
        """Of always guessing the mean of the training set."""
        mean, targets = np.mean(self.train["labels"]), np.asarray(self.validation["labels"], dtype=np.float64)
        return {"pearson": 0.0, "spearman": 0.0, "mse": float(((targets - mean) ** 2).mean())}

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """Some rows, from the nearest to the furthest guess."""
        guesses, targets = logits_of(prediction).squeeze(-1), np.asarray(prediction.label_ids)
        order = np.argsort(np.abs(guesses - targets), kind="stable")
        places = np.linspace(0, len(order) - 1, min(samples, len(order))).round().astype(int)
        rows = [{"text": self.shown(int(i)), "label": f"{targets[i]:.4g}", "predicted": f"{guesses[i]:.4g}"}
                for i in order[places]]  # fmt: skip
        notes = [f"the model predicts the same number {SAME}"] if np.ptp(guesses) == 0 else []
        return {"samples": rows, "notes": notes}
