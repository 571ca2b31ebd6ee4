"""Image classification: folders of images, arrays, or tables that name or hold images."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from transformers import EvalPrediction

from nanoadam.lab import data, models, tasks, vision
from nanoadam.lab.config import Config
from nanoadam.lab.data import Split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_folder(folder: Path) -> tuple[Dataset, str]:
    """One row for each image in a folder of folders, which are the labels; and the SHA-256 of names and contents.

    Raises:
        ValueError: if there is no image in any subfolder.
    """
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"the folder {folder} holds no images: it must have one subfolder of images for each label")
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    rows = {"image": [str(file.resolve()) for file in files], "label": [file.parent.name for file in files]}
    return Dataset.from_dict(rows), digest.hexdigest()


def read_npz(path: Path) -> Dataset:
    """Rows from the arrays of an npz file.

    Raises:
        ValueError: as `vision.read_arrays`, and if it is no npz file.
    """
    try:
        images, labels = vision.read_arrays(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an npz file of arrays: {error}") from error
    return Dataset.from_dict({"image": [_png(image) for image in images], "label": labels.tolist()})


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def decode(source: Any) -> Image.Image:
    """The image at a path or in bytes, as RGB."""
    if isinstance(source, dict):  # as datasets stores images
        source = source["bytes"] or source["path"]
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.convert("RGB")


def sources(split: Split, column: str) -> list[Any]:
    """What `decode` takes, for each row; all have been decoded once.

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
            decode(source)
        except (UnidentifiedImageError, OSError, TypeError, KeyError, SyntaxError, ValueError) as error:
            what = f" ({value})" if isinstance(value, str) else ""
            raise ValueError(
                f"row {number} of {split.name}{what} holds no image that can be decoded: {error}"
            ) from error
        found.append(source)
    return found


class ImageClassification(tasks.Task):
    """Accuracy, F1 and Matthews correlation."""

    metrics = tasks.CLASSIFICATION
    keeps_columns = True  # the images themselves are no input of the model

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._image = train.column("image_column", config.image_column, data.IMAGE)
        self._label = train.column("label_column", config.label_column, data.LABEL)
        for name in (self._image, self._label):
            validation.column(name, name, ())
        self.names = data.label_names(train, self._label)
        self.processor = models.load_image_processor(config)
        self.model = models.load_model(config, **tasks.label_options(self.names))
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = self._batch
        self.description = {"image": self._image, "label": self._label}

    def encode(self, split: Split) -> Dataset:
        """Rows whose images have all been decoded once."""
        labels = data.class_ids(split, self._label, self.names)
        return Dataset.from_dict({"image": sources(split, self._image), "labels": labels})

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.processor([decode(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """All three."""
        return tasks.classification_metrics(prediction)
