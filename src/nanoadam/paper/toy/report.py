"""Tables and the run folder of the toy runs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from nanoadam.finetuning import folders
from nanoadam.paper.toy import charts, network
from nanoadam.paper.toy import runs as toy_runs
from nanoadam.paper.toy.charts import MEASURES, agreement
from nanoadam.reports.page import render

__all__ = ["lines", "spread", "write_folder"]

LEAD = (
    "A student of 20 neurons learns a teacher of 2 and is then finetuned on 1 or 2 more neurons by moving part of its "
    "weights: the smallest, or those with the largest gradients. Mean and standard deviation over the seeds."
)


def spread(mean: float, std: float | None) -> str:
    """Two significant digits, as the paper prints them."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.2g}" if std is None else f"{mean:.2g} ± {std:.2g}"


def _cells(found: dict[str, Any], measure: str) -> str:
    text = spread(found[measure]["mean"], found[measure]["std"])
    total = len(found[measure]["values"])
    return f"{text} ({found['diverged']} of {total} diverged)" if found["diverged"] and measure == "test_loss" else text


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Tables 8 and 9: the paper's figures, then ours under each reading; the first row is the head."""
    head = [
        "extra",
        "reading",
        *(f"{rule}: {name}" for rule in toy_runs.RULES for _, name in MEASURES),
        "order as in the paper",
    ]
    rows: list[tuple[str, ...]] = [tuple(head)]
    for position, extra in enumerate(toy_runs.PAPER):
        printed = [spread(*toy_runs.PAPER[extra][rule][key]) for rule in toy_runs.RULES for key, _ in MEASURES]
        rows.append((str(extra), f"the paper, table {7 + extra}", *printed, ""))
        for name, found in results["readings"].items():
            result = found[position]
            ours = [_cells(result[rule], key) for rule in toy_runs.RULES for key, _ in MEASURES]
            rows.append((str(extra), name, *ours, agreement(result)))
    return rows


def foot(results: dict[str, Any]) -> list[str]:
    """What follows from the tables, in sentences made of the numbers."""
    said = [
        f"Loss {row['loss_scale']:g} x MSE: of {row['cells']} choices the paper's order appears in {row['loss']} for "
        f"the loss, in {row['distance']} for the distance, in {row['both']} for both; in {row['diverged']} some "
        "run diverged."
        for row in results["verdict"]
    ]
    stable = [row for row in results["pretraining"] if row["teacher"] == "unit"]
    shares = (f"{row['learned']} of {row['seeds']} seeds with {row['loss_scale']:g} x MSE" for row in stable)
    said.append(f"Pretraining at the paper's rate of 2 learns its teacher of unit neurons in {', '.join(shares)}.")
    for extra in toy_runs.PAPER:
        critical = sorted(value / 2 for value in results["critical_rate"][str(extra)])  # as a loss scale at a rate of 1
        said.append(
            f"With {extra} more neurons a rate of 1 is stable for all weights up to a loss of {critical[0]:.2f} to "
            f"{critical[-1]:.2f} x MSE, by seed."
        )
    found = results["theorem"]
    moved = statistics.mean(row["distance"] for row in found)
    said.append(
        f"Theorem 2.2: the smallest neuron of the right sign alone brings the loss from {found[0]['loss_before']:.2g} "
        f"to at most {max(row['loss'] for row in found):.1e} in {len(found)} seeds, at l2 distance {moved:.2f} "
        f"({moved / network.PARAMETERS:.3f} over 60); error of v at most {max(row['error'] for row in found):.2g}, "
        f"no other parameter moves by more than {max(row['others_moved'] for row in found):g}."
    )
    return said


def summary(results: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything but the single seeds, which metrics.jsonl has, and the versions of what was not used."""
    usual = {**dataclasses.asdict(toy_runs.ToyConfig()), **manifest["settings"]}

    def brief(result: dict[str, Any]) -> dict[str, Any]:
        differs = {key: value for key, value in result["config"].items() if value != usual[key] and key != "seeds"}
        rules = {
            rule: {key: [_short(result[rule][key][part]) for part in ("mean", "std")] for key, _ in MEASURES}
            | {"diverged": result[rule]["diverged"]}
            for rule in toy_runs.RULES
        }
        return {"differs": differs, **rules, "order_as_in_the_paper": agreement(result)}

    versions = {name: manifest["versions"].get(name) for name in ("python", "torch", "numpy")}
    about = {key: manifest[key] for key in ("command", "started", "seconds", "code", "hardware", "settings")}
    return {
        **about,
        "versions": versions,
        "paper": toy_runs.PAPER,
        "readings": {name: [brief(result) for result in found] for name, found in results["readings"].items()},
        **{name: [brief(result) for result in results[name]] for name in ("grid", "rates", "others")},
        **{name: results[name] for name in ("verdict", "pretraining", "critical_rate", "theorem")},
    }


def _short(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.4g}")


def write_folder(results: dict[str, Any], out: Path, config: dict[str, Any], about: dict[str, Any]) -> None:
    """Config, metrics (a line for each experiment), results and report, and last the manifest."""
    import tomli_w

    folders.write(out / "config.toml", tomli_w.dumps(config))
    parts = {name: results[name] for name in ("grid", "rates", "others")}
    parts["readings"] = [result for found in results["readings"].values() for result in found]
    records = [{"part": part, **result} for part, found in parts.items() for result in found]
    folders.write(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    manifest = {
        "command": "nanoadam reproduce toy",
        "kind": "experiment: two-layer teacher-student networks, synthetic inputs, exact expectations",
        "pseudocode": "arXiv 2506.21374, section 2.3 and appendix E; in the code: nanoadam.paper.toy.network.descend",
        **about,
        **folders.environment(device="cpu", threads=1),
        "data": {"name": "inputs from N(0, I) in two dimensions: the exact mean over all, or samples of the seed"},
        "settings": config["toy"],
        "seeds": config["toy"]["seeds"],
        "left_open_by_the_paper": {
            "shown as a function of": [*config["grid"], "teacher", "init_scale", "samples"],
            "test loss": "mean squared error over all inputs, exact",
            "distance": "l2 over all 60 parameters, divided by 60, which has the paper's magnitude",
            "pretraining": "loss scale 1/8 throughout, where the paper's rate of 2 is stable",
        },
        "results": {name: results[name] for name in ("verdict", "pretraining", "critical_rate", "theorem")},
    }
    page = render("reproduce: toy", LEAD, lines(results), charts.charts(results), manifest, foot(results))
    folders.write(out / "report.html", page)
    folders.write(out / "results.json", json.dumps(summary(results, manifest), indent=1) + "\n")
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
