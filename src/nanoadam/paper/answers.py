"""Questions that a language model answers by writing: prompts, what counts as its answer, and how many are right.

Two formats: GSM8K (the answer is the final number, after "####") and the commonsense tests of LLM-Adapters (the answer
is one of a few words, the first of them that is written counts).

Sources: Cobbe et al. 2021, github.com/openai/grade-school-math; Hu et al. 2023, github.com/AGI-Edgerunners/LLM-Adapters
(commonsense_evaluate.py).
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

COMMONSENSE = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
}
"""The tests by the names of their folders, and the words that are answers."""

COLUMNS = {"gsm8k": ("question", "answer"), "commonsense": ("instruction", "output", "answer")}
"""What a row holds, as text, by format."""

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")

_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_INSTRUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Rows of a .json or .jsonl file, which may be packed (.xz).

    Args:
        path: of the file.
        columns: what each row must hold as text: an answer that is missing would be noticed after hours of training.

    Raises:
        ValueError: if there is no such file, it holds no rows, or one of them lacks a column.
    """
    found = next((p for p in places(path) if p.is_file()), None)
    if found is None:
        raise ValueError(f"there is no file {path}: --data names the folder that it is in")
    raw = found.read_bytes()
    try:
        text = (lzma.decompress(raw) if found.suffix == ".xz" else raw).decode("utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line] if ".jsonl" in found.name else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{found} is no JSON: {error.msg} in line {error.lineno}") from error
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{found} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{found} must hold a list of objects")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise ValueError(f"{found} must hold a text {column!r} in each row, and row {number} has none")
    return rows


def places(path: Path) -> tuple[Path, Path]:
    """Where `read_rows` looks: the file itself, and packed."""
    return path, path.with_name(f"{path.name}.xz")


# Formats ---------------------------------------------------------------------------------------------------


def gsm8k_prompt(row: Row) -> Row:
    """`{"prompt", "completion"}` of a row `{"question", "answer"}`."""
    return {"prompt": f"Question: {row['question'].strip()}\nAnswer:", "completion": f" {row['answer'].strip()}"}


def commonsense_prompt(row: Row) -> Row:
    """`{"prompt", "completion"}` of a row `{"instruction", "input", "output"}`, as LLM-Adapters words it."""
    template = _INSTRUCTION_WITH_INPUT if row.get("input") else _INSTRUCTION
    prompt = template.format(instruction=row["instruction"], input=row.get("input", ""))
    return {"prompt": prompt, "completion": row["output"]}


def number(text: str) -> Decimal | None:
    """The final number of a text: the first one after the first "####" where that stands, otherwise the last one.

    Thousands separators, dollar signs and zeros behind the decimal point do not matter: "$1,200.00" is 1200.
    """
    _, marked, after = text.partition("####")
    found = _NUMBER.findall(after if marked else text)
    if not found:
        return None
    return Decimal((found[0] if marked else found[-1]).replace(",", "").replace("$", "")).normalize()


def word(text: str, words: Sequence[str]) -> str | None:
    """The first of some words that is written, wherever in the text; case counts, as in LLM-Adapters' own script."""
    found = re.search("|".join(map(re.escape, words)), text)
    return found.group() if found else None


def gsm8k_right(text: str, row: Row) -> bool:
    """Whether the final number of a written answer is that of the row's."""
    expected = number(row["answer"])
    return expected is not None and number(text) == expected


def commonsense_right(text: str, row: Row, test: str) -> bool:
    """Whether the first word that is an answer in this test is the row's."""
    return word(text, COMMONSENSE[test]) == str(row["answer"])


# Models ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What a model writes after each prompt, taking the likeliest token each time; no special tokens.

    Prompts are tokenised as for training (`nanoadam.finetuning.tasks.CausalLM`): a first token where the tokenizer
    has one, nothing else added. A prompt longer than the model takes beside `new_tokens` loses its beginning.

    Args:
        model: a causal language model, on its device.
        tokenizer: with a padding token.
        prompts: any number.
        new_tokens: at most so many are written.
        batch_size: prompts at once, those of like length together.
        progress: told how many are done, of how many.
    """
    was_training = model.training
    model.eval()
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    most = (getattr(model.config, "max_position_embeddings", None) or 2**30) - new_tokens
    ids = [
        (start + own)[-most:] for own in tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = max(len(ids[i]) for i in chosen)
        inputs = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(inputs)
        for row, i in enumerate(chosen):  # padded on the left: what is written follows the last token
            inputs[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, longest - len(ids[i]) :] = 1
        written = model.generate(
            input_ids=inputs.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, tokens in zip(chosen, written[:, longest:], strict=True):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        if progress is not None:
            progress(first + len(chosen), len(order))
    model.train(was_training)
    return texts
