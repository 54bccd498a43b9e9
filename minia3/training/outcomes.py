"""How the adapters of a run have ended, as its metrics.jsonl says. No torch is needed."""

import math

from minia3.files.read import read_json, reading
from minia3.training.metrics_file import read_metrics

GRID_FLAGS = ("task", "seed", "lr", "warmup_ratio")  # several values make a grid of adapters


def outcomes_of(lines):
    """Return a dict from each adapter that has ended to "final" or "failed"."""
    ends = [line for line in lines if line["event"] in ("final", "failed")]
    return {line.get("adapter"): line["event"] for line in ends}


def is_mixture(config):
    """Return whether one adapter is trained on several tasks. config: of config.json."""
    return config.get("adapters") == "one" and isinstance(config["task"], list)


def count_cells(config):
    """Return how many adapters the flags of a config.json ask for."""
    lengths = []
    for flag in GRID_FLAGS:
        values = config.get(flag)
        is_axis = isinstance(values, list) and not (flag == "task" and is_mixture(config))
        if is_axis:
            lengths.append(len(values))
    return math.prod(lengths)


def all_have_ended(lines, config):
    """Return whether all adapters have ended. One of a mixture has a final line for each task.

    lines: of metrics.jsonl. config: of config.json.
    """
    events = list(outcomes_of(lines).values())
    n_tasks = len(config["task"]) if is_mixture(config) else 1
    n_finals = sum(line["event"] == "final" for line in lines)
    return len(events) >= count_cells(config) and n_finals >= n_tasks * events.count("final")


def results_of_finished(folder):
    """Return the results of a run that is finished, as a checkpoint has them, or else None.

    It is finished if all adapters have ended, at least one of them with a result.
    """
    with reading(folder):
        lines = read_metrics(folder / "metrics.jsonl")
        finals = [line for line in lines if line["event"] == "final"]
        if not finals or not all_have_ended(lines, read_json(folder / "config.json")):
            return None
    return [result_in(final) for final in finals]


def result_in(final):
    """Return the result in a final line: all but what `Run.finish_cell` has put before it."""
    return {key: value for key, value in final.items() if key not in ("event", "step")}
