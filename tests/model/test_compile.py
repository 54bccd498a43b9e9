"""torch.compile takes each block as one graph, whatever the lengths, and changes no result."""

import pytest
import torch
from batches import batch_of, gradients, same

import minia3
from minia3.model.blocks import Block

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler():
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 64  # as train.py sets it
    yield
    torch.compiler.reset()


def compile_blocks(model, backend):
    for module in model.modules():
        if isinstance(module, Block):
            # With fullgraph, a break in a graph is an error.
            module.compile(dynamic=True, fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_step_has_no_graph_break_and_other_lengths_compile_nothing_again(name, loaded):
    model = loaded(name, seed=0).train()
    minia3.freeze(model)
    graphs = []
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    # The compiler takes sizes that are equal when it makes a graph for one size. So no size here
    # equals another, or one of the model's.
    gradients(model, batch_of((15, 5, 9, 16, 13)))
    gradients(model, batch_of((18,) * 7))  # nothing is padded, so these are other graphs
    n_graphs = len(graphs)
    assert n_graphs > 0
    for lengths in ((4, 9, 2, 2), (12, 3), (8, 8), (5, 5, 5), (30, 1, 1, 1, 1, 2, 9)):
        gradients(model, batch_of(lengths, seed=len(lengths)))
    assert len(graphs) == n_graphs


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_compiled_model_has_the_plain_model_s_gradients(name, loaded):
    model = loaded(name, seed=0)
    batch = batch_of((7, 3, 5))
    minia3.freeze(model)
    expected = gradients(model, batch)
    same(gradients(compile_blocks(model, "aot_eager"), batch), expected)
