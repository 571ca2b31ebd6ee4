"""Rows to learn from: local files and hub ids, the columns that hold what, and what can be wrong with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset

from nanoadam.finetuning.config import Config
from nanoadam.text import nearest

TEXT = ("text", "sentence", "sentence1", "premise", "question1", "question", "review")
IMAGE = ("image", "img", "file", "path")
LABEL = ("label", "labels", "target", "score", "class")
PAIR = ("text2", "sentence2", "hypothesis", "question2", "answer")
PROMPT = ("prompt", "question", "instruction", "input")
COMPLETION = ("completion", "answer", "response", "output")
MESSAGES = ("messages", "conversation", "conversations")

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split and where they are from."""

    rows: Dataset
    name: str
    source: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, option: str, wanted: str | None, guesses: Sequence[str]) -> str:
        """The name of the column that holds something.

        Raises:
            ValueError: if the wanted one is not there, or none of the guesses is.
        """
        names: list[str] = self.rows.column_names
        if wanted is not None:
            if wanted not in names:
                raise ValueError(f"{self.name} has no column {wanted!r} ({option}){nearest(wanted, names)}")
            return wanted
        found = next((name for guess in guesses for name in names if name.lower() == guess), None)
        if found is None:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{self.name} has no column called {' or '.join(guesses)}: name it with {flag}"
                             f" (there are: {', '.join(names)})")  # fmt: skip
        return found

    def has(self, guesses: Sequence[str]) -> bool:
        """Whether one of the guesses is a column."""
        return any(name.lower() in guesses for name in self.rows.column_names)


def load(config: Config) -> tuple[Split, Split]:
    """The training and the validation split.

    Raises:
        ValueError: for a file that is not there or cannot be read, a hub id that cannot be had, or an empty split.
    """
    train = _load(config.train, config.columns)
    if config.validation is not None:
        validation = _load(config.validation, config.columns)
    else:
        if len(train) < 2:
            raise ValueError(f"{train.name} has {len(train)} rows, of which no validation split can be taken")
        parts = train.rows.train_test_split(test_size=config.validation_share, seed=config.seed)
        share = f"{100 * config.validation_share:g} % of {train.name}, drawn with seed {config.seed}"
        validation = Split(parts["test"], share, {**train.source, "split": share})
        train = Split(parts["train"], train.name, {**train.source, "split": "all but the validation split"})
    return _some(train, config.train_rows), _some(validation, config.validation_rows)


def read(name: str) -> Split:
    """All rows of a file, a folder of images or a split on the hub; a table names its columns itself.

    Raises:
        ValueError: as `load`.
    """
    return _some(_load(name, ()), None)


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
    files = [stamp(name) for name in (config.train, config.validation, config.tokenizer or config.model) if name]
    return (config.task, config.model, config.revision, split_off, *files, *(getattr(config, name) for name in own))


def _some(split: Split, count: int | None) -> Split:
    """That many rows in their order, drawn at random: files are often sorted by label. The same ones at every seed."""
    if len(split) == 0:
        raise ValueError(f"{split.name} is empty: there is nothing to learn from or to measure")
    rows = split.rows
    if count is not None and count < len(split):
        rows = rows.select(sorted(random.Random(0).sample(range(len(split)), count)))
    source = {**split.source, "rows": len(rows), "sha256_of_rows": _digest(rows)}
    return Split(rows, split.name, source)


def _digest(rows: Dataset) -> str:
    """Of the content, in order, whatever file it came from."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps(batch.to_pylist(), default=_plain, ensure_ascii=False).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _load(name: str, columns: Sequence[str]) -> Split:
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        from nanoadam.finetuning.images import read_folder

        rows, digest = read_folder(path)
        return Split(rows, path.name, {"folder": str(path.resolve()), "sha256": digest})
    if path.is_file():
        if suffix not in READERS:
            raise ValueError(f"{path} has an unknown format {suffix or 'without a suffix'}{nearest(suffix, READERS)}")
        rows = READERS[suffix](path, columns)
        return Split(rows, path.name, {"file": str(path.resolve()), "sha256": _file_digest(path)})
    if suffix in READERS or name.startswith(("/", ".", "~")):
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {path}{nearest(path.name, near)}")
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
            f"{', '.join(READERS)}"
        ) from error
    version = str(rows.info.version) if rows.info.version else None
    return Split(rows, name, {"hub": identity, "config": subset or None, "split": split, "version": version,
                              "checksums": sorted(rows.info.download_checksums or ())})  # fmt: skip


# Files ---------------------------------------------------------------------------------------------------


def utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if it is in another encoding, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _jsonl(path: Path, _: Sequence[str]) -> Dataset:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error.msg} at column {error.colno}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} of {path} is no UTF-8 text: {error.reason}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {path} is no JSON object, but {type(row).__name__}")
            rows.append(row)
    return _rows(path, rows)


def _json(path: Path, _: Sequence[str]) -> Dataset:
    try:
        content = json.loads(utf8(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} of {path} is no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} must hold a list of objects; for one object a line, call it .jsonl")
    return _rows(path, content)


def _rows(path: Path, rows: list[dict[str, Any]]) -> Dataset:
    import pyarrow

    try:
        return Dataset.from_list(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"{path} mixes types within a column: {error}") from error


def _table(separator: str) -> Callable[[Path, Sequence[str]], Dataset]:
    def read(path: Path, columns: Sequence[str]) -> Dataset:
        import csv

        import pandas

        # GLUE's TSV files hold quotation marks that quote nothing.
        quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        names = list(columns) or None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)  # fewer names than there are columns
                frame = pandas.read_csv(
                    path, sep=separator, quoting=quoting, names=names, header=None if names else 0, index_col=False,
                    keep_default_na=False, na_values=[""],
                )  # fmt: skip
        except pandas.errors.EmptyDataError:
            return Dataset.from_list([])
        except pandas.errors.ParserWarning as error:
            raise ValueError(
                f"{path} has more columns than names ({', '.join(columns)}): name all with --columns"
                if names
                else f"{path} has rows with more fields than its first line names"
            ) from error
        except (pandas.errors.ParserError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as a table: {error}") from error
        return Dataset.from_pandas(frame, preserve_index=False)

    return read


def _parquet(path: Path, _: Sequence[str]) -> Dataset:
    import pyarrow
    from pyarrow import parquet

    try:
        return Dataset(parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _npz(path: Path, _: Sequence[str]) -> Dataset:
    from nanoadam.finetuning.images import read_npz

    return read_npz(path)


READERS: dict[str, Callable[[Path, Sequence[str]], Dataset]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".npz": _npz,
}


# Labels --------------------------------------------------------------------------------------------------


def label_names(train: Split, column: str) -> list[str]:
    """The classes in the training set: a ClassLabel's own order, numbers by value, words by the alphabet.

    Raises:
        ValueError: if there are fewer than two, or a row has none.
    """
    feature = train.rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = train.rows[column]
    for number, value in enumerate(values, start=1):
        if value is None:
            raise ValueError(f"row {number} of {train.name} has no {column!r}")
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"row {number} of {train.name} has {column!r} {value!r}: for numbers use "
                             "--task text-regression")  # fmt: skip
    found = {_class(value) for value in values}
    names = sorted(found, key=lambda name: (0, int(name), name) if name.lstrip("-").isdigit() else (1, 0, name))
    if len(names) < 2:
        raise ValueError(f"{train.name} has one class only in column {column!r}: {names[0]!r}")
    return names


def _class(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def class_ids(split: Split, column: str, names: Sequence[str]) -> list[int]:
    """Each row's class.

    Raises:
        ValueError: for a label that is not in the training set.
    """
    feature = split.rows.features[column]
    if isinstance(feature, ClassLabel) and list(feature.names) == list(names):
        return [int(value) for value in split.rows[column]]
    position = {name: i for i, name in enumerate(names)}
    ids = []
    for number, value in enumerate(split.rows[column], start=1):
        known = position.get(_class(value))
        if known is None:
            raise ValueError(
                f"row {number} of {split.name} has the label {_class(value)!r}, which is not in the training set"
                f"{nearest(_class(value), names)}"
            )
        ids.append(known)
    return ids


def numbers(split: Split, column: str) -> list[float]:
    """Each row's target.

    Raises:
        ValueError: for what is no finite number.
    """
    found = []
    for number, value in enumerate(split.rows[column], start=1):
        try:
            target = float(value)
        except (TypeError, ValueError):
            target = math.nan
        if not math.isfinite(target):
            raise ValueError(f"row {number} of {split.name} has {value!r} in {column!r}, which is no finite number")
        found.append(target)
    return found


def texts(split: Split, column: str) -> list[str]:
    """Each row's text.

    Raises:
        ValueError: for what is no text.
    """
    found = split.rows[column]
    for number, value in enumerate(found, start=1):
        if not isinstance(value, str):
            raise ValueError(f"row {number} of {split.name} has {value!r} in {column!r}, which is no text")
    return list(found)
