"""Guards the vectors beside the paper's three.

They compute, learn and write what PEFT's vectors do. Each example is scaled by its own row wherever
the rows of a batch go. A model that nobody asked for them has none.
"""

import functools
import json
import re
import signal
import warnings

import pytest
import running
import torch
from batches import batch_of, gradients, same
from conftest import (
    Peer,
    at_once,
    double,
    logits,
    make,
    off,
    randomize,
    their_logits,
    tokens,
    with_peft,
)
from running import at_line, kill_self, last_vectors, metrics, run, train, words
from safetensors.torch import load_file
from torch.testing import assert_close
from words import word_tokenizer

import minia3
from minia3.adapters.lora import add_lora
from minia3.adapters.merge import merge, merge_files
from minia3.adapters.mix import mix
from minia3.adapters.named_rows import Adapters
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import row_of, save_adapter
from minia3.adapters.vector_names import PEFT
from minia3.checkpoints.tensor_names import expand, name_table
from minia3.model.blocks import Block
from minia3.model.more_vectors import add_vectors, choose_vectors, possible_vectors
from minia3.model.recompute import recompute_blocks
from minia3.training.prepare import prepare_model

ALL_SITES = "k,v,ff,q,o,up,gate"
UNGATED_SITES = "k,v,ff,q,o,gate"  # of a T5 whose feed-forwards are not gated
UNGATED = ("t5-v1.0", "t5-wide", "t5")
SOURCE = tokens(4, 7)
TARGET = tokens(4, 5, seed=1)
MASK = torch.tensor(
    [[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3, [True] + [False] * 6]
)
ATTENTION = ["q", "k", "v", "o"]
# PEFT's names of all linears of the blocks. On the last one, the vector scales the input.
PEFT_LINEARS = {
    "t5-v1.0": [*ATTENTION, "wi", "wo"],
    "t5-v1.1": [*ATTENTION, "wi_0", "wi_1", "wo"],
    "t5-wide": [*ATTENTION, "wi", "wo"],
    "mt5": [*ATTENTION, "wi_0", "wi_1", "wo"],
    "llama-gqa": [f"{x}_proj" for x in (*ATTENTION, "gate", "up", "down")],
}
THREE = ["t5-v1.0", "t5-v1.1", "llama-gqa"]


def sites_of(name):
    return UNGATED_SITES if name in UNGATED else ALL_SITES


def site(vector_name):
    return vector_name.rpartition(".l_")[2]


@pytest.fixture
def scaled(loaded):
    """A function from a name to a model of ours with random vectors in all places."""

    def get(name, n_adapters=1, seed=0, **options):
        model = loaded(name, n_adapters, **options)
        choose_vectors(model, sites_of(name), "0-", True)
        return randomize(model, seed)

    return get


@pytest.fixture
def peft_folder(tmp_path):
    """A function from a name to PEFT's model with random vectors, and the folder of its adapter.

    targets: linears with a vector (default: all). inputs: those whose input the vector scales.
    """

    def get(name, targets=None, inputs=None):
        if targets is None:
            targets = PEFT_LINEARS[name]
        if inputs is None:
            inputs = [PEFT_LINEARS[name][-1]]
        model = with_peft(name, target_modules=targets, feedforward_modules=inputs)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return get


def row_alone(model, row, loaded, name):
    """Return a model of ours whose only row is this one of `model`."""
    single = loaded(name)
    add_vectors(single, minia3.vectors(model))
    for vector_name, vector in minia3.vectors(single).items():
        vector.data[0] = minia3.vectors(model)[vector_name][row]
    return single


# Ones, and no vectors


@pytest.mark.parametrize("name", PEFT_LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ones_are_the_base_bit_for_bit(loaded, name, dtype):
    model = loaded(name, n_adapters=2, dtype=dtype)
    before = minia3.vectors(model).keys()
    expected = logits(model, SOURCE, MASK, TARGET)
    choose_vectors(model, sites_of(name), "0-", True)
    assert torch.equal(logits(model, SOURCE, MASK, TARGET), expected)
    added = minia3.vectors(model).keys() - before
    assert added == possible_vectors(model).keys()
    for vector_name in added:
        vector = minia3.vectors(model)[vector_name]
        assert vector.dtype == torch.float32
        assert len(vector) == 2
        assert (vector == 1).all()


@pytest.mark.parametrize("name", THREE)
def test_a_model_has_no_vectors_that_nobody_asked_for(loaded, name):
    model = loaded(name)
    before = [parameter_name for parameter_name, _ in model.named_parameters()]
    choose_vectors(model, "k,v,ff", "0-", True)
    assert [parameter_name for parameter_name, _ in model.named_parameters()] == before
    assert {site(vector_name) for vector_name in minia3.vectors(model)} == {"k", "v", "ff"}


COUNTS = {
    "t5-v1.0": {"q": 6, "o": 6, "wi": 4},
    "llama-gqa": {"q": 2, "o": 2, "up": 2, "gate": 2},
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_has_a_place_for_a_vector_on_each_linear(loaded, name):
    widths = possible_vectors(loaded(name))
    counts = {}
    for vector_name, width in widths.items():
        counts[site(vector_name)] = counts.get(site(vector_name), 0) + 1
        assert width == (24 if site(vector_name) in ("q", "o") else 40)
    assert counts == COUNTS[name]


# Like PEFT


@pytest.mark.parametrize("name", PEFT_LINEARS)
def test_logits_and_gradients_of_a_padded_batch_equal_those_of_peft(loaded, peft_folder, name):
    theirs, folder = peft_folder(name)
    ours = loaded(name, n_adapters=3, seed=1)
    before = {key: vector.detach().clone() for key, vector in minia3.vectors(ours).items()}
    minia3.load_adapter(ours, folder, adapter=1)
    for key, vector in minia3.vectors(ours).items():
        # The other rows stay, and are ones in new vectors.
        expected_rows = torch.ones_like(vector[:2])
        if key in before:
            expected_rows = before[key][[0, 2]]
        assert torch.equal(vector[[0, 2]], expected_rows), key

    theirs = double(theirs)
    ours = ours.double()
    minia3.freeze(ours)
    expected = their_logits(theirs, SOURCE, MASK, TARGET)
    state = ours.start(SOURCE, MASK, torch.tensor([1, 1, 1, 1]))
    found = ours.step(torch.cat((state.start, TARGET), dim=1), state)
    assert off(found, expected) < 1e-11

    for logits_BLV in (expected, found):
        logits_BLV.log_softmax(-1)[..., 5].mean().backward()
    our_names = expand(PEFT, 3)
    their_gradients = {}
    for their_name, parameter in theirs.named_parameters():
        if "ia3_l" in their_name:
            our_name = our_names[their_name.replace(".default", "")]
            their_gradients[our_name] = parameter.grad.flatten()
    assert their_gradients.keys() == minia3.vectors(ours).keys()
    largest = max(gradient.abs().max() for gradient in their_gradients.values())
    for key, gradient in their_gradients.items():
        assert gradient.abs().max() > 1e-6 * largest, key
        assert off(minia3.vectors(ours)[key].grad[1], gradient) < 1e-9, key
        assert not minia3.vectors(ours)[key].grad[[0, 2]].any()


@pytest.mark.parametrize("name", PEFT_LINEARS)
def test_our_folder_is_what_peft_writes_and_gives_the_same_logits_there(
    loaded, peft_folder, tmp_path, name
):
    import peft

    _, folder = peft_folder(name)
    model = loaded(name)
    minia3.load_adapter(model, folder)
    save_adapter(model, tmp_path / "ours")

    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    expected = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    expected_config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(expected_config["target_modules"])
    assert config["feedforward_modules"] == expected_config["feedforward_modules"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT calls what transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    n_vectors = sum("ia3_l" in parameter_name for parameter_name, _ in theirs.named_parameters())
    assert n_vectors == len(minia3.vectors(model))
    expected_logits = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected_logits) < 1e-5


WI_1_ALONE_AND_WITH_WO = r"encoder\..*wi_1|decoder\.block\.1\..*wo|decoder\..*\.wi_1"
SUBSETS = [
    ("t5-v1.0", ["q", "wi"]),
    ("t5-v1.0", r".*EncDecAttention\.(q|o)"),
    ("t5-v1.1", ["wi_0"]),
    ("t5-v1.1", WI_1_ALONE_AND_WITH_WO),
    ("llama-gqa", ["up_proj", "o_proj"]),
    ("llama-gqa", r".*\.1\..*(gate|down)_proj"),
]


@pytest.mark.parametrize(("name", "targets"), SUBSETS)
def test_any_subset_of_places_is_read_and_written(loaded, peft_folder, tmp_path, name, targets):
    import peft

    inputs = []
    if isinstance(targets, str):
        inputs = rf".*\.{PEFT_LINEARS[name][-1]}"
    theirs, folder = peft_folder(name, targets, inputs)
    model = loaded(name, seed=1)
    minia3.load_adapter(model, folder)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5

    write_adapter(tmp_path / "ours", *read_adapter(folder))
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert off(Peer(name, None, theirs).logits(SOURCE, MASK, TARGET), expected) < 1e-5
    found = read_adapter(tmp_path / "ours").vectors
    original = read_adapter(folder).vectors
    assert found.keys() == original.keys()
    for key, vector in original.items():
        assert torch.equal(found[key], vector)


def test_l_up_alone_is_l_ff_and_beside_l_ff_it_is_itself(peft_folder):
    _, folder = peft_folder("t5-v1.1", WI_1_ALONE_AND_WITH_WO, r".*\.wo")
    assert sorted(read_adapter(folder).vectors) == [
        "decoder.blocks.0.ffn.l_ff",
        "decoder.blocks.1.ffn.l_ff",
        "decoder.blocks.1.ffn.l_up",
        "encoder.blocks.0.ffn.l_ff",
        "encoder.blocks.1.ffn.l_ff",
    ]


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [
        ("t5-v1.1", "t5-v1.0", "such as decoder.blocks.0.ffn.l_gate of 40, expected none"),
        ("t5-v1.0", "t5-v1.1", "such as decoder.blocks.0.ffn.l_wi of 40, expected none"),
        ("llama-gqa", "t5-v1.0", "such as blocks.0.ffn.l_ff of 40, expected none"),
        ("t5-v1.0", "t5-wide", "such as decoder.blocks.0.attn.l_k of 24, expected 40"),
    ],
)
def test_an_adapter_with_places_that_the_model_lacks_is_refused_and_adds_nothing(
    loaded, peft_folder, name, base, message
):
    _, folder = peft_folder(name)
    model = loaded(base)
    before = [parameter_name for parameter_name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        minia3.load_adapter(model, folder)
    assert [parameter_name for parameter_name, _ in model.named_parameters()] == before


def test_a_vector_on_the_output_of_the_down_projection_is_refused_by_name(loaded, peft_folder):
    _, folder = peft_folder("llama-gqa", inputs=[])
    message = r"down_proj.ia3_l \(24, 1\) scales the outputs of its linear, not the inputs"
    with pytest.raises(ValueError, match=message):
        minia3.load_adapter(loaded("llama-gqa"), folder)


def test_every_vector_has_the_peft_name_of_its_linear(loaded):
    for name in PEFT_LINEARS:
        model = loaded(name)
        ours = minia3.vectors(model).keys() | possible_vectors(model).keys()
        linears = set()
        for theirs, vector_name in expand(PEFT, 3).items():
            if vector_name in ours:
                linear = theirs.removeprefix("base_model.model.").replace("ia3_l", "weight")
                linears.add(linear)
        expected = set()
        for theirs, parameter_name in name_table(model).items():
            if parameter_name and "blocks" in parameter_name and "norm" not in parameter_name:
                expected.add(theirs)
        assert linears == expected


# Files and rows


@pytest.mark.parametrize("name", ["t5-v1.0", "mt5", "llama-gqa"])
def test_a_saved_row_comes_back_bit_for_bit(scaled, loaded, tmp_path, name):
    model = scaled(name, n_adapters=2, seed=3)
    save_adapter(model, tmp_path, adapter=1)
    other = loaded(name, n_adapters=3)
    minia3.load_adapter(other, tmp_path, adapter=2)
    assert minia3.vectors(other).keys() == minia3.vectors(model).keys()
    for key, vector in minia3.vectors(other).items():
        assert torch.equal(vector[2], minia3.vectors(model)[key][1])
        assert (vector[:2] == 1).all()


def test_a_vector_that_an_adapter_lacks_becomes_one_and_is_one_in_a_mixture(
    scaled, loaded, tmp_path
):
    model = scaled("llama-gqa", seed=3)
    save_adapter(loaded("llama-gqa", seed=4), tmp_path / "three")
    save_adapter(model, tmp_path / "seven")
    three = read_adapter(tmp_path / "three").vectors
    seven = read_adapter(tmp_path / "seven").vectors
    mixed = mix([(three, 0.5), (seven, 0.5)])
    name = "blocks.1.ffn.l_gate"
    expected = 1 + 0.5 * (seven[name].double() - 1)
    assert torch.equal(mixed[name], expected.float())

    minia3.load_adapter(model, tmp_path / "three")
    untrained = {key for key, vector in row_of(model, 0).items() if (vector == 1).all()}
    assert untrained == possible_vectors(model).keys()


def test_vectors_join_a_float64_model_in_float64_and_in_all_rows(scaled, loaded, tmp_path):
    save_adapter(scaled("t5-v1.1", seed=3), tmp_path / "all" / "a")
    save_adapter(loaded("t5-v1.1", seed=4), tmp_path / "all" / "b")
    model = loaded("t5-v1.1", n_adapters=2).double()
    adapters = Adapters(model)
    adapters.load("b", tmp_path / "all" / "b")
    adapters.load_folder(tmp_path / "all")
    for vector in minia3.vectors(model).values():
        assert vector.dtype == torch.float64
        assert len(vector) == 4
    for name in ("a", "b"):
        expected = read_adapter(tmp_path / "all" / name).vectors
        row = adapters.rows([name]).item()
        for key, vector in row_of(model, row).items():
            default = torch.ones_like(vector).float()
            assert torch.equal(vector.float(), expected.get(key, default))
    adapters.remove("a")
    for vector in minia3.vectors(model).values():
        assert (vector[[0, 2]] == 1).all()


def test_vectors_join_a_model_that_needs_no_gradient_without_one(scaled, loaded, tmp_path):
    save_adapter(scaled("t5-v1.1", seed=3), tmp_path)
    model = loaded("t5-v1.1").requires_grad_(False)
    minia3.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_an_adapter_with_more_vectors_may_be_loaded_during_a_block_s_call(scaled, loaded, tmp_path):
    """Another thread might do so. The call that is under way uses row 0, which stays the base."""
    donor = scaled("llama-gqa", seed=3)
    save_adapter(donor, tmp_path / "more")
    model = loaded("llama-gqa", n_adapters=2)
    expected = logits(model, SOURCE, MASK, TARGET)
    adapters = Adapters(model)

    def load_once(*_):
        if not adapters:
            adapters.load("more", tmp_path / "more")

    hook = model.blocks[0].attn_norm.register_forward_hook(load_once)
    assert torch.equal(logits(model, SOURCE, MASK, TARGET), expected)
    assert adapters
    hook.remove()
    found = logits(model, SOURCE, MASK, TARGET, adapters.rows(["more"]).item())
    assert off(found, logits(donor, SOURCE, MASK, TARGET)) < 1e-5


# Each example by its own row


@torch.no_grad()
def test_threads_that_share_a_model_each_get_their_own_rows(scaled):
    model = scaled("llama-gqa", n_adapters=3)
    expected = [logits(model, SOURCE, MASK, TARGET, adapter) for adapter in range(3)]
    errors = []

    @torch.no_grad()
    def work(adapter):
        for _ in range(60):
            found = logits(model, SOURCE, MASK, TARGET, adapter)
            errors.append(off(found, expected[adapter]))

    at_once(work, [(adapter,) for adapter in range(3)])
    assert len(errors) == 180
    assert max(errors) < 1e-5


MIXED_ROWS = torch.tensor([4, 0, 2, 4])
PROMPTS = ["w3 w4 w5", "w9", "w6 w7 w8 w9 w10", "w11 w12"]
CHOICES = [["w3", "w4 w5", "w6"], ["w7 w8 w9", "w4"], ["w5"], ["w3 w4", "w8", "w9"]]


@pytest.mark.parametrize("name", THREE)
def test_logits_of_a_mixed_batch_are_those_of_each_row_alone(scaled, loaded, name):
    """With padding and without it, at once and token by token."""
    model = scaled(name, n_adapters=5, seed=3)
    padded = logits(model, SOURCE, MASK, TARGET, MIXED_ROWS)
    unpadded = logits(model, SOURCE, None, TARGET, MIXED_ROWS)
    with torch.no_grad():
        state = model.start(SOURCE, MASK, MIXED_ROWS)
        read = torch.cat((state.start, TARGET), dim=1)
        steps = [model.step(token, state) for token in read.split(1, dim=1)]
    assert off(torch.cat(steps, dim=1), padded) < 1e-5
    for i, row in enumerate(MIXED_ROWS.tolist()):
        single = row_alone(model, row, loaded, name)
        alone = slice(i, i + 1)
        expected = logits(single, SOURCE[alone], MASK[alone], TARGET[alone])
        assert off(padded[alone], expected) < 1e-5
        expected = logits(single, SOURCE[alone], None, TARGET[alone])
        assert off(unpadded[alone], expected) < 1e-5
    assert off(unpadded[:1], unpadded[3:]) > 1e-2


@pytest.mark.parametrize("name", THREE)
def test_every_vector_moves_the_examples_of_its_row_alone(scaled, name):
    model = scaled(name, n_adapters=5, seed=3)
    expected = logits(model, SOURCE, MASK, TARGET, MIXED_ROWS)
    for key, vector in minia3.vectors(model).items():
        before = vector.data[2].clone()
        vector.data[2] += 0.5  # row 2 is that of the third example
        change = logits(model, SOURCE, MASK, TARGET, MIXED_ROWS) - expected
        moved = change.abs().amax((1, 2)) > 1e-4
        assert moved.tolist() == [False, False, True, False], key
        vector.data[2] = before


@pytest.mark.parametrize("name", THREE)
def test_ranks_and_texts_of_a_mixed_batch_are_those_of_each_row_alone(scaled, loaded, name):
    """Greedy, by beams and drawn."""
    model = scaled(name, n_adapters=5, seed=3)
    tokenizer = word_tokenizer(ends=name != "llama-gqa")
    rows = MIXED_ROWS
    drawing = {"temperature": 1.0, "samples": 2, "seed": 3, "max_new_tokens": 4, "batch_size": 16}
    ranks = minia3.rank(model, tokenizer, PROMPTS, CHOICES, adapter=rows, batch_size=4)
    greedy = minia3.generate(
        model, tokenizer, PROMPTS, adapter=rows, max_new_tokens=5, batch_size=4
    )
    by_beams = minia3.generate(
        model, tokenizer, PROMPTS, adapter=rows, max_new_tokens=4, beams=3, batch_size=16
    )
    drawn = minia3.generate(model, tokenizer, PROMPTS, adapter=rows, **drawing)

    for i, row in enumerate(rows.tolist()):
        single = row_alone(model, row, loaded, name)
        prompts = PROMPTS[i : i + 1]
        expected = minia3.rank(single, tokenizer, prompts, CHOICES[i : i + 1])
        n_choices = expected.shape[1]
        assert_close(ranks[i : i + 1, :n_choices], expected, rtol=1e-5, atol=1e-5)
        expected = minia3.generate(single, tokenizer, prompts, max_new_tokens=5)
        assert greedy[i : i + 1] == expected
        expected = minia3.generate(single, tokenizer, prompts, max_new_tokens=4, beams=3)
        assert by_beams[i : i + 1] == expected
        # Texts are drawn by their place in the call, so all prompts are given here, too.
        expected = minia3.generate(model, tokenizer, PROMPTS, adapter=row, **drawing)
        assert drawn[2 * i : 2 * i + 2] == expected[2 * i : 2 * i + 2]


def test_gradients_of_choices_that_share_a_source_are_those_of_repeated_sources(scaled):
    model = scaled("t5-v1.1", n_adapters=3, seed=3).double()
    rows = torch.tensor([2, 0, 1, 2])
    target = tokens(12, 4, seed=5)
    weight_B1 = torch.arange(12)[:, None]

    def results(state):
        model.zero_grad()
        logp = minia3.logprobs(model, state, target)
        (logp * weight_B1).sum().backward()
        return [logp.detach(), *(vector.grad for vector in minia3.vectors(model).values())]

    expected = results(model.start(SOURCE, MASK, rows).repeat(3))
    repeated = [x.repeat_interleave(3, dim=0) for x in (SOURCE, MASK, rows)]
    same(results(model.start(*repeated)), expected, rtol=1e-9, atol=1e-9)
    selected = model.start(SOURCE, MASK, rows).repeat(3).select(torch.arange(12))
    same(results(selected), expected, rtol=1e-9, atol=1e-9)


def test_rows_that_share_the_text_so_far_keep_the_vectors_of_their_source(scaled):
    model = scaled("t5-v1.1", n_adapters=3, seed=3).double()
    rows = torch.tensor([2, 0, 1, 2])
    target = tokens(8, 3, seed=5)
    begun = tokens(4, 2, seed=6)
    with torch.no_grad():
        state = model.start(SOURCE, MASK, rows)
        model.step(begun, state)
        found = model.step(target, state.repeat(2))
        repeated = [x.repeat_interleave(2, dim=0) for x in (SOURCE, MASK, rows, begun)]
        state = model.start(*repeated[:3])
        model.step(repeated[3], state)
        expected = model.step(target, state)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Recomputed and compiled


@pytest.mark.parametrize("name", THREE)
def test_recomputed_blocks_give_the_same_bits_under_dropout(scaled, name):
    model = scaled(name, seed=0).train()
    batch = batch_of((30, 12, 25))
    minia3.freeze(model)
    expected = gradients(model, batch)
    assert all(gradient.any() for gradient in expected[1:])
    recompute_blocks([module for module in model.modules() if isinstance(module, Block)])
    same(gradients(model, batch), expected, rtol=0, atol=0)


def test_vectors_may_be_added_to_recomputed_blocks(loaded):
    model = loaded("llama-gqa")
    prepare_model(model, train.Config(recompute=True))
    plain = loaded("llama-gqa")
    for each in (model, plain):
        choose_vectors(each, "q", "0-")
        randomize(each, seed=3)
    batch = batch_of((7, 3, 5))
    same(gradients(model, batch), gradients(plain, batch), rtol=0, atol=0)


# Merging

TOLERANCES = {  # vectors are float32
    torch.float32: 1e-5,
    torch.float64: 1e-6,
    torch.bfloat16: 0.1,
}


@pytest.mark.parametrize("name", PEFT_LINEARS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_merged_row_is_the_applied_row_and_leaves_the_model_as_it_was(scaled, name, dtype):
    model = scaled(name, n_adapters=2, seed=3, dtype=dtype)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge(model, 1)
    found = logits(merged, SOURCE, MASK, TARGET)
    assert off(found, expected) < TOLERANCES[dtype]
    assert off(found, logits(model, SOURCE, MASK, TARGET)) > 1e-2  # row 0 is another one

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, SOURCE, MASK, TARGET, adapter=1), expected)
    for key, parameter in merged.named_parameters():
        is_linear = parameter.dim() == 2 and "blocks" in key and not key.endswith(".scale")
        if is_linear:
            assert parameter.data_ptr() != model.get_parameter(key).data_ptr(), key


@pytest.mark.parametrize("name", PEFT_LINEARS)
def test_a_merged_model_has_no_vectors_but_the_paper_s(scaled, loaded, name):
    model = scaled(name, n_adapters=2, seed=3)
    merged = merge(model, 1)
    found = [(key, type(module)) for key, module in merged.named_modules()]
    assert found == [(key, type(module)) for key, module in loaded(name).named_modules()]
    for vector in minia3.vectors(merged).values():
        assert len(vector) == 1
        assert (vector == 1).all()
    add_vectors(merged, possible_vectors(merged))
    assert len(minia3.vectors(merged)) == len(minia3.vectors(model))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_merging_files_gives_the_bits_of_merging_in_memory(scaled, peer, tmp_path, name):
    model = scaled(name, seed=3)
    save_adapter(model, tmp_path / "adapter")
    merge_files(peer(name).folder, tmp_path / "adapter", tmp_path / "merged")
    minia3.save_model(merge(model), tmp_path / "saved")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    merged = minia3.load_model(tmp_path / "merged")
    assert off(logits(merged, SOURCE, MASK, TARGET), logits(model, SOURCE, MASK, TARGET)) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_a_saved_model_is_the_base_and_nothing_else(scaled, loaded, tmp_path, name):
    minia3.save_model(scaled(name), tmp_path / "scaled")
    minia3.save_model(loaded(name), tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "scaled" / path.name).read_bytes()


def test_lora_and_a_vector_may_share_a_linear_and_merge(loaded):
    """The vector scales what the linear gives with its LoRA, so LoRA is added before it."""
    model = loaded("llama-gqa", dtype=torch.float64)
    choose_vectors(model, "q,o", "0-")
    randomize(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(model, where=("q", "v")).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(logits(merge(model), SOURCE, MASK, TARGET), expected) < 1e-6  # vectors are float32


# Which vectors train


@pytest.mark.parametrize(
    ("name", "sites", "layers", "cross", "chosen", "added"),
    [
        ("t5-v1.1", ALL_SITES, "0-", True, r".*", r".*"),
        ("t5-v1.1", "q,gate", "1-1", False, r".*\.1\.(attn\.l_q|ffn\.l_gate)", r".*"),
        ("t5-v1.0", "k,gate", "0", True, r".*\.0\..*l_(k|wi)", r".*l_wi"),
        ("llama-gqa", "o,up", "0,1", True, r".*l_(o|up)", r".*"),
        ("llama-gqa", "v", "0-0", True, r".*\.0\..*l_v", r"none"),
        ("llama-gqa", "ff,k", "0-", True, r".*l_(ff|k)", r"none"),
    ],
)
def test_chosen_vectors_are_added_and_they_alone_require_a_gradient(
    loaded, name, sites, layers, cross, chosen, added
):
    """chosen: matches the names that train. added: those of them that the model did not have."""
    model = loaded(name, n_adapters=2)
    before = minia3.vectors(model).keys()
    possible = possible_vectors(model).keys()
    found = choose_vectors(model, sites, layers, cross)

    vectors = minia3.vectors(model)
    expected = {key for key in before | possible if re.fullmatch(chosen, key)}
    expected_new = {key for key in expected & possible if re.fullmatch(added, key)}
    assert found.keys() == expected
    assert vectors.keys() == before | expected_new
    assert all(found[key] is vectors[key] for key in found)
    assert {key for key, vector in vectors.items() if vector.requires_grad} == expected

    choose_vectors(model, "k", "0-", True)
    for key, vector in minia3.vectors(model).items():
        assert vector.requires_grad == key.endswith("l_k")
    assert minia3.vectors(model).keys() == vectors.keys()


@pytest.mark.parametrize("sites", ["x", "k,wi", "k,", "down", "", "up"])
def test_unknown_sites_and_those_of_another_model_are_refused_and_add_nothing(loaded, sites):
    model = loaded("t5-v1.0")
    before = minia3.vectors(model).keys()
    message = "has no vectors for .* expected sites from k,v,ff,q,o,up,gate, and layers"
    with pytest.raises(ValueError, match=message):
        choose_vectors(model, sites, "0-", True)
    assert minia3.vectors(model).keys() == before


def test_a_span_that_ends_before_it_begins_is_named(loaded):
    model = loaded("t5-v1.0")
    with pytest.raises(
        ValueError, match="--layers '0,1-0': 1-0 ends before it begins: did you mean 0-1"
    ):
        choose_vectors(model, "k", "0,1-0", True)


# Runs of train.py


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), [("t5", ["--recompute"]), ("llama", [])])
def test_two_seeds_together_are_each_apart_with_all_sites(name, recipe, tmp_path):
    flags = {
        "model": running.model(name),
        "task": running.task((2, 3)),
        "sites": sites_of(name),
        "dtype": "float64",
        "dropout": 0,
        "lr": 0.01,
        "steps": 8,
    }
    base = minia3.load_model(running.model(name))
    places = minia3.vectors(base).keys() | possible_vectors(base).keys()
    weights = [p for key, p in base.named_parameters() if not key.endswith(".scale")]

    grid = tmp_path / "grid"
    assert run(words(grid, *recipe, seed="0,3", **flags)) == 0
    together = last_vectors(grid)
    assert together.keys() == places
    for row, seed in enumerate((0, 3)):
        folder = tmp_path / str(seed)
        assert run(words(folder, seed=seed, **flags)) == 0
        apart = last_vectors(folder)
        for key, vector in apart.items():
            assert_close(together[key][row], vector[0], rtol=1e-9, atol=1e-9)
            assert (vector != 1).any(), key
        final = metrics(folder)[-1]
        assert final["trainable"] == sum(vector.numel() for vector in apart.values())
        assert final["total"] == sum(parameter.numel() for parameter in weights)

        saved = read_adapter(grid / "adapters" / f"s{seed}").vectors
        saved_apart = read_adapter(folder / "adapter").vectors
        assert saved.keys() == saved_apart.keys() == places
        for key, vector in saved_apart.items():
            assert_close(saved[key], vector, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_more_sites_than_its_first_adapter_is_resumed_bit_for_bit(tmp_path):
    assert run(words(tmp_path / "three", lr=0.1)) == 0
    flags = {
        "sites": UNGATED_SITES,
        "lr": 0.05,
        "save_every": 4,
        "adapter": tmp_path / "three" / "adapter",  # which has three sites
    }
    with at_line(0, None) as executed:
        assert run(words(tmp_path / "whole", **flags)) == 0
    vectors = read_adapter(tmp_path / "whole" / "adapter").vectors
    assert {site(name) for name in vectors} == {"k", "v", "ff", "q", "o", "wi"}

    with at_line(len(executed) * 2 // 3, functools.partial(kill_self, signal.SIGINT)):
        assert run(words(tmp_path / "stopped", **flags)) == 130
    assert running.resume(tmp_path / "stopped") == 0
    assert running.outcome(tmp_path / "stopped") == running.outcome(tmp_path / "whole")

    trained = tmp_path / "whole" / "adapter"
    assert run(words(tmp_path / "evaluated", "--eval-only", adapter=trained)) == 0
    accuracy = metrics(tmp_path / "whole")[-1]["accuracy"]
    assert metrics(tmp_path / "evaluated")[-1]["accuracy"] == accuracy
