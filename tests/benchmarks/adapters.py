"""What it costs to train many adapters in one pass, as a Markdown table.

    python -m tests.benchmarks.adapters --threads 1 --json adapters.json
    python -m tests.benchmarks.adapters --quick               tiny models: does every line work?

Three questions, each with a goal:

- The embedded model: how much longer does a step of 25 adapters take than a step of one? Each has 8
  examples, so the arithmetic of 25 is that of a batch of 200. On a GPU, small operations take as
  long as large ones; on a CPU they do not. The next line has one adapter with these 200 examples,
  and so shows what the adapters themselves cost. The third counts launches (launches.py).
- A step of 64 examples: how much longer does it take if they belong to 64 adapters?
- 8, 16 and 64 tasks with an example each: one pass of ours beside a pass per task of transformers +
  PEFT. The next line has a pass per task of ours, and so shows what batches of one cost.

The steps of the first two are those of train.py: T-Few's losses, clipping and Adafactor. Both sides
of a line take turns.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference.scoring import choice_logprobs
from minia3.training.batch import MixedBatch
from minia3.training.config import Config
from minia3.training.optimizer import Adafactor
from tests.benchmarks.launches import count
from tests.benchmarks.machine import describe_machine, versions
from tests.benchmarks.measure import Bench, Roof, compare
from tests.benchmarks.names import some_of
from tests.benchmarks.pairs import N_TARGET, Pair, random_examples
from tests.benchmarks.training import loss_of, steps_of_tasks

N_ADAPTERS = 25  # of the embedded model
N_EXAMPLES = 8  # of each
EMBEDDED_LENGTH = 32  # tokens of a source
N_MANY = 64
N_TASKS = (8, 16, 64)

# Most that many adapters may cost: how many times the time of one.
MOST = {"25 adapters": 3.0, "64 adapters": 1.1}
# Least that our one pass is faster than theirs.
LEAST = {"8 tasks": 2.5}

HEAD = """
| line | first | second | second / first (middle half of the rounds) | goal |
|---|---|---|---|---|"""


@dataclass(eq=False)
class FixedCell:
    """Stands for a cell of train.py: an adapter with the same examples in each step."""

    row: int
    batches: list
    config: Config


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--models",
        type=some_of(KNOWN_MODELS),
        default="t5-base,smollm2-135m",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=30, help="for the rounds of a line (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu ... (default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {
        "machine": describe_machine(args.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "dtype": args.dtype,
        "rows": {},
    }
    print(", ".join(f"{name}: {value}" for name, value in result.items() if value), flush=True)
    print(HEAD, flush=True)
    roof = Roof(getattr(torch, args.dtype), 256 if args.quick else 4096, args.device)
    bench = Bench(args.quick, args.seconds, roof)
    for title, row in measure_all(bench, args):
        print(table_row(title, row), flush=True)
        result["rows"][title] = row.published()
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure_all(bench, args):
    """Yield (title, Row) for all lines."""
    yield from embedded(bench, args.device)
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            dtype = getattr(torch, args.dtype)
            pair = Pair(name, Path(scratch), args.quick, dtype, args.device)
            yield from many_adapters(bench, pair)
            for n_tasks in N_TASKS:
                yield from tasks(bench, pair, n_tasks)


def table_row(title, row):
    goal = "" if row.goal is None else f"{row.goal:g}"
    if row.unit == "launches":
        return f"| {title} | {row.ours:,} | {row.theirs:,} | {row.ratio:.2f} | {goal} |"
    low, high = row.spread
    times = f"{1000 * row.ours:.4g} ms | {1000 * row.theirs:.4g} ms"
    return f"| {title} | {times} | {row.ratio:.2f} ({low:.2f} to {high:.2f}) | {goal} |"


# Our own steps


def step_of_adapters(model, examples, n_adapters):
    """Return a function that makes a step of train.py. Each adapter has as many of the examples."""
    n_each = len(examples) // n_adapters
    cells = []
    for row in range(n_adapters):
        own = examples[row * n_each : (row + 1) * n_each]
        cells.append(FixedCell(row, [own], Config()))
    (part,) = MixedBatch(cells, 0, n_rows=n_adapters).split()
    optimizer = Adafactor(minia3.vectors(model).values())
    rates = dict.fromkeys(range(n_adapters), 1e-9)
    model.train()

    def step():
        logp_BCL = choice_logprobs(model, part.inputs, part.row_B)
        part.losses(logp_BCL).sum().backward()
        optimizer.clip(1.0)
        optimizer.step(rates)
        optimizer.zero_grad()

    return step


def embedded(bench, device):
    def step(n_adapters, n_examples):
        model = minia3.load_model("tiny-t5", n_adapters=n_adapters, device=device)
        minia3.freeze(model)
        lengths = (EMBEDDED_LENGTH,) * n_examples
        examples = random_examples(lengths, 2, 2, model.embed.num_embeddings)
        return step_of_adapters(model, examples, n_adapters)

    n_all = N_ADAPTERS * N_EXAMPLES
    one = step(1, N_EXAMPLES)
    many = step(N_ADAPTERS, n_all)
    second = f"then of {N_ADAPTERS} adapters with {N_EXAMPLES} each"
    row = bench.time(one, many)
    row.goal = MOST["25 adapters"]
    yield f"tiny-t5, a step of one adapter with {N_EXAMPLES} examples, {second}", row
    row = bench.time(step(1, n_all), many)
    yield f"tiny-t5, a step of one adapter with {n_all} examples, {second}", row
    row = compare(count(one).total(), count(many).total(), "launches")
    yield f"tiny-t5, launches of a step of one adapter, {second}", row


def many_adapters(bench, pair):
    length = pair.lengths()[0]
    examples = random_examples((length,) * N_MANY, 1, N_TARGET, pair.vocab_size)
    one = step_of_adapters(pair.ours(), examples, 1)
    many = step_of_adapters(pair.ours(N_MANY), examples, N_MANY)
    row = bench.time(one, many)
    row.goal = MOST["64 adapters"]
    yield f"{pair.name}, a step of {N_MANY} examples of one adapter, then of {N_MANY} adapters", row


# Beside a pass for each task


def tasks(bench, pair, n_tasks):
    our_step, their_step, batch = steps_of_tasks(pair, n_tasks)
    row = bench.time(our_step, their_step)
    if pair.is_t5:
        row.goal = LEAST.get(f"{n_tasks} tasks")
    yield f"{pair.name}, {n_tasks} tasks in one pass, then a pass per task of PEFT", row

    model = pair.ours(n_tasks).train()
    losses = []
    for i in range(n_tasks):
        example = batch._make(x[i : i + 1] for x in batch)
        losses.append(loss_of(pair, model, example, torch.tensor([i])))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9)

    def our_passes_of_one():
        for loss in losses:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    row = bench.time(our_step, our_passes_of_one)
    yield f"{pair.name}, {n_tasks} tasks in one pass, then a pass per task of ours", row


if __name__ == "__main__":
    main()
