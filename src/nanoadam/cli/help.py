"""`--help` of a command: an example first, whole names, choices, defaults, a section for each kind of option."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import Any

import typer

COLUMN = 26
"""Where the words begin."""


class Command(typer.core.TyperCommand):
    """A command whose help fits 80 columns without cutting a name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """All of it."""
        width = _width()
        arguments = [p for p in self.params if p.param_type_name == "argument"]
        options = [p for p in self.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
        names = "".join(f" [{str(p.name).upper()}]" for p in arguments)
        lines = [f"Usage: {ctx.command_path}{names} [OPTIONS]", ""]
        for paragraph in (self.help or "").split("\n\n"):
            lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
        for example in (self.epilog or "").split(" Or: "):
            if example:
                text = example if example.startswith("Example: ") else f"Example: {example}"
                lines += textwrap.wrap(text, width, subsequent_indent="    ", break_long_words=False,
                                       break_on_hyphens=False)  # fmt: skip
        sections: dict[str, list[Any]] = {}
        for option in [*arguments, *options]:
            sections.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
        if ctx.help_option_names:
            sections["Options"] = [*sections.get("Options", []), None]
        for section, found in sections.items():
            lines += ["", f"{section}:"]
            for option in found:
                lines += _entry(option, width)
        formatter.write("\n".join(line.rstrip() for line in lines).rstrip() + "\n")


def _width() -> int:
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return 80
    return max(50, min(100, shutil.get_terminal_size().columns))


def _entry(option: Any, width: int) -> list[str]:
    """A name, what it takes, and what it means."""
    if option is None:
        name, words = "--help", "Show this and leave."
    elif option.param_type_name == "argument":
        name, words = str(option.name).upper(), option.help or ""
    else:
        name = "/".join([*option.opts, *option.secondary_opts])
        if not option.is_flag and not option.secondary_opts:
            name += f" {_takes(option)}"
        words = (option.help or "") + _default(option)
    body = textwrap.wrap(words, width - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    if len(name) > COLUMN - 4:
        return [f"  {name}", *(f"{'':{COLUMN}}{line}" for line in body)]
    return [f"  {name:{COLUMN - 2}}{body[0]}", *(f"{'':{COLUMN}}{line}" for line in body[1:])]


def _takes(option: Any) -> str:
    """What stands for the value; where its type is kept has moved between releases of typer."""
    if option.metavar:
        return str(option.metavar)
    kind = getattr(getattr(option, "type_descriptor", None), "annotation", None)
    word = getattr(kind, "__name__", "") or str(getattr(getattr(option, "type", None), "name", "text"))
    return {"int": "N", "integer": "N", "integer range": "N", "float": "X", "float range": "X"}.get(
        word.lower(), "PATH" if "path" in word.lower() else "TEXT"
    )


def _default(option: Any) -> str:
    shown = option.show_default
    if isinstance(shown, str):
        return f" [default: {'on' if shown == 'True' else shown}]"
    if shown is False or option.default in (None, "", ()) or callable(option.default):
        return ""
    if option.is_flag and option.default is False:
        return ""
    return f" [default: {'on' if option.default is True else option.default}]"
