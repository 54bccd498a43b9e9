"""Prediction: the answers to the rows of a file, in their order.

    read_inputs -> predict -> write_results (result_file.py)

Rows are read, answered and written in chunks, so that memory does not grow with the file.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from minia3.files.ahead import read_ahead
from minia3.files.messages import plural
from minia3.files.processes import dividing
from minia3.files.read import reading
from minia3.inference.decoding import generate_texts
from minia3.inference.options import Options
from minia3.inference.scoring import (
    check_example,
    naming_rows,
    score_examples,
    warn_of_equal_choices,
)
from minia3.inference.turns import ending_answers
from minia3.tasks.column_flags import ColumnFlags
from minia3.tasks.csv_rows import QuotedCells
from minia3.tasks.examples import Example, encode_question, encode_rows
from minia3.tasks.limits import fit_targets
from minia3.tasks.prompts import Prompt, Rendered
from minia3.tasks.row_files import column_names, read_rows, rows_suffix
from minia3.tasks.rows import (
    PREDICTED,
    check_columns,
    columns_of_rows,
    describe_empty,
    empty_columns,
    expected_names,
    find_rivals,
    normalize_row,
    task_names,
    without_target,
)
from minia3.tasks.task import TaskSpec
from minia3.tasks.understanding import guess_task

CHUNK = 256  # rows that are read, sorted by length and answered at a time
# The columns of a .csv file of results, unless --columns is given
RANKED = ("idx", "label", "choice", "scores")
GENERATED = ("idx", "output")
MIXED = (*RANKED, "output")  # if rows are answered in both ways, or it is not known how
# The fields that results have. The word is that of a task with labels.
KINDS_OF_RESULTS = (RANKED, (*RANKED, "word"), GENERATED)


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

    @property
    def result_fields(self) -> tuple[str, ...]:
        """The fields that the result of some row may have, and that of another may lack."""
        forms = [*self.by_adapter.values(), self.default]
        has_labels = any(form is not None and form.spec.labels for form in forms)
        return (*self.csv_columns, "word") if has_labels else self.csv_columns

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


class FileColumns:
    """The columns of a file of rows.

    of_table: those of a table. In a file of JSON, each row has its own, so the list is empty, and
    the rows are read when somebody asks. A pipe can be read only once, and nothing is known of it.
    """

    def __init__(self, path, has_names):
        """has_names: whether the rows name their adapters."""
        self.path = path
        self.has_names = has_names
        self.is_file = Path(path).is_file()
        self.of_table = column_names(path) if self.is_file else []
        self.of_adapters = {}  # what `of_adapter` has returned
        self.rivals = {}  # of each adapter: what `find_rivals` has returned

    def lack_adapters(self):
        """Return whether the file has rows, and none of them has the column `adapter`.

        A file of JSON is read up to the first row that has it, or that is wrong and will end the
        command anyway.
        """
        if not self.is_file:
            return False
        if self.of_table:
            return "adapter" not in self.of_table
        has_rows = False
        for _, row in read_rows(self.path):
            if isinstance(row, ValueError) or "adapter" in row:
                return False
            has_rows = True
        return has_rows

    def of_adapter(self, name):
        """Return the columns of a table, those that any row of JSON has, or none for a pipe.

        Rows that name another adapter do not count, because they may be put into other words.
        """
        if self.of_table or not self.is_file:
            return self.of_table
        if name not in self.of_adapters:
            self.of_adapters[name] = columns_of_rows(self.rows_of_adapter(name))
        return self.of_adapters[name]

    def rows_of_adapter(self, name):
        rows = (row for _, row in read_rows(self.path) if isinstance(row, dict))
        if self.has_names:
            rows = (row for row in rows if row.get("adapter") == name)
        return rows

    def that_row_may_lack(self, row, spec, name):
        """Return the columns of a table, or those of JSON that `find_rivals` finds.

        JSON is read for them only if a column of the row is not just the one that the task names.
        """
        columns = {field: column for column, field in spec.fields.items()}
        names = task_names(row, spec)
        is_exact = all(column == columns.get(field, field) for column, field in names.items())
        if self.of_table or not self.is_file or is_exact:
            return self.of_table
        if name not in self.rivals:
            self.rivals[name] = find_rivals(self.rows_of_adapter(name), spec)
        return self.rivals[name]

    def check(self, row, spec, name):
        """Raise ValueError if the model reads a column that neither a row nor its file has.

        name: of the row's adapter. In a pipe, each row must have the columns.
        """
        try:
            check_columns(row, spec)
        except ValueError:
            check_columns(self.of_adapter(name) or row, spec)


def read_inputs(path, tokenizer, forms, adapters, default=None, limits=DEFAULT_LIMITS):
    """Yield an Input for each row of a file (see `read_rows`), in the form of the row's adapter.

    forms: Forms. adapters: an Adapters. default: the adapter of rows that name none; if it is None,
    and there are adapters, the column `adapter` holds their names. Answers in the file are not
    read. Warn after the last row of columns that are empty in some rows, of cells of a .tsv that a
    program has put into quotes, and of inputs that were cut. Raise ValueError, "path:line: reason",
    at the first wrong row, and before the first row if no row of the file has the column `adapter`,
    which must name the adapters.
    """
    # In a published task, an empty text is a text.
    keep_empty = forms.default is not None and forms.default.spec.is_published
    has_names = default is None and bool(adapters)
    columns = FileColumns(path, has_names)
    if has_names and columns.lack_adapters():  # the base would answer all rows
        raise ValueError(
            f"{path}: there is no column 'adapter', and --adapter is a folder of adapters: "
            f"give one of them ({', '.join(adapters):.200}), or name one in each row"
        )
    n_empty = Counter()
    n_cut = 0
    quoted = QuotedCells()
    is_tsv = rows_suffix(Path(path)) == ".tsv"
    for n, (line_number, file_row) in enumerate(read_rows(path, keep_empty)):
        with reading(f"{path}:{line_number}"):
            if isinstance(file_row, ValueError):
                raise file_row
            name = default
            if has_names or not reads_adapter(file_row, forms, default):
                name = adapter_name(file_row, keep_empty, adapters, default)
            spec, prompt = forms.find(name, file_row, columns.of_table)
            may_lack = columns.that_row_may_lack(file_row, spec, name)
            row = normalize_row(file_row, spec, PREDICTED, n, may_lack)
            columns.check(file_row, spec, name)
            rendered, example, was_cut = encode_input(row, spec, prompt, tokenizer, limits)
            n_cut += was_cut
            check_tokens(rendered, example)
            check_example(example, adapters.model, tokenizer)
            warn_of_equal_choices(example, rendered.choices)
            if not spec.is_published:
                n_empty.update(empty_columns(row, prompt))
                if is_tsv:
                    quoted.add(path, file_row)
        yield Input(row, rendered, example, spec.labels, name, file_row)
    notes = describe_empty(n_empty) + quoted.notes()
    if n_cut:
        notes.append(
            f"{n_cut} {plural(n_cut, 'input')} cut to {limits.source} tokens (--max-length)"
        )
    for note in notes:
        warnings.warn(note, stacklevel=1)


def encode_input(row, spec, prompt, tokenizer, limits):
    """Return the Rendered and the Example of a row, and whether its input was cut.

    Without choices, it is a text to continue. Raise ValueError if a choice is too long.
    """
    answer = spec.answer_of(row)
    if answer == "messages":
        return encode_question(row, tokenizer, limits.source)
    pairs = [(row, without_target(prompt, row))]
    (rendered,), (example,), n_cut = encode_rows(pairs, tokenizer, limits.source, end=False)
    if answer == "target":
        rendered = rendered._replace(choices=[])
    if rendered.choices:
        example, _ = fit_targets(example, limits.target, are_choices=True)
    return rendered, example, n_cut > 0


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
    that continues it. adapters: an Adapters. Warn after the last row of outputs that were cut.

    Raise ValueError if batch_size or max_new_tokens is below 1, and, with the row's idx, if a score
    is not finite.
    """
    # `generate_texts` checks them, too, but rows with choices may have been answered before.
    options = Options(batch_size=batch_size, max_new_tokens=max_new_tokens)
    options.check()

    def kind_of(row_input):
        is_chat = "messages" in row_input.row
        return bool(row_input.rendered.choices), is_chat

    n_cut = 0
    chunks = in_chunks(inputs)
    for chunk in read_ahead(chunks):  # a GPU would wait while rows are read and tokenized
        # Rows of different kinds may alternate: neighbors of one kind are answered together.
        for (is_scored, is_chat), neighbors in groupby(chunk, kind_of):
            neighbors = list(neighbors)
            names = [row_input.adapter for row_input in neighbors]
            adapter = adapters.rows(names)
            with naming_rows([row_input.row for row_input in neighbors]), dividing():
                if is_scored:
                    results = scored_results(model, neighbors, adapter, batch_size)
                else:
                    results, cut = generated_results(
                        model, tokenizer, neighbors, is_chat, adapter, options
                    )
                    n_cut += len(cut)
            yield from zip(neighbors, results, strict=True)
    if n_cut:
        outputs = plural(n_cut, "output")
        note = f"{n_cut} {outputs} cut to {max_new_tokens} tokens (--max-new-tokens)"
        warnings.warn(note, stacklevel=1)


def in_chunks(inputs):
    """Yield lists of CHUNK inputs. The last one may be shorter."""
    inputs = iter(inputs)
    while chunk := list(islice(inputs, CHUNK)):
        yield chunk


def scored_results(model, inputs, adapter, batch_size):
    """Return the result of each Input. All of them have choices."""
    examples = [row_input.example for row_input in inputs]
    results = []
    all_scores = score_examples(model, examples, adapter=adapter, batch_size=batch_size).tolist()
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


def generated_results(model, tokenizer, inputs, is_chat, adapter, options):
    """Return the result of each Input, and a set of the places of those whose text was cut.

    None of the inputs has choices, and all or none have messages. options: an Options.
    """
    sources = [row_input.example.source for row_input in inputs]
    cut = set()
    if is_chat:
        with ending_answers(model, tokenizer) as stop:
            options = replace(options, stop=stop)
            texts = generate_texts(model, tokenizer, sources, adapter, options, cut)
    else:
        texts = generate_texts(model, tokenizer, sources, adapter, options, cut)
        texts = [without_separator(text, tokenizer) for text in texts]
    results = []
    for row_input, text in zip(inputs, texts, strict=True):
        results.append({"idx": row_input.row["idx"], "output": text})
    return results, cut


def without_separator(text, tokenizer):
    """Return a text without the space that a LLaMA writes between a prompt and its target.

    It has learned this space, because `encode_target` puts it there. Some tokenizers drop it when
    they decode a text alone (LLaMA-2), but those of bytes do not (Llama 3).
    """
    if tokenizer.has_separate_targets:
        return text
    return text.removeprefix(" ")
