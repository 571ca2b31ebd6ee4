"""A Trainer whose processes share out each batch, so that several learn and measure what one does.

transformers gives each process batches of its own, fills the last ones up with rows that were there already, and so
learns something else with each number of processes. Here the batches are those of one process, in their order, and each
process takes its part of every one; a loss that is a mean counts by what it is the mean of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from nanoadam.finetuning import processes

IGNORED = -100
"""A label that no loss counts."""


def part_of(rows: list[int], rank: int, count: int) -> list[int]:
    """The rows of a batch that a process takes; for a part without any, the complement of the batch's first row."""
    own = rows[rank * len(rows) // count : (rank + 1) * len(rows) // count]
    return own or [~rows[0]]


class Parts(Sampler[list[int]]):
    """Of each batch of one process the part of this one."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            yield part_of(rows, processes.rank(), processes.count())

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def batch_sampler(self) -> Parts:
        """Where the Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The order of rows is another one in each epoch."""
        order: Any = self.batches.sampler
        order.set_epoch(epoch)


class Turns(Sampler[list[int]]):
    """Whole batches in turn; who gets none in the last round takes the first one again."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            place = number * processes.count() + processes.rank()
            yield self.batches[place if place < len(self.batches) else 0]

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / processes.count())


class Marked(Dataset[Any]):
    """Rows, with those that only keep a process company marked: they come by the complement of their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, bool]]:
        numbers = [~index if index < 0 else index for index in indices]
        several = getattr(self.rows, "__getitems__", None)
        rows = [self.rows[number] for number in numbers] if several is None else several(numbers)
        return list(zip(rows, (index < 0 for index in indices), strict=True))


class Company:
    """A collator of marked rows: what only keeps company has no labels."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, marked: list[tuple[Any, bool]]) -> Any:
        """The batch of a process."""
        batch = self._collator([row for row, _ in marked])
        if any(mark for _, mark in marked):
            labels = batch["labels"]
            batch["labels"] = torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORED)
        return batch


def counted(labels: Tensor) -> Tensor:
    """Which labels a loss is a mean over."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


class SharedTrainer:
    """In front of a Trainer. With one process it does nothing."""

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        if not processes.joined():
            return super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        me: Any = self
        rows, size = kwargs["dataset"], kwargs["batch_size"]
        if me.args.remove_unused_columns:
            rows = me._remove_unused_columns(rows, description=kwargs["description"])
        more = {"num_workers": me.args.dataloader_num_workers, "pin_memory": me.args.dataloader_pin_memory}
        if not kwargs.get("is_training"):
            turns = Turns(BatchSampler(SequentialSampler(rows), size, drop_last=False))
            return DataLoader(rows, batch_sampler=turns, collate_fn=me.data_collator, **more)
        order = SeedableRandomSampler(rows, data_seed=me.args.seed)  # as accelerate does with one process
        batches = Parts(BatchSampler(order, size, drop_last=False))
        return DataLoader(Marked(rows), batch_sampler=batches, collate_fn=Company(me.data_collator), **more)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of this process's part, weighed so that the mean over the processes is that of the whole batch."""
        me: Any = self
        if not processes.joined() or not model.training or kwargs.get("num_items_in_batch") is not None:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        mask = counted(inputs["labels"])
        own = (mask[..., 1:] if getattr(me, "_loss_shifts_labels", False) else mask).sum().float()
        weight = own * processes.count() / processes.total(own)
        labels = torch.where(own > 0, inputs["labels"], torch.zeros_like(inputs["labels"]))  # a mean over none is NaN
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs) * weight  # type: ignore[misc]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Whole batches in turn, put into their order: what one process predicts, on all."""
        if not processes.joined():
            found: EvalLoopOutput = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            return found
        me: Any = self
        model = me.model
        model.eval()
        turns: Turns = dataloader.batch_sampler
        mine, across = [], me.args.average_tokens_across_devices
        me.args.average_tokens_across_devices = False  # these are whole batches
        try:
            for inputs in dataloader:
                with me.accelerator.autocast():
                    loss, logits, labels = me.prediction_step(model, inputs, False, ignore_keys=ignore_keys)
                if me.preprocess_logits_for_metrics is not None:
                    logits = me.preprocess_logits_for_metrics(logits, labels)
                mine.append(send_to_device(nested_detach((loss, logits, labels)), "cpu"))  # type: ignore[no-untyped-call]
        finally:
            me.args.average_tokens_across_devices = across
        everybody = processes.gathered(mine)
        ordered = [each for number in zip(*everybody, strict=True) for each in number][: len(turns.batches)]
        losses, predictions, label_ids = (EvalLoopContainer(True, padding_index=IGNORED) for _ in range(3))
        for rows, (loss, logits, labels) in zip(turns.batches, ordered, strict=True):
            losses.add(loss.reshape(1).repeat(len(rows)))
            predictions.add(logits)
            label_ids.add(labels)
        arrays = [container.get_arrays() for container in (losses, predictions, label_ids)]  # type: ignore[no-untyped-call]
        return me._measured(arrays, len(dataloader.dataset), metric_key_prefix)  # type: ignore[no-any-return]

    def _measured(self, arrays: list[Any], count: int, prefix: str) -> EvalLoopOutput:
        """The same as the Trainer's last lines."""
        from transformers import EvalPrediction

        me: Any = self
        losses, predictions, labels = arrays
        metrics = dict(me.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels)))
        metrics = {"loss": float(losses.mean()), **denumpify_detensorize(metrics)}  # type: ignore[no-untyped-call]
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=metrics, num_samples=count)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One backward pass; where a loss is not finite, no process gives back one that is."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not processes.joined():
            return loss
        whole = processes.total(loss)
        return torch.where(torch.isfinite(whole), loss, whole)
