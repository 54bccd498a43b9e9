"""Rows are read one at a time as the file has them, in every format."""

import csv
import gzip
import hashlib
import re
import tracemalloc

import pytest
from task_files import choice, lines, target

from minia3.tasks.csv_rows import find_delimiter, parse_choices
from minia3.tasks.prompts import render
from minia3.tasks.row_files import column_names, read_rows
from minia3.tasks.splits import load_task


def read(path, content):
    """Write a file, and return its rows with their line numbers. An error becomes its message."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    found = []
    for number, row in read_rows(path):
        is_error = isinstance(row, ValueError)
        found.append((number, str(row) if is_error else row))
    return found


def test_a_jsonl_row_comes_with_its_line_number_and_an_error_does_not_stop_the_reading(tmp_path):
    content = '\ufeff{"input": "é"}\r\n\r\n{"inp\n[1]\n  {"n": [1, null]}'
    rows = read(tmp_path / "a.jsonl", content)
    assert [number for number, _ in rows] == [1, 3, 4, 5]
    assert (rows[0][1], rows[3][1]) == ({"input": "é"}, {"n": [1, None]})
    assert rows[1][1].startswith("not JSON: ")
    assert rows[2][1] == (
        "expected a JSON object, found '[1]'; a file with a list of objects is named .json"
    )
    assert read(tmp_path / "b.jsonl", b"") == []


def test_a_csv_file_has_the_same_rows_as_the_jsonl_file(tmp_path):
    content = (
        "\ufeffinput,choices,label,adapter,idx\r\n"
        'a,"[""x|y"", ""z""]",1,,7\r\n'
        "\r\n"
        '"two\nlines, ""quoted""",yes | no,0,b,\r\n'
        "é \u2028,one,-1,1,x\r\n"
        ",,,,\r\n"
        "1,,,,"
    )
    assert read(tmp_path / "a.csv", content) == [
        (2, {"input": "a", "choices": '["x|y", "z"]', "label": "1", "idx": "7"}),
        (
            4,
            {
                "input": 'two\nlines, "quoted"',
                "choices": "yes | no",
                "label": "0",
                "adapter": "b",
            },
        ),
        (6, {"input": "é \u2028", "choices": "one", "label": "-1", "adapter": "1", "idx": "x"}),
        (7, {}),
        (8, {"input": "1"}),
    ]


@pytest.mark.parametrize(
    ("cell", "choices"),
    [('["x|y", "z"]', ["x|y", "z"]), ("yes | no", ["yes", "no"]), ("one", ["one"])],
)
def test_a_cell_of_choices_is_a_json_list_or_has_bars_between_them(cell, choices):
    assert parse_choices(cell) == choices


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ('["x"', r"the choices begin with '\[', so they are read as JSON: not JSON: "),
        ("{'text': ['x'], 'label': ['A']}", r"the choices begin with '\{', .* \(pandas writes"),
        ("[x]|y", r"the choices begin with '\[', so they are read as JSON: not JSON: "),
        ("['x', 'y']", r"the choices begin.* \(pandas writes lists in another form"),
    ],
)
def test_a_cell_of_choices_that_is_no_list_is_an_error_if_they_are_picked(tmp_path, cell, words):
    quoted = '"' + cell.replace('"', '""') + '"'
    (tmp_path / "a.csv").write_text(f"input,choices,label\na,b|c,0\na,{quoted},0\n")
    with pytest.raises(ValueError, match=rf"a\.csv:3: {words}") as error:
        load_task(tmp_path / "a.csv")
    assert len(str(error.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("cell", ["A) x | B) y", "['x', 'y']"])
def test_a_cell_of_choices_is_a_text_like_any_other_if_they_are_not_picked(tmp_path, cell):
    rows = "".join(f'question {n},"{cell}",{"AB"[n % 2]}\n' for n in range(12))
    (tmp_path / "mine.csv").write_text("question,choices,answer\n" + rows)
    ignored = load_task(tmp_path / "mine.csv", input="{question}", target="{answer}")
    assert ignored.columns == "reads question, writes answer; ignores choices"
    read_by_model = load_task(
        tmp_path / "mine.csv", input="{question}\n{choices}", target="{answer}", labels="A,B"
    )
    rendered = render(read_by_model.prompts[0], read_by_model.train[0])
    assert rendered.input.endswith(f"\n{cell}")
    assert rendered.choices == ["A", "B"]


def test_a_prompt_names_an_item_of_a_cell_of_choices(tmp_path):
    rows = "".join(f"question {n},good|bad,{n % 2}\n" for n in range(12))
    (tmp_path / "mine.csv").write_text("question,Choices,answer\n" + rows)
    task = load_task(tmp_path / "mine.csv", input="{question} {Choices[1]}", target="{answer}")
    assert render(task.prompts[0], task.train[0]).input.endswith(" bad")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a", r"expected 2 cells, .*found 1: \['a'\]"),
        ("a,b,c", r"expected 2 cells, .*found 3: "),
        ("input,choices", "found the header again, expected a row"),
        (" input, choices ", "found the header again, expected a row"),
        ("\ufeffinput,choices", "found the header again, expected a row"),
        ("a\rb,c", r"a line end \\r without \\n: save the file with the line ends of Unix or Win"),
        ('a,"b" c', "text follows a closing quote: put the whole cell into quotes, and write"),
    ],
)
def test_a_bad_csv_row_is_an_error_with_the_number_of_its_line(tmp_path, line, words):
    content = f'input,choices\n"1\n",b\n{line}\n2,b\n'
    (first_number, first), (number, message), (last_number, last) = read(
        tmp_path / "a.csv", content
    )
    assert (first_number, number, last_number) == (2, 4, 5)
    assert (first["input"], last["input"]) == ("1\n", "2")
    assert re.match(words, message)
    assert len(message) < 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty"),
        (" \n\n", r"expected a header, and no name twice; found \[\]"),
        ("input,target,target\na,b,c\n", "found .'input', 'target', 'target'"),
        ("input,target,,\na,b,,\n", r"2 columns have no name: delete them, or name them; found \["),
        ('"input\n', "a quote is never closed"),
        ('"in"put\n', 'text follows a closing quote: put the whole cell into quotes, and write ""'),
        ("input,target\ra,b\rc,d\r", r"a line end \\r without \\n: save the file with the line "),
        (b"\xff\xfei\0n\0", "not UTF-8, but UTF-16: save the file as UTF-8, as `iconv -f utf-16"),
    ],
)
def test_a_csv_file_without_a_header_is_an_error(tmp_path, content, words):
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/a\.csv: [^\n]*{words}[^\n]*\Z"):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize(
    ("name", "words"), [("a.csv", "a folder; expected a file, "), ("no.csv", "not found")]
)
def test_a_path_that_cannot_be_opened_is_an_error(tmp_path, name, words):
    (tmp_path / "a.csv").mkdir()
    path = tmp_path / name
    with pytest.raises(ValueError, match=rf"\A{path}: .*{words}[^\n]*\Z"):
        next(read_rows(path))


FORMATS = [("a.jsonl", b"", b'{"input": "a"}\n'), ("a.csv", b"input,n\n", b"a,1\n")]


@pytest.mark.parametrize(("name", "header", "good"), FORMATS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [(b"x" * 51, "a row of more than 50 bytes"), (b"\xff", "not UTF-8: byte 0xff")],
)
def test_a_row_that_is_too_long_or_not_utf_8_is_the_last(
    tmp_path, monkeypatch, name, header, good, bad, words
):
    monkeypatch.setattr("minia3.tasks.text_lines.MAX_ROW_BYTES", 50)
    (_, first), (number, message) = read(tmp_path / name, header + good + bad + b"\n" + good)
    assert first["input"] == "a"
    assert number == (3 if header else 2)
    assert message.startswith(words)


@pytest.mark.parametrize(("name", "header", "good"), FORMATS)
def test_a_row_of_exactly_the_limit_is_read(tmp_path, monkeypatch, name, header, good):
    monkeypatch.setattr("minia3.tasks.text_lines.MAX_ROW_BYTES", 50)
    rows = read(tmp_path / name, header + good + b" " * 49 + b"\n" + good)
    assert [row["input"] for _, row in rows] == ["a", "a"]


def test_cells_with_line_ends_do_not_add_up_to_an_endless_row(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.tasks.text_lines.MAX_ROW_BYTES", 1000)
    assert read(tmp_path / "a.csv", 'input\n"a' + '\n","' * 1000) == [
        (2, "a row of more than 1000 bytes: is a line end or a quote missing?")
    ]


@pytest.mark.parametrize("name", ["big.jsonl", "big.csv"])
def test_reading_takes_the_memory_of_one_row(tmp_path, name):
    text = b'"' + b"a" * 10_000 + b'"'
    if name == "big.csv":
        content = b"input\n" + 2000 * (text + b"\n")
    else:
        content = 2000 * (b'{"input": ' + text + b"}\n")
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        assert sum(len(row["input"]) for _, row in read_rows(tmp_path / name)) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_line_of_a_gigabyte_is_refused_before_it_fills_the_memory(tmp_path):
    with (tmp_path / "big.jsonl").open("wb") as file:
        file.truncate(1 << 30)  # a hole, which takes no disk
    tracemalloc.start()
    try:
        ((_, error),) = read_rows(tmp_path / "big.jsonl")
        assert str(error).startswith(f"a row of more than {1 << 24} bytes: ")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make_row", [target, choice])
def test_a_task_in_csv_equals_the_task_in_jsonl(tmp_path, make_row):
    rows = [make_row(n) for n in range(12)]
    names = list(rows[0])
    csv_lines = [",".join(names)]
    for row in rows:
        cells = {name: str(value) for name, value in row.items()}
        if "choices" in row:
            cells["choices"] = "|".join(row["choices"])
        csv_lines.append(",".join(cells.values()))
    (tmp_path / "mine.jsonl").write_bytes(lines(*rows))
    (tmp_path / "mine.csv").write_text("\n".join(csv_lines))
    from_jsonl = load_task(tmp_path / "mine.jsonl")
    from_csv = load_task(tmp_path / "mine.csv")
    for field in ("name", "train", "validation", "test", "metric"):
        assert getattr(from_csv, field) == getattr(from_jsonl, field)
    digest = hashlib.sha256((tmp_path / "mine.csv").read_bytes()).hexdigest()
    assert from_csv.checksums == {"mine.csv": digest}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_a_cell_may_be_as_long_as_a_row(tmp_path, name):
    csv.field_size_limit(131_072)  # as in a new process
    text = "a" * 1_000_000
    content = f"input\n{text}\nb\n".encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    assert read(tmp_path / name, content) == [(2, {"input": text}), (3, {"input": "b"})]


def test_a_larger_limit_on_cells_that_a_program_has_set_stays(tmp_path):
    before = csv.field_size_limit(1 << 30)
    try:
        assert read(tmp_path / "a.csv", "input\na\n") == [(2, {"input": "a"})]
        assert csv.field_size_limit() == 1 << 30
    finally:
        csv.field_size_limit(before)


def test_the_choices_of_a_cell_are_found_whatever_the_case_of_their_column(tmp_path):
    rows = "".join(f"question {n},good|bad,{n % 2}\n" for n in range(12))
    (tmp_path / "mine.csv").write_text("Input,Choices,Label\n" + rows)
    task = load_task(tmp_path / "mine.csv")
    assert task.train[0]["choices"] == ["good", "bad"]
    assert task.columns == "reads Input, picks Label among the row's choices"


def test_the_choices_of_a_cell_are_found_if_a_task_file_names_their_column(tmp_path):
    rows = "".join(f"question {n},good|bad,{n % 2}\n" for n in range(12))
    (tmp_path / "train.csv").write_text("input,options,label\n" + rows)
    (tmp_path / "task.json").write_text('{"fields": {"options": "choices"}}')
    assert load_task(tmp_path).train[0]["choices"] == ["good", "bad"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_the_columns_of_a_table_are_those_of_its_header(tmp_path, name):
    content = b"\n id ,Note\n1,\n"
    if "tsv" in name:
        content = content.replace(b",", b"\t")
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    assert column_names(tmp_path / name) == ["id", "Note"]


def test_a_file_of_json_has_no_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    assert column_names(tmp_path / "a.jsonl") == []


# Delimiters


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".CSV"])
def test_a_csv_file_may_have_semicolons_or_tabs(tmp_path, delimiter, suffix):
    records = [["a text, or; two", "label"], ["a, b; c\td", "1"], ["two\nlines", "0"]]
    with (tmp_path / "made.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(records)
    content = "\n" + (tmp_path / "made.csv").read_text()
    name = records[0][0]
    assert read(tmp_path / f"a{suffix}", content) == [
        (3, {name: "a, b; c\td", "label": "1"}),
        (4, {name: "two\nlines", "label": "0"}),
    ]


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("input", ["input"]),
        ("a,b", ["a", "b"]),
        ("a;b", ["a", "b"]),
        ("a\tb", ["a", "b"]),
        ("a, b", ["a", " b"]),
        ("a;b,c", ["a;b", "c"]),  # in doubt, a comma
        ("a;b;c,d", ["a", "b", "c,d"]),
        ('"a;b;c",d', ["a;b;c", "d"]),
        ('"a,b,c";d', ["a,b,c", "d"]),
    ],
)
def test_the_delimiter_is_the_one_that_makes_the_most_columns(tmp_path, header, names):
    delimiter = find_delimiter([header], iter(()))
    assert next(csv.reader([header], delimiter=delimiter)) == names


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("names", [["Review,\nall of it", "label"], ["id", "a\n\nb;\n", "label"]])
def test_the_name_of_a_column_may_have_line_breaks(tmp_path, delimiter, names):
    cells = ["a, b; c"] * len(names)
    with (tmp_path / "made.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([names, cells, cells])
    first = 1 + 1 + "".join(names).count("\n")
    row = {name.strip(): cell for name, cell in zip(names, cells, strict=True)}
    assert read(tmp_path / "made.csv", (tmp_path / "made.csv").read_text()) == [
        (first, row),
        (first + 1, row),
    ]
    assert column_names(tmp_path / "made.csv") == list(row)


@pytest.mark.parametrize(
    ("first_line", "delimiter"),
    [
        ("sep=;\r\n", ";"),
        ("\ufeffSEP=;\n", ";"),
        ("sep=\t\n\n", "\t"),
        ("sep=|\n", "|"),
        ("sep=^\n", "^"),
        ('sep="\n', ";"),  # which cannot be one, so the header decides
    ],
)
def test_the_line_that_some_programs_write_for_excel_names_the_delimiter(
    tmp_path, first_line, delimiter
):
    n_lines = first_line.count("\n")
    content = first_line + 'text;label\na, b; "x"\n'.replace(";", delimiter)
    assert read(tmp_path / "a.csv", content) == [(n_lines + 2, {"text": "a, b", "label": "x"})]
    assert column_names(tmp_path / "a.csv") == ["text", "label"]


def test_the_declared_delimiter_comes_before_one_that_makes_more_columns(tmp_path):
    content = "sep=;\nReview, all of it, really;label\na;x\n"
    row = {"Review, all of it, really": "a", "label": "x"}
    assert read(tmp_path / "a.csv", content) == [(3, row)]
    assert read(tmp_path / "a.csv", "sep=;\ntext, all of it\na, b\n") == [
        (3, {"text, all of it": "a, b"})
    ]


def test_spaces_around_the_name_of_a_column_do_not_count(tmp_path):
    assert read(tmp_path / "a.csv", "input, target \na,b\n") == [(2, {"input": "a", "target": "b"})]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_spaces_before_a_quoted_cell_do_not_count(tmp_path, delimiter):
    records = [
        ['"text"', ' "label"', " n"],
        ['"I loved it, really; yes\t!"', '  "positive"', " 1"],
        ["a waste", ' ""', "0"],
        [' "a ""good"" one"', '"good"', "  2"],
        ["  a", " b", " c"],
        ["  d", " e", '  "f"'],
        ['5" or 6"', '" ""so"" so"', "d"],
    ]
    content = "".join(delimiter.join(cells) + "\n" for cells in records)
    assert read(tmp_path / "a.csv", content) == [
        (2, {"text": "I loved it, really; yes\t!", "label": "positive", "n": " 1"}),
        (3, {"text": "a waste", "n": "0"}),
        (4, {"text": 'a "good" one', "label": "good", "n": "  2"}),
        (5, {"text": "  a", "label": " b", "n": " c"}),
        (6, {"text": "  d", "label": " e", "n": "f"}),
        (7, {"text": '5" or 6"', "label": ' "so" so', "n": "d"}),
    ]
    assert column_names(tmp_path / "a.csv") == ["text", "label", "n"]


def test_spaces_stay_before_quotes_that_are_not_around_a_cell(tmp_path):
    """Such rows were refused, or took the rest of the file with them."""
    content = """n, "text"
1, "Great" is what he said
2, "unfinished
3, "" x
4, "It is ""good"" " she said
5,"three
, ""lines"", and ""more"", 6"
, "so"
"""
    assert read(tmp_path / "a.csv", content) == [
        (2, {"n": "1", "text": ' "Great" is what he said'}),
        (3, {"n": "2", "text": ' "unfinished'}),
        (4, {"n": "3", "text": ' "" x'}),
        (5, {"n": "4", "text": ' "It is ""good"" " she said'}),
        (6, {"n": "5", "text": 'three\n, "lines", and "more", 6'}),
        (8, {"text": "so"}),
    ]


def test_no_row_is_lost_after_a_quoted_cell_that_ends_in_a_comma(tmp_path):
    """Two lines were taken for a row, and the second of them for no row."""
    content = 'n,text\n1, "Hello,"\n0,size 5"\n1,good\n'
    assert read(tmp_path / "a.csv", content) == [
        (2, {"n": "1", "text": "Hello,"}),
        (3, {"n": "0", "text": 'size 5"'}),
        (4, {"n": "1", "text": "good"}),
    ]


def test_quotes_around_a_comma_are_text_if_the_header_has_so_many_columns(tmp_path):
    content = 'n,a,b\n1, "x, y"\n2, "x, y", z\n'
    assert read(tmp_path / "a.csv", content) == [
        (2, {"n": "1", "a": ' "x', "b": ' y"'}),
        (3, {"n": "2", "a": "x, y", "b": " z"}),
    ]


@pytest.mark.parametrize(("name", "keep_empty"), [("a.csv", True), ("a.tsv", False)])
def test_the_quotes_of_a_tsv_file_and_of_a_published_file_stay(tmp_path, name, keep_empty):
    delimiter = "," if name == "a.csv" else "\t"
    (tmp_path / name).write_text(f'a{delimiter}b\n1{delimiter} "x"\n')
    assert list(read_rows(tmp_path / name, keep_empty)) == [(2, {"a": "1", "b": ' "x"'})]


def test_a_tsv_file_has_tabs_whatever_its_header_looks_like(tmp_path):
    assert read(tmp_path / "a.tsv", 'a;"b;c\n"1;2\n') == [(2, {'a;"b;c': '"1;2'})]


# Names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "a.xlsx",
            r"a\.xlsx: \.xlsx is not read: save the sheet as \.csv, in UTF-8; expected \.jsonl, ",
        ),
        ("a.zip", r"\.zip is not read: unpack it; expected"),
        ("a.csv.bz2", r"\.bz2 is not read: unpack it; expected"),
        ("a.ndjson", r"\.ndjson is not read: name it \.jsonl; expected"),
        ("a.txt", r"\.txt is not read: name it \.tsv if it has a header, and tabs between its col"),
        ("a.md", r"a\.md: \.md is not read; expected \.jsonl, \.json, \.csv, \.tsv or \.parquet"),
        ("a.gz", r"\.gz is not read; expected"),
        ("a.md.gz", r"\.gz is not read; expected"),
    ],
)
def test_a_file_that_is_not_read_is_named_with_what_is_read(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path / name, "a")


def test_a_file_without_a_suffix_has_an_object_on_each_line(tmp_path):
    assert read(tmp_path / "rows", '{"a": 1}\n') == [(1, {"a": 1})]


def test_a_json_list_under_the_name_of_lines_is_explained(tmp_path):
    ((_, message),) = read(tmp_path / "a.jsonl", '[{"a": 1}]')
    assert message.endswith("; a file with a list of objects is named .json")


# Gzip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"a": "é"}\n\n{"a": "b"}\n'),
        ("a.json", '[{"a": "é"}, {"a": "b"}]'),
        ("a.json", '{"rows": [{"a": "é"}, {"a": "b"}]}'),
        ("a.json", '{"a": "é"}\n{"a": "b"}\n'),
        ("a.csv", "a\né\nb\n"),
        ("a.tsv", "a\té\n1\t2\n"),
    ],
)
def test_an_unpacked_file_gives_the_same_rows(tmp_path, name, content):
    expected = read(tmp_path / name, content)
    assert len(expected) >= 1
    assert read(tmp_path / f"{name}.gz", gzip.compress(content.encode())) == expected


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_gzip_file_that_is_damaged_anywhere_is_one_line(tmp_path, name):
    content = '[{"a": 1}]' if ".json." in name else '{"a": 1}\n'
    packed = gzip.compress(content.encode() * 1)
    for n_bytes in range(1, len(packed)):
        with pytest.raises(ValueError, match=r"\A[^\n]*\.gz: damaged or cut short: [^\n]*\Z"):
            read(tmp_path / name, packed[:n_bytes])
    for at in range(10, len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 0xFF
        with pytest.raises(ValueError, match=r"\A[^\n]*\.gz: [^\n]*\Z"):
            read(tmp_path / name, bytes(damaged))


@pytest.mark.parametrize(
    "name", ["bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz", "bomb.parquet.gz"]
)
def test_a_small_file_does_not_fill_memory_or_disk(tmp_path, monkeypatch, name):
    monkeypatch.setattr("minia3.tasks.row_files.FREE_BYTES", 1000)
    blank_lines = (b" " * 9_999 + b"\n") * 2_000
    (tmp_path / name).write_bytes(gzip.compress(blank_lines))
    tracemalloc.start()
    try:
        message = refusal(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "after unpacking, expected at most 100 times the size of the file and 16 MB" in message


def refusal(path):
    """Return the message of the last row, or the error of the file."""
    try:
        *_, (_, error) = read_rows(path)
    except ValueError as raised:
        error = raised
    return str(error)


def test_a_small_file_may_hold_the_same_row_many_times(tmp_path, monkeypatch):
    packed = gzip.compress(b'{"input": "a", "target": "b"}\n' * 50_000)
    assert len(packed) < 10_000
    assert len(read(tmp_path / "a.jsonl.gz", packed)) == 50_000
    # A larger file may hold 100 times its own size.
    monkeypatch.setattr("minia3.tasks.row_files.FREE_BYTES", 0)
    packed = gzip.compress(b'{"input": "a", "target": "b"}\n' * 50)
    assert len(read(tmp_path / "a.jsonl.gz", packed)) == 50


# Damage


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_null_byte_is_refused(tmp_path, name):
    *_, (_, message) = read(tmp_path / name, b'{"a": 1}\n{"a": "\0"}\n{"a": 2}\n')
    assert message.startswith("a null byte: ")


def test_a_row_of_json_has_each_key_once(tmp_path):
    rows = read(tmp_path / "a.jsonl", '{"label": 0, "label": 1}\n{"a": 1}\n')
    assert [number for number, _ in rows] == [1, 2]
    assert rows[0][1].startswith("not JSON: the key 'label' occurs twice: ")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    message = refusal(tmp_path / name)
    assert "a Git LFS pointer in place of the file: run `git lfs pull`" in message


@pytest.mark.parametrize("end", ["", "\n \n,,\n"], ids=["", "blank lines at the end"])
def test_a_blank_line_of_a_file_with_one_column_counts_if_another_row_follows(tmp_path, end):
    """A sheet with an empty cell is written so. The result of each later row stood a row too high.
    pandas writes "" for such a cell, also at the end.
    """
    path = tmp_path / "rows.csv"
    path.write_text(f'text\na\n\n""\n  \nb\n{end}')
    rows = [(2, {"text": "a"}), (3, {}), (4, {}), (5, {}), (6, {"text": "b"})]
    assert list(read_rows(path)) == rows
    assert dict(read_rows(path, keep_empty=True))[3] == {"text": ""}
    path.write_text(f'text\na\n""\n{end}')
    assert list(read_rows(path)) == [(2, {"text": "a"}), (3, {})]
    tabs = tmp_path / "rows.tsv"
    tabs.write_text(f"text\na\n\nb\n{end}".replace(",", "\t"))
    assert list(read_rows(tabs)) == [(2, {"text": "a"}), (3, {}), (4, {"text": "b"})]
    path.write_text('text,label\na,x\n\n""\nb,y\n')  # neither line has two cells
    assert [number for number, _ in read_rows(path)] == [2, 5]


def test_blank_lines_at_the_end_take_little_memory(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\na\n" + "\n" * 200_000)
    tracemalloc.start()
    try:
        assert list(read_rows(path)) == [(2, {"text": "a"})]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ["", ",\n , \n"], ids=["", "rows of empty cells at the end"])
def test_a_row_of_empty_cells_counts_if_another_row_follows(tmp_path, end):
    """pandas writes it for a row of missing values, and a spreadsheet writes many at the end."""
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n,\na,x\n , \n,\nb,y\n{end}")
    rows = [(2, {}), (3, {"text": "a", "label": "x"}), (4, {}), (5, {})]
    assert list(read_rows(path)) == [*rows, (6, {"text": "b", "label": "y"})]
    assert dict(read_rows(path, keep_empty=True))[4] == {"text": "", "label": ""}
    assert column_names(path) == ["text", "label"]
