"""The parameters of a model as formulas of memory see them, of a module, of a config, or of a bare count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nanoadam import chunks
from nanoadam.chunks import nanoadam_state

if TYPE_CHECKING:
    import torch
    from torch import nn

    DType: TypeAlias = str | torch.dtype
    Model: TypeAlias = nn.Module | str | PathLike[str] | Iterable[tuple[str, Sequence[int]]]

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Weight:
    """A parameter as the formulas see it."""

    shape: tuple[int, ...]
    itemsize: int
    treatment: str  # "selected", "dense" or "frozen"
    linear: bool  # the weight of a linear layer within the model: what LoRA and GaLore work on
    counted: bool = False  # a bare count of weights, which has no chunks
    columns: bool = False  # whole columns of it are selected
    transposed: bool = False  # stored [inputs, outputs]
    looked_up: bool = False  # by an embedding that is no head: only selected entries of its gradient are computed

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of it."""
        return self.numel * self.itemsize

    def layout(self, density: float) -> chunks.AnyLayout:
        """How it is selected from."""
        if self.columns:
            return chunks.column_layout(self.shape, density, transposed=self.transposed)
        return chunks.layout(self.shape, density)

    def kept(self, density: float) -> int:
        """Selected weights."""
        return round(density * self.numel) if self.counted else self.layout(density).selected

    def state(self, density: float, size: int, carried: bool) -> int:
        """Bytes of a selected tensor's state; of a bare count what a weight takes, without the few of a column."""
        if not self.counted:
            return chunks.state_bytes(self.layout(density), size, carried=carried)
        kept = self.kept(density)
        return 2 * size * kept if self.columns else nanoadam_state(kept, 0, size, carried=carried)


def from_config(name: str | PathLike[str]) -> nn.Module:
    """The model of a local folder or a hub id on the meta device: shapes and dtypes, no weights.

    The class is the one that `architectures` in the config names, or `AutoModel` without one.

    Raises:
        ValueError: if there is no config to be read, or it needs code that transformers does not have.
        ImportError: without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("reading a model's config needs transformers: pip install 'nanoadam[finetune]'") from error
    import torch

    folder = Path(name)
    if not folder.exists() and (isinstance(name, PathLike) or str(name).startswith(("/", ".", "~"))):
        raise ValueError(f"there is no folder {name}: pass the folder of a saved transformers model, or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json: pass the folder of a saved transformers model")
    automatic: Any = transformers.AutoModel
    try:
        config: Any = transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=False)
        kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        with torch.device("meta"):
            model: nn.Module = automatic.from_config(config) if kind is None else kind(config)
    except Exception as error:  # a config is somebody's file: transformers fails on it in as many ways as there are
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"no model config could be read for {str(name)!r} ({reason}). Without network, pass a local folder that "
            "holds config.json, or a number of weights"
        ) from error
    dtype = getattr(config, "dtype", None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def weights_of(
    params: float | None, model: Model | None, weight_dtype: DType | None, granularity: str = "weight"
) -> tuple[Weight, ...]:
    """The parameters that an estimate is of; arguments as those of `memory.estimate`.

    Raises:
        ValueError: for a dtype, a count or a model that cannot be served.
    """
    columns = granularity == "column"
    itemsize = None if weight_dtype is None else itemsize_of(weight_dtype)
    if (params is None) == (model is None):
        raise ValueError("pass either params= (a number of weights) or model=, and not both")
    if params is not None:
        if not (math.isfinite(params) and params >= 1):
            raise ValueError(f"params must be a number of weights of at least 1, got {params}")
        return (Weight((round(params),), itemsize or 2, "selected", linear=False, counted=True, columns=columns),)
    if isinstance(model, (str, PathLike)):
        model = from_config(model)
    if hasattr(model, "named_parameters"):
        return _module_tensors(model, itemsize, granularity)
    found = tuple(
        Weight(
            tuple(shape),
            itemsize or 2,
            "selected" if len(shape) > 1 else "dense",
            linear=len(shape) == 2,
            columns=columns and len(shape) == 2,
        )
        for _, shape in model or ()
        if math.prod(shape)
    )
    if not found:
        raise ValueError("model= holds no weights: pass a module, a folder, or (name, shape) pairs")
    return found


def _module_tensors(model: Any, itemsize: int | None, granularity: str) -> tuple[Weight, ...]:
    from torch import nn

    from nanoadam import groups

    layers = (m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    linear = {id(layer.weight) for layer in layers}
    treatment: dict[int, str] = {}
    columns: dict[int, bool] = {}  # whether they are stored transposed
    looked_up: set[int] = set()
    found = groups.param_groups(model, granularity=granularity)
    for group in found:
        for parameter, name, role in zip(group["params"], group["param_names"], group["roles"], strict=True):
            treatment[id(parameter)] = "dense" if group["dense"] else "selected"
            if group.get("granularity") == "column" and name not in found.whole:
                columns[id(parameter)] = group["transposed"]
            if role == "embedding" and name not in found.tied:
                looked_up.add(id(parameter))
            if role != "matrix":
                linear.discard(id(parameter))
    return tuple(
        Weight(
            tuple(parameter.shape),
            itemsize or parameter.element_size(),
            treatment.get(id(parameter), "frozen"),
            linear=id(parameter) in linear and parameter.dim() == 2,
            columns=id(parameter) in columns,
            transposed=columns.get(id(parameter), False),
            looked_up=id(parameter) in looked_up,
        )
        for parameter in model.parameters()
    )


def itemsize_of(dtype: DType) -> int:
    """Bytes of a number.

    Raises:
        ValueError: if there is no such dtype.
    """
    if not isinstance(dtype, str):
        return dtype.itemsize
    name = dtype.removeprefix("torch.")
    if name not in _ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(_ITEMSIZE)}; got {dtype!r}")
    return _ITEMSIZE[name]


def torch_dtype(dtype: DType | None) -> torch.dtype | None:
    """The dtype of a name that `itemsize_of` takes."""
    import torch

    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    found: torch.dtype = getattr(torch, names.get(name, name))
    return found
