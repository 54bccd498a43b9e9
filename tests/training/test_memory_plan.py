"""Guards the plan of memory: it equals, byte for byte, what the counter sees when the same steps
run on real tensors; and the counter itself is right about tensors that come and go."""

from dataclasses import replace

import pytest
import torch

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import choice_logprobs
from minia3.model import attend
from minia3.model.ia3 import freeze, vectors
from minia3.tasks.batches import Batch
from minia3.training.memory_plan import MemoryCounter, planned_logprobs, planned_memory
from minia3.training.optimizer import Adafactor

SMALL_T5 = replace(KNOWN_MODELS["t5-small"].config, n_layers=2, n_decoder_layers=2, vocab_size=256)
SMALL_GATED_T5 = replace(
    KNOWN_MODELS["flan-t5-small"].config, n_layers=2, n_decoder_layers=2, vocab_size=256
)
SMALL_LLAMA = replace(KNOWN_MODELS["smollm2-135m"].config, n_layers=2, vocab_size=256)
CONFIGS = {"t5": SMALL_T5, "gated t5": SMALL_GATED_T5, "llama": SMALL_LLAMA}


def real_model(config, dtype):
    """A model whose weights are real, and so small that nothing overflows."""
    model = build_model(config)
    for name, p in list(model.named_parameters()):
        is_vector = name.endswith(".scale")
        value = torch.full(p.shape, 0.01, dtype=torch.float32 if is_vector else dtype)
        place_parameter(model, name, value)
    return model


def counter_of(model, tokens_BL):
    """A counter that knows the parameters of a model, and the tokens, already."""
    counter = MemoryCounter()
    for tensor in (*model.parameters(), tokens_BL):
        counter.add(tensor)
    return counter


# The equation


@pytest.fixture
def planned_attention(monkeypatch):
    """The plan has our own attention only under dropout, on one core."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(attend, "products_are_faster", lambda q, k, bias, dropout: dropout > 0)


@pytest.mark.usefixtures("planned_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plan_of_serving_equals_the_peak_of_a_real_step(kind, dtype):
    model = real_model(CONFIGS[kind], dtype)
    tokens_BL = torch.ones(4, 48, dtype=torch.long)
    with counter_of(model, tokens_BL) as counter, torch.no_grad():
        state = model.eval().start(tokens_BL)
        model.step(state.start, state)
    planned = planned_memory(CONFIGS[kind], dtype, 4, 48, is_training=False)
    assert planned == counter.peak


@pytest.mark.parametrize("kind", ["t5", "gated t5"])
def test_serving_keeps_nothing_of_an_encoder_but_its_output(kind):
    """So each further layer takes only its weights."""
    found = []
    expected = []
    for n_layers in (2, 5):
        config = replace(CONFIGS[kind], n_layers=n_layers)
        found.append(planned_memory(config, torch.float32, 4, 48, is_training=False))
        expected.append(sum(p.nbytes for p in build_model(config).parameters()))
    assert found[1] - found[0] == expected[1] - expected[0]


@pytest.mark.slow
@pytest.mark.usefixtures("planned_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plan_of_training_equals_the_peak_of_real_steps(kind, dtype, monkeypatch):
    """Two steps, because Adafactor has its moments from the first one on."""
    monkeypatch.setattr("minia3.model.gated_hidden.N_IN_CACHE", 10**9)  # all at once, as on a GPU
    model = real_model(CONFIGS[kind], dtype).train()
    freeze(model)
    optimizer = Adafactor(list(vectors(model).values()), lr=1e-3)
    tokens_BL = torch.ones(4, 48, dtype=torch.long)
    with counter_of(model, tokens_BL) as counter:
        for _ in range(2):
            planned_logprobs(model, tokens_BL, tokens_BL[:, :8]).sum().backward()
            optimizer.step()
            model.zero_grad()
    planned = planned_memory(CONFIGS[kind], dtype, 4, 48, is_training=True)
    assert planned == counter.peak


def test_a_plan_does_not_depend_on_the_number_of_cores(monkeypatch):
    planned = [planned_memory(SMALL_T5, torch.float32, 4, 480, is_training=True)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    planned.append(planned_memory(SMALL_T5, torch.float32, 4, 480, is_training=True))
    assert planned[0] == planned[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_attention_to_short_texts_takes_no_more_than_the_plan(kind, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)  # all rows at once
    model = real_model(CONFIGS[kind], torch.bfloat16).train()
    freeze(model)
    tokens_BL = torch.ones(4, 48, dtype=torch.long)
    with counter_of(model, tokens_BL) as counter:
        planned_logprobs(model, tokens_BL, tokens_BL[:, :8]).sum().backward()
    assert counter.peak <= planned_memory(CONFIGS[kind], torch.bfloat16, 4, 48, is_training=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_planned_log_probabilities_are_those_of_training(kind):
    model = real_model(CONFIGS[kind], torch.float64)
    source_BM = torch.arange(4 * 7).view(4, 7)
    target_BL = torch.arange(4 * 3).view(4, 3)
    batch = Batch(
        source_BM,
        torch.ones_like(source_BM, dtype=torch.bool),
        target_BL[:, None],
        torch.ones_like(target_BL[:, None], dtype=torch.bool),
        torch.zeros(4, dtype=torch.long),
    )
    expected = choice_logprobs(model, batch)[:, 0]
    assert torch.equal(planned_logprobs(model, source_BM, target_BL), expected)


def test_a_model_of_any_size_is_planned_on_any_machine():
    config = replace(SMALL_LLAMA, vocab_size=10**10)
    planned = planned_memory(config, torch.bfloat16, 1, 8, is_training=False)
    assert planned > 2 * config.vocab_size * config.d_model


# The counter


def test_the_counter_follows_tensors_that_come_and_go():
    with MemoryCounter() as counter:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        assert (counter.now, counter.peak) == (6000, 6000)
        del first
        assert (counter.now, counter.peak) == (2000, 6000)
        third = second + 1
        assert (counter.now, counter.peak) == (4000, 6000)
        del second, third
        assert (counter.now, counter.peak) == (0, 6000)


def test_the_counter_counts_a_storage_once():
    with MemoryCounter() as counter:
        whole = torch.zeros(1000)
        views = [whole[:10], whole.reshape(10, 100), whole.detach()]
        whole += 1
        assert counter.now == 4000
        del whole
        assert counter.now == 4000  # a view keeps all of it alive
        views.clear()
        assert counter.now == 0
