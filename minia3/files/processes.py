"""Which of several processes this one is, and what they tell each other.

    torchrun --nproc-per-node 4 train.py --model t5-base --task rte

torchrun starts four processes that run the same script, and tells each in its environment who it
is. A process that is alone imports no torch here, and does what it would do without this module.
Two rules make several processes one program:

- All of them take the same decisions, so they meet in the same calls, in the same order. What only
  one of them knows (the first reads the flags, and opens the folder of the run) goes to all.
- A process that cannot go on says why and ends. The others wait for it in a call of this module,
  find it gone, and end, too. So no call has a timeout: a download may take hours.
"""

import math
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce

from minia3.files.read import one_line

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # from torchrun

FOREVER = timedelta(days=300)

FIRST_WORD = "first-word"  # keys of the store that all processes share
EXIT_CODE = "exit-code"
N_LEFT = "n-left"
MOMENT = 2.0  # seconds that a process waits for others when it leaves

# What torch says if the other end of a connection is gone; other errors are shown as well.
SIGNS = (
    *("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process"),
    "Connection timed out",  # its machine has lost its power, or its network
)

GONE = "another process of this run has ended"


class PeerGone(RuntimeError):
    """Another process of this run has ended, so that this one cannot go on."""


class Process:
    """What this process knows about itself. Before `join` it is alone."""

    def __init__(self):
        self.rank = 0
        self.n_processes = 1
        self.store = None  # a dictionary that lives outside the processes of the run
        self.n_per_copy = 1  # processes that hold one copy of a model: see `hold_together`
        self.is_dividing = False  # see `dividing`
        self.has_combined = False  # in the block of `dividing`
        self.has_parted = False  # in that block: the processes of a copy read different batches


_process = Process()


def has_several_processes():
    """Return whether torchrun has started this process together with others."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def is_alone_or_first():
    """Return whether this process has to do what only one of several should do, before `join`."""
    return not has_several_processes() or os.environ["RANK"] == "0"


def join():
    """Meet the other processes that torchrun has started, if there are any.

    A second call does nothing.
    """
    if not has_several_processes() or _process.n_processes > 1:
        return
    import torch.distributed

    if torch.distributed.is_initialized():
        raise ValueError(
            "torch.distributed is initialized already: leave this to minia3, which does it itself"
        )
    rendezvous = torch.distributed.rendezvous("env://", timeout=FOREVER)
    store, _process.rank, _process.n_processes = next(rendezvous)
    # With --max-restarts, torchrun starts all processes again, but what they said before is kept.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    _process.store = torch.distributed.PrefixStore("minia3", store)
    with meeting():
        torch.distributed.init_process_group(
            choose_backend(),
            store=store,
            rank=_process.rank,
            world_size=_process.n_processes,
            timeout=FOREVER,
        )


def choose_backend():
    """Return what sends the tensors of each kind of device, for torch: "cpu:gloo,cuda:nccl".

    torch would choose by itself, but from 2.6 on only for the accelerator, if the machine has one.
    Then nothing would send what the processes tell each other, which is on the CPU.
    """
    import torch.distributed

    chosen = ["cpu:gloo"]
    for kind, backend in torch.distributed.Backend.default_device_backend_map.items():
        module = getattr(torch, kind, None)
        if kind == "cpu" or module is None or not module.is_available():
            continue
        if not torch.distributed.is_backend_available(backend):  # torch for Windows has no NCCL
            backend = "gloo"
        chosen.append(f"{kind}:{backend}")
    return ",".join(chosen)


def rank():
    """Return the number of this process, from 0."""
    return _process.rank


def n_processes():
    return _process.n_processes


def is_first():
    """Return whether this process is the one that writes and prints, and the first to download."""
    return _process.rank == 0


def local_rank():
    """Return the number of this process among those on its machine."""
    return int(os.environ["LOCAL_RANK"]) if _process.n_processes > 1 else 0


def n_on_machine():
    """Return how many processes of this run the machine has."""
    if _process.n_processes == 1:
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", _process.n_processes))


def n_per_copy():
    """Return how many processes hold one copy of the model of this run together."""
    return _process.n_per_copy


@contextmanager
def meeting():
    """Raise PeerGone if another process ends while this one waits for it in the block."""
    try:
        yield
    except RuntimeError as error:  # torch has no class of errors for this
        message = GONE
        if not is_gone(error):
            message += f", or cannot be reached: {one_line(error)}"
        raise PeerGone(message) from error


@contextmanager
def computing_together():
    """Raise PeerGone if another process ends while torch itself waits for it in the block.

    torch does so when it gathers a part of a model that is divided (model/shard.py).
    """
    try:
        yield
    except PeerGone:
        raise
    except RuntimeError as error:
        if _process.n_processes > 1 and is_gone(error):
            raise PeerGone(GONE) from error
        raise


def is_gone(error):
    """Return whether an error of torch says that another process has ended."""
    return any(sign in str(error) for sign in SIGNS)


# What only one process knows


def from_first(value):
    """Return the `value` that the first process has. The others wait for it."""
    if _process.n_processes == 1:
        return value
    import torch.distributed

    values = [value]
    with meeting():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def overwrite_by_first(tensor):
    """Overwrite a contiguous tensor by that of the first process, which has as many bytes."""
    import torch

    # As bytes, because not every way of sending knows every dtype.
    values = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(values) > 0:
        with meeting():
            torch.distributed.broadcast(values, src=0)


@contextmanager
def first_goes_first():
    """Let the first process do the block, then one on each other machine, and then all the others.

    So one process of a machine downloads a file, and the others find it. If all of them began at
    once, those that wait for a long download would give up (checkpoints/hub.py).
    """
    turn = 2
    if is_first():
        turn = 0
    elif local_rank() == 0:
        turn = 1
    for _ in range(turn):
        gathered(None)
    yield
    for _ in range(2 - turn):
        gathered(None)


def gathered(value):
    """Return the values of all processes, in the order of their numbers."""
    if _process.n_processes == 1:
        return [value]
    import torch.distributed

    values = [None] * _process.n_processes
    with meeting():
        torch.distributed.all_gather_object(values, value)
    return values


def add_over_processes(tensor):
    """Add up a tensor over all processes, in place."""
    if _process.n_processes > 1:
        import torch.distributed

        with meeting():
            torch.distributed.all_reduce(tensor)


# Work that is divided


@contextmanager
def dividing():
    """Divide among the processes the batches that a function of the block reads.

    The function takes its batches through `share`, and passes its results through `combine`. If
    one of the processes raises a ValueError before that, all of them raise it. What is raised later
    must come from the combined results, so that all processes raise it themselves.

    But if processes share a copy of the model and read different batches, only the one that raises
    a ValueError knows of it: others wait for its part of a block. It says why and ends, and they
    find it gone.
    """
    if _process.n_processes == 1:
        yield
        return
    _process.is_dividing = True
    _process.has_combined = False
    _process.has_parted = False
    try:
        yield
    except ValueError as error:
        if not (_process.has_combined or _process.has_parted):
            combine_outcomes(None, error)
        raise
    finally:
        _process.is_dividing = False


def hold_together(number):
    """Say that every `number` processes in a row hold one copy of a model (model/shard.py).

    They must make equally many passes. Raise ValueError if some processes would be left over.
    """
    if _process.n_processes % number:
        raise ValueError(
            f"--shard {number} makes groups of {number} processes, but there are "
            f"{_process.n_processes}: expected a multiple: change --nproc-per-node, "
            "or give another --shard"
        )
    _process.n_per_copy = number


def share(items):
    """Return this process's share of the items of a list, within `dividing`; else, all items.

    If processes share a copy of the model, their shares have the same length: if a share is shorter
    than others, the last item of the list is added to it.
    """
    if not _process.is_dividing:
        return items
    _process.has_parted = _process.n_per_copy > 1
    mine = items[_process.rank :: _process.n_processes]
    n_most = math.ceil(len(items) / _process.n_processes)
    if _process.n_per_copy > 1 and len(mine) < n_most:
        mine = [*mine, items[-1]]
    return mine


def share_of_copy(items):
    """Return a share, as `share` does, but the same one for all processes of a copy.

    Generation needs this, because different prompts need different numbers of passes.
    """
    if not _process.is_dividing:
        return items
    n_copies = _process.n_processes // _process.n_per_copy
    return items[_process.rank // _process.n_per_copy :: n_copies]


def combine(function, value):
    """Return function(function(value of process 0, value of process 1), ...), within `dividing`.

    Else, return the value.
    """
    if not _process.is_dividing:
        return value
    return reduce(function, combine_outcomes(value, None))


def combine_outcomes(value, error):
    """Return the values of all processes. If some of them have errors, raise the first one."""
    _process.has_combined = True
    outcomes = gathered((value, error))
    for _, other_error in outcomes:
        if other_error is not None:
            raise other_error
    return [other_value for other_value, _ in outcomes]


# The end


def has_first_word(code):
    """Return whether this process is the first to say why the run ends, and so the only one.

    code: the exit code that goes with it; see `leave`.
    """
    if _process.store is None:
        return True
    with suppress(RuntimeError):  # the store is gone: better said twice than not at all
        if _process.store.add(FIRST_WORD, 1) > 1:
            return False
        _process.store.set(EXIT_CODE, str(code))
    return True


def is_ending():
    """Return whether one of several processes has said why the run ends."""
    if _process.store is None:
        return False
    try:
        return _process.store.check([FIRST_WORD])
    except RuntimeError:  # the store is gone
        return True


def leave(code=0):
    """Take no further part in the run, and return the exit code of this process.

    That is the code of the process that had the first word, or `code` if nobody had it. Processes
    that wait for this one find it gone, and leave, too. This one waits a moment for them, because
    torchrun kills all others as soon as one process has ended, and they would lose their exit code.
    """
    if _process.store is None:
        return code
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # because it is ending already
    # In a thread, because an accelerator whose peer is gone may never answer.
    closing = threading.Thread(target=close_connections, daemon=True)
    closing.start()
    closing.join(MOMENT)
    with suppress(RuntimeError):  # the store is gone
        _process.store.add(N_LEFT, 1)
        if _process.store.check([EXIT_CODE]):
            code = int(_process.store.get(EXIT_CODE))
        deadline = time.monotonic() + MOMENT
        while time.monotonic() < deadline and _process.store.add(N_LEFT, 0) < n_processes():
            time.sleep(0.02)
    return code


def close_connections():
    """Let the other processes find out that this one is gone."""
    import torch.distributed

    with suppress(AssertionError, RuntimeError, ValueError):  # the first: they have never met
        torch.distributed.destroy_process_group()
