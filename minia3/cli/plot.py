"""To be written."""

import os
import textwrap
from pathlib import Path

import numpy as np

from minia3.adapters.peft_files import read_adapter
from minia3.cli.results import read_results
from minia3.cli.table import short_names, table_rows
from minia3.files.read import reading
from minia3.files.write import replacing

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
TITLES = {"train": "loss in training", "eval": "held-out accuracy (%)"}


def plot(folders, out):
    """Draw runs (see table.read) as .png files in `out`: yields paths, and a note. ValueError also: no matplotlib."""
    with reading("plot", extra="plot"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    (runs, note), models = read_results(folders), {}
    trained = [run for run in runs if len(run["train"])]
    pictures = [("accuracy", accuracy, table_rows(folders)[0]), ("curves", curves, trained)]
    top = os.path.commonpath([run["folder"].resolve().parent for run in runs])
    for run in {
        run["adapter"]: run for run in runs if run["method"] == "ia3" and run["trainable"]
    }.values():
        name = "-".join(
            x
            for x in run["adapter"].resolve().relative_to(top).parts
            if x not in ("adapter", "adapters")
        )
        found = read_adapter(run["adapter"]).vectors.items()
        models.setdefault(run["model"], {})[name] = {
            key.replace("blocks.", ""): x.numpy() for key, x in found
        }
        pictures.append((f"learned-{name}", learned, models[run["model"]][name]))
    names = {
        model: name.strip("/").replace("/", "-") for model, name in short_names(models).items()
    }
    pictures += [
        (f"similarity-{names[model]}", similarity, x) for model, x in models.items() if len(x) > 1
    ]
    for name, draw, what in (picture for picture in pictures if picture[2]):
        with rc_context(STYLE), replacing(Path(out, f"{name}.png")) as temporary:
            draw(
                figure := Figure(figsize=(8, 5.5), dpi=200, layout="constrained"), what
            )  # inches: 1600 pixels wide
            figure.savefig(temporary, format="png")
        yield str(Path(out, f"{name}.png"))
    yield from [note] if note else []


def accuracy(figure, rows):
    """By trainable numbers, of each row of the table the medians and interquartile ranges, and the mean over tasks."""
    ax = figure.add_subplot(
        xlabel="trainable numbers", ylabel="accuracy (%); bars: interquartile range"
    )
    names = short_names(row["model"] for row in rows)
    for i, row in enumerate(rows):
        tasks = [key for key in row if f"{key} IQR" in row and row[key] == row[key]]
        x, medians, bars = (
            row["trainable"],
            [row[task] for task in tasks],
            [row[f"{task} IQR"] / 2 for task in tasks],
        )
        ax.errorbar([x] * len(tasks), medians, bars, fmt=".", color=f"C{i}", alpha=0.6)
        label = f"{names[row['model']]}: {row['method']} (tasks: {len(tasks)})"
        ax.plot(x, np.mean(medians), "D", color=f"C{i}", label=label)
    ticks = sorted({row["trainable"] for row in rows})
    ax.set_xscale("symlog", linthresh=min(filter(None, ticks), default=1))
    ax.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=45)
    ax.set_ylim(top=min(ax.get_ylim()[1], 101))
    legend(figure, ax)


def curves(figure, runs):
    """Loss and held-out accuracy by step and by time (a cell's share): of like runs the median, both quartiles."""
    groups, shown = {}, [key for key in TITLES if any(len(run[key]) for run in runs)]
    names = short_names(run["model"] for run in runs)
    titles = sorted({f"{names[run['model']]}, {run['task']}" for run in runs})
    for run in runs:
        title = f"{names[run['model']]}, {run['task']}: " * (len(titles) > 1)
        groups.setdefault(title + run["label"], []).append(run)
    figure.suptitle(titles[0] if len(titles) == 1 else "")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for i, (label, group) in enumerate(groups.items()):
        speed = np.median([run["seconds"] / run["steps"] for run in group])
        for row, key in zip(axes, shown, strict=True):
            if lines := [run[key].T[:2] for run in group if len(run[key])]:
                x = np.unique(np.concatenate([steps for steps, _ in lines]))
                y = [
                    np.interp(x, *line, left=np.nan, right=np.nan) for line in lines
                ]  # none where a run has ended
                low, middle, high = np.nanpercentile(y, (25, 50, 75), axis=0)
                for ax, title, scale in zip(
                    row, ("step", "time (s); in a grid, its share"), (1, speed), strict=True
                ):
                    style, of = (
                        {"color": f"C{i}", "ls": "-" if i < 10 else "--"},
                        f"{label} (runs: {len(group)})",
                    )
                    ax.plot(x * scale, middle, label=of, **style)
                    ax.fill_between(x * scale, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
                    ax.set(xlabel=title, ylabel=TITLES[key])
    legend(figure, axes[0, 0])


def legend(figure, ax):
    """Below the axes, as wide as its labels want; the figure grows by its height."""
    lines, labels = ax.get_legend_handles_labels()
    labels = [textwrap.fill(label, 100) for label in labels]
    columns = 1 if max(map(len, labels)) > 50 else 2
    height = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.16 * height)  # inches
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)


def learned(figure, vectors):
    """The distribution of each vector by layer, a site a panel, and the entries that are furthest from 1."""
    sites, ax = {}, None
    for name in sorted(
        vectors, key=lambda name: (name.startswith("decoder"), int(name.split(".")[-3]), name)
    ):
        *stack, layer, module, site = name.split(".")
        sites.setdefault(".".join([*stack, module, site]), {})[int(layer)] = vectors[name]
    figure.set_figheight(2.2 * (n_rows := len(sites) // 3 + 1))
    for i, (site, layers) in enumerate(sites.items(), 1):
        ax = figure.add_subplot(
            n_rows, 3, i, sharey=ax, title=site, xlabel="layer", ylabel="entries"
        )
        x, q = (
            [*layers],
            np.quantile([*layers.values()], (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1), axis=1),
        )
        ax.plot(x, q[3], "C0.-", x, q[0], "C1.", x, q[6], "C1.", markersize=3)
        for n in (1, 2):
            ax.fill_between(x, q[n], q[6 - n], color="C0", alpha=0.25, linewidth=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
    entries = sorted(
        (-abs(x - 1), f"{x:.3f} {name}[{i}]")
        for name in vectors
        for i, x in enumerate(vectors[name])
    )
    text = "line: median\nbands: 50 % and 90 %\ndots: extremes\n\nfurthest from 1:\n"
    ax = figure.add_subplot(n_rows, 3, len(sites) + 1, frame_on=False, xticks=[], yticks=[])
    ax.text(
        0,
        1,
        text + "\n".join(line for _, line in entries[:8]),
        va="top",
        family="monospace",
        size=7,
    )


def similarity(figure, some):
    """The cosine of the angle between l - 1 of each two adapters; of more than 36, the colours alone."""
    ones = {
        name: np.ones_like(vector) for vectors in some.values() for name, vector in vectors.items()
    }
    changes = np.array(
        [np.concatenate([*(ones | vectors).values()]) - 1 for vectors in some.values()]
    )
    changes /= np.maximum(np.linalg.norm(changes, axis=1, keepdims=True), 1e-12)
    cosines, side = changes @ changes.T, np.clip(3 + 0.36 * len(some), 5.5, 16)  # inches
    figure.set_size_inches(side + 2.5, side)
    ax = figure.add_subplot()
    figure.colorbar(
        ax.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", zorder=2), label="cosine of l - 1"
    )
    ax.set_xticks(range(len(some)), some, rotation=90)
    ax.set_yticks(range(len(some)), some)
    for (i, j), x in np.ndenumerate(cosines) if len(some) <= 36 else ():
        ax.text(
            j,
            i,
            f"{x:.2f}",
            ha="center",
            va="center",
            size=7,
            color="white" if abs(x) > 0.6 else "black",
        )
