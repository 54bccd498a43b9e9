"""Guards (IA)^3 itself: one row of factors per adapter, and each example is scaled by its own row.

Ones are the base model bit for bit, a mixed batch is each row alone, only the vectors learn, and
they learn what PEFT's vectors do.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA_PEERS, PEERS, double, logits, off, randomize, tokens, with_peft
from hypothesis import given, settings
from hypothesis import strategies as st

import minia3
from minia3.adapters.rows import load_adapter
from minia3.adapters.vector_names import PEFT
from minia3.checkpoints.tensor_names import expand
from minia3.model.ia3 import IA3
from minia3.model.sequence_state import check_start

BOTH = ["t5-v1.1", "llama-gqa"]


# The module


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


@pytest.mark.parametrize("before", [torch.float32, torch.float64])
def test_rows_that_are_moved_and_narrowed_at_once_move_and_become_float32(before):
    scale = IA3(3).to(before).to("meta", torch.bfloat16).scale
    assert (scale.device.type, scale.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("keeps_result", [True, False])
def test_a_bfloat16_product_has_the_same_bits_with_and_without_gradients(keeps_result):
    """In both, the factors are rounded to the dtype of the activations before the product."""
    ia3 = IA3(64, keeps_result=keeps_result)
    torch.manual_seed(0)
    ia3.scale.data += torch.randn(1, 64)
    x = torch.randn(2, 3, 64).bfloat16()
    adapter = torch.tensor([0])
    with torch.no_grad():
        found = ia3(x.clone(), adapter)
    assert torch.equal(found, ia3(x.clone(), adapter))


# In a model


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_grad", [False, True])
def test_a_fresh_model_is_the_base_bit_for_bit(loaded, monkeypatch, name, dtype, has_grad):
    """With gradients, another function multiplies: `scale_keeping_result`."""
    model = loaded(name, n_adapters=2, dtype=dtype)
    source = tokens(2, 7)
    target = tokens(2, 4, seed=1)

    def answer(adapter=None):
        with torch.set_grad_enabled(has_grad):
            state = model.start(source, None, adapter)
            logits_BLV = model.step(torch.cat((state.start, target), dim=1), state)
        assert logits_BLV.requires_grad == has_grad
        return logits_BLV

    found = answer(adapter=1)
    monkeypatch.setattr(IA3, "forward", lambda self, x, adapter: x)
    assert torch.equal(found, answer())


@pytest.mark.parametrize("name", BOTH)
def test_vectors_are_float32_and_keep_small_updates_in_a_bfloat16_model(loaded, name):
    model = loaded(name, dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.endswith(".scale"):
            assert parameter.dtype == torch.bfloat16
    for vector in minia3.vectors(model).values():
        assert vector.dtype == torch.float32
        vector.data += 1e-3
        assert (vector > 1).all()
    assert logits(model, tokens(1, 3), None, tokens(1, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", BOTH)
def test_a_model_that_becomes_bfloat16_later_is_one_that_is_loaded_in_bfloat16(loaded, name):
    source = tokens(2, 40)
    target = tokens(2, 5, seed=1)
    model = loaded(name, seed=0)
    minia3.logprobs(model, model.start(source), target).sum().backward()
    model.bfloat16()
    assert {vector.dtype for vector in minia3.vectors(model).values()} == {torch.float32}
    assert {vector.grad.dtype for vector in minia3.vectors(model).values()} == {torch.float32}
    expected = logits(loaded(name, seed=0, dtype=torch.bfloat16), source, None, target)
    assert torch.equal(logits(model, source, None, target), expected)
    assert {vector.dtype for vector in minia3.vectors(model.double()).values()} == {torch.float64}


def test_vectors_are_named_by_their_place_and_hold_one_row_per_adapter(loaded):
    t5 = minia3.vectors(loaded("t5-wide", n_adapters=3))
    assert [name for name in t5 if name.startswith("decoder.")] == [
        "decoder.blocks.0.attn.l_k",
        "decoder.blocks.0.attn.l_v",
        "decoder.blocks.0.cross.l_k",
        "decoder.blocks.0.cross.l_v",
        "decoder.blocks.0.ffn.l_ff",
    ]
    assert len(t5) == 3 * 3 + 5
    for name, vector in t5.items():
        assert name.rpartition(".")[2] in ("l_k", "l_v", "l_ff")
        assert vector.shape == (3, 40)

    llama = minia3.vectors(loaded("llama-odd", n_adapters=2))
    assert len(llama) == 2 * 3
    assert llama["blocks.1.attn.l_k"].shape == (2, 10)
    assert llama["blocks.1.attn.l_v"].shape == (2, 10)
    assert llama["blocks.1.ffn.l_ff"].shape == (2, 37)


@pytest.mark.parametrize("place", ["_orig_mod", "module"])
def test_a_wrapper_of_a_model_is_refused(loaded, tmp_path, place):
    """All names begin with its own, so nothing would be folded, frozen or saved."""
    model = loaded("llama-gqa")
    minia3.save_adapter(model, tmp_path / "adapter")
    wrapper = torch.nn.ModuleDict({place: model})
    uses = [
        minia3.vectors,
        minia3.freeze,
        minia3.merge,
        minia3.Adapters,
        lambda wrapper: minia3.load_adapter(wrapper, tmp_path / "adapter"),
        lambda wrapper: minia3.save_adapter(wrapper, tmp_path / "saved"),
        lambda wrapper: minia3.save_model(wrapper, tmp_path / "saved"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=rf"in the wrapper ModuleDict.*give its `\.{place}`"):
            use(wrapper)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "saved").exists()


# Learning


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


def our_loss(model, source_BM, target_BL, adapter):
    state = model.start(source_BM, adapter=adapter)
    read_BL = torch.cat((state.start, target_BL[:, :-1]), dim=1)
    return mean_loss(model.step(read_BL, state), target_BL)


def their_loss(model, source_BM, target_BL):
    if model.config.is_encoder_decoder:
        start_B1 = torch.zeros_like(target_BL[:, :1])
        read_BL = torch.cat((start_B1, target_BL[:, :-1]), dim=1)
        logits_BLV = model(input_ids=source_BM, decoder_input_ids=read_BL).logits
    else:
        text = torch.cat((source_BM, target_BL[:, :-1]), dim=1)
        logits_BLV = model(input_ids=text).logits[:, source_BM.shape[1] - 1 :]
    return mean_loss(logits_BLV, target_BL)


def mean_loss(logits_BLV, target_BL):
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten())


@pytest.mark.parametrize("name", PEERS)
def test_only_vectors_get_gradients_and_rows_of_absent_adapters_get_exactly_zero(loaded, name):
    model = loaded(name, n_adapters=4, seed=0)
    minia3.freeze(model)
    our_loss(model, tokens(2, 6), tokens(2, 5, seed=1), torch.tensor([3, 1])).backward()
    vectors = minia3.vectors(model)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{name}.scale" for name in vectors}
    for vector_name, vector in vectors.items():
        assert torch.equal(vector.grad[[0, 2]], torch.zeros_like(vector[:2])), vector_name
        assert (vector.grad[[1, 3]] != 0).any(dim=1).all(), vector_name


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "t5-wide", "llama-gqa", "llama3"])
def test_gradients_of_the_vectors_equal_those_of_peft(loaded, tmp_path, name):
    theirs = with_peft(name)
    assert theirs.config.is_encoder_decoder == (name not in LLAMA_PEERS)
    theirs.save_pretrained(tmp_path)  # now, because the vectors are float32 on disk
    theirs = double(theirs)
    ours = loaded(name, n_adapters=2).double()
    load_adapter(ours, tmp_path, adapter=1)
    minia3.freeze(ours)

    source = tokens(3, 8)
    target = tokens(3, 6, seed=1)
    loss = our_loss(ours, source, target, adapter=1)
    loss.backward()
    expected_loss = their_loss(theirs, source, target)
    expected_loss.backward()
    assert abs(loss - expected_loss) < 1e-12

    our_names = expand(PEFT, 3)
    vectors = minia3.vectors(ours)
    compared = set()
    for their_name, parameter in theirs.named_parameters():
        if "ia3_l" in their_name:
            our_name = our_names[their_name.replace(".ia3_l.default", ".ia3_l")]
            compared.add(our_name)
            gradient = vectors[our_name].grad
            assert gradient.dtype == torch.float64
            assert off(gradient[1], parameter.grad.flatten()) < 1e-9, our_name
            assert not gradient[0].any()
    assert compared == set(vectors)


# Mixed batches


@pytest.fixture(scope="module")
def models(loaded):
    return {name: loaded(name, n_adapters=3, seed=0) for name in BOTH}


@pytest.mark.parametrize("name", BOTH)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_mixed_batch_is_each_row_alone_with_its_adapter(models, name, rows, seed):
    model = models[name]
    source = tokens(len(rows), 6, seed=seed)
    target = tokens(len(rows), 4, seed=seed + 1)
    mask = torch.ones_like(source, dtype=torch.bool)
    mask[0, seed % 3 :][:2] = False
    found = logits(model, source, mask, target, adapter=torch.tensor(rows))
    for i, row in enumerate(rows):
        alone = slice(i, i + 1)
        expected = logits(model, source[alone], mask[alone], target[alone], adapter=row)
        assert off(found[alone], expected) < 1e-5


@pytest.mark.parametrize("name", BOTH)
def test_no_adapter_is_row_0_and_an_int_is_that_row_for_all(models, name):
    model = models[name]
    source = tokens(2, 5)
    target = tokens(2, 3, seed=1)
    by_row = [logits(model, source, None, target, adapter=torch.tensor([i, i])) for i in range(3)]
    assert torch.equal(logits(model, source, None, target), by_row[0])
    for i in range(3):
        assert torch.equal(logits(model, source, None, target, adapter=i), by_row[i])
        assert torch.equal(logits(model, source, None, target, adapter=[i, i]), by_row[i])
    assert off(by_row[1], by_row[0]) > 0.01


def test_a_single_adapter_is_checked_without_a_tensor(models, monkeypatch):
    """To switch between adapters is to check this argument, and tensors took most of the time."""
    model = models[BOTH[0]]
    source = tokens(2, 5)
    monkeypatch.setattr(torch, "as_tensor", None)
    for adapter, number in {None: 0, 2: 2}.items():
        adapter_B, adapter_numbers = check_start(source, None, adapter, model)
        assert adapter_B.tolist() == [number]
        assert adapter_numbers == (number,)


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
        (True, r"\(2,\) long"),
        (2**70, "was removed"),  # more than a tensor of integers can hold
    ],
)
def test_an_adapter_that_does_not_exist_or_has_another_shape_is_refused(
    models, name, adapter, message
):
    with pytest.raises(ValueError, match=message):
        models[name].start(tokens(2, 4), adapter=adapter)


@pytest.mark.parametrize("name", BOTH)
def test_a_row_of_ones_beside_trained_rows_stays_the_base(loaded, name):
    model = randomize(loaded(name, n_adapters=2), 1)
    for vector in minia3.vectors(model).values():
        vector.data[0] = 1.0
    source = tokens(2, 5)
    target = tokens(2, 3, seed=1)
    found = logits(model, source, None, target, adapter=torch.tensor([0, 1]))
    expected = logits(loaded(name), source[:1], None, target[:1])
    assert off(found[:1], expected) < 1e-5
