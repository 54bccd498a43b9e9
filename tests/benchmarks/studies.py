"""python -m tests.benchmarks.studies STUDY --out FOLDER: the runs behind a table of the README, one after the other.

A study is a list of command lines of train.py, most of them grids, printed as they run, each with a folder of its own.
What is finished is skipped and what was stopped goes on: a study that was killed is started again by the same line.
Afterwards:

    python -m minia3 table FOLDER
    python -m minia3 plot FOLDER --out PICTURES

Flags that are not the study's own go to each run: --data-dir, --device ...

python -m tests.benchmarks.studies t0-3b --dry-run t5-base --out FOLDER       all of it on a tiny random model
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import minia3
from minia3.checkpoints.known_models import known_models
from minia3.tasks.known_tasks import known_tasks
from minia3.training.checkpoint import load_checkpoint
from tests.benchmarks.growth import random_model

ROOT = Path(__file__).parents[2]
T0_TASKS = (
    "copa",
    "hellaswag",
    "storycloze",
    "winogrande",
    "wsc",
    "wic",
    "rte",
    "cb",
    "anli-r1",
    "anli-r2",
    "anli-r3",
)
SEEDS = {"embedded": "0,1,2,3,4", "smollm2": "0,1,32", "raft": "0,1,2,3,4", "t0": "0,1,32,42,1024"}
DETAILS = ("colour", "thing", "place", "person")
DRY = ("--seed", "0,1", "--steps", "2", "--eval-prompt", "0,1")


def held_out(folder):
    """The embedded model's held-out tasks, and one more of their rows: yes, if colour or place agree, but not both."""
    if not (folder / "xor" / "train.jsonl").exists():
        words = [
            "--quick",
            "--out",
            str(folder),
            "--details",
            *DETAILS,
        ]  # the rows do not depend on what it trains
        subprocess.run(
            [sys.executable, str(ROOT / "data" / "pretrain.py"), *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (folder / "xor").mkdir(exist_ok=True)
        for split in ("test", "validation", "train"):
            files = [
                (folder / f"same-{detail}" / f"{split}.jsonl").read_text()
                for detail in ("colour", "place")
            ]
            pairs = [
                [json.loads(line) for line in pair]
                for pair in zip(*map(str.splitlines, files), strict=True)
            ]
            rows = [one | {"label": one["label"] ^ other["label"]} for one, other in pairs]
            (folder / "xor" / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    return [str(folder / name) for name in (*(f"same-{detail}" for detail in DETAILS), "xor")]


def embedded(model, out):
    """The embedded T5: methods, losses and sites on its held-out tasks, shots, learning rates, and smaller bases."""
    tasks, seeds = held_out(out / "tasks"), ["--seed", SEEDS["embedded"]]
    on, colour = ["--model", model, "--eval-batch-size", "64"], ["--task", tasks[0]]
    every = [*on, *seeds, "--task", ",".join(tasks)]
    trained = {"ia3": [], "faster": ["--lr", "3e-2"], "lora": ["--method", "lora", "--lr", "3e-3"]}
    trained["full"] = ["--method", "full", "--lr", "1e-3"]
    yield "methods-none", [*on, "--task", ",".join(tasks), "--method", "none"]
    for n in ("4", "16"):
        yield f"methods-icl-{n}", [*every, "--method", "icl", "--shots", n]
    for method, words in trained.items():
        yield f"methods-{method}", [*every, *words]
    every = [
        *on,
        *seeds,
        "--task",
        ",".join(tasks[:-1]),
    ]  # at this rate nothing learns the last one
    for losses in ("lm", "lm,ul", "lm,ln"):
        yield f"losses-{losses}", [*every, "--losses", losses]
    for sites in ("k", "v", "ff", "k,v", "k,ff", "v,ff", "k,v,ff,q,o"):
        yield f"sites-{sites}", [*every, "--sites", sites]
    yield "sites-no-cross", [*every, "--no-cross"]
    for shots in ("4", "8", "16", "32", "64", "128", "256"):
        for method, words in trained.items():
            yield f"shots-{shots}-{method}", [*on, *seeds, *colour, *words, "--shots", shots]
    rates = ["--lr", "1e-3,3e-3,1e-2,3e-2", "--warmup-ratio", "0,0.06,0.3", "--seed", "0,1,2"]
    for task in (tasks[0], tasks[3], tasks[4]):
        yield f"rates-{Path(task).name}", [*on, "--task", task, *rates]
    for method, lrs in {"lora": "1e-3,3e-3,1e-2", "full": "3e-4,1e-3,3e-3"}.items():
        words = ["--method", method, "--lr", lrs, "--seed", "0,1,2"]
        yield f"rates-{method}", [*on, *words, "--task", ",".join(tasks[3:])]
    for shots in ("16", "32"):
        for method, lrs in {"ia3": "1e-2,1e-1", "lora": "1e-3,1e-2", "full": "3e-4,3e-3"}.items():
            words = ["--method", method, "--lr", lrs, "--shots", shots]
            yield f"few-{shots}-{method}", [*on, *seeds, *colour, *words]
    yield "mixture", [*on, "--task", ",".join(tasks[1:4]), "--adapters", "one", "--lr", "3e-2"]
    start = [*on, *seeds, *colour, "--lr", "3e-3,3e-2", "--init", str(out / "mixture" / "adapter")]
    for shots in ("16", "32", "64", "512"):
        yield f"init-{shots}", [*start, "--shots", shots]
    for method, words in trained.items():
        yield f"curves-{method}", [*on, *seeds, "--task", tasks[3], "--eval-every", "50", *words]


def widths(model, out):
    """Bases of widths 16, 32 and 64, three of each, made here in two minutes each: what trains well on small ones?

    Bases are made in this order, those too whose runs --only leaves out.
    """
    task = held_out(out / "tasks")[0]
    lrs = {
        "ia3": "3e-3,3e-2,1e-1",
        "none": "3e-3",
        "lora": "3e-3,1e-2,3e-2",
        "full": "1e-3,3e-3,1e-2",
    }
    for width, seed in product(("16", "32", "64"), ("0", "1", "2")):
        base = out / f"base-{width}-{seed}"
        if not (base / "tiny-t5").exists():
            words = ["--d-model", width, "--seed", seed, "--out", str(base)]
            subprocess.run([sys.executable, str(ROOT / "data" / "pretrain.py"), *words], check=True)
        on = ["--model", str(base / "tiny-t5"), "--task", task, "--eval-batch-size", "64"]
        for method, lr in lrs.items():
            yield f"{width}-{seed}-{method}", [*on, "--method", method, "--lr", lr]


def smollm2(model, out):
    """Real weights: RTE, CB, COPA and a task of RAFT, by 32 rows (of RAFT 40), 60 steps, three prompts."""
    for task in ("copa", "cb", "raft/ade_corpus_v2", "rte"):
        raft, shots = task.startswith("raft"), [] if task.startswith("raft") else ["--shots", "32"]
        seeds, name = SEEDS["raft" if raft else "smollm2"], Path(task).name
        on = ["--model", model, "--task", task, "--eval-batch-size", "8", "--eval-prompt", "0,1,2"]
        yield f"{name}-none", [*on, "--method", "none", "--seed", seeds if raft else "0"]
        on += ["--seed", seeds]
        yield f"{name}-ia3", [*on, *shots, "--steps", "60"]
        yield f"{name}-icl", [*on, "--method", "icl", "--shots", "4"]
        yield f"{name}-lora", [*on, *shots, "--method", "lora", "--lr", "1e-3", "--steps", "60"]
        if task == "copa":
            yield "rates-copa", [*on, *shots, "--steps", "60", "--lr", "1e-2,3e-2"]


def t0_3b(model, out):
    """Table 4 of the paper for T0-3B: five seeds, all prompts. With --only ia3 --init ADAPTER, from given vectors."""
    for task in T0_TASKS:
        on = [
            "--model",
            model,
            "--task",
            task,
            "--shots",
            str(known_tasks()[task].shots),
            "--eval-prompt",
            "all",
        ]
        on += ["--seed", SEEDS["t0"]]
        yield f"ia3-{task}", [*on, "--micro-batch-size", "8"]
        yield f"lora-{task}", [*on, "--method", "lora", "--lr", "1e-3"]
        yield (
            f"full-{task}",
            [*on, "--method", "full", "--lr", "1e-4", "--save-every", "1000"],
        )  # 34 GB a time


def tiny_t0(folder, tokenizer):
    """A random model of T0's architecture and vocabulary, 2 + 2 narrow layers: -> its folder."""
    sizes = {
        "d_model": 64,
        "d_head": 16,
        "d_ff": 128,
        "n_layers": 2,
        "n_decoder_layers": 2,
        "n_heads": 4,
    }
    model = random_model(replace(known_models()["t0-3b"].config, **sizes))
    minia3.save_model(model, folder, minia3.load_tokenizer(tokenizer))
    return folder


STUDIES = {"embedded": embedded, "widths": widths, "smollm2": smollm2, "t0-3b": t0_3b}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.studies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", choices=STUDIES)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="as train.py's")
    what = "a tiny random model of T0's architecture with this model's tokenizer, two seeds, two steps, two prompts"
    model.add_argument("--dry-run", metavar="MODEL", help=what)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--only", default="", help="the beginning of the names of the runs that are wanted"
    )
    args, more = parser.parse_known_args(argv)
    if args.dry_run:
        args.model, more = str(tiny_t0(args.out / "tiny-t0", args.dry_run)), [*DRY, *more]
    names = []
    for name, words in STUDIES[args.study](args.model, args.out):
        names.append(name)
        if name.startswith(args.only):
            go_on(args.out / name, [*words, *more])
    if not any(name.startswith(args.only) for name in names):
        parser.error(
            f"--only is {args.only!r}, expected the beginning of one of {', '.join(names)}"
        )


def go_on(folder, words):
    """Begin a run, go on with one that was stopped, or leave alone one that is finished."""
    begun = (folder / "config.json").exists()
    saved = load_checkpoint(folder) if begun else None
    if saved is not None and saved.is_finished:
        print(f"{folder} is finished", flush=True)
        return
    words = ["--resume", str(folder)] if begun else [*words, "--out", str(folder)]
    print("python train.py", *words, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
