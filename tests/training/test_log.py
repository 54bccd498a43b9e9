"""Lines of metrics.jsonl and of the console while a run trains."""

import contextlib
import fcntl
import functools
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from running import (
    events,
    fails,
    finish,
    kill_self,
    metrics,
    model,
    resume,
    run,
    start,
    task,
    train,
    words,
)
from tqdm import tqdm
from written_out import read, results_by_hand

import minia3
from minia3.training.batch import MicroBatch
from minia3.training.cell import Progress
from minia3.training.log import TrainingLog
from minia3.training.optimizer import Adafactor


def test_metrics_are_on_disk_line_by_line_at_least_every_ten_steps(tmp_path, monkeypatch):
    out = tmp_path / "run"
    clip = Adafactor.clip
    steps = []

    def spy(*args):
        steps.append(max(line["step"] for line in metrics(out)))
        clip(*args)

    monkeypatch.setattr(Adafactor, "clip", spy)
    assert run(words(out, steps=25)) == 0
    # The last line on disk, as each step sees it.
    assert steps == [0] + [1] * 9 + [10] * 10 + [20] * 5
    assert [(line["event"], line["step"]) for line in metrics(out)] == [
        ("before", 0), ("train", 1), ("train", 10), ("train", 20), ("train", 25), ("final", 25)
    ]  # fmt: skip
    for line in metrics(out)[1:-1]:
        numbers = ("loss", "examples_per_second", "tokens_per_second", "memory_bytes")
        assert line.keys() == {"event", "step", "lr", *numbers}
        assert all(line[key] > 0 for key in numbers)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_an_early_stop_writes_the_losses_since_the_last_line(is_interrupted, tmp_path, monkeypatch):
    held_out = {5: 0.5, 10: 0.6, 15: 0.6}
    write_rest = TrainingLog.write_rest

    def interrupted(log):
        kill_self(signal.SIGINT)
        write_rest(log)

    with monkeypatch.context() as patch:
        results_by_hand(patch, lambda group, cell: held_out[group.log.step])
        if is_interrupted:
            patch.setattr(TrainingLog, "write_rest", interrupted)
        code = run(words(tmp_path / "early", steps=30, eval_every=5, patience=1))
    if is_interrupted:
        assert code == 130
        assert resume(tmp_path / "early") == 0
    assert run(words(tmp_path / "all", steps=30, save_every=15)) == 0
    early = events(tmp_path / "early", "train")
    found = [line for line in events(tmp_path / "all", "train") if line["step"] <= 15]
    assert [line["step"] for line in early] == [1, 10, 15]
    for name in ("loss", "lr"):
        assert [line[name] for line in early] == [line[name] for line in found]


def test_each_line_logs_the_learning_rate_of_its_step(tmp_path):
    assert run(words(tmp_path / "run", steps=12, warmup_ratio=0.5)) == 0
    rates = {
        line["step"]: line["lr"] for line in metrics(tmp_path / "run") if line["event"] == "train"
    }
    assert rates == pytest.approx({1: 0, 10: 0.003 * 3 / 6, 12: 0.003 * 1 / 6})


@pytest.mark.parametrize("seed", ["0", "0,1"])
def test_speeds_count_the_examples_of_all_adapters_with_sources_and_choices(seed, tmp_path):
    assert run(words(tmp_path / "run", seed=seed, batch_size=20, steps=1)) == 0  # all rows once
    line = next(line for line in metrics(tmp_path / "run") if line["event"] == "train")
    tokenizer = minia3.load_tokenizer(model("t5"))
    train_rows = read(task() / "train.jsonl")
    n_tokens = 0
    for row in train_rows:
        n_tokens += sum(len(tokenizer.encode(text)) for text in (row["input"], *row["choices"]))
    assert line["tokens_per_second"] / line["examples_per_second"] == pytest.approx(n_tokens / 20)


def test_the_seconds_add_up_those_of_all_steps_even_if_the_run_was_stopped(tmp_path, monkeypatch):
    clock = [0.0]
    clips = []
    original_clip = Adafactor.clip

    def slow_evaluate(*args, **options):
        clock[0] += 100
        return {"accuracy": 0.5, "auc": None, "n": 1, "n_cut": 0}

    def slow_clip(*args):
        clips.append(None)
        if len(clips) == 4:
            kill_self(signal.SIGINT)
        clock[0] += 2
        original_clip(*args)

    monkeypatch.setattr("minia3.training.log.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("minia3.training.group.evaluate", slow_evaluate)
    monkeypatch.setattr(Adafactor, "clip", slow_clip)
    out = tmp_path / "run"
    assert run(words(out, eval_every=3)) == 130
    assert resume(out) == 0
    assert len(clips) == 6
    assert metrics(out)[-1]["seconds"] == 6 * 2
    speeds = [line["examples_per_second"] for line in events(out, "train")]
    assert speeds == [4 / 2] * len(speeds)


def test_a_loss_belongs_to_the_row_of_its_cell_even_if_other_cells_have_stopped():
    log = TrainingLog(None, [], train.Config(steps=9))
    log.step = 4  # no line is due after the next steps
    with log.progress_bar():
        for rows in ([0, 1, 2], [1, 2]):
            log.start_step()
            for loss_A in ([0.5, 1.0, 2.0], [0.25, 3.0, 5.0]):  # two parts of a batch
                log.add_losses(torch.tensor(loss_A))
            cells = [SimpleNamespace(row=row) for row in rows]
            log.end_step(SimpleNamespace(cells=cells, n_tokens=1))
    assert log.read_losses() == [{0: 0.75, 1: 4.0, 2: 7.0}, {1: 4.0, 2: 7.0}]


@contextlib.contextmanager
def log_by_hand(names="ab"):
    """Yield the log of cells with these names, and a list that gets its lines."""
    cells = []
    for row, name in enumerate(names):
        cell = SimpleNamespace(name=name, row=row, config=train.Config(), progress=Progress())
        cell.parameters = {"l": torch.zeros(1)}
        cells.append(cell)
    lines = []
    run = SimpleNamespace(write=lambda event, **line: lines.append(line))
    log = TrainingLog(run, cells, train.Config())
    log.seconds = 1.0
    with log.progress_bar():
        yield log, lines


def test_a_line_has_the_loss_of_every_adapter_that_has_trained_since_the_line_before():
    with log_by_hand() as (log, lines):
        log.losses_of_steps = [{0: 1.0}, {0: 3.0, 1: 4.0}]  # the second one trains again
        log.write_training(log.cells)
        assert lines[0]["losses"] == {"a": 2.0, "b": 4.0}
        assert log.cells[1].progress.losses == [4.0]


def test_the_losses_of_adapters_that_have_failed_are_in_no_line():
    with log_by_hand() as (log, lines):
        log.cells[0].progress.failure = "its loss is NaN"
        log.losses_of_steps = [{0: float("nan")}]
        log.write_training(log.cells)
        assert (lines, log.losses_of_steps) == ([], [])
        log.seconds = 2.0
        log.losses_of_steps = [{0: float("nan")}, {1: 4.0}]
        log.write_training(log.cells)
        assert lines[0]["losses"] == {"b": 4.0}


# Losses that are not finite


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_what_to_try(
    tmp_path, capsys, monkeypatch
):
    original = MicroBatch.losses
    calls = []

    def losses(part, logp_BCL):
        calls.append(None)
        return original(part, logp_BCL) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(MicroBatch, "losses", losses)
    fails(words(tmp_path / "run"), capsys, "the loss of step 4 is nan", "--lr", "--dtype", code=1)
    *lines, failed = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    assert failed["event"] == "failed"
    assert "step 4" in failed["reason"]


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path, capsys):
    fails(
        words(tmp_path / "run", lr=1e30),
        capsys,
        "the loss of step ",
        " is nan: ",
        "try a lower --lr",
        code=1,
    )


def test_an_evaluation_that_is_due_when_every_cell_has_failed_changes_nothing(tmp_path, capsys):
    # Losses are read when a line is due: at step 10, and so is the evaluation.
    flags = {"lr": 1e30, "warmup_ratio": 0, "steps": 12, "eval_every": 10, "dropout": 0}
    fails(words(tmp_path / "run", **flags), capsys, "the loss of step ", "lower --lr", code=1)
    assert [line["event"] for line in metrics(tmp_path / "run")] == ["before", "train", "failed"]
    fails(["--resume", tmp_path / "run"], capsys, "the loss of step ", "lower --lr", code=1)
    assert [line["event"] for line in metrics(tmp_path / "run")] == ["before", "train", "failed"]


# The console


def test_progress_is_plain_lines_if_stderr_is_not_a_terminal(tmp_path, capsys):
    assert run(words(tmp_path / "run", steps=12, eval_every=6)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1", "6", "10", "12", "12"]
    for unit in ("loss ", "lr ", "examples/s", "tokens/s", "MB"):
        assert unit in lines[0]
    assert "held out" in lines[1]


@contextlib.contextmanager
def terminal(name):
    """stderr is the terminal `name`."""
    os.dup2(os.open(name, os.O_WRONLY), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    yield


@pytest.mark.slow
def test_progress_is_a_bar_in_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # lines, columns
    prepare = functools.partial(terminal, os.ttyname(theirs))
    process = start(words(tmp_path / "run", steps=12), tmp_path / "log", prepare)
    assert finish(process) == 0
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    text = shown.decode()
    parts = re.split(r"[\r\n]|\x1b\[A", text)
    assert max(map(len, parts)) <= 80
    last = text.rstrip().split("\r")[-1]
    for unit in ("12/12", "step/s", "loss "):
        assert unit in last
    # A few lines with losses stay: of the first step, and about every tenth of the run.
    lines = [
        line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("step")
    ]
    assert [line.split()[1] for line in lines] == ["1", "10", "12"]
    assert all("loss " in line for line in lines)


def test_a_slow_step_shows_its_loss_before_a_line_is_due(tmp_path, monkeypatch):
    shown = []

    class Bar(tqdm):
        def set_postfix_str(self, text, **options):
            shown.append((self.n, text))

    @contextlib.contextmanager
    def bar(**options):
        with Bar(**options, file=io.StringIO()) as made:
            yield made

    monkeypatch.setattr("minia3.training.log.progress_bar", bar)
    monkeypatch.setattr("minia3.training.log.REFRESH", 0)
    assert run(words(tmp_path / "run", steps=8)) == 0
    assert [n for n, _ in shown] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert all(text.startswith("loss ") for _, text in shown)
