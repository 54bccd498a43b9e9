"""Kill what writes, at every change of the file system, within writes, and at random moments.

After each kill the same command runs again (a training resumes), and must leave what it leaves
without a kill: the same files with the same bits, except for times, and nothing else.

A kill is named by (seed, deed, number). The number says of which kind it is:

    change   SIGKILL before the k-th time that the process opens a file to write, renames, removes,
             makes a folder or truncates, as Python's audit hooks tell. Small k come first.
    write    after the k-th change, the system ends the process in the middle of a write, because a
             file gets longer than some bytes. (Writes of libraries in Rust and C++ are hit, too.)
    moment   the process ends after some time
"""

import json
import math
import operator
import os
import random
import resource
import shutil
import signal
import sys
import time

from running import TIMES

from minia3.training.checkpoint import load_checkpoint
from tests.hostile.campaign import Tally
from tests.hostile.deeds import DEEDS, make_inputs, serve_archive
from tests.hostile.processes import finish, last_line, run_process

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Empty files that mean nothing once the process that locked them is dead
LOCKS = (".lock", ".part-lock")
TRIED_KINDS = ("change", "write", "change", "moment")


class Reference:
    """What a deed does if nobody kills it."""

    def __init__(self, n_changes, n_bytes, seconds, results):
        self.n_changes = n_changes
        self.n_bytes = n_bytes  # of its longest file
        self.seconds = seconds
        self.results = results  # path -> what two equal runs share


class KillCampaign:
    """A folder with the inputs of all deeds, and a server of downloads. Close it at the end."""

    def __init__(self, folder):
        self.inputs = folder / "inputs"
        self.scratch = folder / "scratch"
        self.begun = folder / "begun"  # what `begin` of a deed has made, by its name
        self.references = {}  # name of a deed -> its Reference
        self.inputs.mkdir()
        do(lambda: make_inputs(self.inputs))
        self.server, address = serve_archive(self.inputs)
        (self.inputs / "address").write_text(address)

    def close(self):
        os.kill(self.server, signal.SIGKILL)
        finish(self.server)

    def clear(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def begin(self, deed):
        """Make the scratch folder as the deed finds it."""
        self.clear()
        if deed.begin is None:
            return
        begun = self.begun / deed.begin.__name__
        if not begun.exists():
            do(lambda: deed.begin(self.inputs, self.scratch))
            shutil.copytree(self.scratch, begun)
        else:
            shutil.copytree(begun, self.scratch, dirs_exist_ok=True)

    def refer(self, name):
        """Return the Reference of a deed. Raise AssertionError if it fails."""
        if name not in self.references:
            self.references[name] = self.make_reference(DEEDS[name])
        return self.references[name]

    def make_reference(self, deed):
        self.begin(deed)
        counted = self.scratch.with_name("counted")

        def count():
            watch = Watch(self.scratch)
            began = time.monotonic()
            code = deed.run(self.inputs, self.scratch)
            counted.write_text(f"{watch.n_changes} {time.monotonic() - began}")
            return code

        do(count)
        n_changes, seconds = counted.read_text().split()
        sizes = [path.stat().st_size for path in files_in(self.scratch)]
        results = results_in(self.scratch)
        return Reference(int(n_changes), max(sizes), float(seconds), results)

    def kill(self, name, number, seed):
        """Kill a deed and do it again. Return (whether it was killed, what went wrong or None)."""
        deed = DEEDS[name]
        reference = self.refer(name)
        self.begin(deed)
        kind, point = choose_point(name, number, seed, reference)

        def run():
            prepare(kind, point, self.scratch)
            return deed.run(self.inputs, self.scratch)

        code, printed = run_process(run)
        if code > 0:
            return False, f"{kind} {point}: exit code {code}: {last_line(printed)}"
        wrong = self.do_again(deed, reference)
        return code < 0, wrong and f"killed at {kind} {point}: {wrong}"

    def do_again(self, deed, reference, is_equal=operator.eq):
        """Do what is left of a deed. Return what is wrong with the result, or None."""
        again = deed.again or deed.run
        code, printed = run_process(lambda: again(self.inputs, self.scratch))
        wrong = difference(reference.results, results_in(self.scratch), is_equal)
        # A command that writes a new folder refuses one that is complete, and rightly so.
        was_complete = code == 2 and "is not empty" in last_line(printed)
        if code and not (was_complete and wrong is None):
            return f"then exit code {code}: {last_line(printed)}"
        return wrong


def do(act):
    """Call `act` in a process that must succeed."""
    code, printed = run_process(act)
    assert code == 0, last_line(printed)


def choose_point(name, number, seed, reference):
    """Return the kind of a kill and where it comes."""
    rng = random.Random(f"{seed} {name} {number}")
    kind = TRIED_KINDS[number % len(TRIED_KINDS)]
    if kind == "change":
        # Each change once before any comes again, in an order that the seed gives.
        order = list(range(reference.n_changes))
        random.Random(f"{seed} {name}").shuffle(order)
        n_before = sum(TRIED_KINDS[i % len(TRIED_KINDS)] == kind for i in range(number))
        return kind, order[n_before % len(order)]
    if kind == "write":
        longest = math.exp(rng.uniform(0, math.log(reference.n_bytes)))
        return kind, (rng.randrange(reference.n_changes), int(longest))
    return kind, rng.uniform(0.005, reference.seconds)


def prepare(kind, point, folder):
    """Let this process die there."""
    if kind == "change":
        Watch(folder, point, die)
    elif kind == "write":
        change, longest = point
        Watch(folder, change, lambda: die_in_write(longest))
    else:
        signal.setitimer(signal.ITIMER_REAL, point)  # its signal ends the process


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(n_bytes):
    """Let the system end this process when it writes more than n_bytes into a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


class Watch:
    """Counts the changes of a folder by this process, and calls `act` before one of them."""

    def __init__(self, folder, change=math.inf, act=None):
        self.folder = str(folder)
        self.change = change
        self.act = act
        self.n_changes = 0
        sys.addaudithook(self.notice)  # a hook stays until the process ends

    def notice(self, event, arguments):
        if not is_change(event, arguments):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, which was counted when it was opened
        path = os.fsdecode(path)
        # What is not absolute is the content of a folder that is removed.
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        self.n_changes += 1
        if self.n_changes == self.change + 1:
            self.act()


def is_change(event, arguments):
    if event == "open":
        return bool(arguments[2] & TO_WRITE)
    return event in CHANGES


# What is compared


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def results_in(folder):
    """Return what equal deeds share: path -> content, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.name == "metrics.jsonl":
            found[name] = timeless_lines(path)
        elif path.name == "checkpoint.pt":
            found[name] = timeless_checkpoint(path.parent)
        elif path.name not in LOCKS:
            found[name] = path.read_bytes()
    return found


def timeless_lines(path):
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines.append({key: value for key, value in line.items() if key not in TIMES})
    return lines


def timeless_checkpoint(folder):
    saved = load_checkpoint(folder)
    return (saved.n_done, saved.is_finished, len(saved.finals))


def difference(expected, found, is_equal=operator.eq):
    """Return how the results of two deeds differ, or None."""
    missing = sorted(expected.keys() - found.keys())
    left = sorted(found.keys() - expected.keys())
    if missing or left:
        return f"missing: {missing}, left behind: {left}"
    changed = [name for name in expected if not is_equal(expected[name], found[name])]
    return f"other content: {changed}" if changed else None


# The campaign


def run_kills(campaign, names, n_kills, seed, show):
    """Kill the deeds n_kills times in all, and return a Tally for each. show: called on each.

    A deed gets a share by the number of its changes, and a fair minimum. In a Tally, what was
    killed is `n_refused`, and what had ended before is `n_read`.
    """
    references = {name: campaign.refer(name) for name in names}
    mean = sum(reference.n_changes for reference in references.values()) / max(len(names), 1)
    tallies = []
    for name, reference in references.items():
        share = (1 + reference.n_changes / mean) / 2
        n_of_deed = math.ceil(n_kills * share / len(references))
        tally = kill_deed(campaign, name, range(n_of_deed), seed)
        show(tally)
        tallies.append(tally)
    return tallies


def kill_deed(campaign, name, numbers, seed):
    tally = Tally(f"kill {name}", len(numbers))
    began = time.monotonic()
    for number in numbers:
        was_killed, wrong = campaign.kill(name, number, seed)
        if wrong:
            tally.failures.append(f"{number}: {wrong}")
        elif was_killed:
            tally.n_refused += 1
        else:
            tally.n_read += 1
    tally.seconds = time.monotonic() - began
    return tally


def repeat_kill(campaign, name, number, seed):
    """Kill once. Return the point, whether it came in time, and what went wrong, or None."""
    point = choose_point(name, number, seed, campaign.refer(name))
    return (point, *campaign.kill(name, number, seed))
