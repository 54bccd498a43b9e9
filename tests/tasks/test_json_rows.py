"""A .json file gives the values that `json.load` gives, piece by piece, or one clear line."""

import io
import json
import re
import sys
import tracemalloc

import pytest

from minia3.tasks.json_rows import is_json_lines, parse_json, read_json_rows
from minia3.tasks.row_files import read_rows

ROWS = [
    {"input": "a", "target": "b"},
    {},
    {"input": 'é 漢 🙂 "\\', "n": [1, -2.5e3, None, True, {"a": {}}], "x": ""},
    {"input": "]}, {[", "target": "x" * 300},
]


def read(text):
    """Return the rows of a file, with an error as its message."""
    content = text if isinstance(text, bytes) else text.encode()
    found = []
    for number, row in read_json_rows(io.BytesIO(content)):
        is_error = isinstance(row, ValueError)
        found.append((number, str(row) if is_error else row))
    return found


def numbered(rows):
    return list(enumerate(rows, start=1))


FORMS = [
    json.dumps(ROWS),
    json.dumps(ROWS, ensure_ascii=False),
    "\ufeff\r\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n\n",
    json.dumps({"data": ROWS}),
    json.dumps({"size": 12345, "n": [1, 2], "empty": [], "data": ROWS, "more": {"a": [{}]}}),
    json.dumps({"data": ROWS, "names": ["a"]}, indent=1),
    json.dumps({"version": 1.1, "x": [0.5, 1e-7, -2.5e30, 3], "data": ROWS, "y": 2.25}),
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize("text", FORMS)
def test_a_list_of_objects_is_read_wherever_the_pieces_of_the_file_end(monkeypatch, text, chunk):
    monkeypatch.setattr("minia3.tasks.json_rows.CHUNK", chunk)
    assert read(text) == numbered(ROWS)


@pytest.mark.parametrize("text", ["[]", "[\n]", '{"data": [{"a": 1}]}', '[{"a": 1}]'])
def test_a_short_list_is_read(text):
    expected = [{"a": 1}] if "a" in text else []
    assert read(text) == numbered(expected)


def test_a_table_may_have_the_columns_of_a_message_beside_others():
    row = {"role": "user", "content": "a", "label": 1}
    assert read(json.dumps({"rows": [row]})) == [(1, row)]


def test_a_value_that_is_not_an_object_is_an_error_that_does_not_stop_the_reading():
    found = read('[{"a": 1}, 12, ["b"], {"a": 2}]')
    assert found == [
        (1, {"a": 1}),
        (2, "expected a JSON object, found '12'"),
        (3, "expected a JSON object, found '[\"b\"]'"),
        (4, {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("text", "number", "words"),
    [
        ('[{"a": 1}', 2, "not JSON: expected ',', found the end of the file"),
        ('[{"a": 1},', 2, "not JSON: the file ends before the list does"),
        ('[{"a": 1}, {"a', 2, "not JSON: Unterminated string"),
        ('[{"a": 1} {"a": 2}]', 2, "not JSON: expected ',', found '{\"a\": 2}]'"),
        ('[{"a": 1}, ]', 2, "not JSON: Expecting value"),
        ('[{"a": 1}] x', 2, "not JSON: expected the end of the file, found 'x'"),
        ('[{"a": 1}, {"b": 1, "b": 2}]', 2, "not JSON: the key 'b' occurs twice"),
        ('[{"a": 1}, {"b": {"c": 1, "c": 1}}]', 2, "not JSON: the key 'c' occurs twice"),
        ('[{"a": 1}, {"b": "\\ud83d"}]', 2, "a surrogate without its pair is not a character"),
        ('[{"a": 1}, ' + "[" * 100_000, 2, "not JSON: "),
        (
            '{"x": [{"a": 1}], "y": [{"a": 2}]}',
            2,
            "two lists of objects, 'x' and 'y'.*a file for each split",
        ),
        ('{"x": [{"a": 1}]', 2, "not JSON: expected ',', found the end of the file"),
        (b'[{"a": 1}, {"b": "\xe9"}]', 0, "not UTF-8: byte 0xe9 after '"),
        ("12", 0, "expected a list of objects, found '12'"),
        ("", 0, "expected a list of objects, found the end of the file"),
        (" \n", 0, "expected a list of objects, found the end of the file"),
        ("{}", 0, "expected a list of objects, or an object with such a list; found .* nothing"),
        ('{"a": ["b"], "c": {"0": 1}}', 0, "found an object with 'a', 'c' .*orient='records'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": ""}]}',
            0,
            "'messages' is a conversation, not a list of rows: write .* before the object",
        ),
        (
            '{"id": 1, "conversations": [{"from": "human", "value": "a"}]}',
            0,
            "'conversations' is a",
        ),
        ('{"a" 1}', 0, "not JSON: expected ':', found '1}'"),
        ('{1: [{"a": 2}]}', 0, "not JSON: expected a text, found 1"),
    ],
)
def test_what_is_not_a_list_of_objects_is_said_in_one_line(text, number, words):
    if number == 0:
        with pytest.raises(ValueError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
            read(text)
        return
    *_, (last_number, message) = read(text)
    assert last_number == number
    assert re.match(words, message)
    assert "\n" not in message
    assert len(message) < 200


def test_a_row_that_is_too_long_is_the_last(monkeypatch):
    monkeypatch.setattr("minia3.tasks.json_rows.MAX_ROW_BYTES", 50)
    monkeypatch.setattr("minia3.tasks.json_rows.CHUNK", 10)
    assert read(json.dumps([{"a": 1}, {"a": "x" * 200}, {"a": 2}])) == [
        (1, {"a": 1}),
        (2, "a row of more than 50 bytes"),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"b": 1, "b": 2}', "the key 'b' occurs twice"),
        ('{"b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ('{"b": no}', "Expecting value"),
        ('{"b" 1}', "Expecting ':' delimiter"),
        ('{"b": 1 "c": 2}', "Expecting ',' delimiter"),
        ('{"b": "\\x"}', "Invalid"),
        ("[" * 100_000, ""),  # each Python has words of its own
    ],
)
def test_a_mistake_is_named_however_much_of_the_file_comes_after_it(monkeypatch, row, words):
    monkeypatch.setattr("minia3.tasks.json_rows.MAX_ROW_BYTES", 1 << 18)
    content = ('[{"a": 1}, ' + row + ', {"a": 2}' * 200_000 + "]").encode()
    file = io.BytesIO(content)
    (_, first), (number, error) = read_json_rows(file)
    assert (first, number) == ({"a": 1}, 2)
    assert str(error).startswith(f"not JSON: {words}")
    assert file.tell() <= 1 << 18


def test_a_key_is_in_memory_once_for_all_rows():
    (first,), (second,) = (parse_json('{"a key that is not known": 1}') for _ in range(2))
    assert first is second


def test_half_a_surrogate_pair_is_refused_in_either_case():
    for text in ('"\\ud83d"', '"\\uD83D"', '{"\\udc00": 1}'):
        with pytest.raises(ValueError, match="surrogate without its pair"):
            parse_json(text)
    assert parse_json('"\\ud83d\\ude00 \\\\ud83d"') == "😀 \\ud83d"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\n{"a": 2}\n', True),
        (b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}', True),
        (b'{"a": 1}\n', True),
        (b'{"a": ["b"], "c": {"d": 1}}', True),
        (b'\n{"a": 1}\r\n \t\r\n\n{"a": 2}', True),
        (b'\n\n{"a": 1}\n\n', True),
        (b'{"a": [], "b": 1}\n', False),
        (b'{"a": ["b"], "c": [1]}', False),
        (b'{"a": {"0": "b", "1": "c"}, "d": {"0": 1, "1": 0}}', False),  # pandas' to_json
        (b'{"0": {"a": "b", "d": 1}, "1": {"a": "c", "d": 0}}', False),  # with orient="index"
        (b'{"translation": {"de": "ein", "en": "one"}}', True),
        (b"{}", False),
        (b'{"a": [{"b": 1}, 12], "c": 1}\n', False),
        (b"{}\n1", False),
        (b'{"a": [{"b": 1}]}', False),
        (b'[\n{"a": 1},\n{"a": 2}]', False),
        (b'{\n"a": 1}', False),
        (b'{"a":\n{"b": 1}}', False),
        (b"\xff\n{", False),
        (b"[" * 100_000 + b"\n{", False),
        (b"", False),
    ],
)
def test_a_json_file_may_have_an_object_on_each_line(content, expected):
    assert is_json_lines(io.BytesIO(content)) is expected


def test_rows_with_messages_on_each_line_are_rows_and_not_lists_of_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "chat.json").write_text((json.dumps(row) + "\n") * 2)
    assert list(read_rows(tmp_path / "chat.json")) == numbered([row, row])


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\n\n{"a": 1}\n', '\ufeff\n{"a": 1}\n'])
def test_lines_in_a_json_file_are_read_as_in_a_jsonl_file(tmp_path, text):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(read_rows(tmp_path / "a.json"))
    assert found == list(read_rows(tmp_path / "a.jsonl"))
    assert found[0][1] == {"a": 1}


def test_reading_takes_the_memory_of_a_few_rows(tmp_path):
    text = json.dumps({"input": "a" * 1000})
    (tmp_path / "big.json").write_text('{"data": [' + ",\n".join([text] * 20_000) + "]}")
    tracemalloc.start()
    try:
        assert sum(len(row["input"]) for _, row in read_rows(tmp_path / "big.json")) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_on_digits_is_an_error_like_any_other():
    if not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python has no limit")
    assert read('[{"a": 1}, {"a": ' + "9" * 5000 + "}]")[1][1].startswith("not JSON: Exceeds")


def test_objects_of_several_lines_each_are_answered_with_what_makes_lines_of_them(tmp_path):
    """The message was about how pandas writes lists."""
    path = tmp_path / "rows.json"
    rows = [{"text": "a", "spans": []}, {"text": "b", "spans": [1]}]
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    with pytest.raises(ValueError, match=r"several objects, each in several lines: .*`jq -c"):
        list(read_rows(path))
    path.write_text(json.dumps({"a": 1, "b": {}}, indent=2) + "\n")
    with pytest.raises(ValueError, match=r"found an object with 'a', 'b' \(pandas"):
        list(read_rows(path))
