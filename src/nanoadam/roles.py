"""What each parameter of a model is: norm, bias, vector, embedding, head or matrix.

1.  norm: held by LayerNorm, RMSNorm, BatchNorm, GroupNorm, ... or by any class whose name ends in `Norm`.
2.  bias: the bias of its module. vector: anything else with at most one dimension longer than 1, the lengths that
    weight_norm keeps, Mamba's A_log.
3.  embedding: held by an `nn.Embedding`, under any of its names: a head tied to it is an embedding too.
4.  head: see `_head_modules`.
5.  matrix: all the rest: linear layers, convolutions, GPT-2's Conv1D, stacked experts, LoRA's A and B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # instance norms are a subclass
)
_WEIGHT_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORM_NAME = re.compile(r"Norm(\d+d)?$")
_HEAD_NAMES = re.compile(r"(lm_|classification_)?head(s|_\w+)?|classifier(_\w+)?|fc|score|qa_outputs")


@dataclass(frozen=True)
class Entry:
    """One parameter, with everything that is known of where it stands."""

    parameter: Tensor
    names: list[str]  # more than one where it is tied
    owners: list[nn.Module]  # the module that holds it, per name
    ancestors: list[tuple[str, nn.Module]]  # (name, module), owners included, outermost first

    @property
    def name(self) -> str:
        """The first one, under which it is listed."""
        return self.names[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel, torch.compile and the like: they hold it as their only child."""
    while True:
        children = dict(model.named_children())
        name, inner = next(iter(children.items()), ("", model))
        if (
            len(children) != 1
            or name not in ("module", "_orig_mod")
            or next(model.parameters(recurse=False), None) is not None
        ):
            return model
        model = inner


def entries_of(model: nn.Module) -> list[Entry]:
    """Every parameter once, in `named_parameters` order, with all its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, Entry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.split(".")[:-1]
        prefixes = [".".join(path[:depth]) for depth in range(len(path) + 1)]
        entry = found.setdefault(id(parameter), Entry(parameter, [], [], []))
        entry.names.append(name)
        entry.owners.append(modules[prefixes[-1]])
        entry.ancestors.extend((prefix, modules[prefix]) for prefix in prefixes)
    return list(found.values())


def role_of(entry: Entry, heads: set[int]) -> str:
    """One of norm, bias, vector, embedding, head and matrix; `heads` from `head_parameters`."""
    if any(_is_norm(owner) for owner in entry.owners):
        return "norm"
    if _is_bias(entry):
        return "bias"
    if _is_magnitude(entry) or _is_marked(entry):
        return "vector"
    shape = entry.parameter.shape
    if len(shape) < 2 or (sum(size > 1 for size in shape) < 2 and not _is_weight_layer(entry.owners[0])):
        # a class token of shape (1, 1, width) is a vector; a linear layer with one output is a matrix
        return "vector"
    if _is_adapter(entry):
        return "matrix"
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in entry.owners):
        return "embedding"
    return "head" if id(entry.parameter) in heads else "matrix"


def _is_norm(module: nn.Module) -> bool:
    # Most RMSNorms are classes of their own, one per architecture; only the class says what they are.
    return isinstance(module, _NORMS) or _NORM_NAME.search(type(module).__name__) is not None


def _is_weight_layer(module: nn.Module) -> bool:
    return isinstance(module, _WEIGHT_LAYERS) or type(module).__name__ in ("Conv1D", "ModuleDict", "ParameterDict")


def _is_bias(entry: Entry) -> bool:
    """Whether it is called a bias and is smaller than what it is added to (stacked experts have 2-d biases)."""
    for name, owner in zip(entry.names, entry.owners, strict=True):
        attribute = name.rpartition(".")[2]
        if not attribute.endswith("bias"):
            continue
        if entry.parameter.dim() < 2:
            return True
        stem = attribute.removesuffix("bias").rstrip("_") or "weight"
        weight = owner._parameters.get(stem)
        if weight is not None and weight.dim() > entry.parameter.dim():
            return True
    return False


def _is_magnitude(entry: Entry) -> bool:
    """Whether it is what torch.nn.utils.weight_norm makes beside the directions: one length per row."""
    stems = ((name.rpartition(".")[2], owner) for name, owner in zip(entry.names, entry.owners, strict=True))
    return any(
        attribute.endswith("_g") and f"{attribute.removesuffix('_g')}_v" in owner._parameters
        for attribute, owner in stems
    )


def _is_marked(entry: Entry) -> bool:
    """Whether a state space model says that it is no ordinary weight: Mamba's A_log, a decay rate per state."""
    named = any(name.rpartition(".")[2] == "A_log" for name in entry.names)
    return named or bool(getattr(entry.parameter, "_no_weight_decay", False))


def _is_adapter(entry: Entry) -> bool:
    """Whether PEFT added it: inside a tuner layer, but not in the layer that the tuner wraps."""
    for depth, (_, module) in enumerate(entry.ancestors):
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            wrapped = module._modules.get("base_layer")
            return wrapped is None or all(inner is not wrapped for _, inner in entry.ancestors[depth + 1 :])
    return False


# Heads ---------------------------------------------------------------------------------------------------


def head_parameters(model: nn.Module, entries: list[Entry]) -> set[int]:
    """The ids of the parameters of the newly initialised final layers."""
    if sum(entry.parameter.dim() > 1 for entry in entries) < 2:
        return set()  # a model of one matrix is not all head
    modules = list(model.modules())
    return {id(parameter) for head in _head_modules(model, modules) for parameter in head.parameters()}


def new_head_parameters(entries: list[Entry], heads: set[int]) -> set[int]:
    """Of the head's parameters the new ones: not an output tied to an embedding, nor its bias, nor adapters."""
    tied = {id(owner) for entry in entries if role_of(entry, heads) == "embedding" for owner in entry.owners}
    return {
        id(entry.parameter)
        for entry in entries
        if id(entry.parameter) in heads
        and not _is_adapter(entry)
        and not any(id(owner) in tied for owner in entry.owners)
    }


def _head_modules(model: nn.Module, order: list[nn.Module]) -> list[nn.Module]:
    """The modules that make up the head.

    transformers: whatever stands outside the base model is the head, since it is what `from_pretrained` finds
    no weights for (RoBERTa's and T5's `dense` + `out_proj`, DistilBERT's `pre_classifier`); BERT's pooler is
    inside and is not. Where there are output embeddings, only they and what comes after them are the head:
    what leads up to them (BERT's `cls.predictions.transform`) was pretrained with the rest. A bare backbone
    has no head.

    Any other module: the children that come last, if their names say head; otherwise the last child, and so
    on inside it, down to one layer with a weight. A child that repeats its neighbours (one block of many) is no
    head, and neither is an embedding.
    """
    if callable(inner := getattr(model, "get_base_model", None)):  # PEFT
        return _head_modules(inner(), order)
    if isinstance(getattr(model, "base_model_prefix", None), str) and hasattr(model, "get_output_embeddings"):
        return _transformers_head(model, order)
    return _plain_head(model, order)


def _transformers_head(model: nn.Module, order: list[nn.Module]) -> list[nn.Module]:
    base = getattr(model, "base_model", model)
    try:
        output = model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # the class has no such thing
        output = None
    if not isinstance(output, nn.Module):
        output = None
    if base is model:  # a bare backbone, T5, or one whose parts stand side by side (CLIP)
        return _named_heads(model) if output is None else [output]
    inside = {id(module) for module in base.modules()}
    position = {id(module): index for index, module in enumerate(order)}
    first = 0 if output is None else position[id(output)]
    leaves = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return [leaf for leaf in leaves if id(leaf) not in inside and position[id(leaf)] >= first]


def _plain_head(model: nn.Module, order: list[nn.Module]) -> list[nn.Module]:
    children = _weighty_children(model)
    if not children:
        weight = model._parameters.get("weight")
        layer = weight is not None and weight.dim() > 1
        return [model] if layer and not isinstance(model, (nn.Embedding, nn.EmbeddingBag)) else []
    if named := _named_heads(model):
        return named
    last = children[-1][1]
    repeated = any(type(last) is type(other) for _, other in children[:-1])
    if repeated and _weighty_children(last) and not isinstance(last, _CONTAINERS):
        return []
    return _head_modules(last, order)


def _named_heads(model: nn.Module) -> list[nn.Module]:
    """The last children, as far back as their names say head; none if they are all there is."""
    children = _weighty_children(model)
    heads: list[nn.Module] = []
    for name, child in reversed(children[1:]):
        if _HEAD_NAMES.fullmatch(name) is None:
            break
        heads.append(child)
    return heads


def _weighty_children(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in model.named_children() if any(p.dim() > 1 for p in child.parameters())]
