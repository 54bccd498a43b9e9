"""Hand the events of metrics.jsonl to TensorBoard, Weights & Biases or MLflow (--log-to).

Each tracker gets every line of metrics.jsonl, in order. If a run is resumed, its tracker begins
again with all the lines that metrics.jsonl has, so the two always agree: TensorBoard's files are
written again, and the services get a new run with the whole history.

The packages are in the extra `log`, and are imported only if they are asked for.
"""

import importlib.util
import json
import os
import re
import shutil

from minia3.files.processes import is_first
from minia3.files.read import one_line, reading
from minia3.training.choices import TRAINED_ALONE
from minia3.training.metrics_file import read_metrics

PROJECT = "minia3"  # in W&B and MLflow, unless their variables name another one
NOT_IN_MLFLOW = r"[^\w./ -]"  # characters that the name of a metric cannot have there
# How a run has ended, as W&B (which reports 255 after a Ctrl-C itself) and MLflow say it
EXIT_CODES = {"finished": 0, "stopped": 255, "failed": 1}
STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def check_trackers(names):
    """Raise ValueError if the package of a tracker is not installed. names: see --log-to."""
    if names is None:
        return
    for name in names.split(","):
        if importlib.util.find_spec(name) is None:
            remedy = "pip install 'minia3[log]', or do without: --log-to none"
            raise ValueError(f"--log-to {name} needs a package: {remedy}")


def start_trackers(config, folder):
    """Return the trackers of --log-to, which know all lines that metrics.jsonl already has.

    Of several processes, only the first one has trackers. Raise ValueError if a tracker cannot
    start, for example without a login, or if metrics.jsonl is damaged.
    """
    if config.log_to is None or not is_first():
        return []
    with reading(folder):
        lines = read_metrics(folder / "metrics.jsonl")
    trackers = []
    for name in config.log_to.split(","):
        try:
            tracker = TRACKERS[name](config, folder)
        except Exception as error:  # each package has its own
            close_trackers(trackers, "failed")
            raise ValueError(f"--log-to {name} cannot start: {one_line(error)}") from None
        trackers.append(tracker)
    for line in lines:
        trackers = hand_over(line, trackers)
    return trackers


def hand_over(line, trackers):
    """Give a line to the trackers. Return those that still work.

    A tracker that fails, for example because the network is gone, is not worth a run.
    """
    working = []
    for tracker in trackers:
        try:
            tracker.write(line)
            working.append(tracker)
        except Exception as error:
            print(f"note     {describe_failure(tracker, error)}")
    return working


def close_trackers(trackers, ending):
    """Close the trackers. ending: how the run has ended, "finished", "stopped" or "failed"."""
    for tracker in trackers:
        try:
            tracker.close(ending)
        except Exception as error:
            print(f"note     {describe_failure(tracker, error)}")


def describe_failure(tracker, error):
    name = type(tracker).__name__
    return f"{name} gets no more of this run, but metrics.jsonl has everything: {one_line(error)}"


def figures(line, config):
    """Return the numbers in a line of metrics.jsonl: "train/loss" -> 0.5.

    The names say whose they are: "final/rte/accuracy", in a grid "final/rte-s0/accuracy", and in a
    grid of mixtures "final/s0/rte/accuracy". Where the cells of a grid train one after the other,
    the steps begin again with each, so each needs a curve of its own: "train/loss/s0".
    """
    place = [line["event"]]
    if "adapter" in line:
        place.append(line["adapter"])
    if "task" in line and (config.is_mixture or "adapter" not in line):
        place.append(line["task"])
    cell_alone = list(line.get("losses", ())) if config.method in TRAINED_ALONE else []
    found = {}
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step":
            found["/".join([*place, name, *cell_alone])] = value
        if isinstance(value, dict):  # the losses of several cells
            for cell, part in value.items():
                found["/".join([*place, name, cell])] = part
    return found


class TensorBoard:
    """Writes the folder `tensorboard` of a run: tensorboard --logdir runs"""

    def __init__(self, config, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of the run that was stopped
        self.writer = SummaryWriter(folder / "tensorboard")
        self.writer.add_text("flags", f"```json\n{json.dumps(vars(config), indent=1)}\n```")

    def write(self, line):
        for name, value in figures(line, self.config).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def close(self, ending):
        self.writer.close()


class WandB:
    """Sends a run to Weights & Biases. With WANDB_MODE=offline it is written into the folder."""

    def __init__(self, config, folder):
        import wandb

        self.config = config
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            config=vars(config),
        )
        # W&B's own steps may only grow, and ours begin again with each cell that trains alone.
        self.run.define_metric("*", step_metric="step")

    def write(self, line):
        self.run.log({"step": line["step"], **figures(line, self.config)})

    def close(self, ending):
        self.run.finish(exit_code=EXIT_CODES[ending])


def find_experiment(client):
    """Return the id of the experiment of MLflow that the environment names. None: it is made."""
    given_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given_id:
        return given_id
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


class MLflow:
    """Sends a run to the server or the folder that MLFLOW_TRACKING_URI names."""

    def __init__(self, config, folder):
        import mlflow

        self.config = config
        self.client = mlflow.MlflowClient()  # which, unlike mlflow.start_run, has no global run
        run = self.client.create_run(find_experiment(self.client), run_name=folder.name)
        self.run_id = run.info.run_id
        for flag, value in vars(config).items():
            self.client.log_param(self.run_id, flag, value)

    def write(self, line):
        for name, value in figures(line, self.config).items():
            allowed = re.sub(NOT_IN_MLFLOW, "_", name)  # a file may be called "rows (1).csv"
            self.client.log_metric(self.run_id, allowed, value, step=line["step"])

    def close(self, ending):
        self.client.set_terminated(self.run_id, STATUSES[ending])


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
