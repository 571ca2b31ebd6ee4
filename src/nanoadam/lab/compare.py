"""Several optimizers on the same job: a learning-rate grid for each, the same seeds and order of data, one table.

Each run is a finetuning run with a folder of its own. A learning rate is chosen for each optimizer by the mean of the
validation metric over the seeds; what is measured of forgetting takes no part in the choice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from nanoadam.lab import finetune, models, optimizers, report, runs
from nanoadam.lab.config import Config
from nanoadam.lab.plots import size

CHOICE = "best mean of the validation metric over the seeds"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many runs are done, how many there are."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: the job; its optimizer, learning rate and seed give way to these.
        optimizers: by name.
        learning_rates: the grid, the same for all.
        seeds: each run is repeated with each.
        retain: a text file that a language model must not forget; measured as loss per token.

    Raises:
        ValueError: for an unknown optimizer, an empty list, or `retain` with another kind of model.
    """

    config: Config
    optimizers: tuple[str, ...] = ("adamw", "nanoadam")
    learning_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    retain: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        for name in ("optimizers", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds something twice: {', '.join(map(str, values))}")
        for name in self.optimizers:
            optimizers.method(name)
        if self.retain is not None and self.config.task != "causal-lm":
            raise ValueError(f"retain measures the loss of language models, and {self.config.task} trains none")
        if self.retain is not None and not Path(self.retain).is_file():
            raise ValueError(f"there is no text file {self.retain} to retain")

    def to_toml(self) -> str:
        """The job's keys and those of [compare]; reading it gives the same comparison."""
        import tomli_w

        own = {key: getattr(self, key) for key in ("optimizers", "learning_rates", "seeds", "retain")}
        section = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items() if value}
        text = self.config.to_toml().replace("nanoadam finetune", "nanoadam compare")
        return f"{text}\n{tomli_w.dumps({'compare': section})}"


KEYS = tuple(field.name for field in dataclasses.fields(Comparison) if field.name != "config")

# The rows of the table: key of a run's results, what it says, unit.
ROWS: tuple[tuple[str, str, str], ...] = (
    ("memory_weights", "memory: weights", "B"),
    ("memory_gradients", "memory: gradients", "B"),
    ("memory_state", "memory: optimizer state", "B"),
    ("memory_rest", "memory: rest", "B"),
    ("seconds_per_step", "time per step", "s"),
    ("touched", "weights moved", "%"),
    ("l2_moved", "l2 distance moved", ""),
    ("forgetting", "forgetting (loss per token, after - before)", ""),
)


def run(comparison: Comparison, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run all of it, and write one folder with a folder for each run in it.

    Args:
        comparison: what to compare.
        out: new or empty.
        progress: told before each run.

    Returns:
        `{"metric", "runs": [...], "table": [...]}`; see `table`.

    Raises:
        FileExistsError: `out` is a file or holds files.
        ValueError: for whatever the job can get wrong, before the first run.
    """
    tell = progress or (lambda what, done, total: None)
    comparison = dataclasses.replace(
        comparison,
        config=comparison.config.resolved(),
        retain=comparison.retain and str(Path(comparison.retain).resolve()),
    )
    if out.exists():
        runs.prepare_folder(out)
    for name in comparison.optimizers:
        job = finetune.prepare(dataclasses.replace(comparison.config, optimizer=name, seed=comparison.seeds[0]))
    before = _retained(comparison, None) if comparison.retain else None
    runs.prepare_folder(out)
    runs.write(out / "config.toml", comparison.to_toml())
    cases = [
        dataclasses.replace(comparison.config, optimizer=name, learning_rate=lr, seed=seed)
        for name in comparison.optimizers
        for lr in comparison.learning_rates
        for seed in comparison.seeds
    ]
    outcomes = []
    for done, config in enumerate(cases):
        tell(f"{config.optimizer}, learning rate {config.learning_rate:g}, seed {config.seed}", done, len(cases))
        outcome = _one(comparison, config, out / "runs", job.task.metric, before)
        runs.append(out / "metrics.jsonl", outcome)
        outcomes.append(outcome)
    tell("done", len(cases), len(cases))
    results = {
        "metric": job.task.metric,
        "learning_rate_choice": CHOICE,
        "table": table(outcomes, job.task.higher_is_better),
        "limits": optimizers.limits(comparison.optimizers),
        "runs": outcomes,
    }
    manifest = {
        "command": "nanoadam compare",
        "kind": "comparison of optimizers on one job, each at its own learning rate",
        "pseudocode": runs.PSEUDOCODE,
        **runs.environment(),
        "data": job.sources,
        "settings": dataclasses.asdict(comparison),
        "seeds": list(comparison.seeds),
        "results": results,
    }
    runs.write(out / "report.html", _page(comparison, manifest))
    runs.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return results


def _one(comparison: Comparison, config: Config, folder: Path, metric: str, before: float | None) -> dict[str, Any]:
    """One run's line: its key, and its results or why it has none."""
    key = {"optimizer": config.optimizer, "learning_rate": config.learning_rate, "seed": config.seed}
    out = folder / f"{config.optimizer}-{config.learning_rate:g}-{config.seed}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        results = finetune.run(config, out)
    except finetune.Diverged as error:
        return {**key, "metric": None, "stopped": str(error)}
    found = {
        **key,
        "metric": results["final"][metric],
        "final": results["final"],
        **{f"memory_{kind}": count for kind, count in results["memory"].items()},
        **{name: results[name] for name in ("seconds_per_step", "touched", "l2_moved")},
    }
    if before is not None:
        after = _retained(comparison, out / "model")
        found |= {"retained_before": before, "retained_after": after, "forgetting": after - before}
    return found


def table(outcomes: Sequence[dict[str, Any]], higher_is_better: bool) -> list[dict[str, Any]]:
    """One entry per optimizer at its chosen rate: `{"optimizer", "learning_rate", <key>: {"mean", "std"}, ...}`.

    An optimizer whose runs all diverged has a learning rate of None. With one seed there is no deviation.
    """
    sign = 1 if higher_is_better else -1
    rows = []
    for name in dict.fromkeys(o["optimizer"] for o in outcomes):
        own = [o for o in outcomes if o["optimizer"] == name]

        def merit(lr: float, own: list[dict[str, Any]] = own) -> float:
            values = [o["metric"] for o in own if o["learning_rate"] == lr]
            good = all(value is not None and math.isfinite(value) for value in values)
            return sign * statistics.mean(values) if good else -math.inf

        best = max(dict.fromkeys(o["learning_rate"] for o in own), key=merit)
        if merit(best) == -math.inf:
            rows.append({"optimizer": name, "learning_rate": None})
            continue
        chosen = [o for o in own if o["learning_rate"] == best]
        keys = [key for key in ("metric", *(key for key, _, _ in ROWS)) if all(key in o for o in chosen)]
        spreads = {key: _spread([float(o[key]) for o in chosen]) for key in keys}
        rows.append({"optimizer": name, "learning_rate": best, **spreads})
    return rows


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, the head first: one column per optimizer."""
    rows = results["table"]
    text: list[tuple[str, ...]] = [("", *(row["optimizer"] for row in rows))]
    rates = (row["learning_rate"] for row in rows)
    text.append(("learning rate (chosen)", *("all diverged" if lr is None else f"{lr:g}" for lr in rates)))
    for key, label, unit in (("metric", results["metric"], ""), *ROWS):
        if any(key in row for row in rows):
            text.append((label, *(_cell(row.get(key), unit) for row in rows)))
    return text


def limits(results: dict[str, Any]) -> list[str]:
    """What stands under the table: what each optimizer cannot do, or does otherwise."""
    return optimizers.limit_lines(results["limits"])


def _cell(spread: dict[str, float | None] | None, unit: str) -> str:
    if spread is None:
        return "-"
    scale = 100 if unit == "%" else 1
    parts = [value for value in (spread["mean"], spread["std"]) if value is not None]
    if unit == "B":
        return " ± ".join(size(value) for value in parts if value)
    return " ± ".join(f"{scale * value:.4g}" for value in parts) + (f" {unit}" if unit else "")


@torch.no_grad()
def _retained(comparison: Comparison, folder: Path | None) -> float:
    """Loss per token over the text to retain, of a saved model or of the one that all begin with."""
    config = comparison.config
    tokenizer = models.load_tokenizer(config)
    own = config if folder is None else dataclasses.replace(config, model=str(folder), init_from_config=False)
    torch.manual_seed(comparison.seeds[0])  # with init_from_config
    model: torch.nn.Module = models.load_model(own)
    model.train(False)
    text = Path(str(comparison.retain)).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    shape: Any = model.config
    limit = min(getattr(shape.get_text_config(), "max_position_embeddings", None) or 1024, 1024)
    total, count = 0.0, 0
    device = "cuda" if torch.cuda.is_available() and config.device == "auto" else "cpu"
    model.to(device)
    for block in ids.split(limit):
        if len(block) > 1:
            logits = model(block[None].to(device)).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, block[1:].to(device), reduction="sum"))
            count += len(block) - 1
    if not count:
        raise ValueError(f"{comparison.retain} holds fewer than two tokens: there is nothing to retain")
    return total / count


def _page(comparison: Comparison, manifest: dict[str, Any]) -> str:
    results, config = manifest["results"], comparison.config
    lead = (
        f"{config.model}, {config.task} on {config.train}, seeds {', '.join(map(str, comparison.seeds))}: mean ± "
        f"standard deviation over them. Learning rate of each optimizer: {CHOICE}, from "
        f"{', '.join(f'{lr:g}' for lr in comparison.learning_rates)}."
    )
    short = {**manifest, "results": {key: value for key, value in results.items() if key != "runs"}}
    drawn = [_rates(comparison, results), _memory(results)]
    return report.render(f"compare: {config.task}", lead, lines(results), drawn, short, limits(results))


def _rates(comparison: Comparison, results: dict[str, Any]) -> Figure:
    """The metric, and what was forgotten where that was measured, over learning rates."""
    keys = ["metric"] + ["forgetting"] * any("forgetting" in run for run in results["runs"])
    figure = Figure(figsize=(4 * len(keys) + 2, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for name in comparison.optimizers:
            found: dict[float, list[float]] = {}
            for one in results["runs"]:
                if one["optimizer"] == name and one.get(key) is not None:
                    found.setdefault(one["learning_rate"], []).append(one[key])
            axes.plot(list(found), [statistics.mean(values) for values in found.values()], "o-", ms=4, lw=1, label=name)
        label = results["metric"] if key == "metric" else key
        axes.set(xscale="log", xlabel="learning rate", ylabel=label, title=f"{label}, mean over seeds")
        axes.legend(fontsize=8)
    return figure


def _memory(results: dict[str, Any]) -> Figure:
    rows = [row for row in results["table"] if row["learning_rate"] is not None]
    figure = Figure(figsize=(7, 1 + 0.5 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for kind in ("weights", "gradients", "state", "rest"):
        if rows and all(f"memory_{kind}" in row for row in rows):
            widths = [row[f"memory_{kind}"]["mean"] / 1e6 for row in rows]
            axes.barh([row["optimizer"] for row in rows], widths, left=left, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="MB (1e6 bytes)", title="Memory by kind")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure
