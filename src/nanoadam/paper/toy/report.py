"""Tables, figures and the run folder of the toyruns."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanoadam.finetuning import folders
from nanoadam.paper.toy import network
from nanoadam.paper.toy import runs as toy_runs
from nanoadam.reports.page import render

__all__ = ["figures", "lines", "spread", "write_folder"]

MEASURES = (("test_loss", "test loss"), ("distance", "l2 distance / 60"))
COLORS = dict(zip(toy_runs.RULES, ("C0", "C3"), strict=True))
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


def agreement(result: dict[str, Any]) -> str:
    """Both, loss, distance or neither."""
    agreed = toy_runs.agrees(result)
    return "both" if all(agreed.values()) else next((name for name, value in agreed.items() if value), "neither")


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


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """By name: choices (what agrees with the paper), rates, neurons and curves (figures 3 and 7)."""
    drawn = {"choices": _choices(results["grid"]), "rates": _rates(results)}
    drawn["neurons"] = _neurons(results["portraits"])
    drawn["curves"] = _curves(results["readings"])
    return drawn


SHADES = {"both": "#2a9d55", "loss": "#a8d8b9", "distance": "#f3d27a", "neither": "#e3e3e3"}


def _choices(grid: list[dict[str, Any]]) -> Figure:
    """One square for every choice: what of the paper's order appears, and how often the two rules diverged."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    densities = sorted({r["config"]["density"] for r in grid})
    scales = sorted({r["config"]["loss_scale"] for r in grid})
    columns = [(s, d) for s in scales for d in densities]
    kinds = [(n, o) for n in (False, True) for o in (False, True)]
    for axes, extra in zip(figure.subplots(2, 1, sharex=True), toy_runs.PAPER, strict=True):
        for result in grid:
            c = result["config"]
            if c["extra"] != extra:
                continue
            x, y = columns.index((c["loss_scale"], c["density"])), kinds.index((c["neurons"], c["once"]))
            axes.add_patch(_square(x, y, SHADES[agreement(result)]))
            small, large = (result[rule] for rule in toy_runs.RULES)
            text = "\n".join(
                f"{f['test_loss']['mean']:.3f}" + (f" ({f['diverged']})" if f["diverged"] else "")
                for f in (small, large)
            )
            axes.text(x, y, text, ha="center", va="center", fontsize=6)
        axes.set(
            xlim=(-0.5, len(columns) - 0.5),
            ylim=(len(kinds) - 0.5, -0.5),
            title=f"{extra} more neuron{'s' * (extra > 1)}",
        )
        axes.set_yticks(
            range(len(kinds)), [f"{'neurons' if n else 'weights'}, {'once' if o else 'every step'}" for n, o in kinds]
        )
        axes.set_xticks(range(len(columns)), [f"{100 * d:g} %\n{s:g} x MSE" for s, d in columns], fontsize=7)
    for name, shade in SHADES.items():
        figure.axes[0].plot([], [], "s", color=shade, label=name)
    figure.axes[0].legend(fontsize=7, ncols=4, loc="lower right", bbox_to_anchor=(1, 1.0), frameon=False)
    figure.suptitle(
        "Does the paper's order appear? Test loss: small weights above, large gradients below (diverged)", fontsize=9
    )
    return figure


def _square(x: float, y: float, shade: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white")


def _rates(results: dict[str, Any]) -> Figure:
    """Loss and distance over the rate of descent on half the MSE, with the range of critical rates."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    for column, extra in zip(figure.subplots(2, 2, sharex=True).T, toy_runs.PAPER, strict=True):
        found = [r for r in results["rates"] if r["config"]["extra"] == extra]
        rates = [2 * r["config"]["loss_scale"] * r["config"]["finetune_rate"] for r in found]
        critical = results["critical_rate"][str(extra)]
        for axes, (key, name) in zip(column, MEASURES, strict=True):
            axes.axvspan(min(critical), max(critical), color="#eee", label="critical rate, over seeds")
            for rule in toy_runs.RULES:
                axes.plot(rates, [r[rule][key]["mean"] for r in found], "o-", ms=3, color=COLORS[rule], label=rule)
                axes.axhline(
                    toy_runs.PAPER[extra][rule][key][0], color=COLORS[rule], ls=":", lw=1, label=f"paper: {rule}"
                )
            axes.set(ylabel=name)
        column[0].set(yscale="log", ylim=(1e-6, 2), title=f"{extra} more neuron{'s' * (extra > 1)}")
        column[1].set(xlabel="rate x 2 x loss scale", ylim=(0, None))
    figure.axes[0].legend(fontsize=6)
    return figure


def _neurons(portraits: list[dict[str, Any]]) -> Figure:
    """Figures 3 and 7: teacher neurons as arrows, the student's as points |a| w, by the sign of a."""
    figure = Figure(figsize=(8.5, 2.7 * len(portraits)), layout="constrained")
    for row, portrait in zip(figure.subplots(len(portraits), 3, squeeze=False), portraits, strict=True):
        for axes, name in zip(row, ("pretrained", *toy_runs.RULES), strict=True):
            old = len(portrait["teacher"]) - portrait["extra"]
            for i, (sign, x, y) in enumerate(portrait["teacher"]):
                if name != "pretrained" or i < old:
                    axes.annotate(
                        "", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": _sign(sign), "lw": 2.5 - (i < old)}
                    )
            for sign, x, y in portrait[name]:
                axes.plot(x, y, "o", ms=4, color=_sign(sign), alpha=0.6)
            axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
            axes.set_title(name if name == "pretrained" else f"{name}, +{portrait['extra']}", fontsize=8)
        row[0].set_ylabel(portrait["reading"], fontsize=7)
    figure.suptitle(
        "First seed. Arrows: teacher (thick: added); points: student, |a| w; blue: a > 0, red: a < 0", fontsize=8
    )
    return figure


def _sign(sign: float) -> str:
    return "C0" if sign > 0 else "C3"


def _curves(readings: dict[str, list[dict[str, Any]]]) -> Figure:
    """Test loss and distance while finetuning, mean over the seeds that did not diverge."""
    figure = Figure(figsize=(8.5, 2.2 * len(readings)), layout="constrained")
    for row, (name, results) in zip(figure.subplots(len(readings), 4, squeeze=False), readings.items(), strict=True):
        for result, pair in zip(results, (row[:2], row[2:]), strict=True):
            for axes, (key, label) in zip(pair, MEASURES, strict=True):
                _curve(axes, result, key)
                axes.set_title(f"+{result['config']['extra']}: {label}", fontsize=7)
        row[0].set_ylabel(name.replace(", M", ",\nM"), fontsize=7)
        for axes in row[::2]:
            axes.set(yscale="log", ylim=(1e-7, 3))
    figure.axes[0].legend(fontsize=6)
    return figure


def _curve(axes: Axes, result: dict[str, Any], key: str) -> None:
    for rule in toy_runs.RULES:
        curves = result[rule]["curves"]
        axes.plot(curves["steps"], curves[key], color=COLORS[rule], lw=1, label=rule)
    axes.set_xscale("symlog", linthresh=1)
    axes.tick_params(labelsize=6)


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

    versions = {name: manifest["versions"].get(name) for name in ("python", "torch", "numpy", "matplotlib")}
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
    """Config, metrics (a line for each experiment), results, plots and report, and last the manifest."""
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
    drawn = figures(results)
    page = render("reproduce: toy", LEAD, lines(results), list(drawn.values()), manifest, foot(results))
    folders.write(out / "report.html", page)
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        folders.write(out / f"{name}.png", buffer.getvalue())
    folders.write(out / "results.json", json.dumps(summary(results, manifest), indent=1) + "\n")
    folders.write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
