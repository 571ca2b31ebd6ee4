"""The small forgetting experiment's files: Keras' layout becomes the same network, images keep their pixels."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
pytest.importorskip("transformers")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def load_program(name: str):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program():
    return load_program("vision_files")


def keras_arrays(model) -> dict:
    """A transformers MobileNetV1 as Keras stores it: kernels HWIO, depthwise ones HWC1."""
    found = {}
    layers = {"conv1": model.mobilenet_v1.conv_stem}
    for i in range(1, 14):
        layers[f"conv_dw_{i}"], layers[f"conv_pw_{i}"] = model.mobilenet_v1.layer[2 * i - 2 : 2 * i]
    for name, layer in layers.items():
        weight, norm = layer.convolution.weight.detach(), layer.normalization
        depthwise = "_dw_" in name
        order = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        found[f"{name}/{'depthwise_kernel' if depthwise else 'kernel'}"] = weight.permute(order).numpy()
        parts = {"gamma": norm.weight, "beta": norm.bias, "moving_mean": norm.running_mean}
        for part, value in {**parts, "moving_variance": norm.running_var}.items():
            found[f"{name}_bn/{part}"] = value.detach().numpy()
    found["conv_preds/kernel"] = model.classifier.weight.detach().T[None, None].numpy()
    found["conv_preds/bias"] = model.classifier.bias.detach().numpy()
    return found


def test_keras_weights_become_the_same_network(program, tmp_path: Path) -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV1Config(depth_multiplier=0.75, layer_norm_eps=1e-3, num_labels=1000)
    model = MobileNetV1ForImageClassification(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    np.savez(tmp_path / "keras.npz", **keras_arrays(model))
    program.convert_model(tmp_path / "keras.npz", tmp_path / "mobilenet")
    again = MobileNetV1ForImageClassification.from_pretrained(tmp_path / "mobilenet").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, model(pixel_values=images).logits)
    assert again.dropout.p < 0.01  # transformers' default of 0.999 would leave nothing to train on


def jpeg(colour: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (colour, 0, 0)).save(buffer, format="jpeg", quality=95)
    return buffer.getvalue()


def test_jpeg_bytes_become_images_in_their_order(program, tmp_path: Path) -> None:
    files = [jpeg(colour) for colour in (0, 100, 250)]
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_off"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_y"] = np.array([2, 0, 1], dtype=np.uint8)
    np.savez(tmp_path / "cifar.npz", **arrays)
    program.convert_cifar(tmp_path / "cifar.npz", tmp_path)
    found = np.load(tmp_path / "cifar10-test.npz")
    assert found["labels"].tolist() == [2, 0, 1]
    assert [int(image[..., 0].mean().round(-1)) for image in found["images"]] == [0, 100, 250]


def test_flowers_are_labelled_by_their_folder(program, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "flowers.tar", "w") as tar:
        for split in ("train", "test"):
            for colour, species in ((250, "rose"), (0, "iris")):
                member = tarfile.TarInfo(f"flowers/{split}/{species}/1.jpg")
                member.size = len(jpeg(colour))
                tar.addfile(member, io.BytesIO(jpeg(colour)))
    program.convert_flowers(tmp_path / "flowers.tar", tmp_path)
    found = np.load(tmp_path / "flowers12-train.npz")
    assert found["labels"].tolist() == [0, 1]  # iris, rose
    assert found["images"][0].mean() < found["images"][1].mean()


def test_gradients_are_measured_from_both_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanoadam.paper import smoke

    smoke.model("mobilenet", tmp_path / "mobilenet")
    for split, count in (("train", 32), ("test", 8)):
        smoke.images(tmp_path / f"cifar10-{split}.npz", count, 3)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out.json"), "--seeds", "1", "--epochs", "1"]
    arguments += ["--side", "32", "--device", "cpu", "--shuffled", "3"]
    monkeypatch.setattr("sys.argv", ["vision_gradients", *arguments])
    load_program("vision_gradients").main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["from"] for run in found["runs"]] == ["pretrained", "scratch"]
    for run in found["runs"]:
        assert run["ratio"]["0"] > 0
        assert len(run["points"]["0"]["weight"]) == len(run["points"]["0"]["gradient"]) > 0
        assert 0 < run["shift"]["touched"] <= 1
    for start in ("pretrained", "scratch"):
        anywhere = found["shuffled"][start]
        assert len(anywhere["all"]["ratio"]) == 3 and min(anywhere["all"]["ratio"]) > 0
        assert min(anywhere["all"]["overlap"]) >= 0
    assert set(found["shuffled"]["kinds"]) == set(found["runs"][0]["tensors"]["0"])

    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    shown, picture = load_program("gradient_tables"), tmp_path / "planes.png"
    shown.main([str(tmp_path / "out.json"), "--picture", str(picture)])
    assert "| pretrained | 0 |" in capsys.readouterr().out
    assert picture.stat().st_size


@pytest.mark.skipif(not (SHARED / "mobilenet_v1_075_imagenet").is_dir(), reason="the weights are not here")
def test_the_real_weights_know_a_daisy(program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.convert_model(next(SHARED.glob("mobilenet*/*.npz")), tmp_path / "mobilenet")
    program.convert_flowers(next(SHARED.glob("flowers12/*.tar")), tmp_path)
    program.check(tmp_path, daisy=3)
    assert "20 of 20" in capsys.readouterr().out
