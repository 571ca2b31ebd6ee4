"""`finetune --save delta|both`: patches instead of weights, in checkpoints too, and bit for bit the same model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

from safetensors.torch import load_file

import tiny
from nanoadam import cli, delta
from nanoadam.finetuning import folders, patches
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("save")
    tiny.jsonl(root / "train.jsonl", tiny.sentences(40))
    tiny.jsonl(root / "dev.jsonl", tiny.sentences(10, first=40))
    tiny.bert_folder(root / "bert")
    return root


def config(files: Path, **keys) -> Config:
    base = {
        "model": str(files / "bert"), "train": str(files / "train.jsonl"), "validation": str(files / "dev.jsonl"),
        "batch_size": 8, "max_steps": 6, "log_every": 2, "save_every": 2, "learning_rate": 1e-2, "density": 0.25,
        "density_end": 0.1, "mask_interval": 2, "density_interval": 2, "device": "cpu", "warmup": 0.0,
    }  # fmt: skip
    return Config(**{**base, **keys})


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run that saves whole models."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune.run(config(files), out)
    return load_file(out / "model" / "model.safetensors")


def same(model, weights):
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_delta_is_the_same_model_in_less(files, whole, tmp_path):
    out = tmp_path / "run"
    finetune.run(config(files, save="delta"), out)
    assert not (out / "model").exists()
    assert not list(out.rglob("model*.safetensors"))
    names = {path.name for path in (out / "delta").iterdir()}
    assert {"delta.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert {path.name for path in (out / "checkpoints" / "checkpoint-6").iterdir()} >= {"delta.safetensors"}
    assert same(patches.load(files / "bert", out / "delta"), whole)
    patch = delta.Patch.load(out / "delta")
    assert (patch.base, patch.prefix, patch["classifier.weight"].kind) == ("bert", "bert.", "new")
    delta.apply(files / "bert", out / "delta", out=tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert set(made) == set(whole)
    assert all(torch.equal(made[name], whole[name]) for name in whole)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["save"] == "delta"
    assert "patches.load" in (out / "report.html").read_text()


def test_both(files, whole, tmp_path):
    out = tmp_path / "run"
    finetune.run(config(files, save="both"), out)
    assert all(torch.equal(t, whole[n]) for n, t in load_file(out / "model" / "model.safetensors").items())
    assert same(patches.load(files / "bert", out / "delta"), whole)


def test_it_goes_on_from_a_patch_bit_for_bit(files, whole, tmp_path, monkeypatch):
    out, append = tmp_path / "run", folders.append

    def interrupted(path, line):
        if line["step"] > 3:
            raise KeyboardInterrupt
        append(path, line)

    monkeypatch.setattr(folders, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config(files, save="delta"), out)
    monkeypatch.undo()
    assert (out / "checkpoints" / "checkpoint-2" / delta.FILE).is_file()
    finetune.resume(out)
    assert same(patches.load(files / "bert", out / "delta"), whole)


def test_what_cannot_be_a_patch_is_refused(files):
    with pytest.raises(ValueError, match="adapters"):
        config(files, save="delta", optimizer="lora")
    with pytest.raises(ValueError, match="no base"):
        config(files, save="both", init_from_config=True)
    with pytest.raises(ValueError, match="save 'patch' is unknown"):
        config(files, save="patch")
    assert dataclasses.replace(config(files), save="both").save == "both"


def test_the_command(files, tmp_path, capsys):
    out = tmp_path / "run"
    keys = ("model", "train", "validation")
    arguments = [part for key in keys for part in (f"--{key}", getattr(config(files), key))]
    arguments += ["--max-steps", "2", "--batch-size", "8", "--device", "cpu", "--save", "delta", "--out", str(out)]
    assert cli.main(["finetune", *arguments, "--learning-rate", "1e-3"]) == 0
    capsys.readouterr()
    assert cli.main(["delta", "verify", str(files / "bert"), str(out / "delta"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "base"


# Strengths


@pytest.mark.parametrize("save", ["delta", "model"])
def test_a_front_of_strengths(files, tmp_path, capsys, save):
    out = tmp_path / "run"
    pairs = "".join(f"{row['text']}\tthe {row['label']} {i}\n" for i, row in enumerate(tiny.sentences(12)))
    (tmp_path / "pairs.tsv").write_text("question\tanswer\n" + pairs)
    finetune.run(config(files, save=save, retain=(str(tmp_path / "pairs.tsv"),)), out)
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert cli.main(["delta", "front", str(out), "--strengths", "0,0.5,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["strength"] for row in found["rows"]] == [0, 0.5, 1]
    base, _, tuned = found["rows"]
    assert tuned["metrics"]["loss"] == pytest.approx(results["final"]["loss"], rel=1e-5)
    for name, values in results["retained"].items():
        (own,) = (key for key in base["retained"] if key.endswith(name.split(": ")[-1]))
        assert base["retained"][own] == pytest.approx(values["before"])
        assert tuned["retained"][own] == pytest.approx(values["after"])
    text = (out / "front.html").read_text()
    assert "strength" in text
    assert "<svg" in text
    assert json.loads((out / "front.json").read_text())["rows"] == found["rows"]


def test_a_front_of_what_is_no_run(files, tmp_path, capsys):
    assert cli.main(["delta", "front", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
