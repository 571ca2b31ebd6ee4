"""What one forward and backward pass needs in memory, found by running it on tensors that have none.

The model is copied to torch's meta device, where tensors have shapes only, and goes forward and backward there once.
Whatever is made counts from then until it is freed, as an allocator counts. So no formula of any architecture is
needed, and activation checkpointing is what it is.
"""

from __future__ import annotations

import collections
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNED = 512
"""Bytes that CUDA's allocator rounds up to."""

WORKSPACE = 64 * 2**20
"""Bytes that cuBLAS takes on a GPU of today."""


@dataclass(frozen=True)
class Handling:
    """What becomes of the gradient of a parameter.

    kind: "dense" (it stays), "selected" (it is cut down as it arrives), "columns" (a layer computes those of the
        selected columns alone), "rows" (an embedding computes the selected entries alone), "frozen", or "adapted"
        (frozen, with a low-rank adapter).
    entries: bytes of what is kept of it; of an adapter, of one of its weights.
    count: selected columns, or the adapter's rank.
    transposed: the weight is stored [inputs, outputs].
    """

    kind: str
    entries: int = 0
    count: int = 0
    transposed: bool = False


def peak(
    model: nn.Module,
    handling: Sequence[Handling],
    batch: int,
    sequence: int | None,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype | None = None,
) -> int:
    """The most bytes that exist at once in one iteration, besides weights and optimizer state.

    Args:
        model: of transformers, on any device; nothing of it is changed.
        handling: of each of `model.parameters()`, in their order.
        batch: rows of a batch.
        sequence: tokens of a row, None for 512 or what the model takes; images have the size of the model's config.
        checkpointing: recompute activations in backward.
        dtype: of the weights, if it is not the model's.

    Raises:
        ValueError: if the model cannot be run with what its config tells of its inputs.
    """
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or 2**30
    sequence = min(512, positions) if sequence is None else sequence
    try:
        ghost: Any = _ghost(model)
        if checkpointing:
            enable = getattr(ghost, "activation_checkpointing_enable", None) or ghost.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        ghost.to(dtype).train()
        held: list[Tensor] = []
        _handle(ghost, handling, held)
        inputs = _inputs(ghost, batch, sequence)
        with _Count(ghost) as count, _AsOnAGPU():
            _backward(_loss(ghost.forward(**inputs)))
    except Exception as error:  # somebody's model: it fails in as many ways as there are
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if sequence > positions:
            reason = f"it takes {positions} tokens, and sequence is {sequence}"
        raise ValueError(
            f"{type(model).__name__} cannot be run without data to estimate activations: {reason}"
        ) from error
    return int(count.peak) + WORKSPACE


def _backward(loss: Tensor) -> None:
    """As loss.backward(), which is a function of torch itself and would leave _AsOnAGPU."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


class _Count(TorchDispatchMode):
    """Bytes of all storages that have been made and not freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._weights = [each.untyped_storage() for each in (*model.parameters(), *model.buffers())]
        self._known |= {storage._cdata: weakref.ref(storage) for storage in self._weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.layout == torch.strided:
                self._see(made.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // ALIGNED) * ALIGNED
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _AsOnAGPU(TorchFunctionMode):
    """Save what fused kernels save, where plain ones, which the meta device has, would save more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (args + tuple(options[n] for n in ("query", "key", "value") if n in options))[:3]
            return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **options)
        if func in (Tensor.all, torch.all, Tensor.any, torch.any) and args[0].is_meta:
            return torch.tensor(func in (Tensor.all, torch.all))  # nothing is padded
        return func(*args, **options)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _Attention(torch.autograd.Function):
    """Its output and one float32 a row are kept, not the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query) if value.shape[-1] == query.shape[-1] else value.new_empty(
            (*query.shape[:-1], value.shape[-1])
        )  # fmt: skip
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Columns(torch.autograd.Function):
    """A linear layer that keeps the selected columns of its input, and makes their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Handling, held: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x[..., : how.count].contiguous())
        ctx.weight, ctx.how, ctx.held, ctx.bias = weight, how, held, bias is not None
        return nn.functional.linear(x, weight.t() if how.transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient, how = gradients[0], ctx.how
        (kept,) = ctx.saved_tensors
        rows, weight = gradient.reshape(-1, gradient.shape[-1]), ctx.weight
        found = rows.t() @ kept.reshape(-1, kept.shape[-1])
        ctx.held.append(_room(how.entries))
        del found
        back = None
        if ctx.needs_input_grad[0]:
            back = gradient @ (weight.t() if how.transposed else weight)
        return back, None, rows.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None, None, None


class _Rows(torch.autograd.Function):
    """An embedding that makes the selected entries of its gradient, in float32 first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, how: Handling, held: list[Tensor]) -> Tensor:
        ctx.how, ctx.held = how, held
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.held.append(_room(ctx.how.entries))
        return None, None, None, None


def _room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _ghost(model: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _handle(model: nn.Module, handling: Sequence[Handling], held: list[Tensor]) -> None:
    of = dict(zip(map(id, model.parameters()), handling, strict=True))
    weights = [getattr(module, "weight", None) for module in model.modules()]
    uses = collections.Counter(id(weight) for weight in weights if isinstance(weight, nn.Parameter))
    served = set()
    modules: list[Any] = list(model.modules())
    for module, weight in zip(modules, weights, strict=True):
        how = of.get(id(weight), Handling("frozen"))
        if how.kind == "adapted":
            module.forward = functools.partial(_adapted, *_adapter(module, how), module.forward)
        elif how.kind == "columns" and uses[id(weight)] == 1 and _is_plain(module):
            module.forward = functools.partial(_by_column, module, how, held)
            served.add(id(weight))
        elif how.kind == "rows" and uses[id(weight)] == 1 and _is_plain(module):
            module.forward = functools.partial(_by_row, module, how, held)
            served.add(id(weight))
    for parameter in model.parameters():
        how = of.get(id(parameter), Handling("dense"))  # of an adapter
        parameter.requires_grad_(how.kind not in ("frozen", "adapted"))
        if how.kind in ("selected", "columns", "rows") and id(parameter) not in served:
            parameter.register_post_accumulate_grad_hook(functools.partial(_release, how, held))


def _is_plain(module: nn.Module) -> bool:
    """A linear layer or an embedding without a forward of its own."""
    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward) or type(module).__name__ == "Conv1D"


def _release(how: Handling, held: list[Tensor], parameter: Tensor) -> None:
    held.append(_room(how.entries))
    parameter.grad = None


def _by_column(module: Any, how: Handling, held: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = _Columns.apply(x, module.weight, module.bias, how, held)  # type: ignore[no-untyped-call]
    return result


def _by_row(module: Any, how: Handling, held: list[Tensor], ids: Tensor) -> Tensor:
    result: Tensor = _Rows.apply(module.weight, ids, how, held)  # type: ignore[no-untyped-call]
    return result


def _adapter(module: Any, how: Handling) -> tuple[Tensor, Tensor]:
    """The two matrices of a low-rank adapter: weights, which are not counted."""
    outer, inner = module.weight.shape[::-1] if type(module).__name__ == "Conv1D" else module.weight.shape
    dtype = {2: torch.bfloat16, 4: torch.float32}[how.entries]
    for name, shape in (("_down", (how.count, inner)), ("_up", (outer, how.count))):
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return module._down, module._up


def _adapted(down: Tensor, up: Tensor, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A linear layer with an adapter, as PEFT computes it."""
    result = plain(x)
    low = nn.functional.linear(nn.functional.linear(x.to(down.dtype), down), up)
    return (result + low * 2.0).to(result.dtype)


def _inputs(model: Any, batch: int, sequence: int) -> dict[str, Tensor]:
    """What the model reads, and labels where it takes them."""
    config = model.config
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        shape = (batch, getattr(config, "num_channels", 3), *sides)
        inputs = {kind: torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")}
    else:
        inputs = {kind: torch.empty((batch, sequence), dtype=torch.int64, device="meta")}
    if "labels" in inspect.signature(model.forward).parameters:
        tokens = "Classification" not in type(model).__name__ or "ForToken" in type(model).__name__
        shape = (batch, sequence) if tokens else (batch,)
        dtype = torch.int64
        if not tokens and kind != "pixel_values" and config.num_labels == 1:
            dtype = torch.float32
        inputs["labels"] = torch.empty(shape, dtype=dtype, device="meta")
    return inputs


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    first: Tensor = output[0] if loss is None else loss
    return first if first.dim() == 0 else first.float().sum()
