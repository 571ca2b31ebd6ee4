"""Checkpoints of a run: which there are, and whether they still are what was written.

Each is sealed by `checksums.json`, the size and the CRC-32 of every file that going on reads. Without it a flipped byte
in a weight, or an optimizer state that is gone, would train on without a word: transformers takes what it finds.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from nanoadam.finetuning import processes

BEST = "best.safetensors"
"""The weights of the best evaluation so far, beside the checkpoints."""

SEAL = "checksums.json"
_READ = (
    "*.pt", "*.pth", "*.safetensors", "*.index.json", "trainer_state.json", "config.json", "adapter_config.json"
)  # fmt: skip
"""What going on reads of a checkpoint; the rest is for people and for whoever loads its model."""

_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_BLOCK = 2**22


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint in a folder."""
    last: Any = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None  # type: ignore[no-untyped-call]
    return None if last is None else Path(last)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Write down what its files are, once all are written."""
    paths = sorted({path for pattern in _READ for path in checkpoint.glob(pattern)})
    content = {path.name: {"bytes": path.stat().st_size, "crc32": _crc(path)} for path in paths}
    (checkpoint / SEAL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _crc(path: Path) -> str:
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


def check(checkpoint: Path, run: Path, best: bool = False) -> None:
    """Refuse a checkpoint that is not as it was written, before anything of the run is changed.

    Args:
        checkpoint: its folder.
        run: the run folder.
        best: look at the best weights as well, which are put back at the end.

    Raises:
        ValueError: names the file, what is wrong with it, and what there is to go on from.
    """
    sentence = processes.by_first(lambda: _sentence(checkpoint, run) or (_best_fault(checkpoint) if best else None))
    if sentence is not None:
        raise ValueError(sentence)


def _sentence(checkpoint: Path, run: Path) -> str | None:
    what = _fault(checkpoint)
    if what is None:
        return None
    earlier = sorted(
        (path for path in checkpoint.parent.glob("checkpoint-*") if path.name[11:].isdecimal()), key=step_of
    )
    earlier = [path for path in earlier if step_of(path) <= step_of(checkpoint)]
    broken = [earlier.pop()]
    while earlier and _fault(earlier[-1]) is not None:
        broken.append(earlier.pop())
    if earlier:
        return f"{what}: remove {' and '.join(map(str, broken))}, and --resume goes on from {earlier[-1]}"
    return (
        f"{what}, and there is no earlier checkpoint that is whole: begin anew with nanoadam finetune "
        f"{run / 'config.toml'} --out ANOTHER"
    )


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as the beginning of a sentence."""
    path = checkpoint / SEAL
    if not path.is_file():
        return _fault_of_form(checkpoint)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = {str(name): (int(about["bytes"]), str(about["crc32"])) for name, about in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        written = {}
    if not written:
        return f"{path} is damaged and lists no files"
    for name, (size, crc) in written.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} is damaged: it has {file.stat().st_size:,} bytes where {size:,} were written"
        if _crc(file) != crc:
            return f"{file} is damaged: its bytes are not those that were written, by their CRC-32 in {SEAL}"
    return None


def _fault_of_form(checkpoint: Path) -> str | None:
    """Likewise of one without checksums, as earlier versions wrote them: whether each file can be read at all."""
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    if not any(path.name != "touched.safetensors" for path in checkpoint.glob("*.safetensors")):
        return f"{checkpoint} holds no weights"
    for path in sorted({path for pattern in _READ for path in checkpoint.glob(pattern)}):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:  # what torch.save writes is a zip file
                with zipfile.ZipFile(path) as file:
                    broken = file.testzip()
                if broken is not None:
                    return f"{path} is damaged: {broken} in it is not what was written"
        except (SafetensorError, zipfile.BadZipFile, ValueError, RecursionError) as error:
            return f"{path} is damaged: {' '.join(str(error).split())}"
    return None


# The best weights -----------------------------------------------------------------------------------------


def save_best(path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Write the weights of an evaluation, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file(dict(tensors), str(temporary), {"step": str(step), "crc32": _crc_of(tensors)})
    temporary.replace(path)


def read_best(path: Path) -> dict[str, Tensor]:
    """The weights of the best evaluation.

    Raises:
        ValueError: if they are not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            crc = (file.metadata() or {}).get("crc32")
        found = load_file(path)
        damaged = "" if crc in (None, _crc_of(found)) else "its weights are not those that were written"
    except SafetensorError as error:
        damaged = " ".join(str(error).split())
    if damaged:
        raise ValueError(
            f"{path} is damaged: {damaged}. Remove it, and --resume keeps the best of the evaluations that are left, "
            "or begin anew with --out"
        )
    return found


def _best_fault(checkpoint: Path) -> str | None:
    path = checkpoint.parent / BEST
    try:
        if path.is_file():
            read_best(path)
    except ValueError as error:
        return str(error)
    return None


def _crc_of(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        content: Any = tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(content, zlib.crc32(name.encode(), found))
    return f"{found:08x}"
