"""Make the rows and models that the studies in tests/benchmarks/studies/ train on.

python -m tests.benchmarks.study_inputs embedded                 the five tasks, in a minute
python -m tests.benchmarks.study_inputs widths                   nine bases, two minutes each
python -m tests.benchmarks.study_inputs tiny-t0 --tokenizer t5-base

They are written to where the files of the studies look for them: runs/embedded/tasks, runs/widths,
and runs/tiny-t0, a random model of T0's architecture on which t0-3b.toml can be tried.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from tests.benchmarks.growth import random_model

ROOT = Path(__file__).parents[2]
DETAILS = ("colour", "thing", "place", "person")
WIDTHS = ("16", "32", "64")
BASE_SEEDS = ("0", "1", "2")
TINY_T0 = {
    "d_model": 64,
    "d_head": 16,
    "d_ff": 128,
    "n_layers": 2,
    "n_decoder_layers": 2,
    "n_heads": 4,
}


def make_tasks(folder):
    """Write the embedded model's held-out tasks, and a fifth task, XOR.

    The answer of XOR is yes if either the colour or the place agrees, but not both.
    """
    # --quick, because the rows do not depend on how long the model trains.
    pretrain("--quick", "--out", str(folder), "--details", *DETAILS, stdout=subprocess.DEVNULL)
    (folder / "xor").mkdir(exist_ok=True)
    for split in ("test", "validation", "train"):
        write_xor(folder, split)


def write_xor(folder, split):
    """Write the rows of a split of XOR: same-colour's, with another label."""
    lines = []
    colour_rows = read_rows(folder / "same-colour" / f"{split}.jsonl")
    place_rows = read_rows(folder / "same-place" / f"{split}.jsonl")
    for row, place_row in zip(colour_rows, place_rows, strict=True):
        row["label"] = row["label"] ^ place_row["label"]
        lines.append(json.dumps(row) + "\n")
    (folder / "xor" / f"{split}.jsonl").write_text("".join(lines))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_bases(folder):
    """Pre-train three bases of each width, except for those that are there."""
    for width, seed in product(WIDTHS, BASE_SEEDS):
        base = folder / f"base-{width}-{seed}"
        if not (base / "tiny-t5").exists():
            pretrain("--d-model", width, "--seed", seed, "--out", str(base))


def pretrain(*flags, stdout=None):
    program = [sys.executable, str(ROOT / "data" / "pretrain.py")]
    subprocess.run([*program, *flags], check=True, stdout=stdout)


def make_tiny_t0(folder, tokenizer):
    """Write a random model of T0's architecture and vocabulary."""
    model = random_model(replace(KNOWN_MODELS["t0-3b"].config, **TINY_T0))
    minia3.save_model(model, folder, minia3.load_tokenizer(tokenizer))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.study_inputs")
    parser.add_argument("study", choices=("embedded", "widths", "tiny-t0"))
    parser.add_argument("--tokenizer", default="t5-base", help="the tokenizer of tiny-t0")
    args = parser.parse_args(argv)
    if args.study == "embedded":
        make_tasks(Path("runs", "embedded", "tasks"))
    elif args.study == "widths":
        make_bases(Path("runs", "widths"))
    else:
        make_tiny_t0(Path("runs", "tiny-t0"), args.tokenizer)


if __name__ == "__main__":
    main()
