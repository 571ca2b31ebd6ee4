"""The model card: `README.md` of a finetuned model, in Hugging Face's form, with the manifest's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoadam.reports.verdict import METRICS, PIPELINES, number, sentence, usage
from nanoadam.text import size


def card(manifest: dict[str, Any]) -> str:
    """Markdown with its front matter."""
    settings, results = manifest["settings"], manifest["results"]
    name = str(manifest["model"]["name"])
    base = name if not Path(name).exists() else Path(name).name
    head = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES.get(settings["task"]),
        "tags": list(dict.fromkeys(["nanoadam", settings["task"], settings["optimizer"]])),
        **({"base_model": base} if not Path(name).exists() else {}),
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)
    data = manifest["data"]
    before, level = results.get("before", {}), results.get("baseline", {})
    rows = [f"| {METRICS.get(key, key)} | {_cell(before, key)} | {_cell(level, key)} | {number(value)} |"
            for key, value in results["final"].items()]  # fmt: skip
    keys = ("optimizer", "learning_rate", "head_learning_rate", "density", "density_end", "weight_decay", "epochs",
            "batch_size", "accumulate", "scheduler", "warmup", "dtype", "autocast", "seed")  # fmt: skip
    chosen = "\n".join(f"| {key} | {settings[key]} |" for key in keys if settings.get(key) is not None)
    peak = results["memory"].get("peak")
    memory = f"\nPeak memory on the accelerator: {size(peak)}." if peak else ""
    return f"""---
{front}
---
# {base}, finetuned for {settings["task"]}

{sentence(manifest)}

## Use
```python
{chr(10).join(usage(manifest, "PATH/OR/HUB/ID"))}
```

## What it came to
Measured on {data["validation"]["rows"]:,} rows that it did not learn from. One seed: small differences are chance.

| | before training | one answer for all | at the end |
|---|---|---|---|
{chr(10).join(rows)}

## How it was trained
From `{base}` ({manifest["model"]["parameters"]:,} weights, {manifest["model"]["class"]}) on
{data["train"]["rows"]:,} rows (SHA-256 of the rows {data["train"]["sha256_of_rows"]}), {results["steps"]:,} steps,
by nanoadam {manifest["code"]["version"]} with transformers {manifest["versions"].get("transformers", "?")} and torch
{manifest["versions"].get("torch", "?")}. {100 * results["touched"]:.2f} % of the weights moved.{memory}

| | |
|---|---|
{chosen}

Licence and limits are those of the model that it was made from and of the data.
"""


def _cell(values: dict[str, float], key: str) -> str:
    return number(values[key]) if key in values else "-"
