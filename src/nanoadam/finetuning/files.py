"""Rows from files: JSON, JSON lines, CSV, TSV, Excel, Parquet, text, arrays and folders of images."""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import difflib
import gzip
import hashlib
import io
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DELIMITERS = (",", ";", "\t", "|")
HEADER_WORDS = frozenset(
    word
    for words in (
        "text sentence sentence1 sentence2 premise hypothesis question question1 question2 label labels target prompt",
        "completion review id idx index instruction input output answer title score class category sentiment tweet",
        "comment content rating stars intent emotion response query passage topic language",
    )
    for word in words.split()
)
"""First lines of tables are made of such words, rows are not."""

_INT64 = range(-(2**63), 2**63)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How tables and texts are to be read.

    Args:
        columns: names for tables without a header.
        delimiter: between the fields of a table; found by default.
        encoding: of text; UTF-8, or UTF-16 with its mark, by default.
        beside: whether it is a file beside the one that the others were given for: what it says itself wins, be it a
            header, another delimiter or UTF-8.
    """

    columns: tuple[str, ...] = ()
    delimiter: str | None = None
    encoding: str | None = None
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a file holds.

    Args:
        rows: the rows.
        lines: for each row the line of the file that it begins at; None where row 1 is line 1 and so on, or where
            there are no lines.
        plain: whether it is running text, whose rows belong together in their order.
    """

    rows: Dataset
    lines: Sequence[int] | None = None
    plain: bool = False


def format_of(path: Path) -> str:
    """The suffix that says how to read a file: ".csv" of "x.csv.gz"."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


def read(path: Path, reading: Reading) -> Rows:
    """All rows of a file.

    Raises:
        ValueError: for a format that is not known, or a file that is not what its name says; names the line.
    """
    suffix = format_of(path)
    if suffix not in READERS:
        raise ValueError(
            f"{path} has an unknown format, {suffix or 'no suffix at all'}: give one of {', '.join(READERS)} (also "
            f"packed: {', '.join(PACKED)})"
        )
    return READERS[suffix](path, reading)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def text_of(path: Path, encoding: str | None = None, beside: bool = False) -> str:
    """The text of a file, unpacked; with `beside` the encoding is for what is not UTF-8.

    Raises:
        ValueError: if it is in another encoding, or no text.
    """
    opener = PACKED.get(path.suffix.lower())
    try:
        raw: bytes = path.read_bytes() if opener is None else opener(path).read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    if beside and encoding is not None:
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode("utf-8-sig")
    chosen = encoding or ("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    try:
        text = raw.decode(chosen)
    except LookupError as error:
        raise ValueError(f"there is no encoding {encoding!r}: try utf-8, cp1252, latin-1, utf-16 or gb18030") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        said = f"no {encoding} text" if encoding else "no UTF-8 text"
        raise ValueError(
            f"line {line} of {path} is {said} ({error.reason}): say which encoding it is, like --encoding cp1252"
        ) from error
    if text[:1000].count("\0") > len(text[:1000]) / 4:
        raise ValueError(f"{path} is full of zero bytes: say which encoding it is, like --encoding utf-16-le")
    return text


def _text(path: Path, reading: Reading) -> str:
    return text_of(path, reading.encoding, reading.beside)


# JSON -----------------------------------------------------------------------------------------------------


def _jsonl(path: Path, reading: Reading) -> Rows:
    text = _text(path, reading)
    if text.lstrip().startswith("["):  # a list of rows, under the other name
        with contextlib.suppress(ValueError, RecursionError):
            return _json(path, reading)
    return _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Rows:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error.msg} at column {error.colno}") from error
        except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
            raise ValueError(f"line {number} of {path} cannot be read as JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is no JSON object, but {type(row).__name__}")
        rows.append(row)
        lines.append(number)
    return Rows(_dataset(path, rows, lines), lines)


def _json(path: Path, reading: Reading) -> Rows:
    text = _text(path, reading)
    if not text.strip():
        return Rows(Dataset.from_list([]))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line
            return _json_lines(path, text)
        raise ValueError(f"line {error.lineno} of {path} is no JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(content, dict):
        content = _rows_in(path, content)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} must hold a list of objects, or one object a line")
    return Rows(_dataset(path, content, None))


def _rows_in(path: Path, content: dict[str, Any]) -> Any:
    """The rows of one object: its only list, its lists as columns where they are alike, or itself as a row."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    tables = [key for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)]
    if len(tables) > 1:
        raise ValueError(f"{path} holds {len(tables)} lists of rows ({', '.join(tables)}): save each as a file")
    if len(lists) < 2:
        return next(iter(lists.values()), [content])
    counts = {len(value) for value in lists.values()}
    plain = not any(isinstance(item, (list, dict)) for value in lists.values() for item in value)
    if len(lists) == len(content) and len(counts) == 1 and plain and not {"tokens", "words"} & lists.keys():
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return [content]


def _dataset(path: Path, rows: list[dict[str, Any]], lines: Sequence[int] | None) -> Dataset:
    """Rows as a table; every key of any row is a column."""
    import pyarrow

    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, int) and value not in _INT64 for value in values):
            values = [None if value is None else str(value) for value in values]  # an id that no integer type holds
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise ValueError(_what_is_wrong(path, name, values, lines, error)) from error
    return Dataset(pyarrow.table(columns)) if columns else Dataset.from_list([])


def _what_is_wrong(
    path: Path, name: str, values: list[Any], lines: Sequence[int] | None, error: Exception
) -> str:  # fmt: skip
    def where(index: int) -> str:
        return f"row {index + 1} of {path}" if lines is None else f"line {lines[index]} of {path}"

    for index, value in enumerate(values):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"{where(index)} has half of a surrogate pair in {name!r}, which is no text: remove or mend it"
    kinds = [None if value is None else _KINDS.get(type(value), "something else") for value in values]
    first = next((kind for kind in kinds if kind is not None), None)
    other = next((i for i, kind in enumerate(kinds) if kind not in (None, first)), None)
    if other is None:
        return f"{path} mixes types within the column {name!r}: {' '.join(str(error).split())[:150]}"
    return (
        f"{path} mixes types within a column: {where(other)} has {kinds[other]} in {name!r}, where rows before have "
        f"{first}"
    )


_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


# Tables ---------------------------------------------------------------------------------------------------


def _csv(path: Path, reading: Reading) -> Rows:
    text = _text(path, reading)
    return _table(path, text, _chosen_delimiter(text, reading) or _delimiter(text), csv.QUOTE_MINIMAL, reading)


def _tsv(path: Path, reading: Reading) -> Rows:
    # GLUE's TSV files hold quotation marks that quote nothing.
    text = _text(path, reading)
    return _table(path, text, _chosen_delimiter(text, reading) or "\t", csv.QUOTE_NONE, reading)


def _chosen_delimiter(text: str, reading: Reading) -> str | None:
    given = reading.delimiter
    return None if given is not None and reading.beside and given not in text.partition("\n")[0] else given


def _delimiter(text: str) -> str:
    """The one that cuts the first lines into the same number of fields, more than one; a comma if none does."""
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text[:100_000], newline=""), delimiter=delimiter)
        try:
            counts = {len(fields) for _, fields in zip(range(20), reader, strict=False) if fields}
        except csv.Error:
            continue
        if len(counts) == 1 and counts != {1}:
            return delimiter
    head = text.partition("\n")[0]
    return max(DELIMITERS, key=head.count) if any(d in head for d in DELIMITERS) else ","


def _table(path: Path, text: str, delimiter: str, quoting: int, reading: Reading) -> Rows:
    """Every field is text: what looks like a number may be a code, like 007."""
    if len(delimiter) != 1:
        raise ValueError(f"--delimiter must be one character, got {delimiter!r}")
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for fields in reader:
            if fields:
                rows.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line} of {path} cannot be read as a table: {error}") from error
    if not rows:
        return Rows(Dataset.from_list([]))
    names, own = _names(path, rows, reading)
    if own:
        del rows[0], lines[0]
    for fields, number in zip(rows, lines, strict=True):
        if fields == names and len(names) > 1:
            raise ValueError(
                f"line {number} of {path} names the columns again, as two tables in one file do: remove it"
            )
        if len(fields) != len(names):
            raise ValueError(_ragged(path, number, len(fields), names, delimiter, not own))
    values = {name: [row[i] or None for row in rows] for i, name in enumerate(names)}
    return Rows(_texts(values), lines)


def _texts(values: dict[str, list[str | None]]) -> Dataset:
    import pyarrow

    return Dataset(pyarrow.table({name: pyarrow.array(found, pyarrow.string()) for name, found in values.items()}))


def _header(path: Path, fields: Sequence[str]) -> list[str]:
    names = [field.strip() or f"unnamed {number}" for number, field in enumerate(fields, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} names the column {twice!r} twice: rename one, or name them with --columns")
    return names


def _names(path: Path, rows: Sequence[Sequence[str | None]], reading: Reading) -> tuple[list[str], bool]:
    """The names of a table's columns, and whether they are its first line.

    Raises:
        ValueError: if both name them, differently.
    """
    columns, fields = reading.columns, [field or "" for field in rows[0]]
    if not columns:
        return _header(path, fields), True
    found = [field.strip().lower() for field in fields]
    if found == [name.lower() for name in columns]:
        return list(columns), True
    known = len(set(found) & HEADER_WORDS)
    if known > 1 or (known and (len(found) == 1 or _stands_out(fields, rows[1:]))):
        if reading.beside:
            return _header(path, fields), True
        raise ValueError(
            f"the first line of {path} seems to name its columns ({', '.join(fields)}), but --columns names others "
            f"({', '.join(columns)}): leave out --columns, or remove that line"
        )
    return list(columns), False


def _stands_out(fields: Sequence[str], rows: Sequence[Sequence[str | None]]) -> bool:
    """Whether no field of a line is in its column again, though some of these columns repeat what they hold."""
    columns = [[row[i] for row in rows if i < len(row)] for i in range(len(fields))]
    alone = all(field not in column for field, column in zip(fields, columns, strict=True))
    return alone and any(len(set(column)) <= len(column) / 2 for column in columns)


def _ragged(path: Path, line: int, count: int, names: Sequence[str], delimiter: str, given: bool) -> str:
    if given and count > len(names):
        return f"{path} has more columns than names ({', '.join(names)}): name all {count} with --columns"
    if given:
        return f"line {line} of {path} has {count} fields where --columns names {len(names)} ({', '.join(names)})"
    return (
        f"line {line} of {path} has {count} fields where its first line names {len(names)}: quote fields that hold "
        f"{delimiter!r}, or name another with --delimiter"
    )


def _xlsx(path: Path, reading: Reading) -> Rows:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading Excel files needs openpyxl: pip install openpyxl, or save as CSV") from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        found = [[_cell(value) for value in row] for row in book.worksheets[0].iter_rows(values_only=True)]
    except Exception as error:  # whatever a zip file, its XML or the library has to say
        raise ValueError(f"{path} cannot be read as an Excel file: {error}") from error
    numbered = [(i, row) for i, row in enumerate(found, start=1) if any(row)]
    if not numbered:
        return Rows(Dataset.from_list([]))
    width = max(len(row) for _, row in numbered)
    numbered[0][1].extend([None] * (width - len(numbered[0][1])))  # what only later rows have is a column too
    names, own = _names(path, [row for _, row in numbered], reading)
    if own:
        del numbered[0]
    values = {name: [row[i] if i < len(row) else None for _, row in numbered] for i, name in enumerate(names)}
    return Rows(_texts(values), [i for i, _ in numbered])


def _cell(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" else str(value)


def _parquet(path: Path, _: Reading) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        return Rows(Dataset(parquet.read_table(path)))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from error


# Text and images ------------------------------------------------------------------------------------------


def _txt(path: Path, reading: Reading) -> Rows:
    """A row for each paragraph, or for each line where no line is empty."""
    text = _text(path, reading).replace("\r\n", "\n")
    if all(line.startswith("{") and line.endswith("}") for line in text.split("\n")[:20] if line) and text.strip():
        raise ValueError(f"{path} seems to hold JSON lines, not text: call it .jsonl")
    mark = "\n\n" if "\n\n" in text.strip() else "\n"
    parts, lines, line = [], [], 1
    for part in text.split(mark):
        if part.strip():
            parts.append(part)
            lines.append(line)
        line += part.count("\n") + len(mark)
    return Rows(_texts({"text": list(parts)}), lines, plain=True)


def _npz(path: Path, _: Reading) -> Rows:
    from nanoadam.finetuning.images import read_npz

    return Rows(read_npz(path))


READERS: dict[str, Callable[[Path, Reading], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
    ".parquet": _parquet,
    ".xlsx": _xlsx,
    ".npz": _npz,
}


def missing(path: Path) -> ValueError:
    """What to say of a file that is not there."""
    entries = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    # By the part before the suffix: all files with one suffix are like each other in it.
    near = difflib.get_close_matches(path.stem, [Path(name).stem for name in entries], n=1, cutoff=0.6)
    hint = f"; did you mean {next(name for name in entries if Path(name).stem == near[0])!r}?" if near else ""
    return ValueError(f"there is no file {path}{hint}")
