"""The paper's table: a row per model and method, a column per task, and what each row costs.

A cell is the median over seeds, with the interquartile range in brackets. If an adapter was
evaluated with several prompts, its result is the median over them, so the brackets show how much
the seeds differ and not how much the prompts do. T-Few's brackets do, too: its code evaluates each
seed once, with a prompt drawn for each row (src/data/data_module.py), and takes the quartiles over
the seeds (src/scripts/get_result_table.py). The first row has what always giving the commonest
label would reach.
"""

import csv
import io
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minia3.cli.results import read_results
from minia3.cli.terminal import show
from minia3.inference.metrics import INVERSE_PERPLEXITY

TITLE = "Print a table of runs, in the form of the paper's tables"
EXAMPLE = "minia3 table runs"

# The tasks of the paper come first, in the order of its tables.
PAPER_TASKS = (
    "copa",
    "hellaswag",
    "storycloze",
    "winogrande",
    "wsc",
    "wic",
    "rte",
    "cb",
    "anli-r1",
    "anli-r2",
    "anli-r3",
)
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
UNKNOWN = math.nan
COMMONEST = "commonest label"  # the method of the row that is compared with, and was never run


@dataclass
class Cell:
    """The accuracies (or another metric) of a row on one task, in per cent, or the perplexities."""

    median: float = UNKNOWN  # over seeds
    low: float = UNKNOWN  # the lower quartile; unknown if there is one accuracy
    high: float = UNKNOWN  # the upper quartile
    before: float = UNKNOWN  # the median before training
    metric: str = ""

    @property
    def iqr(self):
        """The interquartile range."""
        return self.high - self.low


@dataclass
class Row:
    """The results that differ in nothing but task and seed."""

    model: str
    method: str  # and the flags that distinguish it from other rows
    cells: dict  # task -> Cell; every row has all tasks of the table
    average: float  # see `average_of`
    n_runs: int = 0  # adapters
    n_trainable: int = 0  # parameters of an adapter
    flops_per_example: float = UNKNOWN
    flops_to_train: float = UNKNOWN
    megabytes: float = UNKNOWN  # of an adapter's files


# The columns after those of the tasks: title -> attribute of a Row, and the form of its number.
LAST_COLUMNS = {
    "average": ("average", ".1f"),
    "runs": ("n_runs", "d"),
    "trainable": ("n_trainable", ",d"),
    "FLOPs/example": ("flops_per_example", ".1e"),
    "FLOPs to train": ("flops_to_train", ".1e"),
    "MB": ("megabytes", ",.3f"),
}


def add_arguments(parser):
    parser.add_argument(
        "runs", nargs="+", help="folders of runs, or folders that contain folders of runs"
    )
    parser.add_argument(
        "--csv", action="store_true", help="print comma-separated values, with all digits"
    )


def run(args):
    rows, note = table_rows(args.runs)
    if args.csv:
        show(format_csv(rows), end="")
        if note:
            warnings.warn(note, stacklevel=1)  # on standard error, because a program reads the rest
    else:
        show(format_markdown(rows), end="")
        if note:
            show(f"\n{note}")


# Rows


def table_rows(folders):
    """Return the rows of the table, and the note of `read_results` on what is left out.

    Rows are sorted by model, then by trainable parameters, then by label: see `label_order`.
    """
    results, note = read_results(folders)
    return make_rows(results), note


def make_rows(results):
    tasks = sorted({result.task for result in results}, key=task_order)
    groups = {}
    for result in results:
        key = (result.model, result.n_trainable, label_order(result.label), result.label)
        groups.setdefault(key, []).append(result)
    rows = [make_row(group, tasks) for _, group in sorted(groups.items())]
    return commonest_rows(results, tasks) + rows


def label_order(label):
    """Return a sort key: first the labels with few flags, and numbers by their value, so that the
    rates 0.001, 0.003 and 0.01 are in this order.
    """
    texts = NUMBER.split(label)
    texts[1::2] = map(float, texts[1::2])
    return label.count(", "), tuple(texts)


def commonest_rows(results, tasks):
    """Return a row with the share of each task's commonest label, if any result has one.

    Older versions did not write it.
    """
    cells = {}
    for task in tasks:
        known = [
            result for result in results if result.task == task and not is_unknown(result.commonest)
        ]
        cells[task] = Cell()
        if known:
            share = np.median([result.commonest for result in known])  # RAFT's folds differ
            cells[task] = Cell(float(share), metric=known[0].metric)
    if all(is_unknown(cell.median) for cell in cells.values()):
        return []
    return [Row("-", COMMONEST, cells, average_of(cells.values()))]


def average_of(cells):
    """Return the mean over all tasks. It is unknown if a task is missing, or has another metric:
    the mean of an accuracy and of a perplexity says nothing.
    """
    if len({cell.metric for cell in cells}) > 1:
        return UNKNOWN
    return float(np.mean([cell.median for cell in cells]))


def task_order(column):
    """Return a sort key: the paper's tasks in its order, and then the others by name."""
    task = re.split(r" [(\[]", column)[0]  # without its metric, its split and a digest of its data
    place = len(PAPER_TASKS)
    if task in PAPER_TASKS:
        place = PAPER_TASKS.index(task)
    return place, column


def make_row(results, tasks):
    cells = {}
    for task in tasks:
        cells[task] = make_cell([result for result in results if result.task == task])
    return Row(
        model=results[0].model,
        method=results[0].label,
        cells=cells,
        average=average_of(cells.values()),
        n_runs=len({result.adapter_folder for result in results}),
        n_trainable=results[0].n_trainable,
        flops_per_example=float(np.median([result.flops_per_example for result in results])),
        flops_to_train=float(np.median([result.flops_to_train for result in results])),
        megabytes=float(np.median([result.n_bytes / 1e6 for result in results])),
    )


def make_cell(results):
    if not results:
        return Cell()
    metric = results[0].metric
    values = shown_values(np.array([result.accuracy for result in results]), metric)
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    before = shown_values(np.array([result.before for result in results]), metric)
    cell = Cell(median, before=float(np.median(before)), metric=metric)
    if len(values) > 1:
        cell.low = low
        cell.high = high
    return cell


def shown_values(accuracies, metric):
    """Return what the table shows: the perplexity in place of its inverse in per cent."""
    if metric != INVERSE_PERPLEXITY:
        return accuracies
    with np.errstate(divide="ignore"):
        return 100 / accuracies


def shown_task(task):
    """Return the name of a task as the table shows it, with its metric if it is an unusual one."""
    return task.replace(f"({INVERSE_PERPLEXITY}", "(perplexity")


# Text


def format_csv(rows):
    """Return the rows as CSV with all digits. A value that is unknown is an empty text."""
    header = ["model", "method"]
    for task in rows[0].cells:
        header += [shown_task(task), f"{shown_task(task)} IQR"]
    header += LAST_COLUMNS

    lines = [header]
    for row in rows:
        line = [row.model, row.method]
        for cell in row.cells.values():
            line += [cell.median, cell.iqr]
        line += [getattr(row, name) for name, _ in LAST_COLUMNS.values()]
        line = ["" if is_unknown(value) else value for value in line]
        lines.append(line)

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def format_markdown(rows):
    """Return the rows as a Markdown table whose columns are aligned."""
    names = short_names(row.model for row in rows)
    columns = [
        format_column("model", [names[row.model] for row in rows], "<"),
        format_column("method", [row.method for row in rows], "<"),
    ]
    for task in rows[0].cells:
        texts = [format_cell(row.cells[task]) for row in rows]
        columns.append(format_column(shown_task(task), texts))
    for title, (name, form) in LAST_COLUMNS.items():
        texts = [format_number(getattr(row, name), form) for row in rows]
        columns.append(format_column(title, texts))
    lines = [f"| {' | '.join(texts)} |\n" for texts in zip(*columns, strict=True)]
    return "".join(lines)


def format_column(name, texts, side=">"):
    """Return the lines of a column, all equally wide: its name, Markdown's ruler, its texts.

    A bar would end a cell of Markdown, so it is escaped.
    """
    title, *cells = [text.replace("|", "\\|") for text in [name, *texts]]
    width = max(map(len, [title, *cells]))
    ruler = "-" * width
    if side == ">":
        ruler = ruler[:-1] + ":"  # to the right
    return [f"{title:{side}{width}}", ruler, *(f"{cell:{side}{width}}" for cell in cells)]


def format_cell(cell):
    form = ",.2f" if cell.metric == INVERSE_PERPLEXITY else ".1f"
    text = format_number(cell.median, form)
    if not is_unknown(cell.iqr):
        text += f" ({format_number(cell.iqr, form)})"
    return text


def format_number(value, form):
    if is_unknown(value):
        return "-"
    return format(value, form)


def is_unknown(value):
    return isinstance(value, float) and math.isnan(value)


def short_names(models):
    """Return a dict from each model to a short name: the last part of its path.

    The whole paths stay if two models would have the same short name.
    """
    names = {model: Path(model).name or model for model in models}  # "." has no name
    if len(set(names.values())) < len(names):
        return {model: model for model in names}
    return names
