"""What is changed before a run goes on holds from then on and is written down, or is refused by its name."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam import cli
from nanoadam.finetuning import folders
from nanoadam.finetuning import run as finetune
from nanoadam.finetuning.config import FIELDS, Config, read

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted, to be copied."""
    root = tmp_path_factory.mktemp("begun")
    rows = tiny.jsonl(root / "train.jsonl", tiny.sentences(32))
    out = root / "run"

    def stop(line: dict[str, object]) -> None:
        if line["step"] == 5 and "event" not in line:
            raise KeyboardInterrupt

    config = Config(model=str(tiny.bert_folder(root / "bert")), train=str(rows), device="cpu", batch_size=4,
                    max_steps=12, save_every=2, log_every=1, learning_rate=1e-3, warmup=0.0, density=0.2)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config, out, stop)
    return out


@pytest.fixture
def begun(once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(once, tmp_path / "run")


def change(out: Path, key: str, value: str) -> None:
    text = (out / "config.toml").read_text()
    changed = re.sub(rf"(?m)^(# )?{key} =.*$", f"{key} = {value}", text)
    assert changed != text
    (out / "config.toml").write_text(changed)


@pytest.mark.parametrize("way", ["file", "option"])
def test_a_lower_rate_holds_from_the_checkpoint_on(begun: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    if way == "file":
        change(begun, "learning_rate", "1e-6")
        assert cli.main(["finetune", "--resume", str(begun)]) == 0
    else:
        assert cli.main(["finetune", "--resume", str(begun), "--learning-rate", "1e-6"]) == 0
    assert "from step 4 on: learning_rate 1e-06, was 0.001" in capsys.readouterr().err
    lines = [line for line in folders.read_lines(begun / "metrics.jsonl") if line["event"] == "train"]
    assert lines[3]["learning_rate"] == pytest.approx(1e-3 * 9 / 12)
    assert [line["learning_rate"] for line in lines[4:]] == pytest.approx([1e-6 * (12 - s) / 12 for s in range(4, 12)])
    manifest = json.loads((begun / "manifest.json").read_text())
    assert manifest["settings"]["learning_rate"] == 1e-6
    assert manifest["changed"] == [{"step": 4, "key": "learning_rate", "was": 1e-3, "is": 1e-6}]


FIXED = {
    "density": "0.5", "beta1": "0.5", "beta2": "0.5", "weight_decay": "0.5", "moments": "'reset'", "mask_interval": "3",
    "state_dtype": "'float32'", "optimizer": "'adamw'", "max_steps": "20", "batch_size": "8", "seed": "1",
    "scheduler": "'cosine'", "gradient_release": "false", "stochastic_rounding": "false", "criterion": "'largest'",
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_what_the_steps_so_far_were_made_with_is_refused_by_name(
    begun: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(begun, key, FIXED[key])
    before = (begun / "metrics.jsonl").read_bytes()
    assert cli.main(["finetune", "--resume", str(begun)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nanoadam: {key} was ") and "set it back in config.toml, or begin anew" in error
    assert (begun / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_a_lower_rate_holds_whatever_the_optimizer(once: Path, optimizer: str, tmp_path: Path) -> None:
    def stop(line: dict[str, object]) -> None:
        if line["step"] == 3 and "event" not in line:
            raise KeyboardInterrupt

    settings = {**read(once / "config.toml"), "optimizer": optimizer, "max_steps": 4}
    settings = {key: value for key, value in settings.items() if key not in ("density", "density_end")}
    with pytest.raises(KeyboardInterrupt):
        finetune.run(Config(**settings), tmp_path / "run", stop)
    finetune.resume(tmp_path / "run", keys={"learning_rate": 1e-6})
    lines = [line for line in folders.read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "train"]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 7.5e-4, 5e-7, 2.5e-7])


def test_a_run_that_goes_on_tries_no_rates(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (begun / "metrics.jsonl").read_bytes()
    assert cli.main(["finetune", "--resume", str(begun), "--learning-rate", "auto"]) == 2
    assert "tries no learning rates: give --learning-rate a number" in capsys.readouterr().err
    assert (begun / "metrics.jsonl").read_bytes() == before


def test_what_changes_nothing_that_is_learned_may_be_changed(begun: Path) -> None:
    change(begun, "eval_batch_size", "7")
    change(begun, "log_every", "3")
    finetune.resume(begun)
    assert json.loads((begun / "manifest.json").read_text())["settings"]["eval_batch_size"] == 7


def test_the_metric_stays_where_it_chooses_the_best_weights(once: Path, tmp_path: Path) -> None:
    def stop(line: dict[str, object]) -> None:
        if line["step"] == 3 and "event" not in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(Config(**{**read(once / "config.toml"), "best": True}), tmp_path / "run", stop)
    with pytest.raises(ValueError, match="metric was None when the run in .* began and is 'loss' now"):
        finetune.resume(tmp_path / "run", keys={"metric": "loss"})


def test_before_the_first_checkpoint_everything_may_be_changed(begun: Path) -> None:
    shutil.rmtree(begun / "checkpoints")
    change(begun, "density", "0.5")
    finetune.resume(begun)
    lines = folders.read_lines(begun / "metrics.jsonl")
    assert {line["density"] for line in lines if line["event"] == "train"} == {0.5}


def test_every_key_is_applied_free_or_fixed() -> None:
    assert {*finetune.APPLIED, *finetune.FREE} <= FIELDS.keys()
    assert not set(finetune.APPLIED) & set(finetune.FREE)
