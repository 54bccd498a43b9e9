"""Guards minia3/files/write.py: if a process is killed at any moment while it writes a folder, the
folder holds the old checkpoint or the new one.

Two processes never mix their files. A failure changes nothing and leaves nothing behind.

Here the folders hold whole models, because a mixture shows only when the folder is loaded.
"""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_SIZES, T5_SIZES
from running import in_new_process
from safetensors import SafetensorError
from safetensors.torch import save_file

import minia3
from minia3.checkpoints import save as save_module
from minia3.checkpoints.config import from_hf
from minia3.checkpoints.load import build_model
from minia3.files import lock
from minia3.files.write import (
    disk_errors,
    finish_writing,
    is_free,
    move_into_place,
    remove_leftovers,
    replacing,
    write_json,
    writing_folder,
)

LLAMA = {"model_type": "llama", **LLAMA_SIZES}
T5 = {"model_type": "t5", **T5_SIZES}

# Bytes of a shard: all in one file, or in several
ONE_FILE = 10**9
SHARDS = 15_000

slow = pytest.mark.slow
needs_unix = pytest.mark.skipif(
    sys.platform == "win32", reason="processes are killed and limited by means that Windows lacks"
)


def filled(raw, value):
    """Return a model whose weights are all `value`, except for the vectors, which are one."""
    model = build_model(from_hf(raw)).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(1.0)
            else:
                parameter.fill_(value)
    return model


def value_in(folder):
    """Return the value of all weights of a saved model. Fail if there are several: a mixture."""
    model = minia3.load_model(folder)
    values = set()
    for name, parameter in model.named_parameters():
        if not name.endswith(".scale"):
            values.update(parameter.unique().tolist())
    (value,) = values
    return value


def outcome(folder):
    """Return which model a folder holds, or why it holds none."""
    try:
        return value_in(folder)
    except ValueError as error:
        message = str(error).replace(f"{folder}/", "")
        return REFUSED if "expected a folder with config.json" in message else message


def outcome_for_others(folder):
    """Return what a program finds that does not know the hidden files of a folder."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".*"))
    try:
        return outcome(copy)
    finally:
        shutil.rmtree(copy)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def has_hidden(names):
    return any(name.startswith(".") for name in names)


# Processes. A fork must not inherit threads, so each of these tests calls a function in another
# process, which has one thread, and that process forks.


def fork(act):
    """Call `act` in a child process that then ends, and return the id of the process."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def die_at(n):
    """Kill this process at its n-th rename or removal of a file from now on, counted from 0."""
    calls = itertools.count()

    def counted(function):
        def wrapper(*arguments, **options):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    os.replace = counted(os.replace)
    os.unlink = counted(os.unlink)
    os.rmdir = counted(os.rmdir)
    Path.unlink = counted(Path.unlink)


def kill_at_random(folder, shard_bytes):
    save_module.SHARD_BYTES = shard_bytes
    models = [filled(LLAMA, 1.0), filled(LLAMA, 2.0)]
    minia3.save_model(models[1], folder)
    start = time.monotonic()
    minia3.save_model(models[0], folder)
    seconds_to_save = time.monotonic() - start

    def overwrite_forever():
        while True:
            for model in models:
                minia3.save_model(model, folder)
                os.write(saved, b".")

    found = []
    n_hidden = 0
    chance = random.Random(0)
    for i in range(30):
        read, saved = os.pipe()
        pid = fork(overwrite_forever)
        # Wait until one model is saved, or two, so that both of them are overwritten.
        os.read(read, 1)
        if i % 2:
            os.read(read, 1)
        time.sleep(chance.uniform(0, seconds_to_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append(outcome(folder))
        n_hidden += (folder / ".writing").exists()
    minia3.save_model(models[1], folder)
    return [found, n_hidden, outcome(folder), names_in(folder)]


@slow
@needs_unix
def test_a_process_killed_at_random_leaves_the_old_model_or_the_new(tmp_path):
    found, n_hidden, last, names = in_new_process(kill_at_random, tmp_path, ONE_FILE)
    assert set(found) == {1.0, 2.0}
    assert n_hidden > 0, "some processes are killed while they write"
    assert last == 2.0
    assert names == ["config.json", "generation_config.json", "model.safetensors"], (
        "the next writer removes what a killed process left"
    )


@slow
@needs_unix
def test_a_process_killed_at_random_leaves_no_mixture_of_shards(tmp_path):
    found, n_hidden, last, names = in_new_process(kill_at_random, tmp_path, SHARDS)
    assert set(found) == {1.0, 2.0}
    assert n_hidden > 0
    assert last == 2.0
    assert not has_hidden(names)


def kill_at_each_rename(folder, old, new, shard_bytes):
    models = [filled(old, 1.0), filled(new, 2.0)]

    def overwrite(n):
        die_at(n)
        minia3.save_model(models[1], folder)

    found = []
    found_by_others = []
    for n in range(100):
        save_module.SHARD_BYTES = shard_bytes[0]
        minia3.save_model(models[0], folder)
        save_module.SHARD_BYTES = shard_bytes[1]
        _, status = os.waitpid(fork(lambda n=n: overwrite(n)), 0)
        found_by_others.append(outcome_for_others(folder))
        found.append(outcome(folder))
        if status == 0:
            break
    return [found, found_by_others, names_in(folder)]


REFUSED = "there is no config.json"


@slow
@needs_unix
@pytest.mark.parametrize(
    ("old", "new", "shard_bytes"),
    [
        (LLAMA, LLAMA, (ONE_FILE, ONE_FILE)),
        (LLAMA, T5, (ONE_FILE, ONE_FILE)),
        (LLAMA, {**LLAMA, "rms_norm_eps": 0.5}, (ONE_FILE, ONE_FILE)),  # with the same shapes
        (LLAMA, LLAMA, (SHARDS, SHARDS)),
        (LLAMA, LLAMA, (SHARDS, ONE_FILE)),
        (LLAMA, LLAMA, (ONE_FILE, SHARDS)),
    ],
)
def test_after_a_kill_at_any_rename_a_folder_holds_the_old_or_the_new_model(
    tmp_path, old, new, shard_bytes
):
    folder = tmp_path / "model"
    arguments = (folder, old, new, shard_bytes)
    found, by_others, names = in_new_process(kill_at_each_rename, *arguments)
    assert list(dict.fromkeys(found)) == [1.0, 2.0]
    assert found == sorted(found)
    only_weights_change = old == new and shard_bytes == (ONE_FILE, ONE_FILE)
    order = [1.0, 2.0] if only_weights_change else [1.0, REFUSED, 2.0]
    assert list(dict.fromkeys(by_others)) == order
    assert by_others == sorted(by_others, key=order.index)
    assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names)
    assert not has_hidden(names)


def kill_in_a_new_folder(folder):
    save_module.SHARD_BYTES = SHARDS
    model = filled(LLAMA, 2.0)

    def write(n):
        die_at(n)
        minia3.save_model(model, folder)

    n_free = 0
    found = []
    for n in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        _, status = os.waitpid(fork(lambda n=n: write(n)), 0)
        if status == 0:
            break
        if is_free(folder):  # the same command again
            n_free += 1
            minia3.save_model(model, folder)
        found.append(outcome(folder))
    return [n_free, found, names_in(folder)]


@slow
@needs_unix
def test_after_a_kill_in_a_new_folder_the_same_command_works_or_the_folder_is_complete(tmp_path):
    n_free, found, names = in_new_process(kill_in_a_new_folder, tmp_path / "model")
    assert len(found) > n_free > 0
    assert set(found) == {2.0}
    assert not has_hidden(names)


def test_a_folder_is_free_if_nothing_is_lost(tmp_path):
    assert is_free(tmp_path / "new")
    assert is_free(tmp_path)
    (tmp_path / ".hidden").write_text("")
    assert is_free(tmp_path)
    (tmp_path / "file").write_text("")
    assert not is_free(tmp_path)
    assert not is_free(tmp_path / "file")
    (tmp_path / "file").unlink()
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "half a file").write_text("")
    assert is_free(tmp_path), "a killed command had begun to write"


def test_a_folder_that_a_killed_command_had_written_completely_is_finished_and_not_free(tmp_path):
    """Another command would mix its files with those that are there already."""
    (tmp_path / "task.json").write_text("{}")  # which it had moved into place
    (tmp_path / ".written").mkdir()
    (tmp_path / ".written" / "config.json").write_text("{}")
    assert not is_free(tmp_path)
    assert contents(tmp_path) == {"config.json": b"{}", "task.json": b"{}"}


def test_whoever_cannot_finish_a_folder_says_why(tmp_path, monkeypatch):
    (tmp_path / ".written").mkdir()
    (tmp_path / ".written" / "config.json").write_text("{}")

    def refuse(old, new):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"a process was killed while it replaced the files") as e:
        finish_writing(tmp_path)
    assert "Permission denied" in str(e.value)
    monkeypatch.undo()
    finish_writing(tmp_path)
    assert contents(tmp_path) == {"config.json": b"{}"}


def test_a_reader_waits_for_a_process_that_still_moves_its_files(tmp_path, monkeypatch):
    """It was refused, although nothing had been killed."""
    (tmp_path / ".written").mkdir()
    (tmp_path / ".written" / "config.json").write_text("{}")
    lock_of_writer = lock.lock_folder(tmp_path)

    def finish(_):
        move_into_place(tmp_path)
        lock_of_writer.close()

    monkeypatch.setattr(lock.time, "sleep", finish)
    finish_writing(tmp_path)
    assert contents(tmp_path) == {"config.json": b"{}"}


def test_the_lock_of_whoever_wrote_a_part_is_not_moved(tmp_path, monkeypatch):
    """Windows keeps the file of a lock until it is closed, and lets nothing take its place."""
    replace = os.replace

    def refuse_locks(old, new):
        if Path(new).name == ".lock":
            raise PermissionError(13, "Permission denied")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse_locks)
    with writing_folder(tmp_path) as hidden:
        (hidden / ".lock").write_text("")
        (hidden / "config.json").write_text("{}")
    assert contents(tmp_path) == {"config.json": b"{}"}


def let_two_write(folder, shard_bytes):
    save_module.SHARD_BYTES = shard_bytes
    models = [filled(LLAMA, 1.0), filled(LLAMA, 2.0)]

    def overwrite(model):
        for _ in range(10):
            with contextlib.suppress(ValueError):  # the other process is writing
                minia3.save_model(model, folder)

    found = []
    for _ in range(4):
        pids = [fork(lambda model=model: overwrite(model)) for model in models]
        for pid in pids:
            assert os.waitpid(pid, 0)[1] == 0
        found.append(outcome(folder))
    return [found, names_in(folder)]


@slow
@needs_unix
@pytest.mark.parametrize("shard_bytes", [ONE_FILE, SHARDS])
def test_two_processes_that_write_one_folder_leave_the_model_of_one_of_them(tmp_path, shard_bytes):
    found, names = in_new_process(let_two_write, tmp_path, shard_bytes)
    assert set(found) <= {1.0, 2.0}
    assert not has_hidden(names)


def fill_disk(folder):
    import resource  # which Windows lacks

    model = filled(LLAMA | {"num_hidden_layers": 4}, 2.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    messages = []
    for save_module.SHARD_BYTES in (ONE_FILE, SHARDS):
        try:
            minia3.save_model(model, folder)
        except OSError as error:
            messages.append(str(error))
    return messages


@slow
@needs_unix
def test_a_full_disk_leaves_the_old_model(tmp_path):
    folder = tmp_path / "model"
    minia3.save_model(filled(LLAMA, 1.0), folder)
    before = contents(folder)
    messages = in_new_process(fill_disk, folder)
    assert ["File too large" in message for message in messages] == [True, True]
    assert contents(folder) == before


# One process


@needs_unix
def test_a_folder_that_is_being_written_is_refused_and_named(tmp_path):
    with writing_folder(tmp_path) as hidden:
        (hidden / "a").write_text("first")
        refused = pytest.raises(ValueError, match=f"{tmp_path}: another run is writing there")
        with refused, writing_folder(tmp_path):
            raise AssertionError
        assert (hidden / "a").exists(), "the second writer has not touched what the first writes"
    assert contents(tmp_path) == {"a": b"first"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError()]
)
def test_a_failure_leaves_the_old_files_and_nothing_hidden(tmp_path, error):
    minia3.save_model(filled(LLAMA, 1.0), tmp_path)
    before = contents(tmp_path)

    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        minia3.save_model(filled(T5, 2.0), tmp_path, Tokenizer())
    assert contents(tmp_path) == before


def test_a_missing_folder_is_created_and_its_files_have_the_usual_permissions(tmp_path):
    folder = tmp_path / "a" / "b"
    with writing_folder(folder) as hidden:
        assert not list(folder.glob("config*"))
        save_file({"x": torch.ones(2)}, hidden / "x.safetensors")
        write_json(hidden / "config.json", {})
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {usual}
    assert names_in(folder) == ["config.json", "x.safetensors"]


@pytest.mark.parametrize("name", ["model.gguf", "adapter.SAFETENSORS", "adapter.bin"])
def test_a_new_folder_does_not_get_the_name_of_a_file_of_weights(tmp_path, name):
    message = rf"{name}: found the name of a file, expected that of a folder"
    with pytest.raises(ValueError, match=message), writing_folder(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / name).mkdir()  # whoever has such a folder means it
    with writing_folder(tmp_path / name) as hidden:
        (hidden / "config.json").write_text("{}")
    assert os.listdir(tmp_path / name) == ["config.json"]


def test_a_drive_on_which_nobody_may_set_permissions_can_be_written_to(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    for content in ({}, {"a": 1}):
        with writing_folder(tmp_path) as hidden:
            write_json(hidden / "config.json", content)
            write_json(hidden / "other.json", content)
    assert names_in(tmp_path) == ["config.json", "other.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_the_old_config_is_removed_first_and_the_new_one_comes_last(tmp_path, monkeypatch, config):
    for name in (config, "a"):
        (tmp_path / name).write_text("old")
    moved = []
    replace = os.replace

    def watched_replace(old, new):
        if new.name == ".written":
            return replace(old, new)
        assert not (tmp_path / config).exists()
        moved.append(new.name)
        replace(old, new)

    with writing_folder(tmp_path) as hidden:
        for name in (config, "a", "z"):
            (hidden / name).write_text(name)
        monkeypatch.setattr(os, "replace", watched_replace)
    assert sorted(moved[:2]) == ["a", "z"]
    assert moved[2:] == [config]


def test_a_config_stays_if_only_one_file_changes(tmp_path, monkeypatch):
    """One rename leads from the old checkpoint to the new one, so the folder is never refused."""
    for name in ("config.json", "a"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def watched_replace(old, new):
        assert (tmp_path / "config.json").exists()
        replace(old, new)

    with writing_folder(tmp_path) as hidden:
        (hidden / "config.json").write_text("old")
        (hidden / "a").write_text("new")
        monkeypatch.setattr(os, "replace", watched_replace)
    assert contents(tmp_path) == {"config.json": b"old", "a": b"new"}


@pytest.mark.parametrize(
    ("written", "replaces"),
    [
        ({"config.json": "new", "a": "new"}, ()),  # the config itself is one of two changes
        ({"config.json": "old", "a": "new", "b": "new"}, ()),
        ({"config.json": "old", "a": "new"}, ("b",)),  # a removal is a change, too
    ],
)
def test_there_is_no_config_while_two_files_change(tmp_path, monkeypatch, written, replaces):
    for name in ("config.json", "a", "b"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def watched_replace(old, new):
        assert (new.name == ".written") == (tmp_path / "config.json").exists()
        replace(old, new)

    with writing_folder(tmp_path, replaces) as hidden:
        for name, content in written.items():
            (hidden / name).write_text(content)
        monkeypatch.setattr(os, "replace", watched_replace)
    found = contents(tmp_path)
    for name, content in written.items():
        assert found[name] == content.encode()
    assert ("b" in found) == (replaces == ())


def test_matching_files_are_removed_unless_they_are_written_and_others_stay(tmp_path):
    for name in ("config.json", "model-1.bin", "model-2.bin", "README.md"):
        (tmp_path / name).write_text("old")
    with writing_folder(tmp_path, replaces=("model*.bin",)) as hidden:
        (hidden / "model-2.bin").write_text("new")
    expected = {"config.json": b"old", "model-2.bin": b"new", "README.md": b"old"}
    assert contents(tmp_path) == expected


def test_files_of_a_sub_folder_are_removed_too_if_they_match(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("old.txt", "more/old.txt", "more/kept.md"):
        (tmp_path / name).write_text("old")
    with writing_folder(tmp_path, replaces=("more/*.txt",)) as hidden:
        (hidden / "new.txt").write_text("new")
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert left == ["more/kept.md", "new.txt", "old.txt"]


@pytest.mark.parametrize("name", ["../kept", "link/kept", "absolute"])
def test_a_folder_of_strangers_cannot_ask_for_files_elsewhere_to_be_removed(tmp_path, name):
    kept = tmp_path / "kept"
    kept.write_text("")
    folder = tmp_path / "folder"
    (folder / ".written").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    stale = str(kept) if name == "absolute" else name
    (folder / ".written" / ".stale").write_text(json.dumps([stale]))
    with pytest.raises(ValueError, match=r"\.stale: .* is outside of "):
        finish_writing(folder)
    assert kept.exists()


def test_a_folder_of_strangers_cannot_move_files_from_elsewhere_by_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".written").symlink_to(elsewhere)
    for function in (finish_writing, is_free):
        with pytest.raises(ValueError, match=r"\.written: found a link, expected"):
            function(folder)
    with pytest.raises(ValueError, match="found a link"), writing_folder(folder):
        pass
    assert names_in(elsewhere) == ["kept"]


def test_a_folder_of_strangers_cannot_change_permissions_elsewhere_by_a_link(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("")
    secret.chmod(0o600)
    written = tmp_path / "folder" / ".written"
    written.mkdir(parents=True)
    (written / "link").symlink_to(secret)
    finish_writing(tmp_path / "folder")
    assert names_in(tmp_path / "folder") == ["link"]
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert contents(path.parent) == {"a.txt": b"first"}

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "first"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(path.parent) == {"a.txt": b"first"}


def test_temporary_files_of_killed_processes_are_removed_but_not_below_the_folder(tmp_path):
    """A folder below it may have a lock of its own, and a process that writes there."""
    (tmp_path / "run").mkdir()
    left = f".b.txt.{'0' * 32}"
    kept = [".lock", ".hidden.file", "a.txt", ".x." + "0" * 31, f"run/{left}"]
    for name in kept:
        (tmp_path / name).write_text("")
    with replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("half")
        shutil.copy(temporary, tmp_path / left)  # as a kill leaves it
    remove_leftovers(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(found) == sorted([*kept, "b.txt", "run"])


def test_the_errors_of_libraries_that_cannot_write_become_os_errors():
    for error in (SafetensorError("disk\nfull"), Exception("disk\nfull")):
        with pytest.raises(OSError, match=r"^folder: disk full$"), disk_errors("folder"):
            raise error
    for error in (ValueError("mistake"), KeyboardInterrupt()):
        with pytest.raises(type(error)), disk_errors("folder"):
            raise error


def test_json_is_written_with_a_line_for_each_value(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1, "y": "é"})
    expected = '{\n  "x": 1,\n  "y": "\\u00e9"\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected
