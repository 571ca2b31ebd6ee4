"""Language models: a prompt and its completion, a conversation, or plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, EvalPrediction

from nanoadam.finetuning import columns, labels, models
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.data import Split
from nanoadam.finetuning.tasks.base import (
    Task,
    lengths,
    logits_of,
    refuse_long,
    refuse_unknown_tokens,
    sequence_limit,
    shortened,
)

LEARNED = {
    "chat": "the last message of each conversation",
    "completion": "the completion alone, not the prompt",
    "text": "every token",
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "system": "system", "tool": "tool"}  # fmt: skip
"""Who speaks: ShareGPT's names and those of chat templates."""


class CausalLM(Task):
    """The loss is on completions, last messages or whole texts."""

    metrics: ClassVar[dict[str, bool]] = {"token_loss": False, "perplexity": False}

    def __init__(self, config: Config, train: Split, validation: Split) -> None:
        self._config = config
        self.kind, self.roles = columns.of_completions(train.name, train.rows, config)
        for name in self.roles.read:
            if self.kind != "text" or not validation.plain:
                validation.column(name, name, ())
        self.splits = (train, validation)
        self.processor = models.load_tokenizer(config)
        if self.kind == "chat" and not self.processor.chat_template:
            raise ValueError(
                f"the tokenizer of {config.model} has no chat template: give prompts and completions instead"
            )
        if config.label_smoothing and config.packing:
            raise ValueError("label_smoothing does not go with packing: leave out one")
        self.model = models.load_model(config)
        self._refuse_foresight()
        self._cache = getattr(self.model.config, "use_cache", None)
        # Training needs no cache, and with one transformers takes packed rows for one that sees all of itself.
        self.model.config.use_cache = False
        self._limit = sequence_limit(config, self.model, self.processor)
        self.train, self.validation = self.encoded(config, train, validation)
        self.collator = self._collator()
        self.preprocess_logits = _loss_and_count
        self.keeps_columns = config.packing
        self.description = {
            "columns": list(self.roles.read),
            "ignored": list(self.roles.ignored),
            "most_tokens": self._limit,
            "tokens": lengths(self.train["input_ids"]),
            "loss": f"on {LEARNED[self.kind]}",
            **({"packed": f"into {len(self.train)} sequences"} if self.kind == "text" else {}),
        }

    @torch.no_grad()
    def _refuse_foresight(self) -> None:
        """An encoder takes the place of a decoder without complaint, and learns to copy what it is to foretell."""
        device, training = next(self.model.parameters()).device, self.model.training
        ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]], device=device) % self.model.config.get_text_config().vocab_size
        self.model.train(False)
        try:
            one, other = self.model(input_ids=ids).logits[:, :-1].float()
        finally:
            self.model.train(training)
        if float((one - other).abs().max()) > 1e-3 * float(one.abs().max()):
            raise ValueError(
                f"{self._config.model} is no language model: what it says of a token depends on the tokens after it, "
                "as in BERT; name one that writes from left to right, or another --task"
            )

    def _collator(self) -> Any:
        if self._config.packing:
            return DataCollatorWithFlattening()  # type: ignore[no-untyped-call]  # one sequence; positions begin anew, and attention stays within a row
        return DataCollatorForSeq2Seq(self.processor, padding=True, label_pad_token_id=-100)

    def finish(self) -> None:
        """The cache is for generation."""
        if self._cache is not None:
            self.model.config.use_cache = self._cache

    def encode(self, split: Split) -> Dataset:
        """Tokens, with no label where there is no loss."""
        if self.kind == "text":
            return self._blocks(split)
        pairs = self._chats(split) if self.kind == "chat" else self._prompts(split)
        if not self._config.truncate:
            refuse_long([len(prompt) + len(completion) for prompt, completion in pairs], self._limit, split)
        rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for index, (prompt, completion) in enumerate(pairs):
            if not completion:
                raise ValueError(f"{split.where(index)} has nothing to learn from: what is learned of it is empty")
            completion = completion[: self._limit - 1]  # one token to predict the first of it from
            prompt = prompt[max(0, len(prompt) + len(completion) - self._limit) :]
            rows["input_ids"].append(prompt + completion)
            rows["attention_mask"].append([1] * (len(prompt) + len(completion)))
            rows["labels"].append([-100] * len(prompt) + completion)
        refuse_unknown_tokens(rows["input_ids"], self.model, self.processor, split)
        if self._config.packing:
            del rows["attention_mask"]
        return Dataset.from_dict(rows)

    def _blocks(self, split: Split) -> Dataset:
        """Texts one after the other, cut into sequences as long as the model takes."""
        column = self.roles.texts[0] if self.roles.texts[0] in split.rows.column_names else "text"
        texts = labels.texts(split, column)
        if split.plain:
            texts = ["\n\n".join(texts)]
        end = [self.processor.eos_token_id] if self.processor.eos_token_id is not None else []
        start = [self.processor.bos_token_id] if self.processor.bos_token_id is not None else []
        limit = min(self._limit, self._config.max_length or 1024)
        encoded = self._ids(texts)
        refuse_unknown_tokens(encoded, self.model, self.processor, split)
        stream: list[int] = []
        for ids in encoded:
            stream += start + ids + end
        blocks = [stream[i : i + limit] for i in range(0, len(stream), limit)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise ValueError(f"{split.name} holds no text to learn from")
        masks = {} if self._config.packing else {"attention_mask": [[1] * len(block) for block in blocks]}
        return Dataset.from_dict({"input_ids": blocks, **masks, "labels": blocks})

    def _prompts(self, split: Split) -> list[tuple[list[int], list[int]]]:
        completions = labels.texts(split, str(self.roles.label))
        parts = [
            labels.texts(split, name, empty=number > 0) for number, name in enumerate(self.roles.texts)
        ]  # fmt: skip
        prompts = ["\n\n".join(part for part in row if part) for row in zip(*parts, strict=True)]
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
        for index, raw in enumerate(split.rows[self.roles.texts[0]]):
            messages = self._messages(raw, split, index)
            try:
                prompt = self.processor.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
                whole = self.processor.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # a template is a program of the model's makers: it raises what it likes
                raise ValueError(
                    f"{split.where(index)}: the chat template of {self._config.model} refuses it: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
            if not whole.startswith(prompt):
                raise ValueError(f"the chat template of {self._config.model} rewrites earlier messages: give prompts "
                                 "and completions instead")  # fmt: skip
            prompts.append(prompt)
            completions.append(whole[len(prompt) :])
        return list(zip(self._ids(prompts), self._ids(completions), strict=True))

    def _messages(self, raw: Any, split: Split, index: int) -> list[dict[str, str]]:
        """{role, content} of a row, the last of which is learned."""
        messages = messages_of(raw)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{split.where(index)} must be a list of at least two {{role, content}} that ends with the assistant's"
            )
        return messages

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.processor(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss per token over the whole split, whatever its batches."""
        total, count = logits_of(prediction).sum(axis=0)
        loss = float(total / max(1, count))
        return {"token_loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def details(self, prediction: EvalPrediction, samples: int) -> dict[str, Any]:
        """What the model writes after some prompts, and its loss there, from the best to the worst."""
        sums = logits_of(prediction)
        if self.kind == "text" or len(sums) != len(self.validation) or not samples:
            return {}
        means = sums[:, 0] / np.maximum(1, sums[:, 1])
        order = np.argsort(means, kind="stable")
        rows = []
        for i in order[np.linspace(0, len(order) - 1, min(samples, len(order))).round().astype(int)]:
            row = self.validation[int(i)]
            learned = [token for token in row["labels"] if token != -100]
            prompt = row["input_ids"][: len(row["input_ids"]) - len(learned)]
            rows.append(
                {"text": shortened(self._text(prompt)), "label": shortened(self._text(learned)),
                 "predicted": shortened(self._written(prompt, len(learned))), "loss": float(means[i])}
            )  # fmt: skip
        return {"samples": rows}

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode(list(ids), skip_special_tokens=True))

    @torch.no_grad()
    def _written(self, prompt: Sequence[int], length: int) -> str:
        """What it writes after a prompt, the likeliest token each time; a little longer than the right answer."""
        room = max(1, min(96, length + 16, self._limit - len(prompt)))
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(prompt)], device=device)
        training = self.model.training
        self.model.train(False)
        try:
            made: Any = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                pad_token_id=self.processor.pad_token_id,
            )  # fmt: skip
        finally:
            self.model.train(training)
        return self._text(made[0, len(prompt) :].tolist())


def messages_of(raw: Any) -> list[dict[str, str]]:
    """{role, content} of a conversation, also from ShareGPT's {from, value}; nothing where it is no conversation."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            return []
    messages = []
    for message in raw if isinstance(raw, list) else ():
        if isinstance(message, dict):
            role, content = message.get("role") or message.get("from"), message.get("content")
            content = message.get("value") if content is None else content
            if isinstance(role, str) and isinstance(content, str):
                messages.append({"role": ROLES.get(role.lower(), role), "content": content})
    return messages if isinstance(raw, list) and len(messages) == len(raw) else []


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
