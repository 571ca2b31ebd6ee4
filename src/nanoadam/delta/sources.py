"""Where tensors come from: a module, a state dict, a safetensors file, a folder of a saved model."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoadam.delta.bits import DTYPES
from nanoadam.delta.errors import DeltaError
from nanoadam.delta.files import SafeFile

Progress = Callable[[int, int], None]
"""Called with what is done and what there is: bytes, where nothing else is said."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensors(ABC):
    """Named tensors. One that has several names (tied weights) counts once, under the first."""

    label: str
    tied: Mapping[str, tuple[str, ...]]
    """For each name: the others of the same tensor."""

    @abstractmethod
    def names(self) -> list[str]:
        """The first name of each tensor, in order."""

    @abstractmethod
    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor.

        Raises:
            DeltaError: if the dtype is not served.
        """

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor: the model's own, or read from its file."""

    def find(self, *names: str) -> str | None:
        """The first name of the tensor that has one of these names."""
        known = self.known()
        return next((known[each] for each in names if each in known), None)

    def known(self) -> dict[str, str]:
        """First names by all names."""
        if not hasattr(self, "_known"):
            self._known = {other: name for name in self.names() for other in (name, *self.tied.get(name, ()))}
        return self._known


class Memory(Tensors):
    """Tensors in memory: a module's parameters and persistent buffers, or a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        first: dict[Any, str] = {}
        tied: dict[str, list[str]] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            _check_plain(name, tensor)
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in first:
                tied.setdefault(first[place], []).append(name)
                continue
            first[place] = name
            self._tensors[name] = tensor
        self.tied = {name: tuple(others) for name, others in tied.items()}

    def names(self) -> list[str]:
        """As `Tensors.names`."""
        return list(self._tensors)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """As `Tensors.form`."""
        tensor = self._tensors[name]
        return tensor.dtype, tuple(tensor.shape)

    def tensor(self, name: str) -> Tensor:
        """As `Tensors.tensor`."""
        return self._tensors[name].detach()

    def own(self, name: str) -> Tensor:
        """The model's own object."""
        return self._tensors[name]


def _check_plain(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise DeltaError(f"{name} is on the meta device and holds no weights: load the model first")
    if hasattr(tensor, "full_tensor"):
        raise DeltaError(f"{name} is sharded over processes (a DTensor): gather the weights first, with full_tensor()")
    if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
        raise DeltaError(
            f"{name} is a {type(tensor).__name__} of layout {tensor.layout}: only plain tensors are served"
        )


class Files(Tensors):
    """Tensors of safetensors files, read one at a time."""

    tied: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.path = path
        self.files = [SafeFile(file) for file in model_files(path)]
        self.place: dict[str, SafeFile] = {}
        for file in self.files:
            for name in file.items:
                if name in self.place:
                    raise DeltaError(f"{path} holds the tensor {name!r} twice, in {file.path.name} and another file")
                self.place[name] = file

    def names(self) -> list[str]:
        """As `Tensors.names`."""
        return list(self.place)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """As `Tensors.form`."""
        item = self.place[name].items[name]
        dtype = DTYPES.get(item.dtype)
        if dtype is None:
            raise DeltaError(f"{name!r} in {self.label} has dtype {item.dtype}, which is not known here")
        return dtype, item.shape

    def tensor(self, name: str) -> Tensor:
        """As `Tensors.tensor`."""
        return self.place[name].tensor(name)


def model_files(path: Path) -> list[Path]:
    """The safetensors files of a saved model, in order.

    Raises:
        DeltaError: if there are none, if the index is no index, or if it names a file outside the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DeltaError(f"there is no file or folder {path}: save the model there first, with save_pretrained")
    if (path / INDEX).is_file():
        return [path / name for name in _indexed(path / INDEX)]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    found = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".bin", ".pt", ".pth"))
    if found:
        raise DeltaError(f"{path} holds pickled weights only ({found[0]}): save the model again as safetensors")
    raise DeltaError(f"{path} holds no {SINGLE} and no {INDEX}: give the folder of a saved model")


def read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index file.

    Raises:
        DeltaError: if it is no index, or names a file outside its folder.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeltaError(f"{path} is no index of safetensors files: {error!r}"[:300]) from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise DeltaError(f"{path} is no index of safetensors files: its weight_map is no table of names")
    for name in table.values():
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise DeltaError(
                f"{path} names the file {name!r}, which is not in its folder: the index is not to be trusted"
            )
    return table


def _indexed(path: Path) -> list[str]:
    return list(dict.fromkeys(read_index(path).values()))


def is_path(given: Any) -> bool:
    """Whether something is the path of a file or folder."""
    return isinstance(given, (str, os.PathLike))


def tensors_of(given: Any) -> Tensors:
    """The tensors of a module, of a state dict, or of a saved model.

    Raises:
        DeltaError: for something else, or a tensor or file that is not served.
    """
    if isinstance(given, nn.Module):
        state = given.state_dict(keep_vars=True)
        return Memory({k: v for k, v in state.items() if isinstance(v, Tensor)}, type(given).__name__)
    if isinstance(given, Mapping):
        wrong = next((name for name, value in given.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            raise DeltaError(f"{wrong!r} in the state dict is a {type(given[wrong]).__name__}, no tensor: leave it out")
        return Memory(given, "the state dict")
    if is_path(given):
        return Files(Path(given).expanduser())
    raise DeltaError(f"a model is a module, a state dict or a path, got {type(given).__name__}")


def snapshot(model: nn.Module, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A copy of a module's parameters and buffers, each tensor once: what `diff` can be held against later.

    Raises:
        DeltaError: for a tensor that is not served.
    """
    tensors = tensors_of(model)
    return {name: tensors.tensor(name).to(device, copy=True) for name in tensors.names()}
