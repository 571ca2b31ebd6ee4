"""Layers whose backward computes the gradient of what is selected only, and keeps only the inputs that takes.

The columns of a weight are known before the forward pass. dW[:, C] = dy^T x[:, C], so a third of the layer's
arithmetic is gone, and of x only x[:, C] is kept. While an optimizer wants that, `nn.Linear.forward` (and transformers'
`Conv1D.forward`) looks whether its weight is served; the layer and its parameters stay what they are.

The gradient takes a way around the weight: the layer hands it to a `leaf` [keep, outputs], whose own backward makes a
`SelectedGradient` of it for the weight. So a compiled layer, whose backward can only return ordinary tensors, is
served as well, and `torch.autograd.grad(loss, weight)` and hooks find it where they always do.

An embedding is selected from weight by weight. Its gradient is made at the selected entries from the rows that a
batch looks up; there is never one of the table's size.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from nanoadam.chunks import ColumnLayout, Layout
from nanoadam.gradients import Box, SelectedGradient
from nanoadam.ops import Selection, Slot, backend, reference

_ALIGNED = 8  # columns: what 16 bytes of bfloat16 hold, which matrix products want


class Owner(Protocol):
    """What is asked of the optimizer."""

    def _before_forward(self, slot: Slot) -> None:
        """Select for the present step if that is due."""


class Served:
    """A weight whose layer computes selected columns only."""

    def __init__(self, weight: Tensor, slot: Slot, owner: Owner, dtype: torch.dtype, keep_zeros: bool) -> None:
        self.weight, self.slot, self.dtype = weight, slot, dtype
        self.keep_zeros = keep_zeros  # there may be empty places
        self.owner = weakref.ref(owner)
        self.selection: Selection | None = None
        self.leaf: Tensor | None = None
        self.index: Tensor | None = None
        self.keep = 0
        self.needs_whole = False  # its gradient comes whole all the same: an embedding that is the head as well

    def renew(self) -> None:
        """Follow a new selection. Where that was made in place, so is this: a captured graph goes on reading it."""
        selection = self.slot.selection
        if selection is None or self.slot.unselected or self.needs_whole or id(self.weight) in _whole:
            self.leaf = self.index = self.selection = None
            return
        if isinstance(selection.layout, ColumnLayout):
            keep = selection.layout.keep
            index = selection.index.clamp(min=0)
            if self.index is None or self.keep != keep or self.index.device != index.device:
                self.index, self.keep = index.new_zeros(-(-keep // _ALIGNED) * _ALIGNED), keep
            self.index[:keep].copy_(index)
            self.index[keep:] = index[-1]
        else:
            self.index = selection.index
        if self.selection is not selection or (self.leaf is not None and not self.leaf.requires_grad):
            self.selection = selection
            with torch.enable_grad():
                self.leaf = _Leaf.apply(self.weight, self)  # type: ignore[no-untyped-call]


_served: dict[int, Served] = {}
"""By the identity of the weight. Weights live as long as what serves them."""

_whole: Counter[int] = Counter()
"""How many want to see the whole gradient of a weight, by its identity."""

_forwards: dict[type[nn.Module], Callable[..., Tensor]] = {}
"""The forward functions that have been replaced."""


def serve(weight: Tensor, slot: Slot, owner: Owner, dtype: torch.dtype, keep_zeros: bool) -> Served | None:
    """Let layers compute the gradient of a weight's selected columns only; None if another optimizer has it served.

    Args:
        dtype: of the gradient's entries.
    """
    known = _served.get(id(weight))
    if known is not None and known.owner() not in (None, owner):
        return None
    _served[id(weight)] = served = Served(weight, slot, owner, dtype, keep_zeros)
    weakref.finalize(owner, _forget, id(weight), served)
    if not _forwards:
        _replace()
    served.renew()
    return served


def leave(weight: Tensor) -> None:
    """Let layers compute the whole gradient of a weight again."""
    _forget(id(weight), _served.get(id(weight)))


def whole(identities: Iterable[int]) -> Callable[[], None]:
    """Let layers compute the whole gradients of some weights, which somebody wants to see, served or not.

    Hooks made before the optimizer then see the dense gradient, and the optimizer cuts it down as it does any other.
    To be called between steps.

    Args:
        identities: `id(weight)` of each: weights that hooks belong to must not be held by what those hooks hold.

    Returns:
        What ends the request.
    """
    keys = list(identities)
    _whole.update(keys)
    _renew(keys)

    def end() -> None:
        for key in keys:
            _whole[key] -= 1
            if _whole[key] <= 0:
                del _whole[key]
        _renew(keys)
        keys.clear()

    return end


def _renew(keys: Iterable[int]) -> None:
    for key in keys:
        if (served := _served.get(key)) is not None:
            served.renew()


def _forget(key: int, served: Served | None) -> None:
    if served is not None and _served.get(key) is served:
        del _served[key]
    if not _served:
        for kind, forward in _forwards.items():
            kind.forward = forward
        _forwards.clear()


def input_dim(module: nn.Module) -> int | None:
    """The dimension of its weight that counts inputs, if it is a linear layer; else None."""
    if isinstance(module, nn.Linear):
        return 1
    conv1d = _conv1d()
    return 0 if conv1d is not None and isinstance(module, conv1d) else None


def can_serve(module: nn.Module) -> bool:
    """Whether a linear layer has the forward of its kind, so that it can compute selected columns only."""
    conv1d = _conv1d()
    plain = [nn.Linear.forward, *([conv1d.forward] if conv1d is not None else [])]
    return type(module).forward in plain


def _conv1d() -> Any:
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _replace() -> None:
    for kind, forward in ((nn.Linear, _linear), (nn.Embedding, _embedding)):
        _forwards[kind] = kind.forward
        setattr(kind, "forward", forward)  # noqa: B010 - which mypy takes for what it is
    if (conv1d := _conv1d()) is not None:
        _forwards[conv1d] = conv1d.forward
        conv1d.forward = _conv1d_forward


def _ready(weight: Tensor, *, transposed: bool | None = None) -> Served | None:
    """What serves a weight in this forward pass: by columns of a weight stored that way, or None by single weights."""
    served = _served.get(id(weight))
    if served is None or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    if not torch.compiler.is_compiling():
        owner = served.owner()
        if owner is None:
            return None
        owner._before_forward(served.slot)
        served = _served.get(id(weight))  # it may have been made anew, for a state that was cleared
        if served is not None and served.leaf is not None and not served.leaf.requires_grad:
            served.renew()  # the weight was frozen when the leaf was made
    layout = served.selection.layout if served is not None and served.selection is not None else None
    if served is not None and isinstance(layout, ColumnLayout) and layout.transposed is not transposed:
        if transposed is not None and not torch.compiler.is_compiling():  # the group takes its rows for its columns
            served.needs_whole = True
            served.renew()
        return None
    return served if layout is not None and isinstance(layout, Layout) is (transposed is None) else None


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    served = _ready(self.weight, transposed=False)
    if served is None:
        return functional.linear(input, self.weight, self.bias)
    return _served_linear(input, self.weight, self.bias, served, False)


def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    plain = self.max_norm is None and not self.sparse and not self.scale_grad_by_freq
    served = _ready(self.weight) if plain else None
    if served is None:
        output: Tensor = _forwards[nn.Embedding](self, input)
        return output
    assert served.selection is not None
    cut = served.selection.layout
    assert isinstance(cut, Layout)  # embeddings are selected from by weight
    layout = (cut.lines, cut.line, cut.chunk, cut.keep, cut.keep_tail)  # torch 2.6 does not trace dataclasses.astuple
    output = _Lookup.apply(  # type: ignore[no-untyped-call]
        input, self.weight, served.leaf, served.index, self.padding_idx, layout
    )
    return output


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    served = _ready(self.weight, transposed=True)
    if served is None:
        forward: Callable[[Any, Tensor], Tensor] = _forwards[type(self)]
        return forward(self, x)
    return _served_linear(x, self.weight, self.bias, served, True)


def _served_linear(input: Tensor, weight: Tensor, bias: Tensor | None, served: Served, transposed: bool) -> Tensor:
    leaf, index = served.leaf, served.index
    assert leaf is not None and index is not None
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if input.dtype != torch.float64:
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    columns = input.index_select(-1, index)
    output: Tensor = _ColumnLinear.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, leaf, columns, index, transposed
    )
    return output


_REFRESHED = (
    "the selection was refreshed between this layer's forward and its backward, or the weight was written to: call "
    "optimizer.step(), refresh() and load_state_dict() when no backward is to come"
)


class _ColumnLinear(torch.autograd.Function):
    """A linear layer: its weight's gradient goes to `leaf`, the selected columns only.

    `columns` [..., keep and some] are the inputs that are kept. The product with all of them is made: it takes half the
    time of one with a number of columns that is not aligned. Backward is made of what can be differentiated again, so
    gradients of gradients are whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        columns: Tensor,
        index: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, columns, index)  # the index only so that a refresh in between is noticed
        ctx.transposed, ctx.keep, ctx.dtype = transposed, leaf.shape[0], leaf.dtype
        if transposed:
            weight = weight.t()
        if bias is None:
            return functional.linear(input, weight)
        output = functional.linear(input.reshape(-1, input.shape[-1]), weight, bias)
        # Not view(): what a Function returns as a view may not be written to, as nn.ReLU(inplace=True) does.
        whole: Tensor = torch.ops.aten._unsafe_view.default(output, [*input.shape[:-1], output.shape[-1]])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        try:
            weight, columns, _ = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(_REFRESHED) from error
        to_input = to_bias = to_leaf = None
        if ctx.needs_input_grad[0]:
            to_input = gradient @ (weight.t() if ctx.transposed else weight)
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            to_leaf = (columns.reshape(-1, columns.shape[-1]).t() @ flat)[: ctx.keep].to(ctx.dtype)
        return to_input, None, to_bias, to_leaf, None, None, None


class _Lookup(torch.autograd.Function):
    """An embedding: its table's gradient goes to `leaf`, the selected entries only."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, leaf: Tensor, index: Tensor, padding: int | None, layout: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(ids, index)
        ctx.padding, ctx.layout, ctx.dtype = padding, layout, leaf.dtype
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        try:
            ids, index = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(_REFRESHED) from error
        flat = ids.reshape(-1).long()
        if ctx.padding is not None:
            flat = torch.where(flat == ctx.padding, -1, flat)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():  # somebody wants to differentiate it again
            entries = reference.row_entries(Selection(index, Layout(*ctx.layout)), flat, gradient)
        else:
            entries = torch.ops.nanoadam.row_entries(flat, gradient, index, list(ctx.layout))
        return None, None, entries.to(ctx.dtype), None, None, None


# The schema is spelt out: torch 2.6 finds none for list[int].
@torch.library.custom_op(
    "nanoadam::row_entries",
    mutates_args=(),
    schema="(Tensor ids, Tensor gradient, Tensor index, int[] layout) -> Tensor",
)
def _row_entries(ids: Tensor, gradient: Tensor, index: Tensor, layout: list[int]) -> Tensor:
    return backend(gradient.device).row_entries(Selection(index, Layout(*layout)), ids, gradient)


@_row_entries.register_fake
def _(ids: Tensor, gradient: Tensor, index: Tensor, layout: list[int]) -> Tensor:
    return gradient.new_empty(index.shape[0], dtype=torch.float32)


class _Leaf(torch.autograd.Function):
    """Stands for the selected columns of a weight, to receive their gradient; its values are never read."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, served: Served) -> Tensor:
        ctx.selection, ctx.weight = served.selection, weight
        assert served.selection is not None
        return torch.zeros((), dtype=served.dtype, device=weight.device).expand(served.selection.layout.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        selection, weight = ctx.selection, ctx.weight
        served = _served.get(id(weight))
        if served is not None and served.slot.selection is not selection:
            raise RuntimeError(_REFRESHED)
        layout = selection.layout
        if torch.is_grad_enabled() and gradient.requires_grad:  # somebody wants to differentiate it again
            if isinstance(layout, Layout):
                position = reference.positions(selection.index, layout)[selection.index >= 0]
                flat = torch.zeros(weight.numel(), dtype=gradient.dtype, device=gradient.device)
                return flat.index_copy(0, position, gradient[selection.index >= 0]).view(weight.shape).to(
                    weight.dtype
                ), None
            dense = torch.zeros(weight.shape, dtype=gradient.dtype, device=gradient.device)
            values = gradient if layout.transposed else gradient.t()
            held = selection.index >= 0
            values = values[held] if layout.transposed else values[:, held]
            return dense.index_copy(layout.input_dim, selection.index[held].long(), values).to(weight.dtype), None
        entries = gradient.contiguous()
        if isinstance(layout, ColumnLayout) and (served is None or served.keep_zeros):
            entries = entries.masked_fill(~reference.used(selection), 0)
        return SelectedGradient(Box(selection, entries), weight), None
