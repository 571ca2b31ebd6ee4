"""The splits of a run: rows from local files and hub ids, where each row is from, and the validation split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset

from nanoadam.finetuning import columns, files
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.files import Reading, Rows

Made = TypeVar("Made")

LABEL, TEXT, PROMPT, COMPLETION, IMAGE = (
    columns.LABEL,
    columns.TEXT,
    columns.PROMPT,
    columns.COMPLETION,
    columns.IMAGE,
)
PAIR = ("text2", "sentence2", "hypothesis", "question2", "answer")


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split and where they are from.

    Args:
        rows: the rows.
        name: of the file or the hub id.
        source: for the manifest.
        places: for each row its place in the file, counted from 0; None where it is the same.
        lines: for each place in the file its line; None where there are no lines or they are the places.
        plain: whether it is running text.
    """

    rows: Dataset
    name: str
    source: dict[str, Any]
    places: Sequence[int] | None = None
    lines: Sequence[int] | None = None
    plain: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The row of the file that a row of this split is, in words."""
        place = index if self.places is None else self.places[index]
        row = f"row {place + 1} of {self.name}"
        if self.lines is None or self.lines[place] == place + 1:
            return row
        return f"{row} (line {self.lines[place]})"

    def some(self, chosen: Sequence[int], name: str | None = None, **source: Any) -> Split:
        """A part of it, whose rows still know their places."""
        places = [index if self.places is None else self.places[index] for index in chosen]
        found = {**self.source, **source}
        return dataclasses.replace(
            self, rows=self.rows.select(chosen), places=places, name=name or self.name, source=found
        )

    def column(self, option: str, wanted: str | None, guesses: Sequence[str]) -> str:
        """The name of the column that holds something.

        Raises:
            ValueError: if the wanted one is not there, or none of the guesses is.
        """
        return columns.find(self.name, self.rows, option, wanted, guesses)

    def has(self, guesses: Sequence[str]) -> bool:
        """Whether one of the guesses is a column."""
        return any(name.lower() in guesses for name in self.rows.column_names)


def load(config: Config) -> tuple[Split, Split]:
    """The training and the validation split.

    Raises:
        ValueError: for a file that is not there or cannot be read, a hub id that cannot be had, or an empty split.
    """
    reading = Reading(config.columns, config.delimiter, config.encoding)
    train = _load(config.train, reading)
    if config.validation is not None:
        validation = _load(config.validation, dataclasses.replace(reading, beside=True))
    else:
        if len(train) < 2:
            count = f"{len(train)} row{'s' if len(train) != 1 else ''}"
            raise ValueError(f"{train.name} has {count}, of which no validation split can be taken")
        chosen, how = split_off(train, config)
        share = f"{100 * config.validation_share:g} % of {train.name}, {how}"
        left = sorted(set(range(len(train))) - set(chosen))
        validation = train.some(chosen, split=share)
        train = train.some(left, split="all but the validation split")
    return _some(train, config.train_rows), _some(validation, config.validation_rows)


def split_off(train: Split, config: Config) -> tuple[list[int], str]:
    """Which rows become the validation split: of every class the same share, of running text the end.

    Returns:
        The rows, in their order, and how they were chosen, in words.
    """
    count = min(len(train) - 1, max(1, round(config.validation_share * len(train))))
    if train.plain:
        return list(range(len(train) - count, len(train))), "its end"
    generator = random.Random(config.seed)
    shuffled = generator.sample(range(len(train)), len(train))
    label = config.label_column or next(
        (name for guess in LABEL for name in train.rows.column_names if name.lower() == guess), None
    )
    how = f"drawn with seed {config.seed}"
    if label in train.rows.column_names:
        classes = [json.dumps(value, default=repr) for value in train.rows[label]]
        if len(set(classes)) <= len(train) / 5:  # numbers and texts have no classes to keep in balance
            shuffled.sort(key=classes.__getitem__)
            how += ", the same share of every class"
    step = len(train) / count
    start = generator.random() * step
    return sorted(shuffled[min(len(train) - 1, int(start + i * step))] for i in range(count)), how


def read(name: str, reading: Reading | None = None) -> Split:
    """All rows of a file, a folder of images or a split on the hub; by default a table names its columns itself.

    Raises:
        ValueError: as `load`.
    """
    return _some(_load(name, reading or Reading()), None)


def stamp(name: str) -> tuple[Any, ...]:
    """What tells a file or folder from what it was before it was changed."""
    path = Path(name).expanduser()
    if not path.exists():
        return (name,)
    entries = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    return (str(path.resolve()), *((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in entries))


_REMEMBERED: dict[Any, Any] = {}
_MOST_REMEMBERED = 16


def remembered(key: Any, make: Callable[[], Made]) -> Made:
    """What was made for a key before in this process: one that does many runs reads and encodes their data once."""
    if key not in _REMEMBERED:
        made = make()
        while len(_REMEMBERED) >= _MOST_REMEMBERED:
            del _REMEMBERED[next(iter(_REMEMBERED))]
        _REMEMBERED[key] = made
    found: Made = _REMEMBERED[key]
    return found


def key(config: Config) -> tuple[Any, ...]:
    """Everything that decides the rows of a config and how they are encoded."""
    own = [f.name for f in dataclasses.fields(config) if f.metadata["section"] == "data"]
    split_off = config.seed if config.validation is None else None
    named = [stamp(name) for name in (config.train, config.validation, config.tokenizer or config.model) if name]
    model = (config.task, config.model, config.revision, config.new_head)
    return (*model, split_off, *named, *(getattr(config, name) for name in own))


def _some(split: Split, count: int | None) -> Split:
    """That many rows in their order, drawn at random: files are often sorted by label. The same ones at every seed."""
    if len(split) == 0:
        raise ValueError(f"{split.name} is empty: there is nothing to learn from or to measure")
    if count is not None and count < len(split):
        chosen = list(range(count)) if split.plain else sorted(random.Random(0).sample(range(len(split)), count))
        split = split.some(chosen)
    source = {**split.source, "rows": len(split), "sha256_of_rows": _digest(split.rows)}
    return dataclasses.replace(split, source=source)


def _digest(rows: Dataset) -> str:
    """Of the content, in order, whatever file it came from."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps(batch.to_pylist(), default=_plain, ensure_ascii=False).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def _load(name: str, reading: Reading) -> Split:
    path = Path(name).expanduser()
    if path.is_dir():
        from nanoadam.finetuning.images import read_folder

        rows, digest = read_folder(path)
        return Split(rows, path.name, {"folder": str(path.resolve()), "sha256": digest})
    if path.is_file():
        found: Rows = files.read(path, reading)
        source = {"file": str(path.resolve()), "sha256": files.digest(path)}
        return Split(found.rows, path.name, source, None, found.lines, found.plain)
    if files.format_of(path) in files.READERS or name.startswith(("/", ".", "~")):
        raise files.missing(path)
    return _hub(name)


def _hub(name: str) -> Split:
    """`id[:config]@split`."""
    from datasets import load_dataset

    whole, _, split = name.partition("@")
    identity, _, subset = whole.partition(":")
    if not split:
        raise ValueError(f"{name!r} is no file; for data from the hub say which split: {name}@train")
    try:
        rows = load_dataset(identity, subset or None, split=split)
    except Exception as error:  # the library raises dozens of kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{name!r} could not be had from the hub ({reason}). Without network, pass a local file: "
            f"{', '.join(files.READERS)}"
        ) from error
    version = str(rows.info.version) if rows.info.version else None
    return Split(rows, name, {"hub": identity, "config": subset or None, "split": split, "version": version,
                              "checksums": sorted(rows.info.download_checksums or ())})  # fmt: skip
