"""python -m tests.benchmarks.studies STUDY --out FOLDER: the runs behind a table of the README, one after the other.

A study is a list of command lines of train.py, printed as they run, each with a folder of its own. What is finished is
skipped and what was stopped goes on, so a study that was killed is started again by the same line. Afterwards:

    python -m minia3 table FOLDER
    python -m minia3 plot FOLDER --out PICTURES

Flags that are not the study's own go to each run: --data-dir, --device ...
"""

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

from minia3.files import read_json

ROOT = Path(__file__).parents[2]
T0_TASKS = "copa,hellaswag,storycloze,winogrande,wsc,wic,rte,cb,anli-r1,anli-r2,anli-r3"
SEEDS = {"embedded": "0,1,2,3,4", "smollm2": "0,1,32", "raft": "0,1,2,3,4", "t0": "0,1,32,42,1024"}


def each(name, words, **axes):
    """A line for each combination of `axes`, flag -> values: what cannot be a grid, or is too large for one."""
    for values in product(*axes.values()):
        own = [word for flag, value in zip(axes, values, strict=True) for word in (f"--{flag}", value)]
        yield "-".join([name, *values]).replace("/", "-"), [*words, *own]


def smollm2(model):
    """Real weights: RTE, CB, COPA and a task of RAFT, by 32 rows (of RAFT 40), 60 steps, three prompts."""
    for task in ("copa", "cb", "raft/ade_corpus_v2", "rte"):
        raft, shots = task.startswith("raft"), [] if task.startswith("raft") else ["--shots", "32"]
        seeds, name = SEEDS["raft" if raft else "smollm2"], Path(task).name
        on = f"--model {model} --task {task} --dtype bfloat16 --eval-batch-size 8 --eval-prompt 0,1,2".split()
        yield f"{name}-none", [*on, "--method", "none", "--seed", seeds if raft else "0"]
        yield f"{name}-ia3", [*on, *shots, "--steps", "60", "--seed", seeds]
        yield f"{name}-icl", [*on, "--method", "icl", "--shots", "4", "--seed", seeds]
        lora = ["--method", "lora", "--lr", "1e-3", "--steps", "60"]
        yield from each(f"{name}-lora", [*on, *shots, *lora], seed=seeds.split(","))


STUDIES = {"smollm2": smollm2}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.studies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", required=True, help="as train.py's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="", help="the beginning of the names of the runs that are wanted")
    args, more = parser.parse_known_args(argv)
    for name, words in STUDIES[args.study](args.model):
        if name.startswith(args.only):
            go_on(args.out / name, [*words, *more])


def go_on(folder, words):
    """Begin a run, go on with one that was stopped, or leave alone one that is finished (train.py says so itself)."""
    begun = (folder / "config.json").exists() and "data" in read_json(folder / "config.json")
    words = ["--resume", str(folder)] if begun else [*words, "--out", str(folder)]
    print("python train.py", *words, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
