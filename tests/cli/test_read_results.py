"""Guards how run folders are read: what a result holds, which flags tell results apart, what is
left out and reported, and that a damaged file, or a folder without a run, is one line."""

import json
import shlex

import numpy as np
import pytest
import running
from run_folders import FINAL, TRAIN, make_run, write_metrics

from minia3.cli.results import read_results


def labels(folder):
    return [result.label for result in read_results([folder])[0]]


def tasks(folder):
    return [result.task for result in read_results([folder])[0]]


# Costs


@pytest.mark.parametrize(("architecture", "factor"), [("T5", 1), ("Llama", 2)])
def test_flops_follow_from_the_mean_tokens_of_an_example(tmp_path, architecture, factor):
    """17 tokens to evaluate; to train, 10 tokens for 5 steps and 30 for 15: 25 on average."""
    lines = [TRAIN | {"step": 5, "tokens_per_second": 40.0}, TRAIN | {"tokens_per_second": 120.0}]
    make_run(tmp_path / "run", [{"architecture": architecture, "tokens": 17.0}], lines)
    (result,), _ = read_results([tmp_path])
    assert result.flops_per_example == factor * 1000 * 17
    assert result.flops_to_train == 3 * factor * 1000 * 25 * 8 * 20


def test_an_older_run_that_did_not_count_its_tokens_lacks_only_the_flops_to_evaluate(tmp_path):
    final = {key: value for key, value in FINAL.items() if key != "tokens"}
    write_metrics(make_run(tmp_path / "run"), [TRAIN, final])
    (result,), _ = read_results([tmp_path])
    assert result.accuracy == 50
    assert result.flops_to_train == 3 * 1000 * 25 * 8 * 20
    assert np.isnan(result.flops_per_example)


def test_a_run_without_training_has_no_flops_to_train(tmp_path):
    make_run(tmp_path / "run", [{"tokens": 200.0}], method="icl")
    (result,), _ = read_results([tmp_path])
    assert result.flops_per_example == 1000 * 200
    assert np.isnan(result.flops_to_train)


def test_bytes_are_counted_from_the_files(tmp_path):
    for name, method in (("adapter", "ia3"), ("adapter", "lora"), ("model", "full")):
        folder = make_run(tmp_path / method, method=method) / name
        folder.mkdir()
        for i in (1, 2):
            (folder / f"{i}.safetensors").write_bytes(bytes(1000 * i * len(method)))
        (folder / "README.md").write_text("not counted")
    make_run(tmp_path / "gone", method="ia3", lr=1.0)
    make_run(tmp_path / "none", [{"trainable": 0}], method="none")
    found = {result.label: result.n_bytes for result in read_results([tmp_path])[0]}
    expected = {
        "ia3, lr 0.003": 9000,
        "lora": 12000,
        "full": 12000,
        "ia3, lr 1.0": np.nan,
        "none": 0,
    }
    assert found == pytest.approx(expected, nan_ok=True)


# Flags that tell results apart


def test_a_label_names_the_flags_in_which_runs_of_a_method_differ(tmp_path):
    make_run(tmp_path / "a", losses="lm", out="x", weights="x", seed=1)
    other_places = {"out": "y", "data_dir": "elsewhere", "weights": "y"}
    other_program = {"git_commit": "abc", "versions": {"torch": "3"}}
    make_run(tmp_path / "b", losses="lm,ul,ln", **other_places, **other_program)
    make_run(tmp_path / "c", [{"trainable": 9}], method="lora", lr=0.1)
    assert labels(tmp_path) == ["ia3, losses lm", "ia3, losses lm,ul,ln", "lora"]


def test_runs_on_devices_with_different_dtypes_have_different_labels(tmp_path):
    """Without --dtype, config.json does not say it."""
    make_run(tmp_path / "cpu", [{"dtype": "float32"}], dtype=None)
    make_run(tmp_path / "cpu2", [{"dtype": "float32"}], dtype="float32", seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]
    make_run(tmp_path / "gpu", [{"dtype": "bfloat16"}], dtype=None)
    assert labels(tmp_path) == ["ia3, dtype float32", "ia3, dtype float32", "ia3, dtype bfloat16"]


def test_budgets_are_compared_between_methods(tmp_path):
    make_run(tmp_path / "a", steps=1000)
    make_run(tmp_path / "b", [{"trainable": 9}], method="lora", steps=150)
    assert labels(tmp_path) == ["ia3, steps 1000", "lora, steps 150"]


def test_a_flag_that_an_older_run_lacks_distinguishes_nothing(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", sites="k,v,ff", seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]


@pytest.mark.parametrize(
    "flag",
    ["save_every", "micro_batch_size", "eval_batch_size", "recompute", "checkpoint", "out"],
)
def test_a_flag_that_does_not_change_results_distinguishes_nothing(tmp_path, flag):
    make_run(tmp_path / "a", **{flag: 1})
    make_run(tmp_path / "b", **{flag: 2}, seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]


def test_flags_of_older_versions_are_read(tmp_path):
    """`checkpoint` is called `recompute` today. `similar_lengths` is gone, but changed results."""
    make_run(tmp_path / "a", checkpoint=True, similar_lengths=False)
    make_run(tmp_path / "b", checkpoint=False, similar_lengths=True)
    make_run(tmp_path / "c", recompute=True, seed=1)
    assert labels(tmp_path) == ["ia3", "ia3, similar-lengths", "ia3"]


def test_a_label_names_flags_as_people_type_them(tmp_path):
    make_run(tmp_path / "a", no_cross=True, max_length=8)
    make_run(tmp_path / "b", no_cross=False, max_length=9)
    assert labels(tmp_path) == ["ia3, no-cross, max-length 8", "ia3, max-length 9"]


def test_shots_are_compared_within_a_task(tmp_path):
    make_run(tmp_path / "a", task="rte", shots=32)
    make_run(tmp_path / "b", task="hellaswag", shots=20)
    assert labels(tmp_path) == ["ia3", "ia3"]
    make_run(tmp_path / "c", task="rte", shots=4)
    assert labels(tmp_path) == ["ia3, shots 32", "ia3, shots 20", "ia3, shots 4"]
    make_run(tmp_path / "d", task="rte")  # all rows: this is no number of shots
    assert labels(tmp_path) == ["ia3, shots 32", "ia3, shots 20", "ia3, shots 4", "ia3"]
    make_run(tmp_path / "e", [{"trainable": 9}], task="rte", method="lora", shots=8)
    assert labels(tmp_path)[-1] == "lora, shots 8"


def test_shots_are_compared_between_methods_that_train(tmp_path):
    """The row `lora` had eight rows to train on, and the row `ia3` beside it had all of them."""
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", [{"trainable": 9}], method="lora", shots=8)
    make_run(tmp_path / "c", [{"trainable": 0}], method="icl", shots=4)  # these train nothing
    assert labels(tmp_path) == ["ia3", "lora, shots 8", "icl"]


def test_few_shots_on_one_task_are_not_named_like_all_rows_of_another(tmp_path):
    """The row `ia3` had all rows of rte, 32 of cb, and their average."""
    make_run(tmp_path / "a", task="rte", shots=32)
    make_run(tmp_path / "b", task="rte")
    make_run(tmp_path / "c", task="cb", shots=32)
    assert labels(tmp_path) == ["ia3, shots 32", "ia3", "ia3, shots 32"]


def test_flags_that_suit_a_task_are_compared_within_it(tmp_path):
    """Each data set has its own columns and labels, and still they share a row."""
    make_run(tmp_path / "a", task="x", input="{text}", labels="no,yes", target=None)
    make_run(tmp_path / "b", task="y", input="{title}", labels="bad,good", target="stars")
    assert labels(tmp_path) == ["ia3", "ia3"]
    make_run(tmp_path / "c", task="x", input="{text} Good?", labels="no,yes", target=None)
    assert labels(tmp_path) == ["ia3, input {text}", "ia3", "ia3, input {text} Good?"]


def test_equal_epochs_are_an_equal_budget_though_their_steps_differ(tmp_path):
    make_run(tmp_path / "a", task="x", epochs=3.0, steps=90)
    make_run(tmp_path / "b", task="y", epochs=3.0, steps=120)
    make_run(tmp_path / "c", [{"trainable": 0}], method="none", epochs=None, steps=1000)
    assert labels(tmp_path) == ["ia3", "ia3", "none"]
    make_run(tmp_path / "d", task="x", epochs=None, steps=100)
    expected = ["ia3, epochs 3.0", "ia3, epochs 3.0", "none", "ia3, steps 100"]
    assert labels(tmp_path) == expected


def test_equal_steps_are_an_equal_budget_however_they_were_given(tmp_path):
    make_run(tmp_path / "a", epochs=3.0, steps=90)
    make_run(tmp_path / "b", epochs=None, steps=90, seed=1)
    assert labels(tmp_path) == ["ia3", "ia3"]


def test_all_adapters_of_a_grid_name_the_flags_in_which_one_of_them_differs(tmp_path):
    finals = [{"task": task, "adapter": task} for task in ("rte", "cb")]
    make_run(tmp_path / "grid", finals, task=["rte", "cb"], shots=8)
    make_run(tmp_path / "other", task="rte", shots=16)
    assert labels(tmp_path) == ["ia3, shots 8", "ia3, shots 8", "ia3, shots 16"]


def test_prompts_of_the_evaluation_are_named_if_they_differ(tmp_path):
    make_run(tmp_path / "a", eval_prompt="0")
    make_run(tmp_path / "b", [{"accuracies": [0.5, 0.6]}], eval_prompt="all")
    assert labels(tmp_path) == ["ia3, eval-prompt 0", "ia3, eval-prompt all"]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("eval_prompt", ("0", "all")),
        ("dtype", ("float32", "bfloat16")),
        ("quantize", ("nf4", "int8")),
        ("max_length", (512, 256)),
        ("max_target_length", (64, 128)),
        ("max_new_tokens", (64, 8)),
        ("input", ("{text}", "{text} Good?")),
        ("labels", ("no,yes", "bad,good")),
    ],
)
def test_how_results_were_evaluated_is_compared_between_methods(tmp_path, flag, values):
    """The base was evaluated in other words than the adapter beside it, and nothing said so."""
    methods = {"ia3": [{}], "none": [{"trainable": 0}]}
    for value, (method, finals) in zip(values, methods.items(), strict=True):
        make_run(tmp_path / method, finals, method=method, **{flag: value})
    name = flag.replace("_", "-")
    assert labels(tmp_path) == [f"ia3, {name} {values[0]}", f"none, {name} {values[1]}"]


def test_a_label_says_how_many_shots_fit_if_not_all_of_them_did(tmp_path):
    """A row `icl, shots 32` was the result of three to six shots. All seeds share a row."""
    in_context = {"trainable": 0, "method": "icl"}
    for seed, n_fitting in enumerate((4.0, 5.25)):
        final = in_context | {"n_shots": n_fitting, "n_shots_given": 32}
        make_run(tmp_path / "32" / str(seed), [final], method="icl", seed=seed, shots=32)
    make_run(tmp_path / "4", [in_context | {"n_shots": 4.0}], method="icl", shots=4)
    found = [result.label for result in read_results([tmp_path / "32", tmp_path / "4"])[0]]
    assert found == [*["icl, shots 32, 4.6 of 32 shots fit"] * 2, "icl, shots 4"]
    final = in_context | {"n_shots": 4.0}  # of an older version
    make_run(tmp_path / "older", [final], method="icl", shots=8)
    assert [result.label for result in read_results([tmp_path / "older"])[0]] == [
        "icl, 4.0 of 8 shots fit"
    ]


def test_flags_of_training_do_not_distinguish_what_was_only_evaluated(tmp_path):
    untrained = [{"trainable": 0}]
    make_run(tmp_path / "a", untrained, method="none", lr=1.0, shots=4, steps=9)
    make_run(tmp_path / "b", untrained, method="none", seed=1)
    make_run(tmp_path / "c", untrained, method="icl", lr=1.0, shots=4)
    make_run(tmp_path / "d", untrained, method="icl", shots=8)
    make_run(tmp_path / "e", untrained, adapter="x")
    make_run(tmp_path / "f", untrained, adapter="y")
    in_context = ["icl, shots 4", "icl, shots 8"]
    given = ["ia3, adapter x", "ia3, adapter y"]
    assert labels(tmp_path) == ["none", "none", *in_context, *given]


def test_mixtures_of_different_tasks_have_different_labels(tmp_path):
    for names in (["rte", "cb"], ["rte", "copa"]):
        finals = [{"task": name} for name in names]
        make_run(tmp_path / names[1], finals, task=names, adapters="one")
    assert {*labels(tmp_path)} == {"ia3, mixture rte+cb", "ia3, mixture rte+copa"}


def test_mixtures_have_the_names_that_their_tasks_have_in_reports(tmp_path):
    """Both had the names `rte+task`, or `reviews`, so different mixtures shared a row."""
    for number, paths in enumerate((("rte", "x/task.json"), ("rte", "y/task.json"))):
        make_run(tmp_path / str(number), [{"task": "rte"}], task=list(paths), adapters="one")
    assert {*labels(tmp_path)} == {"ia3, mixture rte+x", "ia3, mixture rte+y"}
    for number, path in enumerate(("d/reviews.v1", "d/reviews.v2")):
        task = [path, "d/rows.jsonl"]
        make_run(tmp_path / "folders" / str(number), [{"task": "x"}], task=task, adapters="one")
    expected = {"ia3, mixture reviews.v1+rows", "ia3, mixture reviews.v2+rows"}
    assert {*labels(tmp_path / "folders")} == expected


# Data


def test_different_rows_of_the_same_name_are_different_tasks(tmp_path):
    """The checksums decide, not the path. In a grid a checksum has its task's folder."""
    single = {"task": "rows", "adapter": "x"}
    make_run(tmp_path / "0", [single], task="a/rows.jsonl", data={"rows.jsonl": "aa"})
    make_run(tmp_path / "1", [single], task="a/rows.jsonl", data={"rows.jsonl": "bb"}, seed=1)
    grid_data = {"rows/rows.jsonl": "aa", "cb/train.jsonl": "cc"}
    make_run(tmp_path / "2", [single], task=["./a/rows.jsonl", "cb"], data=grid_data, seed=2)
    make_run(tmp_path / "cb", task="cb", data={"train.jsonl": "cc"})
    first, different, same_as_first, cb = tasks(tmp_path)
    assert first == same_as_first != different
    assert first.startswith("rows [")
    assert cb == "cb"


def test_results_of_weights_that_were_replaced_are_of_two_models(tmp_path):
    """Trained again at the same path, a base is another one, and its results no further seeds."""
    digests = ("a" * 64, "a" * 64, "b" * 64, None)  # None: from an earlier version, or the hub
    for seed, digest in enumerate(digests):
        make_run(tmp_path / str(seed), seed=seed % 2, weights=digest)
    make_run(tmp_path / "other", [{"model": "n"}], weights="c" * 64)
    results, note = read_results([tmp_path])
    assert [result.model for result in results] == [
        "m [aaaaaa]",
        "m [aaaaaa]",
        "m [bbbbbb]",
        "m",
        "n",
    ]
    assert note == ""


def test_the_same_files_in_another_order_are_the_same_data(tmp_path):
    make_run(tmp_path / "a", data={"train.jsonl": "aa", "test.jsonl": "bb"})
    make_run(tmp_path / "b", data={"test.jsonl": "bb", "train.jsonl": "aa"}, seed=1)
    assert tasks(tmp_path) == ["rte", "rte"]


def test_an_unusual_metric_or_split_is_part_of_the_task(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", [{"split": "other published shots"}])
    make_run(tmp_path / "d", [{"split": "the held-out fold"}], seed=2)  # of RAFT, as usual
    make_run(tmp_path / "c", [{"split": "test", "metric": "macro_f1"}])
    assert tasks(tmp_path) == ["rte", "rte (other published shots)", "rte (macro_f1)", "rte"]


# Grids and mixtures


def test_each_adapter_of_a_grid_is_a_result_with_its_task_rate_and_lines(tmp_path):
    lines = [
        TRAIN | {"step": 10, "adapter": "raft/x-lr0.1"},
        TRAIN | {"adapter": "cb-lr0.2"},
        TRAIN | {"step": 5},
    ]
    finals = [
        {"adapter": "raft/x-lr0.1", "task": "raft/x", "lr": 0.1, "accuracy": 0.25},
        {"adapter": "cb-lr0.2", "task": "cb", "lr": 0.2},
    ]
    make_run(tmp_path / "grid", finals, lines, task=["raft/x", "cb"], lr=[0.1, 0.2])
    x, cb = read_results([tmp_path])[0]
    assert [x.label, cb.label] == ["ia3, lr 0.1", "ia3, lr 0.2"]
    assert [x.task, cb.task] == ["raft/x", "cb"]
    assert [x.adapter_folder.name, cb.adapter_folder.name] == ["raft-x-lr0.1", "cb-lr0.2"]
    assert [x.loss_curve[:, 0].tolist(), cb.loss_curve[:, 0].tolist()] == [[10, 5], [20, 5]]
    assert [x.accuracy, cb.accuracy] == [25, 50]
    assert [x.seconds, cb.seconds] == [1.0, 1.0]  # both together took 2


def test_the_training_of_a_grid_of_several_tasks_has_no_flops_of_one_task(tmp_path):
    """All tasks had the mean, although one has texts that are ten times as long."""
    names = ("rte", "cb")
    finals = [{"adapter": name, "task": name} for name in names]
    together = TRAIN | {"losses": dict.fromkeys(names, 1.0)}
    alone = [TRAIN | {"losses": {name: 1.0}} for name in names]  # LoRA trains one after the other

    def flops_to_train(folder, lines, finals=finals, **flags):
        make_run(tmp_path / folder, finals, lines, **flags)
        return [result.flops_to_train for result in read_results([tmp_path / folder])[0]]

    assert np.isnan(flops_to_train("grid", [together], task=names)).all()
    for method in ("lora", "full"):
        assert np.isfinite(flops_to_train(method, alone, task=names, method=method)).all()
    assert np.isfinite(flops_to_train("mixture", [TRAIN], task=names, adapters="one")).all()
    seeds = [{"adapter": name, "seed": seed} for seed, name in enumerate(names)]
    assert np.isfinite(flops_to_train("seeds", [together], seeds, seed=[0, 1])).all()


def test_adapters_that_train_together_share_their_time_by_their_steps(tmp_path):
    """b ran out of patience, and c failed. All of them took two seconds, and 40 steps."""
    finals = [{"adapter": "a", "seed": 0}, {"adapter": "b", "seed": 1, "steps": 16}]
    failed = {"event": "failed", "adapter": "c", "step": 4}
    make_run(tmp_path / "run", finals, [failed], seed=[0, 1, 2])
    a, b = read_results([tmp_path])[0]
    assert [a.seconds, b.seconds] == pytest.approx([1.0, 0.8])


def test_the_tasks_of_a_mixture_have_the_time_of_their_adapter(tmp_path):
    finals = [{"task": "rte"}, {"task": "copa"}]
    make_run(tmp_path / "run", finals, task=["rte", "copa"], adapters="one")
    assert [result.seconds for result in read_results([tmp_path])[0]] == [2.0, 2.0]


def test_the_loss_curve_of_an_adapter_ends_when_it_stops(tmp_path):
    first = TRAIN | {"step": 10, "loss": 9.0, "losses": {"a": 1.0, "b": 3.0}}
    second = TRAIN | {"step": 20, "loss": 9.0, "losses": {"a": 0.5}}
    finals = [{"adapter": "a", "seed": 0}, {"adapter": "b", "seed": 1}]
    make_run(tmp_path / "run", finals, [first, second])
    a, b = read_results([tmp_path])[0]
    assert a.loss_curve.tolist() == [[10, 1], [20, 0.5]]
    assert b.loss_curve.tolist() == [[10, 3]]


def test_each_task_of_a_mixture_has_its_held_out_curve_and_the_same_adapter(tmp_path):
    finals = [{"task": "rte", "accuracy": 0.5}, {"task": "copa", "accuracy": 0.75}]
    evals = [
        {"event": "eval", "step": 5, "task": "rte", "accuracy": 0.4},
        {"event": "eval", "step": 5, "task": "copa", "accuracy": 0.6},
    ]
    make_run(tmp_path / "run", finals, [TRAIN, *evals], task=["rte", "copa"], adapters="one")
    rte, copa = read_results([tmp_path])[0]
    assert [rte.held_out_curve.tolist(), copa.held_out_curve.tolist()] == [[[5, 40]], [[5, 60]]]
    assert rte.adapter_folder == copa.adapter_folder
    assert rte.label == copa.label


# What is left out


def test_runs_without_a_result_are_counted_and_named(tmp_path):
    make_run(tmp_path / "done")
    make_run(tmp_path / "begun", finals=[], lines=[TRAIN])
    make_run(tmp_path / "empty").joinpath("metrics.jsonl").unlink()
    results, note = read_results([tmp_path])
    assert [result.run_folder.name for result in results] == ["done"]
    assert note.startswith("2 left out, because metrics.jsonl has no result")
    assert str(tmp_path / "begun") in note
    assert str(tmp_path / "empty") in note
    with pytest.raises(ValueError, match="no run has a result: 1 left out"):
        read_results([tmp_path / "begun"])


def test_a_run_without_labeled_rows_is_left_out(tmp_path):
    make_run(tmp_path / "a", [{"accuracy": None, "tokens": None}])
    make_run(tmp_path / "b")
    results, note = read_results([tmp_path])
    assert [result.run_folder.name for result in results] == ["b"]
    assert note.startswith("1 left out, because metrics.jsonl has no result")


def test_an_adapter_without_labeled_rows_is_left_out_of_its_grid(tmp_path):
    finals = [{"task": "rte", "adapter": "rte"}]
    finals.append({"task": "b", "adapter": "b", "accuracy": None, "tokens": None})
    folder = make_run(tmp_path / "run", finals, task=["rte", "b"])
    (result,), note = read_results([tmp_path])
    assert result.task == "rte"
    assert note == f"1 left out, because metrics.jsonl has no result: {folder}: b"


@pytest.mark.parametrize("seed", [0, [0, 1]])
def test_a_task_without_labeled_rows_is_left_out_of_its_mixture(seed, tmp_path):
    adapters = [{"adapter": f"s{i}", "seed": i} for i in range(2)] if seed else [{}]
    finals = []
    for adapter in adapters:
        finals.append({**adapter, "task": "rte"})
        finals.append({**adapter, "task": "b", "accuracy": None, "tokens": None})
    flags = {"task": ["rte", "b"], "adapters": "one", "seed": seed}
    folder = make_run(tmp_path / "run", finals, **flags)
    results, note = read_results([tmp_path])
    assert [result.task for result in results] == ["rte"] * len(adapters)
    names = ["s0: b", "s1: b"] if seed else ["b"]
    assert note.endswith(" has no result: " + ", ".join(f"{folder}: {name}" for name in names))
    assert note.startswith(f"{len(names)} left out")


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    folder = make_run(tmp_path / "run")
    results, note = read_results([tmp_path, folder, folder / ".." / "run"])
    assert len(results) == 1
    assert note == ""


def test_the_first_of_several_repetitions_counts_and_the_others_are_reported(tmp_path):
    make_run(tmp_path / "later", [{"accuracy": 1.0}])
    finals = [{"adapter": f"s{i}", "seed": i, "lr": 0.003} for i in range(3)]
    make_run(tmp_path / "grid", finals, seed=[0, 1, 2])
    results, note = read_results([tmp_path])
    assert [result.adapter_folder.name for result in results] == ["s0", "s1", "s2"]
    reason = "because their flags equal those of other results"
    assert note == f"1 left out, {reason}: {tmp_path / 'later'}"
    again = make_run(tmp_path / "more than once", finals, seed=[0, 1, 2])
    _, note = read_results([tmp_path])
    assert note == f"4 left out, {reason}: {tmp_path / 'later'} '{again}'"


def test_adapters_that_failed_or_are_to_come_are_reported(tmp_path):
    finals = []
    for seed in (0, 1):
        for task in ("rte", "cb"):
            cell = {"adapter": f"s{seed}-lr0.1", "seed": seed, "lr": 0.1}
            finals.append(cell | {"task": task})
    failed = {"event": "failed", "adapter": "s0-lr0.2", "step": 3}
    grid = {"seed": [0, 1, 2], "lr": [0.1, 0.2], "task": ["rte", "cb"], "adapters": "one"}
    folder = make_run(tmp_path / "grid", finals, [failed], **grid)
    results, note = read_results([tmp_path])
    assert len({result.adapter_folder for result in results}) == 2
    assert note.endswith(f"{folder}: s0-lr0.2, {folder}: 3 adapters to come")
    (tmp_path / "grid").rename(tmp_path / "first")
    make_run(tmp_path / "second", finals[:2], **grid | {"seed": [0, 1], "lr": 0.1})
    assert read_results([tmp_path / "second"])[1].endswith("second: 1 adapter to come")


def test_a_line_that_is_being_written_and_a_model_among_runs_are_skipped(tmp_path):
    folder = make_run(tmp_path / "run", [{}, {"accuracy": 0.75}])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text('{"model_type": "t5"}')
    (result,), note = read_results([tmp_path])
    assert (result.accuracy, note) == (50, "")
    with pytest.raises(ValueError, match=r"config\.json was not written by train.py"):
        read_results([tmp_path / "merged"])


# Damaged files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "JSONDecodeError"),
        ("config.json", "[1]", "expected a JSON object, found list"),
        ("config.json", '{"model_type": "t5"}', "was not written by train.py"),
        ("metrics.jsonl", '{"event": "train"}\n{"event": "final"', "metrics.jsonl, line 2"),
        ("metrics.jsonl", "3", "line 1: expected a JSON object, found int"),
        ("metrics.jsonl", '{"event": "final"}', "'accuracy' is missing"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracy": 53.0}), "53.0, expected a number from 0"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracy": float("nan")}), "nan, expected"),
        ("metrics.jsonl", json.dumps(FINAL | {"accuracy": "x"}), "could not convert"),
        ("metrics.jsonl", json.dumps(FINAL | {"trainable": None}), "NoneType"),
        ("metrics.jsonl", json.dumps(FINAL | {"steps": float("inf")}), "OverflowError"),
        ("metrics.jsonl", '{"event": "train", "step": 1}\n' + json.dumps(FINAL), "is missing"),
        ("metrics.jsonl", "[" * 100_000, "RecursionError"),
        ("metrics.jsonl", json.dumps(FINAL | {"seed": [0]}), "int() argument"),
        (
            "metrics.jsonl",
            json.dumps(TRAIN | {"step": 0}) + "\n" + json.dumps(FINAL),
            "ZeroDivisionError",
        ),
    ],
)
def test_a_damaged_file_is_reported_in_one_line(tmp_path, name, content, expected):
    (make_run(tmp_path / "run") / name).write_text(content + "\n")
    with pytest.raises(ValueError, match=r"expected a run of train\.py") as error:
        read_results([tmp_path / "run"])
    assert str(error.value).startswith(str(tmp_path / "run"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"expected a run of train\.py, or a folder of runs"):
            read_results([folder])


def test_a_folder_of_folders_of_runs_is_told_apart(tmp_path):
    make_run(tmp_path / "runs" / "study" / "run")
    with pytest.raises(ValueError, match=r"runs: expected a run") as error:
        read_results([tmp_path / "runs"])
    assert str(error.value).endswith(f"give {tmp_path / 'runs' / 'study'}")


def test_folders_of_runs_are_named_as_people_type_them_and_whole(tmp_path):
    """They were cut within a path, and a space in one made two."""
    for number in range(7):
        make_run(tmp_path / "runs" / f"a study {number}" / "run")
    with pytest.raises(ValueError, match="found folders of runs inside") as error:
        read_results([tmp_path / "runs"])
    given = str(error.value).partition(": give ")[2]
    paths = [str(tmp_path / "runs" / f"a study {number}") for number in range(5)]
    assert shlex.split(given) == [*paths, "and", "2", "more"]


def test_folders_of_runs_beside_runs_are_reported(tmp_path):
    """With one plain run in the folder, the studies in it vanished without a word."""
    runs = tmp_path / "runs"
    make_run(runs / "first")
    make_run(runs / "study" / "run", seed=1)
    results, note = read_results([runs])
    assert [result.run_folder.name for result in results] == ["first"]
    assert note == f"folders of runs inside, not read: {runs / 'study'}"
    results, note = read_results([runs, runs / "study"])
    assert [result.run_folder.name for result in results] == ["first", "run"]
    assert note == ""
    assert read_results([runs / "first"])[1] == ""
    make_run(runs / "first" / "below", seed=2)  # `minia3 table runs/first` would not read it
    assert "first" not in read_results([runs])[1]


def test_both_reasons_for_having_no_result_are_named(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "study" / "run", seed=1)
    make_run(runs / "first")
    (runs / "first" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no run has a result: 1 left out") as error:
        read_results([runs])
    assert str(error.value).endswith(f"not read: {runs / 'study'}")


def test_a_folder_of_nothing_but_other_folders_has_no_result(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"no run has a result: train\.py wrote none"):
        read_results([tmp_path])


def test_a_folder_of_train_py_is_read(tmp_path):
    assert running.run(running.words(tmp_path / "run")) == 0
    (result,), note = read_results([tmp_path])
    *lines, final = running.metrics(tmp_path / "run")
    lines = [line for line in lines if line["event"] == "train"]
    n_steps = np.diff([0, *(line["step"] for line in lines)])
    n_tokens = 0
    for n, line in zip(n_steps, lines, strict=True):
        n_tokens += n * line["tokens_per_second"] / line["examples_per_second"]
    assert note == ""
    assert result.accuracy == 100 * final["accuracy"]
    assert result.n_bytes > 4 * result.n_trainable > 0
    n_examples_per_step = 4
    expected = 3 * final["total"] * n_tokens * n_examples_per_step
    assert result.flops_to_train == pytest.approx(expected)
