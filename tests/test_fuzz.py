"""Guards the border: a damaged file ends in a ValueError of one line, or in what an honest reading
of it gives.

It never ends in another exception, a crash, a hang, gigabytes, or a wrong model. What is read is in
fuzz_targets.py, what happens to it in mutations.py.

Every case follows from (seed, target, number) alone, and the message of a failure says how to
repeat it. MINIA3_FUZZ is the number of all cases (some thousands without it), MINIA3_FUZZ_SEED
another seed.

One thing cannot be promised: a file that is cut *while* it is mapped ends the process with SIGBUS,
in torch and safetensors as here. Replace files by renaming them, as everything in minia3 does; a
mapped file then stays whole.
"""

import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fuzz_targets import (
    TARGETS,
    adapter_model,
    check_one_line,
    make_adapter,
    make_llama,
    make_llama_config,
    make_meta,
    make_shards,
    make_t5_config,
    make_unigram,
    read_object,
    write_json,
)
from mutations import mutate
from safetensors.torch import load_file, save_file

import minia3
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.files.tensors import read_tensors
from minia3.training.checkpoint import load_checkpoint

resource = pytest.importorskip("resource", reason="memory is limited by a means that Windows lacks")

SEED = int(os.environ.get("MINIA3_FUZZ_SEED", "0"))
N_CASES = sum(target.n_cases for target in TARGETS.values())
SHARE = int(os.environ.get("MINIA3_FUZZ", N_CASES)) / N_CASES
SECONDS = 5  # that one case may take on the CPU
MEGABYTES = 300  # that one case may fill
MEMORY = 4 << 30  # bytes that a child may ask for, filled or not


def run_case(name, number, whole, scratch):
    """Return what was done to the files, and what went wrong when they were read (or "")."""
    rng = random.Random(f"{SEED} {name} {number}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    action = mutate(rng, scratch)
    before = peak_memory()
    try:
        read_or_refuse(TARGETS[name], scratch)
        n_megabytes = (peak_memory() - before) // 1024
        assert n_megabytes < MEGABYTES, f"{n_megabytes} MB of memory"
    except BaseException as error:  # a panic of Rust is not even an Exception
        message = (str(error).splitlines() or ["wrong"])[0]
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message}"
        return action, message[:300]
    return action, ""


def read_or_refuse(target, folder):
    try:
        target.read(folder)
    except ValueError as error:
        check_one_line(error)


def peak_memory():
    """Return the most that this process has had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(name, numbers, whole, scratch, pipe):
    """Run cases, and never return. Write a line to `pipe` before each, and one for each failure."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust prints its panics, which become ValueErrors
    warnings.simplefilter("ignore")
    status = Path("/proc/self/status").read_text()
    limit = int(re.search(r"VmSize:\s+(\d+) kB", status)[1]) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        # These signals end the process. The second is for a case that waits for something.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        action, failure = run_case(name, number, whole, scratch)
        if failure:
            os.write(pipe, f"{number}: {action}: {failure}\n".encode("utf-8", "replace"))
    os._exit(0)


def run_child(name, numbers, whole, scratch):
    """Run cases in a forked process. Return the lines that it wrote, and its status."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(name, numbers, whole, scratch, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(process, 0)
    return lines, status


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_is(name, tmp_path):
    target = TARGETS[name]
    whole = tmp_path / "whole"
    scratch = tmp_path / "scratch"
    whole.mkdir()
    target.make(whole)
    target.read(shutil.copytree(whole, scratch))  # the whole files are read, and are right
    n_cases = math.ceil(target.n_cases * SHARE)
    first = 0
    failures = []
    while first < n_cases and not failures:
        lines, status = run_child(name, range(first, n_cases), whole, scratch)
        failures += [line for line in lines if ":" in line]
        last = max(int(line.split(":")[0]) for line in lines)
        if status:
            failures.append(
                f"{last}: ended the process with status {status} (27: more than {SECONDS} s of CPU)"
            )
        first = last + 1
    repeat = f"MINIA3_FUZZ_SEED={SEED}; run_case({name!r}, NUMBER, ...)"
    report = "\n".join(failures)
    assert not failures, f"{len(failures)} of {n_cases} cases ({repeat}):\n{report}"


# Pickles


class Code:
    """An object whose pickle creates the file `path` when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def read_run_checkpoint(path):
    return load_checkpoint(path.parent)


def read_adapter_file(path):
    return minia3.load_adapter(adapter_model(), path)


@pytest.mark.parametrize("form", ["plain", "zip", "old"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("pytorch_model.bin", read_tensors),
        ("adapter_model.bin", read_adapter_file),
        ("finish.pt", read_adapter_file),
        ("checkpoint.pt", read_run_checkpoint),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not(tmp_path, name, read, form):
    path = tmp_path / name
    marker = tmp_path / "ran"
    if form == "plain":
        path.write_bytes(pickle.dumps({"a": Code(marker)}))
    else:
        tensors = {"a": torch.ones(2), "b": Code(marker)}
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(path)
    assert not marker.exists()


# What the fuzz has found, or what was found beside it: the smallest case of each


def change_json(path, **changes):
    write_json(path, read_object(path) | changes)


def rename_tensor(path, name):
    tensors = load_file(path)
    renamed = {name: tensors.pop(min(tensors))}
    save_file(renamed | tensors, path)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (make_t5_config, {"tie_word_embeddings": "no"}),
        (make_t5_config, {"scale_decoder_outputs": [0]}),
        (make_llama_config, {"tie_word_embeddings": 4.5}),
        (make_llama_config, {"pad_token_id": "x"}),
        (make_llama_config, {"bos_token_id": [1]}),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(tmp_path, make, changes):
    make(tmp_path)
    read_checkpoint(tmp_path, weights=False)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read_checkpoint(tmp_path, weights=False)


def two_shards_with_one_name(folder):
    make_shards(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = min(load_file(first))
    save_file(load_file(last) | {name: load_file(first)[name] + 1}, last)
    minia3.load_model(folder)


def a_name_of_two_lines(folder):
    make_llama(folder)
    rename_tensor(folder / "model.safetensors", "a\nb")
    minia3.load_model(folder)


def a_name_of_two_lines_in_an_adapter(folder):
    make_adapter(folder)
    rename_tensor(folder / "adapter_model.safetensors", "a\nb")
    minia3.load_adapter(adapter_model(), folder)


def a_key_of_two_lines(folder):
    make_meta(folder)
    change_json(folder / "params.json", **{"a\nb": 1})
    minia3.load_model(folder)


def a_shard_whose_name_is_too_long(folder):
    make_shards(folder)
    change_json(folder / "model.safetensors.index.json", weight_map={"a": "x" * 5000})
    minia3.load_model(folder)


def a_hundred_thousand_sentinels(folder):
    make_unigram(folder)
    change_json(folder / "tokenizer_config.json", extra_ids=100_000)
    Tokenizer.from_folder(folder)


def a_checkpoint_that_is_a_text(folder):
    torch.save("x", folder / "checkpoint.pt")
    load_checkpoint(folder)


@pytest.mark.parametrize(
    "read",
    [
        two_shards_with_one_name,
        a_name_of_two_lines,
        a_name_of_two_lines_in_an_adapter,
        a_key_of_two_lines,
        a_shard_whose_name_is_too_long,
        a_hundred_thousand_sentinels,
        a_checkpoint_that_is_a_text,
    ],
)
def test_a_case_that_was_found_is_refused_in_one_line(tmp_path, read):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\0b"]
)
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    make_shards(folder)
    shard = "model-00001-of-00004.safetensors"
    (folder / shard).rename(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    escaped = name.replace("\0", "\\u0000")
    index.write_text(index.read_text().replace(shard, escaped))
    with pytest.raises(ValueError, match=r"\A[^\n]*model\.safetensors\.index\.json: [^\n]+\Z"):
        minia3.load_model(folder)
