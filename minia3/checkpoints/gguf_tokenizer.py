"""Build a tokenizer of the package `tokenizers` from the metadata of a GGUF file.

A GGUF file holds its tokenizer as lists: the tokens in the order of their ids, their kinds, and
either scores or merges. It has scores if tokenizer.ggml.model is "llama" (the pieces of a
sentencepiece model), and merges if it is "gpt2" (BPE over bytes). The rule by which a text is cut
into words before bytes are merged is given only by a name, tokenizer.ggml.pre, and its meaning is
in the code of llama.cpp. We know the names below, and refuse other names, because a wrong rule
would yield slightly wrong ids.
"""

from typing import NamedTuple

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minia3.checkpoints.sentencepiece import (
    BPE,
    NORMAL,
    UNKNOWN,
    NormalizerSpec,
    Piece,
    add_special_pieces,
    check_characters,
    check_ties,
    sentencepiece_backend,
)

# What Llama 3 calls a word, in the order in which the alternatives are tried
LLAMA3_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit is a word


class WordRule(NamedTuple):
    """How a tokenizer over bytes cuts a text into words.

    pattern: each match becomes a part of the text. None: the text is one part.
    has_gpt2_words: True if the parts are then cut into GPT-2's words.
    has_whole_words: True if a word that is a token stays whole, even if no merges lead to it.
    has_bos: True if a text begins with bos, unless the metadata says otherwise.
    is_composed: True if a letter and its accents become one character first (Unicode's NFC).
    """

    pattern: str | None = None
    has_gpt2_words: bool = True
    has_whole_words: bool = False
    has_bos: bool = False
    is_composed: bool = False


LLAMA3 = WordRule(LLAMA3_WORDS, has_gpt2_words=False, has_whole_words=True, has_bos=True)
# llama.cpp leaves out NFC, but the models were trained with it.
QWEN2 = WordRule(QWEN2_WORDS, has_gpt2_words=False, is_composed=True)

# tokenizer.ggml.pre -> rule
WORD_RULES = {
    "gpt-2": WordRule(),
    # Each digit is a word.
    "smollm": WordRule(r"\p{N}"),
    # Qwen2, Qwen2.5, Qwen3, and the R1-Distill models that DeepSeek made of them
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    # Llama 3, under three names
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
}


def read_gguf_tokenizer(metadata):
    """Return (backend, settings). The settings have the keys of Hugging Face's JSON files.

    metadata: {"tokenizer.ggml.tokens": [...], ...}; other keys are ignored.

    Raise ValueError if the kind of the tokenizer is unknown, and an exception of any type (KeyError
    ...) if the metadata is damaged.
    """
    settings = strip_prefixes(metadata)
    kind = settings.get("model")
    rule_name = settings.get("pre")
    if kind == "llama":
        backend = backend_with_scores(settings)
        has_bos = True
    elif kind == "gpt2" and rule_name in WORD_RULES:
        rule = WORD_RULES[rule_name]
        backend = backend_over_bytes(settings, rule)
        has_bos = rule.has_bos
    elif kind == "gpt2" and rule_name is None:
        raise ValueError(
            "the file does not say how a text is cut into words (tokenizer.ggml.pre is missing, as "
            "in files from before May 2024): use a newer conversion of the model"
        )
    else:
        known = ", ".join(WORD_RULES)
        raise ValueError(
            f"tokenizer {kind!r}, pre {rule_name!r}; expected llama, or gpt2 with {known}"
        )
    settings.setdefault("add_bos_token", has_bos)
    settings["is_encoder_decoder"] = False  # gguf.py reads no other model
    settings.setdefault("pad_token_id", settings.get("padding_token_id"))
    if UNKNOWN in settings["token_type"]:
        settings["unk_token"] = settings["tokens"][settings["token_type"].index(UNKNOWN)]
    settings["chat_template"] = chat_templates(settings)
    return backend, settings


def strip_prefixes(metadata):
    """Return the metadata with short keys: "tokenizer.ggml.bos_token_id" becomes "bos_token_id"."""
    return {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in metadata.items()
    }


def chat_templates(settings):
    """Return the chat templates of a file: None, one, or a dict by name if there are others."""
    default = settings.get("chat_template")
    prefix = "chat_template."
    templates = {
        key.removeprefix(prefix): text for key, text in settings.items() if key.startswith(prefix)
    }
    if templates and default is not None:
        templates["default"] = default
    return templates or default


def backend_with_scores(settings):
    """Return a backend with the ids of the sentencepiece model that the file was made from.

    The file may list more tokens than that model had: unused ones, and those of a fine-tune. No
    merges lead to them. Raise ValueError if the backend would not have sentencepiece's ids.
    """
    columns = (settings["tokens"], settings["scores"], settings["token_type"])
    pieces = [Piece(*row) for row in zip(*columns, strict=True)]
    check_scores(pieces)
    check_characters(pieces)
    check_ties(pieces)
    spec = NormalizerSpec(
        add_dummy_prefix=settings.get("add_space_prefix", True), remove_extra_whitespaces=False
    )
    return sentencepiece_backend(pieces, BPE, spec)


def check_scores(pieces):
    """Raise ValueError if all pieces have one score.

    That is how llama.cpp converts a LLaMA's tokenizer.json: without its merges, and so without the
    order in which pieces are made.
    """
    scores = [piece.score for piece in pieces if piece.kind == NORMAL]
    if len(scores) > 1 and len(set(scores)) == 1:
        raise ValueError(
            "the file has no scores of its pieces: convert the model again with tokenizer.model "
            "beside it"
        )


def backend_over_bytes(settings, rule):
    """Return a BPE whose smallest tokens are the 256 bytes, like GPT-2's."""
    tokens = settings["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in settings["merges"]]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=rule.has_whole_words))
    if rule.is_composed:
        backend.normalizer = normalizers.NFC()
    steps = []
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.has_gpt2_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, settings["token_type"], strict=True)
    add_special_pieces(backend, [Piece(token, 0.0, kind) for token, kind in kinds])
    return backend
