"""What is learned: how rows become batches, which model takes them, and what is measured."""

from __future__ import annotations

from typing import Any

from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import Task
from nanoadam.finetuning.tasks.language import CausalLM
from nanoadam.finetuning.tasks.text import MultiLabelClassification, TextClassification, TextRegression
from nanoadam.finetuning.tasks.tokens import TokenClassification
from nanoadam.text import nearest

__all__ = ["CausalLM", "Task", "TextClassification", "TextRegression", "make"]

KINDS: dict[str, type[Any]] = {
    "text-classification": TextClassification,
    "multi-label-classification": MultiLabelClassification,
    "text-regression": TextRegression,
    "token-classification": TokenClassification,
    "causal-lm": CausalLM,
}


def make(config: Config, train: Split, validation: Split) -> Task:
    """The task of a config, which names it; draws new weights from the global generator.

    Raises:
        ValueError: for a column, a row or a model that does not serve.
    """
    kinds: dict[str, type[Any]] = {**KINDS}
    if config.task == "image-classification":
        from nanoadam.finetuning.tasks.images import ImageClassification  # needs Pillow, which the others do not

        kinds[config.task] = ImageClassification
    if config.task is None:
        raise ValueError("there is no task: find it with columns.task_of first")
    kind = kinds[config.task]
    metric = config.metric or next(iter(kind.metrics))
    if metric not in kind.metrics:
        raise ValueError(f"{config.task} has no metric {metric!r}{nearest(metric, kind.metrics)}")
    if config.label_smoothing and config.task in ("text-regression", "multi-label-classification"):
        raise ValueError(f"label_smoothing is for one class a row, not for {config.task}: leave it out")
    made: Task = kind(config, train, validation)
    made.metric = metric
    return made
