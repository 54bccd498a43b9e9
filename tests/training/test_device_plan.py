"""Guards the plan for devices: its bytes are those of real models, whole, quantized and divided,
and of real steps of several processes; and docs/scale.md has the tables that it makes."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make
from optional import require_bitsandbytes
from ranks import on_ranks
from torch_version import counted_with_this_torch, divides_a_quantized_base

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.model.costs import LAYER_FIELDS
from minia3.model.quantized import quantized_linears
from minia3.training.config import Config
from minia3.training.device_plan import (
    WHILE_GATHERED,
    Base,
    Plan,
    fits_one_device,
    recipe_shape,
)
from tests.benchmarks import plans
from tests.benchmarks.sharded import Case, measured_bytes_of_all, planned_bytes

SCALE = Path(minia3.__file__).parents[1] / "docs" / "scale.md"
# nf4 needs widths that are multiples of 64.
WIDE = {
    "t5-v1.0": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "t5-v1.1": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "llama-gqa": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
}
SMALL = replace(KNOWN_MODELS["smollm2-135m"].config, n_layers=2, vocab_size=256)
SHAPE = recipe_shape(2, 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(name, **WIDE[name]).save_pretrained(made[name])
        return made[name]

    return folder


# The base


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("name", WIDE)
def test_the_base_has_the_bytes_of_a_model_that_is_loaded(folders, name, quantize):
    if quantize == "nf4":
        require_bitsandbytes()
    model = minia3.load_model(folders(name), dtype=torch.bfloat16, quantize=quantize)
    vectors = set(minia3.vectors(model).values())
    base = Base(model.config, torch.bfloat16, quantize)
    expected = sum(p.nbytes for p in model.parameters() if p not in vectors)
    assert base.n_bytes == expected
    assert base.n_vectors == sum(vector.numel() for vector in vectors)
    largest = 0
    for linear in quantized_linears(model).values():
        largest = max(largest, linear.to_linear(torch.bfloat16).weight.nbytes)
    assert base.largest_dequantized == largest


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", WIDE)
def test_shares_are_rows_of_what_is_in_a_block_and_all_of_the_rest(folders, name, quantize):
    model = minia3.load_model(folders(name), dtype=torch.bfloat16, quantize=quantize)
    for n_shards in (2, 3, 5):
        expected = 0
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".scale"):
                continue
            tensor = parameter.detach()
            if "blocks." in parameter_name:
                tensor = tensor.chunk(n_shards)[0]
            expected += tensor.numel() * tensor.element_size()
        assert Base(model.config, torch.bfloat16, quantize).share(n_shards) == expected


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", WIDE)
def test_rows_that_are_pinned_take_powers_of_two(folders, name, quantize):
    model = minia3.load_model(folders(name), dtype=torch.bfloat16, quantize=quantize)
    plan = Plan(model.config, torch.bfloat16, quantize)
    for n_shards in (1, 3):
        expected = 0
        for parameter_name, parameter in model.named_parameters():
            if "blocks." in parameter_name and not parameter_name.endswith(".scale"):
                share = parameter.detach().chunk(n_shards)[0]
                expected += 2 ** math.ceil(math.log2(share.numel() * share.element_size()))
        assert plan.on_cpu(n_shards, is_pinned=True) == expected
        assert plan.on_cpu(n_shards) == plan.base.share(n_shards) - plan.base.n_whole
    assert plan.on_cpu(3) < expected  # because thirds are no powers of two


def test_keys_and_values_of_the_source_are_gathered_apart_from_their_block(folders):
    model = minia3.load_model(folders("t5-v1.0"))
    groups = Base(model.config, torch.float32, None).groups
    n_blocks = len(model.encoder.blocks) + 2 * len(model.decoder.blocks)
    assert len(groups) == n_blocks
    block = model.decoder.blocks[0]
    cross = block.cross.k.weight.nbytes + block.cross.v.weight.nbytes
    assert groups["decoder.blocks.0.", True] == cross
    vectors = sum(v.nbytes for name, v in block.named_parameters() if name.endswith(".scale"))
    whole = sum(p.nbytes for p in block.parameters())
    assert groups["decoder.blocks.0.", False] == whole - cross - vectors


def test_groups_that_run_one_after_the_other_are_neighbors(folders):
    """In a decoder, the keys and values of the source come just before the rest of their block."""
    config = minia3.load_model(folders("t5-v1.0")).config
    base = Base(replace(config, n_layers=2, n_decoder_layers=2), torch.float32, None)
    encoder = base.groups["encoder.blocks.0.", False]
    kv = base.groups["decoder.blocks.0.", True]
    decoder = base.groups["decoder.blocks.0.", False]
    assert len({encoder, kv, decoder}) == 3
    expected = [(encoder, encoder), (encoder, kv), (kv, decoder), (decoder, kv), (kv, decoder)]
    assert base.neighbors() == expected


def test_a_block_that_is_alone_counts_as_two():
    base = Base(replace(SMALL, n_layers=1), torch.float32, None)
    (block,) = base.groups.values()
    assert base.neighbors() == [(block, block)]


# The parts


@functools.cache
def small_plan(quantize=None):
    """Return the Plan of a small model. Its activations are planned once, for all kinds of base."""
    plan = Plan(SMALL, torch.bfloat16, quantize)
    if quantize is not None:
        plan.planned = small_plan().planned
    return plan


def test_one_device_holds_the_whole_base_and_several_hold_shares_and_blocks():
    plan = small_plan()
    alone = plan.on_device(1, SHAPE)
    divided = plan.on_device(4, SHAPE)
    block = max(plan.base.groups.values())
    assert alone.weights == plan.base.n_bytes
    assert alone.unsharded == 0
    assert divided.weights == plan.base.share(4)
    assert divided.unsharded == block + WHILE_GATHERED * block
    assert (alone.vectors, alone.activations) == (divided.vectors, divided.activations)
    assert divided.total == sum(divided)


def test_a_quantized_base_has_one_dequantized_weight():
    plan = small_plan("nf4")
    weight = SMALL.d_model * SMALL.d_ff * 2
    block = max(plan.base.groups.values())
    assert plan.on_device(1, SHAPE).unsharded == weight
    gathering = block + WHILE_GATHERED * block
    running = 2 * block + weight
    assert plan.on_device(4, SHAPE).unsharded == max(gathering, running)


def test_offloading_keeps_only_what_belongs_to_no_block_on_the_device():
    plan = small_plan()
    block = max(plan.base.groups.values())
    weight = SMALL.d_model * SMALL.d_ff * 2
    for n_shards in (1, 4):
        kept = plan.on_device(n_shards, SHAPE)
        offloaded = plan.on_device(n_shards, SHAPE, offload=True)
        assert offloaded.weights == plan.base.n_whole
        assert offloaded.weights + plan.on_cpu(n_shards) == kept.weights
        assert offloaded.activations == kept.activations
    assert plan.on_device(1, SHAPE, offload=True).unsharded == block + weight
    assert offloaded.unsharded == kept.unsharded + block / 4
    memory = kept.total / 0.9
    assert plan.largest_batch(4, SHAPE, memory, offload=True) > plan.largest_batch(4, SHAPE, memory)


def test_a_tenth_of_the_memory_stays_free():
    on_device = small_plan().on_device(1, SHAPE)
    assert on_device.fits(on_device.total / 0.9 + 10)
    assert not on_device.fits(on_device.total / 0.9 - 10)


@pytest.mark.slow
def test_recomputation_takes_less_than_keeping_everything():
    recomputed = Plan(SMALL, torch.bfloat16, config=Config(recompute=True)).activations(SHAPE)
    kept = Plan(SMALL, torch.bfloat16, config=Config()).activations(SHAPE)
    assert recomputed < kept


@counted_with_this_torch
@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5-small", "smollm2-135m"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(model):
    """Nearly: large batches are extrapolated, and their logits are computed in parts, so that a
    step of them takes up to a tenth less than in proportion."""
    # More layers are extrapolated from two and three, which test_step_memory.py looks at.
    config = KNOWN_MODELS[model].config
    shallow = {name: 2 for name in LAYER_FIELDS if hasattr(config, name)}
    plan = Plan(replace(config, **shallow), torch.bfloat16)
    memory = 2.5e8
    shape = recipe_shape(1, 128)
    largest = plan.largest_batch(1, shape, memory)
    assert largest > 20
    less = shape._replace(n_examples=int(largest / 1.05))
    more = shape._replace(n_examples=int(largest * 1.1) + 1)
    assert plan.on_device(1, less).fits(memory)
    assert not plan.on_device(1, more).fits(memory)
    assert plan.largest_batch(1, shape, plan.base.n_bytes) == 0


def test_whether_a_model_fits_one_device_depends_on_the_flags():
    config = Config(max_length=32, recompute=True)
    whole = Plan(SMALL, torch.float32, None, config).on_device(1, recipe_shape(1, 32)).total
    memory = whole / 0.9 - 10
    assert not fits_one_device(SMALL, torch.float32, config, memory)
    assert fits_one_device(SMALL, torch.bfloat16, config, memory)
    assert fits_one_device(SMALL, torch.float32, replace(config, quantize="int8"), memory)
    assert fits_one_device(SMALL, torch.float32, config, whole / 0.9 + 10)
    # The batch does not matter: micro-batches can be smaller.
    assert fits_one_device(SMALL, torch.float32, replace(config, batch_size=500), whole / 0.9 + 10)


# Measured, and published

PROCESSES = {
    1: [Case("shallow llama", "int8", offload=True)],
    2: [Case("small t5", "int8", offload=True)],
    4: [Case("small t5"), Case("small llama", "int8", n_per_copy=2)],
}


@divides_a_quantized_base
@pytest.mark.slow
@pytest.mark.parametrize("n_processes", PROCESSES)
def test_processes_take_what_was_planned(n_processes):
    cases = PROCESSES[n_processes]
    measured_by_ranks = on_ranks(n_processes, measured_bytes_of_all, cases, 2)
    for case, *measured_by_rank in zip(cases, *measured_by_ranks, strict=True):
        # A process that waits for others may have one more block for a moment (docs/scale.md).
        measured = min(measured_by_rank)
        whole, planned = planned_bytes(case, n_processes)
        assert 2e6 < whole < 20e6
        assert planned == pytest.approx(measured, rel=0.1), case
        if n_processes > 1:
            assert measured < whole  # so an undivided base would be noticed


SOME_MODELS = ("t5-3b", "llama-2-70b")


@counted_with_this_torch
def test_the_tables_in_the_docs_are_those_that_the_command_prints():
    text = SCALE.read_text(encoding="utf-8")
    for line in (*plans.size_lines(SOME_MODELS), *plans.batch_lines(SOME_MODELS)):
        assert line in text


@counted_with_this_torch
@pytest.mark.slow
def test_all_other_lines_of_the_tables_are_those_that_the_command_prints():
    text = SCALE.read_text(encoding="utf-8")
    models = [model for model in plans.MODELS if model not in SOME_MODELS]
    for line in (*plans.size_lines(models), *plans.batch_lines(models), *plans.by_hand_lines()):
        assert line in text
