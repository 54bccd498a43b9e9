"""Guards config.json of the LLaMA family against changes: a config in which a few keys have other
values is refused in one line, or makes the model that transformers makes of it.
"""

import json
import os
import random
import shutil

import pytest
import torch
import transformers
from conftest import off, tokens

import minia3

N_CASES = int(os.environ.get("MINIA3_CASES", "150"))
NAMES = ["llama-gqa", "mistral", "qwen2", "qwen3"]
MORE_KEYS = [
    *("is_causal", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("attention_bias", "mlp_bias", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("is_decoder", "add_cross_attention", "pruned_heads", "rope_interleaved"),
]
VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 0.5, 1.0, 1e-5, float("inf"), "x", "silu", "gelu"),
    *([], [1], {}, {"0": [1]}, "default", "llama3", "float16"),
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    ["full_attention", "sliding_attention"],
    ["sliding_attention"] * 2,
    ["full_attention"] * 2,
]
SOURCE = tokens(1, 9)


def their_logits(folder):
    """Return the logits of transformers, or None if it fails to load or to run such a config."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(input_ids=SOURCE).logits
    except Exception:  # it fails in many ways
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_changed_config_is_refused_or_makes_the_model_of_transformers(peer, tmp_path):
    """MINIA3_CASES=5000 runs more cases."""
    n_equal = 0
    messages = []
    for seed in range(N_CASES):
        rng = random.Random(seed)
        name = rng.choice(NAMES)
        folder = tmp_path / name
        shutil.copytree(peer(name).folder, folder, dirs_exist_ok=True)
        raw = json.loads((folder / "config.json").read_text())
        keys = sorted({*peer(name).model.config.to_dict(), *MORE_KEYS} - {"model_type"})
        changes = {rng.choice(keys): rng.choice(VALUES) for _ in range(rng.choice([1, 1, 2, 3]))}
        (folder / "config.json").write_text(json.dumps(raw | changes))
        try:
            model = minia3.load_model(folder, dtype=torch.float32)
        except ValueError as error:
            messages.append(str(error))
            continue
        expected = their_logits(folder)
        if expected is None:
            continue
        with torch.no_grad():
            found = model.step(SOURCE, model.start(SOURCE[:, :1]))
        assert off(found, expected) < 1e-4, f"seed {seed}: {name} with {changes}"
        n_equal += 1
    assert not any("\n" in message for message in messages)
    assert min(n_equal, len(messages)) > N_CASES // 10
