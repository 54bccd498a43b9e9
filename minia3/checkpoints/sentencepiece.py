"""Build a tokenizer of the package `tokenizers` from the pieces of a sentencepiece model.

The aim is sentencepiece's own ids for every text. There are two kinds of models, and both begin
with a text in which "▁" stands for a space:

    Unigram (T5)      chooses the pieces whose scores have the largest sum
    BPE (LLaMA-2)     begins with single characters, and joins two neighbors again and again,
                      always the two that make the piece with the best score

`tokenizers` has both. But its BPE wants a list of merges, in which earlier merges win, and a
sentencepiece file has only pieces with scores: see `bpe_merges`.

The input is a sentencepiece file (spiece.model of T5, tokenizer.model of LLaMA-2) or the same lists
from a GGUF file. A sentencepiece file is refused if it asks for anything that would give other ids.
A GGUF file says less about its tokenizer, and gguf_tokenizer.py checks what it does say. Four
differences are known, and Hugging Face's tokenizers have them, too:

- T5's normalization composes a letter and one mark ("e" + U+0301), as sentencepiece's does, but
  not longer sequences. In decomposed text (NFD), it drops the second mark of a letter ("ệ" becomes
  "ẹ"), and leaves Hangul, kana, and the vowels of Bengali and Tamil in parts. It also drops a mark
  that combines with a ligature ("ĳ" + U+0338). To compose all text first (NFC) is no remedy: it
  would change the order of the marks of Arabic and Hebrew, which sentencepiece keeps.
- A text that spells a control token, such as "</s>", gets the id of that token. If normalization
  makes the spelling, it does so in a Unigram model only.
- A text that spells a byte, such as "<0x0A>", gets the id of that byte in a Unigram model.
- A text that spells the mark before a sentinel of mT5, "▁<extra_id_0>", has only this one mark
  there. sentencepiece puts another one before it, for the start of the text or for a space.
"""

import math
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
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

# The fields of a ModelProto. The first is repeated: a message for each piece.
PIECES = 1
TRAINER_SPEC = 2
NORMALIZER_SPEC = 3
DENORMALIZER_SPEC = 5


@dataclass
class SentencePiece:
    piece: bytes = numbered(1)
    score: bytes = numbered(2, bytes(4))  # a float32
    type: int = numbered(3, NORMAL)


@dataclass
class TrainerSpec:
    model_type: int = numbered(3, UNIGRAM)
    treat_whitespace_as_suffix: int = numbered(24, 0)
    byte_fallback: int = numbered(35, 0)
    bos_id: int = numbered(41, 1)
    eos_id: int = numbered(42, 2)
    pad_id: int = numbered(43, -1)


@dataclass
class NormalizerSpec:
    precompiled_charsmap: bytes = numbered(2, b"")
    add_dummy_prefix: int = numbered(3, 1)
    remove_extra_whitespaces: int = numbered(4, 1)
    escape_whitespaces: int = numbered(5, 1)


class Piece(NamedTuple):
    """A token of a vocabulary. Its id is its position in the list of all pieces."""

    text: str
    score: float
    kind: int


def read_sentencepiece(data, is_prefix_for_all=True, has_prefix=True):
    """Return the backend, and the default settings: "bos_token_id", "unk_token" and so on.

    data: the content of a sentencepiece file.
    is_prefix_for_all: see `sentencepiece_backend`.
    has_prefix: False: no text gets a space at its start, whatever the file says.

    An id that is out of range means that the model has no such token. Raise ValueError if the file
    is damaged, or asks for something that is not supported.
    """
    if TIKTOKEN_LINE.match(data):
        raise ValueError(
            "this is Llama 3's tiktoken format, which is not supported: "
            "put the model's tokenizer.json and tokenizer_config.json into this folder: they are "
            "read in its place"
        )
    fields = list(read_fields(data))
    pieces = [read_piece(value) for number, value in fields if number == PIECES]
    trainer = merged_message(TrainerSpec, fields, TRAINER_SPEC)
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ValueError(
            f"model_type is {trainer.model_type!r:.40}, expected {UNIGRAM} (Unigram) or {BPE} (BPE)"
        )
    normalizer_spec = merged_message(NormalizerSpec, fields, NORMALIZER_SPEC)
    if not has_prefix:
        normalizer_spec.add_dummy_prefix = 0
    denormalizer_spec = merged_message(NormalizerSpec, fields, DENORMALIZER_SPEC)
    check_texts(trainer, normalizer_spec, denormalizer_spec)
    check_kinds(pieces, trainer)
    if trainer.model_type == BPE:
        check_characters(pieces)
        check_ties(pieces)
    backend = sentencepiece_backend(pieces, trainer.model_type, normalizer_spec, is_prefix_for_all)
    check_user_defined(pieces, trainer.model_type, normalizer_spec, backend)
    special = {
        "bos_token_id": trainer.bos_id,
        "eos_token_id": trainer.eos_id,
        "pad_token_id": trainer.pad_id,
        "unk_token": pieces[first_of_kind(pieces, UNKNOWN)].text,
    }
    return backend, special


def merged_message(kind, fields, number):
    """Return the message in the field of this number. If there are several, they are one message.

    (In this file format, to join the bytes of messages is to merge the messages.)
    """
    return parse_message(kind, b"".join(value for n, value in fields if n == number))


def read_piece(data):
    message = parse_message(SentencePiece, data)
    (score,) = struct.unpack("<f", message.score)
    return Piece(message.piece.decode(), score, message.type)


# What is refused, because the ids or texts would not be sentencepiece's


def check_texts(trainer, normalizer_spec, denormalizer_spec):
    """Raise ValueError if texts are to be prepared in a way that is not supported."""
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix is not supported")
    if not normalizer_spec.escape_whitespaces:
        raise ValueError("escape_whitespaces=false is not supported")
    if denormalizer_spec.precompiled_charsmap:
        raise ValueError("a denormalizer is not supported")


def check_kinds(pieces, trainer):
    """Raise ValueError if sentencepiece refuses the pieces, or if a BPE has unused ones."""
    texts = {piece.text for piece in pieces}
    if "" in texts or len(texts) < len(pieces):
        raise ValueError("damaged: a piece is empty, or there twice")
    kinds = [piece.kind for piece in pieces]
    if kinds.count(UNKNOWN) > 1:
        raise ValueError("damaged: several pieces stand for unknown characters")
    if trainer.model_type == BPE and UNUSED in kinds:
        # sentencepiece makes such a piece, and takes it apart again.
        unused = pieces[kinds.index(UNUSED)].text
        raise ValueError(f"the piece {unused!r:.40} of a BPE is UNUSED, which is not supported")
    strange = set(kinds) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    if strange:
        raise ValueError(f"damaged: a piece of the kind {min(strange)}, expected 1 to 6")
    bytes_found = {piece.text for piece in pieces if piece.kind == BYTE}
    all_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    if bytes_found != (all_bytes if trainer.byte_fallback else set()):
        expected = "all 256 if byte_fallback is set, else none"
        raise ValueError(f"damaged: {len(bytes_found)} pieces of single bytes, expected {expected}")


def check_characters(pieces):
    """Raise ValueError if a BPE has a piece with a character that is not a piece itself.

    sentencepiece joins such a character with its neighbor, but the package `tokenizers` joins only
    pieces.
    """
    texts = {piece.text for piece in pieces if piece.kind == NORMAL}
    for text in texts:
        missing = [character for character in text if character not in texts]
        if missing:
            problem = f"has the character {missing[0]!r}, which is not a piece"
            raise ValueError(f"the piece {text!r:.40} {problem}: not supported")


def check_ties(pieces):
    """Raise ValueError if two pieces of a BPE that may overlap in a text have one score.

    sentencepiece makes the leftmost of them in each text, but the package `tokenizers` has one
    order of merges for all texts. For runs of one character, such as LLaMA-2's runs of spaces, the
    order of `bpe_merges` does the same.
    """
    scores = {piece.text: piece.score for piece in pieces}
    ends_with = {}  # (score, right half) -> pieces
    starts_with = {}  # (score, left half) -> pieces
    for left, right in bpe_merges(pieces):
        text = left + right
        ends_with.setdefault((scores[text], right), set()).add(text)
        starts_with.setdefault((scores[text], left), set()).add(text)
    for score_and_half in ends_with.keys() & starts_with.keys():
        tied = ends_with[score_and_half] | starts_with[score_and_half]
        is_run = len(set("".join(tied))) == 1
        if len(tied) > 1 and not is_run:
            first, second = sorted(tied)[:2]
            problem = f"the pieces {first!r:.40} and {second!r:.40} overlap and have the same score"
            raise ValueError(f"{problem}: not supported, use the model's tokenizer.json")


def check_user_defined(pieces, model_type, normalizer_spec, backend):
    """Raise ValueError if user-defined pieces would not be found as sentencepiece finds them."""
    texts = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    for text in texts:
        core = text
        if model_type == UNIGRAM and text != SPACE:
            # The mark of mT5's "▁<extra_id_0>" stands for the space before it in a text.
            core = text.removeprefix(SPACE)
        normal = backend.normalizer.normalize_str(core)
        if normal != core or (model_type == BPE and SPACE in text):
            problem = "has spaces, or changes with normalization: not supported"
            raise ValueError(f"the user-defined piece {text!r:.40} {problem}")
    edges = normalizer_spec.add_dummy_prefix or normalizer_spec.remove_extra_whitespaces
    if texts and model_type == BPE and edges:
        reason = "user-defined pieces in a BPE that changes spaces at the edges of a text"
        raise ValueError(f"{reason} are not supported: use the model's tokenizer.json")


# The backend


def sentencepiece_backend(pieces, model_type, normalizer_spec, is_prefix_for_all=True):
    """Return a backend of the package `tokenizers` that has the ids of sentencepiece.

    pieces: a list of Pieces in the order of their ids.
    is_prefix_for_all: if a text gets a space at its start, the text after a special token gets a
        space, too. False: only the start of the whole text does.
    Raise ValueError if the list cannot be a vocabulary.
    """
    check_pieces(pieces)
    model = unigram_model(pieces) if model_type == UNIGRAM else bpe_model(pieces)
    backend = Backend(model)
    backend.normalizer = normalizer(normalizer_spec)
    backend.pre_tokenizer = pre_tokenizer(normalizer_spec, is_prefix_for_all)
    backend.decoder = decoder(normalizer_spec)
    is_found_by_model = model_type == UNIGRAM
    add_special_pieces(backend, pieces, is_found_by_model)
    return backend


def check_pieces(pieces):
    if all(piece.kind != UNKNOWN for piece in pieces):
        raise ValueError("damaged: no piece stands for unknown characters")
    for piece in pieces:
        if not math.isfinite(piece.score):
            raise ValueError(f"damaged: the piece {piece.text!r:.40} has the score {piece.score}")


def unigram_model(pieces):
    unknown = first_of_kind(pieces, UNKNOWN)
    normal_scores = [piece.score for piece in pieces if piece.kind == NORMAL] or [0.0]
    least = min(normal_scores)
    greatest = max(0.0, *normal_scores)  # not below 0, as in sentencepiece's code
    scores = []
    for piece in pieces:
        score = piece.score
        if piece.kind == USER_DEFINED:
            # So high that the piece is nearly always chosen (unigram_model.cc of sentencepiece)
            score = greatest * len(piece.text.encode()) - 0.1
        if piece.kind != NORMAL:
            # An unknown character costs 10 more than the least score, of the normal pieces in
            # sentencepiece, and of all pieces in the package `tokenizers`.
            score = max(score, least)
        text = piece.text
        if piece.kind == UNUSED:
            # The piece keeps its id, but no text has it, because all spaces of a text are marks.
            text = f" {text}"
        scores.append((text, score))
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
        check_charsmap(spec.precompiled_charsmap)
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces at the start and the end go, and all but the last one of several in a row. A mark
        # at the end goes, too.
        steps.append(normalizers.Replace(Regex(r"\A +|[ ▁]+\z| +(?= )"), ""))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def check_charsmap(charsmap):
    """Raise ValueError if a map of characters does not hold what its first four bytes announce.

    These are the size of its trie. The package allocates what they say, up to 4 GB, before it looks
    at the rest, and if there is not so much memory, it ends the process.
    """
    n_announced = int.from_bytes(charsmap[:4], "little")
    n_found = len(charsmap) - 4
    if n_announced > n_found:
        raise ValueError(
            f"damaged: precompiled_charsmap announces {n_announced} bytes, and has {n_found}"
        )


def pre_tokenizer(spec, is_prefix_for_all):
    """Return the step that puts a mark for a space before a text, if the file asks for it."""
    # If characters at the start are removed, the package does not know the start of the text.
    is_start_known = not spec.remove_extra_whitespaces and not spec.precompiled_charsmap
    scheme = "never"
    if spec.add_dummy_prefix:
        scheme = "first" if is_start_known and not is_prefix_for_all else "always"
    # The first step adds a space, because it would leave out a mark if there is one already. (All
    # spaces of the text are marks by now.) The second step turns the space into a mark.
    steps = [
        pre_tokenizers.Metaspace(" ", scheme, split=False),
        pre_tokenizers.Metaspace(SPACE, "never", split=False),
    ]
    return pre_tokenizers.Sequence(steps)


def decoder(spec):
    """Return the steps that turn pieces back into a text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))  # one space at the start, none at the end
    return decoders.Sequence(steps)


def add_special_pieces(backend, pieces, is_found_by_model=False):
    """Let the backend find control and user-defined tokens in a text before it cuts the rest.

    is_found_by_model: the model itself finds the user-defined tokens.

    sentencepiece itself does not look for control tokens in a text, but transformers does, and so
    do we. `decode` drops the special tokens.
    """
    tokens = []
    for piece in pieces:
        if piece.kind in (UNKNOWN, CONTROL):
            tokens.append(AddedToken(piece.text, special=True, normalized=False))
        elif piece.kind == USER_DEFINED and not is_found_by_model:
            tokens.append(AddedToken(piece.text, special=False, normalized=False))
    backend.add_tokens(tokens)


def first_of_kind(pieces, kind):
    return next(i for i, piece in enumerate(pieces) if piece.kind == kind)


def has_bytes(pieces):
    return any(piece.kind == BYTE for piece in pieces)
