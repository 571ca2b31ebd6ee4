"""The files that default_rates.py runs on: token and pixel arrays of each task, models in 16 bits.

`python benchmarks/default_rates.py prepare` calls it, once, where the sources are.
"""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "dev")


def prepare(shared: Path, minilm: Path, out: Path) -> None:
    """Everything that `run` reads, in few bytes."""
    for name in ("minilm", "llama", "mobilenet"):
        (out / name).mkdir(parents=True, exist_ok=True)
    _copy_model(minilm, out / "minilm")
    _copy_model(shared / "docs_llama_23m", out / "llama")
    _texts(shared, out / "minilm", minilm)
    _completions(shared, out / "llama")
    _images(shared, out / "mobilenet")


def _copy_model(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    half = torch.bfloat16 if "llama" in str(source) else torch.float16
    config, state = (source / "config.json").read_text(), load_file(source / "model.safetensors")
    kept = {name: t.to(half) if t.is_floating_point() else t for name, t in state.items() if "position_ids" not in name}
    save_file(kept, out / "model.safetensors")
    (out / "config.json").write_text(config)


def _texts(shared: Path, out: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with tarfile.open(shared / "glue" / "glue_cola_sst2.tar.xz") as glue:
        lines = {m: glue.extractfile(m).read().decode().splitlines() for m in glue.getnames() if m.endswith(".tsv")}
    rows = {
        "cola": [[(r.split("\t")[3], None, int(r.split("\t")[1])) for r in lines[f"CoLA/{s}.tsv"]] for s in SPLITS],
        "sst2": [
            [(r.split("\t")[0], None, int(r.split("\t")[1])) for r in lines[f"SST-2/{s}.tsv"][1:]] for s in SPLITS
        ],
        "boolq": [
            [(_question(row["instruction"]), None, int(row["answer"] == "true")) for row in _adapters(shared, name)]
            for name in ("dataset/boolq/train.json", "dataset/boolq/test.json")
        ],
        "obqa-pairs": [_pairs(_adapters(shared, f"dataset/openbookqa/{s}.json")) for s in ("train", "test")],
    }
    for task, splits in rows.items():
        arrays: dict[str, Any] = {}
        for split, found in zip(SPLITS, splits, strict=True):
            firsts, seconds = [r[0] for r in found], [r[1] for r in found]
            encoded = tokenizer(firsts, seconds if seconds[0] is not None else None, truncation=True, max_length=128)
            arrays |= _packed(split, encoded["input_ids"], [r[2] for r in found])
            if seconds[0] is not None:
                arrays[f"{split}_second"] = np.array([ids.index(1) for ids in encoded["token_type_ids"]], np.int16)
        np.savez_compressed(out / f"{task}.npz", **arrays)


def _adapters(shared: Path, name: str) -> list[dict[str, str]]:
    with tarfile.open(shared / "llm_adapters" / "llm_adapters_data.tar.xz") as tar:
        found: list[dict[str, str]] = json.loads(tar.extractfile(name).read())
    return found


def _question(instruction: str) -> str:
    return instruction.split("question:", 1)[1].split("\n")[0].strip()


def _pairs(rows: list[dict[str, str]]) -> list[tuple[str, str, int]]:
    """A question with its right answer or one of the three wrong ones, in turn."""
    found = []
    for number, row in enumerate(rows):
        question, choices = row["instruction"].split("question: ", 1)[1].split("\n\nAnswer1: ", 1)
        texts = choices.split("\n\n")[0].replace("Answer2: ", "|").replace("Answer3: ", "|").replace("Answer4: ", "|")
        options = [text.strip() for text in texts.split("|")]
        right = int(row["answer"][-1]) - 1
        shown = right if number % 2 else (right + 1 + number // 2 % (len(options) - 1)) % len(options)
        found.append((question.strip(), options[shown], int(shown == right)))
    return found


def _completions(shared: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "docs_llama_23m")

    def gsm(split: str) -> list[tuple[str, str]]:
        text = lzma.decompress((shared / "gsm8k" / f"{split}.jsonl.xz").read_bytes()).decode()
        return [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]

    def adapters(name: str) -> list[tuple[str, str]]:
        return [(row["instruction"], row["output"]) for row in _adapters(shared, name)]

    math = adapters("ft-training_set/math_data.json")
    random.Random(0).shuffle(math)
    rows = {
        "gsm8k": (gsm("train"), gsm("test")[:640]),
        "math": (math[400:], math[:400]),
        "obqa": (adapters("dataset/openbookqa/train.json"), adapters("dataset/openbookqa/test.json")),
    }
    for task, splits in rows.items():
        arrays: dict[str, Any] = {}
        for split, found in zip(SPLITS, splits, strict=True):
            ids, starts = [], []
            for prompt, answer in found:
                head = [tokenizer.bos_token_id] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
                tail = tokenizer(" " + answer.lstrip(), add_special_tokens=False)["input_ids"]
                ids.append((head + tail + [tokenizer.eos_token_id])[:512])
                starts.append(len(head))
            arrays |= _packed(split, ids, starts)
        np.savez_compressed(out / f"{task}.npz", **arrays)


def _packed(split: str, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> dict[str, Any]:
    ends = np.cumsum([len(row) for row in ids])
    return {
        f"{split}_ids": np.concatenate([np.asarray(row, np.uint16) for row in ids]),
        f"{split}_ends": ends.astype(np.int32),
        f"{split}_labels": np.asarray(labels, np.int16),
    }


def _images(shared: Path, out: Path) -> None:
    from PIL import Image
    from vision_files import SIZE, convert_model, decode

    convert_model(shared / "mobilenet_v1_075_imagenet" / "mobilenet_v1_075_224_imagenet.npz", out)
    _copy_model(out, out)
    cifar = np.load(shared / "cifar10_jpeg" / "cifar10_full_jpegbytes.npz", allow_pickle=False)
    arrays: dict[str, Any] = {}
    for split, name, count in (("train", "train", 2_500), ("dev", "test", 1_000)):
        chosen = random.Random(0).sample(range(len(cifar[f"{name}_y"])), count)
        off, joined = cifar[f"{name}_off"], cifar[f"{name}_jpeg"]
        files = [joined[off[i] : off[i + 1]] for i in chosen]
        arrays |= _jpegs(split, files, cifar[f"{name}_y"][chosen])
    np.savez(out / "cifar10.npz", **arrays)
    arrays, found = {}, {"train": [], "test": []}
    with tarfile.open(shared / "flowers12" / "flowers12_224_jpg.tar") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith(".jpg"):
                split, species = Path(member.name).parts[-3:-1]
                small = io.BytesIO()
                pixels = Image.fromarray(decode(tar.extractfile(member).read())).resize((SIZE, SIZE))
                pixels.save(small, format="jpeg", quality=92)
                found[split].append((species, np.frombuffer(small.getvalue(), np.uint8)))
    names = sorted({species for species, _ in found["train"]})
    for split, name in (("train", "train"), ("dev", "test")):
        arrays |= _jpegs(split, [f for _, f in found[name]], np.array([names.index(s) for s, _ in found[name]]))
    np.savez(out / "flowers12.npz", **arrays)


def _jpegs(split: str, files: Sequence[Any], labels: Any) -> dict[str, Any]:
    ends = np.cumsum([len(file) for file in files])
    return {f"{split}_jpeg": np.concatenate(files), f"{split}_ends": ends.astype(np.int64),
            f"{split}_labels": np.asarray(labels, np.int16)}  # fmt: skip
