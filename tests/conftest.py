"""What the tests of the models share: small random checkpoints, made and saved by transformers.

Every weight is random, even the weights that transformers starts at one or zero, because half of
all mistakes would not show in a model whose norms are one and whose attention is uniform.
transformers and peft are imported only by the fixtures that need them.
"""

import functools
import gc
import json
import os
import shutil
import signal
import sys
import threading
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

# For models this small, several cores cost more than they save. And a forked process (the fuzz
# forks) would wait for threads of OpenMP that it does not have. This is set before torch is
# imported, and the processes that the tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `minia3 torchrun` sets it
os.environ.pop("COLUMNS", None)  # some shells export the width of the terminal, which wraps lines

import pytest
import torch

import minia3

T5_SIZES = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
}
LLAMA_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
NEAR = {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.3,
}
ODD = {
    "hidden_size": 21,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 37,
}

# name: (class of transformers, the differences between its config and the sizes above)
T5_PEERS = {
    "t5-v1.0": ("T5", {}),
    "t5-v1.1": ("T5", GATED),  # with a head of its own: see `make`
    # n_heads * d_head is not d_model, as in t5-3b
    "t5-wide": ("T5", {"d_kv": 10, "num_layers": 3, "num_decoder_layers": 1}),
    "t5-deep-decoder": ("T5", {**GATED, "num_heads": 3, "num_layers": 1, "num_decoder_layers": 3}),
    "t5-near": ("T5", NEAR),
    "t5-unscaled": ("T5", GATED),  # tied and not scaled, as transformers 5 makes it from v1.1
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu"}),
}
LLAMA_PEERS = {
    "llama-mha": ("Llama", {}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-2}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-odd": ("Llama", ODD),
    "llama3": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10}),
}
# The published families of T5, which differ in what T5_PEERS do not cover
# (tests/checkpoints/test_t5_families.py)
T5_FAMILIES = {
    # ByT5's encoder is three times as deep as its decoder.
    "byt5": ("T5", {**GATED, "num_layers": 3, "num_decoder_layers": 1}),
    "codet5": ("T5", {"bos_token_id": 1, "eos_token_id": 2}),
    "mt0": ("MT5", {"num_heads": 3}),
    "umt5": ("UMT5", {**GATED, "relative_attention_num_buckets": 8}),
    "umt5-tied": ("UMT5", {"num_decoder_layers": 3}),
    "flan-ul2": ("T5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "t0": ("T5", {**GATED, "num_heads": 5}),
    "t5-lm-adapt": ("T5", GATED),
}
PEERS = T5_PEERS | LLAMA_PEERS
UNTIED_FAMILIES = ("byt5", "mt0", "umt5", "flan-ul2", "t0", "t5-lm-adapt")
OWN_HEAD = ("t5-v1.1", "t5-deep-decoder", "mt5", *UNTIED_FAMILIES)


# How tests are listed, and what the fast run left out


def pytest_configure(config):
    config.n_left_out = 0
    # A shell that starts the tests in the background has them, and the programs that they start,
    # ignore Ctrl-C. Tests of Ctrl-C need what a terminal's programs do.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """Import and list all tests without garbage collections, which would take a fifth of the time.

    What is imported here stays until the end, so later collections need not look at it again, nor
    copy it in forked processes. Full collections also look at all that tests keep for others, and
    find next to nothing, so they are made ten times more rarely than usual.
    """
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    often, rarely, very_rarely = gc.get_threshold()
    gc.set_threshold(often, rarely, 10 * very_rarely)
    gc.enable()


def pytest_unconfigure():
    """Unfreeze what is imported, or triton would list on stderr that it was not freed."""
    gc.unfreeze()


def pytest_deselected(items):
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.config.n_left_out += 1


# With `-n 2`, each worker of pytest-xdist collects all tests, and the process that prints, none.


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["n_left_out"] = session.config.n_left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if hasattr(node, "workeroutput"):  # a worker that has crashed has none
        node.config.n_left_out = node.workeroutput["n_left_out"]


def pytest_terminal_summary(terminalreporter, config):
    if config.n_left_out:
        terminalreporter.write_line(
            f"{config.n_left_out} slow tests were left out; `python -m pytest -m slow` runs them"
        )
    if "MINIA3_TEST_DATA" not in os.environ:
        terminalreporter.write_line(
            "MINIA3_TEST_DATA is not set: tests on real data sets and tokenizers were skipped"
        )


# Peers


class Peer(NamedTuple):
    name: str
    folder: Path  # as transformers saved it
    model: torch.nn.Module  # of transformers, in eval mode

    def logits(self, source_BM, mask_BM, target_BL):
        """Return (B, L + 1, V): the logits after the source and after each token of the target.

        A LLaMA reads each row separately, without its padding.
        """
        with torch.no_grad():
            if self.model.config.is_encoder_decoder:
                start_B1 = torch.full_like(
                    target_BL[:, :1], self.model.config.decoder_start_token_id
                )
                target_BL = torch.cat((start_B1, target_BL), dim=1)
                mask_BM = None if mask_BM is None else mask_BM.long()
                output = self.model(
                    input_ids=source_BM, attention_mask=mask_BM, decoder_input_ids=target_BL
                )
                return output.logits
            if mask_BM is None:
                mask_BM = torch.ones_like(source_BM, dtype=torch.bool)
            return their_llama_logits(self.model, source_BM, mask_BM, target_BL)


def their_llama_logits(model, source_BM, mask_BM, target_BL):
    n_logits = target_BL.shape[1] + 1
    rows = []
    for source, mask, target in zip(source_BM, mask_BM, target_BL, strict=True):
        text = torch.cat((source[mask], target))
        rows.append(model(input_ids=text[None]).logits[:, -n_logits:])
    return torch.cat(rows)


def their_logits(model, source_BM, mask_BM, target_BL):
    """Return what Peer.logits returns, but with gradients."""
    if model.config.is_encoder_decoder:
        target_BL = torch.cat((torch.zeros_like(target_BL[:, :1]), target_BL), dim=1)
        output = model(
            input_ids=source_BM, attention_mask=mask_BM.long(), decoder_input_ids=target_BL
        )
        return output.logits
    return their_llama_logits(model, source_BM, mask_BM, target_BL)


def make(name, **overrides):
    """Return a random model of transformers in eval mode, with the same weights at every call."""
    if overrides:
        return make_anew(name, **overrides)
    return deepcopy(made(name))  # in half the time


@functools.cache
def made(name):
    return make_anew(name)


def make_anew(name, **overrides):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, differences = (PEERS | T5_FAMILIES)[name]
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if kind == "UMT5" and version < (5, 20):
        pytest.skip("transformers 5.15 to 5.19 has other logits for umT5 than older and newer ones")
    is_llama = name in LLAMA_PEERS
    sizes = LLAMA_SIZES if is_llama else T5_SIZES
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**{**sizes, **differences, **overrides})
    config.decoder_start_token_id = 0 if config.is_encoder_decoder else None
    model_kind = "ForCausalLM" if is_llama else "ForConditionalGeneration"
    model_class = getattr(transformers, f"{kind}{model_kind}")
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        model = model_class(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                std = 0.2 if is_llama else 0.1
                if "relative_attention_bias" in parameter_name:
                    std = 1.0
                parameter.add_(std * torch.randn(parameter.shape))
        if name in OWN_HEAD:  # transformers 5 ties the head of every T5
            head = torch.randn(config.vocab_size, config.d_model)
            model.lm_head.weight = torch.nn.Parameter(head)
    return model.eval()


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """A function from a name to its Peer. Each Peer is made once."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        model = make(name)
        model.save_pretrained(folder)
        return Peer(name, folder, model)

    return get


@pytest.fixture(scope="session")
def loaded(peer):
    """A function from a name to a new model of ours. Its vectors are one, or random with a seed."""

    def get(name, n_adapters=1, seed=None, **options):
        model = minia3.load_model(peer(name).folder, n_adapters=n_adapters, **options)
        if seed is not None:
            randomize(model, seed)
        return model

    return get


def with_peft(name, **options):
    """Return `make(name)` with PEFT's (IA)^3, in eval mode. Random vectors, some negative."""
    import peft

    model = make(name)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    model = peft.get_peft_model(model, peft.IA3Config(task_type=kind, **options))
    model.create_or_update_model_card = write_no_card
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "ia3_l" in parameter_name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_no_card(folder):
    """Stands for what PEFT would write beside an adapter, which takes longer than the adapter."""


def double(model):
    """Return `model` in float64. Its norms are replaced, because they would compute in float32."""

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
    """A function from a name to a copy of its folder, which a test may damage.

    Keyword arguments change its config.json; None removes a key.
    """

    def get(name, **changes):
        folder = tmp_path / name
        shutil.copytree(peer(name).folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return get


# Models of ours


def randomize(model, seed=0, std=0.5):
    """Draw all vectors from a normal distribution around one; some become negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in minia3.vectors(model).values():
            vector.copy_(1 + std * torch.randn(vector.shape, generator=generator))
    return model


def tokens(*shape, seed=0):
    """Return random ids. None of them is the pad or the end token."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, source_BM, mask_BM, target_BL, adapter=None):
    """Return what Peer.logits returns, for a model of ours."""
    with torch.no_grad():
        state = model.start(source_BM, mask_BM, adapter)
        return model.step(torch.cat((state.start, target_BL), dim=1), state)


def at_once(work, arguments):
    """Call `work` with each tuple of `arguments` in its own thread. The threads switch often."""
    threads = [threading.Thread(target=work, args=values) for values in arguments]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds, so they switch in the middle of a block or of loading
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


# Comparisons


def off(found, expected):
    """Return the largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def equal_tensors(found, expected):
    """Return whether two dicts have the same names and, bit for bit, the same tensors."""
    return found.keys() == expected.keys() and all(
        torch.equal(x, expected[name]) for name, x in found.items()
    )


def rms(x):
    return x.double().square().mean().sqrt().item()


def bfloat16_errors(peer, name, source_BM, mask_BM, target_BL):
    """Return three root mean squares: of our error in bfloat16, of transformers' error, and of the
    logits.

    An error is the difference from transformers in float32 with the same (bfloat16) weights.
    """
    folder = peer(name).folder
    theirs = type(peer(name).model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    exact = make(name)
    exact.load_state_dict({key: value.float() for key, value in theirs.state_dict().items()})
    expected = Peer(name, folder, exact).logits(source_BM, mask_BM, target_BL)
    ours = minia3.load_model(folder, dtype=torch.bfloat16)
    our_error = logits(ours, source_BM, mask_BM, target_BL) - expected
    their_error = Peer(name, folder, theirs).logits(source_BM, mask_BM, target_BL) - expected
    return rms(our_error), rms(their_error), rms(expected)
