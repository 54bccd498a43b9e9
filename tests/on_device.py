"""Jobs in a process in which the device "sim" exists, and what a GPU would have waited for there.

The device (`simulated_device.py` of MINIA3_TEST_DATA) computes on the CPU, and refuses what a GPU
refuses. It is registered once per process, so each job gets a process of its own, forked from a
server that has imported torch.
"""

import collections
import os
import pickle
import sys
import tempfile
import traceback
from numbers import Number
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from running import finish, processes

READ = "read"  # the CPU waits for a value
COPY_OUT = "copy out"  # the same
COPY_IN = "copy in"
COPY_IN_AT_ONCE = "copy in, without waiting"

COUNTS = collections.Counter()  # (one of these, the file of minia3 that asks) -> how often


def on_sim(job, *arguments):
    """Return what job(*arguments) returns in a process with the device, and what it counted.

    job: a function of a module. Its arguments and result can be pickled. The counts: a Counter of
    pairs (READ, COPY_OUT ..., name of the file of minia3 that asked for it).
    """
    data = os.environ.get("MINIA3_TEST_DATA")
    if data is None or not Path(data, "simulated_device.py").exists():
        pytest.skip("MINIA3_TEST_DATA has no simulated_device.py")
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("the simulated device needs torch 2.13")
    with tempfile.NamedTemporaryFile() as file:
        process = processes().Process(target=_in_child, args=(data, file.name, job, arguments))
        process.start()
        exit_code = finish(process)
        outcome = pickle.loads(Path(file.name).read_bytes())
        assert exit_code == 0, outcome
        return outcome


def _in_child(data, file, job, arguments):
    torch.set_num_threads(1)
    try:
        register(data)
        result = job(*arguments)
        outcome = (result, COUNTS)
    except BaseException:
        Path(file).write_bytes(pickle.dumps(traceback.format_exc()))
        raise
    Path(file).write_bytes(pickle.dumps(outcome))


def register(data):
    """Register the device, and count in COUNTS.

    torch turns `.to("sim", non_blocking=True)` into `copy_`, where the simulated device overlooks
    that nobody waits. So it is looked at here, and the file is that of the caller of `to_device`.
    """
    sys.path.insert(0, data)
    import simulated_device as sim

    run = sim.run
    is_waiting = True

    def look_and_run(function, args, kwargs):
        nonlocal is_waiting
        is_copy = function is torch.ops.aten.copy_.default
        is_waiting = not ((is_copy and args[2:3] == (True,)) or kwargs.get("non_blocking"))
        return run(function, args, kwargs)

    def count(what):
        if what == COPY_IN and not is_waiting:
            what = COPY_IN_AT_ONCE
        COUNTS[what, caller()] += 1

    # torch exchanges the data of a tensor without telling Python, where the numbers are.
    exchange = torch.Tensor.data

    def set_data(tensor, new):
        exchange.__set__(tensor, new)
        tensor.raw = new.raw

    # On CUDA, a number that is written into one entry is a tensor on the CPU, which is copied.
    write = torch.Tensor.__setitem__

    def set_item(tensor, index, value):
        if isinstance(value, Number) and tensor[index].dim() == 0:
            count(COPY_IN)
        write(tensor, index, value)

    sim.SimulatedTensor.data = property(exchange.__get__, set_data)
    sim.SimulatedTensor.__setitem__ = set_item
    sim.run = look_and_run
    sim.count = count
    # torch's own functions take half the time of a job, because they know many kinds of trees.
    sim.tree_map = mapped
    sim.tree_leaves = leaves


def mapped(function, tree):
    """Return `tree` with function(leaf) in place of each leaf. Lists, tuples and dicts branch."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([mapped(function, branch) for branch in tree])
    if kind is dict:
        return {name: mapped(function, branch) for name, branch in tree.items()}
    return function(tree)


def leaves(tree):
    """Return a list of what `mapped` would give to its function."""
    kind = type(tree)
    if kind is dict:
        tree = tree.values()
    elif kind is not tuple and kind is not list:
        return [tree]
    found = []
    for branch in tree:
        found += leaves(branch)
    return found


def forget_counts():
    """Begin to count. A job calls this when its model is loaded."""
    COUNTS.clear()


def caller():
    """Return the name of the file of minia3 that asks for a copy or a value, or "?"."""
    frame = sys._getframe(1)
    while frame is not None:
        *_, grandparent, parent, name = f"//{frame.f_code.co_filename}".split("/")
        is_ours = "minia3" in (grandparent, parent) or name == "train.py"
        if is_ours and name != "to_device.py":
            return name
        frame = frame.f_back
    return "?"


def total(counts, *kinds):
    """Return how many were counted of these kinds."""
    return sum(number for (kind, _), number in counts.items() if kind in kinds)
