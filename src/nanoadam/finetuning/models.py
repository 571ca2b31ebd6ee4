"""Pretrained models and their tokenizers, and what can go wrong with getting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from nanoadam.finetuning.config import Config
from nanoadam.text import nearest

AUTO: dict[str, Any] = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "multi-label-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "text-regression": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}


def architecture(config: Config) -> str:
    """The class that the model's own config names, or nothing.

    Raises:
        ValueError: if there is no such config.
    """
    own = _own_config(config)
    return next(iter(getattr(own, "architectures", None) or ()), "")


def _own_config(config: Config, **options: Any) -> Any:
    name = _checked_name(config.model)

    def load() -> Any:
        return transformers.AutoConfig.from_pretrained(
            name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **options
        )

    return _explain(config.model, load)


def load_model(config: Config, **options: Any) -> transformers.PreTrainedModel:
    """The model of a config, in training mode, its new weights drawn from the global generator.

    Args:
        config: says which model, and what is allowed to get it.
        options: for its transformers config: number of labels, their names.

    Raises:
        ValueError: if it cannot be had or used as asked; says why and what to do.
    """
    return _load(config, options)[0]


def _load(config: Config, options: dict[str, Any]) -> tuple[transformers.PreTrainedModel, set[str]]:
    """The model, and the names of its weights that no checkpoint held."""
    name = _checked_name(config.model)
    if not config.init_from_config:
        _refuse_pickle(Path(name), config)
    own = _own_config(config, **options)
    kind, dtype = AUTO[str(config.task)], getattr(torch, config.dtype)

    def load() -> Any:
        if config.init_from_config:
            # Where they will be trained: a large model would take minutes and twice its memory on the CPU.
            with torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"):
                made = kind.from_config(own, dtype=dtype, trust_remote_code=config.trust_remote_code)
            return made, {"missing_keys": [name for name, _ in made.named_parameters()]}
        return kind.from_pretrained(
            name,
            config=own,
            revision=config.revision or "main",
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            ignore_mismatched_sizes=config.new_head,
            output_loading_info=True,
        )

    model, info = _explain(config.model, load, task=config.task)
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())}
    missing = {*info["missing_keys"], *mismatched}
    if not config.init_from_config:
        _refuse_holes(model, missing, config)
    model.train()
    model.nanoadam_new = frozenset(missing)  # for patches: values that are nobody's
    return model, missing


def _refuse_holes(model: Any, missing: set[str], config: Config) -> None:
    """Weights below the head that no checkpoint held would be random: then it is not this model's checkpoint."""
    prefix = f"{model.base_model_prefix}."
    trained = {name for name, _ in model.named_parameters()}
    holes = sorted(
        name
        for name in missing & trained
        if name.startswith(prefix) and "pooler" not in name and model.base_model is not model
    )
    if holes:
        raise ValueError(
            f"{config.model} lacks {len(holes)} weights of a {type(model).__name__} ({holes[0]}): its files belong to "
            "another model; for random weights pass --init-from-config"
        )


def load_with_head(config: Config, options: dict[str, Any]) -> tuple[transformers.PreTrainedModel, str]:
    """A model whose head is made for the data, or was already: then "kept", otherwise "new".

    Raises:
        ValueError: as `load_model`.
    """
    model, missing = _load(config, options)
    head = _head_weights(model)
    if not missing & head.keys():
        if not config.new_head:
            return model, "kept"
        _draw_anew(model)
    return model, "new"


def load_classifier(
    config: Config, names: list[str], options: Callable[[list[str]], dict[str, Any]]
) -> tuple[transformers.PreTrainedModel, str, list[str]]:
    """A model whose head has these classes, in the order of the head that it had.

    Args:
        config: says which model.
        names: of the classes.
        options: makes what its transformers config has to know of them.

    Returns:
        The model, "new" or "kept", and the names in the order of the outputs.

    Raises:
        ValueError: as `load_model`; and if the model has a head whose classes are called otherwise.
    """
    own = getattr(_own_config(config), "id2label", None) or {}
    theirs = [str(own[i]) for i in sorted(own)]
    same = {name.lower(): name for name in names}
    if not config.new_head and len(theirs) == len(names) and {name.lower() for name in theirs} == set(same):
        names = [same[name.lower()] for name in theirs]
    model, head = load_with_head(config, options(names))
    if head == "kept" and theirs and [name.lower() for name in theirs] != [name.lower() for name in names]:
        numbered = all(name == f"LABEL_{i}" for i, name in enumerate(theirs))
        if not (numbered and names == [str(i) for i in range(len(names))]):
            raise ValueError(
                f"the head of {config.model} knows the classes {_few(theirs)}, and the data have {_few(names)}: which "
                "is which? Pass --new-head to train a head of its own, or rename the labels in the data"
            )
    return model, head, names


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _head_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    if model.base_model is model:
        return {}
    prefix = f"{model.base_model_prefix}."
    return {name: p for name, p in model.named_parameters() if not name.startswith(prefix)}


def _draw_anew(model: Any) -> None:
    """A head as transformers draws it for this kind of model."""
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            for module in part.modules():
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False
                module._is_hf_initialized = False
                if isinstance(module, torch.nn.Linear):
                    with torch.no_grad():
                        module.weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
                        if module.bias is not None:
                            module.bias.zero_()
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()


def load_tokenizer(config: Config) -> Any:
    """The tokenizer, which pads with something.

    Raises:
        ValueError: if it cannot be had.
    """
    name = _checked_name(config.tokenizer or config.model)

    def load() -> Any:
        return transformers.AutoTokenizer.from_pretrained(
            name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )

    tokenizer = _explain(name, load, "tokenizer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name} has neither a padding nor an end token: give one with --tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(config: Config) -> Any:
    """What resizes and normalises images as the model has learned them.

    Raises:
        ValueError: if it cannot be had.
    """
    name = _checked_name(config.tokenizer or config.model)
    automatic: Any = transformers.AutoImageProcessor

    def load() -> Any:
        return automatic.from_pretrained(
            name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )

    return _explain(name, load, "image processor")


def _checked_name(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "tokenizer.json").is_file():
            raise ValueError(f"the folder {path} holds no config.json: pass the folder of a saved transformers model")
        return str(path)
    if path.is_file() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        near = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise ValueError(f"there is no model folder {path}{nearest(path.name, near)}")
    return name


def _refuse_pickle(folder: Path, config: Config) -> None:
    if not folder.is_dir() or config.allow_pickle or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise ValueError(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run any code when they are loaded: "
            "convert them to safetensors, or pass --allow-pickle if you trust where they come from"
        )
    raise ValueError(f"{folder} holds no weights: for random ones pass --init-from-config")


def _explain(name: str, load: Callable[[], Any], what: str = "model", task: str | None = None) -> Any:
    """Call `load`, and turn what transformers raises into a sentence."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ValueError(
                f"the {what} {name} comes with Python code of its own, which is not run unless asked for: read it, and "
                "pass --trust-remote-code if you trust it"
            ) from error
        if "Unrecognized configuration class" in text:
            raise ValueError(
                f"{name} is no model for {task}: name what is learned with --task, or another model"
            ) from error
        if "mismatch" in text:
            raise ValueError(
                f"the head of {name} does not fit the classes in the data: pass --new-head to replace it"
            ) from error
        if Path(name).is_dir():
            raise ValueError(f"the {what} in {name} cannot be loaded: {text[:300]}") from error
        raise ValueError(
            f"the {what} {name!r} is no folder here and could not be had from the hub: without network, pass the "
            f"folder of a saved model ({text[:150]})"
        ) from error
