"""Image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import UnidentifiedImageError
from transformers import EvalPrediction

from nanoadam.finetuning import data, images, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import CLASSIFICATION, Task, classification_metrics, label_options


def sources(split: Split, column: str) -> list[Any]:
    """What `images.decode` takes, for each row; all have been decoded once.

    Raises:
        ValueError: for an image that does not decode, naming its row.
    """
    base = Path(split.source.get("file", ".")).parent
    rows = split.rows.with_format(None)
    if hasattr(rows.features[column], "decode"):
        from datasets import Image as ImageFeature

        rows = rows.cast_column(column, ImageFeature(decode=False))
    found = []
    for number, value in enumerate(rows[column], start=1):
        source = str(base / value) if isinstance(value, str) else value
        try:
            images.decode(source)
        except (UnidentifiedImageError, OSError, TypeError, KeyError, SyntaxError, ValueError) as error:
            what = f" ({value})" if isinstance(value, str) else ""
            raise ValueError(
                f"row {number} of {split.name}{what} holds no image that can be decoded: {error}"
            ) from error
        found.append(source)
    return found


class ImageClassification(Task):
    """Accuracy, F1 and Matthews correlation."""

    metrics = CLASSIFICATION
    keeps_columns = True  # the images themselves are no input of the model

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._image = train.column("image_column", config.image_column, data.IMAGE)
        self._label = train.column("label_column", config.label_column, data.LABEL)
        for name in (self._image, self._label):
            validation.column(name, name, ())
        self.names = data.label_names(train, self._label)
        self.processor = models.load_image_processor(config)
        self.model = models.load_model(config, **label_options(self.names))
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = self._batch
        self.description = {"image": self._image, "label": self._label}

    def encode(self, split: Split) -> Dataset:
        """Rows whose images have all been decoded once."""
        labels = data.class_ids(split, self._label, self.names)
        return Dataset.from_dict({"image": sources(split, self._image), "labels": labels})

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.processor([images.decode(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three."""
        return classification_metrics(prediction)
