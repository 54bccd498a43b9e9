"""Guards the paper's table: the published FLOPs, the medians over seeds and prompts, what a row is called, what is left
out, and that a folder which is no run, or a damaged file of one, is told in one line."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import running

from minia3.cli.results import read_results
from minia3.cli.table import table_rows, table_text
from minia3.model.costs import flops

CONFIG = {
    "model": "m",
    "task": "rte",
    "method": "ia3",
    "seed": 0,
    "batch_size": 8,
    "lr": 0.003,
    "shots": None,
}
FINAL = {
    **{
        "event": "final",
        "model": "m",
        "task": "rte",
        "method": "ia3",
        "metric": "accuracy",
        "accuracy": 0.5,
    },
    **{"trainable": 100, "total": 1000, "steps": 20, "seconds": 2.0},
    **{"architecture": "T5", "tokens": 25.0, "split": "validation"},
}
TRAIN = {
    "event": "train",
    "step": 20,
    "loss": 1.0,
    "examples_per_second": 4.0,
    "tokens_per_second": 100.0,
}


def make(folder, finals=({},), lines=(), **config):
    """A run's folder: its flags, and of each final line, as they differ from the ones above."""
    folder.mkdir(parents=True)
    own = {key: value for key, value in config.items() if key in ("model", "task", "method")}
    lines = [*lines, *(FINAL | own | final for final in finals)]
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def labels(folder):
    return [run["label"] for run in read_results([folder])[0]]


# FLOPs


def digits(x):
    return f"{x:.1e}"


def test_flops_are_those_that_the_paper_publishes():
    """With the round numbers of parameters of its text: T0 has 11.135e9, which would round the second to 2.8e16."""
    assert digits(flops(11e9, 103, decoder_only=False)) == "1.1e+12"
    assert digits(flops(11e9, 103 * 8 * 1000, decoder_only=False, training=True)) == "2.7e+16"
    # 41 shots of 98 tokens, which have the right choice alone, and then 103 with all choices, as T-Few's example has
    assert digits(flops(175e9, 41 * 98 + 103, decoder_only=True)) == "1.4e+15"


def test_training_takes_three_times_as_much_and_a_decoder_alone_twice():
    each = [flops(7, 5, only, training) for only in (False, True) for training in (False, True)]
    assert each == [35, 105, 70, 210]


@pytest.mark.parametrize(("architecture", "n"), [("T5", 1), ("Llama", 2)])
def test_flops_of_a_run_follow_from_its_mean_tokens_an_example(tmp_path, architecture, n):
    """Of those that are measured 17, of those that train in 5 steps 10 tokens, then in 15 steps 30: 25."""
    lines = [TRAIN | {"step": 5, "tokens_per_second": 40.0}, TRAIN | {"tokens_per_second": 120.0}]
    make(tmp_path / "run", [{"architecture": architecture, "tokens": 17.0}], lines)
    (row,), _ = table_rows([tmp_path])
    assert row["FLOPs/example"] == n * 1000 * 17
    assert row["FLOPs to train"] == 3 * n * 1000 * 25 * 8 * 20


def test_an_older_run_that_did_not_count_its_tokens_has_all_but_that(tmp_path):
    folder = make(tmp_path / "run", lines=[TRAIN])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del lines[-1]["tokens"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,), _ = table_rows([tmp_path])
    assert (row["rte"], row["FLOPs to train"]) == (50, 3 * 1000 * 25 * 8 * 20)
    assert np.isnan(row["FLOPs/example"])


def test_what_is_not_trained_costs_nothing_to_train_that_is_known(tmp_path):
    make(tmp_path / "run", [{"tokens": 200.0}], method="icl")
    (row,), _ = table_rows([tmp_path])
    assert row["FLOPs/example"] == 1000 * 200
    assert np.isnan(row["FLOPs to train"])


# Cells


def test_a_cell_is_the_median_and_interquartile_range_over_seeds_and_prompts(tmp_path):
    make(tmp_path / "a", [{"accuracies": [0.1, 0.2, 0.6]}], seed=0)
    make(tmp_path / "b", [{"accuracies": [0.7, 0.8]}], seed=1)
    (row,), note = table_rows([tmp_path])
    assert (row["rte"], row["rte IQR"], row["average"], row["runs"], note) == (
        60,
        pytest.approx(50),
        60,
        2,
        "",
    )


def test_an_average_is_there_where_all_tasks_are(tmp_path):
    for task, accuracy in (("rte", 0.5), ("copa", 0.75)):
        make(tmp_path / f"ia3-{task}", [{"accuracy": accuracy}], task=task)
    make(tmp_path / "lora-rte", [{"accuracy": 0.6, "trainable": 500}], method="lora")
    (ia3, lora), _ = table_rows([tmp_path])
    assert (ia3["average"], lora["rte"]) == (62.5, 60)
    assert np.isnan([lora["average"], lora["copa"], lora["copa IQR"], ia3["copa IQR"]]).all()


def test_tasks_stand_in_the_paper_s_order_and_others_behind_by_name_with_their_metric(tmp_path):
    for i, task in enumerate(("sst2", "anli-r1", "boolq", "rte", "copa")):
        make(tmp_path / str(i), task=task)
    make(tmp_path / "cb", [{"split": "some others"}], task="cb")
    make(tmp_path / "raft", [{"metric": "macro_f1"}], task="raft/overruling")
    names = [
        name.removesuffix(" IQR") for name in table_rows([tmp_path])[0][0] if name.endswith(" IQR")
    ]
    assert names == [
        "copa",
        "rte",
        "cb (some others)",
        "anli-r1",
        "boolq",
        "raft/overruling (macro_f1)",
        "sst2",
    ]


def test_megabytes_are_those_of_the_files(tmp_path):
    for name, method in (("adapter", "ia3"), ("adapter", "lora"), ("model", "full")):
        folder = make(tmp_path / method, method=method) / name
        folder.mkdir()
        for i in (1, 2):
            (folder / f"{i}.safetensors").write_bytes(bytes(1000 * i * len(method)))
        (folder / "README.md").write_text("not counted")
    make(tmp_path / "gone", method="ia3", lr=1.0)
    make(tmp_path / "none", [{"trainable": 0}], method="none")
    found = {row["method"]: row["MB"] for row in table_rows([tmp_path])[0]}
    expected = {
        "ia3, lr 0.003": 0.009,
        "lora": 0.012,
        "full": 0.012,
        "ia3, lr 1.0": np.nan,
        "none": 0,
    }
    assert found == pytest.approx(expected, nan_ok=True)


# Rows


def test_a_row_names_the_flags_in_which_runs_of_its_method_differ(tmp_path):
    make(tmp_path / "a", losses="lm", out="x", seed=1)
    make(
        tmp_path / "b",
        losses="lm,ul,ln",
        out="y",
        data_dir="elsewhere",
        git_commit="abc",
        versions={"torch": "3"},
    )
    make(tmp_path / "c", [{"trainable": 9}], method="lora", lr=0.1)
    assert labels(tmp_path) == ["ia3, losses lm", "ia3, losses lm,ul,ln", "lora"]


def test_budgets_that_differ_between_methods_are_told(tmp_path):
    make(tmp_path / "a", steps=1000)
    make(tmp_path / "b", [{"trainable": 9}], method="lora", steps=150)
    assert labels(tmp_path) == ["ia3, steps 1000", "lora, steps 150"]


def test_a_flag_that_an_older_run_lacks_makes_no_other_row(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", sites="k,v,ff", seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]


@pytest.mark.parametrize(
    "flag", ["save_every", "micro_batch_size", "eval_batch_size", "checkpoint", "out"]
)
def test_a_flag_that_leaves_results_as_they_are_names_no_row(tmp_path, flag):
    make(tmp_path / "a", **{flag: 1})
    make(tmp_path / "b", **{flag: 2}, seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]


def test_shots_name_a_row_where_they_differ_within_a_task(tmp_path):
    make(tmp_path / "paper" / "a", task="rte", shots=32)
    make(tmp_path / "paper" / "b", task="hellaswag", shots=20)
    assert labels(tmp_path / "paper") == ["ia3", "ia3"]
    make(tmp_path / "study" / "a", shots=4)
    make(tmp_path / "study" / "b", shots=256)
    make(tmp_path / "study" / "c", shots=16)
    assert [row["method"] for row in table_rows([tmp_path / "study"])[0]] == [
        f"ia3, shots {n}" for n in (4, 16, 256)
    ]
    make(tmp_path / "study" / "d")  # all rows: and so is another task, whose row it shares
    make(tmp_path / "study" / "e", task="cb")
    found = [(row["method"], row["cb"] == row["cb"]) for row in table_rows([tmp_path / "study"])[0]]
    assert found[0] == ("ia3", True)
    assert [x[0] for x in found[1:]] == [f"ia3, shots {n}" for n in (4, 16, 256)]


def test_a_grid_is_one_row_though_shots_differ_on_one_of_its_tasks(tmp_path):
    finals = [{"task": task, "adapter": task} for task in ("rte", "cb")]
    make(tmp_path / "grid", finals, task=["rte", "cb"], shots=8)
    make(tmp_path / "other", task="rte", shots=16)
    found = {row["method"]: (row["rte"], row["cb"]) for row in table_rows([tmp_path])[0]}
    assert found["ia3, shots 8"] == (50, 50)
    assert found.keys() == {"ia3, shots 8", "ia3, shots 16"}


def test_the_prompts_that_measured_name_a_row_where_they_differ(tmp_path):
    make(tmp_path / "a", eval_prompt="0")
    make(tmp_path / "b", [{"accuracies": [0.5, 0.6]}], eval_prompt="all")
    assert labels(tmp_path) == ["ia3, eval_prompt 0", "ia3, eval_prompt all"]


def test_flags_of_training_name_nothing_that_is_only_measured(tmp_path):
    make(tmp_path / "a", [{"trainable": 0}], method="none", lr=1.0, shots=4, steps=9)
    make(tmp_path / "b", [{"trainable": 0}], method="none", seed=1)
    make(tmp_path / "c", [{"trainable": 0}], method="icl", lr=1.0, shots=4)
    make(tmp_path / "d", [{"trainable": 0}], method="icl", shots=8)
    make(tmp_path / "e", [{"trainable": 0}], adapter="x")
    make(tmp_path / "f", [{"trainable": 0}], adapter="y")
    assert [*dict.fromkeys(labels(tmp_path))] == [
        "none",
        "icl, shots 4",
        "icl, shots 8",
        "ia3, adapter x",
        "ia3, adapter y",
    ]


def test_other_rows_under_the_same_name_are_another_column(tmp_path):
    """Whatever path they were typed by: the checksums tell, in a grid by the task's folder."""
    data = [
        {"rows.jsonl": "aa"},
        {"rows.jsonl": "bb"},
        {"rows/rows.jsonl": "aa", "cb/train.jsonl": "cc"},
    ]
    for i, (task, digests) in enumerate(
        zip(("a/rows.jsonl", "a/rows.jsonl", ["./a/rows.jsonl", "cb"]), data, strict=True)
    ):
        make(
            tmp_path / str(i),
            [{"task": "rows", "adapter": "x"}],
            task=task,
            data=digests,
            seed=i,
            adapters="each",
        )
    make(tmp_path / "cb", task="cb", data={"train.jsonl": "cc"})
    one, other, again, cb = (run["task"] for run in read_results([tmp_path])[0])
    assert one == again != other
    assert one.startswith("rows [")
    assert cb == "cb"


def test_the_same_files_in_another_order_are_the_same_data(tmp_path):
    make(tmp_path / "a", data={"train.jsonl": "aa", "test.jsonl": "bb"})
    make(tmp_path / "b", data={"test.jsonl": "bb", "train.jsonl": "aa"}, seed=1)
    assert [run["task"] for run in read_results([tmp_path])[0]] == ["rte", "rte"]


def test_what_is_measured_on_published_splits_is_another_column(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", [{"split": "other published shots"}])
    assert [run["task"] for run in read_results([tmp_path])[0]] == [
        "rte",
        "rte (other published shots)",
    ]


def test_mixtures_of_other_tasks_are_other_rows(tmp_path):
    for tasks in (["rte", "cb"], ["rte", "copa"]):
        make(tmp_path / tasks[1], [{"task": task} for task in tasks], task=tasks, adapters="one")
    assert {*labels(tmp_path)} == {"ia3, mixture rte+cb", "ia3, mixture rte+copa"}


def test_rows_stand_by_model_and_trainable_numbers(tmp_path):
    for i, (model, n) in enumerate([("b", 5), ("a", 200), ("a", 0)]):
        make(tmp_path / str(i), [{"trainable": n}], model=model)
    assert [(row["model"], row["trainable"]) for row in table_rows([tmp_path])[0]] == [
        ("a", 0),
        ("a", 200),
        ("b", 5),
    ]


def test_each_adapter_of_a_grid_is_a_run_with_its_own_task_rate_and_lines(tmp_path):
    lines = [
        TRAIN | {"step": 10, "adapter": "raft/x-lr0.1"},
        TRAIN | {"adapter": "cb-lr0.2"},
        TRAIN | {"step": 5},
    ]
    finals = [
        {
            "adapter": "raft/x-lr0.1",
            "task": "raft/x",
            "lr": 0.1,
            "seed": 0,
            "accuracies": [0.25, 0.75],
        },
        {"adapter": "cb-lr0.2", "task": "cb", "lr": 0.2, "seed": 0},
    ]
    make(tmp_path / "grid", finals, lines, task="raft/x,cb", lr="0.1,0.2")
    x, cb = read_results([tmp_path])[0]
    assert [x["label"], cb["label"]] == ["ia3, lr 0.1", "ia3, lr 0.2"]
    assert [x["task"], cb["task"]] == ["raft/x", "cb"]
    assert [x["adapter"].name, cb["adapter"].name] == ["raft-x-lr0.1", "cb-lr0.2"]
    assert [x["train"][:, 0].tolist(), cb["train"][:, 0].tolist()] == [[10, 5], [20, 5]]
    assert x["accuracies"].tolist() == [25, 75]
    assert [x["seconds"], cb["seconds"]] == [1.0, 1.0]  # of 2 that both took


# What is read


def test_runs_without_a_final_line_are_counted(tmp_path):
    make(tmp_path / "done")
    make(tmp_path / "begun", finals=[], lines=[TRAIN])
    make(tmp_path / "empty").joinpath("metrics.jsonl").unlink()
    (row,), note = table_rows([tmp_path])
    assert row["runs"] == 1
    assert note.startswith("2 left out")
    assert str(tmp_path / "begun") in note
    assert str(tmp_path / "empty") in note
    with pytest.raises(ValueError, match="no run has a result: 1 left out"):
        table_rows([tmp_path / "begun"])


def test_a_cell_s_curve_is_of_its_own_loss_as_long_as_it_trains(tmp_path):
    losses = [{"a": 1.0, "b": 3.0}, {"a": 0.5}]
    lines = [TRAIN | {"step": 10 * i, "loss": 9.0, "losses": x} for i, x in enumerate(losses, 1)]
    make(tmp_path / "run", [{"adapter": "a", "seed": 0}, {"adapter": "b", "seed": 1}], lines)
    found = {
        run["adapter"].name: run["train"][:, :2].tolist() for run in read_results([tmp_path])[0]
    }
    assert found == {"a": [[10, 1], [20, 0.5]], "b": [[10, 3]]}


def test_a_mixture_is_a_row_with_a_cell_for_each_task(tmp_path):
    finals = [{"task": "rte", "accuracy": 0.5}, {"task": "copa", "accuracy": 0.75}]
    evals = [
        {"event": "eval", "step": 5, "task": task, "accuracy": x}
        for task, x in (("rte", 0.4), ("copa", 0.6))
    ]
    make(tmp_path / "run", finals, [TRAIN, *evals], task=["rte", "copa"], adapters="one")
    (row,), _ = table_rows([tmp_path])
    assert (row["rte"], row["copa"], row["average"]) == (50, 75, 62.5)
    assert [run["eval"].tolist() for run in read_results([tmp_path])[0]] == [[[5, 40]], [[5, 60]]]


def test_what_nothing_measured_is_left_out(tmp_path):
    make(tmp_path / "a", [{"accuracy": None, "tokens": None}])
    make(tmp_path / "b")
    (row,), note = table_rows([tmp_path])
    assert row["runs"] == 1
    assert note.startswith("1 left out, without a result in metrics.jsonl")


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    run = make(tmp_path / "run")
    (row,), _ = table_rows([tmp_path, run, tmp_path / "run" / ".." / "run"])
    assert row["runs"] == 1


def test_the_same_cell_of_two_runs_counts_once_and_is_told(tmp_path):
    make(tmp_path / "one", [{"accuracy": 1.0}])
    make(
        tmp_path / "grid",
        [{"adapter": f"s{i}", "seed": i, "lr": 0.003} for i in range(3)],
        seed=[0, 1, 2],
    )
    (row,), note = table_rows([tmp_path])  # the grid comes first
    assert (row["runs"], row["rte IQR"], note) == (
        3,
        0,
        "1 left out, whose flags are those of others",
    )


def test_what_a_grid_has_not_come_to_is_told(tmp_path):
    grid = {"seed": [0, 1, 2], "lr": [0.1, 0.2], "task": ["rte", "cb"], "adapters": "one"}
    finals = [
        {"adapter": f"s{i}-lr0.1", "task": task, "seed": i, "lr": 0.1}
        for i in (0, 1)
        for task in ("rte", "cb")
    ]
    failed = {"event": "failed", "adapter": "s0-lr0.2", "step": 3}
    make(tmp_path / "grid", finals, [failed], **grid)
    (row,), note = table_rows([tmp_path])
    assert row["runs"] == 2
    assert note.endswith(f"{tmp_path / 'grid'}: s0-lr0.2, {tmp_path / 'grid'}: 3 adapters to come")


def test_a_line_that_was_being_written_and_a_model_among_runs_are_passed_over(tmp_path):
    folder = make(tmp_path / "run", [{}, {"accuracy": 0.75}])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "t5"}')
    (row,), note = table_rows([tmp_path])
    assert (row["rte"], note) == (50, "")
    with pytest.raises(ValueError, match="something else"):
        table_rows([tmp_path / "merged"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", "{", "JSONDecodeError"),
        ("config.json", "[1]", "AttributeError"),
        ("config.json", '{"model_type": "t5"}', "something else"),
        ("metrics.jsonl", '{"event": "train"\n{"event": "final"}', "line 2"),
        ("metrics.jsonl", "3", "TypeError"),
        ("metrics.jsonl", '{"event": "final"}', "'accuracy'"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracy": 53.0}), "5300"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracy": float("nan")}), "[nan] %"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracies": ["x"]}), "could not convert"),
        ("metrics.jsonl", json.dumps(FINAL | {"trainable": None}), "NoneType"),
        (
            "metrics.jsonl",
            json.dumps({"event": "train", "step": 1}) + "\n" + json.dumps(FINAL),
            "'loss'",
        ),
        ("metrics.jsonl", "[" * 100_000, "RecursionError"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path, name, content, told):
    (make(tmp_path / "run") / name).write_text(content + "\n")
    with pytest.raises(ValueError, match=r"expected a run of train\.py") as error:
        table_rows([tmp_path / "run"])
    assert str(tmp_path / "run") in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a run of train\.py: FileNotFoundError"):
        table_rows([tmp_path])
    with pytest.raises(
        ValueError, match=r"nowhere: expected a run of train\.py: FileNotFoundError"
    ):
        table_rows([tmp_path / "nowhere"])


def test_train_s_own_folder_is_read(tmp_path):
    assert running.run(running.words(tmp_path / "run")) == 0
    (row,), note = table_rows([tmp_path])
    final = running.metrics(tmp_path / "run")[-1]
    lines = [line for line in running.metrics(tmp_path / "run") if line["event"] == "train"]
    n_steps = np.diff([0, *(line["step"] for line in lines)])
    tokens = sum(
        n * x["tokens_per_second"] / x["examples_per_second"]
        for n, x in zip(n_steps, lines, strict=True)
    )
    assert note == ""
    assert row["FLOPs to train"] == pytest.approx(
        3 * final["total"] * tokens * 4
    )  # examples a step
    assert row[final["task"]] == 100 * final["accuracy"]


# What is shown


@pytest.fixture
def study(tmp_path):
    make(tmp_path / "a", [{"accuracy": 0.5, "architecture": "T5"}], [TRAIN], seed=0)
    make(tmp_path / "b", [{"accuracy": 0.625, "architecture": "T5"}], [TRAIN], seed=1)
    make(tmp_path / "c", [{"trainable": 0}], model="nano", method="none", task="cb")
    for name in "ab":
        (tmp_path / name / "adapter").mkdir()
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(bytes(400))
    return table_rows([tmp_path])[0]


def test_markdown_is_aligned_and_has_dashes_where_nothing_is_known(study):
    assert table_text(study) == (
        "| model | method |        rte |   cb | average | runs | trainable | FLOPs/example | FLOPs to train |    MB |\n"
        "| ----- | ------ | ---------: | ---: | ------: | ---: | --------: | ------------: | -------------: | ----: |\n"
        "| m     | ia3    | 56.2 (6.2) |    - |       - |    2 |       100 |       2.5e+04 |        1.2e+07 | 0.000 |\n"
        "| nano  | none   |          - | 50.0 |       - |    1 |         0 |       2.5e+04 |              - | 0.000 |\n"
    )


@pytest.mark.parametrize(
    ("models", "shown"),
    [(("a/one", "b/c/two"), ["one", "two"]), (("a/one", "b/one"), ["a/one", "b/one"])],
)
def test_a_model_s_folders_are_shown_where_its_name_is_not_enough(models, shown, tmp_path):
    for i, model in enumerate(models):
        make(tmp_path / str(i), model=model)
    table = table_rows([tmp_path])[0]
    assert [
        line.split(" | ")[0].removeprefix("| ").strip()
        for line in table_text(table).splitlines()[2:]
    ] == shown
    assert [line[0] for line in csv.reader(io.StringIO(table_text(table, as_csv=True)))] == [
        "model",
        *models,
    ]


def test_csv_has_all_digits_and_nothing_where_nothing_is_known(study):
    header, ia3, none = csv.reader(io.StringIO(table_text(study, as_csv=True)))
    costs = ["average", "runs", "trainable", "FLOPs/example", "FLOPs to train", "MB"]
    assert header == ["model", "method", "rte", "rte IQR", "cb", "cb IQR", *costs]
    assert ia3 == [
        "m",
        "ia3",
        "56.25",
        "6.25",
        "",
        "",
        "",
        "2",
        "100",
        "25000.0",
        "12000000.0",
        "0.0004",
    ]
    assert none == ["nano", "none", "", "", "50.0", "", "", "1", "0", "25000.0", "", "0.0"]


def test_the_table_needs_no_torch():
    code = "import sys, minia3.table; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "False\n"
    )
