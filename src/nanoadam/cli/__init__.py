"""The command `nanoadam`. What a user can get wrong ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
import time
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

from nanoadam.cli import analyze, bench, compare, delta, demo, finetune, memory, predict, reproduce  # they need typer
from nanoadam.cli.help import Command
from nanoadam.cli.options import EXTRAS
from nanoadam.finetuning import processes

__all__ = ["main"]

app = typer.Typer(
    name="nanoadam",
    help="Finetune pretrained models with Adam moments for the smallest weights only.",
    epilog="Example: nanoadam demo",
    rich_markup_mode=None,
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
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "nanoadam")
        sentence = str(error.format_message())
        for far in (" (Possible options: ", " Did you mean "):  # what the parser finds near is often not
            sentence = sentence.partition(far)[0].rstrip(".")
        return _refuse(f"{sentence} (see {path} --help)")
    if result == 130 and processes.first():
        print("nanoadam: interrupted", file=sys.stderr)
    return processes.leave(result if isinstance(result, int) else 0)


GRACE = 10.0
"""Seconds in which the first of several processes says what is wrong, and whoever started them ends the others."""


def _refuse(sentence: str) -> int:
    who = ""
    if not processes.first():  # it may have gone wrong here only
        time.sleep(GRACE)
        who = f"process {processes.rank()}: "
    print(f"nanoadam: {who}{' '.join(sentence.split())}", file=sys.stderr)
    return processes.leave(2)


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
    elif processes.count() > 1 and context.invoked_subcommand not in ("finetune", "compare"):
        name = context.invoked_subcommand
        spread = "; --jobs N spreads its runs over the GPUs" if name == "reproduce" else ""
        raise ValueError(
            f"{name} is one process, and torchrun or accelerate launch has started {processes.count()} of them: start "
            f"it by itself{spread} (finetune and compare are the commands for several processes)"
        )


# In the order of the help; what each is for fits its list.
for _command, _words, _example in (
    (demo.demo, "Two tasks on real digit images, in a minute.", demo.EXAMPLE),
    (finetune.finetune, "Finetune a model on your data.", finetune.EXAMPLE),
    (predict.predict, "What a finetuned model says of other rows.", predict.PREDICT_EXAMPLE),
    (predict.evaluate, "How good a finetuned model is on a test set.", predict.EVALUATE_EXAMPLE),
    (compare.compare, "Several optimizers or rates of one job, in a table.", compare.EXAMPLE),
    (reproduce.reproduce, "The paper's experiments.", reproduce.EXAMPLE),
    (analyze.analyze, "What finetuning moved; where gradients fall.", analyze.EXAMPLE),
    (memory.memory, "What each optimizer takes, by formula.", memory.EXAMPLE),
    (bench.bench, "Each optimizer alone: memory and time of a step.", bench.EXAMPLE),
):
    app.command(epilog=_example, short_help=_words, cls=Command)(_command)
app.add_typer(delta.app)
