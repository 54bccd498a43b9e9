"""Guards minia3/checkpoints/copies.py: files hold the embedding once or several times, under any of
its names.
"""

import json

import pytest
import torch
from checkpoint_folders import (
    SOURCE,
    TARGET,
    embedding_name,
    have_the_same_bits,
    read_weights,
    refusal,
    transformers_class,
    write_weights,
)
from conftest import Peer, logits, off

import minia3


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-unscaled", "llama-tied"])
def test_a_head_that_is_a_copy_of_the_embedding_is_dropped(loaded, copy, name):
    folder = copy(name)
    tensors = read_weights(folder)
    head = tensors[embedding_name(name)].clone()
    write_weights(folder, tensors | {"lm_head.weight": head})
    model = minia3.load_model(folder)
    assert model.head is None
    assert model.config == loaded(name).config
    assert have_the_same_bits(model, loaded(name))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-unscaled", "llama-tied"])
def test_a_head_that_differs_from_the_embedding_is_kept_whatever_the_config_says(copy, name):
    folder = copy(name)
    head = torch.randn(61, 24)
    write_weights(folder, read_weights(folder) | {"lm_head.weight": head})
    model = minia3.load_model(folder)
    assert torch.equal(model.head.weight, head)
    assert model.config.own_head
    theirs = Peer(name, folder, transformers_class(name).from_pretrained(folder).eval())
    assert off(logits(model, SOURCE, None, TARGET), theirs.logits(SOURCE, None, TARGET)) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-mha"])
def test_an_untied_head_may_equal_the_embedding(copy, name):
    folder = copy(name)
    tensors = read_weights(folder)
    head = tensors[embedding_name(name)].clone()
    write_weights(folder, tensors | {"lm_head.weight": head})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    assert minia3.load_model(folder).head is not None


@pytest.mark.parametrize("form", ["bin", "old bin"])
@pytest.mark.parametrize("name", ["t5-v1.1", "llama-mha"])
def test_an_untied_head_that_a_file_stores_together_with_the_embedding_is_apart(copy, name, form):
    """torch.save stores a tensor once, however many names it has."""
    folder = copy(name)
    tensors = read_weights(folder)
    embedding = tensors[embedding_name(name)]
    write_weights(folder, tensors | {"lm_head.weight": embedding}, form)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    model = minia3.load_model(folder)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(model.embed.weight, embedding)
    minia3.save_model(model, folder)
    assert have_the_same_bits(minia3.load_model(folder), model)


def test_tensors_that_only_older_files_hold_are_ignored(loaded, copy):
    folder = copy("t5-v1.0")
    tensors = read_weights(folder)
    embedding = tensors["shared.weight"]
    older = {
        "encoder.embed_tokens.weight": embedding.clone(),
        "decoder.embed_tokens.weight": embedding.clone(),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(
            32, 4
        ),
    }
    write_weights(folder, tensors | older, "bin")
    assert have_the_same_bits(minia3.load_model(folder), loaded("t5-v1.0"))

    folder = copy("llama-mha")
    older = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.randn(3) for i in range(2)}
    write_weights(folder, read_weights(folder) | older, "bin")
    assert have_the_same_bits(minia3.load_model(folder), loaded("llama-mha"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("t5-v1.0", "encoder.embed_tokens.weight"),
        ("t5-v1.0", "decoder.embed_tokens.weight"),
        ("t5-v1.0", "lm_head.weight"),
        ("llama-tied", "lm_head.weight"),
    ],
)
def test_a_tied_embedding_that_is_stored_once_may_have_any_of_its_names(loaded, copy, model, name):
    folder = copy(model)
    tensors = read_weights(folder)
    tensors[name] = tensors.pop(embedding_name(model))
    write_weights(folder, tensors)
    assert have_the_same_bits(minia3.load_model(folder), loaded(model))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_copy_of_the_embedding_that_differs_is_refused(copy, name, stack):
    folder = copy(name)
    tensors = read_weights(folder)
    other = tensors["shared.weight"].clone()
    other[3, 5] += 1
    write_weights(folder, tensors | {f"{stack}.embed_tokens.weight": other})
    expected = f"{stack}.embed_tokens.weight is not the copy of shared.weight"
    assert expected in refusal(minia3.load_model, folder)
