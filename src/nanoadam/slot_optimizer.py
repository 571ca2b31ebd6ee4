"""What NanoAdam holds for its parameters: groups, a slot for each parameter, state that is saved and loaded.

Nothing here asks for a gradient: optimizer.py has the steps.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from nanoadam import checks, portable
from nanoadam.chunks import ColumnLayout
from nanoadam.ops import Selection, Slot, reference
from nanoadam.schedules import Schedule
from nanoadam.slots import density_at, make_slot


class SlotOptimizer(Optimizer):
    """A torch optimizer with a slot for each parameter."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.made_with: list[dict[str, Any]] = []  # the options of each group before any state was loaded
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        """Nothing is known of parameters yet."""
        self._slots: dict[Tensor, Slot] = {}
        self._members: list[tuple[list[Slot], list[Slot]]] = []  # for each group: selected from, dense
        self._group_of: dict[Tensor, int] = {}
        self._frozen: list[Tensor] = []
        self._counts: dict[int, list[Tensor]] = {}  # for each group: the steps that its members share
        self._seen: tuple[list[Any], list[Any], list[Any], list[int]] = ([], [], [], [])
        self._selection_hooks: dict[int, Callable[[Any, list[Tensor]], None]] = OrderedDict()

    # Parameters and their state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. Nothing changes if it is refused.

        Raises:
            ValueError, TypeError: for an option or a parameter that cannot be served.
        """
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):  # torch serves the one and refuses the other
            group["params"] = list(group["params"])
        options = {**self.defaults, **group}
        where = checks.label(group, len(self.param_groups))
        checks.check_options(options, where)
        checks.check_parameters(group["params"], options, where)
        super().add_param_group(group)
        group = self.param_groups[-1]
        if isinstance(group["mask_interval"], tuple):
            group["mask_interval"] = group["mask_interval"][0]
        if group["active_density"] is None:
            group["active_density"] = density_at(group, 0)
        self.made_with.append({name: group[name] for name in checks.WATCHED})
        self._make_slots()

    def _make_slots(self) -> None:
        """A slot, and state, for every parameter that can be trained and has none yet."""
        self._leave([slot for slot in self._slots.values() if self._is_cleared(slot)])
        self._members, self._group_of, self._frozen, self._counts = [], {}, [], {}
        known, self._slots = self._slots, {}
        counts: dict[tuple[int, torch.device, int], Tensor] = {}
        ordinal = 0
        for i, group in enumerate(self.param_groups):
            members: tuple[list[Slot], list[Slot]] = ([], [])
            for parameter, name in zip(group["params"], checks.names(group, i), strict=True):
                ordinal += 1
                self._group_of[parameter] = i
                trained = parameter.requires_grad and parameter.numel() > 0
                if not trained:
                    self._frozen.append(parameter)
                slot = known.get(parameter)
                if slot is not None and self._is_cleared(slot):
                    slot = None
                if slot is None and (trained or self.state.get(parameter)):
                    slot = make_slot(parameter, self.state[parameter], group, ordinal, name)
                if slot is None:
                    continue
                self._slots[parameter] = slot
                step = slot.state["step"]
                if not group["capturable"]:  # a graph that adds to a shared count could not leave one tensor out
                    slot.state["step"] = counts.setdefault((i, step.device, slot.steps), step)
                members[slot.selection is None].append(slot)
            self._members.append(members)
        for parameter in known:
            if parameter not in self._group_of:
                self.state.pop(parameter, None)
        self._seen = self._present()

    def _is_cleared(self, slot: Slot) -> bool:
        """Whether somebody has cleared or replaced a slot's state."""
        return self.state.get(slot.parameter) is not slot.state or not slot.state

    def _present(self) -> tuple[list[Any], list[Any], list[Any], list[int]]:
        """Parameters, state, options, entries of each state: what others may change behind the optimizer's back."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = list(self.state.values())
        sizes = [len(state) for state in states if isinstance(state, dict)]
        return parameters, states, list(map(checks.watched, self.param_groups)), sizes

    def _follow(self) -> None:
        """Take up what others have done since: parameters replaced, added or unfrozen, state cleared, options changed.

        Raises:
            ValueError, TypeError: for what cannot be served.
        """
        now = self._present()
        same = all(
            len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(now[:2], self._seen[:2], strict=True)
        )
        if same and now[2:] == self._seen[2:] and not any(p.requires_grad and p.numel() for p in self._frozen):
            return
        for i, group in enumerate(self.param_groups):
            where = checks.label(group, i)
            checks.check_changes(group, self._seen[2][i] if i < len(self._seen[2]) else None, where)
            checks.check_parameters(group["params"], group, where)
            if i < len(self._members):
                checks.check_flattened([slot.parameter for slot in self._members[i][0]], group, where)
            for parameter, name in zip(group["params"], checks.names(group, i), strict=True):
                if self.state.get(parameter):
                    checks.check_parameter_state(name, parameter, group, self.state[parameter])
        self._make_slots()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; and let go of parameters that were replaced, as accelerate replaces them by shards."""
        self._follow()
        super().zero_grad(set_to_none)

    @contextlib.contextmanager
    def _counted(self, slots: Sequence[Slot], i: int) -> Iterator[None]:
        """Count a step of these tensors of group i; taken back if it is interrupted.

        Those in step with each other share one count.
        """
        everybody = len(slots) == sum(map(len, self._members[i]))
        counts = self._counts.get(i) if everybody else None
        if counts is None:
            found = {id(count): count for count in (slot.state["step"] for slot in slots)}
            if not everybody:  # those who stand still keep the count that they shared
                moving = {id(slot) for slot in slots}
                still = {id(slot.state["step"]) for some in self._members[i] for slot in some if id(slot) not in moving}
                found = {key: count.clone() if key in still else count for key, count in found.items()}
                for slot in slots:
                    slot.state["step"] = found[id(slot.state["step"])]
            counts = list(found.values())
            self._counts = {**self._counts, i: counts} if everybody else {}

        def add(number: int) -> None:
            for slot in slots:
                slot.steps += number
            if counts:
                torch._foreach_add_(counts, number)

        add(1)
        try:
            yield
        except BaseException:
            add(-1)
            raise

    # What is selected, and what it takes

    def positions(self, parameter: Tensor) -> Tensor | None:
        """Where the weights are that the last update moved: int64, ascending, in the flattened parameter (row-major).

        None for a dense tensor, all of which may have moved. Not what would be selected now: see `selected`.
        Of a sharded one, those that lie on this process.

        Raises:
            ValueError: if the parameter is not one of this optimizer.
        """
        self._check_member(parameter)
        slot = self._slots.get(parameter)
        if slot is None:
            return torch.empty(0, dtype=torch.int64, device=parameter.device)
        if slot.selection is None:
            return None
        if slot.weight.numel() == 0:
            return torch.empty(0, dtype=torch.int64, device=parameter.device)
        mine = reference.positions(slot.selection.index, slot.layout)[slot.selection.index >= 0].view(-1).sort().values
        return mine if slot.part is None else slot.part.to_whole(mine)

    def columns(self, parameter: Tensor) -> Tensor | None:
        """The columns that the last update moved: int64, ascending; None where whole columns are not selected.

        Raises:
            ValueError: if the parameter is not one of this optimizer.
        """
        selection = self.selection(parameter)
        if selection is None or not isinstance(selection.layout, ColumnLayout):
            return None
        return selection.index[selection.index >= 0].long()

    def selection(self, parameter: Tensor) -> Selection | None:
        """What the last update moved, as it is kept: the optimizer's own index, and how it counts.

        None for a dense tensor. In a selection hook it is still the old one.

        Raises:
            ValueError: if the parameter is not one of this optimizer.
        """
        self._check_member(parameter)
        slot = self._slots.get(parameter)
        return None if slot is None else slot.selection

    def register_selection_pre_hook(self, hook: Callable[[Any, list[Tensor]], None]) -> RemovableHandle:
        """Have `hook(optimizer, parameters)` called before the selections of these parameters are replaced.

        `positions(parameter)` still has the old ones then. Hooks are not copied with the optimizer.
        """
        handle = RemovableHandle(self._selection_hooks)
        self._selection_hooks[handle.id] = hook
        return handle

    def _leave(self, slots: Iterable[Slot]) -> None:
        """Tell those who want to know that the selections of these are about to go."""
        parameters = [slot.parameter for slot in slots if not slot.unselected] if self._selection_hooks else []
        for hook in tuple(self._selection_hooks.values()) if parameters else ():
            hook(self, parameters)

    def _check_member(self, parameter: Tensor) -> None:
        if parameter not in self._group_of:
            raise ValueError(f"the parameter of shape {tuple(parameter.shape)} is not in this optimizer")

    def state_bytes(self) -> int:
        """Bytes of optimizer state: indices, moments, entry steps and step counts of all tensors."""
        return sum(value.nbytes for slot in self._slots.values() for value in slot.state.values())

    # Saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """As in torch: plain tensors and plain values, loadable with `torch.load(weights_only=True)`.

        Of sharded parameters DTensors, for torch.distributed.checkpoint: see portable.py.
        """
        self._follow()
        saved = super().state_dict()
        # Tensors of the same age share their count here; whoever loads into this dict must find one for each.
        saved["state"] = {
            key: {**state, "step": state["step"].clone()} if isinstance(key, int) and "exp_avg" in state else state
            for key, state in saved["state"].items()
        }
        for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(group["params"], own["params"], strict=True):
                slot = self._slots.get(parameter)
                if slot is not None and slot.part is not None and key in saved["state"]:
                    saved["state"][key] = portable.saved(slot, own["active_density"])
            group["shapes"] = [tuple(parameter.shape) for parameter in own["params"]]  # sizes alone do not tell
            if isinstance(group["density"], Schedule):
                group["density"] = group["density"].to_dict()
            for name in ("state_dtype", "grad_dtype"):  # torch's export of sharded state knows no dtypes
                group[name] = str(group[name]).removeprefix("torch.")
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; nothing changes if it does not fit. `p.grad` stays, as in torch.

        Tensors are copied, except those that are this optimizer's own: accelerate's wrapper loads an optimizer's state
        into itself, and a copy of it beside the original would be the peak of the whole run. With sharded parameters
        all processes load together; the state may be of another number of processes, or of one that was not sharded.

        Raises:
            ValueError: if the state was not saved by NanoAdam for parameters of these shapes.
        """
        # Not torch's own: it would cast every tensor to its parameter's dtype, indices too.
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = portable.taken_up(self.param_groups, state_dict)
        groups = checks.check_state(self.param_groups, state_dict)
        own = {id(value) for slot in self._slots.values() for value in slot.state.values()}
        keys = [key for group in groups for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for group, saved in zip(self.param_groups, groups, strict=True):
            params = group["params"]
            group.update(copy.deepcopy({name: value for name, value in saved.items() if name != "params"}))
            group["params"] = params
        self._forget_slots()
        state = state_dict["state"]
        for key in [key for key in list[Any](self.state) if not isinstance(key, Tensor)]:
            del self.state[key]
        self.state.update({key: copy.deepcopy(value) for key, value in state.items() if key not in keys})
        for i, group in enumerate(self.param_groups):
            self._group_of.update(dict.fromkeys(group["params"], i))
        for key, parameter in zip(keys, parameters, strict=True):
            loaded = state.get(key, {})
            self.state.pop(parameter, None)
            for name, value in loaded.items():
                on_host = name == "step" and not self.param_groups[self._group_of[parameter]]["capturable"]
                home = torch.device("cpu") if on_host else parameter.device
                kept = id(value) in own and value.device == home
                self.state[parameter][name] = value if kept else value.detach().to(home, copy=True)
        self._make_slots()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _forget_slots(self) -> None:
        """Other state is about to come: what was there before is freed as it is replaced."""
        self._leave(self._slots.values())
        self._slots, self._members = {}, []

    @torch.no_grad()
    def prepare(self, steps: int) -> None:
        """Give the state of a new optimizer the shapes that it has after `steps` steps, before it is loaded into.

        For loaders that read into existing tensors, as torch.distributed.checkpoint does, where the density has
        changed since the start. `load_state_dict` needs no such call.

        Raises:
            ValueError: if the optimizer has made steps of its own, or `steps` is negative.
        """
        if steps < 0 or any(group["steps"] for group in self.param_groups):
            raise ValueError(f"prepare({steps}) is for a new optimizer and a number of steps of at least 0")
        for group in self.param_groups:
            group["active_density"] = density_at(group, max(0, steps - 1))
        self.state.clear()
        self._make_slots()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "made_with": self.made_with}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._make_slots()
