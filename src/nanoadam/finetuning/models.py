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
    "text-regression": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}


def load_model(config: Config, **options: Any) -> transformers.PreTrainedModel:
    """The model of a config, in training mode, its new weights drawn from the global generator.

    Args:
        config: says which model, and what is allowed to get it.
        options: for its transformers config: number of labels, their names.

    Raises:
        ValueError: if it cannot be had or used as asked; says why and what to do.
    """
    name = _checked_name(config.model)
    if not config.init_from_config:
        _refuse_pickle(Path(name), config)

    def load() -> Any:
        own = transformers.AutoConfig.from_pretrained(
            name, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **options
        )
        dtype = getattr(torch, config.dtype)
        if config.init_from_config:
            # Where they will be trained: a large model would take minutes and twice its memory on the CPU.
            with torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"):
                return AUTO[config.task].from_config(own, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return AUTO[config.task].from_pretrained(
            name,
            config=own,
            revision=config.revision or "main",
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            ignore_mismatched_sizes=config.new_head,
        )

    model: transformers.PreTrainedModel = _explain(config.model, load)
    model.train()
    return model


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


def _explain(name: str, load: Callable[[], Any], what: str = "model") -> Any:
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
