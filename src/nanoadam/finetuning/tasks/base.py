"""What every task has, and what tasks share: limits of length, the classes, their metrics, what the rows look like."""

from __future__ import annotations

import abc
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from nanoadam.finetuning import data
from nanoadam.finetuning.columns import Roles
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split

CLASSIFICATION = {"accuracy": True, "f1": True, "matthews": True, "loss": False}
"""What is measured of a classifier, and whether more of it is better."""

SAME, NONE = "for every row", "for any row"
"""How notes end that say that a model has one answer, or none."""

MOST_CLASSES_SHOWN = 40
MOST_CHARACTERS = 300


class Task(abc.ABC):
    """One kind of job. Made for a config, its training and its validation split.

    Attributes:
        metrics: what is measured, and whether more of it is better; the first counts unless told otherwise.
        metric: the name of the one that counts.
        model: the model to be trained.
        head: "new", "kept" or "" where there is none.
        processor: what turns rows into inputs; saved with the model.
        train: encoded rows, as the Trainer takes them.
        validation: likewise.
        splits: the rows that they were made of.
        collator: makes a batch of rows.
        preprocess_logits: makes less of the logits before they are gathered.
        keeps_columns: whether the collator needs columns that are no input of the model.
        roles: what was read from which columns.
        description: the same for the manifest, with what else there is to say of the rows.
    """

    metrics: ClassVar[dict[str, bool]]
    metric: str
    model: PreTrainedModel
    head: str = ""
    processor: Any
    train: Dataset
    validation: Dataset
    splits: tuple[Split, Split]
    collator: Any
    roles: Roles
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

    def finish(self) -> None:  # noqa: B027 # most have nothing to put back
        """Put back what training needed otherwise, before the model is saved."""

    def baseline(self) -> dict[str, float]:
        """The metrics of the best answer that is the same for all rows; none where there is no such thing."""
        return {}

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """What of the validation split came out how: `classes`, `confusion`, `samples`, `notes`; some of them."""
        return {}


# What rows look like --------------------------------------------------------------------------------------


def lengths(rows: Sequence[Sequence[int]]) -> dict[str, int]:
    """Tokens of a sequence: the median and the most."""
    counts = [len(row) for row in rows]
    return {"median": int(statistics.median(counts)), "most": max(counts)}


def shortened(text: str) -> str:
    """As much of a text as fits a table."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MOST_CHARACTERS else f"{flat[: MOST_CHARACTERS - 3]}..."


# Limits ---------------------------------------------------------------------------------------------------


def sequence_limit(config: Config, model: PreTrainedModel, tokenizer: Any) -> int:
    """The most tokens of a sequence: what model and tokenizer take, or less if told so."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    takes = min(own, _positions(model), tokenizer.model_max_length)
    if config.max_length is not None and config.max_length > takes:
        raise ValueError(f"max_length {config.max_length} is more than the {takes} tokens that {config.model} takes")
    return int(config.max_length or takes)


def _positions(model: PreTrainedModel) -> int:
    """Of learned positions, those that a token can have: RoBERTa's begin after the padding's."""
    found = 2**30
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            found = min(found, module.num_embeddings - max(first, getattr(module, "offset", 0)))
    return found


_POSITIONS = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


def refuse_long(found: list[int], limit: int, split: Split) -> None:
    """Refuse rows that are longer than the limit; names the longest."""
    longest = max(range(len(found)), key=found.__getitem__)
    if found[longest] > limit:
        count = sum(length > limit for length in found)
        others = f", and {count - 1} more are too long" if count > 1 else ""
        raise ValueError(
            f"{split.where(longest)} has {found[longest]} tokens where {limit} are allowed{others}: pass --truncate to "
            "cut them"
        )


def refuse_unknown_tokens(rows: Sequence[Sequence[int]], model: PreTrainedModel, tokenizer: Any, split: Split) -> None:
    """Refuse a token that the model has no embedding for, before it ends the training."""
    embeddings: Any = model.get_input_embeddings()
    known = int(embeddings.weight.shape[0])
    for index, row in enumerate(rows):
        if len(row) and max(row) >= known:
            token = max(row)
            raise ValueError(
                f"{split.where(index)} has the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), and the "
                f"model has embeddings for {known} tokens only: the tokenizer has tokens that were added later; pass "
                "--tokenizer with the model's own, or a model whose embeddings were resized and saved"
            )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= known:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_token!r} ({pad}), and the model has embeddings for {known} tokens "
            "only: set another pad_token in its tokenizer_config.json, or pass --tokenizer with the model's own"
        )


# Classes --------------------------------------------------------------------------------------------------


def label_options(names: list[str]) -> dict[str, Any]:
    """What a model's config has to know of its classes; one of them is right for each row."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation."""
    return scores(logits_of(prediction).argmax(axis=-1), np.asarray(prediction.label_ids))


def scores(guesses: Any, labels: Any) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation of guessed classes."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one class only was found: then the correlation is 0
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "f1": float(f1_score(labels, guesses, average="macro")),
            "matthews": float(matthews_corrcoef(labels, guesses)),
        }


def majority(train: Sequence[int], validation: Sequence[int]) -> dict[str, float]:
    """The scores of always guessing the commonest class of the training set."""
    common = int(np.bincount(np.asarray(train)).argmax())
    return scores(np.full(len(validation), common), np.asarray(validation))


def class_details(guesses: Any, labels: Any, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and rows of each class, the confusion matrix where it fits, and what is odd about them."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = list(range(len(names)))
    columns = precision_recall_fscore_support(labels, guesses, labels=every, zero_division=0.0)
    rows = [
        {"name": names[i], "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for i, p, r, f, n in zip(every, *columns, strict=True)
    ]
    found: dict[str, Any] = {"classes": rows[:MOST_CLASSES_SHOWN], "notes": []}
    if len(names) <= MOST_CLASSES_SHOWN:
        table = confusion_matrix(labels, guesses, labels=every)
        found["confusion"] = {"names": list(names), "counts": table.tolist()}
    said = sorted(set(np.asarray(guesses).tolist()))
    if len(said) == 1:
        found["notes"].append(f"the model predicts {names[said[0]]!r} {SAME}")
    elif missing := [names[i] for i in every if i not in said and rows[i]["rows"]]:
        found["notes"].append(f"the model never predicts {', '.join(missing[:8])}")
    return found


def right_and_wrong(guesses: Any, labels: Any, sure: Any, count: int) -> list[int]:
    """Some rows, half of them guessed wrong where there are so many; the surest ones, where mistakes tell most."""
    order = np.argsort(-np.asarray(sure), kind="stable")
    wrong = [int(i) for i in order if guesses[i] != labels[i]]
    right = [int(i) for i in order if guesses[i] == labels[i]]
    chosen = wrong[: max(count // 2, count - len(right))]
    return [*chosen, *right[: count - len(chosen)]]


def softmax(logits: Any) -> Any:
    """Shares of the classes: float64, the shape of the logits."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def logits_of(prediction: EvalPrediction) -> np.ndarray[Any, Any]:
    """The logits alone, where a model gives more."""
    first = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return np.asarray(first)
