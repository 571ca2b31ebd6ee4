"""What a finetuning run looked like over its steps."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def figures(lines: list[dict[str, Any]], metric: str) -> list[Figure]:
    """Loss, the metric, memory by kind, and where there is a density that and the share touched, over steps."""
    trained = [line for line in lines if line["event"] == "train"]
    evaluated = [line for line in lines if line["event"] == "evaluation"]
    first = Figure(figsize=(8, 3), layout="constrained")
    loss, measured = first.subplots(1, 2)
    loss.plot([line["step"] for line in trained], [line["loss"] for line in trained], lw=1, label="training")
    steps = [line["step"] for line in evaluated]
    loss.plot(steps, [line["metrics"]["loss"] for line in evaluated], "o-", ms=3, lw=1, label="validation")
    loss.legend(fontsize=8)
    loss.set(xlabel="step", ylabel="loss", title="Loss")
    measured.plot(steps, [line["metrics"][metric] for line in evaluated], "o-", ms=3, lw=1, color="C2")
    measured.set(xlabel="step", ylabel=metric, title=f"Validation: {metric}")
    drawn = [first, _memory(trained)]
    if any("density" in line for line in trained):
        drawn.append(_density([line for line in trained if "density" in line]))
    return drawn


def _memory(trained: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in ("weights", "gradients", "state", "rest") if kind in trained[-1]["memory"]]
    steps = [line["step"] for line in trained]
    axes.stackplot(
        steps, [[line["memory"][kind] / 1e6 for line in trained] for kind in kinds], labels=kinds, step="post"
    )
    axes.set(xlabel="step", ylabel="MB (1e6 bytes)", title="Memory by kind", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _density(trained: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in trained]
    axes.step(steps, [100 * line["density"] for line in trained], where="post", label="density")
    if all("touched" in line for line in trained):
        axes.plot(steps, [100 * line["touched"] for line in trained], label="selected at least once")
    axes.set(xlabel="step", ylabel="% of the weights selected from", title="Density and touched share", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
