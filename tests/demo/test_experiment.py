"""The demo runs end to end on a small setting, and leaves a run folder that stands by itself."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from browser import browsed
from nanoadam.demo import experiment as demo
from nanoadam.demo import figures
from nanoadam.demo.folder import write_folder
from nanoadam.finetuning import folders
from nanoadam.text import size

SMALL = demo.Settings(
    seeds=(0, 1),
    densities=(0.25,),
    learning_rates=(1e-3, 1e-2),
    hidden=16,
    pretrain_epochs=3,
    pretrain_learning_rate=1e-2,
    finetune_epochs=2,
)
METHODS = ["AdamW", "NanoAdam 25 %"]


@pytest.fixture(scope="module")
def result() -> demo.Demo:
    return demo.run(SMALL)


@pytest.fixture(scope="module")
def folder(result: demo.Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    write_folder(result, out)
    return out


def test_every_method_runs_at_every_rate_and_seed(result: demo.Demo) -> None:
    runs = {(o.method, o.learning_rate, o.seed) for o in result.outcomes}
    assert runs == {(m, lr, s) for m in METHODS for lr in SMALL.learning_rates for s in SMALL.seeds}
    assert len(result.outcomes) == len(runs)


def test_the_table_is_complete(result: demo.Demo) -> None:
    table = result.table()
    assert [row["method"] for row in table] == METHODS
    for row in table:
        assert row["learning_rate"] in SMALL.learning_rates
        for key, _, unit in demo.METRICS:
            assert row[key]["mean"] is not None
            assert row[key]["std"] >= 0
            assert figures.cell(row[key], unit)


def test_all_methods_start_from_the_same_pretrained_network(result: demo.Demo) -> None:
    for seed in SMALL.seeds:
        assert len({o.task1_before for o in result.outcomes if o.seed == seed}) == 1


def test_pretraining_learns_task_1(result: demo.Demo) -> None:
    assert all(o.task1_before > 0.6 for o in result.outcomes)  # chance is 0.2


def test_forgetting_is_the_drop_in_task_1(result: demo.Demo) -> None:
    for o in result.outcomes:
        assert o.forgetting == pytest.approx(o.task1_before - o.task1_after)


def test_nanoadam_touches_its_density_and_holds_less_than_adamw(result: demo.Demo) -> None:
    # 18 steps are fewer than one mask interval, so the selection is one and the same throughout.
    by_method = {m: [o for o in result.outcomes if o.method == m] for m in METHODS}
    assert all(0 < o.touched <= 0.25 for o in by_method["NanoAdam 25 %"])
    assert all(o.touched > 0.25 for o in by_method["AdamW"])
    for key in ("state_bytes", "gradient_bytes"):
        adamw, nano = ({getattr(o, key) for o in by_method[m]} for m in METHODS)
        assert max(nano) < min(adamw)


def test_adamw_holds_a_full_gradient_and_two_float32_moments(result: demo.Demo) -> None:
    parameters = list(demo.Digits(SMALL.hidden).parameters())
    weights = sum(p.numel() for p in parameters)
    own = next(o for o in result.outcomes if o.method == "AdamW")
    assert own.gradient_bytes == 4 * weights
    assert own.state_bytes == 8 * weights + 4 * len(parameters)  # and a step counter each


def test_the_same_settings_give_the_same_numbers(result: demo.Demo) -> None:
    again = demo.run(dataclasses.replace(SMALL, seeds=(1,)))
    assert again.outcomes == [o for o in result.outcomes if o.seed == 1]


def test_the_rate_is_chosen_by_validation_alone(result: demo.Demo) -> None:
    base = result.outcomes[0]

    def outcome(lr: float, validation: float, loss: float, task2: float) -> demo.Outcome:
        return dataclasses.replace(
            base,
            learning_rate=lr,
            task2_validation=validation,
            task2_validation_loss=loss,
            task2=task2,
            task1_after=task2,
        )

    assert demo.choose([outcome(1, 0.9, 0.3, 0.99), outcome(2, 0.95, 0.4, 0.1)]) == {"AdamW": 2}
    assert demo.choose([outcome(1, 0.9, 0.3, 0.1), outcome(2, 0.9, 0.2, 0.1)]) == {"AdamW": 2}
    assert demo.choose([outcome(1, 0.9, float("nan"), 0.9), outcome(2, 0.9, 5.0, 0.1)]) == {"AdamW": 2}


def test_splits_do_not_overlap_and_tasks_share_no_digit() -> None:
    images, labels, _ = demo.load_data()
    assert images.shape == (1797, 64)
    for first, count in ((0, 901), (5, 896)):
        task = demo.split_task(images, labels, first, seed=0)
        assert sum(len(split.labels) for split in task) == count
        assert set(torch.cat([split.labels for split in task]).tolist()) == set(range(5))
        together = torch.cat([split.images for split in task])
        own = torch.tensor(images[(labels >= first) & (labels < first + 5)] / 16 - 0.5, dtype=torch.float32)
        assert sorted(together.tolist()) == sorted(own.tolist())


def test_progress_counts_up_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    small = dataclasses.replace(SMALL, seeds=(0,), pretrain_epochs=1, finetune_epochs=1)
    demo.run(small, lambda what, done, total: seen.append((done, total)))
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_run_folder_is_complete(folder: Path) -> None:
    expected = {"config.toml", "manifest.json", "metrics.jsonl", "report.html"}
    assert {p.name for p in folder.iterdir()} == expected


def test_the_manifest_answers_what_reviewers_ask(folder: Path, result: demo.Demo) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = {"kind", "pseudocode", "code", "data", "hardware", "versions", "settings", "seeds", "results"}
    assert wanted <= manifest.keys()
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or manifest["versions"][
        "torch"
    ].startswith(torch.__version__.partition("+")[0])
    assert manifest["data"]["sha256"] == demo.load_data()[2]
    assert manifest["results"] == result.table()


def test_metrics_hold_every_run_and_epoch(folder: Path, result: demo.Demo) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    runs = [line for line in lines if line["event"] == "run"]
    assert len(runs) == len(result.outcomes)
    assert sum(line["chosen"] for line in runs) == len(METHODS) * len(SMALL.seeds)
    assert sum(line["event"] == "epoch" for line in lines) == len(runs) * SMALL.finetune_epochs


def test_the_report_needs_no_other_file(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4
    for question in ("What does the new task cost the old one?", "What does the optimizer take?"):
        assert question in page
    assert "src=" not in page
    assert "<link" not in page
    for _, label, _ in demo.METRICS:
        assert label in page


def test_the_report_fits_a_phone_without_an_error(folder: Path, tmp_path: Path) -> None:
    found = browsed((folder / "report.html").read_text(), tmp_path)
    assert int(str(found["wide"])) <= found["inner"] == 390
    assert "learning rate" in str(found["tip"])  # each point says which it is


def test_a_used_folder_is_refused_and_left_alone(folder: Path, result: demo.Demo) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match=f"{folder.name} is not empty: choose another one with --out"):
        write_folder(result, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        folders.prepare_folder(tmp_path / "taken")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        folders.write(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_settings_without_seeds_or_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        demo.Settings(seeds=())
    with pytest.raises(ValueError, match="at least one learning rate"):
        demo.Settings(learning_rates=())


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (2_392_000, "2.39 MB"), (25.1e9, "25.1 GB")]
)
def test_sizes_read_well(count: float, text: str) -> None:
    assert size(count) == text
