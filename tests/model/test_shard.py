"""A model that is divided among processes computes what the whole model computes."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from batches import batch_of
from conftest import make, randomize, tokens
from optional import require_bitsandbytes
from ranks import my_shards, on_ranks
from torch.utils._pytree import tree_leaves
from torch_version import divides_a_base, divides_a_quantized_base

import minia3
from minia3.files.processes import FOREVER, add_over_processes, n_processes, rank
from minia3.inference import scoring
from minia3.inference.decoding import decode_tokens
from minia3.inference.scoring import choice_logprobs
from minia3.model.blocks import blocks_of
from minia3.model.recompute import recompute_blocks
from minia3.model.shard import is_divided, reset_passes
from minia3.training.losses import count_terms, total_loss

pytestmark = divides_a_base

NAMES = ["t5-deep-decoder", "umt5", "llama-gqa", "qwen2", "qwen3", "mistral"]
# These two are divided by four processes, also into two copies of two processes each.
OTHER_NAMES = ["t5-v1.0", "llama-odd"]
# One of two processes begins with two sources of one token, of which a LLaMA reads nothing.
LENGTHS = (9, 1, 6, 1, 7, 5, 8, 2)
N_CHOICES = 3
PLAIN = (None, False, False)  # quantize, recompute, offload


def load(folder, shards=None, quantize=None):
    model = minia3.load_model(
        folder, dtype=torch.float64, n_adapters=3, quantize=quantize, shards=shards
    ).double()
    minia3.freeze(model)
    return randomize(model, seed=1)


def step(model, rows, size):
    """Return log-probabilities and gradients of these rows of a step, in parts of `size`."""
    whole = batch_of(LENGTHS, N_CHOICES)
    n_terms = count_terms(whole.target_mask_BCL, whole.label_B)
    adapter_B = torch.arange(len(LENGTHS)) % 3
    parts = []
    for part in rows.split(size):
        batch = type(whole)(*(values[part] for values in whole))
        logp_BCL = choice_logprobs(model, batch, adapter_B[part])
        total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B, n_terms=n_terms).backward()
        parts.append(logp_BCL.detach())
    return torch.cat(parts), [vector.grad for vector in minia3.vectors(model).values()]


def written(model):
    """Return (row, token) of texts that a model writes for padded prompts, greedily."""
    mask_BM = torch.arange(7) < torch.tensor([[7], [3], [5]])
    state = model.start(tokens(3, 7), mask_BM, torch.tensor([0, 2, 1]))
    return list(decode_tokens(model, state.repeat(2), 6, set()))


def outcomes(folders, variants, n_per_copy=None):
    """Return what divided models compute: log-probabilities, gradients, texts, and passes."""
    rows = torch.arange(len(LENGTHS))[rank() :: n_processes()]
    found = {}
    for folder in folders:
        for quantize, recompute, offload in variants:
            model = load(folder, my_shards(n_per_copy, offload), quantize)
            if recompute:
                recompute_blocks(blocks_of(model))
            logp, gradients = step(model, rows, max(1, len(rows) // 2))
            for gradient in gradients:
                add_over_processes(gradient)
            key = folder, quantize, recompute, offload
            found[key] = logp, gradients, written(model), reset_passes(model)
    return found


def off(found, expected):
    """Return the largest difference, relative to the largest expected number."""
    scale = max(x.abs().max() for x in expected)
    return max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) / scale


def check(results):
    """Compare what each process has found with what the whole model computes."""
    for folder, quantize, recompute, offload in results[0]:
        whole = load(folder, None, quantize)
        logp, gradients = step(whole, torch.arange(len(LENGTHS)), len(LENGTHS))
        texts = written(whole)
        n_passes = set()
        for number, found in enumerate(results):
            our_logp, our_gradients, our_texts, n = found[folder, quantize, recompute, offload]
            assert off([our_logp], [logp[number :: len(results)]]) < 1e-12
            assert off(our_gradients, gradients) < 1e-12
            assert our_texts == texts
            n_passes.add(n)
        assert len(n_passes) == 1


@pytest.mark.slow
def test_two_processes_compute_what_the_whole_model_computes(peer):
    folders = [peer(name).folder for name in NAMES]
    check(on_ranks(2, outcomes, folders, [PLAIN]))


@divides_a_quantized_base
@pytest.mark.slow
def test_recomputed_offloaded_and_quantized_models_compute_the_same_divided(peer):
    folders = [peer(name).folder for name in ("t5-v1.1", "llama-gqa")]
    variants = [(None, True, False), (None, False, True), ("int8", False, False)]
    variants += [("int8", True, True)]
    check(on_ranks(2, outcomes, folders, variants))


@divides_a_quantized_base
@pytest.mark.slow
def test_a_base_in_nf4_computes_the_same_divided(tmp_path):
    require_bitsandbytes()
    make("t5-v1.1", d_model=64, d_kv=16, d_ff=192).save_pretrained(tmp_path)
    check(on_ranks(2, outcomes, [tmp_path], [("nf4", False, False)]))


@pytest.mark.slow
@pytest.mark.parametrize("n_per_copy", [4, 2])
def test_four_processes_compute_the_same_in_one_copy_or_in_two(n_per_copy, peer):
    # llama-odd has 1 key/value head of 10 entries, and a feed-forward of 37: rows that 4 processes
    # cannot divide evenly.
    folders = [peer(name).folder for name in OTHER_NAMES]
    check(on_ranks(4, outcomes, folders, [PLAIN], n_per_copy))


def group_of_copy(n_per_copy):
    """Return the processes that hold a copy with this one, and how long they wait for each other.

    The times are those of gloo, which is all that a CPU has.
    """
    group = my_shards(n_per_copy).mesh.get_group()
    gloo = group._get_backend(torch.device("cpu"))
    return torch.distributed.get_process_group_ranks(group), gloo.options._timeout


@pytest.mark.parametrize(("n_per_copy", "copies"), [(4, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]])])
def test_processes_wait_for_each_other_as_long_as_it_takes(n_per_copy, copies):
    """torch's own timeouts are 10 minutes with NCCL, and 30 with gloo."""
    found = on_ranks(4, group_of_copy, n_per_copy)
    expected = [(copy, FOREVER) for copy in copies for _ in copy]
    assert found == expected


@pytest.mark.slow
def test_a_process_alone_keeps_its_rows_on_the_cpu(peer):
    folders = [peer(name).folder for name in ("t5-v1.0", "llama-gqa")]
    check(on_ranks(1, outcomes, folders, [(None, False, True)]))


def rows_beside_a_mesh_of_another_device():
    """Return rows on the CPU as a part of a weight whose mesh is of another kind of device."""
    shards = my_shards(offload=True)
    name = "_device_type" if hasattr(shards.mesh, "_device_type") else "device_type"
    setattr(shards.mesh, name, "meta")  # in the place of "cuda"
    # torch 2.15 asks for the number of such devices.
    torch.distributed.device_mesh._get_device_handle = lambda _: torch.cpu
    rows = torch.arange(6.0).view(3, 2)[shards.rows(3)]
    weight = shards.join(rows, (3, 2))
    return tuple(weight.shape), weight.device.type, weight.to_local()


def test_offloaded_rows_stay_on_the_cpu_whatever_the_device_that_computes():
    found = on_ranks(2, rows_beside_a_mesh_of_another_device)
    for (shape, device, rows), expected in zip(found, ([[0, 1], [2, 3]], [[4, 5]]), strict=True):
        assert (shape, device) == ((3, 2), "cpu")
        assert rows.tolist() == expected


def tensors_that_are_moved(folder):
    """Return the tensors that FSDP2 would have moved to the device if it were a GPU."""
    moved = []

    def note(args, options, *_):
        moved.extend([args, options])
        return (args,), (options,)

    model = load(folder, my_shards())
    step(model, torch.arange(len(LENGTHS)), len(LENGTHS))  # which prepares FSDP2
    model._get_fsdp_state()._device = SimpleNamespace(type="cuda")
    with mock.patch("torch.distributed.fsdp._fully_shard._fsdp_state._to_kwargs", note):
        step(model, torch.arange(len(LENGTHS)), len(LENGTHS))
        written(model)
    assert moved, "FSDP2 has changed: it no longer looks at arguments"
    return [value for value in tree_leaves(moved) if isinstance(value, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_masks_and_adapters_stay_on_the_cpu_until_they_are_needed(name, peer):
    """FSDP2 would copy them to a GPU, and wait for the copies."""
    for tensors in on_ranks(2, tensors_that_are_moved, peer(name).folder):
        # Tokens alone, which are there already
        assert {(tensor.dtype, tensor.dim()) for tensor in tensors} == {(torch.int64, 2)}


# One choice, or several


def batch_with_choices(n_choices):
    """Return a batch whose examples have only the first `n_choices` of three choices."""
    batch = batch_of(LENGTHS, 3)
    return batch._replace(
        target_BCL=batch.target_BCL[:, :n_choices],
        target_mask_BCL=batch.target_mask_BCL[:, :n_choices],
    )


def scores_of_choices(folder, numbers):
    """Return this process's log-probabilities of its number of choices, and the passes made."""
    model = load(folder, my_shards())
    logp_BCL = choice_logprobs(model, batch_with_choices(numbers[rank()]))
    logp_BCL.sum().backward()  # which gathers the weights again
    return logp_BCL.detach(), reset_passes(model)


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "n_passes"), [((1, 1), 1), ((1, 3), 2)])
def test_a_llama_makes_one_pass_if_no_process_has_several_choices(numbers, n_passes, peer):
    folder = peer("llama-gqa").folder
    results = on_ranks(2, scores_of_choices, folder, numbers)
    whole = load(folder)
    for n_choices, (logp_BCL, n) in zip(numbers, results, strict=True):
        assert n == n_passes
        expected = choice_logprobs(whole, batch_with_choices(n_choices))
        assert off([logp_BCL], [expected.detach()]) < 1e-12


# Processes that disagree


def message_of_unequal_steps(folder, is_after):
    """Return what happens if process 0 makes more passes than the others, or the others more."""
    model = load(folder, my_shards())
    has_more = (rank() == 0) == is_after
    size = 2 if has_more else 4
    try:
        step(model, torch.arange(4), size)
        reset_passes(model)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_unequal_numbers_of_passes_are_an_error_and_not_wrong_gradients(name, is_after, peer):
    messages = on_ranks(2, message_of_unequal_steps, peer(name).folder, is_after)
    for message in messages:
        assert "out of step: their passes are [" in message
    assert len(set(messages)) == 1


# How much is whole at once


def most_whole_groups(folders):
    """Return (the most groups that are whole at once in a step, the number of groups)."""
    found = []
    for n_side_by_side in (512, 4):
        scoring.MAX_SIDE_BY_SIDE = n_side_by_side
        for folder in folders:
            model = load(folder, my_shards())
            counts, n_groups = watch_groups(model)
            step(model, torch.arange(len(LENGTHS)), len(LENGTHS))
            found.append((max(counts), n_groups))
    return found


def watch_groups(model):
    """Return a list, to which a step adds how many groups are whole, and the number of groups."""
    linears = []
    for block in blocks_of(model):
        linears.append(block.attn.q)
        if block.cross is not None:
            linears.append(block.cross.k)
    counts = []

    def count(*_):
        counts.append(sum(not is_divided(linear.weight) for linear in linears))

    for block in blocks_of(model):
        for module in block.modules():
            module.register_forward_pre_hook(count)
            module.register_forward_hook(count)
    for vector in minia3.vectors(model).values():
        vector.register_hook(count)
    return counts, len(linears)


@pytest.mark.slow
def test_one_group_is_whole_at_a_time_even_if_choices_would_take_turns(peer):
    # Elsewhere choices take turns, which are computed again in the backward pass. There, FSDP2
    # drops nothing: the whole decoder would be in memory.
    folders = [peer(name).folder for name in ("t5-deep-decoder", "umt5-tied", "llama-gqa")]
    for found in on_ranks(2, most_whole_groups, folders):
        for n_whole, n_groups in found:
            assert n_whole == 1 < n_groups
