"""A step with static shapes writes the tokens of a plain step, and is compiled once."""

from dataclasses import replace

import pytest
import torch
from torch_version import counted_with_this_torch
from words import texts, word_tokenizer

import minia3
from minia3.inference import decoding
from minia3.model.adapter_rows import give_up

NAMES = ("t5-v1.0", "t5-v1.1", "umt5", "llama-gqa", "mistral", "qwen3")
OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3, "samples": 3},
    {"temperature": 0.7, "seed": 3, "top_p": 0.9, "stop": "w7", "batch_size": 4},
]


@pytest.fixture(params=NAMES)
def model(request, loaded):
    return loaded(request.param, n_adapters=3, seed=0, dtype=torch.float64)


@pytest.fixture
def tokenizer():
    return word_tokenizer(ends=True)


def count_graphs(graphs):
    """Return a `compile_step` that keeps each graph that torch makes."""
    compile_step = decoding.compile_step

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    return lambda model, state: compile_step(model, state, keep)


@pytest.mark.parametrize("options", OPTIONS)
def test_static_shapes_change_no_token(options, model, tokenizer, monkeypatch):
    steps = []

    def plain_step(model, state):
        steps.append([x.shape for x in state.tensors_that_stay()])
        return model.step

    monkeypatch.setattr(decoding, "compile_step", plain_step)
    prompts = texts(7, seed=1)  # of 1 to 9 words, so batches are padded
    given = {"adapter": torch.arange(7) % 3, "max_new_tokens": 9, **options}
    expected = minia3.generate(model, tokenizer, prompts, **given)
    assert minia3.generate(model, tokenizer, prompts, compile=True, **given) == expected
    assert steps
    assert len(set(expected)) > 1


def test_a_stream_and_prompts_of_one_token(model, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding, "compile_step", lambda model, state: model.step)
    for prompt in ("w9", "w3 w4 w5 w6"):
        expected = minia3.generate(model, tokenizer, [prompt], max_new_tokens=9)[0]
        pieces = minia3.stream(model, tokenizer, prompt, max_new_tokens=9, compile=True)
        assert "".join(pieces) == expected
    assert minia3.generate(model, tokenizer, ["w9"], max_new_tokens=1, compile=True)


def test_a_stream_that_begins_in_inference_mode_may_go_on_outside_of_it(
    model, tokenizer, monkeypatch
):
    monkeypatch.setattr(decoding, "compile_step", lambda model, state: model.step)
    monkeypatch.setattr(model, "config", replace(model.config, eos_ids=()))
    expected = minia3.generate(model, tokenizer, ["w3 w4 w5"], max_new_tokens=9)[0]
    pieces = minia3.stream(model, tokenizer, "w3 w4 w5", max_new_tokens=9, compile=True)
    with torch.inference_mode():
        text = next(pieces) + next(pieces)  # the second step is the first with static shapes
    assert text + "".join(pieces) == expected


def test_the_state_that_it_starts_from_stays(model):
    source = torch.tensor([[5, 6, 7], [8, 9, 0]])
    state = model.start(source, source > 0)
    with torch.no_grad():
        logits = model.step(state.start, state)
        token = logits.argmax(-1)
        static = decoding.StaticState.make(state, 2)
        found = [model.step(token, static)]
        static.advance()
        found.append(model.step(token, static))
        expected = [model.step(token, state), model.step(token, state)]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


def tensors_of(state):
    """Return the tensors of a state and of its caches, but for those that no step reads."""
    values = [value for name, value in vars(state).items() if name not in ("start", "owner_M")]
    for cache in state.caches:
        values += [cache.column_1, *cache.kv, *(cache.cross_kv or ())]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.slow
def test_no_tensor_of_a_state_is_copied_for_each_step(model):
    """A CUDA graph copies its inputs, unless torch knows that their addresses stay."""
    source = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with torch.no_grad():
        state = model.start(source, source > 0)
        model.step(state.start, state)
        state = decoding.StaticState.make(state, 2)
        decoding.compile_step(model, state, backend="eager")
    kinds = {getattr(x, "_dynamo_static_input_type", None) for x in tensors_of(state)}
    assert kinds == {"unguarded"}, "another batch would compile the step again"


def test_a_step_prepares_no_keys_and_values_of_the_source_again(loaded):
    """Otherwise a compiled step would trace this, and switch gradients on for it."""
    model = loaded("t5-v1.1", seed=0)
    source = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with torch.no_grad():
        state = model.start(source, source > 0)
        model.step(state.start, state)
        static = decoding.StaticState.make(state, 2)
        before = [cache.cross_kv for cache in static.caches]
        model.step(state.start, static)
    for cache, cross_kv in zip(static.caches, before, strict=True):
        assert cache.cross_kv is cross_kv
        assert all(x.is_contiguous() for x in cross_kv)


def test_a_beam_search_is_not_compiled(model, tokenizer):
    with pytest.raises(ValueError, match="beams is 2, expected 1: a beam search is not compiled"):
        minia3.generate(model, tokenizer, ["w3"], beams=2, compile=True)


def test_a_divided_model_is_not_compiled(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "shards", "of some processes", raising=False)
    with pytest.raises(ValueError, match="compile cannot be combined with --shard"):
        minia3.generate(model, tokenizer, ["w3"], compile=True)


def test_an_adapter_that_is_removed_meanwhile_is_an_error(model, tokenizer, monkeypatch):
    steps = []

    def step_and_remove(tokens, state):
        assert state.adapter_numbers == ()  # a step is not compiled for each of them
        steps.append(tokens)
        give_up(1, model)
        return model.step(tokens, state)

    monkeypatch.setattr(decoding, "compile_step", lambda model, state: step_and_remove)
    with pytest.raises(ValueError, match="the adapter of row 1 was removed"):
        minia3.generate(model, tokenizer, ["w3"], adapter=1, max_new_tokens=5, compile=True)
    assert len(steps) == 1


@counted_with_this_torch
@pytest.mark.slow
def test_batches_of_many_shapes_are_all_compiled(loaded, tokenizer, monkeypatch):
    torch.compiler.reset()
    graphs = []
    monkeypatch.setattr(decoding, "compile_step", count_graphs(graphs))
    model = loaded("llama-gqa", seed=0, n_adapters=3)
    with torch._dynamo.config.patch(cache_size_limit=2):
        for n in (1, 2, 3):
            prompts = ["w3 w4"] * n
            options = {"adapter": torch.arange(n), "max_new_tokens": 3}
            expected = minia3.generate(model, tokenizer, prompts, **options)
            assert minia3.generate(model, tokenizer, prompts, compile=True, **options) == expected
            assert len(graphs) == n
    torch.compiler.reset()


@counted_with_this_torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_all_steps_are_one_graph_without_a_break(name, loaded, tokenizer, monkeypatch):
    torch.compiler.reset()
    graphs = []
    monkeypatch.setattr(decoding, "compile_step", count_graphs(graphs))
    model = loaded(name, seed=0)
    prompts = ["w3 w4 w5", "w6 w7"]
    expected = minia3.generate(model, tokenizer, prompts, max_new_tokens=9)
    for _ in range(2):  # the second time, it is compiled already
        found = minia3.generate(model, tokenizer, prompts, max_new_tokens=9, compile=True)
        assert found == expected
    assert len(graphs) == 1
    torch.compiler.reset()
