"""What the command prints and where, and the exit code it ends with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

import nanoadam
import tiny
from nanoadam import cli, memory

COMMANDS = ["analyze", "bench", "compare", "demo", "evaluate", "finetune", "memory", "predict", "reproduce"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what depends on the modules that are there."""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *wanted: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that names what is wrong."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nanoadam: ")
    assert captured.err.count("\n") == 1
    for text in wanted:
        assert text in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{nanoadam.__version__}\n"


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: nanoadam {command}" in out
    assert "--json" in out


def test_no_command_is_left_out_of_these_tests() -> None:
    assert sorted(c.name or getattr(c.callback, "__name__", "") for c in cli.app.registered_commands) == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["dmo"], "dmo"),
        (["--nothing"], "--nothing"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--seeds", "many"], "--seeds"),
        (["memory"], "--params"),
        (["memory", "--params", "1e9", "--model", "somewhere"], "--model"),
        (["memory", "--params", "much"], "--params"),
        (["memory", "--params", "-1"], "-1"),
        (["memory", "--params", "1e9", "--density", "1.5"], "density must be in (0, 1], got 1.5"),
        (["memory", "--params", "1e9", "--method", "adagrad"], "adagrad"),
        (["memory", "--params", "1e9", "--batch-size", "8"], "--batch-size needs --model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, arguments, wanted)


def test_memory_prints_the_figures_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--params", "6.275e9"]) == 0
    out = capsys.readouterr().out
    for method, state in {"AdamW, 16": "25.1", "AdamW 8": "12.55", "MicroAdam": "5.65", "NanoAdam": "0.3765"}.items():
        line = next(line for line in out.splitlines() if line.startswith(method))
        assert state in line.split()


def test_memory_json_is_the_library_table_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--params", "1e6", "--density", "0.1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [row.to_dict() for row in memory.table(params=1e6, density=0.1)]
    assert captured.err == ""


def test_memory_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--params", "6.275e9", "--method", "nanoadam", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == 376_500_000


def test_memory_with_a_batch_counts_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    tiny.causal_folder(tmp_path)
    peaks = []
    for more in ([], ["--checkpoint-activations"]):
        assert cli.main(["memory", "--model", str(tmp_path), "--batch-size", "512", "--sequence", "64", *more]) == 0
        out = capsys.readouterr().out
        assert "iteration" in out.splitlines()[0]
        peaks.append(float(next(line for line in out.splitlines() if "of columns" in line).split()[-1]))
    assert peaks[1] < peaks[0]


def test_memory_counts_a_model_from_its_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    assert cli.main(["memory", "--model", str(tmp_path), "--method", "adamw", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    with_weights = transformers.BertForSequenceClassification(config)
    assert row["parameters"] == sum(p.numel() for p in with_weights.parameters())


def test_memory_refuses_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, ["memory", "--model", str(tmp_path)], "config.json")


def test_demo_refuses_a_used_folder_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(capsys, ["demo", "--out", str(tmp_path)], "is not empty", "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoadam.demo import experiment as demo

    whole = demo.run

    def run(settings: demo.Settings, progress: demo.Progress) -> demo.Demo:
        small = demo.Settings(
            seeds=settings.seeds,
            densities=(0.1,),
            learning_rates=(1e-3,),
            hidden=8,
            pretrain_epochs=1,
            finetune_epochs=1,
        )
        return whole(small, progress)

    monkeypatch.setattr(demo, "run", run)


@pytest.mark.usefixtures("small_demo")
def test_demo_prints_its_table_and_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["demo", "--seeds", "2", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    for text in ("AdamW", "NanoAdam 10 %", "forgetting", "optimizer state", "2 seeds", str(out / "report.html")):
        assert text in captured.out
    assert captured.err == ""  # no progress where there is no terminal
    assert (out / "report.html").is_file()


@pytest.mark.usefixtures("small_demo")
def test_demo_json_is_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in printed["methods"]] == ["AdamW", "NanoAdam 10 %"]
    assert all(row["forgetting"]["std"] is None for row in printed["methods"])


def test_ctrl_c_ends_in_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "table", interrupt)
    assert cli.main(["memory", "--params", "1e9"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "nanoadam: interrupted\n"


@pytest.mark.parametrize("module", ["sklearn", "numpy", "tomli_w"])
def test_a_missing_extra_is_named_before_any_work(module: str, tmp_path: Path) -> None:
    arguments = ["demo", "--out", str(tmp_path / "run")]
    done = python(
        f"import sys; sys.modules[{module!r}] = None; from nanoadam.cli import main; sys.exit(main({arguments}))"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        f"nanoadam: this command needs {module}, which is not installed: pip install 'nanoadam[demo]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_lab_extra_names_it(tmp_path: Path) -> None:
    arguments = ["finetune", "--model", "m", "--train", "t.jsonl", "--out", str(tmp_path / "run")]
    done = python(
        f"import sys; sys.modules['transformers'] = None; from nanoadam.cli import main; sys.exit(main({arguments}))"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "nanoadam: this command needs transformers, which is not installed: pip install 'nanoadam[finetune]'\n"
    )


def test_an_error_that_is_no_fault_of_the_user_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(memory, "table", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["memory", "--params", "1e9"])


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_cli_extra_the_command_names_it(module: str) -> None:
    done = python(f"import sys; sys.modules[{module!r}] = None; import nanoadam.cli")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"nanoadam: the command needs {module}: pip install 'nanoadam[cli]'\n")


def test_importing_the_library_needs_no_extra() -> None:
    extras = ["typer", "rich", "sklearn", "matplotlib", "numpy", "transformers", "scipy", "datasets", "triton"]
    done = python(
        f"import sys; sys.modules.update(dict.fromkeys({extras})); import nanoadam; print(nanoadam.__version__)"
    )
    assert (done.returncode, done.stdout) == (0, f"{nanoadam.__version__}\n"), done.stderr


def test_two_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    from nanoadam.cli.options import new_folder

    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        found.append(new_folder("analyze"))
        found[-1].mkdir(parents=True)
    assert len(set(found)) == 3
    assert all(re.fullmatch(r"analyze-\d{8}-\d{6}(-\d)?", folder.name) for folder in found)
