"""Every row is read whole and as it stands, or one sentence says where it is not; nothing is dropped or renamed."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from nanoadam.finetuning import columns, data, files, labels
from nanoadam.finetuning.config import Config
from nanoadam.finetuning.files import Reading


def config(train: Path, **keys: object) -> Config:
    return Config(**{"model": "-", "train": str(train), "validation": str(train), **keys})


def rows_of(path: Path, reading: Reading | None = None) -> list[dict[str, object]]:
    return list(files.read(path, reading or Reading()).rows)


def roles(row: dict[str, object], tmp_path: Path, **keys: object) -> columns.Roles:
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [row] * 12)))
    return columns.of_text(split.name, split.rows, config(tmp_path / "rows.jsonl", **keys), "text-classification")


LONG = "a text of several words"


@pytest.mark.parametrize(
    ("first", "second"),
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
     ("text", "text_pair"), ("text1", "text2"), ("query", "passage"), ("Sentence1", "Sentence2")],
)  # fmt: skip
def test_texts_that_belong_together_are_read_as_a_pair(first: str, second: str, tmp_path: Path) -> None:
    assert roles({second: LONG, "label": 1, first: LONG, "idx": 3}, tmp_path).texts == (first, second)


def test_a_text_left_over_is_refused_unless_told(tmp_path: Path) -> None:
    row = {"text": LONG, "summary": LONG, "source": "gj04", "label": 1}
    with pytest.raises(ValueError, match=r"more columns of text .*\(text, summary\).*--pair-column summary"):
        roles(row, tmp_path)
    told = roles(row, tmp_path, text_column="text")
    assert (told.texts, told.ignored) == (("text",), ("summary", "source"))
    assert roles(row, tmp_path, text_column="text", pair_column="summary").texts == ("text", "summary")
    row = {"premise": LONG, "hypothesis": LONG, "explanation": LONG, "label": 1}
    with pytest.raises(ValueError, match=r"--text-column premise, .*--pair-column hypothesis"):
        roles(row, tmp_path)


def test_the_only_text_needs_no_usual_name(tmp_path: Path) -> None:
    assert roles({"utterance_en": LONG, "label": 1}, tmp_path).texts == ("utterance_en",)
    assert roles({"text": "short", "mood": "good"}, tmp_path).label == "mood"


def test_every_text_of_a_prompt_is_read(tmp_path: Path) -> None:
    def read(row: dict[str, object], **keys: object) -> tuple[str, columns.Roles]:
        split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [row] * 4)))
        return columns.of_completions(split.name, split.rows, config(tmp_path / "rows.jsonl", **keys))

    kind, found = read({"instruction": LONG, "input": LONG, "output": LONG})
    assert (kind, found.texts, found.label) == ("completion", ("instruction", "input"), "output")
    with pytest.raises(
        ValueError, match="more columns of text than a prompt and a completion.*question, answer, notes"
    ):
        read({"question": LONG, "answer": LONG, "notes": LONG})
    kind, found = read({"question": LONG, "answer": LONG, "notes": LONG}, prompt_column="notes,question")
    assert found.texts == ("notes", "question")
    with pytest.raises(ValueError, match="like --prompt-column instruction,input without the rest"):
        read({"instruction": LONG, "input": "", "output": LONG, "text": LONG})
    with pytest.raises(ValueError, match=r"\(content, text\): say which is read with --text-column content"):
        read({"content": LONG, "text": LONG})
    assert read({"text": LONG})[0] == "text"
    assert read({"text": "short", "url": "a"})[0] == "text"
    assert read({"conversations": [{"from": "human", "value": "a"}]})[0] == "chat"


@pytest.mark.parametrize(
    ("row", "architecture", "task"),
    [
        ({"text": LONG, "label": "a"}, "BertModel", "text-classification"),
        ({"text": LONG, "label": 0.25}, "BertModel", "text-regression"),
        ({"text": LONG, "label": 2.0}, "BertModel", "text-classification"),
        ({"text": LONG, "score": "3.8"}, "BertModel", "text-regression"),  # as tables have it
        ({"text": LONG, "score": "4"}, "BertModel", "text-classification"),
        ({"text": LONG, "score": "1.2.3"}, "BertModel", "text-classification"),
        ({"text": LONG, "labels": ["a", "b"]}, "BertModel", "multi-label-classification"),
        ({"tokens": ["a"], "ner_tags": [0]}, "BertModel", "token-classification"),
        ({"question": LONG, "answer": LONG}, "LlamaForCausalLM", "causal-lm"),
        ({"messages": [{"role": "user", "content": "a"}]}, "LlamaForCausalLM", "causal-lm"),
        ({"text": LONG}, "GPT2LMHeadModel", "causal-lm"),
        ({"image": "a.png", "label": "a"}, "ViTModel", "image-classification"),
    ],
)
def test_the_task_follows_from_data_and_model(
    row: dict[str, object], architecture: str, task: str, tmp_path: Path
) -> None:
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [row] * 4)))
    assert columns.task_of(split.rows, config(tmp_path / "rows.jsonl"), architecture) == task


def test_prompts_for_a_classifier_are_refused(tmp_path: Path) -> None:
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [{"question": LONG, "answer": LONG}] * 4)))
    with pytest.raises(ValueError, match="no language model .*--task"):
        columns.task_of(split.rows, config(tmp_path / "rows.jsonl"), "BertForSequenceClassification")


def test_pairs_of_answers_are_not_learned_by_halves(tmp_path: Path) -> None:
    rows = [{"prompt": LONG, "chosen": LONG, "rejected": LONG}] * 4
    path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    for given in (rows, [{"chosen": LONG, "rejected": LONG}] * 4):
        split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", given)))
        with pytest.raises(ValueError, match="learned by DPO .*--completion-column chosen"):
            columns.task_of(split.rows, config(path), "LlamaForCausalLM")
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", rows)))
    kind, roles = columns.of_completions(
        "rows", split.rows, config(path, completion_column="chosen", prompt_column="prompt")
    )
    assert (kind, roles.read, roles.ignored) == ("completion", ("prompt", "chosen"), ("rejected",))


def test_text_alone_is_for_language_models(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{LONG}\n\n{LONG}\n")
    split = data.read(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="text without labels: .*--task causal-lm"):
        columns.of_text("a.txt", split.rows, config(tmp_path / "a.txt"), "text-classification")


def test_a_name_is_near_without_its_suffix(tmp_path: Path) -> None:
    for name in ("rag.csv", "train.csv"):
        (tmp_path / name).touch()
    assert "did you mean 'train.csv'" in str(files.missing(tmp_path / "trian.csv"))
    assert str(files.missing(tmp_path / "dev.csv")) == f"there is no file {tmp_path / 'dev.csv'}"


# Labels ----------------------------------------------------------------------------------------------------


def test_codes_stay_codes(tmp_path: Path) -> None:
    (tmp_path / "codes.csv").write_text("text,label\n" + "a,007\nb,7\nc,01\nd,1\n" * 6)
    split = data.read(str(tmp_path / "codes.csv"))
    assert labels.label_names(split, "label") == ["01", "1", "007", "7"]
    assert labels.unlabelled(["-", "neutral", "Unknown"]) == ["-", "Unknown"]
    assert labels.unlabelled(["-1", "0", "1"]) == ["-1"] and labels.unlabelled(["-1", "1"]) == []
    assert labels.alike(["007", "7", "01", "Good", "good ", "bad"]) == [("007", "7"), ("Good", "good ")]


@pytest.mark.parametrize("label", [["a", "b"], {"name": "a"}])
def test_lists_and_objects_are_no_classes(label: object, tmp_path: Path) -> None:
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": label}] * 4)))
    with pytest.raises(ValueError, match=r"row 1 of rows.jsonl has .* which is no class: use .*--label-column"):
        labels.label_names(split, "label")


def test_as_many_classes_as_rows_are_none(tmp_path: Path) -> None:
    split = data.read(str(tiny.jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": f"id {i}"} for i in range(50)])))
    with pytest.raises(ValueError, match="50 different values in 'label' among 50 rows.*--task text-regression"):
        labels.label_names(split, "label")


def test_rows_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f'"row\n{r["label"]}",{i}\n' for i, r in enumerate(rows))
    )
    train, validation = data.load(Config(model="-", train=str(tmp_path / "rows.csv"), train_rows=10))
    for split in (train, validation):
        for index, label in enumerate(split.rows["label"]):
            place = int(label)
            assert split.where(index) == f"row {place + 1} of {split.name} (line {2 * place + 2})"


def test_a_validation_split_has_the_same_share_of_every_class(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": "rare" if i % 20 == 0 else "common"} for i in range(400)]
    for seed in range(5):
        made = Config(model="-", train=str(tiny.jsonl(tmp_path / "rows.jsonl", rows)), seed=seed)
        train, validation = data.load(made)
        assert list(validation.rows["label"]).count("rare") == 2
        assert sorted([*train.rows["text"], *validation.rows["text"]]) == sorted(row["text"] for row in rows)
        assert "the same share of every class" in validation.source["split"]


# Formats ---------------------------------------------------------------------------------------------------


def test_delimiters_are_found_or_told(tmp_path: Path) -> None:
    for number, mark in enumerate(";|,\t"):
        path = tmp_path / f"{number}.csv"
        path.write_text(
            f"text{mark}label\nso, well{mark}good\n".replace("so, well", "so well" if mark == "," else "so, well")
        )
        assert list(rows_of(path)[0]) == ["text", "label"]
    (tmp_path / "odd.csv").write_text("text~label\na~good\n")
    assert rows_of(tmp_path / "odd.csv", Reading(delimiter="~")) == [{"text": "a", "label": "good"}]


def test_encodings_are_told_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nok,x\ncaf\xe9,y\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"line 3 of .*a.csv is no UTF-8 text.*--encoding cp1252"):
        rows_of(tmp_path / "a.csv")
    assert rows_of(tmp_path / "a.csv", Reading(encoding="cp1252"))[1]["text"] == "café"
    (tmp_path / "b.csv").write_text("text,label\ncafé,y\n", encoding="utf-16")
    assert rows_of(tmp_path / "b.csv")[0]["text"] == "café"
    (tmp_path / "c.csv").write_bytes("text,label\na,y\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="full of zero bytes.*--encoding utf-16-le"):
        rows_of(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="there is no encoding 'klingon': try"):
        rows_of(tmp_path / "a.csv", Reading(encoding="klingon"))


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("text,label\na,1\n")
    assert rows_of(tmp_path / "a.csv.gz") == [{"text": "a", "label": "1"}]
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="b.jsonl.gz cannot be unpacked"):
        rows_of(tmp_path / "b.jsonl.gz")


def test_json_of_every_shape(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "within.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "columns.json").write_text(json.dumps({"text": ["a", "b"], "label": [1, 2]}))
    for name in ("lines", "within", "columns"):
        assert rows_of(tmp_path / f"{name}.json") == rows, name
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=1))
    assert rows_of(tmp_path / "list.jsonl") == rows
    (tmp_path / "lines.txt").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="lines.txt seems to hold JSON lines, not text: call it .jsonl"):
        rows_of(tmp_path / "lines.txt")
    one = {"tokens": ["a", "b"], "ner_tags": ["O", "O"]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert rows_of(tmp_path / "one.json") == [one]
    (tmp_path / "two.json").write_text(json.dumps({"train": rows, "test": rows}))
    with pytest.raises(ValueError, match=r"holds 2 lists of rows \(train, test\)"):
        rows_of(tmp_path / "two.json")


def test_a_column_that_the_first_row_lacks_is_kept(tmp_path: Path) -> None:
    path = tiny.jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b", "label": "x"}])
    assert rows_of(path) == [{"text": "a", "label": None}, {"text": "b", "label": "x"}]


def test_what_no_column_can_hold_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "\\ud800 b"}\n')
    with pytest.raises(ValueError, match=r"line 3 of .* half of a surrogate pair in 'text'"):
        rows_of(path)
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": true}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* has true or false in 'label', where rows before have a number"):
        rows_of(path)
    path.write_text(f'{{"text": "a", "id": {2**70}}}\n{{"text": "b", "id": 1}}\n')
    assert rows_of(path)[0]["id"] == str(2**70)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1 of"):
        rows_of(path)


def test_ragged_rows_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\nb,y,z\n')
    with pytest.raises(ValueError, match=r"line 4 of .*a.csv has 3 fields where its first line names 2.*--delimiter"):
        rows_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="names the column 'text' twice"):
        rows_of(tmp_path / "b.csv")


def test_names_for_a_table_that_has_a_header_are_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\n")
    assert rows_of(tmp_path / "a.csv", Reading(("Text", "Label"))) == [{"Text": "a", "Label": "x"}]
    (tmp_path / "b.csv").write_text("text,label\na,x\ntext,label\nb,y\n")
    with pytest.raises(ValueError, match="line 3 of .* names the columns again"):
        rows_of(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"seems to name its columns \(text, label\), but --columns names others"):
        rows_of(tmp_path / "a.csv", Reading(("sentence", "class")))
    rows = "".join(f"so {i},{'yn'[i % 2]}\n" for i in range(6))
    for first in ("tweet,sentiment", "tweet,mood"):
        (tmp_path / "c.csv").write_text(f"{first}\n{rows}")
        with pytest.raises(ValueError, match=rf"seems to name its columns \({first.replace(',', ', ')}\)"):
            rows_of(tmp_path / "c.csv", Reading(("text", "label")))
    (tmp_path / "c.csv").write_text(f"title,y\n{rows}")  # a row: its class is one of the others'
    assert len(rows_of(tmp_path / "c.csv", Reading(("text", "label")))) == 7


def test_what_is_said_of_one_file_holds_for_others_where_they_do_not_say_it_themselves(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes("3;été;1\n4;film;0\n".encode("cp1252"))
    written = {"bare.csv": "5;été;1\n".encode("cp1252"), "own.csv": "label,text\n1,été\n".encode()}
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        job = config(tmp_path / "train.csv", columns=("id", "text", "label"), delimiter=";", encoding="cp1252",
                     validation=str(tmp_path / name))  # fmt: skip
        train, validation = data.load(job)
        assert train.rows["text"][0] == validation.rows["text"][0] == "été", name
        assert validation.rows["label"][0] == "1"


def test_an_excel_sheet_is_a_table(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a", 1], ["b", None], [None, None], ["c", 2.5]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    found = files.read(tmp_path / "a.xlsx", Reading())
    assert list(found.rows) == [
        {"text": "a", "label": "1"},
        {"text": "b", "label": None},
        {"text": "c", "label": "2.5"},
    ]
    assert found.lines == [2, 3, 5]
    book = openpyxl.Workbook(write_only=True)  # which does not say how wide its sheet is
    sheet = book.create_sheet()
    for row in (["text", "label"], ["a", "y"], ["d", "x", "more"]):
        sheet.append(row)
    book.save(tmp_path / "c.xlsx")
    assert rows_of(tmp_path / "c.xlsx")[-1] == {"text": "d", "label": "x", "unnamed 3": "more"}
    (tmp_path / "b.xlsx").write_text("none")
    with pytest.raises(ValueError, match="cannot be read as an Excel file"):
        rows_of(tmp_path / "b.xlsx")


def test_plain_text_is_split_off_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {i}\nof two lines" for i in range(20)))
    train, validation = data.load(Config(model="-", train=str(tmp_path / "a.txt")))
    assert validation.rows["text"][:] == ["paragraph 18\nof two lines", "paragraph 19\nof two lines"]
    assert train.where(1) == "row 2 of a.txt (line 4)"
