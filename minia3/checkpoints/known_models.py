"""The known models: short name -> hub repository, family and sizes; and other names of them.

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
from minia3.files.write import finish_writing
from minia3.model.llama import LlamaConfig
from minia3.model.t5 import T5Config

# The folder of the model that was trained for minia3 and comes with it.
EMBEDDED = find_shipped("data") / "tiny-t5"

# Sizes by which a copy of a known model is recognized: in our configs -> in config.json
T5_SIZES = {
    "d_model": "d_model",
    "d_ff": "d_ff",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
}
LLAMA_SIZES = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}


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

# ByT5 reads bytes: its embedding is small, and its encoder three times as deep as its decoder.
BYT5_SMALL = replace(
    t5_v1_1(d_model=1472, d_ff=3584, n_layers=12, n_heads=6), n_decoder_layers=4, vocab_size=384
)
BYT5_BASE = replace(
    BYT5_SMALL, d_model=1536, d_ff=3968, n_layers=18, n_decoder_layers=6, n_heads=12
)
BYT5_LARGE = replace(BYT5_BASE, d_ff=3840, n_layers=36, n_decoder_layers=12, n_heads=16)
BYT5_XL = replace(BYT5_LARGE, d_model=2560, d_ff=6720, n_heads=32)
BYT5_XXL = replace(BYT5_LARGE, d_model=4672, d_ff=12352, n_heads=64)


def codet5(d_model, d_ff, n_layers, n_heads):
    """Return the config of a CodeT5: T5 v1.0 with a vocabulary of code, <s> 1 and </s> 2."""
    return replace(t5_v1_0(d_model, 64, d_ff, n_layers, n_heads), vocab_size=32100, eos_ids=(2,))


def multilingual(config):
    """Return the config of an mT5: T5 v1.1 with a vocabulary of 101 languages."""
    return replace(config, vocab_size=250112)


def umt5(config):
    """Return the config of a umT5: 107 languages, and a table of position biases in each layer."""
    return replace(config, vocab_size=256384, own_positions=True)


UL2 = replace(t5_v1_1(4096, 16384, 32, 16), d_head=256, activation="silu", dropout=0.0)

# The defaults of LlamaConfig describe the first LLaMA: 2,048 positions, theta 10,000, eps 1e-6,
# <s> 1 and </s> 2.
LLAMA_7B = LlamaConfig(
    d_model=4096, d_head=128, d_ff=11008, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000
)
LLAMA_13B = replace(LLAMA_7B, d_model=5120, d_ff=13824, n_layers=40, n_heads=40, n_kv_heads=40)
LLAMA_30B = replace(LLAMA_7B, d_model=6656, d_ff=17920, n_layers=60, n_heads=52, n_kv_heads=52)
LLAMA_65B = replace(
    LLAMA_7B, d_model=8192, d_ff=22016, n_layers=80, n_heads=64, n_kv_heads=64, eps=1e-5
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
LLAMA_3_1_405B = replace(LLAMA_3_1_8B, d_model=16384, d_ff=53248, n_layers=126, n_heads=128)
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

# The end of a text, of a message to a tool, and of a turn
LLAMA_3_ENDS = (128001, 128008, 128009)

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

# Only the first Mistral has a window.
MISTRAL_7B_V0_1 = replace(LLAMA_2_7B, d_ff=14336, n_kv_heads=8, max_length=32768, window=4096)
MISTRAL_7B_V0_2 = replace(MISTRAL_7B_V0_1, window=None, rope_theta=1000000.0)
MISTRAL_7B_V0_3 = replace(MISTRAL_7B_V0_2, vocab_size=32768)

# Qwen2 and Qwen2.5 have the same sizes. Their files name a window, but do not use it.
QWEN2_0_5B = LlamaConfig(
    d_model=896,
    d_head=64,
    d_ff=4864,
    n_layers=24,
    n_heads=14,
    n_kv_heads=2,
    vocab_size=151936,
    own_head=False,  # the small models are tied
    qkv_bias=True,
    max_length=131072,
    rope_theta=1000000.0,
    bos_id=151643,  # <|endoftext|> begins a text and ends it
    eos_ids=(151643,),
)
QWEN2_1_5B = replace(QWEN2_0_5B, d_model=1536, d_head=128, d_ff=8960, n_layers=28, n_heads=12)
QWEN2_7B = replace(
    QWEN2_1_5B,
    d_model=3584,
    d_ff=18944,
    n_heads=28,
    n_kv_heads=4,
    vocab_size=152064,
    own_head=True,
)
QWEN2_72B = replace(
    QWEN2_7B, d_model=8192, d_ff=29568, n_layers=80, n_heads=64, n_kv_heads=8, eps=1e-5
)
QWEN2_5_0_5B = replace(QWEN2_0_5B, max_length=32768)
QWEN2_5_3B = replace(
    QWEN2_1_5B, d_model=2048, d_ff=11008, n_layers=36, n_heads=16, max_length=32768
)
QWEN2_5_14B = replace(QWEN2_72B, d_model=5120, d_ff=13824, n_layers=48, n_heads=40)
QWEN2_5_32B = replace(QWEN2_5_14B, d_ff=27648, n_layers=64)


def qwen2_instruct(config):
    """Return the config of a Qwen2 or Qwen2.5 that was tuned to chat: <|im_end|> ends a turn."""
    return replace(config, eps=1e-6, max_length=32768, eos_ids=(151645,))


QWEN3_0_6B = LlamaConfig(
    d_model=1024,
    d_head=128,
    d_ff=3072,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    vocab_size=151936,
    own_head=False,
    qk_norm=True,
    max_length=40960,
    rope_theta=1000000.0,
    bos_id=151643,
    eos_ids=(151645,),
)
QWEN3_1_7B = replace(QWEN3_0_6B, d_model=2048, d_ff=6144)
QWEN3_4B = replace(QWEN3_0_6B, d_model=2560, d_ff=9728, n_layers=36, n_heads=32)
QWEN3_8B = replace(QWEN3_4B, d_model=4096, d_ff=12288, own_head=True)
QWEN3_14B = replace(QWEN3_8B, d_model=5120, d_ff=17408, n_layers=40, n_heads=40)
QWEN3_32B = replace(QWEN3_14B, d_ff=25600, n_layers=64, n_heads=64)


def qwen3_base(config):
    """Return the config of a Qwen3 before it was tuned to chat."""
    return replace(config, max_length=32768, eos_ids=(151643,))


def smollm2_instruct(config):
    """Return the config of a SmolLM2 that was tuned to chat: <|im_start|> 1 and <|im_end|> 2."""
    return replace(config, bos_id=1, eos_ids=(2,), pad_id=2)


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

    # T5 v1.1 saw only C4, and no task. The LM-adapted ones went on with C4 as language models.
    "t5-v1.1-small":  KnownModel("google/t5-v1_1-small", "t5-v1.1", T5_V1_1_SMALL),
    "t5-v1.1-base":   KnownModel("google/t5-v1_1-base", "t5-v1.1", T5_V1_1_BASE),
    "t5-v1.1-large":  KnownModel("google/t5-v1_1-large", "t5-v1.1", T5_V1_1_LARGE),
    "t5-v1.1-xl":     KnownModel("google/t5-v1_1-xl", "t5-v1.1", T5_V1_1_XL),
    "t5-v1.1-xxl":    KnownModel("google/t5-v1_1-xxl", "t5-v1.1", T5_V1_1_XXL),
    "t5-small-lm-adapt": KnownModel("google/t5-small-lm-adapt", "t5-v1.1", T5_V1_1_SMALL),
    "t5-base-lm-adapt":  KnownModel("google/t5-base-lm-adapt", "t5-v1.1", T5_V1_1_BASE),
    "t5-large-lm-adapt": KnownModel("google/t5-large-lm-adapt", "t5-v1.1", T5_V1_1_LARGE),
    "t5-xl-lm-adapt":    KnownModel("google/t5-xl-lm-adapt", "t5-v1.1", T5_V1_1_XL),
    "t5-xxl-lm-adapt":   KnownModel("google/t5-xxl-lm-adapt", "t5-v1.1", T5_V1_1_XXL),

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
    # T0p was also trained on HellaSwag and other tasks with which GPT-3 was evaluated, and T0pp
    # beyond that on SuperGLUE without RTE and CB (t0/datasets.csv of T0's code).
    "t0p-11b":        KnownModel("bigscience/T0p", "t0p", T5_V1_1_XXL),
    "t0pp-11b":       KnownModel("bigscience/T0pp", "t0pp", T5_V1_1_XXL),
    # The last two are trained on fewer prompts than T0.
    "t0-single-prompt":      KnownModel("bigscience/T0_single_prompt", "t0", T5_V1_1_XXL),
    "t0-original-task-only": KnownModel("bigscience/T0_original_task_only", "t0", T5_V1_1_XXL),

    # UL2 saw only C4. Flan-UL2 is UL2 after the same tuning as Flan-T5.
    "ul2":            KnownModel("google/ul2", "ul2", UL2),
    "flan-ul2":       KnownModel("google/flan-ul2", "flan-t5", UL2),

    # These saw only texts in many languages (mC4), and no task.
    "byt5-small":     KnownModel("google/byt5-small", "mc4", BYT5_SMALL),
    "byt5-base":      KnownModel("google/byt5-base", "mc4", BYT5_BASE),
    "byt5-large":     KnownModel("google/byt5-large", "mc4", BYT5_LARGE),
    "byt5-xl":        KnownModel("google/byt5-xl", "mc4", BYT5_XL),
    "byt5-xxl":       KnownModel("google/byt5-xxl", "mc4", BYT5_XXL),
    "mt5-small":      KnownModel("google/mt5-small", "mc4", multilingual(T5_V1_1_SMALL)),
    "mt5-base":       KnownModel("google/mt5-base", "mc4", multilingual(T5_V1_1_BASE)),
    "mt5-large":      KnownModel("google/mt5-large", "mc4", multilingual(T5_V1_1_LARGE)),
    "mt5-xl":         KnownModel("google/mt5-xl", "mc4", multilingual(T5_V1_1_XL)),
    "mt5-xxl":        KnownModel("google/mt5-xxl", "mc4", multilingual(T5_V1_1_XXL)),
    "umt5-small":     KnownModel("google/umt5-small", "mc4", umt5(T5_V1_1_SMALL)),
    "umt5-base":      KnownModel("google/umt5-base", "mc4", umt5(T5_V1_1_BASE)),
    "umt5-xl":        KnownModel("google/umt5-xl", "mc4", umt5(T5_V1_1_XL)),
    "umt5-xxl":       KnownModel("google/umt5-xxl", "mc4", umt5(T5_V1_1_XXL)),

    # mT0 is mT5 after training on xP3, whose English part has T0's tasks.
    "mt0-small":      KnownModel("bigscience/mt0-small", "t0", multilingual(T5_V1_1_SMALL)),
    "mt0-base":       KnownModel("bigscience/mt0-base", "t0", multilingual(T5_V1_1_BASE)),
    "mt0-large":      KnownModel("bigscience/mt0-large", "t0", multilingual(T5_V1_1_LARGE)),
    "mt0-xl":         KnownModel("bigscience/mt0-xl", "t0", multilingual(T5_V1_1_XL)),
    "mt0-xxl":        KnownModel("bigscience/mt0-xxl", "t0", multilingual(T5_V1_1_XXL)),

    # CodeT5 saw programs, and its base also tasks on programs.
    "codet5-small":   KnownModel("Salesforce/codet5-small", "codet5", codet5(512, 2048, 6, 8)),
    "codet5-base":    KnownModel("Salesforce/codet5-base", "codet5", codet5(768, 3072, 12, 12)),
    "codet5-large":   KnownModel("Salesforce/codet5-large", "codet5", codet5(1024, 4096, 24, 16)),

    # Meta's own repositories are gated. The first LLaMA has no repository, so its rows name copies.
    "llama-7b":      KnownModel("huggyllama/llama-7b", "llama", LLAMA_7B),
    "llama-13b":     KnownModel("huggyllama/llama-13b", "llama", LLAMA_13B),
    "llama-30b":     KnownModel("huggyllama/llama-30b", "llama", LLAMA_30B),
    "llama-65b":     KnownModel("huggyllama/llama-65b", "llama", LLAMA_65B),
    "llama-2-7b":    KnownModel("meta-llama/Llama-2-7b-hf", "llama", LLAMA_2_7B),
    "llama-2-13b":   KnownModel("meta-llama/Llama-2-13b-hf", "llama", LLAMA_2_13B),
    "llama-2-70b":   KnownModel("meta-llama/Llama-2-70b-hf", "llama", LLAMA_2_70B),
    "llama-2-7b-chat": KnownModel("meta-llama/Llama-2-7b-chat-hf", "llama", LLAMA_2_7B),
    "llama-2-13b-chat": KnownModel("meta-llama/Llama-2-13b-chat-hf", "llama", LLAMA_2_13B),
    "llama-2-70b-chat": KnownModel("meta-llama/Llama-2-70b-chat-hf", "llama", LLAMA_2_70B),
    "llama-3-8b":    KnownModel("meta-llama/Meta-Llama-3-8B", "llama", LLAMA_3_8B),
    "llama-3-70b":   KnownModel("meta-llama/Meta-Llama-3-70B", "llama", LLAMA_3_70B),
    "llama-3.1-8b":  KnownModel("meta-llama/Llama-3.1-8B", "llama", LLAMA_3_1_8B),
    "llama-3.1-70b": KnownModel("meta-llama/Llama-3.1-70B", "llama", LLAMA_3_1_70B),
    "llama-3.1-405b": KnownModel("meta-llama/Llama-3.1-405B", "llama", LLAMA_3_1_405B),
    "llama-3.2-1b":  KnownModel("meta-llama/Llama-3.2-1B", "llama", LLAMA_3_2_1B),
    "llama-3.2-3b":  KnownModel("meta-llama/Llama-3.2-3B", "llama", LLAMA_3_2_3B),
    # Tuned to chat. Llama 3.3 exists only in this form.
    "llama-3-8b-instruct": KnownModel(
        "meta-llama/Meta-Llama-3-8B-Instruct", "llama", replace(LLAMA_3_8B, eos_ids=(128009,))
    ),
    "llama-3-70b-instruct": KnownModel(
        "meta-llama/Meta-Llama-3-70B-Instruct", "llama", replace(LLAMA_3_70B, eos_ids=(128009,))
    ),
    "llama-3.1-8b-instruct": KnownModel(
        "meta-llama/Llama-3.1-8B-Instruct", "llama", replace(LLAMA_3_1_8B, eos_ids=LLAMA_3_ENDS)
    ),
    "llama-3.1-70b-instruct": KnownModel(
        "meta-llama/Llama-3.1-70B-Instruct", "llama", replace(LLAMA_3_1_70B, eos_ids=LLAMA_3_ENDS)
    ),
    "llama-3.1-405b-instruct": KnownModel(
        "meta-llama/Llama-3.1-405B-Instruct", "llama", replace(LLAMA_3_1_405B, eos_ids=LLAMA_3_ENDS)
    ),
    "llama-3.2-1b-instruct": KnownModel(
        "meta-llama/Llama-3.2-1B-Instruct", "llama", replace(LLAMA_3_2_1B, eos_ids=LLAMA_3_ENDS)
    ),
    "llama-3.2-3b-instruct": KnownModel(
        "meta-llama/Llama-3.2-3B-Instruct", "llama", replace(LLAMA_3_2_3B, eos_ids=LLAMA_3_ENDS)
    ),
    "llama-3.3-70b-instruct": KnownModel(
        "meta-llama/Llama-3.3-70B-Instruct", "llama", replace(LLAMA_3_1_70B, eos_ids=LLAMA_3_ENDS)
    ),
    "tinyllama-1.1b": KnownModel("TinyLlama/TinyLlama_v1.1", "llama", TINYLLAMA_1_1B),
    "tinyllama-1.1b-chat": KnownModel(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", TINYLLAMA_1_1B
    ),

    # SmolLM2 has LLaMA's architecture, and a repository that is open to all.
    "smollm2-135m":  KnownModel("HuggingFaceTB/SmolLM2-135M", "smollm2", SMOLLM2_135M),
    "smollm2-360m":  KnownModel("HuggingFaceTB/SmolLM2-360M", "smollm2", SMOLLM2_360M),
    "smollm2-1.7b":  KnownModel("HuggingFaceTB/SmolLM2-1.7B", "smollm2", SMOLLM2_1_7B),
    "smollm2-135m-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2", smollm2_instruct(SMOLLM2_135M)
    ),
    "smollm2-360m-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2", smollm2_instruct(SMOLLM2_360M)
    ),
    "smollm2-1.7b-instruct": KnownModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2", smollm2_instruct(SMOLLM2_1_7B)
    ),

    # Mistral 0.2 exists only tuned to chat, as do the rows that end in `instruct`.
    "mistral-7b-v0.1": KnownModel("mistralai/Mistral-7B-v0.1", "mistral", MISTRAL_7B_V0_1),
    "mistral-7b-v0.3": KnownModel("mistralai/Mistral-7B-v0.3", "mistral", MISTRAL_7B_V0_3),
    "mistral-7b-instruct-v0.1": KnownModel(
        "mistralai/Mistral-7B-Instruct-v0.1", "mistral", MISTRAL_7B_V0_1
    ),
    "mistral-7b-instruct-v0.2": KnownModel(
        "mistralai/Mistral-7B-Instruct-v0.2", "mistral", MISTRAL_7B_V0_2
    ),
    "mistral-7b-instruct-v0.3": KnownModel(
        "mistralai/Mistral-7B-Instruct-v0.3", "mistral", MISTRAL_7B_V0_3
    ),

    "qwen2-0.5b":    KnownModel("Qwen/Qwen2-0.5B", "qwen2", QWEN2_0_5B),
    "qwen2-1.5b":    KnownModel("Qwen/Qwen2-1.5B", "qwen2", QWEN2_1_5B),
    "qwen2-7b":      KnownModel("Qwen/Qwen2-7B", "qwen2", QWEN2_7B),
    "qwen2-72b":     KnownModel("Qwen/Qwen2-72B", "qwen2", QWEN2_72B),
    "qwen2-0.5b-instruct": KnownModel(
        "Qwen/Qwen2-0.5B-Instruct", "qwen2", qwen2_instruct(QWEN2_0_5B)
    ),
    "qwen2-1.5b-instruct": KnownModel(
        "Qwen/Qwen2-1.5B-Instruct", "qwen2", qwen2_instruct(QWEN2_1_5B)
    ),
    "qwen2-7b-instruct": KnownModel("Qwen/Qwen2-7B-Instruct", "qwen2", qwen2_instruct(QWEN2_7B)),
    "qwen2-72b-instruct": KnownModel("Qwen/Qwen2-72B-Instruct", "qwen2", qwen2_instruct(QWEN2_72B)),
    "qwen2.5-0.5b":  KnownModel("Qwen/Qwen2.5-0.5B", "qwen2.5", QWEN2_5_0_5B),
    "qwen2.5-1.5b":  KnownModel("Qwen/Qwen2.5-1.5B", "qwen2.5", QWEN2_1_5B),
    "qwen2.5-3b":    KnownModel("Qwen/Qwen2.5-3B", "qwen2.5", QWEN2_5_3B),
    "qwen2.5-7b":    KnownModel("Qwen/Qwen2.5-7B", "qwen2.5", QWEN2_7B),
    "qwen2.5-14b":   KnownModel("Qwen/Qwen2.5-14B", "qwen2.5", QWEN2_5_14B),
    "qwen2.5-32b":   KnownModel("Qwen/Qwen2.5-32B", "qwen2.5", QWEN2_5_32B),
    "qwen2.5-72b":   KnownModel("Qwen/Qwen2.5-72B", "qwen2.5", QWEN2_72B),
    "qwen2.5-0.5b-instruct": KnownModel(
        "Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_5_0_5B)
    ),
    "qwen2.5-1.5b-instruct": KnownModel(
        "Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_1_5B)
    ),
    "qwen2.5-3b-instruct": KnownModel(
        "Qwen/Qwen2.5-3B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_5_3B)
    ),
    "qwen2.5-7b-instruct": KnownModel(
        "Qwen/Qwen2.5-7B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_7B)
    ),
    "qwen2.5-14b-instruct": KnownModel(
        "Qwen/Qwen2.5-14B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_5_14B)
    ),
    "qwen2.5-32b-instruct": KnownModel(
        "Qwen/Qwen2.5-32B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_5_32B)
    ),
    "qwen2.5-72b-instruct": KnownModel(
        "Qwen/Qwen2.5-72B-Instruct", "qwen2.5", qwen2_instruct(QWEN2_72B)
    ),
    # A Qwen3 without an ending was tuned to chat.
    "qwen3-0.6b":    KnownModel("Qwen/Qwen3-0.6B", "qwen3", QWEN3_0_6B),
    "qwen3-1.7b":    KnownModel("Qwen/Qwen3-1.7B", "qwen3", QWEN3_1_7B),
    "qwen3-4b":      KnownModel("Qwen/Qwen3-4B", "qwen3", QWEN3_4B),
    "qwen3-8b":      KnownModel("Qwen/Qwen3-8B", "qwen3", QWEN3_8B),
    "qwen3-14b":     KnownModel("Qwen/Qwen3-14B", "qwen3", QWEN3_14B),
    "qwen3-32b":     KnownModel("Qwen/Qwen3-32B", "qwen3", QWEN3_32B),
    "qwen3-0.6b-base": KnownModel("Qwen/Qwen3-0.6B-Base", "qwen3", qwen3_base(QWEN3_0_6B)),
    "qwen3-1.7b-base": KnownModel("Qwen/Qwen3-1.7B-Base", "qwen3", qwen3_base(QWEN3_1_7B)),
    "qwen3-4b-base": KnownModel("Qwen/Qwen3-4B-Base", "qwen3", qwen3_base(QWEN3_4B)),
    "qwen3-8b-base": KnownModel("Qwen/Qwen3-8B-Base", "qwen3", qwen3_base(QWEN3_8B)),
    "qwen3-14b-base": KnownModel("Qwen/Qwen3-14B-Base", "qwen3", qwen3_base(QWEN3_14B)),
}

# Other names that people use -> short name. Texts and papers write them, or the hub redirects them.
OTHER_NAMES = {
    "google/t5-small":       "t5-small",
    "google/t5-base":        "t5-base",
    "google/t5-large":       "t5-large",
    "google/t5-3b":          "t5-3b",
    "google/t5-11b":         "t5-11b",
    "google/t5-v1.1-small":  "t5-v1.1-small",
    "google/t5-v1.1-base":   "t5-v1.1-base",
    "google/t5-v1.1-large":  "t5-v1.1-large",
    "google/t5-v1.1-xl":     "t5-v1.1-xl",
    "google/t5-v1.1-xxl":    "t5-v1.1-xxl",
    "t5-v1_1-small":         "t5-v1.1-small",
    "t5-v1_1-base":          "t5-v1.1-base",
    "t5-v1_1-large":         "t5-v1.1-large",
    "t5-v1_1-xl":            "t5-v1.1-xl",
    "t5-v1_1-xxl":           "t5-v1.1-xxl",
    "t0_3b":                 "t0-3b",
    "t0":                    "t0-11b",
    "t0p":                   "t0p-11b",
    "t0pp":                  "t0pp-11b",
    "bigscience/t0_11b":     "t0-11b",
    "meta-llama/meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama/meta-llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama/meta-llama-3.1-70b": "llama-3.1-70b",
    "meta-llama/meta-llama-3.1-70b-instruct": "llama-3.1-70b-instruct",
    "meta-llama/meta-llama-3.1-405b": "llama-3.1-405b",
    "meta-llama/meta-llama-3.1-405b-instruct": "llama-3.1-405b-instruct",
    "llama-33b": "llama-30b",
    "mistral-7b": "mistral-7b-v0.1",
}
# fmt: on


def known_model(name):
    """Return the row of a name in KNOWN_MODELS or OTHER_NAMES or of a hub id, or None.

    Upper and lower case are the same. A folder of that name that holds a model wins over the table:
    then the result is None, too.
    """
    path = str(name)
    # os.path.exists, because Path.exists raises OSError if a name is too long for the file system.
    holds_model = any(os.path.exists(os.path.join(path, file)) for file in CONFIG_FILES)
    if holds_model and path != str(EMBEDDED):
        return None
    return row_of(path)


def row_of(name):
    """Return the row of a name or of a hub id, whatever folders there are, or None."""
    lower = name.lower()
    short_name = OTHER_NAMES.get(lower, lower)
    for short, row in KNOWN_MODELS.items():
        if short_name in (short, row.repo.lower()):
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


def public_name(name):
    """Return the name of a model for files that leave this machine: `hub_name`, but only the last
    part of an absolute path, which means nothing elsewhere. name: a text, a Path or None.
    """
    hub = None if name is None else hub_name(os.fspath(name))
    if hub is None or not os.path.isabs(hub):
        return hub
    return os.path.basename(os.path.normpath(hub))


def base_of(name_or_path):
    """Return the name of the known model that a folder was made from, or else `name_or_path`.

    `save_model` writes this name to config.json as `_name_or_path`, so a merged t5-base gets the
    prompts that t5-base knows from pre-training. So does a copy of t5-base, in the hub's cache or
    elsewhere.
    """
    return find_base(name_or_path) or name_or_path


def known_base(name_or_path):
    """Return the row of the known model of that name, or that a folder was made from, or None."""
    base = find_base(name_or_path)
    # A copy may have the path that is the model's name, and would hide the row.
    return known_model(name_or_path) if base is None else row_of(base)


def find_base(name_or_path):
    """Return the name of the known model that a folder was made from, or None."""
    finish_writing(name_or_path)
    path = Path(name_or_path, "config.json")
    if not path.is_file():
        return None
    folder = Path(os.path.abspath(path.parent))
    config = read_json(path)
    row = row_in_cache(folder)
    base = config.get("_name_or_path")
    if row is None and isinstance(base, str) and row_of(base):  # whatever folders there are
        return base
    row = row or row_of_copy(folder, config)
    return row.repo if row else None


def row_in_cache(folder):
    """Return the row of a folder in the hub's cache, models--google-t5--t5-base/snapshots/..., or
    None. Its config.json may name the model from which the known model was made.
    """
    if folder.parent.name != "snapshots":
        return None
    repo = folder.parent.parent.name.removeprefix("models--")
    return row_of(repo.replace("--", "/"))


def row_of_copy(folder, config):
    """Return the row of the known model whose name and sizes a folder has, or None.

    `hf download google-t5/t5-base --local-dir t5-base` makes such a folder. config: the content of
    its config.json.
    """
    name = folder.name.lower()
    for row in KNOWN_MODELS.values():
        is_named = row is row_of(name) or name == row.repo.lower().partition("/")[2]
        if is_named and row.repo != str(EMBEDDED) and has_sizes(config, row.config):
            return row
    return None


def has_sizes(config, expected):
    """Return whether the content of a config.json has the sizes of a T5Config or a LlamaConfig."""
    names = T5_SIZES if isinstance(expected, T5Config) else LLAMA_SIZES
    return all(config.get(key) == getattr(expected, name) for name, key in names.items())
