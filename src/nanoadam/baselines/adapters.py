"""Adapters through peft beside frozen weights: LoRA, as the NanoAdam paper sets it, and what came after it.

Sources: LoRA: Hu et al., ICLR 2022, arXiv 2106.09685. rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. SHiRA: Bhardwaj et
al., NeurIPS 2024, arXiv 2406.13175. OFT: Qiu et al., NeurIPS 2023, arXiv 2306.07280. On all linear layers but the head.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

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
        ValueError: if the model has no linear layer besides its head, has adapters already, or an option does not
            serve it.
    """
    own = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "lora_dropout": dropout}
    return _adapted(model, "lora", "LoraConfig", own)


def apply_rslora(model: nn.Module, rank: int = 32, *, alpha: float = 16.0, dropout: float = 0.0) -> nn.Module:
    """LoRA whose adapters are scaled by alpha / sqrt(rank), so that high ranks learn as fast; see `apply_lora`."""
    own = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": True}
    return _adapted(model, "rslora", "LoraConfig", own)


def apply_shira(model: nn.Module, rank: int = 32, *, seed: int = 0) -> nn.Module:
    """SHiRA: what is added to rank * (in + out) weights of each layer, chosen at random once; see `apply_lora`.

    Args:
        model: with nn.Linear layers alone.
        rank: as many weights as LoRA has at this rank.
        seed: of the choice.
    """
    return _adapted(model, "shira", "ShiraConfig", {"r": rank, "random_seed": seed}, conv1d=False)


def apply_oft(model: nn.Module, block_size: int = 32) -> nn.Module:
    """OFT: rotations of each layer's inputs, in blocks of so many; see `apply_lora`.

    Args:
        model: with nn.Linear layers alone.
        block_size: peft takes the nearest that divides a layer's inputs.
    """
    return _adapted(model, "oft", "OFTConfig", {"oft_block_size": block_size}, conv1d=False)


ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    "lora": apply_lora,
    "rslora": apply_rslora,
    "shira": apply_shira,
    "oft": apply_oft,
}
"""What puts adapters into a model, by the method's name."""

_PARTS = (".lora_", ".shira_", ".oft_", ".modules_to_save.")
"""What the names of parameters hold that are no weights of the model beneath."""


def _adapted(model: nn.Module, method: str, kind: str, options: dict[str, Any], conv1d: bool = True) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{method} needs peft: pip install 'nanoadam[baselines]'") from error
    if has_adapters(model):
        raise ValueError("the model has adapters already")
    for name, value in options.items():
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{method} needs a {_AT_LEAST_ONE[name]} of at least 1, got {value}")
    targets, heads = _places(model)
    if not targets:
        raise ValueError(f"{method} needs linear layers, and {type(model).__name__} has none besides its head")
    other = next((name for name in targets if not isinstance(model.get_submodule(name), nn.Linear)), None)
    if other is not None and not conv1d:
        what = type(model.get_submodule(other)).__name__
        raise ValueError(f"{method} works on nn.Linear layers, and {other} of {type(model).__name__} is a {what}: "
                         "take lora")  # fmt: skip
    config = getattr(peft, kind)(
        target_modules="|".join(map(re.escape, targets)),  # a list would match the ends of names
        modules_to_save=heads or None,
        **options,
    )
    size = next(name for name in _AT_LEAST_ONE if name in options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # that it takes the nearest is documented
            adapted: nn.Module = peft.get_peft_model(model, config)
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:  # what peft says to a value
        raise ValueError(
            f"{method} cannot be put into this model, try a smaller {_AT_LEAST_ONE[size]}: {error}"
        ) from error
    return adapted


_AT_LEAST_ONE = {"r": "rank", "oft_block_size": "block_size"}


def _places(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of linear layers, and of what is trained in full beside their adapters."""
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
    return targets, heads


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
        if not any(part in name for part in _PARTS):
            plain = name.removeprefix("base_model.model.")
            found[plain.replace(".base_layer.", ".").replace(".original_module.", ".")] = parameter
    return found


def of_adapters(model: nn.Module) -> list[Tensor]:
    """The buffers that adapters have brought: OFT's positions in its blocks."""
    return [buffer for name, buffer in model.named_buffers() if any(part in name for part in _PARTS)]


def merged(model: nn.Module) -> Any:
    """The whole finetuned model: adapters put into the weights beside them, in place; others come back as they are."""
    return model.merge_and_unload() if has_adapters(model) else model  # type: ignore[operator]


def _roles(group: dict[str, Any]) -> zip[tuple[Any, str]]:
    return zip(group["params"], group["roles"], strict=True)
