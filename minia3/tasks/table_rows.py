"""Read the rows of .parquet files, and of the .arrow files that the `datasets` library writes.

pyarrow reads them (the extra [data]). It is imported when a file is read, because it takes a while.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

N_ROWS = 256  # that are turned into dicts at a time
# A parquet file writes a value that is repeated only once, so a few bytes may hold many rows. But a
# file with more rows than this is damaged, or made to fill the memory.
MOST_ROWS_PER_BYTE = 100
FEATHER = b"ARROW1"  # how a file in the format of Feather begins


def read_table_rows(
    file: BinaryIO, suffix: str, keep_empty: bool = False
) -> Iterator[tuple[int, dict]]:
    """Yield (number of the row, dict) for each row of a .parquet or .arrow file.

    Texts, numbers, booleans, lists and structures keep their types. Dates, times and decimals
    become texts, and so do bytes that are UTF-8. Other bytes (a picture) are left out. A column of
    float32 has the numbers as people write them: 3.8, and not 3.799999952316284.

    keep_empty: a null stays as None. By default it is left out, as an empty cell of a .csv file is,
        and so is a null inside of a structure.

    Raise ValueError if two columns have one name. If a file is damaged, pyarrow raises errors of
    many kinds.
    """
    number = 0
    for batch in read_batches(file, suffix):
        for values in with_short_floats(batch).to_pylist():
            row = {}
            for name, value in values.items():
                value = to_plain(value, keep_empty)
                if keep_empty or value is not None:
                    row[name] = value
            number += 1
            yield number, row


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


def to_plain(value: Any, keep_empty: bool) -> Any:
    """Return a value of pyarrow as JSON has it, or None for bytes that are not text."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, dict):
        return plain_struct(value, keep_empty)
    if isinstance(value, list | tuple):
        return [to_plain(entry, keep_empty) for entry in value]
    return str(value)


def plain_struct(struct: dict, keep_empty: bool) -> dict:
    """Return a structure as a JSON object. Without `keep_empty`, its nulls are left out.

    In a table, all structures of a column have the same keys: the arguments of one function would
    have those of all others, too. Only a message keeps a content that is null, because templates
    ask whether it is.
    """
    plain = {}
    for name, entry in struct.items():
        entry = to_plain(entry, keep_empty)
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
