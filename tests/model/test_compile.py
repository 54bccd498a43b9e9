"""torch.compile turns each block into one graph for all lengths, and changes no result."""

import pytest
import torch
from batches import batch_of, gradients, same
from conftest import randomize

import minia3
from minia3.inference.scoring import choice_logprobs
from minia3.model.blocks import Block
from minia3.model.more_vectors import choose_vectors

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    # The texts here are short. Plain norms compute some of them whole, and most in pieces.
    monkeypatch.setattr("minia3.model.recompute.N_IN_CACHE", 12 * 24)
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=64):  # as train.py sets it
        yield
    torch.compiler.reset()


def first_blocks(model):
    """Leave one block in each stack, because each block is compiled by itself, in seconds."""
    for module in model.modules():
        if hasattr(module, "blocks"):
            module.blocks = module.blocks[:1]
    return model


def compile_blocks(model, backend, dynamic=True):
    for module in model.modules():
        if isinstance(module, Block):
            # With fullgraph, a break in a graph is an error.
            module.compile(dynamic=dynamic, fullgraph=True, backend=backend)
    return model


# The LLaMA has the vectors of the paper, and the T5 has those of all sites. (No block of a LLaMA
# has a vector that these do not have.)
@pytest.mark.parametrize(
    ("name", "sites"), [("llama-gqa", None), ("t5-v1.1", "k,v,ff,q,o,up,gate")]
)
def test_a_step_has_no_graph_break_and_other_lengths_do_not_compile_again(name, sites, loaded):
    model = first_blocks(loaded(name))
    if sites is not None:
        choose_vectors(model, sites, "0-", True)
    randomize(model, seed=0).train()
    minia3.freeze(model)
    # If two sizes are equal when the compiler makes a graph, it takes them for the same size. So
    # all sizes here differ from one another and from the sizes of the model. Without padding, the
    # graphs are different.
    lengths_that_compile = ((15, 5, 9, 16, 13), (18,) * 7)
    other_lengths = ((4, 9, 2, 2), (12, 3), (8, 8), (5, 5, 5), (30, 1, 1, 1, 1, 2, 9))
    batches = [batch_of(lengths, seed=len(lengths)) for lengths in lengths_that_compile]
    other_batches = [batch_of(lengths, seed=len(lengths)) for lengths in other_lengths]
    expected = [gradients(model, batch) for batch in batches + other_batches]

    graphs = []
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    found = [gradients(model, batch) for batch in batches]
    n_graphs = len(graphs)
    assert n_graphs > 0
    found += [gradients(model, batch) for batch in other_batches]
    assert len(graphs) == n_graphs
    for ours, plain in zip(found, expected, strict=True):
        same(ours, plain)


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_an_evaluation_does_not_compile_again_for_other_lengths_either(name, loaded):
    """PyTorch 2.5 did so, because of its own rms_norm. Without gradients, graphs are different."""
    model = first_blocks(loaded(name, seed=0))
    graphs = []
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    n_graphs = []
    with torch.no_grad():
        for lengths in ((15, 5, 9, 16, 13), (18,) * 7, (17, 9, 2, 2), (19, 3, 8), (20,) * 3):
            choice_logprobs(model, batch_of(lengths, seed=len(lengths)))
            n_graphs.append(len(graphs))
    assert 0 < n_graphs[1] == n_graphs[-1]


def test_a_model_in_torch_s_wrapper_is_refused(loaded):
    with pytest.raises(ValueError, match=r"in the wrapper OptimizedModule.*give its `\._orig_mod`"):
        minia3.merge(torch.compile(loaded("llama-gqa"), backend="eager"))


# A graph for all lengths takes three times as long to make, so only one is made here.
@pytest.mark.parametrize(("name", "dynamic"), [("t5-v1.1", False), ("llama-gqa", True)])
def test_a_compiled_model_has_the_gradients_of_the_plain_model(name, dynamic, loaded):
    model = first_blocks(loaded(name, seed=0))
    batch = batch_of((7, 3, 5))
    minia3.freeze(model)
    expected = gradients(model, batch)
    # T5's encoder has nothing that its decoder does not have, and each block takes seconds.
    compile_blocks(getattr(model, "decoder", model), "aot_eager", dynamic)
    same(gradients(model, batch), expected)


class Logits(torch.nn.Module):
    """A user's own module around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, source):
        state = self.model.start(source)
        return self.model.step(state.start, state)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_module_around_a_model_may_be_compiled_as_a_whole(name, loaded):
    # In float64, because compiled code has norms of its own, which round differently.
    model = first_blocks(loaded(name, seed=0)).double()
    minia3.freeze(model)
    source = torch.arange(2, 14).view(2, 6)
    results = []
    for module in (Logits(model), torch.compile(Logits(model), backend="eager")):
        logits = module(source)
        logits.square().sum().backward()
        results.append([vector.grad.clone() for vector in minia3.vectors(model).values()])
        model.zero_grad()
    plain, compiled = results
    for expected, found in zip(plain, compiled, strict=True):
        torch.testing.assert_close(found, expected)
