"""Learning rates: grids and short trials on real models, which the command's defaults are made from and held against.

    python benchmarks/default_rates.py prepare --shared DATA --minilm FOLDER --out runs/rates
    python benchmarks/default_rates.py run --data runs/rates --models minilm --jobs 16 --seconds 540 --out rates.jsonl

`prepare` makes token and pixel arrays of GLUE, GSM8K, LLM-Adapters, CIFAR-10 and Flowers, and copies the models in 16
bits. `run` needs no data library: many small runs share a GPU, each in a process (CUDA MPS lets them overlap). It
writes one line of JSON for each run: a full run of three epochs with linear decay, or a trial of so many steps.
What does not fit the time is left out and said.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from default_data import SPLITS, prepare
from shared_runs import shared_run, work_through

EPOCHS, BATCH, WARMUP = 3.0, 16, 0.05


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process does."""

    task: str
    optimizer: str
    lr: float
    seed: int
    density: tuple[float, float] = (0.1, 0.04)
    head_lr: float | None = None
    steps: int | None = None  # a trial of so many; by default three epochs
    rule: bool = False  # the rate is found as the command finds it
    untied: bool = False  # a language model whose head is a copy of its embedding

    @property
    def name(self) -> str:
        share = f" {self.density[0]:g}-{self.density[1]:g}" if self.optimizer == "nanoadam" else ""
        what = f"{'rule ' * self.rule}{'untied ' * self.untied}{self.task} {self.optimizer}{share}"
        return f"{what} lr {self.lr:g} head {self.head_lr} steps {self.steps} #{self.seed}"


# Which tasks a model has, and how many training rows of each are used.
TASKS = {
    "minilm": {"cola": None, "sst2": 10_000, "boolq": None, "obqa-pairs": 4_000},
    "llama": {"gsm8k": None, "math": None, "obqa": None},
    "mobilenet": {"cifar10": None, "flowers12": None},
}
# The middle of each grid: (10 % falling to 4 %, 1 %, AdamW).
MIDDLE = {"minilm": (6e-4, 2.4e-3, 4e-5), "llama": (2e-3, 8e-3, 5e-4), "mobilenet": (1e-3, 4e-3, 3e-4)}


def plan(model: str) -> list[Run]:
    """In the order of what matters most; first what the command would do with nothing given."""
    tasks = list(TASKS[model])
    first = [Run(task, "nanoadam", 0.0, seed, rule=True) for seed in (0, 1, 2) for task in tasks]
    first += [Run(task, "adamw", 0.0, seed, rule=True) for seed in (0, 1, 2) for task in tasks]
    return first + heads(model) + grids(model)


def short(model: str) -> list[Run]:
    """What shows whether the rule does as well as the best of a grid: it, and five rates, 3 seeds each."""
    tasks, middle = list(TASKS[model]), MIDDLE[model][0]
    runs = [Run(task, "nanoadam", 0.0, seed, rule=True) for seed in (0, 1, 2) for task in tasks]
    for seed in (0, 1, 2):
        runs += [Run(task, "nanoadam", middle * f, seed) for task in tasks for f in (1, 3.3, 1.8, 0.33, 6)]
    return runs


def heads(model: str) -> list[Run]:
    """A head's own rate: of a new head, and of a pretrained one that is trained in full."""
    middle = {"minilm": 5e-4, "mobilenet": 1e-3}.get(model)
    if middle is None:
        runs = [Run("gsm8k", "nanoadam", lr, 0, head_lr=h, untied=True) for lr in (1e-3, 3e-3) for h in (None, lr / 12)]
        return [*runs, *(Run("gsm8k", "adamw", lr, 0, untied=True) for lr in (2.5e-4, 1e-3))]
    tasks = list(TASKS[model])[:2]
    return [
        Run(task, "nanoadam", middle, seed, head_lr=middle * factor)
        for seed in (0, 1)
        for task in tasks
        for factor in (0.2, 1, 5, 20)
    ]


def grids(model: str) -> list[Run]:
    """Full runs and trials at rates that are given."""
    tasks = list(TASKS[model])
    ten, one, adam = MIDDLE[model]
    runs: list[Run] = []
    for seed in (0, 1, 2):
        runs += [Run(t, "nanoadam", ten * f, seed) for t in tasks for f in (0.18, 0.33, 0.6, 1, 1.8, 3.3, 6)]
    for seed in (0, 1):
        runs += [
            Run(t, "nanoadam", ten * f, seed, steps=n)
            for t in tasks
            for n in (30, 60, 120)
            for f in (0.11, 0.33, 1, 3.3, 10)
        ]
    for seed in (0, 1):
        runs += [Run(t, "nanoadam", one * f, seed, (0.01, 0.01)) for t in tasks for f in (0.18, 0.33, 0.6, 1, 1.8, 3.3)]
        runs += [Run(t, "adamw", adam * f, seed) for t in tasks for f in (0.25, 0.5, 1, 2, 4)]
    for seed in (0, 1):
        runs += [
            dataclasses.replace(run, steps=60)
            for t in tasks
            for run in (
                *(Run(t, "nanoadam", one * f, seed, (0.01, 0.01)) for f in (0.11, 0.33, 1, 3.3, 10)),
                *(Run(t, "adamw", adam * f, seed) for f in (0.1, 0.33, 1, 3.3, 10)),
            )
        ]
    return runs


# One run --------------------------------------------------------------------------------------------------


class Task:
    """A model and rows on the device, made once in a process."""

    def __init__(self, folder: Path, model: str, task: str, device: Any) -> None:
        import torch

        self.kind, self.name, self.device, self.folder = model, task, device, folder / model
        arrays = dict(np.load(folder / model / f"{task}.npz"))
        self.splits = {}
        for split in SPLITS:
            labels = torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64))
            if model == "mobilenet":
                rows: Any = self._pixels(arrays, split)
            else:
                parts = np.split(arrays[f"{split}_ids"], arrays[f"{split}_ends"][:-1])
                rows = [torch.from_numpy(part.astype(np.int64)) for part in parts]
            second = arrays.get(f"{split}_second")
            self.splits[split] = (rows, labels, None if second is None else second.tolist())
        count = TASKS[model][task]
        self.order = list(range(len(self.splits["train"][1])))
        if count is not None and count < len(self.order):
            self.order = sorted(random.Random(0).sample(self.order, count))
        self.classes = int(self.splits["train"][1].max()) + 1

    def _pixels(self, arrays: dict[str, Any], split: str) -> Any:
        import torch
        from PIL import Image

        images = []
        for part in np.split(arrays[f"{split}_jpeg"], arrays[f"{split}_ends"][:-1]):
            with Image.open(io.BytesIO(part.tobytes())) as image:
                images.append(np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.BILINEAR)))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(self.device)

    def fresh(self, seed: int, untied: bool = False) -> Any:
        """The pretrained model with a new head drawn from the seed."""
        import torch
        import transformers
        from safetensors.torch import load_file

        torch.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(self.folder)
        state = {name: tensor.float() for name, tensor in load_file(self.folder / "model.safetensors").items()}
        if self.kind == "llama":
            if untied:
                config.tie_word_embeddings = False
                state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
            model = transformers.LlamaForCausalLM(config).float()
        elif self.kind == "minilm":
            config.num_labels = self.classes
            model = transformers.BertForSequenceClassification(config).float()
            state = {f"bert.{name}": tensor for name, tensor in state.items()}
        else:
            config.num_labels = self.classes
            model = transformers.MobileNetV1ForImageClassification(config).float()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.1
            state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
        model.load_state_dict(state, strict=False)
        return model.to(self.device)

    def batch(self, split: str, chosen: Sequence[int]) -> tuple[dict[str, Any], Any]:
        """Inputs and labels."""
        import torch

        rows, labels, second = self.splits[split]
        if self.kind == "mobilenet":
            pixels = rows[torch.tensor(chosen, device=self.device)].float() / 127.5 - 1
            if split == "train":
                flip = torch.rand(len(chosen), generator=self.generator) < 0.5
                pixels = torch.where(flip.to(self.device)[:, None, None, None], pixels.flip(3), pixels)
            return {"pixel_values": pixels}, labels[list(chosen)].to(self.device)
        parts = [rows[i] for i in chosen]
        longest = max(len(part) for part in parts)
        ids = torch.zeros(len(parts), longest, dtype=torch.long)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        targets = torch.full_like(ids, -100)
        for row, (i, part) in enumerate(zip(chosen, parts, strict=True)):
            ids[row, : len(part)] = part
            mask[row, : len(part)] = 1
            if second is not None:
                types[row, second[i] : len(part)] = 1
            if self.kind == "llama":
                start = int(labels[i])
                targets[row, start : len(part)] = part[start:]
        send = lambda t: t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t  # noqa: E731
        if self.kind == "llama":
            return {"input_ids": send(ids), "attention_mask": send(mask)}, send(targets)
        inputs = {"input_ids": send(ids), "attention_mask": send(mask), "token_type_ids": send(types)}
        return inputs, labels[list(chosen)].to(self.device)

    def loss(self, model: Any, split: str, chosen: Sequence[int]) -> tuple[Any, Any, int]:
        """Sum of the loss, logits or None, and over how much it is."""
        import torch

        inputs, labels = self.batch(split, chosen)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.kind == "llama"):
            logits = model(**inputs).logits
        if self.kind == "llama":
            targets = labels[:, 1:]
            total = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="sum"
            )
            return total, None, (targets != -100).sum()
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), (logits, labels), len(labels)

    def measure(
        self, model: Any, rows: int | None = None, split: str = "dev", chosen: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Loss, and for classifiers accuracy and Matthews correlation; of some rows."""
        import torch

        count = len(self.splits[split][1])
        if chosen is None:
            chosen = range(count) if rows is None or rows >= count else random.Random(0).sample(range(count), rows)
        chosen = list(chosen)
        size = 64 if self.kind == "llama" else 250
        if self.kind != "mobilenet":
            chosen.sort(key=lambda i: len(self.splits[split][0][i]))
        model.eval()
        total, over, guesses, labels = 0.0, 0, [], []
        with torch.no_grad():
            for start in range(0, len(chosen), size):
                loss, pair, n = self.loss(model, split, chosen[start : start + size])
                total, over = total + loss, over + n
                if pair is not None:
                    guesses.append(pair[0].argmax(-1))
                    labels.append(pair[1])
        model.train()
        found = {"loss": float(total / over)}
        if guesses:
            guess, label = torch.cat(guesses).cpu(), torch.cat(labels).cpu()
            found["accuracy"] = float((guess == label).double().mean())
            found["matthews"] = _matthews(guess, label, self.classes)
            found["majority"] = float(torch.bincount(label).max() / len(label))
        return found


def _matthews(guess: Any, label: Any, classes: int) -> float:
    import torch

    table = torch.bincount(label * classes + guess, minlength=classes**2).view(classes, classes).double()
    right, total = table.diagonal().sum(), table.sum()
    true, said = table.sum(1), table.sum(0)
    below = ((total**2 - (said**2).sum()) * (total**2 - (true**2).sum())).sqrt()
    return float((right * total - (true * said).sum()) / below) if below > 0 else 0.0


def batches(order: Sequence[int], seed: int, size: int = BATCH) -> Iterator[list[int]]:
    """Shuffled anew in each epoch, without end."""
    generator = random.Random(seed)
    while True:
        shuffled = generator.sample(list(order), len(order))
        for start in range(0, len(shuffled) - size + 1, size):
            yield shuffled[start : start + size]


def do(task: Task, run: Run, deadline: float) -> dict[str, Any] | None:
    """One line, or None where the time was over."""
    began = time.perf_counter()
    per_epoch = max(1, len(task.order) // BATCH)
    steps = run.steps or round(EPOCHS * per_epoch)
    more: dict[str, Any] = {}
    if run.rule:
        found = find(task, run, steps, deadline)
        if found is None:
            return None
        run, more = dataclasses.replace(run, lr=found["rate"]), found
    trained = train(task, run, task.order, steps, per_epoch, deadline)
    if trained is None:
        return None
    model, losses, evaluations = trained
    final = None if model is None else task.measure(model)
    return {**dataclasses.asdict(run), "model": task.kind, "total": steps, "losses": losses, "epochs": evaluations,
            "final": final, **more, "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def find(task: Task, run: Run, steps: int, deadline: float) -> dict[str, Any] | None:
    """The rate that `nanoadam finetune` would find, and the trials."""
    from nanoadam.finetuning import optimizers, search
    from nanoadam.finetuning.config import Config

    images = "image-classification" if task.kind == "mobilenet" else None
    config = Config(model="-", train="-", optimizer=run.optimizer, task=images)
    short = search.trial_steps(steps)
    if not short:
        return {"rate": optimizers.typical(config, steps), "trials": []}
    order = random.Random(run.seed).sample(task.order, len(task.order))
    held = min(512, len(order) // 4)
    late = False

    def loss_at(rate: float) -> float:
        nonlocal late
        trial = dataclasses.replace(run, lr=rate, steps=short)
        trained = train(task, trial, order[held:], short, max(1, len(task.order) // BATCH), deadline)
        late = late or trained is None
        if trained is None or trained[0] is None:
            return float("inf")
        return task.measure(trained[0], split="train", chosen=order[:held])["loss"]

    at, full = (optimizers.typical(config, count) for count in (short, steps))
    trials = search.search(loss_at, at)
    if late:
        return None
    return {"rate": search.best_of(trials, at) * full / at, "trials": trials, "trial_steps": short}


def train(
    task: Task, run: Run, order: Sequence[int], steps: int, per_epoch: int, deadline: float
) -> tuple[Any, list[float], dict[int, Any]] | None:
    """The model (None if it diverged), training losses by tens of steps, evaluations; None where the time was over."""
    import torch

    import nanoadam

    task.generator = torch.Generator().manual_seed(run.seed)
    model = task.fresh(run.seed, run.untied).train()
    groups = nanoadam.param_groups(model, head_lr=run.head_lr)
    if run.optimizer == "nanoadam":
        start, end = run.density
        intervals = nanoadam.recommended_intervals(per_epoch)
        shape = nanoadam.linear(start, end, total_steps=steps, interval=intervals.density_interval)
        density = start if start == end else shape
        optimizer: Any = nanoadam.NanoAdam(
            groups, lr=run.lr, density=density, mask_interval=intervals.mask_interval, seed=run.seed
        )
    else:
        options = [{"params": group["params"], **({"lr": group["lr"]} if "lr" in group else {})} for group in groups]
        optimizer = torch.optim.AdamW(options, lr=run.lr, weight_decay=0.0, fused=task.device.type == "cuda")
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    losses, block, evaluations = [], [], {}
    rows = batches(order, run.seed)
    for step in range(1, steps + 1):
        total, _, count = task.loss(model, "train", next(rows))
        loss = total / count
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        block.append(loss.detach())
        if step % 10 == 0 or step == steps:
            losses.append(round(float(torch.stack(block).mean()), 4))
            block = []
            if losses[-1] != losses[-1]:
                return None, losses, evaluations
            if time.time() > deadline:
                return None
        if run.steps is None and step % per_epoch == 0 and step < steps:
            evaluations[step] = task.measure(model, 640)
    return model, losses, evaluations


def serve(folder: str, model: str, jobs: Any, results: Any, deadline: float) -> None:
    """What a process does: runs until there are none or the time is over."""
    work_through(folder, model, jobs, results, deadline, Task, lambda task, run: do(task, run, deadline))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("--shared", type=Path, required=True, help="folder with glue, gsm8k, docs_llama_23m, ...")
    preparing.add_argument("--minilm", type=Path, required=True)
    preparing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--models", default="minilm", help="separated by commas")
    running.add_argument("--jobs", type=int, default=16)
    running.add_argument("--seconds", type=float, default=540)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--short", action="store_true", help="the rule against five rates, 3 seeds each")
    running.add_argument("--tasks", help="of those that the models have, separated by commas")
    running.add_argument("--only", help="a word that a run's name must hold")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.shared, arguments.minilm, arguments.out)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def chosen(model: str) -> list[Run]:
        runs = [run for run in (short if arguments.short else plan)(model) if (arguments.only or "") in run.name]
        return [run for run in runs if not arguments.tasks or run.task in arguments.tasks.split(",")]

    shared_run(arguments, chosen, serve)


if __name__ == "__main__":
    main()
