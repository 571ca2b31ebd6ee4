"""The command `nanoadam`. What a user can get wrong ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import nanoadam

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    if missing.name not in {"typer", "rich"}:
        raise
    print(f"nanoadam: the command needs {missing.name}: pip install 'nanoadam[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from nanoadam.cli import analyze, bench, compare, delta, demo, finetune, memory, reproduce  # they need typer
from nanoadam.cli.options import EXTRAS

__all__ = ["main"]

app = typer.Typer(
    name="nanoadam",
    help="Finetune pretrained models with Adam moments for the smallest weights only.",
    epilog="Example: nanoadam demo",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        command = typer.main.get_command(app)
        result = command.main(args=None if argv is None else list(argv), prog_name="nanoadam", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except ImportError as error:
        if error.name is None:  # raised by this library, with the remedy
            return _refuse(str(error))
        module = error.name.partition(".")[0]
        if module not in EXTRAS or not isinstance(error, ModuleNotFoundError):
            raise
        return _refuse(f"this command needs {module}, which is not installed: pip install 'nanoadam[{EXTRAS[module]}]'")
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except Exception as error:
        # The parser's own errors; their class has moved between releases of typer, their method has not.
        if not hasattr(error, "format_message"):
            raise
        return _refuse(f"{str(error.format_message()).rstrip('.')} (see nanoadam --help)")
    if result == 130:
        print("nanoadam: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _refuse(sentence: str) -> int:
    print(f"nanoadam: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(nanoadam.__version__)
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


# In the order of the help.
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=finetune.EXAMPLE)(finetune.finetune)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.command(epilog=reproduce.EXAMPLE)(reproduce.reproduce)
app.command(epilog=analyze.EXAMPLE)(analyze.analyze)
app.command(epilog=memory.EXAMPLE)(memory.memory)
app.command(epilog=bench.EXAMPLE)(bench.bench)
app.add_typer(delta.app)
