"""Language models: a prompt and its completion, or a conversation."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from nanoadam.finetuning import data, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import Task, logits_of, refuse_long, sequence_limit


class CausalLM(Task):
    """A prompt and its completion, or a conversation and its last message: the loss is on the latter alone."""

    metrics: ClassVar[dict[str, bool]] = {"token_loss": False, "perplexity": False}

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        chat = config.messages_column is not None or (config.prompt_column is None and train.has(data.MESSAGES))
        if chat:
            self._columns = [train.column("messages_column", config.messages_column, data.MESSAGES)]
        else:
            prompt = train.column("prompt_column", config.prompt_column, data.PROMPT)
            self._columns = [prompt, train.column("completion_column", config.completion_column, data.COMPLETION)]
        for name in self._columns:
            validation.column(name, name, ())
        self.processor = models.load_tokenizer(config)
        if chat and not self.processor.chat_template:
            raise ValueError(
                f"the tokenizer of {config.model} has no chat template: give prompts and completions instead"
            )
        self.model = models.load_model(config)
        self._limit = sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = DataCollatorForSeq2Seq(self.processor, padding=True, label_pad_token_id=-100)
        self.preprocess_logits = _loss_and_count
        self.description = {"columns": self._columns, "most_tokens": self._limit, "loss": "on completions only"}

    def encode(self, split: Split) -> Dataset:
        """Tokens, with no label where there is no loss."""
        pairs = self._chats(split) if len(self._columns) == 1 else self._prompts(split)
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        if not self._config.truncate:
            refuse_long(lengths, self._limit, split)
        rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, completion in pairs:
            completion = completion[: self._limit - 1]  # one token to predict the first of it from
            prompt = prompt[max(0, len(prompt) + len(completion) - self._limit) :]
            rows["input_ids"].append(prompt + completion)
            rows["attention_mask"].append([1] * (len(prompt) + len(completion)))
            rows["labels"].append([-100] * len(prompt) + completion)
        return Dataset.from_dict(rows)

    def _prompts(self, split: Split) -> list[tuple[list[int], list[int]]]:
        prompts, completions = (data.texts(split, name) for name in self._columns)
        tokenizer = self.processor
        start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # Apart, so that what is learned begins at a token's edge; a space between them belongs to the completion.
        ids = [
            self._ids(texts) for texts in (prompts, [_spaced(p, c) for p, c in zip(prompts, completions, strict=True)])
        ]
        return [(start + prompt or end, completion + end) for prompt, completion in zip(*ids, strict=True)]

    def _chats(self, split: Split) -> list[tuple[list[int], list[int]]]:
        prompts, completions = [], []
        for number, messages in enumerate(split.rows[self._columns[0]], start=1):
            valid = isinstance(messages, list) and len(messages) > 1 and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )  # fmt: skip
            if not valid or messages[-1]["role"] != "assistant":
                raise ValueError(
                    f"row {number} of {split.name} must be a list of at least two {{role, content}} that ends with the "
                    "assistant's"
                )
            template = self.processor.apply_chat_template
            prompt = template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = template(messages, tokenize=False)
            if not whole.startswith(prompt):
                raise ValueError(f"the chat template of {self._config.model} rewrites earlier messages: give prompts "
                                 "and completions instead")  # fmt: skip
            prompts.append(prompt)
            completions.append(whole[len(prompt) :])
        return list(zip(self._ids(prompts), self._ids(completions), strict=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.processor(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss per token over the whole split, whatever its batches."""
        total, count = logits_of(prediction).sum(axis=0)
        loss = float(total / max(1, count))
        return {"token_loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}


def _spaced(prompt: str, completion: str) -> str:
    return completion if not prompt or prompt[-1].isspace() or completion[:1].isspace() else f" {completion}"


def _loss_and_count(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """For each row the loss over its completion and how many tokens that has: float64 [rows, 2]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=-100, reduction="none"
    )
    return torch.stack([loss.double().sum(dim=1), (targets != -100).double().sum(dim=1)], dim=1)
