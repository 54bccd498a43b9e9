"""What TensorBoard, W&B and MLflow have of a run is what metrics.jsonl has."""

import json
import os
import re
import signal
import struct
import sys
import threading
from types import SimpleNamespace

import pytest
import running
from running import fails, kill_self, load_checkpoint, metrics, resume, run, words

from minia3.training import trackers
from minia3.training.group import Group
from minia3.training.log import TrainingLog
from minia3.training.run import Run
from minia3.training.trackers import figures, find_experiment


def expected_figures(folder, method="ia3"):
    """Return {(name, step): value} of metrics.jsonl."""
    config = running.train.Config(method=method)
    found = {}
    for line in metrics(folder):
        for name, value in figures(line, config).items():
            found[name, line["step"]] = pytest.approx(value)
    return found


def tensorboard_figures(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = accumulators.EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    found = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            assert (name, event.step) not in found
            found[name, event.step] = event.value
    return found


def test_the_numbers_of_a_line_have_names_that_say_whose_they_are():
    line = {
        "event": "train",
        "step": 10,
        "loss": 0.5,
        "losses": {"s0": 0.4, "s1": 0.6},
        "auc": None,
    }
    config = running.train.Config()
    mixture = running.train.Config(task=("rte", "cb"), adapters="one")
    losses = {"train/loss": 0.5, "train/losses/s0": 0.4, "train/losses/s1": 0.6}
    assert figures(line, config) == losses
    line = {"event": "final", "step": 10, "adapter": "s0", "task": "rte", "accuracy": 0.5}
    assert figures(line, config) == {"final/s0/accuracy": 0.5}
    assert figures(line, mixture) == {"final/s0/rte/accuracy": 0.5}
    line = {"event": "eval", "step": 1, "task": "rte", "n": 3}
    assert figures(line, config) == figures(line, mixture) == {"eval/rte/n": 3}
    assert figures({"event": "failed", "step": 1, "reason": "the loss"}, config) == {}


@pytest.fixture
def names(monkeypatch):
    """Let TensorBoard only collect the name and the step of each figure."""
    names = []

    class Writer:
        """Writes scalars of TensorBoard, but only into a list."""

        def __init__(self, folder):
            pass

        def add_text(self, name, text):
            pass

        def add_scalar(self, name, value, step):
            names.append((name, step))

        def flush(self):
            pass

        close = flush

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return names


def test_the_tasks_of_a_mixture_in_a_grid_have_a_name_each(tmp_path, names):
    """A tracker would take figures of one name and step for one figure."""
    tasks = f"{running.task()},{running.task((2, 3, 1))}"
    flags = {"task": tasks, "adapters": "one", "seed": "0,1", "log_to": "tensorboard"}
    assert run(words(tmp_path / "run", steps=2, eval_every=1, **flags)) == 0
    assert ("final/s1/task-2-3-1/accuracy", 2) in names
    assert len(set(names)) == len(names)


def test_cells_that_train_one_after_the_other_have_a_curve_each(tmp_path, names):
    """A curve of all would go back to the first step with each cell."""
    flags = {"method": "lora", "seed": "0,1", "log_to": "tensorboard"}
    assert run(words(tmp_path / "run", steps=2, **flags)) == 0
    assert {("train/loss/s0", 2), ("train/lr/s1", 2), ("train/losses/s1", 2)} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_tensorboard_has_what_metrics_jsonl_has(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert run(words(out, steps=12, seed="0,1", eval_every=6, log_to="tensorboard")) == 0
    found = tensorboard_figures(out)
    assert found == expected_figures(out)
    assert ("train/losses/s0", 10) in found
    assert ("eval/s1/accuracy", 6) in found
    assert run(["--resume", out, "--steps", 15]) == 0
    assert tensorboard_figures(out) == expected_figures(out)


def test_a_finished_run_can_still_be_sent(tmp_path, names, capsys):
    out = tmp_path / "run"
    assert run(words(out, steps=2)) == 0
    assert names == []
    lines = (out / "metrics.jsonl").read_bytes()
    assert run(["--resume", out, "--log-to", "tensorboard"]) == 0
    output = capsys.readouterr().out
    assert "is finished" in output
    assert f"note     the lines of {out} were sent to tensorboard" in output
    assert ("train/loss", 2) in names
    assert any(name.startswith("final/") for name, _ in names)
    assert (out / "metrics.jsonl").read_bytes() == lines
    n_sent = len(names)
    assert run(["--resume", out]) == 0
    assert run(["--resume", out, "--log-to", "tensorboard"]) == 0  # it has the run already
    assert run(["--resume", out, "--log-to", "none"]) == 0
    assert len(names) == n_sent


class Endings:
    """Remembers how runs have ended."""

    seen = ()

    def __init__(self, config, folder):
        pass

    def write(self, line):
        pass

    def close(self, ending):
        Endings.seen += (ending,)


def test_a_grid_with_an_adapter_that_failed_is_sent_as_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Endings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    out = tmp_path / "run"
    assert run(words(out, steps=4, lr="1e30,0.01", warmup_ratio=0)) == 1
    monkeypatch.setattr(Endings, "seen", ())
    assert run(["--resume", out, "--log-to", "wandb"]) == 0
    assert Endings.seen == ("failed",)


def test_the_environment_names_the_experiment_of_mlflow(monkeypatch):
    found = {"mine": SimpleNamespace(experiment_id="3")}
    client = SimpleNamespace(
        get_experiment_by_name=found.get, create_experiment=lambda name: f"new {name}"
    )
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert find_experiment(client) == "new minia3"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert find_experiment(client) == "3"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
    assert find_experiment(client) == "17"


@pytest.mark.slow
def test_a_resumed_run_leaves_no_steps_that_were_undone(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    original = Group.update
    updates = []

    class Killed(BaseException):
        pass

    def update(group, rates):
        updates.append(rates)
        if len(updates) == 12:
            raise Killed
        original(group, rates)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "update", update)
        with pytest.raises(Killed):
            run(words(out, steps=14, save_every=7, log_to="tensorboard"))
    assert ("train/loss", 10) in tensorboard_figures(out)  # beyond the checkpoint of step 7
    assert resume(out) == 0
    assert tensorboard_figures(out) == expected_figures(out)


def test_a_package_that_is_missing_is_named_with_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        flags = words(tmp_path / "run", log_to=name)
        fails(flags, capsys, f"--log-to {name} needs a package: pip install 'minia3[log]'")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_resumed_may_do_without_its_trackers(tmp_path, capsys, monkeypatch):
    """The other machine may lack the package, or a login."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: name)
        assert run(words(out, steps=3, log_to="wandb")) == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    resumed = ["--resume", out, "--steps", 6]
    fails(resumed, capsys, "--log-to wandb needs a package", "or do without: --log-to none")
    assert run([*resumed, "--log-to", "none"]) == 0
    assert metrics(out)[-1]["steps"] == 6
    assert json.loads((out / "config.json").read_text())["log_to"] is None
    assert run(words(out, "--or-resume", steps=6, log_to="none")) == 0
    fails(words(tmp_path / "new", log_to="none,wandb"), capsys, "--log-to none needs a package")


def test_without_a_folder_there_is_nothing_to_log(capsys):
    pytest.importorskip("tensorboard")
    fails(words(None, "--eval-only", log_to="tensorboard"), capsys, "give --out")


def test_packages_are_imported_only_if_they_are_asked_for(tmp_path):
    assert run(words(tmp_path / "run", steps=1)) == 0
    assert not {"wandb", "mlflow"} & sys.modules.keys()


def read_wandb_file(path):
    """Yield the records of a .wandb file, which has the format of LevelDB's log.

    After a header of 7 bytes come blocks of 32 KiB. In a block, each part of a record begins with a
    checksum (4 bytes), its length (2 bytes) and its kind: whole, first, middle or last part.
    """
    data = path.read_bytes()
    place = 7
    parts = b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is too short for a part
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


class RowsThatOnlyGrow:
    """A run of W&B, which passes over what has an earlier step of its own than it already has."""

    def __init__(self):
        self.rows = []
        self.axes = {}
        self.step = 0

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row, step=None):
        if step is None:
            step = self.step + 1
        if step >= self.step:
            self.rows.append(row)
            self.step = step


def test_wandb_has_the_lines_of_every_cell_that_trains_alone(tmp_path, monkeypatch):
    tracked = RowsThatOnlyGrow()
    wandb = SimpleNamespace(init=lambda **settings: tracked)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = trackers.WandB(running.train.Config(), tmp_path)
    for cell in ("s0", "s1"):
        for step in (1, 10):
            tracker.write({"event": "train", "step": step, "losses": {cell: 0.5}})
    assert tracked.axes == {"*": "step"}
    assert tracked.rows == [
        {"step": 1, "train/losses/s0": 0.5},
        {"step": 10, "train/losses/s0": 0.5},
        {"step": 1, "train/losses/s1": 0.5},
        {"step": 10, "train/losses/s1": 0.5},
    ]


@pytest.mark.slow
def test_wandb_offline_has_what_metrics_jsonl_has(tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    # The cells of a LoRA train one after the other, so the steps begin again.
    assert run(words(out, method="lora", seed="0,1", log_to="wandb")) == 0
    fails(words(tmp_path / "nan", lr=1e30, log_to="wandb"), capsys, "lower --lr", code=1)
    wandb.teardown()  # waits for the process that writes the file, as the end of a program does
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    (failed,) = tmp_path.glob("nan/wandb/offline-run-*/*.wandb")
    records = {}
    for path in (file, failed):
        records[path] = [Record.FromString(data) for data in read_wandb_file(path)]
    codes = []
    for path in (file, failed):
        ends = [record for record in records[path] if record.HasField("exit")]
        codes += [record.exit.exit_code for record in ends]
    assert codes == [0, 1]
    found = {}
    for record in records[file]:
        values = {}
        for item in record.history.item:
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for name, value in values.items():
            if name != "step" and not name.startswith("_"):
                found[name, values["step"]] = value
    assert found == expected_figures(out, "lora")


@pytest.mark.slow
def test_mlflow_in_a_folder_has_what_metrics_jsonl_has(tmp_path, capsys, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert run(words(out, seed="0,1", log_to="mlflow")) == 0
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("minia3")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["seed"] == "(0, 1)"
    found = {}
    for name in tracked.data.metrics:
        for metric in client.get_metric_history(tracked.info.run_id, name):
            found[name, metric.step] = metric.value
    assert found == expected_figures(out)
    assert os.listdir(tmp_path).count("mlflow.db") == 1
    fails(words(tmp_path / "nan", lr=1e30, log_to="mlflow"), capsys, "lower --lr", code=1)
    statuses = [entry.info.status for entry in client.search_runs([experiment.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]
    assert running.events(out, "final")


def test_mlflow_gets_the_figures_of_a_task_with_any_name():
    """MLflow refuses other characters in names of metrics, and then it got no more of the run."""
    logged = {}

    class Client:
        def log_metric(self, run_id, name, value, step):
            assert re.fullmatch(r"[\w./ -]*", name)
            logged[name] = value

    tracker = trackers.MLflow.__new__(trackers.MLflow)
    tracker.config = running.train.Config()
    tracker.client = Client()
    tracker.run_id = "1"
    tracker.write({"event": "before", "step": 0, "task": "rows (1)", "accuracy": 0.5, "auc": None})
    tracker.write({"event": "before", "step": 0, "task": "Zeilen-ä.b", "accuracy": 0.7})
    assert logged == {"before/rows _1_/accuracy": 0.5, "before/Zeilen-ä.b/accuracy": 0.7}


class Broken:
    """A service that is gone after the first line."""

    def __init__(self, config, folder):
        self.lines = []

    def write(self, line):
        if self.lines:
            raise ConnectionError("the network\nis gone")
        self.lines.append(line)

    def close(self, ending):
        raise ConnectionError("the network is gone")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert run(words(tmp_path / "run", steps=3, log_to="tensorboard")) == 0
    out = capsys.readouterr().out
    assert out.count("Broken gets no more of this run, but metrics.jsonl has everything") == 1
    assert "everything: the network is gone\n" in out
    assert running.events(tmp_path / "run", "final")


class Hanging:
    """A service that does not answer, and so waits within `write` when SIGTERM comes."""

    def __init__(self, config, folder):
        self.lines = []
        self.answered = []
        self.silent_at = None  # the event and the step of the line that it does not answer
        self.endings = []

    def write(self, line):
        self.lines.append((line["event"], line["step"]))
        if (line["event"], line["step"]) == self.silent_at:
            self.silent_at = None  # another line of the same step is answered
            kill_self(signal.SIGTERM)
        self.answered.append((line["event"], line["step"]))

    def close(self, ending):
        self.endings.append(ending)


@pytest.mark.parametrize("event", ["train", "eval"])
def test_a_tracker_that_does_not_answer_holds_no_signal_back(event, tmp_path, monkeypatch):
    """Until it answered, the run could not stop, and then it was killed between checkpoints."""
    flags = {"steps": 12, "save_every": 100, "eval_every": 10}
    assert run(words(tmp_path / "whole", **flags)) == 0
    out = tmp_path / "run"
    tracker = Hanging(None, None)
    tracker.silent_at = (event, 10)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda config, folder: tracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert run(words(out, log_to="wandb", **flags)) == 128 + signal.SIGTERM
    assert tracker.lines[-1] == (event, 10)
    assert tracker.answered == tracker.lines[:-1]
    assert tracker.endings == ["stopped"]
    assert load_checkpoint(out).n_steps == 10
    assert resume(out) == 0
    assert running.outcome(out) == running.outcome(tmp_path / "whole")


def test_lines_after_one_without_an_answer_are_handed_over_in_order(tmp_path, monkeypatch):
    adapters = []

    class Noting(Hanging):
        def write(self, line):
            adapters.append(line.get("adapter"))
            super().write(line)

    tracker = Noting(None, None)
    tracker.silent_at = ("eval", 10)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda config, folder: tracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    flags = {"steps": 12, "eval_every": 10, "seed": "0,1", "log_to": "wandb"}
    assert run(words(tmp_path / "run", **flags)) == 128 + signal.SIGTERM
    written = metrics(tmp_path / "run")
    assert [(line["event"], line["step"]) for line in written].count(("eval", 10)) == 2
    assert adapters == [line.get("adapter") for line in written]
    assert tracker.lines == [(line["event"], line["step"]) for line in written]


def test_a_tracker_has_the_lines_of_the_step_in_which_a_run_is_stopped(tmp_path, monkeypatch):
    out = tmp_path / "run"
    tracker = Hanging(None, None)
    original = TrainingLog.write_training

    def write_training(log, cells):
        original(log, cells)
        if log.step == 10:
            kill_self(signal.SIGTERM)

    monkeypatch.setattr(TrainingLog, "write_training", write_training)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda config, folder: tracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert run(words(out, steps=12, log_to="wandb")) == 128 + signal.SIGTERM
    assert tracker.lines == [(line["event"], line["step"]) for line in metrics(out)]
    assert tracker.lines[-1] == ("train", 10)


def test_a_tracker_that_fails_while_a_run_is_resumed_does_not_end_it(tmp_path, capsys, monkeypatch):
    received = []

    class Working:
        """A service that gets everything."""

        def __init__(self, config, folder):
            received.clear()

        def write(self, line):
            received.append(line)

        def close(self, ending):
            pass

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Working)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    out = tmp_path / "run"
    assert run(words(out, steps=3, log_to="tensorboard,wandb")) == 0
    assert received == metrics(out)
    capsys.readouterr()
    assert run(["--resume", out, "--steps", 6]) == 0
    assert capsys.readouterr().out.count("Broken gets no more of this run") == 1
    assert received == metrics(out)
    assert metrics(out)[-1]["steps"] == 6


def test_metrics_that_are_damaged_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    out = tmp_path / "run"
    original = Group.update

    def update(group, rates):
        running.kill_self(signal.SIGINT)
        original(group, rates)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "update", update)
        assert run(words(out, steps=3, log_to="tensorboard")) == 130
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(["{" + lines[0][2:], *lines[1:]]))
    fails(["--resume", out], capsys, f"{out}: metrics.jsonl, line 1: ")


def test_ctrl_c_while_a_tracker_closes_is_no_traceback(tmp_path, capsys, monkeypatch):
    class Uploading:
        def __init__(self, config, folder):
            pass

        def write(self, line):
            pass

        def close(self, ending):
            raise KeyboardInterrupt

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Uploading)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    out = tmp_path / "run"
    assert run(words(out, steps=3, log_to="wandb")) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert resume(out) == 0  # it is finished, and its folder is not locked


def test_a_mistake_before_the_first_evaluation_leaves_no_files_of_tensorboard(
    tmp_path, capsys, monkeypatch
):
    class Writer:
        """Writes the folder `tensorboard`, also as it closes."""

        def __init__(self, config, folder):
            self.path = folder / "tensorboard" / "events"
            self.path.parent.mkdir()

        def close(self, ending):
            self.path.write_text("the end")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Writer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    damaged = tmp_path / "vectors.safetensors"
    damaged.touch()
    flags = words(tmp_path / "run", log_to="tensorboard", adapter=damaged)
    for _ in range(2):  # the second time, the folder is not in the way
        fails(flags, capsys, damaged.name)
        assert list(tmp_path.iterdir()) == [damaged]


class Service:
    """A stand-in for the packages of W&B and MLflow, which keeps how each run has ended."""

    def __init__(self):
        self.exit_codes = []
        self.statuses = []

    # W&B

    def init(self, **settings):
        return self

    def define_metric(self, name, step_metric):
        pass

    def log(self, row):
        pass

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)

    # MLflow

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment_id, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id="2"))

    def log_param(self, run_id, flag, value):
        pass

    def log_metric(self, run_id, name, value, step):
        pass

    def set_terminated(self, run_id, status):
        self.statuses.append(status)


def test_services_hear_how_a_run_has_ended(tmp_path, capsys, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    original = Group.update

    def update(group, rates):
        running.kill_self(signal.SIGINT)
        original(group, rates)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Group, "update", update)
        assert run(words(out, log_to="wandb,mlflow")) == 130
    assert resume(out) == 0
    fails(words(tmp_path / "nan", lr=1e30, log_to="wandb,mlflow"), capsys, "lower --lr", code=1)
    damaged = tmp_path / "vectors.safetensors"
    damaged.touch()
    fails(words(tmp_path / "x", log_to="wandb,mlflow", adapter=damaged), capsys, damaged.name)
    grid = words(tmp_path / "grid", lr="1e-12,1e30", warmup_ratio=0, log_to="wandb,mlflow")
    fails(grid, capsys, "1 of 2 adapters failed", "lr1e+30; the others have", code=1)
    assert service.exit_codes == [255, 0, 1, 1, 1]
    assert service.statuses == ["KILLED", "FINISHED", "FAILED", "FAILED", "FAILED"]


@pytest.mark.parametrize("answers", [True, False])
def test_services_hear_that_a_process_ends_in_a_step(answers, tmp_path, monkeypatch):
    """The second thread ends it, also if a service never answers."""
    service = Service()
    patience = threading.Event()
    called = threading.Event()
    original = service.set_terminated

    def set_terminated(run_id, status):
        original(run_id, status)
        called.set()
        if not answers:
            patience.wait(60)

    ended = []

    def exit_now(code):
        assert called.wait(60)
        ended.append((code, list(service.exit_codes), list(service.statuses)))
        patience.set()

    def sum_over_processes(run, group):
        if group.log.step == 3:
            run.signals.end_process(signal.SIGTERM)

    service.set_terminated = set_terminated
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("minia3.training.signals.os._exit", exit_now)
    monkeypatch.setattr("minia3.training.run.CLOSING", 60 if answers else 0.1)
    monkeypatch.setattr(Run, "sum_over_processes", sum_over_processes)
    run(words(tmp_path / "run", log_to="wandb,mlflow"))
    assert ended == [(143, [255], ["KILLED"])]


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(config, folder):
        raise RuntimeError("not\nlogged in")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    flags = words(tmp_path / "run", log_to="wandb")
    fails(flags, capsys, "--log-to wandb cannot start: not logged in")
    assert not (tmp_path / "run").exists()
