"""Several processes train as one: the same numbers as a process that is alone."""

import pytest
import running
import several
import torch

TOLERANCE = 1e-9  # of float64, after some steps


def cases(name):
    """Return the flags of runs on one architecture, by what is special about each."""
    common = {"model": running.model(name), "dtype": "float64", "dropout": 0.0, "steps": 6}
    flags = {
        "one adapter": {},
        "grid": {"seed": "0,1", "lr": "3e-3,1e-2"},
        "micro-batches": {"batch_size": 6, "micro_batch_size": 2},
        "micro-batches of a grid": {"seed": "0,1", "batch_size": 5, "micro_batch_size": 3},
        "not divisible": {"batch_size": 5},
        "fewer rows than processes": {"batch_size": 1},
        "unlikelihood": {"losses": "ul"},
        "length-normalized": {"losses": "ln"},
        "targets": {"task": running.task((0,))},
        "several numbers of choices": {"task": running.task((2, 4, 3))},
        "lora": {"method": "lora", "lr": 1e-2, "batch_size": 3},
        "full": {"method": "full", "lr": 1e-3, "batch_size": 3},
        "early stop": {"eval_every": 2, "patience": 1, "seed": "0,1", "lr": 0.3},
        "evaluated in small batches": {"eval_batch_size": 5},
    }
    return {special: common | values for special, values in flags.items()}


def command_lines(name, folder):
    lines = []
    for special, flags in cases(name).items():
        lines.append(running.words(folder / special, **flags))
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_several_processes_have_the_numbers_of_one(name, tmp_path):
    alone = tmp_path / "1"
    for words in command_lines(name, alone):
        assert running.run(words) == 0
    for n_processes in (2, 4):
        folder = tmp_path / str(n_processes)
        several.run_together(n_processes, command_lines(name, folder), tmp_path)
        for special in cases(name):
            check_equal(folder / special, alone / special)


def check_equal(folder, other):
    """Check that two runs have equal vectors and equal lines, up to rounding in float64."""
    vectors = running.last_vectors(folder)
    if vectors:  # the checkpoint of full fine-tuning has none in the end
        expected = running.last_vectors(other)
        assert vectors.keys() == expected.keys()
        for name, value in vectors.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=TOLERANCE)
    lines = running.metrics(folder)
    expected_lines = running.metrics(other)
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.keys() == expected_line.keys()
        for key in line.keys() - running.TIMES:
            assert line[key] == pytest.approx(expected_line[key], abs=TOLERANCE), (folder, key)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*"))
