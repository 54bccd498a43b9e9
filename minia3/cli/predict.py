"""`predict`: label the rows of a file, or continue them, each with the adapter that it names."""

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from minia3.cli.arguments import (
    adapter_path,
    add_device_options,
    add_max_new_tokens,
    add_model,
    add_quantize,
    add_shard,
    is_folder_of_adapters,
    load_model,
    positive,
    warn_if_endless,
)
from minia3.cli.terminal import show
from minia3.files.home import expand_home
from minia3.files.processes import first_goes_first, is_first, n_processes
from minia3.files.program import ignoring_interrupts
from minia3.files.streams import print_error

TITLE = "Label the rows of a file, or continue them"
EXAMPLE = "minia3 predict tiny-t5 data/same-colour/test.jsonl"

WRITTEN = (".jsonl", ".csv", "")  # endings of names that --out can have

# A column of --columns, NAME or NAME=FIELD, and the comma after it. A name or a field may be in
# quotes, as in a .csv file. The csv module does not read them here: it knows no quotes after a =,
# and it does not say whether the = of "a=b" was in quotes.
QUOTED = r'"(?:[^"]|"")*"'
COLUMN = re.compile(f"({QUOTED}|[^,=]*)(?:=({QUOTED}|[^,]*))?,")


def add_arguments(parser):
    add_model(parser)
    parser.add_argument(
        "file",
        help=".jsonl, .json, .csv, .tsv or .parquet file, also as .gz (-: JSON lines from standard "
        "input), with the columns that the adapter was trained on; a row may have its own "
        "`choices`, and the name of an `adapter`",
    )
    parser.add_argument(
        "--adapter",
        type=adapter_path,
        help="folder, file or hub id of an adapter for all rows, or a folder of adapters for "
        "rows that name them",
    )
    parser.add_argument(
        "--task",
        type=expand_home,
        help="known task (rte ...) or task file whose prompts and labels the rows get (default: "
        "those that the adapter was trained on)",
    )
    parser.add_argument(
        "--input",
        help='what the model reads: columns in braces, as in "{premise} Question: {hypothesis}"',
    )
    parser.add_argument("--labels", help="words to choose from, as in negative,positive")
    parser.add_argument(
        "--prompt",
        type=int,
        default=0,
        help="number of the task's prompt to use (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=expand_home,
        help="file of results, .jsonl or .csv (default or -: print them); an incomplete "
        "file is continued",
    )
    parser.add_argument(
        "--columns",
        help="columns of results: NAME or NAME=FIELD, with commas between, as in ID,Label=word; "
        "a field is one of the row's, or idx, label, choice, scores, output, or word (the label as "
        "the task's file spells it); a name or field with a comma stands in quotes, as in "
        "'\"net,total\",Label=word'",
    )
    parser.list_flags = ("--labels", "--columns")
    add_size_options(parser)
    add_max_new_tokens(parser)
    add_device_options(parser)
    add_quantize(parser)
    add_shard(parser)


def add_size_options(parser):
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        default=16,
        help="rows per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=positive(int),
        default=512,
        help="maximum tokens of an input; a longer input loses its middle (default: %(default)s)",
    )
    parser.add_argument(
        "--max-target-length",
        type=positive(int),
        help="maximum tokens of a choice; a longer choice is an error (default: any number)",
    )


def run(args):
    from minia3.checkpoints.hub import find
    from minia3.checkpoints.tokenizer import load_tokenizer
    from minia3.inference.result_file import follow, write_results

    if args.file == "-":
        args.file = "/dev/stdin"
    # What opens /dev/stdout a second time writes over what this process prints there.
    if args.out in ("-", "/dev/stdout"):
        args.out = None
    check_out(args)
    check_file(args.file)
    if args.columns:
        read_columns(args.columns)  # to find mistakes before anything is loaded
    with first_goes_first():  # because these write and download
        finish_adapters(args.adapter)
        check_adapter(args.adapter)
        find(args.model, weights=False)  # `make_forms` reads what the model has learned
        forms = make_forms(args)
    model = load_model(args)
    adapters, default_adapter = load_adapters(model, args.adapter)
    tokenizer = load_tokenizer(args.model)
    tokenizer.chat_template = forms.chat_template or tokenizer.chat_template
    prediction = Prediction(args, model, tokenizer, forms, adapters, default_adapter)
    if args.out is None:
        for line in prediction.lines():
            show(line, end="")
    elif not is_first():
        follow(prediction.lines)
    else:
        lines = with_progress(prediction, args.file)
        try:
            n_before, has_new = write_results(Path(args.out), lines, prediction.layout)
        except KeyboardInterrupt:
            if os.path.isfile(args.out):
                with ignoring_interrupts():
                    print_error(f"minia3: stopped; the same command continues {args.out}")
            raise
        show(f"{args.out} is finished{note_on_rows(n_before, has_new)}")


def note_on_rows(n_before, has_new):
    """Return that a file had all of its rows already, or "" if some of them are new."""
    if has_new or not n_before:
        return ""
    if n_before == 1:
        return ": its only row was there before"
    return f": all {n_before} rows were there before"


def check_out(args):
    """Raise ValueError if the results cannot go into the file that --out names.

    Either it is a folder, or its format is not written, or it is the file of the rows itself, whose
    rows would be taken for results that are there already.
    """
    if args.out is not None and os.path.isdir(args.out):
        raise ValueError(f"--out is {args.out}, a folder: expected a file, .jsonl or .csv")
    if args.out is not None and not has_known_format(args.out):
        raise ValueError(f"--out is {args.out}, expected a name that ends in .jsonl or .csv")
    paths = [args.file, args.out]
    if args.out is not None and all(map(os.path.exists, paths)) and os.path.samefile(*paths):
        raise ValueError(f"--out is {args.out}, the file of the rows: give another one")


def has_known_format(out):
    """Return whether the results can go to a path: a .jsonl or .csv file, a device or a pipe."""
    is_device = os.path.exists(out) and not os.path.isfile(out)
    ending = Path(out).suffix.lower()
    is_number = ending[1:].isdigit()  # as in results-v1.2
    return is_device or is_number or ending in WRITTEN


def read_columns(text):
    """Return a dict from the name of each column of --columns to its field.

    Raise ValueError if two columns have the same name.
    """
    columns = {}
    for written_name, written_field in COLUMN.findall(text + ","):
        name = without_quotes(written_name)
        if name in columns:
            raise ValueError(f"--columns names {name!r} twice, expected names that differ")
        columns[name] = without_quotes(written_field or written_name)
    return columns


def without_quotes(text):
    """Return a name or a field of --columns without the quotes around it, if there are some."""
    if re.fullmatch(QUOTED, text):
        return text[1:-1].replace('""', '"')
    return text


def check_file(path):
    """Raise ValueError if a file of rows cannot be read, before anything is loaded, or if several
    processes would read one pipe: each would get other rows.
    """
    from minia3.tasks.row_files import read_rows

    is_pipe = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if not is_pipe:
        next(read_rows(path), None)
    elif n_processes() > 1:
        raise ValueError(
            f"{path} is a pipe, and each of {n_processes()} processes would read a part of it: "
            "write the rows to a file first"
        )


def finish_adapters(path):
    """Finish what a killed process was writing: an adapter, or adapters in the sub-folders.

    This comes first, because a folder without an adapter_config.json is taken for one of adapters.
    """
    from minia3.files.write import finish_writing

    if path is not None:
        for folder in (Path(path), *Path(path).glob("[!.]*")):
            finish_writing(folder)


def check_adapter(path):
    """Raise ValueError if a folder holds neither an adapter nor adapters.

    The folder of a run has an adapter in a sub-folder, but its rows would be answered without it.
    """
    from minia3.checkpoints.layout import check_adapter_folder, is_run

    if is_folder_of_adapters(path):
        has_adapters = any(Path(path).glob("[!.]*/adapter_config.json"))
        if is_run(Path(path)) or not has_adapters:
            check_adapter_folder(Path(path))


def with_progress(prediction, file):
    """Return the function `prediction.lines`, which shows a progress bar if standard error is a
    terminal. file: of the rows.
    """
    from minia3.files.progress import progress_bar
    from minia3.files.streams import is_terminal
    from minia3.tasks.row_files import read_rows

    if not is_terminal(sys.stderr):
        return prediction.lines
    n_rows = None
    if Path(file).is_file():  # a pipe can be read only once
        n_rows = sum(1 for _ in read_rows(file))

    def shown_lines(first_row=0):
        lines = prediction.lines(first_row)
        if prediction.is_csv and first_row == 0:
            yield next(lines)  # the header, which the bar should not count as a row
        options = {"desc": "predicting", "total": n_rows, "initial": first_row, "leave": False}
        yield from progress_bar(iterable=lines, **options)

    return shown_lines


# How rows are put into words


def make_forms(args):
    """Return the Forms of rows: of --task, or else of the task.json beside each adapter or model.

    Raise ValueError if there is no such task or prompt.
    """
    from minia3.inference.prediction import Forms
    from minia3.tasks.column_flags import ColumnFlags, read_flags
    from minia3.training.learned import learned_tasks

    by_adapter = {}
    if is_folder_of_adapters(args.adapter):
        tasks, specs = tasks_of_folder(args.adapter, args.task)
        by_adapter = {name: make_form(spec, args) for name, spec in specs.items()}
        says_form = args.task is not None
    else:
        tasks = learned_tasks(args.model, args.adapter)
        says_form = args.task is not None or bool(tasks)
    flags = read_flags(ColumnFlags(input=args.input, labels=args.labels))
    if not says_form:
        if not by_adapter:  # `make_form` has checked the number for each adapter's prompts
            check_prompt_number(args.prompt, n_prompts=1)
        return Forms(None, by_adapter, flags)
    return Forms(make_form(choose_task(args, tasks), args), by_adapter, flags)


def tasks_of_folder(folder, name):
    """Return the tasks that the adapters of a folder have learned, and the one of each adapter.

    Both are dicts to TaskSpec: by the name of the task, and by the name of the adapter. name: of
    --task; an adapter that has not learned it is left out. None: each adapter has only one task, or
    a ValueError is raised.
    """
    from minia3.tasks.task_file import read_tasks_beside

    tasks = {}
    by_adapter = {}
    for path in sorted(Path(folder).iterdir()):
        tasks_of_adapter = read_tasks_beside(path)
        tasks = tasks_of_adapter | tasks  # the first adapter's, if several have one of this name
        if name in tasks_of_adapter:
            by_adapter[path.name] = tasks_of_adapter[name]
        elif name is None and tasks_of_adapter:
            by_adapter[path.name] = only_task(path, tasks_of_adapter)
    return tasks, by_adapter


def only_task(path, tasks):
    """Return the TaskSpec of an adapter. Raise ValueError if it has learned several tasks."""
    if len(tasks) > 1:
        raise ValueError(f"{path} has learned {len(tasks)} tasks: give --task {'|'.join(tasks)}")
    return next(iter(tasks.values()))


def choose_task(args, tasks):
    """Return the TaskSpec of rows that name no adapter. tasks: what the adapter has learned."""
    from minia3.tasks.known_tasks import known_tasks, list_known_tasks
    from minia3.tasks.task_file import find_task_file, read_task_file

    if args.task is None:
        return only_task(args.adapter or args.model, tasks)
    if args.task in tasks:
        return tasks[args.task]
    if args.task in known_tasks():
        return known_tasks()[args.task]
    path = find_task_file(args.task)
    if path is None:
        learned = list(filter(None, tasks))
        message = f"--task is {args.task!r}, expected a task file or the name of a task"
        near = difflib.get_close_matches(args.task, [*learned, *known_tasks()], n=1)
        if near:
            raise ValueError(f"{message}: did you mean {near[0]!r}?")
        raise ValueError(f"{message}: {', '.join([*learned, list_known_tasks()])}")
    spec = read_task_file(path)
    is_single = not is_folder_of_adapters(args.adapter)  # others may have learned something else
    if is_single and not args.labels and lacks_labels(spec, tasks):
        raise ValueError(
            f"--task is {args.task}, which takes its labels from its file of train, and "
            f"{args.adapter or args.model} has learned to pick among labels: leave out --task, or "
            "give --labels"
        )
    return spec


def lacks_labels(spec, tasks):
    """Return whether a task file does not say how rows are answered, and the only task that was
    learned has labels. The rows would be continued, which was not learned.
    """
    labels_of_tasks = [learned.labels for learned in tasks.values()]
    prompt = spec.prompts[0]
    says_answer = bool(spec.labels or spec.messages or prompt.choices or prompt.target)
    return not says_answer and len(labels_of_tasks) == 1 and bool(labels_of_tasks[0])


def make_form(spec, args):
    """Return the Form of a task's rows. Raise ValueError if it has no prompt of this number."""
    from minia3.inference.prediction import Form
    from minia3.tasks.column_flags import ColumnFlags, with_flags
    from minia3.tasks.prompts import for_family
    from minia3.training.learned import family_of

    spec = with_flags(spec, ColumnFlags(input=args.input, labels=args.labels))
    prompts = for_family(spec.prompts, family_of(args.model))
    check_prompt_number(args.prompt, len(prompts))
    return Form(spec, prompts[args.prompt])


def check_prompt_number(number, n_prompts):
    if not 0 <= number < n_prompts:
        raise ValueError(f"--prompt is {number}, expected 0 to {n_prompts - 1}")


def load_adapters(model, path):
    """Return the adapters that rows can name, and the adapter of rows that name none."""
    from minia3.adapters.lora import is_lora, load_lora
    from minia3.adapters.named_rows import Adapters

    adapters = Adapters(model)
    if not path:
        return adapters, None
    if is_folder_of_adapters(path):
        adapters.load_folder(path)
        return adapters, None
    if is_lora(path):  # it changes the weights, so it has no row and no name
        load_lora(model, path)
        return adapters, None
    adapters.load(path, path)
    return adapters, path


@dataclasses.dataclass
class Prediction:
    """All that it takes to make lines of results out of rows."""

    args: Any  # of the command line
    model: Any
    tokenizer: Any
    forms: Any  # Forms
    adapters: Any  # Adapters
    default_adapter: str | None
    writers: set = dataclasses.field(default_factory=set)  # adapters that have written a text

    @property
    def is_csv(self):
        return self.args.out is not None and self.args.out.lower().endswith(".csv")

    @property
    def columns(self):
        """A dict from the name of each column to its field, or empty: all fields of the result."""
        if self.args.columns:
            return read_columns(self.args.columns)
        if self.is_csv:
            return {name: name for name in self.forms.csv_columns}
        return {}

    @property
    def layout(self):
        """What the lines of the file of results look like."""
        from minia3.inference.prediction import KINDS_OF_RESULTS
        from minia3.inference.result_file import Layout

        kinds = (tuple(self.columns),) if self.columns else KINDS_OF_RESULTS
        return Layout(self.is_csv, kinds)

    def lines(self, first_row=0):
        """Yield the lines of results from a row on; before the first row, the header of a csv."""
        from minia3.inference.prediction import CHUNK, Limits, predict, read_inputs
        from minia3.inference.result_file import csv_line

        columns = self.columns
        if self.is_csv and first_row == 0:
            yield csv_line(columns)
        # The last bits of a row's scores depend on the other rows of its batch. So compute the
        # whole chunk again: a file that is completed has the bits of one that was written at once.
        first_in_chunk = first_row - first_row % CHUNK
        rows = read_inputs(
            self.args.file,
            self.tokenizer,
            self.forms,
            self.adapters,
            self.default_adapter,
            Limits(self.args.max_length, self.args.max_target_length),
        )
        results = predict(
            self.model,
            self.tokenizer,
            islice(rows, first_in_chunk, None),
            self.adapters,
            batch_size=self.args.batch_size,
            max_new_tokens=self.args.max_new_tokens,
        )
        for row_input, result in islice(results, first_row - first_in_chunk, None):
            if "output" in result:
                self.warn_once(row_input.adapter)
            values = self.select(row_input, result, columns)
            if self.is_csv:
                yield csv_line(values.values())
            else:
                yield json.dumps(values) + "\n"

    @functools.cached_property
    def known_columns(self):
        """The columns of the file of rows and, in `select`, of the rows so far. A row of a .csv
        file lacks those that are empty, and a row of JSON may lack those of other rows.
        """
        from minia3.tasks.row_files import column_names, read_rows
        from minia3.tasks.rows import columns_of_rows

        if not Path(self.args.file).is_file():
            return set()  # a pipe can be read only once
        columns = column_names(self.args.file)
        return set(columns or columns_of_rows(row for _, row in read_rows(self.args.file)))

    def warn_once(self, name):
        """Warn if an adapter writes that was not trained to stop. name: of the adapter, or None."""
        path = self.args.adapter
        if is_folder_of_adapters(path):
            path = name and str(Path(path, name))
        if path is not None and path not in self.writers:
            self.writers.add(path)
            warn_if_endless(self.args, path, self.tokenizer)

    def select(self, row_input, result, columns):
        """Return a dict from the name of each column to its value for a row."""
        from minia3.inference.result_file import csv_line

        if not columns:
            return result
        # The row has texts in place of the file's numbers, but also names that the file lacks. Its
        # own `label` is an index that says nothing here: rows to predict hide their answers.
        row = {name: value for name, value in row_input.row.items() if name != "label"}
        fields = row_input.file_row | row | row_input.file_row
        # A result may lack a field that others have. A field that none has is the file's own.
        fields |= dict.fromkeys(self.forms.result_fields) | result
        if fields.get("adapter") is None:
            fields["adapter"] = row_input.adapter
        self.known_columns.update(fields)
        for field in columns.values():
            if field not in self.known_columns:
                found = ", ".join(csv_line([name]).rstrip() for name in fields)
                message = f"--columns: {field!r} is not in row {result['idx']}"
                raise ValueError(f"{message}; it has {found}")
        return {name: fields.get(field) for name, field in columns.items()}
