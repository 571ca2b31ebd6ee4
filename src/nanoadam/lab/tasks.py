"""What is learned: how rows become batches, which model takes them, and what is measured."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction, PreTrainedModel

from nanoadam.lab import data, models
from nanoadam.lab.config import Config
from nanoadam.lab.data import Split
from nanoadam.lab.runs import nearest

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


def make(config: Config, train: Split, validation: Split) -> Task:
    """The task of a config; draws new weights from the global generator.

    Raises:
        ValueError: for a column, a row or a model that does not serve.
    """
    kinds: dict[str, type[Any]] = {**KINDS}
    if config.task == "image-classification":
        from nanoadam.lab.images import ImageClassification  # needs Pillow, which the others do not

        kinds[config.task] = ImageClassification
    kind = kinds[config.task]
    metric = config.metric or next(iter(kind.metrics))
    if metric not in kind.metrics:
        raise ValueError(f"{config.task} has no metric {metric!r}{nearest(metric, kind.metrics)}")
    made: Task = kind(config, train, validation)
    made.metric = metric
    return made


def _sequence_limit(config: Config, model: PreTrainedModel, tokenizer: Any) -> int:
    takes = min(
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30, tokenizer.model_max_length
    )
    if config.max_length is not None and config.max_length > takes:
        raise ValueError(f"max_length {config.max_length} is more than the {takes} tokens that {config.model} takes")
    return int(config.max_length or takes)


def _refuse_long(lengths: list[int], limit: int, split: Split) -> None:
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        count = sum(length > limit for length in lengths)
        others = f", and {count - 1} more are too long" if count > 1 else ""
        raise ValueError(
            f"row {longest + 1} of {split.name} has {lengths[longest]} tokens where {limit} are allowed{others}: pass "
            "--truncate to cut them"
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
        self._limit = _sequence_limit(config, self.model, self.processor)
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
        _refuse_long([len(ids) for ids in encoded["input_ids"]], self._limit, split)
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

    guesses, labels = _logits(prediction).argmax(axis=-1), prediction.label_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one class only was found: then the correlation is 0
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "f1": float(f1_score(labels, guesses, average="macro")),
            "matthews": float(matthews_corrcoef(labels, guesses)),
        }


def _logits(prediction: EvalPrediction) -> np.ndarray[Any, Any]:
    first = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return np.asarray(first)


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

        guesses, targets = _logits(prediction).squeeze(-1), np.asarray(prediction.label_ids)
        found = {"mse": float(mean_squared_error(targets, guesses))}
        constant = len(targets) < 2 or np.ptp(guesses) == 0 or np.ptp(targets) == 0  # correlation is undefined
        found["pearson"] = 0.0 if constant else float(pearsonr(targets, guesses).statistic)
        found["spearman"] = 0.0 if constant else float(spearmanr(targets, guesses).statistic)
        return found


class CausalLM(Task):
    """A prompt and its completion, or a conversation and its last message: the loss is on the latter alone."""

    metrics: ClassVar[dict[str, bool]] = {"token_loss": False, "perplexity": False}

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        chat = config.messages_column is not None or (config.prompt_column is None and train.has(data.MESSAGES))
        if chat:
            self._columns = [train.column("messages_column", config.messages_column, data.MESSAGES)]
        else:
            prompt = train.column("prompt_column", config.prompt_column, data.PROMPT)
            self._columns = [prompt, train.column("completion_column", config.completion_column, data.COMPLETION)]
        for name in self._columns:
            validation.column(name, name, ())
        self.processor = models.load_tokenizer(config)
        if chat and not self.processor.chat_template:
            raise ValueError(
                f"the tokenizer of {config.model} has no chat template: give prompts and completions instead"
            )
        self.model = models.load_model(config)
        self._limit = _sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = DataCollatorForSeq2Seq(self.processor, padding=True, label_pad_token_id=-100)
        self.preprocess_logits = _loss_and_count
        self.description = {"columns": self._columns, "most_tokens": self._limit, "loss": "on completions only"}

    def encode(self, split: Split) -> Dataset:
        """Tokens, with no label where there is no loss."""
        pairs = self._chats(split) if len(self._columns) == 1 else self._prompts(split)
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        if not self._config.truncate:
            _refuse_long(lengths, self._limit, split)
        rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, completion in pairs:
            completion = completion[: self._limit - 1]  # one token to predict the first of it from
            prompt = prompt[max(0, len(prompt) + len(completion) - self._limit) :]
            rows["input_ids"].append(prompt + completion)
            rows["attention_mask"].append([1] * (len(prompt) + len(completion)))
            rows["labels"].append([-100] * len(prompt) + completion)
        return Dataset.from_dict(rows)

    def _prompts(self, split: Split) -> list[tuple[list[int], list[int]]]:
        prompts, completions = (data.texts(split, name) for name in self._columns)
        tokenizer = self.processor
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # Apart, so that what is learned begins at a token's edge; a space between them belongs to the completion.
        ids = [
            self._ids(texts) for texts in (prompts, [_spaced(p, c) for p, c in zip(prompts, completions, strict=True)])
        ]
        return [(start + prompt or end, completion + end) for prompt, completion in zip(*ids, strict=True)]

    def _chats(self, split: Split) -> list[tuple[list[int], list[int]]]:
        prompts, completions = [], []
        for number, messages in enumerate(split.rows[self._columns[0]], start=1):
            valid = isinstance(messages, list) and len(messages) > 1 and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )  # fmt: skip
            if not valid or messages[-1]["role"] != "assistant":
                raise ValueError(
                    f"row {number} of {split.name} must be a list of at least two {{role, content}} that ends with the "
                    "assistant's"
                )
            template = self.processor.apply_chat_template
            prompt = template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = template(messages, tokenize=False)
            if not whole.startswith(prompt):
                raise ValueError(f"the chat template of {self._config.model} rewrites earlier messages: give prompts "
                                 "and completions instead")  # fmt: skip
            prompts.append(prompt)
            completions.append(whole[len(prompt) :])
        return list(zip(self._ids(prompts), self._ids(completions), strict=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.processor(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss per token over the whole split, whatever its batches."""
        total, count = _logits(prediction).sum(axis=0)
        loss = float(total / max(1, count))
        return {"token_loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}


def _spaced(prompt: str, completion: str) -> str:
    return completion if not prompt or prompt[-1].isspace() or completion[:1].isspace() else f" {completion}"


def _loss_and_count(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """For each row the loss over its completion and how many tokens that has: float64 [rows, 2]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=-100, reduction="none"
    )
    return torch.stack([loss.double().sum(dim=1), (targets != -100).double().sum(dim=1)], dim=1)


KINDS: dict[str, type[Any]] = {
    "text-classification": TextClassification,
    "text-regression": TextRegression,
    "causal-lm": CausalLM,
}
