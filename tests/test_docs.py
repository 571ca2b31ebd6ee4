"""Every code block of README and docs runs as it stands, on stand-ins; what cannot run is checked and counted."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import docs_blocks
from docs_blocks import ROOT, Block

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
pytest.importorskip("transformers")
pytest.importorskip("typer")
docs_standins = pytest.importorskip("docs_standins")

# Libraries may warn; what we have to say must not be overheard.
pytestmark = pytest.mark.filterwarnings("ignore", "error:.*(NanoAdam|nanoadam)")

# Pages whose commands name a reader's own files and long runs: their options, files and extras are checked.
CHECKED_ONLY = {
    "docs/finetune.md": "commands on a reader's files; each option has its own test in tests/finetuning",
    "docs/reproduction.md": "hours each; tests/paper runs every recipe at smoke scale",
    "docs/delta-format.md": "tests/delta/test_format_document.py runs the reader",
    "docs/distributed.md": "several processes; tests/distributed runs them",
}
SHELL = {"sh", "bash", "console", ""}


def is_run(block: Block) -> bool:
    return not block.not_run and block.page not in CHECKED_ONLY


RUN = [chain for chain in docs_blocks.chains() if any(is_run(block) for block in chain)]


@pytest.mark.parametrize("chain", [pytest.param(chain, id=chain[0].name) for chain in RUN])
def test_block_runs(chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (package for block in chain for package in block.needs):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in filter(is_run, chain):
        docs_standins.give(block.given, tmp_path, monkeypatch, names)
        if block.language == "python":
            exec(compile(block.code, block.name, "exec"), names)
            assert not block.check or eval(block.check, names), f"not true afterwards: {block.check}"
        elif block.language in SHELL:
            for words in commands(block):
                run_command(words)
        else:
            pytest.fail(f"{block.name} is {block.language}: say why it does not run")


@pytest.mark.parametrize("page", sorted({block.page for block in docs_blocks.all_blocks()}))
def test_commands_name_what_exists(page: str) -> None:
    for block in (block for block in docs_blocks.all_blocks() if block.page == page):
        if block.language in SHELL:
            for words in commands(block):
                check_command(words, block)
        elif block.language == "python":
            compile(block.code, block.name, "exec")


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    left = [block for block in docs_blocks.all_blocks() if not is_run(block)]
    of_pages = [block for block in left if block.page in CHECKED_ONLY]
    assert all(block.not_run or block.page in CHECKED_ONLY for block in left)
    print("\n".join(f"{block.name}: {block.not_run or CHECKED_ONLY[block.page]}" for block in left))
    assert len(left) - len(of_pages) <= 20


@pytest.mark.parametrize("program", ["pictures.py", "figures.py"])
def test_pictures_and_the_table_are_what_the_data_say(program: str) -> None:
    found = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_lines_of_text_are_short() -> None:
    """120 characters at most in the source; rows of tables, pictures and code may be longer."""
    free = re.compile(r"^\s*(\||!\[|<!--)|^\s*\S+$")
    long = []
    for page in docs_blocks.pages():
        in_code = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            in_code ^= line.lstrip().startswith("```")
            if len(line) > 120 and not in_code and not free.match(line):
                long.append(f"{page.relative_to(ROOT).as_posix()}:{number}")
    assert long == []


def test_release_files_agree() -> None:
    import nanoadam

    assert f"version: {nanoadam.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "arXiv:2506.21374" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "src/nanoadam/py.typed").exists()
    assert f"Version {nanoadam.__version__}" in (ROOT / "README.md").read_text()


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, words split as a shell does; output and other text of a block are left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    known = ("nanoadam ", "pip ", "python ", "make ", "nox")
    if not block.language and not any(line.startswith(known) for line in lines):
        return []
    return [shlex.split(line, comments=True) for line in lines if line.startswith(known)]


def run_command(words: list[str]) -> None:
    from nanoadam import cli

    if words[0] == "nanoadam":
        assert cli.main(words[1:]) == 0, " ".join(words)
    elif words[0] != "pip":  # what pip would install is checked, not installed
        raise AssertionError(f"the test cannot run {words[0]}: say 'not run'")


def check_command(words: list[str], block: Block) -> None:
    if words[0] == "nanoadam":
        check_options(words[1:], block)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= extras.keys(), f"{block.name}: no extra {extra}"
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{block.name}: no target {words}"
    elif words[0] == "python" and words[1].startswith(("examples/", "benchmarks/")):
        assert (ROOT / words[1]).is_file(), f"{block.name}: no file {words[1]}"


def check_options(words: list[str], block: Block) -> None:
    """Each subcommand and option of a command is one that `nanoadam` has."""
    import typer

    from nanoadam import cli

    command = typer.main.get_command(cli.app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{block.name}: no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in options | {"--help"}, f"{block.name}: nanoadam has no {word}"
