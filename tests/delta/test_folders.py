"""Folders of saved models: shard by shard, whole or not at all, and nothing outside of them."""

import json
import subprocess
import sys

import pytest
import torch
from cases import same
from safetensors.torch import load_file, save_file

from nanoadam import delta
from nanoadam.delta import DeltaError
from nanoadam.delta.sources import INDEX, SINGLE


def save(folder, shards, **others):
    """A saved model: one file, or several and their index."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, {"format": "pt"})
    else:
        table = {}
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            table |= dict.fromkeys(shard, name)
        content = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(content))
    for name, text in others.items():
        (folder / name).write_text(text)
    return folder


def load(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def models(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shards = [
        {"embed": torch.randn(50, 20, generator=generator).bfloat16(), "a.weight": torch.randn(30, 20)},
        {"b.weight": torch.randn(30, 40).half(), "b.bias": torch.zeros(30), "old.head": torch.ones(3)},
    ]
    tuned = {name: tensor.clone() for shard in shards for name, tensor in shard.items() if name != "old.head"}
    tuned["embed"].view(-1)[::30] = 3
    tuned["b.weight"][:, 7] = 5
    tuned["b.bias"] += 1
    tuned["head"] = torch.randn(4, 20)
    return shards, tuned


def test_shards_and_their_index(tmp_path):
    shards, tuned = models()
    base = save(tmp_path / "base", shards, **{"tokenizer.json": "{}", "notes.md": "x", "pytorch_model.bin": "x"})
    finetuned = save(tmp_path / "tuned", [tuned])
    seen = []
    patch = delta.diff(base, finetuned, out=tmp_path / "p.safetensors", progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tuned.values())
    assert (patch.base, patch.removed) == ("base", ("old.head",))
    seen.clear()
    delta.apply(base, tmp_path / "p.safetensors", out=tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for shard in shards for tensor in shard.values())
    assert same(load(tmp_path / "out"), tuned)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tuned.values()), "kept": "yes"}
    assert set(index["weight_map"]) == set(tuned)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "notes.md"} < names
    assert "pytorch_model.bin" not in names
    assert delta.verify(base, patch).is_base
    assert delta.verify(tmp_path / "out", patch).is_tuned


def test_a_patch_in_a_folder_brings_its_configuration(tmp_path):
    shards, tuned = models()
    base, finetuned = save(tmp_path / "base", shards), save(tmp_path / "tuned", [tuned])
    folder = tmp_path / "patch"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_labels": 4}')
    delta.diff(base, finetuned, out=folder / delta.FILE)
    delta.apply(base, folder, out=tmp_path / "out")
    assert same(load(tmp_path / "out"), tuned)
    assert (tmp_path / "out" / "config.json").read_text() == '{"num_labels": 4}'
    assert not (tmp_path / "out" / delta.FILE).exists()


def test_strength_on_folders_is_that_of_memory(tmp_path):
    shards, tuned = models()
    base, finetuned = save(tmp_path / "base", shards), save(tmp_path / "tuned", [tuned])
    patch = delta.diff(base, finetuned)
    delta.apply(base, patch, 0.6, out=tmp_path / "out")
    model = load(base)
    delta.apply(model, patch, 0.6)
    assert same(load(tmp_path / "out"), model)


def test_applied_to_the_finetuned_folder_it_is_a_copy(tmp_path):
    shards, tuned = models()
    base, finetuned = save(tmp_path / "base", shards), save(tmp_path / "tuned", [tuned])
    delta.apply(finetuned, delta.diff(base, finetuned), out=tmp_path / "out")
    assert same(load(tmp_path / "out"), tuned)


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    shards, tuned = models()
    base, finetuned = save(tmp_path / "base", shards), save(tmp_path / "tuned", [tuned])
    patch = delta.diff(base, finetuned)
    shards[1]["b.bias"][3] = 7
    other = save(tmp_path / "other", shards)
    with pytest.raises(DeltaError, match=r"b\.bias in .*other .* base"):
        delta.apply(other, patch, out=tmp_path / "out")
    with pytest.raises(DeltaError, match="out="):
        delta.apply(base, patch)
    with pytest.raises(DeltaError, match="exists already"):
        delta.apply(base, patch, out=finetuned)
    with pytest.raises(DeltaError, match="cannot be written"):
        delta.apply(base, patch, out=tmp_path / "no" / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"base", "tuned", "other"}
    assert same(load(finetuned), tuned)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "", "x\0"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, name):
    shards, _ = models()
    base = save(tmp_path / "base", shards)
    save(tmp_path / "other", shards[:1])
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["embed"] = name
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(DeltaError, match="not in its folder"):
        delta.diff(base, base)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    base = save(tmp_path / "base", models()[0])
    (base / INDEX).write_text(content)
    with pytest.raises(DeltaError, match="no index"):
        delta.diff(base, base)


def test_what_is_no_model_is_refused(tmp_path):
    shards, _ = models()
    base = save(tmp_path / "base", shards)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DeltaError, match="00002-of-00002"):
        delta.diff(base, base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeltaError, match="holds no model"):
        delta.diff(tmp_path / "empty", base)
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DeltaError, match="pickled"):
        delta.diff(tmp_path / "empty", base)
    with pytest.raises(DeltaError, match="no file or folder"):
        delta.diff(tmp_path / "nothing", base)
    double = save(tmp_path / "double", [shards[0], shards[1]])
    save_file(shards[0] | shards[1], double / "model-00002-of-00002.safetensors")
    with pytest.raises(DeltaError, match="twice"):
        delta.diff(double, double)


MEMORY = """
import resource, sys, torch
from nanoadam import delta

torch.set_num_threads(1)
base, tuned, folder = sys.argv[1:]
delta.diff(base, base)  # what is loaded and made once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
delta.diff(base, tuned, out=folder + "/p.safetensors")
delta.apply(base, folder + "/p.safetensors", out=folder + "/out.safetensors")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_one_tensor(tmp_path):
    """24 tensors of 8 MB, all of them changed: less than eight of them, where the two models are 48."""
    base = {f"w{i}": torch.zeros(2_000_000) for i in range(24)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for i, tensor in enumerate(tuned.values()):
        tensor[:: 100 if i % 2 else 1] = 1.0
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = [str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64e6
    assert same(load_file(tmp_path / "out.safetensors"), tuned)
