"""The benchmarks run on tiny shapes and write what their README says; nothing here looks at a time."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import nanoadam
from nanoadam.comparing import shapes

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run(program, *arguments):
    """In this process: to start one takes longer than most of what they do here."""
    file, out, errors = FOLDER / f"{program}.py", io.StringIO(), io.StringIO()
    code, threads = 0, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", [str(file), *arguments])
        patch.syspath_prepend(str(FOLDER))
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess([program, *arguments], code, out.getvalue(), errors.getvalue())


def run_alone(program, *arguments):
    """As a user starts it, in a process of its own."""
    source = str(Path(nanoadam.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, str(FOLDER / f"{program}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)


def results(program, *arguments, run=run):
    done = run(program, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["benchmark"] == program
    assert torch.__version__.startswith(data["machine"]["versions"]["torch"])  # a CUDA build adds its own part
    assert data["machine"]["date"]
    return data


COUNTS = {
    "minilm": 22_713_216,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "opt-1.3b": 1_315_758_080,
    "vit-large": 304_326_632,
    "resnet-101": 44_549_160,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_add_up_to_the_published_count(name):
    assert shapes.count(shapes.MODELS[name]()) == COUNTS[name]


def transformers_model(name):
    t = pytest.importorskip("transformers")
    large = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    small = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    wide = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192}
    llama3 = {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 128256}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
    makers = {
        "minilm": lambda: t.BertModel(t.BertConfig(**small)),
        "bert-base": lambda: t.BertModel(t.BertConfig()),
        "bert-large": lambda: t.BertModel(t.BertConfig(**large)),
        "opt-1.3b": lambda: t.OPTForCausalLM(t.OPTConfig(**wide, num_hidden_layers=24, num_attention_heads=32)),
        "vit-large": lambda: t.ViTForImageClassification(t.ViTConfig(**large, num_labels=1000)),
        "resnet-101": lambda: t.ResNetForImageClassification(t.ResNetConfig(depths=[3, 4, 23, 3], num_labels=1000)),
        "llama-3.2-3b": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama3, **heads)),
        "llama-2-7b": lambda: t.LlamaForCausalLM(t.LlamaConfig()),
    }
    with torch.device("meta"):
        return makers[name]()


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_are_those_of_transformers_and_dense_ones_those_of_param_groups(name):
    model = transformers_model(name)
    found = Counter(
        (tuple(parameter.shape), group["dense"])
        for group in nanoadam.param_groups(model)
        for parameter in group["params"]
    )
    assert Counter((parameter.shape, parameter.dense) for parameter in shapes.MODELS[name]()) == found


def test_cpu_step_measures_parts_of_every_method():
    data = results("cpu_step", "--model", "tiny", "--repeats", "1", "--threads", "1", "--densities", "0.01,0.1")
    assert [result["method"] for result in data["results"]] == [
        "AdamW foreach",
        "AdamW fused",
        "NanoAdam k = 1 %",
        "NanoAdam k = 10 %",
    ]
    for result in data["results"][2:]:
        assert set(result["ms"]) == {"step", "gather", "update", "refresh"}
        whole = result["ms"]["step"] + result["ms"]["refresh"] / data["settings"]["interval"]
        assert math.isclose(result["per_step_ms"], whole)
    assert data["weights"] == 107_328


def test_step_measures_peers_and_nanoadam_on_the_same_tensors():
    few = ["--model", "tiny", "--device", "cpu", "--repeats", "1", "--warmup", "1", "--densities", "0.1"]
    data = results("step", *few, "--peers", "adamw,sgd", "--launches")
    [found] = data["models"]
    adamw, sgd, nano = found["results"]
    assert not found["skipped"]
    assert adamw["state_bytes"] == 2 * 2 * 107_328 + 4 * 21  # two bfloat16 moments and a step count a tensor
    assert sgd["state_bytes"] == 0
    assert set(nano["ms"]) == {"step", "update", "gather", "gather_in_batches", "refresh"}
    assert nano["held_bytes"] == 4 * nanoadam_selected(0.1)
    assert 0 < nano["stayed_selected"] <= 1
    assert data["copy_bytes_per_second"] > 0


def nanoadam_selected(density):
    cut = nanoadam.chunks.layout
    return sum(cut(shape, density).selected for _, shape, dense in shapes.MODELS["tiny"]() if not dense)


@pytest.mark.parametrize("checkpointing", ["--checkpointing", "--no-checkpointing"])
def test_finetune_memory_trains_with_every_kind_of_method(checkpointing):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    few = ["--device", "cpu", "--sequence", "16", "--steps", "1", "--warmup", "1", checkpointing]
    data = results("finetune_memory", *few, "--optimizers", "adamw,sgd,lora,nanoadam:0.1")
    assert [result["optimizer"] for result in data["results"]] == ["adamw", "sgd", "lora", "nanoadam"]
    assert all(result["finite"] for result in data["results"])
    nano = data["results"][-1]
    assert nano["bytes"]["held"] > 0
    assert nano["bytes"]["gradients"] < data["results"][0]["bytes"]["gradients"]


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("step", ["--model", "bert-huge"], "unknown 'bert-huge': see --help for the names"),
        ("cpu_step", ["--model", "tiny", "--densities", "many"], "--densities must be numbers"),
        ("finetune_memory", ["--optimizers", "adam"], "optimizers are adamw, sgd, lora"),
    ],
)
def test_bad_input_gives_one_sentence(program, arguments, sentence):
    done = run(program, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_plot_shows_every_method(tmp_path):
    pytest.importorskip("transformers")
    few = ["--device", "cpu", "--sequence", "16", "--steps", "1", "--warmup", "1"]
    (tmp_path / "memory.json").write_text(
        json.dumps(results("finetune_memory", *few, "--optimizers", "sgd,nanoadam:0.1"))
    )
    done = run("plot", str(tmp_path / "memory.json"), "--out", str(tmp_path / "memory.svg"))
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "memory.svg").read_text()
    assert "<!-- SGD -->" in drawn and "<!-- NanoAdam k = 10 % -->" in drawn


@pytest.mark.parametrize("program", ["cpu_step", "step", "finetune_memory", "plot"])
def test_help_has_an_example(program):
    done = (run_alone if program == "step" else run)(program, "--help")
    assert done.returncode == 0
    assert f"example: python benchmarks/{program}.py" in " ".join(done.stdout.split())


def test_fronts_of_comparisons(tmp_path):
    pytest.importorskip("matplotlib")
    retained = lambda left: {"old: recall@1": {"before": 1.0, "after": left, "forgetting": 1 - left}}  # noqa: E731
    lines = [
        {"variant": name, "optimizer": name, "learning_rate": rate, "seed": seed, "metric": metric + 0.01 * seed,
         "l2_moved": 1.0, "touched": 0.5, "retained": retained(left)}
        for name, rate, metric, left in (("a", 1e-3, 0.4, 0.5), ("a", 1e-2, 0.2, 0.9), ("b", 1e-3, 0.3, 0.4))
        for seed in (0, 1)
    ]  # fmt: skip
    lost = {"metric": None, "stopped": "the loss is nan", "retained": {}}
    lines.append({**lines[0], "learning_rate": 1.0, **lost})
    lines += [{**lines[0], "learning_rate": 0.1, "metric": 0.9}, {**lines[0], "learning_rate": 0.1, "seed": 1, **lost}]
    lines.append({**lines[0], "variant": "c", "optimizer": "c", **lost})
    file, picture = tmp_path / "metrics.jsonl", tmp_path / "fronts.svg"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("compare_fronts", str(file), "--left", "old: recall@1", "--level", "0.35", "--svg", str(picture))
    assert done.returncode == 0, done.stderr
    a = next(line.split() for line in done.stdout.split("\n\n")[1].splitlines() if line.startswith("a "))
    assert a[2:10] == ["0.001", "lower", "40.5", "±", "0.7", "0.500", "±", "0.000"]
    assert a[10] == "0.285"  # 0.405 * 0.5 + 0.205 * 0.4: a rate that one of its seeds diverged at has no mean
    assert a[-1] == "0.500"
    assert "c 1 none - - -" in " ".join(done.stdout.split())
    assert "old: recall@1" in picture.read_text()
    assert "not every run has" in run("compare_fronts", str(file), "--left", "old: mrr").stderr
    assert "stopped: a at 0.1 (1), a at 1 (1), c at 0.001 (1)\nmetric at most 0: none" in done.stdout

    pair = ["--pair", "a", "b", "--constant", "0.3", "--markdown"]
    done = run("compare_fronts", str(file), "--left", "old: recall@1", "--only", "b,a", *pair)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows if row[0] in ("a", "b")][:2] == ["b", "a"]
    expected = ["a - b", "0.001 (chosen)", "+10.0, +10.0", "+10.0 ± 0.0", "+0.100, +0.100", "+0.100 ± 0.000"]
    assert rows[-1] == expected
    assert "metric at most 0.3: b at 0.001 (1), a at 0.01 (2)" in done.stdout
    refused = run("compare_fronts", str(file), "--left", "old: recall@1", "--only", "a,d")
    assert refused.returncode == 2
    assert "there is no variant d; there is a, b, c" in refused.stderr


def test_fronts_of_forgetting(tmp_path):
    pytest.importorskip("matplotlib")
    start = {"kind": "task2", "norms": "trained", "start": "AdamW", "start_rate": 2e-4, "l2": 1.0, "touched": 0.5}
    lines = [
        {**start, "method": name, "rate": rate, "seed": seed, "task1": 0.8 + bonus, "task2": task2 + 0.01 * seed,
         "task1_after": after + bonus, "course": [[10, 0.6, 0.7], [20, task2, after]], "series": series}
        for name, series, bonus, points in (
            ("AdamW", 1, 0.0, [(1e-3, 0.8, 0.5), (1e-2, 0.7, 0.7)]),
            ("NanoAdam 1 %", 1, 0.0, [(1e-3, 0.8, 0.6)]),
            ("random 1 %", 2, 0.1, [(1e-3, 0.8, 0.6)]),
        )
        for rate, task2, after in points
        for seed in (0, 1, 2)
    ]  # fmt: skip
    lines.append({**start, "kind": "task1", "method": "AdamW", "rate": 2e-4, "seed": 0, "start": None, "task1": 0.8})
    lost = {"task2": None, "task1_after": None, "stopped": "the loss is not finite"}
    lines += [{**line, "rate": 1.0, **lost} for line in lines if line["method"] == "NanoAdam 1 %"]
    rows_file, lines_file = tmp_path / "forgetting.json", tmp_path / "metrics.jsonl"
    rows_file.write_text('{\n"runs": ' + json.dumps(lines) + "\n}\n")
    lines_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = ["--pair", "NanoAdam 1 %", "AdamW", "--pair", "random 1 %", "NanoAdam 1 %"]
    done = run("vision_fronts", str(rows_file), *pairs, "--pictures", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    nano = next(row for row in rows if row[0] == "NanoAdam 1 %")
    # (0.81 - 0.5) * (0.6 - 0.1), and from a loss of 0.7: (0.81 - 0.5) * (0.7 - 0.2); by seed ± 0.005
    assert nano[1:] == ["1", "0.155 ± 0.005", "0.155 ± 0.005", "-", "-", "-"]
    other = next(row for row in rows if row[0] == "random 1 %")
    assert other[1:4] == [
        "2",
        "0.186 ± 0.006",
        "0.155 ± 0.005",
    ]  # 0.1 more of task 1 to begin with: what is kept is level
    shared, apart = rows[-2:]
    # AdamW: 0.2 * 0.6 + 0.1 * 0.4 for seed 0, then 0.21 * 0.6 + 0.1 * 0.4, 0.22 * 0.6 + 0.1 * 0.4
    assert (
        shared
        == ["NanoAdam 1 % - AdamW", "-0.010, -0.011, -0.012", "**-0.011 ± 0.001**", "1 of 2", "0 of 1"] + ["-"] * 4
    )
    assert apart == ["random 1 % - NanoAdam 1 %", "other start", "+0.000 ± 0.007", "1 of 1", "1 of 1"] + ["-"] * 4
    assert all((tmp_path / f"forgetting_{name}.png").stat().st_size for name in ("fronts", "own", "variants"))
    assert run("vision_fronts", str(lines_file), *pairs).stdout == done.stdout
    early = run("vision_fronts", str(rows_file), "--epoch", "10").stdout
    assert "| NanoAdam 1 % | 1 | 0.060 ± 0.000 | 0.060 ± 0.000 |" in early  # (0.6 - 0.5) * (0.7 - 0.1)
    assert "there is no method b" in run("vision_fronts", str(rows_file), "--pair", "AdamW", "b").stderr


def test_granularity_selects_within_chunks_of_the_size_asked_for():
    options = ("--seeds", "1", "--hidden", "32", "--chunks", "64,4096", "--learning-rates", "3e-3")
    found = results("granularity", *options)
    runs = {(line["chunk"], line["density"]): line for line in found["runs"]}
    assert set(runs) == {(64, 0.1), (64, 0.01), (4096, 0.1), (4096, 0.01)}
    # At 1 % a chunk of 64 keeps one weight, so 1.6 %: more move than in the one chunk of 1,024 or 2,048.
    assert runs[64, 0.01]["touched"] > 1.2 * runs[4096, 0.01]["touched"]
    assert runs[64, 0.1]["l2_moved"] != runs[4096, 0.1]["l2_moved"]


@pytest.mark.slow
def test_communication_measures_replicas_beside_ddp():
    pytest.importorskip("transformers")
    options = ["--cpu", "--model", "tiny", "--sequence", "8", "--steps", "1", "--methods", "ddp,replicate:0.01"]
    data = results("communication", *options)
    ddp, replicas = data["results"]
    assert "error" not in ddp
    assert "error" not in replicas
    assert ddp["sent_bytes"] == 2 * ddp["weights"]  # bfloat16
    assert replicas["sent_bytes"] < 0.15 * ddp["sent_bytes"]  # most of it the head, which is small only in large models
    assert replicas["state_bytes"] < ddp["state_bytes"]


def test_communication_on_paper():
    data = results("communication", "--paper")
    assert len(data["paper"]) == 3 * 2 * (1 + 4 + 4)  # models, densities; GPUs of a host and of two networks
    for row in data["paper"]:
        assert row["replicate"] < row["ddp"] < row["fsdp"]
