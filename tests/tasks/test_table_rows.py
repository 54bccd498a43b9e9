"""Guards minia3/tasks/table_rows.py: parquet and arrow files give the values that pyarrow and the
`datasets` library give, and a damaged file is one clear line.
"""

import datetime
import decimal
import gzip
import json
import re
import sys
import tracemalloc

import pytest
from task_files import choice, lines, target

from minia3.tasks.row_files import column_names, read_label_names, read_rows
from minia3.tasks.splits import load_task
from minia3.tasks.table_rows import has_json

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
from pyarrow import parquet  # noqa: E402

ROWS = [
    {"input": "é 漢 🙂", "label": 1, "score": 0.5, "is_new": True, "choices": ["a", "b"]},
    {"input": "", "label": None, "score": -1.0, "is_new": False, "choices": []},
    {"input": "x" * 3000, "label": 2**60, "score": 1e300, "is_new": None, "choices": None},
]


def write(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_arrow(path, table):
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def without_none(row):
    return {name: value for name, value in row.items() if value is not None}


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_values_keep_their_types_and_a_null_is_left_out(tmp_path, compression):
    path = write(tmp_path / "a.parquet", ROWS, compression=compression)
    assert list(read_rows(path)) == list(enumerate(map(without_none, ROWS), start=1))
    assert [row for _, row in read_rows(path, keep_empty=True)] == ROWS


def test_an_arrow_file_gives_the_same_rows(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", pyarrow.Table.from_pylist(ROWS))
    assert [row for _, row in read_rows(path)] == list(map(without_none, ROWS))


def test_an_unpacked_file_gives_the_same_rows(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_rows(packed)) == list(read_rows(path))


@pytest.mark.parametrize("n_rows", [1, 255, 256, 257, 1000])
def test_rows_come_in_order_whatever_the_groups_of_the_file_are(tmp_path, n_rows):
    rows = [{"n": n} for n in range(n_rows)]
    path = write(tmp_path / "a.parquet", rows, row_group_size=100)
    assert list(read_rows(path)) == list(enumerate(rows, start=1))
    table = pyarrow.Table.from_pylist(rows)
    assert [row for _, row in read_rows(write_arrow(tmp_path / "a.arrow", table))] == rows


def test_a_float32_is_the_number_that_people_write(tmp_path):
    # The scores of GLUE's STS-B are float32. They were 3.799999952316284 to the model.
    numbers = [3.8, 0.1, 5.0, -1e-8, 1e20, None]
    score = pyarrow.array(numbers, pyarrow.float32())
    table = pyarrow.table({"score": score})
    parquet.write_table(table, tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", write_arrow(tmp_path / "a.arrow", table)):
        assert [row.get("score") for _, row in read_rows(path)] == numbers


def test_what_json_does_not_have_becomes_a_text(tmp_path):
    kinds = {
        "day": (pyarrow.date32(), datetime.date(2024, 2, 29), "2024-02-29"),
        "moment": (
            pyarrow.timestamp("us"),
            datetime.datetime(2024, 2, 29, 12, 30),
            "2024-02-29 12:30:00",
        ),
        "price": (pyarrow.decimal128(5, 2), decimal.Decimal("1.50"), "1.50"),
        "text": (pyarrow.binary(), "é".encode(), "é"),
        "picture": (pyarrow.binary(), b"\x89PNG", None),
        "word": (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "good", "good"),
        "pairs": (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1)], [["a", 1]]),
        "tree": (
            pyarrow.struct([("days", pyarrow.list_(pyarrow.date32())), ("raw", pyarrow.binary())]),
            {"days": [datetime.date(2024, 1, 1)], "raw": b"\xff"},
            {"days": ["2024-01-01"]},
        ),
    }
    columns = {}
    for name, (kind, value, _) in kinds.items():
        columns[name] = pyarrow.array([value, None], kind)
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (_, first), (_, second) = read_rows(tmp_path / "a.parquet")
    assert first == {name: plain for name, (_, _, plain) in kinds.items() if plain is not None}
    assert second == {}
    json.dumps(first)


@pytest.mark.parametrize("make_row", [target, choice])
def test_a_task_in_parquet_equals_the_task_in_jsonl(tmp_path, make_row):
    rows = [make_row(n) for n in range(12)]
    (tmp_path / "mine.jsonl").write_bytes(lines(*rows))
    write(tmp_path / "mine.parquet", rows)
    from_jsonl = load_task(tmp_path / "mine.jsonl")
    from_parquet = load_task(tmp_path / "mine.parquet")
    for field in ("name", "train", "validation", "test", "metric"):
        assert getattr(from_parquet, field) == getattr(from_jsonl, field)


def test_the_names_of_labels_are_those_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "more": [datasets.ClassLabel(names=["a"])],
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "more": [[0], []]}
    table = datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    parquet.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    for name in ("a.parquet", "a.arrow"):
        assert read_label_names(tmp_path / name) == {"label": ["negative", "positive"]}
        assert [row["label"] for _, row in read_rows(tmp_path / name)] == [1, 0]


def test_other_files_have_no_names_of_labels(tmp_path):
    assert read_label_names(write(tmp_path / "a.parquet", ROWS)) == {}
    assert read_label_names("anything.csv") == {}


def test_the_columns_of_a_table_are_those_of_its_schema(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    for path in (write(tmp_path / "a.parquet", ROWS), write_arrow(tmp_path / "a.arrow", table)):
        assert column_names(path) == list(ROWS[0])


def test_conversations_in_parquet_equal_those_in_jsonl(tmp_path):
    """In a .parquet file, each message, call and schema has the keys of all others."""

    def call(said, name, **arguments):
        function = {"name": name, "arguments": arguments}
        calls = [{"id": "c1", "type": "function", "function": function}]
        return {"role": "assistant", "content": said, "tool_calls": calls}

    def tool(name, **properties):
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    question = {"role": "user", "content": "Weather in Paris?"}
    answers = [
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    weather = [question, call("", "weather", city="Paris", days=[1, 2]), *answers]
    note = [question, call(None, "note", content="sunny", place={"city": "Paris"}), *answers]
    rows = [
        {"messages": weather, "tools": [tool("weather", city={"type": "string"})]},
        {"messages": note, "tools": [tool("note", content={"type": "string", "enum": ["a"]})]},
        {"messages": [question, answers[1]]},
    ] * 2
    (tmp_path / "mine.jsonl").write_bytes(lines(*rows))
    write(tmp_path / "mine.parquet", rows)
    from_jsonl = load_task(tmp_path / "mine.jsonl")
    from_parquet = load_task(tmp_path / "mine.parquet")
    for field in ("train", "validation", "test"):
        assert getattr(from_parquet, field) == getattr(from_jsonl, field)


# How a file says it, which a pyarrow that has no type for JSON leaves in the metadata of a text.
NAMED_JSON = {"ARROW:extension:name": "arrow.json"}
has_type_for_json = pytest.mark.skipif(
    not hasattr(pyarrow, "json_"), reason="this pyarrow has no type for JSON"
)


@has_type_for_json
def test_json_in_lists_and_structures_is_read_and_keeps_its_nulls(tmp_path):
    """A null of the table may be a gap. Those of JSON were written."""
    text = pyarrow.string()
    json_text = pyarrow.field("arguments", text, metadata=NAMED_JSON)
    call = pyarrow.struct([("name", text), ("id", text), json_text])
    calls = [
        [{"name": "a", "id": None, "arguments": '{"x": [1.5, "1"], "y": null}'}],
        [{"name": "b", "id": "c1", "arguments": '"x"'}, {"name": "c", "id": None}],
        None,
    ]
    columns = {
        "calls": pyarrow.array(calls, pyarrow.list_(call)),
        "pair": pyarrow.array([["1", '"1"'], ["null", None], []], pyarrow.list_(json_text)),
        "plain": pyarrow.array(['{"x": 1}', "null", None]),
        "score": pyarrow.array(["1", "null", None], pyarrow.json_()),
    }
    arrow_path = write_arrow(tmp_path / "a.arrow", pyarrow.table(columns))
    table = pyarrow.ipc.open_stream(arrow_path).read_all()
    assert str(table.schema.types).count("arrow.json") == 3
    parquet.write_table(table, tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", arrow_path):
        assert [row for _, row in read_rows(path)] == [
            {
                "calls": [{"name": "a", "arguments": {"x": [1.5, "1"], "y": None}}],
                "pair": [1, "1"],
                "plain": '{"x": 1}',
                "score": 1,
            },
            {
                "calls": [{"name": "b", "id": "c1", "arguments": "x"}, {"name": "c"}],
                "pair": [None, None],
                "plain": "null",
            },
            {"pair": []},
        ]


@has_type_for_json
def test_a_text_that_is_no_json_is_an_error_of_its_row(tmp_path):
    column = pyarrow.array(['"a"', "a", '"c"'], pyarrow.json_())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (_, first), (number, error), (_, third) = read_rows(tmp_path / "a.parquet")
    assert (first, number, third) == ({"text": "a"}, 2, {"text": "c"})
    assert re.fullmatch("not JSON: .*: 'a'", str(error))


def test_json_is_recognized_by_a_pyarrow_that_has_no_type_for_it():
    text = pyarrow.string()
    json_text = pyarrow.field("a", text, metadata=NAMED_JSON)
    assert has_json(json_text)
    assert has_json(pyarrow.field("a", pyarrow.list_(json_text)))
    assert not has_json(pyarrow.field("a", pyarrow.list_(text), metadata={"b": "c"}))


def test_nulls_in_structures_stay_if_empty_cells_do(tmp_path):
    rows = [{"pair": {"a": "x", "b": None}}, {"pair": {"a": None, "b": "y"}}]
    path = write(tmp_path / "a.parquet", rows)
    assert [row for _, row in read_rows(path, keep_empty=True)] == rows
    assert [row for _, row in read_rows(path)] == [{"pair": {"a": "x"}}, {"pair": {"b": "y"}}]


def test_without_pyarrow_the_message_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: .*pyarrow.*pip install 'minia3\[data\]'\Z"):
        next(read_rows(path))


def test_two_columns_of_one_name_are_an_error(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"expected no name twice; found \['text', 'text'\]"):
        next(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "content", [b"PAR1", b"PAR1" * 9, b"x" * 100, b"ARROW", b"\xff\xff\xff\xff\0\0\0\x10"]
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".parquet.gz"])
def test_what_is_no_table_is_one_line(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"\A{path}: damaged or cut short: [^\n]*\Z"):
        list(read_rows(path))


def test_a_file_of_feather_is_named_and_not_called_damaged(tmp_path):
    path = tmp_path / "a.arrow"
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=rf"\A{path}: a file in Arrow's other format, .*parquet\Z"):
        list(read_rows(path))


def test_an_empty_file_and_a_git_lfs_pointer_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.touch()
    with pytest.raises(ValueError, match=r"a\.parquet: the file is empty"):
        next(read_rows(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"a Git LFS pointer .* `git lfs pull`"):
        next(read_rows(path))


def test_a_file_that_is_cut_short_is_one_line_wherever_it_is_cut(tmp_path):
    content = write(tmp_path / "a.parquet", ROWS).read_bytes()
    for n_bytes in range(1, len(content), 97):
        (tmp_path / "cut.parquet").write_bytes(content[:n_bytes])
        with pytest.raises(ValueError, match=r"\A[^\n]*damaged or cut short[^\n]*\Z"):
            list(read_rows(tmp_path / "cut.parquet"))


def test_damage_inside_of_a_text_is_found_by_the_checksums_of_the_pages(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 1000, b"y" * 1000, 1))
    with pytest.raises(ValueError, match="damaged or cut short"):
        list(read_rows(path))


def test_more_rows_than_the_bytes_can_hold_are_not_read(tmp_path):
    table = pyarrow.table({"label": pyarrow.array([0]).take(pyarrow.array([0] * 3_000_000))})
    path = tmp_path / "bomb.parquet"
    parquet.write_table(table, path, row_group_size=3_000_000)
    n_bytes = path.stat().st_size
    assert n_bytes < 30_000
    with pytest.raises(ValueError, match=f"3000000 rows in {n_bytes} bytes"):
        next(read_rows(path))


def test_reading_takes_the_memory_of_some_rows(tmp_path):
    rows = [{"input": f"{n} " + "a" * 1000} for n in range(20_000)]
    path = write(tmp_path / "big.parquet", rows)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
