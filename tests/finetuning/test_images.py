"""Image classification from folders, arrays and tables, and images that are none."""

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import numpy as np
from PIL import Image

import tiny
from nanoadam import cli
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def pixels(count: int) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 60, (count, 10, 12, 3), dtype=np.uint8)
    images[::2] += 180  # every other one is bright
    return images


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "vit"
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    images, rows = pixels(20), []
    for i, image in enumerate(images):
        name = f"folder/{('bright', 'dark')[i % 2]}/{i}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
        rows.append({"file": name, "class": ("bright", "dark")[i % 2]})
    tiny.jsonl(root / "table.jsonl", rows)
    np.savez(root / "arrays.npz", images=images, labels=np.arange(20) % 2)
    import datasets

    table = {"image": [str(root / row["file"]) for row in rows], "label": [i % 2 for i in range(20)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bright", "dark"])})
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "images.parquet")
    return {
        "folder": root / "folder",
        "table": root / "table.jsonl",
        "arrays": root / "arrays.npz",
        "parquet": root / "images.parquet",
    }


@pytest.mark.parametrize("kind", ["folder", "table", "arrays", "parquet"])
def test_every_source_gives_the_same_images(kind: str, vit: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    config = Config(
        task="image-classification", model=str(vit), train=str(sources[kind]), max_steps=2, batch_size=4, device="cpu"
    )
    job = finetune.prepare(config)
    assert len(job.task.train) + len(job.task.validation) == 20
    batch = job.task.collator([job.task.train[i] for i in range(18)])
    assert batch["pixel_values"].shape == (18, 3, 8, 8)
    bright = batch["pixel_values"].mean(dim=(1, 2, 3)) > 0
    assert bright.tolist() == [label == 0 for label in batch["labels"].tolist()]
    results = finetune.run(config, tmp_path / "run")
    assert 0 <= results["final"]["accuracy"] <= 1


def refused(vit: Path, train: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = ["--task", "image-classification", "--model", str(vit), "--train", str(train), "--out", str(out)]
    assert cli.main(["finetune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not out.exists()
    return error


def test_an_image_that_does_not_decode_is_named(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, image in enumerate(pixels(6)):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    whole = (tmp_path / "images" / "b" / "1.png").read_bytes()
    for content in (b"no image", whole[: len(whole) // 2]):
        (tmp_path / "images" / "b" / "1.png").write_bytes(content)
        error = refused(vit, tmp_path / "images", tmp_path / "run", capsys)
        assert "1.png) holds no image that can be decoded" in error


@pytest.mark.parametrize("missing", [None, 7])
def test_a_row_without_an_image_is_named(
    missing: int | None, vit: Path, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((sources["folder"]).glob("*/*")))
    held = {None: image, 7: 7}[missing]  # a column holds one type
    rows = [{"image": missing if i == 4 else held, "label": "ab"[i % 2]} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refused(vit, path, tmp_path / "run", capsys)
    assert "holds no image that can be decoded" in error and f"{missing!r} is neither a path nor bytes" in error


def test_arrays_that_are_no_images(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, images=np.zeros((4, 8, 8)), labels=np.arange(4))
    assert "must hold uint8 images" in refused(vit, path, tmp_path / "run", capsys)
    np.savez(path, x=np.zeros(4))
    assert "must hold the arrays images and labels, and holds x" in refused(vit, path, tmp_path / "run", capsys)
    np.savez(path, images=np.array([{}], dtype=object), labels=np.arange(1))
    assert "cannot be read as an npz file of arrays" in refused(vit, path, tmp_path / "run", capsys)
    for content in (b"", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        assert "cannot be read as an npz file of arrays" in refused(vit, path, tmp_path / "run", capsys)
    (tmp_path / "empty").mkdir()
    assert "one subfolder of images for each label" in refused(vit, tmp_path / "empty", tmp_path / "run", capsys)
