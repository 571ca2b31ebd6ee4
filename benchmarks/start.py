"""How long the command takes to say something, and to its first step.

    python benchmarks/start.py --json docs/results/start.json

`nanoadam --help` and `nanoadam finetune --help`, and `nanoadam finetune` on a small model that is made on the spot (a
BERT of 4 layers, 256 wide, or --model) and 2,000 rows: from the start of the process to the end of its first step, its
evaluation before training left out (2 rows) and the learning rate given.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; a small BERT by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures; - for stdout")
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        rows.setdefault("nanoadam --help", []).append(_seconds(["--help"]))
        rows.setdefault("nanoadam finetune --help", []).append(_seconds(["finetune", "--help"]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = arguments.model or str(_model(root / "model"))
        for number in range(max(1, arguments.repeats // 2)):
            found = _to_first_step(root, model, number)
            rows.setdefault("nanoadam finetune, to the end of its first step", []).append(found)
    table = [(name, statistics.median(values), min(values), max(values)) for name, values in rows.items()]
    common.show(arguments.json, common.table(("seconds", "median", "least", "most"), table))
    common.save(arguments.json, {**common.machine(), "seconds": rows})


def _seconds(arguments: list[str]) -> float:
    clock = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nanoadam", *arguments], check=True, capture_output=True)
    return time.perf_counter() - clock


def _model(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(5_000))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", model_max_length=128
    )
    config = BertConfig(vocab_size=len(names), hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=1024)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _to_first_step(root: Path, model: str, number: int) -> float:
    draw: Any = random.Random(number)
    rows = [{"text": " ".join(f"word{draw.randrange(5_000)}" for _ in range(20)), "label": i % 2} for i in range(2_000)]
    for name, some in (("train", rows), ("dev", rows[:2])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    command = [sys.executable, "-m", "nanoadam", "finetune", "--model", model, "--train", str(root / "train.jsonl"),
               "--validation", str(root / "dev.jsonl"), "--max-steps", "1", "--learning-rate", "1e-3",
               "--no-save-model", "--out", str(root / f"run{number}"), "--json"]  # fmt: skip
    clock = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = root / f"run{number}" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and '"event": "train"' in metrics.read_text():
            break
        time.sleep(0.01)
    seconds = time.time() - clock
    process.wait()
    return seconds


if __name__ == "__main__":
    main()
