"""Runs whose base is divided among processes: the same numbers as a process that is alone."""

import pytest
import running
import several
from test_replicas import cases, check_equal

SPECIAL = ["grid", "micro-batches of a grid", "fewer rows than processes", "targets"]
SPECIAL += ["several numbers of choices", "early stop", "evaluated in small batches"]


def runs_of(name):
    """Return what is special about a run -> its flags with values, and its flags without."""
    runs = {special: (cases(name)[special], []) for special in SPECIAL}
    grid = cases(name)["grid"]
    runs["recomputed"] = grid, ["--recompute"]
    runs["offloaded"] = grid, ["--offload"]
    runs["quantized"] = grid | {"quantize": "int8"}, []
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_processes_that_hold_a_model_together_have_the_numbers_of_one(name, tmp_path):
    alone = tmp_path / "1"
    for special, (flags, _) in runs_of(name).items():
        assert running.run(running.words(alone / special, **flags)) == 0
    for n_processes, n_per_copy in ((2, 2), (4, 4), (4, 2)):
        folder = tmp_path / f"{n_processes}-{n_per_copy}"
        lines = []
        for special, (flags, switches) in runs_of(name).items():
            flags = flags | {"shard": n_per_copy}
            lines.append(running.words(folder / special, *switches, **flags))
        several.run_together(n_processes, lines, tmp_path)
        for special in runs_of(name):
            check_equal(folder / special, alone / special)
