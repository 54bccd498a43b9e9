"""Guards (IA)^3 itself: one row of factors per adapter, each example scaled by its own; ones are the base model bit for
bit, a mixed batch is each row alone, only the vectors learn, and they learn what PEFT's do."""

import pytest
import torch
import torch.nn.functional as F
from conftest import PEERS, T5_PEERS, double, logits, off, randomize, tokens, with_peft
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.adapters.rows import load_adapter
from minia3.adapters.vector_names import PEFT
from minia3.checkpoints.tensor_names import expand
from minia3.model.ia3 import IA3

BOTH = ["t5-v1.1", "llama-gqa"]


def test_each_example_is_multiplied_by_the_row_of_its_adapter():
    ia3 = IA3(3, n_adapters=2)
    ia3.scale.data = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.5]])
    x = torch.arange(12.0).reshape(2, 2, 3)
    expected = torch.stack((x[0] * ia3.scale[1], x[1] * ia3.scale[0]))
    assert torch.equal(ia3(x, torch.tensor([1, 0])), expected)


def test_a_new_row_is_all_ones_in_float32():
    scale = IA3(3, n_adapters=2).scale
    assert torch.equal(scale, torch.ones(2, 3))
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_the_base_bit_for_bit(loaded, monkeypatch, name, dtype):
    model = loaded(name, n_adapters=2, dtype=dtype)
    source, target = tokens(2, 7), tokens(2, 4, seed=1)
    found = logits(model, source, None, target, adapter=1)
    monkeypatch.setattr(IA3, "forward", lambda self, x, adapter: x)
    assert torch.equal(found, logits(model, source, None, target))


@pytest.mark.parametrize("name", BOTH)
def test_vectors_are_float32_and_keep_small_updates_in_a_bfloat16_model(loaded, name):
    model = loaded(name, dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith(".scale")} == {
        torch.bfloat16
    }
    for vector in minia3.vectors(model).values():
        assert vector.dtype == torch.float32
        vector.data += 1e-3
        assert (vector > 1).all()
    assert logits(model, tokens(1, 3), None, tokens(1, 2)).dtype == torch.bfloat16


def test_vectors_are_named_by_their_place_and_hold_one_row_per_adapter(loaded):
    t5 = minia3.vectors(loaded("t5-wide", n_adapters=3))
    self_attention = [f"blocks.0.attn.{x}" for x in ("l_k", "l_v")]
    assert [n for n in t5 if n.startswith("decoder.")] == [
        f"decoder.{n}"
        for n in (*self_attention, "blocks.0.cross.l_k", "blocks.0.cross.l_v", "blocks.0.ffn.l_ff")
    ]
    assert len(t5) == 3 * 3 + 5
    assert {n.rsplit(".", 1)[1]: tuple(v.shape) for n, v in t5.items()} == {
        "l_k": (3, 40),
        "l_v": (3, 40),
        "l_ff": (3, 40),
    }
    llama = minia3.vectors(loaded("llama-odd", n_adapters=2))
    assert {n: tuple(v.shape) for n, v in llama.items() if n.startswith("blocks.1.")} == {
        **{"blocks.1.attn.l_k": (2, 10), "blocks.1.attn.l_v": (2, 10), "blocks.1.ffn.l_ff": (2, 37)}
    }


def test_freeze_goes_by_type_and_not_by_name():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.l_k = torch.nn.Linear(2, 2)
            self.other = IA3(2)

    model = Model()
    minia3.freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["other.scale"]
    model.other.scale.requires_grad_(False)
    minia3.freeze(model)
    assert model.other.scale.requires_grad


def loss_of(logits_BLV, target_BL):
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten())


@pytest.mark.parametrize("name", PEERS)
def test_only_vectors_get_gradients_and_rows_of_absent_adapters_get_exactly_zero(loaded, name):
    model = loaded(name, n_adapters=4, seed=0)
    minia3.freeze(model)
    target = tokens(2, 5, seed=1)
    state = model.start(tokens(2, 6), adapter=torch.tensor([3, 1]))
    loss_of(model.step(torch.cat((state.start, target[:, :-1]), dim=1), state), target).backward()
    vectors = minia3.vectors(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"{n}.scale" for n in vectors
    }
    for name, vector in vectors.items():
        assert torch.equal(vector.grad[[0, 2]], torch.zeros_like(vector[:2])), name
        assert (vector.grad[[1, 3]] != 0).any(dim=1).all(), name


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "t5-wide", "llama-gqa", "llama3"])
def test_gradients_of_the_vectors_equal_those_of_peft(loaded, tmp_path, name):
    theirs = with_peft(name)
    theirs.save_pretrained(tmp_path)  # before it is widened: the vectors are float32 on disk
    theirs = double(theirs)
    ours = loaded(name, n_adapters=2).double()
    load_adapter(ours, tmp_path, adapter=1)
    minia3.freeze(ours)

    source, target = tokens(3, 8), tokens(3, 6, seed=1)
    state = ours.start(source, adapter=1)
    loss = loss_of(ours.step(torch.cat((state.start, target[:, :-1]), dim=1), state), target)
    loss.backward()
    if name in T5_PEERS:
        start = torch.zeros_like(target[:, :1])
        found = theirs(
            input_ids=source, decoder_input_ids=torch.cat((start, target[:, :-1]), dim=1)
        ).logits
    else:
        found = theirs(input_ids=torch.cat((source, target[:, :-1]), dim=1)).logits[
            :, source.shape[1] - 1 :
        ]
    expected = loss_of(found, target)
    expected.backward()
    assert abs(loss - expected) < 1e-12
    gradients = {
        n.replace(".ia3_l.default", ".ia3_l"): p.grad
        for n, p in theirs.named_parameters()
        if "ia3_l" in n
    }
    table, vectors = expand(PEFT, 3), minia3.vectors(ours)
    assert {table[n] for n in gradients} == set(vectors)
    for n, gradient in gradients.items():
        vector = vectors[table[n]]
        assert vector.grad.dtype == torch.float64
        assert off(vector.grad[1], gradient.flatten()) < 1e-9, n
        assert not vector.grad[0].any()


@pytest.mark.parametrize("name", BOTH)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_mixed_batch_is_each_row_alone_with_its_adapter(models, name, rows, seed):
    model = models[name]
    source, target = tokens(len(rows), 6, seed=seed), tokens(len(rows), 4, seed=seed + 1)
    mask = torch.ones_like(source, dtype=torch.bool)
    mask[0, seed % 3 :][:2] = False
    found = logits(model, source, mask, target, adapter=torch.tensor(rows))
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        assert (
            off(found[one], logits(model, source[one], mask[one], target[one], adapter=row)) < 1e-5
        )


@pytest.fixture(scope="module")
def models(loaded):
    return {name: loaded(name, n_adapters=3, seed=0) for name in BOTH}


@pytest.mark.parametrize("name", BOTH)
def test_no_adapter_is_row_0_and_an_int_is_that_row_for_all(models, name):
    model, source, target = models[name], tokens(2, 5), tokens(2, 3, seed=1)
    by_row = [logits(model, source, None, target, adapter=torch.tensor([i, i])) for i in range(3)]
    assert torch.equal(logits(model, source, None, target), by_row[0])
    for i in range(3):
        assert torch.equal(logits(model, source, None, target, adapter=i), by_row[i])
        assert torch.equal(logits(model, source, None, target, adapter=[i, i]), by_row[i])
    assert off(by_row[1], by_row[0]) > 0.01


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (-1, "out of range: the model has rows 0 to 2"),
        (3, "out of range"),
        (torch.tensor([0, 3]), "out of range"),
        (torch.tensor([-1, 0]), "out of range"),
        (torch.tensor([0]), r"None, an int or \(2,\) long"),
        (torch.tensor([[0, 1]]), r"\(2,\) long"),
        (torch.tensor([0.0, 1.0]), r"\(2,\) long"),
        (torch.tensor([True, False]), r"\(2,\) long"),
        (1.5, r"\(2,\) long"),
    ],
)
def test_an_adapter_that_is_not_there_or_of_another_shape_is_refused(
    models, name, adapter, message
):
    with pytest.raises(ValueError, match=message):
        models[name].start(tokens(2, 4), adapter=adapter)


@pytest.mark.parametrize("name", BOTH)
def test_a_row_of_ones_beside_trained_rows_stays_the_base(loaded, name):
    model = randomize(loaded(name, n_adapters=2), 1)
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    source, target = tokens(2, 5), tokens(2, 3, seed=1)
    found = logits(model, source, None, target, adapter=torch.tensor([0, 1]))
    assert off(found[:1], logits(loaded(name), source[:1], None, target[:1])) < 1e-5
