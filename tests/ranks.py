"""Run a function in several processes that compute together, as torchrun would start them.

They talk through gloo, which works on any machine. The processes are forked from the server of
running.py, which has imported torch already.
"""

import os
import traceback

import torch
from running import processes


def on_ranks(n_processes, folder, function, *arguments):
    """Return [function(*arguments) in process 0, in process 1, ...].

    folder: an empty one, in which the processes meet. function: of a module. It runs within
    torch.distributed. Raise AssertionError with the traceback of the first process that fails.
    """
    context = processes()
    pipes = []
    children = []
    for rank in range(n_processes):
        receiver, sender = context.Pipe(duplex=False)
        settings = (rank, n_processes, str(folder / "meeting"))
        child = context.Process(target=run_rank, args=(sender, settings, function, arguments))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    outcomes = [receive(pipe) for pipe in pipes]
    for child in children:
        child.join(60)
    for result, error in outcomes:
        assert error is None, error
    return [result for result, _ in outcomes]


def receive(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None, "the process has died"


def run_rank(pipe, settings, function, arguments):
    rank, n_processes, meeting = settings
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_processes
    )
    try:
        pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, f"process {rank}: {traceback.format_exc()}"))
        os._exit(1)  # so that the others do not wait for this one
    torch.distributed.destroy_process_group()
