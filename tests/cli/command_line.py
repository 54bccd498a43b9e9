"""What the tests of the command line share: commands in this process and in others."""

import os
import re
import select
import subprocess
import sys

import torch
from conftest import randomize
from running import ROOT

import minia3
from minia3.cli.main import main

CUT = re.compile(r"(minia3: \d+ outputs? cut to \d+ tokens \(--max-new-tokens\)\n)?")


def python(*words, **options):
    """Start `python -m minia3` in a process."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "minia3", *map(str, words)]
    return subprocess.Popen(command, env=environ, **options)


def outcome(*words):
    """Return stdout, stderr and the exit code of such a process."""
    process = python(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    return out, err, process.returncode


def output(capsys, *words):
    """Return what a command prints when it runs in this process."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def answered(capsys, *words):
    """Return what `predict` prints. It may note that outputs were cut, and nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert CUT.fullmatch(err)
    return out


def failure(capsys, *words, code=2):
    """Return the one line that a command prints on stderr before it fails with an exit code."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minia3: ")
    assert err.count("\n") == 1
    return err


def read_until(file_number, mark):
    """Return what comes until `mark` has come, or until nothing comes for 30 seconds."""
    seen = b""
    while mark not in seen and select.select([file_number], [], [], 30)[0]:
        seen += os.read(file_number, 1000)
    return seen.replace(b"\r", b"")


def save_adapters(folder):
    """Save two adapters of the embedded model, one/adapter and other/adapter."""
    for seed, name in enumerate(("one", "other")):
        model = randomize(minia3.load_model("tiny-t5"), seed)
        minia3.save_adapter(model, folder / name / "adapter")


def write_tfew_file(path):
    """Write T-Few's file of random vectors for a gated T5 of two layers."""
    shapes = {}
    stacks = {"encoder": ["SelfAttention"], "decoder": ["SelfAttention", "EncDecAttention"]}
    for stack, attentions in stacks.items():
        for i in range(2):
            for j, attention in enumerate(attentions):
                shapes[f"{stack}.block.{i}.layer.{j}.{attention}.k.multi_lora_b"] = (24, 1)
                shapes[f"{stack}.block.{i}.layer.{j}.{attention}.v.multi_lora_b"] = (24, 1)
            feed_forward = f"{stack}.block.{i}.layer.{len(attentions)}.DenseReluDense"
            shapes[f"{feed_forward}.wi_1.multi_lora_b"] = (40, 1)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(tensors, path)
