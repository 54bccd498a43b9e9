"""Build a tokenizer of the package `tokenizers` from the pieces of a sentencepiece model.

The aim is sentencepiece's own ids for every text. There are two kinds of models, and both begin
with a text in which "▁" stands for a space:

    Unigram (T5)      chooses the pieces whose scores have the largest sum
    BPE (LLaMA-2)     begins with single characters, and joins two neighbors again and again,
                      always the two that make the piece with the best score

`tokenizers` has both. But its BPE wants a list of merges, in which earlier merges win, and a
sentencepiece file has only pieces with scores: see `bpe_merges`.

The input is a sentencepiece file (spiece.model of T5, tokenizer.model of LLaMA-2) or the same lists
from a GGUF file. There is one known difference: T5's normalization drops a mark that combines with
a ligature ("ĳ" + U+0338). Hugging Face's tokenizer does the same, but sentencepiece does not.
"""

import math
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from minia3.checkpoints.protobuf import numbered, parse_message, read_fields

# Kinds of pieces, the same in sentencepiece files and in GGUF files
NORMAL = 1
UNKNOWN = 2  # stands for a character that no piece has
CONTROL = 3  # such as </s>
USER_DEFINED = 4  # found in a text before any other piece
UNUSED = 5
BYTE = 6  # one of 256, such as <0x0A>, that spell the characters that no piece has

# Kinds of models
UNIGRAM = 1
BPE = 2

SPACE = "▁"  # U+2581, which stands for a space in a piece

# A line of Llama 3's tokenizer.model: a token in base64, and its id
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")

# The fields that we read, with their names, numbers and defaults in sentencepiece_model.proto
# (github.com/google/sentencepiece, src/sentencepiece_model.proto)

MODEL_PIECES = 1  # ModelProto.pieces, repeated: a message for each piece


@dataclass
class ModelProto:
    trainer_spec: bytes = numbered(2, b"")
    normalizer_spec: bytes = numbered(3, b"")


@dataclass
class SentencePiece:
    piece: bytes = numbered(1)
    score: bytes = numbered(2, bytes(4))  # a float32
    type: int = numbered(3, NORMAL)


@dataclass
class TrainerSpec:
    model_type: int = numbered(3, UNIGRAM)
    treat_whitespace_as_suffix: int = numbered(24, 0)
    bos_id: int = numbered(41, 1)
    eos_id: int = numbered(42, 2)
    pad_id: int = numbered(43, -1)


@dataclass
class NormalizerSpec:
    precompiled_charsmap: bytes = numbered(2, b"")
    add_dummy_prefix: int = numbered(3, 1)
    remove_extra_whitespaces: int = numbered(4, 1)


class Piece(NamedTuple):
    """A token of a vocabulary. Its id is its position in the list of all pieces."""

    text: str
    score: float
    kind: int


def read_sentencepiece(data):
    """Return (backend, {"bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ...}).

    data: the content of a sentencepiece file. An id that is out of range means that the model has
    no such token. Raise ValueError if the file is damaged, or asks for something that is not
    supported.
    """
    if TIKTOKEN_LINE.match(data):
        raise ValueError(
            "this is Llama 3's tiktoken format, which is not supported: "
            "use the model's tokenizer.json"
        )
    pieces = [read_piece(value) for number, value in read_fields(data) if number == MODEL_PIECES]
    model = parse_message(ModelProto, data)
    trainer = parse_message(TrainerSpec, model.trainer_spec)
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ValueError(
            f"model_type is {trainer.model_type!r:.40}, expected {UNIGRAM} (Unigram) or {BPE} (BPE)"
        )
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix is not supported")
    normalizer_spec = parse_message(NormalizerSpec, model.normalizer_spec)
    backend = sentencepiece_backend(pieces, trainer.model_type, normalizer_spec)
    special_ids = {
        "bos_token_id": trainer.bos_id,
        "eos_token_id": trainer.eos_id,
        "pad_token_id": trainer.pad_id,
    }
    return backend, special_ids


def read_piece(data):
    message = parse_message(SentencePiece, data)
    (score,) = struct.unpack("<f", message.score)
    return Piece(message.piece.decode(), score, message.type)


def sentencepiece_backend(pieces, model_type, normalizer_spec):
    """Return a backend of the package `tokenizers` that has the ids of sentencepiece.

    pieces: a list of Pieces in the order of their ids. Raise ValueError if the list cannot be a
    vocabulary.
    """
    check_pieces(pieces)
    model = unigram_model(pieces) if model_type == UNIGRAM else bpe_model(pieces)
    backend = Backend(model)
    backend.normalizer = normalizer(normalizer_spec)
    backend.decoder = decoder(normalizer_spec)
    add_special_pieces(backend, pieces)
    return backend


def check_pieces(pieces):
    if all(piece.kind != UNKNOWN for piece in pieces):
        raise ValueError("damaged: no piece stands for unknown characters")
    for piece in pieces:
        if not math.isfinite(piece.score):
            raise ValueError(f"damaged: the piece {piece.text!r:.40} has the score {piece.score}")


def unigram_model(pieces):
    unknown = first_of_kind(pieces, UNKNOWN)
    scores = [(piece.text, piece.score) for piece in pieces]
    return models.Unigram(scores, unknown, has_bytes(pieces))


def bpe_model(pieces):
    unknown = first_of_kind(pieces, UNKNOWN)
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    # fuse_unk: sentencepiece makes one unknown piece of several successive unknown characters.
    return models.BPE(
        vocabulary,
        bpe_merges(pieces),
        unk_token=pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=has_bytes(pieces),
    )


def bpe_merges(pieces):
    """Return the merges of a BPE, best first: all pairs of pieces that together make a piece.

    sentencepiece joins the pair that makes the piece with the best score, so the merges are ordered
    by that score. The order of the ids is nearly the same, but not quite: transformers uses it, and
    gets runs of spaces wrong.

    Merges that make the same piece tie, and so do LLaMA-2's runs of spaces. Then sentencepiece
    takes the leftmost pair of the text. We do the same if the longest left half comes first.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    # A left half is a piece, so only the lengths of pieces are tried. A damaged file may have a
    # huge piece, and to try every length would take time in proportion to the square of its length.
    lengths = sorted({len(text) for text in scores})
    merges = []
    for text in scores:
        for n in lengths:
            left = text[:n]
            if left in scores and text[n:] in scores:
                merges.append((left, text[n:]))

    def priority(merge):
        left, right = merge
        return -scores[left + right], -len(left)

    merges.sort(key=priority)
    return merges


def normalizer(spec):
    """Return the steps before a text is cut: map characters, remove spaces, mark the others."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces at the start and the end go, and all but the last one of several in a row.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def decoder(spec):
    """Return the steps that turn pieces back into a text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))  # one space at the start, none at the end
    return decoders.Sequence(steps)


def add_special_pieces(backend, pieces):
    """Let the backend find control and user-defined tokens in a text before it cuts the rest.

    sentencepiece itself does not look for control tokens in a text, but transformers does, and so
    do we. `decode` drops the special tokens.
    """
    tokens = []
    for piece in pieces:
        if piece.kind in (UNKNOWN, CONTROL):
            tokens.append(AddedToken(piece.text, special=True, normalized=False))
        elif piece.kind == USER_DEFINED:
            tokens.append(AddedToken(piece.text, special=False, normalized=False))
    backend.add_tokens(tokens)


def first_of_kind(pieces, kind):
    return next(i for i, piece in enumerate(pieces) if piece.kind == kind)


def has_bytes(pieces):
    return any(piece.kind == BYTE for piece in pieces)
