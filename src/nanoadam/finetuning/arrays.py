"""Arrays in npz files, images and their labels among them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any


def read_npz(path: Path) -> dict[str, Any]:
    """Every array of an npz file, by name.

    Raises:
        ValueError: if it is none, or a broken one; pickled objects are never loaded.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as an npz file of arrays: {error}") from error


def read_arrays(path: Path) -> tuple[Any, Any]:
    """Images and labels of an npz file: arrays `images` (uint8 [n, height, width(, 3)]) and `labels` ([n]).

    Raises:
        ValueError: if the file holds anything else; pickled objects are never loaded.
    """
    import numpy as np

    found = read_npz(path)
    if not {"images", "labels"} <= found.keys():
        raise ValueError(f"{path} must hold the arrays images and labels, and holds {', '.join(found) or 'none'}")
    images, labels = found["images"], found["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise ValueError(
            f"{path} must hold uint8 images [n, height, width(, 3)] and as many labels, and holds {images.dtype} "
            f"{list(images.shape)} and {len(labels)}"
        )
    return images, labels
