"""What several processes tell each other; those that torchrun starts are tested with runs."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from ranks import on_ranks

from minia3.files import processes
from minia3.files.processes import PeerGone, computing_together, meeting
from minia3.inference.scoring import NotFiniteError


@pytest.fixture
def two(monkeypatch):
    """Let each thread be one of two processes, which meet in `gathered` and `from_first`."""
    local = threading.local()
    barrier = threading.Barrier(2, timeout=10)
    sent = [None, None]

    class ThreadProcess:
        def __getattribute__(self, name):
            return getattr(local, name)

        def __setattr__(self, name, value):
            setattr(local, name, value)

    def gathered(value):
        sent[local.rank] = pickle.dumps(value)
        barrier.wait()
        values = [pickle.loads(text) for text in sent]
        barrier.wait()
        return values

    monkeypatch.setattr(processes, "_process", ThreadProcess())
    monkeypatch.setattr(processes, "gathered", gathered)
    monkeypatch.setattr(processes, "from_first", lambda value: gathered(value)[0])

    def run(function):
        outcomes = [None, None]

        def run_one(rank):
            vars(local).update(vars(processes.Process()), rank=rank, n_processes=2)
            try:
                outcomes[rank] = function(rank)
            except ValueError as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run_one, args=(rank,)) for rank in (0, 1)]
        for thread in reversed(threads):  # so that the first process has to be waited for
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


def test_a_process_that_is_alone_imports_no_torch_and_shares_with_nobody():
    code = (
        "import sys; from minia3.files import processes as p; p.join(); assert p.is_first()\n"
        "assert (p.rank(), p.n_processes(), p.local_rank(), p.n_on_machine()) == (0, 1, 0, 1)\n"
        "assert p.from_first(3) == 3 and p.gathered(3) == [3]\n"
        "with p.first_goes_first(), p.dividing():\n"
        "    assert p.share([1, 2]) == [1, 2] and p.combine(max, 4) == 4\n"
        "assert p.has_first_word(2) and p.has_first_word(2) and p.leave(2) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_torchrun_has_started(monkeypatch):
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not processes.has_several_processes()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")  # other programs set these two
    assert not processes.has_several_processes()
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert processes.has_several_processes()
    assert not processes.is_alone_or_first()
    monkeypatch.setenv("RANK", "0")
    assert processes.is_alone_or_first()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not processes.has_several_processes()


def test_divided_work_is_combined_in_all_processes(two):
    def work(rank):
        with processes.dividing():
            shared = processes.share([5, 6, 7])
            assert shared == ([5, 7] if rank == 0 else [6])
            return processes.combine(lambda a, b: a + b, shared)

    assert two(work) == [[5, 7, 6], [5, 7, 6]]


def test_outside_of_the_block_nothing_is_divided(two):
    def work(rank):
        with processes.dividing():
            processes.combine(max, rank)
        return processes.share([1, 2]), processes.combine(max, rank)

    assert two(work) == [([1, 2], 0), ([1, 2], 1)]


def test_an_error_of_one_process_is_the_error_of_all(two):
    def work(rank):
        with processes.dividing():
            if rank == 1:
                raise NotFiniteError("row 7", 3)
            return processes.combine(max, rank)

    first, second = two(work)
    assert type(first) is type(second) is NotFiniteError
    assert str(first) == str(second)
    assert (first.name, first.index) == ("row 7", 3)


def test_all_raise_the_same_of_two_errors(two):
    def work(rank):
        with processes.dividing():
            raise ValueError(rank)

    assert list(map(str, two(work))) == ["0", "0"]


def test_an_error_in_a_share_of_a_copy_is_not_exchanged(two):
    """The other process may be waiting for a pass of this one, and not for its error."""

    def work(rank):
        processes.hold_together(2)
        with processes.dividing():
            processes.share([1, 2])
            if rank == 1:
                raise ValueError("too long")
        return "waits elsewhere"

    first, second = two(work)
    assert first == "waits elsewhere"
    assert str(second) == "too long"


def test_an_error_before_or_after_the_shares_of_a_copy_is_exchanged(two):
    def work(rank):
        processes.hold_together(2)
        with processes.dividing():
            if rank == 1:
                raise ValueError("before")
            processes.combine_outcomes(None, None)

    assert list(map(str, two(work))) == ["before", "before"]


def test_the_first_process_goes_first(two, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    order = []

    def work(rank):
        with processes.first_goes_first():
            order.append(rank)

    two(work)
    assert order == [0, 1]


def test_only_one_process_has_the_first_word(monkeypatch):
    class Store(dict):
        def add(self, key, n):
            self[key] = self.get(key, 0) + n
            return self[key]

        def set(self, key, value):
            self[key] = value.encode()

    monkeypatch.setattr(processes._process, "store", Store())
    assert processes.has_first_word(2)
    assert not processes.has_first_word(1)
    assert processes._process.store[processes.EXIT_CODE] == b"2"


class Gone:
    """A store whose process has ended."""

    def add(self, key, n):
        raise RuntimeError("Broken pipe")


def test_a_store_that_is_gone_silences_nobody(monkeypatch):
    monkeypatch.setattr(processes._process, "store", Gone())
    assert processes.has_first_word(2)


def test_a_process_that_leaves_is_not_disturbed_by_signals(monkeypatch):
    monkeypatch.setattr(processes._process, "store", Gone())
    monkeypatch.setattr(processes, "close_connections", lambda: None)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        assert processes.leave(3) == 3
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_lost_connection_is_a_peer_that_is_gone():
    said = "[gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1"
    with pytest.raises(PeerGone, match=r"of this run has ended$"), meeting():
        raise RuntimeError(said)
    with pytest.raises(PeerGone, match=r"of this run has ended$"), meeting():
        raise RuntimeError("[gloo/pair.cc:1] Read error [10.0.0.2]:1: Connection timed out")
    with pytest.raises(PeerGone, match=r"or cannot be reached: NCCL error$"), meeting():
        raise RuntimeError("NCCL error")


def test_torch_itself_may_find_that_a_peer_is_gone(monkeypatch):
    def lose(message):
        with computing_together():
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=r"^Broken pipe$"):
        lose("Broken pipe")  # of something else, because this process is alone
    monkeypatch.setattr(processes._process, "n_processes", 2)
    with pytest.raises(PeerGone, match=r"of this run has ended$"):
        lose("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        lose("shapes differ")


@pytest.mark.parametrize(
    ("available", "has_nccl", "expected"),
    [
        ([], True, "cpu:gloo"),
        (["cuda"], True, "cpu:gloo,cuda:nccl"),
        (["cuda"], False, "cpu:gloo,cuda:gloo"),  # Windows
        (["mps"], False, "cpu:gloo,mps:gloo"),
    ],
)
def test_an_accelerator_does_not_take_the_place_of_the_cpu(
    available, has_nccl, expected, monkeypatch
):
    kinds = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "mps": "gloo", "nosuch": "other"}
    monkeypatch.setattr(torch.distributed.Backend, "default_device_backend_map", kinds)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    for kind in ("cuda", "xpu", "mps"):
        is_available = kind in available
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda found=is_available: found)
    assert processes.choose_backend() == expected


def find_accelerator():
    """Let torch find an accelerator on this machine: Apple's, because gloo is what sends there."""
    mock.patch("torch._C._get_accelerator", return_value=torch.device("mps")).start()
    mock.patch("torch.mps.is_available", return_value=True).start()


def values_of_all():
    total = torch.ones(1)
    processes.add_over_processes(total)
    text = processes.from_first(f"from {processes.rank()}")
    return processes.gathered(processes.rank()), text, total.item()


@pytest.mark.slow
def test_processes_on_a_machine_with_an_accelerator_tell_each_other_what_is_on_the_cpu():
    outcomes = on_ranks(2, values_of_all, prepare=find_accelerator)
    assert outcomes == [([0, 1], "from 0", 2.0)] * 2


def note_turn(log):
    """Take a turn as one of two processes on one of two machines."""
    os.environ["LOCAL_RANK"] = str(processes.rank() % 2)
    with processes.first_goes_first(), open(log, "a") as file:
        file.write(f"{processes.rank()} begins\n")
        file.flush()
        file.write(f"{processes.rank()} ends\n")


@pytest.mark.slow
def test_one_process_of_each_machine_goes_before_the_others(tmp_path):
    log = tmp_path / "log"
    on_ranks(4, note_turn, log)
    lines = log.read_text().splitlines()
    assert lines[:4] == ["0 begins", "0 ends", "2 begins", "2 ends"]
    assert sorted(lines[4:]) == ["1 begins", "1 ends", "3 begins", "3 ends"]
