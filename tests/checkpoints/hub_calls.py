"""Calls that download, in a process of their own with another environment.

huggingface_hub reads its environment when it is imported. So the process is forked from a server
that has not imported it, and neither does this module.
"""

import contextlib
import io
import json
import os
import time

from running import finish, processes

import minia3


def ask(folder, environ, calls, longest_wait=None):
    """Return the results of the calls, and the seconds that huggingface_hub would have waited.

    folder: where the process may write. calls: pairs of a word (see `outcome`) and a name.
    """
    answers = folder / "answers.json"
    log = folder / "log.txt"
    arguments = (answers, log, environ, calls, longest_wait)
    process = processes().Process(target=answer, args=arguments)
    process.start()
    assert finish(process) == 0, log.read_text()
    return json.loads(answers.read_text())


def answer(answers, log, environ, calls, longest_wait):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environ)
    waits = []
    time.sleep = waits.append  # huggingface_hub waits longer and longer between its tries
    from minia3.checkpoints import hub

    if longest_wait is not None:
        hub.LONGEST_WAIT = longest_wait
    outcomes = [outcome(call, name) for call, name in calls]
    answers.write_text(json.dumps([outcomes, sum(waits)]))


def outcome(call, name):
    """Return the files that a call finds, the sum of the weights that it loads, or its error.

    For a command, return what it prints, or its message if it fails. name: its words.
    """
    from minia3.checkpoints import hub

    if call == "command":
        return printed(name)
    try:
        if call == "find without weights":
            return sorted(path.name for path in hub.find(name, weights=False).iterdir())
        if call == "find adapter":
            return {path.name: path.read_text() for path in hub.find_adapter(name).iterdir()}
        model = minia3.load_model(name)
    except ValueError as error:
        return f"ValueError: {error}"
    weights = [p for name, p in model.named_parameters() if not name.endswith(".scale")]
    return sum(p.double().sum().item() for p in weights)


def printed(words):
    from minia3.cli.main import main

    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return err.getvalue() if code else out.getvalue()
