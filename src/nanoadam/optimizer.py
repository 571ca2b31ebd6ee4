"""NanoAdam: Adam whose moments exist only for the smallest weights of each tensor.

Source: Zhou, Jacobs, Gadhikar, Burkholz, "Pay Attention to Small Weights", NeurIPS 2025, arXiv 2506.21374,
Algorithm 1. What the paper leaves open (chunk size, rounding, ties, moments at a refresh, bias correction,
weight decay) is decided in docs/design.md.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nanoadam import amp, checks
from nanoadam.chunks import layout
from nanoadam.ops import MAX_AGE, Adam, Selection, Slot, backend, reference
from nanoadam.ops.rounding import seed_key
from nanoadam.release import GradientRelease, stands_in
from nanoadam.schedules import Intervals, Schedule
from nanoadam.slots import by_device, empty, make_slot

# GradScaler hands itself to a step that has a parameter for it, which is the only way for it to learn of an
# infinity in a held gradient. It announces that this will change; amp.unscale serves the new way as well.
warnings.filterwarnings("ignore", message="GradScaler is going to stop passing itself", category=FutureWarning)


class NanoAdam(Optimizer):
    """AdamW on the smallest weights of each tensor (or another criterion); the rest keep their bits.

    Source: Algorithm 1 of arXiv 2506.21374. Of the options, `max_grad_norm`, `gradient_release` and `release_bytes`
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
            the dense gradient: nothing is released).
        moments: at a refresh, "carry" them over for weights that stay selected, or "reset" all of them.
        keep_zeros: never select weights that are exactly zero, so that pruned models stay pruned.
        state_dtype: of the moments, torch.bfloat16 or torch.float32.
        stochastic_rounding: of bfloat16 moments and bfloat16 weights; otherwise to nearest.
        seed: of the random bits, which depend on it, the step, the tensor and the position alone.
        gradient_release: cut gradients down to their selected entries during backward; `p.grad` is then None, for
            hooks that were registered later too. After `step()`, in a model without dense tensors, one parameter has
            an empty sparse `p.grad` until the next backward: it shows whether the model's gradients were zeroed.
        grad_dtype: of the entries held until they are zeroed.
        max_grad_norm: clip by the norm of what will be applied: held entries and gradients of dense tensors.
        maximize: ascend.
        capturable: `step()` may be captured in a CUDA graph; call `refresh()` between replays.
        release_bytes: bytes of dense gradients that may be alive together before they are compacted. Default: 0
            (each at once) on CPU; on GPUs, where a launch costs more, a little more than the largest one takes.

    Raises:
        ValueError, TypeError: for an argument or a parameter that cannot be served, naming it and the remedy.
    """

    # GradScaler then leaves unscaling and skipping to step(), which can see the held gradients.
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
        criterion: str = "smallest",
        moments: str = "carry",
        keep_zeros: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        gradient_release: bool = True,
        grad_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        release_bytes: int | None = None,
    ) -> None:
        checks.check_release(max_grad_norm, gradient_release, release_bytes)
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
            "steps": 0,  # calls of step() so far
            "refreshed_at": -1,  # the step that the present selection was made for
            "active_density": None,  # and the density it was made with
        }
        checks.check_options(defaults, "every group")
        self.max_grad_norm = max_grad_norm
        self.gradient_release = gradient_release
        self.release_bytes = release_bytes
        self._slots: dict[Tensor, Slot] = {}
        self._window: list[int] = []  # for each group: the step whose first gradient has arrived, or -1
        self._release = GradientRelease(self, release_bytes)
        super().__init__(params, defaults)

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
        self._make_slots()

    def _make_slots(self) -> None:
        """State for every parameter that can be trained and has none yet; hooks where gradients are released."""
        self._members: list[tuple[list[Slot], list[Slot]]] = []  # for each group: selected from, dense
        self._group_of: dict[Tensor, int] = {}
        self._window += [-1] * (len(self.param_groups) - len(self._window))
        self._frozen: list[Tensor] = []
        counts: dict[tuple[int, torch.device, int], Tensor] = {}
        ordinal = 0
        for i, group in enumerate(self.param_groups):
            selected: list[Slot] = []
            dense: list[Slot] = []
            names = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
            for parameter, name in zip(group["params"], names, strict=True):
                ordinal += 1
                self._group_of[parameter] = i
                trained = parameter.requires_grad and parameter.numel() > 0
                if not trained:
                    self._frozen.append(parameter)
                slot = self._slots.get(parameter)
                if slot is None and (trained or self.state.get(parameter)):
                    slot = self._slots[parameter] = make_slot(parameter, self.state[parameter], group, ordinal, name)
                if slot is None:
                    continue
                step = slot.state["step"]
                if not group["capturable"]:  # a graph that adds to a shared count could not leave one tensor out
                    slot.state["step"] = counts.setdefault((i, step.device, slot.steps), step)
                (dense if slot.layout is None else selected).append(slot)
                if trained and slot.layout is not None and self._releases(i):
                    self._release.attach(parameter)
            self._members.append((selected, dense))

    # Algorithm 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> Any:
        """One step of Algorithm 1: new density and mask if they are due, then AdamW on the selected weights.

        Args:
            closure: computes the loss and its gradients anew, as in torch; its value is returned.
            grad_scaler: passed by `GradScaler.step(optimizer)`.

        Raises:
            TypeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(parameter.requires_grad and parameter.numel() for parameter in self._frozen):
            self._make_slots()
        self._release.flush()
        self._release.settle()
        self._check_gradients()
        if self._release.altered and not self._release.told:
            self._warn_of_altered_gradients()
        if amp.unscale(self, grad_scaler):
            for i in range(len(self.param_groups)):
                self._refresh_if_due(i)
                self._take_gradients(i)
            grad_scale = self._clip()
            for i, group in enumerate(self.param_groups):
                self._update(i, grad_scale)
                group["steps"] += 1
        if self.gradient_release:
            self._release.stepped()
        return loss

    def _refresh_if_due(self, i: int) -> None:
        """Lines 1 and 2 of Algorithm 1, before the first gradient of a step is used and never later in that step."""
        group, slots = self.param_groups[i], self._members[i][0]
        t = group["steps"]
        if self._window[i] == t:
            return
        without: list[Slot] = []
        if group["criterion"] == "gradient":
            without = [slot for slot in slots if slot.weight.grad is None]
            slots = [slot for slot in slots if slot.weight.grad is not None]
            if not slots:
                return
        self._window[i] = t
        if self._is_due(group):
            group["active_density"], group["refreshed_at"] = _density(group, t), t
            for slot in without:
                if slot.layout != layout(slot.weight.shape, group["active_density"]):
                    empty(slot, group)
        else:
            slots = [slot for slot in slots if slot.fresh]  # unfrozen since the last refresh
        self._select(slots, group)

    @staticmethod
    def _is_due(group: Mapping[str, Any]) -> bool:
        t = group["steps"]
        if group["refreshed_at"] < 0 or _density(group, t) != group["active_density"]:
            return True
        return bool(t % group["mask_interval"] == 0)

    @staticmethod
    def _select(slots: Iterable[Slot], group: Mapping[str, Any]) -> None:
        rule = Selection(
            criterion=group["criterion"],
            keep_zeros=group["keep_zeros"],
            carry=group["moments"] == "carry",
            key=seed_key(group["seed"]),
            step=group["steps"],
        )
        for device, members in by_device(slots):
            gradients = None
            if rule.criterion == "gradient":
                gradients = [slot.weight.grad for slot in members if slot.weight.grad is not None]
            layouts = [layout(slot.weight.shape, _density(group, rule.step)) for slot in members]
            backend(device).select(members, layouts, rule, gradients)
            for slot in members:
                slot.fresh = False
                slot.version += 1

    def _collect(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compact dense gradients, in backward (gradient release) or in step()."""
        for i, group in enumerate(self.param_groups):
            mine = {p: gradient for p, gradient in pairs if self._group_of[p] == i}
            if mine:
                self._refresh_if_due(i)
            for device, members in by_device(self._slots[p] for p in mine):
                backend(device).gather(members, [mine[slot.weight] for slot in members], group["grad_dtype"])

    def _take_gradients(self, i: int) -> None:
        """Selected entries of the `p.grad` that were not released in backward, added to what is held."""
        left = [(s.weight, s.weight.grad) for s in self._members[i][0] if s.weight.grad is not None]
        left = [(parameter, gradient) for parameter, gradient in left if not stands_in(gradient)]
        if left:
            self._collect(left)
            if self._releases(i):
                for parameter, _ in left:
                    parameter.grad = None

    def _check_gradients(self) -> None:
        """Refuse what cannot be used before anything of the step is done."""
        for slot in self._slots.values():
            gradient = slot.weight.grad
            if gradient is not None and gradient.layout != torch.strided and not stands_in(gradient):
                checks.check_gradient(slot.name, gradient)

    def _warn_of_altered_gradients(self) -> None:
        """Once, where others have changed what they found in `p.grad` and gradients are held that they did not find."""
        held = sum(slot.held is not None for slot in self._slots.values())
        if held:
            self._release.told = True
            checks.warn_of_altered_gradients(held)

    def _takes(self, parameter: Tensor, gradient: Tensor) -> bool:
        slot = self._slots.get(parameter)
        if slot is None or slot.layout is None or not self._releases(self._group_of[parameter]):
            return False
        checks.check_gradient(slot.name, gradient)
        return True

    def _witnesses(self) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [slot.weight for _, dense in self._members for slot in dense],
            [slot.weight for selected, _ in self._members for slot in selected if slot.held is not None],
        )

    def _releases(self, i: int) -> bool:
        """Whether the gradients of a group's selected tensors are released; not if they decide the selection."""
        return self.gradient_release and self.param_groups[i]["criterion"] != "gradient"

    def _clip(self) -> float | Tensor:
        """What gradients are to be multiplied by so that their joint norm is at most `max_grad_norm`."""
        if self.max_grad_norm is None:
            return 1.0
        gradients = self.held()
        gradients += [slot.weight.grad for _, dense in self._members for slot in dense if slot.weight.grad is not None]
        if not gradients:
            return 1.0
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        scale: Tensor = self.max_grad_norm / (norm + 1e-6)
        return scale.clamp(max=1.0)

    def _update(self, i: int, grad_scale: float | Tensor) -> None:
        """Lines 3 and 4 of Algorithm 1."""
        group, (selected, dense) = self.param_groups[i], self._members[i]
        selected = [slot for slot in selected if slot.held is not None]
        dense = [slot for slot in dense if slot.weight.grad is not None]
        self._count([*selected, *dense], i)
        for slot in selected:
            if slot.steps % (MAX_AGE // 2) == 0:
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
            capturable=group["capturable"],
        )
        for device, members in by_device(selected):
            backend(device).update(members, adam)
        for device, members in by_device(dense):
            gradients = [slot.weight.grad for slot in members if slot.weight.grad is not None]
            backend(device).update_dense(members, gradients, adam)
        if not self._releases(i):
            for slot in selected:  # p.grad is still there, and is what zero_grad() speaks of
                slot.held = None

    def _count(self, slots: Sequence[Slot], i: int) -> None:
        """Count a step of these tensors of group i. Those in step with each other share one count."""
        counts = {id(count): count for count in (slot.state["step"] for slot in slots)}
        if len(slots) < sum(map(len, self._members[i])):  # those who stand still keep the count that they shared
            moving = {id(slot) for slot in slots}
            still = {id(slot.state["step"]) for some in self._members[i] for slot in some if id(slot) not in moving}
            counts = {key: count.clone() if key in still else count for key, count in counts.items()}
            for slot in slots:
                slot.state["step"] = counts[id(slot.state["step"])]
        for slot in slots:
            slot.steps += 1
        if counts:
            torch._foreach_add_(list(counts.values()), 1)

    # Gradients

    def held(self) -> list[Tensor]:
        """Gradients of selected weights held since they were last zeroed: `grad_dtype` [selected], one a tensor."""
        self._release.flush()
        return [slot.held for slot in self._slots.values() if slot.held is not None]

    def gradient_bytes(self) -> int:
        """Bytes of held gradients; dense tensors' `p.grad` come on top."""
        return sum(held.nbytes for held in self.held())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero `p.grad` and the held gradients, as in torch."""
        super().zero_grad(set_to_none)
        self._release.discard()
        self._drop_held(in_place=not set_to_none)

    def _drop_held(self, *, in_place: bool) -> None:
        for slot in self._slots.values():
            if slot.held is not None:
                slot.held = slot.held.zero_() if in_place else None
        self._window = [-1] * len(self.param_groups)  # what comes is the first gradient of its step

    @torch.no_grad()
    def release(self, enabled: bool = True) -> None:
        """Switch gradient release on or off, at any time: gradients so far move to where they are read next.

        Switched off, `p.grad` holds them (in the parameter's dtype, zero where nothing is selected), and torch's
        own clipping and every other reader of `p.grad` work.
        """
        self._release.flush()
        self._release.settle()
        self.gradient_release = enabled
        if enabled:
            self._make_slots()
            for i in range(len(self.param_groups)):
                if self._releases(i):
                    self._take_gradients(i)
            return
        self._release.detach()
        for slot in self._slots.values():
            if slot.held is not None:
                if slot.weight.grad is None:
                    slot.weight.grad = torch.zeros_like(slot.weight)
                reference.scatter_add(slot, slot.weight.grad)
                slot.held = None

    # What is selected, and what it takes

    @torch.no_grad()
    def selected(self, parameter: Tensor) -> Tensor:
        """The weights that the present step updates: bool, of the parameter's shape and on its device.

        All of them for a dense tensor, none for a frozen one, and none before the first step with criterion
        "gradient". Before the first backward of a step this is the selection that it would make from the
        present weights; asking fixes nothing.

        Raises:
            ValueError: if the parameter is not one of this optimizer.
        """
        if not parameter.requires_grad and parameter in self._group_of:
            return torch.zeros_like(parameter, dtype=torch.bool)
        if parameter not in self._slots:
            raise ValueError(f"the parameter of shape {tuple(parameter.shape)} is not in this optimizer")
        slot, group = self._slots[parameter], self.param_groups[self._group_of[parameter]]
        if slot.layout is None:
            return torch.ones_like(parameter, dtype=torch.bool)
        opened = self._window[self._group_of[parameter]] == group["steps"]
        if not opened and (slot.fresh or self._is_due(group)) and group["criterion"] != "gradient":
            empty = {name: slot.state[name].new_empty(0) for name in ("exp_avg", "exp_avg_sq")}
            slot = Slot(parameter, empty, slot.ordinal)
            self._select([slot], group)
        return reference.mask(slot)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the selection of the coming step now if it is due, as its first gradient would.

        With `capturable=True` this is called between replays of the captured step, and first brings the number
        of steps up to what the device has counted.
        """
        for i, group in enumerate(self.param_groups):
            if group["capturable"]:
                for slot in (*self._members[i][0], *self._members[i][1]):
                    slot.steps = int(slot.state["step"].item())
                    group["steps"] = max(group["steps"], slot.steps)
            self._refresh_if_due(i)

    def state_bytes(self) -> int:
        """Bytes of optimizer state: indices, moments, entry steps and step counts of all tensors."""
        return sum(value.nbytes for slot in self._slots.values() for value in slot.state.values())

    # Saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """As in torch: plain tensors and plain values, loadable with `torch.load(weights_only=True)`."""
        saved = super().state_dict()
        # Tensors of the same age share their count here; whoever loads into this dict must find one for each.
        saved["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in saved["state"].items()
        }
        for group in saved["param_groups"]:
            if isinstance(group["density"], Schedule):
                group["density"] = group["density"].to_dict()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; nothing changes if it does not fit. Held gradients are dropped.

        Tensors are copied, except those that are this optimizer's own: accelerate's wrapper loads an optimizer's state
        into itself, and a copy of it beside the original would be the peak of the whole run.

        Raises:
            ValueError: if the state was not saved by NanoAdam for parameters of these shapes.
        """
        checks.check_state(self.param_groups, state_dict)
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            if isinstance(group["density"], Mapping):
                group["density"] = Schedule(**group["density"])
        self.zero_grad()
        own = {id(value) for state in self.state.values() for value in state.values()}
        # torch gets the groups only: it would cast every tensor to its parameter's dtype, indices too.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._forget()  # what was there before is freed as it is replaced
        keys = [key for group in groups for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                on_host = name == "step" and not self.param_groups[self._group_of[parameter]]["capturable"]
                home = torch.device("cpu") if on_host else parameter.device
                kept = id(value) in own and value.device == home
                self.state[parameter][name] = value if kept else value.detach().to(home, copy=True)
        self._make_slots()

    def _forget(self) -> None:
        """Let go of all that is derived from parameters, groups and state, and of what it holds alive."""
        self._release.detach()
        self._slots, self._members, self._window = {}, [], []

    def _rebuild(self) -> None:
        """Derive everything from parameters, groups and state anew."""
        self._forget()
        self._make_slots()

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
        self._rebuild()

    def __getstate__(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("max_grad_norm", "gradient_release", "release_bytes")}
        return {**super().__getstate__(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # a copy or an unpickled one, not load_state_dict()
            self._release = GradientRelease(self, self.release_bytes)
            self._rebuild()

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate wraps step() in a function of (*args, **kwargs), which hides from GradScaler that it takes one.
        if name == "step" and inspect.isfunction(value):
            value.__signature__ = inspect.signature(type(self).step)  # type: ignore[attr-defined]
        super().__setattr__(name, value)


def _density(group: Mapping[str, Any], step: int) -> float:
    density = group["density"]
    return density(step) if isinstance(density, Schedule) else float(density)
