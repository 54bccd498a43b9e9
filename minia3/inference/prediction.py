"""Prediction: the answers to the rows of a file, in their order, written to a file.

    read_inputs -> predict -> write_results

Rows are read, answered and written in chunks, so that memory does not grow with the file. If the
process is stopped, the same command counts the finished lines and continues after them.
"""

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from minia3.files.ahead import read_ahead
from minia3.files.lock import lock_folder
from minia3.files.processes import dividing, from_first
from minia3.files.read import reading
from minia3.inference.decoding import Options, generate
from minia3.inference.scoring import (
    check_example,
    naming_rows,
    score_examples,
    warn_of_equal_choices,
)
from minia3.inference.turns import ending_answers
from minia3.tasks.column_flags import ColumnFlags
from minia3.tasks.examples import Example, encode_question, encode_rows
from minia3.tasks.limits import fit_targets
from minia3.tasks.prompts import Prompt, Rendered
from minia3.tasks.row_files import column_names, read_rows
from minia3.tasks.rows import (
    PREDICTED,
    check_columns,
    columns_of_rows,
    describe_empty,
    empty_columns,
    expected_names,
    normalize_row,
    without_target,
)
from minia3.tasks.task import TaskSpec
from minia3.tasks.understanding import guess_task

CHUNK = 256  # rows that are read, sorted by length and answered at a time
# The columns of a .csv file of results, unless --columns is given
RANKED = ("idx", "label", "choice", "scores")
GENERATED = ("idx", "output")
MIXED = (*RANKED, "output")  # if rows are answered in both ways, or it is not known how


class Form(NamedTuple):
    """How rows are put into words."""

    spec: TaskSpec
    prompt: Prompt


class Forms(NamedTuple):
    """The form of each adapter that was trained on a task, and of all other rows."""

    default: Form | None  # None: it is guessed from the columns of each row
    by_adapter: dict[str, Form]
    flags: ColumnFlags = ColumnFlags()  # for forms that are guessed

    @property
    def chat_template(self) -> str | None:
        """The template of conversations, if it is not the model's own.

        Raise ValueError if the adapters were trained with different ones.
        """
        forms = list(self.by_adapter.values())
        if self.default is not None:
            forms.append(self.default)
        templates = {form.spec.chat_template for form in forms if form.spec.messages}
        if len(templates) > 1:
            raise ValueError(
                f"the adapters were trained with {len(templates)} different chat templates: "
                "predict with one adapter after the other"
            )
        return next(iter(templates), None)

    @property
    def csv_columns(self) -> tuple[str, ...]:
        """The columns of a .csv file of results: those that no row leaves empty, if it is known."""
        if self.flags.labels:
            return RANKED
        if self.by_adapter or self.default is None:
            return MIXED
        spec, prompt = self.default
        if prompt.choices:
            return RANKED
        return GENERATED if prompt.target or spec.messages else MIXED

    def find(self, adapter: str | None, row: dict, columns: Sequence[str] = ()) -> Form:
        """Return the form of a row that has this adapter. columns: see `guess_task`."""
        form = self.by_adapter.get(adapter, self.default)
        if form is None:
            spec = guess_task(row, self.flags, columns)
            form = Form(spec, spec.prompts[0])
        return form


class Input(NamedTuple):
    """A row to be answered."""

    row: dict
    rendered: Rendered  # without choices: the row is to be continued
    example: Example
    labels: Sequence[str]  # the choices as the task's files spell them, if it has such labels
    adapter: str | None  # the name of the adapter that answers it; None: the base
    file_row: dict  # the row as the file has it: names may be spelled otherwise in `row`


class Limits(NamedTuple):
    """How many tokens a row may have."""

    source: int = 512  # a longer input loses its middle
    target: int | None = None  # a row with a longer choice is an error


DEFAULT_LIMITS = Limits()


def read_inputs(path, tokenizer, forms, adapters, default=None, limits=DEFAULT_LIMITS):
    """Yield an Input for each row of a file (see `read_rows`), in the form of the row's adapter.

    forms: Forms. adapters: an Adapters. default: the adapter of rows that name none; if it is None,
    and there are adapters, the column `adapter` holds their names. Answers in the file are not
    read. Warn after the last row of columns that are empty in some. Raise ValueError, "path:line:
    reason", at the first wrong row, and before the first row if no row of the file has the column
    `adapter`, which must name the adapters.
    """
    # In a published task, an empty text is a text.
    keep_empty = forms.default is not None and forms.default.spec.is_published
    has_names = default is None and bool(adapters)
    columns = []  # each row has its own
    is_file = Path(path).is_file()  # a pipe can be read only once
    if is_file:
        columns = column_names(path)
        if has_names and lacks_adapters(path, columns):  # the base would answer all rows
            raise ValueError(
                f"{path}: there is no column 'adapter', and --adapter is a folder of adapters: "
                f"give one of them ({', '.join(adapters):.200}), or name one in each row"
            )

    @cache
    def columns_for(name):
        """Return the columns of the file, or those that any of its rows with this adapter has."""
        if columns or not is_file:
            return columns
        return columns_of_json(path, name, has_names)

    n_empty = Counter()
    for n, (line_number, file_row) in enumerate(read_rows(path, keep_empty)):
        with reading(f"{path}:{line_number}"):
            if isinstance(file_row, ValueError):
                raise file_row
            name = default
            if has_names or not reads_adapter(file_row, forms, default):
                name = adapter_name(file_row, keep_empty, adapters, default)
            spec, prompt = forms.find(name, file_row, columns)
            row = normalize_row(file_row, spec, PREDICTED, n, columns)
            check_row_columns(file_row, spec, partial(columns_for, name))
            rendered, example = encode_input(row, spec, prompt, tokenizer, limits)
            check_tokens(rendered, example)
            check_example(example, adapters.model, tokenizer)
            warn_of_equal_choices(example, rendered.choices)
            if not spec.is_published:
                n_empty.update(empty_columns(row, prompt))
        yield Input(row, rendered, example, spec.labels, name, file_row)
    for note in describe_empty(n_empty):
        warnings.warn(note, stacklevel=1)


def lacks_adapters(path, columns):
    """Return whether a file has rows, and none of them has the column `adapter`.

    columns: see `column_names`. A file of JSON is read up to the first row that has it, or that is
    wrong and will end the command anyway.
    """
    if columns:
        return "adapter" not in columns
    has_rows = False
    for _, row in read_rows(path):
        if isinstance(row, ValueError) or "adapter" in row:
            return False
        has_rows = True
    return has_rows


def columns_of_json(path, name, has_names):
    """Return the columns that any row of a file of JSON has.

    has_names: whether rows name their adapters. Then only rows of the adapter `name` count, because
    others may be put into other words.
    """
    rows = (row for _, row in read_rows(path) if isinstance(row, dict))
    if has_names:
        rows = (row for row in rows if row.get("adapter") == name)
    return columns_of_rows(rows)


def check_row_columns(row, spec, find_columns):
    """Raise ValueError if the model reads a column that neither the row nor its file has.

    find_columns: a function that returns the columns of the file. It is asked only if the row lacks
    one. It returns nothing for a pipe, in which each row must have the columns.
    """
    try:
        check_columns(row, spec)
    except ValueError:
        check_columns(find_columns() or row, spec)


def encode_input(row, spec, prompt, tokenizer, limits):
    """Return the Rendered and the Example of a row. Without choices, it is a text to continue.

    Raise ValueError if a choice is too long.
    """
    answer = spec.answer_of(row)
    if answer == "messages":
        return encode_question(row, tokenizer, limits.source)
    pairs = [(row, without_target(prompt, row))]
    (rendered,), (example,), _ = encode_rows(pairs, tokenizer, limits.source, end=False)
    if answer == "target":
        rendered = rendered._replace(choices=[])
    if rendered.choices:
        example, _ = fit_targets(example, limits.target, are_choices=True)
    return rendered, example


def reads_adapter(row, forms, default):
    """Return whether the task of a row reads its column `adapter`, which then names no adapter."""
    if "adapter" not in row:
        return False
    spec = forms.find(default, row).spec
    return "adapter" in (*spec.fields, *expected_names(spec))


def adapter_name(row, keep_empty, adapters, default):
    """Return the name of a row's adapter, or `default`. Raise ValueError if it is not known.

    If there are no adapters, a name is an error: --adapter was forgotten, and the base would give
    another answer.
    """
    name = row.get("adapter")
    # In the .csv file of a known task, an empty cell is an empty text. In a user's file, the row
    # does not have the field.
    is_empty_cell = keep_empty and name == ""
    if name is None or is_empty_cell:
        name = default
    is_known = isinstance(name, str) and name in adapters
    if name is not None and not is_known:
        expected = f"expected one of {', '.join(adapters)}"
        if not adapters or default is not None:
            expected = "but --adapter is not a folder of adapters: give one, or rename the column"
        elif str(name) in adapters:
            expected = f"expected the text {str(name)!r}"
        raise ValueError(f"'adapter' is {name!r:.40}, {expected}")
    return name


def check_tokens(rendered, example):
    """Raise ValueError if there is nothing to read or score, because a text has no tokens."""
    has_empty_choice = bool(rendered.choices) and not all(example.targets)
    if not example.source or has_empty_choice:
        found = f"{rendered.input!r:.40}, {rendered.choices!r:.80}"
        raise ValueError(f"no tokens in the input or in a choice: {found}")


def predict(model, tokenizer, inputs, adapters, *, batch_size=16, max_new_tokens=64):
    """Yield (Input, result) for each Input, in order.

    The result of a row with choices has "idx", "label", "choice" and "scores" (the mean
    log-probability per token of each choice), and "word" (the label as the task's files spell it)
    if the task has labels. The result of a row without choices has "idx" and "output", the text
    that continues it. adapters: an Adapters.

    Raise ValueError if batch_size or max_new_tokens is below 1, and, with the row's idx, if a score
    is not finite.
    """
    # `generate` checks them, too, but rows with choices may have been answered before.
    Options(batch_size=batch_size, max_new_tokens=max_new_tokens).check()

    def kind_of(row_input):
        is_chat = "messages" in row_input.row
        return bool(row_input.rendered.choices), is_chat

    chunks = in_chunks(inputs)
    for chunk in read_ahead(chunks):  # a GPU would wait while rows are read and tokenized
        # Rows of different kinds may alternate: neighbors of one kind are answered together.
        for (is_scored, is_chat), neighbors in groupby(chunk, kind_of):
            neighbors = list(neighbors)
            names = [row_input.adapter for row_input in neighbors]
            options = {"adapter": adapters.rows(names), "batch_size": batch_size}
            with naming_rows([row_input.row for row_input in neighbors]), dividing():
                if is_scored:
                    results = scored_results(model, neighbors, options)
                else:
                    options["max_new_tokens"] = max_new_tokens
                    results = generated_results(model, tokenizer, neighbors, is_chat, options)
            yield from zip(neighbors, results, strict=True)


def in_chunks(inputs):
    """Yield lists of CHUNK inputs. The last one may be shorter."""
    inputs = iter(inputs)
    while chunk := list(islice(inputs, CHUNK)):
        yield chunk


def scored_results(model, inputs, options):
    """Return the result of each Input. All of them have choices."""
    examples = [row_input.example for row_input in inputs]
    results = []
    all_scores = score_examples(model, examples, **options).tolist()
    for row_input, scores in zip(inputs, all_scores, strict=True):
        choices = row_input.rendered.choices
        scores = scores[: len(choices)]  # the rest is -inf, because another row has more choices
        label = scores.index(max(scores))
        idx = row_input.row["idx"]
        result = {"idx": idx, "label": label, "choice": choices[label], "scores": scores}
        if row_input.labels:
            result["word"] = row_input.labels[label]
        results.append(result)
    return results


def generated_results(model, tokenizer, inputs, is_chat, options):
    """Return the result of each Input. None of them has choices, and all or none have messages."""
    sources = [row_input.example.source for row_input in inputs]
    if is_chat:
        with ending_answers(model, tokenizer) as stop:
            texts = generate(model, tokenizer, sources, stop=stop, **options)
    else:
        texts = generate(model, tokenizer, sources, **options)
    results = []
    for row_input, text in zip(inputs, texts, strict=True):
        results.append({"idx": row_input.row["idx"], "output": text})
    return results


def csv_line(cells):
    """Return a line of a .csv file. None is an empty cell, and whatever is not a text is JSON."""
    texts = []
    for cell in cells:
        if cell is None:
            texts.append("")
        elif isinstance(cell, str):
            texts.append(cell)
        else:
            texts.append(json.dumps(cell))
    line = io.StringIO()
    csv.writer(line).writerow(texts)
    return line.getvalue()


def write_results(path, lines, to_csv):
    """Write a file of results, or complete it: count its finished lines, and append the others.

    If the process was killed, the last line may be incomplete: it is cut, and the other lines stay
    as they are. They are not compared with the model or the rows: the caller must use the same.

    lines: a function from the number of a row to an iterator of the lines from this row on. With
    to_csv, lines(0) begins with the header, which is written with the first row. Each row is on
    disk before the next one is asked for.

    Raise ValueError if another process is writing the file, or if it begins differently.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe, which holds nothing
        with path.open("wb", buffering=0) as device:
            write_lines(path, device, lines(from_first(0)))
        return
    # Without a buffer, so that nothing is left in it, to be written again, if the disk is full.
    with lock_folder(path.parent, path.name), path.open("a+b", buffering=0) as file:
        expected = b"{"
        if to_csv:
            expected = next(iter(lines(0))).encode()
        check_beginning(path, file, expected)
        n_rows, n_bytes = count_finished(path, to_csv)
        file.truncate(n_bytes)
        new_lines = iter(lines(from_first(n_rows)))
        if to_csv and n_rows == 0:
            new_lines = with_header(new_lines)
        write_lines(path, file, new_lines)


def with_header(lines):
    """Yield the lines of a csv, with its header and its first row in a single text.

    So a mistake in the first row leaves an empty file. A header would stay behind, and the next
    command, with other columns, would be refused for it.
    """
    header = next(lines)
    yield header + next(lines, "")
    yield from lines


def follow(lines):
    """Help another process that calls `write_results`: answer this process's share of the rows."""
    for _ in lines(from_first(None)):
        pass


def write_lines(path, file, lines):
    """Write each line whole, or not at all. Raise OSError with the path if the disk is full."""
    for line in lines:
        rest = line.encode()
        n_written = 0
        try:
            while rest:  # a disk that is nearly full takes a part of a line
                n_bytes = file.write(rest)
                n_written += n_bytes
                rest = rest[n_bytes:]
        except OSError as error:
            if file.seekable() and n_written:
                file.truncate(file.tell() - n_written)
            raise OSError(error.errno, error.strerror, str(path)) from None


def check_beginning(path, file, expected):
    """Raise ValueError if a file, which may be cut short, does not begin with `expected`.

    This keeps results from being appended to a file with other columns, or to some other file.
    """
    file.seek(0)
    found = file.read(len(expected))
    if not expected.startswith(found):
        message = f"{path} is not a file of these results: it begins with {found!r:.80}"
        raise ValueError(f"{message}, expected {expected!r:.80}. Give another --out, or remove it")


def count_finished(path, to_csv):
    """Return how many complete rows a file has, and how many bytes it has up to their end.

    A csv's header without rows does not count, because it is written again.
    """
    n_header_lines = 1 if to_csv else 0
    n_lines = 0
    n_bytes = 0
    n_quotes = 0
    n_read = 0
    with path.open("rb") as file:
        for line in file:
            n_read += len(line)
            n_quotes += line.count(b'"')
            # A quoted text of a csv may hold line breaks: the quote is open if their number is odd.
            is_open = to_csv and n_quotes % 2 == 1
            if line.endswith(b"\n") and not is_open:
                n_lines += 1
                n_bytes = n_read
    if n_lines <= n_header_lines:
        return 0, 0
    return n_lines - n_header_lines, n_bytes
