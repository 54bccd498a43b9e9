"""Command lines that repeat a run, or use what it trained."""

import dataclasses
import os
import shlex

from minia3.files.processes import n_on_machine, n_per_copy, n_processes
from minia3.tasks.split_files import HUB_PREFIX
from minia3.training.flags import flag_words, option

# A result depends on these flags even if nothing is trained.
EVALUATION_FLAGS = (
    "input",
    "target",
    "labels",
    "metric",
    "chat_template",
    "data_dir",
    "shots",
    "seed",
    "dtype",
    "quantize",
    "max_length",
    "max_target_length",
    "max_new_tokens",
    "eval_prompt",
)
# These flags say on which machine a run happens.
PLACES_OF_MACHINE = ("data_dir", "device", "log_to")
# These flags may differ when a run is resumed. The sizes change results only by rounding and the
# draws of dropout. So does where the base is. A run that ran out of memory needs smaller sizes, and
# another number of processes needs another --shard.
MAY_DIFFER = (*PLACES_OF_MACHINE, "micro_batch_size", "eval_batch_size", "shard", "offload")
# These flags say where a run happens and what it continues, and not what it computes.
PLACES = (*PLACES_OF_MACHINE, "out", "resume", "config", "or_resume")
PROMPTS = ("input", "target")
TEXTS = (*PROMPTS, "labels")  # in which a slash begins no path

# How runs are started.
SCRIPT = "python train.py"
COMMAND = "minia3 train"
CALL = "minia3.train"


def unrecorded_flags(config, recorded):
    """Return the flags of a resumed run that its config.json does not have yet: name -> value.

    recorded: the content of config.json.
    """
    flags = {}
    for name in ("steps", *MAY_DIFFER):
        value = getattr(config, name)
        default = getattr(type(config), name)  # an earlier version has fewer flags
        if value != recorded.get(name, default):
            flags[name] = "none" if value is None else value  # of --log-to
    if flags.get("offload") is False and config.shard is not None:
        flags["shard"] = config.shard  # which takes --offload back: see `restore_flags`
    return flags


def resume_command(program, folder, flags):
    """Return what continues the run in a folder with these flags: name -> value.

    This starts as many processes as there are now. On several machines the user knows the flags of
    torchrun, and this process does not.
    """
    if program == CALL:
        given = {"resume": str(folder), **flags}
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"minia3.train({arguments})"
    if n_processes() > 1:
        started = {SCRIPT: "train.py", COMMAND: "-m minia3 train"}[program]
        is_one_machine = n_processes() == n_on_machine()
        count = f"--nproc-per-node {n_processes()}" if is_one_machine else "..."
        program = f"torchrun {count} {started}"
    words = ["--resume", str(folder)]
    for name, value in flags.items():
        if value is False:  # --offload, which cannot be typed as "no"
            continue
        words.append(option(name))
        if value is not True:
            words.append(str(value))
    return f"{program} {shlex.join(words)}"


def training_command(config):
    """Return the words of the command that trains with the flags of `config`, without PLACES.

    The command is for other people, so an absolute path loses its folders, and the program is the
    one that every installed minia3 has.
    """
    names = ["model", "task"]
    left_out = [*names, *PLACES]
    if config.epochs is not None:
        left_out.append("steps")  # the run has worked out how many steps its epochs are
    names += [name for name in changed_flags(config) if name not in left_out]
    public = {name: without_place(getattr(config, name)) for name in names if name not in TEXTS}
    config = dataclasses.replace(config, **public)
    words = COMMAND.split()
    for name in names:
        typed = flag_words(config, [name])
        if name in PROMPTS:  # a file of flags may have the line breaks that people type as \n
            typed = [word.replace("\n", "\\n") for word in typed]
        words += typed
    return words


def without_place(value):
    """Return the value of a flag, or several in a tuple, with only the last part of each absolute
    path. It may be the path of a data set: hf:/home/me/rows.
    """
    if isinstance(value, tuple):
        return tuple(map(without_place, value))
    if not isinstance(value, str):
        return value
    prefix = HUB_PREFIX if value.startswith(HUB_PREFIX) else ""
    path = value.removeprefix(prefix)
    if not os.path.isabs(path):
        return value
    return prefix + os.path.basename(os.path.normpath(path))


def using_command(config, answer, adapter=None):
    """Return the words of the command that labels or answers new rows.

    config: the flags of the run. answer: how its rows are answered (METRICS in tasks/task.py).
    adapter: the folder of the adapter; None if the model of `config` itself was trained.
    If one device did not hold the base in this run, the command divides it, too.
    """
    words = ["minia3", "predict", config.model, "new.csv"]
    names = ["max_length", "max_new_tokens", "dtype", "quantize", "offload"]
    if answer == "messages":
        words = ["minia3", "generate", config.model, "--chat"]
        names.remove("max_length")
    if n_per_copy() > 1:
        count = str(n_per_copy()) if n_per_copy() <= n_on_machine() else "..."
        words = ["torchrun", "--nproc-per-node", count, "-m", *words, "--shard"]
    if n_per_copy() > 1 and answer == "messages":
        words.insert(words.index(config.model) + 1, "PROMPT")  # only one process can converse
    if adapter is not None:
        words += ["--adapter", str(adapter)]
    if config.is_mixture and answer != "messages":
        words += ["--task", "TASK"]  # one of those that the adapter has learned
    changed = changed_flags(config)
    words += flag_words(config, [name for name in names if name in changed])
    is_one_prompt = str(config.eval_prompt).isdecimal()
    if "eval_prompt" in changed and is_one_prompt and answer != "messages":
        words += ["--prompt", str(config.eval_prompt)]
    return words


def changed_flags(config):
    """Return the names of the flags that differ from their defaults, in the order of --help."""
    fields = dataclasses.fields(config)
    return [field.name for field in fields if getattr(config, field.name) != field.default]
