"""Mutated configs of T5s: our logits equal those of transformers, or the config is refused.

Each case changes one to three keys of a config.json, beside the same weights. Its number is its
seed, so each case can be repeated alone. More cases by hand:

    MINIA3_CASES=3000 python -m pytest -m slow tests/checkpoints/test_config_mutations.py
"""

import json
import os
import random
import shutil
import warnings

import pytest
import torch
from conftest import T5_PEERS, logits, off, tokens

import minia3

N_CASES = int(os.environ.get("MINIA3_CASES", "100"))
ABSENT = "absent"
NAMES = ["t5-v1.0", "t5-unscaled", "t5-v1.1", "mt5", "umt5", "umt5-tied", "flan-ul2", "codet5"]
SOURCE = tokens(2, 30)
TARGET = tokens(2, 25, seed=1)

# Keys of configs, also of other models and of older files, and values that may mean something
VALUES = {
    "add_cross_attention": [True],
    "architectures": [["T5EncoderModel"], ["T5ForConditionalGeneration"], None],
    "attention_bias": [True],
    "chunk_size_feed_forward": [0, 2],
    "classifier_dropout": [0.5],
    "cross_attention_hidden_size": [12],
    "d_kv": [6, 3],
    "decoder_start_token_id": [0, 5],
    "dense_act_fn": ["relu", "gelu", "gelu_new", "silu"],
    "dropout_rate": [0.1, 0.0, 1],
    "eos_token_id": [1, None, [1, 2], -1],
    "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "silu", "gelu", "gated-relu", "tanh"],
    "head_dim": [6, 3],
    "hidden_size": [24, 12],
    "initializer_factor": [0.0, 2.0],
    "is_decoder": [True, False],
    "is_encoder_decoder": [False, True],
    "is_gated_act": [True, False],
    "layer_norm_epsilon": [1e-6, 1e-2, 1.0],
    "n_positions": [4, 512],
    "num_attention_heads": [4, 2],
    "num_decoder_layers": [None, 1, 2, 3],
    "num_hidden_layers": [2, 1],
    "output_attentions": [True],
    "output_past": [True],
    "pad_token_id": [0, 3, -1],
    "pruned_heads": [{}, {"0": [1]}],
    "relative_attention_max_distance": [128, 20],
    "relative_attention_num_buckets": [8, 32],
    "scalable_attention": [True, False],
    "scale_decoder_outputs": [True, False, None],
    "tie_encoder_decoder": [True, False],
    "tie_word_embeddings": [True, False],
    "torchscript": [True],
    "use_cache": [True, False],
    "vocab_size": [61, 60],
}


def mutate(seed):
    """Return the name of a peer, and what changes in its config."""
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    changes = {}
    for key in rng.sample(list(VALUES), rng.randint(1, 3)):
        changes[key] = ABSENT if rng.random() < 0.15 else rng.choice(VALUES[key])
    return name, changes


def our_logits(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys that nobody knows
        model = minia3.load_model(folder)
    return logits(model, SOURCE, None, TARGET), model.config.start_id


def their_logits(kind, folder, start):
    """Return transformers' logits, or None if it does not load the folder with all weights."""
    try:
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
        start_B1 = torch.full_like(TARGET[:, :1], start)
        with torch.no_grad():
            output = model.eval()(
                input_ids=SOURCE,
                decoder_input_ids=torch.cat((start_B1, TARGET), dim=1),
                return_dict=True,
            )
    except Exception:  # its errors have no common type
        return None
    return None if loading["missing_keys"] else output.logits


@pytest.mark.slow
def test_a_config_of_a_t5_means_what_it_means_in_transformers_or_is_refused(peer, tmp_path):
    assert set(NAMES) - set(T5_PEERS) == {"umt5", "umt5-tied", "flan-ul2", "codet5"}
    wrong = {}
    n_equal = 0
    for seed in range(N_CASES):
        name, changes = mutate(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(peer(name).folder, folder)
        (folder / "generation_config.json").unlink()
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw = {key: value for key, value in raw.items() if value != ABSENT}
        (folder / "config.json").write_text(json.dumps(raw))
        try:
            found, start = our_logits(folder)
        except ValueError as error:
            if "\n" in str(error):
                wrong[seed] = error
            continue
        expected = their_logits(type(peer(name).model), folder, start)
        shutil.rmtree(folder)
        if expected is None:
            continue
        if off(found, expected) < 1e-4:
            n_equal += 1
        else:
            wrong[seed] = (name, changes)
    assert not wrong
    assert n_equal > N_CASES / 4, "most cases are refused, so little was compared"
