"""To be written."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from minia3.model.costs import flops

GRID = ("seed", "lr", "warmup_ratio")  # of a final line, where they differ from config.json's
TRAIN = ("step", "loss", "examples_per_second", "tokens_per_second")
MEASURING = (
    "data_dir",
    "shots",
    "seed",
    "dtype",
    "max_length",
    "max_new_tokens",
    "eval_prompt",
)  # a result depends on
# Of config.json, what names no row: it is a column, or within a cell, or leaves the result as it is. (Of the data what
# is in the files counts, not where they are.)
# fmt: off
UNNAMED = {"model", "task", "method", "seed", "out", "data_dir", "resume", "device", "deterministic", "checkpoint",
           "compile", "micro_batch_size", "eval_batch_size", "save_every", "minia3", "git_commit", "versions", "data"}
# fmt: on
BUDGET = (
    "steps",
    "batch_size",
)  # named where any rows differ in them, and not only those of one method


def read_results(folders):
    """-> a dict (see `_run`) for each result in metrics.jsonl, and a note on what is left out, maybe empty.

    Of results that have the same flags and data the first one counts.

    Each folder is a run's, or holds such. ValueError, of one line: it is neither, or a file is not as train.py's.
    """
    paths, runs, left_out = {}, [], []
    for folder in map(Path, folders):
        inside = [] if (folder / "config.json").exists() else sorted(folder.glob("*/config.json"))
        paths |= {
            path.resolve(): (path.parent, bool(inside))
            for path in inside or [folder / "config.json"]
        }
    for folder, found in paths.values():
        try:
            config, metrics = (
                json.loads((folder / "config.json").read_bytes()),
                folder / "metrics.jsonl",
            )
            if not {"model", "task", "batch_size"} <= config.keys():
                if found:  # a model, among runs
                    continue
                raise ValueError("config.json is that of something else")
            text = (
                metrics.read_text("utf-8").rpartition("\n")[0] if metrics.exists() else ""
            )  # a last line may be torn
            lines = json.loads(
                "[" + text.replace("\n", ",\n") + "]"
            )  # in one: so an error tells the line
            finals = [
                line for line in lines if line["event"] == "final" and line["accuracy"] is not None
            ]
            runs += [read_result(folder, config, final, lines) for final in finals]
            ended = {
                line.get("adapter"): line["event"]
                for line in lines
                if line["event"] in ("final", "failed")
            }
            left_out += (
                [f"{folder}: {x}" for x in ended if ended[x] == "failed"]
                if finals
                else [str(folder)]
            )
            axes = [
                x
                for x in config
                if isinstance(config[x], list) and (x, config.get("adapters")) != ("task", "one")
            ]
            if finals and (n := math.prod(len(config[x]) for x in axes) - len(ended)):
                left_out.append(f"{folder}: {n} adapters to come")
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{folder}: expected a run of train.py: {type(error).__name__}: {error}"
            ) from None
    note = (
        f"{len(left_out)} left out, without a result in metrics.jsonl: {', '.join(left_out)}"
        if left_out
        else ""
    )
    if not runs:
        raise ValueError(f"no run has a result: {note:.300}")
    same, data, named = {}, {}, {}
    for run in (
        runs
    ):  # named: flags in which runs of a method differ (shots: on a task), for all cells of a run
        data.setdefault(run["task"], set()).add(run["data"])
        differ = {
            key[0]
            for key, x in run["flags"].items()
            if any(y["flags"].get(key, x) != x for y in runs)
        }
        named[run["folder"]] = named.get(run["folder"], set()) | differ
    for run in runs:
        run["task"] += f" [{run['data']}]" * (
            len(data[run["task"]]) > 1
        )  # other rows under the same name
        flags = {
            key[0]: x
            for key, x in run["flags"].items()
            if key[0] in named[run["folder"]] and x is not None
        }
        run["label"] = ", ".join([run["method"], *(f"{name} {x}" for name, x in flags.items())])
        same.setdefault(
            (run["model"], run["task"], run["label"], run["trainable"], run["seed"]), run
        )
    if n := len(runs) - len(same):
        note += f"{'; ' if note else ''}{n} left out, whose flags are those of others"
    return [*same.values()], note


def read_result(folder, config, final, lines):
    """A run, or one adapter of a grid. accuracies: of each prompt, in per cent; flops: of an example, and to train."""
    run = {"folder": folder} | {key: str(final[key]) for key in ("model", "task", "method")}
    run |= {"trainable": int(final["trainable"])} | {
        key: float(final[key]) for key in ("total", "steps", "seconds")
    }
    more = [
        x for x in (final["metric"], final["split"]) if x not in ("accuracy", "validation", "test")
    ]
    digests = config.get("data", {})  # of a grid's files, those in the task's folder
    own = {
        key: x for key, x in digests.items() if f"/{key}".startswith(f"/{run['task']}/")
    } or digests
    run["data"] = hashlib.sha256(json.dumps(sorted(own.values())).encode()).hexdigest()[:6]
    run["task"] += f" ({', '.join(more)})" * bool(more)
    run["accuracies"] = 100 * np.array(final.get("accuracies", [final["accuracy"]]), float)
    if not (abs(run["accuracies"] - 50) <= 50).all():
        raise ValueError(f"accuracies are {run['accuracies'].tolist()!r:.80} %")
    name, own = final.get("adapter"), config | {key: final[key] for key in GRID if key in final}
    run["seed"], named = own["seed"], {*own} - UNNAMED
    if not run["trainable"]:  # then it was only measured
        named &= {*MEASURING, "adapter"} - ({"shots"} if run["method"] == "none" else set())
    run["flags"] = {
        (x, x not in BUDGET and run["method"], x == "shots" and run["task"]): own[x]
        for x in own
        if x in named
    }
    if config.get("adapters") == "one":
        run["flags"]["mixture", run["method"], False] = "+".join(
            Path(task).stem for task in config["task"]
        )
    run["adapter"] = folder / "adapters" / name.replace("/", "-") if name else folder / "adapter"
    weights = (run["adapter"] if run["method"] != "full" or name else folder / "model").glob(
        "*.safetensors"
    )
    run["bytes"] = (
        (sum(path.stat().st_size for path in weights) or np.nan) if run["trainable"] else 0
    )
    if run["method"] == "ia3":  # a cell's share of what all took together
        run["seconds"] /= len(
            {x.get("adapter") for x in lines if x["event"] in ("final", "failed")}
        )
    whose = {"adapter": name, "task": final["task"]}
    lines = [line for line in lines if all(line.get(key, x) == x for key, x in whose.items())]
    train = [
        line for line in lines if line["event"] == "train" and name in line.get("losses", [name])
    ]  # not yet ended
    train = [line | {"loss": line["losses"][name]} if "losses" in line else line for line in train]
    run["train"] = np.array([[line[key] for key in TRAIN] for line in train], float)
    run["eval"] = np.array(
        [[line["step"], 100 * line["accuracy"]] for line in lines if line["event"] == "eval"], float
    )
    step, _, examples, tokens = run["train"].T if len(run["train"]) else np.full((4, 1), np.nan)
    n = (
        np.diff(step, prepend=0) @ (tokens / examples) / step[-1]
    )  # tokens of an example, in the mean
    total, twice = run["total"], final["architecture"] == "Llama"
    to_train = flops(total, n * config["batch_size"] * run["steps"], twice, True)
    return run | {"flops": (flops(total, final.get("tokens", np.nan), twice), to_train)}
