"""The state of sharded parameters in a form that any number of processes can take up.

What a process holds of a tensor depends on how many share it, and so do the indices of its chunks. Saved, state is a
DTensor of `shape[0]` rows, sharded as the parameter is, in which each selected weight has a place: its position in the
full tensor, its two moments, and the step at which it entered. There are as many places to a row as its chunks keep; so
the shape of what is saved follows from the parameter and its density alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoadam.chunks import ColumnLayout, Layout, layout
from nanoadam.ops import Slot, reference
from nanoadam.shards import SHARDED, Part, is_sharded_along, like, local, part_of
from nanoadam.slots import is_dense, layout_of

_NONE = -1  # position of an empty place


class Entries(NamedTuple):
    """Selected weights of one tensor: their positions in the full tensor, int64, and what belongs to each."""

    position: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    entry_step: Tensor  # int32

    def only(self, which: Tensor) -> Entries:
        """Some of them."""
        return Entries(*(value[which] for value in self))


def _width(shape: Sequence[int], density: float) -> int:
    """Places to a row."""
    lay, row = layout(shape, density), math.prod(shape[1:])
    return lay.kept_per_line if lay.lines > 1 or lay.chunk < row else -(-lay.keep // (lay.chunk // row))


def saved(slot: Slot, density: float) -> dict[str, Tensor]:
    """The state of a sharded parameter, to be saved: DTensors, sharded as it is, and what all processes share.

    Raises:
        ValueError: for a tensor that is cut unevenly along dimension 1.
    """
    state, parameter, part = slot.state, slot.parameter, slot.part
    assert part is not None
    result = {"step": state["step"].clone()}
    if slot.selection is None:
        return result | {name: like(state[name], parameter) for name in ("exp_avg", "exp_avg_sq")}
    if isinstance(slot.layout, ColumnLayout):
        shape = (part.whole[0], slot.layout.keep)
        moments = {name: like(state[name].t().contiguous(), parameter, shape) for name in ("exp_avg", "exp_avg_sq")}
        result["by_row"] = torch.ones(())  # otherwise moments of columns lie column by column
        return result | moments | {"index": state["index"].clone(), "entry_step": state["entry_step"].int()}
    pieces = 1
    if is_sharded_along(parameter, 1):
        pieces = math.prod(part.whole[1:]) // max(1, part.row)
        if pieces * part.row != math.prod(part.whole[1:]):
            raise ValueError(f"{slot.name!r} is cut unevenly along dimension 1: its state cannot be saved")
    rows, width = part.shape[0], _width((part.whole[0], *part.shape[1:]), density)
    numbers = torch.int32 if math.prod(part.whole) < 2**31 else torch.int64
    values = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    if slot.weight.numel():
        found = reference.positions(state["index"].clamp(min=0), slot.layout)
        values["position"] = torch.where(state["index"] >= 0, part.to_whole(found), _NONE).to(numbers)
    else:
        values["position"] = torch.empty(0, dtype=numbers, device=slot.weight.device)
    if state["entry_step"].numel() == slot.layout.places and state["entry_step"].numel() > 1:
        values["entry_step"] = state["entry_step"].int()  # gloo has no int16
    elif rows == 0 and state["entry_step"].numel() == 0:
        values["entry_step"] = state["entry_step"].int()
    else:
        result["entry_step"] = state["entry_step"].int()
    for name, value in values.items():
        grid = torch.full((rows * width,), _NONE if name == "position" else 0, dtype=value.dtype, device=value.device)
        grid[: value.numel()] = value
        result[name] = like(grid.view(rows, width), parameter, (part.whole[0], width * pieces))
    return result


def taken_up(groups: Sequence[Mapping[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved state as these groups' parameters hold it here, whoever has saved it. Called by all processes.

    What is not a state of NanoAdam for such groups is left as it is, to be refused by those who check it.
    """
    states, loaded = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(states, Mapping) or not loaded or len(loaded) != len(groups):
        return state_dict
    wanted: list[tuple[Tensor, Any, Mapping[str, Any], Mapping[str, Any]]] = []
    for group, saved_group in zip(groups, loaded, strict=True):
        if len(group["params"]) != len(saved_group["params"]) or "active_density" not in saved_group:
            return state_dict
        options = {**group, **{key: value for key, value in saved_group.items() if key != "params"}}
        for parameter, key in zip(group["params"], saved_group["params"], strict=True):
            state = states.get(key)
            if state and "exp_avg" in state and (isinstance(parameter, SHARDED) or {"position", "by_row"} & set(state)):
                wanted.append((parameter, key, state, options))
    if not wanted:
        return state_dict
    changed: dict[Any, Any] = dict(states)
    found: list[tuple[Tensor, Any, Mapping[str, Any], Mapping[str, Any], Entries]] = []
    for parameter, key, its, theirs in wanted:
        if is_dense(parameter, theirs) or isinstance(
            layout_of(parameter, theirs, theirs["active_density"]), ColumnLayout
        ):
            changed[key] = _part_of_state(parameter, its, theirs)
        else:
            found.append((parameter, key, its, theirs, _entries(parameter, its, theirs)))
    arrived = _exchange([(parameter, entries) for parameter, _, _, _, entries in found])
    for (parameter, key, its, theirs, _), entries in zip(found, arrived, strict=True):
        lay = layout_of(parameter, theirs, theirs["active_density"])
        assert isinstance(lay, Layout)
        entered: Tensor = its["entry_step"]
        alone = entered if entered.dim() == 1 and entered.numel() == 1 else None
        changed[key] = {"step": its["step"], **_place(entries, part_of(parameter), lay, alone)}
    return {**state_dict, "state": changed}


def _part_of_state(parameter: Tensor, state: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a dense tensor, or of columns."""
    part, result = part_of(parameter), {name: value for name, value in state.items() if name != "by_row"}
    for name in ("exp_avg", "exp_avg_sq"):
        value = state[name]
        rows: Tensor = value if is_dense(parameter, options) or "by_row" in state else value.t()
        if isinstance(value, SHARDED):
            rows = local(torch.as_tensor(value))
        elif part is not None:
            rows = rows.narrow(0, part.first[0], part.shape[0])
            if is_sharded_along(parameter, 1):
                rows = rows.narrow(1, part.first[1] // math.prod(part.whole[2:]), part.shape[1])
        result[name] = rows if is_dense(parameter, options) else rows.t().contiguous()
    if "entry_step" in result:
        result["entry_step"] = result["entry_step"].to(torch.int16)
    return result


def _entries(parameter: Tensor, state: Mapping[str, Any], options: Mapping[str, Any]) -> Entries:
    """What is selected in a saved state, or in the part of it that was read here."""
    average, average_sq = (local(state[name]).reshape(-1) for name in ("exp_avg", "exp_avg_sq"))
    entered = local(state["entry_step"]).reshape(-1).int()
    if "position" in state:
        position = local(state["position"]).reshape(-1).long()
    else:  # of one process that had all of it
        index = state["index"]
        lay = layout(parameter.shape, options["active_density"])
        position = torch.where(index >= 0, reference.positions(index.clamp(min=0), lay), _NONE)
    entered = entered.expand(position.shape) if entered.numel() == 1 else entered
    entries = Entries(position, average, average_sq, entered)
    return entries.only(position >= 0)


def _exchange(found: Sequence[tuple[Tensor, Entries]]) -> list[Entries]:
    """Give entries that were read here, but lie in other processes' parts, to those; keep what lies here."""
    result, strays = [], {}
    mesh: Any = None
    for i, (parameter, entries) in enumerate(found):
        part = part_of(parameter)
        if part is None:
            result.append(entries)
            continue
        here = part.to_part(entries.position)[1]
        result.append(entries.only(here))
        row = math.prod(part.whole[1:])
        if is_sharded_along(parameter, 1) or layout(part.whole, 1.0).chunk > row:  # shards may end within chunks
            mesh = parameter
            strays[i] = [value.cpu() for value in entries.only(~here)]
    if mesh is None:
        return result
    known = [strays]
    for dim in range(mesh.device_mesh.ndim):
        group = mesh.device_mesh.get_group(dim)
        everybody: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everybody, known, group=group)
        known = [each for several in everybody for each in several]
    for i in strays:
        part, mine = part_of(found[i][0]), result[i]
        assert part is not None
        others = [torch.cat(values) for values in zip(*(each[i] for each in known), strict=True)]
        coming = Entries(*(value.to(mine.position.device) for value in others))
        coming = coming.only(part.to_part(coming.position)[1])
        result[i] = Entries(*(torch.cat(pair) for pair in zip(mine, coming, strict=True)))
    return result


def _place(entries: Entries, part: Part | None, lay: Layout, alone: Tensor | None) -> dict[str, Tensor]:
    """State of a layout that has these entries; where a chunk has no room for all, without the last ones."""
    position = entries.position if part is None else part.to_part(entries.position)[0]
    position, order = position.sort(stable=True)
    if len(position) > 1:  # replicas of a shard have all read it
        first = torch.cat([position.new_ones(1, dtype=torch.bool), position[1:] != position[:-1]])
        position, order = position[first], order[first]
    line, within = position // max(1, lay.line), position % max(1, lay.line)
    number = within // lay.chunk
    chunk = line * lay.per_line + number
    rank = torch.arange(len(chunk), device=chunk.device) - torch.searchsorted(chunk, chunk)
    room = torch.where(number == lay.full, lay.keep_tail, lay.keep)
    fits = rank < room
    place = (line * lay.kept_per_line + number * lay.keep + rank)[fits]
    device, order = position.device, order[fits]
    index = torch.full((lay.selected,), -1, dtype=torch.int16, device=device)
    index[place] = (within - number * lay.chunk)[fits].to(torch.int16)
    state = {"index": index}
    for name in ("exp_avg", "exp_avg_sq"):
        values = getattr(entries, name)
        state[name] = values.new_zeros(lay.selected)
        state[name][place] = values[order]
    if alone is not None and lay.selected != 1:
        state["entry_step"] = alone.to(torch.int16)
    else:
        state["entry_step"] = torch.zeros(lay.selected, dtype=torch.int16, device=device)
        state["entry_step"][place] = entries.entry_step[order].to(torch.int16)
    return state
