"""A run knows before its first step whether the step fits into memory, and says what does."""

import contextlib
import functools
import io
import json
import resource
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peaks import peak_beyond_weights
from running import events, fails, in_new_process, model, rows, run, train, words, write
from torch_version import counted_with_this_torch

import minia3
from minia3.adapters.lora import add_lora
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.inference import scoring
from minia3.inference.scoring import choice_logprobs
from minia3.model.costs import LAYER_FIELDS
from minia3.training import memory_fit, step_memory
from minia3.training.memory_fit import upper_bound
from minia3.training.memory_plan import StepShape, extrapolate_depth
from minia3.training.methods import trainable_parameters
from minia3.training.step_memory import peaks_of_step

SMALL = dict.fromkeys(("n_layers", "n_decoder_layers"), 2)
CONFIGS = {
    "t5": replace(KNOWN_MODELS["t5-small"].config, vocab_size=256, **SMALL),
    "gated t5": replace(KNOWN_MODELS["flan-t5-small"].config, vocab_size=256, **SMALL),
    "llama": replace(KNOWN_MODELS["smollm2-135m"].config, vocab_size=256, n_layers=2),
}
FLAGS = train.Config()
ALL_SITES = "k,v,ff,q,o,up,gate"


def real_peak(shape, flags=FLAGS, name="tiny-t5"):
    """Return what the tensors of a real step of a model take beyond the weights."""
    model = minia3.load_model(name).train()
    trainable_parameters(model, flags)
    return peak_beyond_weights(
        model, shape, lambda batch: choice_logprobs(model, batch).sum().backward()
    )


def peak_of_step(*arguments, **options):
    """Return what the tensors of a step of this depth take, on fake tensors."""
    return peaks_of_step(*arguments, **options).max()


@functools.cache
def planned_peak(shape):
    """Return the plan for such a step."""
    config = minia3.load_model("tiny-t5").config
    return peak_of_step(config, torch.float32, StepShape(*shape), FLAGS)


# The last shape scores its choices in turns.
@pytest.mark.parametrize("shape", [(4, 20, 2, 3), (16, 9, 3, 2), (300, 3, 8, 3)])
def test_the_plan_is_what_a_real_step_takes(shape):
    assert planned_peak(shape) == pytest.approx(real_peak(shape), rel=0.02)


def test_choices_of_a_divided_base_take_no_turns_in_the_plan_either(monkeypatch):
    shape = (300, 3, 8, 3)
    model = minia3.load_model("tiny-t5")
    group = SimpleNamespace(model=model, config=FLAGS, n_trained=0, cells=[])
    in_turns = step_memory.planned_step(group, StepShape(*shape))
    model.shards = "of some processes"
    at_once = step_memory.planned_step(group, StepShape(*shape))
    assert at_once > 1.2 * in_turns
    monkeypatch.setattr(scoring, "is_sharded", lambda model: True)
    # A divided base is read with a mask, even if there is no padding, and the plan has no masks.
    assert at_once == pytest.approx(real_peak(shape), rel=0.05)
    assert upper_bound(model.config, StepShape(*shape)) > at_once


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("shape", [(4, 20, 2, 3), (16, 9, 3, 2)])
def test_the_plan_of_another_method_has_what_its_gradients_need(shape, method):
    config = minia3.load_model("tiny-t5").config
    flags = replace(FLAGS, method=method)
    planned = peak_of_step(config, torch.float32, StepShape(*shape), flags)
    assert planned == pytest.approx(real_peak(shape, flags), rel=0.02)
    assert planned != planned_peak(shape)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("t5", {"sites": "ff"}),
        ("t5", {"sites": "k,v,ff,q,o"}),
        ("llama", {"sites": ALL_SITES}),
        ("t5", {"layers": "1-"}),
        ("llama", {"layers": "1"}),
    ],
)
def test_the_plan_has_the_vectors_that_train(name, flags):
    shape = (4, 20, 2, 3)
    config = minia3.load_model(model(name)).config
    flags = replace(FLAGS, **flags)
    planned = peak_of_step(config, torch.float32, StepShape(*shape), flags)
    assert planned == pytest.approx(real_peak(shape, flags, model(name)), rel=0.02)
    assert planned != peak_of_step(config, torch.float32, StepShape(*shape), FLAGS)


def test_the_plan_of_a_lora_from_a_file_has_its_rank_and_its_linears():
    loaded = minia3.load_model("tiny-t5")
    group = SimpleNamespace(model=loaded, n_trained=0, cells=[])
    group.config = replace(FLAGS, method="lora", rank=50, where="q,k,v,o")
    add_lora(loaded, 50, 16, ["q", "k", "v", "o"])
    expected = step_memory.planned_step(group, StepShape(4, 20, 2, 3))
    group.config = replace(FLAGS, method="lora", adapter="a file")
    assert step_memory.planned_step(group, StepShape(4, 20, 2, 3)) == expected


FIVE = dict.fromkeys(LAYER_FIELDS, 5)
DEEP = {
    "t5": replace(CONFIGS["t5"], **FIVE),
    "gated t5": replace(CONFIGS["gated t5"], **FIVE),
    "llama": replace(CONFIGS["llama"], n_layers=5),
    "deep t5": replace(CONFIGS["t5"], n_layers=12, n_decoder_layers=7),
    # As many heads of keys and values as of queries, so that the caches take as much as they can
    "deep llama": replace(CONFIGS["llama"], n_layers=12, n_kv_heads=9),
}
RECOMPUTE = replace(FLAGS, recompute=True, dropout=0.0)


# In some of these steps, the peak of a model with three layers lies elsewhere than that of a deep
# one: in the backward pass instead of the forward pass, or in the encoder instead of the decoder.
@counted_with_this_torch
@pytest.mark.parametrize(
    ("kind", "flags", "shape"),
    [
        ("t5", FLAGS, (4, 32, 2, 4)),
        ("gated t5", FLAGS, (4, 32, 2, 4)),
        ("llama", FLAGS, (4, 32, 2, 4)),
        ("deep llama", RECOMPUTE, (4, 64, 1, 4)),
        ("llama", replace(FLAGS, layers="3-"), (4, 32, 2, 4)),
        pytest.param("deep llama", RECOMPUTE, (4, 64, 3, 4), marks=pytest.mark.slow),
        pytest.param("deep t5", RECOMPUTE, (4, 64, 3, 8), marks=pytest.mark.slow),
        # Its choices take turns.
        pytest.param("deep t5", FLAGS, (300, 3, 8, 3), marks=pytest.mark.slow),
    ],
)
def test_layers_beyond_the_fourth_are_like_the_fourth(kind, flags, shape):
    shape = StepShape(*shape)
    embed = SimpleNamespace(weight=torch.zeros(1))
    model = SimpleNamespace(config=DEEP[kind], embed=embed)
    group = SimpleNamespace(model=model, config=flags, n_trained=0, cells=[])
    expected = peak_of_step(DEEP[kind], torch.float32, shape, flags)
    assert step_memory.planned_step(group, shape) == expected


@pytest.mark.parametrize(
    ("depths", "planned_depths"),
    [
        ((3, 5), [(3, 3), (3, 4)]),
        ((5, 4), [(3, 3), (4, 3), (3, 4)]),
        ((2, 9), [(2, 3), (2, 4)]),
        ((1, 3), [(1, 3)]),
    ],
)
def test_a_fourth_layer_is_planned_only_in_a_stack_that_has_it(depths, planned_depths):
    planned = []

    def count(config):
        planned.append((config.n_layers, config.n_decoder_layers))
        return 7 * config.n_layers + 5 * config.n_decoder_layers

    config = replace(CONFIGS["t5"], n_layers=depths[0], n_decoder_layers=depths[1])
    assert extrapolate_depth(count, config) == 7 * depths[0] + 5 * depths[1]
    assert planned == planned_depths


# A T5's own dropout is 0.1, and a LLaMA's is 0, with which a step keeps less.
@pytest.mark.parametrize(
    ("kind", "dropout", "sites"),
    [("t5", None, "k,v,ff,q,o"), ("gated t5", None, ALL_SITES), ("llama", 0.1, ALL_SITES)],
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 100, 4, 8), (64, 12, 30, 2)])
def test_the_bound_is_never_below_the_plan(kind, shape, dropout, sites):
    shape = StepShape(*shape)
    config = replace(FLAGS, dropout=dropout, sites=sites)
    assert upper_bound(CONFIGS[kind], shape) > peak_of_step(
        CONFIGS[kind], torch.float32, shape, config
    )


def test_recomputation_takes_less():
    shape = StepShape(32, 64, 2, 4)
    kept = peak_of_step(CONFIGS["t5"], torch.float32, shape, FLAGS)
    recomputed = peak_of_step(CONFIGS["t5"], torch.float32, shape, replace(FLAGS, recompute=True))
    assert recomputed < kept


# Runs


@pytest.fixture
def plans_once(monkeypatch):
    """Plan each shape once, because three runs plan the same steps."""
    planned = {}

    def plan(model_config, *, shape, **options):
        key = (model_config, shape)
        if key not in planned:
            planned[key] = peaks_of_step(model_config, shape=shape, **options)
        return planned[key]

    monkeypatch.setattr(step_memory, "peaks_of_step", plan)


def test_a_step_that_does_not_fit_is_a_note_with_the_size_that_does(
    tmp_path, capsys, monkeypatch, plans_once
):
    monkeypatch.setattr(step_memory, "free_memory", lambda device: 8e6)
    monkeypatch.setattr(memory_fit, "limited_memory", contextlib.nullcontext)
    assert run(words(tmp_path / "run", batch_size=128, steps=1)) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "a step takes" in line]
    size = int(note.partition("--micro-batch-size ")[2].split()[0])
    assert 1 <= size < 128
    flags = {"batch_size": 128, "steps": 1}
    assert run(words(tmp_path / "fits", micro_batch_size=size, **flags)) == 0
    assert "a step takes" not in capsys.readouterr().out
    assert run(words(tmp_path / "next", micro_batch_size=2 * size, **flags)) == 0
    assert "a step takes" in capsys.readouterr().out  # so the size is the largest power of two


def test_the_plan_has_the_gradients_and_the_moments_of_all_adapters(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_memory, "TRAINED_BYTES", 1e9)
    monkeypatch.setattr(step_memory, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(memory_fit, "limited_memory", contextlib.nullcontext)
    # With one example in a pass, no smaller size is planned.
    assert run(words(tmp_path / "run", seed="0,1,2", steps=1, micro_batch_size=1)) == 0
    loaded = minia3.load_model(model("t5"))
    n_trained = 3 * sum(len(l_1D[0]) for l_1D in minia3.vectors(loaded).values())
    needed = f"a step takes about {memory_fit.OVERHEAD * n_trained:.1f} GB, but 0.9 GB of "
    assert needed in capsys.readouterr().out


def test_a_short_step_is_not_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "planned_step", lambda *_: 0 / 0)
    assert run(words(tmp_path / "run", steps=1)) == 0


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA"), reason="this system has no limit of data")
def test_a_run_that_exceeds_what_is_free_ends_in_one_line_with_the_size(tmp_path):
    data = write(tmp_path / "task", train=rows(20), validation=rows(4))
    out = tmp_path / "run"
    arguments = words(out, task=data, batch_size=2048, steps=1)
    # In a new process, because malloc may have kept enough memory in this one.
    code, err, has_same_limits = in_new_process(run_with_free_memory, 60_000_000, arguments)
    assert code == 1
    assert err.startswith("train.py: out of memory: lower --micro-batch-size (try ")
    assert err.count("\n") == 1
    assert has_same_limits
    assert events(out, "before")  # the run can be looked at, and resumed


def run_with_free_memory(n_bytes, arguments):
    """Run train.py, and return (its exit code, its errors, whether limits are as before)."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    step_memory.free_memory = lambda device: n_bytes
    # Too little, so the step begins. The tests above check a real plan.
    step_memory.planned_step = lambda group, shape: 30_000 * shape.n_examples
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = run(arguments)
    return code, errors.getvalue(), resource.getrlimit(resource.RLIMIT_DATA) == limits


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit of data")
def test_a_limit_of_the_user_stays_if_it_is_lower():
    soft = (1 << 40, resource.RLIM_INFINITY)
    both = (1 << 40, 1 << 40)
    found = in_new_process(limits_of_data, [(soft, 1 << 41), (both, 1 << 41), (both, 1 << 30)])
    (within_soft, after_soft), (within_both, after_both), (within_lower, after_lower) = found
    assert within_soft == after_soft == soft
    assert within_both == after_both == both
    assert within_lower[0] < 1 << 40
    assert after_lower == both


def limits_of_data(cases):
    """Return, for each (limits of data that the user sets, bytes that are free), the limits within
    `limited_memory` and after it."""
    found = []
    for limits, n_bytes in cases:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        with memory_fit.limited_memory(n_bytes):
            within = resource.getrlimit(resource.RLIMIT_DATA)
        found.append((within, resource.getrlimit(resource.RLIMIT_DATA)))
    return found


def test_another_error_of_torch_is_a_bug_and_not_a_message(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("expected all tensors on one device")

    monkeypatch.setattr(train, "choice_logprobs", broken)
    with pytest.raises(RuntimeError, match="one device"):
        run(words(tmp_path / "run", steps=1))


def test_without_a_plan_a_half_of_the_batch_is_offered(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. " + "many words " * 500)

    monkeypatch.setattr(train, "choice_logprobs", full)
    arguments = words(tmp_path / "run", batch_size=6, eval_batch_size=10)
    fails(arguments, capsys, "--micro-batch-size (try 3)", "--eval-batch-size (try 5)", code=1)
    others = "use a smaller model, a shorter --max-length or --recompute: CUDA out"
    arguments = words(tmp_path / "single", micro_batch_size=1, eval_batch_size=10)
    expected = f"out of memory: lower --eval-batch-size (try 5), or {others}"
    fails(arguments, capsys, expected, code=1)
    arguments = words(tmp_path / "both", batch_size=1, eval_batch_size=1)
    fails(arguments, capsys, f"out of memory: {others}", code=1)


def test_a_base_on_the_cpu_may_be_what_takes_its_memory(tmp_path):
    config = train.Config(out=str(tmp_path / "run"), offload=True)
    offloaded = train.Run(config, None)
    offloaded.close("failed")
    error = RuntimeError("CUDA error: out of memory")
    message = memory_fit.out_of_memory_message(error, offloaded)
    assert "or free memory of the CPU, in which --offload keeps the base: CUDA error" in message
    full_device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    message = memory_fit.out_of_memory_message(full_device, offloaded)
    assert "free memory of the CPU" not in message


def test_a_run_that_ran_out_of_memory_continues_with_the_command_that_it_names(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    scored = train.choice_logprobs
    n_passes = []

    def full(*args):
        n_passes.append(None)
        if len(n_passes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scored(*args)

    monkeypatch.setattr(train, "choice_logprobs", full)
    assert run(words(out, save_every=3, eval_batch_size=10)) == 1
    err = capsys.readouterr().err
    command = shlex.split(err.partition("; to continue: python train.py ")[2])
    sizes = {"micro_batch_size": 2, "eval_batch_size": 5}
    assert command == ["--resume", str(out), "--micro-batch-size", "2", "--eval-batch-size", "5"]
    assert run(command) == 0
    assert len(n_passes) == 5 + 2 * 2  # the steps after the fourth, in two passes each
    recorded = json.loads((out / "config.json").read_text())
    assert {name: recorded[name] for name in sizes} == sizes
