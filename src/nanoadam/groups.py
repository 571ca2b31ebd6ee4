"""Which tensors are selected from and which get ordinary AdamW: parameter groups for any model.

The paper never selects from normalisation layers and the newly initialised final layer ("lm_head and norms
in full"); everything else is selected from. A tensor's role follows from the type of the module that holds
it and from where that module stands, never from a parameter's name alone; `roles.py` says how.

Norms, biases and vectors are dense and not decayed; heads are dense and decayed; matrices and embeddings are
selected from and decayed. Overrides beat all of that. With a learning rate of its own the head, its biases and norms
included, stands in groups of its own.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanoadam import chunks, columns, slots, text
from nanoadam.roles import Entry, entries_of, head_parameters, new_head_parameters, role_of, unwrap

Override: TypeAlias = "str | nn.Module | type[nn.Module] | Callable[[str, Tensor], bool]"
"""One way to name tensors: an fnmatch pattern on parameter or module names, a module, a module type, a predicate."""

Overrides: TypeAlias = "Override | Iterable[Override]"

_DECAYED = {"matrix", "embedding", "head"}
_GROUP_OF = {
    # (selected from, decayed) -> the group's name; heads have a group of their own
    (True, True): "weights",
    (False, True): "dense weights",
    (False, False): "norms and biases",
    (True, False): "selected norms and biases",
}
_HEAD_GROUP_OF = {  # the same, where the head has a learning rate of its own
    (True, True): "selected head",
    (False, True): "head",
    (False, False): "head norms and biases",
    (True, False): "selected head norms and biases",
}
_BY_COLUMN = ", by column"
_TRANSPOSED = ", transposed"
_GROUP_ORDER = tuple(
    kind + more
    for kind in dict.fromkeys(("weights", "head", *_GROUP_OF.values(), *_HEAD_GROUP_OF.values()))
    for more in (_BY_COLUMN, _BY_COLUMN + _TRANSPOSED, "")
)


class ParamGroups(list[dict[str, Any]]):
    """A list of parameter groups that remembers what was left out, for `describe`. Any optimizer takes it as a list."""

    def __init__(self, groups: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(groups)
        self.frozen: dict[str, int] = {}
        """Names of the parameters that need no gradient, with their number of weights."""
        self.empty: list[str] = []
        """Names of the parameters without weights."""
        self.tied: dict[str, list[str]] = {}
        """The name under which a shared parameter is listed, with its other names."""
        self.whole: list[str] = []
        """Weights selected from by column whose layer has a forward of its own, which makes their whole gradient."""


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    dense: Overrides = (),
    selected: Overrides = (),
    head_lr: float | None = None,
    granularity: str = "weight",
) -> ParamGroups:
    """Parameter groups for `NanoAdam` (or any torch optimizer): what is selected from, and what is dense.

    Recognises heads, norms, embeddings, biases, tied weights and frozen parameters in plain modules and in
    transformers and PEFT models, also inside DDP, DataParallel and `torch.compile`; see `nanoadam/roles.py` for
    the rules and `print(nanoadam.describe(groups))` for what they came to.

    Args:
        model: the model to finetune. Frozen parameters and parameters without weights are left out.
        weight_decay: for matrices, embeddings and heads. Norms, biases and other vectors get 0.
        dense: parameters that shall get ordinary AdamW, whatever they were recognised as.
        selected: parameters that shall be selected from, whatever they were recognised as. Tensors of
            dimension < 2 stay dense: NanoAdam never selects from them.
            Both take one or several of: an fnmatch pattern on a parameter's or a module's name
            (`"*.query.weight"`, `"bert.pooler"`), a module, a module type (`nn.Embedding`), or a predicate
            `(name, parameter) -> bool`. A module stands for every parameter within it. Names are the
            model's own, without the prefix that DDP or `torch.compile` puts before them.
        head_lr: the learning rate of the head, its biases and norms included, in groups of their own that carry it
            as `lr`; None: that of the rest. An output tied to the embeddings is no head, nor are adapters in one.
            Schedulers scale each group's own rate.
        granularity: "column" selects whole input columns of linear layers' weights, in groups of their own that carry
            it; all others are selected from by weight.

    Returns:
        One dict per kind of treatment, usually three, four with `head_lr`, in `named_parameters` order within:
        `params` (tensors), `param_names`, `roles` (per parameter: matrix, embedding, head, norm, bias or
        vector), `role` (the group's name), `dense` (False: selected from), `weight_decay`. Plain values
        only, so an optimizer's `state_dict` that holds them loads with `weights_only=True`.

    Raises:
        TypeError: if `model` is not a module, or an override is none of the above.
        ValueError: if a parameter is claimed by both overrides, an override matches nothing, the model has
            nothing to train, `weight_decay` is negative, a lazy module was not materialised, or `head_lr` is
            no number of at least 0 or given for a model without a head that is trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups needs the model itself, got {type(model).__name__}: pass model, not its parameters"
        )
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    check_head_lr(head_lr)
    if granularity not in ("weight", "column"):
        raise ValueError(f"granularity must be 'weight' or 'column', got {granularity!r}")
    model = unwrap(model)
    entries = entries_of(model)
    for entry in entries:
        if nn.parameter.is_lazy(entry.parameter):
            raise ValueError(f"parameter {entry.name!r} has no shape yet: run the model once before param_groups")
    forced_dense = _claimed(entries, dense, "dense")
    forced_selected = _claimed(entries, selected, "selected")
    for entry in entries:
        if id(entry.parameter) in forced_dense & forced_selected:
            raise ValueError(f"parameter {entry.name!r} is claimed by both dense= and selected=: narrow one of them")

    heads = head_parameters(model, entries)
    apart = set() if head_lr is None else new_head_parameters(entries, heads)
    found = ParamGroups()
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        parameter = entry.parameter
        if len(entry.names) > 1:
            found.tied[entry.name] = entry.names[1:]
        if parameter.numel() == 0:
            found.empty.append(entry.name)
            continue
        if not parameter.requires_grad:
            found.frozen[entry.name] = parameter.numel()
            continue
        role = role_of(entry, heads)
        decayed = role in _DECAYED
        choose = role in ("matrix", "embedding")
        if id(parameter) in forced_dense:
            choose = False
        elif id(parameter) in forced_selected:
            choose = parameter.dim() >= 2
        own_rate = id(parameter) in apart
        kind = (_HEAD_GROUP_OF if own_rate or (role == "head" and not choose) else _GROUP_OF)[choose, decayed]
        dims = {columns.input_dim(owner) for owner in entry.owners} - {None}
        by_column = choose and granularity == "column" and len(dims) == 1 and role in ("matrix", "head")
        if by_column:
            kind += _BY_COLUMN + _TRANSPOSED * (dims == {0})
            if not all(map(columns.can_serve, entry.owners)):
                found.whole.append(entry.name)
        group = groups.setdefault(
            kind,
            {
                "params": [],
                "param_names": [],
                "roles": [],
                "role": kind,
                "dense": not choose,
                "weight_decay": weight_decay if decayed else 0.0,
                **({"lr": head_lr} if own_rate else {}),
                **({"granularity": "column", "transposed": dims == {0}} if by_column else {}),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(entry.name)
        group["roles"].append(role)
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has nothing to train: {len(found.frozen)} parameters are frozen, "
            f"{len(found.empty)} are empty. Set requires_grad on those to finetune"
        )
    if head_lr is not None and not any("lr" in group and "head" in group["roles"] for group in groups.values()):
        raise ValueError(
            f"head_lr={head_lr:g} is for a head, and {type(model).__name__} has none that is trained "
            "(an output tied to the embeddings is none): leave head_lr out"
        )
    found.extend(groups[kind] for kind in _GROUP_ORDER if kind in groups)
    return found


def check_head_lr(head_lr: object) -> None:
    """Raise ValueError for a learning rate of the head that is none."""
    number = isinstance(head_lr, (int, float)) and not isinstance(head_lr, bool)
    if head_lr is not None and not (number and 0.0 <= head_lr < math.inf):  # type: ignore[operator]
        raise ValueError(
            f"head_lr must be a finite number of at least 0, or None for the learning rate of the rest; got {head_lr!r}"
        )


# Overrides -----------------------------------------------------------------------------------------------


def _claimed(entries: list[Entry], overrides: Overrides, option: str) -> set[int]:
    """The ids of the parameters that these overrides name."""
    if isinstance(overrides, (str, nn.Module, type)) or not isinstance(overrides, Iterable):
        overrides = [overrides]  # strings and some modules are iterable, and mean themselves
    claimed: set[int] = set()
    for override in overrides:
        matched = {id(entry.parameter) for entry in entries if _matches(entry, override, option)}
        if not matched and (isinstance(override, (str, nn.Module, type))):
            raise ValueError(_no_match(entries, override, option))
        if (
            option == "selected"
            and matched
            and not any(e.parameter.dim() > 1 for e in entries if id(e.parameter) in matched)
        ):
            raise ValueError(f"selected={_label(override)} names only tensors of dimension < 2, which are always dense")
        claimed |= matched
    return claimed


def _matches(entry: Entry, override: Override, option: str) -> bool:
    if isinstance(override, str):
        return any(fnmatch.fnmatchcase(name, override) for name in _searchable(entry))
    if isinstance(override, nn.Module):
        return any(module is override for _, module in entry.ancestors)
    if isinstance(override, type):
        return any(isinstance(module, override) for _, module in entry.ancestors)
    if not callable(override):
        raise TypeError(
            f"{option}= takes name patterns, modules, module types or predicates (name, parameter) -> bool, "
            f"got {type(override).__name__} {override!r}"
        )
    return bool(override(entry.name, entry.parameter))


def _searchable(entry: Entry) -> Iterator[str]:
    yield from entry.names
    yield from (name for name, _ in entry.ancestors if name)


def _label(override: Override) -> str:
    if isinstance(override, str):
        return repr(override)
    return type(override).__name__ if isinstance(override, nn.Module) else getattr(override, "__name__", repr(override))


def _no_match(entries: list[Entry], override: str | nn.Module | type, option: str) -> str:
    if isinstance(override, str):
        names = sorted({name for entry in entries for name in _searchable(entry)})
        near = difflib.get_close_matches(override, names, n=3, cutoff=0.3) or names[:3]
        return f"{option}={override!r} matches no parameter and no module; nearest: {', '.join(near)}"
    if isinstance(override, nn.Module):
        return f"{option}= names a {type(override).__name__} that is not part of the model or holds no parameters"
    types = sorted({type(owner).__name__ for entry in entries for owner in entry.owners})
    return f"{option}={override.__name__} matches no module with parameters; this model has {', '.join(types)}"


# Describe ------------------------------------------------------------------------------------------------

_UNNAMED = (
    None,
    "weights",
    "weights" + _BY_COLUMN,
    "norms and biases",
)  # groups of too many parameters to be worth naming


def describe(
    groups: Iterable[dict[str, Any]],
    *,
    density: Any = 0.01,
    state_dtype: torch.dtype = torch.bfloat16,
    grad_dtype: torch.dtype = torch.float32,
) -> str:
    """A table of what `param_groups` decided and what it costs, to be printed.

    `state` and `gradients` are what NanoAdam holds (with moments carried, gradients between backward
    and step); `AdamW` is what torch's AdamW holds of both, in the parameter's dtype.

    Args:
        groups: from `param_groups`, or an optimizer's `param_groups`. Frozen, empty and tied parameters are
            reported for the former only. A head with a learning rate of its own is said to have it.
        density: a share or a schedule, whose largest value counts. Groups that have options of their own
            (an optimizer's do) keep them, here and below.
        state_dtype: of the moments.
        grad_dtype: of the held gradients of selected entries.
    """
    groups = groups if isinstance(groups, list) else list(groups)
    defaults = {"density": density, "state_dtype": state_dtype, "grad_dtype": grad_dtype}
    rows = [row for group in groups for row in _costs({**defaults, **group})]
    total = [sum(row[1][column] for row in rows) for column in range(5)]
    unit, size = text.unit(total[-1])
    heading = ["group", "role", "treatment", "tensors", "weights", "share"]
    lines = [[*heading, f"state {unit}", f"gradients {unit}", f"AdamW {unit}"]]
    for labels, (tensors, weights, *sizes) in [*rows, (("total", "", ""), total)]:
        share = f"{100 * weights / max(1, total[1]):.2f} %"
        lines.append([*labels, str(tensors), f"{weights:,}", share, *(text.short(each / size) for each in sizes)])
    notes = [f"{group['role']}: {_few(group['param_names'])}" for group in groups if group.get("role") not in _UNNAMED]
    notes += _rate_of_head(groups)
    if isinstance(groups, ParamGroups):
        if groups.whole:
            notes.append(f"made whole in backward, by a forward of their own: {_few(groups.whole)}")
        if groups.tied:
            notes.append("tied: " + _few([" = ".join([name, *others]) for name, others in groups.tied.items()]))
        if groups.frozen:
            notes.append(f"frozen: {sum(groups.frozen.values()):,} weights in {_few(list(groups.frozen))}")
        if groups.empty:
            notes.append(f"empty: {_few(groups.empty)}")
    return "\n".join([text.align(lines, left=3), *notes])


def _costs(group: dict[str, Any]) -> list[tuple[tuple[str, str, str], list[int]]]:
    """Per role: group, role and treatment; tensors, weights, and bytes of state, held gradients and AdamW."""
    share = float(getattr(group["density"], "largest", group["density"]))
    rows: dict[tuple[str, str, str], list[int]] = {}
    for parameter, role in zip(group["params"], group.get("roles") or ["any"] * len(group["params"]), strict=True):
        size, width = parameter.numel(), parameter.element_size()
        dense = group.get("dense", False) or parameter.dim() < 2 or size == 0
        layout = (
            None
            if dense
            else slots.layout_of(parameter, {"granularity": "weight", "transposed": False, **group}, share)
        )
        by = "columns" if isinstance(layout, chunks.ColumnLayout) else "selected from"
        labels = (group.get("role", "group"), role, "dense AdamW" if layout is None else f"{by}, {100 * share:g} %")
        row = rows.setdefault(labels, [0] * 5)
        row[0] += 1
        row[1] += size
        carried = group.get("moments", "carry") == "carry"
        moment = group["state_dtype"].itemsize
        row[2] += 2 * moment * size if layout is None else chunks.state_bytes(layout, moment, carried=carried)
        row[3] += size * width if layout is None else layout.selected * group["grad_dtype"].itemsize
        row[4] += 3 * size * width
    return list(rows.items())


def _rate_of_head(groups: list[dict[str, Any]]) -> list[str]:
    """A line if the head's learning rate is not that of the rest, which groups may leave to the optimizer."""
    own = {float(g["lr"]) for g in groups if g.get("role") in _HEAD_GROUP_OF.values() and "lr" in g}
    rest = {float(g.get("lr", math.nan)) for g in groups if g.get("role") not in _HEAD_GROUP_OF.values()}
    return [f"learning rate of the head: {rate:g}" for rate in sorted(own - rest)]


def _few(names: list[str], at_most: int = 4) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
