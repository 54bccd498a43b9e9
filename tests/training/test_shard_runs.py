"""Runs whose base is divided among processes: the same numbers as a process that is alone."""

import pytest
import running
import several
from test_replicas import CASES, NAMES, check_equal
from torch_version import divides_a_quantized_base

SPECIAL = ["grid", "micro-batches of a grid", "fewer rows than processes", "targets"]
SPECIAL += ["several numbers of choices", "early stop", "generated texts", "in context"]
SPECIAL += ["evaluated in small batches"]


def command_lines(name, folder, n_per_copy=None):
    """Return the command lines of runs, and the folder of each."""
    common = {"model": running.model(name), "dtype": "float64", "dropout": 0.0, "steps": 4}
    common["shard"] = n_per_copy
    runs = {special: (CASES[special], []) for special in SPECIAL}
    runs["recomputed"] = CASES["grid"], ["--recompute"]
    runs["offloaded"] = CASES["grid"], ["--offload"]
    runs["quantized"] = {"quantize": "int8"}, []
    lines = []
    for special, (flags, switches) in runs.items():
        lines.append(running.words(folder / special, *switches, **(common | flags)))
    return lines, [folder / special for special in runs]


def of_all_models(folder, n_per_copy=None):
    """Return the command lines and the folders of the runs of all models."""
    lines, folders = [], []
    for name in NAMES:
        its_lines, its_folders = command_lines(name, folder / name, n_per_copy)
        lines += its_lines
        folders += its_folders
    return lines, folders


@divides_a_quantized_base
@pytest.mark.slow
def test_processes_that_hold_a_model_together_have_the_numbers_of_one(tmp_path):
    lines, expected = of_all_models(tmp_path / "1")
    for words in lines:
        words = [word for word in words if word != "--offload"]
        assert running.run(words) == 0
    for n_processes, n_per_copy in ((2, 2), (4, 2)):
        lines, folders = of_all_models(tmp_path / str(n_processes), n_per_copy)
        several.run_together(n_processes, lines, tmp_path)
        for found, other in zip(folders, expected, strict=True):
            check_equal(found, other)
