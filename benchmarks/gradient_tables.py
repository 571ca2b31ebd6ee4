"""Tables of what vision_gradients.py measured, beside what gradients that fall anywhere would give; and their planes.

Example: python benchmarks/gradient_tables.py docs/results/gradients.json --picture docs/results/gradients.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_fronts import shown, spread

Data = dict[str, Any]


def between(values: Sequence[float]) -> str:
    """Mean, and what 95 % of random gradients lie between."""
    ordered = sorted(values)
    cut = round(0.025 * len(ordered))
    return f"{statistics.mean(ordered):.3f} ({ordered[cut]:.3f} to {ordered[-1 - cut]:.3f})"


def by_seed(data: Data, key: str) -> str:
    """Mean over all tensors of each run at each step."""
    steps = list(data["runs"][0][key])
    lines = []
    for run in sorted(data["runs"], key=lambda run: (run["from"], run["seed"])):
        values = [run[key][step] for step in steps]
        cells = [f"{value:.3f}" for value in values]
        anywhere = between(data["shuffled"][run["from"]]["all"][key])
        lines.append([run["from"], run["seed"], *cells, f"{statistics.mean(values):.3f}", anywhere])
    return shown(["from", "seed", *(f"step {step}" for step in steps), "mean", "if anywhere"], lines, True)


def by_kind(data: Data) -> str:
    """r of the tensors of a kind at each step: mean and deviation over seeds."""
    steps = list(data["runs"][0]["tensors"])
    lines = []
    for start in ("pretrained", "scratch"):
        own = [run["tensors"] for run in data["runs"] if run["from"] == start]
        for kind in sorted(set(data["shuffled"]["kinds"].values()), reverse=True):
            names = [name for name, other in data["shuffled"]["kinds"].items() if other == kind]
            means = [[statistics.mean(run[step][name] for name in names) for step in steps] for run in own]
            independent = statistics.mean(data["shuffled"]["independent"][start][name] for name in names)
            lines.append(
                [
                    start,
                    f"{kind} ({len(names)})",
                    *(spread(column, ".3f") for column in zip(*means, strict=True)),
                    f"{statistics.mean(value for row in means for value in row):.3f}",
                    between(data["shuffled"][start][kind]["ratio"]),
                    f"{independent:.3f}",
                ]
            )
    head = ["from", "tensors", *(f"step {step}" for step in steps), "mean", "if anywhere", "median over largest"]
    return shown(head, lines, True)


def by_tensor(data: Data) -> str:
    """r of each tensor, mean over steps and seeds, beside its median over its largest weight."""
    lines = []
    for name, kind in reversed(data["shuffled"]["kinds"].items()):
        cells: list[str] = []
        for start in ("pretrained", "scratch"):
            own = [run["tensors"] for run in data["runs"] if run["from"] == start]
            values = [ratios[name] for run in own for ratios in run.values()]
            cells += [f"{statistics.mean(values):.3f}", f"{data['shuffled']['independent'][start][name]:.3f}"]
        lines.append([name.split(".", 1)[-1].removesuffix(".convolution.weight"), kind, *cells])
    head = ["tensor", "", "pretrained: r", "median over largest", "scratch: r", "median over largest"]
    return shown(head, lines, True)


def moved(data: Data) -> str:
    lines = []
    for start in ("pretrained", "scratch"):
        own = [run for run in data["runs"] if run["from"] == start]
        groups = [spread([run["shift"][group] for run in own], ".1e") for group in ("smallest", "largest", "rest")]
        lines.append([start, spread([100 * run["accuracy"] for run in own], ".1f"), *groups])
    return shown(["from", "accuracy", "smallest 30 %", "largest 30 %", "rest"], lines, True)


def picture(data: Data, steps: Sequence[str]) -> Any:
    """The first seed's points of the tensor that was drawn, from both starts."""
    records = []
    for run in data["runs"]:
        for step, points in run.get("points", {}).items():
            if run["seed"] == 0 and (not steps or step in steps):
                name = points["name"]
                value = {"points": points, "ratio": run["tensors"][step][name]}
                layer = name.split(".", 1)[-1].removesuffix(".convolution.weight").replace(".", " ")
                records.append({"name": f"{run['from']}, {layer}", "step": int(step), "value": value})
    return drawn("MobileNetV1 on CIFAR-10, AdamW, seed 0", records)


def drawn(title: str, records: Iterable[Mapping[str, Any]]) -> Any:
    """|gradient| over |weight|, a row for each tensor that is drawn and a column for each step.

    Args:
        title: of the figure.
        records: `Recorder.gradients`, or others like them; those without points are left out.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    shown = [record for record in records if "points" in record["value"]]
    names = list(dict.fromkeys(record["name"] for record in shown))
    steps = sorted({record["step"] for record in shown})
    figure = Figure(figsize=(2.6 * len(steps), 2.3 * len(names) + 0.4), layout="constrained")
    panels = figure.subplots(len(names), len(steps), squeeze=False)
    for record in shown:
        axes = panels[names.index(record["name"])][steps.index(record["step"])]
        points, ratio = record["value"]["points"], record["value"]["ratio"]
        axes.plot(points["weight"], points["gradient"], ".", ms=1.5, alpha=0.6)
        axes.set_title(f"{record['name'].split('.', 1)[-1][-34:]}\nstep {record['step']}, r = "
                       f"{math.nan if ratio is None else ratio:.3g}", fontsize=6)  # fmt: skip
        axes.tick_params(labelsize=5)
        axes.ticklabel_format(style="sci", scilimits=(0, 0))
    figure.suptitle(f"{title}: |gradient| over |weight|", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of vision_gradients.py --shuffled N")
    parser.add_argument("--picture", type=Path, help="where to draw")
    parser.add_argument("--step", action="append", default=[], help="that is drawn; all by default")
    options = parser.parse_args(arguments)
    data = json.loads(options.file.read_text())
    if "shuffled" not in data:
        parser.error(f"{options.file} has no random gradients to compare with: vision_gradients.py --shuffled 200")
    print(by_seed(data, "ratio"), by_kind(data), by_seed(data, "overlap"), by_tensor(data), moved(data), sep="\n\n")
    if options.picture:
        picture(data, options.step).savefig(options.picture, dpi=100)


if __name__ == "__main__":
    main()
