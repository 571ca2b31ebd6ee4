"""What a run came to, in words: for the page, the model card and the last lines of the command."""

from __future__ import annotations

from typing import Any

from nanoadam.text import duration, size

PIPELINES = {
    "text-classification": "text-classification",
    "multi-label-classification": "text-classification",
    "text-regression": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
}

METRICS = {
    "accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "micro_f1": "micro F1",
    "macro_f1": "macro F1", "exact": "share of rows with every label right", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "mse": "mean squared error", "token_loss": "loss per token",
    "perplexity": "perplexity", "loss": "loss",
}  # fmt: skip

BASELINES = {
    "text-regression": "always saying the mean",
    "multi-label-classification": "always saying the commonest labels",
}
COMMONEST = "always saying the commonest class"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def sentence(manifest: dict[str, Any]) -> str:
    """Task, metric against baseline and before, memory against AdamW's, time."""
    results, settings = manifest["results"], manifest["settings"]
    metric = results["metric"]
    name, final = METRICS.get(metric, metric), results["final"][metric]
    parts = [f"{name[0].upper() + name[1:]} {number(final)} on the validation split"]
    against = []
    if metric in results.get("baseline", {}):
        against.append(f"{number(results['baseline'][metric])} by {BASELINES.get(settings['task'], COMMONEST)}")
    if metric in results.get("before", {}):
        against.append(f"{number(results['before'][metric])} before training")
    text = parts[0] + (f", against {' and '.join(against)}" if against else "")
    text += f", after {results['steps']:,} steps in {duration(results['seconds_per_step'] * results['steps'])}"
    expected = manifest.get("expected") or {}
    if expected.get("adamw"):
        own, adamw = sum(expected["own"].values()), sum(expected["adamw"].values())
        if settings["optimizer"] != "adamw":
            text += f"; weights, gradients and state take {size(own)} where AdamW's take {size(adamw)} (by formula)"
    return text + "."


def usage(manifest: dict[str, Any], model: str) -> list[str]:
    """Lines of Python that use a finetuned model."""
    task, read = manifest["settings"]["task"], manifest["data"]["read_as"]
    kind = PIPELINES.get(task, "text-classification")
    example = {"image-classification": '"photo.jpg"', "causal-lm": '"Once upon a time", max_new_tokens=50'}.get(
        task, '"a text like those it was trained on"'
    )
    if len(read.get("text", ())) == 2:
        example = '{"text": "the first of a pair", "text_pair": "the second"}'
    if "last message" in read.get("loss", ""):
        example = '[{"role": "user", "content": "Hello!"}], max_new_tokens=50'
    more = ", top_k=None" if task == "multi-label-classification" else ""
    more = ', function_to_apply="none"' if task == "text-regression" else more
    return [
        "from transformers import pipeline",
        f'model = pipeline("{kind}", model="{model}"{more})',
        f"print(model({example}))",
    ]


def patch_usage(base: str, folder: str) -> list[str]:
    """Lines of Python that make a finetuned model of its base and a patch."""
    return ["from nanoadam.finetuning import patches", f'model = patches.load("{base}", "{folder}")']


def advice(manifest: dict[str, Any]) -> list[str]:
    """What to try next, from what the run was."""
    results, settings = manifest["results"], manifest["settings"]
    rate, seed = settings.get("learning_rate") or 0.0, settings["seed"]
    lines = []
    if results.get("notes"):
        lines.append(f"A higher learning rate (--learning-rate {3 * rate:.2g}), or more epochs (--epochs "
                     f"{2 * settings['epochs']:g}), if the loss was still falling.")  # fmt: skip
    lines.append(
        f"Is it luck? One seed proves little: nanoadam compare --optimizers {settings['optimizer']} --learning-rates "
        f"{rate / 3:.2g},{rate:.2g},{3 * rate:.2g} --seeds {seed},{seed + 1},{seed + 2} --keep best with the same "
        "--model and --train."
    )
    if settings["optimizer"] == "nanoadam":
        lines.append("Less memory: --density 0.01 selects a tenth as many weights; the rate is found anew.")
        if settings.get("granularity", "weight") == "weight":
            lines.append("Less time: --granularity column selects whole columns, and backward computes no others.")
    lines.append("What the model forgets meanwhile: --retain FILE measures it before and after.")
    return lines
