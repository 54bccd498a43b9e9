"""metrics.jsonl says whether a run is finished, without its checkpoint."""

import json

import pytest

from minia3.training.outcomes import results_of_finished

FINAL = {"event": "final", "step": 3, "accuracy": 0.5}


def final(task, adapter=None):
    line = FINAL | {"task": task}
    if adapter is not None:
        line["adapter"] = adapter
    return line


def failed(adapter):
    return {"event": "failed", "step": 3, "adapter": adapter, "reason": "the loss is nan"}


@pytest.mark.parametrize(
    ("flags", "lines", "is_finished"),
    [
        ({}, [final("cb")], True),
        ({}, [FINAL | {"event": "extended"}], False),
        ({"seed": [0, 1]}, [final("cb", "s0")], False),
        ({"seed": [0, 1]}, [final("cb", "s0"), final("cb", "s1")], True),
        ({"seed": [0, 1]}, [failed("s0"), final("cb", "s1")], True),
        ({"seed": [0, 1]}, [failed("s0"), failed("s1")], False),
    ],
)
def test_a_run_is_finished_if_all_its_adapters_have_ended(flags, lines, is_finished, tmp_path):
    write_run(tmp_path, {"task": "cb"} | flags, lines)
    assert (results_of_finished(tmp_path) is not None) == is_finished


def test_an_adapter_of_a_mixture_has_ended_if_each_task_has_its_result(tmp_path):
    """A tracker may take seconds for each line, and the run may be killed between two of them."""
    mixture = {"task": ["cb", "rte"], "adapters": "one"}
    lines = [final("cb"), final("rte")]
    write_run(tmp_path, mixture, lines[:1])
    assert results_of_finished(tmp_path) is None
    write_run(tmp_path, mixture, lines)
    assert [result["task"] for result in results_of_finished(tmp_path)] == ["cb", "rte"]

    grid = mixture | {"seed": [0, 1]}
    lines = [failed("s0"), final("cb", "s1"), final("rte", "s1")]
    write_run(tmp_path, grid, lines[:2])
    assert results_of_finished(tmp_path) is None
    write_run(tmp_path, grid, lines)
    assert len(results_of_finished(tmp_path)) == 2


def write_run(folder, config, lines):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
