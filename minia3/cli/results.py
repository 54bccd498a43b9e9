"""Read the folders of runs into results, one per adapter and task, for the table and the pictures.

A run's folder holds `config.json`, its flags, and `metrics.jsonl`, which has one line per event:

    before   the result of one adapter on one task before training
    train    every few steps: the loss, or in a grid one loss per adapter, and the speed
    eval     an evaluation on held-out rows
    final    the result of one adapter on one task
    failed   one adapter of a grid whose loss became NaN
    extended a result of an earlier end, before the run was made longer

Folders that older versions wrote are read, too, although their config.json has other flags.
"""

import hashlib
import json
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minia3.files.messages import plural
from minia3.files.read import read_json
from minia3.model.costs import flops
from minia3.tasks.split_files import HELD_OUT_FOLD, short_name
from minia3.training.choices import CHAT_TEMPLATE, TRAINED, TRAINED_ALONE
from minia3.training.config_file import NOT_FLAGS
from minia3.training.metrics_file import read_metrics
from minia3.training.outcomes import count_cells, is_mixture, outcomes_of
from minia3.training.shown_commands import EVALUATION_FLAGS

# These flags do not distinguish results: two runs that differ in nothing else share a row.
UNNAMED_FLAGS = {
    # columns of the table, or spread within a cell of it
    *("model", "task", "method", "seed"),
    # where things are: the data is compared by its checksums instead
    *("out", "data_dir", "resume", "config", "log_to", "device"),
    # other ways to compute the same result (`checkpoint` is the older name of `recompute`)
    *("deterministic", "recompute", "checkpoint", "compile", "shard", "offload", "check_weights"),
    *("micro_batch_size", "eval_batch_size", "save_every"),
    *NOT_FLAGS,
}
LORA_SHAPE = {"rank", "alpha", "where"}
LENGTHS = ("steps", "epochs")  # a result keeps one of them: see `choose_lengths`
TASK_FLAGS = ("input", "target", "labels", "metric", "chat_template")  # which suit a single task
# How a result was evaluated, whatever the method
EVALUATED = (
    *("eval_prompt", "max_length", "max_target_length", "max_new_tokens"),
    *("dtype", "quantize"),
)
USUAL_SPLITS = ("validation", "test", HELD_OUT_FOLD)
MOST_PATHS = 5  # that a message names
EXTENDED = "extended from"  # no flag: the steps after which `--resume --steps` made a run longer


@dataclass
class Result:
    """The result of one adapter on one task: a final line of metrics.jsonl, and what led to it."""

    run_folder: Path
    adapter_folder: Path  # where the adapter was saved, or the whole model
    model: str  # with a digest if other weights had the same name
    task: str  # with what is unusual: another metric or split, or other data of the same name
    metric: str
    method: str
    seed: int
    accuracy: float  # or another metric, in per cent; of several prompts, it is the median
    before: float  # the same before training; NaN if not known
    commonest: float  # of always giving the commonest label, in per cent; NaN if not known
    n_trainable: int  # parameters of one adapter
    n_steps: int
    n_bytes: float  # of the adapter's files; NaN if they are gone
    seconds: float  # of training; cells that train together share their time by their steps
    flops_per_example: float  # to evaluate; NaN if the run did not count its tokens
    flops_to_train: float  # NaN if nothing was trained
    loss_curve: np.ndarray  # (N, 2): step, training loss
    held_out_curve: np.ndarray  # (N, 2): step, accuracy on held-out rows in per cent
    flags: dict  # the flags that may distinguish this result from others
    data_digest: str  # six digits of the checksums of the task's files
    weights_digest: str | None  # six digits of a checksum of the base; None: unknown
    label: str = ""  # the method, and the flags that do distinguish it
    n_shots: float = np.nan  # of in-context learning: how many fit before a row, on average
    n_shots_given: float = np.nan

    @property
    def identity(self):
        """Results with the same identity are repetitions of one another."""
        return self.model, self.task, self.label, self.n_trainable, self.seed


@dataclass
class Run:
    """What train.py wrote into one folder."""

    folder: Path
    config: dict  # config.json: flags, versions, checksums
    lines: list  # metrics.jsonl: a dict per event

    @property
    def final_lines(self):
        """The final lines with a result. Without labeled rows a run has nothing to report."""
        finals = [line for line in self.lines if line["event"] == "final"]
        return [line for line in finals if line["accuracy"] is not None]

    @property
    def outcomes(self):
        """A dict from each adapter that has ended to "final" or "failed"."""
        return outcomes_of(self.lines)

    @property
    def n_steps(self):
        """How many steps the adapters that have ended have taken, all together."""
        steps = {}  # a mixture has a final line for each of its tasks
        for line in self.lines:
            if line["event"] == "final":
                steps[line.get("adapter")] = int(line["steps"])
            if line["event"] == "failed":
                steps[line.get("adapter")] = int(line["step"])
        return sum(steps.values())

    def missing_results(self):
        """Return a text for each result that this run does not have, or not yet."""
        if not self.final_lines:
            return [str(self.folder)]
        missing = []
        for adapter, outcome in self.outcomes.items():
            if outcome == "failed":
                missing.append(f"{self.folder}: {adapter}")
        for line in self.lines:
            if line["event"] == "final" and line["accuracy"] is None:
                missing.append(f"{self.folder}: {self.name_of(line)}")
        n_to_come = count_cells(self.config) - len(self.outcomes)
        if n_to_come:
            adapters = plural(n_to_come, "adapter")
            missing.append(f"{self.folder}: {n_to_come} {adapters} to come")
        return missing

    def name_of(self, final):
        """Return what tells a final line from the others of this run."""
        names = []
        if "adapter" in final:
            names.append(final["adapter"])
        if is_mixture(self.config):
            names.append(final["task"])
        return ": ".join(names)


def read_results(folders):
    """Return the results in `folders`, and a note on what is left out, which may be empty.

    folders: of runs, or of folders with runs in them. If runs repeat each other, only the first
    one counts.
    Raise ValueError, in one line, if a folder is neither, if a file is not as train.py writes it,
    or if there is no result at all.
    """
    results, missing = read_runs(folders)
    notes = []
    if missing:
        names = ", ".join(missing)
        notes.append(f"{len(missing)} left out, because metrics.jsonl has no result: {names}")
    unread = unread_folders(folders)
    if unread:
        notes.append(f"folders of runs inside, not read: {join_paths(unread)}")
    if not results:
        reason = "; ".join(notes) if notes else "train.py wrote none of the folders"
        raise ValueError(f"no run has a result: {reason:.300}")

    label_results(results)
    tell_data_apart(results)
    tell_weights_apart(results)
    distinct = {}
    repeated = []
    for result in results:
        if distinct.setdefault(result.identity, result) is not result:
            repeated.append(result.run_folder)
    if repeated:
        names = join_paths(list(dict.fromkeys(repeated)))
        reason = "their flags equal those of other results"
        notes.append(f"{len(repeated)} left out, because {reason}: {names}")
    return list(distinct.values()), "; ".join(notes)


# Reading


def read_runs(folders):
    """Return all results in `folders`, and a text for each result that a run does not have."""
    results = []
    missing = []
    for folder, is_inside in find_runs(folders).items():
        with errors_in_one_line(folder):
            config = read_json(folder / "config.json")
            if {"model", "task", "batch_size"} <= config.keys():
                run = Run(folder, config, read_metrics(folder / "metrics.jsonl"))
                results += [read_result(run, final) for final in run.final_lines]
                missing += run.missing_results()
            elif not is_inside:  # a model may lie among the runs of a folder
                raise ValueError("config.json was not written by train.py")
    return results, missing


def find_runs(folders):
    """Return a dict from each folder of a run to whether it was found inside another folder.

    A folder that is given twice, or that is also inside another one, is in the dict once.
    Raise ValueError if neither a folder nor any folder inside it has a config.json.
    """
    found = {}
    for folder in map(Path, folders):
        inside = []
        if not (folder / "config.json").exists():
            inside = sorted(path.parent for path in folder.glob("*/config.json"))
            if not inside:
                expected = "expected a run of train.py, or a folder of runs"
                raise ValueError(f"{folder}: {expected}, {found_instead(folder)}")
        for path in inside or [folder]:
            found[path.resolve()] = (path, bool(inside))
    return dict(found.values())


def found_instead(folder):
    """Return the end of a message about a folder without runs."""
    folders = folders_of_runs(folder)
    if folders:  # as in the folder `runs` after a study
        return f"found folders of runs inside: give {join_paths(folders)}"
    return "found no config.json"


def unread_folders(folders):
    """Return the folders of runs that lie inside `folders`, and whose runs nobody asked for.

    Such a folder lies beside the runs that are read, as the one of a study does.
    """
    read = {path.resolve() for path in find_runs(folders)}
    unread = []
    for folder in map(Path, folders):
        if not (folder / "config.json").exists():
            for path in folders_of_runs(folder):
                inside = {line.parent.resolve() for line in path.glob("*/metrics.jsonl")}
                if not inside <= read:
                    unread.append(path)
    return list(dict.fromkeys(unread))


def folders_of_runs(folder):
    """Return the folders in `folder` that have runs in them, and are no runs themselves."""
    found = {path.parents[1] for path in folder.glob("*/*/metrics.jsonl")}
    return sorted(path for path in found if not (path / "config.json").exists())


def join_paths(paths):
    """Return paths as people type them. Of many, only the first."""
    text = shlex.join(map(str, paths[:MOST_PATHS]))
    n_more = len(paths) - MOST_PATHS
    return f"{text} and {n_more} more" if n_more > 0 else text


@contextmanager
def errors_in_one_line(folder):
    """Turn whatever a damaged file of a run causes into a ValueError of one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected a run of train.py: {error}") from None
    except KeyError as error:
        raise ValueError(f"{folder}: expected a run of train.py: {error} is missing") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"  # the text alone may say too little
        raise ValueError(f"{folder}: expected a run of train.py: {reason}") from None


def read_result(run, final):
    """Return the Result of a final line."""
    adapter = final.get("adapter")  # its name in a grid
    task = str(final["task"])
    method = method_of(run, final)
    n_trainable = int(final["trainable"])
    n_steps = int(final["steps"])
    is_decoder_only = final["architecture"] == "Llama"

    seconds = float(final["seconds"])
    if method == "ia3":  # its cells train together, and each line has the time of all
        seconds *= n_steps / max(1, run.n_steps)

    adapter_folder = saved_folder(run, method, adapter)
    n_bytes = 0.0
    if n_trainable:
        n_bytes = count_bytes(adapter_folder)

    train_lines = select_train_lines(run, adapter)
    n_examples = n_steps * run.config["batch_size"]
    n_train_tokens = mean_tokens(train_lines) * n_examples
    if shares_lines_with_other_tasks(run, method, train_lines):
        n_train_tokens = np.nan  # the lines count the tokens of all tasks together
    n_base = float(final["total"])
    return Result(
        run_folder=run.folder,
        adapter_folder=adapter_folder,
        model=str(final["model"]),
        task=name_column(final),
        metric=str(final["metric"]),
        method=method,
        seed=int(final.get("seed", run.config["seed"])),
        accuracy=read_share(final["accuracy"]),
        before=read_share(final.get("accuracy_before")),
        commonest=read_share(final.get("commonest")),
        n_trainable=n_trainable,
        n_steps=n_steps,
        n_bytes=n_bytes,
        seconds=seconds,
        flops_per_example=flops(n_base, final.get("tokens", np.nan), is_decoder_only),
        flops_to_train=flops(n_base, n_train_tokens, is_decoder_only, training=True),
        loss_curve=read_loss_curve(train_lines, adapter),
        held_out_curve=read_held_out_curve(run, adapter, task),
        flags=select_flags(run, final),
        data_digest=digest_data(run.config.get("data", {}), task),
        weights_digest=(run.config.get("weights") or "")[:6] or None,
        n_shots=float(final.get("n_shots", np.nan)),
        n_shots_given=float(final.get("n_shots_given", run.config.get("shots") or np.nan)),
    )


def method_of(run, final):
    """Return the method of a result. `--eval-only` without an adapter is `none`: the base alone."""
    method = str(final["method"])
    is_base = run.config.get("eval_only") and not run.config.get("adapter")
    if is_base and method in TRAINED:
        return "none"
    return method


def read_share(value):
    """Return a number in per cent, or NaN for None. Raise ValueError if it is not from 0 to 1."""
    if value is None:
        return np.nan
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(f"a result is {share}, expected a number from 0 to 1")
    return 100 * share


def name_column(final):
    """Return the task's name, with its metric and its split if these are not the usual ones."""
    unusual = []
    if final["metric"] != "accuracy":
        unusual.append(final["metric"])
    if final["split"] not in USUAL_SPLITS:
        unusual.append(final["split"])
    if not unusual:
        return str(final["task"])
    return f"{final['task']} ({', '.join(unusual)})"


def saved_folder(run, method, adapter):
    """Return the folder in which a run saved an adapter, or the whole model that it trained."""
    if adapter is not None:
        return run.folder / "adapters" / adapter.replace("/", "-")
    if method == "full":
        return run.folder / "model"
    return run.folder / "adapter"


def count_bytes(adapter_folder):
    """Return the size of the weights in a folder, or NaN if there are none any more."""
    sizes = [path.stat().st_size for path in adapter_folder.glob("*.safetensors")]
    if not sizes:
        return np.nan
    return sum(sizes)


def digest_data(checksums, task):
    """Return six digits that are equal if the task's files are, whatever their order.

    checksums: those of config.json. A grid puts the name of its task before the name of a file.
    """
    digests = [digest for file, digest in checksums.items() if file.startswith(f"{task}/")]
    if not digests:
        # The template is a flag, and no other data.
        digests = [digest for file, digest in checksums.items() if file != CHAT_TEMPLATE]
    text = json.dumps(sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()[:6]


# Curves


def select_train_lines(run, adapter):
    """Return the train lines of the steps that an adapter took part in."""
    selected = []
    for line in run.lines:
        is_other = line.get("adapter", adapter) != adapter
        has_stopped = adapter not in line.get("losses", [adapter])
        if line["event"] == "train" and not is_other and not has_stopped:
            selected.append(line)
    return selected


def read_loss_curve(train_lines, adapter):
    """Return (N, 2): step and loss. In a grid a line has a loss for each adapter."""
    points = []
    for line in train_lines:
        loss = line["loss"]
        if "losses" in line:
            loss = line["losses"][adapter]
        points.append((line["step"], loss))
    return np.array(points, float).reshape(-1, 2)


def read_held_out_curve(run, adapter, task):
    """Return (N, 2): step and accuracy in per cent. A mixture has one curve per task."""
    points = []
    for line in run.lines:
        is_of_adapter = line.get("adapter", adapter) == adapter
        is_of_task = line.get("task", task) == task
        if line["event"] == "eval" and is_of_adapter and is_of_task:
            points.append((line["step"], 100 * line["accuracy"]))
    return np.array(points, float).reshape(-1, 2)


def mean_tokens(train_lines):
    """Return the mean tokens of a training example, or NaN if nothing was trained.

    A line has the speed since the line before, so its weight is the number of steps in between.
    """
    if not train_lines:
        return np.nan
    steps = np.array([line["step"] for line in train_lines], float)
    tokens = np.array([line["tokens_per_second"] for line in train_lines], float)
    examples = np.array([line["examples_per_second"] for line in train_lines], float)
    return np.average(tokens / examples, weights=np.diff(steps, prepend=0))


def shares_lines_with_other_tasks(run, method, train_lines):
    """Return whether adapters of several tasks train together, and each line is about all of them.

    A mixture is one task: its tokens are those of its adapter. Adapters that train one after the
    other have lines of their own, each with the loss of one adapter in `losses`.
    """
    is_of_several = isinstance(run.config["task"], list) and not is_mixture(run.config)
    is_together = is_of_several and method not in TRAINED_ALONE
    return is_together and any("losses" in line for line in train_lines)


# Labels


def select_flags(run, final):
    """Return the flags of a result that may distinguish it from others, with their values."""
    values = dict(run.config)
    # config.json has all values of a grid, and no --dtype if it depended on the device. (Older
    # versions do not say which it was.)
    for flag in ("seed", "lr", "warmup_ratio", "dtype"):
        if flag in final:
            values[flag] = final[flag]
    names = values.keys() - UNNAMED_FLAGS
    if not final["trainable"]:  # flags of training do not matter if there was none
        names &= {"adapter", *EVALUATION_FLAGS}
        if method_of(run, final) == "none":  # shots are rows to train on, or to put before a row
            names -= {"shots"}
    if values.get("adapter") is not None:
        names -= LORA_SHAPE  # a LoRA that trains on has the shape of the one it began with
    flags = {name: value for name, value in values.items() if name in names}
    if is_mixture(run.config):
        flags["mixture"] = "+".join(short_name(task) for task in run.config["task"])
    elif flags.get("adapters") == "one":
        flags["adapters"] = "each"  # which is the same for a single task
    # A run that was made longer had another learning rate than one that was as long at once.
    flags[EXTENDED] = " and ".join(map(str, final.get("extended_from", ()))) or None
    return flags


def label_results(results):
    """Set the label of each result: its method, and the flags in which it differs from others.

    See `comparison` for the results between which a flag is compared. Older versions lack some
    flags, and such results are not compared. If a flag differs for one adapter of a grid, all
    adapters of the grid name it: they share a row. Always named are that a run was made longer, and
    an adapter that was only evaluated.
    """
    choose_lengths(results)
    different = find_differences(results)
    # T-Few's shots differ by task, so they are compared within each. If they differ there, all
    # results of the group name them: otherwise other tasks would look like trained on all rows.
    groups_with_shots = {group for flag, group, _ in different if flag == "shots"}

    named_flags = {}  # folder of a run -> the flags that its results name
    for result in results:
        named = named_flags.setdefault(result.run_folder, set())
        for flag in result.flags:
            if is_always_named(result, flag) or comparison(result, flag) in different:
                named.add(flag)
        if shots_group(result) in groups_with_shots:
            named.add("shots")

    for result in results:
        parts = [result.method]
        for flag, value in result.flags.items():
            if flag in named_flags[result.run_folder]:
                parts += name_flag(flag, value)
        result.label = ", ".join(parts)
    name_fitting_shots(results)


def name_fitting_shots(results):
    """Add to a label how many shots fit before a row, if these are fewer than there were.

    Results that share a row of the table share the mean, because it differs by seed and by task.
    """
    rows = {}  # model and label -> its results
    for result in results:
        rows.setdefault((result.model, result.label), []).append(result)
    for same_row in rows.values():
        n_fitting = np.mean([result.n_shots for result in same_row])
        n_given = np.mean([result.n_shots_given for result in same_row])
        if n_fitting < n_given:  # and none of them is NaN
            shown = np.floor(10 * n_fitting) / 10
            for result in same_row:
                result.label += f", {shown:.1f} of {n_given:.4g} shots fit"


def is_always_named(result, flag):
    """Return whether a flag says what a result is, even if no other result differs in it."""
    is_adapter_alone = flag == "adapter" and not result.n_trainable
    return is_adapter_alone or flag == EXTENDED


def find_differences(results):
    """Return the set of the keys, from `comparison`, for which results have different values."""
    values = {}  # key -> the flags and values that were found
    for result in results:
        for flag, value in result.flags.items():
            found = values.setdefault(comparison(result, flag), [])
            if (flag, value) not in found:
                found.append((flag, value))
    return {key for key, found in values.items() if len(found) > 1}


def name_flag(flag, value):
    """Return the words for a flag of a label, as people type it, or none if it is not set."""
    name = flag.replace("_", "-")
    if value is True:
        return [name]
    if value is None or value is False:
        return []
    text = f"{name} {value}".replace("\n", "\\n")  # a table has a line for each row
    return [text]


def choose_lengths(results):
    """Keep of each result either the steps or the epochs, whichever says how long training was.

    Equal steps are equal, however they were given. If steps differ, --epochs is the budget of the
    results that it was given for: the same epochs are other steps on other data.
    """
    steps = [result.flags["steps"] for result in results if "steps" in result.flags]
    is_equal = all(number == steps[0] for number in steps)
    for result in results:
        has_epochs = result.flags.get("epochs") is not None
        left_out = "steps" if has_epochs and not is_equal else "epochs"
        result.flags.pop(left_out, None)


def comparison(result, flag):
    """Return a key that is the same for all results whose values of a flag are compared.

    The budget is compared between all methods, because it is the effort, and so is how results were
    evaluated. The words of a task are compared between all results on it, and so are the shots, but
    those of in-context learning by themselves. Any other flag is compared within a method.
    """
    if flag in LENGTHS:
        return ("length", None, None)
    if flag == "batch_size" or flag in EVALUATED:
        return (flag, None, None)
    if flag == "shots":
        return (flag, shots_group(result), result.task)
    if flag in TASK_FLAGS:
        return (flag, None, result.task)
    return (flag, result.method, None)


def shots_group(result):
    """Return a name that is the same for results whose shots mean the same: rows to train on, or
    rows before each input. Beside 32 shots of LoRA, (IA)^3 without shots had all rows.
    """
    return "trained" if result.n_trainable else result.method


def tell_data_apart(results):
    """Add a digest of the data to the name of a task that has different data in some results."""
    digests = {}
    for result in results:
        digests.setdefault(result.task, set()).add(result.data_digest)
    for result in results:
        if len(digests[result.task]) > 1:
            result.task += f" [{result.data_digest}]"


def tell_weights_apart(results):
    """Add a digest to the name of a model whose weights were replaced between some results.

    Only weights that are a path on the machine of the run have a digest.
    """
    digests = {}
    for result in results:
        if result.weights_digest is not None:
            digests.setdefault(result.model, set()).add(result.weights_digest)
    for result in results:
        if result.weights_digest is not None and len(digests[result.model]) > 1:
            result.model += f" [{result.weights_digest}]"
