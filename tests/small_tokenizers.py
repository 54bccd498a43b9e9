"""Small tokenizers for the tests: sentencepiece models trained here, files written by hand, and BPE
over bytes.

Whatever takes time is made when it is first asked for, once.
"""

import functools
import io
import json
import random
import struct
import tempfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minia3.checkpoints.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece", reason="needs the extra: pip install 'minia3[test]'")

# Texts

SYLLABLES = [
    *("an", "na", "ha", "re", "red", "ing", "th", "er", "ball"),
    *("tom", "s", "ed", "a", "o", "st", "ri", "lo", "we"),
]


def texts_with_spaces():
    texts = []
    for n_before in (0, 1, 2, 3, 7, 8, 20):
        for word in ("", "a", "\n", "é"):
            for n_after in (0, 1, 5):
                texts.append(" " * n_before + word + " " * n_after)
    return texts


SPACES = texts_with_spaces()
ODD = [
    *(
        "\t",
        "\n\n x",
        "a\tb",
        "e\u0301\u0302",
        "🎉👩‍👩‍👧",
        "中国 日本",
        "\u200b\u00a0",
        "\x00\x7f",
        "ﬁ ½ Ⅷ",
    ),
    *("▁ a", "<0x0A>"),
]
TEXTS = [*SPACES, *ODD, "the red hats of anna", "tom's ball 305305", "hhhhhhh aaaaaaa"]


@functools.cache
def corpus():
    """Return 300 lines of made-up words, and words of TEXTS."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(200)]
    words += ["12", "305", ",", ";", "!", "tom's", "hats", "the", "red", "hall"] * 4
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(300)]


# Trained sentencepiece models

# As T5, mT5 and LLaMA-2 were trained, and with what else a file may ask for
T5_OPTIONS = {
    **{"model_type": "unigram", "vocab_size": 120},
    **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}
LLAMA_OPTIONS = {
    **{"model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "split_digits": True},
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "allow_whitespace_only_pieces": True,
}
OPTIONS = {
    "t5": T5_OPTIONS,
    "mt5": T5_OPTIONS | {"vocab_size": 376, "byte_fallback": True},
    "llama": LLAMA_OPTIONS,
    "llama-no-bytes": LLAMA_OPTIONS | {"vocab_size": 80, "byte_fallback": False},
    "llama-no-prefix": LLAMA_OPTIONS | {"add_dummy_prefix": False},
    "llama-spaces-inside": LLAMA_OPTIONS | {"split_by_whitespace": False},
    "llama-user-defined": LLAMA_OPTIONS
    | {"user_defined_symbols": "<sep>,<cls>", "control_symbols": "<ctl>"}
    | {"add_dummy_prefix": False},  # with a prefix, it is refused
}
# What Google's code appends to the pieces of an mT5: user-defined pieces (4), each with its space
MT5_SENTINELS = [("▁<extra_id_1>", 0.0, 4), ("▁<extra_id_0>", 0.0, 4)]


def file_name(name):
    """Return how the file of a model is called in a checkpoint, by which we tell T5 from LLaMA."""
    return "spiece.model" if name.endswith("t5") else "tokenizer.model"


@functools.cache
def trained(name):
    """Return the content of a sentencepiece file."""
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=file,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **OPTIONS[name],
    )
    content = file.getvalue()
    if name == "mt5":
        content += sentencepiece_file(MT5_SENTINELS, model_type=1)
    return content


@functools.cache
def peer(name):
    """Return sentencepiece's own processor of a trained model."""
    return spm.SentencePieceProcessor(model_proto=trained(name))


@functools.cache
def small(name):
    """Return our tokenizer of a trained model."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_folder(write(Path(folder), name))


def write(folder, name, **beside):
    """Write a trained model, and JSON files (tokenizer_config={...}). Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name(name)).write_bytes(trained(name))
    write_beside(folder, **beside)
    return folder


def write_beside(folder, **beside):
    for stem, content in beside.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))


def gguf_of(name):
    """Return a trained model as the metadata of a GGUF file."""
    processor = peer(name)
    tokens = []
    scores = []
    kinds = []
    for i in range(processor.get_piece_size()):
        tokens.append(processor.id_to_piece(i))
        scores.append(processor.get_score(i))
        kinds.append(kind_of(processor, i))
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def kind_of(processor, i):
    if processor.is_unknown(i):
        return 2
    if processor.is_control(i):
        return 3
    if processor.is_byte(i):
        return 6
    return 1


# Sentencepiece files by hand

# Text, score, kind: 1 is normal, 2 unknown, 3 control, 4 user-defined, 6 a byte
BASE = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("▁", -9.0, 1),
    ("a", -9.0, 1),
    ("aa", -1.0, 1),
]


def varint(value):
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    """Return a field of a protobuf message: an int, a float, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_file(pieces, model_type=2):
    """Return the content of a file that leaves out whatever has its default value."""
    content = b""
    for text, score, kind in pieces:
        piece = field(1, text.encode()) + field(2, score)
        if kind != 1:
            piece += field(3, kind)
        content += field(1, piece)
    if model_type != 1:
        content += field(2, field(3, model_type))
    return content


# BPE over bytes


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level():
    """Return a trained BPE over bytes, and the metadata of a GGUF file that holds it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = BYTE_LEVEL
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }
    return backend, metadata


# Checks that several tests share


def check_refused(folder, *words):
    """Loading a folder's tokenizer fails with a short line that has the folder and these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are looked for below)
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


def check_same_segmentation(processor, ids, expected):
    """The ids are equal, or their scores tie but for sentencepiece's rounding to float32."""
    if ids == expected:
        return
    assert processor.decode(ids) == processor.decode(expected)
    score = sum(processor.get_score(i) for i in ids)
    expected_score = sum(processor.get_score(i) for i in expected)
    assert abs(score - expected_score) <= 1e-6 * abs(expected_score)


def check_join(tokenizer, prompt, text):
    """A prompt and a target that are encoded separately give the ids of the joined text."""
    joined = tokenizer.encode(prompt + " " + text.removeprefix(" "))
    target = tokenizer.encode_target(text, end=False)
    assert tokenizer.encode(prompt) + target == joined
    assert tokenizer.encode_target(text, end=True) == [*target, tokenizer.eos_id]


def check_saved(tokenizer, folder, texts):
    """What was saved in `folder` gives the same ids and texts here and in transformers."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    again = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        batch = theirs(text)
        ids = batch["input_ids"]
        assert again.encode(text) == ids == tokenizer.encode(text)
        assert set(batch) == {"input_ids", "attention_mask"}
        decoded = theirs.decode(ids, skip_special_tokens=True)
        assert again.decode(ids) == decoded == tokenizer.decode(ids)
    target = tokenizer.encode_target("hall", end=True)
    assert again.encode_target("hall", end=True) == target
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert (again.bos_id, again.eos_id, again.pad_id) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == ids[:2]
