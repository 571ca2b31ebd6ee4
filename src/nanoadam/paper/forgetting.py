"""Two tasks in sequence, and what is left of the first: the pieces of the paper's tables 4, 5 and 18 to 22.

A model learns task 1; its head is kept. It gets a new head and learns task 2. Then the head of task 1 is put back as it
was, and task 1 is measured again: forgetting is the drop.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from nanoadam.finetuning.config import Config

Head = dict[str, nn.Module]
"""The parts of a model outside its backbone, by name."""


def head_of(model: PreTrainedModel) -> Head:
    """Everything but the backbone: the modules themselves."""
    return {name: part for name, part in model.named_children() if name != model.base_model_prefix}


def put_head(model: PreTrainedModel, head: Head) -> None:
    """Give a model another head."""
    for name, part in head.items():
        setattr(model, name, part)


def new_head(model: PreTrainedModel, classes: int, seed: int) -> Head:
    """A head for so many classes, drawn as transformers draws it, on the model's device."""
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(model)(config)
    return {name: part.to(model.device) for name, part in head_of(untrained).items()}


def backbone(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of the backbone's weights, without buffers."""
    return {name: p.detach().clone() for name, p in model.base_model.named_parameters()}


def shift(model: PreTrainedModel, before: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far the backbone is from where it was.

    Returns:
        `l2`: of the whole change; `mean_l2`: mean over tensors of each one's; `touched`: share of weights whose bits
        differ; `tensors`: `{name: l2}` of the tensors of two dimensions or more.
    """
    squares, changed, total = {}, torch.zeros((), dtype=torch.long, device=model.device), 0
    for name, now in model.base_model.named_parameters():
        squares[name] = (now.detach() - before[name]).double().square().sum()
        changed += (now.detach() != before[name]).sum()
        total += now.numel()
    distances = dict(zip(squares, torch.stack(list(squares.values())).sqrt().tolist(), strict=True))
    wide = {name for name, p in before.items() if p.ndim > 1}
    return {
        "l2": math.sqrt(sum(d * d for d in distances.values())),
        "mean_l2": sum(distances.values()) / len(distances),
        "touched": int(changed) / total,
        "tensors": {name: d for name, d in distances.items() if name in wide},
    }


def scores(task1: float, task2: float, task1_after: float) -> dict[str, float]:
    """A row of table 4, as shares: both tasks, task 1 afterwards, the mean of these three, the drop."""
    return {
        "task1": task1,
        "task2": task2,
        "task1_after": task1_after,
        "average": (task1 + task2 + task1_after) / 3,
        "forgetting": task1 - task1_after,
    }


def run(first: Config, second: Config, out: Path) -> dict[str, Any]:
    """Two finetuning runs, each with a folder of its own in `out`, and task 1 measured again with its own head.

    Goes on with what is in `out` already.

    Args:
        first: task 1.
        second: task 2; its model gives way to the backbone that task 1 has left, and its head is new.
        out: for the folders `task1`, `start` (that backbone) and `task2`.

    Returns:
        `scores` (of the validation splits' accuracy), and the backbone's `shift` from where it was before task 2
        (`moved`) and from the pretrained weights (`pretrained`).
    """
    from nanoadam.finetuning import models  # they need the extras; the rest of this does not
    from nanoadam.finetuning import run as finetune

    learned = finetune.ensure(first, out / "task1")
    again = dataclasses.replace(
        first,
        model=str(out / "task1" / "model"),
        init_from_config=False,
        new_head=False,
        optimizer="adamw",
        optimizer_options=(),
    )
    job = finetune.prepare(again)
    model: Any = job.task.model
    model.base_model.save_pretrained(out / "start")
    job.task.processor.save_pretrained(out / "start")
    start = backbone(model)
    second = dataclasses.replace(second, model=str(out / "start"), init_from_config=False)
    changed = finetune.ensure(second, out / "task2")
    last: Any = models.load_model(dataclasses.replace(second, model=str(out / "task2" / "model")))
    model.base_model.load_state_dict(last.base_model.state_dict())
    after = _accuracy(job, model)
    pretrained: Any = models.load_model(dataclasses.replace(first, new_head=True))
    return {
        **scores(learned["final"]["accuracy"], changed["final"]["accuracy"], after),
        "moved": shift(model, start),
        "pretrained": shift(model, backbone(pretrained)),
    }


@torch.no_grad()
def _accuracy(job: Any, model: Any) -> float:
    """Of a model on the validation split of a job."""
    rows, size = job.task.validation, job.config.eval_batch_size
    device = torch.device("cuda" if torch.cuda.is_available() and job.config.device == "auto" else "cpu")
    model.to(device).eval()
    right = 0
    for first in range(0, len(rows), size):
        batch = job.task.collator([rows[i] for i in range(first, min(first + size, len(rows)))])
        labels = batch.pop("labels")
        logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
        right += int((logits.argmax(dim=-1).cpu() == labels).sum())
    model.to("cpu")
    return right / len(rows)
