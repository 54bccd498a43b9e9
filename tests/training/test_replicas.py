"""Several processes train as one: the same numbers as a process that is alone."""

import functools
import os
import pickle
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import running
import torch
from ranks import on_ranks, run_on_ranks
from safetensors.torch import load_file
from torch.testing import assert_close
from torch_version import TORCH

import minia3
from minia3.files import processes
from minia3.files.lock import waiting_for_lock
from minia3.files.processes import is_first
from minia3.training import announce, replicas
from minia3.training.config import Config
from minia3.training.replicas import seed_dropout, share_of_step, state_from_first, sum_step

TOLERANCE = 1e-9  # of float64, after some steps

NAMES = ("t5", "llama")  # of running.model

N_WRITTEN = 6  # the tokens of a text that a model writes


def written_task():
    """Return the folder of a task: each model writes some targets of its test rows by itself.

    Random words would never be written. So each result would be 0, whatever a process compares.
    """
    made = running.rows(42, (0,))
    test = made[30:]
    for turn, name in enumerate(NAMES):
        model = minia3.load_model(running.model(name), dtype=torch.float64)
        tokenizer = minia3.load_tokenizer(running.model(name))
        mine = test[turn :: len(NAMES)]
        inputs = [row["input"] for row in mine]
        texts = minia3.generate(model, tokenizer, inputs, max_new_tokens=N_WRITTEN)
        for row, text in zip(mine, texts, strict=True):
            row["target"] = text or row["target"]  # a target may not be empty
    folder = Path(running.home().name, "written")
    return running.write(folder, train=made[:20], validation=made[20:30], test=test)


TARGETS = {"task": written_task(), "max_new_tokens": N_WRITTEN}
# In the second step, the optimizer has moments.
COMMON = {"dtype": "float64", "dropout": 0.0, "steps": 2}
# Runs whose numbers are compared: what is special about each, and its flags.
CASES = {
    "one adapter": {},
    "grid": {"seed": "0,1", "lr": "3e-3,1e-2"},
    "micro-batches of a grid": {"seed": "0,1", "batch_size": 5, "micro_batch_size": 2},
    "fewer rows than processes": {"batch_size": 1},
    "unlikelihood": {"losses": "ul", "batch_size": 3},
    "length-normalized": {"losses": "ln"},
    "targets": TARGETS,
    "several numbers of choices": {"task": running.task((2, 4, 3))},
    "choices and targets": {"task": f"{running.task()},{running.task((0,))}", "batch_size": 2},
    "lora": {"method": "lora", "lr": 1e-2, "batch_size": 3},
    "full": {"method": "full", "lr": 1e-3, "batch_size": 3},
    "early stop": {"eval_every": 2, "patience": 1, "seed": "0,1", "lr": 0.3, "steps": 4},
    "evaluated in small batches": {"eval_batch_size": 5, "steps": 1},
    "generated texts": {**TARGETS, "metric": "exact_match", "steps": 1},
    "perplexity": {**TARGETS, "metric": "inverse_perplexity"},
    "a cell that fails": {"lr": "3e-3,1e31", "steps": 12},
    "in context": {"method": "icl", "shots": 4},
}
if TORCH < (2, 13):  # whose attention stays finite, and then the cell's numbers are chaotic
    del CASES["a cell that fails"]


# Cases in which a T5 and a LLaMA differ in nothing that several processes would notice: how rows
# are read and divided is the same, and so one of the models is enough.
OF_ONE_MODEL = ["one adapter", "fewer rows than processes", "unlikelihood", "length-normalized"]
OF_ONE_MODEL += ["lora", "full", "early stop", "a cell that fails", "in context"]


def command_line(name, folder, special):
    flags = COMMON | CASES[special]
    return running.words(folder / special, model=running.model(name), **flags)


# Cases in which some processes have fewer rows than others, or none, and have to wait for them.
UNEQUAL = ["micro-batches of a grid", "fewer rows than processes", "unlikelihood"]
UNEQUAL += ["several numbers of choices", "generated texts", "perplexity"]
UNEQUAL += ["evaluated in small batches"]


def in_turns(specials):
    """Return a dict from the name of each model to its share of the cases."""
    return {name: specials[i :: len(NAMES)] for i, name in enumerate(NAMES)}


def of_models(specials):
    """Return a dict from the name of each model to its cases. Those OF_ONE_MODEL take turns."""
    of_both = [special for special in specials if special not in OF_ONE_MODEL]
    others = in_turns([special for special in specials if special in OF_ONE_MODEL])
    return {name: of_both + others[name] for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_processes", "specials_of"), [(2, of_models(CASES)), (4, in_turns(UNEQUAL))]
)
def test_several_processes_have_the_numbers_of_one(
    n_processes, specials_of, tmp_path, tmp_path_factory
):
    lines = []
    codes = []
    for name, specials in specials_of.items():
        lines += [command_line(name, tmp_path / name, special) for special in specials]
        codes += map(exit_code, specials)
    run_on_ranks(n_processes, *lines, codes=codes)
    for name, specials in specials_of.items():
        for special in specials:
            expected = alone(name, special, tmp_path_factory)
            check_equal(tmp_path / name / special, expected)
            if special == "generated texts":
                assert 0 < running.metrics(expected)[-1]["accuracy"] < 1


def exit_code(special):
    return 1 if special == "a cell that fails" else 0


def alone(name, special, tmp_path_factory):
    """Return the folder of the same run in a single process.

    Each run is made once, for all tests and for all processes of pytest-xdist.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"alone-{name}"
    folder.mkdir(exist_ok=True)
    with waiting_for_lock(folder, f"{special}.lock"):
        if not (folder / special).exists():
            assert running.run(command_line(name, folder, special)) == exit_code(special)
    return folder / special


def check_equal(folder, other):
    """Check that two runs have equal vectors and equal lines, up to rounding in float64."""
    check_close(running.last_vectors(folder), running.last_vectors(other), TOLERANCE)
    for path in folder.rglob("*.safetensors"):  # adapters are float32
        check_close(load_file(path), load_file(other / path.relative_to(folder)), 1e-6)
    lines = running.metrics(folder)
    expected_lines = running.metrics(other)
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.keys() == expected_line.keys()
        for key in line.keys() - running.TIMES - {"model"}:
            assert line[key] == pytest.approx(expected_line[key], abs=TOLERANCE), (folder, key)
        if "model" in line:  # each process of pytest-xdist has a folder of its own for models
            assert Path(line["model"]).name == Path(expected_line["model"]).name
    files = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*"))


def check_close(tensors, expected, tolerance):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        options = {"rtol": 0, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(tensor, expected[name], **options)


def test_the_shares_of_a_step_are_the_whole_step(monkeypatch):
    for n_processes in (1, 2, 3, 5):
        for n_pairs, size in ((7, 7), (7, 2), (2, 1), (1, 4)):
            pairs = list(range(n_pairs))
            shares = []
            for rank in range(n_processes):
                become(monkeypatch, rank, n_processes)
                shares.append(share_of_step(pairs, size))
            assert len({len(parts) for parts in shares}) == 1  # equally many
            parts = [part for parts in shares for part in parts]
            assert all(len(part) <= size for part in parts)
            assert sorted(pair for part in parts for pair in part) == pairs
            if n_processes == 1:
                assert parts == [pairs[i : i + size] for i in range(0, n_pairs, size)]


def resumed_here(words):
    """Return the sizes of what the first process pickles for others while it resumes a run."""
    sizes = []
    broadcast = torch.distributed.broadcast_object_list

    def note_size(values, src):
        sizes.append(len(pickle.dumps(values)))
        broadcast(values, src=src)

    with mock.patch("torch.distributed.broadcast_object_list", note_size):
        assert running.run(words) == 0
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("is_finished", [False, True])
def test_no_process_gets_the_state_of_a_resumed_run_as_a_pickle(is_finished, tmp_path):
    """That of --method full is three times as large as the model, and a pickle doubles it."""
    flags = COMMON | {"method": "full", "lr": 1e-3, "optimizer": "adamw", "steps": 12}
    alone = tmp_path / "alone"
    together = tmp_path / "together"
    kill = functools.partial(running.kill_self, signal.SIGINT)
    if is_finished:
        assert running.run(running.words(alone, **flags | {"steps": 2})) == 0
    else:
        with running.at_line(0, None) as executed:
            assert running.run(running.words(tmp_path / "whole", **flags)) == 0
        with running.at_line(len(executed) // 2, kill):
            assert running.run(running.words(alone, **flags)) == 128 + signal.SIGINT
        assert 0 < running.load_checkpoint(alone).n_steps < 12
    shutil.copytree(alone, together)
    n_bytes = (alone / "checkpoint.pt").stat().st_size
    steps = ["--steps", "12"] if is_finished else []
    assert running.run(["--resume", alone, *steps]) == 0
    sizes = on_ranks(2, resumed_here, ["--resume", together, *steps])
    assert max(sizes[0]) < n_bytes / 20
    expected = load_file(alone / "model" / "model.safetensors")
    check_close(load_file(together / "model" / "model.safetensors"), expected, TOLERANCE)


def sent_state():
    """Return a state as the first process has it."""
    state = None
    if is_first():
        odd = torch.arange(12.0).view(3, 4).t()  # not contiguous
        state = {"a": [torch.tensor(True), {"b": odd, "c": None}], 0: torch.zeros(0, 3)}
        state["narrow"] = torch.tensor([1.5, -2], dtype=torch.bfloat16)
        state["number"] = torch.tensor(7)
        state["text"] = "x"
    return state_from_first(state)


@pytest.mark.slow
def test_a_state_of_any_tensors_arrives_as_it_is():
    sent, received = on_ranks(2, sent_state)
    assert received["a"][0] is not None
    assert (received["text"], received["a"][1]["c"]) == ("x", None)
    assert received.keys() == sent.keys()
    for name in (0, "narrow", "number"):
        assert_close(received[name], sent[name], rtol=0, atol=0)
    assert_close(received["a"][0], torch.tensor(True))
    assert_close(received["a"][1]["b"], torch.arange(12.0).view(3, 4).t(), rtol=0, atol=0)


def become(monkeypatch, rank, n_processes):
    """Let this process believe that it is one of several."""
    monkeypatch.setattr(processes._process, "rank", rank)
    monkeypatch.setattr(processes._process, "n_processes", n_processes)


@pytest.mark.parametrize(("flag", "shared"), [(False, "step"), (True, "evaluation")])
def test_what_processes_share_is_what_the_run_does(flag, shared, monkeypatch, capsys):
    monkeypatch.setattr(announce, "n_processes", lambda: 2)
    announce.announce_processes(2, Config(eval_only=flag))
    line = f"share    each of 2 processes computes a part of every {shared}\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ({"batch_size": 3}, "a step has 3 examples for 4 processes: start fewer of them"),
        ({"batch_size": 1}, "a step has 1 example for 4 processes: start fewer of them"),
        ({"batch_size": 2, "seed": (0, 1)}, None),
        ({"batch_size": 2, "seed": (0, 1), "method": "lora"}, "a step has 2 examples for 4"),
        ({"batch_size": 1, "eval_only": True}, None),
    ],
)
def test_a_batch_with_too_few_examples_for_all_processes_is_noted(flags, note, monkeypatch, capsys):
    monkeypatch.setattr(announce, "n_processes", lambda: 4)
    announce.announce_processes(4, Config(**flags))
    _, *notes = capsys.readouterr().out.splitlines()
    assert len(notes) == (note is not None)
    assert all(line.startswith(f"note     {note}") for line in notes)


def test_each_process_and_each_step_draws_its_own_dropout(monkeypatch):
    drawn = set()
    before = torch.get_rng_state()
    try:
        for rank in range(3):
            become(monkeypatch, rank, 3)
            for step in range(3):
                for seed in range(3):
                    seed_dropout(seed, step)
                    drawn.add(torch.rand(1).item())
        assert len(drawn) == 27
        become(monkeypatch, 1, 3)
        seed_dropout(0, 2)
        first = torch.rand(3)
        seed_dropout(0, 2)
        assert torch.rand(3).equal(first)
        become(monkeypatch, 0, 1)  # alone
        state = torch.get_rng_state()
        seed_dropout(0, 2)
        assert torch.get_rng_state().equal(state)
    finally:
        torch.set_rng_state(before)


def test_processes_that_have_not_read_equally_many_parts_are_an_error(monkeypatch):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    become(monkeypatch, 0, 2)

    def add(reports):
        """Add what a second process would have sent: that it has read other parts."""
        assert reports.tolist() == [[4, 0], [0, 0]]
        assert reports.device.type == "cpu", "a GPU would be waited for"
        reports += torch.tensor([[0, 3], [0, 15]])

    monkeypatch.setattr("minia3.training.replicas.add_over_processes", add)
    losses = torch.tensor([5.0])
    with pytest.raises(RuntimeError, match=r"\[4, 3\] parts"):
        sum_step([parameter], losses, 4, None)
    assert parameter.grad.tolist() == [1, 1, 1]
    monkeypatch.setattr("minia3.training.replicas.add_over_processes", lambda flat: flat.mul_(1))
    become(monkeypatch, 0, 1)
    assert sum_step([parameter], losses, 4, 15) == 15


def test_the_sum_has_all_dtypes_and_the_losses(monkeypatch):
    narrow = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    wide = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    unused = torch.nn.Parameter(torch.zeros(2))
    narrow.grad = torch.full((2,), 3.0, dtype=torch.bfloat16)
    wide.grad = torch.arange(4.0, dtype=torch.float64).view(2, 2)

    def add(tensor):
        """Add what a second process would have sent: the same."""
        tensor *= 2
        if tensor.shape == (2, 2):
            tensor[:, 0] = tensor[:, 1]

    become(monkeypatch, 1, 2)
    monkeypatch.setattr("minia3.training.replicas.add_over_processes", add)
    losses = torch.tensor([1.5, 0.25])
    assert sum_step([narrow, wide, unused], losses, 1, None) is None
    assert narrow.grad.tolist() == [6, 6]
    assert wide.grad.tolist() == [[0, 2], [4, 6]]
    assert unused.grad is None
    assert losses.tolist() == [3.0, 0.5]


@pytest.mark.parametrize(("n_bytes", "n_portions"), [(2**20, 1), (64, 9), (8, 55)])
def test_large_gradients_are_added_up_in_portions(n_bytes, n_portions, monkeypatch):
    """With --method full, all gradients at once would take as much memory as the model."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in [(5, 7), (1,), (3, 3), ()]]
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    gradients[2] = gradients[2].bfloat16()
    parameters[2].data = parameters[2].data.bfloat16()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    losses = torch.arange(9.0, dtype=torch.float64)
    sizes = []

    def add(tensor):
        if tensor.dtype != torch.long:  # the reports
            sizes.append(tensor.nbytes)
            tensor *= 3

    become(monkeypatch, 0, 1)
    monkeypatch.setattr(replicas, "add_over_processes", add)
    monkeypatch.setattr(replicas, "PORTION", n_bytes)
    sum_step(parameters, losses, 1, None)
    assert len(sizes) == n_portions
    assert max(sizes) <= n_bytes
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_close(parameter.grad, (gradient.double() * 3).to(gradient.dtype), rtol=0, atol=0)
    assert losses.tolist() == [3 * i for i in range(9)]


def test_a_gradient_that_is_not_contiguous_is_added_up_too(monkeypatch):
    parameter = torch.nn.Parameter(torch.zeros(3, 4).t())
    parameter.grad = torch.arange(12.0).view(3, 4).t()
    become(monkeypatch, 0, 1)
    monkeypatch.setattr(replicas, "add_over_processes", lambda tensor: tensor.mul_(3))
    monkeypatch.setattr(replicas, "PORTION", 16)
    sum_step([parameter], torch.tensor([1.0]), 1, None)
    assert_close(parameter.grad, 3 * torch.arange(12.0).view(3, 4).t(), rtol=0, atol=0)
