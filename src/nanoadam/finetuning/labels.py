"""What rows hold: classes, numbers, texts, and what of them cannot be learned from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from datasets import ClassLabel

from nanoadam.finetuning import columns
from nanoadam.finetuning.data import Split

MOST_CLASSES = 0.5
"""With more different labels than this share of the rows, they are no classes."""


def label_names(train: Split, column: str) -> list[str]:
    """The classes in the training set: a ClassLabel's own order, numbers by value, words by the alphabet.

    Raises:
        ValueError: if there are fewer than two, a row has none, or they are no classes at all.
    """
    feature = train.rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = train.rows[column]
    for index, value in enumerate(values):
        if value is None:
            raise ValueError(f"{train.where(index)} has no {column!r}")
        if isinstance(value, (list, dict)):
            several = "--task multi-label-classification for several labels a row, or " * isinstance(value, list)
            raise ValueError(f"{train.where(index)} has {_shown(value)} in {column!r}, which is no class: use "
                             f"{several}another column with --label-column")  # fmt: skip
        if isinstance(value, (float, Decimal)) and not _whole(value):
            raise ValueError(f"{train.where(index)} has {column!r} {value}: for numbers use --task text-regression")
    names = sorted({class_of(value) for value in values}, key=_order)
    if len(names) < 2:
        raise ValueError(f"{train.name} has one class only in column {column!r}: {names[0]!r}")
    if len(names) > max(20, MOST_CLASSES * len(values)):
        raise ValueError(
            f"{train.name} has {len(names)} different values in {column!r} among {len(values)} rows, which are no "
            "classes: use --task text-regression for numbers, or another --label-column"
        )
    return names


def _order(name: str) -> tuple[int, int, str]:
    digits = name.lstrip("-")
    return (0, int(name), name) if digits.isdecimal() and digits.isascii() and len(digits) < 400 else (1, 0, name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def class_of(value: Any) -> str:
    """The name of a class, from what a row has: whole numbers without a point, text as it is."""
    return str(int(value)) if isinstance(value, (float, Decimal)) and _whole(value) else str(value)


def _whole(value: float | Decimal) -> bool:
    return math.isfinite(value) and value == int(value)


def class_ids(split: Split, column: str, names: Sequence[str]) -> list[int]:
    """Each row's class.

    Raises:
        ValueError: for a row without a label, or one that is not in the training set.
    """
    feature = split.rows.features[column]
    own = list(feature.names) if isinstance(feature, ClassLabel) else None
    position = {name: i for i, name in enumerate(names)}
    ids = []
    for index, value in enumerate(split.rows[column]):
        if value is None or (own is not None and not 0 <= value < len(own)):
            raise ValueError(f"{split.where(index)} has no label ({column!r} is {value!r}): remove such rows")
        name = class_of(value) if own is None else own[value]
        known = position.get(name)
        if known is None:
            raise ValueError(
                f"{split.where(index)} has the label {name!r}, which is not in the training set (there: {_few(names)})"
            )
        ids.append(known)
    return ids


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def alike(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Classes that differ by letter case, spaces or leading zeros only: likely one class written in two ways."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(" ".join(name.lower().split()).lstrip("0") or "0", []).append(name)
    return [tuple(group) for group in found.values() if len(group) > 1]


def unlabelled(names: Sequence[str]) -> list[str]:
    """Classes whose names say elsewhere that a row has no label: SNLI's "-", and -1 beside 0."""
    return [name for name in names if name.strip().lower() in _NO_LABEL or (name == "-1" and "0" in names)]


_NO_LABEL = ("-", "?", "nan", "none", "null", "n/a", "na", "unknown", "unlabeled", "unlabelled")


def commas(names: Sequence[str]) -> str | None:
    """A class that looks like a number with a comma, if there is one."""
    return next((name for name in names if columns.has_comma(name)), None)


def sets_of_names(train: Split, column: str) -> list[str]:
    """The classes in the training set where a row has any number of them, as a list or as text with commas.

    Raises:
        ValueError: if there are none.
    """
    named = columns.names_of(train.rows.features[column])
    if named is not None:
        return named
    names = sorted({name for row in _sets(train, column) for name in row}, key=_order)
    if not names:
        raise ValueError(f"{train.name} has no label in any row of {column!r}: there is nothing to learn")
    return names


def _sets(split: Split, column: str) -> list[list[str]]:
    named = columns.names_of(split.rows.features[column])
    found = []
    for index, value in enumerate(split.rows[column]):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if value is None:
            value = []
        if not isinstance(value, list) or any(isinstance(part, (list, dict)) for part in value):
            raise ValueError(f"{split.where(index)} has {_shown(value)} in {column!r}, which is no list of labels")
        if any(part is None or (named is not None and not 0 <= part < len(named)) for part in value):
            raise ValueError(f"{split.where(index)} has a label that {column!r} has no name for: {_shown(value)}")
        found.append([class_of(part) if named is None else named[part] for part in value])
    return found


def class_sets(split: Split, column: str, names: Sequence[str]) -> list[list[float]]:
    """For each row a 1 for each of its classes and a 0 for the others.

    Raises:
        ValueError: for a label that is not in the training set.
    """
    position = {name: i for i, name in enumerate(names)}
    rows = []
    for index, labels in enumerate(_sets(split, column)):
        row = [0.0] * len(names)
        for label in labels:
            if label not in position:
                raise ValueError(
                    f"{split.where(index)} has the label {label!r}, which is not in the training set (there: "
                    f"{_few(names)})"
                )
            row[position[label]] = 1.0
        rows.append(row)
    return rows


def numbers(split: Split, column: str, comma: bool = False) -> list[float]:
    """Each row's target.

    Args:
        split: the rows.
        column: which of their columns.
        comma: whether numbers in text have a decimal comma.

    Raises:
        ValueError: for what is no finite number, or may be two.
    """
    found = []
    for index, value in enumerate(split.rows[column]):
        if not comma and columns.has_comma(value):
            raise ValueError(
                f"{split.where(index)} has {_shown(value)} in {column!r}, whose comma may be a decimal one or not: "
                "write all numbers without a comma, and with a point for decimals"
            )
        try:
            target = columns.number_of(value, comma)
        except (TypeError, ValueError, OverflowError):
            target = math.nan
        if not math.isfinite(target):
            raise ValueError(f"{split.where(index)} has {_shown(value)} in {column!r}, which is no finite number (for "
                             "classes use --task text-classification)")  # fmt: skip
        found.append(target)
    return found


def texts(split: Split, column: str, empty: bool = False) -> list[str]:
    """Each row's text.

    Args:
        split: the rows.
        column: which of their columns.
        empty: take a row that has none as an empty one.

    Raises:
        ValueError: for what is no text.
    """
    found = []
    for index, value in enumerate(split.rows[column]):
        if value is None and empty:
            value = ""
        if not isinstance(value, str):
            raise ValueError(f"{split.where(index)} has {_shown(value)} in {column!r}, which is no text")
        found.append(value)
    return found


def counts(ids: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """How many rows each class has, the largest first."""
    found = Counter(ids)
    return {names[i]: found[i] for i in sorted(range(len(names)), key=lambda i: -found[i])}
