"""Guards the paper's table: the medians over seeds, which results share a row, the order of rows
and columns, and the text that is printed."""

import csv
import io
import subprocess
import sys

import numpy as np
import pytest
from run_folders import TRAIN, make_run

from minia3.cli.main import main
from minia3.cli.table import format_csv, format_markdown, table_rows

# Cells


def test_a_cell_is_the_median_and_interquartile_range_over_seeds(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.625, 0.875)):
        make_run(tmp_path / str(seed), [{"accuracy": accuracy}], seed=seed)
    (row,), note = table_rows([tmp_path])
    assert (row.cells["rte"].median, row.cells["rte"].iqr) == (62.5, 18.75)
    assert (row.average, row.n_runs, note) == (62.5, 3, "")


def test_prompts_that_differ_are_no_spread_of_the_seeds(tmp_path):
    """All seeds have the same median over the prompts."""
    for seed in range(3):
        prompts = {"accuracies": [0.125, 0.5, 0.75 + seed / 16], "accuracy": 0.5}
        prompts |= {"accuracies_before": [0.0, 0.25, 1.0], "accuracy_before": 0.25}
        make_run(tmp_path / str(seed), [prompts], seed=seed)
    (row,), _ = table_rows([tmp_path])
    cell = row.cells["rte"]
    assert (cell.median, cell.iqr, cell.before) == (50, 0, 25)


def test_prompts_of_a_single_seed_have_no_interquartile_range(tmp_path):
    make_run(tmp_path / "a", [{"accuracies": [0.25, 0.5, 0.75]}])
    (row,), _ = table_rows([tmp_path])
    assert row.cells["rte"].median == 50
    assert np.isnan(row.cells["rte"].iqr)


def test_a_row_without_one_of_the_tasks_has_no_average(tmp_path):
    make_run(tmp_path / "ia3-rte", task="rte")
    make_run(tmp_path / "ia3-copa", [{"accuracy": 0.75}], task="copa")
    make_run(tmp_path / "lora-rte", [{"accuracy": 0.6, "trainable": 500}], method="lora")
    (ia3, lora), _ = table_rows([tmp_path])
    assert (ia3.average, lora.cells["rte"].median) == (62.5, 60)
    unknown = [lora.average, lora.cells["copa"].median, lora.cells["copa"].iqr]
    assert np.isnan([*unknown, ia3.cells["copa"].iqr]).all()


def test_metrics_are_not_averaged(tmp_path):
    finals = [{"task": "rte", "commonest": 0.5}]
    finals.append({"task": "raft/x", "metric": "macro_f1", "commonest": 0.3})
    make_run(tmp_path / "run", finals, task=["rte", "raft/x"], adapters="one")
    rows, _ = table_rows([tmp_path])
    assert len(rows) == 2
    assert np.isnan([row.average for row in rows]).all()


def test_the_table_shows_the_perplexity_and_not_its_inverse(tmp_path):
    finals = [{"task": "chats", "metric": "inverse_perplexity", "accuracy": 0.08}]
    finals[0] |= {"accuracy_before": 0.05}
    make_run(tmp_path / "a", finals, task="chats")
    make_run(tmp_path / "b", [finals[0] | {"accuracy": 0.1}], task="chats", seed=1)
    rows, _ = table_rows([tmp_path])
    assert rows[0].cells["chats (inverse_perplexity)"].before == 20
    lines = format_markdown(rows).splitlines()
    assert "| chats (perplexity) |" in lines[0]
    assert "|       11.25 (1.25) |" in lines[2]  # of 12.5 and 10
    assert format_csv(rows).startswith("model,method,chats (perplexity),chats (perplexity) IQR,")


def test_tasks_are_in_the_paper_s_order_and_the_others_follow_by_name(tmp_path):
    for i, task in enumerate(("sst2", "anli-r1", "boolq", "rte", "copa")):
        make_run(tmp_path / str(i), task=task)
    make_run(tmp_path / "cb", [{"split": "other rows"}], task="cb")
    make_run(tmp_path / "raft", [{"metric": "macro_f1"}], task="raft/overruling")
    expected = ["copa", "rte", "cb (other rows)", "anli-r1"]
    expected += ["boolq", "raft/overruling (macro_f1)", "sst2"]
    (row,), _ = table_rows([tmp_path])
    assert list(row.cells) == expected
    make_run(tmp_path / "other rte", task="rte", seed=1, data={"rte/train.jsonl": "ab"})
    (row,), _ = table_rows([tmp_path])
    names = [name.partition(" [")[0] for name in row.cells]
    assert names == ["copa", "rte", *expected[1:]]


# Rows


def test_results_with_the_same_label_share_a_row(tmp_path):
    make_run(tmp_path / "a", shots=4)
    make_run(tmp_path / "b", shots=256)
    make_run(tmp_path / "c", shots=16)
    make_run(tmp_path / "d")  # all rows
    make_run(tmp_path / "e", task="cb")  # all rows, so it shares the row
    rows, _ = table_rows([tmp_path])
    expected = ["ia3", "ia3, shots 4", "ia3, shots 16", "ia3, shots 256"]
    assert [row.method for row in rows] == expected
    assert [np.isnan(row.cells["cb"].median) for row in rows] == [False, True, True, True]


def test_a_lora_that_trains_on_is_not_called_by_the_flags_of_a_new_one(tmp_path):
    make_run(tmp_path / "a", [{"trainable": 500}], method="lora", rank=4, where="q")
    make_run(tmp_path / "b", [{"trainable": 500}], method="lora", rank=16, where="q")
    make_run(tmp_path / "c", [{"trainable": 500}], method="lora", adapter="a/adapter", rank=8)
    rows, _ = table_rows([tmp_path])
    labels = [row.method for row in rows]
    assert sum("rank" in label for label in labels) == 2, "c has the rank of a"
    assert not any("rank 8" in label for label in labels)


def test_a_grid_is_one_row_even_if_shots_differ_on_one_of_its_tasks(tmp_path):
    finals = [{"task": task, "adapter": task} for task in ("rte", "cb")]
    make_run(tmp_path / "grid", finals, task=["rte", "cb"], shots=8)
    make_run(tmp_path / "other", task="rte", shots=16)
    grid, other = table_rows([tmp_path])[0]
    assert [grid.method, other.method] == ["ia3, shots 8", "ia3, shots 16"]
    assert [grid.cells["rte"].median, grid.cells["cb"].median] == [50, 50]
    assert (grid.n_runs, other.n_runs) == (2, 1)


def test_a_mixture_is_a_row_with_a_cell_for_each_task(tmp_path):
    finals = [{"task": "rte", "accuracy": 0.5}, {"task": "copa", "accuracy": 0.75}]
    make_run(tmp_path / "run", finals, [TRAIN], task=["rte", "copa"], adapters="one")
    (row,), _ = table_rows([tmp_path])
    assert [row.cells["rte"].median, row.cells["copa"].median] == [50, 75]
    assert (row.average, row.n_runs) == (62.5, 1)


def test_a_run_that_was_made_longer_is_another_one(tmp_path):
    make_run(tmp_path / "a", steps=20)
    make_run(tmp_path / "b", [{"extended_from": [5, 10]}], steps=20)
    rows, note = table_rows([tmp_path])
    assert [row.method for row in rows] == ["ia3", "ia3, extended from 5 and 10"]
    assert note == ""


def test_a_run_that_was_made_longer_says_so_even_if_no_other_differs(tmp_path):
    make_run(tmp_path / "a", steps=20)
    make_run(tmp_path / "b", [{"extended_from": [5]}], method="lora", steps=20)
    rows, _ = table_rows([tmp_path])
    assert [row.method for row in rows] == ["ia3", "lora, extended from 5"]


def test_a_base_that_was_only_evaluated_has_the_method_none(tmp_path):
    untrained = [{"trainable": 0}]
    make_run(tmp_path / "a", untrained, eval_only=True, adapter=None)
    make_run(tmp_path / "b", untrained, eval_only=True, adapter="x")
    make_run(tmp_path / "c", untrained, eval_only=True, adapter=None, method="icl")
    make_run(tmp_path / "d", untrained, adapter="y", method="none")
    rows, _ = table_rows([tmp_path])
    expected = ["icl", "none", "ia3, adapter x", "none, adapter y"]  # and not like `none` alone
    assert [row.method for row in rows] == expected


def test_one_adapter_of_a_single_task_is_no_mixture(tmp_path):
    make_run(tmp_path / "a", adapters="one")
    make_run(tmp_path / "b", adapters="each", task="cb")
    rows, _ = table_rows([tmp_path])
    assert [row.method for row in rows] == ["ia3"]
    make_run(tmp_path / "c", task=["rte", "cb"], adapters="one", finals=[{}, {"task": "cb"}])
    rows, _ = table_rows([tmp_path])
    assert [row.method for row in rows] == ["ia3, adapters each", "ia3, adapters one"]


def test_evaluations_in_different_words_are_different_results(tmp_path):
    untrained = [{"trainable": 0, "method": "none"}]
    flags = ({"chat_template": "a.jinja"}, {"chat_template": "b.jinja"}, {"input": "{text}"})
    for i, changed in enumerate(flags):
        make_run(tmp_path / str(i), untrained, method="none", **changed)
    rows, note = table_rows([tmp_path])
    assert (len(rows), note) == (3, "")


def test_runs_with_different_chat_templates_have_the_same_data(tmp_path):
    for digest in ("a", "b"):
        data = {"chats.jsonl": "d", "--chat-template": digest}
        make_run(tmp_path / digest, data=data, chat_template=f"{digest}.jinja")
    first, second = table_rows([tmp_path])[0]
    assert list(first.cells) == ["rte"]
    assert [first.method, second.method] == [
        f"ia3, chat-template {digest}.jinja" for digest in ("a", "b")
    ]


def test_where_metrics_are_sent_and_how_steps_were_counted_make_no_other_row(tmp_path):
    make_run(tmp_path / "a", seed=0, log_to=None, epochs=None)
    make_run(tmp_path / "b", seed=1, log_to="wandb", epochs=2.0)
    rows, _ = table_rows([tmp_path])
    assert [row.method for row in rows] == ["ia3"]


def test_where_a_base_is_kept_and_whether_it_was_checked_make_no_other_row(tmp_path):
    usual = {"shard": None, "offload": False, "check_weights": False}
    for seed, changed in enumerate(({"shard": 2}, {"offload": True}, {"check_weights": True})):
        make_run(tmp_path / str(seed), seed=seed, **usual | changed)
    rows, note = table_rows([tmp_path])
    assert [(row.method, row.n_runs) for row in rows] == [("ia3", 3)]
    assert note == ""


def test_rows_are_sorted_by_model_and_trainable_parameters(tmp_path):
    for i, (model, n) in enumerate([("b", 5), ("a", 200), ("a", 0)]):
        make_run(tmp_path / str(i), [{"trainable": n}], model=model)
    found = [(row.model, row.n_trainable) for row in table_rows([tmp_path])[0]]
    assert found == [("a", 0), ("a", 200), ("b", 5)]


def test_rows_of_one_method_are_sorted_by_the_numbers_in_their_flags(tmp_path):
    for i, (lr, shots) in enumerate([(1e-2, 4), (1e-3, 128), (3e-3, 4), (1e-3, 16), (1e-5, 4)]):
        make_run(tmp_path / str(i), lr=lr, shots=shots)
    found = [row.method.partition(", ")[2] for row in table_rows([tmp_path])[0]]
    assert found == [
        "lr 1e-05, shots 4",
        "lr 0.001, shots 16",
        "lr 0.001, shots 128",
        "lr 0.003, shots 4",
        "lr 0.01, shots 4",
    ]


def test_costs_are_medians(tmp_path):
    for i, tokens in enumerate((10.0, 20.0, 90.0)):
        line = TRAIN | {"tokens_per_second": tokens * TRAIN["examples_per_second"]}
        make_run(tmp_path / str(i), [{"tokens": tokens}], [line], seed=i)
    (row,), _ = table_rows([tmp_path])
    assert row.flops_per_example == 1000 * 20
    n_examples = 20 * 8
    assert row.flops_to_train == 3 * 1000 * 20 * n_examples


def test_the_first_row_has_the_share_of_the_commonest_label_of_each_task(tmp_path):
    make_run(tmp_path / "a", [{"commonest": 0.6}], seed=0)
    make_run(tmp_path / "b", [{"commonest": 0.5}], seed=1)  # another fold
    make_run(tmp_path / "b2", [{"commonest": 0.5}], seed=2)
    make_run(tmp_path / "c", task="cb")  # of an older version
    baseline, row = table_rows([tmp_path])[0]
    assert (baseline.method, baseline.n_runs) == ("commonest label", 0)
    assert baseline.cells["rte"].median == pytest.approx(50)
    assert np.isnan(baseline.cells["cb"].median)
    assert np.isnan(baseline.average)
    assert row.method == "ia3"
    *_, line, _ = format_markdown([baseline, row]).splitlines()
    assert line.startswith("| -     | commonest label |")
    make_run(tmp_path / "d", [{"commonest": 0.75}], task="cb", seed=1)
    baseline = table_rows([tmp_path])[0][0]
    assert baseline.average == pytest.approx((50 + 75) / 2)


def test_a_cell_knows_the_result_before_training_and_the_metric(tmp_path):
    finals = [{"accuracy_before": 0.25, "metric": "f1"}]
    make_run(tmp_path / "a", finals, seed=0)
    make_run(tmp_path / "b", [{**finals[0], "accuracy_before": 0.75}], seed=1)
    make_run(tmp_path / "c", finals, seed=2)
    (row,), _ = table_rows([tmp_path])
    assert (row.cells["rte (f1)"].before, row.cells["rte (f1)"].metric) == (25, "f1")


# Text


@pytest.fixture
def rows(tmp_path):
    make_run(tmp_path / "a", [{"accuracy": 0.5}], [TRAIN], seed=0)
    make_run(tmp_path / "b", [{"accuracy": 0.625}], [TRAIN], seed=1)
    make_run(tmp_path / "c", [{"trainable": 0}], model="nano", method="none", task="cb")
    for name in "ab":
        (tmp_path / name / "adapter").mkdir()
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(bytes(400))
    return table_rows([tmp_path])[0]


def test_markdown_is_aligned_and_has_dashes_for_unknown_values(rows):
    assert format_markdown(rows) == (
        "| model | method |        rte |   cb | average | runs | trainable "
        "| FLOPs/example | FLOPs to train |    MB |\n"
        "| ----- | ------ | ---------: | ---: | ------: | ---: | --------: "
        "| ------------: | -------------: | ----: |\n"
        "| m     | ia3    | 56.2 (6.2) |    - |       - |    2 |       100 "
        "|       2.5e+04 |        1.2e+07 | 0.000 |\n"
        "| nano  | none   |          - | 50.0 |       - |    1 |         0 "
        "|       2.5e+04 |              - | 0.000 |\n"
    )


def test_a_row_of_markdown_is_a_line_whatever_the_flags_are(tmp_path):
    make_run(tmp_path / "a", input="{text} | {from}\ngood?", task="a|b")
    make_run(tmp_path / "b", input="{text}", task="a|b")
    lines = format_markdown(table_rows([tmp_path])[0]).splitlines()
    assert len(lines) == 4
    assert "a\\|b" in lines[0]
    assert "input {text} \\| {from}\\ngood?" in lines[3]


def test_csv_has_all_digits_and_empty_texts_for_unknown_values(rows):
    header, ia3, none = csv.reader(io.StringIO(format_csv(rows)))
    costs = ["average", "runs", "trainable", "FLOPs/example", "FLOPs to train", "MB"]
    assert header == ["model", "method", "rte", "rte IQR", "cb", "cb IQR", *costs]
    assert ia3[:6] == ["m", "ia3", "56.25", "6.25", "", ""]
    assert ia3[6:] == ["", "2", "100", "25000.0", "12000000.0", "0.0004"]
    assert none[:6] == ["nano", "none", "", "", "50.0", ""]
    assert none[6:] == ["", "1", "0", "25000.0", "", "0.0"]


def test_a_note_does_not_stand_among_the_values_of_csv(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", finals=(), lines=[TRAIN])
    assert main(["table", "--csv", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "1 left out, because metrics.jsonl has no result" in err


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (("a/one", "b/c/two"), ["one", "two"]),
        (("a/one", "b/one"), ["a/one", "b/one"]),
        ((".", "a/one"), [".", "one"]),
    ],
)
def test_a_model_is_shown_with_its_folders_if_two_models_have_the_same_name(
    models, shown, tmp_path
):
    for i, model in enumerate(models):
        make_run(tmp_path / str(i), model=model)
    rows, _ = table_rows([tmp_path])
    lines = format_markdown(rows).splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ").strip() for line in lines] == shown
    _, *lines = csv.reader(io.StringIO(format_csv(rows)))
    assert [line[0] for line in lines] == list(models)


@pytest.mark.slow
def test_the_table_does_not_import_torch():
    code = "import sys, minia3.cli.table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
