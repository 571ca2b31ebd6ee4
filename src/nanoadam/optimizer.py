"""NanoAdam: Adam whose moments exist only for the smallest weights of each tensor.

Source: Zhou, Jacobs, Gadhikar, Burkholz, "Pay Attention to Small Weights", NeurIPS 2025, arXiv 2506.21374,
Algorithm 1. What the paper leaves open (chunk size, rounding, ties, moments at a refresh, bias correction,
weight decay) is decided in docs/design.md.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from nanoadam import checks, columns, portable
from nanoadam.chunks import ColumnLayout
from nanoadam.gradients import Box, GradientRelease, SelectedGradient, gradient_bytes, is_zeroed
from nanoadam.ops import MAX_AGE, Adam, Rule, Selection, Slot, backend, reference
from nanoadam.ops.rounding import seed_key
from nanoadam.schedules import Intervals, Schedule
from nanoadam.shards import like, local
from nanoadam.slots import by_column, by_device, empty, layout_of, make_slot


class NanoAdam(Optimizer):
    """AdamW on the smallest weights of each tensor (or another criterion); the rest keep their bits.

    Source: Algorithm 1 of arXiv 2506.21374. After backward `p.grad` of a tensor that is selected from is a
    `SelectedGradient`: the selected entries, reading as a dense gradient that is zero elsewhere. Accumulation,
    clipping, loss scaling and zeroing are torch's own. The options `gradient_release`, `release_bytes` and `local`
    belong to the optimizer and are not saved; all others belong to a group, may differ between groups, and are.

    Args:
        params: parameters, `(name, parameter)` pairs, or groups as from `nanoadam.param_groups(model)`. Groups with
            `dense=True`, and tensors of dimension < 2, get ordinary AdamW.
        lr: learning rate; a float or a one-element Tensor.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, on selected weights only.
        density: share of each chunk's weights that is selected, in (0, 1], or a schedule of it:
            `nanoadam.linear(...)`, `cosine(...)`, `constant(...)`.
        mask_interval: steps between refreshes of the selection; see `nanoadam.recommended_intervals`.
        criterion: "smallest", "largest" or "random" weights, or those with the largest "gradient" (which needs
            the dense gradient: nothing is released). None: the smallest weights, and of whole columns the largest,
            which forget less (docs/results/columns.md).
        moments: at a refresh, "carry" them over for weights that stay selected, or "reset" all of them.
        keep_zeros: never select weights that are exactly zero, so that pruned models stay pruned.
        state_dtype: of the moments, torch.bfloat16 or torch.float32.
        stochastic_rounding: of bfloat16 moments and bfloat16 weights; otherwise to nearest.
        granularity: "weight", or "column": whole input columns of tensors of two dimensions, by their L2 norm; other
            tensors are selected from by weight. The backward of an `nn.Linear` then computes these columns only.
        seed: of the random bits, which depend on it, the step, the tensor and the position alone.
        gradient_release: cut gradients down to their selected entries during backward; otherwise `p.grad` stays dense.
        grad_dtype: of the entries in `p.grad`. The gradient's own dtype loses nothing where each step has one backward.
        maximize: ascend.
        capturable: `step()` may be captured in a CUDA graph; call `refresh()` between replays.
        release_bytes: bytes of dense gradients that may be alive together before they are compacted. Default: 0
            (each at once) on CPU; on GPUs, where a launch costs more, 0.7 times the largest gradient, at most 64 MiB.
        local: with several processes, that each steps on its own gradients, or that you exchange them yourself
            (LocalSGD, hand-made averaging). Otherwise the first step checks that they were exchanged.

    Raises:
        ValueError, TypeError: for an argument or a parameter that cannot be served, naming it and the remedy.
    """

    # GradScaler then leaves the division to step(), which can do it in float32, for float16 gradients too.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float | Schedule = 0.01,
        mask_interval: int | Intervals = 100,
        criterion: str | None = None,
        moments: str = "carry",
        keep_zeros: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        granularity: str = "weight",
        gradient_release: bool = True,
        grad_dtype: torch.dtype = torch.float32,
        maximize: bool = False,
        capturable: bool = False,
        release_bytes: int | None = None,
        local: bool = False,
    ) -> None:
        checks.check_release(gradient_release, release_bytes, local)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "mask_interval": mask_interval,
            "criterion": criterion,
            "moments": moments,
            "keep_zeros": keep_zeros,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "grad_dtype": grad_dtype,
            "maximize": maximize,
            "capturable": capturable,
            "dense": False,
            "granularity": granularity,
            "transposed": False,  # weights are stored [inputs, outputs]
            "steps": 0,  # calls of step() so far
            "refreshed_at": -1,  # the step that the present selection was made for
            "active_density": None,  # and the density it was made with
        }
        checks.check_options(defaults, "every group")
        self.gradient_release, self.release_bytes, self.local = gradient_release, release_bytes, local
        self.made_with: list[dict[str, Any]] = []  # the options of each group before any state was loaded
        self._start()
        super().__init__(params, defaults)
        checks.warn_of_unsorted(self.param_groups)

    def _start(self) -> None:
        """Nothing is known of parameters yet."""
        self._slots: dict[Tensor, Slot] = {}
        self._members: list[tuple[list[Slot], list[Slot]]] = []  # for each group: selected from, dense
        self._group_of: dict[Tensor, int] = {}
        self._frozen: list[Tensor] = []
        self._counts: dict[int, list[Tensor]] = {}  # for each group: the steps that its members share
        self._seen: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        self._looked = False  # at the first gradients, whether they are what they should be
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # on which step() was called
        self._release = GradientRelease(self, self.release_bytes)
        self._selection_hooks: dict[int, Callable[[NanoAdam, list[Tensor]], None]] = OrderedDict()

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
            group["active_density"] = _density(group, 0)
        self.made_with.append({name: group[name] for name in checks.WATCHED})
        self._make_slots()

    def _make_slots(self) -> None:
        """State for every parameter that can be trained and has none yet; hooks where gradients are released."""
        self._members, self._group_of, self._frozen, self._counts = [], {}, [], {}
        known, self._slots = self._slots, {}
        counts: dict[tuple[int, torch.device, int], Tensor] = {}
        ordinal = 0
        for i, group in enumerate(self.param_groups):
            members: tuple[list[Slot], list[Slot]] = ([], [])
            for j, (parameter, name) in enumerate(zip(group["params"], checks.names(group, i), strict=True)):
                ordinal += 1
                self._group_of[parameter] = i
                trained = parameter.requires_grad and parameter.numel() > 0
                if not trained:
                    self._frozen.append(parameter)
                slot = known.get(parameter)
                if slot is not None and self.state.get(parameter) is not slot.state:
                    slot = None  # its state was cleared or replaced
                if slot is None and (trained or self.state.get(parameter)):
                    slot = make_slot(parameter, self.state[parameter], group, ordinal, name)
                if slot is None:
                    continue
                self._slots[parameter] = slot
                step = slot.state["step"]
                if not group["capturable"]:  # a graph that adds to a shared count could not leave one tensor out
                    slot.state["step"] = counts.setdefault((i, step.device, slot.steps), step)
                members[slot.selection is None].append(slot)
                if trained and slot.selection is not None:
                    self._release.hold(parameter)
                embedding = j < len(group.get("roles", ())) and group["roles"][j] == "embedding"
                wanted = trained and self._releases(i) and slot.selection is not None and slot.part is None
                wanted = wanted and parameter.dim() == 2 and (embedding or isinstance(slot.layout, ColumnLayout))
                if wanted and slot.served is None:
                    slot.served = columns.serve(parameter, slot, self, group["grad_dtype"], group["keep_zeros"])
                elif not wanted and slot.served is not None:
                    columns.leave(parameter)
                    slot.served = None
            self._members.append(members)
        gone = [parameter for parameter in known if parameter not in self._group_of]
        self._release.let_go(gone)
        for parameter in gone:
            columns.leave(parameter)
            self.state.pop(parameter, None)
        self._seen = self._present()

    def _present(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Parameters, state and options: what others may change behind the optimizer's back."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return parameters, list(self.state.values()), list(map(checks.watched, self.param_groups))

    def _follow(self) -> None:
        """Take up what others have done since: parameters replaced, added or unfrozen, state cleared, options changed.

        Raises:
            ValueError, TypeError: for what cannot be served.
        """
        now = self._present()
        same = all(
            len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(now[:2], self._seen[:2], strict=True)
        )
        if same and now[2] == self._seen[2] and not any(p.requires_grad and p.numel() for p in self._frozen):
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

    # Algorithm 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Algorithm 1: new density and mask if they are due, then AdamW on the selected weights.

        Args:
            closure: computes the loss and its gradients anew, as in torch; its value is returned.

        Raises:
            TypeError: if a gradient is sparse.
            ValueError: if no parameter is trained, or if somebody has changed groups or state to what cannot be served.
            RuntimeError: if there are several processes and gradients were not exchanged between them; see `local`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        self._release.flush()
        self._check_gradients()
        # GradScaler sets these two. Reading the first waits for the device, as GradScaler itself does.
        infinite, grad_scale = getattr(self, "found_inf", 0.0), getattr(self, "grad_scale", None)
        if bool(infinite):
            return loss
        inverse = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float()
        self._select_missing()
        for device in {s.weight.device for s in self._slots.values() if s.part is not None and s.weight.is_cuda}:
            self._streams[device] = torch.cuda.current_stream(device)
        for i, group in enumerate(self.param_groups):
            self._update(i, inverse)
            compiled = [s for s in self._members[i][0] if _is_compiled(s)]
            group["steps"] += 1
            if compiled:  # their layers ask nobody before they compute: the coming step's selection is made now
                self._refresh(i, compiled, overdue=any(slot.overdue for slot in compiled))
        return loss

    def _select_missing(self) -> None:
        """Select for the present step, where that is due and was not done."""
        for i, group in enumerate(self.param_groups):
            self._refresh(i, [slot for slot in self._members[i][0] if slot.selected_for != group["steps"]])

    def _open(self, slot: Slot, slots: Sequence[Slot]) -> None:
        """Select for the present step if that is due: for these slots of a group, which wait for it together.

        If a first gradient has arrived already in this step, it was thrown away since: weights may have changed.
        """
        i = self._group_of[slot.parameter]
        t = self.param_groups[i]["steps"]
        if slot.arrived_in == t:
            for other in slots:
                other.selected_for = other.arrived_in = -1
        if slot.selected_for != t:
            self._refresh(i, [other for other in slots if other.selected_for != t])

    def _before_forward(self, slot: Slot) -> None:
        """A layer is about to compute with the columns of a slot, or with those of another that shares its weight."""
        weight, group = slot.parameter, self.param_groups[self._group_of.get(slot.parameter, 0)]
        if slot.selected_for != group["steps"] or (slot.arrived_in == group["steps"] and is_zeroed(weight.grad)):
            self._follow()
            if weight not in self._slots:
                return
            slot, i = self._slots[weight], self._group_of[weight]
            with torch.no_grad():
                self._open(slot, [other for other in self._members[i][0] if other.served is not None])
        slot.forward_in = self.param_groups[self._group_of[weight]]["steps"]

    def _arrives(self, parameter: Tensor, gradient: Tensor) -> tuple[Slot, torch.dtype] | None:
        """The first gradient of a tensor in this step: its selection, which stands until the step is made."""
        slot = self._slots.get(parameter)
        groups = len(self.param_groups) == len(self._members)
        if slot is None or not groups or slot.selected_for != self.param_groups[self._group_of[parameter]]["steps"]:
            self._follow()
            slot = self._slots.get(parameter)
        if slot is None or slot.selection is None or not self._releases(i := self._group_of[parameter]):
            return None
        checks.check_gradient(slot.name, gradient)
        by_device([slot])
        group = self.param_groups[i]
        if _asks_before_forward(slot):
            if type(gradient) is not SelectedGradient and not isinstance(slot.layout, ColumnLayout):
                slot.served.in_vain = True
            if slot.selected_for != group["steps"]:  # by a compiled layer, which asked nobody
                slot.selected_for, slot.overdue = group["steps"], slot.overdue or self._is_due(group)
        elif slot.selected_for != group["steps"] or slot.arrived_in == group["steps"]:
            waiting = [other for other in self._members[i][0] if other is slot or is_zeroed(other.gradient)]
            self._open(slot, [other for other in waiting if not _asks_before_forward(other)])
        slot.arrived_in = group["steps"]
        return slot, group["grad_dtype"]

    def _refresh(self, i: int, slots: Sequence[Slot], *, overdue: bool = False) -> None:
        """Lines 1 and 2 of Algorithm 1: select for the present step, where that is due or `overdue`."""
        group = self.param_groups[i]
        t = group["steps"]
        due, without = self._is_due(group), []
        if group["criterion"] == "gradient":
            without = [slot for slot in slots if slot.gradient is None]
            slots = [slot for slot in slots if slot.gradient is not None]
        if not slots:
            return
        for slot in slots:
            slot.selected_for = t
        if due:
            group["active_density"], group["refreshed_at"] = _density(group, t), t
            without = [s for s in without if s.layout != layout_of(s.parameter, group, group["active_density"])]
            self._leave([*slots, *without])
            for slot in without:
                empty(slot, group)
        elif not overdue:
            slots = [slot for slot in slots if slot.unselected]  # unfrozen since the last refresh
        gradients = [_kept(slot, group) for slot in slots]
        with self._on_their_stream(slots):
            self._select(slots, group)
        for slot, kept in zip(slots, gradients, strict=True):
            if kept is not None:
                self._keep(slot, *kept)

    @contextlib.contextmanager
    def _on_their_stream(self, slots: Sequence[Slot]) -> Iterator[None]:
        """Select from sharded parameters on the stream of step().

        FSDP2 hands gradients over on a stream of its own; state that is freed there would be written over too early.
        """
        device = next((slot.weight.device for slot in slots if slot.part is not None), torch.device("cpu"))
        if device.type != "cuda":
            yield
            return
        now = torch.cuda.current_stream(device)
        home = self._streams.get(device, torch.cuda.default_stream(device))
        home.wait_stream(now)
        with torch.cuda.stream(home):
            yield
        now.wait_stream(home)

    @staticmethod
    def _is_due(group: Mapping[str, Any]) -> bool:
        t = group["steps"]
        if group["refreshed_at"] in (-1, t) or _density(group, t) != group["active_density"]:
            return True
        return bool(t % group["mask_interval"] == 0)

    @staticmethod
    def _select(slots: Iterable[Slot], group: Mapping[str, Any]) -> None:
        """New selections, by the group's criterion or, where that is None, by the one of each granularity."""
        slots = list(slots)
        if group["criterion"] is None:
            for criterion, whole in (("smallest", False), ("largest", True)):
                some = [slot for slot in slots if by_column(slot.weight, group) is whole]
                NanoAdam._select(some, {**group, "criterion": criterion})
            return
        rule = Rule(
            criterion=group["criterion"],
            keep_zeros=group["keep_zeros"],
            carry=group["moments"] == "carry",
            key=seed_key(group["seed"]),
            step=group["steps"],
            in_place=group["capturable"],
        )
        for slot in slots:
            slot.unselected = slot.overdue = False
            slot.version += 1
        for device, members, _ in by_device(slots, choosing=True):
            gradients = None
            if rule.criterion == "gradient":
                gradients = [_as_dense(slot.gradient) for slot in members if slot.gradient is not None]
            layouts = [layout_of(slot.parameter, group, _density(group, rule.step)) for slot in members]
            backend(device).select(members, layouts, rule, gradients)
            for slot in members:
                if slot.served is not None:
                    slot.served.renew()

    def _keep(self, slot: Slot, box: Box, before: Box) -> None:
        """A gradient that was kept over a refresh: what it has for weights that stay. Newcomers have none."""
        assert slot.selection is not None
        if box.zeroed:
            box.place(slot.selection, None)
        elif before is not box:  # a graph goes on writing to these addresses
            assert box.stored is not None
            box.place(slot.selection, box.stored.copy_(before.moved_to(slot.selection)))
        else:
            box = Box(slot.selection, box.moved_to(slot.selection), slot=slot, accumulator=self._release)
            slot.gradient = SelectedGradient(box, slot.weight)

    def _compact(self, boxes: Sequence[Box]) -> None:
        """Take the selected entries of gradients that have gathered in backward."""
        ours: list[tuple[Slot, Box]] = []
        for box in boxes:
            if box.slot is not None and box.selection is box.slot.selection:
                ours.append((box.slot, box))
            else:  # kept over a refresh
                box.compact()
        for device, members, mine in by_device([slot for slot, _ in ours], [box for _, box in ours]):
            dense, add = [box.pending for box in mine], [box.stored is not None for box in mine]
            entries = [box.room() for box in mine]
            backend(device).gather(members, dense, entries, add)
            for box, values in zip(mine, entries, strict=True):
                box.stored, box.pending = values, None

    def _entries(self, slots: Sequence[Slot], dtype: torch.dtype) -> list[Tensor]:
        """The selected entries of `p.grad`, whatever it is: [selected] each."""
        entries: list[Any] = [None] * len(slots)
        dense: list[int] = []
        for i, slot in enumerate(slots):
            gradient = slot.gradient
            if type(gradient) is SelectedGradient:
                assert slot.selection is not None
                entries[i] = gradient._box.moved_to(slot.selection)
            else:
                dense.append(i)
                self._release.hold(slot.parameter)  # if swap_tensors has taken the hook away
        for device, members, places in by_device([slots[i] for i in dense], dense):
            found = [torch.empty(slot.layout.shape, dtype=dtype, device=device) for slot in members]
            gradients = [slot.gradient for slot in members if slot.gradient is not None]
            backend(device).gather(members, gradients, found, [False] * len(found))
            for i, values in zip(places, found, strict=True):
                entries[i] = values
        return entries

    def _check_gradients(self) -> None:
        """Refuse what cannot be used before anything of the step is done."""
        seen = False
        for slot in self._slots.values():
            gradient = slot.gradient
            if gradient is not None:
                seen = True
                if gradient.layout != torch.strided:
                    checks.check_gradient(slot.name, gradient)
        if self._looked:
            return
        checks.check_trained([slot.parameter for slot in self._slots.values()] or self._frozen)
        sharded = any(slot.part is not None for slot in self._slots.values())  # by those who exchange gradients, too
        if self.gradient_release and not self.local and not sharded:
            checks.check_exchange([s.gradient for s in self._slots.values() if s.selection is not None])
        self._looked = seen

    # For those who exchange gradients between processes

    def _select_released(self) -> None:
        """Select for the present step before its gradients are all there; not where a compiled layer still computes."""
        for i, group in enumerate(self.param_groups):
            if self._releases(i):
                missing = [slot for slot in self._members[i][0] if slot.selected_for != group["steps"]]
                self._refresh(i, [slot for slot in missing if not _is_compiled(slot)])

    def _released(self, parameter: Tensor) -> tuple[Slot | None, torch.dtype]:
        """The slot whose selected entries `p.grad` has after a backward, and their dtype; None where it stays dense."""
        slot, i = self._slots.get(parameter), self._group_of.get(parameter, -1)
        if slot is None or slot.selection is None or not self._releases(i):
            return None, parameter.dtype
        return slot, self.param_groups[i]["grad_dtype"]

    def _put(self, slot: Slot, values: Tensor) -> None:
        """Let these be the entries of `p.grad`, other processes' gradients among them."""
        gradient, group = slot.gradient, self.param_groups[self._group_of[slot.parameter]]
        assert slot.selection is not None
        if type(gradient) is not SelectedGradient or gradient._box.selection is not slot.selection:
            box = Box(slot.selection, dtype=group["grad_dtype"], slot=slot, accumulator=self._release)
            gradient = slot.gradient = SelectedGradient(box, slot.weight)
        if slot.selected_for != group["steps"]:  # as where it has arrived, from a compiled layer
            slot.selected_for, slot.overdue = group["steps"], slot.overdue or self._is_due(group)
        slot.arrived_in = group["steps"]
        box = gradient._box
        box.stored, box.pending = values.to(box.dtype), None
        box.exchanged, box.zeroed = "replicas", False

    def _releases(self, i: int) -> bool:
        """Whether the gradients of a group's selected tensors are released; not if they decide the selection."""
        return self.gradient_release and self.param_groups[i]["criterion"] != "gradient"

    def _update(self, i: int, grad_scale: float | Tensor) -> None:
        """Lines 3 and 4 of Algorithm 1."""
        group = self.param_groups[i]
        selected, dense = ([slot for slot in some if slot.gradient is not None] for some in self._members[i])
        entries = self._entries(selected, group["grad_dtype"])
        gradients = [slot.gradient for slot in dense]
        gradients = [_as_dense(g) if type(g) is SelectedGradient else g for g in gradients]
        with self._counted([*selected, *dense], i):
            for slot in selected:
                if slot.steps - slot.restamped >= MAX_AGE // 2:
                    reference.restamp(slot)
            beta1, beta2 = group["betas"]
            adam = Adam(
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                stochastic_rounding=group["stochastic_rounding"],
                key=seed_key(group["seed"]),
                grad_scale=grad_scale,
                keep_zeros=group["keep_zeros"],
                capturable=group["capturable"],
            )
            for device, members, theirs in by_device(selected, entries):
                backend(device).update(members, theirs, adam)
            for device, members, theirs in by_device(dense, gradients):
                backend(device).update_dense(members, theirs, adam)

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

    # Gradients

    def gradient_bytes(self) -> int:
        """Bytes that `p.grad` takes on this process, of all parameters; `p.grad.nbytes` is what a dense one takes."""
        return sum(gradient_bytes(local(p.grad)) for p in self._group_of if p.grad is not None)

    @torch.no_grad()
    def release(self, enabled: bool = True) -> None:
        """Switch gradient release on or off, at any time. Switched off, gradients so far become dense in `p.grad`."""
        self.gradient_release = enabled
        self._make_slots()
        if enabled:
            return
        self._release.flush()
        for slot in self._slots.values():
            slot.gradient = None if slot.gradient is None else _as_dense(slot.gradient)

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

    def register_selection_pre_hook(self, hook: Callable[[NanoAdam, list[Tensor]], None]) -> RemovableHandle:
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

    @torch.no_grad()
    def selected(self, parameter: Tensor) -> Tensor:
        """The weights that the present step updates: bool, of the parameter's shape and on its device.

        Sharded as the parameter is; where its columns are selected, all processes have to ask. All of them for a dense
        tensor, none for a frozen one, and none before the first step with criterion "gradient". Before the first
        backward of a step this is the selection that it would make from the present weights; asking fixes nothing.

        Raises:
            ValueError: if the parameter is not one of this optimizer.
        """
        self._follow()
        self._check_member(parameter)
        if not parameter.requires_grad or parameter.numel() == 0:
            return torch.zeros_like(parameter, dtype=torch.bool)
        slot, group = self._slots[parameter], self.param_groups[self._group_of[parameter]]
        if slot.selection is None:
            return torch.ones_like(parameter, dtype=torch.bool)
        if slot.weight.numel() == 0 and not isinstance(slot.layout, ColumnLayout):
            return like(torch.zeros(slot.weight.shape, dtype=torch.bool, device=slot.weight.device), parameter)
        t = group["steps"]
        stands = slot.selected_for == t and not (slot.arrived_in == t and is_zeroed(slot.gradient))
        if not stands and (slot.unselected or self._is_due(group)) and group["criterion"] != "gradient":
            nothing = {name: slot.state[name].new_empty(0) for name in ("exp_avg", "exp_avg_sq")}
            slot = Slot(parameter, nothing, slot.ordinal, part=slot.part)
            self._select([slot], group)
        assert slot.selection is not None
        chosen = reference.mask(slot.selection, slot.weight.shape)
        if isinstance(slot.layout, ColumnLayout) and group["keep_zeros"]:
            chosen = chosen & (slot.weight.detach() != 0)
        return like(chosen, parameter)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the selection of the coming step now if it is due, as its first gradient would.

        With `capturable=True` this is called between replays of the captured step, at least once in 30,000, and first
        brings the number of steps up to what the device has counted.
        """
        self._follow()
        self._release.flush()
        for i, group in enumerate(self.param_groups):
            if group["capturable"]:
                for slot in (*self._members[i][0], *self._members[i][1]):
                    slot.steps = int(slot.state["step"].item())
                    group["steps"] = max(group["steps"], slot.steps)
                for slot in self._members[i][0]:
                    if slot.steps - slot.restamped >= MAX_AGE // 2:
                        reference.restamp(slot)
        self._select_missing()

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
        self._leave(self._slots.values())
        self._release.let_go(self._release.held)
        self._slots, self._members = {}, []  # what was there before is freed as it is replaced
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

    @torch.no_grad()
    def prepare(self, steps: int) -> None:
        """Give the state of a fresh optimizer the shapes that it has after `steps` steps, before it is loaded into.

        For loaders that read into existing tensors, as torch.distributed.checkpoint does, where the density has
        changed since the start. `load_state_dict` needs no such call.

        Raises:
            ValueError: if the optimizer has made steps of its own, or `steps` is negative.
        """
        if steps < 0 or any(group["steps"] for group in self.param_groups):
            raise ValueError(f"prepare({steps}) is for a fresh optimizer and a number of steps of at least 0")
        for group in self.param_groups:
            group["active_density"] = _density(group, max(0, steps - 1))
        self.state.clear()
        self._make_slots()

    def __getstate__(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("gradient_release", "release_bytes", "local", "made_with")}
        return {**super().__getstate__(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._make_slots()


def _density(group: Mapping[str, Any], step: int) -> float:
    density = group["density"]
    return density(step) if isinstance(density, Schedule) else float(density)


def _asks_before_forward(slot: Slot) -> bool:
    """Whether its layer computes with the columns that are selected, so that gradients come for those."""
    return slot.served is not None and slot.served.leaf is not None


def _is_compiled(slot: Slot) -> bool:
    """Whether a gradient came last from a layer that did not ask before: a compiled one."""
    return slot.served is not None and slot.forward_in < slot.arrived_in


def _as_dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if isinstance(gradient, SelectedGradient) else gradient


def _kept(slot: Slot, group: Mapping[str, Any]) -> tuple[Box, Box] | None:
    """A gradient that the optimizer has put into `p.grad`, and where its entries are before a refresh."""
    gradient = slot.gradient
    if type(gradient) is not SelectedGradient or gradient._box.slot is not slot:
        return None
    box = gradient._box
    if box.zeroed or not group["capturable"]:
        return box, box
    return box, Box(Selection(box.selection.index.clone(), box.selection.layout), box.values)
