"""Guards minia3/files/lock.py: a lock has one holder at a time, even if its file is removed."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import running

from minia3.files.lock import FAR, FolderLocked, lock_folder, remove_lock, waiting_for_lock
from minia3.files.write import write_json, writing_folder

fcntl = pytest.importorskip("fcntl", reason="these tests are for flock")
REFUSED = "another run is writing there"


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    first = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: {REFUSED}$"):
        lock_folder(tmp_path)
    first.close()
    with lock_folder(tmp_path), pytest.raises(ValueError, match=REFUSED):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_locks_with_different_names_or_folders_are_independent(tmp_path):
    (tmp_path / "b").mkdir()
    with lock_folder(tmp_path), lock_folder(tmp_path, "results.csv"), lock_folder(tmp_path / "b"):
        pass


def test_a_lock_keeps_the_content_of_its_file(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n")
    lock_folder(tmp_path, "results.csv").close()
    assert (tmp_path / "results.csv").read_text() == "a,b\n"


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(
    is_made_anew, tmp_path, monkeypatch
):
    """A process that opened the file before it was removed would hold a lock that nobody sees."""
    first = lock_folder(tmp_path)
    flock = fcntl.flock

    def flock_after_the_first_holder_has_gone(file, operation):
        if not first.closed:
            (tmp_path / ".lock").unlink()
            first.close()
            if is_made_anew:
                (tmp_path / ".lock").touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_first_holder_has_gone)
    second = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        lock_folder(tmp_path)
    second.close()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="there is no /dev/fd")
def test_a_file_without_a_name_is_locked_at_the_first_try(tmp_path, monkeypatch):
    """A shell can keep a deleted file open, and give it to a command as `--out /dev/fd/9`."""
    flock = fcntl.flock
    n_tries = 0

    def flock_once(file, operation):
        nonlocal n_tries
        n_tries += 1
        assert n_tries == 1
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_once)
    with open(tmp_path / "results.csv", "w") as kept:
        (tmp_path / "results.csv").unlink()
        lock_folder(Path("/dev/fd"), str(kept.fileno())).close()


def test_a_file_system_without_locks_is_named_and_is_not_taken_for_another_run(
    tmp_path, monkeypatch
):
    """Lustre says so unless it is mounted with `flock`."""

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="its file system has no locks") as caught:
        lock_folder(tmp_path)
    assert not isinstance(caught.value, FolderLocked)
    with (
        pytest.raises(ValueError, match="Function not implemented"),
        waiting_for_lock(tmp_path, "x"),
    ):
        pass


# Windows


class FakeLocking:
    """Python's msvcrt: a byte of a file has one holder, and locking it again is an OSError."""

    LK_NBLCK = 2

    def __init__(self):
        self.held = {}  # (inode, byte) -> the descriptor that holds it

    def locking(self, descriptor, mode, n_bytes):
        assert (mode, n_bytes) == (self.LK_NBLCK, 1)
        key = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if key in self.held and is_open(self.held[key]):
            raise PermissionError(13, "Permission denied")
        self.held[key] = descriptor


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def windows(monkeypatch):
    """This process has no fcntl, but msvcrt; and an open file cannot be removed."""
    fake = FakeLocking()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)

    unlink = Path.unlink

    def unlink_if_closed(path, missing_ok=False):
        if path.exists() and any(path.stat().st_ino == inode for inode, _ in fake.held):
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_if_closed)
    return fake


def test_windows_locks_a_byte_behind_the_end(windows, tmp_path):
    first = lock_folder(tmp_path)
    assert [byte for _, byte in windows.held] == [FAR]
    with pytest.raises(ValueError, match=REFUSED):
        lock_folder(tmp_path)
    first.close()
    windows.held.clear()  # as the system does when the file is closed
    lock_folder(tmp_path).close()


def test_windows_keeps_the_file_of_a_lock_and_folders_are_written_all_the_same(windows, tmp_path):
    with lock_folder(tmp_path):
        remove_lock(tmp_path / ".lock")
    assert (tmp_path / ".lock").exists()
    write_json(tmp_path / "a" / "config.json", {})
    with writing_folder(tmp_path / "b") as temporary:
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "b" / "config.json").read_text() == "{}"


def test_a_run_trains_on_windows(windows, tmp_path, monkeypatch):
    """Without fcntl and resource, and with a third signal."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("minia3.training.signals.STOPPING", [signal.SIGINT, signal.SIGTERM, 21])
    assert running.run(running.words(tmp_path / "run", steps=2)) == 0
    assert running.metrics(tmp_path / "run")[-1]["peak_memory_bytes"] == 0
