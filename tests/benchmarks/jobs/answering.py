"""The job that answers prompts, which arrive one by one, for several adapters."""

import json
import statistics

import minia3
from tests.benchmarks.jobs.processes import SIDES, Job, as_words
from tests.benchmarks.jobs.products import count_weights

N_PROMPTS = 64
N_ADAPTERS = 16
INTERVAL = 0.02  # seconds from one prompt to the next: a client that sends 50 per second
MAX_NEW_TOKENS = 32
MAX_BATCH = 64  # prompts
# The part of all texts that must be equal in float32. Among two thousand tokens, a few have a rival
# that is nearer than rounding. A side that never switched adapters had 7 of 12 in the quick job.
LEAST_EQUAL = 0.9


def answer(inputs):
    """Return the job: mixed batches beside `set_adapter` and batches of one adapter."""
    setting = inputs.setting
    n_adapters = 4 if setting.quick else N_ADAPTERS
    n_prompts = 12 if setting.quick else N_PROMPTS
    prompts = inputs.rows(n_prompts, n_adapters)
    flags = {
        "model": inputs.model,
        "adapters": inputs.adapters(n_adapters),
        "prompts": prompts,
        "interval": INTERVAL,
        "max_new_tokens": 8 if setting.quick else MAX_NEW_TOKENS,
        "max_batch": MAX_BATCH,
    }
    our_file = inputs.folder / "our-answers.json"
    their_file = inputs.folder / "their-answers.json"

    def ours(runner):
        runner(SIDES / "our_answers.py", *as_words({**flags, "out": our_file}))

    def theirs(runner):
        runner.script("their_answers.py", out=their_file, **flags)

    def agreement():
        found = json.loads(our_file.read_text())["texts"]
        expected = json.loads(their_file.read_text())["texts"]
        return compare(found, expected, setting.dtype)

    def notes():
        found = json.loads(our_file.read_text())
        expected = json.loads(their_file.read_text())
        return latencies(found, expected)

    title = f"{n_prompts} prompts, one each {INTERVAL * 1e3:.0f} ms, {n_adapters} adapters"
    flops = flops_of_answers(inputs, prompts, flags["max_new_tokens"])
    return Job(title, 4, ours, theirs, agreement, flops, notes, may_stop=False)


def flops_of_answers(inputs, prompts, n_new):
    """Return the FLOPs of reading the prompts and of writing `n_new` tokens for each."""
    tokenizer = minia3.load_tokenizer(inputs.model)
    n_source = 0
    n_target = 0
    for line in prompts.read_text().splitlines():
        n_source += len(tokenizer.encode(json.loads(line)["input"]))
        n_target += n_new
    return count_weights(inputs.model).flops(n_source, n_target)


def compare(found, expected, dtype):
    """Return how many texts are equal. Raise AssertionError if they are too few in float32.

    In bfloat16, rounding decides more often between tokens that are nearly as likely.
    """
    n_equal = sum(a == b for a, b in zip(found, expected, strict=True))
    text = f"{n_equal} of {len(found)} texts"
    if dtype == "float32" and n_equal < LEAST_EQUAL * len(found):
        raise AssertionError(f"{text} are equal")
    return text


def latencies(found, expected):
    """Return the seconds until all is answered, and the median latencies, of both sides."""
    parts = []
    for side in (found, expected):
        median = statistics.median(side["latencies"])
        parts.append(f"{side['seconds']:.2f} s after the first prompt, median latency {median:.2f}")
    ratio = expected["seconds"] / found["seconds"]
    return f"all answered {parts[0]} s; theirs {parts[1]} s ({ratio:.2f} times as long)"
