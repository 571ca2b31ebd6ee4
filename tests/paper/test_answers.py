"""What counts as an answer: hand-written cases, and the real files where they are."""

import json
import lzma
import tarfile
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from nanoadam.paper import answers

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 apples and buys 4.\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### -12", "-12"),
        ("#### $18.00", "18"),
        ("It costs $2.50 each, so $1,200.00", "1200"),
        ("The answer is 7.", "7"),
        ("3 + 4 = 7", "7"),
        ("a half is .5", "0.5"),
        ("#### 5\nQuestion: another one with 9", "5"),
        ("first #### 1 then #### 2", "1"),
        ("3 + 4 #### is no number", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, expected: str | None) -> None:
    found = answers.number(text)
    assert found == (None if expected is None else Decimal(expected))


def test_numbers_are_compared_by_value() -> None:
    row = {"answer": "so it is 1,080\n#### 1,080"}
    assert answers.gsm8k_right("that makes $1080.00", row)
    assert not answers.gsm8k_right("that makes 1080.5", row)
    assert not answers.gsm8k_right("", row)


@pytest.mark.parametrize(
    ("test", "text", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),
        ("piqa", "solution2 is better than solution1", "solution2"),
        ("ARC-Easy", "the correct answer is answer5", "answer5"),
        ("social_i_qa", "answer 2", None),
        ("hellaswag", "ending4", "ending4"),
        ("winogrande", "the correct answer is option1.", "option1"),
        ("openbookqa", "", None),
    ],
)
def test_the_first_answer_that_is_written_counts(test: str, text: str, expected: str | None) -> None:
    assert answers.word(text, answers.COMMONSENSE[test]) == expected
    assert answers.commonsense_right(text, {"answer": expected or "true"}, test) is (expected is not None)


def test_prompts_end_where_the_answer_begins() -> None:
    row = answers.commonsense_prompt({"instruction": "Choose.", "input": "", "output": "the correct answer is true"})
    assert row["prompt"].endswith("### Instruction:\nChoose.\n\n### Response:\n")
    assert row["completion"] == "the correct answer is true"
    with_input = answers.commonsense_prompt({"instruction": "Choose.", "input": "{x}", "output": ""})
    assert "### Input:\n{x}\n\n### Response:" in with_input["prompt"]
    asked = answers.gsm8k_prompt({"question": "How many? ", "answer": "One.\n#### 1"})
    assert asked == {"prompt": "Question: How many?\nAnswer:", "completion": " One.\n#### 1"}


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "packed.jsonl.xz").write_bytes(lzma.compress((tmp_path / "lines.jsonl").read_bytes()))
    for name in ("list.json", "lines.jsonl", "packed.jsonl"):
        assert answers.read_rows(tmp_path / name) == rows
    with pytest.raises(ValueError, match=r"there is no file .*none\.json: --data names the folder"):
        answers.read_rows(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        answers.read_rows(tmp_path / "bad.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a list of objects"):
        answers.read_rows(tmp_path / "empty.json")


@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        ({"question": "why?"}, "gsm8k", "answer"),
        ({"question": "why?", "answer": 3}, "gsm8k", "answer"),
        ({"instruction": "do", "input": "", "answer": "true"}, "commonsense", "output"),
    ],
)
def test_a_row_that_could_not_be_judged_is_named_before_any_training(
    row: dict[str, object], kind: str, column: str, tmp_path: Path
) -> None:
    good = dict.fromkeys(answers.COLUMNS[kind], "x")
    (tmp_path / "rows.json").write_text(json.dumps([good, row]))
    assert len(answers.read_rows(tmp_path / "rows.json")) == 2
    with pytest.raises(ValueError, match=f"a text '{column}' in each row, and row 2 has none"):
        answers.read_rows(tmp_path / "rows.json", answers.COLUMNS[kind])
    (tmp_path / "broken.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match="broken.jsonl.xz cannot be read"):
        answers.read_rows(tmp_path / "broken.jsonl")


def test_every_prompt_is_answered_in_its_place() -> None:
    """A model that counts upwards: what follows a prompt depends on its last token alone, whatever the padding."""
    pytest.importorskip("transformers")

    class Counting(torch.nn.Module):
        config = type("Config", (), {"max_position_embeddings": 16})()
        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
            assert not self.training
            assert bool((input_ids[attention_mask == 0] == 0).all() and attention_mask[:, -1].all())
            last = input_ids[:, -1:]
            return torch.cat([input_ids, last + 1, last + 2], dim=1)

    class Letters:
        bos_token_id, pad_token_id = 1, 0

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        def decode(self, tokens: torch.Tensor, **options: object) -> str:
            return "".join(map(chr, tokens.tolist()))

    model = Counting().train()
    texts = answers.write(model, Letters(), ["xa", "b", "yyyyc", "x" * 99 + "d"], new_tokens=2, batch_size=3)
    assert texts == ["bc", "cd", "de", "ef"]
    assert model.training


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the data is not here")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_real_gsm8k_answer_has_its_number(split: str, count: int) -> None:
    rows = answers.read_rows(SHARED / "gsm8k" / f"{split}.jsonl")
    assert len(rows) == count
    for row in rows:
        assert answers.number(row["answer"]) == Decimal(row["answer"].split("####")[1].strip().replace(",", ""))
        assert answers.gsm8k_right(answers.gsm8k_prompt(row)["completion"], row)


@pytest.mark.skipif(not (SHARED / "llm_adapters").is_dir(), reason="the data is not here")
def test_every_real_commonsense_answer_is_found() -> None:
    seen = {}
    with tarfile.open(SHARED / "llm_adapters" / "llm_adapters_data.tar.xz") as tar:
        for member in tar:
            test = Path(member.name).parent.name
            if test in answers.COMMONSENSE and Path(member.name).name == "test.json":
                rows = json.load(tar.extractfile(member))
                assert all(answers.commonsense_right(row["output"], row, test) for row in rows), test
                assert all(row["output"] in answers.commonsense_prompt(row)["completion"] for row in rows)
                seen[test] = len(rows)
    assert seen == {
        "boolq": 3270, "openbookqa": 500, "ARC-Easy": 2376, "ARC-Challenge": 1172, "piqa": 1838, "social_i_qa": 1954,
        "winogrande": 1267,
    }  # fmt: skip
