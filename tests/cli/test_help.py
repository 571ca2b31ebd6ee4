"""Help fits 80 columns: whole names, what they take, choices and defaults, an example first."""

import re
import subprocess
import sys

import pytest

from nanoadam import cli
from nanoadam.finetuning.config import FIELDS

COMMANDS = ["analyze", "bench", "compare", "demo", "evaluate", "finetune", "memory", "predict", "reproduce"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_is_longer_than_80_and_no_word_is_cut(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "..." not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_comes_before_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert text.index(f"Example: nanoadam {command}") < text.index("--json")


def test_every_key_is_an_option_with_its_choices_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("finetune", capsys).split())
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}[ /]", text), flag
        for choice in field.metadata["choices"]:
            assert choice in text
    assert "[default: auto]" in text and "[default: 16]" in text and "[default: 1e-08]" in text
    for section in ("Model:", "Data:", "Optimizer:", "NanoAdam (--optimizer nanoadam):", "Training:", "Output:"):
        assert section in text


def test_the_list_of_commands_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "..." not in text.partition("Commands:")[2]
    assert all(f"\n  {command} " in text for command in COMMANDS)


def test_a_wrong_option_names_its_own_commands_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--seed-s", "1"]) == 2
    error = capsys.readouterr().err
    assert error == "nanoadam: No such option: --seed-s (see nanoadam compare --help)\n"


def test_an_unknown_experiment_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert cli.main(["reproduce", "foo"]) == 2
    error = capsys.readouterr().err
    assert "there is no experiment 'foo'. There are: ablation-criterion," in error and "toy" in error


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from nanoadam.cli import main; main(['finetune', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "nanoadam", "--version"], check=True, capture_output=True, text=True)
    from nanoadam import __version__

    assert done.stdout.strip() == __version__
