"""Two tasks in sequence on images in memory: what is put back, what is frozen, and what runs share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("transformers")

import numpy as np
import transformers

from nanoadam.finetuning import arrays, folders, norms
from nanoadam.paper import experiments, forgetting, front, recipe, reproduce, vision


def mobilenet(classes: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.MobileNetV1Config(
        depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.0, num_labels=classes
    )
    model = transformers.MobileNetV1ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # signals that come through without BatchNorm's statistics
    return model


def save_images(path: Path, count: int, classes: int, side: int = 32) -> None:
    """Each class is a colour of its own, with noise."""
    random = np.random.default_rng(count)
    labels = np.arange(count) % classes
    images = random.integers(0, 60, (count, side, side, 3)) + 190 * np.eye(3, dtype=int)[labels % 3][:, None, None, :]
    np.savez(path, images=images.astype(np.uint8), labels=labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    mobilenet().save_pretrained(root / "mobilenet")
    for name, classes in (("old", 3), ("new", 2)):
        for split, count in (("train", 24), ("test", 12)):
            save_images(root / f"{name}-{split}.npz", count, classes)
    return root


# Images ------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_and_is_the_same_for_the_same_seed() -> None:
    images = vision.Images(
        torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 4, 4, 3), torch.arange(10), 10
    )
    first, again = (
        [labels for _, labels in vision.batches(images, 4, torch.Generator().manual_seed(1), shift=2)] for _ in range(2)
    )
    assert [len(labels) for labels in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    assert torch.equal(torch.cat(first), torch.cat(again))
    for pixels, labels in vision.batches(images, 4, torch.Generator().manual_seed(2), shift=2):
        assert torch.equal(pixels, labels.to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3))


def test_images_are_mirrored_and_shifted_with_their_border_repeated() -> None:
    row = torch.arange(1, 6, dtype=torch.uint8)
    images = vision.Images(
        row[None, None, :, None].expand(64, 5, 5, 3).contiguous(), torch.zeros(64, dtype=torch.long), 1
    )
    ((pixels, _),) = vision.batches(images, 64, torch.Generator().manual_seed(0), shift=1)
    seen = {tuple(line) for line in pixels[:, 0, :, 0].tolist()}
    whole = [(1, 2, 3, 4, 5), (1, 1, 2, 3, 4), (2, 3, 4, 5, 5)]
    assert seen == {*whole, *(line[::-1] for line in whole)}


def test_inputs_are_scaled_as_the_models_processor_says(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0, 1], "image_std": [0.5, 1, 2]}')
    scale = vision.read_scale(tmp_path)
    inputs = scale(torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 2, 3))
    assert inputs.shape == (1, 3, 2, 2)
    assert inputs[0, :, 0, 0].tolist() == pytest.approx([-1.0, 0.2, 0.0])


def test_rows_are_resized_and_chosen_by_a_seed(folder: Path) -> None:
    load = lambda **more: vision.load(folder / "old-train.npz", 16, torch.device("cpu"), **more)  # noqa: E731
    assert load().pixels.shape == (24, 16, 16, 3)
    few = load(rows=6)
    assert torch.equal(few.pixels, load(rows=6).pixels)
    assert few.labels.tolist() != load(rows=6, order=1).labels.tolist()
    assert few.classes == 3


@pytest.mark.parametrize("kept", [0, 10, 400, -30])
def test_a_file_that_was_cut_off_is_named(kept: int, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes((folder / "old-train.npz").read_bytes()[:kept])
    for read in (arrays.read_arrays, lambda path: experiments.split_medmnist(path, tmp_path / "parts")):
        with pytest.raises(ValueError, match="cut.npz cannot be read as an npz file"):
            read(tmp_path / "cut.npz")


def test_accuracy_leaves_the_modules_as_they_were(folder: Path) -> None:
    model, images = mobilenet().train(), vision.load(folder / "old-test.npz", 32, torch.device("cpu"))
    norms.freeze_norms(model)
    before = [module.training for module in model.modules()]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert vision.accuracy(model, images, vision.Scale(), batch_size=5) == pytest.approx(4 / 12)
    assert [module.training for module in model.modules()] == before


# Heads and norms ---------------------------------------------------------------------------------------------


def test_the_old_head_comes_back_bit_for_bit() -> None:
    model = mobilenet()
    inputs = torch.randn(2, 3, 32, 32)
    model.eval()
    expected = model(pixel_values=inputs).logits
    old = forgetting.head_of(model)
    forgetting.put_head(model, forgetting.new_head(model, 5, seed=1))
    assert model(pixel_values=inputs).logits.shape == (2, 5)
    forgetting.put_head(model, old)
    assert torch.equal(model(pixel_values=inputs).logits, expected)


def test_a_new_head_depends_on_its_seed_alone() -> None:
    model = mobilenet()
    one, same, other = (forgetting.new_head(model, 4, seed)["classifier"].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_norms_keep_their_bits_in_training(frozen: bool) -> None:
    model = mobilenet().train()
    if frozen:
        norms.freeze_norms(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(pixel_values=torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("convolution" in name for name in changed)
    assert any("normalization" in name for name in changed) is not frozen


def test_shift_counts_the_backbone_alone() -> None:
    model = mobilenet()
    before = forgetting.backbone(model)
    weight = model.mobilenet_v1.conv_stem.convolution.weight
    with torch.no_grad():
        weight[0, 0, 0, :2] += torch.tensor([3.0, 4.0])
        model.classifier.weight.add_(1.0)
    moved = forgetting.shift(model, before)
    assert moved["l2"] == pytest.approx(5.0)
    assert moved["mean_l2"] == pytest.approx(5.0 / len(before))
    assert moved["touched"] == pytest.approx(2 / sum(p.numel() for p in before.values()))
    assert {name for name, value in moved["tensors"].items() if value} == {"conv_stem.convolution.weight"}


def test_the_average_is_that_of_the_papers_table() -> None:
    row = forgetting.scores(0.9937, 0.9813, 0.9935)  # NanoAdam on ViT-Large
    assert row["average"] == pytest.approx(0.9895, abs=5e-5)
    assert row["forgetting"] == pytest.approx(0.0002)


# The whole experiment ----------------------------------------------------------------------------------------


def experiment(folder: Path, **more: Any) -> front.Front:
    nano = {"density": 0.1, "mask_interval": 2}
    methods = {
        "AdamW": front.Method("adamw", 1e-3, (1e-4, 1e-2)),
        "NanoAdam": front.Method("nanoadam", 1e-2, (1e-3, 1e-2), nano),
        "head only": front.Method("adamw", 1e-3, (1e-2,), only_head=True),
        "apart": front.Method("nanoadam", 1e-2, (0.0,), nano, dense_rate=1e-2),
    }
    parts = (
        front.Part(("AdamW", "NanoAdam", "head only", "apart"), start="AdamW", norms="frozen", seeds=(0,)),
        front.Part(("NanoAdam",), seeds=(0,)),
    )
    keys = {"side": 32, "batch_size": 8, "epochs": (1, 2), "evaluate_every": 1, "shift": 2, "parts": parts}
    paths = [tuple(str(folder / f"{task}-{split}.npz") for split in ("train", "test")) for task in ("old", "new")]
    model = more.pop("model", str(folder / "mobilenet"))
    return front.Front(model, *paths, **{"methods": methods, **keys, **more})


@pytest.fixture(scope="module")
def lines(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("front")
    found = front.run(experiment(folder), out / "lines.jsonl", out / "starts")
    assert found == folders.read_lines(out / "lines.jsonl")
    assert not [line for line in found if "stopped" in line]
    return found


def test_each_start_is_trained_once_and_before_its_runs(lines: list[dict[str, Any]]) -> None:
    keys = [(line["kind"], line["method"], line["rate"]) for line in lines]
    assert keys == [
        ("task1", "AdamW", 1e-3),
        ("task2", "AdamW", 1e-4), ("task2", "AdamW", 1e-2), ("task2", "NanoAdam", 1e-3), ("task2", "NanoAdam", 1e-2),
        ("task2", "head only", 1e-2), ("task2", "apart", 0.0),
        ("task1", "NanoAdam", 1e-2),
        ("task2", "NanoAdam", 1e-3), ("task2", "NanoAdam", 1e-2),
    ]  # fmt: skip


def test_what_is_not_trained_is_not_forgotten(lines: list[dict[str, Any]]) -> None:
    """Task 1 is measured again with its own head, and a backbone that keeps its bits has forgotten nothing."""
    for method in ("head only", "apart"):  # a backbone of rate 0
        (line,) = (line for line in lines if line["method"] == method)
        assert line["shift"]["l2"] == 0.0 == line["forgetting"]
    assert {line["task1"] for line in lines if line["start"] == "AdamW"} == {lines[0]["task1"]}


def test_sparse_runs_touch_what_they_select(lines: list[dict[str, Any]]) -> None:
    touched = {(line["method"], line["norms"]): line["shift"]["touched"] for line in lines if line["kind"] == "task2"}
    assert 0 < touched["NanoAdam", "frozen"] < 0.3 < touched["AdamW", "frozen"]


def test_the_table_takes_the_runs_of_one_condition(lines: list[dict[str, Any]]) -> None:
    common = front.table(lines, "frozen", "AdamW", (0.0, 0.0))
    assert {row["method"]: len(row["points"]) for row in common} == {
        "AdamW": 2, "NanoAdam": 2, "head only": 1, "apart": 1
    }  # fmt: skip
    assert [row["method"] for row in front.table(lines, "trained", None, (0.0, 0.0))] == ["NanoAdam"]


@pytest.mark.slow
def test_runs_are_the_same_in_processes_of_their_own(lines: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    part = front.Part(("NanoAdam",), start="AdamW", norms="frozen", seeds=(0,))
    again = front.run(experiment(folder, parts=(part,)), tmp_path / "lines.jsonl", tmp_path / "starts", processes=2)

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["kind"], line["method"], line["rate"], line["start"], line["norms"]

    before = {key(line): line.get("task1_after") for line in lines}
    assert len(again) == 3
    assert all(line.get("task1_after") == before[key(line)] for line in again)


def test_a_run_draws_its_own_dropout_whatever_ran_before(folder: Path, tmp_path: Path) -> None:
    model = mobilenet()
    model.config.classifier_dropout_prob = 0.5
    model.save_pretrained(tmp_path / "mobilenet")
    part = front.Part(("NanoAdam",), start="AdamW", norms="frozen", seeds=(0,))
    job = experiment(folder, parts=(part,), model=str(tmp_path / "mobilenet"))
    found = front.run(job, tmp_path / "lines.jsonl", tmp_path / "starts")
    assert front.run(job, tmp_path / "lines.jsonl", tmp_path / "starts") == found  # read
    text = (tmp_path / "lines.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "lines.jsonl").write_text("".join(text[:-1]))
    again = front.run(job, tmp_path / "lines.jsonl", tmp_path / "starts")
    assert again[:-1] == found[:-1]
    assert again[-1]["shift"] == found[-1]["shift"]


def test_a_run_that_fails_loses_no_other(folder: Path, tmp_path: Path) -> None:
    methods = {
        "wild": front.Method("sgd", 1e-3, (1e38,)),
        "wrong": front.Method("nanoadam", 1e-3, (1e-3,), {"density": 2.0}),
        "fine": front.Method("sgd", 1e-3, (1e-3,)),
    }
    part = front.Part(("wild", "wrong", "fine"), start="fine", seeds=(0,))
    found = front.run(experiment(folder, methods=methods, parts=(part,)), tmp_path / "lines.jsonl", tmp_path / "starts")
    stopped = {line["method"]: line.get("stopped") for line in found if line["kind"] == "task2"}
    assert stopped["wild"] == "the loss is not finite"
    assert "density must be in (0, 1]" in stopped["wrong"]
    assert stopped["fine"] is None
    rows = front.table(found, "trained", "fine", (0.0, 0.0))
    assert [row["front"] != [] for row in rows] == [False, False, True]


def test_a_front_with_runs_that_stopped_says_so_and_is_json() -> None:
    lines = [
        {"kind": "task2", "method": "sgd", "norms": "trained", "start": "sgd", "seed": 0, "rate": rate, **found}
        for rate, found in ((0.1, {"task2": 0.9, "task1_after": 0.5}), (3.0, {"task2": None, "stopped": "why"}))
    ]
    part = front.Part(("sgd",), start="own", seeds=(0,))
    job = front.Front("m", ("a", "b"), ("c", "d"), {"sgd": front.Method("sgd", 0.1, (0.1, 3.0))}, (part,))
    (row,) = reproduce.fronts_of(job, lines).rows
    assert row["stopped"] == ["1 of 2 runs stopped"] and row["here"]["mean"] == pytest.approx(0.45)
    assert [point["x"] for point in json.loads(json.dumps(row, allow_nan=False))["points"]] == [0.9, None]


def test_no_run_begins_after_the_time_is_up(folder: Path, tmp_path: Path) -> None:
    assert front.run(experiment(folder), tmp_path / "lines.jsonl", tmp_path / "starts", seconds=0) == []


def test_the_recipe_is_what_it_says() -> None:
    job = front.from_recipe(recipe.load("forgetting-front").keys, Path("data"))
    assert job.task1 == ("data/cifar10-train.npz", "data/cifar10-test.npz")
    jobs = job.jobs()
    assert len(jobs) == len(set(jobs))
    assert {job.seed for job in jobs} == {0, 1, 2}
    position = {job: i for i, job in enumerate(jobs)}
    assert all(position[job.start] < position[job] for job in jobs if job.start)


def test_what_cannot_run_is_refused_first(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no method 'Adamw'; did you mean 'AdamW'"):
        experiment(folder, parts=(front.Part(("Adamw",)),))
    with pytest.raises(ValueError, match="norms must be trained or frozen, got 'fixed'"):
        experiment(folder, parts=(front.Part(("AdamW",), norms="fixed"),))
