"""Run a function in several processes that compute together, as torchrun would start them.

They talk through gloo, which works on any machine. The processes are forked from the server of
running.py, which has imported torch already.
"""

import contextlib
import io
import os
import traceback
from multiprocessing.connection import wait

import torch
from ports import reserved_port
from running import processes, run

from minia3.files.processes import join, leave, n_processes
from minia3.training.shards import make_shards

PATIENCE = 120  # seconds that a process may take longer than the first one to answer


def on_ranks(n_processes, function, *arguments, prepare=None):
    """Return [function(*arguments) in process 0, in process 1, ...].

    function: of a module. It runs after `join` (processes.py). prepare: another one, which each
    process calls before that. Raise AssertionError with the traceback of the first process that
    fails.
    """
    context = processes()
    all_have_answered = context.Event()
    pipes = []
    children = []
    with reserved_port() as port:
        for rank in range(n_processes):
            receiver, sender = context.Pipe(duplex=False)
            place = (rank, n_processes, port)
            given = (sender, all_have_answered, place, prepare, function, arguments)
            child = context.Process(target=run_rank, args=given)
            child.start()
            sender.close()
            pipes.append(receiver)
            children.append(child)
        try:
            wait(pipes)  # for the first answer, however long it takes
            outcomes = [receive(pipe, child) for pipe, child in zip(pipes, children, strict=True)]
        finally:
            all_have_answered.set()  # after Ctrl-C, too, or the processes would stay
        for child in children:
            child.join(60)
    for _, error in outcomes:
        assert error is None, error
    return [torch.load(io.BytesIO(content), weights_only=False) for content, _ in outcomes]


def receive(pipe, child):
    """Return what a process answers, and its error: one of the two is None."""
    if not pipe.poll(PATIENCE):
        child.kill()
        return None, f"no answer {PATIENCE} s after the first: does a process wait for another?"
    try:
        return pipe.recv()
    except EOFError:
        return None, "the process has died"


def run_rank(pipe, all_have_answered, place, prepare, function, arguments):
    rank, n_processes, port = place
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if prepare is not None:
        prepare()
    join()
    try:
        # As bytes, because a tensor would be sent as the address of memory that ends with this
        # process.
        content = io.BytesIO()
        torch.save(function(*arguments), content)
        pipe.send((content.getvalue(), None))
    except BaseException:
        pipe.send((None, f"process {rank}: {traceback.format_exc()}"))
        os._exit(1)  # so that the others do not wait for this one
    # The end of a process would break off those that are still connecting. (They do not meet in a
    # collective here: it could be the counterpart of one that only another process makes.)
    all_have_answered.wait(10 * PATIENCE)  # not forever, because the parent may be killed
    leave()


def run_on_ranks(n_processes, *command_lines, codes=None):
    """Run train.py in processes that compute together, and return what it prints.

    Several command lines are several runs, one after the other, in the same processes. codes: the
    exit code that each of them should have; None: 0. Only a run that fails may print errors.
    """
    codes = codes or [0] * len(command_lines)
    return "".join(on_ranks(n_processes, printed_by_runs, command_lines, codes))


def printed_by_runs(command_lines, codes):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for words, code in zip(command_lines, codes, strict=True):
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                assert run(words) == code, errors.getvalue()
            assert code != 0 or errors.getvalue() == ""
    return output.getvalue()


def my_shards(n_per_copy=None, offload=False):
    """Return the Shards of this process, for copies that `n_per_copy` processes hold; None: all."""
    return make_shards(n_per_copy or n_processes(), offload, torch.device("cpu"))
