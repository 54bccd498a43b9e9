"""The mistakes that people make, as a table: each ends in one short line with what to do.

A row is a command line, and words that the message must have. The message is one line of at most
300 characters on standard error, the exit code is 2, and nothing is written.
"""

import json
import os
import shlex
import shutil
import struct
from typing import NamedTuple

import pytest
import running
import torch
from conftest import randomize
from running import ROOT, contents

import minia3
from minia3.cli.main import main

MOST_CHARACTERS = 300


MISTAKES = [
    # Flags
    ("train.py --modle t5-base", ["--modle", "did you mean --model?"]),
    ("train.py --learning-rate 1e-3", ["--learning-rate", "--lr"]),
    ("train.py --epochs 2 --steps 100", ["--epochs", "--steps"]),
    ("train.py --seed 1 2 3", ["--seed", "commas", "1,2,3"]),
    ("train.py --checkpoint run/checkpoint.pt", ["--checkpoint", "--resume run? (see"]),
    ("train.py --checkpoint=run", ["--checkpoint", "--recompute", "--resume run? (see"]),
    ("train.py --checkpoint", ["--checkpoint", "--resume FOLDER? (see"]),
    ("minia3 train --stpes 5", ["--stpes", "did you mean --steps?"]),
    ("train.py --steps 0", ["--steps is 0", "expected at least 1"]),
    ("train.py --batch-size x", ["--batch-size", "'x'"]),
    ("train.py --lr 0", ["--lr is 0.0", "expected above 0"]),
    ("train.py --rank 4", ["--rank is for --method lora", "found --method ia3"]),
    ("train.py --layers 5-9", ["--layers names 5-9", "layers 0 to 1", "0-1"]),
    ("train.py --layers first", ["--layers 'first'", "as in 0-5,20-"]),
    ("train.py --device mps", ["--device is 'mps'", "this machine has: cpu"]),
    ("train.py --device gpu", ["--device is 'gpu'", "this machine has: cpu"]),
    ("train.py --dtype float16", ["T5 overflows in float16", "use bfloat16 or float32"]),
    ("train.py --dtype int8", ["--dtype is 'int8'", "float32"]),
    ("train.py --method full --dtype float16 --model llama", ["float16", "use float32"]),
    ("train.py --resume nowhere", ["nowhere", "expected the folder of a run"]),
    ("train.py --resume model", ["model", "expected the folder of a run"]),
    ("train.py --resume run --lr 1", ["--resume"]),
    ("train.py --out run", ["run holds a run already", "--resume or another --out"]),
    ("train.py --out /dev/full", ["/dev/full", "expected a folder to write to"]),
    # Models
    ("train.py --model t5-bsae", ["t5-bsae", "did you mean t5-base?"]),
    ("train.py --model nowhere", ["nowhere: no such folder", "info --list"]),
    ("train.py --model org/name", ["org/name", "cannot be reached", "path of a folder"]),
    ("train.py --model model.onnx", ["model.onnx: found a model in ONNX's format", "config.json"]),
    ("train.py --model alone/w.safetensors", ["found weights without the config", "config.json"]),
    ("train.py --model model/model.safetensors", ["give the folder model"]),
    ("train.py --model empty", ["empty: found an empty folder", "config.json"]),
    ("train.py --model notes", ["notes: found a folder with read.me", "config.json"]),
    ("train.py --model run", ["run: found the folder of a run", "run/adapter as the adapter"]),
    ("train.py --model run/adapter", ["run/adapter: found an adapter", "expected a model"]),
    ("train.py --model finish.pt", ["finish.pt: found weights without the config"]),
    ("train.py --model model.pkl", ["model.pkl: found a pickle, which could run code"]),
    ("train.py --model last.ckpt", ["last.ckpt: found a checkpoint of PyTorch Lightning"]),
    ("train.py --model tf", ["tf: found weights of TensorFlow (tf_model.h5)", "model.safetensors"]),
    ("train.py --model flax", ["flax: found weights of Flax", "model.safetensors"]),
    ("train.py --model gpt.gguf", ["gpt.gguf", "'gpt2'", "llama"]),
    ("minia3 info model.onnx", ["ONNX"]),
    ("minia3 generate empty x", ["empty: found an empty folder"]),
    ("minia3 convert tf out", ["weights of TensorFlow"]),
    # Adapters
    ("train.py --adapter nowhere", ["nowhere: not found", "folder or file of an adapter"]),
    ("train.py --adapter run", ["run: found the folder of a run", "give run/adapter"]),
    ("train.py --adapter model", ["model: found a model, expected an adapter"]),
    ("train.py --adapter empty", ["empty: found an empty folder, expected an adapter"]),
    ("train.py --adapter model/model.safetensors", ["not an (IA)^3 adapter", "more"]),
    ("train.py --adapter of-llama", ["another base", "trained on llama", "the model is tiny-t5"]),
    ("minia3 merge tiny-t5 of-llama out", ["another base", "trained on llama", "tiny-t5"]),
    ("minia3 generate tiny-t5 x --adapter run", ["give run/adapter"]),
    ("minia3 predict tiny-t5 rows.jsonl --adapter run", ["folder of a run", "give run/adapter"]),
    ("minia3 predict tiny-t5 rows.jsonl --adapter model", ["model: found a model, expected an"]),
    ("minia3 predict tiny-t5 rows.jsonl --adapter notes", ["notes: found a folder with read.me"]),
    ("minia3 predict tiny-t5 rows.jsonl --adapter nowhere", ["nowhere: not found"]),
    (
        "minia3 predict tiny-t5 words.csv",
        ["words.csv:2: 'input' has no value", "note", "--input"],
    ),
    ("minia3 merge tiny-t5 run/adapter /dev/full", ["/dev/full exists and is not a folder"]),
    ("minia3 mix out run:1", ["give run/adapter"]),
    ("minia3 mix out run/adapter", ["ADAPTER:WEIGHT"]),
    ("minia3 mix run/adapter:0.5 run/adapter:0.5", ["the folder to write first"]),
    # Data
    ("train.py --task rtee", ["'rtee' is not a known task", "did you mean 'rte'?"]),
    ("train.py --task data/same-color", ["data/same-color", "data/same-colour"]),
    ("train.py --task latin2.csv", ["no such file", "did you mean latin1.csv?"]),
    ("train.py --task odd.csv", ["odd.csv", "note", "mark", "--input"]),
    ("train.py --task damaged.parquet", ["damaged.parquet", "damaged"]),
    ("train.py --task number.json", ["number.json", "list"]),
    ("train.py --task latin1.csv", ["latin1.csv", "UTF-8"]),
    ("train.py --task alpaca.json", ["alpaca.json", "output"]),
    ("train.py --task empty", ["empty", "train"]),
    ("train.py --task run/adapter/task.json", ["run/adapter", "no rows", "an adapter has learned"]),
    ("train.py --task run/adapter", ["run/adapter", "no rows", "an adapter has learned"]),
    ("train.py --task one.csv --losses ul", ["there is one label", "lm", "--labels"]),
    ("minia3 predict tiny-t5 rows.jsonl --labels bad good", ["as in --labels bad,good"]),
    ("minia3 predict tiny-t5 nowhere.jsonl", ["nowhere.jsonl", "not found"]),
    ("minia3 predict tiny-t5 damaged.parquet", ["damaged.parquet", "damaged"]),
    ("minia3 predict tiny-t5 rows.jsonl --task rtee", ["'rtee'", "'rte'"]),
    ("minia3 predict tiny-t5 rows.jsonl --out odd.csv", ["odd.csv", "another --out"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with everything that the table names. No command changes it."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / "data" / "tiny-t5", folder / "model")
    shutil.copytree(running.model("llama"), folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert running.run(["--steps", 1, "--eval-batch-size", 512, "--out", "run"]) == 0
        minia3.save_adapter(randomize(minia3.load_model("llama")), "of-llama")
    for name in ("alone", "empty", "notes", "tf", "flax"):
        (folder / name).mkdir()
    shutil.copy(folder / "model" / "model.safetensors", folder / "alone" / "w.safetensors")
    (folder / "notes" / "read.me").write_text("notes")
    for name, weights in (("tf", "tf_model.h5"), ("flax", "flax_model.msgpack")):
        shutil.copy(folder / "model" / "config.json", folder / name)
        (folder / name / weights).touch()
    torch.save({"a": torch.ones(2)}, folder / "finish.pt")
    for name in ("model.onnx", "model.pkl", "last.ckpt"):
        (folder / name).write_bytes(b"\x08\x07")
    write_gguf(folder / "gpt.gguf", "gpt2")

    (folder / "odd.csv").write_text("note,mark\nred,7\nblue,8\n")
    (folder / "damaged.parquet").write_bytes(b"PAR1\x15\x04")
    (folder / "number.json").write_text("7")
    (folder / "latin1.csv").write_bytes("input,target\nküche,weiß\n".encode("latin-1"))
    alpaca = [{"instruction": "say yes", "input": ""}] * 3
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "one.csv").write_text("text,label\nred,yes\nblue,yes\nred blue,yes\n")
    (folder / "words.csv").write_text("note\nred\n")
    (folder / "rows.jsonl").write_text(json.dumps({"input": "red"}) + "\n")
    return folder


def write_gguf(path, architecture):
    """Write a GGUF file without tensors."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)  # version, tensors, keys
    kind_of_text = 8
    pair = text("general.architecture") + struct.pack("<I", kind_of_text) + text(architecture)
    path.write_bytes(head + pair)


class Outcome(NamedTuple):
    code: int
    error: str


def outcome(line, capsys):
    """Return the exit code of a command line, and what it prints on standard error."""
    program, *words = shlex.split(line)
    capsys.readouterr()
    code = running.run(words) if program == "train.py" else main(words)
    return Outcome(code, capsys.readouterr().err)


@pytest.mark.parametrize(("line", "parts"), MISTAKES)
def test_a_mistake_is_one_short_line_and_nothing_is_written(
    line, parts, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("minia3.checkpoints.hub.why_unreachable", lambda: "no network")
    before = contents(folder)
    found = outcome(line, capsys)
    assert found.code == 2, found.error
    program = line.split()[0]
    assert found.error.startswith((f"{program}: ", f"{program} train: "))
    assert found.error.endswith("\n")
    assert found.error.count("\n") == 1
    assert len(found.error) <= MOST_CHARACTERS, found.error
    assert "Traceback" not in found.error
    for part in parts:
        assert part in found.error
    assert contents(folder) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line_too(folder, monkeypatch, capsys):
    """It is a failure and not a mistake, so the exit code is 1."""
    monkeypatch.chdir(folder)
    found = outcome("minia3 predict tiny-t5 rows.jsonl --out /dev/full", capsys)
    assert found == (1, "minia3: [Errno 28] No space left on device: '/dev/full'\n")
