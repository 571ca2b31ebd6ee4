"""Options that several commands have, and those that come from the keys of a config."""

from __future__ import annotations

import datetime
import importlib.util
import inspect
import itertools
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoadam.finetuning.config import AUTO, FIELDS, Config

DEMO_EXTRA = dict.fromkeys(("sklearn", "numpy", "tomli_w"), "demo")
"""Which modules the demo wants, and the extra that brings them."""

EXTRAS = DEMO_EXTRA | dict.fromkeys(("transformers", "datasets", "accelerate", "scipy", "PIL", "filelock"), "finetune")
"""Likewise of everything that trains."""

SECTIONS = {"nanoadam": "NanoAdam (--optimizer nanoadam)"}
"""Titles of sections that are not called by their name."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]

ConfigFile = Annotated[
    Path | None, typer.Argument(help="TOML file with keys; options win over it.", show_default=False)
]


def need(modules: Iterable[str]) -> None:
    """Look for what a command wants, without importing it: what is missing must be said before the work.

    Raises:
        ModuleNotFoundError: for the first that is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def config_options(command: Callable[..., None], only: frozenset[str] = frozenset(FIELDS)) -> Callable[..., None]:
    """Give a command an option for every key of a config, or only some; it gets those that were given as `keys`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "keys"]
    hints = typing.get_type_hints(Config)
    several_of = {name for name in FIELDS if typing.get_origin(hints[name]) is tuple}
    options = []
    for field in (field for name, field in FIELDS.items() if name in only):
        several, auto = field.name in several_of, field.name == "learning_rate"
        words = field.metadata["help"] + (" Separated by commas." if several else "")
        choices = f" One of: {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        default = AUTO if auto else str(field.default)
        section = field.metadata["section"]
        about = typer.Option(
            help=words + choices,
            show_default=default if auto or field.default not in (None, "", (), False) else False,
            metavar="X" if auto else None,
            rich_help_panel=SECTIONS.get(section, section.capitalize()),
        )
        kind: Any = Annotated[(str if several or auto else hints[field.name]) | None, about]
        options.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def with_keys(**given: Any) -> None:
        mine = {parameter.name: given.pop(parameter.name) for parameter in own}
        keys = {name: value for name, value in given.items() if value is not None}
        for name in keys.keys() & several_of:
            keys[name] = tuple(part.strip() for part in keys[name].split(","))
        if "learning_rate" in keys:
            keys["learning_rate"] = _rate(keys["learning_rate"])
        command(**mine, keys=keys)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_keys.__name__, with_keys.__doc__ = command.__name__, command.__doc__
    with_keys.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
    with_keys.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_keys


def _rate(text: str) -> float | str:
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--learning-rate must be a number or {AUTO}, got {text!r}") from None


def listed(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """The parts of a text separated by commas, each of a kind; a ValueError names the option."""
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} must be numbers separated by commas, got {text!r}") from None


def new_folder(name: str) -> Path:
    """Where a command writes if nobody says: under runs/, by its name and the time; not where anything is."""
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    names = (stem if again < 2 else f"{stem}-{again}" for again in itertools.count(1))
    return next(folder for each in names if not (folder := Path("runs") / each).exists())
