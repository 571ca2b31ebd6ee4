"""Texts and pairs of texts with a class or a number."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from nanoadam.finetuning import data, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import (
    CLASSIFICATION,
    Task,
    classification_metrics,
    label_options,
    logits_of,
    refuse_long,
    sequence_limit,
)


class _Text(Task):
    """One text or a pair, and a label or a number."""

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        self._label = train.column("label_column", config.label_column, data.LABEL)
        first = train.column("text_column", config.text_column, data.TEXT)
        self._texts = [first] if config.pair_column is None else [
            first, train.column("pair_column", config.pair_column, ())]  # fmt: skip
        for name in (*self._texts, self._label):
            validation.column(name, name, ())
        self.processor = models.load_tokenizer(config)
        self.model = models.load_model(config, **self.model_options(train))
        self.model.config.pad_token_id = self.processor.pad_token_id
        self._limit = sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = DataCollatorWithPadding(self.processor)
        self.description = {"text": self._texts, "label": self._label, "most_tokens": self._limit}

    @abc.abstractmethod
    def model_options(self, train: Split) -> dict[str, Any]:
        """What the model has to know of the labels."""

    @abc.abstractmethod
    def labels(self, split: Split) -> list[Any]:
        """Each row's label as the model takes it."""

    def encode(self, split: Split) -> Dataset:
        """Tokens of one text or of a pair."""
        columns = [data.texts(split, name) for name in self._texts]
        encoded = self.processor(*columns, truncation=self._config.truncate, max_length=self._limit, verbose=False)
        refuse_long([len(ids) for ids in encoded["input_ids"]], self._limit, split)
        return Dataset.from_dict({**encoded, "labels": self.labels(split)})


class TextClassification(_Text):
    """Accuracy, F1 and Matthews correlation; the last is what CoLA is measured by."""

    metrics = CLASSIFICATION

    def model_options(self, train: Split) -> dict[str, Any]:
        """The classes of the training set."""
        self.names = data.label_names(train, self._label)
        return label_options(self.names)

    def labels(self, split: Split) -> list[Any]:
        """As numbers."""
        return data.class_ids(split, self._label, self.names)

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three."""
        return classification_metrics(prediction)


class TextRegression(_Text):
    """Pearson and Spearman correlation, which STS-B is measured by, and the mean squared error."""

    metrics: ClassVar[dict[str, bool]] = {"pearson": True, "spearman": True, "mse": False, "loss": False}

    def model_options(self, train: Split) -> dict[str, Any]:
        """One output, squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def labels(self, split: Split) -> list[Any]:
        """As numbers."""
        return data.numbers(split, self._label)

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
