"""Rows are read one at a time as the file has them, and every bad row is reported with its file and
line.
"""

import json
import math
import re

import pytest
from task_files import PARTS, SPLIT_NAMES, YES_OR_NO, choice, lines, target

from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import render
from minia3.tasks.rows import read_idx
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source, TaskSpec

# Checking rows


@pytest.mark.parametrize(
    ("value", "idx"),
    [(100.0, 100), ("100.0", 100), (-3, -3), (1.5, 9), (True, 9), (math.nan, 9), ("07", 9)],
)
def test_the_idx_of_a_row_is_an_integer_or_its_number(value, idx):
    """pandas writes 100.0 for 100 beside an empty cell, and the number was taken in its place."""
    found = read_idx(value, 9)
    assert (found, type(found)) == (idx, int)


EMPTY_CELLS = [
    # header, two cells per row, and what the last row has in place of its empty cell
    ("gold,label", "label", {"gold": "label"}),
    ("Gold,gold", "label", {"Gold": "label"}),
    ("label,Label", "label", {}),
]


@pytest.mark.parametrize(("header", "name", "fields"), EMPTY_CELLS)
def test_an_empty_cell_is_not_filled_by_a_column_that_is_not_read(tmp_path, header, name, fields):
    (tmp_path / "task.json").write_text(json.dumps({"fields": fields, "label_field": name}))
    content = f"text,{header}\na,x,y\nb,y,x\n"
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text(content)
    (tmp_path / "test.csv").write_text(content + "c,,x\n")
    task = load_task(tmp_path)
    assert [row["label"] for row in task.test] == [0, 1, -1]
    (tmp_path / "train.csv").write_text(content + "c,,x\n")
    column = header.split(",")[0]  # as the file calls it
    message = rf"train\.csv:4: '{column}' has no value, expected one of x, y"
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path)


@pytest.mark.parametrize(("header", "name", "fields"), EMPTY_CELLS)
def test_a_row_of_json_without_a_column_is_not_given_another_one(tmp_path, header, name, fields):
    """The line of the run said that the other column is ignored, and its label was taken."""
    (tmp_path / "task.json").write_text(json.dumps({"fields": fields, "label_field": name}))
    read, other = header.split(",")
    rows = [{"text": "a", read: "x", other: "y"}, {"text": "b", read: "y", other: "x"}]
    lacking = {"text": "c", other: "x"}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_bytes(lines(*rows))
    (tmp_path / "test.jsonl").write_bytes(lines(lacking, *rows))
    assert [row["label"] for row in load_task(tmp_path).test] == [-1, 0, 1]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows, lacking))
    with pytest.raises(ValueError, match=r"train\.jsonl:3: .* has no value, expected one of x, y"):
        load_task(tmp_path)
    # If no row has both, they are two names for one column.
    rows = [{"text": "a", read: "x"}, {"text": "b", read: "y"}, {"text": "c", other: "x"}]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(lines(*rows))
    assert [row["label"] for row in load_task(tmp_path).test] == [0, 1, 0]


def test_a_message_names_the_column_as_the_file_does(tmp_path):
    # It had the name of our own field (label_text), and proposed another column for an empty cell.
    path = tmp_path / "rows.csv"
    path.write_text("text,Label\na,x\nb,\nc,y\n")
    message = r"3: 'Label' has no value, expected a text that is not empty$"
    with pytest.raises(ValueError, match=message):
        load_task(path, target="{Label}")
    entry = {"files": "rows.csv", "fields": {"text": "words"}, "labels": ["x", "y"]}
    (tmp_path / "task.json").write_text(json.dumps(entry))
    path.write_text("text,Label\na,x\n,y\nc,y\n")
    message = r"3: 'text' has no value, expected a text that is not empty$"
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "task.json", input="{words}")


def test_an_empty_cell_of_an_input_is_empty_also_if_a_column_differs_from_it_in_case(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("premise,Premise,hypothesis,label\n" + "a,b,c,x\n,b,c,y\n" * 2)
    task = load_task(path)
    rows = [*task.train, *task.validation, *task.test]
    assert sorted(row["premise"] for row in rows) == ["", "", "a", "a"]


LACKING = (
    "there is no column 'hypothesis', which the model reads (it may be empty); "
    "the columns are premise, hypotesis, label: did you mean 'hypotesis'?"
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_file_that_lacks_a_column_of_the_input_is_refused(tmp_path, suffix):
    """The rows were read as if the column were empty in all of them."""
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\na,b,x\na,,y\n")
    path = tmp_path / f"validation{suffix}"
    rows = [{"premise": "a", "hypotesis": "b", "label": label} for label in "xy"]
    content = {
        ".csv": "premise,hypotesis,label\na,b,x\na,c,y\n",
        ".tsv": "premise\thypotesis\tlabel\na\tb\tx\na\tc\ty\n",
        ".jsonl": lines(*rows).decode(),
        ".json": json.dumps(rows),
    }[suffix]
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {LACKING}")):
        load_task(tmp_path)
    path.write_text(content.replace("hypotesis", "Hypothesis"))
    assert load_task(tmp_path).validation[0]["hypothesis"] == "b"


def test_a_column_of_the_input_may_be_empty_in_a_file_or_missing_in_some_rows_of_json(tmp_path):
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\na,b,x\na,,y\n")
    (tmp_path / "val.csv").write_text("premise,hypothesis,label\na,,x\n")
    rows = [{"premise": "a", "label": "x"}, {"premise": "a", "hypothesis": "b", "label": "y"}]
    (tmp_path / "test.jsonl").write_bytes(lines(*rows))
    task = load_task(tmp_path)
    assert [row["hypothesis"] for row in task.validation + task.test] == ["", "", "b"]


def test_a_file_may_lack_the_input_of_instructions(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,input,output\na,b,x\na,,y\n")
    (tmp_path / "val.csv").write_text("instruction,output\na,x\n")
    assert [row["input"] for row in load_task(tmp_path).validation] == [""]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": "maybe"}, "'label' is 'maybe', expected one of no, yes"),
        ({"text": "a"}, "'label' has no value, expected one of no, yes"),
        ({"label": "no"}, "the row has no field 'text', which '{text}[?]' needs"),
        (["text"], r"expected a JSON object, found '\[\"text\"\]"),
    ],
)
def test_a_bad_row_of_a_known_task_is_reported_like_any_other(tmp_path, monkeypatch, row, words):
    spec = TaskSpec(YES_OR_NO, [Source("", PARTS)], ("no", "yes"))
    monkeypatch.setitem(known_tasks(), "served", spec)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "train.jsonl").write_bytes(lines({"text": "a", "label": "no"}, row))
    (tmp_path / "served" / "val.jsonl").write_bytes(lines({"text": "a", "label": "no"}))
    with pytest.raises(ValueError, match=rf"served/train\.jsonl:2: {words}"):
        load_task("served", tmp_path)


@pytest.mark.parametrize(
    ("labels", "values"),
    [(("false", "true"), [False, "true", "False", True]), (("0", "1"), [0, "1", "0", 1])],
)
def test_labels_may_be_texts_numbers_or_booleans(tmp_path, monkeypatch, labels, values):
    spec = TaskSpec(YES_OR_NO, [Source("", PARTS)], labels)
    monkeypatch.setitem(known_tasks(), "served", spec)
    (tmp_path / "served").mkdir()
    content = lines(*({"text": "a", "label": value} for value in values))
    for name in SPLIT_NAMES:
        (tmp_path / "served" / f"{name}.jsonl").write_bytes(content)
    task = load_task("served", tmp_path)
    assert [row["label"] for row in task.train] == [0, 1, 0, 1]
    assert all(type(row["label"]) is int for row in task.train)
    assert task.evaluation == ("test", task.test), "all of its rows are labeled, so it counts"


def test_a_byte_order_mark_and_windows_line_ends_and_blank_lines_are_ignored(tmp_path):
    rows = [target(0), target(1), target(2, note="\u2028 é 漢 🙂")]
    text = "\ufeff\n" + "\r\n \t\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    (tmp_path / "val.jsonl").write_bytes(text.encode())
    assert load_task(str(tmp_path)).train == [
        {**row, "label": 0, "idx": n} for n, row in enumerate(rows)
    ]


BAD_LINES = [
    (b'{"input": "a",', "not JSON: "),
    (b'{"input": "a", "target": "b"} x', "not JSON: Extra data"),
    (b"[" * 100_000, "not JSON: "),
    (b'{"input": "a", "target": "\\ud83d"}', "not JSON: .*surrogate"),
    (b'{"input": "a", "target": "b", "n": ' + b"9" * 5000 + b"}", "not JSON: "),
    (b'["input"]', r"expected a JSON object, found '\[\"input\"\]"),
    (b"null", "expected a JSON object, found 'null"),
    (
        b'{"input": "a", "choices": ' + b"[" * 600 + b'"b"' + b"]" * 600 + b', "label": 0}',
        r"'choices' is \[\[.*, expected a list of texts that differ and are not empty",
    ),
    (lines({"target": "b"}), "'input' has no value, expected a text that is not empty"),
    (lines({"input": "", "target": "b"}), "'input' is '', expected a text that is not empty"),
    (
        lines({"input": " \n", "target": "b"}),
        r"'input' is ' \\n', expected a text that is not empty",
    ),
    (
        lines({"input": ["a"], "target": "b"}),
        r"'input' is \['a'\], expected a text that is not empty",
    ),
    (
        lines({"input": "a"}),
        r"'target' has no value, expected a text that is not empty; the columns are input",
    ),
    (
        lines({"input": "a", "target": "b", "choices": ["b"], "label": 0}),
        "expected either 'target', or",
    ),
    (lines({"input": "a", "target": " "}), "'target' is ' ', expected a text that is not empty"),
    (
        lines({"input": "a", "target": [4]}),
        r"'target' is \[4\], expected a text that is not empty",
    ),
    (lines({"input": "a", "choices": [], "label": 0}), r"'choices' is \[\], expected a list"),
    (lines({"input": "a", "choices": "bc", "label": 0}), "'choices' is 'bc', expected a list"),
    (lines({"input": "a", "choices": None, "label": 0}), "'choices' is None, expected a list"),
    (
        lines({"input": "a", "choices": ["b", ""], "label": 0}),
        r"'choices' is \['b', ''\], expected a list",
    ),
    (
        lines({"input": "a", "choices": ["b", 1], "label": 0}),
        r"'choices' is \['b', 1\], expected a list",
    ),
    (
        lines({"input": "a", "choices": ["b", "c", "b"], "label": 0}),
        r"'choices' is \['b', 'c', 'b'\], expected a list of texts that differ",
    ),
    (lines({"input": "a", "choices": ["b", "c"]}), "'label' has no value, expected one of 0, 1"),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": 2}),
        "'label' is 2, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": -1}),
        "'label' is -1, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": "d"}),
        "'label' is 'd', expected one of 0, 1 or one of the choices",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": True}),
        "'label' is True, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": 1.5}),
        "'label' is 1.5, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": [1]}),
        r"'label' is \[1\], expected one of 0, 1",
    ),
    (
        '{"input": "café", "target": "b"}'.encode("latin-1"),
        """not UTF-8: byte 0xe9 after '{"input": "caf'; save the file as UTF-8""",
    ),
    ('{"input": "a", "target": "b"}'.encode("utf-16"), "not UTF-8: byte 0xff after ''"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=[words for _, words in BAD_LINES])
def test_a_bad_row_is_reported_with_its_file_its_line_and_the_reason(tmp_path, line, words):
    has_choices = b"choices" in line and b"target" not in line
    good_row = choice(0) if has_choices else target(0)
    good = lines(good_row)
    (tmp_path / "train.jsonl").write_bytes(good + b"\n" + line.rstrip() + b"\n" + good)
    (tmp_path / "val.jsonl").write_bytes(good)
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/train\.jsonl:3: {words}[^\n]*\Z") as error:
        load_task(str(tmp_path))
    assert len(str(error.value)) < len(str(tmp_path)) + 250
    assert str(error.value).count(str(tmp_path)) == 1, "one bad row is one error"


@pytest.mark.parametrize(
    ("translation", "words"),
    [
        ({"de": "Hallo", "en": None}, r"'translation\[en\]' has no value, expected a text\Z"),
        (
            {"de": "Hallo", "en": ["Hello"]},
            r"'translation\[en\]' is \['Hello'\], expected a text; "
            r"\{translation\[en\]\[0\]\} is its first item",
        ),
        ({"de": "Hallo", "en": float("nan")}, r"'translation\[en\]' is nan, expected a text\Z"),
        ({"de": "Hallo", "en": " "}, r"the target '\{translation\[en\]\}' is empty"),
        ({"de": None, "en": "Hello"}, r"'translation\[de\]' has no value, expected a text\Z"),
        ({"de": {"a": 1}, "en": "Hello"}, r"'translation\[de\]' is \{'a': 1\}, expected a text\Z"),
    ],
)
def test_an_item_that_is_not_a_text_is_refused_as_a_column_is(tmp_path, translation, words):
    rows = [{"translation": {"de": f"Zahl {n}", "en": n}} for n in range(4)]
    path = tmp_path / "rows.jsonl"
    flags = {"input": "{translation[de]}", "target": "{translation[en]}"}
    path.write_bytes(lines(*rows))
    assert load_task(path, **flags).answer == "target"
    path.write_bytes(lines(*rows, {"translation": translation}))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:5: {words}"):
        load_task(path, **flags)


def test_a_number_or_a_boolean_is_one_text_as_a_column_an_item_a_target_and_a_label(tmp_path):
    """An item kept its ".0", and a boolean was "True" as a text and "true" as a label."""
    values = {"n": 3.0, "yes": True, "no": False, "half": 0.5}
    item = {**values, "deep": [{"n": 3.0}, True]}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*[{**values, "item": item, "list": [3.0, True]}] * 3))
    flags = {
        "input": "{n} {yes} {no} {half}",
        "target": "{item[n]} {item[yes]} {item[no]} {item[half]}",
    }
    (row, *_) = (task := load_task(path, **flags)).train
    rendered = render(task.prompts[0], row)
    assert rendered.input == rendered.choices[0] == "3 true false 0.5"
    flags["input"] = "{list[0]} {list[1]} {item[deep][0][n]} {item[deep][1]}"
    (row, *_) = (task := load_task(path, **flags)).train
    assert render(task.prompts[0], row).input == "3 true 3 true"
    task = load_task(path, input="{n}", target="{yes}", labels="false,true")
    assert render(task.prompts[0], task.train[0]).choices[1] == rendered.input.split()[1]


def test_a_null_is_not_a_choice_of_a_task_file(tmp_path):
    entry = {"labels": ["0", "1"], "prompts": [{"text": "{q}", "choices": ["{a}", "{b[0]}"]}]}
    (tmp_path / "task.json").write_text(json.dumps(entry))
    rows = [{"q": "w", "a": "x", "b": [b], "label": "0"} for b in ("y", "z", None)]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows, {**rows[0], "a": None}))
    words = r"jsonl:3: 'b\[0\]' has no value, .*jsonl:4: 'a' has no value, expected a text"
    with pytest.raises(ValueError, match=words):
        load_task(tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_the_columns_of_every_prompt_are_prepared(tmp_path, order):
    texts = ["{body}", "{title}: {body} {n}?"][::order]
    prompts = [{"text": text} for text in texts]
    (tmp_path / "task.json").write_text(json.dumps({"prompts": prompts}))
    rows = [{"title": "a", "body": "b", "n": 3.0, "label": "x"}, {"body": "c", "label": "y"}]
    (tmp_path / "train.jsonl").write_bytes(lines(*rows))
    (tmp_path / "test.jsonl").write_bytes(lines(*rows))
    task = load_task(tmp_path)
    prompt = task.prompts[texts.index("{title}: {body} {n}?")]
    assert [render(prompt, row).input for row in task.train] == ["a: b 3?", ": c ?"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "'a' has no value, expected a text that is not empty; the columns are "),
        ({"a": " "}, "'a' is ' ', expected a text that is not empty"),
        ({"a": "x", "b": [" "]}, r"the choice '\{b\[0\]\}' is empty, expected a text"),
    ],
)
def test_an_empty_choice_of_any_prompt_is_refused(tmp_path, more, words):
    first = {"text": "{q}", "choices": ["no", "yes"]}
    second = {"text": "{q}", "choices": ["{a}", "{b[0]}"]}
    entry = {"labels": ["0", "1"], "prompts": [first, second]}
    (tmp_path / "task.json").write_text(json.dumps(entry))
    row = {"q": "w", "b": ["y"], "label": "0"}
    good = {**row, "a": 2.0}
    (tmp_path / "test.jsonl").write_bytes(lines(good))
    (tmp_path / "train.jsonl").write_bytes(lines(good, good))
    task = load_task(tmp_path)
    assert render(task.prompts[1], task.train[0]).choices == ["2", "y"]
    (tmp_path / "train.jsonl").write_bytes(lines(good, {**row, **more}))
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: {words}"):
        load_task(tmp_path)


def test_only_a_test_row_may_lack_its_label(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(choice(0)))
    (tmp_path / "test.jsonl").write_bytes(
        lines({**choice(0), "label": True}, {**choice(0), "label": 2}, choice(0, label=-1))
    )
    words = r"test\.jsonl:1: 'label' is True.*test\.jsonl:2: 'label' is 2[^;]*\Z"
    with pytest.raises(ValueError, match=words):
        load_task(str(tmp_path))


def test_one_error_shows_five_bad_rows_of_all_files_and_counts_the_others(tmp_path):
    bad = [{"input": "a"}] * 3
    (tmp_path / "train.jsonl").write_bytes(lines(*bad, target(0)))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0), *bad))
    with pytest.raises(ValueError, match=r"; and 1 more\Z") as error:
        load_task(str(tmp_path))
    places = [part.split(": ")[0] for part in str(error.value).split(f"{tmp_path}/")[1:]]
    assert places == [
        "train.jsonl:1",
        "train.jsonl:2",
        "train.jsonl:3",
        "val.jsonl:2",
        "val.jsonl:3",
    ]
    (tmp_path / "val.jsonl").write_bytes(lines(target(0), *bad[:2]))
    with pytest.raises(ValueError, match="'target' has no value") as error:
        load_task(str(tmp_path))
    assert "more" not in str(error.value)


def test_a_file_in_another_encoding_is_one_error_and_not_one_for_each_line(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"input": "é", "target": "é"}\n'.encode("latin-1") * 9)
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    words = r"train\.jsonl:1: not UTF-8: byte 0xe9 [^;]*; save the file as UTF-8 \(if [^;]*\)\Z"
    with pytest.raises(ValueError, match=words):
        load_task(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\n \r\n", "\ufeff".encode()])
def test_an_empty_file_is_reported_together_with_bad_rows_of_other_files(tmp_path, content):
    (tmp_path / "train.jsonl").write_bytes(lines({"input": " ", "target": "b"}))
    (tmp_path / "val.jsonl").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"train\.jsonl:1: 'input' is ' ', .*val\.jsonl: no rows\Z"
    ):
        load_task(str(tmp_path))


def test_a_file_without_permission_is_an_error_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    for function in ("io.open", "builtins.open"):
        monkeypatch.setattr(function, refuse)  # and not chmod, which root ignores
    with pytest.raises(ValueError, match=r"val\.jsonl: Permission denied\Z"):
        load_task(str(tmp_path))


def test_rows_of_both_kinds_are_an_error_in_one_file_and_across_files(tmp_path):
    (tmp_path / "one.jsonl").write_bytes(lines(target(0), choice(1), target(2)))
    with pytest.raises(ValueError, match=r"one\.jsonl: 2 rows have 'target', the others 'choices'"):
        load_task(str(tmp_path / "one.jsonl"))
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "val.jsonl").write_bytes(lines(choice(0)))
    with pytest.raises(
        ValueError,
        match=r"val\.jsonl:1: 'target' has no value.*the columns are input, choices, label",
    ):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("value", "item", "advice"),
    [
        (["x", "y"], "{answer[0]}", "; {answer[0]} names its first item; "),
        ({"value": "x"}, "{answer[value]}", "; {answer[value]} names an item of it; "),
        (
            [{"role": "user", "content": "x"}],
            "{answer[0][content]}",
            "; a conversation has all of its turns in one column, 'messages'; ",
        ),
    ],
)
def test_a_structure_in_place_of_a_text_is_answered_with_the_name_of_its_item(
    value, item, advice, tmp_path
):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*[{"question": "a", "answer": value}] * 5))
    with pytest.raises(ValueError, match=re.escape(f"a text that is not empty{advice}")):
        load_task(path)
    assert load_task(path, target=item).train[0]["answer"] == value
    path.write_bytes(lines(*[{"question": "a", "answer": type(value)()}] * 5))
    with pytest.raises(ValueError, match=r"expected a text that is not empty; .*:2: "):
        load_task(path)
