"""To be written."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from minia3.tasks.prompts import render

FORMS = {".csv": {"strict": True}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
N_SHOWN = 5  # bad rows that are written out; the others are counted
MOST = 1 << 24  # bytes of a row


def read_rows(
    path: str | Path, column: str | None = "input"
) -> Iterator[tuple[int, dict | ValueError]]:
    """Each row of a .jsonl, .csv or .tsv file: the number of its first line, and a dict or what is wrong with it.

    Streamed; a row of more than 16 MB, or that is not UTF-8, is the last to be read. A byte order mark, CRLF and blank
    lines are passed over. csv: commas, and a header; one that has `column`, and then an empty cell is as good as none,
    and `choices` is a JSON list, or texts with | between. tsv: tabs, no quotes. Raises ValueError where the file cannot
    be opened, or its header is wrong.
    """
    n_lines = n_bytes = 0

    def lines(file):
        nonlocal n_lines, n_bytes
        while line := file.readline(
            MOST + 1
        ):  # ended by \n alone: JSON's texts may hold Unicode's separators
            n_lines, n_bytes = n_lines + 1, n_bytes + len(line)
            if n_bytes > MOST:
                raise ValueError(f"a row of more than {MOST} bytes")
            yield line.decode("utf-8-sig" if n_lines == 1 else "utf-8")

    try:
        with Path(path).open("rb") as file:
            records, header = lines(file), None
            if form := FORMS.get(Path(path).suffix):
                records = csv.reader(records, **form)
                header = next(filter(None, records), [])
                if column not in (None, *header) or len(set(header)) < len(header) or not header:
                    raise ValueError(
                        f"expected a header with {column or 'names'!r}, none twice; found {header!r:.80}"
                    )
            while True:
                number, n_bytes = n_lines + 1, 0
                try:
                    if (record := next(records, None)) is None:  # also after an error of `lines`
                        return
                    if any(map(str.strip, record)):
                        yield (
                            number,
                            row_from_csv(header, record, column)
                            if header
                            else parse_json(dict, record),
                        )
                except (ValueError, csv.Error) as error:
                    yield number, ValueError(str(error))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', error)}") from None


def parse_json(kind, text):
    try:
        value = json.loads(text)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # fails for half a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}: {text[:40]!r}") from None
    if not isinstance(value, kind):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value


def row_from_csv(header, cells, column):
    if cells == header or len(cells) != len(header):
        raise ValueError(
            f"expected {len(header)} cells, other than the header's; found {len(cells)}: {cells!r:.80}"
        )
    row = {name: cell for name, cell in zip(header, cells, strict=True) if cell or column is None}
    if choices := row.get("choices"):
        row["choices"] = (
            parse_json(list, choices)
            if choices[0] == "["
            else [text.strip() for text in choices.split("|")]
        )
    return row


def read_splits(files, spec):
    """Rows by split. Whatever is wrong with any row of any file is in one ValueError."""
    rows, bad = {split: [] for split in files}, []
    for split, path in files.items():
        number = 0
        for number, row in read_rows(path, None if spec.labels else "input"):
            try:
                rows[split].append(check_row(row, spec, split, len(rows[split])))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
        bad += [] if number else [f"{path}: no rows"]
    targets = ["target" in row for part in rows.values() for row in part]
    if not spec.labels and 0 < sum(targets) < len(targets):
        where = ", ".join(map(str, files.values()))
        bad.append(
            f"{where}: {sum(targets)} rows have 'target', the others 'choices': a task has rows of one kind"
        )
    if bad:
        raise ValueError(
            "; ".join(bad[:N_SHOWN] + [f"and {len(bad) - N_SHOWN} more"] * (len(bad) > N_SHOWN))
        )
    return rows


def check_row(row, spec, split, number):
    """`row` with an integer `label` and `idx`. Raises ValueError for what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    row = {spec.fields.get(name, name): value for name, value in row.items()}
    if spec.spans:
        fix_spans(row, spec.spans)
    labels, value = spec.labels, row.get(spec.label)
    if (
        not labels
    ):  # a user's row: it has choices of its own, or a target, which is the only choice, and right
        if ("target" in row) == ("choices" in row):
            raise ValueError(
                f"expected either 'target', or 'choices' and 'label'; found {list(row)!r:.100}"
            )
        kind, choices = (
            ("choices", row["choices"]) if "choices" in row else ("target", [row["target"]])
        )
        for key, texts in (("input", [row.get("input")]), (kind, choices)):
            good = (
                isinstance(texts, list)
                and texts
                and all(isinstance(text, str) and text.strip() for text in texts)
            )
            if not good or len(set(texts)) < len(texts):
                expected = (
                    "a list of texts, none twice and none"
                    if key == "choices"
                    else "a text that is not"
                )
                raise ValueError(f"{key!r} is {row.get(key)!r:.80}, expected {expected} empty")
        labels, value = [str(i) for i in range(len(choices))], value if kind == "choices" else 0
    lower, label = (
        [label.lower() for label in labels],
        str(value).lower(),
    )  # files have 1, true, "true" and "True"
    if label not in lower and type(value) is int and 0 <= value < len(labels):
        label = lower[value]  # in T-Few's published splits it is an index
    if label not in lower and not (split == "test" and label in ("none", "-1", "")):
        raise ValueError(
            f"{spec.label!r} is {value!r:.40}, expected one of {', '.join(labels):.80}"
        )
    row["label"] = lower.index(label) if label in lower else -1
    row["idx"] = row["idx"] if type(row.get("idx")) is int else number
    render(spec.prompts[0], row)  # names the field that is missing in a known task's row
    return row


def fix_spans(row, field):
    """WSC's spans become fields, as in its "fixed" variant: one that is not in the text is spelled as at its index."""
    try:
        row |= row.pop(field, {})
        for n in (1, 2):
            text, index, span = (
                row["text"],
                row[f"span{n}_index"],
                row[f"span{n}_text"].rstrip(".").replace("\n", " "),
            )
            there = " ".join(text.split()[index:])[: len(span)]
            if row[f"span{n}_text"] not in text and there.lower() == span.lower():
                row[f"span{n}_text"] = there
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"'text' and {field!r} are not as expected: {error}") from None
