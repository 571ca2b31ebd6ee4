"""Every example runs as it stands and does what it says."""

import runpy
import sys
from pathlib import Path

import pytest

import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"

# Libraries may warn; what we have to say must not be overheard.
pytestmark = pytest.mark.filterwarnings("ignore", "error:.*(NanoAdam|nanoadam)")


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["example"])


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def losses(out: str) -> list[float]:
    return [float(line.split("loss ")[1].split()[0].rstrip(",;")) for line in out.splitlines() if "loss " in line]


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("plain_loop.py", capsys)
    assert "resumed bit for bit: True" in out
    assert losses(out)[-1] < 0.5


def test_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = run("trainer.py", capsys)
    found = losses(out)
    assert len(found) == 4
    assert found[-1] < found[0]
    assert "touched" in out


def test_accelerate_loop(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    assert "resumed bit for bit: True" in run("accelerate_loop.py", capsys)


def test_peft_lora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    out = run("peft_lora.py", capsys)
    assert "base unchanged: True" in out
    assert losses(out)[-1] < losses(out)[0] - 0.5


def test_trl_sft(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("trl")
    found = losses(run("trl_sft.py", capsys))
    assert len(found) == 4
    assert found[-1] < 0.1 * found[0]


@pytest.mark.slow
def test_rl_sync(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("trl")
    out = run("rl_sync.py", capsys)
    rewards = [float(line.split("reward ")[1]) for line in out.splitlines() if "reward " in line]
    assert rewards[-1] > rewards[0] + 0.2
    assert rewards[-1] > 0.9
    assert "each rollout had the weights of its step: True" in out


def test_trl_dpo(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("trl")
    out = run("trl_dpo.py", capsys)
    assert losses(out)[-1] < 0.5 * losses(out)[0]
    assert "right in 100%" in out


def test_lightning_module(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    out = run("lightning_module.py", capsys)
    assert "resumed bit for bit: True" in out
    assert losses(out)[-1] < 0.7 * losses(out)[0]


# The same with a model that is loaded, as --model NAME does it.


@pytest.mark.parametrize("name", ["plain_loop.py", "accelerate_loop.py", "lightning_module.py"])
def test_loops_with_a_model(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if name != "plain_loop.py":
        pytest.importorskip(name.partition("_")[0])
    steps = ["--steps", "20"] if name == "plain_loop.py" else []
    folder = str(tiny.bert_folder(tmp_path / "model"))
    assert "resumed bit for bit: True" in run(name, capsys, "--model", folder, *steps)


@pytest.mark.slow
def test_trainer_with_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64)  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert len(losses(run("trainer.py", capsys, "--model", str(tmp_path)))) == 4


@pytest.mark.parametrize("name", ["trl_sft.py", pytest.param("trl_dpo.py", marks=pytest.mark.slow), "peft_lora.py"])
def test_language_models_with_a_model(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("peft" if name.startswith("peft") else "trl")
    found = losses(run(name, capsys, "--model", str(tiny.causal_folder(tmp_path / "model"))))
    assert len(found) >= 3
    assert found[-1] < found[0] or name == "trl_dpo.py"  # the tiny tokenizer knows none of its words


def test_no_example_is_left_out() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "accelerate_loop.py", "lightning_module.py", "peft_lora.py", "plain_loop.py", "rl_sync.py", "trainer.py",
        "distributed_loop.py",  # tests/distributed

        "trl_dpo.py",
        "trl_sft.py",
    }  # fmt: skip
