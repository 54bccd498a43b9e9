"""`minia3.train` is the script's run, and leaves the process as it was."""

import gc
import os
import signal
import sys
import threading
import weakref

import numpy as np
import pytest
import running
import torch
from forked import print_into
from running import ROOT, kill_self, metrics, outcome, run, words

import minia3
from minia3.files.lock import lock_folder
from minia3.tasks.labels import split_words
from minia3.training import from_python, group, trackers
from minia3.training.flags import as_tuple
from minia3.training.log import TrainingLog
from minia3.training.optimizer import RowOptimizer
from minia3.training.run import Failed

FLAGS = {"device": "cpu", "steps": 6, "batch_size": 4, "eval_batch_size": 64}


def call(out, **flags):
    """Train in this process, with the flags of `running.words`."""
    flags = {"model": running.model("t5"), "task": running.task(), **FLAGS, **flags}
    return minia3.train(out=out, **flags)


def process_state():
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": precisions(),
        "dtype": torch.get_default_dtype(),
        "environ": dict(os.environ),
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "path": list(sys.path),
    }


def precisions():
    """Return how torch multiplies float32, as its newer way and its older way say it."""
    modules = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    found = [getattr(module, "fp32_precision", None) for module in modules]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError:
        return found


def test_a_call_is_the_run_of_the_script(tmp_path, capsys):
    trained = call(tmp_path / "call", seed=[1, 2], lr=0.1, dropout=0.1)
    printed = capsys.readouterr().out
    assert run(words(tmp_path / "script", seed="1,2", lr=0.1, dropout=0.1)) == 0
    assert outcome(tmp_path / "call") == outcome(tmp_path / "script")
    assert trained.folder == tmp_path / "call"
    lines = [line for line in metrics(trained.folder) if line["event"] == "final"]
    assert trained.results == [without(line, "event", "step") for line in lines]
    assert [result["adapter"] for result in trained.results] == ["s1", "s2"]
    assert "2 results" in printed


def without(line, *names):
    return {name: value for name, value in line.items() if name not in names}


def test_two_calls_in_one_process_are_equal_and_leave_it_as_it_was(tmp_path):
    before = process_state()
    for name in ("a", "b"):
        call(tmp_path / name, dropout=0.2, deterministic=True)
        assert process_state() == before
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_settings_of_a_notebook_do_not_change_the_run_and_stay(tmp_path):
    call(tmp_path / "plain")
    n_threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)  # the run takes one, because the model is small
    try:
        with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            before = process_state()
            call(tmp_path / "changed")
            assert process_state() == before
            assert torch.is_autocast_enabled("cpu")
            assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(n_threads)
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "changed")


def use_less_precision():
    torch.set_float32_matmul_precision("medium")


def use_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def use_tf32_in_the_newer_way():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 has it")
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("change", [use_less_precision, use_tf32, use_tf32_in_the_newer_way])
def test_products_are_true_float32_whatever_a_notebook_has_set(change, tmp_path, monkeypatch):
    seen = []
    original = RowOptimizer.clip

    def clip(*args):
        seen.append((torch.get_float32_matmul_precision(), torch.get_deterministic_debug_mode()))
        original(*args)

    monkeypatch.setattr(RowOptimizer, "clip", clip)
    change()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = process_state()
        call(tmp_path / "run", steps=1)
        call(tmp_path / "deterministic", steps=1, deterministic=True)
        assert process_state() == before
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", 0), ("highest", 2)]


def test_it_works_in_a_thread_and_several_threads_take_turns(tmp_path):
    call(tmp_path / "main", dropout=0.1)
    before = process_state()
    results = {}

    def work(name):
        results[name] = call(tmp_path / name, dropout=0.1)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process_state() == before
    assert results.keys() == {"a", "b"}
    for name in results:
        assert outcome(tmp_path / name) == outcome(tmp_path / "main")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": 1}, 'unknown flag "learning_rate": did you mean --lr'),
        ({"batchsize": 1}, 'unknown flag "batchsize": did you mean batch_size'),
        ({"steps": 0}, "--steps is 0, expected at least 1"),
        ({"steps": "3"}, "--steps is '3', expected int"),
        ({"shard": True}, "--shard is True, expected int"),
        ({"lr": [True, 0.1]}, "--lr is True, expected float"),
        ({"seed": "0,x"}, "--seed is '0,x', expected int"),
        ({"rank": 4}, "--rank is for --method lora"),
        ({"input": ["{a}", "{b}"]}, r"--input is \('{a}', '{b}'\), expected str"),
        ({"task": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ({"resume": "nowhere"}, "--resume takes no other flags"),
    ],
)
def test_a_mistake_is_a_value_error_and_leaves_nothing(flags, message, tmp_path):
    before = process_state()
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "run", **flags)
    assert process_state() == before
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="expected the folder of a run"):
        minia3.train(resume=tmp_path)


def test_a_model_or_a_task_in_place_of_its_name_is_refused_in_a_short_line():
    for flags in (
        {"model": minia3.load_model("tiny-t5")},
        {"task": minia3.load_task("same-colour")},
    ):
        with pytest.raises(
            ValueError, match=r"^--(model|task) is .* \.\.\. .*, expected str$"
        ) as caught:
            minia3.train(**flags)
        assert len(str(caught.value)) < 250


class Table:
    """A table of pandas is compared cell by cell, and the result is neither true nor false."""

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise ValueError("The truth value of a Table is ambiguous")


@pytest.mark.parametrize("task", [Table(), [Table()]])
def test_a_table_in_place_of_its_file_is_refused(task):
    with pytest.raises(ValueError, match=r"^--task is <.*Table object.*>, expected str$"):
        minia3.train(task=task)


def test_a_program_without_standard_output_trains_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as pythonw on Windows has it
    trained = call(tmp_path / "run", steps=2)
    assert sys.stdout is None
    assert trained.results[0]["steps"] == 2


def test_a_mistake_that_a_notebook_remembers_does_not_keep_the_folder_locked(tmp_path):
    def mistake(**flags):
        """Return the error, and with its traceback all that the functions held which it left."""
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
            minia3.train(**flags)
        return caught.value

    out = tmp_path / "run"
    call(out, steps=3)
    errors = [mistake(out=out), mistake(resume=out, steps=2)]
    checkpoint = out / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-50])
    errors.append(mistake(resume=out))
    checkpoint.write_bytes(content)
    assert minia3.train(resume=out, steps=5).results[0]["steps"] == 5
    for error, part in zip(errors, ("holds a run", "--steps is 2", "damaged"), strict=True):
        assert part in str(error)


class Slow:
    """A service of --log-to for whose end nobody wants to wait."""

    def __init__(self, config, folder):
        pass

    def write(self, line):
        pass

    def close(self, ending):
        kill_self(signal.SIGINT)


def test_an_interrupt_while_a_service_ends_does_not_keep_the_folder_locked(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Slow)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        call(tmp_path / "run", steps=1, log_to="wandb")
    monkeypatch.undo()
    lock_folder(tmp_path / "run").close()
    assert interrupt.value.__traceback__ is not None


def test_a_failure_is_an_exception(tmp_path):
    with pytest.raises(Failed, match=r"the loss of step . is nan"):
        call(tmp_path / "run", lr=1e30)
    assert issubclass(Failed, RuntimeError)


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def interrupt_twice():
    kill_self(signal.SIGINT)  # which would finish the step
    kill_self(signal.SIGINT)


def make_a_mistake():
    raise ValueError("a row is too long")


def do_nothing():
    pass


@pytest.mark.parametrize(
    ("act", "flags"),
    [
        (run_out_of_memory, {}),
        (run_out_of_memory, {"recompute": True}),
        (interrupt_twice, {}),
        (interrupt_twice, {"recompute": True}),
        (make_a_mistake, {}),
        (do_nothing, {"lr": 1e30}),  # the loss becomes NaN
    ],
)
def test_an_error_that_a_notebook_remembers_keeps_no_model_and_no_activations(
    act, flags, tmp_path, monkeypatch
):
    """The error says how to continue, and then there was no memory for a second model."""
    remains = []
    load_model = group.load_model

    def load_noted_model(*args, **options):
        model = load_model(*args, **options)
        remains.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    def add_losses(log, loss_A):
        remains.append(weakref.ref(loss_A))  # with it, the graph of the step
        act()
        original(log, loss_A)

    original = TrainingLog.add_losses
    monkeypatch.setattr(group, "load_model", load_noted_model)
    monkeypatch.setattr(TrainingLog, "add_losses", add_losses)
    gc.disable()  # nothing waits until Python happens to collect garbage
    try:
        with pytest.raises((Failed, KeyboardInterrupt, ValueError)) as caught:
            call(tmp_path / "run", **flags)
        assert [reference() for reference in remains if reference() is not None] == []
    finally:
        gc.enable()
    assert len(remains) > 3
    assert caught.value.__traceback__ is not None  # as `sys.last_value` of a notebook keeps it


def test_an_error_that_the_caller_handles_keeps_its_variables(tmp_path):
    """They are cleared in what the run raises, and nowhere else."""

    def fail():
        kept = "what a debugger shows"
        raise KeyError(kept)

    try:
        fail()
    except KeyError as error:
        with pytest.raises(Failed):
            call(tmp_path / "run", lr=1e30)
        frame = error.__traceback__.tb_next.tb_frame
    assert frame.f_locals == {"kept": "what a debugger shows"}


def test_a_grid_in_which_an_adapter_fails_returns_the_results_of_the_others(tmp_path):
    trained = call(tmp_path / "run", lr=[1e-12, 1e30], warmup_ratio=0, dropout=0)
    assert [result["adapter"] for result in trained.results] == ["lr1e-12"]


def test_values_are_read_as_on_the_command_line(tmp_path):
    given = from_python.given_flags(
        {"task": "rte,cb", "seed": range(3), "lr": [0.1], "model": tmp_path, "shots": None}
    )
    assert given == {
        "task": ("rte", "cb"),
        "seed": (0, 1, 2),
        "lr": 0.1,
        "model": str(tmp_path),
    }


def test_a_flag_has_its_other_name_in_python_too():
    assert from_python.given_flags({"init": "x"}) == {"adapter": "x"}


def test_a_list_is_what_commas_say_on_the_command_line(tmp_path):
    flags = {"labels": ["no", "yes"], "losses": ("lm", "ul"), "eval_prompt": [0, 1]}
    expected = {"labels": "no,yes", "losses": "lm,ul", "eval_prompt": "0,1"}
    assert from_python.given_flags(flags) == expected
    for labels in (("no, never", "yes"), ("[neg]", "[pos]"), ("no", "[yes]")):
        given = from_python.given_flags({"labels": labels})
        assert split_words(given["labels"]) == labels
    with pytest.raises(ValueError, match=r"--steps is \(1, 2\), expected int"):
        call(tmp_path / "run", steps=[1, 2])


def test_a_path_is_not_divided_at_its_commas(tmp_path):
    """The message was about "missing", or about a tuple."""
    path = tmp_path / "missing,x.csv"
    for task in (path, [path], [str(path)], [str(path), "rte"]):
        with pytest.raises(ValueError, match=r"/missing,x\.csv: no such file or folder"):
            call(tmp_path / "run", task=task)
    given = from_python.given_flags({"task": [path, "rte"], "seed": ["0", "1"]})
    assert given == {"task": (str(path), "rte"), "seed": (0, 1)}


NUMBERS = [
    ({"steps": np.int64(10), "seed": np.uint8(1)}, {"steps": 10, "seed": 1}),
    ({"seed": np.arange(2), "lr": np.array([0.5, 0.1])}, {"seed": (0, 1), "lr": (0.5, 0.1)}),
    ({"seed": [np.int64(2), 3], "lr": np.float32(0.5)}, {"seed": (2, 3), "lr": 0.5}),
    ({"steps": torch.tensor(10), "lr": torch.tensor(0.5)}, {"steps": 10, "lr": 0.5}),
    (
        {"labels": np.array(["no", "yes"]), "model": np.str_("m")},
        {"labels": "no,yes", "model": "m"},
    ),
    ({"compile": np.True_, "shots": np.int32(4)}, {"compile": True, "shots": 4}),
]


@pytest.mark.parametrize(("flags", "expected"), NUMBERS)
def test_numbers_of_numpy_and_torch_are_those_of_python(flags, expected):
    """They were refused: --steps is np.int64(10), expected int."""
    given = from_python.given_flags(flags)
    assert given == expected
    kinds = {name: kinds_in(value) for name, value in given.items()}
    assert kinds == {name: kinds_in(value) for name, value in expected.items()}


def kinds_in(value):
    return [type(part) for part in as_tuple(value)]


def test_a_run_takes_numbers_of_numpy_and_refuses_its_booleans_as_numbers(tmp_path):
    plain = call(tmp_path / "plain", steps=3, seed=1, lr=0.5)
    found = call(tmp_path / "numpy", steps=np.int64(3), seed=np.int64(1), lr=np.float32(0.5))
    assert outcome(found.folder) == outcome(plain.folder)
    for value in (np.True_, torch.tensor(True), [np.True_]):
        with pytest.raises(ValueError, match="--seed is True, expected int"):
            call(tmp_path / "run", seed=value)
    with pytest.raises(ValueError, match=r"--steps is 3\.0, expected int"):
        call(tmp_path / "run", steps=np.float64(3))


def test_an_interrupt_saves_the_run_and_is_then_an_ordinary_interrupt(
    tmp_path, monkeypatch, capsys
):
    call(tmp_path / "whole", dropout=0.1)
    original = RowOptimizer.clip
    steps = []

    def clip(*args):
        steps.append(None)
        if len(steps) == 5:
            kill_self(signal.SIGINT)
        original(*args)

    before = process_state()
    with monkeypatch.context() as patch:
        patch.setattr(RowOptimizer, "clip", clip)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "run", dropout=0.1)
    assert len(steps) == 5  # the step was finished
    assert process_state() == before
    out = str(tmp_path / "run")
    assert capsys.readouterr().err == f"stopped; to continue: minia3.train(resume={out!r})\n"
    minia3.train(resume=out)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):  # the next one is Python's own, too
        kill_self(signal.SIGINT)


@pytest.mark.slow
def test_it_works_in_a_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = "import minia3\ntrained = minia3.train(method='none', device='cpu', out='run')\n"
    source += "trained.results[0]['accuracy'], str(trained.folder)"
    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("1 + 1")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # A kernel is Python's own process: it must find minia3, and the user's folder has a train.py.
    (tmp_path / "train.py").write_text("raise SystemExit('the train.py of a user')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
    outputs = notebook.cells[0].outputs
    assert outputs[-1]["data"]["text/plain"] == "(0.5126953125, 'run')"
    assert "same-colour: 1024 rows of test" in "".join(output.get("text", "") for output in outputs)
    assert notebook.cells[1].outputs[0]["data"]["text/plain"] == "2"


@pytest.mark.slow
def test_sigterm_saves_the_run_and_then_ends_the_process(tmp_path):
    log = tmp_path / "log"
    flags = {"model": running.model("t5"), "task": running.task(), "out": tmp_path / "run"}
    process = running.processes().Process(target=train_until_sigterm, args=(flags, log))
    process.start()
    assert running.finish(process) == -signal.SIGTERM
    assert "to continue: minia3.train(resume=" in log.read_text()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def train_until_sigterm(flags, log):
    """Train in this process, which was forked for it, until the signal comes in a step."""
    print_into(log, log, buffering=1)  # as Python does on standard error
    RowOptimizer.clip = lambda *args: kill_self(signal.SIGTERM)
    minia3.train(**flags, device="cpu", steps=3)
