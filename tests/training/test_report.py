"""Guards what a run prints at its end: plain lines with the figures of the final lines, what is
doubtful about them, and a command that uses the adapter on new rows."""

import shlex
from pathlib import Path

import pytest
from running import train

from minia3.cli.main import parse
from minia3.files import processes
from minia3.training.command_line import parse_flags
from minia3.training.report import before_after, describe, report
from minia3.training.shown_commands import training_command, using_command

FINAL = {
    "task": "rte",
    "metric": "accuracy",
    "split": "test",
    "rows": 277,
    "rows_cut": 0,
    "accuracy_before": 0.5,
    "accuracy": 0.751,
    "auc_before": None,
    "auc": None,
    "answer": "choices",
    "trainable": 1536,
    "total": 218112,
    "steps": 30,
    "seconds": 12.3,
    "peak_memory_bytes": 279 * 10**6,
}


def lines_of(capsys, config, *changes, folder=Path("runs/x"), n_failed=0):
    """Return the title, and a dict from name to text, of what `report` prints."""
    report(config, folder, [FINAL | change for change in changes], n_failed)
    blank, title, *lines = capsys.readouterr().out.splitlines()
    assert blank == ""
    pairs = [line.strip().split(" ", 1) for line in lines]
    return title, {name: text.strip() for name, text in pairs}


def text_of(capsys, config, *changes, folder=Path("runs/x")):
    report(config, folder, [FINAL | change for change in changes])
    return capsys.readouterr().out


# The lines


def test_a_run_with_one_result_prints_these_lines(capsys):
    config = train.Config(model="t5-base", task="rte")
    expected = """
rte: 277 rows of test
  accuracy    50.0% before, 75.1% after (commonest label: 52.7%)
  AUC         0.50 before, 0.75 after
  peak memory 279 MB
  trained     1,536 of 218,112 parameters (0.704%)
  time        12 s for 30 steps
  adapter     runs/x/adapter
  use it      minia3 predict t5-base new.csv --adapter runs/x/adapter
"""
    final = {"auc_before": 0.5, "auc": 0.751, "commonest": 0.527}
    assert text_of(capsys, config, final) == expected


def test_a_grid_prints_a_line_for_each_adapter(capsys):
    config = train.Config(model="t5-base", task=("rte", "cb"), seed=(0, 1))
    changes = [{"adapter": "rte-s0", "accuracy": 0.6}, {"adapter": "cb-s1", "steps": 20}]
    expected = """
2 results
  rte-s0      accuracy 50.0% before, 60.0% after, 30 steps
  cb-s1       accuracy 50.0% before, 75.1% after, 20 steps
  peak memory 279 MB
  trained     1,536 of 218,112 parameters (0.704%) each
  time        12 s for 30 steps
  adapter     runs/x/adapters/NAME
  use it      minia3 predict t5-base new.csv --adapter runs/x/adapters/NAME
"""
    assert text_of(capsys, config, *changes) == expected


def test_a_grid_shows_the_names_of_the_folders_of_its_adapters(capsys):
    """`use it` has NAME in place of one, and the folder of raft/x-s0 is raft-x-s0."""
    config = train.Config(task=("raft/x", "cb"), seed=(0, 1))
    final = {"adapter": "raft/x-s0", "steps": 1, "warnings": ["the result is worse"]}
    text = text_of(capsys, config, final)
    assert "\n  raft-x-s0   accuracy 50.0% before, 75.1% after, 1 step\n" in text
    assert "\n  warning     raft-x-s0: the result is worse\n" in text
    assert "/" not in text.partition("raft-x-s0")[2].partition("trained")[0]


def test_a_mixture_prints_a_line_for_each_task(capsys):
    config = train.Config(model="t5-base", task=("rte", "cb"), adapters="one")
    text = text_of(capsys, config, {"task": "rte"}, {"task": "cb", "accuracy": None})
    assert "\n2 results\n  rte         accuracy 50.0% before, 75.1% after, 30 steps\n" in text
    assert "\n  cb          accuracy 50.0% before, - after, 30 steps\n" in text
    assert "(0.704%)\n" in text
    assert "predict t5-base new.csv --adapter runs/x/adapter --task TASK\n" in text


def test_a_mixture_of_a_single_task_is_used_without_naming_it(capsys):
    config = train.Config(model="t5-base", task="rte", adapters="one")
    assert "--task" not in shlex.join(using_command(config, "choices", Path("a")))


def test_a_grid_of_mixtures_names_adapter_and_task(capsys):
    config = train.Config(task=("rte", "cb"), adapters="one", seed=(0, 1))
    text = text_of(capsys, config, {"adapter": "s0"}, {"adapter": "s0", "task": "cb"})
    assert "\n  s0: rte     accuracy" in text
    assert "\n  s0: cb      accuracy" in text


@pytest.mark.parametrize(
    ("n_finals", "n_failed", "expected"),
    [
        (2, 0, "2 results"),
        (1, 1, "1 result; failed adapters: 1"),
        (3, 2, "3 results; failed adapters: 2"),
    ],
)
def test_failed_adapters_are_counted(n_finals, n_failed, expected, capsys):
    config = train.Config(seed=tuple(range(n_finals + n_failed)))
    finals = [{"adapter": f"s{i}"} for i in range(n_finals)]
    assert lines_of(capsys, config, *finals, n_failed=n_failed)[0] == expected


def test_without_training_there_is_one_figure_and_no_adapter(capsys):
    config = train.Config(task="rte", method="none")
    expected = "\nrte: 277 rows of test\n  accuracy    75.1%\n  peak memory 279 MB\n"
    assert text_of(capsys, config, {"trainable": 0}, folder=None) == expected


def test_in_context_learning_prints_its_shots(capsys):
    config = train.Config(task="rte", method="icl", shots=3)
    untrained = {"trainable": 0}
    _, lines = lines_of(capsys, config, untrained | {"n_shots": 3.0})
    assert lines["accuracy"] == "50.0% before, 75.1% after"
    assert lines["shots"] == "3.0 before each input, on average"
    several = train.Config(task="rte", method="icl", shots=3, seed=(0, 1, 2))
    finals = [untrained | {"adapter": f"s{n}", "n_shots": n} for n in (3.0, 1.0, 2.5)]
    _, lines = lines_of(capsys, several, *finals)
    assert lines["shots"] == "1.0 to 3.0 before each input, on average"


def test_inputs_that_were_cut_are_counted(capsys):
    title, _ = lines_of(capsys, train.Config(max_length=99), {"rows_cut": 7})
    assert title == "rte: 277 rows of test, 7 of them cut to 99 tokens"
    several = train.Config(seed=(0, 1), max_length=99)
    finals = [{"adapter": "s0", "rows_cut": 7}, {"adapter": "s1"}]
    _, lines = lines_of(capsys, several, *finals)
    assert lines["s0"].endswith(" steps, 7 of 277 rows cut to 99 tokens")
    assert lines["s1"].endswith(" steps")


@pytest.mark.parametrize(
    ("method", "seeds", "expected"),
    [
        ("ia3", (0, 1, 2), "12 s for 30 steps"),  # all cells together
        ("lora", (0, 1, 2), "37 s for 3 x 30 steps"),  # one after the other
        ("lora", 0, "12 s for 30 steps"),
    ],
)
def test_the_time_of_a_grid_covers_all_its_cells(method, seeds, expected, capsys):
    config = train.Config(method=method, seed=seeds)
    finals = [{}]
    if isinstance(seeds, tuple):
        finals = [{"adapter": f"s{seed}"} for seed in seeds]
    assert f"\n  time        {expected}\n" in text_of(capsys, config, *finals)


def test_without_labeled_rows_the_adapter_can_still_be_used(capsys):
    text = text_of(capsys, train.Config(), {"rows": 0, "accuracy": None, "accuracy_before": None})
    assert "- before, - after" in text
    assert "use it      minia3 predict tiny-t5 new.csv --adapter runs/x/adapter\n" in text
    assert "commonest" not in text


def test_perplexities_are_shown_as_such(capsys):
    final = {
        "metric": "inverse_perplexity",
        "perplexity_before": 1234.5,
        "perplexity": 3.25,
        "answer": "messages",
    }
    text = text_of(capsys, train.Config(model="m"), final)
    assert "\n  perplexity  1,234.50 before, 3.25 after\n" in text
    assert "\n  use it      minia3 generate m --chat --adapter runs/x/adapter\n" in text
    several = train.Config(seed=(0, 1))
    text = text_of(capsys, several, {**final, "adapter": "s0"}, {**final, "adapter": "s1"})
    assert "\n  s1          perplexity 1,234.50 before, 3.25 after, 30 steps\n" in text
    no_rows = {**final, "perplexity": None, "perplexity_before": None, "accuracy": None}
    assert "perplexity  - before, - after" in text_of(capsys, train.Config(), no_rows)


def test_the_share_of_the_commonest_label_stands_beside_each_result(capsys):
    config = train.Config(task=("rte", "cb"), seed=(0, 1))
    finals = [{"adapter": "a", "commonest": 0.527}, {"adapter": "c", "commonest": 0.5}]
    _, lines = lines_of(capsys, config, *finals)
    assert lines["a"] == "accuracy 50.0% before, 75.1% after (commonest label: 52.7%), 30 steps"
    assert lines["c"] == "accuracy 50.0% before, 75.1% after (commonest label: 50.0%), 30 steps"
    _, lines = lines_of(capsys, train.Config(), {"metric": "exact_match", "auc": None})
    assert lines["exact_match"] == "50.0% before, 75.1% after"


def test_each_doubt_is_a_line_with_the_name_of_its_result(capsys):
    text = text_of(capsys, train.Config(), {"warnings": ["first", "second"]})
    assert text.endswith("\n  warning     first\n  warning     second\n")
    config = train.Config(task=("rte", "cb"), adapters="one", seed=(0, 1))
    text = text_of(capsys, config, {"adapter": "s0", "warnings": ["first"]})
    assert text.endswith("\n  warning     s0: rte: first\n")


def test_a_doubt_about_several_results_is_one_line(capsys):
    config = train.Config(seed=tuple(range(6)))
    finals = []
    for seed in range(6):
        warnings = ["of all"]
        if seed > 0:
            warnings.append("of five")
        if seed > 3:
            warnings.append("of two")
        finals.append({"adapter": f"s{seed}", "warnings": warnings})
    expected = """
  warning     all 6: of all
  warning     s1, s2, s3, s4 and 1 more: of five
  warning     s4, s5: of two
"""
    assert text_of(capsys, config, *finals).endswith(expected)


def test_results_are_described_in_a_few_words():
    assert describe("accuracy", {"accuracy": 0.5, "auc": None}) == "accuracy 50.0%"
    assert describe("macro_f1", {"accuracy": 0.5, "auc": 0.7}) == "macro_f1 50.0%, AUC 0.70"
    assert describe("accuracy", {"accuracy": None, "auc": None}) == "nothing to evaluate"
    likelihood = {"accuracy": 0.5, "auc": None, "perplexity": 2.0}
    assert describe("inverse_perplexity", likelihood) == "perplexity 2.00"
    ruled_out = {"accuracy": 0.0, "auc": None, "perplexity": None}
    assert describe("inverse_perplexity", ruled_out) == "perplexity -"
    assert before_after(FINAL, "accuracy", ".1%") == ["50.0%", "75.1%"]
    assert before_after(FINAL, "auc", ".2f") == ["-", "-"]


# The commands


def parsed(words):
    assert words[:2] == ["minia3", "train"]
    return train.Config(**parse_flags(words[2:]))


def test_the_command_that_uses_an_adapter_has_the_flags_that_an_answer_depends_on():
    config = train.Config(
        model="my model",
        method="lora",
        seed=1,
        dtype="float64",
        max_length=5,
        max_new_tokens=6,
        eval_prompt="3",
        steps=7,
    )
    words = using_command(config, "choices", Path("runs/x/adapter"))
    assert words[0] == "minia3"
    args = parse(words[1:])
    assert (args.command, args.model, args.file) == ("predict", "my model", "new.csv")
    assert (args.adapter, args.dtype, args.max_length) == ("runs/x/adapter", "float64", 5)
    assert (args.max_new_tokens, args.prompt) == (6, 3)


def test_a_base_that_one_device_does_not_hold_is_divided_in_use_too(monkeypatch):
    """Without its --shard, the command ran out of memory."""
    monkeypatch.setattr(processes._process, "n_processes", 4)
    monkeypatch.setattr(processes._process, "n_per_copy", 2)
    config = train.Config(offload=True)
    words = using_command(config, "choices", Path("a"))
    assert words[:4] == ["torchrun", "--nproc-per-node", "2", "-m"]
    args = parse(words[5:])
    assert (args.command, args.file, args.adapter) == ("predict", "new.csv", "a")
    assert (args.shard, args.offload) == (0, True)
    args = parse(using_command(config, "messages", Path("a"))[5:])
    assert (args.command, args.prompts, args.chat, args.shard) == ("generate", ["PROMPT"], True, 0)
    monkeypatch.setattr(processes._process, "n_per_copy", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on two machines
    assert using_command(config, "choices")[:4] == ["torchrun", "--nproc-per-node", "...", "-m"]
    monkeypatch.setattr(processes._process, "n_per_copy", 1)
    assert using_command(config, "choices") == [
        "minia3",
        "predict",
        "tiny-t5",
        "new.csv",
        "--offload",
    ]


def test_several_prompts_and_chats_have_no_prompt_to_use():
    config = train.Config(eval_prompt="all")
    assert using_command(config, "target") == ["minia3", "predict", "tiny-t5", "new.csv"]
    config = train.Config(eval_prompt=1, max_length=9, max_new_tokens=8)
    words = using_command(config, "messages", Path("a"))
    assert words == [
        *("minia3", "generate", "tiny-t5", "--chat"),
        *("--adapter", "a", "--max-new-tokens", "8"),
    ]


def test_a_whole_model_is_used_as_a_model(capsys):
    text = text_of(capsys, train.Config(model="t5-base", task="rte", method="full"), {})
    assert "\n  model       runs/x/model\n" in text
    words = shlex.split(text.splitlines()[-1].partition("use it")[2])
    assert words == ["minia3", "predict", "runs/x/model", "new.csv"]


def test_the_training_command_gives_the_same_config_in_the_default_places():
    config = train.Config(task="rte", lr=0.1, steps=7, out="x", device="cpu", data_dir="y")
    assert parsed(training_command(config)) == train.Config(task="rte", lr=0.1, steps=7)


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("hf:/home/me/clients/acme", "hf:acme"),
        ("/home/me/Smith, John/rows.jsonl", "rows.jsonl"),
        (("/home/me/one.csv", "rte", "hf:user/name"), "one.csv,rte,hf:user/name"),
        ("clients/rows.csv", "clients/rows.csv"),
    ],
)
def test_the_training_command_has_only_the_last_part_of_an_absolute_path(task, shown):
    command = training_command(train.Config(task=task, input="/ {text}"))
    assert command[command.index("--task") + 1] == shown
    assert command[command.index("--input") + 1] == "/ {text}"
