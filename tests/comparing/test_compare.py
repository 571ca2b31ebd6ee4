"""Several optimizers on one job: the same start and data for all, one table, and forgetting where it is asked for."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from browser import browsed
from nanoadam import cli
from nanoadam.comparing import compare, tables
from nanoadam.finetuning import folders
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("job")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.sentences(24)]
    (root / "old.txt").write_text("the film was great and the book was dull " * 20)
    return {
        "task": "causal-lm", "model": str(tiny.causal_folder(root / "llama")), "device": "cpu",
        "train": str(tiny.jsonl(root / "train.jsonl", rows)), "max-steps": 2, "batch-size": 8, "density": 0.1,
        "learning-rates": "1e-4,1e-2", "seeds": "0,1", "retain": str(root / "old.txt"),
    }  # fmt: skip


def command(job: dict[str, object], out: Path, **more: object) -> list[str]:
    options = {**job, **{key.replace("_", "-"): value for key, value in more.items()}, "out": out}
    return ["compare", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def whole(job: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "compared"
    assert cli.main(command(job, out)) == 0
    return out


def test_every_optimizer_runs_at_every_rate_and_seed(whole: Path) -> None:
    lines = folders.read_lines(whole / "metrics.jsonl")
    keys = {(line["variant"], line["learning_rate"], line["seed"]) for line in lines}
    assert keys == {(o, lr, s) for o in ("adamw", "nanoadam") for lr in (1e-4, 1e-2) for s in (0, 1)}
    assert len(lines) == 8
    assert {p.name for p in whole.iterdir()} == {"config.toml", "manifest.json", "metrics.jsonl", "report.html", "runs"}


def test_the_table_holds_mean_and_deviation_at_the_chosen_rate(whole: Path) -> None:
    results = json.loads((whole / "manifest.json").read_text())["results"]
    assert [row["optimizer"] for row in results["table"]] == ["adamw", "nanoadam"]
    for row in results["table"]:
        own = [r for r in results["runs"] if r["optimizer"] == row["optimizer"]]
        means = {lr: sum(r["metric"] for r in own if r["learning_rate"] == lr) / 2 for lr in (1e-4, 1e-2)}
        assert row["learning_rate"] == min(means, key=means.__getitem__)  # a loss: lower is better
        assert row["metric"]["mean"] == pytest.approx(means[row["learning_rate"]])
        assert row["metric"]["std"] >= 0
        assert {"memory_state", "touched", "l2_moved", "seconds_per_step", "forgetting"} <= row.keys()
    adamw, nano = results["table"]
    assert nano["memory_state"]["mean"] < adamw["memory_state"]["mean"]
    assert nano["touched"]["mean"] < adamw["touched"]["mean"]


def test_all_begin_with_the_same_model_and_data(whole: Path) -> None:
    lines = folders.read_lines(whole / "metrics.jsonl")
    assert len({line["retained"]["old: token loss"]["before"] for line in lines}) == 1
    for seed in (0, 1):
        first = {
            folders.read_lines(folder / "metrics.jsonl")[0]["metrics"]["loss"]
            for folder in (whole / "runs").glob(f"*-{seed}")
        }
        assert len(first) == 1


def test_the_report_fits_a_phone_without_an_error(whole: Path, tmp_path: Path) -> None:
    assert int(str(browsed((whole / "report.html").read_text(), tmp_path)["wide"])) <= 390


def test_the_report_stands_alone(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert len(re.findall("<svg .*?</svg>", page, flags=re.DOTALL)) == 4
    assert "src=" not in page
    for text in ("adamw", "nanoadam", "forgetting", "token_loss", "± "):
        assert text in page


def test_config_toml_reruns_the_comparison(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(whole / "config.toml"), "--seeds", "1", "--learning-rates", "1e-2", "--json"]
    assert cli.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    printed = json.loads(capsys.readouterr().out)
    before = {(r["variant"], r["learning_rate"], r["seed"]): r for r in folders.read_lines(whole / "metrics.jsonl")}
    for one in printed["runs"]:
        old = before[one["variant"], one["learning_rate"], one["seed"]]
        assert (one["metric"], one["forgetting"]) == (old["metric"], old["forgetting"])


def test_another_metric_may_decide(job: dict[str, object], tmp_path: Path) -> None:
    small = {**job, "optimizers": "sgd", "learning-rates": "1e-4,1e-1", "seeds": "0", "metric": "perplexity"}
    del small["retain"]
    assert cli.main(command(small, tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]
    assert results["metric"] == "perplexity"
    best = min(results["runs"], key=lambda one: one["final"]["perplexity"])
    assert results["table"][0]["learning_rate"] == best["learning_rate"]


def test_a_rate_at_which_a_run_diverged_is_not_chosen() -> None:
    def outcome(lr: float, metric: float | None) -> dict[str, object]:
        key = {"variant": "mine", "optimizer": "adamw", "learning_rate": lr, "seed": 0, "metric": metric}
        return {**key, "stopped": "the loss is nan"} if metric is None else key

    assert tables.table([outcome(1, 0.5), outcome(2, None)], True)[0]["learning_rate"] == 1
    assert tables.table([outcome(1, 0.5), outcome(2, float("nan"))], False)[0]["learning_rate"] == 1
    none = {"variant": "mine", "optimizer": "adamw", "learning_rate": None, "stopped": ["the loss is nan"]}
    assert tables.table([outcome(1, None)], True) == [none]


def timeless(line: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in line.items() if key != "seconds_per_step"}


@pytest.mark.slow
def test_the_results_are_the_same_whatever_the_number_of_jobs(job: dict[str, object], tmp_path: Path) -> None:
    small = {**job, "seeds": "0", "threads": 1}
    outs = {n: tmp_path / n for n in ("1", "2")}
    for n, out in outs.items():
        assert cli.main(command({**small, "jobs": n}, out)) == 0
    one, two = (json.loads((out / "manifest.json").read_text())["results"] for out in outs.values())
    assert [timeless(line) for line in one["runs"]] == [timeless(line) for line in two["runs"]]
    assert [row["variant"] for row in two["table"]] == ["adamw", "nanoadam"]
    assert any("2 runs at once" in line[0] for line in tables.lines(two))
    assert not any("at once" in line[0] for line in tables.lines(one))


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(
    whole: Path, job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run, begun = tmp_path / "run", finetune.run, []

    def stop(config: object, folder: Path, *more: object) -> object:
        if len(begun) == 3:
            (folder / "half").mkdir(parents=True)
            raise KeyboardInterrupt
        begun.append(folder)
        return run(config, folder, *more)

    monkeypatch.setattr(finetune, "run", stop)
    assert cli.main(command(job, out)) == 130
    results = compare.load(out)[1]["results"]  # what there is makes a table
    assert (len(results["runs"]), results["unfinished"]) == (3, 5)
    assert [row["variant"] for row in results["table"]] == ["adamw"]
    assert "5 runs are not finished" in tables.foot(results)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])  # killed while writing a line
    begun.clear()
    monkeypatch.setattr(finetune, "run", lambda config, folder: (begun.append(folder.name), run(config, folder))[1])
    assert cli.main(["compare", "--resume", str(out)]) == 0
    assert len(begun) == 5
    ours, theirs = (json.loads((folder / "manifest.json").read_text())["results"] for folder in (out, whole))
    assert [timeless(line) for line in ours["runs"]] == [timeless(line) for line in theirs["runs"]]
    begun.clear()
    assert cli.main(["compare", "--resume", str(out)]) == 0
    assert begun == []


def test_what_fails_is_a_line_and_the_rest_goes_on(
    job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, broken = finetune.run, ["sgd"]

    def fail(config: object, folder: Path) -> object:
        if config.optimizer in broken:
            raise RuntimeError("CUDA out of memory\nand more")
        return run(config, folder)

    monkeypatch.setattr(finetune, "run", fail)
    small = {**job, "optimizers": "sgd,adamw", "seeds": "0", "learning-rates": "1e-3"}
    assert cli.main(command(small, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "sgd has no result: RuntimeError: CUDA out of memory" in printed
    lines = {line["variant"]: line for line in folders.read_lines(tmp_path / "run" / "metrics.jsonl")}
    assert lines["sgd"]["failed"] and lines["adamw"]["metric"] > 0
    assert "fail" in (tmp_path / "run" / "runs" / "sgd-0.001-0" / "error.txt").read_text()
    broken.clear()  # what failed is tried again
    assert cli.main(["compare", "--resume", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]
    assert all(one["metric"] > 0 for one in results["runs"])


def test_a_missing_library_stops_its_variant_only(
    job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    small = {**job, "optimizers": "adamw8bit,adamw", "seeds": "0", "learning-rates": "1e-3"}
    assert cli.main(command(small, tmp_path / "run")) == 0
    assert "adamw8bit has no result: adamw8bit needs bitsandbytes: pip install" in capsys.readouterr().out
    assert cli.main(command({**small, "optimizers": "adamw8bit"}, tmp_path / "alone")) == 2
    assert not (tmp_path / "alone").exists()


def test_resume_takes_no_other_options_and_no_other_data(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "--resume", str(tmp_path)]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert cli.main(["compare", "--resume", str(whole), "--seeds", "1"]) == 2
    assert "leave out --seeds" in capsys.readouterr().err
    copy = shutil.copytree(whole, tmp_path / "copy")
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.sentences(12)]
    other = tiny.jsonl(tmp_path / "train.jsonl", rows)
    text = re.sub(r"(?m)^train = .*$", f'train = "{other}"', (copy / "config.toml").read_text())
    (copy / "config.toml").write_text(text)
    assert cli.main(["compare", "--resume", str(copy)]) == 2
    assert "the train data is not what it was" in capsys.readouterr().err


def test_resume_mixes_no_two_configs_but_takes_more_runs(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("max_steps = 2", "max_steps = 3"))
    assert cli.main(["compare", "--resume", str(copy)]) == 2
    assert "max_steps in " in capsys.readouterr().err
    more = re.sub(r"(?s)(\[compare\.variants\.nanoadam\].*?learning_rates = \[)", r"\g<1>1e-3, ", text)
    assert more != text
    (copy / "config.toml").write_text(more)
    assert cli.main(["compare", "--resume", str(copy)]) == 0
    assert len(json.loads((copy / "manifest.json").read_text())["results"]["runs"]) == 10


def test_resume_mixes_no_rows_of_a_variant_that_has_its_own(
    job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a comparison was begun by a version that chose other rows: the config says the same."""
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.sentences(20)]
    few, validation = (tiny.jsonl(tmp_path / f"{name}.jsonl", rows) for name in ("few", "validation"))
    config = Config(
        task="causal-lm", model=str(job["model"]), train=str(job["train"]), validation=str(validation), device="cpu",
        max_steps=1, batch_size=8,
    )  # fmt: skip
    sections = {"all": {"optimizer": "sgd"}, "few": {"optimizer": "sgd", "train": str(few), "train_rows": 10}}
    comparison = compare.Comparison(config, compare.variants(None, [1e-3], sections), seeds=(0, 1))
    one, begun, out = compare._one, [], tmp_path / "run"

    def stop(task: compare._Task) -> compare.Outcome:
        begun.append(task.case.name)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return one(task)

    monkeypatch.setattr(compare, "_one", stop)
    with pytest.raises(KeyboardInterrupt):
        compare.run(comparison, out)
    before = few.read_text()
    few.write_text("".join(reversed(before.splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"the train data of the run few-0\.001-0 is not what it was"):
        compare.resume(out)
    few.write_text(before)
    assert len(compare.resume(out)["runs"]) == 4


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"command": "nanoadam finetune"}'])
def test_only_a_comparison_is_gone_on_with(
    whole: Path, manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text((whole / "config.toml").read_text())
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    (tmp_path / "manifest.json").write_text(manifest)
    assert cli.main(["compare", "--resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


def test_a_line_after_one_that_was_cut_off_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    folders.append(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    folders.append(path, {"step": 3})
    folders.append(path, {"step": 4})
    assert [line["step"] for line in folders.read_lines(path)] == [1, 3, 4]


def test_paths_of_variants_are_kept_whole(
    job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(str(job["retain"]))
    monkeypatch.chdir(old.parent)
    config = compare.Config(task="causal-lm", model=str(job["model"]), train=str(job["train"]))
    own = compare.variants(sections={"sgd": {"retain": [old.name], "model": "llama"}, "adamw": {}})
    made = compare.Comparison(config, own, (0,)).resolved()
    assert made.variants[0].overrides == {"optimizer": "sgd", "retain": (str(old),), "model": str(job["model"])}
    assert made.resolved() == made


def test_a_comparison_without_any_result_is_refused_after_it_was_written(
    job: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**job, "optimizers": "sgd", "learning-rates": "1e30", "max-steps": 4, "seeds": "0", "log-every": 1}
    assert cli.main([*command(small, tmp_path / "run"), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["table"][0]["learning_rate"] is None
    assert said.err.startswith("nanoadam: no variant has a result: the ")
    assert said.err.count("\n") == 1
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_grid_given_twice_is_refused_rather_than_forgotten(
    job: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for again in ("1e-3", "adamw=1e-3"):
        options = command(job, tmp_path / "run", learning_rates=again)
        assert cli.main([*options, "--learning-rates", again.replace("3", "4")]) == 2
        assert "is given twice" in capsys.readouterr().err


VARIANTS = """
[compare]
seeds = [0]
[compare.variants.adamw]
learning_rates = [1e-4, 1e-3]
[compare.variants.static]
optimizer = "nanoadam"
density = 0.5
mask_interval = 1000000
learning_rates = [1e-3]
[compare.variants.large-reset]
optimizer = "nanoadam"
criterion = "largest"
moments = "reset"
keep_zeros = true
"""


def variants(job: dict[str, object], root: Path, text: str = VARIANTS, **keys: object) -> Path:
    base = {
        key.replace("-", "_"): value for key, value in job.items() if key not in ("seeds", "learning-rates", "retain")
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**base, "save_model": False, **keys}.items()]
    (root / "variants.toml").write_text("\n".join(lines) + "\n" + text)
    return root / "variants.toml"


def test_a_variant_sets_keys_and_has_a_grid_of_its_own(job: dict[str, object], tmp_path: Path) -> None:
    file, out = variants(job, tmp_path), tmp_path / "run"
    assert cli.main(["compare", str(file), "--learning-rates", "large-reset=1e-2,1e-1", "--out", str(out)]) == 0
    grids = {"adamw": {1e-4, 1e-3}, "static": {1e-3}, "large-reset": {1e-2, 1e-1}}
    lines = folders.read_lines(out / "metrics.jsonl")
    assert {name: {li["learning_rate"] for li in lines if li["variant"] == name} for name in grids} == grids
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert [(row["variant"], row["optimizer"]) for row in results["table"]] == [
        ("adamw", "adamw"), ("static", "nanoadam"), ("large-reset", "nanoadam")]  # fmt: skip
    shares = {row["variant"]: row["touched"]["mean"] for row in results["table"]}
    assert shares["large-reset"] < shares["static"] < shares["adamw"]
    settings = json.loads((out / "runs" / "static-0.001-0" / "manifest.json").read_text())["settings"]
    assert (settings["density"], settings["mask_interval"], settings["criterion"]) == (0.5, 1000000, None)
    again = lab_comparison(out / "config.toml")
    assert again.variants == lab_comparison(file, {"large-reset": (1e-2, 1e-1)}).variants


def lab_comparison(file: Path, rates: object = None) -> compare.Comparison:
    from nanoadam.finetuning import config as configs

    keys = configs.read(file, {"compare": compare.KEYS})
    return compare.made({**keys, "learning_rates": rates} if rates else keys)


def test_the_selection_of_a_static_mask_is_made_once(job: dict[str, object], tmp_path: Path) -> None:
    case = next(c for c in lab_comparison(variants(job, tmp_path)).cases() if c.variant == "static")
    results = finetune.run(
        dataclasses.replace(case.config, max_steps=4, log_every=1, log_touched=True), tmp_path / "run"
    )
    lines = folders.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["touched"] for line in lines if line["event"] == "train"] == [pytest.approx(0.5, abs=0.01)] * 4
    assert results["touched"] < 0.7
    assert not (tmp_path / "run" / "model").exists()  # save_model = false
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[compare.variants.a]\noptimiser = 'sgd'", ["variant a: there is no key 'optimiser'", "'optimizer'?"]),
        ("[compare.variants.a]\nseed = 1", ["variant a cannot set seed"]),
        ("[compare.variants.a]\ndensity = 'much'", ["variant a: density must be a number"]),
        (
            "[compare.variants.a]\n[compare.variants.b]\ndensity = 1.5",
            ["variant b: density must be in (0, 1], got 1.5"],
        ),
        ("[compare.variants.a]\noptimizer = 'sdg'", ["optimizer 'sdg' is unknown"]),
        ("[compare.variants.a]\nlearning_rates = 'all'", ["learning_rates of a must be a list of numbers"]),
        ("[compare.variants.a]\nlearning_rates = []", ["learning_rates of a must be a list of numbers"]),
        (
            "optimizer_options = ['galore.rank=4']\n[compare.variants.a]\noptimizer = 'sgd'\n[compare.variants.adamw]",
            ["has galore.rank, and the optimizers are sgd, adamw: leave it out, or add galore to them"],
        ),
        (
            "[compare.variants.a]\noptimizer = 'sgd'\noptimizer_options = ['microadam.window=4']",
            ["variant a: optimizer_options has microadam.window, and the optimizer is sgd: leave it out"],
        ),
        ("[compare.variants.'a/b']", ["the variant 'a/b' needs a name of letters"]),
        ("[compare]\nvariants = 3", ["variants must be sections like [compare.variants.NAME]"]),
        ("[compare]\noptimizers = ['sgd']\n[compare.variants.a]", ["give either optimizers or variants"]),
        ("[compare]\nvariants = {}", ["variants is empty"]),
        ("[compare]\noptimizers = 'sgd'", ["optimizers must be a list of names, got 'sgd'"]),
        ("[compare]\noptimizers = [1]", ["optimizers must be a list of names"]),
        ("[compare]\nseeds = 3", ["seeds must be a list of whole numbers, got 3"]),
        ("[compare]\nseeds = [[1]]", ["seeds must be a list of whole numbers"]),
    ],
    ids=str,
)
def test_a_bad_variant_is_one_sentence(
    job: dict[str, object], text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(variants(job, tmp_path, text)), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizers": "adamw,nanadam"}, ["optimizer 'nanadam' is unknown", "'nanoadam'?"]),
        ({"learning_rates": "1e-3,fast"}, ["--learning-rates must be numbers"]),
        ({"learning_rates": "nanadam=1e-3"}, ["a grid for 'nanadam', which is no variant", "'nanoadam'?"]),
        ({"learning_rates": "adamw=1e-3,0.001"}, ["learning_rates of adamw holds something twice"]),
        (
            {"optimizers": "adamw", "optimizer_options": "sgd.momentum=0.5"},
            ["sgd.momentum, and the optimizer is adamw"],
        ),
        ({"optimizers": ""}, ["optimizer '' is unknown. Known: nanoadam"]),
        ({"optimizers": "adamw,adamw"}, ["optimizers holds something twice"]),
        ({"seeds": "1,1"}, ["seeds holds something twice"]),
        ({"retain": "nowhere.txt"}, ["there is no text file nowhere.txt"]),
        (
            {"task": "text-classification", "text_column": "prompt", "label_column": "completion"},
            ["old.txt: a text file is for language models"],
        ),
        ({"jobs": "0"}, ["--jobs must be at least 1, got 0"]),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(
    job: dict[str, object], options: dict[str, object], words: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(command(job, tmp_path / "run", **options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_each_run_gets_the_options_of_its_own_optimizer(job: dict[str, object]) -> None:
    config = Config(
        model="-", train="-", optimizer_options=("sgd.momentum=0.5", "microadam.window=4", "sgd.momentum=0.6")
    )
    comparison = compare.Comparison(config, compare.variants(["sgd", "microadam", "adamw"], [1e-3]), seeds=(0,))
    comparison.refuse_idle()
    given = {case.variant: case.config.optimizer_options for case in comparison.cases()}
    assert given == {"sgd": ("sgd.momentum=0.5", "sgd.momentum=0.6"), "microadam": ("microadam.window=4",), "adamw": ()}


def test_a_full_disk_is_one_sentence_and_what_is_finished_is_kept(
    job: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    small = {**job, "optimizers": "sgd", "learning-rates": "1e-3", "retain": job["retain"]}
    before, going = resource.getrlimit(resource.RLIMIT_FSIZE), folders.append

    def append(path: Path, record: dict[str, object]) -> None:
        going(path, record)
        if path == out / "metrics.jsonl":  # the first run is done: nothing can be written any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(folders, "append", append)
            assert cli.main(command(small, out)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not be written (File too large): make room on the disk, then go on with --resume" in error
    assert len(compare.finished(compare.load(out)[0], out)) == 1
    assert cli.main(["compare", "--resume", str(out)]) == 0
    assert len(json.loads((out / "manifest.json").read_text())["results"]["runs"]) == 2


@pytest.mark.slow
def test_nothing_is_said_where_there_is_no_terminal(tmp_path: Path) -> None:
    options = {
        "model": tiny.bert_folder(tmp_path / "bert"), "train": tiny.jsonl(tmp_path / "rows", tiny.sentences(8)).rename(
            tmp_path / "rows.jsonl"), "validation-rows": 1, "max-steps": 1, "log-every": 10, "jobs": 2, "seeds": 0,
        "learning-rates": "1e-3", "device": "cpu",
    }  # fmt: skip
    line = [sys.executable, "-m", "nanoadam", *command(options, tmp_path / "run"), "--json"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [row["variant"] for row in json.loads(ended.stdout)["table"]] == ["adamw", "nanoadam"]
