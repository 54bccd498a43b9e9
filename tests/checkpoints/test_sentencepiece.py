"""Guards minia3/checkpoints/sentencepiece.py: our ids equal sentencepiece's, even if scores tie.

The files are trained here, or written by hand. test_published_tokenizers.py has published files.
"""

import io
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    BASE,
    TEXTS,
    check_refused,
    check_same_segmentation,
    corpus,
    field,
    gguf_of,
    peer,
    sentencepiece_file,
    small,
    spm,
    write,
    write_beside,
)

from minia3.checkpoints.sentencepiece import Piece, bpe_merges, read_sentencepiece
from minia3.checkpoints.tokenizer import Tokenizer

few = settings(deadline=None, max_examples=60)
LLAMAS = ["llama", "llama-no-bytes", "llama-no-prefix", "llama-spaces-inside"]


# Trained files


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_unigram_ids_equal_those_of_sentencepiece(name):
    # Without combining marks, because our ids differ there (see sentencepiece.py).
    characters = "aehnort'Hx305 ,.;!\t\n  é中🎉ﬁ①…ａ½"
    tokenizer = small(name)

    @few
    @given(st.text(characters) | st.sampled_from(corpus()))
    @example("  hello\t the   world \n")
    def check(text):
        *ids, end = tokenizer.encode(text)
        assert end == 1
        check_same_segmentation(peer(name), ids, peer(name).encode(text))
        if name == "mt5":  # without bytes, sentencepiece shows unknown characters as " ⁇ "
            assert tokenizer.decode(ids) == peer(name).decode(ids)

    check()


def test_marks_stay_in_the_order_in_which_they_are_written():
    """In Arabic, a doubled consonant is written before its vowel. NFC would swap these marks."""
    texts = [
        "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
        "\u05d1\u05bc\u05b0",
        "fac\u0327ade",
    ]
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=file,
        hard_vocab_limit=False,
        minloglevel=2,
        vocab_size=40,
    )
    processor = spm.SentencePieceProcessor(model_proto=file.getvalue())
    backend, _ = read_sentencepiece(file.getvalue())
    for text in texts:
        assert unicodedata.normalize("NFC", text) != text
        assert backend.encode(text, add_special_tokens=False).ids == processor.encode(text)


@pytest.mark.parametrize("name", LLAMAS)
def test_bpe_ids_and_texts_equal_those_of_sentencepiece(name):
    parts = ["a", "an", " ", "  ", "   ", "é", "🎉", "305", "\n"]
    runs = st.lists(st.sampled_from(parts)).map("".join)
    tokenizer = small(name)
    start = [] if peer(name).bos_id() < 0 else [peer(name).bos_id()]

    @few
    @given(st.text() | st.text("anh  t") | runs)
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == start + peer(name).encode(text)
        if name != "llama-no-bytes":  # without bytes, sentencepiece shows " ⁇ "
            assert tokenizer.decode(ids) == peer(name).decode(ids) == text.replace("▁", " ")

    for text in TEXTS:
        check = example(text)(check)
    check()


def test_control_and_user_defined_tokens_are_found_in_a_text_and_only_the_latter_are_decoded():
    tokenizer = small("llama-user-defined")
    processor = peer("llama-user-defined")
    sep = processor.piece_to_id("<sep>")
    ctl = processor.piece_to_id("<ctl>")
    ids = tokenizer.encode("a</s><sep><ctl><unk>", special=False)
    assert ids == [*processor.encode("a"), 2, sep, ctl, 0]
    assert tokenizer.decode(ids) == "a<sep>"


# Files by hand


def by_hand(folder, pieces, model_type=2):
    """Return our tokenizer and sentencepiece's of the same file."""
    data = sentencepiece_file(pieces, model_type)
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.from_folder(folder), spm.SentencePieceProcessor(model_proto=data)


@pytest.mark.parametrize("model_type", [1, 2])
def test_a_file_that_holds_only_pieces_has_the_defaults_of_sentencepiece(tmp_path, model_type):
    ours, processor = by_hand(tmp_path, [*BASE, ("\n", -3.0, 1)], model_type)
    for text in ["aaa", "  a  aa ", "a\n  \n a", "\n", "ab bb", "", " "]:
        assert ours.encode(text) == [1, *processor.encode(text)]


def equal_scores(n):
    return -1e9


def powers_of_two_first(n):
    return {2: -1.0, 4: -2.0, 8: -3.0}.get(n, -4.0 - n)


@pytest.mark.parametrize("score", [equal_scores, powers_of_two_first])
def test_ties_go_to_the_leftmost_pair(tmp_path, score):
    """All ways to make the same piece tie, and so do LLaMA-2's runs of spaces.

    The ids have no order, so that an order by ids cannot be right by chance.
    """
    lengths = [8, 3, 16, 2, 5, 13, 4, 15, 6, 7, 9, 10, 11, 12, 14]
    pieces = BASE[:-1] + [("a" * n, score(n), 1) for n in lengths]
    ours, processor = by_hand(tmp_path, pieces)
    texts = ["a" * n for n in range(200)]
    texts += ["aab" * 3 + "a" * n + "b" for n in range(60)]
    for text in texts:
        assert ours.encode(text) == [1, *processor.encode(text)]


@pytest.mark.parametrize(
    ("legacy", "expected"), [(None, ["▁a", "<sep>", "b"]), (True, ["▁a", "<sep>", "▁b"])]
)
def test_text_behind_an_added_token_gets_a_space_only_in_a_legacy_llama(tmp_path, legacy, expected):
    """transformers 5 does the same."""
    pieces = [*BASE, ("▁a", -2.0, 1), ("b", -9.0, 1), ("▁b", -3.0, 1)]
    data = sentencepiece_file(pieces) + field(3, field(4, 0))
    (tmp_path / "tokenizer.model").write_bytes(data)
    write_beside(tmp_path, added_tokens={"<sep>": 9}, tokenizer_config={"legacy": legacy})
    ours = Tokenizer.from_folder(tmp_path)
    ids = ours.encode("a<sep>b", special=False)
    assert [ours.backend.id_to_token(i) for i in ids] == expected
    assert ours.decode(ours.encode(" a", special=False)) == " a"


def test_a_llama_whose_settings_ask_for_no_space_at_the_start_gets_none(tmp_path):
    """transformers does the same, and passes over the setting of a T5."""
    settings = {"add_prefix_space": False}
    llama = Tokenizer.from_folder(write(tmp_path / "llama", "llama", tokenizer_config=settings))
    t5 = Tokenizer.from_folder(write(tmp_path / "t5", "t5", tokenizer_config=settings))
    without = Tokenizer.from_gguf(gguf_of("llama") | {"tokenizer.ggml.add_space_prefix": False})
    for text in TEXTS:
        ids = llama.encode(text)
        assert ids == without.encode(text)
        assert llama.decode(ids) == text.replace("▁", " ")
        assert t5.encode(text) == small("t5").encode(text)


def test_the_name_of_a_byte_in_a_text_is_not_the_byte(tmp_path):
    parts = ["<", "0", "x", "A", ">", "<0", "<0x", "<0x0", "<0x0A"]
    pieces = [*BASE, *((part, -2.0, 1) for part in parts)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    data = sentencepiece_file(pieces) + field(2, field(35, 1))
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = Tokenizer.from_folder(tmp_path)
    names = [name for name, _, _ in pieces]
    found = [names[i] for i in tokenizer.encode("a<0x0A>\n")]
    assert found == ["<s>", "▁", "a", "<0x0A", ">", "<0x0A>"]


# What is refused


@pytest.mark.parametrize("model_type", [1, 2])
def test_a_file_that_is_cut_inside_a_field_is_always_refused(tmp_path, model_type):
    data = sentencepiece_file(BASE, model_type)
    ends_of_fields = {len(sentencepiece_file(BASE[:n], 1)) for n in range(len(BASE) + 1)}
    for n in set(range(1, len(data))) - ends_of_fields:
        (tmp_path / "tokenizer.model").write_bytes(data[:n])
        check_refused(tmp_path)


@pytest.mark.parametrize(
    ("pieces", "model_type", "reason"),
    [
        (BASE, 3, "model_type is 3, expected 1 (Unigram) or 2 (BPE)"),
        (BASE[1:], 2, "damaged: no piece stands for unknown characters"),
        ([], 2, "damaged: no piece stands for unknown characters"),
        ([*BASE, ("b", float("nan"), 1)], 2, "damaged: the piece 'b' has the score nan"),
        ([*BASE, ("b", float("inf"), 1)], 1, "damaged: the piece 'b' has the score inf"),
        ([*BASE, ("b", -float("inf"), 1)], 2, "damaged: the piece 'b' has the score -inf"),
    ],
)
def test_a_file_that_is_not_a_vocabulary_is_refused(tmp_path, pieces, model_type, reason):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(pieces, model_type))
    check_refused(tmp_path, f"tokenizer.model: {reason}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (field(2, field(24, 1)), "treat_whitespace_as_suffix is not supported"),
        (field(3, field(5, 0)), "escape_whitespaces=false is not supported"),
        (field(5, field(2, b"map")), "a denormalizer is not supported"),
        (field(3, field(2, b"\xff\xff\xff\x7f")), "announces 2147483647 bytes, and has 0"),
        (field(2, field(35, 1)), "0 pieces of single bytes, expected all 256 if byte_fallback"),
    ],
)
@pytest.mark.parametrize("model_type", [1, 2])
def test_options_that_would_change_the_ids_are_refused(tmp_path, model_type, options, reason):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(BASE, model_type) + options)
    check_refused(tmp_path, reason)


def test_options_in_two_messages_are_those_of_both(tmp_path):
    """A protobuf message that is there twice is merged."""
    data = sentencepiece_file(BASE) + field(3, field(3, 0)) + field(3, field(4, 0))
    (tmp_path / "tokenizer.model").write_bytes(data)
    processor = spm.SentencePieceProcessor(model_proto=data)
    assert Tokenizer.from_folder(tmp_path).encode(" a") == [1, *processor.encode(" a")] == [1, 3, 4]


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([("b", -1.0, 5)], "the piece 'b' of a BPE is UNUSED, which is not supported"),
        ([("b", -1.0, 7)], "damaged: a piece of the kind 7, expected 1 to 6"),
        ([("", -1.0, 1)], "damaged: a piece is empty, or there twice"),
        ([("a", -1.0, 1)], "damaged: a piece is empty, or there twice"),
        ([("b", 0.0, 2)], "damaged: several pieces stand for unknown characters"),
        ([("ab", -2.0, 1)], "the piece 'ab' has the character 'b', which is not a piece"),
        (
            [("b", -9.0, 1), ("ab", -2.0, 1), ("ba", -2.0, 1)],
            "the pieces 'ab' and 'ba' overlap and have the same score",
        ),
        ([("<u>", 0.0, 4)], "user-defined pieces in a BPE that changes spaces at the edges"),
        ([("▁▁", 0.0, 4)], "the user-defined piece '▁▁' has spaces, or changes"),
    ],
)
def test_pieces_that_the_package_would_use_in_other_ways_are_refused(tmp_path, pieces, reason):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file([*BASE, *pieces]))
    check_refused(tmp_path, reason)


def test_an_unused_piece_of_a_unigram_model_keeps_its_id_and_is_never_found(tmp_path):
    pieces = [*BASE[:-1], ("aa", 0.0, 5), ("b", -3.0, 1)]
    ours, processor = by_hand(tmp_path, pieces, model_type=1)
    for text in ["aa", "aab", "b aa"]:
        assert ours.encode(text) == [1, *processor.encode(text)]
    assert ours.backend.get_vocab_size() == len(pieces)


def test_a_user_defined_piece_of_a_unigram_model_is_found_as_in_sentencepiece(tmp_path):
    pieces = [*BASE, ("<u>", 0.0, 4), ("<", -3.0, 1), (">a", -1.0, 1), ("u", -1.0, 1)]
    ours, processor = by_hand(tmp_path, pieces, model_type=1)
    for text in ["<u>", "a<u>a", " a  <u> <u>", "<u", "u>a<u>"]:
        assert ours.encode(text) == [1, *processor.encode(text)]


def test_the_sentinels_of_mt5_are_pieces_that_begin_with_a_space(tmp_path):
    """They are in the file, and without a space before it, a sentinel is only letters."""
    folder = write(tmp_path, "mt5", tokenizer_config={"extra_ids": 0})
    tokenizer = Tokenizer.from_folder(folder)
    sentinel = peer("mt5").piece_to_id("▁<extra_id_0>")
    with_sentinel = [
        *("<extra_id_0>", "the <extra_id_0> hats", "a  <extra_id_0>b", "\t<extra_id_0> "),
        *("中 <extra_id_0> ﬁ", "<extra_id_0> a <extra_id_0>", "a <extra_id_1> <extra_id_0>"),
    ]
    without = ["a<extra_id_0>", "the <extra_id_2>", "<extra_id_1><extra_id_0>", "<extra_id_1>"]
    for text in with_sentinel + without:
        ids = tokenizer.encode(text)
        assert ids == [*peer("mt5").encode(text), tokenizer.eos_id]
        assert (sentinel in ids) == (text in with_sentinel)
        assert tokenizer.decode(ids) == peer("mt5").decode(ids)


def test_the_tiktoken_file_of_llama_3_is_refused_and_the_error_says_what_to_use(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    check_refused(tmp_path, "tiktoken", "tokenizer.json")


class CountingText(str):
    """A text that notes how often it is cut."""

    n_cuts = 0

    def __getitem__(self, key):
        CountingText.n_cuts += 1
        return super().__getitem__(key)


def test_a_huge_piece_is_cut_only_at_the_lengths_of_other_pieces(tmp_path):
    """To cut it everywhere would take time in proportion to the square of its length."""
    huge = ("a" * 400_000, -2.0, 1)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file([*BASE, huge]))
    assert Tokenizer.from_folder(tmp_path).encode("aaa") == [1, 3, 5, 4]

    pieces = [Piece(*piece) for piece in BASE]
    pieces.append(Piece(CountingText(huge[0]), -2.0, 1))
    CountingText.n_cuts = 0
    assert bpe_merges(pieces) == [("a", "a")]
    n_lengths = 3  # 1, 2 and that of the huge piece
    assert 0 < CountingText.n_cuts <= 2 * n_lengths
