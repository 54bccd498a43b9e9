"""Command lines of train.py that repeat a run, or evaluate what it trained."""

import dataclasses
import shlex

from minia3.training.flags import flag_words

# A result depends on these flags even if nothing is trained.
EVALUATION_FLAGS = (
    "data_dir",
    "shots",
    "seed",
    "dtype",
    "max_length",
    "max_new_tokens",
    "eval_prompt",
)
PLACES = (
    "out",
    "data_dir",
    "resume",
    "config",
    "device",
    "log_to",
)  # where a run happens, not what it does

# How runs are started.
SCRIPT = "python train.py"
COMMAND = "minia3 train"
CALL = "minia3.train"


def resume_command(program, folder, steps=None):
    """Return what continues the run in a folder, with another number of steps if it is given."""
    if program == CALL:
        extension = f", steps={steps}" if steps else ""
        return f"minia3.train(resume={str(folder)!r}{extension})"
    extension = f" --steps {steps}" if steps else ""
    return f"{program} --resume {shlex.quote(str(folder))}{extension}"


def training_command(config):
    """Return the words of the command that trains with the flags of `config`, without places."""
    names = ["model", "task"]
    for name in changed_flags(config):
        if name not in ("model", "task", *PLACES):
            names.append(name)
    return ["python", "train.py", *flag_words(config, names)]


def evaluation_command(config, adapter=None):
    """Return the words of the command that evaluates the model of `config` with an adapter."""
    names = ["model", "task"]
    for name in changed_flags(config):
        if name in ("method", *EVALUATION_FLAGS):
            names.append(name)
    words = ["python", "train.py", *flag_words(config, names)]
    if adapter is not None:
        words += ["--adapter", str(adapter)]
    return [*words, "--eval-only"]


def changed_flags(config):
    """Return the names of the flags that differ from their defaults, in the order of --help."""
    fields = dataclasses.fields(config)
    return [field.name for field in fields if getattr(config, field.name) != field.default]
