"""Guards the published families of T5: ByT5, CodeT5, mT5, mT0, umT5, flan-UL2, T0 and LM-adapted.

A family counts as supported if its logits, the gradients of its vectors, generation, PEFT's
adapters in both directions and merging agree with transformers and peft. So one small random model
of each family, written by transformers, goes through the same tests. The models differ from each
other in what the published models differ in: the depth of the stacks, the activation, gated or not,
the head, and the tables of biases.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    T5_FAMILIES,
    UNTIED_FAMILIES,
    Peer,
    double,
    logits,
    make,
    off,
    tokens,
    with_peft,
)
from safetensors.torch import load_file

import minia3
from minia3.adapters.rows import load_adapter, save_adapter
from minia3.adapters.vector_names import PEFT
from minia3.checkpoints.tensor_names import expand
from minia3.inference.beam_search import beam_search
from minia3.inference.decoding import decode_tokens

FAMILIES = ["mt5", *T5_FAMILIES]
SOURCE = tokens(3, 30)
TARGET = tokens(3, 26, seed=1)  # beyond the last bucket of umT5's small table
MASK = torch.ones_like(SOURCE, dtype=torch.bool)
MASK[0, :4] = False
MASK[1, 11:] = False

NO_DRAWING = {"do_sample": False, "use_cache": False}

# What PEFT scales by itself. It has no default for umT5.
OF_PAPER = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}
OF_MT5 = {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []}
OF_PLAIN = {"target_modules": ["q", "v", "wi"], "feedforward_modules": []}


def is_gated(name):
    return make(name).config.is_gated_act


def their_logits(theirs):
    return Peer(None, None, theirs).logits(SOURCE, MASK, TARGET)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(peer, loaded, name):
    expected = peer(name).logits(SOURCE, MASK, TARGET)
    assert off(logits(loaded(name), SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_token_by_token_are_those_of_the_whole_text(loaded, name):
    model = loaded(name, seed=1)
    whole = logits(model, SOURCE, MASK, TARGET)
    with torch.no_grad():
        state = model.start(SOURCE, MASK)
        steps = [model.step(state.start, state)]
        for token in TARGET.split(1, dim=1):
            steps.append(model.step(token, state))
    assert off(torch.cat(steps, dim=1), whole) < 1e-5


def test_the_families_have_the_heads_and_the_tables_of_the_published_models(loaded):
    for name in FAMILIES:
        model = loaded(name)
        assert (model.head is not None) == (name in (*UNTIED_FAMILIES, "mt5")), name
        n_tables = len(model.decoder.bias_tables)
        n_layers = len(model.decoder.blocks)
        assert n_tables == (n_layers if name.startswith("umt5") else 1), name


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_vectors_are_those_of_peft(loaded, tmp_path, name):
    theirs = with_peft(name, **OF_PAPER)
    theirs.save_pretrained(tmp_path)  # now, because the vectors are float32 on disk
    theirs = double(theirs)
    ours = loaded(name).double()
    load_adapter(ours, tmp_path)
    minia3.freeze(ours)

    state = ours.start(SOURCE, MASK)
    found = ours.step(torch.cat((state.start, TARGET[:, :-1]), dim=1), state)
    F.cross_entropy(found.flatten(0, 1), TARGET.flatten()).backward()
    theirs(input_ids=SOURCE, attention_mask=MASK.long(), labels=TARGET).loss.backward()

    our_names = expand(PEFT, 3)
    gradients = {}
    for their_name, parameter in theirs.named_parameters():
        if "ia3_l" in their_name:
            our_name = our_names[their_name.replace(".ia3_l.default", ".ia3_l")]
            gradients[our_name] = parameter.grad.flatten()
    vectors = minia3.vectors(ours)
    assert gradients.keys() == vectors.keys()
    for vector_name, vector in vectors.items():
        assert off(vector.grad[0], gradients[vector_name]) < 1e-9, vector_name


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(peer, loaded, name):
    model = loaded(name)
    theirs = peer(name).model
    for row in SOURCE:
        # Without a cache, because that of transformers has as many layers as the encoder.
        written = theirs.generate(row[None], max_new_tokens=8, num_beams=1, **NO_DRAWING)
        expected = until_end(written[0, 1:].tolist(), model.config.eos_ids)
        pairs = decode_tokens(model, model.start(row[None]), 8, ended=set())
        assert [token for _, token in pairs] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_of_a_beam_search_are_those_of_transformers(peer, loaded, name):
    model = loaded(name)
    theirs = peer(name).model
    written = theirs.generate(
        SOURCE[:1], max_new_tokens=6, num_beams=3, early_stopping="never", **NO_DRAWING
    )
    expected = until_end(written[0, 1:].tolist(), model.config.eos_ids)
    with torch.no_grad():
        (best, *_), *_ = beam_search(model, model.start(SOURCE[:1]), 3, 6)
    assert until_end(list(best), model.config.eos_ids) == expected


def until_end(ids, end_ids):
    """Return the ids before the first end token."""
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[:i]
    return ids


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("modules", [OF_PAPER, OF_MT5, OF_PLAIN], ids=["paper", "mt5", "q and v"])
def test_an_adapter_of_peft_gives_the_logits_of_peft_and_goes_back(loaded, tmp_path, name, modules):
    import peft

    kinds = [kind for kind in modules["target_modules"] if has_linear(name, kind)]
    theirs = with_peft(name, **modules | {"target_modules": kinds})
    theirs.save_pretrained(tmp_path / "theirs")
    model = loaded(name, n_adapters=2)
    load_adapter(model, tmp_path / "theirs", adapter=1)
    expected = their_logits(theirs)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=1), expected) < 1e-5
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=0), expected) > 1e-3

    save_adapter(model, tmp_path / "ours", adapter=1)
    again = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert off(their_logits(again), expected) < 1e-5


def has_linear(name, kind):
    """Return whether a model of the family has linears of this kind: wi, or wi_0 and wi_1."""
    return kind not in ("wi", "wi_1") or (kind == "wi_1") == is_gated(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_of_peft_for_a_model_type_is_loaded(loaded, tmp_path, name):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

    kind = make(name).config.model_type
    if kind not in DEFAULTS:  # umT5
        with pytest.raises(ValueError, match="target_modules"):
            with_peft(name)
        return
    theirs = with_peft(name)
    theirs.save_pretrained(tmp_path)
    n_stored = len(load_file(tmp_path / "adapter_model.safetensors"))
    model = loaded(name)
    load_adapter(model, tmp_path)
    assert len(minia3.vectors(model)) == n_stored, "each vector of the file has its place"
    assert off(logits(model, SOURCE, MASK, TARGET), their_logits(theirs)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_has_the_logits_of_peft_merged_and_transformers_loads_it(
    loaded, tmp_path, name
):
    import transformers

    theirs = with_peft(name, **OF_PAPER)
    theirs.save_pretrained(tmp_path / "adapter")
    model = loaded(name, n_adapters=2)
    load_adapter(model, tmp_path / "adapter", adapter=1)
    merged = minia3.merge(model, adapter=1)
    expected = their_logits(theirs.merge_and_unload())
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-5

    minia3.save_model(merged, tmp_path / "merged")
    again = minia3.load_model(tmp_path / "merged")
    assert again.config == merged.config
    found = logits(again, SOURCE, MASK, TARGET)
    assert torch.equal(found, logits(merged, SOURCE, MASK, TARGET))
    in_transformers = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert off(their_logits(in_transformers.eval()), expected) < 1e-5
