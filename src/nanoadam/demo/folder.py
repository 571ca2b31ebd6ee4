"""What a demo run leaves: settings, metrics, report, manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from nanoadam.demo import figures
from nanoadam.demo.experiment import CHOICE, Demo
from nanoadam.finetuning import folders


def write_folder(demo: Demo, out: Path) -> None:
    """Write config, metrics and report, and last the manifest: where it is, the folder is complete.

    Raises:
        FileExistsError: `out` is a file or holds files.
    """
    folders.prepare_folder(out)
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(demo.settings).items()}
    folders.write(out / "config.toml", tomli_w.dumps({"demo": config}))
    folders.write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in _lines(demo)))
    manifest = _manifest(demo)
    folders.write(out / "report.html", figures.report(demo, manifest))
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _lines(demo: Demo) -> Iterator[dict[str, Any]]:
    for outcome in demo.outcomes:
        result = dataclasses.asdict(outcome)
        curve = result.pop("curve")
        key = {k: result[k] for k in ("method", "learning_rate", "seed")}
        for epoch, (task1, task2_validation) in enumerate(curve, start=1):
            yield {"event": "epoch", **key, "epoch": epoch, "task1": task1, "task2_validation": task2_validation}
        yield {"event": "run", **result, "chosen": demo.chosen[outcome.method] == outcome.learning_rate}


def _manifest(demo: Demo) -> dict[str, Any]:
    return {
        "command": "nanoadam demo",
        "kind": "experiment: catastrophic forgetting, two tasks in sequence, real data",
        "pseudocode": folders.PSEUDOCODE,
        "started": demo.started,
        "seconds": round(demo.seconds, 1),
        **folders.environment(device="cpu", threads=1),
        "data": {
            "name": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part)",
            "sha256": demo.data_sha256,
            "splits": "per task 60 / 20 / 20 % train / validation / test, stratified, drawn anew for each seed",
        },
        "settings": dataclasses.asdict(demo.settings),
        "seeds": list(demo.settings.seeds),
        "learning_rate_choice": CHOICE,
        "chosen_learning_rates": demo.chosen,
        "results": demo.table(),
    }
