"""What finetuning with each optimizer costs in memory, by formula: weights, gradients and optimizer state.

Appendix G of the paper gives optimizer state as a function of the number of weights S: 4 S bytes for AdamW
with bfloat16 states, 2 S for 8-bit AdamW, 0.5 S + 4 m k S for MicroAdam, 6 k S for NanoAdam. A bare count
gets exactly these. For a model, the tensors that are never selected from are counted dense, and the selected
weights as the chunks keep them.

What this implementation really holds per selected weight: an int16 index and two moments, 2 + 2 + 2 bytes
with bfloat16 states, which is the paper's 6. `moments="carry"` (the default) takes 2 bytes more, from the start: the
step at which the weight entered. With `granularity="column"` an index and that step are of a whole input column, so
the two moments are nearly all, and layers compute the gradient of the selected columns only, so none is in transit.
Activations are in here where the batch is given: see activations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from nanoadam.chunks import nanoadam_state
from nanoadam.text import align, short, unit
from nanoadam.weights import Weight, from_config, itemsize_of, torch_dtype, weights_of

__all__ = ["Estimate", "estimate", "from_config", "render", "table"]

if TYPE_CHECKING:
    from nanoadam import activations
    from nanoadam.weights import DType, Model


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
    iteration: int | None = None
    """The most that exists at once of activations and gradients in one iteration; None if no batch was given."""

    @property
    def total(self) -> int:
        """All of it: the peak. Without a batch that is without activations, if the largest gradient comes last."""
        gradients = self.gradients + self.held + self.transient
        return self.weights + self.state + (gradients if self.iteration is None else max(gradients, self.iteration))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the total included."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Case:
    """What an estimate is made of."""

    tensors: tuple[Weight, ...]
    density: float
    window: int
    rank: int | None
    state_bytes: int | None
    grad_bytes: int
    momentum: bool
    carried: bool

    @property
    def trained(self) -> tuple[Weight, ...]:
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

    def matrices(self, method: str) -> tuple[Weight, ...]:
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
    """Adapters on all linear layers but the head, float32 as PEFT makes them by default; the base is frozen."""
    rank, size = case.rank or 32, case.state_bytes or 4
    adapters = size * sum(rank * sum(tensor.shape) for tensor in case.matrices("LoRA"))
    name = f"LoRA, r={rank}, all linear"
    return case.estimate(name, f"{2 * size} r (in + out)", 2 * adapters, weights=adapters, gradients=adapters)


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
    batch: int | None = None,
    sequence: int | None = None,
    checkpointing: bool = False,
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
        state_dtype: of the moments; bfloat16 by default. Of LoRA's moments and adapters: float32 by default.
        weight_dtype: of the weights and their gradients; by default the model's own, bfloat16 without one.
        grad_dtype: of NanoAdam's held gradients.
        momentum: whether SGD has it.
        carried: NanoAdam with `moments="carry"`, its default; without, the paper's formula, as with "reset".
        granularity: of NanoAdam's selection: "weight", or "column" for whole input columns of linear layers.
        batch: rows of a batch. With it what forward and backward take is found, for a model of transformers.
        sequence: tokens of a row; by default 512, or what the model takes if that is less. Images have the size that
            the model's config says.
        checkpointing: whether activations are recomputed in backward.

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
    for name, count in (("window", window), ("rank", rank), ("batch", batch), ("sequence", sequence)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if batch is not None and isinstance(model, (str, PathLike)):
        model = from_config(model)
    if batch is not None and not hasattr(model, "config"):
        raise ValueError("activations are of a model of transformers: pass model= (a module, a folder or a hub id)")
    case = _Case(
        tensors=weights_of(params, model, weight_dtype, granularity if method == "nanoadam" else "weight"),
        density=density,
        window=window,
        rank=rank,
        state_bytes=None if state_dtype is None else itemsize_of(state_dtype),
        grad_bytes=itemsize_of(grad_dtype),
        momentum=momentum,
        carried=carried,
    )
    found = METHODS[method](case)
    if batch is None:
        return found
    module: Any = model
    from nanoadam import activations

    handling = [_handling(tensor, case, method) for tensor in case.tensors]
    iteration = activations.peak(
        module, handling, batch, sequence, checkpointing=checkpointing, dtype=torch_dtype(weight_dtype)
    )
    return replace(found, iteration=iteration)


def _handling(tensor: Weight, case: _Case, method: str) -> activations.Handling:
    """What becomes of a parameter's gradient."""
    from nanoadam import activations

    if method == "lora":
        if not tensor.linear:
            return activations.Handling("frozen")
        return activations.Handling("adapted", case.state_bytes or 4, case.rank or 32)
    if method != "nanoadam" or tensor.treatment != "selected":
        return activations.Handling("frozen" if tensor.treatment == "frozen" else "dense")
    entries = tensor.kept(case.density) * case.grad_bytes
    if tensor.columns:
        keep = -(-tensor.layout(case.density).places // 8) * 8  # of the last few nothing is used
        return activations.Handling("columns", entries, keep, tensor.transposed)
    return activations.Handling("rows" if tensor.looked_up else "selected", entries)


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
    shapes = any(tensor.linear for tensor in weights_of(params, model, None))
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
    whole = rows[0].iteration is not None
    columns = ["iteration"] if whole else ["gradients", "held", "in transit"]
    header = ["method", "state by formula", "state", "weights", *columns, "total"]
    lines = []
    for row in rows:
        parts = (row.iteration or 0,) if whole else (row.gradients, row.held, row.transient)
        sizes = (row.state, row.weights, *parts, row.total)
        lines.append([row.method, row.formula, *(short(part / size) for part in sizes)])
    each = rows[0].weights / max(1, rows[0].parameters)
    said = f"{short(each)} byte{'s' if each != 1 else ''} each{' (assumed)' if assumed else ''}"
    note = f"In {name} (1e{len(str(size)) - 1} bytes), for {rows[0].parameters:,} weights of {said}"
    if whole:
        note += ". An iteration is what activations and gradients take together at its peak, as on a GPU."
    else:
        note += ", and gradients as large; without activations."
    return f"{align([header, *lines], left=2)}\n{note}"
