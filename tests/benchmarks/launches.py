"""Count the operators that a GPU would be told to compute: ours beside transformers + PEFT.

    python -m tests.benchmarks.launches
    python -m tests.benchmarks.launches --operators     also the commonest operators of each line

A CPU tells a GPU about every operator (a launch). If the model is small, or reads a single token,
the GPU computes an operator sooner than the CPU can name the next one, and then their number
decides.

The models are narrow, because the number of launches does not depend on widths, but they have all
layers of the real ones. Their weights are random, and bfloat16.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import minia3
import train
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference.scoring import score_examples
from minia3.model import attend, linear, packing, recompute
from minia3.model.t5 import T5Config
from tests.benchmarks.inference import (
    Ids,
    random_prompts,
    score_as_peft_users,
    write_as_peft_users,
)
from tests.benchmarks.machine import versions
from tests.benchmarks.names import some_of
from tests.benchmarks.pairs import TINY, Pair, random_examples
from tests.benchmarks.patched_mode import PatchedMode
from tests.benchmarks.training import loss_of
from tests.words import word_tokenizer

MODELS = "t5-base,smollm2-135m"
N_TASKS = 8

# These give a tensor memory, and compute nothing.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# These look at a tensor or read it, but their schemas do not say so.
LOOKS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "promote_types"}

FEWER = 3  # steps or tokens; one more is counted


class CountLaunches(PatchedMode):
    """Count the operators that compute something while this is active, as on CUDA.

    Below autograd, each operator of PyTorch arrives here, and its parts do not. On a GPU, the
    profiler counts the same as kernels. On a CPU it has no kernels to count, but operators, with
    views, which launch nothing, and with the operators that others consist of.
    """

    def __init__(self):
        super().__init__()
        self.operators = Counter()
        self.is_fused = False  # within an operator that is one on CUDA, and several on a CPU

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if launches(function) and not self.is_fused:
            self.operators[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def replaced_functions(self):
        """Return what CUDA computes otherwise than a CPU: (owner, name, function) of each."""
        norm = recompute._RMSNorm  # CUDA has a fused one, see `has_fused_norm`
        return (
            (F, "scaled_dot_product_attention", self.as_one(F.scaled_dot_product_attention)),
            (F, "rms_norm", self.as_one(F.rms_norm)),
            (recompute, "normalized", self.as_one(recompute.normalized)),
            (norm, "backward", staticmethod(self.as_one(norm.backward))),
            (packing, "lies_end_to_end", lambda *args: False),
            (attend, "is_decoding_on_cpu", lambda *args: False),
            (attend, "products_are_faster", lambda *args: False),
            (linear, "HAS_TILES", False),
        )

    def as_one(self, function):
        """Return `function`, which counts as a single operator."""

        def run(*args, **options):
            self.operators[function.__qualname__] += 1
            self.is_fused = True
            out = function(*args, **options)
            self.is_fused = False
            return out

        return run


def launches(function):
    """Return whether an operator computes something, so that a GPU has a kernel for it."""
    name = function.overloadpacket.__name__
    if name in ALLOCATIONS or name in LOOKS:
        return False
    # A view returns what it was given, and does not write into it.
    aliases = [returned.alias_info for returned in function._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def count(function):
    """Return how often a call of `function` launches each operator."""
    with CountLaunches() as counter:
        function()
    return counter.operators


def count_one_more(function):
    """Return what function(n + 1) launches beyond function(n): one more step, or token.

    What happens once, before the first of them or after the last one, drops out.
    """
    function(FEWER)  # sets up what is set up once per process
    more = count(lambda: function(FEWER + 1))
    more.subtract(count(lambda: function(FEWER)))
    return Counter({name: n for name, n in more.items() if n})


class NarrowPair(Pair):
    """Both sides of a model that is as deep as the real one, but narrow."""

    def __init__(self, name, scratch, is_shallow):
        self.is_shallow = is_shallow
        super().__init__(name, scratch, quick=True, dtype=torch.bfloat16)

    def make_folders(self):
        if not self.is_shallow:
            self.config = narrow_config(self.name)
        super().make_folders()
        minia3.save_model(minia3.load_model(self.folder), self.folder, word_tokenizer(self.is_t5))


def narrow_config(name):
    """Return the config of a known model in the widths of TINY, without dropout."""
    config = KNOWN_MODELS[name].config
    widths = {key: x for key, x in TINY.items() if key != "n_layers"}
    if not isinstance(config, T5Config):
        widths["n_kv_heads"] = 2
    return dataclasses.replace(config, **widths, dropout=0.0)


# Lines: each yields a title, and the operators of both sides


def passes(pair):
    """Forward and backward pass of a batch with padding, with the loss of its targets."""
    batch = pair.batch(pair.lengths(like_rte=True))
    for model in (pair.ours().train(), pair.theirs().train()):
        loss = loss_of(pair, model, batch)
        yield count(lambda loss=loss: loss().backward())


def step(pair):
    """A step of train.py, with all that belongs to it, and the same step by their loop."""
    yield count_one_more(lambda n_steps: train_ours(pair, n_steps, n_cells=1))
    yield count_one_more(lambda n_steps: train_theirs(pair, n_steps, n_tasks=1))


def step_of_many(pair):
    """A step of train.py for eight adapters with an example each; their loop makes eight passes."""
    yield count_one_more(lambda n_steps: train_ours(pair, n_steps, n_cells=N_TASKS))
    yield count_one_more(lambda n_steps: train_theirs(pair, n_steps, n_tasks=N_TASKS))


def token(pair):
    """A token of greedy generation."""
    ours = pair.ours()
    ours.config = dataclasses.replace(ours.config, eos_ids=())  # no token ends a text
    theirs = pair.theirs().eval()
    prompts = random_prompts(pair, 1)
    source_BM = torch.tensor(prompts)

    def write_ours(n_tokens):
        minia3.generate(ours, Ids(), prompts, max_new_tokens=n_tokens)

    def write_theirs(n_tokens):
        write_as_peft_users(theirs, source_BM, n_tokens)

    yield count_one_more(write_ours)
    yield count_one_more(write_theirs)


def ranking(pair):
    """A batch of evaluation: eight rows with padding, and two choices for each."""
    ours = pair.ours()
    theirs = pair.theirs().eval()

    def examples_of(n_batches):
        lengths = pair.lengths(like_rte=True) * n_batches
        return random_examples(lengths, 2, 2, pair.vocab_size)

    yield count_one_more(lambda n: score_examples(ours, examples_of(n), batch_size=8))
    yield count_one_more(lambda n: score_as_peft_users(pair, theirs, examples_of(n)))


LINES = {
    "forward and backward pass": passes,
    "training step": step,
    f"training step of {N_TASKS} adapters": step_of_many,
    "greedy token": token,
    "evaluation batch, 2 choices": ranking,
}


def train_ours(pair, n_steps, n_cells):
    """Run train.py on sentences of a target each. Each cell of the grid is a seed."""
    rows = []
    for i in range(24):
        words = " ".join(f"w{3 + (7 * i + k) % 50}" for k in range(4 + i % 9))
        rows.append(json.dumps({"input": words, "target": f"w{3 + i} w{4 + i}"}) + "\n")
    folder = pair.scratch / "task"
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "validation.jsonl").write_text("".join(rows[:2]))
    seeds = ",".join(map(str, range(n_cells)))
    flags = {
        "--model": pair.folder,
        "--task": folder,
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--seed": seeds,
        "--batch-size": 8 // n_cells,
        "--steps": n_steps,
        "--max-new-tokens": 1,  # of the evaluations, which are not counted
        "--out": tempfile.mkdtemp(dir=pair.scratch) + "/run",
    }
    words = [str(word) for pair_of_words in flags.items() for word in pair_of_words]
    with contextlib.redirect_stdout(io.StringIO()):
        if train.main(words) != 0:
            raise RuntimeError("train.py has failed")


def train_theirs(pair, n_steps, n_tasks):
    """Train with what transformers' Trainer uses: clipping, and a fused AdamW."""
    names = ["default", *(f"task{i}" for i in range(1, n_tasks))]
    model = pair.theirs().train()
    for name in names[1:]:
        model.load_adapter(pair.adapter, name, is_trainable=True)
    for name in names:
        model.set_adapter(name)  # lets its vectors train
    vectors = [p for name, p in model.named_parameters() if "ia3_l" in name]
    optimizer = torch.optim.AdamW(vectors, lr=1e-9, fused=True)
    batch = pair.batch(pair.lengths(like_rte=True))
    inputs = pair.their_inputs(batch, batch.target_BCL[:, 0])
    n_examples = 8 // n_tasks
    for _ in range(n_steps):
        for i, name in enumerate(names):
            model.set_adapter(name)
            part = slice(i * n_examples, (i + 1) * n_examples)
            model(**{key: x[part] for key, x in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        optimizer.zero_grad()


# The table


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=some_of(KNOWN_MODELS), default=MODELS, help="default: %(default)s"
    )
    parser.add_argument("--only", help="a part of the titles of the lines; default: all lines")
    parser.add_argument("--quick", action="store_true", help="two layers: does every line work?")
    parser.add_argument("--operators", action="store_true", help="print each line's operators")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    versions()
    torch.set_num_threads(1)

    result = {}
    print("| line | ours | theirs | theirs / ours |\n|---|---|---|---|", flush=True)
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            pair = NarrowPair(name, Path(scratch), args.quick)
            for title, line in LINES.items():
                if args.only and args.only not in title:
                    continue
                sides = list(line(pair))
                ours, theirs = (sum(operators.values()) for operators in sides)
                result[f"{name}, {title}"] = {"ours": ours, "theirs": theirs}
                ratio = theirs / ours
                print(f"| {name}, {title} | {ours:,} | {theirs:,} | {ratio:.2f} |", flush=True)
                if args.operators:
                    for operators in sides:
                        print(json.dumps(dict(operators.most_common())))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
