"""Images: folders of them, arrays, and one image from its path or bytes."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from nanoadam.finetuning import arrays

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
        ValueError: as `arrays.read_arrays`, and if it is no npz file.
    """
    try:
        images, labels = arrays.read_arrays(path)
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
