"""The job that labels rows, each with the adapter that it names, in mixed order."""

import json

import torch

import minia3
from tests.benchmarks.jobs.processes import Job
from tests.benchmarks.jobs.products import count_weights
from tests.benchmarks.jobs.training import flops_of_file

N_ROWS = 2000
N_ADAPTERS = 20
BATCH_SIZE = 16
# How far the scores of the two sides may be apart: the root mean square, by their spread.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# Two scores of a row may have either order if they are nearer than this many times as much.
NEAR = 10


def label(inputs):
    """Return the job: `minia3 predict` beside a loop over `set_adapter`."""
    setting = inputs.setting
    n_adapters = 4 if setting.quick else N_ADAPTERS
    n_rows = 24 if setting.quick else setting.divided(N_ROWS)
    adapters = inputs.adapters(n_adapters)
    rows = inputs.rows(n_rows, n_adapters)
    our_file = inputs.folder / "our-labels.jsonl"
    their_file = inputs.folder / "their-labels.jsonl"

    def ours(runner):
        our_file.unlink(missing_ok=True)  # otherwise it would count as done
        words = ["-m", "minia3", "predict", inputs.model, rows, "--adapter", adapters]
        words += ["--out", our_file, "--batch-size", BATCH_SIZE, "--device", "cpu"]
        runner(*words)

    def theirs(runner):
        runner.script(
            "their_labels.py",
            model=inputs.model,
            adapters=adapters,
            rows=rows,
            out=their_file,
            batch_size=BATCH_SIZE,
            encode_once=setting.encode_once,
        )

    def agreement():
        return compare(read_results(our_file), read_results(their_file), TOLERANCE[setting.dtype])

    tokenizer = minia3.load_tokenizer(inputs.model)
    flops = flops_of_file(rows, tokenizer, count_weights(inputs.model))
    title = f"{n_rows:,} rows, {n_adapters} adapters in mixed order"
    return Job(title, 4, ours, theirs, agreement, flops)


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(ours, theirs, tolerance):
    """Return what agrees. Raise AssertionError if scores differ, or a label that is not near."""
    found = torch.tensor([result["scores"] for result in ours])
    expected = torch.tensor([result["scores"] for result in theirs])
    allowed = tolerance * expected.std().item()
    difference = (found - expected).square().mean().sqrt().item()
    if not difference <= allowed:  # also if it is NaN
        raise AssertionError(f"the scores of the two sides differ by {difference:.3g}")
    n_equal = 0
    for row, (result, other) in enumerate(zip(ours, theirs, strict=True)):
        if result["label"] == other["label"]:
            n_equal += 1
            continue
        best, second = expected[row].sort(descending=True).values[:2].tolist()
        if not best - second < NEAR * allowed:
            raise AssertionError(f"row {row} has label {result['label']}, and {other['label']}")
    return f"{n_equal:,} of {len(ours):,} labels; scores within {difference:.1g}"
