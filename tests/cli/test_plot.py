"""Guards the pictures: which are drawn of which runs, that what they show are the numbers of the files, and that one
without matplotlib is told which extra to install."""

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import running
import torch

from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.cli.plot import accuracy, curves, learned, plot, similarity
from minia3.cli.results import read_results

figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds with measurements on held-out rows, the base alone, and one that was not finished."""
    folder = tmp_path_factory.mktemp("plots") / "runs"
    for seed in (0, 1):
        assert (
            running.run(running.words(folder / f"ia3-{seed}", seed=seed, eval_every=4, lr=0.1)) == 0
        )
    assert running.run(running.words(folder / "none", method="none")) == 0
    shutil.copytree(folder / "none", folder / "begun").joinpath("metrics.jsonl").unlink()
    return folder


def drawn(draw, what):
    new = figure.Figure()
    draw(new, what)
    return new


def test_each_picture_is_a_png_and_a_note_tells_what_is_left_out(runs, tmp_path):
    *paths, note = plot([runs], tmp_path / "new")
    names = [
        "accuracy",
        "curves",
        "learned-ia3-0",
        "learned-ia3-1",
        f"similarity-{running.model('t5').name}",
    ]
    assert paths == [str(tmp_path / "new" / f"{name}.png") for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"{name}.png" for name in names
    ]
    for path in (tmp_path / "new").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20], "big") == 1600  # pixels wide
    assert str(runs / "begun") in note


def test_without_training_there_is_no_curve_and_of_one_adapter_no_similarity(runs, tmp_path):
    assert [*plot([runs / "none"], tmp_path)] == [str(tmp_path / "accuracy.png")]
    names = [path.rpartition("/")[2] for path in plot([runs / "ia3-1"], tmp_path)]
    assert names == ["accuracy.png", "curves.png", "learned-ia3-1.png"]


def test_a_run_that_trained_nothing_has_no_adapter_to_draw(tmp_path):
    assert running.run(running.words(tmp_path / "run", "--eval-only")) == 0
    assert [*plot([tmp_path / "run"], tmp_path)] == [str(tmp_path / "accuracy.png")]


def test_the_adapters_of_a_grid_each_have_a_picture(runs, tmp_path):
    grid = tmp_path / "grid"
    shutil.copytree(runs / "ia3-0", grid)
    (grid / "adapters").mkdir()
    *lines, final = running.metrics(grid)
    for cell in ("cb-s0", "rte-s0"):
        shutil.copytree(grid / "adapter", grid / "adapters" / cell)
        lines.append(final | {"adapter": cell, "task": cell[:-3]})
    shutil.rmtree(grid / "adapter")
    (grid / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = [path.rpartition("/")[2] for path in plot([grid], tmp_path / "out")]
    assert names[2:4] == ["learned-grid-cb-s0.png", "learned-grid-rte-s0.png"]


def test_models_of_one_name_have_a_picture_of_similarity_each(runs, tmp_path):
    for i in (0, 1):
        for seed in (0, 1):
            folder = tmp_path / f"{i}-{seed}"
            shutil.copytree(runs / f"ia3-{seed}", folder)
            *lines, final = running.metrics(folder)
            lines.append(final | {"model": f"base-{i}/t5"})
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
    names = [path.rpartition("/")[2] for path in plot([tmp_path], tmp_path / "out")]
    assert [name for name in names if "similarity" in name] == [
        "similarity-base-0-t5.png",
        "similarity-base-1-t5.png",
    ]


def test_a_legend_has_each_label_whole(runs):
    flags = ", ".join(f"flag{i} {i}" for i in range(30))
    new = drawn(
        curves, [run | {"label": f"ia3, {flags}"} for run in read_results([runs / "ia3-0"])[0]]
    )
    (text,) = new.legends[0].get_texts()
    assert text.get_text().replace("\n", " ") == f"ia3, {flags} (runs: 1)"
    assert max(map(len, text.get_text().splitlines())) <= 100
    assert new.get_figheight() > drawn(curves, read_results([runs / "ia3-0"])[0]).get_figheight()


def test_no_matplotlib_is_a_line_with_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^plot: .*pip install 'minia3\[plot\]'$"):
        next(plot([runs], tmp_path))


def test_curves_are_medians_over_runs_by_step_and_by_time(runs):
    some, _ = read_results([runs / "ia3-0", runs / "ia3-1"])
    axes = np.reshape(drawn(curves, some).axes, (2, 2))
    for row, key in zip(axes, ("train", "eval"), strict=True):
        by_step, by_time = (ax.lines[0] for ax in row)
        assert by_step.get_xdata().tolist() == some[0][key][:, 0].tolist()
        np.testing.assert_allclose(
            by_step.get_ydata(), (some[0][key][:, 1] + some[1][key][:, 1]) / 2
        )
        assert by_time.get_ydata().tolist() == by_step.get_ydata().tolist()
        seconds = (some[0]["seconds"] + some[1]["seconds"]) / 2
        assert by_time.get_xdata()[-1] == pytest.approx(
            seconds * by_step.get_xdata()[-1] / 12
        )  # of 12 steps


def test_a_curve_goes_on_by_the_runs_that_have_not_ended(runs):
    one, other = read_results([runs / "ia3-0", runs / "ia3-1"])[0]
    one["train"] = one["train"][:1]
    line = drawn(curves, [one, other]).axes[0].lines[0]
    assert line.get_xdata().tolist() == other["train"][:, 0].tolist()
    assert line.get_ydata()[-1] == other["train"][-1, 1]


def test_accuracy_shows_each_row_s_tasks_and_their_mean():
    row = {
        "model": "m",
        "method": "ia3",
        "a": 60.0,
        "a IQR": 4.0,
        "b": 80.0,
        "b IQR": np.nan,
        "c": np.nan,
        "c IQR": np.nan,
    }
    ax = drawn(accuracy, [row | {"trainable": 5}, row | {"trainable": 0, "a": 10.0}]).axes[0]
    means = [line for line in ax.lines if line.get_marker() == "D"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in means] == [(5, 70), (0, 45)]
    assert means[0].get_label() == "m: ia3 (tasks: 2)"
    tasks = ax.containers[0]
    assert tasks.lines[0].get_ydata().tolist() == [60, 80]
    assert tasks.lines[2][0].get_segments()[0][:, 1].tolist() == [
        58,
        62,
    ]  # as long as the interquartile range


def test_learned_shows_quantiles_in_the_order_of_layers_and_the_furthest_entries():
    vectors = {f"{i}.attn.l_k": np.linspace(1, 1 + i, 101) for i in (0, 10, 2)} | {
        "0.ffn.l_ff": np.ones(7)
    }
    vectors["0.ffn.l_ff"][3] = -20
    first, second, text = drawn(learned, vectors).axes
    assert [first.get_title(), second.get_title()] == ["attn.l_k", "ffn.l_ff"]
    middle, least, most = first.lines
    assert middle.get_xdata().tolist() == [0, 2, 10]
    np.testing.assert_allclose(middle.get_ydata(), [1, 2, 6])
    np.testing.assert_allclose(least.get_ydata(), 1)
    np.testing.assert_allclose(most.get_ydata(), [1, 3, 11])
    bands = [{*np.round(band.get_paths()[0].vertices[:, 1], 6)} for band in first.collections]
    assert [max(band) for band in bands] == [10.5, 8.5]  # 95 % and 75 % of layer 10
    furthest = text.texts[0].get_text().partition("furthest from 1:\n")[2].splitlines()
    assert furthest[:3] == [
        "-20.000 0.ffn.l_ff[3]",
        "11.000 10.attn.l_k[100]",
        "10.900 10.attn.l_k[99]",
    ]


def test_the_encoder_s_panels_come_before_the_decoder_s():
    vectors = {
        f"{x}": np.ones(3)
        for x in ("decoder.0.cross.l_k", "decoder.0.attn.l_k", "encoder.0.ffn.l_ff")
    }
    titles = [ax.get_title() for ax in drawn(learned, vectors).axes]
    assert titles == ["encoder.ffn.l_ff", "decoder.attn.l_k", "decoder.cross.l_k", ""]


def test_similarity_is_the_cosine_of_the_changes_and_a_vector_that_is_not_there_is_no_change():
    some = {
        "one": {"0.attn.l_k": np.array([2.0, 1.0]), "0.attn.l_v": np.array([2.0])},
        "other": {"0.attn.l_k": np.array([1.0, 3.0])},
        "third": {"0.attn.l_v": np.array([-4.0])},
        "base": {"0.attn.l_k": np.ones(2)},
    }
    cosines = drawn(similarity, some).axes[0].images[0].get_array().filled(np.nan)
    half = 0.5**0.5
    expected = [[1, 0, -half, 0], [0, 1, 0, 0], [-half, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosines, expected, atol=1e-12)


@pytest.mark.parametrize("n", [2, 12, 36, 37])
def test_the_numbers_of_similarity_lie_apart_and_of_many_adapters_there_are_none(n):
    new = figure.Figure(layout="constrained")  # as `plot` has it: names take their room
    similarity(
        new, {f"methods-ia3-same-colour-s{i}": {"0.attn.l_k": np.ones(2) * i} for i in range(n)}
    )
    new.draw_without_rendering()
    boxes = [text.get_window_extent() for text in new.axes[0].texts[:n]]
    assert len(new.axes[0].texts) == (n * n if n <= 36 else 0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_adapters_of_two_models_are_not_compared(runs, tmp_path):
    for i, model in enumerate(("a/one", "b/two")):
        shutil.copytree(runs / "ia3-0", tmp_path / "runs" / str(i))
        path = tmp_path / "runs" / str(i) / "metrics.jsonl"
        *lines, final = running.metrics(path.parent)
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in [*lines, final | {"model": model}])
        )
    vectors = read_adapter(runs / "ia3-0" / "adapter").vectors
    write_adapter(
        tmp_path / "runs" / "1" / "adapter",
        {name: torch.ones(len(x) + 1) for name, x in vectors.items()},
    )
    names = [path.rpartition("/")[2] for path in plot([tmp_path / "runs"], tmp_path / "out")]
    assert names == ["accuracy.png", "curves.png", "learned-0.png", "learned-1.png"]
