"""Every optimizer of the registry trains through `finetune` and `compare`, takes its own options, says its limits."""

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

from safetensors.torch import load_file

import tiny
from nanoadam import cli
from nanoadam.baselines import ADAPTERS, BASELINES
from nanoadam.comparing import compare
from nanoadam.finetuning import config, optimizers, outcome
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import prepare
from nanoadam.text import size

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

OPTIONS = {
    "galore": ("galore.rank=4",),
    "apollo": ("apollo.rank=4", "apollo.scale_type=tensor"),
    "lora": ("lora.rank=2",),
    "rslora": ("rslora.rank=2",),
    "shira": ("shira.rank=2",),
    "oft": ("oft.block_size=16",),
}


EXACT = ("adamw", "sgd", "adafactor", "galore", *ADAPTERS)
"""Whose bytes the formulas give to the last one, but for the step that torch keeps of each tensor, and buffers."""

POSITIONS, SCALARS = 512, 50
"""Bytes of the model's own buffers, and at least as many steps as there are tensors."""


def bytes_of(results: dict[str, object]) -> dict[str, int]:
    return {kind: results["memory"][kind] for kind in ("weights", "gradients", "state")}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("job")
    train = tiny.jsonl(root / "train.jsonl", tiny.sentences(24))
    return {
        "model": str(tiny.bert_folder(root / "bert")), "train": str(train),
        "validation": str(tiny.jsonl(root / "dev.jsonl", tiny.sentences(8, first=24))), "device": "cpu",
        "batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "density": 0.1, "warmup": 0.0,
    }  # fmt: skip


def needs(name: str) -> None:
    package = BASELINES[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in BASELINES if BASELINES[name].cpu])
def test_every_method_finetunes_a_whole_model(name: str, job: dict[str, object], tmp_path: Path) -> None:
    needs(name)
    given = Config(**job, optimizer=name, optimizer_options=OPTIONS.get(name, ()))
    results = finetune.run(given, tmp_path / "run")
    assert results["final"]["loss"] > 0
    assert 0 < results["touched"] <= 1
    assert results["memory"]["state"] > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["optimizer"]["source"] == BASELINES[name].source
    assert manifest["optimizer"]["limits"] == list(BASELINES[name].limits)
    before, after = weights(Path(str(job["model"]))), weights(tmp_path / "run" / "model")
    assert {f"bert.{key}" for key in before} <= after.keys()  # whole, whatever was trained beside it
    moved = [key for key, value in before.items() if not torch.equal(value, after[f"bert.{key}"])]
    assert "encoder.layer.0.intermediate.dense.weight" in moved
    assert ("embeddings.word_embeddings.weight" in moved) == (name not in ADAPTERS)
    assert (name in EXACT) <= ("own" in manifest["expected"])
    if name in EXACT:
        counted, said = bytes_of(results), manifest["expected"]["own"]
        assert counted["weights"] - said["weights"] == POSITIONS
        assert counted["gradients"] == said["gradients"]
        assert 0 <= counted["state"] - said["state"] <= 4 * SCALARS


@pytest.mark.parametrize("name", ["lora", "adafactor"])
def test_the_first_lines_say_what_a_method_takes_in_bfloat16(name: str, job: dict[str, object], tmp_path: Path) -> None:
    """Adapters are float32 beside bfloat16 weights and a bfloat16 head; AdamW's figure is that of the model alone."""
    needs(name)
    said: list[str] = []
    given = Config(**{**job, "dtype": "bfloat16", "save_model": False}, optimizer=name,
                   optimizer_options=OPTIONS.get(name, ()))  # fmt: skip
    results = finetune.run(given, tmp_path / "run", lambda line: said.extend(line.get("about", ())))
    expected = json.loads((tmp_path / "run" / "manifest.json").read_text())["expected"]
    assert 0 <= sum(bytes_of(results).values()) - sum(expected["own"].values()) - POSITIONS <= 4 * SCALARS
    plain = tiny.bert()
    assert sum(expected["adamw"].values()) == 4 * 2 * sum(p.numel() for p in plain.parameters())
    own, adamw = (size(sum(expected[who].values())) for who in ("own", "adamw"))
    line = f"Memory: {own} for weights, gradients and state, where AdamW's take {adamw} (by formula, without"
    assert any(text.startswith(line) for text in said), said


@pytest.mark.parametrize("name", ["adamw", "nanoadam", "column", "lora", "sgd"])
def test_on_a_gpu_the_first_lines_say_whether_it_fits(
    name: str, job: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("nanoadam" if name == "column" else name)
    own = {"granularity": "column"} if name == "column" else {"optimizer": name}
    made = prepare(Config(**{**job, **own}).resolved())
    state = copy.deepcopy(made.task.model.state_dict())
    assert not any(line.startswith("Peak: ") for line in outcome.beginning(made))
    said = []
    for room in (10**12, 10**6):
        monkeypatch.setattr(outcome, "gpu_bytes", lambda config, room=room: room)
        said.append([line for line in outcome.beginning(made) if line.startswith(("Peak: ", "Note: that does not"))])
    assert [len(lines) for lines in said] == [1, 2]
    assert "rows of" in said[0][0]
    assert said[0][0].endswith(f"the GPU has {size(10**12)}")
    assert "--checkpoint-activations" in said[1][1]
    assert said[1][1].endswith("a lower --density" if name in ("nanoadam", "column") else "--optimizer nanoadam")
    assert all(torch.equal(value, state[key]) for key, value in made.task.model.state_dict().items())
    made.task.model(input_ids=torch.ones(2, 4, dtype=torch.int64), labels=torch.zeros(2, dtype=torch.int64))


def test_adapters_can_be_trained_by_nanoadam(job: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    own = ("lora.rank=4", "lora.alpha=8", "lora.trainer=nanoadam")
    results = finetune.run(Config(**job, optimizer="lora", optimizer_options=own, max_grad_norm=1.0), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["optimizer"]["options"] == {"trainer": "nanoadam", "rank": 4, "alpha": 8}
    assert "Algorithm 1" in manifest["pseudocode"]
    assert results["touched"] > 0
    counted, said = results["memory"], manifest["expected"]["own"]
    assert (counted["weights"] - said["weights"], counted["gradients"] <= said["gradients"]) == (POSITIONS, True)
    assert 0 <= counted["state"] - said["state"] <= 4 * SCALARS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("microadam", "microadam.window=2"),
        ("lora", "lora.rank=2"),
        pytest.param("shira", "shira.rank=2", marks=pytest.mark.slow),
        pytest.param("oft", "oft.block_size=16", marks=pytest.mark.slow),
        ("nanoadam", ""),
    ],
)
def test_it_goes_on_bit_for_bit_with_resume(name: str, options: str, job: dict[str, object], tmp_path: Path) -> None:
    needs(name)
    own = (
        {"optimizer_options": (options,)} if options else {"granularity": "column", "density": 0.3, "mask_interval": 2}
    )
    given = Config(**{**job, "max_steps": 5, "optimizer": name, "save_every": 2, **own})
    finetune.run(given, tmp_path / "whole")

    def stop(line: dict[str, object]) -> None:
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(given, tmp_path / "stopped", stop)
    assert cli.main(["finetune", "--resume", str(tmp_path / "stopped")]) == 0
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "stopped" / "model")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one.keys() == other.keys()


# The rule itself is held for every method by tests/baselines/test_registry.py.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("nanoadam", "adamw", "lora") else pytest.mark.slow)
        for name in BASELINES
        if BASELINES[name].cpu
    ],
)
def test_every_method_trains_the_head_at_its_own_rate(name: str, job: dict[str, object], tmp_path: Path) -> None:
    needs(name)
    own = OPTIONS.get(name, ())
    given = Config(
        **{**job, "learning_rate": 0.0}, head_learning_rate=1e-2, log_every=1, optimizer=name, optimizer_options=own
    )
    finetune.run(given, tmp_path / "run")
    before, after = weights(Path(str(job["model"]))), weights(tmp_path / "run" / "model")
    assert all(torch.equal(value, after[f"bert.{key}"]) for key, value in before.items())
    assert after["classifier.bias"].any()  # zero when it is made
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [(line["learning_rate"], line["head_learning_rate"]) for line in lines if line["event"] == "train"]
    assert rates == [(0.0, pytest.approx(1e-2 * factor)) for factor in (2 / 3, 1 / 3, 0)]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["head_learning_rate"] == 1e-2
    assert "learning rate 0 (head: 0.01), seed" in (tmp_path / "run" / "report.html").read_text()


def test_a_variant_can_give_the_head_a_rate(job: dict[str, object], tmp_path: Path) -> None:
    rows = {"apart": {"optimizer": "adamw", "head_learning_rate": 1e-1}, "same": {"optimizer": "adamw"}}
    variants = compare.variants(learning_rates=[1e-3], sections=rows)
    comparison = compare.Comparison(Config(**{**job, "save_model": False}), variants, seeds=(0,))
    results = compare.run(comparison, tmp_path / "out")
    moved = {run["variant"]: run["l2_moved"] for run in results["runs"]}
    assert moved["apart"] > 2 * moved["same"]
    settings = json.loads((tmp_path / "out" / "runs" / "apart-0.001-0" / "manifest.json").read_text())["settings"]
    assert settings["head_learning_rate"] == 1e-1


def test_the_names_that_need_no_torch_are_all_there_are() -> None:
    assert tuple(ADAPTERS) == config.ADAPTERS
    assert set(BASELINES) == set(config.OPTIMIZERS)


def test_whole_columns_are_selected_if_asked_for(
    job: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, object]] = []
    given = Config(**{**job, "density": 0.25}, granularity="column", mask_interval=1000)
    finetune.run(given, tmp_path / "run", lines.append)
    told: list[dict[str, object]] = []
    finetune.run(dataclasses.replace(given, criterion="smallest"), tmp_path / "told", told.append)
    assert any("the smallest whole columns in" in text for line in told for text in line.get("about", ()))
    before, after = weights(Path(str(job["model"]))), weights(tmp_path / "run" / "model")
    name = "encoder.layer.0.intermediate.dense.weight"
    columns = (before[name] != after[f"bert.{name}"]).any(0)
    assert columns.sum() == 8  # a quarter of 32
    norms = before[name].norm(dim=0)
    assert norms[columns].min() >= norms[~columns].max()  # the largest, unless told otherwise
    about = next(line["about"] for line in lines if "about" in line)
    assert any(
        "25 %: the largest whole columns in " in text and "the smallest single weights in" in text for text in about
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["granularity"] == "column"
    by_weight = finetune.run(Config(**{**job, "density": 0.25}), tmp_path / "other")
    assert manifest["results"]["memory"]["state"] != by_weight["memory"]["state"]
    expected = json.loads((tmp_path / "run" / "manifest.json").read_text())["expected"]["own"]
    assert abs(expected["state"] - manifest["results"]["memory"]["state"]) < 0.02 * expected["state"]


def test_granularity_is_an_option_of_every_command_that_has_nanoadam(
    job: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"one": {"optimizer": "nanoadam"}, "whole": {"optimizer": "nanoadam", "granularity": "column"}}
    comparison = compare.Comparison(
        Config(**{**job, "save_model": False}), compare.variants(learning_rates=[1e-3], sections=variants), seeds=(0,)
    )
    one, whole = compare.run(comparison, tmp_path / "out")["table"]
    assert one["memory_state"]["mean"] != whole["memory_state"]["mean"]
    bench = ["bench", "--shapes", "tiny", "--optimizers", "nanoadam", "--repeats", "1", "--device", "cpu"]
    for arguments in (["memory", "--model", str(job["model"])], bench):
        said = []
        for granularity in ("weight", "column"):
            assert cli.main([*arguments, "--granularity", granularity, "--json"]) == 0
            said.append(json.loads(capsys.readouterr().out))
        assert said[0] != said[1]
        assert cli.main([*arguments, "--granularity", "row"]) == 2
        assert "row" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["lora", "nanoadam"])
def test_a_rate_for_a_head_that_is_not_trained_is_one_sentence(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(optimizer)
    # Beside adapters an output that came with the model is frozen; otherwise it is none where it is tied.
    model = tiny.causal_folder(tmp_path / "model", tied=optimizer == "nanoadam")
    train = tiny.jsonl(tmp_path / "train.jsonl", [{"prompt": "the film is", "completion": "good"}] * 8)
    job = {"task": "causal-lm", "model": model, "train": train, "device": "cpu", "optimizer": optimizer}
    capsys.readouterr()  # transformers' progress of saving the model
    assert cli.main(command("finetune", job, tmp_path / "run", head_learning_rate=1e-3)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "head_learning_rate=0.001 is for a head, and " in error
    assert "has none that is trained" in error
    assert not (tmp_path / "run").exists()


def command(verb: str, job: dict[str, object], out: Path, **more: object) -> list[str]:
    given = {**job, **more, "out": out}
    return [verb, *(part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value)))]


def test_limits_stand_under_the_table_and_in_the_manifest(
    job: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"optimizers": "microadam,adafactor", "learning_rates": "1e-2", "seeds": "0", "max_steps": 1}
    assert cli.main(command("compare", job, tmp_path / "out", **more)) == 0
    out = capsys.readouterr().out
    assert "microadam: keeps all dense gradients until step()\n" in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["results"]["limits"] == {k: list(BASELINES[k].limits) for k in ("microadam", "adafactor")}
    assert "adafactor: keeps all dense gradients until step()" in (tmp_path / "out" / "report.html").read_text()


def test_an_optimizer_is_tried_on_weights_of_the_dtype_that_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []  # flashadamw takes other options for float32 than for bfloat16
    monkeypatch.setattr(optimizers, "adapt", lambda layer, _: tried.append(next(layer.parameters()).dtype) or layer)
    for dtype in (torch.bfloat16, torch.float32):
        optimizers.check(Config(model="-", train="-", optimizer="sgd", dtype=str(dtype).removeprefix("torch.")))
    assert tried == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"optimizer": "microadm"}, ["optimizer 'microadm' is unknown", "'microadam'?"]),
        ({"optimizer_options": "galore.rnk=4"}, ["galore has no option 'rnk'", "'rank'?"]),
        ({"optimizer_options": "galor.rank=4"}, ["optimizer 'galor' is unknown", "'galore'?"]),
        ({"optimizer_options": "rank"}, ["METHOD.OPTION=VALUE", "'rank'"]),
        ({"optimizer_options": "sgd.momentum=high"}, ["sgd.momentum must be a number, got 'high'"]),
        ({"optimizer_options": "adamw.fused=true"}, ["adamw has no option 'fused': it has no options"]),
        ({"optimizer_options": "nanoadam.density=0.1"}, ["--density"]),
        ({"optimizer_options": "galore.rank=64"}, ["has galore.rank", "the optimizer is nanoadam", "optimizer galore"]),
        ({"optimizer": "lora", "optimizer_options": "rslora.rank=4"}, ["has rslora.rank, and the optimizer is lora"]),
        ({"optimizer": "microadam", "optimizer_options": "microadam.density=2"}, ["density", "2"]),
        ({"head_learning_rate": -1}, ["head_learning_rate must be at least 0, got -1"]),
        ({"optimizer": "flashadamw"}, ["flashadamw trains on CUDA devices only"]),
        ({"optimizer": "flashadamw", "optimizer_options": "flashadamw.release=true", "accumulate": 2}, ["late 2"]),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_sentence(
    more: dict[str, object], words: list[str], job: dict[str, object], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(command("finetune", job, tmp_path / "run", **more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "module"), [("adamw8bit", "bitsandbytes"), ("galore", "pytorch_optimizer"), ("lora", "peft")]
)
def test_a_missing_library_is_one_sentence(
    name: str, module: str, job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(command("finetune", job, tmp_path / "run", optimizer=name)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name} needs {module}: pip install" in error
    assert not (tmp_path / "run").exists()


def test_options_are_read_as_what_the_method_takes() -> None:
    found = optimizers.parse(
        ["galore.rank=8", "galore.scale=2", "lora.alpha=none", "microadam.stochastic_rounding=false"]
    )
    assert found == {
        "galore": {"rank": 8, "scale": 2.0}, "lora": {"alpha": None}, "microadam": {"stochastic_rounding": False}
    }  # fmt: skip
    assert isinstance(found["galore"]["scale"], float)
