"""Flags that contradict each other are one line before anything is written."""

import pytest
from running import fails, train

from minia3.training.rules import check_config


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--patience", "2"], ["--patience", "--eval-every"]),
        (
            ["--steps", "5", "--eval-every", "6"],
            ["--eval-every is 6, and the run has 5 steps", "expected at most 5"],
        ),
        (["--rank", "4"], ["--rank is for --method lora", "found --method ia3"]),
        (
            ["--method", "lora", "--sites", "k"],
            ["--sites is for --method ia3", "found --method lora"],
        ),
        (
            ["--method", "lora", "--rank", "4", "--init", "x"],
            ["--rank is for a new LoRA", "--adapter is a trained one"],
        ),
        (["--method", "icl"], ["--method icl", "give their number with --shots"]),
        (
            ["--method", "lora", "--optimizer", "adafactor"],
            ["--optimizer adafactor", "B starts at 0", "use --optimizer adamw"],
        ),
        (
            ["--method", "full", "--optimizer", "adafactor"],
            ["--optimizer adafactor", "use --optimizer adamw"],
        ),
        (["--method", "full", "--adapter", "x"], ["--method full", "--model"]),
        (["--task", "rte,cb", "--cap", "5"], ["--cap limits", "--adapters one"]),
        (["--method", "lora", "--no-cross"], ["--no-cross is for --method ia3"]),
        (["--weight-decay", "0.1"], ["--weight-decay is for --optimizer adamw"]),
        (
            ["--weight-decay", "0.1", "--optimizer", "adafactor"],
            ["--weight-decay is for --optimizer adamw"],
        ),
        (["--method", "full", "--alpha", "3"], ["--alpha is for --method lora"]),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    arguments, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fails(arguments, capsys, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"patience": 2, "eval_every": 5},
        {"steps": 5, "eval_every": 5},
        {"epochs": 3.0, "eval_every": 2000},  # how many steps they are is not known yet
        {"steps": 5, "eval_every": 6, "resume": "x"},
        {"steps": 5, "eval_every": 6, "eval_only": True},
        {"cap": 5, "adapters": "one", "task": ("rte", "cb")},
        {"method": "lora", "rank": 4, "optimizer": "adamw"},
        {"method": "lora", "adapter": "x"},
        {"method": "icl", "shots": 4},
        {"weight_decay": 0.1, "optimizer": "adamw"},
        {"weight_decay": 0.1, "method": "lora"},
        {"method": "full", "optimizer": "adamw"},
        {"method": "ia3", "sites": "k", "layers": "0", "no_cross": True, "optimizer": "adafactor"},
    ],
)
def test_flags_that_go_together_pass(flags):
    check_config(train.Config(**flags))
