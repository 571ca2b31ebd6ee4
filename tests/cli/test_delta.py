"""`nanoadam delta`: the commands do what the functions do, and refuse in one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from nanoadam import delta
from nanoadam.cli import main


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(200, 100).bfloat16(), "b": torch.zeros(7), "same": torch.ones(3)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"].view(-1)[::60] = 9
    tuned["b"] += 1
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path, tuned


def run(capsys, *arguments, code=0):
    assert main(["delta", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_the_way_round(models, capsys):
    folder, tuned = models
    said = run(capsys, "diff", folder / "base", folder / "tuned", folder / "p.safetensors").out
    assert "made on base" in said
    assert "sparse" in said
    assert "1 tensors stay as they are" in said
    run(capsys, "apply", folder / "base", folder / "p.safetensors", folder / "out")
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in load_file(folder / "out/model.safetensors").items())
    assert "is the base of this patch" in run(capsys, "verify", folder / "base", folder / "p.safetensors").out
    assert "is the finetuned model" in run(capsys, "verify", folder / "out", folder / "p.safetensors").out
    run(capsys, "apply", folder / "base", folder / "p.safetensors", folder / "half", "--strength", 0.5)
    assert load_file(folder / "half/model.safetensors")["b"][0] == 0.5
    said = run(capsys, "verify", folder / "half", folder / "p.safetensors", code=1).out
    assert "neither the base nor the finetuned model: 2 tensors" in said


def test_json(models, capsys):
    folder, _ = models
    about = json.loads(run(capsys, "diff", folder / "base", folder / "tuned", folder / "p.safetensors", "--json").out)
    assert about["kinds"]["sparse"]["weights"] == 334
    assert about["file_bytes"] == (folder / "p.safetensors").stat().st_size
    assert json.loads(run(capsys, "info", folder / "p.safetensors", "--json").out) == about
    assert len(about["tensors"]) == 2
    done = run(capsys, "apply", folder / "base", folder / "p.safetensors", folder / "out", "--json").out
    assert json.loads(done)["weights"] == 341
    state = json.loads(run(capsys, "verify", folder / "tuned", folder / "p.safetensors", "--json").out)
    assert (state["state"], state["tuned"], state["same"]) == ("tuned", 2, 1)


def test_a_line_for_each_tensor(models, capsys):
    folder, _ = models
    delta.diff(folder / "base", folder / "tuned", out=folder / "p.safetensors")
    lines = run(capsys, "info", folder / "p.safetensors", "--tensors").out.splitlines()
    assert any(line.split()[:3] == ["w", "sparse", "BF16"] for line in lines)


def test_compose(models, capsys):
    folder, tuned = models
    further = {name: tensor.clone() for name, tensor in tuned.items()}
    further["w"][0, 1] = 8
    save_file(further, folder / "further.safetensors")
    delta.diff(folder / "base", folder / "tuned", out=folder / "a.safetensors")
    delta.diff(folder / "tuned", folder / "further.safetensors", out=folder / "b.safetensors")
    run(capsys, "compose", folder / "a.safetensors", folder / "b.safetensors", folder / "c.safetensors")
    assert delta.verify(folder / "further.safetensors", folder / "c.safetensors").is_tuned


def test_what_is_refused(models, capsys):
    folder, _ = models
    patch = folder / "p.safetensors"
    delta.diff(folder / "base", folder / "tuned", out=patch)
    content = bytearray(patch.read_bytes())
    content[-200] ^= 1
    (folder / "damaged.safetensors").write_bytes(content)
    wrong = [
        (("apply", folder / "nowhere", patch, folder / "out"), "no file or folder"),
        (("apply", folder / "base", folder / "damaged.safetensors", folder / "out"), "is damaged"),
        (("apply", folder / "base", patch, folder / "tuned"), "exists already"),
        (("apply", folder / "base", patch, folder / "out", "--strength", "nan"), "strength"),
        (("diff", folder / "base", folder / "tuned", patch), "exists already"),
        (("diff", folder / "base", folder / "tuned", folder / "no" / "p"), "cannot be written"),
        (("info", folder / "base" / "model.safetensors"), "no patch"),
        (("verify", folder / "base", folder / "damaged.safetensors"), "is damaged"),
    ]
    for arguments, words in wrong:
        said = run(capsys, *arguments, code=2)
        assert words in said.err
        assert len(said.err.strip().splitlines()) == 1
        assert "Traceback" not in said.err
    assert {path.name for path in folder.iterdir()} == {"base", "tuned", "p.safetensors", "damaged.safetensors"}


@pytest.mark.filterwarnings("ignore")
def test_export(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from nanoadam.finetuning import patches

    base = tiny.causal_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.view(-1)[::60] += 0.125
    (tmp_path / "patch").mkdir()
    patches.save(tmp_path / "patch", tuned, delta.snapshot(model), name=str(base))
    out = run(capsys, "export", base, tmp_path / "patch", tmp_path / "adapter").out
    assert "1 layers" in out
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tuned.state_dict().values(), strict=True)
    )
