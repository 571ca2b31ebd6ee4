"""Checkpoint pairs: found, paired, refused, and never more than one tensor of each in memory."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoadam import analysis
from nanoadam.analysis import checkpoints


def saved(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    files = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, start=1)}
    for name, file in files.items():
        saved(folder, {name: tensors[name]}, file)
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def model(layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"encoder.layer.{i}.dense.weight": torch.randn(4, 5) for i in range(layers)}
    return {"embeddings.weight": torch.randn(6, 4), **found}


def test_a_sharded_and_a_single_checkpoint_give_the_changes_of_their_tensors(tmp_path: Path) -> None:
    old = model()
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["encoder.layer.1.dense.weight"][2, 3] += 0.5
    before = analysis.Checkpoint(saved(tmp_path / "before", old))
    after = analysis.Checkpoint(sharded(tmp_path / "after", new))
    assert before.shapes == after.shapes == {name: tuple(t.shape) for name, t in old.items()}
    found = dict(analysis.changes(before, after, checkpoints.match(before.shapes, after.shapes)))
    assert {name: shift.changed for name, shift in found.items() if shift.changed} == {
        "encoder.layer.1.dense.weight": 1
    }
    assert found["encoder.layer.1.dense.weight"].l2 == pytest.approx(0.5, rel=1e-6)
    assert found == {name: analysis.shift(old[name], new[name]) for name in old}


def test_no_more_than_one_tensor_of_each_checkpoint_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = analysis.Checkpoint(saved(tmp_path / "before", model(20)))
    after = analysis.Checkpoint(sharded(tmp_path / "after", model(20)))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, load = 0, analysis.Checkpoint.load

    def watched(self: analysis.Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = load(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(analysis.Checkpoint, "load", watched)
    names = [name for name, _ in analysis.changes(before, after, checkpoints.match(before.shapes, after.shapes))]
    assert len(names) == 21
    assert most == 2


def test_tensors_come_in_the_order_of_their_layers(tmp_path: Path) -> None:
    names = list(analysis.Checkpoint(saved(tmp_path / "m", model(12))).shapes)
    assert names == ["embeddings.weight", *(f"encoder.layer.{i}.dense.weight" for i in range(12))]


def test_integers_are_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", {"ids": torch.arange(3), "w": torch.ones(2, dtype=torch.bfloat16)})
    assert analysis.Checkpoint(folder).shapes == {"w": (2,)}


def test_a_base_model_pairs_with_the_model_around_it(tmp_path: Path) -> None:
    base = {name: tuple(t.shape) for name, t in model().items()}
    around = {f"bert.{name}": shape for name, shape in base.items()} | {"classifier.weight": (2, 4)}
    found = checkpoints.match(base, around)
    assert found.names == {f"bert.{name}": name for name in base}
    assert (found.only_before, found.only_after) == ([], ["classifier.weight"])
    back = checkpoints.match(around, base)
    assert back.names == {name: f"bert.{name}" for name in base}
    assert back.only_before == ["classifier.weight"]


def test_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"b\.weight has another shape than before: \[3, 2\], was \[2, 2\]"):
        checkpoints.match({"a": (1,), "b.weight": (2, 2)}, {"a": (1,), "b.weight": (3, 2)})
    with pytest.raises(ValueError, match="no tensor in common: x is not in the second, y not in the first"):
        checkpoints.match({"x": (1,)}, {"y": (1,)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "holds no safetensors"),
        (lambda folder: (folder.mkdir(), (folder / "pytorch_model.bin").write_bytes(b"x")), "pickled weights only"),
        (lambda folder: (folder.mkdir(), (folder / "model.safetensors").write_bytes(b"x" * 9)), "no whole safetensors"),
        (lambda folder: (sharded(folder, model()), next(folder.glob("*-of-*")).unlink()), "which is not there"),
        (lambda folder: (folder.mkdir(), (folder / checkpoints.INDEX).write_text("{}")), "is no index"),
        (lambda folder: (folder.mkdir(), (folder / checkpoints.INDEX).write_text("[1]")), "is no index"),
        (lambda folder: (folder.mkdir(), (folder / checkpoints.INDEX).write_bytes(b"\xff")), "is no index"),
    ],
)
def test_what_is_no_checkpoint_is_refused(make, words: str, tmp_path: Path) -> None:
    make(tmp_path / "m")
    with pytest.raises(ValueError, match=words):
        analysis.Checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bert.encoder.layer.3.output.dense.weight", (3, "output.dense")),
        ("model.layers.17.self_attn.q_proj.weight", (17, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("vit.encoder.layer.11.attention.attention.query.bias", (11, "attention.attention.query.bias")),
        ("blocks.5.attn.qkv.weight", (5, "attn.qkv")),
        ("mobilenet_v1.layer.4.convolution.weight", (4, "convolution")),
        ("0.weight", (None, "0")),
        ("bert.embeddings.word_embeddings.weight", (None, "bert.embeddings.word_embeddings")),
    ],
)
def test_the_place_of_a_tensor(name: str, found: tuple[int | None, str]) -> None:
    assert analysis.place(name) == found


def test_heatmap_by_hand() -> None:
    values = {"layer.0.q.weight": 3.0, "layer.0.k.weight": 1.0, "layer.2.q.weight": 5.0, "head.weight": 9.0,
              "decoder.layer.0.q.weight": 4.0}  # fmt: skip
    assert analysis.heatmap(values) == {"layers": [0, 2], "kinds": ["q", "k"], "values": [[5.0, 5.0], [1.0, None]]}
    assert analysis.heatmap(values, "mean")["values"][0] == [3.5, 5.0]
    with pytest.raises(ValueError, match="l2 or mean"):
        analysis.heatmap(values, "max")
