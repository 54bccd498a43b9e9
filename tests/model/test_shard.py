"""A model that is divided among processes computes what the whole model computes."""

import pytest
import torch
from batches import batch_of
from conftest import randomize
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

import minia3
from minia3.inference.scoring import choice_logprobs
from minia3.model.recompute import recompute_blocks
from minia3.model.shard import Shards, blocks_of
from minia3.training.losses import total_loss

NAMES = ["t5-v1.0", "t5-v1.1", "t5-deep-decoder", "umt5", "llama-gqa", "qwen2", "qwen3"]
LENGTHS = (9, 3, 6, 4, 7, 5, 8, 2)


def all_shards(offload=False):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return Shards(mesh, offload)


def load(folder, shards, quantize=None):
    model = minia3.load_model(
        folder, dtype=torch.float64, n_adapters=3, quantize=quantize, shards=shards
    )
    randomize(model.double(), seed=1)
    minia3.freeze(model)
    return model


def take_rows(batch, rows):
    return type(batch)(*(None if values is None else values[rows] for values in batch))


def step(model, rows, micro_batch_size):
    """Return log-probabilities and gradients of a step on some rows of a batch."""
    model.zero_grad()
    whole = batch_of(LENGTHS, n_choices=3)
    adapter_B = torch.arange(len(LENGTHS)) % 3
    parts = []
    for part in rows.split(micro_batch_size):
        batch = take_rows(whole, part)
        logp_BCL = choice_logprobs(model, batch, adapter_B[part])
        loss = total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B)
        (loss * len(part)).backward()
        parts.append(logp_BCL.detach())
    return torch.cat(parts), [vector.grad for vector in minia3.vectors(model).values()]


def compare_steps(folder, recompute, quantize):
    """Return the largest differences of log-probabilities and of gradients, and what is counted."""
    rank = torch.distributed.get_rank()
    n_processes = torch.distributed.get_world_size()
    rows = torch.arange(len(LENGTHS))[rank::n_processes]
    whole = load(folder, None, quantize)
    sharded = load(folder, all_shards(), quantize)
    if recompute:
        recompute_blocks(blocks_of(sharded))
    size = max(1, len(rows) // 2)
    expected_logp, expected = step(whole, rows, size)
    found_logp, found = step(sharded, rows, size)
    logp_error = (found_logp - expected_logp).abs().max().item()
    scale = max(grad.abs().max() for grad in expected)
    grad_error = max((a - b).abs().max() / scale for a, b in zip(found, expected, strict=True))
    return logp_error, grad_error.item(), sharded.n_passes


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_divided(name, recompute, quantize, peer, tmp_path):
    print(on_ranks(2, tmp_path, compare_steps, peer(name).folder, recompute, quantize))
