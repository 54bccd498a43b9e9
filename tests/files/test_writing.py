"""Guards what is written: killed at any moment, a folder holds the old or the new (or, where several files change, no
config for a moment, and is refused), two processes never mix, and what fails changes nothing and leaves nothing."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_SIZES, T5_SIZES
from safetensors.torch import load_file, save_file

import minia3
from minia3.checkpoints.config import from_hf
from minia3.checkpoints.load import build_model
from minia3.checkpoints.save import save_tensors
from minia3.files.lock import lock_folder
from minia3.files.write import write_json, writing_folder

resource = pytest.importorskip(
    "resource", reason="processes are killed and limited by means that Windows lacks"
)
LLAMA = {"model_type": "llama", **LLAMA_SIZES}
T5 = {"model_type": "t5", **T5_SIZES}


def filled(raw, number):
    """A model of which every weight is `number`, but for the vectors."""
    model = build_model(from_hf(raw)).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(".scale") else number)
    return model


def number_in(folder):
    """The one number that all weights of a saved model are; a mixture has several."""
    model = minia3.load_model(folder)
    (number,) = {
        x
        for n, p in model.named_parameters()
        if not n.endswith(".scale")
        for x in p.unique().tolist()
    }
    return number


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(code, *arguments):
    """Run `code` with what this file defines, in one thread, so that it may fork: -> the JSON that it prints."""
    start = f"import sys; sys.path[:0] = {sys.path!r}\nfrom test_writing import *\ntorch.set_num_threads(1)\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fork(act):
    """A process that does `act` and ends: -> its id."""
    pid = os.fork()
    if not pid:
        try:
            act()
        finally:
            os._exit(0)
    return pid


def outcome(folder):
    """Which model a folder holds, or why none."""
    try:
        return number_in(folder)
    except ValueError as error:
        return str(error).replace(f"{folder}/", "")


def die_at(count):
    """From now on, this process is killed at its `count`-th rename or removal of a file."""

    def counted(act):
        def wrapper(*arguments, **options):
            nonlocal count
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        return wrapper

    os.replace, Path.unlink, os.unlink, os.rmdir = map(
        counted, (os.replace, Path.unlink, os.unlink, os.rmdir)
    )


KILLED = """
    import random, time

    def overwrite():
        while True:
            for model in models:
                minia3.save_model(model, folder)
                os.write(saved, b".")

    folder, load.SHARD_BYTES = Path(sys.argv[1]), int(sys.argv[2])
    models = [filled(LLAMA, 1.0), filled(LLAMA, 2.0)]
    minia3.save_model(models[1], folder)
    start = time.monotonic()
    minia3.save_model(models[0], folder)
    takes, found, hidden, chance = time.monotonic() - start, [], 0, random.Random(0)
    for i in range(30):
        read, saved = os.pipe()
        pid = fork(overwrite)
        os.read(read, 1)  # one is saved
        for _ in range(i % 2):
            os.read(read, 1)
        time.sleep(chance.uniform(0, takes))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append(outcome(folder))
        hidden += (folder / ".writing").exists()
    minia3.save_model(models[1], folder)
    print(json.dumps([found, hidden, outcome(folder), sorted(p.name for p in folder.iterdir())]))
"""


def test_a_process_killed_at_random_leaves_the_old_model_or_the_new(tmp_path):
    found, hidden, last, left = run(KILLED, tmp_path, 10**9)
    assert set(found) == {1.0, 2.0}
    assert hidden > 0, "some are killed while they write"
    assert last == 2.0
    assert left == ["config.json", "generation_config.json", "model.safetensors"], (
        "what the killed left is gone"
    )


def test_a_process_killed_at_random_leaves_no_mixture_of_shards(tmp_path):
    found, hidden, last, left = run(KILLED, tmp_path, 15_000)
    assert {1.0, 2.0} <= set(found) <= {1.0, 2.0, "config.json: not found"}
    assert hidden > 0
    assert last == 2.0
    assert not any(name.startswith(".") for name in left)


EACH = """
    folder, old, new, cut = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    models = [filled(old, 1.0), filled(new, 2.0)]
    found = []
    for count in range(100):
        load.SHARD_BYTES = cut[0]
        minia3.save_model(models[0], folder)
        load.SHARD_BYTES = cut[1]
        pid = fork(lambda: (die_at(count), minia3.save_model(models[1], folder)))
        _, status = os.waitpid(pid, 0)
        found.append(outcome(folder))
        if not status:
            break
    print(json.dumps([found, sorted(p.name for p in folder.iterdir())]))
"""
REFUSED = "config.json: not found"


@pytest.mark.parametrize(
    ("old", "new", "cut"),
    [
        (LLAMA, LLAMA, (10**9, 10**9)),
        (LLAMA, T5, (10**9, 10**9)),
        (LLAMA, {**LLAMA, "rms_norm_eps": 0.5}, (10**9, 10**9)),  # of the same shapes
        (LLAMA, LLAMA, (15_000, 15_000)),
        (LLAMA, LLAMA, (15_000, 10**9)),
        (LLAMA, LLAMA, (10**9, 15_000)),
    ],
)
def test_killed_at_each_rename_a_folder_holds_the_old_or_the_new_or_is_refused(
    tmp_path, old, new, cut
):
    found, left = run(EACH, tmp_path, json.dumps(old), json.dumps(new), json.dumps(cut))
    order = [1.0, REFUSED, 2.0] if (old, cut) != (new, (10**9, 10**9)) else [1.0, 2.0]
    assert list(dict.fromkeys(found)) == order
    assert found == sorted(found, key=order.index)
    assert ("model.safetensors" in left) != ("model.safetensors.index.json" in left)
    assert not any(name.startswith(".") for name in left)


TWO = """
    import contextlib

    def overwrite(model):
        for _ in range(10):
            with contextlib.suppress(ValueError):  # the other one is writing
                minia3.save_model(model, folder)

    folder, load.SHARD_BYTES = Path(sys.argv[1]), int(sys.argv[2])
    models = [filled(LLAMA, 1.0), filled(LLAMA, 2.0)]
    found = []
    for _ in range(4):
        pids = [fork(lambda model=model: overwrite(model)) for model in models]
        for pid in pids:
            os.waitpid(pid, 0)
        found.append(outcome(folder))
    print(json.dumps([found, sorted(p.name for p in folder.iterdir())]))
"""


@pytest.mark.parametrize("cut", [10**9, 15_000])
def test_two_processes_that_write_one_folder_leave_what_one_of_them_wrote(tmp_path, cut):
    found, left = run(TWO, tmp_path, cut)
    assert set(found) <= {1.0, 2.0}
    assert not any(name.startswith(".") for name in left)


def test_a_folder_that_is_being_written_is_refused_and_named(tmp_path):
    with writing_folder(tmp_path) as hidden:
        (hidden / "a").write_text("first")
        with (
            pytest.raises(ValueError, match=f"{tmp_path}: another run is writing there"),
            writing_folder(tmp_path),
        ):
            raise AssertionError
        assert (hidden / "a").exists(), "the second has not touched what the first writes"
    assert contents(tmp_path) == {"a": b"first"}


def test_a_lock_that_was_removed_meanwhile_is_no_lock(tmp_path):
    """Its holder removes the file. Whoever had opened it before must not hold what nobody else can see."""
    import fcntl

    first, real = lock_folder(tmp_path), fcntl.flock

    def flock(file, how):
        nonlocal first
        if first:
            (tmp_path / ".lock").unlink()
            first.close()
            first = None
        real(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        second = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="another run is writing there"):
        lock_folder(tmp_path)
    second.close()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError()]
)
def test_what_fails_while_it_writes_leaves_what_was_there_and_nothing_hidden(tmp_path, error):
    minia3.save_model(filled(LLAMA, 1.0), tmp_path)
    before = contents(tmp_path)

    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        minia3.save_model(filled(T5, 2.0), tmp_path, Tokenizer())
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_model(tmp_path):
    folder = tmp_path / "model"
    minia3.save_model(filled(LLAMA, 1.0), folder)
    before = contents(folder)
    code = """
        model, said = filled(LLAMA | {"num_hidden_layers": 4}, 2.0), []
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        for load.SHARD_BYTES in (10**9, 15_000):
            try:
                minia3.save_model(model, sys.argv[1])
            except OSError as error:
                said.append(str(error))
        print(json.dumps(said))
    """
    said = run(code, folder)
    assert ["File too large" in message for message in said] == [True, True]
    assert contents(folder) == before


def test_a_folder_is_made_where_there_is_none_and_its_files_have_the_usual_permissions(tmp_path):
    with writing_folder(tmp_path / "a" / "b") as hidden:
        assert not list((tmp_path / "a" / "b").glob("config*"))
        save_file({"x": torch.ones(2)}, hidden / "x.safetensors")
        write_json(hidden / "config.json", {})
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a" / "b").iterdir()} == {
        usual
    }
    assert sorted(contents(tmp_path / "a" / "b")) == ["config.json", "x.safetensors"]


def test_the_config_moves_last(tmp_path, monkeypatch):
    done, replace = [], os.replace
    with writing_folder(tmp_path) as hidden:
        for name in ("config.json", "a", "z"):
            (hidden / name).write_text(name)
        monkeypatch.setattr(
            os, "replace", lambda old, new: done.append(new.name) or replace(old, new)
        )
    assert sorted(done[:2]) == ["a", "z"]
    assert done[2:] == ["config.json"]


def test_what_is_replaced_goes_and_what_is_not_stays(tmp_path):
    for name in ("config.json", "model-1.bin", "model-2.bin", "README.md"):
        (tmp_path / name).write_text("old")
    with writing_folder(tmp_path, replaces=("model*.bin",)) as hidden:
        (hidden / "model-2.bin").write_text("new")
    assert contents(tmp_path) == {"config.json": b"old", "model-2.bin": b"new", "README.md": b"old"}


# Tensors, shard by shard


def test_tensors_are_read_when_their_shard_is_written_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 80)  # two tensors fill it
    live, most = [], 0

    def read(i):
        nonlocal most
        x = torch.full((10,), float(i))
        live.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in live))
        return x

    save_tensors(tmp_path, ((f"x{i}", 40, lambda i=i: read(i)) for i in range(7)))
    assert most == 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280}
    assert index["weight_map"] == {
        f"x{i}": f"model-{i // 2 + 1:05d}-of-00004.safetensors" for i in range(7)
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], torch.full((10,), float(name[1:])))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 100)
    save_tensors(tmp_path, [(f"x{n}", 4 * n, lambda n=n: torch.ones(n)) for n in (10, 50, 16)])
    files_of = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {files_of[f"x{n}"][6:] for n in (10, 50, 16)} == {
        f"0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path):
    x = torch.arange(12.0).view(3, 4).T
    save_tensors(tmp_path, [("x", 48, lambda: x)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], x)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
