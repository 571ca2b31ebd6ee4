"""A finetuning run from data to report, on tiny models: complete, rerunnable, and resumable bit for bit."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

from safetensors.torch import load_file

import tiny
from browser import browsed
from nanoadam import cli
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import folders, training
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny.bert_folder(root / "bert"),
        "llama": tiny.causal_folder(root / "llama"),
        "chat": tiny.causal_folder(root / "chat", chat=True),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = tiny.sentences(40)
    tiny.jsonl(root / "train.jsonl", rows)
    tiny.jsonl(root / "dev.jsonl", tiny.sentences(10, first=40))
    (root / "train.json").write_text(json.dumps(rows))
    (root / "cola.tsv").write_text("".join(f'x\t{int(r["label"] == "good")}\t*\t{r["text"]} "\n' for r in rows))
    pairs = "".join(f"{r['text']},the film is {r['label']},{i % 5}.5\n" for i, r in enumerate(rows))
    (root / "pairs.csv").write_text("one,two,likeness\n" + pairs)
    import pandas

    pandas.DataFrame(rows).to_parquet(root / "train.parquet")
    tiny.jsonl(root / "prompts.jsonl", [{"prompt": r["text"], "completion": r["label"]} for r in rows])
    chats = [
        {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
        for r in rows
    ]
    tiny.jsonl(root / "chats.jsonl", chats)
    return root


def config(models: dict[str, Path], files: Path, **keys: object) -> Config:
    base = {
        "model": str(models["bert"]), "train": str(files / "train.jsonl"), "validation": str(files / "dev.jsonl"),
        "batch_size": 8, "max_steps": 6, "log_every": 2, "save_every": 2, "learning_rate": 1e-2, "density": 0.25,
        "density_end": 0.1, "mask_interval": 2, "density_interval": 2, "device": "cpu", "warmup": 0.0,
    }  # fmt: skip
    return Config(**{**base, **keys})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def timeless(out: Path) -> list[dict[str, object]]:
    lines = folders.read_lines(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune.run(config(models, files), out)
    return out


def test_the_run_folder_is_complete(whole: Path) -> None:
    expected = {"config.toml", "manifest.json", "metrics.jsonl", "report.html", "checkpoints", "model"}
    assert {p.name for p in whole.iterdir()} == expected
    assert [p.name for p in (whole / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert (whole / "model" / "tokenizer.json").is_file()
    assert not list((whole / "model").glob("*.bin"))  # nothing pickled


def test_the_manifest_answers_what_reviewers_ask(whole: Path, files: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    wanted = {"kind", "pseudocode", "code", "data", "hardware", "versions", "settings", "seeds", "results", "model"}
    assert wanted <= manifest.keys()
    assert manifest["data"]["train"]["rows"] == 40
    import hashlib

    assert manifest["data"]["train"]["sha256"] == hashlib.sha256((files / "train.jsonl").read_bytes()).hexdigest()
    assert manifest["data"]["validation"]["sha256_of_rows"] != manifest["data"]["train"]["sha256_of_rows"]
    results = manifest["results"]
    assert results["steps"] == 6
    assert {"accuracy", "f1", "matthews", "loss"} <= results["final"].keys()
    assert 0 < results["touched"] < 0.6
    assert results["l2_moved"] > 0
    assert {"weights", "gradients", "state"} <= results["memory"].keys()


def test_metrics_tell_the_course_of_the_run(whole: Path) -> None:
    lines = folders.read_lines(whole / "metrics.jsonl")
    trained = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 4, 6]
    assert [line["density"] for line in trained] == pytest.approx([0.25, 0.25, 0.2, 0.15])
    assert all({"loss", "grad_norm", "learning_rate", "touched", "memory"} <= line.keys() for line in trained)
    assert [line["step"] for line in lines if line["event"] == "evaluation"][-1] == 6


def test_the_norm_of_all_gradients_is_taken_only_where_it_is_logged(whole: Path, tmp_path: Path, monkeypatch) -> None:
    from accelerate import Accelerator

    taken = []
    norm = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args, **kw: taken.append(1) or norm(*args, **kw))
    config = dataclasses.replace(
        Config(**configs.read(whole / "config.toml")), optimizer="adamw", log_every=5, save_model=False
    )
    finetune.run(config, tmp_path / "run")
    lines = [line for line in folders.read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "train"]
    assert [line["step"] for line in lines] == [1, 5, 6]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert len(taken) == 3


def test_the_report_needs_no_other_file(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # whole and well-formed
    assert "src=" not in page
    assert "<link" not in page
    for text in ("Matthews", "Where does the memory go?", "How many weights does it work on?", "AdamW, by formula"):
        assert text in page


def test_the_report_opens_in_a_browser(whole: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (whole / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert dom.count("<svg") == 6
    assert "How it was run" in dom


def test_the_report_fits_a_phone_without_an_error(whole: Path, tmp_path: Path) -> None:
    found = browsed((whole / "report.html").read_text(), tmp_path)
    assert int(str(found["wide"])) <= 390
    assert str(found["tip"]).startswith("step ")


def test_config_toml_reruns_the_run(whole: Path, tmp_path: Path) -> None:
    text = (whole / "config.toml").read_text()
    assert all(key in text for key in configs.FIELDS)
    finetune.run(Config(**configs.read(whole / "config.toml")), tmp_path / "again")
    assert_same(whole, tmp_path / "again")
    assert timeless(whole) == timeless(tmp_path / "again")
    assert (tmp_path / "again" / "config.toml").read_text() == text


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(
    whole: Path, models: dict[str, Path], files: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "stopped"

    def stop(line: dict[str, object]) -> None:
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(config(models, files), out, stop)
    finetune.resume(out)
    assert_same(whole, out)
    assert timeless(whole) == timeless(out)


def test_adamw_resumes_bit_for_bit_too_within_an_epoch(models: dict[str, Path], files: Path, tmp_path: Path) -> None:
    keys = {
        "optimizer": "adamw",
        "max_steps": 9,
        "save_every": 3,
        "accumulate": 2,
        "batch_size": 4,
        "max_grad_norm": 0.5,
    }
    finetune.run(config(models, files, **keys), tmp_path / "whole")

    def stop(line: dict[str, object]) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(config(models, files, **keys), tmp_path / "stopped", stop)
    finetune.resume(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


KILLED = """
import os, signal, sys
from pathlib import Path
from nanoadam import cli
from nanoadam.finetuning import folders
publish = folders.publish
def die(folder, final):
    if final.name == "checkpoint-4":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(folder, final)
folders.publish = die
cli.main(["finetune", sys.argv[1], "--out", sys.argv[2]])
"""


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = [sys.executable, "-W", "ignore", "-c", KILLED, str(whole / "config.toml"), str(out)]
    same = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums over more threads round otherwise
    assert subprocess.run(arguments, check=False, capture_output=True, env=same).returncode == -9
    assert (out / "checkpoints" / ".writing").is_dir()  # it was in the middle of it
    assert finetune.last_checkpoint(out / "checkpoints").name == "checkpoint-2"
    finetune.resume(out)
    assert_same(whole, out)
    assert not (out / "checkpoints" / ".writing").exists()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_whole(
    whole: Path, models: dict[str, Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: object, path: object, *more: object) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(folders.RunError, match=r"step 4 could not be written \(.*No space left.*checkpoint-2"):
            finetune.run(config(models, files), tmp_path / "full")
    finetune.resume(tmp_path / "full")
    assert_same(whole, tmp_path / "full")


def test_a_loss_of_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    models: dict[str, Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.RunTrainer.compute_loss

    def broken(self: training.RunTrainer, *args: object, **kwargs: object) -> object:
        loss = step(self, *args, **kwargs)
        return loss if isinstance(loss, tuple) or self.state.global_step != 4 else loss * float("nan")

    monkeypatch.setattr(training.RunTrainer, "compute_loss", broken)
    with pytest.raises(
        folders.RunError, match=r"the loss is nan at step 5: the last good checkpoint is .*checkpoint-4"
    ):
        finetune.run(config(models, files), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "model.safetensors").is_file()


def test_weights_that_are_not_finite_become_no_checkpoint(models: dict[str, Path], files: Path, tmp_path: Path) -> None:
    keys = {"optimizer": "sgd", "learning_rate": 1e38, "save_every": 1, "scheduler": "constant"}
    with pytest.raises(folders.RunError, match=r"(loss is|not finite).*(checkpoint-1|no checkpoint)"):
        finetune.run(config(models, files, **keys), tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


FORMATS = [
    {"train": "train.json"},
    {"train": "train.parquet"},
    {"train": "cola.tsv", "columns": ("from", "label", "star", "sentence"), "text_column": "sentence"},
    {"train": "train.jsonl", "init_from_config": True, "dtype": "bfloat16"},
    {"train": "train.jsonl", "optimizer": "adamw", "autocast": "bf16", "max_grad_norm": 1.0, "warmup": 0.5},
    {"train": "train.jsonl", "optimizer": "adamw", "autocast": "bf16", "device": "auto"},
    {"train": "train.jsonl", "optimizer": "sgd", "checkpoint_activations": True},
    {"train": "train.jsonl", "max_grad_norm": 0.1, "train_rows": 16, "truncate": True, "max_length": 4},
]


@pytest.mark.parametrize("keys", FORMATS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_format_and_way_runs(
    keys: dict[str, object], models: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    keys = {**keys, "train": str(files / str(keys["train"])), "validation": None, "max_steps": 2}
    results = finetune.run(config(models, files, **keys), tmp_path / "run")
    assert results["final"]["loss"] > 0


def test_regression_on_pairs_learns_a_number(models: dict[str, Path], files: Path, tmp_path: Path) -> None:
    keys = {"task": "text-regression", "train": str(files / "pairs.csv"), "validation": None, "text_column": "one",
            "pair_column": "two", "label_column": "likeness"}  # fmt: skip
    job = finetune.prepare(config(models, files, **keys))
    assert job.task.train[0]["input_ids"].count(3) == 2  # two texts, two [SEP]
    assert 1 in job.task.train[0]["token_type_ids"]
    results = finetune.run(config(models, files, **keys), tmp_path / "run")
    assert {"pearson", "spearman", "mse"} <= results["final"].keys()


@pytest.mark.parametrize(("model", "file"), [("llama", "prompts.jsonl"), ("chat", "chats.jsonl")])
def test_a_causal_model_learns_the_completion_only(
    model: str, file: str, models: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    keys = {"task": "causal-lm", "model": str(models[model]), "train": str(files / file), "validation": None}
    job = finetune.prepare(config(models, files, **keys))
    row = job.task.train[0]
    learned = [token for token in row["labels"] if token != -100]
    words = job.task.processor.decode(learned).split()
    assert words in (["good", "[SEP]"], ["bad", "[SEP]"])
    assert row["input_ids"][-2:] == learned
    results = finetune.run(config(models, files, **keys, accumulate=2), tmp_path / "run")
    assert results["metric"] == "token_loss"
    # Per token over the whole split, whatever the batches: by hand, on the saved model.
    import transformers

    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    total, count = 0.0, 0
    for row in job.task.validation:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        logits = saved(ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels[:, 1:] != -100).sum())
    assert results["final"]["token_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_accumulated_gradients_are_a_mean_as_in_one_batch(
    task: str, models: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if task == "causal-lm":
        shutil.copytree(models["llama"], model)
    else:
        tiny.bert(dropout=0.0).bert.save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
    name = "prompts.jsonl" if task == "causal-lm" else "train.jsonl"
    keys = {"task": task, "model": str(model), "train": str(files / name), "validation": None, "optimizer": "sgd",
            "max_steps": 2, "scheduler": "constant", "learning_rate": 0.1}  # fmt: skip
    finetune.run(config(models, files, **keys, batch_size=8), tmp_path / "one")
    finetune.run(config(models, files, **keys, batch_size=4, accumulate=2), tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[name], rtol=1e-4, atol=1e-6)


def test_the_command_prints_a_table_or_json(
    models: dict[str, Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--model", str(models["bert"]), "--train", str(files / "train.jsonl"), "--max-steps", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert "validation accuracy" in captured.out
    assert str(tmp_path / "a" / "report.html") in captured.out
    assert "Read: text as the text, label as the label" in captured.err
    assert cli.main([*arguments, "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_time_per_step_is_the_mean_of_the_second_half() -> None:
    def lines(*pairs: tuple[int, float]) -> list[dict[str, object]]:
        return [{"step": step, "seconds_per_step": seconds} for step, seconds in pairs]

    assert finetune._seconds_per_step(lines((1, 50.0), (10, 9.0), (20, 1.0), (25, 3.0), (40, 1.0))) == 1.5
    assert finetune._seconds_per_step(lines((1, 50.0), (3, 2.0))) == 2.0
    assert finetune._seconds_per_step(lines((1, 50.0))) == 50.0
