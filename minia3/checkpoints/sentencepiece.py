"""To be written."""

import re
import struct

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    1, 7
)  # kinds of tokens, in sentencepiece and GGUF alike


def add_tokens(backend, tokens):
    special = {
        UNKNOWN: True,
        CONTROL: True,
        USER_DEFINED: False,
    }  # what is found in a text before all else
    backend.add_tokens(
        [AddedToken(t, special=special[k], normalized=False) for t, k in tokens if k in special]
    )


def read_sentencepiece(data):
    """A sentencepiece file -> backend and special ids. Fields have their numbers from sentencepiece_model.proto."""
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data):
        raise ValueError(
            "this is Llama 3's tiktoken form, which is not read; use the model's tokenizer.json"
        )
    model = list(protobuf_fields(data))
    trainer, normalizer = (dict(protobuf_fields(dict(model).get(number, b""))) for number in (2, 3))
    unigram = {1: True, 2: False}[trainer.get(3, 1)]  # the types WORD and CHAR are not read
    if trainer.get(24):
        raise ValueError("treat_whitespace_as_suffix is not read")
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    pieces = [
        (p[1].decode(), *struct.unpack("<f", p.get(2, bytes(4))), p.get(3, NORMAL)) for p in pieces
    ]
    ids = {
        "bos_token_id": trainer.get(41, 1),
        "eos_token_id": trainer.get(42, 2),
        "pad_token_id": trainer.get(43),
    }
    options = {
        "charsmap": normalizer.get(2),
        "dummy_prefix": normalizer.get(3, 1),
        "one_space": normalizer.get(4, 1),
    }
    return sentencepiece_backend(*zip(*pieces, strict=True), unigram, **options), ids


def protobuf_fields(data):
    """(number, value) of each field of a protobuf message: an int for a varint, bytes for any other."""
    at = 0

    def varint():
        nonlocal at
        first, at = at, re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]").match(data, at).end()
        return sum((byte & 127) << 7 * n for n, byte in enumerate(data[first:at]))

    while at < len(data):
        key = varint()
        value = varint() if key & 7 in (0, 2) else {1: 8, 5: 4}[key & 7]
        if key & 7:  # then this is the length
            value, at = data[at : at + value], at + value
        if at > len(data):
            raise ValueError("a field is cut")
        yield key >> 3, value


def sentencepiece_backend(
    names, scores, kinds, unigram=False, charsmap=None, dummy_prefix=True, one_space=False
):
    """Pieces in the order of their ids, and how a text is normalised -> a backend that gives sentencepiece's ids."""
    if UNKNOWN not in kinds or not all(abs(score) < float("inf") for score in scores):
        raise ValueError("damaged: no piece stands for the unknown, or a score is no number")
    unknown, has_bytes = kinds.index(UNKNOWN), BYTE in kinds
    if unigram:
        backend = Backend(models.Unigram(list(zip(names, scores, strict=True)), unknown, has_bytes))
    else:
        score = {
            name: score
            for name, score, kind in zip(names, scores, kinds, strict=True)
            if kind == NORMAL
        }
        lengths = sorted({len(name) for name in score})
        merges = [
            (name[:n], name[n:])
            for name in score
            for n in lengths
            if name[:n] in score and name[n:] in score
        ]
        # Ways to one piece tie, as do LLaMA-2's runs of spaces: the leftmost wins if the longest left half comes first.
        merges.sort(key=lambda halves: (-score[halves[0] + halves[1]], -len(halves[0])))
        vocab = {name: i for i, name in enumerate(names)}
        backend = Backend(
            models.BPE(
                vocab, merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=has_bytes
            )
        )
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), "")] if one_space else []
    prefix, strip = (
        ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if dummy_prefix else ([], [])
    )
    backend.normalizer = normalizers.Sequence([*steps, *prefix, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_tokens(backend, zip(names, kinds, strict=True))
    return backend
