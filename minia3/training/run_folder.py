"""The folder of a run: its name, and its config.json.

config.json      all flags, versions, and checksums of data, --chat-template, weights and --adapter
metrics.jsonl    a line per event: before, train, eval, final ...; see metrics_file.py
checkpoint.pt    see checkpoint.py, also for states/
adapter/         the result; for a grid adapters/<cell>/, for full fine-tuning model/
tensorboard/     see trackers.py
"""

import dataclasses
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from minia3 import __version__
from minia3.checkpoints.layout import local_weights
from minia3.files.lock import SECONDS_BETWEEN_TRIES, FolderLocked, lock_folder, remove_lock
from minia3.files.processes import gathered
from minia3.files.read import read_json, reading, sample_digest, sha256
from minia3.files.write import remove_leftovers, write_json
from minia3.tasks.split_files import TASK_FILE, short_name
from minia3.training.choices import CHAT_TEMPLATE
from minia3.training.config import Config
from minia3.training.config_file import recorded_flags
from minia3.training.flags import as_tuple, option
from minia3.training.shown_commands import COMMAND, MAY_DIFFER, PLACES

CONTENTS = (  # a run replaces these without asking, so a new run finds none of them
    *("config.json", "metrics.jsonl", "checkpoint.pt", "states"),
    *("adapter", "adapters", "model", "tensorboard"),
)
SUB_FOLDERS = ("states", "adapter", "adapters/*", "model")  # in which a run writes
RUNS = Path("runs")  # the folder of runs without --out
MOVABLE = ("model", "task", "adapter", "chat_template")  # flags that may be paths
LONGEST_NAME = 50  # characters of a list of values; a longer one is abbreviated
LONGEST_VALUE = 20  # characters of the value of a flag
NOT_IN_NAMES = r'[\x00-\x1f<>:"/\\|?*]'  # characters that a name of a file cannot have on Windows
BEGINNING = 10.0  # seconds within which a run that holds its folder has written its flags


class RunExists(ValueError):
    """The folder of a new run holds a run already."""


class FoundFiles(NamedTuple):
    """The checksums of the files that a run has found, under their names in config.json."""

    data: dict  # from `checksums_of_run`
    weights: str | None  # from `digest_weights`
    adapter_files: dict | None  # from `checksums_of_adapter`; None: no adapter is read


def choose_folder(config):
    """Return runs/<model>-<task>-<method>-<seed>, with commas between several values.

    If that folder holds a run with other flags, the flags that differ are added to the name.
    """
    folder = RUNS / run_name(config)
    # os.path.exists, because Path.exists raises OSError if a name is too long for the file system.
    if not os.path.exists(folder / "config.json"):
        return folder
    try:
        content = read_run_config(folder)
        found = recorded_flags(content, folder)
    except ValueError:  # `begin_run` says that the folder is taken
        return folder
    return Path(f"{folder}{describe_difference(config, found, knows_steps(content))}")


def describe_difference(config, found, has_steps=True):
    """Return the flags of `config` that differ from those of another run: "-lr0.01-steps300"."""
    text = ""
    for field in different_fields(config, found, has_steps):
        value = getattr(config, field.name)
        name = field.name.replace("_", "")
        if value is True:
            text += f"-{name}"
        elif value is None or value is False:  # and not 0, which equals False
            text += f"-no{name}"
        else:
            text += f"-{name}{short_value(value)}"
    return text


def different_fields(config, found, has_steps=True):
    """Return the fields in which `config` differs from the flags of another run.

    PLACES do not count. has_steps: from `knows_steps`. If so, the --steps and the --epochs of the
    other run mean the same length, so only the one of them that `config` gives is compared.
    """
    length = "epochs" if config.epochs is None else "steps"  # the flag that `config` does not give
    ignored = [*PLACES, length] if has_steps else PLACES
    fields = []
    for field in dataclasses.fields(config):
        is_ignored = field.name in ignored
        # A list of a single value was a grid of a single adapter once.
        value = as_tuple(getattr(config, field.name))
        if not is_ignored and value != as_tuple(found.get(field.name, field.default)):
            fields.append(field)
    return fields


def knows_steps(content):
    """Return whether a run with this config.json has read its data.

    From then on, config.json has the steps that its --epochs are. Before, they are the default.
    """
    return "data" in content


def check_same_flags(folder, config):
    """Raise ValueError if the run in a folder has other flags than `config`.

    PLACES and the flags in MAY_DIFFER do not count.
    """
    content = read_run_config(folder)
    found = recorded_flags(content, folder)
    fields = different_fields(config, found, knows_steps(content))
    fields = [field for field in fields if field.name not in MAY_DIFFER]
    if not fields:
        return
    name = fields[0].name
    value = found.get(name, fields[0].default)
    expected = getattr(config, name)
    advice = "give another --out, or remove the folder"
    if len(fields) == 1:
        advice += other_advice(folder, name, found, config)
    raise ValueError(
        f"{folder} holds a run with other flags: {option(name)} is {value!r:.80}, expected "
        f"{expected!r:.80}: {advice}"
    )


def other_advice(folder, name, found, config):
    """Return how to keep a run that differs in a single flag, for the end of a message, or "".

    found: the flags of the run. One that was made longer has --steps in place of --epochs.
    """
    expected = getattr(config, name)
    n_steps = found.get("steps", Config.steps)
    has_lost_epochs = name == "epochs" and found.get(name) is None
    if config.is_training and (has_lost_epochs or (name == "steps" and expected < n_steps)):
        return f", or, if it was made longer, give --steps {n_steps}"
    if name == "steps" and config.is_training and expected > n_steps:
        words = [*COMMAND.split(), "--resume", str(folder), "--steps", str(expected)]
        return f", or make it longer: {shlex.join(words)}"
    if name in MOVABLE and isinstance(expected, str) and os.path.exists(expected):
        return ", or, if it was moved, write the new path into its config.json"
    return ""


def short_value(value):
    """Return a value as a part of a file name. A long one becomes six digits of its hash."""
    text = ",".join(map(str, as_tuple(value)))
    if len(text) <= LONGEST_VALUE and re.fullmatch(r"[\w.,+-]*", text):
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def run_name(config):
    """Return the name of a run's folder, which Windows accepts, too."""
    tasks = [Path(short_name(task)).name for task in as_tuple(config.task)]
    method = config.method
    if config.is_mixture:
        method += "-one"  # not the folder of a grid of the same tasks
    model = os.path.basename(os.path.abspath(config.model))  # which also gives "." a name
    parts = [model, join_values(tasks), method]
    parts.append(join_values(as_tuple(config.seed)))
    if len(as_tuple(config.lr)) > 1:
        parts.append(join_values(as_tuple(config.lr)))
    return re.sub(NOT_IN_NAMES, "-", "-".join(parts))


def join_values(values):
    """Return "a,b,c", or "a+2" if that would be too long."""
    text = ",".join(map(str, values))
    if len(text) > LONGEST_NAME and len(values) > 1:
        return f"{values[0]}+{len(values) - 1}"
    return text


# Beginning, continuing and undoing a run


def begin_run(folder, config, now, resources):
    """Lock the folder of a new run, after making it if there is none, and write its config.json.

    now: from `environment`, which the caller asks first: git may take seconds on a network file
    system, and other runs would wait for the lock. resources: the ExitStack that holds the lock
    from then on. Return the lock. Raise ValueError if the folder cannot be made or written to, or
    if it holds a run already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = resources.enter_context(lock_folder(folder))
        found = [name for name in CONTENTS if (folder / name).exists()]
        if found:
            raise RunExists(
                f"{folder} holds a run already ({', '.join(found)}): use --resume or another --out"
            )
        remove_leftovers(folder)  # a run that was killed before it had a config.json
        try:
            write_json(folder / "config.json", dataclasses.asdict(config) | now)
        except OSError:  # such as a full disk
            discard_run(folder)
            raise
        return lock
    except OSError as error:
        raise ValueError(
            f"--out is {str(folder)!r}, expected a folder to write to: {error.strerror}"
        ) from None


def begin_default_run(config, resources):
    """Begin a run without --out, as `begin_run` does. Return its folder, and the lock.

    The jobs of an array begin together, and may all have chosen the same folder before the first
    one has written its flags there. So a run that finds its folder taken chooses again.
    """
    now = environment()
    deadline = time.monotonic() + BEGINNING
    while True:
        folder = choose_folder(config)
        recorded = dataclasses.replace(config, out=str(folder))
        try:
            with ExitStack() as held:  # so that no lock of another folder is kept
                lock = begin_run(folder, recorded, now, held)
                resources.enter_context(held.pop_all())
                return folder, lock
        except (FolderLocked, RunExists) as error:
            has_flags = (folder / "config.json").exists() or isinstance(error, RunExists)
            if time.monotonic() > deadline or (has_flags and choose_folder(config) == folder):
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def clean_run(folder):
    """Remove the temporary files that a killed run left in its folder. The caller holds its lock.

    Another run below this folder has a lock of its own, so its files stay.
    """
    remove_leftovers(folder)
    for pattern in SUB_FOLDERS:
        for place in folder.glob(pattern):
            remove_leftovers(place)


def discard_run(folder):
    """Undo `begin_run` if nothing was evaluated yet, so that the user can try again."""
    if (folder / "metrics.jsonl").exists():
        return
    for name in ("config.json", ".lock"):
        remove_lock(folder / name)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of --log-to
    with suppress(OSError):  # the folder is not empty: it held other files before
        folder.rmdir()
        if folder.parent == RUNS:
            RUNS.rmdir()


def restore_flags(given):
    """Return the flags of the run in the folder `given["resume"]`, with the --steps and the flags
    of MAY_DIFFER that are given. --shard without --offload keeps the base on the devices.

    Raise ValueError if other flags are given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    allowed = ("steps", *MAY_DIFFER)
    if given.keys() - {"resume", *allowed}:
        raise ValueError(
            f"--resume takes no other flags than {', '.join(map(option, allowed))}: "
            "the others come from the config.json of its folder"
        )
    folder = Path(given["resume"])
    if folder.name == "checkpoint.pt":
        raise ValueError(
            f"--resume is {str(folder)!r}, expected the folder of a run: {folder.parent}"
        )
    saved = recorded_flags(read_run_config(folder), folder)
    values = {}
    for field in dataclasses.fields(Config):
        if field.name in saved:
            values[field.name] = saved[field.name]
    if "steps" in given:
        values["epochs"] = None
    if "shard" in given:
        values["offload"] = False  # --shard says anew where the base is, maybe with --offload
    return Config(**values | given)


def read_run_config(folder):
    """Return the config.json of a run: its flags, and more.

    Raise ValueError if the folder does not hold a run.
    """
    try:
        config = read_json(folder / "config.json")
        if not {"model", "task"} <= config.keys():
            raise ValueError(f"{folder / 'config.json'} was not written by train.py")
    except ValueError as error:
        raise ValueError(f"expected the folder of a run: {error}") from None
    return config


def checksums_of_run(cells, config):
    """Return the checksums of all files from which a run makes its texts: name to sha256."""
    checksums = {}
    for cell in cells:
        checksums |= cell.checksums
    if config.chat_template is not None:
        checksums[CHAT_TEMPLATE] = sha256(Path(config.chat_template))
    return checksums


def digest_weights(config):
    """Return a checksum of samples of the weights of --model, or None.

    It is None for a model of the hub, which has no path on this machine, and for --method full,
    which has all weights in its state.
    """
    paths = local_weights(config.model)
    if not paths or config.method == "full":
        return None
    return sample_digest(paths)


def checksums_of_adapter(config):
    """Return the checksums of the files of --adapter: name to sha256.

    Its config has the scale of a LoRA, and its task.json may say how rows are put into words. There
    are none for an adapter of the hub, which has no path on this machine. Raise ValueError if there
    is no such adapter.
    """
    # Here, because flags must be restored without torch.
    from minia3.adapters.peft_files import adapter_file
    from minia3.checkpoints.hub import local_adapter

    path = local_adapter(config.adapter)
    if path is None:
        return {}
    if path.is_dir():
        paths = [path / "adapter_config.json", adapter_file(path), path / TASK_FILE]
        files = {file.name: file for file in paths}
    else:  # its name does not count, because a file may be moved
        files = {"--adapter": path, TASK_FILE: path.parent / TASK_FILE}
    checksums = {}
    for name, file in files.items():
        if file.exists():
            with reading(file):
                checksums[name] = sha256(file)
    return checksums


def check_same_weights(folder, digest, config):
    """Raise ValueError if config.json has another digest of the weights than a resumed run finds.

    If an earlier version wrote it, it does not say, and nothing is compared.
    """
    recorded = read_run_config(folder).get("weights", digest)
    if recorded != digest:
        raise ValueError(
            f"{folder}: the weights of {config.model} have changed since this run began: "
            "restore them, or begin a new run"
        )


def check_same_adapter(folder, checksums, config):
    """Raise ValueError if config.json has other checksums of --adapter than a resumed run finds.

    checksums: None if the run does not read the adapter again. Then nothing is compared, nor if an
    earlier version wrote config.json, which does not say.
    """
    if checksums is None:
        return
    recorded = read_run_config(folder).get("adapter_files", checksums)
    changed = different_names(recorded, checksums)
    if changed:
        raise ValueError(
            f"{folder}: the adapter {config.adapter} has changed since this run began "
            f"({', '.join(changed)}): restore it, or begin a new run"
        )


def check_data(folder, checksums):
    """Raise ValueError if config.json has other checksums than a resumed run finds."""
    recorded = read_run_config(folder).get("data", checksums)
    changed = different_names(recorded, checksums)
    if changed:
        raise ValueError(
            f"{folder}: files have changed since this run began ({', '.join(changed):.200}): "
            "restore them, or begin a new run"
        )


def different_names(recorded, checksums):
    """Return the names of the files that do not have the same checksum in both dicts."""
    names = sorted(recorded.keys() | checksums.keys())
    return [name for name in names if recorded.get(name) != checksums.get(name)]


def check_same_files(files, config):
    """Raise ValueError if another process of this run has other data, or another model or adapter.

    It is on another machine then, and the model or the adapter is a path. All processes must call
    this, and all of them raise it.
    files: the FoundFiles of this process.
    """
    found = gathered(files)
    first = found[0]
    for number, other in enumerate(found):
        names = different_names(first.data, other.data)
        if other.weights != first.weights:
            names.append(f"the weights of {config.model}")
        if other.adapter_files != first.adapter_files:
            names.append(f"the adapter {config.adapter}")
        if names:
            listed = f"{', '.join(names):.200}"
            raise ValueError(
                f"process {number} has different files from the first one ({listed}): copy the "
                "files of one machine to the others"
            )


def record_run(folder, files, config):
    """Add to config.json the checksums of the files, how long the run is (see --epochs), where it
    continues, and with which other code. Return `code_changes`.

    files: a FoundFiles. If the adapter is not read again, its checksums in config.json stay.
    """
    names = ("steps", "epochs", *MAY_DIFFER)
    flags = {name: getattr(config, name) for name in names}
    found = files._asdict()
    if files.adapter_files is None:
        del found["adapter_files"]
    recorded = read_run_config(folder)
    changes = {}
    if knows_steps(recorded):  # it has begun before
        now = environment()
        changes = code_changes(recorded, now)
    if changes:
        found["continued_with"] = [*recorded.get("continued_with", ()), now]
    write_json(folder / "config.json", recorded | flags | found)
    return changes


def record_trackers(folder, config):
    """Write --log-to into the config.json of a finished run, so that nothing is sent twice."""
    write_json(folder / "config.json", read_run_config(folder) | {"log_to": config.log_to})


def code_changes(recorded, now):
    """Return what a run was computed with so far, and is computed with now: name to both values.

    recorded: its config.json. now: `environment`. What one of them does not know is left out.
    """
    last = [recorded, *recorded.get("continued_with", ())][-1]
    before = versions_of(last)
    changes = {}
    for name, version in versions_of(now).items():
        if None not in (version, before.get(name)) and version != before[name]:
            changes[name] = (before[name], version)
    return changes


def versions_of(found):
    """Return the versions in an `environment`, name to version. Some may be None."""
    versions = {"minia3": found.get("minia3"), "commit": found.get("git_commit")}
    return versions | found.get("versions", {})


def environment():
    """Return what a result depends on besides the flags: versions, and the commit of this code."""
    import numpy as np  # here, because flags must be restored without torch
    import torch

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {"minia3": __version__, "git_commit": git_commit(), "versions": versions}


def git_commit():
    """Return the commit of this file's repository, with -dirty if files differ from it, or None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    is_tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # There may be no git, or no repository, or a repository in which minia3 is only installed.
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(is_tracked, capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return None
