"""What every task has, and what tasks share: limits of length, the classes, their metrics."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel

from nanoadam.finetuning import data
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split

CLASSIFICATION = {"accuracy": True, "f1": True, "matthews": True, "loss": False}
"""What is measured of a classifier, and whether more of it is better."""


class Task(abc.ABC):
    """One kind of job. Made for a config, its training and its validation split.

    Attributes:
        metrics: what is measured, and whether more of it is better; the first counts unless told otherwise.
        metric: the name of the one that counts.
        model: the model to be trained.
        processor: what turns rows into inputs; saved with the model.
        train: encoded rows, as the Trainer takes them.
        validation: likewise.
        collator: makes a batch of rows.
        preprocess_logits: makes less of the logits before they are gathered.
        keeps_columns: whether the collator needs columns that are no input of the model.
        description: what was read from where, for the manifest.
    """

    metrics: ClassVar[dict[str, bool]]
    metric: str
    model: PreTrainedModel
    processor: Any
    train: Dataset
    validation: Dataset
    collator: Any
    description: dict[str, Any]
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    keeps_columns = False

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric goes."""
        return self.metrics[self.metric]

    def encoded(self, config: Config, train: Split, validation: Split) -> tuple[Dataset, Dataset]:
        """Both splits, encoded once in a process."""
        return data.remembered(("encoded", data.key(config)), lambda: (self.encode(train), self.encode(validation)))

    @abc.abstractmethod
    def encode(self, split: Split) -> Dataset:
        """Rows as the model takes them."""

    @abc.abstractmethod
    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of a split."""


def sequence_limit(config: Config, model: PreTrainedModel, tokenizer: Any) -> int:
    """The most tokens of a sequence: what model and tokenizer take, or less if told so."""
    takes = min(
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30, tokenizer.model_max_length
    )
    if config.max_length is not None and config.max_length > takes:
        raise ValueError(f"max_length {config.max_length} is more than the {takes} tokens that {config.model} takes")
    return int(config.max_length or takes)


def refuse_long(lengths: list[int], limit: int, split: Split) -> None:
    """Refuse rows that are longer than the limit; names the longest."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        count = sum(length > limit for length in lengths)
        others = f", and {count - 1} more are too long" if count > 1 else ""
        raise ValueError(
            f"row {longest + 1} of {split.name} has {lengths[longest]} tokens where {limit} are allowed{others}: pass "
            "--truncate to cut them"
        )


def label_options(names: list[str]) -> dict[str, Any]:
    """What a model's config has to know of its classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses, labels = logits_of(prediction).argmax(axis=-1), prediction.label_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one class only was found: then the correlation is 0
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "f1": float(f1_score(labels, guesses, average="macro")),
            "matthews": float(matthews_corrcoef(labels, guesses)),
        }


def logits_of(prediction: EvalPrediction) -> np.ndarray[Any, Any]:
    """The logits alone, where a model gives more."""
    first = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return np.asarray(first)
