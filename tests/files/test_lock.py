"""Guards minia3/files/lock.py: a lock has one holder at a time, even if its file is removed."""

import pytest

from minia3.files.lock import lock_folder

fcntl = pytest.importorskip("fcntl", reason="Windows has no flock, and nothing is locked there")
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


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """A process that opened the file before it was removed would hold a lock that nobody sees."""
    first = lock_folder(tmp_path)
    flock = fcntl.flock

    def flock_after_the_first_holder_has_gone(file, operation):
        if not first.closed:
            (tmp_path / ".lock").unlink()
            first.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_first_holder_has_gone)
    second = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        lock_folder(tmp_path)
    second.close()
