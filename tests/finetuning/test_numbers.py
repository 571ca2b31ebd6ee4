"""Labels that are numbers, as tables of other countries and Parquet files write them."""

import decimal
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import pyarrow
from pyarrow import parquet

import tiny
from nanoadam.finetuning import outcome
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.job import Job, prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SENTENCES = [row["text"] for row in tiny.sentences(12)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert_folder(tmp_path_factory.mktemp("bert"))


def table(folder: Path, labels: list[str], kind: str = ";") -> Path:
    """With its labels in turn, one a row; `kind` is the delimiter, or a quotation mark for quoted labels."""
    delimiter = "," if kind == '"' else kind
    lines = [f"text{delimiter}label"]
    for i, text in enumerate(SENTENCES):
        label = labels[i % len(labels)]
        lines.append(f'{text},"{label}"' if kind == '"' else f"{text}{delimiter}{label}")
    path = folder / ("train.tsv" if kind == "\t" else "train.csv")
    path.write_text("\n".join(lines) + "\n")
    return path


def job(bert: Path, train: Path, **keys: object) -> Job:
    options = {"max_steps": 1, "learning_rate": 1e-3, "validation": str(train), **keys}
    return prepare(Config(model=str(bert), train=str(train), device="cpu", **options))


@pytest.mark.parametrize("kind", [";", "\t", '"', "|"])
def test_decimal_commas_are_numbers_and_a_line_says_so(bert: Path, tmp_path: Path, kind: str) -> None:
    labels = ["4,5", "-0,25", "3", "2,125", "1,5e1", ",5"]
    made = job(bert, table(tmp_path, labels, kind))
    assert made.config.task == "text-regression"
    assert made.task.train["labels"] == [4.5, -0.25, 3.0, 2.125, 15.0, 0.5] * 2
    (line,) = (line for line in outcome.beginning(made) if line.startswith("Note: the comma"))
    assert line == (
        "Note: the comma in '4,5' is read as a decimal one; if it parts several labels, use --task "
        "multi-label-classification"
    )


@pytest.mark.parametrize(
    "labels",
    [
        ["1,000", "2,500"],  # thousands, or not
        ["4,5", "4.5"],
        ["4,5", "none"],
        ["4,5,6", "1,2"],
        ["4,0", "3,0"],
    ],
)
def test_what_may_be_no_number_is_a_class_and_a_line_says_so(bert: Path, tmp_path: Path, labels: list[str]) -> None:
    made = job(bert, table(tmp_path, labels))
    assert made.config.task == "text-classification"
    assert sorted(made.task.names) == sorted(labels)
    said = [line for line in outcome.beginning(made) if "is learned as a class; if the labels are numbers" in line]
    assert len(said) == 1
    assert "--task text-regression" in said[0] and "--task multi-label-classification" in said[0]


def test_a_comma_that_may_be_two_things_is_refused_by_its_row(bert: Path, tmp_path: Path) -> None:
    for labels, row, value in ((["1,000", "2,500"], 1, "1,000"), (["4.5", "4,5"], 2, "4,5")):
        with pytest.raises(ValueError, match=rf"row {row} of .* has '{value}' in 'label', whose comma may be"):
            job(bert, table(tmp_path, labels), task="text-regression")
    with pytest.raises(ValueError, match="row 2 of .* has 'none' in 'label', which is no finite number"):
        job(bert, table(tmp_path, ["4,5", "none"]), task="text-regression")
    assert job(bert, table(tmp_path, ["4,0", "3,0"]), task="text-regression").task.train["labels"][:2] == [4.0, 3.0]


def test_the_training_split_says_what_a_comma_is(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    held = table(tmp_path / "held", ["1,250", "3,125"])
    made = job(bert, table(tmp_path, ["4,5", "3"]), validation=str(held))
    assert made.task.validation["labels"][:2] == [1.25, 3.125]
    with pytest.raises(ValueError, match="row 1 of .*whose comma may be"):
        job(bert, table(tmp_path, ["4.5", "3"]), validation=str(held))


@pytest.mark.parametrize("bits", [128, 256])
def test_decimals_of_parquet_are_numbers(bert: Path, tmp_path: Path, bits: int) -> None:
    kind = (pyarrow.decimal128 if bits == 128 else pyarrow.decimal256)(6, 2)

    def written(name: str, numbers: list[str]) -> Path:
        values = [decimal.Decimal(numbers[i % len(numbers)]) for i in range(12)]
        content = pyarrow.table({"text": SENTENCES, "label": pyarrow.array(values, kind)})
        parquet.write_table(content, tmp_path / name)
        return tmp_path / name

    measured = written("measured.parquet", ["4.50", "-0.25"])
    made = job(bert, measured)
    assert (made.config.task, made.task.train["labels"][:2]) == ("text-regression", [4.5, -0.25])
    with pytest.raises(ValueError, match=r"row 1 of .* has 'label' 4.50: for numbers use --task text-regression"):
        job(bert, measured, task="text-classification")
    counted = job(bert, written("counted.parquet", ["10.00", "2.00"]))
    assert (counted.config.task, counted.task.names) == ("text-classification", ["2", "10"])
