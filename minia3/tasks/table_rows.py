"""Read the rows of .parquet files, and of the .arrow files that the `datasets` library writes.

pyarrow reads them (the extra [data]). It is imported when a file is read, because it takes a while.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from minia3.tasks.json_rows import parse_json

N_ROWS = 256  # that are turned into dicts at a time
# A parquet file writes a value that is repeated only once, so a few bytes may hold many rows. But a
# file with more rows than this is damaged, or made to fill the memory.
MOST_ROWS_PER_BYTE = 100
FEATHER = b"ARROW1"  # how a file in the format of Feather begins
JSON = "arrow.json"  # the name of Arrow's type for texts of JSON
# Releases of pyarrow before 19 do not know the type, and leave its name here.
EXTENSION_NAME = b"ARROW:extension:name"


def read_table_rows(
    file: BinaryIO, suffix: str, keep_empty: bool = False
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number of the row, dict or ValueError) for each row of a .parquet or .arrow file.

    Texts, numbers, booleans, lists and structures keep their types. Dates, times and decimals
    become texts, and so do bytes that are UTF-8. Other bytes (a picture) are left out. A column of
    float32 has the numbers as people write them: 3.8, and not 3.799999952316284. If Arrow's
    type says that a text is JSON, the row has the value that it spells; if it spells none, an error
    takes the place of the row.

    keep_empty: a null stays as None. By default it is left out, as an empty cell of a .csv file is,
        and so is a null inside of a structure.

    Raise ValueError if two columns have one name. If a file is damaged, pyarrow raises errors of
    many kinds.
    """
    number = 0
    for batch in read_batches(file, suffix):
        json_fields = {field.name: field for field in batch.schema if has_json(field)}
        for values in with_short_floats(batch).to_pylist():
            number += 1
            try:
                yield number, plain_row(values, json_fields, keep_empty)
            except ValueError as error:
                yield number, error


def plain_row(values: dict, json_fields: Mapping[str, Any], keep_empty: bool) -> dict:
    """Return the row of a table as JSON has it. json_fields: the columns that hold JSON."""
    row = {}
    for name, value in values.items():
        value = to_plain(value, keep_empty, json_fields.get(name))
        if keep_empty or value is not None:
            row[name] = value
    return row


def with_short_floats(batch):
    """Return a record batch in which each number of a float32 column is the one with the fewest
    digits that rounds to it. (In Python, the float32 of 3.8 is 3.799999952316284.)
    """
    from pyarrow import float32, float64, string

    for place, column in enumerate(batch.schema):
        if column.type == float32():
            numbers = batch.column(place).cast(string()).cast(float64())
            batch = batch.set_column(place, column.name, numbers)
    return batch


def has_json(field) -> bool:
    """Return whether a pyarrow.Field is JSON, or a list or structure with JSON in it.

    So the `datasets` library stores values of several types, and objects with different keys.
    """
    return is_json(field) or any(map(has_json, parts_of(field).values()))


def is_json(field) -> bool:
    named = (field.metadata or {}).get(EXTENSION_NAME, b"").decode()
    return getattr(field.type, "extension_name", named) == JSON


def parts_of(field) -> dict[str, Any]:
    """Return the fields of a structure by their names, and the field of a list's entries."""
    from pyarrow.types import is_map

    if is_map(field.type):
        return {}
    parts = [field.type.field(index) for index in range(field.type.num_fields)]
    return {part.name: part for part in parts}


def to_plain(value: Any, keep_empty: bool, field=None) -> Any:
    """Return a value of pyarrow as JSON has it, or None for bytes that are not text.

    field: the pyarrow.Field of the value if there is JSON in it. Raise ValueError if that is not
        JSON.
    """
    if value is not None and field is not None and is_json(field):
        return parse_json(value)  # with its nulls, as in a file of JSON
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    parts = {} if field is None else parts_of(field)
    if isinstance(value, dict):
        return plain_struct(value, keep_empty, parts)
    if isinstance(value, list | tuple):
        entry_field = next(iter(parts.values()), None)
        return [to_plain(entry, keep_empty, entry_field) for entry in value]
    return str(value)


def plain_struct(struct: dict, keep_empty: bool, parts: Mapping[str, Any]) -> dict:
    """Return a structure as a JSON object. Without `keep_empty`, its nulls are left out.

    In a table, all structures of a column have the same keys: the arguments of one function would
    have those of all others, too. Only a message keeps a content that is null, because templates
    ask whether it is. parts: see `parts_of`.
    """
    plain = {}
    for name, entry in struct.items():
        entry = to_plain(entry, keep_empty, parts.get(name))
        is_content = name == "content" and "role" in struct
        if keep_empty or is_content or entry is not None:
            plain[name] = entry
    return plain


def label_names(file: BinaryIO, suffix: str) -> dict[str, list[str]]:
    """Return the names of the labels of each column that the `datasets` library made of labels.

    The names stand in the metadata of the file. The column holds their indices.
    """
    _, schema = open_table(file, suffix)
    metadata = schema.metadata or {}
    description = json.loads(metadata.get(b"huggingface", "{}"))
    features = description.get("info", {}).get("features") or {}
    names = {}
    for column, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names[column] = list(feature["names"])
    return names


def read_batches(file: BinaryIO, suffix: str) -> Iterator:
    """Yield the rows of a file as record batches of at most N_ROWS rows."""
    table, schema = open_table(file, suffix)
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"expected no name twice; found {schema.names!r:.80}")
    if suffix == ".parquet":
        yield from table.iter_batches(N_ROWS, use_threads=False)
        return
    for batch in table:
        for start in range(0, batch.num_rows, N_ROWS):
            yield batch.slice(start, N_ROWS)


def is_feather(file: BinaryIO) -> bool:
    """Return whether a file has the format of Feather, and not the one that `datasets` writes.

    Polars and pandas write it, under the name .arrow, too. The file is read from its beginning
    again afterwards.
    """
    beginning = file.read(len(FEATHER))
    file.seek(0)
    return beginning == FEATHER


def open_table(file: BinaryIO, suffix: str) -> tuple:
    """Return pyarrow's reader of a file, and its schema. The file must be seekable."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    n_bytes = file.seek(0, 2)
    file.seek(0)
    if suffix == ".arrow":
        if is_feather(file):
            raise ValueError(
                "a file in Arrow's other format, which is Feather's; expected the one that the "
                "`datasets` library writes: save the table as .parquet"
            )
        reader = pyarrow.ipc.open_stream(file)
        return reader, reader.schema
    # If the writer stored checksums of its pages, damage in a text is found, too. Without
    # `pre_buffer`, less of the file is in memory at a time.
    table = ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    n_rows = table.metadata.num_rows
    if n_rows > MOST_ROWS_PER_BYTE * n_bytes:
        raise ValueError(f"{n_rows} rows in {n_bytes} bytes: damaged")
    return table, table.schema_arrow
