"""Image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import UnidentifiedImageError
from transformers import EvalPrediction

from nanoadam.finetuning import columns, images, labels, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import (
    CLASSIFICATION,
    Task,
    class_details,
    classification_metrics,
    label_options,
    logits_of,
    majority,
    right_and_wrong,
    shortened,
    softmax,
)


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
    for index, value in enumerate(rows[column]):
        source = str(base / value) if isinstance(value, str) else value
        try:
            if not isinstance(source, (str, bytes, dict)):
                raise TypeError(f"{source!r} is neither a path nor bytes")
            images.decode(source)
        except (UnidentifiedImageError, OSError, TypeError, KeyError, SyntaxError, ValueError) as error:
            what = f" ({value})" if isinstance(value, str) else ""
            raise ValueError(f"{split.where(index)}{what} holds no image that can be decoded: {error}") from error
        found.append(source)
    return found


class ImageClassification(Task):
    """Accuracy, F1 and Matthews correlation."""

    metrics = CLASSIFICATION
    keeps_columns = True  # the images themselves are no input of the model

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self.roles = columns.of_images(train.name, train.rows, config)
        self._image, self._label = self.roles.texts[0], str(self.roles.label)
        for name in self.roles.read:
            validation.column(name, name, ())
        self.splits = (train, validation)
        self.names = labels.label_names(train, self._label)
        self.processor = models.load_image_processor(config)
        self.model, self.head, self.names = models.load_classifier(config, self.names, label_options)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = self._batch
        self.description = {
            "image": self._image,
            "label": self._label,
            "ignored": list(self.roles.ignored),
            "classes": labels.counts(self.train["labels"], self.names),
        }

    def encode(self, split: Split) -> Dataset:
        """Rows whose images have all been decoded once."""
        ids = labels.class_ids(split, self._label, self.names)
        return Dataset.from_dict({"image": sources(split, self._image), "labels": ids})

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.processor([images.decode(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three."""
        return classification_metrics(prediction)

    def baseline(self) -> dict[str, float]:
        """Of always guessing the commonest class."""
        return majority(self.train["labels"], self.validation["labels"])

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """Each class, the confusion matrix, and some images guessed right and wrong, by their paths or rows."""
        shares = softmax(logits_of(prediction))
        guesses, true = shares.argmax(axis=-1), np.asarray(prediction.label_ids)
        chosen = right_and_wrong(guesses, true, shares.max(axis=-1), samples)
        rows = [
            {"text": self._shown(i), "label": self.names[true[i]], "predicted": self.names[guesses[i]],
             "right": bool(guesses[i] == true[i]), "sure": float(shares[i].max())}
            for i in chosen
        ]  # fmt: skip
        return {**class_details(guesses, true, self.names), "samples": rows}

    def _shown(self, index: int) -> str:
        value = self.validation[index]["image"]
        return shortened("/".join(Path(value).parts[-2:])) if isinstance(value, str) else self.splits[1].where(index)
