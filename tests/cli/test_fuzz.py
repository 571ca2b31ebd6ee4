"""Whatever is in a file, a config or on the command line: exit code 0 or 2, one sentence, no traceback and no hang.

Cases of four kinds from fixed seeds: a few each time, and 2,000 with `NANOADAM_FUZZ=500 pytest tests/cli/test_fuzz.py`.
Data and configs go through everything up to the first step on a tiny model, which is loaded once; a few of them through
a whole run.
"""

import copy
import json
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import models, rates
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import FIELDS, TASKS

CASES = int(os.environ.get("NANOADAM_FUZZ", "8"))
"""Of each kind."""

FIRST = int(os.environ.get("NANOADAM_FUZZ_FIRST", "0"))
"""The first seed."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(300 if CASES < 50 else 3600),
]

NAMES = ["text", "sentence1", "sentence2", "label", "labels", "prompt", "completion", "messages", "tokens", "ner_tags",
         "question", "answer", "instruction", "input", "output", "id", "Größe", "", " ", "x" * 50]  # fmt: skip
WORDS = [*tiny.WORDS, "", " ", "\n", '"', "'", ",", ";", "\t", "\x00", "\ud800", "é", "漢", "007", "1", "-1", "1e400",
         "nan", "NaN", "null", "true", "{}", "[]", "\ufeff", "a" * 400]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"bert": tiny.bert_folder(root / "bert"), "llama": tiny.causal_folder(root / "llama"),
            "chat": tiny.causal_folder(root / "chat", chat=True)}  # fmt: skip


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything but the training itself; a model of the same kind is loaded once."""
    known: dict[Any, Any] = {}
    load, tokenizer = models._load, models.load_tokenizer

    def loaded(config: Any, options: dict[str, Any]) -> Any:
        key = (config.model, config.task, config.dtype, config.new_head, config.init_from_config, repr(options))
        if key not in known:
            known[key] = load(config, options)
        return copy.deepcopy(known[key])

    def tokens(config: Any) -> Any:
        key = (config.tokenizer, config.model)
        if key not in known:
            known[key] = tokenizer(config)
        return known[key]

    def done(job: Any, out: Path, *_: Any) -> dict[str, Any]:
        raise ValueError("ready to train")

    monkeypatch.setattr(models, "_load", loaded)
    monkeypatch.setattr(models, "load_tokenizer", tokens)
    monkeypatch.setattr(rates, "chosen", lambda job, tell: rates.Found(1e-3, "given"))
    monkeypatch.setattr(finetune, "_run", done)
    monkeypatch.chdir(tmp_path)


def ends_well(arguments: list[str], capsys: pytest.CaptureFixture[str], what: object) -> str:
    """Exit code 0 or 2, and in that case one sentence."""
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code in (0, 2), (code, what)
    if code == 0:
        return "done"
    said = [line for line in captured.err.splitlines() if line.startswith("nanoadam: ")]
    assert len(said) == 1 and len(said[0]) > 20, (captured.err, what)
    assert "Traceback" not in captured.err
    return said[0]


def value(draw: random.Random, deep: int = 0) -> Any:
    kind = draw.randrange(12 if deep < 2 else 8)
    if kind < 4:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(6)))
    if kind == 4:
        return draw.choice([0, 1, -1, 2**31, 2**63, -(2**63), 10**30, True, False])
    if kind == 5:
        return draw.choice([0.5, -0.0, 1e308, float("nan"), float("inf"), 3.0])
    if kind < 8:
        return draw.choice([None, "", "good", "bad", "0", "1"])
    if kind < 10:
        return [value(draw, deep + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(["role", "content", "from", "value", "a"]): value(draw, deep + 1) for _ in range(2)}


def options(draw: random.Random, folders: dict[str, Path]) -> list[str]:
    found = ["--model", str(folders[draw.choice(list(folders))]), "--device", "cpu", "--max-steps", "1"]
    if draw.random() < 0.5:
        found += ["--task", draw.choice([task for task in TASKS if task != "image-classification"])]
    if draw.random() < 0.3:
        found += ["--text-column", draw.choice(NAMES)]
    if draw.random() < 0.3:
        found += ["--label-column", draw.choice(NAMES)]
    for flag in ("--truncate", "--new-head", "--packing"):
        if draw.random() < 0.3:
            found.append(flag)
    return found


def test_tables(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = 0
    for seed in range(FIRST, FIRST + CASES):
        draw = random.Random(seed)
        names = draw.sample(NAMES, draw.randrange(1, 5))
        mark = draw.choice([",", ";", "\t", "|"])
        rows = [names] * (draw.random() < 0.9)
        rows += [[str(value(draw, 2)) for _ in names] for _ in range(draw.randrange(12))]
        if draw.random() < 0.2 and rows:
            rows[draw.randrange(len(rows))].append("one more")
        quoted = draw.random() < 0.5
        text = "\n".join(mark.join(f'"{cell}"' if quoted else cell for cell in row) for row in rows)
        path = tmp_path / f"table{draw.choice(['.csv', '.tsv', '.txt'])}"
        encoding = draw.choice(["utf-8", "utf-16", "latin-1"])
        path.write_bytes(text.encode(encoding, errors="replace"))
        more = ["--columns", ",".join(names)] if draw.random() < 0.2 else []
        arguments = ["finetune", "--train", str(path), "--out", str(tmp_path / "run"), *more, *options(draw, folders)]
        reached += ends_well(arguments, capsys, (seed, text[:300])).endswith("ready to train")
    assert reached > CASES / 100 - 1


def test_json_lines(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = 0
    for seed in range(FIRST, FIRST + CASES):
        draw = random.Random(seed)
        names = draw.sample(NAMES, draw.randrange(1, 5))
        likely = draw.random() < 0.6  # of one kind a column, so that some get through
        kinds = {name: draw.choice(["text", "class", "list"]) for name in names}
        lines = []
        for _ in range(draw.randrange(14)):
            row = {name: plain(draw, kinds[name]) if likely else value(draw) for name in names if draw.random() < 0.97}
            lines.append(json.dumps(row))
        if draw.random() < 0.15:
            lines.append(draw.choice(["{", "[1]", "nul", '{"a": }', "\x00", '{"text": "\\ud800"}']))
        path = tmp_path / draw.choice(["rows.jsonl", "rows.json", "rows.ndjson"])
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        arguments = ["finetune", "--train", str(path), "--out", str(tmp_path / "run"), *options(draw, folders)]
        reached += ends_well(arguments, capsys, (seed, lines[:3])).endswith("ready to train")
    assert reached > CASES / 50 - 1


def plain(draw: random.Random, kind: str) -> Any:
    if kind == "text":
        return " ".join(draw.choice(tiny.WORDS) for _ in range(draw.randrange(1, 9)))
    return draw.choice(["good", "bad"]) if kind == "class" else [draw.choice(["good", "bad"])]


def test_configs(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    train = str(tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12)))
    wild = [0, 1, -1, 0.5, -0.5, 1e300, float("nan"), float("inf"), True, "", "auto", "no", "good", "adamw", [], ["a"],
            10**18, "nanoadam", "linear", "bfloat16", "lora", "shira", "oft", "column"]  # fmt: skip
    reached = 0
    for seed in range(FIRST, FIRST + CASES):
        draw = random.Random(seed)
        content: dict[str, Any] = {"model": str(folders["bert"]), "train": train, "max_steps": 1, "device": "cpu"}
        left_out = ("device", "threads", "trust_remote_code", "init_from_config")
        tame = draw.random() < 0.4
        for name in draw.sample([name for name in FIELDS if name not in left_out], draw.randrange(1, 4)):
            field = FIELDS[name]
            known = [*field.metadata["choices"], *([field.default] if field.default is not None else [])]
            if name != "task" and (known or not tame):
                content[name] = draw.choice(known if tame else [*known, *wild])
        if draw.random() < 0.1:
            content[draw.choice(["lerning_rate", "x y", "model "])] = 1
        content = {key: list(v) if isinstance(v, tuple) else v for key, v in content.items() if v is not None}
        text = tomli_w.dumps(content)
        if draw.random() < 0.1:
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice('=["\n#') + text[place:]
        (tmp_path / "config.toml").write_text(text)
        arguments = ["finetune", str(tmp_path / "config.toml"), "--out", str(tmp_path / "run")]
        reached += ends_well(arguments, capsys, (seed, text)).endswith("ready to train")
    assert reached > CASES / 10


def test_command_lines(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = str(tiny.jsonl(tmp_path / "train.jsonl", tiny.sentences(12)))
    commands = [
        "finetune",
        "predict",
        "evaluate",
        "compare",
        "memory",
        "analyze",
        "reproduce",
        "bench",
        "demo",
        "delta",
    ]
    flags = ["--" + name.replace("_", "-") for name in FIELDS]
    flags += ["--out", "--resume", "--json", "--data", "--text", "--params", "--seeds", "--jobs", "--keep", "--list",
              "--before", "--after", "--shapes", "--only", "--scale", "--version", "--nothing", "-x", "--"]  # fmt: skip
    values = ["", "0", "1", "-1", "1.5", "nan", "1e-3", "a,b", ",", str(folders["bert"]), train, "/nowhere", ".",
              "x@y", "none", "best", "\n", "é", "--json", string.printable]  # fmt: skip
    for seed in range(FIRST, FIRST + CASES):
        draw = random.Random(seed)
        command = draw.choice(commands)
        arguments = [command] if draw.random() < 0.97 else []
        if draw.random() < 0.6 and command in ("finetune", "compare"):
            arguments += ["--model", str(folders["bert"]), "--train", train, "--max-steps", "1", "--device", "cpu"]
        for _ in range(draw.randrange(5)):
            arguments.append(draw.choice(flags))
            if draw.random() < 0.8:
                arguments.append(draw.choice(values))
        heavy = {"demo", "bench", "reproduce", "compare"} & set(arguments) and "--help" not in arguments
        if heavy:  # they would work: refused at the end at the latest
            arguments.append(draw.choice(["--nothing", "--seeds=x", "stray"]))
        ends_well(arguments, capsys, arguments)


def test_some_of_them_to_the_end(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for seed in range(1 if CASES < 500 else 12):
        draw = random.Random(seed)
        rows = [{"text": " ".join(draw.choice(tiny.WORDS) for _ in range(draw.randrange(1, 6))),
                 "label": draw.choice(["a", "b"])} for _ in range(draw.randrange(2, 30))]  # fmt: skip
        path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
        arguments = ["finetune", "--model", str(folders["bert"]), "--train", str(path), "--max-steps", "2", "--device",
                     "cpu", "--out", str(tmp_path / f"run{seed}"), "--batch-size", str(draw.choice([1, 3, 64])),
                     "--optimizer", draw.choice(["nanoadam", "adamw", "sgd", "oft"])]  # fmt: skip
        ends_well(arguments, capsys, (seed, rows))
