"""Chapter 6, the table of known models: short name -> hub repository, family and sizes.

The sizes let `python -m minia3 info NAME` answer without a network; `load_model` always reads the checkpoint's own
config.json. A test compares the counts that come out with those of the papers.
"""

from pathlib import Path
from typing import NamedTuple

from minia3.llama import LlamaConfig
from minia3.t5 import T5Config

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "tiny-t5"


class Known(NamedTuple):
    repo: str  # on the hub; for the embedded model, the folder
    family: str  # what it was pre-trained on: see `seen` in tasks.py
    config: T5Config | LlamaConfig


# fmt: off
V1_0 = {"vocab_size": 32128}
V1_1 = V1_0 | {"activation": "gelu", "gated": True, "own_head": True, "scale_logits": False}
LLAMA1 = {"vocab_size": 32000, "max_length": 2048}
TINYLLAMA = LLAMA1 | {"eps": 1e-5}
LLAMA2 = TINYLLAMA | {"max_length": 4096}
LLAMA3 = LLAMA2 | {"vocab_size": 128256, "max_length": 8192, "rope_theta": 5e5, "eos_ids": (128001,), "bos_id": 128000}
LLAMA31 = LLAMA3 | {"max_length": 131072, "rope_scaling": (8.0, 1.0, 4.0, 8192)}
LLAMA32 = LLAMA31 | {"rope_scaling": (32.0, 1.0, 4.0, 8192), "own_head": False}
SMOLLM2 = LLAMA3 | {"vocab_size": 49152, "rope_theta": 1e5, "eos_ids": (0,), "bos_id": 0, "own_head": False}
SMOLLM2_1B = SMOLLM2 | {"rope_theta": 1.3e5}
KNOWN = {short: Known(*row) for short, row in {
    #                                                               d_model d_head d_ff encoder decoder heads
    "tiny-t5":        (str(EMBEDDED), "tiny-t5",                T5Config(64, 16, 192, 2, 2, 4, 320, dropout=0.0)),
    "t5-small":       ("google-t5/t5-small", "t5-v1.0",         T5Config(512, 64, 2048, 6, 6, 8, **V1_0)),
    "t5-base":        ("google-t5/t5-base", "t5-v1.0",          T5Config(768, 64, 3072, 12, 12, 12, **V1_0)),
    "t5-large":       ("google-t5/t5-large", "t5-v1.0",         T5Config(1024, 64, 4096, 24, 24, 16, **V1_0)),
    "t5-3b":          ("google-t5/t5-3b", "t5-v1.0",            T5Config(1024, 128, 16384, 24, 24, 32, **V1_0)),
    "t5-11b":         ("google-t5/t5-11b", "t5-v1.0",           T5Config(1024, 128, 65536, 24, 24, 128, **V1_0)),
    "t5-v1.1-small":  ("google/t5-v1_1-small", "t5-v1.1",       T5Config(512, 64, 1024, 8, 8, 6, **V1_1)),
    "t5-v1.1-base":   ("google/t5-v1_1-base", "t5-v1.1",        T5Config(768, 64, 2048, 12, 12, 12, **V1_1)),
    "t5-v1.1-large":  ("google/t5-v1_1-large", "t5-v1.1",       T5Config(1024, 64, 2816, 24, 24, 16, **V1_1)),
    "t5-v1.1-xl":     ("google/t5-v1_1-xl", "t5-v1.1",          T5Config(2048, 64, 5120, 24, 24, 32, **V1_1)),
    "t5-v1.1-xxl":    ("google/t5-v1_1-xxl", "t5-v1.1",         T5Config(4096, 64, 10240, 24, 24, 64, **V1_1)),
    "flan-t5-small":  ("google/flan-t5-small", "flan-t5",       T5Config(512, 64, 1024, 8, 8, 6, **V1_1)),
    "flan-t5-base":   ("google/flan-t5-base", "flan-t5",        T5Config(768, 64, 2048, 12, 12, 12, **V1_1)),
    "flan-t5-large":  ("google/flan-t5-large", "flan-t5",       T5Config(1024, 64, 2816, 24, 24, 16, **V1_1)),
    "flan-t5-xl":     ("google/flan-t5-xl", "flan-t5",          T5Config(2048, 64, 5120, 24, 24, 32, **V1_1)),
    "flan-t5-xxl":    ("google/flan-t5-xxl", "flan-t5",         T5Config(4096, 64, 10240, 24, 24, 64, **V1_1)),
    "t0-3b":          ("bigscience/T0_3B", "t0",                T5Config(2048, 64, 5120, 24, 24, 32, **V1_1)),
    "t0-11b":         ("bigscience/T0", "t0",                   T5Config(4096, 64, 10240, 24, 24, 64, **V1_1)),
    #                                                                  d_model d_head d_ff layers heads kv_heads
    "llama-7b":       ("huggyllama/llama-7b", "llama",          LlamaConfig(4096, 128, 11008, 32, 32, 32, **LLAMA1)),
    "llama-2-7b":     ("meta-llama/Llama-2-7b-hf", "llama",     LlamaConfig(4096, 128, 11008, 32, 32, 32, **LLAMA2)),
    "llama-2-13b":    ("meta-llama/Llama-2-13b-hf", "llama",    LlamaConfig(5120, 128, 13824, 40, 40, 40, **LLAMA2)),
    "llama-2-70b":    ("meta-llama/Llama-2-70b-hf", "llama",    LlamaConfig(8192, 128, 28672, 80, 64, 8, **LLAMA2)),
    "llama-3-8b":     ("meta-llama/Meta-Llama-3-8B", "llama",   LlamaConfig(4096, 128, 14336, 32, 32, 8, **LLAMA3)),
    "llama-3-70b":    ("meta-llama/Meta-Llama-3-70B", "llama",  LlamaConfig(8192, 128, 28672, 80, 64, 8, **LLAMA3)),
    "llama-3.1-8b":   ("meta-llama/Llama-3.1-8B", "llama",      LlamaConfig(4096, 128, 14336, 32, 32, 8, **LLAMA31)),
    "llama-3.1-70b":  ("meta-llama/Llama-3.1-70B", "llama",     LlamaConfig(8192, 128, 28672, 80, 64, 8, **LLAMA31)),
    "llama-3.2-1b":   ("meta-llama/Llama-3.2-1B", "llama",      LlamaConfig(2048, 64, 8192, 16, 32, 8, **LLAMA32)),
    "llama-3.2-3b":   ("meta-llama/Llama-3.2-3B", "llama",      LlamaConfig(3072, 128, 8192, 28, 24, 8, **LLAMA32)),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama_v1.1", "llama",     LlamaConfig(2048, 64, 5632, 22, 32, 4, **TINYLLAMA)),
    "smollm2-135m":   ("HuggingFaceTB/SmolLM2-135M", "smollm2", LlamaConfig(576, 64, 1536, 30, 9, 3, **SMOLLM2)),
    "smollm2-360m":   ("HuggingFaceTB/SmolLM2-360M", "smollm2", LlamaConfig(960, 64, 2560, 32, 15, 5, **SMOLLM2)),
    "smollm2-1.7b":   ("HuggingFaceTB/SmolLM2-1.7B", "smollm2", LlamaConfig(2048, 64, 8192, 24, 32, 32, **SMOLLM2_1B)),
}.items()}
# fmt: on


def hub_name(name):
    """The hub repository of a known name; any other name, and the embedded model's, as it is."""
    row = known(name)
    return row.repo if row and row.repo != str(EMBEDDED) else name


def known(name):
    """The table's row for a short name or a hub id, in any case; None where it has none."""
    name = str(name).lower()
    return next((row for short, row in KNOWN.items() if name in (short, row.repo.lower())), None)
