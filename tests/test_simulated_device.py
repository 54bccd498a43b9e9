"""Everything on another device than the CPU gives what it gives on the CPU, and waits for little.

The other device is a simulated one (on_device.py): a tensor in the wrong place is an error there,
and whatever would make a GPU wait is counted. The numbers of
copies and reads in this file are guards: they may become smaller.
"""

import io
import json
from collections import Counter
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from on_device import (
    COPY_IN,
    COPY_IN_AT_ONCE,
    COPY_OUT,
    COUNTS,
    READ,
    forget_counts,
    on_sim,
    total,
)
from optional import require_bitsandbytes
from running import TIMES, events, metrics, model, rows, run, task, words, write
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import minia3
from minia3.cli.main import main
from minia3.inference import decoding
from minia3.model.to_device import to_device
from minia3.tasks.batches import pad
from minia3.training.checkpoint import copy_values
from minia3.training.group import Group
from minia3.training.replicas import sum_step

pytestmark = pytest.mark.slow

PROMPTS = ["w3 w4 w5", "w7 w8 w9 w10 w11", "w12", "w13 w14"]
CHOICES = [["w3", "w4 w5"], ["w6 w7 w8"], ["w9", "w10", "w11 w12"], ["w13", "w14"]]
NAMES = ("t5", "llama")


def load(folder, device, n_adapters=3, **options):
    """Return a model with random vectors, and its tokenizer."""
    options = {"dtype": torch.float64, "n_adapters": n_adapters, **options}
    loaded = minia3.load_model(folder, device=device, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vector in minia3.vectors(loaded).values():
            vector.copy_(1 + 0.5 * torch.randn(vector.shape, generator=generator))
    forget_counts()
    return loaded, minia3.load_tokenizer(folder)


def same(found, expected, case=None):
    """Assert that results are equal: texts and integers exactly, floats up to rounding.

    The CPU has fused operations that the simulated device lacks, so float64 differs in rounding.
    case: the name of these results, for a message.
    """
    assert type(found) is type(expected), case
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), case
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected), case
        for found_part, expected_part in zip(found, expected, strict=True):
            same(found_part, expected_part, case)
    elif isinstance(expected, torch.Tensor):
        options = {"rtol": 1e-6, "atol": 1e-7, "msg": lambda message: f"{case}: {message}"}
        torch.testing.assert_close(found, expected, **options)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7), case
    else:
        assert found == expected, case


def on_both(job, *arguments):
    """Return what a job gives on the CPU, on the simulated device, and what it counted there."""
    ((_, *results),) = on_both_in_turns(job, {job.__name__: arguments})
    return results


def on_both_in_turns(job, cases):
    """Return a list of what `on_both` returns, with the name of the case in front.

    All cases on the simulated device share a process.

    cases: their arguments, by name.
    """
    on_cpu = in_turns("cpu", job, cases)
    on_device, _ = on_sim(in_turns, "sim", job, cases)
    return [(case, on_cpu[case][0], *on_device[case]) for case in cases]


def in_turns(device, job, cases):
    """Return what a job gives for each case, and what it counts."""
    results = {}
    for case, arguments in cases.items():
        forget_counts()
        try:
            result = job(device, *arguments)
        except BaseException as error:
            raise AssertionError(f"{case}, on {device}") from error
        results[case] = (result, Counter(COUNTS))
    return results


# Texts


def generated(device, folder, options, quantize=None):
    """Write texts. Steps of static shapes are not compiled, because this device has no compiler."""
    ours, tokenizer = load(folder, device, quantize=quantize)
    rows = torch.tensor([0, 1, 2, 1])
    options = {"adapter": rows, "max_new_tokens": 8, **options}
    with mock.patch.object(decoding, "compile_step", lambda model, state: model.step):
        return minia3.generate(ours, tokenizer, PROMPTS, **options)


GREEDY = {}
SAMPLING = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 1}
SAMPLES = {"temperature": 1.0, "samples": 3, "seed": 1}
BEAMS = {"beams": 3, "samples": 2}
STATIC = {"compile": True}


WAYS = {  # the options, and how often each model copies
    # T5 copies the source, its mask, where its tokens are, and the adapters. LLaMA copies five
    # things, and here a row ends and leaves the batch, for which it copies four more.
    "greedy": (GREEDY, {"t5": 4, "llama": 9}),
    # One more per step: the random numbers.
    "sampling": (SAMPLING, {"t5": 12, "llama": 14}),
    # LLaMA's samples share the prompt until one of them ends. Then they are taken apart.
    "samples": (SAMPLES, {"t5": 12, "llama": 22}),
    # In a step, four or five: the totals, which rows go on, where they are, and their tokens.
    "beams": (BEAMS, {"t5": 40, "llama": 37}),
    # What `select` copies once, and nothing per step: a copy would not be part of a CUDA graph.
    "static": (STATIC, {"t5": 6, "llama": 8}),
}


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_equal_and_a_token_is_read_once(name):
    cases = {way: (model(name), options) for way, (options, _) in WAYS.items()}
    for way, on_cpu, found, counts in on_both_in_turns(generated, cases):
        assert found == on_cpu, way
        assert any(on_cpu), way
        n_steps = 8
        assert total(counts, READ, COPY_OUT) == n_steps, way
        assert total(counts, COPY_IN) == 0, way
        n_copies = WAYS[way][1][name]
        assert total(counts, COPY_IN_AT_ONCE) == n_copies, (way, counts)


def streamed(device, folder):
    ours, tokenizer = load(folder, device)
    return list(minia3.stream(ours, tokenizer, PROMPTS[1], adapter=2, max_new_tokens=8))


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_equal_and_reads_each_token_once(name):
    on_cpu, found, counts = on_both(streamed, model(name))
    assert found == on_cpu
    assert len(on_cpu) > 1
    assert total(counts, READ, COPY_OUT) <= 8
    # Without padding, a stream copies its prompt and the row of its adapter.
    assert (total(counts, COPY_IN), total(counts, COPY_IN_AT_ONCE)) == (0, 2)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_writes_the_same_texts(name, quantize):
    if quantize == "nf4":
        require_bitsandbytes()
    on_cpu, found, _ = on_both(generated, model(f"{name}-wide"), GREEDY, quantize)
    assert found == on_cpu


# Scores


def ranked(device, folder):
    ours, tokenizer = load(folder, device)
    return minia3.rank(ours, tokenizer, PROMPTS, CHOICES, adapter=torch.tensor([2, 0, 1, 1]))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_equal_and_a_batch_is_read_once(name):
    on_cpu, found, counts = on_both(ranked, model(name))
    same(found, on_cpu)
    assert total(counts, READ, COPY_OUT) == 1
    assert total(counts, COPY_IN) == 0
    assert total(counts, COPY_IN_AT_ONCE) == {"t5": 6, "llama": 9}[name]


def started(device, folder, is_padded):
    """Start sequences, and return what that counts, and the first logits."""
    ours, tokenizer = load(folder, device)
    sources = [tokenizer.encode(prompt) for prompt in PROMPTS]
    source_BM, mask_BM = pad(sources)
    if not is_padded:
        mask_BM = None
    source_BM = to_device(source_BM, ours.embed.weight.device)
    forget_counts()
    with torch.no_grad():
        state = ours.start(source_BM, mask_BM, torch.tensor([2, 0, 1, 1]))
        counts = dict(COUNTS)
        return counts, ours.step(state.start, state).cpu()


@pytest.mark.parametrize("name", NAMES)
def test_start_checks_masks_and_rows_without_reading_anything_back(name):
    cases = {"padded": (model(name), True), "not padded": (model(name), False)}
    for case, (_, expected), (counts, found), _ in on_both_in_turns(started, cases):
        same(found, expected, case)
        assert total(counts, READ, COPY_OUT, COPY_IN) == 0, case
        assert total(counts, COPY_IN_AT_ONCE) > 0, case


# Adapters, merging and files


def saved(device, folder, out):
    """Save an adapter and a merged model, and read both again. Return the contents of all files."""
    ours, tokenizer = load(folder, device)
    minia3.save_adapter(ours, out / "adapter", 1)
    merged = minia3.merge(ours, 1)
    minia3.save_model(merged, out / "merged", tokenizer)
    assert merged.embed.weight.device.type == device
    again, _ = load(out / "merged", device, n_adapters=1)
    named = minia3.Adapters(again)
    named.load("one", out / "adapter")
    named.load("two", out / "adapter")
    named.remove("one")
    texts = minia3.generate(again, tokenizer, PROMPTS[:1], adapter=named.rows(["two"]))
    return texts, contents_of(out)


def contents_of(folder):
    """Return the contents of all files, by name: tensors, or bytes."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        is_tensors = path.suffix == ".safetensors"
        found[path.name] = load_file(path) if is_tensors else path.read_bytes()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_merging_and_files_are_equal(name, tmp_path):
    on_cpu = saved("cpu", model(name), tmp_path / "cpu")
    found, _ = on_sim(saved, "sim", model(name), tmp_path / "sim")
    same(found, on_cpu)


def merged_quantized(device, folder):
    ours, tokenizer = load(folder, device, quantize="int8")
    merged = minia3.merge(ours, 2)
    return minia3.rank(merged, tokenizer, PROMPTS, CHOICES)


@pytest.mark.parametrize("name", NAMES)
def test_merging_into_a_quantized_base_is_equal(name):
    on_cpu, found, _ = on_both(merged_quantized, model(name))
    same(found, on_cpu)


# Training


def trained(device, out, flags):
    """Run train.py, and return what it has left behind, except for times."""
    assert run(words(out / device, device=device, **flags)) == 0
    return left_behind(out / device)


def left_behind(folder):
    """Return the metrics of a run, without times, and its trained tensors."""
    lines = []
    for line in metrics(folder):
        lines.append({name: value for name, value in line.items() if name not in TIMES})
    return lines, [load_file(path) for path in sorted(folder.rglob("*.safetensors"))]


# A run of a single adapter goes on below.
RUNS = {
    "lora": {"method": "lora"},
    "full": {"method": "full", "lr": 1e-3},
    "none": {"method": "none", "eval_only": None},
    "icl": {"method": "icl", "shots": 3},
    "grid": {"seed": "0,1", "lr": "3e-3,1e-2"},
    "micro-batches": {"micro_batch_size": 3},
    "grid of micro-batches": {"seed": "0,1", "micro_batch_size": 3, "patience": 1},
    "adamw": {"optimizer": "adamw", "losses": "lm,ul", "clip": 0.1},
    "int8": {"quantize": "int8"},
    "more vectors": {"sites": "k,v,ff,q,o", "adapter": None},
    "targets": {"task": task((0,)), "max_new_tokens": 4},
}
# What the two architectures do in the same way, one of them does. The rest both do.
LEFT_OUT = {
    "t5": {"full", "none", "grid", "micro-batches", "adamw", "int8"},
    "llama": {"lora", "icl", "grid of micro-batches"},
}
# Without dropout, because a CPU draws it row by row for a padded batch, and so draws other numbers.
EVALUATING = {"steps": 2, "dtype": "float64", "dropout": 0.0, "eval_every": 1, "save_every": 1}


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_equal(name, tmp_path):
    cases = {}
    for kind, special in RUNS.items():
        if kind not in LEFT_OUT[name]:
            flags = {**EVALUATING, "model": model(name), "task": task(), **special}
            cases[kind] = (tmp_path / kind, flags)
    for kind, on_cpu, found, _ in on_both_in_turns(trained, cases):
        same(found, on_cpu, kind)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_an_nf4_base_is_equal(name, tmp_path):
    require_bitsandbytes()
    flags = {**EVALUATING, "model": model(f"{name}-wide"), "task": task(), "quantize": "nf4"}
    on_cpu, found, _ = on_both(trained, tmp_path, flags)
    same(found, on_cpu)


def resumed(device, out, flags):
    """Train for two steps, continue for two more, and return what both have left behind."""
    trained(device, out, flags)
    assert run(["--resume", out / device, "--steps", 4]) == 0
    return left_behind(out / device)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_on_is_equal(name, tmp_path):
    flags = {**EVALUATING, "model": model(name), "task": task()}
    on_cpu, found, _ = on_both(resumed, tmp_path, flags)
    same(found, on_cpu)


def predicted(device, folder, adapter, rows):
    """Return the answers of `minia3 predict` to the rows of a file."""
    with redirect_stdout(io.StringIO()) as answers:
        argv = ["predict", folder, rows, "--adapter", adapter, "--device", device]
        argv += ["--dtype", "float64", "--max-new-tokens", "4"]
        assert not main([*map(str, argv)])
    return answers.getvalue()


def parsed(lines):
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_equal(name, tmp_path):
    cases = {}
    for case, n_choices in {"choices": 2, "targets": 0}.items():
        rows = task((n_choices,))
        flags = {**EVALUATING, "model": model(name), "task": rows}
        trained("cpu", tmp_path / case, flags)
        adapter = tmp_path / case / "cpu" / "adapter"
        cases[case] = (model(name), adapter, Path(rows, "test.jsonl"))
    for case, on_cpu, found, _ in on_both_in_turns(predicted, cases):
        same(parsed(found), parsed(on_cpu), case)
        assert len(parsed(on_cpu)) == 12


# What a step of training waits for


def count_of_a_step(device, out, flags):
    """Return what the third of four steps counts. Only the first and the last write a line."""
    counted = []  # when each step begins
    next_batch = Group.next_batch

    def next_batch_of_step(group):
        counted.append(Counter(COUNTS))
        return next_batch(group)

    with mock.patch.object(Group, "next_batch", next_batch_of_step):
        trained(device, out, {**flags, "steps": 4})
    assert [line["step"] for line in events(out / device, "train")] == [1, 4]
    return counted[3] - counted[2]


STEPS = [
    # T5 copies the source, its mask, where its tokens are, the adapters, the target, where its
    # tokens are, and for the losses the mask of the target and, in one tensor, the label, the
    # row and the counts of each example.
    ("t5", {}, 8),
    ("t5", {"method": "lora"}, 8),
    ("t5", {"seed": "0,1,2,3"}, 8),
    # The rates of the rows, for the tables of either width.
    ("t5", {"lr": "0.01,0.02,0.03"}, 10),
    ("t5", {"lr": "0.01,0.02,0.03", "optimizer": "adamw"}, 10),
    # LLaMA also copies the order of its tokens and the place of the last one, and, if it reads
    # choices side by side, which choice each token belongs to.
    ("llama", {}, 11),
    ("llama", {"seed": "0,1,2,3"}, 11),
    ("t5-wide", {"quantize": "int8"}, 8),
    ("t5-wide", {"quantize": "nf4"}, 8),
]


def test_a_step_waits_for_nothing_and_reads_nothing(tmp_path):
    few_to_evaluate = write(tmp_path / "task", train=rows(20), test=rows(1))
    cases = {}
    for i, (name, flags, _) in enumerate(STEPS):
        if "nf4" in flags.values() and find_spec("bitsandbytes") is None:
            continue
        common = {"model": model(name), "task": few_to_evaluate, "dtype": "float32"}
        cases[i] = (tmp_path / f"{i}", {**common, **flags})
    found, _ = on_sim(in_turns, "sim", count_of_a_step, cases)
    for i, (counts, _) in found.items():
        assert total(counts, COPY_IN, COPY_OUT, READ) == 0, (STEPS[i], counts)
        assert total(counts, COPY_IN_AT_ONCE) == STEPS[i][2], (STEPS[i], counts)


def test_the_losses_of_all_steps_and_adapters_are_read_at_once_when_a_line_is_due(tmp_path):
    flags = {"model": model("t5"), "task": task(), "dtype": "float32", "steps": 11, "seed": "0,1"}
    _, counts = on_sim(trained, "sim", tmp_path, flags)
    assert counts[READ, "log.py"] == len(events(tmp_path / "sim", "train")) == 3


def summed(device):
    """Return what `sum_step` makes of one process's gradients and losses, on a device."""
    tables = [torch.nn.Parameter(torch.ones(2, 3, device=device)) for _ in range(4)]
    for table in tables:
        table.grad = torch.full((2, 3), 2.0, device=device)
    loss_A = torch.ones(2, device=device)
    signal = sum_step(tables, loss_A, 3, 15)
    counts = Counter(COUNTS)
    return signal, [table.grad.cpu() for table in tables], loss_A.cpu(), counts


def test_processes_exchange_what_they_must_agree_on_without_waiting_for_a_gpu():
    (*found, counts), _ = on_sim(summed, "sim")
    same(found, list(summed("cpu")[:3]))
    assert total(counts, READ, COPY_OUT, COPY_IN, COPY_IN_AT_ONCE) == 0


@pytest.mark.parametrize("seed", ["0", "0,1"])
def test_an_evaluation_reads_once_for_each_adapter_whether_it_is_finite(seed, tmp_path):
    flags = {**EVALUATING, "model": model("t5"), "task": task(), "seed": seed, "save_every": 100}
    _, counts = on_sim(trained, "sim", tmp_path, flags)
    n_evaluations = len(events(tmp_path / "sim", "eval"))
    n_adapters = len(seed.split(","))
    assert n_evaluations == 2 * n_adapters
    # One more for each adapter, at the end of training.
    assert counts[READ, "checkpoint.py"] == n_evaluations + n_adapters


def n_copies_of_one(device):
    """Return how many operations copy a tensor when the values of a parameter are copied."""
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        (copy,) = copy_values({"name": parameter}).values()
    assert copy.device.type == "cpu"
    assert copy.data_ptr() != parameter.data_ptr()
    return sum("copy" in name or "clone" in name for name in names)


def test_values_are_copied_once_for_a_checkpoint():
    on_cpu, found, _ = on_both(n_copies_of_one)
    assert (on_cpu, found) == (1, 1)


def test_the_line_about_the_device_names_it(tmp_path):
    flags = {"model": model("t5"), "task": task(), "dtype": "float32", "steps": 1}
    out, _ = on_sim(first_line, tmp_path, flags)
    assert out == "device   sim (as asked), float32"
    assert events(tmp_path / "sim", "final")


def first_line(out, flags):
    with redirect_stdout(io.StringIO()) as printed:
        trained("sim", out, flags)
    return printed.getvalue().splitlines()[0]
