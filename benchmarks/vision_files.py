"""The files of the small forgetting experiment: a transformers folder and npz files from what was downloaded.

    python benchmarks/vision_files.py --data DATA --out vision

makes vision/mobilenet (MobileNetV1 0.75 with its ImageNet weights, from an npz in Keras' layout) and
vision/{cifar10,flowers12}-{train,test}.npz (arrays `images`, uint8 [n, height, width, 3], and `labels`), as far as the
sources are there. `--check` has the model tell the daisies among the flowers: ImageNet class 985.
"""

import argparse
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 96
"""Side of the images that the experiment trains on; what the folder's image processor resizes to."""


def convert_model(source: Path, out: Path) -> None:
    """Keras' layout to transformers': kernels HWIO to OIHW, depthwise HWC1 to C1HW."""
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification, ViTImageProcessorPil

    keras = {name: torch.from_numpy(array) for name, array in np.load(source, allow_pickle=False).items()}
    config = MobileNetV1Config(
        depth_multiplier=0.75, tf_padding=True, layer_norm_eps=1e-3, classifier_dropout_prob=1e-3, num_labels=1000
    )  # Keras' 1000 classes, without the background class of TensorFlow's own release
    model = MobileNetV1ForImageClassification(config)
    state = model.state_dict()

    def put(layer: str, kernel: str, norm: str) -> None:
        order = (2, 3, 0, 1) if "depthwise" in kernel else (3, 2, 0, 1)
        state[f"{layer}.convolution.weight"] = keras.pop(kernel).permute(order)
        parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        for part, name in parts.items():
            state[f"{layer}.normalization.{part}"] = keras.pop(f"{norm}/{name}")

    put("mobilenet_v1.conv_stem", "conv1/kernel", "conv1_bn")
    for i in range(1, 14):
        put(f"mobilenet_v1.layer.{2 * i - 2}", f"conv_dw_{i}/depthwise_kernel", f"conv_dw_{i}_bn")
        put(f"mobilenet_v1.layer.{2 * i - 1}", f"conv_pw_{i}/kernel", f"conv_pw_{i}_bn")
    state["classifier.weight"] = keras.pop("conv_preds/kernel")[0, 0].T
    state["classifier.bias"] = keras.pop("conv_preds/bias")
    if keras:
        raise SystemExit(f"{source} holds more than a MobileNetV1: {', '.join(keras)}")
    model.load_state_dict(state)
    model.save_pretrained(out)
    half = [0.5, 0.5, 0.5]  # pixels / 127.5 - 1
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half).save_pretrained(out)


def decode(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def convert_cifar(source: Path, out: Path) -> None:
    arrays = np.load(source, allow_pickle=False)
    for split in ("train", "test"):
        joined, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_off"]
        images = np.stack([decode(joined[a:b].tobytes()) for a, b in itertools.pairwise(offsets)])
        np.savez(out / f"cifar10-{split}.npz", images=images, labels=arrays[f"{split}_y"].astype(np.int64))


def convert_flowers(source: Path, out: Path) -> None:
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(source) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith(".jpg"):
                split, species = Path(member.name).parts[-3:-1]
                found[split].append((species, decode(tar.extractfile(member).read())))
    names = sorted({species for species, _ in found["train"]})
    for split, pairs in found.items():
        labels = np.array([names.index(species) for species, _ in pairs])
        np.savez(out / f"flowers12-{split}.npz", images=np.stack([image for _, image in pairs]), labels=labels)
    print("flowers:", ", ".join(names))


def check(out: Path, daisy: int) -> None:
    from transformers import MobileNetV1ForImageClassification

    flowers = np.load(out / "flowers12-test.npz")
    pixels = torch.from_numpy(flowers["images"][flowers["labels"] == daisy]).permute(0, 3, 1, 2) / 127.5 - 1
    model = MobileNetV1ForImageClassification.from_pretrained(out / "mobilenet").eval()
    with torch.no_grad():
        classes = model(pixel_values=pixels).logits.argmax(dim=1)
    print(f"daisies told as ImageNet's class 985: {int((classes == 985).sum())} of {len(classes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that the sources are somewhere in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = {
        "mobilenet_v1_075_224_imagenet.npz": lambda path: convert_model(path, arguments.out / "mobilenet"),
        "cifar10_full_jpegbytes.npz": lambda path: convert_cifar(path, arguments.out),
        "flowers12_224_jpg.tar": lambda path: convert_flowers(path, arguments.out),
    }
    for name, convert in steps.items():
        for source in sorted(arguments.data.rglob(name))[:1]:
            print(source)
            convert(source)
    if arguments.check:
        check(arguments.out, daisy=3)


if __name__ == "__main__":
    main()
