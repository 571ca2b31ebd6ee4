"""A finetuned model on other data: what it says of rows, and how good that is."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from nanoadam.finetuning import config as configs
from nanoadam.finetuning import data, folders, labels, models, optimizers, tasks, training
from nanoadam.finetuning.columns import MESSAGES
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.files import Reading
from nanoadam.finetuning.job import Job
from nanoadam.finetuning.tasks.base import sequence_limit
from nanoadam.finetuning.tasks.language import messages_of

Progress = Callable[[str, int, int], None]


def load(run: Path) -> tuple[Config, dict[str, Any]]:
    """The config of a finished run, whose model is the finetuned one, and its manifest.

    Raises:
        ValueError: if it is no such folder, or holds no model.
    """
    manifest_path = run / "manifest.json"
    if not (run / "config.toml").is_file() or not manifest_path.is_file():
        raise ValueError(f"{run} is no run folder: it holds no config.toml with a manifest.json")
    manifest = folders.read_manifest(
        manifest_path, f"what the run learned from stands there; {run / 'model'} can be used without it"
    )
    if not (run / "model").is_dir():
        why = "it was run with --no-save-model" if manifest.get("results") else "the run is not finished"
        if (run / "delta").is_dir():
            base = manifest["settings"]["model"]
            why = f"its patch makes one: nanoadam delta apply {base} {run / 'delta'} {run / 'model'}"
        raise ValueError(f"{run} holds no model/: {why}")
    own = {"model": str(run / "model"), "tokenizer": None, "revision": None, "new_head": False, "retain": (),
           "init_from_config": False, "optimizer": "adamw", "optimizer_options": ()}  # fmt: skip
    return configs.of_run(run, own), manifest


def evaluate(run: Path, name: str, batch_size: int = 32) -> dict[str, Any]:
    """The metrics on rows with labels.

    Returns:
        `{"data", "rows", "metrics", "baseline", "validation", "details", "notes"}`; `validation` has the metrics that
        the run ended with.

    Raises:
        ValueError: as for the validation data of a run.
    """
    config, manifest = load(run)
    if Path(config.train).is_absolute() and not Path(config.train).exists():
        raise ValueError(
            f"{run} was trained on {config.train}, which is not there any more: evaluate reads its classes and what "
            "the commonest answer is from it; predict does without"
        )
    job = _job(dataclasses.replace(config, validation=name, validation_rows=None, eval_batch_size=batch_size))
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.RunTrainer.of(job, training.arguments_for(job, Path(folder), 1), [])
        metrics = trainer.evaluate()
    found = {
        key.removeprefix("eval_"): value
        for key, value in metrics.items()
        if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_preparation_time"))
    }
    assert trainer.seen is not None
    details = job.task.details(trainer.seen, config.samples)
    notes = details.pop("notes", [])
    return {"data": name, "rows": len(job.task.validation), "metrics": found, "baseline": job.task.baseline(),
            "validation": (manifest.get("results") or {}).get("final", {}), "details": details,
            "notes": notes}  # fmt: skip


def _job(config: Config) -> Job:
    """A job that is measured, not trained."""
    train, validation = data.load(config)
    task = tasks.make(config, train, validation)
    plan = optimizers.Plan(1, 1)
    return Job(config, task, plan, optimizers.make(task.model, config, plan), {}, {})


def predict(
    run: Path, name: str | None, texts: list[str], batch_size: int, new_tokens: int, tell: Progress
) -> list[dict[str, Any]]:
    """What the model says, row by row.

    Args:
        run: folder of a finished run.
        name: of a file or hub id, read as the training data was; no labels are needed.
        texts: instead of that, texts.
        batch_size: rows per forward pass.
        new_tokens: of language models, the most that are written.
        tell: called with how many rows are done.

    Raises:
        ValueError: for data that lack the columns that the run read, or a run of another task.
    """
    config, manifest = load(run)
    read = manifest["data"]["read_as"]
    columns = _columns(read)
    if name is not None:
        split = data.read(name, Reading(config.columns, config.delimiter, config.encoding, beside=True))
    else:
        if len(columns) != 1 and config.task != "causal-lm":
            raise ValueError(f"this model reads {' and '.join(columns)}: give them with --data")
        words = config.task == "token-classification"
        rows = Dataset.from_dict({columns[0]: [text.split() for text in texts] if words else texts})
        columns, split = columns[:1], data.Split(rows, "--text", {})
    for column in columns:
        split.column("data", column, ())
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")
    model: Any = models.load_model(config).to(device)  # type: ignore[arg-type]
    model.train(False)
    if config.task == "image-classification":
        return _images(config, model, split, columns[0], batch_size, tell)
    if config.task == "causal-lm":
        return _written(config, model, split, columns, new_tokens, tell)
    return _classified(config, model, split, columns, batch_size, tell)


def _columns(read: dict[str, Any]) -> list[str]:
    """The columns that a model needs, from what the manifest says was read."""
    if "columns" in read:
        return list(read["columns"][:-1] or read["columns"])
    if "image" in read:
        return [read["image"]]
    return [read["words"]] if "words" in read else list(read["text"])


@torch.no_grad()
def _classified(
    config: Config, model: Any, split: data.Split, columns: list[str], size: int, tell: Progress
) -> list[dict[str, Any]]:
    tokenizer, found = models.load_tokenizer(config), []
    words = config.task == "token-classification"
    limit = sequence_limit(config, model, tokenizer)
    inputs = [_words(split, columns[0])] if words else [labels.texts(split, column) for column in columns]
    for start in range(0, len(split), size):
        tell("predicting", start, len(split))
        part = [column[start : start + size] for column in inputs]
        batch = tokenizer(*part, truncation=True, max_length=limit, padding=True, return_tensors="pt",
                          is_split_into_words=words)  # fmt: skip
        logits = model(**batch.to(model.device)).logits.float().cpu()
        for i, row in enumerate(logits):
            said = _tags(batch.word_ids(i), row, model) if words else _said(config, row, model)
            shown = {column: part[number][i] for number, column in enumerate(columns)}
            cut = {"cut": True} if batch.is_fast and batch[i].overflowing else {}
            found.append({**shown, **said, **cut})
    return found


def _words(split: data.Split, column: str) -> list[list[str]]:
    rows = list(split.rows[column])
    for index, words in enumerate(rows):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{split.where(index)} must have a list of words in {column!r}, and at least one")
    return rows


def _said(config: Config, row: torch.Tensor, model: Any) -> dict[str, Any]:
    names = model.config.id2label
    if config.task == "text-regression":
        return {"predicted": float(row[0])}
    if config.task == "multi-label-classification":
        shares = row.sigmoid()
        return {"predicted": [names[i] for i in range(len(row)) if shares[i] > 0.5],
                "scores": {names[i]: round(float(shares[i]), 4) for i in range(len(row))}}  # fmt: skip
    shares = row.softmax(-1)
    best = int(shares.argmax())
    return {"predicted": names[best], "score": round(float(shares[best]), 4)}


def _tags(words: list[int | None], row: torch.Tensor, model: Any) -> dict[str, Any]:
    tags: dict[int, str] = {}
    for place, word in enumerate(words):
        if word is not None and word not in tags:
            tags[word] = model.config.id2label[int(row[place].argmax())]
    return {"predicted": [tags[word] for word in sorted(tags)]}


@torch.no_grad()
def _images(
    config: Config, model: Any, split: data.Split, column: str, size: int, tell: Progress
) -> list[dict[str, Any]]:
    from nanoadam.finetuning import images
    from nanoadam.finetuning.tasks.images import sources

    processor, given, found = models.load_image_processor(config), sources(split, column), []
    for start in range(0, len(given), size):
        tell("predicting", start, len(given))
        part = given[start : start + size]
        pixels = processor([images.decode(source) for source in part], return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=pixels.to(model.device)).logits.float().cpu()
        for i, row in enumerate(logits):
            shown = part[i] if isinstance(part[i], str) else split.where(start + i)
            found.append({column: shown, **_said(config, row, model)})
    return found


@torch.no_grad()
def _written(
    config: Config, model: Any, split: data.Split, columns: list[str], new_tokens: int, tell: Progress
) -> list[dict[str, Any]]:
    tokenizer, found = models.load_tokenizer(config), []
    limit = sequence_limit(config, model, tokenizer)
    chat = config.messages_column is not None or columns[0].lower() in MESSAGES
    for index in range(len(split)):
        tell("writing", index, len(split))
        if chat:
            shown, prompt = _asked(split, index, columns[0], tokenizer)
        else:
            parts = [labels.texts(split.some([index]), column, empty=True)[0] for column in columns]
            shown = prompt = "\n\n".join(part for part in parts if part)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not chat and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        # The prompt's end is what counts, and it keeps most of what the model takes.
        room = max(1, min(new_tokens, max(limit - len(ids), limit // 4)))
        ids = (ids or [tokenizer.eos_token_id])[-max(1, limit - room) :]
        tensor = torch.tensor([ids], device=model.device)
        made = model.generate(
            input_ids=tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        found.append({"prompt": shown, "written": text.strip()})
    return found


def _asked(split: data.Split, index: int, column: str, tokenizer: Any) -> tuple[str, str]:
    """What is answered, as it is shown and as the template has it; an answer that is there already is left out."""
    raw = split.rows[column][index]
    messages = messages_of(raw)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    elif not messages and isinstance(raw, str):
        messages = [{"role": "user", "content": raw}]
    if not messages:
        raise ValueError(f"{split.where(index)} must be a list of {{role, content}} in {column!r}, with a question")
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's makers: it raises what it likes
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{split.where(index)}: the chat template refuses it: {said}") from error
    return "\n".join(message["content"] for message in messages), prompt
