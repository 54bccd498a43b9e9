"""What the tests of the models share: small random checkpoints, made by transformers and saved as it saves them.

Weights are jittered, so that no norm is one, no bias zero and no attention uniform: else half of the mistakes would not
show. transformers and peft are imported only by the fixtures which need them.
"""

import functools
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import NamedTuple

# Models this small cost more to share among cores than to run; and a fork, as of the fuzz, hangs in threads of OpenMP
# that it does not have. Before torch is imported; children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import minia3

T5_SIZES = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
LLAMA_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# name -> class of transformers, and what its config differs in
T5_PEERS = {
    "t5-v1.0": ("T5", {}),
    "t5-v1.1": ("T5", GATED),  # with its own head: see `make`
    "t5-wide": (
        "T5",
        {"d_kv": 10, "num_layers": 3, "num_decoder_layers": 1},
    ),  # heads * d_kv != d_model, as t5-3b
    "t5-deep-decoder": ("T5", {**GATED, "num_heads": 3, "num_layers": 1, "num_decoder_layers": 3}),
    "t5-near": (
        "T5",
        {
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "dropout_rate": 0.3,
        },
    ),
    "t5-unscaled": ("T5", GATED),  # tied and not scaled: what transformers 5 makes of a v1.1 config
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu"}),
}
LLAMA_PEERS = {
    "llama-mha": ("Llama", {}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-2}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-odd": (
        "Llama",
        {
            "hidden_size": 21,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 37,
        },
    ),
    "llama3": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
}
PEERS = T5_PEERS | LLAMA_PEERS
OWN_HEAD = ("t5-v1.1", "t5-deep-decoder", "mt5")


class Peer(NamedTuple):
    name: str
    folder: Path  # as transformers saved it
    model: torch.nn.Module  # transformers' own, in eval mode

    def logits(self, source_BM, mask_BM, target_BL):
        """(B, L + 1, V): the logits after the source and after each token of the target; LLaMA's rows unpadded."""
        with torch.no_grad():
            if self.model.config.is_encoder_decoder:
                start_B1 = torch.full_like(
                    target_BL[:, :1], self.model.config.decoder_start_token_id
                )
                target_BL = torch.cat((start_B1, target_BL), dim=1)
                mask_BM = None if mask_BM is None else mask_BM.long()
                return self.model(
                    input_ids=source_BM, attention_mask=mask_BM, decoder_input_ids=target_BL
                ).logits
            rows = (
                source_BM
                if mask_BM is None
                else [row[keep] for row, keep in zip(source_BM, mask_BM, strict=True)]
            )
            texts = [
                torch.cat((row, target))[None] for row, target in zip(rows, target_BL, strict=True)
            ]
            return torch.cat(
                [self.model(input_ids=text).logits[:, -target_BL.shape[1] - 1 :] for text in texts]
            )


def make(name, **overrides):
    """A random model of transformers, in eval mode: the same weights at every call."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, differs = PEERS[name]
    sizes = LLAMA_SIZES if name in LLAMA_PEERS else T5_SIZES
    model_kind = "ForCausalLM" if name in LLAMA_PEERS else "ForConditionalGeneration"
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **differs, **overrides})
    config.decoder_start_token_id = 0 if config.is_encoder_decoder else None
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        model = getattr(transformers, f"{kind}{model_kind}")(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                std = (
                    1.0
                    if "relative_attention_bias" in parameter_name
                    else 0.2
                    if name in LLAMA_PEERS
                    else 0.1
                )
                parameter.add_(std * torch.randn(parameter.shape))
        if name in OWN_HEAD:  # transformers 5 ties every T5
            model.lm_head.weight = torch.nn.Parameter(
                torch.randn(config.vocab_size, config.d_model)
            )
    return model.eval()


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """name -> Peer, each made once."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        model = make(name)
        model.save_pretrained(folder)
        return Peer(name, folder, model)

    return get


@pytest.fixture(scope="session")
def loaded(peer):
    """name -> a fresh model of ours, with its vectors at one (or random, the same for a seed)."""

    def get(name, n_adapters=1, seed=None, **options):
        model = minia3.load_model(peer(name).folder, n_adapters=n_adapters, **options)
        if seed is not None:
            randomize(model, seed)
        return model

    return get


def with_peft(name, **options):
    """PEFT's (IA)^3 by its defaults around `make(name)`: random vectors, negative ones among them, in eval mode."""
    import peft

    model = make(name)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    model = peft.get_peft_model(model, peft.IA3Config(task_type=kind, **options))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "ia3_l" in parameter_name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def double(model):
    """`model` in float64 throughout: transformers' norms compute in float32 even then."""

    def forward(norm, x):
        return (
            norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        )

    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(forward, module)
    return model


@pytest.fixture
def copy(peer, tmp_path):
    """name, changes of its config.json (None: take the key away) -> a folder of its own that a test may damage."""

    def get(name, **changes):
        folder = tmp_path / name
        shutil.copytree(peer(name).folder, folder)
        raw = json.loads((folder / "config.json").read_text())
        raw.update(changes)
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in raw.items() if value is not None})
        )
        return folder

    return get


def randomize(model, seed=0, std=0.5):
    """Vectors from a normal distribution around one, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in minia3.vectors(model).values():
            vector.copy_(1 + std * torch.randn(vector.shape, generator=generator))
    return model


def at_once(work, arguments):
    """Call `work` with each of these tuples, in a thread of its own; they take turns within a block, or a load."""
    threads, before = (
        [threading.Thread(target=work, args=own) for own in arguments],
        sys.getswitchinterval(),
    )
    sys.setswitchinterval(1e-6)  # seconds
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)


def tokens(*shape, seed=0):
    """Random ids which are neither pad nor end."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, source_BM, mask_BM, target_BL, adapter=None):
    """As Peer.logits, of a model of ours."""
    with torch.no_grad():
        state = model.start(source_BM, mask_BM, adapter)
        return model.step(torch.cat((state.start, target_BL), dim=1), state)


def their_logits(model, source_BM, mask_BM, target_BL):
    """As Peer.logits, with gradients."""
    if model.config.is_encoder_decoder:
        target_BL = torch.cat((torch.zeros_like(target_BL[:, :1]), target_BL), dim=1)
        return model(
            input_ids=source_BM, attention_mask=mask_BM.long(), decoder_input_ids=target_BL
        ).logits
    texts = [
        torch.cat((row[m], target))
        for row, m, target in zip(source_BM, mask_BM, target_BL, strict=True)
    ]
    return torch.cat(
        [model(input_ids=text[None]).logits[:, -target_BL.shape[1] - 1 :] for text in texts]
    )


def off(found, expected):
    """The largest difference as a part of the largest expected value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rms(x):
    return x.double().square().mean().sqrt().item()


def bfloat16_errors(peer, name, source_BM, mask_BM, target_BL):
    """Root mean square errors of the logits in bfloat16, ours and theirs, from theirs in float32 with the same weights.

    The third value is the root mean square of the logits themselves.
    """
    folder = peer(name).folder
    theirs = type(peer(name).model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    exact = make(name)
    exact.load_state_dict({key: value.float() for key, value in theirs.state_dict().items()})
    arguments = (source_BM, mask_BM, target_BL)
    expected = Peer(name, folder, exact).logits(*arguments)
    ours = logits(minia3.load_model(folder, dtype=torch.bfloat16), *arguments)
    return (
        rms(ours - expected),
        rms(Peer(name, folder, theirs).logits(*arguments) - expected),
        rms(expected),
    )
