"""Guards `replacing` and `write_json`: a file is the old one or the new one, never half of it."""

import errno
import os
from pathlib import Path

import pytest

from minia3.files.read import read_json
from minia3.files.write import replacing, write_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), replacing(file) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_json_that_is_written_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    def write_half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError

    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError):  # noqa: PT011
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}


@pytest.mark.parametrize(
    ("number", "is_named"), [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.ECONNRESET, False)]
)
def test_what_the_disk_refuses_names_the_file(number, is_named, tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(OSError) as caught, replacing(file) as temporary:  # noqa: PT011, PT012
        temporary.touch()
        raise OSError(number, os.strerror(number))
    assert str(caught.value).endswith(f": '{file}'") == is_named


def test_a_new_file_is_on_the_disk_before_it_takes_the_name_of_the_old_one(tmp_path, monkeypatch):
    calls = []

    def record(name):
        original = getattr(os, name)

        def call(*arguments):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    record("fsync")
    record("replace")
    write_json(tmp_path / "x.json", {"a": 1})
    assert calls == ["fsync", "replace"]
