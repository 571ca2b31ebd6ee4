"""What a model must not forget, measured on the live model before and after finetuning.

Three measures, chosen by what the data is:

- a text file, or rows that language models learn from, for language models: loss per token;
- pairs of texts (a question and its answer), for text encoders: retrieval without training. Each text is the mean of
  its last hidden states, each first text is to find its second one among all by cosine: recall@1 and mean
  reciprocal rank. That is what sentence encoders are pretrained for;
- labelled texts or images, for text and image encoders: accuracy of a linear probe, logistic regression on frozen
  pooled features with a fixed split, whatever the seed.

Forgetting is how much worse a measure is after than before: before - after, and for a loss after - before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanoadam.baselines.adapters import has_adapters, pretrained
from nanoadam.finetuning import columns, data, files, labels
from nanoadam.finetuning.config import Config

BATCH = 128
PROBE_TEST = 0.25
"""Share of the labelled rows that the probe is measured on, drawn once and for all."""

ROUNDING = 1e-6
"""Cosines this near are the same: sums over other batches round otherwise."""

Measured = dict[str, float]
Measure = Callable[..., Measured]
"""Takes the model that is trained, and `precision`, a config's autocast; gives a number for each thing it measures."""

LOWER_IS_BETTER = ("token loss",)


def measures(config: Config, processor: Any) -> dict[str, Measure]:
    """What a config says is to be retained, by the name of its file.

    Args:
        config: with `retain`.
        processor: tokenizer or image processor of the model.

    Raises:
        ValueError: for a file that is not there, cannot be read, or does not serve this kind of model.
    """
    found: dict[str, Measure] = {}
    precision = config.autocast
    for name in config.retain:
        stem = Path(name).stem if Path(name).expanduser().exists() else name
        if stem in found:
            raise ValueError(f"retain holds two files called {stem}: their results could not be told apart")
        reading = (config.delimiter, config.encoding)
        key = ("retain", data.stamp(name), config.task, data.stamp(config.tokenizer or config.model), reading)
        measure = data.remembered(key, functools.partial(_measure, name, config, processor))
        found[stem] = functools.partial(measure, precision=precision)
    return found


def before(measures: dict[str, Measure], config: Config, model: nn.Module) -> dict[str, Measured]:
    """What is measured of a model that has not been trained yet, once in a process for models that are the same."""
    if not measures:
        return {}
    digest = hashlib.blake2b()
    inner: Any = _inner(model)
    for name, parameter in pretrained(model).items():
        if config.task == "causal-lm" or name.startswith(f"{inner.base_model_prefix}.") or inner.base_model is inner:
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    files = tuple(data.stamp(name) for name in config.retain)
    device = next(model.parameters()).device.type
    key = ("before", files, config.autocast, config.dtype, device, digest.hexdigest())
    return data.remembered(key, lambda: {name: measure(model) for name, measure in measures.items()})


def compared(before: dict[str, Measured], after: dict[str, Measured]) -> dict[str, dict[str, float]]:
    """`{"NAME: MEASURE": {"before", "after", "forgetting"}}`; forgetting is positive where it has become worse."""
    found = {}
    for name, values in before.items():
        for what, then in values.items():
            now = after[name][what]
            lost = now - then if what in LOWER_IS_BETTER else then - now
            found[f"{name}: {what}"] = {"before": then, "after": now, "forgetting": lost}
    return found


def _measure(name: str, config: Config, processor: Any) -> Measure:
    path = Path(name).expanduser()
    if config.task == "causal-lm" or path.suffix.lower() == ".txt":
        if config.task != "causal-lm":
            raise ValueError(f"retain {name}: a text file is for language models, and {config.task} trains none: give "
                             "pairs of texts or labelled rows")  # fmt: skip
        if not path.is_file():
            raise ValueError(f"there is no text file {name} to retain")
        return _token_loss(path, _running_text(path, config), processor)
    split = data.read(name, files.Reading(delimiter=config.delimiter, encoding=config.encoding, beside=True))
    if config.task == "image-classification":
        return _image_probe(split, processor)
    if split.has(data.LABEL):
        return _text_probe(split, processor)
    return _retrieval(split, processor)


# Language models ------------------------------------------------------------------------------------------


def _running_text(path: Path, config: Config) -> str:
    """A text as it is; of rows what a language model would learn from, one after the other."""
    suffix = files.format_of(path)
    if suffix == ".txt" or suffix not in files.READERS:
        return files.text_of(path, config.encoding, beside=True)
    split = data.read(str(path), files.Reading(delimiter=config.delimiter, encoding=config.encoding, beside=True))
    kind, roles = columns.of_completions(path.name, split.rows, dataclasses.replace(config, **_UNTOLD))
    if kind == "chat":
        raise ValueError(f"retain {path}: conversations are no text to retain; give a text file, or texts in a column")
    parts = [labels.texts(split, name, empty=True) for name in roles.read]
    return "\n\n".join("\n\n".join(part for part in row if part) for row in zip(*parts, strict=True))


_UNTOLD: dict[str, Any] = dict.fromkeys(
    ("text_column", "label_column", "prompt_column", "completion_column", "messages_column")
)
"""Names of columns are those of the training data."""


def _token_loss(path: Path, text: str, tokenizer: Any) -> Measure:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise ValueError(f"{path} holds fewer than two tokens: there is nothing to retain")

    def measure(model: nn.Module, precision: str) -> Measured:
        shape: Any = model.config
        limit = min(getattr(shape.get_text_config(), "max_position_embeddings", None) or 1024, 1024)
        total, count = 0.0, 0
        with _evaluating(model, precision) as device:
            for block in ids.split(limit):
                if len(block) > 1:
                    logits = model(block[None].to(device)).logits[0, :-1].float()
                    total += float(nn.functional.cross_entropy(logits, block[1:].to(device), reduction="sum"))
                    count += len(block) - 1
        return {"token loss": total / max(1, count)}

    return measure


# Encoders -------------------------------------------------------------------------------------------------


def _retrieval(split: data.Split, tokenizer: Any) -> Measure:
    first = split.column("retain", None, (*data.PROMPT, *data.TEXT))
    second = split.column("retain", None, (*data.COMPLETION, *data.PAIR))
    sides = [_batches(labels.texts(split, name), tokenizer) for name in (first, second)]

    def measure(model: nn.Module, precision: str) -> Measured:
        with _evaluating(model, precision) as device:
            asked, answers = (_text_features(model, batches, device) for batches in sides)
        likeness = nn.functional.normalize(asked) @ nn.functional.normalize(answers).T
        own = likeness.diagonal()[:, None]
        ranks = (likeness >= own - ROUNDING).sum(dim=1).double()  # equally near ones stand before it
        return {"recall@1": float((ranks == 1).double().mean()), "mrr": float(ranks.reciprocal().mean())}

    return measure


def _text_probe(split: data.Split, tokenizer: Any) -> Measure:
    texts = labels.texts(split, split.column("retain", None, data.TEXT))
    batches, ids = _batches(texts, tokenizer), _labels(split)

    def measure(model: nn.Module, precision: str) -> Measured:
        with _evaluating(model, precision) as device:
            return _probe(_text_features(model, batches, device), ids)

    return measure


def _image_probe(split: data.Split, processor: Any) -> Measure:
    from nanoadam.finetuning import images
    from nanoadam.finetuning.tasks.images import sources as sources_of

    sources, ids = sources_of(split, split.column("retain", None, data.IMAGE)), _labels(split)

    def measure(model: nn.Module, precision: str) -> Measured:
        features = []
        with _evaluating(model, precision) as device:
            encoder = backbone(model)
            dtype = next(encoder.parameters()).dtype
            for start in range(0, len(sources), BATCH):
                chosen = [images.decode(source) for source in sources[start : start + BATCH]]
                pixels = processor(chosen, return_tensors="pt")["pixel_values"].to(device, dtype)
                features.append(_pooled(encoder(pixel_values=pixels)))
        return _probe(torch.cat(features), ids)

    return measure


def _pooled(output: Any) -> Tensor:
    """[images, features]: of transformers the mean over their tokens, of convolutions their own pooling."""
    last: Tensor = output.last_hidden_state.float()
    return last.mean(dim=1) if last.dim() == 3 else last.mean(dim=(2, 3))


def _labels(split: data.Split) -> list[int]:
    """Each row's class; refuses before the run what the probe could not be fitted to after it."""
    column = split.column("retain", None, data.LABEL)
    names = labels.label_names(split, column)
    ids = labels.class_ids(split, column, names)
    for label, count in Counter(ids).items():
        if count < 2:
            raise ValueError(f"{split.name} has one row only with {column} {names[label]!r}: a probe needs two of each")
    if math.ceil(PROBE_TEST * len(ids)) < len(set(ids)):
        raise ValueError(f"{split.name} has {len(ids)} rows for {len(set(ids))} labels: a probe needs four times "
                         "as many rows as labels")  # fmt: skip
    return ids


def _probe(features: Tensor, labels: Sequence[int]) -> Measured:
    """Accuracy on the held-out rows; features are standardised by the training rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = features.cpu().numpy().astype(np.float64)
    if not np.isfinite(rows).all():
        return {"probe accuracy": math.nan}
    parts = train_test_split(rows, np.asarray(labels), test_size=PROBE_TEST, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = parts
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {"probe accuracy": float(probe.fit(train, train_labels).score(test, test_labels))}


def backbone(model: nn.Module) -> nn.Module:
    """The model under its head, also with peft's adapters in it."""
    found: nn.Module = _inner(model).base_model
    return found


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if has_adapters(model) else model  # type: ignore[operator]


def _batches(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Positions and inputs of texts of similar length; what is longer than the model takes is cut."""
    limit = min(tokenizer.model_max_length, 512)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit, verbose=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    padded = [tokenizer.pad({"input_ids": [encoded[i] for i in chunk]}, return_tensors="pt") for chunk in chunks]
    return [(chunk, dict(inputs)) for chunk, inputs in zip(chunks, padded, strict=True)]


def _text_features(model: nn.Module, batches: list[tuple[list[int], dict[str, Tensor]]], device: Any) -> Tensor:
    """Mean of the last hidden states of each text: float32 [texts, width], on the model's device."""
    encoder = backbone(model)
    positions: list[int] = []
    features = []
    for chunk, inputs in batches:
        on_device = {name: value.to(device) for name, value in inputs.items()}
        states = encoder(**on_device).last_hidden_state.float()
        mask = on_device["attention_mask"][..., None].float()
        features.append((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        positions += chunk
    back = torch.tensor(positions, device=device).argsort()
    return torch.cat(features)[back]


@contextlib.contextmanager
def _evaluating(model: nn.Module, precision: str) -> Iterator[torch.device]:
    """No gradients, no dropout, in the precision that the run computes in; as it was afterwards."""
    device = next(model.parameters()).device
    computes = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(device.type, computes, enabled=computes is not None):
            yield device
    finally:
        for module in training:
            module.training = True
