"""checkpoint.pt: what is damaged, or of another version, is refused in one line."""

import errno
import functools
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from running import (
    at_line,
    contents,
    events,
    fails,
    in_new_process,
    kill_self,
    model,
    outcome,
    resume,
    run,
    words,
)

import minia3
from minia3.training.checkpoint import (
    LAYOUT,
    Checkpoint,
    all_finite,
    load_checkpoint,
    reopen_cells,
    save_checkpoint,
    saving,
    set_values,
)
from minia3.training.memory_fit import limited_memory
from minia3.training.memory_plan import MemoryCounter
from minia3.training.outcomes import result_in
from minia3.training.run import Run

N_BYTES = 1 << 25  # of a state whose copy is noticed


@pytest.mark.parametrize("damage", ["half", "html", "empty"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    whole = (out / "checkpoint.pt").read_bytes()
    broken = {"half": whole[: len(whole) // 2], "html": b"<html>", "empty": b""}[damage]
    (out / "checkpoint.pt").write_bytes(broken)
    fails(["--resume", out], capsys, "checkpoint.pt", "damaged")


def test_nobody_is_told_to_start_a_finished_run_over(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:-50])
    fails(["--resume", out], capsys, "it is finished, and metrics.jsonl has its results")
    (out / "metrics.jsonl").unlink()
    fails(["--resume", out], capsys, "damaged: remove the file to start over from step 0")


@pytest.mark.parametrize("reader", ["checkpoint.torch.load", "group.Group.load_state_dict"])
def test_a_checkpoint_for_which_memory_is_missing_is_not_called_damaged(
    reader, tmp_path, capsys, monkeypatch
):
    """It is good, and the advice about a damaged one is to remove it."""

    def read_without_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    out = tmp_path / "run"
    assert run(words(out, steps=3)) == 0
    more_steps = ["--resume", out, "--steps", 6]
    with monkeypatch.context() as patch:
        patch.setattr(f"minia3.training.{reader}", read_without_memory)
        message = "checkpoint.pt: not enough memory to read it: CUDA out of memory"
        fails(more_steps, capsys, message, code=1)
    assert run(more_steps) == 0


def test_a_byte_that_changed_is_found_by_the_checksums(tmp_path):
    """A wrong number in a vector or in the optimizer's state would go unnoticed otherwise."""
    vector = torch.full((64,), 1.5)
    save_checkpoint(tmp_path, Checkpoint(group={"vector": vector}))
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[content.index(vector.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the checksum of the record .* is wrong"):
        load_checkpoint(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit of data")
def test_a_state_is_saved_without_memory_for_a_copy(tmp_path):
    assert in_new_process(save_in_little_memory, tmp_path) > N_BYTES
    (parameter,) = load_checkpoint(tmp_path).group["parameters"].values()
    assert bool((parameter == 1).all())


def save_in_little_memory(folder):
    """Save a state with a quarter of the memory that it takes, and return the size of the file."""
    parameters = {"x": torch.nn.Parameter(torch.ones(N_BYTES // 4))}
    with limited_memory(N_BYTES // 4):
        save_checkpoint(folder, Checkpoint(group={"parameters": parameters}))
    return (folder / "checkpoint.pt").stat().st_size


def test_a_run_saves_its_parameters_and_moments_from_where_they_are(tmp_path, monkeypatch):
    save = Run.save
    found = []

    def count(run, group):
        counter = MemoryCounter()
        moments = group.optimizer.optimizer.state
        for parameter in group.parameters.values():
            for tensor in (parameter, *moments.get(parameter, {}).values()):
                counter.add(tensor)
        n_before = counter.now
        with counter:
            save(run, group)
        found.append((counter.peak - n_before, n_before))

    monkeypatch.setattr(Run, "save", count)
    assert run(words(tmp_path / "run", method="full", lr=1e-3, steps=1)) == 0
    assert found
    # The state of the random numbers is copied, and the model would be a third.
    assert all(n_more < n_bytes / 20 for n_more, n_bytes in found)


def test_a_save_for_which_memory_is_missing_says_so(tmp_path, capsys, monkeypatch):
    """It is no step that takes too much, so a smaller batch would not help."""

    def copy_without_memory(state):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: 9 bytes.")

    monkeypatch.setattr("minia3.training.checkpoint.on_cpu", copy_without_memory)
    message = "checkpoint.pt: not enough memory to save the state: [enforce fail"
    fails(words(tmp_path / "run", steps=1), capsys, message, code=1)
    assert not list((tmp_path / "run").glob(".checkpoint*"))


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_state_that_the_disk_refuses_says_that_it_is_full():
    """torch says that the position in the file is unexpected."""
    file = FullDisk()
    with pytest.raises(OSError, match="No space left on device"), saving("checkpoint.pt"):
        torch.save({"x": torch.zeros(1 << 16)}, file)


def test_a_run_that_continues_before_its_first_step_has_not_been_made_longer():
    found = []
    for step in (0, 5):
        group = {"log": {"step": step}, "cells": [{"progress": {}}]}
        (cell,) = reopen_cells(group)["cells"]
        found.append(cell["progress"].get("extended_from"))
    assert found == [None, [5]]


@pytest.mark.parametrize("step", [None, "3", 3.0])
def test_a_group_without_a_whole_number_of_steps_has_no_state_to_continue_from(step):
    assert Checkpoint(group={"log": {"step": 3}}).n_steps == 3
    assert Checkpoint(group={"log": {"step": step}}).n_steps is None


def test_values_of_other_parameters_are_not_taken():
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 3))}
    for saved in ({"a": torch.zeros(1, 3)}, {"b": torch.zeros(2, 3)}):
        with pytest.raises((KeyError, TypeError)):
            set_values(parameters, saved)
    assert bool((parameters["a"] == 1).all())


def test_biases_are_found_under_the_name_that_an_earlier_version_gave_them(tmp_path):
    """The checkpoint of a run of --method full was called damaged."""
    out = tmp_path / "run"
    assert run(words(out, method="full", lr=0.01, steps=4, eval_every=2)) == 0
    earlier = shutil.copytree(out, tmp_path / "earlier")
    saved = torch.load(earlier / "checkpoint.pt", weights_only=True)
    (cell,) = saved["group"]["cells"]
    for state, key in ((saved["group"], "parameters"), (cell["progress"], "last_parameters")):
        old_names = {name: name.replace(".bias_tables.", ".positions.") for name in state[key]}
        state[key] = {old_names[name]: value for name, value in state[key].items()}
        assert "encoder.positions.0.weight" in state[key]
    torch.save(saved, earlier / "checkpoint.pt")
    for folder in (out, earlier):
        assert run(["--resume", folder, "--steps", 8]) == 0
    assert outcome(earlier) == outcome(out)


@pytest.mark.parametrize(
    "change", [{"n_bytes": -1}, {"n_bytes": "9"}, {"n_done": None}, {"reopened": 3}, {"x": 1}]
)
def test_a_checkpoint_with_other_values_is_damaged(change, tmp_path):
    save_checkpoint(tmp_path, Checkpoint())
    assert load_checkpoint(tmp_path) == Checkpoint()
    torch.save({"layout": LAYOUT, **vars(Checkpoint()), **change}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"\A[^\n]*checkpoint.pt: damaged[^\n]*\Z"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path, capsys):
    out = tmp_path / "run"
    with at_line(0, None) as executed:
        assert run(words(tmp_path / "whole", save_every=4)) == 0
    with at_line(len(executed) // 2, functools.partial(kill_self, signal.SIGINT)):
        assert run(words(out, save_every=4)) == 130
    config = json.loads((out / "config.json").read_text())
    del config["weights"]  # as in runs of versions before it, whose weights are not compared
    (out / "config.json").write_text(json.dumps(config | {"model": str(model("llama"))}))
    fails(["--resume", out], capsys, "checkpoint.pt", "damaged: remove the file to start over")


def test_a_finished_run_of_an_earlier_version_is_finished(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    before = contents(out)
    torch.save({"finished": True, "step": 3}, out / "checkpoint.pt")
    capsys.readouterr()
    assert resume(out) == 0
    shown = capsys.readouterr().out
    assert "is finished" in shown
    assert "--steps" not in shown  # because it has kept no state
    results = minia3.train(resume=out).results
    assert results == [result_in(line) for line in events(out, "final")]
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {Path("checkpoint.pt")}


@pytest.mark.parametrize("state", [{"finished": False, "done": 0, "metrics": 9}, {"layout": 1}, {}])
def test_an_unfinished_run_of_an_earlier_version_is_refused(state, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=1)) == 0
    torch.save(state, out / "checkpoint.pt")
    before = contents(out)
    fails(["--resume", out], capsys, "checkpoint.pt", "written by another version")
    assert contents(out) == before


@pytest.mark.parametrize(("flags", "n_copies"), [({}, 3), ({"eval_every": 4}, 4)])
def test_the_last_checkpoint_of_full_fine_tuning_holds_nothing_twice(
    flags, n_copies, tmp_path, capsys
):
    """The model and the two moments of AdamW, and the last parameters if the best are others."""
    out = tmp_path / "run"
    assert run(words(out, method="full", lr=1e-3, **flags)) == 0
    n_bytes = (out / "model" / "model.safetensors").stat().st_size
    assert (out / "checkpoint.pt").stat().st_size < (n_copies + 0.7) * n_bytes
    capsys.readouterr()
    assert resume(out) == 0
    assert capsys.readouterr().out.startswith(f"{out} is finished")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_number_of_any_parameter_shows_that_not_all_are_finite(bad):
    for name in ("first", "last"):
        parameters = {"first": torch.ones(2, 3), "last": torch.ones(4)}
        assert all_finite(parameters)
        parameters[name][-1] = bad
        assert not all_finite(parameters)
    assert all_finite({})
