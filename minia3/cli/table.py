"""To be written."""

import csv
import io
from pathlib import Path

import numpy as np

from minia3.cli.results import read_results

PAPER = (
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
COSTS = {
    "runs": "{}",
    "trainable": "{:,}",
    "FLOPs/example": "{:.1e}",
    "FLOPs to train": "{:.1e}",
    "MB": "{:,.3f}",
}


def table_rows(folders):
    """-> the table's rows, dicts from column to text or number (nan: there is none), and `read`'s note."""
    (runs, note), groups, table = read_results(folders), {}, []
    for run in runs:
        groups.setdefault(
            (run["model"], run["trainable"], len(run["label"]), run["label"]), []
        ).append(run)
    place = {task: i for i, task in enumerate(PAPER)}
    tasks = sorted(
        {run["task"] for run in runs},
        key=lambda x: (place.get(x.partition(" (")[0], len(place)), x),
    )
    for (model, trainable, _, label), group in sorted(groups.items()):
        row = {"model": model, "method": label}
        for task in tasks:
            values = [x for run in group if run["task"] == task for x in run["accuracies"]] or [
                np.nan
            ]
            low, row[task], high = np.percentile(values, (25, 50, 75))
            row[f"{task} IQR"] = high - low if len(values) > 1 else np.nan
        n = len({run["adapter"] for run in group})
        costs = (
            n,
            trainable,
            *np.median([[*run["flops"], run["bytes"] / 1e6] for run in group], axis=0),
        )
        row["average"] = np.mean([row[task] for task in tasks])
        table.append(row | dict(zip(COSTS, costs, strict=True)))
    return table, note


def short_names(models):
    """Model -> the last part of its path, which is wider than figures are; where two would be alike the whole."""
    names = {model: Path(model).name for model in models}
    return names if len({*names.values()}) == len(names) else dict(zip(names, names, strict=True))


def table_text(rows, as_csv=False):
    """The rows as a Markdown table that is aligned, or as CSV with all digits."""
    if as_csv:
        file, cells = io.StringIO(), [["" if x != x else x for x in row.values()] for row in rows]
        csv.writer(file, lineterminator="\n").writerows([rows[0], *cells])
        return file.getvalue()
    names, columns = short_names(row["model"] for row in rows), []
    rows = [row | {"model": names[row["model"]]} for row in rows]
    for name in (x for x in rows[0] if not x.endswith(" IQR")):
        form, cells = COSTS.get(name, "{:.1f}") + " ({:.1f})", [name]
        for x, iqr in [(row[name], row.get(f"{name} IQR", np.nan)) for row in rows]:
            cells.append(
                x
                if isinstance(x, str)
                else form.format(x, iqr).replace(" (nan)", "").replace("nan", "-")
            )
        width, side = max(map(len, cells)), "<" if name in ("model", "method") else ">"
        cells.insert(1, ("-" if side == "<" else ":").rjust(width, "-"))
        columns.append([f"{x:{side}{width}}" for x in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))
