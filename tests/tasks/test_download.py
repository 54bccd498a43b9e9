"""A download is whole and has the right checksum, or it leaves nothing behind, whatever the server,
the network, the archive or another process does.
"""

import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from ports import reserved_port
from task_files import FILES, PARTS, Handler, files_below, lines, serve, zipped

from minia3.tasks.download import check_rate, download
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import render
from minia3.tasks.splits import load_task

pytest_plugins = ["served_task"]


ALL_FILES = ["test.jsonl", "train.jsonl", "val.jsonl"]


def names_below(folder):
    return sorted(path.name for path in files_below(folder))


def failure(folder):
    """Load the task, which must fail and leave nothing behind. Return the message."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_task("served", folder)
    assert files_below(folder) == []
    message = str(error.value)
    assert message.startswith(known_tasks()["served"].sources[0].address + ": ")
    assert message.endswith(
        f"put train.jsonl, val.jsonl, test.jsonl into {Path(folder, 'served')} by hand"
    )
    return message


def test_a_new_task_needs_only_an_entry_of_the_table(server, tmp_path, capsys):
    task = load_task("served", tmp_path / "new" / "data")
    assert task.train == [{"text": "a", "label": 0, "idx": 0}, {"text": "b", "label": 1, "idx": 9}]
    assert task.validation == [{"text": "c", "label": 1, "idx": 0}]
    assert task.test == [{"text": "d", "label": -1, "idx": 0}]
    assert render(task.prompts[0], task.train[1]) == ("b?", ["No", "Yes"], 1)
    folder = tmp_path / "new" / "data" / "served"
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert contents == {name: FILES[f"T/{name}"] for name in ALL_FILES}
    assert capsys.readouterr().err == "", "a progress bar is for terminals only"


def test_a_server_that_sends_too_slowly_is_given_up_with_the_reason(server, tmp_path, monkeypatch):
    now = [0.0]

    def monotonic():
        now[0] += 40
        return now[0]

    monkeypatch.setattr("minia3.tasks.download.time.monotonic", monotonic)
    monkeypatch.setattr("minia3.tasks.download.CHUNK", 16)
    message = failure(tmp_path)
    assert "the server is too slow: " in message
    assert "bytes in 80 seconds, expected 1,000 a second" in message


@pytest.mark.parametrize(("n_bytes", "seconds"), [(0, 59), (61_000, 61), (10**9, 10**6)])
def test_a_server_may_be_slow_for_a_minute_and_then_a_kilobyte_per_second(n_bytes, seconds):
    check_rate(n_bytes, seconds)
    with pytest.raises(ValueError, match="too slow"):
        check_rate(n_bytes, seconds + n_bytes + 2)


def test_a_downloaded_file_is_as_readable_as_any_other(server, tmp_path, monkeypatch):
    # Each file is written beside its place, because a file system renames only within itself.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    load_task("served", tmp_path)
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "served" / "train.jsonl").stat().st_mode == mode


def test_files_that_are_there_are_not_downloaded_again(server, tmp_path):
    load_task("served", tmp_path)
    server.shutdown()
    assert load_task("served", tmp_path).train == load_task("served", str(tmp_path)).train
    assert server.n_requests == 1


def test_nothing_is_downloaded_if_train_and_validation_are_there(server, tmp_path):
    load_task("served", tmp_path)
    (tmp_path / "served" / "test.jsonl").unlink()
    (tmp_path / "served" / "val.jsonl").rename(tmp_path / "served" / "validation.jsonl")
    task = load_task("served", tmp_path)
    assert (len(task.train), len(task.validation), task.test, task.notes) == (2, 1, [], [])
    assert server.n_requests == 1


def test_a_file_that_somebody_put_there_is_not_overwritten(server, tmp_path):
    (tmp_path / "served").mkdir()
    mine = lines({"text": "mine", "label": "no"})
    (tmp_path / "served" / "train.jsonl").write_bytes(mine)
    task = load_task("served", tmp_path)
    assert (task.train[0]["text"], len(task.train), len(task.validation)) == ("mine", 1, 1)
    assert (tmp_path / "served" / "train.jsonl").read_bytes() == mine


def test_a_terminal_gets_a_progress_bar(server, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    load_task("served", tmp_path)
    assert "100%" in sys.stderr.getvalue()


def test_a_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    content = zipped(FILES)
    changed = bytes([content[0], content[1] ^ 1]) + content[2:]
    found = f"{len(content)} bytes of sha256 {hashlib.sha256(changed).hexdigest()}"
    digest = hashlib.sha256(content).hexdigest()
    serve(server, monkeypatch, changed, sha256=digest)
    expected = f"{len(content)} bytes of sha256 {digest}"
    assert f"found {found}, expected {expected};" in failure(tmp_path)


@pytest.mark.parametrize("change", [-1, 1, 100_000])
def test_a_wrong_length_is_refused(server, tmp_path, monkeypatch, change):
    content = zipped(FILES)
    other = content[:change] if change < 0 else content + b"x" * change
    serve(server, monkeypatch, other, n_bytes=len(content))
    assert f", expected {len(content)} bytes of sha256 " in failure(tmp_path)
    server.promised_length = 0  # the server does not name the length
    assert f", expected {len(content)} bytes of sha256 " in failure(tmp_path)


def test_no_more_is_read_than_the_file_should_have(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, b"x" * 10_000_000, n_bytes=1000)
    found = int(re.search(r"found (\d+) bytes", failure(tmp_path))[1])
    assert 1000 < found < 200_000


def test_a_transfer_that_breaks_off_is_refused(server, tmp_path):
    n = server.promised_length = len(server.content)
    server.content = server.content[:100]
    assert re.search(rf"found 100 bytes of sha256 \w+, expected {n} bytes", failure(tmp_path))


def test_a_server_that_hangs_runs_into_a_timeout(server, tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.tasks.download.TIMEOUT", 0.2)
    done = threading.Event()
    server.wait = lambda: done.wait(10)
    try:
        assert "timed out" in failure(tmp_path)
    finally:
        done.set()


@pytest.mark.parametrize(
    ("status", "words"), [(404, "HTTP Error 404: Not Found"), (410, "HTTP Error 410"), (503, "503")]
)
def test_an_address_that_is_gone_is_named(server, tmp_path, status, words):
    server.status = status
    assert words in failure(tmp_path)


def test_a_missing_network_is_named(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, zipped(FILES), address="http://data.example/T.zip")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def no_network(*args, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert "Temporary failure in name resolution" in failure(tmp_path)


def test_a_server_that_does_not_run_is_named(server, tmp_path, monkeypatch):
    with reserved_port() as port:
        address = f"http://127.0.0.1:{port}/T.zip"
        serve(server, monkeypatch, zipped(FILES), address=address)
        assert "Connection refused" in failure(tmp_path)


def test_an_answer_that_is_not_http_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"\x00\x01\n\n"))
    failure(tmp_path)


def test_a_zip_bomb_is_refused_before_it_is_read(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, zipped({**FILES, "T/val.jsonl": bytes(2_000_000)}))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    assert re.search(
        r"found \d+ bytes or more in T/val\.jsonl of the zip file, expected less", failure(tmp_path)
    )


@pytest.mark.parametrize("name", ["../evil.jsonl", "T/../../evil.jsonl", "/evil.jsonl"])
def test_a_zip_entry_whose_path_leaves_the_folder_is_not_written(
    server, tmp_path, monkeypatch, name
):
    serve(server, monkeypatch, zipped({**FILES, name: b"evil"}))
    folder = tmp_path / "a" / "b"
    assert len(load_task("served", folder).train) == 2
    assert {path.name for path in tmp_path.rglob("*.jsonl")} == {
        "train.jsonl",
        "val.jsonl",
        "test.jsonl",
    }
    assert not Path("/evil.jsonl").exists()


@pytest.mark.parametrize("name", ["../val.jsonl", "T/../../val.jsonl", "/val.jsonl"])
def test_a_member_whose_path_leaves_the_folder_is_written_inside_it(
    server, tmp_path, monkeypatch, name
):
    files = {name if path == "T/val.jsonl" else path: content for path, content in FILES.items()}
    serve(server, monkeypatch, zipped(files), files={**PARTS, "val.jsonl": name})
    assert len(load_task("served", tmp_path).validation) == 1
    assert names_below(tmp_path) == ALL_FILES


def test_a_zip_that_lacks_a_member_is_refused(server, tmp_path, monkeypatch):
    serve(
        server,
        monkeypatch,
        zipped({name: content for name, content in FILES.items() if "val" not in name}),
    )
    assert "no item named 'T/val.jsonl'" in failure(tmp_path)


def test_a_file_that_is_not_a_zip_is_refused(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, b"<html>moved</html>")
    assert "not a zip file" in failure(tmp_path)


def test_a_data_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"T\.zip: .*(Not a directory|File exists)"):
        load_task("served", tmp_path / "file")


@pytest.mark.slow
def test_two_processes_at_once_do_not_break_each_other(server, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=60)
    server.wait = both.wait  # neither process gets its file before both have asked for it
    code = (
        "from minia3.tasks.known_tasks import known_tasks\n"
        "from minia3.tasks.prompts import Prompt\n"
        "from minia3.tasks.splits import load_task\n"
        "from minia3.tasks.task import Source, TaskSpec\n"
        f"known_tasks()['served'] = {known_tasks()['served']!r}\n"
        f"print(len(load_task('served', {str(tmp_path)!r}).train))"
    )
    run = [sys.executable, "-c", code]
    both_runs = [
        subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    assert [process.communicate() for process in both_runs] == [(b"2\n", b"")] * 2
    assert server.n_requests == 2
    assert names_below(tmp_path) == ALL_FILES


def test_the_leftovers_of_a_killed_process_do_no_harm_and_are_removed(server, tmp_path):
    (tmp_path / "served" / ".part-killed").mkdir(parents=True)
    (tmp_path / "served" / ".part-killed" / "train.jsonl").write_bytes(b"{")
    (tmp_path / "served" / "test.jsonl").write_bytes(FILES["T/test.jsonl"])
    (tmp_path / "served" / "val.jsonl").write_bytes(FILES["T/val.jsonl"])
    assert len(load_task("served", tmp_path).train) == 2
    assert names_below(tmp_path) == ALL_FILES


def test_what_was_killed_after_its_last_file_is_removed_by_the_next_run(server, tmp_path):
    load_task("served", tmp_path)
    (tmp_path / "served" / ".part-killed").mkdir()
    load_task("served", tmp_path)
    assert names_below(tmp_path) == ALL_FILES
    assert server.n_requests == 1


@pytest.mark.parametrize("n_moved", [0, 1, 2])
def test_the_next_run_finishes_an_unpacking_that_stopped_halfway(
    server, tmp_path, monkeypatch, n_moved
):
    moved = []

    def move(source, to):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(to.name)
        os.rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            load_task("served", tmp_path)
    assert names_below(tmp_path) == sorted(moved)
    load_task("served", tmp_path)
    assert names_below(tmp_path) == ALL_FILES


def test_a_known_task_is_not_read_from_files_with_another_suffix(server, tmp_path):
    (tmp_path / "served").mkdir()
    for name in ("train", "val"):
        (tmp_path / "served" / f"{name}.csv").write_text("input\n")
    assert len(load_task("served", tmp_path).train) == 2
    assert server.n_requests == 1


def test_files_that_somebody_removes_after_the_download_are_missed(server, tmp_path, monkeypatch):
    def download_and_lose(sources, folder):
        download(sources, folder)
        (folder / "train.jsonl").unlink()

    monkeypatch.setattr("minia3.tasks.download.download", download_and_lose)
    with pytest.raises(ValueError, match=r"removed \(left: test, validation\): run"):
        load_task("served", tmp_path)
