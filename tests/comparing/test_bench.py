"""`nanoadam bench` measures every optimizer on a model's shapes; nothing here looks at a time."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

import nanoadam
import tiny
from nanoadam import baselines, cli
from nanoadam.comparing import bench
from nanoadam.comparing.shapes import MODELS

WEIGHTS = 107_328  # of the shapes called tiny


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.main(["bench", *arguments, "--device", "cpu", "--repeats", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_state_and_peak_are_what_they_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = results(capsys, "--shapes", "tiny", "--optimizers", "adamw,sgd,microadam,nanoadam,flashadamw")
    rows = {row["optimizer"]: row for row in found["table"]}
    assert rows["adamw"]["state_bytes"] == 2 * 2 * WEIGHTS + 4 * 21  # two bfloat16 moments and a step count a tensor
    assert rows["adamw"]["gradient_bytes"] == rows["adamw"]["weight_bytes"] == 2 * WEIGHTS
    assert rows["sgd"]["state_bytes"] == 0
    assert rows["nanoadam"]["gradient_bytes"] < 0.2 * rows["adamw"]["gradient_bytes"]  # released
    for row in rows.values():
        assert row["peak_bytes"] == row["weight_bytes"] + row["gradient_bytes"] + row["state_bytes"]
        assert row["of_adamw"]["state_bytes"] == row["state_bytes"] / rows["adamw"]["state_bytes"]
        assert row["ms"] > 0
    assert "CUDA" in found["left_out"]["flashadamw"]
    assert found["limits"]["microadam"] == list(baselines.BASELINES["microadam"].limits)


def test_a_method_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    def state(window: int) -> int:
        options = ("--optimizer-options", f"microadam.window={window}")
        return results(capsys, "--shapes", "tiny", "--optimizers", "microadam", *options)["table"][0]["state_bytes"]

    assert state(2) < state(20)


def test_a_model_folder_and_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tiny.causal_folder(tmp_path / "llama")
    found = results(capsys, "--model", str(folder), "--optimizers", "adamw,lora", "--dtype", "float32")
    adamw, lora = found["table"]
    assert adamw["weights"]["trained"] == adamw["weights"]["all"]
    assert lora["weights"]["trained"] == lora["weights"]["all"] - adamw["weights"]["all"]  # adapters beside all


def test_the_table_ends_with_what_was_left_out_and_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--shapes", "tiny", "--optimizers", "adamw,flashadamw", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "first step" in out
    assert "\nflashadamw left out: " in out or torch.cuda.is_available()
    assert "\nadamw: keeps all dense gradients until step()\n" in out


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_made_from_shapes_get_the_groups_that_the_table_says(name: str) -> None:
    shapes = MODELS[name]()
    groups = nanoadam.param_groups(bench.Shaped(shapes))
    found = Counter((tuple(p.shape), group["dense"]) for group in groups for p in group["params"])
    assert found == Counter((shape, dense) for _, shape, dense in shapes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--shapes", "--model"]),
        (["--shapes", "tiny", "--model", "x"], ["--shapes", "--model"]),
        (["--shapes", "bert-bse"], ["'bert-bse'", "'bert-base'?"]),
        (["--shapes", "tiny", "--optimizers", "adamv"], ["optimizer 'adamv' is unknown", "'adamw'?"]),
        (["--shapes", "tiny", "--optimizer-options", "galore.rnk=1"], ["galore has no option 'rnk'"]),
        (
            ["--shapes", "tiny", "--optimizers", "adamw,sgd", "--optimizer-options", "galore.rank=1"],
            ["has galore.rank, and the optimizers are adamw, sgd: leave it out, or add galore to them"],
        ),
        (["--shapes", "tiny", "--dtype", "int8"], ["dtype 'int8' is unknown"]),
        (["--shapes", "tiny", "--density", "2", "--optimizers", "nanoadam"], ["density must be in (0, 1]", "got 2.0"]),
        (["--shapes", "tiny", "--repeats", "0"], ["repeats must be at least 1, got 0"]),
        (["--model", "./nowhere"], ["there is no folder ./nowhere"]),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
