"""Run a function in several processes that compute together, as torchrun would start them.

They talk through gloo, which works on any machine. The processes are forked from the server of
running.py, which has imported torch already.
"""

import io
import os
import traceback

import torch
from running import processes
from torch.distributed.device_mesh import init_device_mesh

from minia3.model.shard import Shards


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
        place = (rank, n_processes, str(folder / "meeting"))
        child = context.Process(target=run_rank, args=(sender, place, function, arguments))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    outcomes = [receive(pipe) for pipe in pipes]
    for child in children:
        child.join(60)
    for _, error in outcomes:
        assert error is None, error
    return [torch.load(io.BytesIO(content), weights_only=False) for content, _ in outcomes]


def receive(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None, "the process has died"


def run_rank(pipe, place, function, arguments):
    rank, n_processes, meeting = place
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_processes
    )
    try:
        # As bytes, because a tensor would be sent as the address of memory that ends with this
        # process.
        content = io.BytesIO()
        torch.save(function(*arguments), content)
        pipe.send((content.getvalue(), None))
    except BaseException:
        pipe.send((None, f"process {rank}: {traceback.format_exc()}"))
        os._exit(1)  # so that the others do not wait for this one
    torch.distributed.destroy_process_group()


def my_shards(n_per_copy=None, offload=False):
    """Return the Shards of this process, for copies that `n_per_copy` processes hold; None: all."""
    n_processes = torch.distributed.get_world_size()
    n_per_copy = n_per_copy or n_processes
    shape = (n_processes // n_per_copy, n_per_copy)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return Shards(mesh["shards"], offload)
