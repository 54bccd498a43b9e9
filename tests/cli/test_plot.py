"""Guards the pictures: which pictures are drawn for which runs, that they show the numbers of the
files, and that a missing matplotlib is reported with the extra to install."""

import json
import os
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from run_folders import make_run, write_metrics

from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.cli.plot import (
    DPI,
    SIZE,
    choose_pictures,
    draw_accuracy,
    draw_curves,
    draw_learned,
    draw_similarity,
    plot,
)
from minia3.cli.results import read_results
from minia3.cli.table import COMMONEST, Cell, Row, make_rows

figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")
colors = pytest.importorskip("matplotlib.colors")
agg = pytest.importorskip("matplotlib.backends.backend_agg")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds with held-out evaluations, the base alone, and a run that was not finished."""
    folder = tmp_path_factory.mktemp("plots") / "runs"
    for seed in (0, 1):
        flags = {"seed": seed, "steps": 12, "eval_every": 4, "lr": 0.1}
        assert running.run(running.words(folder / f"ia3-{seed}", **flags)) == 0
    assert running.run(running.words(folder / "none", method="none")) == 0
    shutil.copytree(folder / "none", folder / "begun").joinpath("metrics.jsonl").unlink()
    return folder


def drawn(draw, data):
    new = figure.Figure()
    draw(new, data)
    return new


def change_final(folder, **changes):
    """Change the final line of a run."""
    *lines, final = running.metrics(folder)
    write_metrics(folder, [*lines, final | changes])


def names_of_pictures(*folders):
    """Return which pictures `plot` would draw."""
    return [picture.name for picture in choose_pictures(folders)[0]]


# Which pictures


def test_dollar_signs_in_names_and_flags_begin_no_formula(tmp_path):
    make_run(tmp_path / "a", task="$a_$", input="pay $ {x} \\frac $ now")
    make_run(tmp_path / "b", task="$a_$", input="{x}")
    path, _ = plot([tmp_path], tmp_path)  # and a note that the adapters are not there
    assert path == str(tmp_path / "accuracy.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_of_files_that_are_not_utf8_are_drawn(runs, tmp_path):
    task = os.fsdecode(b"caf\xe9")  # Latin-1, as from an old archive
    for name in ("a", "b"):
        shutil.copytree(runs / "ia3-0", tmp_path / f"{task}-{name}")
        change_final(tmp_path / f"{task}-{name}", task=f"{task}-{name}")
    pictures = list(plot([tmp_path / f"{task}-a"], tmp_path / "one"))
    assert len(pictures) == 3
    pictures = list(plot([tmp_path], tmp_path / "both"))
    assert len(pictures) == 5  # with the similarity


@pytest.mark.slow
def test_each_picture_is_a_png_and_a_note_reports_what_is_left_out(runs, tmp_path):
    *paths, note = plot([runs], tmp_path / "new")
    similarity = f"similarity-{running.model('t5').name}"
    names = ["accuracy", "curves", "learned-ia3-0", "learned-ia3-1", similarity]
    assert paths == [str(tmp_path / "new" / f"{name}.png") for name in names]
    files = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in files] == [f"{name}.png" for name in names]
    for path in files:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        n_pixels = int.from_bytes(content[16:20], "big")
        assert n_pixels == 1600
    assert str(runs / "begun") in note


def test_the_picture_of_very_many_rows_has_a_lower_resolution(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.cli.plot.MOST_PIXELS", 2000)
    for i in range(30):
        make_run(tmp_path / "runs" / str(i), lr=0.001 * (i + 1))
    path, _ = plot([tmp_path / "runs"], tmp_path)
    content = Path(path).read_bytes()
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width < height <= 2000


def test_without_training_there_are_no_curves_and_one_adapter_has_no_similarity(runs):
    assert names_of_pictures(runs / "none") == ["accuracy"]
    assert names_of_pictures(runs / "ia3-1") == ["accuracy", "curves", "learned-ia3-1"]


def test_a_run_that_trained_nothing_has_no_adapter_to_draw(tmp_path):
    assert running.run(running.words(tmp_path / "run", "--eval-only")) == 0
    assert names_of_pictures(tmp_path / "run") == ["accuracy"]


def test_adapters_whose_folders_are_gone_are_left_out_with_a_note(runs, tmp_path, monkeypatch):
    """From inside the folder, such a path has the form of an id on the hub: "ia3-0/adapter"."""
    for name in ("ia3-0", "ia3-1"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.rmtree(tmp_path / "ia3-0" / "adapter")
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", None)
    monkeypatch.chdir(tmp_path)
    pictures, note = choose_pictures(["ia3-0", "ia3-1"])
    assert [picture.name for picture in pictures] == ["accuracy", "curves", "learned-ia3-1"]
    assert note == "1 not drawn, because these folders are not there: ia3-0/adapter"


def test_each_adapter_of_a_grid_has_a_picture(runs, tmp_path):
    grid = tmp_path / "grid"
    shutil.copytree(runs / "ia3-0", grid)
    (grid / "adapters").mkdir()
    *lines, final = running.metrics(grid)
    for task in ("cb", "rte"):
        shutil.copytree(grid / "adapter", grid / "adapters" / f"{task}-s0")
        lines.append(final | {"adapter": f"{task}-s0", "task": task})
    shutil.rmtree(grid / "adapter")
    write_metrics(grid, lines)
    assert names_of_pictures(grid)[2:4] == ["learned-grid-cb-s0", "learned-grid-rte-s0"]


def test_adapters_of_different_folders_keep_apart_if_their_names_are_equal(runs, tmp_path):
    shutil.copytree(runs / "ia3-0", tmp_path / "x-s0")
    shutil.copytree(runs / "ia3-1", tmp_path / "x")
    (tmp_path / "x" / "adapters").mkdir()
    (tmp_path / "x" / "adapter").rename(tmp_path / "x" / "adapters" / "s0")
    change_final(tmp_path / "x", adapter="s0")
    *lines, final = running.metrics(tmp_path / "x")
    lines = [line for line in lines if line["event"] not in ("train", "eval")]
    write_metrics(tmp_path / "x", [*lines, final])
    names = [name for name in names_of_pictures(tmp_path) if "learned" in name]
    assert names == ["learned-x-s0", "learned-x-s0-2"]


def test_adapters_that_are_links_to_another_disk_are_drawn(runs, tmp_path):
    shutil.copytree(runs / "ia3-0", tmp_path / "runs" / "linked")
    (tmp_path / "disk").mkdir()
    adapter = tmp_path / "runs" / "linked" / "adapter"
    adapter.rename(tmp_path / "disk" / "moved")
    adapter.symlink_to(tmp_path / "disk" / "moved")
    assert names_of_pictures(tmp_path / "runs") == ["accuracy", "curves", "learned-linked"]


def test_a_mixture_has_one_picture_of_its_adapter(runs, tmp_path):
    mixture = tmp_path / "mixture"
    shutil.copytree(runs / "ia3-0", mixture)
    config = json.loads((mixture / "config.json").read_text())
    changes = {"task": ["cb", "rte"], "adapters": "one"}
    (mixture / "config.json").write_text(json.dumps(config | changes))
    *lines, final = running.metrics(mixture)
    write_metrics(mixture, [*lines, final | {"task": "cb"}, final | {"task": "rte"}])
    assert names_of_pictures(mixture) == ["accuracy", "curves", "learned-mixture"]


def test_two_models_of_the_same_name_have_a_picture_of_similarity_each(runs, tmp_path):
    for i in (0, 1):
        for seed in (0, 1):
            folder = tmp_path / f"{i}-{seed}"
            shutil.copytree(runs / f"ia3-{seed}", folder)
            change_final(folder, model=f"base-{i}/t5")
    names = [name for name in names_of_pictures(tmp_path) if "similarity" in name]
    assert names == ["similarity-base-0-t5", "similarity-base-1-t5"]


def test_adapters_of_two_models_are_not_compared(runs, tmp_path):
    for i, model in enumerate(("a/one", "b/two")):
        shutil.copytree(runs / "ia3-0", tmp_path / "runs" / str(i))
        change_final(tmp_path / "runs" / str(i), model=model)
    vectors = read_adapter(runs / "ia3-0" / "adapter").vectors
    wider = {name: torch.ones(len(vector) + 1) for name, vector in vectors.items()}
    write_adapter(tmp_path / "runs" / "1" / "adapter", wider)
    names = names_of_pictures(tmp_path / "runs")
    assert names == ["accuracy", "curves", "learned-0", "learned-1"]


def test_a_missing_matplotlib_is_one_line_with_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^plot: .*pip install 'minia3\[plot\]'$"):
        next(plot([runs], tmp_path))


# Accuracy and curves


def table_row(n_trainable, method="ia3", **cells):
    costs = {"flops_per_example": 1.0, "flops_to_train": 1.0, "megabytes": 1.0}
    all_cells = {"a": Cell(), "b (f1)": Cell(), **cells}
    return Row("m", method, all_cells, np.nan, 1, n_trainable, **costs)


def points(ax, marker_face):
    """Return the (x, y) of the markers of one kind: before training, or the results."""
    found = []
    for line in ax.lines:
        if line.get_marker() == "o" and line.get_markerfacecolor() == marker_face:
            found.append((float(line.get_xdata()[0]), float(line.get_ydata()[0])))
    return found


def test_accuracy_has_a_panel_per_task_and_a_line_per_row_and_averages_nothing():
    first = table_row(5, a=Cell(60.0, 57.0, 61.0, 50.0, "accuracy"))
    both = {
        "a": Cell(60.0, before=50.0, metric="accuracy"),
        "b (f1)": Cell(80.0, 79.0, 81.0, 20.0, "f1"),
    }
    second = table_row(1000, "lora", **both)
    baseline = table_row(0, COMMONEST, a=Cell(55.0))
    ax, other = drawn(draw_accuracy, [baseline, first, second]).axes
    assert (ax.get_title(), ax.get_xlabel()) == ("a", "accuracy (%)")
    assert (other.get_title(), other.get_xlabel()) == ("b (f1)", "f1 (%)")
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "m: ia3\n5 parameters",
        "m: lora\n1,000 parameters",
    ]
    # The two results are equal, and neither hides the other.
    assert points(ax, "C0") == [(60, 0), (60, 1)]
    assert points(ax, "white") == [(50, 0), (50, 1)]
    assert points(other, "C0") == [(80, 1)]
    assert points(other, "white") == [(20, 1)]
    bar = ax.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0].tolist() == [57, 61]  # from one quartile to the other
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [55]
    assert not [line for line in other.lines if line.get_linestyle() == "--"]


def test_the_bar_of_seeds_that_are_nearly_perfect_ends_at_100(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.75, 1.0, 1.0, 1.0)):
        make_run(tmp_path / f"run-{seed}", [{"accuracy": accuracy, "seed": seed}])
    (ax,) = drawn(draw_accuracy, make_rows(read_results([tmp_path])[0])).axes
    bar = ax.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0].tolist() == [75, 100]


def test_old_runs_without_a_result_before_training_are_drawn_without_it(tmp_path):
    make_run(tmp_path / "run", [{"trainable": 0}], method="none")
    (picture,) = choose_pictures([tmp_path])[0]
    new = figure.Figure()
    picture.draw(new)
    assert points(new.axes[0], "C0") == [(50, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("n_tasks", [1, 2, 7])
@pytest.mark.parametrize("n_short", [0, 5])
def test_labels_of_many_rows_do_not_overlap(n_tasks, n_short):
    cells = {f"task {i}": Cell(50.0 + i, before=40.0, metric="accuracy") for i in range(n_tasks)}
    method = "ia3, " + ", ".join(f"flag_{i} {i}" for i in range(8))
    costs = {"flops_per_example": 1.0, "flops_to_train": 1.0, "megabytes": 1.0}
    methods = ["lora"] * n_short + [method] * (9 - n_short)
    rows = [Row("model", methods[i], cells, np.nan, 1, i, **costs) for i in range(9)]
    new = figure.Figure(layout="constrained")
    draw_accuracy(new, rows)
    new.draw_without_rendering()
    boxes = [label.get_window_extent() for label in new.axes[0].get_yticklabels()]
    assert len(boxes) == 9
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)


def test_held_out_results_of_different_metrics_have_different_axes(runs):
    first, second = read_results([runs / "ia3-0", runs / "ia3-1"])[0]
    second.metric = "f1"
    second.task = "other"
    axes = np.reshape(drawn(draw_curves, [first, second]).axes, (3, 2))
    labels = [ax.get_ylabel() for ax in axes[:, 0]]
    assert labels == ["training loss", "held-out accuracy (%)", "held-out f1 (%)"]
    assert [len(ax.lines) for ax in axes[:, 0]] == [2, 1, 1]


def test_sums_of_other_losses_have_axes_of_their_own(runs):
    (result,), _ = read_results([runs / "ia3-0"])
    other = replace(result, label="ia3, losses lm", flags=result.flags | {"losses": "lm"})
    new = drawn(draw_curves, [result, other])
    axes = np.reshape(new.axes, (3, 2))
    labels = [ax.get_ylabel() for ax in axes[:, 0]]
    expected = ["training loss (lm)", "training loss (lm,ul,ln)", "held-out accuracy (%)"]
    assert labels == expected
    assert [len(ax.lines) for ax in axes[:, 0]] == [1, 1, 2]
    assert len(new.legends[0].get_texts()) == 2


def test_equal_curves_show_because_the_upper_ones_have_gaps_or_are_thinner(runs):
    (result,), _ = read_results([runs / "ia3-0"])
    results = [replace(result, label=f"ia3, lr {i}") for i in range(4)]
    lines = drawn(draw_curves, results).axes[0].lines
    widths = [line.get_linewidth() for line in lines]
    assert sorted(widths, reverse=True) == widths
    assert len(set(widths)) == 4
    assert [line.get_linestyle() for line in lines] == ["-", "--", ":", "-"]
    heights = [line.get_zorder() for line in lines]
    assert heights[0] == heights[3] < heights[1] < heights[2]


def test_equal_curves_have_each_its_color_in_the_picture(runs):
    """In pixels: five curves with the same values."""
    (result,), _ = read_results([runs / "ia3-0"])
    results = [replace(result, label=f"ia3, lr {i}") for i in range(5)]
    new = figure.Figure(SIZE, DPI, layout="constrained")
    draw_curves(new, results)
    new.legends[0].remove()
    canvas = agg.FigureCanvasAgg(new)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int).reshape(-1, 3)
    for i in range(5):
        color = np.round(np.array(colors.to_rgb(f"C{i}")) * 255)
        n_pixels = (np.abs(pixels - color).max(axis=1) <= 1).sum()
        assert n_pixels > 100, i


def test_held_out_curves_show_the_perplexity_and_not_its_inverse(runs):
    (result,), _ = read_results([runs / "ia3-0"])
    curve = np.array([[4, 1.0], [8, 2.0]])  # in per cent
    perplexities = replace(result, metric="inverse_perplexity", held_out_curve=curve)
    new = drawn(draw_curves, [result, perplexities])
    axes = np.reshape(new.axes, (3, 2))
    expected = ["training loss", "held-out accuracy (%)", "held-out perplexity (lower is better)"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == expected
    assert axes[2, 0].lines[0].get_xydata().tolist() == [[4, 100], [8, 50]]


def test_curves_are_medians_over_runs_by_step_and_by_time(runs):
    first, second = read_results([runs / "ia3-0", runs / "ia3-1"])[0]
    axes = np.reshape(drawn(draw_curves, [first, second]).axes, (2, 2))
    curves = [
        (first.loss_curve, second.loss_curve),
        (first.held_out_curve, second.held_out_curve),
    ]
    for row, (curve, other) in zip(axes, curves, strict=True):
        by_step, by_time = (ax.lines[0] for ax in row)
        assert by_step.get_xdata().tolist() == curve[:, 0].tolist()
        np.testing.assert_allclose(by_step.get_ydata(), (curve[:, 1] + other[:, 1]) / 2)
        assert by_time.get_ydata().tolist() == by_step.get_ydata().tolist()
        seconds_per_step = (first.seconds + second.seconds) / 2 / 12
        expected = seconds_per_step * by_step.get_xdata()[-1]
        assert by_time.get_xdata()[-1] == pytest.approx(expected)


def test_a_curve_follows_the_runs_that_have_not_ended(runs):
    ended, other = read_results([runs / "ia3-0", runs / "ia3-1"])[0]
    ended.loss_curve = ended.loss_curve[:1]
    line = drawn(draw_curves, [ended, other]).axes[0].lines[0]
    assert line.get_xdata().tolist() == other.loss_curve[:, 0].tolist()
    assert line.get_ydata()[-1] == other.loss_curve[-1, 1]


def test_a_legend_wraps_long_labels_and_the_figure_grows(runs):
    (result,), _ = read_results([runs / "ia3-0"])
    height = drawn(draw_curves, [result]).get_figheight()
    flags = ", ".join(f"flag{i} {i}" for i in range(30))
    new = drawn(draw_curves, [replace(result, label=f"ia3, {flags}")])
    (text,) = new.legends[0].get_texts()
    assert text.get_text().replace("\n", " ") == f"ia3, {flags} (runs: 1)"
    assert max(map(len, text.get_text().splitlines())) <= 100
    assert new.get_figheight() > height


@pytest.mark.parametrize("n", [10, 11])
def test_rows_and_curves_beyond_the_tenth_are_told_apart_without_color(runs, n):
    (result,), _ = read_results([runs / "ia3-0"])
    results = [replace(result, label=f"ia3, lr {i}") for i in range(n)]
    lines = drawn(draw_curves, results).axes[0].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == n


# What adapters learned


def test_learned_shows_quantiles_in_the_order_of_layers_and_the_furthest_entries():
    vectors = {f"{i}.attn.l_k": np.linspace(1, 1 + i, 101) for i in (0, 10, 2)}
    vectors["0.ffn.l_ff"] = np.ones(7)
    vectors["0.ffn.l_ff"][3] = -20
    first, second, text = drawn(draw_learned, vectors).axes
    assert [first.get_title(), second.get_title()] == ["attn.l_k", "ffn.l_ff"]
    median, least, most = first.lines
    assert median.get_xdata().tolist() == [0, 2, 10]
    np.testing.assert_allclose(median.get_ydata(), [1, 2, 6])
    np.testing.assert_allclose(least.get_ydata(), 1)
    np.testing.assert_allclose(most.get_ydata(), [1, 3, 11])
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in first.collections]
    np.testing.assert_allclose(tops, [10.5, 8.5])  # of 95% and 75% of the entries of layer 10
    legend, _, furthest = text.texts[0].get_text().partition("furthest from 1:\n")
    assert "bands: 50% and 90%\n" in legend
    expected = ["-20.000 0.ffn.l_ff[3]", "11.000 10.attn.l_k[100]", "10.900 10.attn.l_k[99]"]
    assert furthest.splitlines()[:3] == expected


def test_the_panels_of_the_encoder_come_before_the_panels_of_the_decoder():
    names = ("decoder.0.cross.l_k", "decoder.0.attn.l_k", "encoder.0.ffn.l_ff")
    vectors = {name: np.ones(3) for name in names}
    titles = [ax.get_title() for ax in drawn(draw_learned, vectors).axes]
    assert titles == ["encoder.ffn.l_ff", "decoder.attn.l_k", "decoder.cross.l_k", ""]


def test_similarity_is_the_cosine_of_the_changes_and_a_missing_vector_is_no_change():
    adapters = {
        "first": {"0.attn.l_k": np.array([2.0, 1.0]), "0.attn.l_v": np.array([2.0])},
        "second": {"0.attn.l_k": np.array([1.0, 3.0])},
        "third": {"0.attn.l_v": np.array([-4.0])},
        "base": {"0.attn.l_k": np.ones(2)},
    }
    cosines = drawn(draw_similarity, adapters).axes[0].images[0].get_array().filled(np.nan)
    half = 0.5**0.5
    expected = [[1, 0, -half, 0], [0, 1, 0, 0], [-half, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosines, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 12, 36, 37])
def test_the_cosines_do_not_overlap_and_many_adapters_have_colors_only(n):
    new = figure.Figure(layout="constrained")  # as `plot` makes it: names take room from the axes
    vector = np.ones(2)
    adapters = {f"methods-ia3-same-colour-s{i}": {"0.attn.l_k": vector * i} for i in range(n)}
    draw_similarity(new, adapters)
    new.draw_without_rendering()
    texts = new.axes[0].texts
    assert len(texts) == (n * n if n <= 36 else 0)
    boxes = [text.get_window_extent() for text in texts[:n]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
