"""Where the time of a step or of generation goes: the operators of both sides, in groups.

python -m tests.benchmarks.operators --threads 1 --json operators.json
python -m tests.benchmarks.operators --only "training step, no padding" --models t5-base
python -m tests.benchmarks.operators --quick       tiny models: does it work

The profiler of torch records how long each operator of a CPU runs, without the operators that it
calls. The groups are made by names. Two more rows say what the groups do not: how many operators
were called, and how much of the time passed in no operator (Python, and the profiler itself).
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from tests.benchmarks.inference import Ids, random_prompts, write_as_peft_users
from tests.benchmarks.machine import versions
from tests.benchmarks.names import some_of
from tests.benchmarks.pairs import Pair
from tests.benchmarks.training import LENGTHS, loss_of, training_step

# Group: beginnings of the names of its operators, without "aten::". The first that fits counts.
GROUPS = {
    "matrix products": ("mm", "mv", "addmm", "addmv", "mkldnn", "matmul", "linear"),
    "attention": ("_scaled_dot_product", "scaled_dot_product", "bmm", "baddbmm", "_softmax"),
    "loss": ("_log_softmax", "log_softmax", "logsumexp", "nll_loss", "cross_entropy"),
    "norms": ("_fused_rms_norm", "rms_norm", "rsqrt", "mean", "pow", "square"),
    "activations": ("relu", "threshold_backward", "silu", "gelu", "tanh", "sigmoid"),
    "optimizer": ("_fused_adam", "_foreach", "lerp", "addcmul", "addcdiv", "sqrt"),
    "products of elements": ("mul", "div"),  # scaling, rotation, parts of norms
    "sums": ("add", "sub", "rsub", "sum", "neg"),
    "copies and casts": ("copy_", "_to_copy", "clone", "cat", "contiguous", "repeat"),
    "filling and indexing": ("fill_", "zero_", "index", "gather", "scatter", "embedding", "where"),
    "views and new memory": (
        *("view", "_unsafe_view", "reshape", "_reshape", "transpose", "permute", "slice"),
        *("as_strided", "unsqueeze", "squeeze", "expand", "select", "narrow", "flatten"),
        *("unflatten", "split", "chunk", "unbind", "alias", "detach", "empty", "new_empty"),
    ),
}
OTHER = "other operators"
OUTSIDE = "outside of operators"
N_NEW = 32  # tokens that are generated


@dataclass
class Recording:
    """The operators of one call."""

    seconds: dict  # group: seconds in its operators
    n_calls: int  # of operators
    names: dict  # name of an operator: seconds

    @property
    def total(self):
        return sum(self.seconds.values())


def group_of(name):
    """Return the group of an operator, such as "aten::mul_"."""
    name = name.removeprefix("aten::")
    for group, beginnings in GROUPS.items():
        if name.startswith(beginnings):
            return group
    return OTHER


def record(function, n_rounds):
    """Return the Recording of a call of a function: the mean of some rounds after a first one."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        for _ in range(n_rounds):
            function()
        n_seconds = time.perf_counter() - begun
    seconds = dict.fromkeys([*GROUPS, OTHER], 0.0)
    names = Counter()
    n_calls = 0
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue  # the nodes of autograd, and annotations: their time is outside of operators
        n_calls += event.count
        seconds[group_of(event.key)] += event.self_cpu_time_total / 1e6 / n_rounds
        names[event.key] += event.self_cpu_time_total / 1e6 / n_rounds
    seconds[OUTSIDE] = n_seconds / n_rounds - sum(seconds.values())
    return Recording(seconds, n_calls // n_rounds, dict(names.most_common()))


# What is recorded


def training(pair):
    """Yield (title, our step, their step)."""
    ours = pair.ours().train()
    theirs = pair.theirs().train()
    for lengths, like_rte in LENGTHS.items():
        batch = pair.batch(pair.lengths(like_rte))
        our_step = training_step(loss_of(pair, ours, batch), ours.parameters())
        their_step = training_step(loss_of(pair, theirs, batch), theirs.parameters())
        yield f"training step, {lengths}", our_step, their_step


def generation(pair):
    """Yield (title, our generation, theirs). No token ends a text."""
    ours = pair.ours()
    ours.config = replace(ours.config, eos_ids=())
    theirs = pair.theirs().eval()
    n_new = 4 if pair.quick else N_NEW
    for batch_size in (1, 32):
        prompts = random_prompts(pair, batch_size)
        source_BM = torch.tensor(prompts)

        def our_texts(prompts=prompts, batch_size=batch_size):
            minia3.generate(ours, Ids(), prompts, max_new_tokens=n_new, batch_size=batch_size)

        def their_texts(source_BM=source_BM):
            write_as_peft_users(theirs, source_BM, n_new)

        yield f"greedy generation, batch {batch_size}", our_texts, their_texts


KINDS = {"training step": training, "greedy generation": generation}


def tables(args):
    """Print the table of each title, and return the rows for JSON."""
    result = {}
    n_rounds = 1 if args.quick else args.rounds
    for model in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair(model, Path(scratch), args.quick, getattr(torch, args.dtype))
            for kind, sides_of in KINDS.items():
                if args.only and not args.only.startswith(kind):
                    continue
                for title, ours, theirs in sides_of(pair):
                    if args.only and not title.startswith(args.only):
                        continue
                    recordings = [record(ours, n_rounds), record(theirs, n_rounds)]
                    print_table(f"{model}, {title}", *recordings)
                    result[f"{model}, {title}"] = [vars(recording) for recording in recordings]
    return result


def print_table(title, ours, theirs):
    print(f"\n| {title} | ours | share | theirs | share |\n|---|---|---|---|---|")
    for group in ours.seconds:
        cells = [group]
        for side in (ours, theirs):
            n_seconds = side.seconds[group]
            cells += [f"{n_seconds * 1e3:,.0f} ms", f"{n_seconds / side.total:.0%}"]
        print(f"| {' | '.join(cells)} |")
    print(f"| together | {ours.total:.2f} s | | {theirs.total:.2f} s | |")
    print(f"| calls of operators | {ours.n_calls:,} | | {theirs.n_calls:,} | |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.operators",
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
    parser.add_argument("--only", help="a title, or how it begins (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each side (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="file for the result, with each operator")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    versions()  # makes transformers quiet
    result = tables(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
