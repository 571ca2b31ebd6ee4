"""Which columns of a table hold what: by the usual names, as told, or not at all where two readings are possible."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Image, List, Value

from nanoadam.finetuning.config import Config
from nanoadam.text import nearest

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text", "text_pair"), ("text", "text2"), ("sentence", "sentence2"), ("sentence_a", "sentence_b"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"), ("query", "passage"),
    ("query", "document"), ("claim", "evidence"), ("question", "answer"), ("anchor", "positive"),
)  # fmt: skip
"""Names of two texts that belong together: GLUE's, SNLI's and those of retrieval."""

TEXT = (
    "text", "sentence", "sentence1", "premise", "question1", "question", "review", "content", "tweet", "comment",
    "title", "body", "document", "utterance", "query",
)  # fmt: skip
LABEL = (
    "label", "labels", "target", "class", "category", "sentiment", "score", "gold_label", "stars", "rating", "intent",
    "emotion", "is_duplicate", "similarity", "y",
)  # fmt: skip
IMAGE = ("image", "img", "file", "path", "file_name", "pixel_values")
PROMPT = ("prompt", "question", "instruction", "input", "query")
COMPLETION = ("completion", "answer", "response", "output", "chosen")
MESSAGES = ("messages", "conversation", "conversations")
ALPACA = ("instruction", "input")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "labels")

_SAMPLE = 200


@dataclasses.dataclass(frozen=True)
class Roles:
    """What is read from which columns.

    Args:
        texts: one, or the two of a pair, or the parts of a prompt.
        label: the class, the number, the classes, or the completion.
        ignored: columns that are not read, those of text first.
    """

    texts: tuple[str, ...]
    label: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that is read."""
        return self.texts if self.label is None else (*self.texts, self.label)


def task_of(rows: Dataset, config: Config, architecture: str) -> str:
    """The task that data and model are for, where the config names none.

    Args:
        rows: of the training split.
        config: its columns count.
        architecture: the class that the model's config names, or nothing.

    Raises:
        ValueError: if it cannot be told.
    """
    names = {name.lower(): name for name in rows.column_names}
    _refuse_preferences("the data", names, config)
    if config.image_column or any(isinstance(rows.features[n], Image) for n in rows.column_names):
        return "image-classification"
    if not config.text_column and any(n in names for n in IMAGE[:2]) and not set(names) & {*TEXT, *PROMPT}:
        return "image-classification"
    if config.messages_column or config.prompt_column or config.completion_column:
        return "causal-lm"
    if names.keys() & set(TOKENS) and names.keys() & set(TAGS):
        return "token-classification"
    label = config.label_column or next((names[n] for n in LABEL if n in names), None)
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if label in rows.column_names and not (generates and names.keys() & set(COMPLETION) - {label}):
        return _by_label(rows, str(label), set(names))
    if names.keys() & set(MESSAGES) or (names.keys() & set(PROMPT) and names.keys() & set(COMPLETION)):
        if architecture and not generates and not architecture.endswith("Model"):
            raise ValueError(
                f"the data hold no labels, but prompts and completions, and {config.model} is no language model "
                f"({architecture}): name another model, or what is learned with --task and --label-column"
            )
        return "causal-lm"
    if generates and len(names) == 1:
        return "causal-lm"
    if generates and "text" in names:
        return "causal-lm"
    return "text-classification"  # which says what is missing


def _refuse_preferences(name: str, names: Mapping[str, str], config: Config) -> None:
    """Of pairs of a better and a worse answer the better one alone would be learned."""
    named = config.completion_column or config.text_column or config.label_column or config.messages_column
    if named is None and {"chosen", "rejected"} <= names.keys():
        raise ValueError(
            f"{name} has pairs of a chosen and a rejected answer, which are learned by DPO (examples/trl_dpo.py): "
            f"--completion-column {names['chosen']} learns the chosen ones alone"
        )


def _by_label(rows: Dataset, label: str, names: set[str]) -> str:
    feature = rows.features[label]
    if _is_list(feature):
        return "token-classification" if names & set(TOKENS) else "multi-label-classification"
    fractions = ("float", "double", "decimal")
    if _is_string(feature) or (isinstance(feature, Value) and feature.dtype.startswith(fractions)):
        values = [v for v in rows[: min(len(rows), 5_000)][label] if v not in (None, "")]
        return "text-regression" if _measured(values) else "text-classification"
    return "text-classification"


def _measured(values: Sequence[Any]) -> bool:
    """Whether all are numbers, as tables hold them in text, and not all of them whole."""
    comma = decimal_comma(values)
    try:
        numbers = [number_of(value, comma) for value in values]
    except ValueError:
        return False
    return any(math.isfinite(number) and not number.is_integer() for number in numbers)


_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


def has_comma(value: Any) -> bool:
    """Whether it is text of two numbers with a comma between, like 4,5 or 1,000."""
    return isinstance(value, str) and _COMMA.fullmatch(value.strip()) is not None


def decimal_comma(values: Sequence[Any]) -> bool:
    """Whether the comma in numbers is a decimal one: it does not always part thousands, and none has a point."""
    decimal = any(has_comma(value) and not _THOUSANDS.fullmatch(value.strip()) for value in values)
    return decimal and not any(isinstance(value, str) and _POINT.fullmatch(value.strip()) for value in values)


def number_of(value: Any, comma: bool) -> float:
    """A number, from what a row has; in text with a point, or with a comma where that is a decimal one.

    Raises:
        ValueError, TypeError, OverflowError: as `float`.
    """
    return float(value.replace(",", ".") if comma and has_comma(value) else value)


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (list, List)) or type(feature).__name__ in ("Sequence", "LargeList")


def find(name: str, rows: Dataset, option: str, wanted: str | None, guesses: Sequence[str], task: str = "") -> str:
    """The name of the column that holds something.

    Args:
        name: of the split, for messages.
        rows: its rows.
        option: the option that names it.
        wanted: what it was given.
        guesses: usual names, the likeliest first.
        task: what wants it, for messages.

    Raises:
        ValueError: if the wanted one is not there, or none of the guesses is.
    """
    names: list[str] = rows.column_names
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{name} has no column {wanted!r} ({option}){nearest(wanted, names)}")
        return wanted
    found = next((column for guess in guesses for column in names if column.lower() == guess), None)
    if found is None:
        flag = "--" + option.replace("_", "-")
        usual = ", ".join(guesses[:3])
        if names == ["text"] and option == "label_column":
            raise ValueError(f"{name} is text without labels: language models learn from such (--task causal-lm); "
                             f"{task} needs a column of labels")  # fmt: skip
        other = f", or another task with --task (this is {task})" if task else ""
        raise ValueError(
            f"{name} has no column called {usual} or the like: name it with {flag}{other} (there are: "
            f"{', '.join(names)})"
        )
    return found


def of_text(name: str, rows: Dataset, config: Config, task: str) -> Roles:
    """One text or a pair, and a label.

    Raises:
        ValueError: if a column is missing, or a second text could belong to the first or not.
    """
    label = find(name, rows, "label_column", config.label_column or _lone_label(rows), LABEL, task)
    if config.text_column is not None or config.pair_column is not None:
        first = find(name, rows, "text_column", config.text_column, TEXT, task)
        second = (find(name, rows, "pair_column", config.pair_column, ()),) if config.pair_column else ()
        return _roles(rows, (first, *second), label)
    names = {column.lower(): column for column in rows.column_names if column != label}
    pair: tuple[str, ...] = next(((names[a], names[b]) for a, b in PAIRS if a in names and b in names), ())
    texty = [column for column in rows.column_names if column != label and _is_text(rows, column)]
    if pair:
        _refuse_more(name, pair, [column for column in texty if column not in pair])
        return _roles(rows, pair, label)
    known = next((names[guess] for guess in TEXT if guess in names), None)
    only = known or (texty[0] if len(texty) == 1 else None) or _lone(rows, label)
    text = only or find(name, rows, "text_column", None, TEXT, task)
    _refuse_more(name, (text,), [column for column in texty if column != text])
    return _roles(rows, (text,), label)


def _refuse_more(name: str, read: Sequence[str], more: Sequence[str]) -> None:
    if more:
        raise ValueError(
            f"{name} has more columns of text than one reading explains ({', '.join((*read, *more))}): say what is "
            f"read with --text-column {read[0]}, and of a pair the second with --pair-column {[*read, *more][1]}"
        )


def _lone_label(rows: Dataset) -> str | None:
    """In a table of two columns, one of them text by its name: the other one."""
    names: list[str] = rows.column_names
    if len(names) != 2 or any(name.lower() in LABEL for name in names):
        return None
    texts = [name for name in names if name.lower() in TEXT]
    both = {name.lower() for name in names}
    if len(texts) != 1 or any(both == set(pair) for pair in PAIRS) or both & {*COMPLETION, *MESSAGES}:
        return None
    return next(name for name in names if name not in texts)


def _lone(rows: Dataset, label: str) -> str | None:
    strings = [n for n in rows.column_names if n != label and _is_string(rows.features[n])]
    return strings[0] if len(strings) == 1 else None


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_text(rows: Dataset, column: str) -> bool:
    """Whether a column holds words, not codes, names or numbers."""
    if not _is_string(rows.features[column]):
        return False
    values = [value for value in rows[: min(len(rows), _SAMPLE)][column] if value]
    spaced = sum(len(value.split()) > 2 for value in values)
    return spaced > len(values) / 4


def _roles(rows: Dataset, texts: Sequence[str], label: str | None) -> Roles:
    rest = [column for column in rows.column_names if column not in texts and column != label]
    rest.sort(key=lambda column: not _is_text(rows, column))
    return Roles(tuple(texts), label, tuple(rest))


def of_completions(name: str, rows: Dataset, config: Config) -> tuple[str, Roles]:
    """What a language model learns from: "chat", "completion" or "text", and the columns.

    Raises:
        ValueError: if a column is missing, or there is more text than one reading explains.
    """
    names = {column.lower(): column for column in rows.column_names}
    named = config.prompt_column is not None or config.completion_column is not None
    _refuse_preferences(name, names, config)
    if config.messages_column is not None or (
        not named and config.text_column is None and names.keys() & set(MESSAGES)
    ):
        return "chat", _roles(rows, (find(name, rows, "messages_column", config.messages_column, MESSAGES),), None)
    completes = names.keys() & set(COMPLETION)
    if config.text_column is not None or (not named and not completes and _only_text(rows)):
        return "text", _roles(rows, (_plain(name, rows, config),), None)
    texty = [column for column in rows.column_names if _is_text(rows, column)]
    if not named and not completes and len(texty) > 1:
        raise ValueError(
            f"{name} has more columns of text than one reading explains ({', '.join(texty)}): say which is read with "
            f"--text-column {texty[0]}, or name two of them with --prompt-column and --completion-column"
        )
    completion = find(name, rows, "completion_column", config.completion_column, COMPLETION, "causal-lm")
    if config.prompt_column is not None:
        prompt = tuple(
            find(name, rows, "prompt_column", part.strip(), ())
            for part in ([config.prompt_column] if config.prompt_column in names.values() else
                         config.prompt_column.split(","))
        )  # fmt: skip
        return "completion", _roles(rows, prompt, completion)
    prompt = tuple(names[part] for part in ALPACA if part in names and names[part] != completion)
    if ALPACA[0] not in names:
        prompt = (find(name, rows, "prompt_column", None, PROMPT, "causal-lm"),)
    texty = [column for column in texty if column not in (*prompt, completion)]
    if texty:
        every = ", ".join((*prompt, completion, *texty))
        raise ValueError(
            f"{name} has more columns of text than a prompt and a completion ({every}): say what the prompt is, like "
            f"--prompt-column {','.join(prompt)} without the rest, or --prompt-column {','.join((*prompt, texty[0]))}"
        )
    return "completion", _roles(rows, prompt, completion)


def _only_text(rows: Dataset) -> bool:
    texts = [column for column in rows.column_names if _is_text(rows, column)]
    named = [column for column in rows.column_names if column.lower() in ("text", "content")]
    if len(texts) > 1:
        return False
    return bool(named) or len(texts) == 1 or len(rows.column_names) == 1


def _plain(name: str, rows: Dataset, config: Config) -> str:
    if config.text_column is not None:
        return find(name, rows, "text_column", config.text_column, ())
    names: list[str] = rows.column_names
    texts = [column for column in names if _is_text(rows, column)]
    return next((column for column in names if column.lower() in ("text", "content")), (texts or names)[0])


def of_tokens(name: str, rows: Dataset, config: Config) -> Roles:
    """Words and a tag for each.

    Raises:
        ValueError: if a column is missing.
    """
    words = find(name, rows, "text_column", config.text_column, TOKENS, "token-classification")
    tags = find(name, rows, "label_column", config.label_column, TAGS, "token-classification")
    return _roles(rows, (words,), tags)


def of_images(name: str, rows: Dataset, config: Config) -> Roles:
    """An image and a label.

    Raises:
        ValueError: if a column is missing.
    """
    image = find(name, rows, "image_column", config.image_column, IMAGE, "image-classification")
    label = find(name, rows, "label_column", config.label_column, LABEL, "image-classification")
    return _roles(rows, (image,), label)


def names_of(feature: Any) -> list[str] | None:
    """The names of the classes, where a column's type has them: a ClassLabel, or a list of such."""
    inner = getattr(feature, "feature", None) or (feature[0] if isinstance(feature, list) and feature else feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None
