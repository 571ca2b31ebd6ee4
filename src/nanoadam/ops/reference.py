"""The operations in plain PyTorch, on any device: the definition that the kernels are held to.

Each public function loops over tensors; the private ones above it say what happens to one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoadam.chunks import AnyLayout, ColumnLayout, Layout
from nanoadam.ops import MAX_AGE, Adam, Rule, Selection, Slot
from nanoadam.ops.rounding import random_words, round_stochastically, tensor_key
from nanoadam.shards import sum_over_rows

_BITS = 24  # of a place in a chunk, or of a column's number
_NEVER = 0x7FFFFFFF  # rank of a weight that may not be selected


def positions(index: Tensor, layout: AnyLayout) -> Tensor:
    """Positions in the flattened full tensor (row-major) of the selected weights.

    Args:
        index: as in `Selection`.

    Returns:
        int64, of `layout.shape`; meaningless where `index` is -1.
    """
    if isinstance(layout, ColumnLayout):
        output = torch.arange(layout.outputs, device=index.device)
        column = index[:, None].long()
        return column * layout.outputs + output if layout.transposed else output * layout.columns + column
    start = torch.arange(layout.per_line, device=index.device) * layout.chunk
    keep = torch.full_like(start, layout.keep)
    if layout.tail:
        keep[-1] = layout.keep_tail
    offset = start.repeat_interleave(keep, output_size=layout.kept_per_line)
    line = torch.arange(layout.lines, device=index.device) * layout.line
    return (index.view(layout.lines, -1) + offset + line[:, None]).view(-1)


def used(selection: Selection) -> Tensor:
    """Which places are not empty: bool, [selected], or [keep, 1] of columns."""
    held = selection.index >= 0
    return held[:, None] if isinstance(selection.layout, ColumnLayout) else held


def _flat_storage(tensor: Tensor) -> Tensor:
    """All of a tensor's storage from its first element on, as one dimension: writable whatever the strides."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent,), (1,))


def _storage_offsets(position: Tensor, tensor: Tensor) -> Tensor:
    """Where the element at each row-major position lies in `_flat_storage(tensor)`."""
    if tensor.is_contiguous():
        return position
    offset, rest = torch.zeros_like(position), position
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offset += rest % size * stride
        rest = rest // size
    return offset


def _magnitude(values: Tensor) -> Tensor:
    """int32 ranks that order like |values|, equal for equal magnitudes; NaN ranks above infinity."""
    if values.dtype == torch.float32:
        bits, infinity = values.view(torch.int32) & 0x7FFFFFFF, 0x7F800000
    else:
        bits = (values.view(torch.int16) & 0x7FFF).to(torch.int32)
        infinity = 0x7F80 if values.dtype == torch.bfloat16 else 0x7C00
    return bits.clamp_(max=infinity + 1)


def _ranks(slot: Slot, rule: Rule, gradient: Tensor | None) -> Tensor:
    """int32 [numel]: the lower, the sooner selected."""
    values = slot.weight.detach().reshape(-1)
    if rule.criterion == "random":
        key = tensor_key(rule.key, rule.step, slot.ordinal)
        place = torch.arange(slot.offset, slot.reach, device=values.device)
        ranks = (random_words(key, place)[0] >> 2).to(torch.int32)
    elif rule.criterion == "smallest":
        ranks = _magnitude(values)
    elif rule.criterion == "largest":
        ranks = 0x7F800001 - _magnitude(values)
    else:
        assert gradient is not None
        ranks = 0x7F800001 - _magnitude(gradient.reshape(-1))
    return ranks.masked_fill_(values == 0, _NEVER) if rule.keep_zeros else ranks


def _first(ranks: Tensor, keep: int) -> Tensor:
    """The `keep` places of each row with the lowest ranks, equal ranks by place.

    Args:
        ranks: int32 [rows, length].

    Returns:
        int64 [rows, keep], ascending; -1 (at the end) where fewer than `keep` places may be selected.
    """
    rows, length = ranks.shape
    if keep == length:
        place = torch.arange(length, device=ranks.device).expand(rows, length)
        chosen = ranks
    else:
        chosen, place = ranks.topk(keep, dim=1, largest=False, sorted=False)
        # topk takes any of several equal ranks: rows where the last rank taken is shared by one left out are redone.
        limit = chosen.amax(1, keepdim=True)
        tied = ((ranks <= limit).sum(1) > keep).nonzero().view(-1)
        if tied.numel():
            unique = (ranks[tied].to(torch.int64) << _BITS) | torch.arange(length, device=ranks.device)
            best = unique.topk(keep, dim=1, largest=False, sorted=False).values
            place[tied], chosen[tied] = best & (2**_BITS - 1), (best >> _BITS).to(torch.int32)
    place = place.masked_fill(chosen == _NEVER, length).sort(1).values
    return place.masked_fill_(place == length, -1)


def _select(slot: Slot, layout: AnyLayout, rule: Rule, gradient: Tensor | None) -> Tensor:
    if isinstance(layout, ColumnLayout):
        ranks = _column_ranks(slot, layout, rule, gradient)
        return _first(ranks[None], layout.keep)[0].to(torch.int32)
    ranks = _ranks(slot, rule, gradient).view(layout.lines, layout.line)
    cut = layout.full * layout.chunk
    body = _first(ranks[:, :cut].reshape(-1, layout.chunk), layout.keep).view(layout.lines, -1)
    if layout.tail:
        body = torch.cat([body, _first(ranks[:, cut:], layout.keep_tail)], dim=1)
    return body.reshape(-1).to(torch.int16)


def column_norms(values: Tensor, layout: ColumnLayout, slot: Slot | None = None) -> Tensor:
    """float32 [columns]: sums of squares. Summed in float64, so that the order of the sum does not show.

    Over the rows on all processes, if these are of a slot whose parameter is sharded: called by all of them.
    """
    sums = values.detach().double().square().sum(1 - layout.input_dim)
    if slot is not None and slot.part is not None:
        sum_over_rows(slot.parameter, sums)
    return sums.float()


def _column_ranks(slot: Slot, layout: ColumnLayout, rule: Rule, gradient: Tensor | None) -> Tensor:
    """int32 [columns]: the lower, the sooner selected."""
    norms = column_norms(slot.weight, layout, slot)
    if rule.criterion == "random":
        key = tensor_key(rule.key, rule.step, slot.ordinal)
        ranks = (random_words(key, torch.arange(layout.columns, device=norms.device))[0] >> 2).to(torch.int32)
    elif rule.criterion == "smallest":
        ranks = _magnitude(norms)
    elif rule.criterion == "largest":
        ranks = 0x7F800001 - _magnitude(norms)
    else:
        assert gradient is not None
        ranks = 0x7F800001 - _magnitude(column_norms(gradient, layout, slot))
    return ranks.masked_fill_(norms == 0, _NEVER) if rule.keep_zeros else ranks


def _survivors(old: Selection, new: Selection) -> tuple[Tensor, Tensor]:
    """Which of the new weights or columns were selected before, and at which old place (valid where they were).

    Returns:
        bool and int64, one for each number of `new.index`.
    """
    if isinstance(old.layout, ColumnLayout):
        before, after = old.index.long(), new.index.long()
    else:
        before, after = positions(old.index, old.layout), positions(new.index, new.layout)
    held = old.index >= 0
    if not held.all():  # empty places would break the ascending order that the search needs
        before = torch.where(held, before, -1).cummax(0).values
    # In a run made by cummax the real entry comes first, which is where a search from the left arrives.
    place = torch.searchsorted(before, after).clamp_(max=before.numel() - 1)
    return (before[place] == after) & (new.index >= 0), place


def select(slots: Sequence[Slot], layouts: Sequence[AnyLayout], rule: Rule, gradients: Sequence[Tensor] | None) -> None:
    for i, (slot, layout) in enumerate(zip(slots, layouts, strict=True)):
        index = _select(slot, layout, rule, gradients[i] if gradients is not None else None)
        entry_step = torch.full((layout.places if rule.carry else 1,), slot.steps, dtype=torch.int64)
        new = {"index": index, "entry_step": entry_step.to(index.device, torch.int16)}  # its low 16 bits
        if slot.steps and rule.carry and slot.selection is not None:
            chosen = Selection(index, layout)
            for name in ("exp_avg", "exp_avg_sq"):
                new[name] = move(slot.state[name], slot.selection, chosen)
            kept, place = _survivors(slot.selection, chosen)
            restamped = (slot.steps - _age(slot).view(-1)).to(torch.int16).expand(slot.layout.places)  # maybe of size 1
            new["entry_step"] = torch.where(kept, restamped[place], new["entry_step"])
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                new[name] = torch.zeros(layout.shape, dtype=slot.state[name].dtype, device=index.device)
        slot.take(new, layout, in_place=rule.in_place)


def take(selection: Selection, dense: Tensor) -> Tensor:
    """The selected entries of a dense tensor, in its dtype, of `layout.shape`; zero at empty places."""
    index, layout = selection.index, selection.layout
    if isinstance(layout, ColumnLayout):
        columns = dense.index_select(layout.input_dim, index.clamp(min=0))
        entries = columns if layout.transposed else columns.t().contiguous()
    else:
        entries = _flat_storage(dense)[_storage_offsets(positions(index.clamp(min=0), layout), dense)]
    return entries.masked_fill_(~used(selection), 0)


def put(selection: Selection, entries: Tensor, dense: Tensor) -> None:
    """Write entries, of `layout.shape`, into a dense tensor."""
    held, index, layout = selection.index >= 0, selection.index, selection.layout
    if isinstance(layout, ColumnLayout):
        values = entries[held].to(dense.dtype)
        dense.index_copy_(layout.input_dim, index[held].long(), values if layout.transposed else values.t())
    else:
        _flat_storage(dense)[_storage_offsets(positions(index, layout)[held], dense)] = entries[held].to(dense.dtype)


def move(entries: Tensor, old: Selection, new: Selection) -> Tensor:
    """Entries of one selection as those of another: zero for weights that the old one had not."""
    kept, place = _survivors(old, new)
    moved = entries[place]
    return moved.masked_fill_(~(kept if moved.dim() == 1 else kept[:, None]), 0)


def gather(slots: Sequence[Slot], gradients: Sequence[Tensor], entries: Sequence[Tensor], add: Sequence[bool]) -> None:
    for slot, gradient, mine, more in zip(slots, gradients, entries, add, strict=True):
        assert slot.selection is not None
        new = take(slot.selection, gradient).float()
        mine.copy_(mine.float() + new if more else new)  # rounded once, where it is not float32


def mask(selection: Selection, shape: Sequence[int]) -> Tensor:
    """Which weights are selected: bool, of the parameter's shape."""
    index, layout = selection.index, selection.layout
    chosen = torch.zeros(layout.numel, dtype=torch.bool, device=index.device)
    chosen[positions(index, layout)[index >= 0].view(-1)] = True
    return chosen.view(tuple(shape))


def _age(slot: Slot) -> Tensor:
    """int32, like `entry_step` ([..., 1] of columns): updates since each entered, with this one; at most MAX_AGE."""
    entry_step = slot.state["entry_step"]
    if slot.selection is not None and isinstance(slot.layout, ColumnLayout):
        entry_step = entry_step[:, None]
    return ((slot.steps - entry_step.to(torch.int32)) & 0xFFFF).clamp_(max=MAX_AGE)


def restamp(slot: Slot) -> None:
    """Move entry steps up so that ages stay at MAX_AGE: to be called before their low 16 bits wrap around."""
    slot.state["entry_step"].copy_((slot.steps - _age(slot)).to(torch.int16).view(-1))
    slot.restamped = slot.steps


def _store(target: Tensor, value: Tensor, noise: Tensor | None) -> Tensor:
    return value.to(target.dtype) if noise is None else round_stochastically(value, noise)


def _adam(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    adam: Adam,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW on float32 values of one shape; `age` int32, same shape or one element. New weight and moments."""
    lr = adam.lr.reshape(()) if isinstance(adam.lr, Tensor) else adam.lr
    gradient = gradient * adam.grad_scale
    if adam.maximize:
        gradient = -gradient
    exp_avg = exp_avg.lerp(gradient, 1 - adam.beta1)
    exp_avg_sq = exp_avg_sq * adam.beta2 + (1 - adam.beta2) * gradient * gradient
    # Bias corrections in float64: 1 - beta2**age has lost half its digits in float32 while age is small.
    correction1 = 1 - adam.beta1 ** age.double()
    correction2 = (1 - adam.beta2 ** age.double()).sqrt().float()
    step_size = (lr / correction1).float()
    weight = weight * (1 - lr * adam.weight_decay)
    return weight - step_size * (exp_avg / (exp_avg_sq.sqrt() / correction2 + adam.eps)), exp_avg, exp_avg_sq


def _noise(slot: Slot, adam: Adam, position: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Random bits for first moment, second moment and weight; None where the rounding is to nearest."""
    wanted = adam.stochastic_rounding
    moments = wanted and slot.state["exp_avg"].dtype == torch.bfloat16
    weight = wanted and slot.weight.dtype == torch.bfloat16
    if not (moments or weight):
        return None, None, None
    first, second = random_words(tensor_key(adam.key, slot.steps, slot.ordinal), position)
    return first if moments else None, first >> 16 if moments else None, second if weight else None


def update(slots: Sequence[Slot], entries: Sequence[Tensor], adam: Adam) -> None:
    for slot, gradient in zip(slots, entries, strict=True):
        state, selection = slot.state, slot.selection
        assert selection is not None
        position = positions(selection.index.clamp(min=0), selection.layout)
        storage, place = _flat_storage(slot.weight), _storage_offsets(position, slot.weight)
        held = used(selection)
        if adam.keep_zeros and isinstance(selection.layout, ColumnLayout):
            held = held & (storage[place] != 0)
        held = held.expand(position.shape)
        weight, exp_avg, exp_avg_sq = _adam(
            storage[place].float(),
            gradient.float(),
            state["exp_avg"].float(),
            state["exp_avg_sq"].float(),
            _age(slot),
            adam,
        )
        noise1, noise2, noise3 = _noise(slot, adam, position + slot.offset)
        state["exp_avg"].copy_(_store(state["exp_avg"], exp_avg, noise1).masked_fill_(~held, 0))
        state["exp_avg_sq"].copy_(_store(state["exp_avg_sq"], exp_avg_sq, noise2).masked_fill_(~held, 0))
        storage[place[held]] = _store(storage, weight, noise3)[held]


def update_dense(slots: Sequence[Slot], gradients: Sequence[Tensor], adam: Adam) -> None:
    for slot, gradient in zip(slots, gradients, strict=True):
        state = slot.state
        age = torch.tensor(slot.steps, device=gradient.device)
        weight, exp_avg, exp_avg_sq = _adam(
            slot.weight.detach().float(),
            gradient.float(),
            state["exp_avg"].float(),
            state["exp_avg_sq"].float(),
            age,
            adam,
        )
        position = torch.arange(gradient.numel(), device=gradient.device).view(gradient.shape)
        noise1, noise2, noise3 = _noise(slot, adam, position + slot.offset)
        state["exp_avg"].copy_(_store(state["exp_avg"], exp_avg, noise1))
        state["exp_avg_sq"].copy_(_store(state["exp_avg_sq"], exp_avg_sq, noise2))
        slot.weight.detach().copy_(_store(slot.weight, weight, noise3))


def row_entries(selection: Selection, ids: Tensor, gradient: Tensor) -> Tensor:
    """The selected entries of an embedding's gradient, from the gradient of what was looked up.

    Args:
        selection: of a table [rows, width].
        ids: int64 [tokens]; a row each, or -1 for none.
        gradient: [tokens, width].

    Returns:
        float32 [selected], zero at empty places.
    """
    assert isinstance(selection.layout, Layout)
    if ids.numel() == 0:
        return torch.zeros(selection.index.shape, device=gradient.device)
    rows, which = ids.unique(return_inverse=True)
    width = gradient.shape[1]
    sums = torch.zeros(len(rows), width, dtype=torch.float32, device=gradient.device)
    if gradient.device.type == "cpu":
        sums = sums.index_add(0, which, gradient.float())
    else:  # where index_add would give other bits every time
        sums = sums.index_put((which,), gradient.float(), accumulate=True)
    position = positions(selection.index.clamp(min=0), selection.layout)
    row, column = position // width, position % width
    place = torch.searchsorted(rows, row).clamp_(max=len(rows) - 1)
    entries = sums[place, column]
    return torch.where((rows[place] == row) & (selection.index >= 0), entries, 0.0)
