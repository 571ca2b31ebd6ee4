"""The public names and their parameters are those of tests/public_api.txt: what users call changes on purpose only.

After a change that is meant, `python tests/test_public_api.py` writes the list anew. Removing or renaming a line of it
breaks somebody's program, so it belongs in CHANGELOG.md.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("public_api.txt")

# What docs name as public. A module without __all__ is listed with what it defines itself.
MODULES = (
    "nanoadam",
    "nanoadam.analysis",
    "nanoadam.baselines",
    "nanoadam.callback",
    "nanoadam.delta",
    "nanoadam.delta.sync",
    "nanoadam.distributed",
    "nanoadam.finetuning.patches",
    "nanoadam.memory",
)


def public_names(module: Any) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
    )


def parameters(function: Any) -> str:
    """Names, kinds and defaults, without annotations. A default that prints its address is shown as an ellipsis."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"

    def plain(parameter: inspect.Parameter) -> inspect.Parameter:
        default = parameter.default
        if default is not inspect.Parameter.empty and " at 0x" in repr(default):
            parameter = parameter.replace(default=...)
        return parameter.replace(annotation=inspect.Parameter.empty)

    shown = [plain(parameter) for name, parameter in signature.parameters.items() if name not in ("self", "cls")]
    return str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))


def lines_of_class(path: str, cls: type) -> Iterator[str]:
    """The constructor, and the public methods and properties that the class has from us."""
    if not issubclass(cls, BaseException) and not getattr(cls, "_is_protocol", False):  # nobody calls these
        yield path + parameters(cls)
    ours = {name: value for base in reversed(own_and_unlisted(cls)) for name, value in vars(base).items()}
    for name, value in sorted(ours.items()):
        if name.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if inspect.isfunction(value):
            yield f"{path}.{name}{parameters(value)}"
        elif isinstance(value, property):
            yield f"{path}.{name}"


def own_and_unlisted(cls: type) -> list[type]:
    """A class, and those bases of the project that are not public themselves: who calls one calls the other."""
    return [cls, *(base for base in cls.__mro__[1:] if base.__module__ == "nanoadam.slot_optimizer")]


def public_api(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    lines = []
    for name in public_names(module):
        value, path = getattr(module, name), f"{module_name}.{name}"
        if inspect.isclass(value):
            lines += lines_of_class(path, value)
        elif callable(value):
            lines.append(path + parameters(value))
        else:
            lines.append(path)
    return lines


def listed(module_name: str) -> list[str]:
    sections = LIST.read_text().split("\n\n")
    found = [section.splitlines()[1:] for section in sections if section.splitlines()[0] == f"[{module_name}]"]
    return found[0] if found else []


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_and_their_parameters_are_those_on_the_list(module_name: str) -> None:
    if not _importable(module_name):
        pytest.skip(f"{module_name} is not here, or needs a package that is not")
    now = public_api(module_name)
    changes = [line for line in difflib.ndiff(listed(module_name), now) if line[0] in "+-"]
    assert not changes, "the public API has changed; if that is meant: python tests/test_public_api.py\n" + "\n".join(
        changes
    )


def test_every_public_name_has_a_docstring() -> None:
    bare = []
    for module_name in filter(_importable, MODULES):
        module = importlib.import_module(module_name)
        values = {f"{module_name}.{name}": getattr(module, name) for name in public_names(module)}
        bare += [path for path, value in values.items() if callable(value) and not inspect.getdoc(value)]
    assert not bare


def _importable(module_name: str) -> bool:
    try:
        importlib.import_module(module_name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sections = {name: public_api(name) if _importable(name) else listed(name) for name in MODULES}
    LIST.write_text("\n\n".join("\n".join([f"[{name}]", *lines]) for name, lines in sections.items() if lines) + "\n")
