"""NanoAdam: Adam whose moments exist only for the smallest weights of each tensor.

Source: Zhou, Jacobs, Gadhikar, Burkholz, "Pay Attention to Small Weights", NeurIPS 2025, arXiv 2506.21374,
Algorithm 1. What the paper leaves open (chunk size, rounding, ties, moments at a refresh, bias correction,
weight decay) is decided in docs/design.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nanoadam import checks, columns
from nanoadam.chunks import ColumnLayout
from nanoadam.gradients import Box, GradientRelease, SelectedGradient, gather, gradient_bytes, is_zeroed
from nanoadam.ops import MAX_AGE, Adam, Slot, backend, reference
from nanoadam.ops.rounding import seed_key
from nanoadam.refresh import as_dense, is_due, keep, kept, on_their_stream, select
from nanoadam.schedules import Intervals, Schedule
from nanoadam.shards import like, local
from nanoadam.slot_optimizer import SlotOptimizer
from nanoadam.slots import by_device, density_at, empty, layout_of

Found: TypeAlias = tuple[list[Slot], list[Tensor]]
"""Slots whose parameters have a gradient, and the gradients."""


class NanoAdam(SlotOptimizer):
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
        super().__init__(params, defaults)
        checks.warn_of_unsorted(self.param_groups)

    def _start(self) -> None:
        super()._start()
        self._looked = False  # at the first gradients, whether they are what they should be
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # on which step() was called
        self._release = GradientRelease(self, self.release_bytes)

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
        found = self._gradients()
        self._check_gradients(found)
        # GradScaler sets these two. Reading the first waits for the device, as GradScaler itself does.
        infinite, grad_scale = getattr(self, "found_inf", 0.0), getattr(self, "grad_scale", None)
        if bool(infinite):
            return loss
        inverse = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float()
        if self._select_missing():
            found = self._gradients()  # those that are kept over a refresh are new objects
        for device in {s.weight.device for s in self._slots.values() if s.part is not None and s.weight.is_cuda}:
            self._streams[device] = torch.cuda.current_stream(device)
        for i, group in enumerate(self.param_groups):
            self._update(i, *found[i], inverse)
            compiled = [s for s in self._members[i][0] if _is_compiled(s)]
            group["steps"] += 1
            if compiled:  # their layers ask nobody before they compute: the coming step's selection is made now
                self._refresh(i, compiled, overdue=any(slot.overdue for slot in compiled))
        return loss

    def _select_missing(self) -> bool:
        """Select for the present step, where that is due and was not done; whether it was missing anywhere."""
        found = False
        for i, group in enumerate(self.param_groups):
            missing = [slot for slot in self._members[i][0] if slot.selected_for != group["steps"]]
            found = found or bool(missing)
            self._refresh(i, missing)
        return found

    def _gradients(self) -> list[tuple[Found, Found]]:
        """For each group: who has a gradient, of those that are selected from and of the dense ones."""
        return [(_with_gradients(selected), _with_gradients(dense)) for selected, dense in self._members]

    def _open(self, slot: Slot, slots: Sequence[Slot]) -> None:
        """Select for the present step if that is due: for these slots of a group, which wait for it together.

        If that was done already in this step, it was in vain: weights may have changed since.
        """
        i = self._group_of[slot.parameter]
        t = self.param_groups[i]["steps"]
        if slot.selected_for == t:
            for other in slots:
                other.selected_for = other.arrived_in = -1
        if slot.selected_for != t:
            self._refresh(i, [other for other in slots if other.selected_for != t])

    def _before_forward(self, slot: Slot) -> None:
        """A layer is about to compute with the columns of a slot, or with those of another that shares its weight."""
        weight, group = slot.parameter, self.param_groups[self._group_of.get(slot.parameter, 0)]
        if slot.selected_for != group["steps"] or _is_outdated(slot, group["steps"]) or not slot.state:
            self._follow()
            if weight not in self._slots:
                return
            slot, i = self._slots[weight], self._group_of[weight]
            t = group["steps"]
            with torch.no_grad():  # not those whose layers have computed already: their backward is still to come
                waiting = [s for s in self._members[i][0] if s is slot or s.selected_for != t or _is_outdated(s, t)]
                self._open(slot, [other for other in waiting if other.served is not None])
        slot.forward_in = self.param_groups[self._group_of[weight]]["steps"]

    def _arrives(self, parameter: Tensor, gradient: Tensor) -> tuple[Slot, torch.dtype] | None:
        """The first gradient of a tensor in this step: its selection, which stands until the step is made."""
        slot = self._slots.get(parameter)
        known = slot is not None and slot.state and len(self.param_groups) == len(self._members)
        if slot is None or not known or slot.selected_for != self.param_groups[self._group_of[parameter]]["steps"]:
            self._follow()
            slot = self._slots.get(parameter)
        if slot is None or slot.selection is None or not self._releases(i := self._group_of[parameter]):
            return None
        checks.check_gradient(slot.name, gradient)
        by_device([slot])
        group = self.param_groups[i]
        if _asks_before_forward(slot):
            if type(gradient) is not SelectedGradient and not isinstance(slot.layout, ColumnLayout):
                slot.served.needs_whole = True
            if slot.selected_for != group["steps"]:  # by a compiled layer, which asked nobody
                slot.selected_for, slot.overdue = group["steps"], slot.overdue or is_due(group)
        elif slot.selected_for != group["steps"] or slot.arrived_in == group["steps"]:
            waiting = [other for other in self._members[i][0] if other is slot or is_zeroed(other.gradient)]
            self._open(slot, [other for other in waiting if not _asks_before_forward(other)])
        slot.arrived_in = group["steps"]
        return slot, group["grad_dtype"]

    def _refresh(self, i: int, slots: Sequence[Slot], *, overdue: bool = False) -> None:
        """Lines 1 and 2 of Algorithm 1: select for the present step, where that is due or `overdue`."""
        group = self.param_groups[i]
        t = group["steps"]
        due, without = is_due(group), []
        if due and density_at(group, t) != group["active_density"]:  # all state of a group is of one density
            given = set(map(id, slots))
            slots = [*slots, *(slot for slot in self._members[i][0] if id(slot) not in given)]
        if group["criterion"] == "gradient":
            without = [slot for slot in slots if slot.gradient is None]
            slots = [slot for slot in slots if slot.gradient is not None]
        if not slots:
            return
        for slot in slots:
            slot.selected_for, slot.weight_version = t, slot.weight._version
        if due:
            group["active_density"], group["refreshed_at"] = density_at(group, t), t
            without = [s for s in without if s.layout != layout_of(s.parameter, group, group["active_density"])]
            self._leave([*slots, *without])
            for slot in without:
                empty(slot, group)
        elif not overdue:
            slots = [slot for slot in slots if slot.unselected]  # unfrozen since the last refresh
        gradients = [kept(slot, group) for slot in slots]
        with on_their_stream(slots, self._streams):
            select(slots, group)
        for slot, box in zip(slots, gradients, strict=True):
            if box is not None:
                keep(slot, *box, self._release)

    def _check_gradients(self, found: Sequence[tuple[Found, Found]]) -> None:
        """Refuse what cannot be used before anything of the step is done."""
        seen = False
        for slots, gradients in itertools.chain.from_iterable(found):
            seen = seen or bool(slots)
            for i, gradient in enumerate(gradients):
                if type(gradient) is not SelectedGradient and gradient.layout != torch.strided:
                    checks.check_gradient(slots[i].name, gradient)
        if self._looked:
            return
        checks.check_trained([slot.parameter for slot in self._slots.values()] or self._frozen)
        sharded = any(slot.part is not None for slot in self._slots.values())  # by those who exchange gradients, too
        if self.gradient_release and not self.local and not sharded:
            checks.check_exchange([s.gradient for s in self._slots.values() if s.selection is not None])
        self._looked = seen

    def _update(self, i: int, of_selected: Found, of_dense: Found, grad_scale: float | Tensor) -> None:
        """Lines 3 and 4 of Algorithm 1."""
        group = self.param_groups[i]
        (selected, sparse), (dense, gradients) = of_selected, of_dense
        for slot, gradient in zip(selected, sparse, strict=True):
            if type(gradient) is not SelectedGradient:
                self._release.hold(slot.parameter)  # if swap_tensors has taken the hook away
            elif gradient._box.accumulator is None and self._releases(i):
                self._release.adopt(slot, gradient)
        entries = gather.entries(selected, sparse, group["grad_dtype"])
        gradients = [as_dense(g) if type(g) is SelectedGradient else g for g in gradients]
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
            slot.selected_for, slot.overdue = group["steps"], slot.overdue or is_due(group)
        slot.arrived_in = group["steps"]
        box = gradient._box
        box.stored, box.pending = values.to(box.dtype), None
        box.exchanged, box.zeroed = "replicas", False

    # Gradient release, and what it takes

    def _make_slots(self) -> None:
        """As above; and hooks where gradients are released, layers that compute what is selected only."""
        before = self._slots
        super()._make_slots()
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                slot = self._slots.get(parameter)
                if slot is None:
                    continue
                trained = parameter.requires_grad and parameter.numel() > 0
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
        gone = [parameter for parameter in before if parameter not in self._group_of]
        self._release.let_go(gone)
        for parameter in gone:
            columns.leave(parameter)

    def _forget_slots(self) -> None:
        super()._forget_slots()
        self._release.let_go(self._release.held)

    def _releases(self, i: int) -> bool:
        """Whether the gradients of a group's selected tensors are released; not if they decide the selection."""
        return self.gradient_release and self.param_groups[i]["criterion"] != "gradient"

    @torch.no_grad()
    def release(self, enabled: bool = True) -> None:
        """Switch gradient release on or off, at any time. Switched off, gradients so far become dense in `p.grad`."""
        self.gradient_release = enabled
        self._make_slots()
        if enabled:
            return
        self._release.flush()
        for slot in self._slots.values():
            slot.gradient = None if slot.gradient is None else as_dense(slot.gradient)

    def gradient_bytes(self) -> int:
        """Bytes that `p.grad` takes on this process, of all parameters; `p.grad.nbytes` is what a dense one takes."""
        return sum(gradient_bytes(local(p.grad)) for p in self._group_of if p.grad is not None)

    # What the coming step selects

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
        stands = slot.selected_for == t and not _is_outdated(slot, t)
        if not stands and (slot.unselected or is_due(group)) and group["criterion"] != "gradient":
            nothing = {name: slot.state[name].new_empty(0) for name in ("exp_avg", "exp_avg_sq")}
            slot = Slot(parameter, nothing, slot.ordinal, part=slot.part)
            select([slot], group)
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

    def __getstate__(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("gradient_release", "release_bytes", "local")}
        return {**super().__getstate__(), **options}


def _with_gradients(slots: Sequence[Slot]) -> Found:
    """Those whose parameters have a gradient, and the gradients."""
    found = [(slot, gradient) for slot in slots if (gradient := slot.gradient) is not None]
    return [slot for slot, _ in found], [gradient for _, gradient in found]


def _is_outdated(slot: Slot, t: int) -> bool:
    """Whether it was selected for step t in vain: its gradient was thrown away since, or its weight loaded."""
    loaded = slot.served is not None and slot.weight._version != slot.weight_version
    return (loaded or slot.arrived_in == t) and is_zeroed(slot.gradient)


def _asks_before_forward(slot: Slot) -> bool:
    """Whether its layer computes with the columns that are selected, so that gradients come for those."""
    return slot.served is not None and slot.served.leaf is not None


def _is_compiled(slot: Slot) -> bool:
    """Whether a gradient came last from a layer that did not ask before: a compiled one."""
    return slot.served is not None and slot.forward_in < slot.arrived_in
