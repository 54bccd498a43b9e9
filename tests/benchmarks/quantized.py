"""What a quantized base loses and saves, as a Markdown table.

    python -m tests.benchmarks.quantized                     the embedded T5 and its task
    python -m tests.benchmarks.quantized --model smollm2.gguf --task cb --shots 32 --steps 60
    python -m tests.benchmarks.quantized --bases nf4         one of the rows

For each base (as --dtype says, int8, nf4): the bytes of its parameters, how far the
log-probabilities of the right answers are off on 64 of the rows to report on (mean over the rows of
the difference per token), the accuracy before and after training (medians over the seeds), and how
long a step takes compared with the first base. The seeds of a base train together.

For the last column, the bases take steps in turns, on 8 sources of 64 tokens with targets of 8, so
that a machine that does other things slows down all of them. It is the median over the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import minia3
from minia3.training.from_python import train

PLAIN = None  # the base as --dtype says, with which the others are compared
KINDS = (PLAIN, "int8", "nf4")
N_ROWS = 64  # whose log-probabilities are compared
N_ROUNDS = 7  # in which each base takes a step, after one to warm up


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quantized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-t5")
    parser.add_argument("--task", default="same-colour")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--shots", type=int)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--bases", nargs="+", choices=["plain", "int8", "nf4"], default=["plain", "int8", "nf4"]
    )
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    print("| base | MB | error of log p | before | after | time of a step |")
    print("|---|---|---|---|---|---|")
    kinds = [kind for kind in KINDS if (kind or "plain") in args.bases]
    ratios = step_ratios(args, kinds)
    expected = right_scores(load(args, PLAIN), args)
    for kind in kinds:
        model = load(args, kind)
        scores = right_scores(model, args)
        error = (scores - expected).abs().mean().item()
        n_bytes = sum(parameter.nbytes for parameter in model.parameters())
        del model
        before, after = train_and_evaluate(args, kind)
        name = kind or args.dtype
        print(
            f"| {name} | {n_bytes / 1e6:.2f} | {error:.4f} | {before:.1%} | {after:.1%} "
            f"| {ratios[kind]:.2f} |",
            flush=True,
        )


def load(args, kind):
    return minia3.load_model(args.model, dtype=getattr(torch, args.dtype), quantize=kind)


def right_scores(model, args):
    """Return (N,): the mean log-probability of a token of the right answer to each row."""
    tokenizer = minia3.load_tokenizer(args.model)
    task = minia3.load_task(args.task, data_dir=args.data_dir)
    prompt = task.prompts[0]
    prompts = []
    answers = []
    for row in task.evaluation[1][:N_ROWS]:
        text, choices, label = minia3.tasks.prompts.render(prompt, row)
        prompts.append(text)
        answers.append([choices[label]])
    return minia3.rank(model, tokenizer, prompts, answers)[:, 0]


def train_and_evaluate(args, kind):
    """Return the accuracy before and after training, medians over the seeds."""
    seeds = tuple(map(int, args.seeds.split(",")))
    flags = {
        "data_dir": args.data_dir,
        "shots": args.shots,
        "steps": args.steps,
        "dtype": args.dtype,
        "quantize": kind,
        "seed": seeds if len(seeds) > 1 else seeds[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        train(model=args.model, task=args.task, out=str(Path(folder, "run")), **flags)
        text = Path(folder, "run", "metrics.jsonl").read_text()
    finals = [json.loads(line) for line in text.splitlines()]
    finals = [line for line in finals if line["event"] == "final"]
    before = statistics.median(final["accuracy_before"] for final in finals)
    after = statistics.median(final["accuracy"] for final in finals)
    return before, after


def step_ratios(args, kinds):
    """Return kind -> the time of a training step, divided by that of the plain base."""
    models = {kind: load(args, kind) for kind in (PLAIN, *kinds)}
    seconds = {kind: [] for kind in models}
    for _ in range(1 + N_ROUNDS):
        for kind, model in models.items():
            seconds[kind].append(time_step(model))
    ratios = {}
    for kind in kinds:
        pairs = zip(seconds[kind][1:], seconds[PLAIN][1:], strict=True)
        ratios[kind] = statistics.median(mine / plain for mine, plain in pairs)
    return ratios


def time_step(model):
    """Return the seconds of a forward and a backward pass."""
    tokens_BL = torch.arange(8 * 64).view(8, 64) % 256
    minia3.freeze(model)
    start = time.perf_counter()
    minia3.logprobs(model, model.start(tokens_BL), tokens_BL[:, :8]).sum().backward()
    model.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
