"""T5: its logits equal those of transformers, for every form of the model and in three dtypes.

Positions go far beyond the last bucket of distances. In training, dropout has the same places and
the same draws as in transformers.
"""

import pytest
import torch
from conftest import T5_PEERS, Peer, bfloat16_errors, double, logits, make, off, tokens

import minia3
from minia3.model.blocks import Attention
from minia3.model.t5 import distance_bucket

# Padding on the right, on the left and on both sides; no padding.
MASK = torch.tensor(
    [
        [True] * 5 + [False] * 4,
        [False] * 3 + [True] * 6,
        [False, True, True] + [False] * 6,
        [True] * 9,
    ]
)


@pytest.mark.parametrize("name", T5_PEERS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_logits_are_those_of_transformers(peer, loaded, name, mask):
    source = tokens(4, 9)
    target = tokens(4, 6, seed=1)
    found = logits(loaded(name), source, mask, target)
    assert off(found, peer(name).logits(source, mask, target)) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-near"])
def test_logits_are_those_of_transformers_beyond_the_last_bucket(peer, loaded, name):
    source = tokens(2, 300)
    target = tokens(2, 290, seed=1)
    mask = torch.ones_like(source, dtype=torch.bool)
    mask[0, 280:] = False
    found = logits(loaded(name), source, mask, target)
    assert off(found, peer(name).logits(source, mask, target)) < 1e-5


@pytest.mark.parametrize("name", T5_PEERS)
def test_logits_in_float64_are_those_of_transformers_in_float64(peer, loaded, name):
    source = tokens(4, 9)
    target = tokens(4, 6, seed=1)
    theirs = Peer(name, None, double(make(name))).logits(source, MASK, target)
    found = logits(loaded(name, dtype=torch.float64), source, MASK, target)
    assert found.dtype == torch.float64
    assert off(found, theirs) < 1e-12


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
def test_logits_in_bfloat16_are_as_near_the_exact_ones_as_those_of_transformers(peer, name):
    ours, theirs, scale = bfloat16_errors(peer, name, tokens(4, 9), MASK, tokens(4, 20, seed=1))
    assert 0 < ours < 1.5 * theirs
    assert ours < 0.05 * scale


def test_the_peers_cover_tied_and_untied_heads_with_and_without_scaling(loaded):
    found = {}
    for name in T5_PEERS:
        model = loaded(name)
        found[name] = (model.head is not None, model.config.scale_logits)
    assert found == {
        **{name: (False, True) for name in ("t5-v1.0", "t5-wide", "t5-near")},
        **{name: (True, False) for name in ("t5-v1.1", "t5-deep-decoder", "mt5")},
        "t5-unscaled": (False, False),
    }


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-near", "t5-deep-decoder"])
def test_dropout_in_training_has_the_places_and_draws_of_transformers(peer, loaded, name):
    """With the same seed, an extra dropout or another rate would change all logits.

    The batch has no padding, because transformers draws numbers for padding, and we do not.
    """
    source = tokens(3, 7)
    target = tokens(3, 5, seed=1)
    ours = loaded(name).train()
    theirs = make(name).train()
    torch.manual_seed(0)
    expected = Peer(name, None, theirs).logits(source, None, target)
    torch.manual_seed(0)
    found = logits(ours, source, None, target)
    assert off(found, expected) < 1e-5
    assert off(found, peer(name).logits(source, None, target)) > 0.01, "there was no dropout"


def test_a_model_comes_in_eval_mode_and_draws_nothing(loaded):
    model = loaded("t5-v1.0")
    assert not any(module.training for module in model.modules())
    before = torch.random.get_rng_state()
    logits(model, tokens(1, 4), None, tokens(1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_of_distances_are_those_of_transformers(is_bidirectional, n_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(
        distance, is_bidirectional, n_buckets, max_distance
    )
    found = distance_bucket(distance, is_bidirectional, n_buckets, max_distance)
    assert torch.equal(found, expected)
    assert found.max() == n_buckets - 1
    assert found.min() == 0


def test_the_target_starts_with_the_token_that_the_config_names(copy):
    folder = copy("t5-v1.0", decoder_start_token_id=7)
    (folder / "generation_config.json").unlink()
    model = minia3.load_model(folder)
    assert torch.equal(model.start(tokens(3, 4)).start, torch.full((3, 1), 7))
    folder = copy("t5-v1.1", decoder_start_token_id=None, pad_token_id=5)
    (folder / "generation_config.json").unlink()
    model = minia3.load_model(folder)
    assert torch.equal(model.start(tokens(1, 4)).start, torch.full((1, 1), 5)), (
        "without a start token, the target starts with the pad token"
    )


@pytest.mark.parametrize("grad", [False, True])
def test_keys_and_values_of_the_source_are_made_once(loaded, monkeypatch, grad):
    model = loaded("t5-deep-decoder")
    original = Attention.kv
    made = []

    def spy(attention, memory, context):
        made.append(attention)
        return original(attention, memory, context)

    monkeypatch.setattr(Attention, "kv", spy)
    of_encoder = [block.attn for block in model.encoder.blocks]
    of_decoder = [block.attn for block in model.decoder.blocks]
    cross = [block.cross for block in model.decoder.blocks]
    with torch.set_grad_enabled(grad):
        state = model.start(tokens(2, 4))
        assert made == of_encoder + ([] if grad else cross)
        made.clear()
        model.step(tokens(2, 1), state)
        if grad:  # just before their block runs
            assert made == [attn for pair in zip(cross, of_decoder, strict=True) for attn in pair]
        else:
            assert made == of_decoder
        made.clear()
        model.step(tokens(2, 1), state)
        assert made == of_decoder


def test_the_backward_pass_has_the_source_s_keys_and_values_of_one_block_at_a_time(loaded):
    """The gradients of a block's keys and values become those of its vectors before the next."""
    model = loaded("t5-deep-decoder")
    done = []
    expected = []
    for i, block in reversed(list(enumerate(model.decoder.blocks))):
        for kind in ("attn", "cross"):
            expected.append((kind, i))
            vector = block.get_submodule(kind).l_k.scale
            vector.register_post_accumulate_grad_hook(lambda _, of=(kind, i): done.append(of))
    model.step(tokens(2, 3), model.start(tokens(2, 4))).sum().backward()
    assert done == expected


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_takes_none_from_the_steps_that_follow(loaded, without_gradients):
    model = loaded("t5-v1.0")
    state = model.start(tokens(2, 4))
    with without_gradients():
        model.step(state.start, state)
    model.step(tokens(2, 1), state).sum().backward()
    for block in model.decoder.blocks:
        assert block.cross.l_k.scale.grad.any()
