"""The training runs behind the tables of the documentation, one after the other.

python -m tests.benchmarks.studies STUDY --model MODEL --out FOLDER

A study is a list of command lines of train.py. Most of them are grids. Each is printed when it
starts, and has a folder of its own in FOLDER. A study that was killed is continued by the same
command: it skips finished runs, and resumes the one that was stopped. Then:

    python -m minia3 table FOLDER
    python -m minia3 plot FOLDER --out PICTURES

Flags that this command does not know (--data-dir, --device ...) are passed on to every run.

python -m tests.benchmarks.studies t0-3b --dry-run t5-base --out FOLDER    on a tiny random model
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
from minia3.cli.table import PAPER_TASKS
from minia3.tasks.known_tasks import known_tasks
from minia3.training.checkpoint import load_checkpoint
from tests.benchmarks.growth import random_model

ROOT = Path(__file__).parents[2]
SEEDS = {"embedded": "0,1,2,3,4", "smollm2": "0,1,32", "raft": "0,1,2,3,4", "t0": "0,1,32,42,1024"}
DETAILS = ("colour", "thing", "place", "person")
DRY_FLAGS = ("--seed", "0,1", "--steps", "2", "--eval-prompt", "0,1")
TINY_T0 = {
    "d_model": 64,
    "d_head": 16,
    "d_ff": 128,
    "n_layers": 2,
    "n_decoder_layers": 2,
    "n_heads": 4,
}


# Rows and models that are made here


def held_out(folder):
    """Return the folders of the embedded model's held-out tasks, and of a fifth task, XOR.

    The answer of XOR is yes if either the colour or the place agrees, but not both.
    """
    if not (folder / "xor" / "train.jsonl").exists():
        # --quick, because the rows do not depend on how long the model trains.
        pretrain("--quick", "--out", str(folder), "--details", *DETAILS, stdout=subprocess.DEVNULL)
        (folder / "xor").mkdir(exist_ok=True)
        for split in ("test", "validation", "train"):
            write_xor(folder, split)
    names = [f"same-{detail}" for detail in DETAILS]
    return [str(folder / name) for name in (*names, "xor")]


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


def pretrain(*flags, stdout=None):
    program = [sys.executable, str(ROOT / "data" / "pretrain.py")]
    subprocess.run([*program, *flags], check=True, stdout=stdout)


def tiny_t0(folder, tokenizer):
    """Write a random model of T0's architecture and vocabulary, and return its folder."""
    model = random_model(replace(KNOWN_MODELS["t0-3b"].config, **TINY_T0))
    minia3.save_model(model, folder, minia3.load_tokenizer(tokenizer))
    return folder


# Studies: each yields (name of a run, flags of train.py)


def embedded(model, out):
    """Compare methods, losses, sites, shots and learning rates on the embedded T5's tasks."""
    tasks = held_out(out / "tasks")
    base = ["--model", model, "--eval-batch-size", "64"]
    seeds = ["--seed", SEEDS["embedded"]]
    colour = ["--task", tasks[0]]
    all_tasks = ["--task", ",".join(tasks)]
    # At the default rate nothing learns XOR, the last task.
    learnable_tasks = ["--task", ",".join(tasks[:-1])]
    methods = {
        "ia3": [],
        "faster": ["--lr", "3e-2"],
        "lora": ["--method", "lora", "--lr", "3e-3"],
        "full": ["--method", "full", "--lr", "1e-3"],
    }

    yield "methods-none", [*base, *all_tasks, "--method", "none"]
    for shots in ("4", "16"):
        flags = ["--method", "icl", "--shots", shots]
        yield f"methods-icl-{shots}", [*base, *seeds, *all_tasks, *flags]
    for method, flags in methods.items():
        yield f"methods-{method}", [*base, *seeds, *all_tasks, *flags]

    for losses in ("lm", "lm,ul", "lm,ln"):
        yield f"losses-{losses}", [*base, *seeds, *learnable_tasks, "--losses", losses]
    for sites in ("k", "v", "ff", "k,v", "k,ff", "v,ff", "k,v,ff,q,o"):
        yield f"sites-{sites}", [*base, *seeds, *learnable_tasks, "--sites", sites]
    yield "sites-no-cross", [*base, *seeds, *learnable_tasks, "--no-cross"]

    for shots in ("4", "8", "16", "32", "64", "128", "256"):
        for method, flags in methods.items():
            name = f"shots-{shots}-{method}"
            yield name, [*base, *seeds, *colour, *flags, "--shots", shots]

    yield from embedded_rates(base, tasks)
    for shots in ("16", "32"):
        for method, lr in {"ia3": "1e-2,1e-1", "lora": "1e-3,1e-2", "full": "3e-4,3e-3"}.items():
            flags = ["--method", method, "--lr", lr, "--shots", shots]
            yield f"few-{shots}-{method}", [*base, *seeds, *colour, *flags]

    other_tasks = ["--task", ",".join(tasks[1:4])]
    yield "mixture", [*base, *other_tasks, "--adapters", "one", "--lr", "3e-2"]
    start = ["--lr", "3e-3,3e-2", "--init", str(out / "mixture" / "adapter")]
    for shots in ("16", "32", "64", "512"):
        yield f"init-{shots}", [*base, *seeds, *colour, *start, "--shots", shots]

    for method, flags in methods.items():
        task = ["--task", tasks[3], "--eval-every", "50"]
        yield f"curves-{method}", [*base, *seeds, *task, *flags]


def embedded_rates(base, tasks):
    """Yield the runs that compare learning rates."""
    rates = ["--lr", "1e-3,3e-3,1e-2,3e-2", "--warmup-ratio", "0,0.06,0.3", "--seed", "0,1,2"]
    for task in (tasks[0], tasks[3], tasks[4]):
        yield f"rates-{Path(task).name}", [*base, "--task", task, *rates]
    for method, lr in {"lora": "1e-3,3e-3,1e-2", "full": "3e-4,1e-3,3e-3"}.items():
        flags = ["--method", method, "--lr", lr, "--seed", "0,1,2"]
        yield f"rates-{method}", [*base, *flags, "--task", ",".join(tasks[3:])]


def widths(model, out):
    """Find out what trains well on small models: three bases each of widths 16, 32 and 64.

    A base is pre-trained here in two minutes, before its runs and in this order, even if --only
    leaves its runs out.
    """
    task = held_out(out / "tasks")[0]
    lrs = {
        "ia3": "3e-3,3e-2,1e-1",
        "none": "3e-3",
        "lora": "3e-3,1e-2,3e-2",
        "full": "1e-3,3e-3,1e-2",
    }
    for width, seed in product(("16", "32", "64"), ("0", "1", "2")):
        folder = out / f"base-{width}-{seed}"
        if not (folder / "tiny-t5").exists():
            pretrain("--d-model", width, "--seed", seed, "--out", str(folder))
        base = ["--model", str(folder / "tiny-t5"), "--task", task, "--eval-batch-size", "64"]
        for method, lr in lrs.items():
            yield f"{width}-{seed}-{method}", [*base, "--method", method, "--lr", lr]


def smollm2(model, out):
    """Train on real weights: RTE, CB, COPA and a task of RAFT, 60 steps, three prompts.

    Each task has 32 rows; RAFT has 40.
    """
    for task in ("copa", "cb", "raft/ade_corpus_v2", "rte"):
        name = Path(task).name
        seeds = SEEDS["smollm2"]
        seeds_of_none = "0"  # the same rows are evaluated with every seed
        shots = ["--shots", "32"]
        if task.startswith("raft"):
            seeds = SEEDS["raft"]
            seeds_of_none = seeds  # a seed is a fold, and evaluates other rows
            shots = []
        base = ["--model", model, "--task", task]
        base += ["--eval-batch-size", "8", "--eval-prompt", "0,1,2"]
        yield f"{name}-none", [*base, "--method", "none", "--seed", seeds_of_none]
        base += ["--seed", seeds]
        yield f"{name}-ia3", [*base, *shots, "--steps", "60"]
        yield f"{name}-icl", [*base, "--method", "icl", "--shots", "4"]
        lora = ["--method", "lora", "--lr", "1e-3"]
        yield f"{name}-lora", [*base, *shots, *lora, "--steps", "60"]
        if task == "copa":
            yield "rates-copa", [*base, *shots, "--steps", "60", "--lr", "1e-2,3e-2"]


def t0_3b(model, out):
    """Repeat table 4 of the paper for T0-3B: five seeds, all prompts.

    With --only ia3 --init ADAPTER, it starts from given vectors.
    """
    for task in PAPER_TASKS:
        shots = str(known_tasks()[task].shots)
        base = ["--model", model, "--task", task, "--shots", shots, "--eval-prompt", "all"]
        base += ["--seed", SEEDS["t0"]]
        yield f"ia3-{task}", [*base, "--micro-batch-size", "8"]
        yield f"lora-{task}", [*base, "--method", "lora", "--lr", "1e-3"]
        # Saved once, because a checkpoint of the whole model takes 34 GB.
        full = ["--method", "full", "--lr", "1e-4", "--save-every", "1000"]
        yield f"full-{task}", [*base, *full]


STUDIES = {"embedded": embedded, "widths": widths, "smollm2": smollm2, "t0-3b": t0_3b}


# The command


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.studies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", choices=STUDIES)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="--model of train.py")
    model.add_argument(
        "--dry-run",
        metavar="MODEL",
        help="try the study on a tiny random model of T0's architecture with the tokenizer of "
        "MODEL: two seeds, two steps, two prompts",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", help="make only runs whose names begin with this")
    return parser


def main(argv=None):
    parser = make_parser()
    args, flags = parser.parse_known_args(argv)
    model = args.model
    if args.dry_run:
        model = str(tiny_t0(args.out / "tiny-t0", args.dry_run))
        flags = [*DRY_FLAGS, *flags]
    names = []
    for name, words in STUDIES[args.study](model, args.out):
        names.append(name)
        if name.startswith(args.only):
            make_run(args.out / name, [*words, *flags])
    if not any(name.startswith(args.only) for name in names):
        expected = f"expected the beginning of one of {', '.join(names)}"
        parser.error(f"--only is {args.only!r}, {expected}")


def make_run(folder, words):
    """Start a run, or resume it if it was stopped. Skip it if it is finished."""
    if is_finished(folder):
        print(f"{folder} is finished", flush=True)
        return
    if (folder / "config.json").exists():
        words = ["--resume", str(folder)]
    else:
        words = [*words, "--out", str(folder)]
    print("python train.py", *words, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words])
    if done.returncode:
        sys.exit(done.returncode)


def is_finished(folder):
    checkpoint = load_checkpoint(folder)
    return checkpoint is not None and checkpoint.is_finished


if __name__ == "__main__":
    main()
