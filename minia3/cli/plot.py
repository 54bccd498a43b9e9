"""Pictures of runs (.png), and of what their adapters learned.

accuracy          a panel per task, and in it a line per table row: before and after training
curves            training loss and held-out results, by step and by time
learned-NAME      the entries of one (IA)^3 adapter, layer by layer
similarity-MODEL  how alike the adapters of a model are
"""

import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minia3.cli.results import read_results
from minia3.cli.table import (
    COMMONEST,
    is_unknown,
    make_rows,
    short_names,
    shown_task,
    shown_values,
)
from minia3.cli.terminal import show
from minia3.files.home import expand_home
from minia3.files.read import reading
from minia3.files.write import replacing
from minia3.inference.metrics import INVERSE_PERPLEXITY

TITLE = "Draw runs, and what their adapters learned"
EXAMPLE = "minia3 plot runs --out pictures"

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # $ in the name of a file or in --input begins no formula
}
SIZE = (8, 5.5)  # inches
DPI = 200  # 8 inches are 1600 pixels
MOST_PIXELS = 32_000  # of a side: viewers show no more, and older versions of matplotlib fail

# Curves go through all of these in turn, and through the ten colors of matplotlib's cycle. A curve
# with gaps lies on top, so that another one with the same values shows through.
LINE_STYLES = ("-", "--", ":")
LABEL_WIDTH = 100  # characters; longer labels of a legend are wrapped
LINE_HEIGHT = 0.16  # inches per line of a legend
N_PANELS = 3  # side by side
PANEL_HEIGHT = 0.9  # inches of a panel of tasks, without its lines
PANEL_WIDTH = 2.6
LEGEND_HEIGHT = 0.4
LABEL_INCHES = 3
ROW_LABEL_WIDTH = 40  # characters
NO_BREAK = "\u00a0"  # a space at which no line ends
CURVE_HEIGHT = 2.6  # inches
NO_CURVE = np.empty((0, 2))
WIDTHS = (3, 1)  # of the first and the last curve, in points
N_FURTHEST = 8  # entries that are listed
MOST_NUMBERED = 36  # adapters; with more of them, the cosines would overlap


@dataclass
class Picture:
    name: str  # of the file, without .png
    draw: Callable  # takes an empty figure


def add_arguments(parser):
    parser.add_argument(
        "runs", nargs="+", help="folders of runs, or folders that contain folders of runs"
    )
    parser.add_argument(
        "--out",
        type=expand_home,
        default="pictures",
        help="folder of the pictures (default: %(default)s)",
    )


def run(args):
    for line in plot(args.runs, args.out):
        show(line)


def plot(folders, out):
    """Draw the runs in `folders` (see `read_results`) as .png files in the folder `out`.

    Yield the path of each picture, and finally the note on what is left out, if there is one.
    Raise ValueError if matplotlib is not installed, or for a reason of `read_results`.
    """
    with reading("plot", extra="plot"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    pictures, note = choose_pictures(folders)
    for picture in pictures:
        path = Path(out, f"{picture.name}.png")
        with rc_context(STYLE), replacing(path) as temporary:
            figure = Figure(SIZE, DPI, layout="constrained")
            picture.draw(figure)
            dpi = min(DPI, MOST_PIXELS / max(figure.get_size_inches()))
            figure.savefig(temporary, format="png", dpi=dpi)
        yield str(path)
    if note:
        yield note


def choose_pictures(folders):
    """Return the pictures of the runs in `folders`, and a note on what is left out."""
    results, note = read_results(folders)
    pictures = [Picture("accuracy", partial(draw_accuracy, rows=make_rows(results)))]
    trained = [result for result in results if len(result.loss_curve)]
    if trained:
        pictures.append(Picture("curves", partial(draw_curves, results=trained)))

    adapters = read_adapters(results)
    for adapters_of_model in adapters.values():
        for name, vectors in adapters_of_model.items():
            pictures.append(Picture(f"learned-{name}", partial(draw_learned, vectors=vectors)))
    for model, model_name in short_names(adapters).items():
        if len(adapters[model]) > 1:
            name = "similarity-" + model_name.strip("/").replace("/", "-")
            pictures.append(Picture(name, partial(draw_similarity, adapters=adapters[model])))
    notes = [note, note_on_missing(results)]
    return pictures, "; ".join(filter(None, notes))


def read_adapters(results):
    """Return the trained (IA)^3 adapters: dicts from model to name to vector to array (D,).

    Those whose folders are not there are left out.
    """
    from minia3.adapters.peft_files import read_adapter  # imports torch, and `--help` is quick

    resolved = {result.run_folder: result.run_folder.resolve() for result in results}
    top = os.path.commonpath([folder.parent for folder in resolved.values()])
    adapters = {}
    names = {}  # folder of an adapter -> its name
    for result in results:
        # Without the folder, its path would be taken for an adapter on the hub.
        if not has_adapter(result) or not result.adapter_folder.is_dir():
            continue
        if result.adapter_folder in names:  # a mixture has several results and one adapter
            continue
        # The folder may be a link to another disk, so only that of the run is resolved.
        place = result.adapter_folder.relative_to(result.run_folder)
        parts = (resolved[result.run_folder] / place).relative_to(top).parts
        name = "-".join(part for part in parts if part not in ("adapter", "adapters"))
        name = distinct_name(name, names.values())
        names[result.adapter_folder] = name
        vectors = read_adapter(result.adapter_folder).vectors
        adapters.setdefault(result.model, {})[name] = {
            key.replace("blocks.", ""): vector.numpy() for key, vector in vectors.items()
        }
    return adapters


def has_adapter(result):
    return result.method == "ia3" and result.n_trainable > 0


def note_on_missing(results):
    """Return which adapters have no picture, because their folders are not there, or ""."""
    folders = dict.fromkeys(result.adapter_folder for result in results if has_adapter(result))
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if not missing:
        return ""
    return f"{len(missing)} not drawn, because these folders are not there: {', '.join(missing)}"


def distinct_name(name, taken):
    """Return a name, with a number after it if it is taken: "x-s0", "x-s0-2", "x-s0-3" ..."""
    found = name
    number = 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


# Accuracy and curves


def draw_accuracy(figure, rows):
    """Draw a panel for each task, with a line for each table row: before and after training.

    Tasks and metrics are never averaged, because their figures do not mean the same. Each row has a
    line of its own, so that no run hides another.
    """
    names = short_names(row.model for row in rows if row.method != COMMONEST)
    labels = [row_label(row, names) for row in rows if row.method != COMMONEST]
    tasks = list(rows[0].cells)
    n_columns = min(len(tasks), N_PANELS)
    n_rows = math.ceil(len(tasks) / n_columns)
    # The rows are equally far apart, so each of them needs the height of the longest label.
    n_lines = len(labels) * max(label.count("\n") + 1.5 for label in labels)
    figure.set_figheight(n_rows * (PANEL_HEIGHT + LINE_HEIGHT * n_lines) + LEGEND_HEIGHT)
    figure.set_figwidth(max(SIZE[0], LABEL_INCHES + n_columns * PANEL_WIDTH))
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flatten()
    for ax, task in zip(axes, tasks, strict=False):
        draw_task(ax, rows, task)
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)  # the first row of the table is at the top

    legend = {}
    for ax in axes[: len(tasks)]:
        handles, texts = ax.get_legend_handles_labels()
        legend |= dict(zip(texts, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))


def row_label(row, names):
    # A flag stays beside its value.
    label = re.sub(r"(?<!,) ", NO_BREAK, f"{names[row.model]}: {row.method}")
    text = textwrap.fill(label, ROW_LABEL_WIDTH, break_on_hyphens=False).replace(NO_BREAK, " ")
    return drawable(f"{text}\n{row.n_trainable:,} parameters")


def drawable(text):
    """Return a text for matplotlib, with "?" for bytes of file names that are not UTF-8."""
    return text.encode(errors="replace").decode()


def draw_task(ax, rows, task):
    """Draw the results of all table rows on one task."""
    trained = [row for row in rows if row.method != COMMONEST]
    metric = ""
    for place, row in enumerate(trained):
        cell = row.cells[task]
        if is_unknown(cell.median):
            continue
        metric = cell.metric
        ax.plot([cell.before, cell.median], [place, place], color="C0", linewidth=1, alpha=0.5)
        ax.plot(cell.before, place, "o", color="C0", mfc="white", label="before training")
        distances = [[cell.median - cell.low], [cell.high - cell.median]]
        ax.errorbar(
            cell.median,
            place,
            xerr=np.nan_to_num(distances),
            fmt="o",
            color="C0",
            capsize=3,
            label="result (bar: interquartile range)",
        )
    for row in rows:
        share = row.cells[task].median
        if row.method == COMMONEST and not is_unknown(share):
            ax.axvline(share, color="C1", linestyle="--", label="always the commonest label")
    ax.set(title=drawable(shown_task(task)), xlabel=axis_label(metric or "result"))
    ax.margins(x=0.1)


def axis_label(metric):
    """Return what an axis of a metric's values says, as `shown_values` gives them."""
    if metric == INVERSE_PERPLEXITY:
        return "perplexity (lower is better)"
    return f"{metric} (%)"


def draw_curves(figure, results):
    """Draw loss and held-out results by step and by time.

    A line is the median of all results with the same label, and the band shows their quartiles.
    Lines on top are thinner or have gaps, so that they do not hide a line with the same values.
    """
    models = short_names(result.model for result in results)
    titles = sorted({f"{models[result.model]}, {result.task}" for result in results})
    groups = {}
    for result in results:
        label = result.label
        if len(titles) > 1:
            label = f"{models[result.model]}, {result.task}: {label}"
        groups.setdefault(label, []).append(result)

    if len(titles) == 1:
        figure.suptitle(drawable(titles[0]))
    panels = curve_panels(results)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for i, (label, group) in enumerate(groups.items()):
        layer = i % len(LINE_STYLES)
        style = {
            "color": f"C{i}",
            "linestyle": LINE_STYLES[layer],
            "zorder": 2 + layer,
            "linewidth": np.interp(i, (0, len(groups)), WIDTHS),
            "label": drawable(f"{label} (runs: {len(group)})"),
        }
        for row, curve_of in zip(axes, panels.values(), strict=True):
            draw_group(row, list(map(curve_of, group)), group, style)
    for row, quantity in zip(axes, panels, strict=True):
        row[0].set(xlabel="step", ylabel=quantity)
        row[1].set(xlabel="time (s); in a grid, one adapter's share", ylabel=quantity)
    figure.set_figheight(max(SIZE[1], CURVE_HEIGHT * len(panels)))
    add_legend(figure, axes[:, 0])


def curve_panels(results):
    """Return a dict from what a row of panels shows to a function from a result to its curve there.

    There is a row for each sum of losses (--losses), and for each metric, because others cannot be
    compared. A result has an empty curve in the rows of others.
    """
    sums = sorted({losses_of(result) for result in results})
    metrics = sorted({result.metric for result in results if len(result.held_out_curve)})
    panels = {}
    for names in sums:
        quantity = f"training loss ({names})" if len(sums) > 1 else "training loss"
        panels[quantity] = partial(loss_curve, names)
    for metric in metrics:
        panels[f"held-out {axis_label(metric)}"] = partial(held_out_curve, metric)
    return panels


def loss_curve(names, result):
    return result.loss_curve if losses_of(result) == names else NO_CURVE


def held_out_curve(metric, result):
    """Return the held-out curve, (N, 2), with the values that the table shows."""
    if result.metric != metric:
        return NO_CURVE
    steps, values = result.held_out_curve.T
    return np.stack([steps, shown_values(values, metric)], axis=1)


def losses_of(result):
    return result.flags.get("losses", "")


def draw_group(axes, curves, results, style):
    """Draw the median of curves over steps on the left, and over seconds on the right."""
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return
    steps, low, median, high = quartiles(curves)
    seconds_per_step = np.median([result.seconds / result.n_steps for result in results])
    for ax, x in ((axes[0], steps), (axes[1], steps * seconds_per_step)):
        ax.plot(x, median, **style)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def quartiles(curves):
    """Return all steps of the curves (N, 2), and their quartiles there.

    A curve is interpolated between its steps, and does not count outside of them: its run may have
    stopped early.
    """
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = []
    for curve in curves:
        values.append(np.interp(steps, curve[:, 0], curve[:, 1], left=np.nan, right=np.nan))
    low, median, high = np.nanpercentile(values, (25, 50, 75), axis=0)
    return steps, low, median, high


def add_legend(figure, axes):
    """Put a legend of the lines of some axes below all axes. The figure grows by its height."""
    lines = {}
    for ax in axes:
        lines |= {line.get_label(): line for line in ax.lines}
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in lines]
    n_columns = 2
    if max(map(len, labels)) > LABEL_WIDTH / 2:
        n_columns = 1
    n_lines = sum(label.count("\n") + 1 for label in labels) / n_columns
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * n_lines)
    figure.legend(lines.values(), labels, loc="outside lower center", ncols=n_columns)


# What adapters learned


def draw_learned(figure, vectors):
    """Draw the quantiles of an adapter's vectors by layer, a panel per site of the block.

    The last panel lists the entries that are furthest from 1, which is where training began.
    """
    sites = group_by_site(vectors)
    n_rows = len(sites) // N_PANELS + 1  # the list needs a panel, too
    figure.set_figheight(2.2 * n_rows)
    ax = None
    for i, (site, layers) in enumerate(sites.items(), 1):
        ax = figure.add_subplot(
            n_rows, N_PANELS, i, sharey=ax, title=site, xlabel="layer", ylabel="entries"
        )
        draw_quantiles(ax, layers)
    ax = figure.add_subplot(n_rows, N_PANELS, len(sites) + 1, frame_on=False, xticks=[], yticks=[])
    text = "line: median\nbands: 50% and 90%\ndots: extremes\n\nfurthest from 1:\n"
    text += "\n".join(furthest_entries(vectors))
    ax.text(0, 1, text, va="top", family="monospace", size=7)


def group_by_site(vectors):
    """Return site -> layer -> vector, in the order of the model: the encoder comes first.

    The vector `encoder.3.attn.l_k` is of the site `encoder.attn.l_k`, in layer 3.
    """

    def place(name):
        return name.startswith("decoder"), int(name.split(".")[-3]), name

    sites = {}
    for name in sorted(vectors, key=place):
        *stack, layer, module, vector = name.split(".")
        site = ".".join([*stack, module, vector])
        sites.setdefault(site, {})[int(layer)] = vectors[name]
    return sites


def draw_quantiles(ax, layers):
    numbers = list(layers)
    quantiles = np.quantile(list(layers.values()), (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1), axis=1)
    least, low_90, low_50, median, high_50, high_90, most = quantiles
    ax.plot(numbers, median, "C0.-", markersize=3)
    ax.plot(numbers, least, "C1.", markersize=3)
    ax.plot(numbers, most, "C1.", markersize=3)
    for low, high in ((low_90, high_90), (low_50, high_50)):
        ax.fill_between(numbers, low, high, color="C0", alpha=0.25, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)


def furthest_entries(vectors):
    """Return a line for each of the entries that are furthest from 1."""
    entries = []
    for name, vector in vectors.items():
        for i, value in enumerate(vector):
            entries.append((-abs(value - 1), f"{value:.3f} {name}[{i}]"))
    return [line for _, line in sorted(entries)[:N_FURTHEST]]


def draw_similarity(figure, adapters):
    """Draw the cosine of the angle between the changes l - 1 of each pair of adapters."""
    cosines = compare_changes(list(adapters.values()))
    side = np.clip(3 + 0.36 * len(adapters), 5.5, 16)  # inches
    figure.set_size_inches(side + 2.5, side)
    ax = figure.add_subplot()
    image = ax.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", zorder=2)
    figure.colorbar(image, label="cosine of l - 1")
    names = list(map(drawable, adapters))
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    if len(adapters) > MOST_NUMBERED:
        return
    for (i, j), cosine in np.ndenumerate(cosines):
        color = "white" if abs(cosine) > 0.6 else "black"
        ax.text(j, i, f"{cosine:.2f}", ha="center", va="center", size=7, color=color)


def compare_changes(adapters):
    """Return (N, N), the cosines of l - 1. A vector that an adapter lacks counts as unchanged."""
    widths = {}
    for vectors in adapters:
        for name, vector in vectors.items():
            widths[name] = len(vector)
    changes = []
    for vectors in adapters:
        full = [vectors.get(name, np.ones(width)) for name, width in widths.items()]
        changes.append(np.concatenate(full) - 1)
    changes = np.array(changes)
    norms = np.linalg.norm(changes, axis=1, keepdims=True)
    changes /= np.maximum(norms, 1e-12)  # an adapter of ones has no direction
    return changes @ changes.T
