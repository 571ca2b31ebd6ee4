"""Which columns: what a finetune learns against what it forgets, by rule of selection, beside AdamW and PEFT's methods.

    python benchmarks/column_fronts.py prepare --shared DATA --rates runs/rates --minilm FOLDER --out runs/columns
    python benchmarks/column_fronts.py run --data runs/columns --models llama --jobs 14 --seconds 280 --out fronts.jsonl
    python benchmarks/column_fronts.py show fronts.jsonl

The tasks are a small pretrained Llama on GSM8K's answers (kept: loss on held-out documentation) and MiniLM on CoLA and
SST-2 (kept: which answer belongs to which question of GSM8K, recall at 1). Each run is measured as it is and with a
part of its change only: base + a x change. `run` needs no data library and shares a GPU between many processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import lzma
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import default_rates as rates
import numpy as np
import torch
from torch import Tensor, nn

import nanoadam

BATCH, WARMUP, HEAD_RATE = 32, 0.05, 1e-3
PARTS = (0.5, 0.75, 1.0)
"""How much of the change is kept."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way to finetune; of NanoAdam's, which weights are selected and when."""

    kind: str = "nanoadam"  # or adamw, masked (AdamW on a mixture of columns and single weights), or one of PEFT's
    granularity: str = "column"
    density: tuple[float, float] = (0.1, 0.1)
    criterion: str = "smallest"
    once: bool = False  # chosen at the start and not again
    rows: str = ""  # parts of the names of matrices whose rows are selected, "all" for each
    inputs: bool = False  # norms weighted by the layer's mean input
    depth: tuple[float, float] | None = None  # densities of the first layer and of the last
    rates: tuple[float, ...] = ()


def column(rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3), **options: Any) -> Rule:
    return Rule(rates=rates, **options)


def weight(*rates: float, **options: Any) -> Rule:
    return Rule(granularity="weight", rates=rates, **options)


FOUR = (3e-4, 1e-3, 3e-3, 1e-2)
FIVE = (*FOUR, 3e-2)
LLAMA: dict[str, Rule] = {
    "adamw": Rule("adamw", rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "lora r=32": Rule("lora", rates=FOUR),
    "columns 10 %, largest": column(FIVE, criterion="largest"),
    "columns 10 %, largest, once": column(FIVE, criterion="largest", once=True),
    "columns 25 %, largest, once": column(FOUR, density=(0.25, 0.25), criterion="largest", once=True),
    "columns 25 %, largest": column(FOUR, density=(0.25, 0.25), criterion="largest"),
    "columns 50 %, largest, once": column(FOUR, density=(0.5, 0.5), criterion="largest", once=True),
    "weights 10->4 %": weight(*FIVE, density=(0.1, 0.04)),
    "weights 10 %": weight(*FIVE),
    "columns 10 %": column(FOUR),
    "columns 10 %, random, once": column(FIVE, criterion="random", once=True),
    "columns 10 %, largest, + weights 1 %, once": Rule("masked", criterion="largest", rates=FIVE, once=True),
    "columns 5 to 15 % by depth, largest, once": column(FIVE, criterion="largest", once=True, depth=(0.05, 0.15)),
    "columns 15 to 5 % by depth, largest, once": column(FIVE, criterion="largest", once=True, depth=(0.15, 0.05)),
    "weights 1 %": weight(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, density=(0.01, 0.01)),
    "shira r=32": Rule("shira", rates=(1e-3, 3e-3, 1e-2, 3e-2)),
    "supertuning 10 %, smallest": Rule("supertuning", rates=FIVE),
    "oft": Rule("oft", rates=FIVE),
}
MORE_LLAMA: dict[str, Rule] = {
    "columns 10 %, once": column((1e-3, 3e-3, 1e-2, 3e-2), once=True),
    "columns 10 %, random": column(FOUR, criterion="random"),
    "columns 25 %": column(FOUR, density=(0.25, 0.25)),
    "columns 10 %, inputs smallest, once": column(FIVE, inputs=True, once=True),
    "columns 10 %, inputs largest, once": column(FIVE, inputs=True, once=True, criterion="largest"),
    "rows 10 %": column(FOUR, rows="all"),
    "rows and columns coupled 10 %": column(FOUR, rows="q_proj k_proj v_proj gate_proj up_proj"),
    "columns 10->4 %": column(FOUR, density=(0.1, 0.04)),
    "columns 5 %": column((1e-3, 3e-3, 1e-2, 3e-2), density=(0.05, 0.05)),
    "columns 2 %": column((1e-3, 3e-3, 1e-2, 3e-2), density=(0.02, 0.02)),
}
SLOW = (1e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)
MINILM: dict[str, Rule] = {
    "adamw": Rule("adamw", rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4)),
    "lora r=32": Rule("lora", rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    "weights 10->4 %": weight(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3, density=(0.1, 0.04)),
    "columns 10 %, largest": column(SLOW[:4], criterion="largest"),
    "columns 10 %, largest, once": column(SLOW, criterion="largest", once=True),
    "columns 10 %": column(SLOW),
    "columns 10 %, random, once": column(SLOW[:4], criterion="random", once=True),
    "weights 10 %": weight(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3),
    "weights 1 %": weight(6e-4, 1.2e-3, 2.4e-3, 4.8e-3, density=(0.01, 0.01)),
    "shira r=32": Rule("shira", rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3)),
    "supertuning 10 %, smallest": Rule("supertuning", rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3)),
    "oft": Rule("oft", rates=(1e-4, 3e-4, 1e-3, 3e-3)),
}
MORE_MINILM: dict[str, Rule] = {
    "columns 10 %, once": column(SLOW[:4], once=True),
    "columns 10 %, random": column(SLOW[:4], criterion="random"),
    "columns 10 %, inputs smallest, once": column(SLOW[:4], inputs=True, once=True),
    "rows 10 %": column(SLOW[:4], rows="all"),
    "columns 25 %": column((3e-5, *SLOW[:3]), density=(0.25, 0.25)),
    "columns 25 %, largest, once": column((3e-5, *SLOW[:4]), density=(0.25, 0.25), criterion="largest", once=True),
    "columns 25 %, random, once": column((3e-5, *SLOW[:4]), density=(0.25, 0.25), criterion="random", once=True),
    "columns 2 %": column(SLOW[1:], density=(0.02, 0.02)),
}
EPOCHS = {"gsm8k": 1, "cola": 3, "sst2": 2}
TASKS = {"llama": ("gsm8k",), "minilm": ("cola", "sst2")}
RULES = {"llama": (LLAMA, MORE_LLAMA), "minilm": (MINILM, MORE_MINILM)}
"""Those that are compared first, at all seeds, and the others."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process does."""

    task: str
    rule: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task} {self.rule} lr {self.lr:g} #{self.seed}"


def plan(model: str, seeds: Sequence[int]) -> list[Run]:
    """The rules that are compared first at all seeds, then the others."""
    return [
        Run(task, name, rate, seed)
        for rules in RULES[model]
        for seed in seeds
        for name, rule in rules.items()
        for task in TASKS[model]
        for rate in rule.rates
    ]


def rule_of(model: str, name: str) -> Rule:
    first, others = RULES[model]
    return {**first, **others}[name]


# Data, once, where the sources are ------------------------------------------------------------------------


def prepare(shared: Path, made: Path, minilm: Path, out: Path) -> None:
    """The arrays of `default_rates.py prepare`, and those of what shall be kept."""
    from transformers import AutoTokenizer

    for model, tasks in TASKS.items():
        (out / model).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", *(f"{task}.npz" for task in tasks)):
            (out / model / name).write_bytes((made / model / name).read_bytes())
    text = lzma.decompress((shared / "docs_llama_23m" / "docs_heldout.txt.xz").read_bytes()).decode()
    tokenizer = AutoTokenizer.from_pretrained(shared / "docs_llama_23m")
    ids = tokenizer(text[:1_600_000], add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + 512] for start in range(0, len(ids) - 511, 512)][:256]
    np.savez_compressed(out / "llama" / "kept.npz", ids=np.array(windows, np.uint16))
    lines = lzma.decompress((shared / "gsm8k" / "test.jsonl.xz").read_bytes()).decode().splitlines()[:500]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    arrays: dict[str, Any] = {}
    for key in ("question", "answer"):
        found = tokenizer([json.loads(line)[key] for line in lines], padding=True, truncation=True, max_length=128)
        arrays |= {key: np.array(found["input_ids"], np.uint16), f"{key}_mask": np.array(found["attention_mask"], bool)}
    np.savez_compressed(out / "minilm" / "kept.npz", **arrays)


# One run --------------------------------------------------------------------------------------------------


class Job(rates.Task):
    """A model, its rows, and what it shall not forget."""

    def __init__(self, folder: Path, model: str, task: str, device: Any) -> None:
        super().__init__(folder, model, task, device)
        arrays = dict(np.load(folder / model / "kept.npz"))
        self.kept = {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in arrays.items()}

    @torch.no_grad()
    def kept_now(self, model: Any) -> float:
        """Loss per token of the documentation; of a classifier, recall at 1 of answers by questions."""
        model.eval()
        if self.kind == "llama":
            total = 0.0
            for ids in self.kept["ids"].split(32):
                with torch.autocast(self.device.type, torch.bfloat16):
                    logits = model(input_ids=ids).logits
                total += nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:]) * len(ids)
            model.train()
            return float(total / len(self.kept["ids"]))
        sides = []
        for side in ("question", "answer"):
            parts = []
            for ids, mask in zip(self.kept[side].split(250), self.kept[f"{side}_mask"].split(250), strict=True):
                hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
                parts.append(nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=-1))
            sides.append(torch.cat(parts))
        model.train()
        found = (sides[0] @ sides[1].t()).argmax(1)
        return float((found == torch.arange(len(found), device=found.device)).double().mean())

    def outcome(self, model: Any) -> dict[str, float]:
        return {**self.measure(model), "kept": self.kept_now(model)}


def tune(job: Job, run: Run) -> dict[str, Any]:
    """One line: what was learned and what was kept, with parts of the change."""
    began = time.perf_counter()
    rule = rule_of(job.kind, run.rule)
    per_epoch = len(job.order) // BATCH
    steps = EPOCHS[run.task] * per_epoch
    job.generator = torch.Generator().manual_seed(run.seed)
    model = job.fresh(run.seed).train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    order = rates.batches(job.order, run.seed, BATCH)
    trained, optimizer = _prepared(job, model, rule, run, steps, per_epoch)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    losses = []
    for step in range(1, steps + 1):
        total, _, count = job.loss(trained, "train", next(order))
        loss = total / count
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            losses.append(round(float(loss.detach()), 4))
    peak = torch.cuda.max_memory_allocated() if job.device.type == "cuda" else None
    model = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    after = {name: value.detach().clone() for name, value in _original(model).items()}
    changed = [name for name in before if "classifier" not in name and before[name].is_floating_point()]
    parts = {}
    for part in PARTS:
        with torch.no_grad():
            for name, value in _original(model).items():
                if name in changed:
                    value.copy_(before[name] + part * (after[name] - before[name]))
        parts[f"{part:g}"] = job.outcome(model)
    moved = sum(int((after[name] != before[name]).sum()) for name in changed)
    return {
        **dataclasses.asdict(run),
        "model": job.kind,
        "steps": steps,
        "losses": losses,
        "parts": parts,
        "l2_moved": float(sum((after[n] - before[n]).double().square().sum() for n in changed).sqrt()),
        "moved": moved / sum(before[name].numel() for name in changed),
        "peak_bytes": peak,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _original(model: Any) -> dict[str, Tensor]:
    """The state of a model that PEFT has wrapped and unwrapped, under its first names."""
    return {name.replace(".modules_to_save.default", ""): value for name, value in model.state_dict().items()
            if ".original_module" not in name}  # fmt: skip


def _prepared(job: Job, model: Any, rule: Rule, run: Run, steps: int, per_epoch: int) -> tuple[Any, Any]:
    """The model to train and its optimizer."""
    head = HEAD_RATE if job.kind == "minilm" else None
    fused = job.device.type == "cuda"
    if rule.kind == "nanoadam":
        optimizer = _nanoadam(job, model, rule, run, steps, per_epoch, head)
        return model, optimizer
    if rule.kind == "masked":
        _mask(model, rule)
    elif rule.kind != "adamw":
        model = _adapted(model, rule, job.kind)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    heads = [p for name, p in trainable if head and "classifier" in name]
    body = [p for name, p in trainable if not (head and "classifier" in name)]
    groups = [{"params": body}, *([{"params": heads, "lr": head}] if heads else [])]
    return model, torch.optim.AdamW(groups, lr=run.lr, weight_decay=0.0, fused=fused)


@torch.no_grad()
def _mask(model: Any, rule: Rule) -> None:
    """Let AdamW see gradients of whole columns and of the smallest 1 % of the other weights alone, for all matrices."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or "classifier" in name or name == "lm_head":
            continue
        weight = module.weight
        mask = torch.zeros_like(weight, dtype=torch.bool)
        count = max(1, round(rule.density[0] * weight.shape[1]))
        if isinstance(module, nn.Linear):
            norms = weight.square().sum(0)
            mask[:, norms.topk(count, largest=rule.criterion == "largest").indices] = True
        else:  # an embedding has no columns: single weights, as the column rules do there
            mask.view(-1)[
                weight.abs().view(-1).topk(round(rule.density[0] * weight.numel()), largest=False).indices
            ] = True
        rest = weight.abs().masked_fill(mask, torch.inf).view(-1)
        mask.view(-1)[rest.topk(round(0.01 * weight.numel()), largest=False).indices] = True

        def hide(parameter: Tensor, mask: Tensor = mask) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)

        weight.register_post_accumulate_grad_hook(hide)


def _adapted(model: Any, rule: Rule, kind: str) -> Any:
    import peft

    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    where = {"target_modules": [name for name in linear if name not in ("lm_head", "classifier")]}
    if kind == "minilm":
        where["modules_to_save"] = ["classifier"]
    config = {
        "lora": lambda: peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, **where),
        "shira": lambda: peft.ShiraConfig(r=32, **where),
        "oft": lambda: peft.OFTConfig(oft_block_size=32, **where),
        "supertuning": lambda: peft.SupertuningConfig(sparsity=1 - rule.density[0], select_top=False, **where),
    }[rule.kind]()
    return peft.get_peft_model(model, config)


def _nanoadam(
    job: Job, model: Any, rule: Rule, run: Run, steps: int, per_epoch: int, head: float | None
) -> nanoadam.NanoAdam:
    groups = nanoadam.param_groups(model, head_lr=head, granularity=rule.granularity)
    if rule.rows:
        groups = _with_rows(model, groups, rule.rows)
    if rule.depth:
        groups = _by_depth(model, groups, *rule.depth)
    intervals = nanoadam.recommended_intervals(per_epoch)
    start, end = rule.density
    shape = nanoadam.linear(start, end, total_steps=steps, interval=intervals.density_interval)
    optimizer = nanoadam.NanoAdam(
        groups,
        lr=run.lr,
        density=start if start == end else shape,
        mask_interval=10**9 if rule.once else intervals.mask_interval,
        criterion=rule.criterion,
        seed=run.seed,
    )
    if rule.inputs:
        _weighted(job, model, optimizer)
    return optimizer


def _with_rows(model: Any, groups: list[dict[str, Any]], names: str) -> list[dict[str, Any]]:
    """Matrices with such names select rows: to the optimizer they are matrices whose inputs come first."""
    linear = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    wanted = {key for key, name in linear.items() if names == "all" or any(part in name for part in names.split())}
    found = []
    for group in groups:
        mine = [i for i, p in enumerate(group["params"]) if id(p) in wanted]
        if group.get("dense") or not mine:
            found.append(group)
            continue
        rest = [i for i in range(len(group["params"])) if i not in mine]
        listed = [key for key, value in group.items() if isinstance(value, list) and len(value) == len(group["params"])]
        for members, transposed in ((rest, False), (mine, True)):
            if members:
                found.append({**group, **{key: [group[key][i] for i in members] for key in listed}})
                found[-1]["transposed"] = transposed
    return found


def _by_depth(model: Any, groups: list[dict[str, Any]], first: float, last: float) -> list[dict[str, Any]]:
    """A density for each layer, on a straight line."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = model.config.num_hidden_layers

    def density(parameter: Tensor) -> float | None:
        numbers = [int(part) for part in names[id(parameter)].split(".") if part.isdigit()]
        return first + (last - first) * numbers[0] / (layers - 1) if numbers else None

    found = []
    for group in groups:
        each = [None if group.get("dense") else density(p) for p in group["params"]]
        listed = [key for key, value in group.items() if isinstance(value, list) and len(value) == len(group["params"])]
        for wanted in dict.fromkeys(each):
            mine = [i for i, value in enumerate(each) if value == wanted]
            found.append({**group, **{key: [group[key][i] for i in mine] for key in listed}})
            if wanted is not None:
                found[-1]["density"] = wanted
    return found


@torch.no_grad()
def _weighted(job: Job, model: Any, optimizer: nanoadam.NanoAdam) -> None:
    """Select by |column| x root mean square of its input, over a few batches, as Wanda scores weights."""
    sums: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().reshape(-1, inputs[0].shape[-1])
        sums[module] = sums.get(module, 0) + x.square().sum(0)

    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in name]
    handles = [m.register_forward_pre_hook(look) for m in linear]
    for start in range(0, 128, BATCH):
        job.loss(model, "train", job.order[start : start + BATCH])
    for handle in handles:
        handle.remove()
    kept = [module.weight.clone() for module in linear]
    for module in linear:
        if module in sums:
            module.weight.mul_(sums[module].sqrt().to(module.weight.dtype))
    optimizer.refresh()
    for module, weight in zip(linear, kept, strict=True):
        module.weight.copy_(weight)


def serve(folder: str, model: str, jobs: Any, results: Any, deadline: float) -> None:
    """What a process does: runs until there are none or the time is over."""
    rates.work_through(folder, model, jobs, results, deadline, Job, tune)


# Fronts ---------------------------------------------------------------------------------------------------


def value(line: dict[str, Any], part: str) -> tuple[float, float]:
    """(what is learned, what is kept), both the lower the better."""
    found = {name: math.nan if number is None else number for name, number in line["parts"][part].items()}
    if line["model"] == "llama":
        return found["loss"], found["kept"]
    return -found["matthews" if line["task"] == "cola" else "accuracy"], -found["kept"]


def level(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The best that is kept by those who learn `at` or better, on straight lines between neighbours of the front."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    best = None
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        if x0 <= at <= x1:
            best = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    if best is None and front and front[-1][0] <= at:
        best = front[-1][1]
    return best


LEVELS = {"gsm8k": (2.0, 1.8, 1.6, 1.5, 1.4), "cola": (-0.2, -0.25, -0.3), "sst2": (-0.86, -0.88, -0.89)}


def show(files: Sequence[Path]) -> str:
    """A table for each task."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    texts = [f"left out: {line['task']} {line['rule']}: {line['error']}" for line in lines if "error" in line]
    texts = list(dict.fromkeys(texts))
    lines = [line for line in lines if "error" not in line]
    diverged = [line for line in lines if value(line, "1")[0] != value(line, "1")[0]]
    texts += [f"diverged: {line['task']} {line['rule']} at {line['lr']:g}, seed {line['seed']}" for line in diverged]
    lines = [line for line in lines if line not in diverged]
    for task in dict.fromkeys(line["task"] for line in lines):
        rows = []
        for rule in dict.fromkeys(line["rule"] for line in lines if line["task"] == task):
            own = [line for line in lines if (line["task"], line["rule"]) == (task, rule)]
            seeds = sorted({line["seed"] for line in own})
            whole = len({line["lr"] for line in own})
            by_rate = {rate: [line for line in own if line["lr"] == rate] for rate in {line["lr"] for line in own}}
            mean = {r: statistics.mean(value(line, "1")[0] for line in some) for r, some in by_rate.items()}
            best = min(mean, key=lambda rate: mean[rate])
            edge = "edge" if whole > 1 and best in (min(mean), max(mean)) else ""
            at_best = by_rate[best]
            cells = []
            for at in LEVELS[task]:
                found = []
                for seed in seeds:
                    points = [value(line, part) for line in own if line["seed"] == seed for part in line["parts"]]
                    found.append(level(points, at))
                good = [abs(each) for each in found if each is not None]
                few = f" ({len(good)})" if good and len(good) < len(found) else ""  # seeds that come there
                cells.append(spread(good) + few if good else "-")
            rows.append([
                rule, whole, len(seeds), f"{best:g} {edge}",
                spread([abs(value(line, "1")[0]) for line in at_best]),
                spread([abs(value(line, "1")[1]) for line in at_best]),
                f"{statistics.mean(line['l2_moved'] for line in at_best):.0f}",
                f"{100 * statistics.mean(line['moved'] for line in at_best):.0f} %",
                *cells,
            ])  # fmt: skip
        head = ["rule", "rates", "seeds", "best rate", "learned", "kept", "l2", "moved"]
        head += [f"kept at {abs(at):g}" for at in LEVELS[task]]
        texts += ["", task, common.table(head, rows)]
    return "\n".join(texts)


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    for name in ("shared", "rates", "minilm", "out"):
        preparing.add_argument(f"--{name}", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--models", default="llama,minilm", help="separated by commas")
    running.add_argument("--jobs", type=int, default=14)
    running.add_argument("--seconds", type=float, default=280)
    running.add_argument("--seeds", default="0,1,2")
    running.add_argument("--only", help="words, separated by semicolons, one of which a run's name must hold")
    running.add_argument("--without", help="words that it must not hold")
    running.add_argument("--done", type=Path, nargs="*", default=[], help="files with runs that are not made again")
    running.add_argument("--out", type=Path, required=True)
    showing = commands.add_parser("show")
    showing.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.shared, arguments.rates, arguments.minilm, arguments.out)
    elif arguments.command == "show":
        print(show(arguments.files))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        seeds = [int(seed) for seed in arguments.seeds.split(",")]

        lines = [json.loads(text) for file in arguments.done for text in file.read_text().splitlines()]
        done = {Run(line["task"], line["rule"], line["lr"], line["seed"]) for line in lines if "error" not in line}

        def holds(run: Run, words: str | None) -> bool:
            return any(word in run.name for word in (words or "").split(";") if word)

        def chosen(model: str) -> list[Any]:
            runs = [run for run in plan(model, seeds) if run not in done and not holds(run, arguments.without)]
            return [run for run in runs if not arguments.only or holds(run, arguments.only)]

        rates.shared_run(arguments, chosen, serve)


if __name__ == "__main__":
    main()
