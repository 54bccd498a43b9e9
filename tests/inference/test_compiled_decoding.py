"""A step with static shapes writes the tokens of a plain step, and is compiled once."""

import gc
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch_version import counted_with_this_torch
from words import texts, word_tokenizer

import minia3
from minia3.inference import decoding
from minia3.inference.options import Options
from minia3.model.adapter_rows import give_up
from minia3.model.static_state import Room, StaticState, rounded_up, unused_rooms

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
        static = StaticState.make(state, 2, Room())
        found = [model.step(token, static)]
        static.advance()
        found.append(model.step(token, static))
        expected = [model.step(token, state), model.step(token, state)]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


def test_the_state_that_it_starts_from_is_kept_by_nobody(model, monkeypatch):
    """Otherwise its keys and values would stay beside their copies in the Room."""
    monkeypatch.setattr(decoding, "compile_step", lambda model, state: model.step)
    state = model.start(torch.tensor([[5, 6, 7], [8, 9, 4]]))
    kept = weakref.ref(state)
    pairs = decoding.decode_compiled(model, state, 3, set(), end_ids=())
    del state
    for _ in range(2):
        next(pairs)
    assert kept() is not None  # the first step is a plain one
    next(pairs)
    assert kept() is None
    assert len(list(pairs)) == 3


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
        state = StaticState.make(state, 2, Room())
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
        static = StaticState.make(state, 2, Room())
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
    # The second batch has other lengths, and the third has no padding.
    for prompts in (["w3 w4 w5", "w6 w7"], ["w8 w9", "w3 w4 w5 w6 w7"], ["w6 w7", "w3 w4"]):
        expected = minia3.generate(model, tokenizer, prompts, max_new_tokens=9)
        found = minia3.generate(model, tokenizer, prompts, max_new_tokens=9, compile=True)
        assert found == expected
    assert len(graphs) == 1
    torch.compiler.reset()


# What batches share


@pytest.fixture
def states(monkeypatch):
    """Return a list to which each state of static shapes is added. Nothing is compiled."""
    found = []

    def keep(model, state):
        found.append(state)
        return model.step

    monkeypatch.setattr(decoding, "compile_step", keep)
    return found


def addresses(states):
    return [[x.data_ptr() for x in state.tensors_that_stay()] for state in states]


def written_alike(model, tokenizer, prompts, **options):
    """Return whether steps of static shapes write the texts of plain decoding."""
    expected = minia3.generate(model, tokenizer, prompts, max_new_tokens=9, **options)
    found = minia3.generate(model, tokenizer, prompts, max_new_tokens=9, compile=True, **options)
    return found == expected


def test_batches_share_their_shapes_and_addresses(model, tokenizer, states):
    prompts = texts(8, seed=1) + ["w3 w4 w5"] * 4  # the last batch, or the second, has no padding
    adapters = torch.arange(12) % 3
    assert written_alike(model, tokenizer, prompts, batch_size=4, adapter=adapters)
    assert written_alike(model, tokenizer, prompts[::-1], batch_size=4, adapter=adapters)
    assert len(states) == 6
    shapes = [[x.shape for x in state.tensors_that_stay()] for state in states]
    assert shapes == shapes[:1] * 6
    assert addresses(states) == addresses(states[:1]) * 6


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "samples": 2}])
def test_the_last_batch_has_the_rows_of_the_others(options, model, tokenizer, states):
    """It was compiled again for its own number of rows."""
    prompts = texts(9, seed=1)
    adapters = torch.arange(9) % 3
    found = []
    for is_compiled in (False, True):
        cut = set()
        given = Options(max_new_tokens=9, batch_size=4, compile=is_compiled, **options)
        written = decoding.generate_texts(model, tokenizer, prompts, adapters, given, cut)
        found.append((written, cut))
    assert found[0] == found[1]
    n_batches = math.ceil(9 * given.samples / 4)
    assert [len(state.start) for state in states] == [4] * n_batches


def test_addresses_change_only_if_more_memory_is_needed(model, tokenizer, states):
    short, long = texts(4, seed=1), texts(4, seed=2, longest=90)
    for prompts in (short, long, short, long, short[:2]):
        assert written_alike(model, tokenizer, prompts)
    first, *others = addresses(states)
    assert others == others[:1] * 4
    assert first != others[0]
    assert [len(state.start) for state in states] == [4, 4, 4, 4, 2]


def test_nothing_of_the_last_batch_is_read(model, tokenizer, states):
    assert written_alike(model, tokenizer, texts(4, seed=2, longest=90))
    for piece in unused_rooms[model].pieces.values():
        piece.view(torch.uint8).fill_(0xFF)  # NaN, in each dtype of numbers
    assert states[0].caches[0].kv[0].isnan().all()
    assert written_alike(model, tokenizer, texts(4, seed=1))


def test_streams_that_are_read_in_turns_do_not_share_memory(model, tokenizer, states, monkeypatch):
    monkeypatch.setattr(model, "config", replace(model.config, eos_ids=()))
    prompts = ("w3 w4 w5", "w8 w9")
    expected = minia3.generate(model, tokenizer, prompts, max_new_tokens=9)
    streams = []
    for prompt in prompts:
        streams.append(minia3.stream(model, tokenizer, prompt, max_new_tokens=9, compile=True))
    found = ["", ""]
    for _ in range(9):
        for i, pieces in enumerate(streams):
            found[i] += next(pieces, "")
    assert found == expected
    first, second = addresses(states)
    assert not set(first) & set(second)


def test_a_stream_that_is_left_gives_its_memory_back(model, tokenizer, states, monkeypatch):
    monkeypatch.setattr(model, "config", replace(model.config, eos_ids=()))
    for _ in range(2):
        pieces = minia3.stream(model, tokenizer, "w3 w4 w5", max_new_tokens=9, compile=True)
        next(pieces)
        next(pieces)
        assert model not in unused_rooms
        pieces.close()
        assert model in unused_rooms
    assert addresses(states[:1]) == addresses(states[1:])


@pytest.mark.parametrize("like", [{"device": "meta"}, {"dtype": torch.float64}])
def test_a_model_that_is_moved_gets_other_memory(like):
    room = Room()
    x = torch.ones(2, 3)
    before = room.place("x", x, 5, axis=1, empty=7)
    assert before.tolist() == [[1, 1, 1, 7, 7]] * 2
    moved = room.place("x", x.to(**like), 4, axis=1)
    assert (moved.device, moved.dtype) == (x.to(**like).device, x.to(**like).dtype)
    assert moved.shape == (2, 4)
    assert before.tolist() == [[1, 1, 1, 7, 7]] * 2


def test_the_memory_ends_with_its_model(loaded, tokenizer, states):
    model = loaded("llama-gqa", seed=0)
    assert written_alike(model, tokenizer, ["w3 w4 w5"])
    ended = [weakref.ref(model), weakref.ref(unused_rooms[model])]
    states.clear()
    del model
    gc.collect()
    assert [ref() for ref in ended] == [None, None]


def test_numbers_of_columns_are_rounded_up_to_few_numbers():
    numbers = sorted({rounded_up(n) for n in range(1, 4097)})
    assert numbers == [64, 128, 256, 512, 1024, 2048, 3072, 4096]
    for n in (1, 64, 65, 512, 513, 1024, 1025, 2048, 2049):
        assert n <= rounded_up(n) < max(65, 2 * n)


@pytest.mark.parametrize(("max_length", "n_warned"), [(13, None), (12, 13), (100, None)])
def test_columns_that_no_token_needs_are_no_reason_to_warn(
    max_length, n_warned, loaded, tokenizer, states
):
    model = loaded("llama-gqa", seed=0)
    model.config = replace(model.config, max_length=max_length)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minia3.generate(model, tokenizer, ["w3 w4 w5"], max_new_tokens=10, compile=True)
    numbers = [str(warning.message).split()[3] for warning in caught]
    assert numbers == [str(n) for n in [n_warned] if n]
