"""What finetuning with each optimizer costs in memory, by formula: weights, gradients and optimizer state.

Appendix G of the paper gives optimizer state as a function of the number of weights S: 4 S bytes for AdamW
with bfloat16 states, 2 S for 8-bit AdamW, 0.5 S + 4 m k S for MicroAdam, 6 k S for NanoAdam. A bare count
gets exactly these. For a model, the tensors that are never selected from are counted dense, and the selected
weights as the chunks keep them.

What this implementation really holds per selected weight: an int16 index and two moments, 2 + 2 + 2 bytes
with bfloat16 states, which is the paper's 6. `moments="carry"` (the default) takes 2 bytes more, from the start: the
step at which the weight entered. With `granularity="column"` an index and that step are of a whole input column, so
the two moments are nearly all, and layers compute the gradient of the selected columns only, so none is in transit.
Activations, temporary buffers and the allocator's rounding are not in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nanoadam import chunks
from nanoadam.chunks import nanoadam_state
from nanoadam.text import align, short, unit

if TYPE_CHECKING:
    import torch
    from torch import nn

    DType: TypeAlias = str | torch.dtype
    Model: TypeAlias = nn.Module | str | PathLike[str] | Iterable[tuple[str, Sequence[int]]]

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Estimate:
    """What one method needs, in bytes."""

    method: str
    formula: str
    """Bytes of optimizer state: S weights, density k, window m, rank r."""
    parameters: int
    """Weights of the model, trained or not, without adapters."""
    weights: int
    gradients: int
    """Gradients that exist together at the end of the backward pass."""
    held: int
    """Selected entries kept between backward and step (gradient release)."""
    transient: int
    """The one dense gradient that exists before it is cut down: of the largest tensor whose gradient is made whole."""
    state: int

    @property
    def total(self) -> int:
        """All of it: the peak without activations, if the largest tensor's gradient comes last."""
        return self.weights + self.gradients + self.held + self.transient + self.state

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the total included."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Tensor:
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
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize

    def layout(self, density: float) -> chunks.AnyLayout:
        if self.columns:
            return chunks.column_layout(self.shape, density, transposed=self.transposed)
        return chunks.layout(self.shape, density)

    def kept(self, density: float) -> int:
        return round(density * self.numel) if self.counted else self.layout(density).selected

    def state(self, density: float, size: int, carried: bool) -> int:
        """Bytes of a selected tensor's state; of a bare count what a weight takes, without the few of a column."""
        if not self.counted:
            return chunks.state_bytes(self.layout(density), size, carried=carried)
        kept = self.kept(density)
        return 2 * size * kept if self.columns else nanoadam_state(kept, 0, size, carried=carried)


@dataclass(frozen=True)
class _Case:
    """What an estimate is made of."""

    tensors: tuple[_Tensor, ...]
    density: float
    window: int
    rank: int | None
    state_bytes: int | None
    grad_bytes: int
    momentum: bool
    carried: bool

    @property
    def trained(self) -> tuple[_Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.treatment != "frozen")

    @property
    def count(self) -> int:
        return sum(tensor.numel for tensor in self.trained)

    def estimate(
        self, method: str, formula: str, state: float, *, weights: int = 0, gradients: int | None = None, **more: int
    ) -> Estimate:
        """With all weights, and with a gradient for each trained one unless told otherwise."""
        return Estimate(
            method=method,
            formula=formula,
            parameters=sum(tensor.numel for tensor in self.tensors),
            weights=weights + sum(tensor.bytes for tensor in self.tensors),
            gradients=sum(tensor.bytes for tensor in self.trained) if gradients is None else gradients,
            held=more.get("held", 0),
            transient=more.get("transient", 0),
            state=round(state),
        )

    def matrices(self, method: str) -> tuple[_Tensor, ...]:
        """The weights of linear layers, at least one."""
        found = tuple(tensor for tensor in self.tensors if tensor.linear)
        if not found:
            raise ValueError(f"{method} works on linear layers, and there are none: pass a model= that has some")
        return found


# Methods -------------------------------------------------------------------------------------------------


def _adamw(case: _Case) -> Estimate:
    size = case.state_bytes or 2
    return case.estimate(f"AdamW, {8 * size}-bit states", f"{2 * size} S", 2 * size * case.count)


def _adamw8bit(case: _Case) -> Estimate:
    """As in the paper: without block scales (bitsandbytes: 1.6 % more) or exceptions for small tensors."""
    return case.estimate("AdamW 8-bit", "2 S", 2 * case.count)


def _sgd(case: _Case) -> Estimate:
    if not case.momentum:
        return case.estimate("SGD", "0", 0)
    buffers = sum(tensor.bytes for tensor in case.trained)  # torch keeps them in the parameter's dtype
    return case.estimate("SGD, momentum", f"{buffers / case.count:.3g} S", buffers)


def _microadam(case: _Case) -> Estimate:
    """Error feedback in 4 bits; a window of m gradients, 2 bytes of value and 2 of index each."""
    state = 0.5 * case.count + 4 * case.window * case.density * case.count
    name = f"MicroAdam, k={100 * case.density:g} %, m={case.window}"
    return case.estimate(name, "0.5 S + 4 m k S", state)


def _nanoadam(case: _Case) -> Estimate:
    size = case.state_bytes or 2
    chosen = [tensor for tensor in case.trained if tensor.treatment == "selected"]
    others = [tensor for tensor in case.trained if tensor.treatment == "dense"]
    dense, columns = sum(tensor.numel for tensor in others), any(tensor.columns for tensor in chosen)
    each = nanoadam_state(1, 0, size, carried=case.carried)
    by_weight = [tensor for tensor in chosen if not tensor.columns]
    formula = f"{2 * size} k S" if columns else f"{each} k S"
    formula += f" ({each} by weight)" * (columns and bool(by_weight)) + f" + {2 * size} dense" * bool(dense)
    whole = (tensor.bytes for tensor in by_weight if not tensor.counted and not tensor.looked_up)
    return case.estimate(
        f"NanoAdam, k={100 * case.density:g} %{' of columns' * columns}" + ", moments carried" * case.carried,
        formula,
        sum(tensor.state(case.density, size, case.carried) for tensor in chosen) + 2 * size * dense,
        gradients=sum(tensor.bytes for tensor in others),
        held=sum(tensor.kept(case.density) for tensor in chosen) * case.grad_bytes,
        transient=max(whole, default=0),
    )


def _galore(case: _Case) -> Estimate:
    """Per matrix a projector, r x the shorter side, and two moments, r x the longer side; AdamW for the rest."""
    rank, size = case.rank or 256, case.state_bytes or 2
    matrices = [tensor for tensor in case.matrices("GaLore") if tensor.treatment != "frozen"]
    state = 2 * (case.count - sum(tensor.numel for tensor in matrices))
    for tensor in matrices:
        short, long = sorted(tensor.shape)
        state += min(rank, short) * (short + 2 * long)
    return case.estimate(f"GaLore, r={rank}", f"{size} r (short + 2 long)", size * state)


def _adafactor(case: _Case) -> Estimate:
    """As torch keeps it: a second moment for each row and column of a matrix, one for each weight of a vector."""
    if any(tensor.counted for tensor in case.tensors):
        raise ValueError(
            "Adafactor has a state for each row and column, which a number of weights has not: pass model="
        )
    state = sum(
        tensor.bytes if len(tensor.shape) < 2 else tensor.bytes // tensor.shape[-1] + tensor.bytes // tensor.shape[-2]
        for tensor in case.trained
    )
    return case.estimate("Adafactor", "rows + columns", state)


def _lora(case: _Case) -> Estimate:
    """Adapters on all linear layers but the head, in float32 as PEFT makes them; the base is frozen, the head too."""
    rank, size = case.rank or 32, case.state_bytes or 4
    adapters = sum(rank * sum(tensor.shape) for tensor in case.matrices("LoRA"))
    name = f"LoRA, r={rank}, all linear"
    return case.estimate(
        name, f"{2 * size} r (in + out)", 2 * size * adapters, weights=4 * adapters, gradients=4 * adapters
    )


METHODS: dict[str, Callable[[_Case], Estimate]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "sgd": _sgd,
    "microadam": _microadam,
    "galore": _galore,
    "adafactor": _adafactor,
    "lora": _lora,
    "nanoadam": _nanoadam,
}
"""The methods that `estimate` knows."""


# Public --------------------------------------------------------------------------------------------------


def estimate(
    method: str = "nanoadam",
    *,
    params: float | None = None,
    model: Model | None = None,
    density: float = 0.01,
    window: int = 10,
    rank: int | None = None,
    state_dtype: DType | None = None,
    weight_dtype: DType | None = None,
    grad_dtype: DType = "float32",
    momentum: bool = False,
    carried: bool = False,
    granularity: str = "weight",
) -> Estimate:
    """The memory that one method needs to finetune a model, in bytes.

    Args:
        method: one of `METHODS`.
        params: a bare number of weights, all of them selected from: the paper's appendix G.
        model: instead of that, a module; a local folder with a `config.json` or a hub id (nothing but the
            config is read, no weights are allocated, remote code is never run); or (name, shape) pairs, where tensors
            of dimension < 2 count as dense.
        density: k, for NanoAdam and MicroAdam; for a schedule its `largest`.
        window: m, the gradients in MicroAdam's window.
        rank: of LoRA (default 32) and GaLore (default 256).
        state_dtype: of the moments; bfloat16 by default, float32 for LoRA.
        weight_dtype: of the weights and their gradients; by default the model's own, bfloat16 without one.
        grad_dtype: of NanoAdam's held gradients.
        momentum: whether SGD has it.
        carried: NanoAdam with `moments="carry"`, its default; without, the paper's formula, as with "reset".
        granularity: of NanoAdam's selection: "weight", or "column" for whole input columns of linear layers.

    Raises:
        ValueError: for an unknown method, granularity or dtype, a density outside (0, 1], a count that is not positive,
            both or neither of `params` and `model`, a model whose config cannot be read, or LoRA, GaLore or Adafactor
            without shapes.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}")
    for name, count in (("window", window), ("rank", rank)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    case = _Case(
        tensors=_tensors(params, model, weight_dtype, granularity if method == "nanoadam" else "weight"),
        density=density,
        window=window,
        rank=rank,
        state_bytes=None if state_dtype is None else _itemsize(state_dtype),
        grad_bytes=_itemsize(grad_dtype),
        momentum=momentum,
        carried=carried,
    )
    return METHODS[method](case)


def table(
    *,
    params: float | None = None,
    model: Model | None = None,
    density: float = 0.01,
    granularity: str | None = None,
    **options: Any,
) -> list[Estimate]:
    """Every method on the same model, largest state first as in appendix G.

    LoRA, GaLore, Adafactor and NanoAdam by columns are left out where the shapes of linear layers are not known. Takes
    the arguments of `estimate` that do not belong to one method (`window`, `weight_dtype`, `grad_dtype`), and raises
    what it raises. With a `granularity` NanoAdam has that one only.
    """
    if isinstance(model, (str, PathLike)):
        model = from_config(model)  # once, not once per method
    elif model is not None and not hasattr(model, "named_parameters"):
        model = list(model)
    shapes = any(tensor.linear for tensor in _tensors(params, model, None))
    shared: dict[str, Any] = {"params": params, "model": model, "density": density, **options}
    rows = [(method, own) for method, own in _TABLE if shapes or method not in _NEED_LINEAR]
    if granularity not in (None, *GRANULARITIES):
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}")
    if granularity == "column" or (granularity is None and shapes):
        rows.append(("nanoadam", {"carried": True, "granularity": "column"}))
    if granularity is not None:
        rows = [(m, own) for m, own in rows if m != "nanoadam" or own.get("granularity", "weight") == granularity]
    return [estimate(method, **shared, **own) for method, own in rows]


GRANULARITIES = ("weight", "column")
_NEED_LINEAR = ("galore", "adafactor", "lora")
_TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {"state_dtype": "float32"}),
    ("adamw", {}),
    ("adamw8bit", {}),
    ("microadam", {}),
    ("galore", {}),
    ("adafactor", {}),
    ("lora", {}),
    ("sgd", {}),
    ("nanoadam", {}),
    ("nanoadam", {"carried": True}),
)


def render(rows: Sequence[Estimate], *, assumed: bool = False) -> str:
    """A table of estimates for people, in GB of 1e9 bytes (MB or kB for small models).

    Args:
        rows: one a line.
        assumed: whether the bytes of a weight were not told, nor known from a model.
    """
    name, size = unit(max(row.total for row in rows))
    header = ["method", "state by formula", "state", "weights", "gradients", "held", "in transit", "total"]
    lines = [
        [row.method, row.formula]
        + [short(part / size) for part in (row.state, row.weights, row.gradients, row.held, row.transient, row.total)]
        for row in rows
    ]
    each = rows[0].weights / max(1, rows[0].parameters)
    said = f"{short(each)} byte{'s' if each != 1 else ''} each{' (assumed)' if assumed else ''}"
    note = (
        f"In {name} (1e{len(str(size)) - 1} bytes), for {rows[0].parameters:,} weights of {said}, and gradients as "
        "large; without activations."
    )
    return f"{align([header, *lines], left=2)}\n{note}"


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


def _tensors(
    params: float | None, model: Model | None, weight_dtype: DType | None, granularity: str = "weight"
) -> tuple[_Tensor, ...]:
    columns = granularity == "column"
    itemsize = None if weight_dtype is None else _itemsize(weight_dtype)
    if (params is None) == (model is None):
        raise ValueError("pass either params= (a number of weights) or model=, and not both")
    if params is not None:
        if not (math.isfinite(params) and params >= 1):
            raise ValueError(f"params must be a number of weights of at least 1, got {params}")
        return (_Tensor((round(params),), itemsize or 2, "selected", linear=False, counted=True, columns=columns),)
    if isinstance(model, (str, PathLike)):
        model = from_config(model)
    if hasattr(model, "named_parameters"):
        return _module_tensors(model, itemsize, granularity)
    found = tuple(
        _Tensor(
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


def _module_tensors(model: Any, itemsize: int | None, granularity: str) -> tuple[_Tensor, ...]:
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
        _Tensor(
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


def _itemsize(dtype: DType) -> int:
    if not isinstance(dtype, str):
        return dtype.itemsize
    name = dtype.removeprefix("torch.")
    if name not in _ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(_ITEMSIZE)}; got {dtype!r}")
    return _ITEMSIZE[name]
