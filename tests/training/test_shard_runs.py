"""Runs whose base is divided among processes: the same numbers as a process that is alone."""

from pathlib import Path

import pytest
import running
from ranks import run_on_ranks
from test_replicas import CASES, COMMON, NAMES, alone, check_equal, in_turns, of_models
from torch_version import divides_a_quantized_base

# Cases that differ in nothing that a divided base would notice: losses, and what trains.
ALIKE = ["one adapter", "unlikelihood", "length-normalized", "lora", "full", "a cell that fails"]
# Each case of test_replicas.py that is repeated here, and a few more: their flags, and switches.
RUNS = {special: (CASES[special], []) for special in CASES if special not in ALIKE}
RUNS["recomputed"] = CASES["grid"], ["--recompute"]
RUNS["offloaded"] = CASES["grid"], ["--offload"]
RUNS["quantized"] = {"quantize": "int8"}, []
PLAIN = {"recomputed": "grid", "offloaded": "grid"}  # the runs that must have the same numbers
# Cases in which copies of a model have fewer rows than others, or none, and have to wait for them.
UNEQUAL = ["micro-batches of a grid", "fewer rows than processes", "several numbers of choices"]
UNEQUAL += ["generated texts", "quantized"]
# A LLaMA reads choices in two passes and targets in one, and here each copy reads one kind.
UNEQUAL += ["choices and targets"]


def command_lines(folder, specials_of, n_per_copy=None):
    """Return a dict from the folder of each run, below `folder`, to its command line.

    specials_of: a dict from the name of each model to its cases.
    """
    lines = {}
    for name, specials in specials_of.items():
        for special in specials:
            flags, switches = RUNS[special]
            run_folder = Path(name, special)
            values = {**COMMON, "model": running.model(name), "shard": n_per_copy, **flags}
            lines[run_folder] = running.words(folder / run_folder, *switches, **values)
    return lines


@divides_a_quantized_base
@pytest.mark.slow
def test_processes_that_hold_a_model_together_have_the_numbers_of_one(tmp_path, tmp_path_factory):
    quantized = {name: ["quantized"] for name in NAMES}
    for words in command_lines(tmp_path / "1", quantized).values():
        assert running.run(words) == 0
    # What four processes do as two copies of a model need not be done again by two as one copy.
    by_four = in_turns(UNEQUAL)
    by_two = {}
    for name, specials in of_models(RUNS).items():
        by_two[name] = [special for special in specials if special not in by_four[name]]
    for n_processes, specials_of in ((2, by_two), (4, by_four)):
        folder = tmp_path / str(n_processes)
        lines = command_lines(folder, specials_of, n_per_copy=2)
        run_on_ranks(n_processes, *lines.values())
        for run_folder in lines:
            name, special = run_folder.parts
            if special == "quantized":
                expected = tmp_path / "1" / run_folder
            else:
                expected = alone(name, PLAIN.get(special, special), tmp_path_factory)
            check_equal(folder / run_folder, expected)
