"""Draw the pictures of README and docs from the figures in docs/results: small SVG files, light and dark.

    python benchmarks/pictures.py            # writes docs/pictures/*.svg
    python benchmarks/pictures.py --check    # exit code 1 where a file is not what the data say

No library, no random number: the same data make the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURES = ROOT / "docs" / "pictures"

STYLE = """
text{font:13px system-ui,sans-serif;fill:#24292f}.s{font-size:11px;fill:#57606a}.t{font-weight:600}.e{text-anchor:end}
.m{text-anchor:middle}.a{fill:#2b6ca3}.b{fill:#9aa7b2}.c{fill:#d9822b}.d{fill:#d7dde2}.l{stroke:#8c959f;fill:none}
.p{fill:none;stroke-width:2}.pa{stroke:#2b6ca3}.pb{stroke:#6e7781}.pc{stroke:#d9822b}.pd{stroke:#4d9a6a}
.pe{stroke:#8a63c9}.g{fill:#4d9a6a}.v{fill:#8a63c9}.w{fill:#fff;stroke:#c4ccd4}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b1}.b{fill:#6e7781}.d{fill:#343b44}
.w{fill:#161b22;stroke:#3d444d}.pb{stroke:#9da7b1}}
""".replace("\n", "")


class Picture:
    """An SVG document that grows by shapes."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title, self.parts = width, height, title, []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"/>')

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{kind}"/>')

    def __str__(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img">'
        return "\n".join([head, f"<title>{escape(self.title)}</title><style>{STYLE}</style>", *self.parts, "</svg>\n"])


def rows_of(name: str) -> list[dict]:
    text = (RESULTS / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)["results"]


# Memory and time of LLaMA-2-7B ---------------------------------------------------------------------------------

METHODS = [  # label, file of 27 November or 22 November, name of the method there, class of the bar
    ("AdamW", "columns", "AdamW fused", "b"),
    ("8-bit AdamW *", "mem", "bitsandbytes AdamW8bit", "b"),
    ("LoRA, rank 32", "columns", "LoRA r = 32, bfloat16 adapters", "b"),
    ("NanoAdam 1 %, single weights", "columns", "NanoAdam k = 1 %", "a"),
    ("NanoAdam 1 %, whole columns", "columns", "NanoAdam k = 1 %, columns", "a"),
]


def of_llama(batch: int, key: Callable[[dict], float]) -> list[tuple[str, float, str]]:
    found = []
    for label, kind, name, color in METHODS:
        row = next(row for row in rows_of(f"{kind}_b{batch}.json") if row["method"] == name)
        found.append((label, key(row), color))
    return found


def bars(picture: Picture, left: float, top: float, width: float, title: str, rows: list, digits: int = 1) -> None:
    """Horizontal bars with their values; names only where `left` leaves room for them."""
    picture.text(left, top, title, "t")
    largest = max(value for _, value, _ in rows)
    for i, (_, value, kind) in enumerate(rows):
        y = top + 14 + 24 * i
        picture.box(left, y, (width - 44) * value / largest, 16, kind)
        picture.text(left + (width - 44) * value / largest + 5, y + 13, f"{value:.{digits}f}")


def llama() -> Picture:
    picture = Picture(900, 210, "LLaMA-2-7B on one H200: peak memory and time of an iteration by optimizer")
    names = [label for label, *_ in METHODS]
    for i, name in enumerate(names):
        picture.text(216, 40 + 13 + 24 * i, name, "e")

    def peak(row: dict) -> float:
        return row["peak_bytes"]["training"] / 1e9

    bars(picture, 226, 26, 210, "GB, batch 1, checkpointing", of_llama(1, peak))
    bars(picture, 450, 26, 210, "GB, batch 8", of_llama(8, peak))
    bars(picture, 674, 26, 210, "ms an iteration, batch 8", of_llama(8, lambda row: row["ms"]), digits=0)
    picture.text(
        226, 182, "One H200, bfloat16, sequence 512, torch 2.11, 27 November 2026. * of 22 November, bitsandbytes.", "s"
    )
    picture.text(
        226,
        198,
        "At batch 1 the host decides the time, so it is left out. Peak of training, activations included.",
        "s",
    )
    return picture


def kinds() -> Picture:
    """Where the memory of batch 1 goes."""
    shown = [("weights", "b"), ("gradients", "c"), ("held", "c"), ("state", "a")]
    picture = Picture(860, 150, "LLaMA-2-7B: weights, gradients and optimizer state of AdamW and NanoAdam, in GB")
    names = ["AdamW", "single weights, 1 %", "whole columns, 1 %"]
    wanted = ["AdamW fused", "NanoAdam k = 1 %", "NanoAdam k = 1 %, columns"]
    rows = [next(row for row in rows_of("columns_b1.json") if row["method"] == name) for name in wanted]
    scale = 600 / 56
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        x, y = 170.0, 34 + 28 * i
        picture.text(x - 10, y + 14, name, "e")
        for key, kind in shown:
            size = row["bytes"][key] / 1e9
            picture.box(x, y, size * scale, 20, kind)
            if size > 3:
                picture.text(x + size * scale / 2, y + 14, f"{size:.1f}", "m")
            x += size * scale
        picture.text(x + 6, y + 14, f"{(x - 170) / scale:.1f} GB")
    for i, (label, kind) in enumerate([("weights", "b"), ("gradients", "c"), ("optimizer state", "a")]):
        picture.box(170 + 130 * i, 128, 12, 12, kind)
        picture.text(188 + 130 * i, 139, label, "s")
    picture.text(170, 20, "LLaMA-2-7B in bfloat16, head in full: what has to be held", "t")
    return picture


# How it works ---------------------------------------------------------------------------------------------------


def smallest() -> Picture:
    """Which weights of a normal distribution the smallest tenth is."""
    picture = Picture(640, 210, "The smallest 10 % of normally distributed weights by magnitude")
    limit = 0.1257  # |w| below which a tenth of a standard normal distribution lies
    left, bottom, width, height = 40, 170, 560, 130

    def place(w: float) -> tuple[float, float]:
        return left + width * (w + 3.2) / 6.4, bottom - height * math.exp(-w * w / 2)

    steps = [-3.2 + 0.02 * i for i in range(321)]
    for w in [-limit + 0.01 * i for i in range(26)]:
        x, y = place(w)
        picture.box(x, y, 1.2, bottom - y, "a")
    picture.line([place(w) for w in steps], "p pb")
    picture.line([(left, bottom), (left + width, bottom)], "l")
    picture.text(320, 190, "a weight's value before the step", "m s")
    picture.text(336, 36, "selected: the smallest 10 %", "t")
    picture.text(352, 53, "a gradient, moments, an update", "s")
    picture.text(440, 110, "all others: no gradient,", "s")
    picture.text(440, 125, "no moments, not one bit changes", "s")
    return picture


def step() -> Picture:
    """One step, from forward to update."""
    picture = Picture(
        860, 190, "One step of NanoAdam: the selection is known before backward, gradients are cut during it"
    )
    boxes = [
        (20, "1  select", ["the smallest weights,", "every mask_interval steps;", "needs no gradient"]),
        (230, "2  backward", ["a layer's dense gradient", "exists, is cut down to the", "selected entries, is freed"]),
        (440, "3  p.grad", ["the entries that are left:", "accumulate, clip, scale", "with torch's functions"]),
        (650, "4  step()", ["Adam on the selected", "weights, in float32,", "rounded once"]),
    ]
    for x, title, lines in boxes:
        picture.box(x, 40, 190, 110, "w")
        picture.text(x + 12, 64, title, "t")
        for i, words in enumerate(lines):
            picture.text(x + 12, 88 + 18 * i, words)
    for x in (212, 422, 632):
        picture.line([(x, 95), (x + 14, 95)], "p pb")
        picture.line([(x + 8, 90), (x + 14, 95), (x + 8, 100)], "p pb")
    picture.text(20, 26, "What makes it small: which weights move is known before there is a gradient", "t")
    return picture


def granularity() -> Picture:
    """A weight matrix with single weights, and with whole columns, selected."""
    picture = Picture(640, 230, "Single weights against whole input columns of a weight matrix")
    size, count = 14, 12

    def grid(left: float, chosen: Callable[[int, int], bool]) -> None:
        for i in range(count):
            for j in range(count):
                picture.box(left + size * j, 40 + size * i, size - 2, size - 2, "a" if chosen(i, j) else "d")

    picture.text(40, 26, 'granularity="weight"', "t")
    picture.text(360, 26, 'granularity="column"', "t")
    grid(40, lambda i, j: (7 * i + 5 * j + i * j) % 12 == 3)
    grid(360, lambda i, j: j == 4)
    picture.text(40, 222, "the whole product dW is computed, then cut", "s")
    picture.text(360, 222, "only these columns of dW are ever computed", "s")
    return picture


# Choosing -------------------------------------------------------------------------------------------------------


def axes(picture: Picture, frame: tuple, x_ticks: dict[float, str], y_ticks: dict[float, str], names: tuple) -> None:
    left, top, width, height = frame
    picture.line([(left, top), (left, top + height), (left + width, top + height)], "l")
    for x, words in x_ticks.items():
        picture.text(x, top + height + 16, words, "m s")
    for y, words in y_ticks.items():
        picture.text(left - 6, y + 4, words, "e s")
    picture.text(left + width / 2, top + height + 34, names[0], "m s")
    picture.text(left, top - 10, names[1], "t")


def curve(picture: Picture, frame: tuple, ranges: tuple, points: Sequence[tuple[float, float]], color: str) -> None:
    left, top, width, height = frame
    (x0, x1), (y0, y1) = ranges
    placed = [(left + width * (x - x0) / (x1 - x0), top + height * (y1 - y) / (y1 - y0)) for x, y in points]
    picture.line(placed, f"p p{color}")
    for x, y in placed:
        picture.dot(x, y, {"a": "a", "b": "b", "c": "c", "d": "g", "e": "v"}[color])


def rates() -> Picture:
    """Metric over learning rate: MiniLM on CoLA, four densities and AdamW."""
    rows = rows_of("minilm-cola.jsonl") + rows_of("minilm-ablations.jsonl") + rows_of("minilm-edges.jsonl")
    curves = [("AdamW", "adamw", "b"), ("10 % to 4 %", "nanoadam", "a"), ("1 %", "nanoadam-1", "c"),
              ("0.1 %", "nanoadam-0.1", "d")]  # fmt: skip
    picture = Picture(640, 320, "MiniLM on CoLA: Matthews correlation over the learning rate, by density")
    frame, ranges = (60, 40, 540, 210), ((-5.4, -2), (0, 36))
    axes(
        picture, frame,
        {60 + 540 * (e + 5.4) / 3.4: f"1e{e}" for e in (-5, -4, -3, -2)},
        {40 + 210 * (36 - v) / 36: str(v) for v in (0, 10, 20, 30)},
        ("learning rate", "Matthews x 100, mean of three seeds"),
    )  # fmt: skip
    for i, (label, variant, color) in enumerate(curves):
        by_rate = defaultdict(list)
        for row in rows:
            if row["variant"] == variant and row.get("metric") is not None:
                by_rate[row["learning_rate"]].append(100 * row["metric"])
        points = [(math.log10(rate), mean(values)) for rate, values in sorted(by_rate.items())]
        curve(picture, frame, ranges, points, color)
        picture.box(80 + 130 * i, 300, 12, 12, {"d": "g"}.get(color, color))
        picture.text(98 + 130 * i, 311, label, "s")
    return picture


def fronts(name: str, task: str, value: Callable[[dict], tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Of each rule, what is learned and kept (less is better), mean of seeds, by those that none of its own betters."""
    by = defaultdict(lambda: defaultdict(list))
    for row in rows_of(name):
        if row["task"] == task and row["parts"]["1"]["loss"] is not None:  # None: the run diverged
            for part, found in row["parts"].items():
                by[row["rule"]][row["lr"], part].append(value(found))
    result = {}
    for rule, places in by.items():
        most = max(map(len, places.values()))
        points = sorted(tuple(map(mean, zip(*some, strict=True))) for some in places.values() if len(some) == most)
        result[rule] = [p for i, p in enumerate(points) if all(p[1] < other[1] for other in points[:i])]
    return result


def legend(picture: Picture, wanted: Sequence[tuple[str, str, str]], places: Sequence[float], top: float) -> None:
    for (label, _, color), x in zip(wanted, places, strict=True):
        picture.box(x, top, 12, 12, {"d": "g", "e": "v"}.get(color, color))
        picture.text(x + 18, top + 11, label, "s")


def columns() -> Picture:
    """What is kept against what is learned: rules on the small Llama."""
    wanted = [("AdamW", "adamw", "b"), ("LoRA, rank 32", "lora r=32", "c"),
              ("single weights, 10 to 4 %", "weights 10->4 %", "a"),
              ("largest columns, 10 %", "columns 10 %, largest", "d"),
              ("25 %", "columns 25 %, largest", "e")]  # fmt: skip
    found = fronts("columns-llama.jsonl", "gsm8k", lambda part: (part["loss"], part["kept"]))
    picture = Picture(640, 330, "A small Llama on GSM8K: loss on what is learned against loss on what is kept")
    frame, ranges = (60, 40, 540, 210), ((1.1, 1.9), (1.85, 2.95))
    axes(
        picture, frame,
        {60 + 675 * (x - 1.1): f"{x:.1f}" for x in (1.2, 1.4, 1.6, 1.8)},
        {40 + 210 * (2.95 - y) / 1.1: f"{y:.1f}" for y in (2.0, 2.2, 2.4, 2.6, 2.8)},
        ("loss on GSM8K's answers after finetuning (less is better)", "loss on documentation that it knew before"),
    )  # fmt: skip
    for _, rule, color in wanted:
        curve(picture, frame, ranges, [p for p in found[rule] if p[0] <= 1.9 and p[1] <= 2.95], color)
    legend(picture, wanted, (60, 130, 230, 390, 530), 306)
    return picture


def columns_minilm() -> Picture:
    """The same on MiniLM: CoLA and SST-2."""
    wanted = [("AdamW", "adamw", "b"), ("LoRA", "lora r=32", "c"),
              ("single weights, 10 to 4 %", "weights 10->4 %", "a"),
              ("columns at random, 10 %", "columns 10 %, random, once", "d"),
              ("largest, 10 %", "columns 10 %, largest", "e")]  # fmt: skip
    picture = Picture(760, 330, "MiniLM on CoLA and SST-2: what is learned against what is kept")
    for left, task, metric, ticks, title in (
        (60, "cola", "matthews", (0.1, 0.2, 0.3), "CoLA: recall of what it knew before"),
        (430, "sst2", "accuracy", (0.82, 0.84, 0.86, 0.88), "SST-2: the same"),
    ):
        found = fronts("columns-minilm.jsonl", task, lambda part, metric=metric: (-part[metric], -part["kept"]))
        low, high = ticks[0] - 0.01, ticks[-1] + 0.005
        frame, ranges = (left, 40, 300, 210), ((low, high), (0.8, 1.0))
        axes(
            picture, frame,
            {left + 300 * (x - low) / (high - low): f"{x:g}" for x in ticks},
            {40 + 210 * (1 - y) / 0.2: f"{y:.2f}" for y in (0.8, 0.9, 1.0)},
            (f"{metric.capitalize()} after finetuning (more is better)", title),
        )  # fmt: skip
        for _, rule, color in wanted:
            points = [(-x, -y) for x, y in found[rule] if low <= -x <= high and -y >= 0.8]
            curve(picture, frame, ranges, points, color)
    legend(picture, wanted, (60, 150, 230, 410, 590), 306)
    return picture


SHOWN = {
    "matrix products": ("products", "a"),
    "attention": ("attention", "g"),
    "NanoAdam": ("NanoAdam's kernels", "c"),
    "": ("pointwise and the rest", "b"),
}


def backward() -> Picture:
    """The kernels of a part of one backward, one method below the other, on one scale of time."""
    rows = rows_of("columns_backward.json")
    names = {
        "adamw": "AdamW",
        "lora": "LoRA r = 32",
        "nanoadam:0.01": "single weights 1 %",
        "columns:0.01": "columns 1 %",
    }
    picture = Picture(760, 62 + 46 * len(rows), "One backward: two layers of LLaMA-2-7B")
    picture.text(10, 20, "Two of 32 layers in one backward, LLaMA-2-7B, batch 8 x 512, one H200", "t")
    longest = max(row["backward"]["shown_us"] for row in rows)
    for number, row in enumerate(rows):
        top, found = 44 + 46 * number, row["backward"]
        picture.text(10, top + 4, names[row["given"]])
        picture.text(
            750, top + 4, f"{found['shown_us'] / 1000:.1f} ms; whole backward {found['us'] / 1000:.0f} ms", "s e"
        )
        picture.box(10, top + 10, 740 * found["shown_us"] / longest, 18, "d")
        for kind, start, us in found["kernels"]:
            color = SHOWN.get(kind, SHOWN[""])[1]
            width = min(us, found["shown_us"] - start) * 740 / longest
            picture.box(10 + 740 * start / longest, top + 10, max(width, 0.2), 18, color)
    left = 10
    for name, color in SHOWN.values():
        picture.box(left, picture.height - 18, 11, 11, color)
        picture.text(left + 16, picture.height - 8, name, "s")
        left += 170
    return picture


def intervals() -> Picture:
    """Metric and forgetting over the mask interval."""
    rows = rows_of("minilm-ablations.jsonl")
    found = defaultdict(list)
    for row in rows:
        name = row["variant"]
        if name.startswith("m-") and row["learning_rate"] == 6e-4:
            found[int(name[2:])].append((100 * row["metric"], row["retained"]["gsm8k: recall@1"]["forgetting"]))
    picture = Picture(640, 250, "MiniLM on CoLA at 10 %: Matthews and what is forgotten over the mask interval")
    table = sorted(found.items())
    picture.text(60, 26, "Matthews x 100, and what is forgotten, at 10 % and 6e-4", "t")
    for i, (m, values) in enumerate(table):
        y = 48 + 26 * i
        metric, lost = mean(v[0] for v in values), mean(v[1] for v in values)
        spread = stdev(v[0] for v in values) if len(values) > 1 else 0.0
        picture.text(100, y + 13, f"m = {m}", "e")
        picture.box(110, y, 8 * metric, 16, "a")
        picture.text(118 + 8 * metric, y + 13, f"{metric:.1f} ± {spread:.1f}; recall lost {lost:.3f}")
    return picture


DRAWN: dict[str, Callable[[], Picture]] = {
    "llama-2-7b": llama, "kinds": kinds, "smallest": smallest, "step": step, "granularity": granularity,
    "rates": rates, "columns": columns, "columns-minilm": columns_minilm, "backward": backward, "intervals": intervals,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is out of date")
    arguments = parser.parse_args()
    stale = []
    for name, draw in DRAWN.items():
        path, text = PICTURES / f"{name}.svg", str(draw())
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not arguments.check:
                path.write_text(text)
    print(("out of date: " if arguments.check else "written: ") + (", ".join(stale) or "none"))
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
