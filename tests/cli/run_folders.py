"""Folders of runs that were never run: the files that train.py would have written."""

import json

CONFIG = {
    "model": "m",
    "task": "rte",
    "method": "ia3",
    "seed": 0,
    "batch_size": 8,
    "lr": 0.003,
    "shots": None,
}
FINAL = {
    "event": "final",
    "model": "m",
    "task": "rte",
    "method": "ia3",
    "metric": "accuracy",
    "accuracy": 0.5,
    "trainable": 100,
    "total": 1000,
    "steps": 20,
    "seconds": 2.0,
    "architecture": "T5",
    "tokens": 25.0,
    "split": "validation",
}
TRAIN = {
    "event": "train",
    "step": 20,
    "loss": 1.0,
    "examples_per_second": 4.0,
    "tokens_per_second": 100.0,
}


def make_run(folder, finals=({},), lines=(), **config):
    """Write a run's folder and return it.

    config: the flags that differ from CONFIG. finals: a dict for each final line, of what differs
    from FINAL. lines: whole lines of metrics.jsonl that stand before the final ones.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    shared = {key: config[key] for key in ("model", "task", "method") if key in config}
    final_lines = [FINAL | shared | final for final in finals]
    write_metrics(folder, [*lines, *final_lines])
    return folder


def write_metrics(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
