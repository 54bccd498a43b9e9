"""The jobs that train: one adapter of RTE, and a table of seeds and learning rates."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

import minia3
from minia3.adapters.peft_files import ADAPTER_FILES
from tests.benchmarks.jobs.inputs import N_QUICK, N_RTE
from tests.benchmarks.jobs.processes import ROOT, Job, as_words
from tests.benchmarks.jobs.products import TRAINING, count_weights

STEPS = 100
BATCH_SIZE = 8
EVAL_BATCH_SIZE = 16
WARMUP_RATIO = 0.06  # the defaults of train.py
SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-3, 3e-3, 1e-2)
# Of the way that the vectors go in training, how far the two sides may be apart in float32.
MOST_APART = 0.05


def train(inputs):
    """Return the job that trains one adapter."""
    job = Training(inputs, seeds=(0,), rates=(3e-3,))
    return job.as_job("train.py on RTE", goal=2)


def grid(inputs):
    """Return the job that trains an adapter for each seed and learning rate."""
    seeds = SEEDS
    rates = RATES
    if inputs.setting.quick:
        seeds = SEEDS[:2]
        rates = RATES[1:2]
    job = Training(inputs, seeds, rates)
    return job.as_job(f"a table of {len(job.cells)} adapters", goal=8)


class Training:
    """One run of train.py beside a run of their script for each seed and learning rate."""

    def __init__(self, inputs, seeds, rates):
        setting = inputs.setting
        self.inputs = inputs
        self.n_steps = 6 if setting.quick else setting.divided(STEPS)
        n_test = N_QUICK if setting.quick else setting.divided(N_RTE)
        self.cells = [(seed, rate) for seed in seeds for rate in rates]
        self.flags = inputs.training_flags(self.n_steps, n_test, seeds, rates)
        self.rows = inputs.training_rows(self.flags)
        self.our_folder = inputs.folder / f"ours-{len(self.cells)}"

    def as_job(self, title, goal):
        n_test = len((self.rows / "test.jsonl").read_text().splitlines())
        title = f"{title}: {self.n_steps} steps, {n_test} rows to evaluate on, twice"
        return Job(title, goal, self.ours, self.theirs, self.agreement, self.flops())

    def ours(self, runner):
        flags = dict(self.flags, out=str(self.our_folder))
        for name in ("seed", "lr"):
            flags[name] = ",".join(map(str, flags[name]))
        shutil.rmtree(self.our_folder, ignore_errors=True)
        runner(ROOT / "train.py", *as_words(flags))

    def theirs(self, runner):
        sampling = "group_by_length" if self.inputs.setting.group_by_length else "sequential"
        for seed, rate in self.cells:
            runner.script(
                "their_training.py",
                model=self.inputs.model,
                train=self.rows / f"train-{seed}.jsonl",
                test=self.rows / "test.jsonl",
                out=self.their_folder(seed, rate),
                steps=self.n_steps,
                warmup_steps=round(WARMUP_RATIO * self.n_steps),
                lr=rate,
                batch_size=BATCH_SIZE,
                eval_batch_size=EVAL_BATCH_SIZE,
                sampling=sampling,
            )

    def their_folder(self, seed, rate):
        return self.inputs.folder / f"theirs-{seed}-{rate:g}"

    def flops(self):
        """Return the FLOPs of our products: the steps, and the evaluations.

        All cells share the evaluation before training.
        """
        weights = count_weights(self.inputs.model)
        tokenizer = minia3.load_tokenizer(self.inputs.model)
        total = 0
        for seed, _ in self.cells:
            total += TRAINING * flops_of_file(self.rows / f"train-{seed}.jsonl", tokenizer, weights)
        n_evaluations = len(self.cells) + 1
        total += n_evaluations * flops_of_file(self.rows / "test.jsonl", tokenizer, weights)
        return total

    def agreement(self):
        """Compare the accuracies of both sides, and the vectors unless batches or dtypes forbid."""
        finals = our_finals(self.our_folder)
        accuracies = []
        farthest = 0.0
        for (seed, rate), final in zip(self.cells, finals, strict=True):
            folder = self.their_folder(seed, rate)
            result = json.loads((folder / "result.json").read_text())
            for name in ("accuracy_before", "accuracy"):
                check_accuracy(final[name], result[name], final["rows"])
            accuracies.append((final["accuracy_before"], final["accuracy"], result["accuracy"]))
            distance = apart(our_adapter(self.our_folder, final), folder)
            farthest = max(farthest, distance)
        setting = self.inputs.setting
        is_exact = setting.dtype == "float32" and not setting.group_by_length
        if is_exact and not farthest <= MOST_APART:
            raise AssertionError(f"the vectors are apart by {farthest:.1g} of their way")
        mean_B, mean_ours, mean_theirs = torch.tensor(accuracies).mean(dim=0).tolist()
        return (
            f"accuracy {mean_B:.3f} before on both sides, {mean_ours:.3f} and {mean_theirs:.3f} "
            f"after; vectors within {farthest:.1g} of their way"
        )


def flops_of_file(path, tokenizer, weights):
    """Return the FLOPs of reading the rows of a file once, and of scoring all their choices."""
    n_source = 0
    n_target = 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        n_source += len(tokenizer.encode(row["input"]))
        for choice in row["choices"]:
            n_target += len(tokenizer.encode_target(choice, end=False))
    return weights.flops(n_source, n_target)


def our_finals(folder):
    """Return the final lines of a run, in the order of its cells."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "final"]


def our_adapter(folder, final):
    if "adapter" in final:
        return folder / "adapters" / final["adapter"]
    return folder / "adapter"


def check_accuracy(ours, theirs, n_rows):
    """Raise AssertionError if two accuracies differ by more than three standard errors."""
    noise = 3 * math.sqrt(0.25 / n_rows)
    if not abs(ours - theirs) <= noise:
        raise AssertionError(f"accuracy {ours:.3f}, and theirs is {theirs:.3f}")


def apart(ours, theirs):
    """Return how far two adapters are apart, as a part of how far theirs is from ones.

    Adapters that have not moved yet, because the first step changes nothing, are not apart.
    """
    vectors = load_file(Path(ours, ADAPTER_FILES[0]))
    expected = load_file(Path(theirs, ADAPTER_FILES[0]))
    if vectors.keys() != expected.keys():
        raise AssertionError("the adapters of the two sides have different vectors")
    difference = 0.0
    way = 0.0
    for name, vector in vectors.items():
        difference += (vector - expected[name]).square().sum().item()
        way += (expected[name] - 1).square().sum().item()
    if way == 0:
        return difference
    return math.sqrt(difference / way)
