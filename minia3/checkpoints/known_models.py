"""The known models: short name -> hub repository, family and sizes.

With the sizes, `python -m minia3 info NAME` needs no network. `load_model` never uses them: it
reads the config.json of the checkpoint. Tests compare each row with the config on the hub, and the
parameter counts with the papers.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minia3.checkpoints.layout import CONFIG_FILES
from minia3.files.read import read_json
from minia3.files.shipped import find_shipped
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config

# The folder of the model that was trained for minia3 and comes with it.
EMBEDDED = find_shipped("data") / "tiny-t5"


class KnownModel(NamedTuple):
    repo: str  # the repository on the hub; for the embedded model, its folder
    family: str  # what the model was trained on: see `seen` in the table of tasks
    config: T5Config | LlamaConfig


def t5_v1_0(d_model, d_head, d_ff, n_layers, n_heads):
    """Return the config of a T5 v1.0: ReLU, and a tied head after a scaling by d_model ** -0.5."""
    return T5Config(
        d_model=d_model,
        d_head=d_head,
        d_ff=d_ff,
        n_layers=n_layers,
        n_decoder_layers=n_layers,
        n_heads=n_heads,
        vocab_size=32128,  # the tokenizer has 32,100 tokens; the matrix has rows to spare
    )


def t5_v1_1(d_model, d_ff, n_layers, n_heads):
    """Return the config of a T5 v1.1: gated GELU, and a head of its own without a scaling."""
    return replace(
        t5_v1_0(d_model, 64, d_ff, n_layers, n_heads),
        activation="gelu",
        gated=True,
        own_head=True,
        scale_logits=False,
    )


T5_V1_1_SMALL = t5_v1_1(d_model=512, d_ff=1024, n_layers=8, n_heads=6)
T5_V1_1_BASE = t5_v1_1(d_model=768, d_ff=2048, n_layers=12, n_heads=12)
T5_V1_1_LARGE = t5_v1_1(d_model=1024, d_ff=2816, n_layers=24, n_heads=16)
T5_V1_1_XL = t5_v1_1(d_model=2048, d_ff=5120, n_layers=24, n_heads=32)
T5_V1_1_XXL = t5_v1_1(d_model=4096, d_ff=10240, n_layers=24, n_heads=64)

# The defaults of LlamaConfig describe the first LLaMA: 2,048 positions, theta 10,000, eps 1e-6,
# <s> 1 and </s> 2.
LLAMA_7B = LlamaConfig(
    d_model=4096, d_head=128, d_ff=11008, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000
)
LLAMA_2_7B = replace(LLAMA_7B, eps=1e-5, max_length=4096)
LLAMA_2_13B = replace(LLAMA_2_7B, d_model=5120, d_ff=13824, n_layers=40, n_heads=40, n_kv_heads=40)
LLAMA_2_70B = replace(LLAMA_2_7B, d_model=8192, d_ff=28672, n_layers=80, n_heads=64, n_kv_heads=8)
LLAMA_3_8B = replace(
    LLAMA_2_7B,
    d_ff=14336,
    n_kv_heads=8,
    vocab_size=128256,
    max_length=8192,
    rope_theta=500000.0,
    bos_id=128000,
    eos_ids=(128001,),
)
LLAMA_3_70B = replace(LLAMA_3_8B, d_model=8192, d_ff=28672, n_layers=80, n_heads=64)

# Llama 3.1 stretches 8,192 positions to 131,072 by slowing down rotations, and Llama 3.2 slows them
# down further. The numbers are factor, low_freq_factor, high_freq_factor and the original length.
LLAMA_3_1_ROPE = (8.0, 1.0, 4.0, 8192)
LLAMA_3_2_ROPE = (32.0, 1.0, 4.0, 8192)
LLAMA_3_1_8B = replace(LLAMA_3_8B, max_length=131072, rope_scaling=LLAMA_3_1_ROPE)
LLAMA_3_1_70B = replace(LLAMA_3_70B, max_length=131072, rope_scaling=LLAMA_3_1_ROPE)
LLAMA_3_2_1B = replace(
    LLAMA_3_1_8B,
    d_model=2048,
    d_head=64,  # 3.2-1B has 32 heads of 64, and 3.2-3B has 24 heads of 128
    d_ff=8192,
    n_layers=16,
    own_head=False,  # the small models of Llama 3.2 are tied
    rope_scaling=LLAMA_3_2_ROPE,
)
LLAMA_3_2_3B = replace(LLAMA_3_2_1B, d_model=3072, d_head=128, n_layers=28, n_heads=24)

# TinyLlama has the tokenizer and the positions of the first LLaMA, and the eps of Llama 2.
TINYLLAMA_1_1B = replace(
    LLAMA_7B, d_model=2048, d_head=64, d_ff=5632, n_layers=22, n_kv_heads=4, eps=1e-5
)

SMOLLM2_135M = LlamaConfig(
    d_model=576,
    d_head=64,
    d_ff=1536,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    vocab_size=49152,
    own_head=False,
    eps=1e-5,
    max_length=8192,
    rope_theta=100000.0,
    bos_id=0,  # <|endoftext|> begins a text and ends it
    eos_ids=(0,),
)
SMOLLM2_360M = replace(SMOLLM2_135M, d_model=960, d_ff=2560, n_layers=32, n_heads=15, n_kv_heads=5)
SMOLLM2_1_7B = replace(
    SMOLLM2_135M,
    d_model=2048,
    d_ff=8192,
    n_layers=24,
    n_heads=32,
    n_kv_heads=32,
    rope_theta=130000.0,
)

TINY_T5 = T5Config(
    d_model=64,
    d_head=16,
    d_ff=192,
    n_layers=2,
    n_decoder_layers=2,
    n_heads=4,
    vocab_size=320,
    dropout=0.0,
)

# fmt: off
KNOWN_MODELS = {
    # The model of this repository. It is trained on the toy tasks in data/.
    "tiny-t5":        KnownModel(str(EMBEDDED), "tiny-t5", TINY_T5),

    # T5 v1.0 saw GLUE, SuperGLUE and other tasks with their labels in pre-training, so its results
    # on these tasks are not few-shot. On the hub, a T5 without a version in its name is v1.0.
    "t5-small":       KnownModel("google-t5/t5-small", "t5-v1.0", t5_v1_0(512, 64, 2048, 6, 8)),
    "t5-base":        KnownModel("google-t5/t5-base", "t5-v1.0", t5_v1_0(768, 64, 3072, 12, 12)),
    "t5-large":       KnownModel("google-t5/t5-large", "t5-v1.0", t5_v1_0(1024, 64, 4096, 24, 16)),
    # In these two, n_heads * d_head (4,096 and 16,384) is not d_model (1,024).
    "t5-3b":          KnownModel("google-t5/t5-3b", "t5-v1.0", t5_v1_0(1024, 128, 16384, 24, 32)),
    "t5-11b":         KnownModel("google-t5/t5-11b", "t5-v1.0", t5_v1_0(1024, 128, 65536, 24, 128)),

    # T5 v1.1 saw only C4, and no task.
    "t5-v1.1-small":  KnownModel("google/t5-v1_1-small", "t5-v1.1", T5_V1_1_SMALL),
    "t5-v1.1-base":   KnownModel("google/t5-v1_1-base", "t5-v1.1", T5_V1_1_BASE),
    "t5-v1.1-large":  KnownModel("google/t5-v1_1-large", "t5-v1.1", T5_V1_1_LARGE),
    "t5-v1.1-xl":     KnownModel("google/t5-v1_1-xl", "t5-v1.1", T5_V1_1_XL),
    "t5-v1.1-xxl":    KnownModel("google/t5-v1_1-xxl", "t5-v1.1", T5_V1_1_XXL),

    # Flan-T5 is T5 v1.1 after instruction tuning on 1,836 tasks, RTE, CB and COPA among them.
    "flan-t5-small":  KnownModel("google/flan-t5-small", "flan-t5", T5_V1_1_SMALL),
    "flan-t5-base":   KnownModel("google/flan-t5-base", "flan-t5", T5_V1_1_BASE),
    "flan-t5-large":  KnownModel("google/flan-t5-large", "flan-t5", T5_V1_1_LARGE),
    "flan-t5-xl":     KnownModel("google/flan-t5-xl", "flan-t5", T5_V1_1_XL),
    "flan-t5-xxl":    KnownModel("google/flan-t5-xxl", "flan-t5", T5_V1_1_XXL),

    # T0 is T5 v1.1 after training on the prompts of P3, which hold no NLI. The paper of (IA)^3
    # starts from T0. The model called T0 is the 11B.
    "t0-3b":          KnownModel("bigscience/T0_3B", "t0", T5_V1_1_XL),
    "t0-11b":         KnownModel("bigscience/T0", "t0", T5_V1_1_XXL),

    # Meta's own repositories are gated. The first LLaMA has no repository, so its row names a copy.
    "llama-7b":       KnownModel("huggyllama/llama-7b", "llama", LLAMA_7B),
    "llama-2-7b":     KnownModel("meta-llama/Llama-2-7b-hf", "llama", LLAMA_2_7B),
    "llama-2-13b":    KnownModel("meta-llama/Llama-2-13b-hf", "llama", LLAMA_2_13B),
    "llama-2-70b":    KnownModel("meta-llama/Llama-2-70b-hf", "llama", LLAMA_2_70B),
    "llama-3-8b":     KnownModel("meta-llama/Meta-Llama-3-8B", "llama", LLAMA_3_8B),
    "llama-3-70b":    KnownModel("meta-llama/Meta-Llama-3-70B", "llama", LLAMA_3_70B),
    "llama-3.1-8b":   KnownModel("meta-llama/Llama-3.1-8B", "llama", LLAMA_3_1_8B),
    "llama-3.1-70b":  KnownModel("meta-llama/Llama-3.1-70B", "llama", LLAMA_3_1_70B),
    "llama-3.2-1b":   KnownModel("meta-llama/Llama-3.2-1B", "llama", LLAMA_3_2_1B),
    "llama-3.2-3b":   KnownModel("meta-llama/Llama-3.2-3B", "llama", LLAMA_3_2_3B),
    "tinyllama-1.1b": KnownModel("TinyLlama/TinyLlama_v1.1", "llama", TINYLLAMA_1_1B),

    # SmolLM2 has LLaMA's architecture, and a repository that is open to all.
    "smollm2-135m":   KnownModel("HuggingFaceTB/SmolLM2-135M", "smollm2", SMOLLM2_135M),
    "smollm2-360m":   KnownModel("HuggingFaceTB/SmolLM2-360M", "smollm2", SMOLLM2_360M),
    "smollm2-1.7b":   KnownModel("HuggingFaceTB/SmolLM2-1.7B", "smollm2", SMOLLM2_1_7B),
}
# fmt: on


def known_model(name):
    """Return the row of a short name or a hub id, or None if the table has no such row.

    Upper and lower case are the same. A folder of that name that holds a model wins over the table:
    then the result is None, too.
    """
    path = str(name)
    # os.path.exists, because Path.exists raises OSError if a name is too long for the file system.
    holds_model = any(os.path.exists(os.path.join(path, file)) for file in CONFIG_FILES)
    if holds_model and path != str(EMBEDDED):
        return None
    for short, row in KNOWN_MODELS.items():
        if path.lower() in (short, row.repo.lower()):
            return row
    return None


def hub_name(name):
    """Return the hub repository of a known name. For other names and the embedded model, return
    `name`.
    """
    row = known_model(name)
    if row is None or row.repo == str(EMBEDDED):
        return name
    return row.repo


def base_of(name_or_path):
    """Return the name of the known model that a folder was made from, or else `name_or_path`.

    `save_model` writes this name to config.json as `_name_or_path`, so a merged t5-base gets the
    prompts that t5-base knows from pre-training.
    """
    config = Path(name_or_path, "config.json")
    if not config.is_file():
        return name_or_path
    base = read_json(config).get("_name_or_path")
    return base if known_model(base) else name_or_path
