"""What the command says where torchrun or accelerate has started several of it: one sentence, by the first process."""

import pytest

from nanoadam import cli
from nanoadam.finetuning import processes


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "leave", lambda code: code)  # it ends the process
    monkeypatch.setattr(cli, "GRACE", 0.0)
    return monkeypatch


@pytest.mark.parametrize(
    "arguments",
    [["reproduce", "toy"], ["demo"], ["bench"], ["memory"], ["predict", "x"],
     ["analyze", "x", "y"], ["delta", "info", "x"]],
)  # fmt: skip
def test_commands_of_one_process_refuse_to_be_several(
    several: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nanoadam: {arguments[0]} is one process, and torchrun or accelerate launch has started 2")
    assert said.count("\n") == 1
    assert ("--jobs N" in said) == (arguments[0] == "reproduce")


def test_only_what_the_first_process_does_not_say_is_said_by_another(
    several: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several.setenv("RANK", "1")
    waited: list[float] = []
    several.setattr(cli, "GRACE", 7.0)
    several.setattr(cli.time, "sleep", waited.append)
    assert cli.main(["finetune", "--model", "x", "--train", "y", "--density", "2"]) == 2
    assert waited == [7.0]  # in which whoever started it ends it, once the first one has said it
    assert capsys.readouterr().err == "nanoadam: process 1: density must be in (0, 1], got 2.0\n"


@pytest.mark.parametrize("what", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_other_ways_to_shard_are_refused(
    several: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path, what: str
) -> None:
    pytest.importorskip("accelerate")
    several.setenv(f"ACCELERATE_USE_{what}", "true")
    assert cli.main(["finetune", "--model", "x", "--train", "y", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "say --shard" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "--optimizer", "lora"], "shard spreads the state of nanoadam, adamw, sgd, not of lora"),
        (["--shard", "--autocast", "fp16"], "use --autocast bf16"),
        (["--batch-size", "1"], "batch_size 1 cannot be shared out among 2 processes"),
        (
            ["--optimizer", "flashadamw", "--optimizer-options", "flashadamw.release=true"],
            "leave out flashadamw.release",
        ),
    ],
)
def test_what_does_not_go_with_several_processes_is_refused(
    several: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path, options: list[str], words: str
) -> None:
    pytest.importorskip("transformers")
    several.setattr(processes, "join", lambda cpu: None)
    assert cli.main(["finetune", "--model", "x", "--train", "y", "--out", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err
