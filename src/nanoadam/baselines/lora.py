"""LoRA through peft, with the settings of the NanoAdam paper: rank 32 on all linear layers but the head.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from nanoadam.groups import param_groups


def apply_lora(model: nn.Module, rank: int = 32, *, alpha: float | None = None, dropout: float = 0.0) -> nn.Module:
    """Freeze a model and put adapters beside its linear layers, in place; train what is returned.

    A newly made head (a classifier) is trained in full beside the adapters, like every other method does; an
    output embedding (`lm_head`) came with the pretrained model and is frozen with it.

    Args:
        model: with linear layers: nn.Linear, or transformers' Conv1D.
        rank: of the adapters. They are float32, also beside bfloat16 weights.
        alpha: adapters are scaled by alpha / rank; 2 * rank unless given.
        dropout: before the adapters.

    Returns:
        peft's model around the given one.

    Raises:
        ImportError: without peft.
        ValueError: if the model has no linear layer besides its head, or has adapters already.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'nanoadam[baselines]'") from error
    if has_adapters(model):
        raise ValueError("the model has adapters already")
    head_parameters = {id(p) for group in param_groups(model) for p, role in _roles(group) if role == "head"}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    targets: list[str] = []
    heads: list[str] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if module is output or not own:
            continue
        if any(id(parameter) in head_parameters for parameter in own):
            heads.append(name)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            targets.append(name)
    if not targets:
        raise ValueError(f"lora needs linear layers, and {type(model).__name__} has none besides its head")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, targets)),  # a list would match the ends of names
        modules_to_save=heads or None,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return any(cls.__name__ == "BaseTunerLayer" for module in model.modules() for cls in type(module).__mro__)


def pretrained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a model is to be finetuned from, by the names they have without adapters.

    With adapters that is the frozen model under them and the first state of the head; without, whatever is trained.
    """
    if not has_adapters(model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain = name.removeprefix("base_model.model.")
            found[plain.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    return found


def merge_lora(model: nn.Module) -> Any:
    """The whole finetuned model: adapters added to the weights beside them, in place; others come back as they are."""
    return model.merge_and_unload() if has_adapters(model) else model  # type: ignore[operator]


def _roles(group: dict[str, Any]) -> zip[tuple[Any, str]]:
    return zip(group["params"], group["roles"], strict=True)
