"""The paper's experiments from their recipes: complete, valid at every scale, and runnable from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import numpy as np

from browser import browsed
from nanoadam import cli
from nanoadam.comparing import compare
from nanoadam.finetuning import folders, norms
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.paper import experiments, forgetting, recipe, reproduce, smoke

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EXPERIMENTS = [
    "ablation-criterion", "ablation-static", "commonsense", "forgetting", "forgetting-front", "glue", "gsm8k",
    "gradient-weight", "learning-rate", "pathmnist", "pruned", "sensitivity", "toy",
]  # fmt: skip


def command(name: str, out: Path, *more: str) -> list[str]:
    return ["reproduce", name, "--out", str(out), *more]


# Recipes -----------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_experiment() -> None:
    assert set(EXPERIMENTS) <= set(recipe.names())
    for name in recipe.names():
        assert {"full", "smoke"} <= set(recipe.scales(name)), name
        assert recipe.load(name).kind in reproduce.KINDS, name


def everything(folder: Path, chosen: recipe.Recipe) -> experiments.Setting:
    """A setting in which all that a recipe names is there, if only by name."""
    if chosen.scale == "full":
        return experiments.Setting(folder)
    for model in chosen.table("models"):
        (folder / "models" / model).mkdir(parents=True)
        (folder / "models" / model / "config.json").touch()
    for _, task in experiments.pairs(chosen):
        for file in chosen.keys["tasks"][task]["files"].values():
            if isinstance(file, str) and "." in file:
                (folder / "data" / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / "data" / file).touch()
    return experiments.Setting(folder, folder / "data", folder / "models")


CASES = [
    (name, scale)
    for name in recipe.names()
    for scale in recipe.scales(name)
    if scale != "smoke"
    and recipe.load(name).kind in ("comparison", "sequence", "answers", "gradients")
    and name != "pathmnist"
]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_every_run_of_a_recipe_is_a_valid_config(name: str, scale: str, tmp_path: Path) -> None:
    chosen = recipe.load(name, scale)
    chosen = recipe.Recipe(name, scale, {key: value for key, value in chosen.keys.items() if key != "prune"})
    setting = everything(tmp_path, chosen)
    assert experiments.pairs(chosen)
    for model, task in experiments.pairs(chosen):
        keys = experiments.keys(chosen, model, task, setting) if chosen.kind != "answers" else {
            **chosen.keys["config"], "model": "m", "train": "t"}  # fmt: skip
        if chosen.kind == "comparison":
            comparison = compare.made({**keys, "variants": experiments.variants(chosen, model, task), "seeds": [0]})
            assert len(comparison.variants) > 1 or name == "pathmnist"
        else:
            for own in experiments.variants(chosen, model, task).values():
                options = {key: value for key, value in own.items() if key != "learning_rates"}
                for rate in own["learning_rates"]:
                    Config(**{**keys, **options, "learning_rate": rate})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_figures_are_of_runs_that_there_are(name: str) -> None:
    chosen = recipe.load(name)
    also = {"avg", "GB", "minutes", "hours", "rate", "l2", "task1", "task2", "task1_after", "average", "forgetting"}
    for model, methods in chosen.keys.get("paper", {}).items():
        assert model in chosen.table("models")
        for method, figures in methods.items():
            assert method in chosen.table("variants")
            named = {key for key in figures if not key.startswith(("seed ", "r, layer ", "moved, "))}
            assert named <= also | set(chosen.table("tasks"))


def test_the_averages_of_table_2_are_those_of_its_tasks() -> None:
    """A figure that was copied wrongly would not fit its average."""
    for model, methods in recipe.load("glue").keys["paper"].items():
        for method, figures in methods.items():
            tasks = [figures[task] for task in recipe.load("glue").table("tasks")]
            assert len(tasks) == 7
            assert sum(tasks) / 7 == pytest.approx(figures["avg"], abs=0.011), (model, method)


def test_the_averages_of_the_commonsense_table_are_those_of_its_tests() -> None:
    chosen = recipe.load("commonsense")
    for figures in chosen.keys["paper"]["llama-3.2-3b"].values():
        tests = [figures[test] for test in chosen.table("tasks") if test != "train"]
        assert sum(tests) / len(tests) == pytest.approx(figures["avg"], abs=0.05)


def test_scales_change_what_they_say_and_nothing_else() -> None:
    assert recipe.merged({"a": {"x": 1, "y": [1]}, "b": 2}, {"a": {"y": [3]}}) == {"a": {"x": 1, "y": [3]}, "b": 2}
    full, small = recipe.load("glue"), recipe.load("glue", "small")
    assert full.table("config") == small.table("config")
    assert list(small.table("models")) == ["minilm-l6"]


def test_only_takes_names_of_any_kind() -> None:
    chosen = recipe.load("glue").only(["COLA", "QNLI", "nanoadam"])
    assert list(chosen.table("tasks")) == ["COLA", "QNLI"]
    assert list(chosen.table("variants")) == ["nanoadam"]
    assert len(chosen.table("models")) == 3


def test_local_files_stand_in_for_the_hub(tmp_path: Path) -> None:
    chosen = recipe.load("glue", "small")
    keys = experiments.keys(chosen, "minilm-l6", "COLA", everything(tmp_path, chosen))
    assert keys["train"] == str(tmp_path / "data" / "CoLA" / "train.tsv")
    assert keys["columns"] == ["source", "label", "star", "sentence"]
    assert keys["model"] == str(tmp_path / "models" / "minilm-l6")
    hub = experiments.keys(recipe.load("glue"), "bert-base", "COLA", experiments.Setting(tmp_path))
    assert hub["train"] == "nyu-mll/glue:cola@train"
    assert "columns" not in hub


# From end to end ---------------------------------------------------------------------------------------------

# test_resume.py runs `glue`, too; `ablation-static` is as the other ablation.
SLOW = ("learning-rate", "forgetting", "glue", "ablation-criterion")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPERIMENTS],
)
def test_smoke_runs_from_end_to_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(command(name, out, "--scale", "smoke", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"]
    for row in printed["rows"] if name != "toy" else ():  # the paper's rate diverges under some readings
        assert row["here"] is not None, row
        assert "stopped" not in row
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["results"]["rows"] == printed["rows"]
    assert manifest["recipe"] == json.loads(json.dumps(recipe.load(name, "smoke").keys))
    page = (out / "report.html").read_text()
    assert 0 < page.index("Every figure here is of a tiny model with random weights") < page.index("<table")
    assert page.index("It runs from end to end") < page.index("<table")
    if name in ("gradient-weight", "forgetting", "toy"):
        whole = (out / "toy" / "report.html").read_text() if name == "toy" else page
        found = browsed(whole, tmp_path)
        assert int(str(found["wide"])) <= found["inner"] == 390


def test_the_table_has_the_papers_figure_beside_ours() -> None:
    row = {"model": "m", "measure": "COLA", "variant": "nanoadam", "rate": 1e-4, "paper": 60.87, "runs": 3,
           "here": {"mean": 59.123, "std": 0.456}}  # fmt: skip
    lost = {**row, "here": None, "stopped": ["the loss is nan"], "paper": None, "rate": None, "runs": 0}
    head, *lines = reproduce.lines({"rows": [row, lost]})
    assert lines[0] == ("m", "COLA", "nanoadam", "60.87", "59.12 ± 0.46", "0.0001", "3")
    assert lines[1] == ("m", "COLA", "nanoadam", "-", "the loss is nan", "-", "0")
    assert len(head) == 7


def test_the_list_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipe.names())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["glu"], ["no experiment 'glu'. There are: ", " glue, "]),
        (["glue", "--scale", "tiny"], ["no scale 'tiny'", "smoke"]),
        (["glue", "--only", "CoLA"], ["glue has no 'CoLA'; did you mean 'COLA'"]),
        (["glue", "--only", "xyzzy"], ["glue has no 'xyzzy'. Known: bert-base, ", "COLA, ", "adamw"]),
        (["pathmnist", "--only", "xyzzy"], ["pathmnist has no 'xyzzy'. Known: ", "PathMNIST"]),
        (["toy", "--only", "x"], ["toy has no models, tasks or variants to choose from: leave out --only"]),
        (["forgetting-front", "--only", "adamw"], ["forgetting-front has no models, tasks or variants"]),
        (["pathmnist"], ["the data of PathMNIST is on no hub: --data"]),
        (["gsm8k"], ["--data names the folder with train.jsonl and test.jsonl"]),
        (["forgetting-front"], ["--data names the folder"]),
        (["glue", "--data", "nowhere"], ["--data nowhere is no folder"]),
        (["glue", "--scale", "small"], ["minilm-l6 is on no hub: --model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "-" not in value[0] else "",
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(arguments[0], tmp_path / "run"), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gsm8k", "pathmnist", "forgetting", "forgetting-front"):
        assert cli.main(command(name, tmp_path / "run", "--data", str(tmp_path))) == 2
        assert f"there is no {tmp_path}" in capsys.readouterr().err
    assert cli.main(command("glue", tmp_path / "run", "--model", str(tmp_path))) == 2
    assert "holds no model folder bert-base" in capsys.readouterr().err


# The pieces --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reproduce")
    smoke.model("resnet", root / "resnet")
    for name, classes in (("old", 3), ("new", 2)):
        for split, count in (("train", 24), ("validation", 12)):
            smoke.images(root / f"{name}-{split}.npz", count, classes)
    return root


def images(folder: Path, task: str, **more: Any) -> Config:
    keys = {"task": "image-classification", "model": str(folder / "resnet"), "device": "cpu", "batch_size": 8}
    keys |= {split: str(folder / f"{task}-{split}.npz") for split in ("train", "validation")}
    return Config(**{**keys, "new_head": True, "optimizer": "adamw", "max_steps": 3, **more})


def test_nothing_is_forgotten_where_nothing_moves(folder: Path, tmp_path: Path) -> None:
    """The first head is put back on the backbone that task 2 has left, its BatchNorm included."""
    one = images(folder, "old", learning_rate=1e-2)
    still = images(folder, "new", learning_rate=0.0, freeze_norms=True)
    found = forgetting.run(one, still, tmp_path / "still")
    assert found["forgetting"] == 0.0 == found["moved"]["l2"]
    assert found["pretrained"]["l2"] > 0
    learned = folders.read_lines(tmp_path / "still" / "task1" / "metrics.jsonl")[-1]["metrics"]["accuracy"]
    assert found["task1"] == learned
    moving = forgetting.run(one, images(folder, "new", learning_rate=1e-1), tmp_path / "moving")
    assert moving["task1"] == found["task1"]
    assert moving["moved"]["l2"] > 0


def test_the_momentum_of_batchnorm_can_be_set(folder: Path) -> None:
    model = finetune.prepare(images(folder, "old", norm_momentum=0.25)).task.model
    assert {module.momentum for module in norms.norm_modules(model)} == {0.25}


def test_a_new_task_gets_a_new_head_even_of_the_same_size(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    same = images(folder, "old", learning_rate=0.0)
    forgetting.run(images(folder, "old", learning_rate=1e-1), same, tmp_path / "run")
    first, second = (load_file(tmp_path / "run" / task / "model" / "model.safetensors") for task in ("task1", "task2"))
    heads = [name for name in first if name.startswith("classifier") and name.endswith("weight")]
    assert heads
    assert not any(torch.equal(first[name], second[name]) for name in heads)


def test_a_pruned_model_stays_pruned(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    experiments.prune(str(folder / "resnet"), tmp_path / "pruned", 0.8)
    nano = {"optimizer": "nanoadam", "density": 0.1, "mask_interval": 1, "keep_zeros": True, "learning_rate": 1e-2}
    finetune.run(images(folder, "old", model=str(tmp_path / "pruned"), **nano), tmp_path / "run")
    before, after = (
        load_file(path / "model.safetensors") for path in (tmp_path / "pruned", tmp_path / "run" / "model")
    )
    weights = {name: value for name, value in before.items() if value.ndim == 4}
    assert len(weights) > 3
    for name, value in weights.items():
        zero = value == 0
        assert float(zero.float().mean()) == pytest.approx(0.8, abs=0.01)
        assert float(value[~zero].abs().min()) > 0
        now = after[f"resnet.{name}"]
        assert torch.equal(now == 0, zero)
    assert any(not torch.equal(after[f"resnet.{name}"], value) for name, value in weights.items())


def test_medmnist_files_give_training_and_test_images(tmp_path: Path) -> None:
    arrays = {}
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        arrays[f"{split}_images"] = np.full((count, 28, 28, 3), count, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 3
    np.savez(tmp_path / "pathmnist.npz", **arrays)
    found = experiments.split_medmnist(tmp_path / "pathmnist.npz", tmp_path / "data")
    for key, count in (("train", 6), ("validation", 4)):
        with np.load(found[key]) as part:
            assert part["images"].shape == (count, 28, 28, 3)
            assert (part["images"] == count).all()
            assert part["labels"].tolist() == [i % 3 for i in range(count)]
    np.savez(tmp_path / "other.npz", images=arrays["train_images"])
    with pytest.raises(ValueError, match="is no MedMNIST file"):
        experiments.split_medmnist(tmp_path / "other.npz", tmp_path / "data")


def test_an_average_over_some_tasks_stands_beside_no_figure() -> None:
    """The paper's are over all seven."""

    def average(names: list[str]) -> list[Any]:
        chosen = recipe.load("glue").only([*names, "bert-base", "adamw"])
        rows = [{"model": "bert-base", "variant": "adamw", "measure": name, "here": {"mean": 80.0}, "runs": 1}
                for name in names]  # fmt: skip
        return list(experiments._averages(chosen, "bert-base", rows))

    (some,) = average(["COLA", "SST2"])
    assert (some["measure"], some["here"]["mean"], some["paper"]) == ("avg", 80.0, None)
    (whole,) = average(list(recipe.load("glue").table("tasks")))
    assert whole["paper"] == 84.58


def test_every_gradient_is_seen_before_the_optimizer_takes_it(folder: Path, tmp_path: Path) -> None:
    from nanoadam.paper import hyperbola

    seen = {}
    for name, options in (("adamw", {}), ("nanoadam", {"density": 0.1, "mask_interval": 1})):
        config = images(folder, "old", optimizer=name, learning_rate=1e-3, warmup=0.0, **options)
        seen[name] = hyperbola._record(config, tmp_path / name, [0, 2])
    for recorder in seen.values():
        assert {record["step"] for record in recorder.gradients} == {0, 2}
        assert set(recorder.rates) == {0, 2}
        assert all(rate > 0 for rate in recorder.rates.values())
    first = [
        {record["name"]: record["value"]["ratio"] for record in recorder.gradients if record["step"] == 0}
        for recorder in seen.values()
    ]
    assert first[0] == first[1]  # before the first step nothing of them differs
    assert seen["adamw"].shift.touched == 1.0
    assert 0 < seen["nanoadam"].shift.touched < 0.3


def test_a_run_that_diverges_leaves_the_measures_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoadam.paper import hyperbola

    record = hyperbola._record

    def some(config: Config, out: Path, steps: list[int]) -> hyperbola.Recorder:
        if config.optimizer == "nanoadam":
            raise finetune.Diverged("the loss is nan at step 3")
        return record(config, out, steps)

    monkeypatch.setattr(hyperbola, "_record", some)
    chosen = recipe.load("gradient-weight", "smoke").only(["bert-base", "finetuned", "nanoadam"])
    rows, _ = hyperbola.run(chosen, experiments.Setting(tmp_path))
    assert {row["variant"] for row in rows if row["here"] is not None} == {"finetuned"}
    (lost,) = [row for row in rows if row["here"] is None]
    assert (lost["variant"], lost["stopped"], lost["runs"]) == ("nanoadam", ["the loss is nan at step 3"], 0)


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("ablation-criterion", "vit-large,SST2"),  # a task of another model
        ("ablation-criterion", "vit-large,random"),  # a method that its task leaves out
        ("commonsense", "train"),  # no test
    ],
)
def test_a_selection_that_leaves_nothing_is_refused(
    name: str, only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = "full" if name != "commonsense" else "smoke"
    assert cli.main(command(name, tmp_path / "out", "--scale", scale, "--only", only)) == 2
    assert f"--only leaves nothing of {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
