"""What a run prints before it trains."""

import warnings
from contextlib import contextmanager

from minia3.files.messages import plural
from minia3.files.processes import n_processes
from minia3.files.read import reading
from minia3.model.shard import is_sharded
from minia3.training.choices import TRAINED_ALONE
from minia3.training.flags import expand_grid
from minia3.training.metrics_file import read_metrics
from minia3.training.optimizer import learning_rate
from minia3.training.shown_commands import resume_command


@contextmanager
def announcing_warnings():
    """Print a warning of the block like the other notes of a run, and not with a line of code."""
    with warnings.catch_warnings():
        warnings.showwarning = print_note
        yield


def print_note(message, *_):
    print(f"warning  {message}", flush=True)


def announce_device(device, reason, dtype, dtype_before):
    """Print the device and the dtype, and a note if a resumed run had another dtype before.

    dtype_before: what the weights were until the run was stopped; None: not known. Without --dtype,
    it depends on the device.
    """
    print(f"device   {device} ({reason}), {dtype}")
    if dtype_before not in (None, dtype):
        print(
            f"note     weights so far: {dtype_before}, from now on: {dtype}, because there was no "
            "--dtype; results differ by rounding"
        )


def announce_finished(run, config):
    """Print that there is nothing left to do, and how to train longer."""
    text = f"{run.folder} is finished: the final lines of its metrics.jsonl are the results"
    if run.failure is not None:
        text += f" ({describe_failed(run)})"
    # Version 0.1.0 kept no state, and users may remove checkpoint.pt.
    if config.is_training and run.saved.group is not None:
        longer = {"steps": 2 * config.steps}
        text += f"; to train longer: {resume_command(run.program, run.folder, longer)}"
    print(text)


def describe_failed(run):
    """Return which adapters of a finished run have no results, and why."""
    with reading(run.folder):
        lines = read_metrics(run.folder / "metrics.jsonl")
    reasons = [line["reason"] for line in lines if line["event"] == "failed"]
    if len(reasons) < 2:  # none if metrics.jsonl was removed
        return f"an adapter that failed has none: {run.failure}"
    return f"{len(reasons)} adapters that failed have none: {'; '.join(reasons):.600}"


def announce_start_over(folder):
    """Print that a run begins again, if it has written results but has no checkpoint."""
    path = folder / "metrics.jsonl"
    if path.exists():
        print(f"note     {folder} has no checkpoint.pt, so the run starts over: {path} is replaced")


def announce_code(changes):
    """Print that a resumed run continues with other code. changes: from `code_changes`."""
    if not changes:
        return
    before = ", ".join(f"{name} {versions[0]}" for name, versions in changes.items())
    now = ", ".join(f"{name} {versions[1]}" for name, versions in changes.items())
    print(f"note     computed so far with {before}, and from now on with {now}: results may differ")


def announce_extension(n_steps, config):
    """Print that a run continues after `n_steps` steps, and what its learning rate does then."""
    cell_configs = expand_grid(config, config.axes)
    rates = [f"{learning_rate(n_steps, cell_config):.1e}" for cell_config in cell_configs]
    distinct = ",".join(dict.fromkeys(rates))  # not the same one for each task and seed
    print(
        f"extended from step {n_steps} to step {config.steps}: the learning rate continues as in a "
        f"run of {config.steps} steps, at {distinct}, and falls to 0"
    )


def announce_processes(n_before, config):
    """Print how many processes there are, if it is more than one, or another number than before.

    n_before: how many have trained a resumed run so far.
    """
    n_now = n_processes()
    if n_now > 1:
        shared = "step" if config.is_training else "evaluation"
        print(f"share    each of {n_now} processes computes a part of every {shared}")
    n_examples = examples_of_step(config)
    if config.is_training and n_examples < n_now:
        examples = f"{n_examples} {plural(n_examples, 'example')}"
        print(f"note     a step has {examples} for {n_now} processes: start fewer of them")
    if n_before != n_now:
        print(
            f"note     processes so far: {n_before}, from now on: {n_now}; results differ by "
            "rounding, and dropout is drawn differently"
        )
    asks_for_shards = config.shard not in (None, 1) and not config.offload
    if config.resume is not None and n_now == 1 and asks_for_shards:  # see `choose_shards`
        print("note     --shard needs several processes, and there is one: it holds the whole base")


def examples_of_step(config):
    """Return how many examples a step has while no adapter has stopped: those of all adapters that
    train together.
    """
    if config.method in TRAINED_ALONE:
        return config.batch_size
    return config.batch_size * len(expand_grid(config, config.axes))


def announce_group(group, is_first):
    """Print what trains, and on which rows.

    All groups of a run load the same model, so only the first one prints it.
    """
    if is_first:
        announce_model(group)
    lines = []
    for cell in group.cells:
        for assignment in cell.assignments:
            lines += describe_assignment(assignment, cell.config)
    lines += [f"note     {text}" for text in group.warnings]
    for line in dict.fromkeys(lines):  # cells that share a task share its lines
        print(line)


def announce_model(group):
    line = f"model    {group.config.model}: {group.n_base:,} parameters"
    if group.n_trained:
        share = group.n_trained / group.n_base
        line += f", {group.n_trained:,} trained ({share:.3%})"
    print(line)
    if is_sharded(group.model):
        print(describe_shards(group.model.shards))


def describe_shards(shards):
    """Return a line about where the weights of the blocks are."""
    n = shards.mesh.size()
    line = f"shard    {n} processes share one copy of the base"
    if n == 1:
        line = "shard    one process holds the base"
    if shards.offload:
        line += ", in the memory of the CPU"
    return line


def describe_assignment(assignment, config):
    """Return lines about the rows of a task and what they are used for."""
    n_train = len(assignment.train_rows)
    n_report = len(assignment.report_rows)
    uses = []
    if config.is_training:
        uses.append(f"{n_train} {plural(n_train, 'row')} to train on")
    if config.method == "icl":
        uses.append(f"{n_train} {plural(n_train, 'row')} to put before each input")
    uses.append(f"{n_report} {plural(n_report, 'row')} of {assignment.report_split} to report on")
    lines = [f"task     {assignment.task.name}: {', '.join(uses)}"]
    if assignment.task.columns:
        lines.append(f"columns  {assignment.task.columns}")
    for note in assignment.notes:
        lines.append(f"note     {note}")
    for doubt in assignment.doubts:
        lines.append(f"warning  {doubt}")
    return lines
