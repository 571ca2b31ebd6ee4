"""A learning rate that is found is one that was tried, and trying leaves the run as if it had been given."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam.comparing import compare
from nanoadam.finetuning import config as configs
from nanoadam.finetuning import optimizers, rates, search
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def valley(best: float):
    """A loss that is least at a rate, and infinite thirty times above it."""
    return lambda rate: math.inf if rate > 30 * best else 1 + math.log(rate / best) ** 2 / 10


@pytest.mark.parametrize("best", [3e-5, 1e-4, 6e-4, 3e-3, 6e-3])
def test_a_search_ends_near_the_best_rate(best: float) -> None:
    tried = search.search(valley(best), 6e-4)
    assert 3 <= len(tried) <= search.MOST_TRIALS
    found = search.best_of(tried, 6e-4)
    assert max(best / found, found / best) < 1.35


def test_where_trials_hardly_differ_the_typical_rate_stands() -> None:
    noise = iter([1.0, 0.998, 1.002, 0.997, 1.0, 1.001])
    tried = search.search(lambda rate: next(noise), 6e-4)
    assert len(tried) == 3
    assert search.best_of(tried, 6e-4) == pytest.approx(6e-4, rel=0.35)


def test_a_search_where_everything_diverges_goes_below() -> None:
    tried = search.search(lambda rate: math.inf, 1e-3)
    assert search.best_of(tried, 1e-3) < min(rate for rate, _ in tried)


def test_trials_are_a_fifteenth_of_the_run() -> None:
    assert [search.trial_steps(total) for total in (10, 239, 240, 1_000, 100_000)] == [0, 0, 30, 65, 200]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("job")
    train = tiny.jsonl(root / "train.jsonl", tiny.sentences(96))
    return {"model": str(tiny.bert_folder(root / "bert")), "train": str(train), "device": "cpu", "batch_size": 8,
            "max_steps": 240, "log_every": 80, "eval_every": 240, "save_every": 240}  # fmt: skip


@pytest.mark.slow
def test_a_run_that_found_its_rate_is_the_run_that_was_given_it(job: dict[str, object], tmp_path: Path) -> None:
    said: list[str] = []
    results = finetune.run(Config(**job), tmp_path / "found", lambda line: said.extend(line.get("about", ())))
    written = Config(**configs.read(tmp_path / "found" / "config.toml"))
    assert written.learning_rate is not None
    assert (written.density, written.density_end, written.task) == (0.1, 0.04, "text-classification")
    assert any(line.startswith(f"Learning rate: {written.learning_rate:g}, from") for line in said)
    again = finetune.run(written, tmp_path / "given")
    assert again["final"] == results["final"]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("found", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_too_short_for_trials_says_so(job: dict[str, object], tmp_path: Path) -> None:
    made = prepare(Config(**{**job, "max_steps": 20}))
    said: list[str] = []
    found = rates.chosen(made, lambda line: said.extend(line["about"]))
    assert (found.how, found.rate) == ("typical", 2.1e-3)
    assert "too short to try others" in said[0]


@pytest.mark.parametrize(("density", "more"), [(0.1, 1.0), (0.025, 2.0), (1.0, 10**-0.5)])
def test_fewer_weights_take_larger_steps(density: float, more: float) -> None:
    config = Config(model="-", train="-", density=density)
    assert optimizers.typical(config) == pytest.approx(5e-4 * more, rel=0.02)
    assert optimizers.typical(config, 1500 // 8) == pytest.approx(10e-4 * more, rel=0.02)


def test_images_take_larger_steps_in_runs_of_any_length() -> None:
    config = Config(model="-", train="-", task="image-classification")
    assert [optimizers.typical(config, steps) for steps in (100, 1500)] == pytest.approx([4.5e-3] * 2)
    grids = [compare.made({"model": "-", "train": "-", **keys}).variants for keys in ({}, {"task": config.task})]
    for texts, images in zip(*grids, strict=True):
        assert images.learning_rates == pytest.approx([9 * rate for rate in texts.learning_rates], rel=0.05)


def test_every_optimizer_has_a_rate_to_begin_at() -> None:
    from nanoadam.baselines import BASELINES

    assert tuple(BASELINES) == configs.OPTIMIZERS
    assert optimizers.TYPICAL.keys() == BASELINES.keys()
