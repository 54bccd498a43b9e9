"""Guards the operators that a GPU is told to compute, and how they are counted.

If a number here becomes smaller, that is progress: write it down.
"""

import dataclasses
import json
import tempfile

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of
from running import model, run, task, words
from torch_version import counted_with_this_torch

import minia3
from minia3.inference.decoding import generate
from minia3.inference.scoring import choice_logprobs
from minia3.model.attend import attend
from minia3.model.recompute import rms_norm
from minia3.model.sequence_state import Context
from minia3.training.losses import total_loss
from tests.benchmarks import launches
from tests.benchmarks.inference import Ids
from tests.benchmarks.launches import count, count_one_more, main

LENGTHS = (7, 2, 4)
NAMES = ["t5-v1.0", "llama-gqa"]


def total(operators):
    return sum(operators.values())


# How they are counted


def test_views_allocations_and_reads_launch_nothing():
    x_BD = torch.ones(4, 6)

    def look():
        x_BD.view(2, 12).T[1:].unsqueeze(0).expand(3, -1, -1).detach()
        torch.empty(3, 3)
        x_BD.new_empty(3)
        x_BD[0, 0].item()

    assert count(look) == {}


def test_an_operator_counts_once_forward_and_once_or_twice_backward():
    x_BD = torch.ones(4, 6, requires_grad=True)
    weight_ED = torch.ones(5, 6, requires_grad=True)
    assert count(lambda: F.linear(x_BD, weight_ED))["mm"] == 1
    assert count(lambda: F.linear(x_BD, weight_ED).sum().backward())["mm"] == 3
    assert count(lambda: x_BD.data.mul_(2)) == {"mul_": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_fused_on_cuda_is_one_operator(dtype):
    q_BHLK = torch.randn(2, 3, 1, 8, dtype=dtype)
    context = Context(None, bias_BHLM=torch.zeros(1, 1, 1, 1, dtype=dtype))
    with torch.no_grad():
        options = {"dropout": 0.0, "scale": 1.0}
        assert total(count(lambda: attend(q_BHLK, q_BHLK, q_BHLK, context, **options))) == 1
        assert total(count(lambda: F.rms_norm(q_BHLK, (8,), None, 1e-6))) == 1

    leaf_BHLK = torch.randn(2, 3, 4, 8, dtype=dtype, requires_grad=True)
    grad_BHLK = torch.ones_like(leaf_BHLK)

    def attend_and_back():
        out_BHLK = attend(leaf_BHLK, leaf_BHLK, leaf_BHLK, Context(None), **options)
        torch.autograd.grad(out_BHLK, leaf_BHLK, grad_BHLK)

    additions = {"add": 2}  # of the gradients of queries, keys and values
    backward = "_scaled_dot_product_flash_attention_for_cpu_backward"
    assert count(attend_and_back) == {"scaled_dot_product_attention": 1, backward: 1, **additions}

    x_BD = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    weight_D = torch.ones(6, dtype=dtype)
    grad_BD = torch.ones_like(x_BD)
    assert total(count(lambda: rms_norm(x_BD, weight_D, 1e-6))) == 1
    assert total(count(lambda: rms_norm(x_BD, weight_D, 1e-6).backward(grad_BD))) == 2
    assert x_BD.grad is not None


def test_one_more_is_what_a_step_launches():
    x = torch.ones(3)

    def steps(n):
        x.exp()
        for _ in range(n):
            x.sin().cos()

    assert count_one_more(steps) == {"sin": 1, "cos": 1}


# Ours


@pytest.fixture
def frozen(loaded):
    def get(name, n_adapters=1):
        found = loaded(name, seed=0, n_adapters=n_adapters)
        minia3.freeze(found)
        return found

    return get


def loss_of(ours, batch, adapter=None):
    logp_BCL = choice_logprobs(ours, batch, adapter)
    return total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B)


@counted_with_this_torch
@pytest.mark.parametrize(("name", "most"), [("t5-v1.0", 433), ("llama-gqa", 414)])
def test_a_step_launches_at_most_so_many_operators(frozen, name, most):
    """Two layers per stack, padding, two choices, and three losses; without the update."""
    ours = frozen(name)
    batch = batch_of(LENGTHS)
    assert total(count(lambda: loss_of(ours, batch).backward())) <= most


@counted_with_this_torch
@pytest.mark.parametrize("name", NAMES)
def test_many_adapters_launch_what_five_launch(frozen, name):
    """Forward and backward, with one example each, and the losses of all examples together."""
    found = []
    for n_adapters in (5, 25):
        ours = frozen(name, n_adapters)
        batch = batch_of([2 + i % 3 for i in range(n_adapters)])
        rows = torch.arange(n_adapters)
        found.append(count(lambda a=ours, b=batch, c=rows: loss_of(a, b, c).backward()))
    assert found[0] == found[1]


@counted_with_this_torch
@pytest.mark.parametrize(("name", "most"), [("t5-v1.0", 85), ("llama-gqa", 97)])
def test_a_token_launches_at_most_so_many_operators(frozen, name, most):
    ours = frozen(name)
    ours.config = dataclasses.replace(ours.config, eos_ids=())  # no token ends a text
    prompts = [[3, 4, 5], [6, 7]]

    def write(n_tokens):
        generate(ours, Ids(), prompts, max_new_tokens=n_tokens)

    assert total(count_one_more(write)) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_step_of_a_grid_launches_as_many_operators_for_4_cells_as_for_2(name, tmp_path):
    found = []
    for n_cells in (2, 4):
        seeds = ",".join(map(str, range(n_cells)))

        def train(n_steps, seeds=seeds):
            out = tempfile.mkdtemp(dir=tmp_path) + "/run"
            flags = {"model": model(name), "task": task(), "seed": seeds, "dtype": "float32"}
            assert run(words(out, steps=n_steps, **flags)) == 0

        found.append(count_one_more(train))
    assert found[0] == found[1]


# The table


@pytest.mark.slow
def test_every_line_of_the_table_works_on_shallow_models(tmp_path, capsys, monkeypatch):
    # Two adapters are enough: a test above sees that more launch as many operators.
    monkeypatch.setattr(launches, "FEWER", 1)
    monkeypatch.setattr(launches, "N_TASKS", 2)
    file = tmp_path / "launches.json"
    main(["--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    assert len(result) == 10
    # With the fused operators alone, these numbers would be at most 48.
    assert all(min(sides["ours"], sides["theirs"]) > 60 for sides in result.values())
    assert capsys.readouterr().out.count("\n| ") == len(result)
