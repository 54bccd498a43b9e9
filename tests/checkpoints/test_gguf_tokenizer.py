"""Guards minia3/checkpoints/gguf_tokenizer.py: the tokenizer in a GGUF file has the ids of the
tokenizer that the file was made from.
"""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import BASE, BYTE_LEVEL, TEXTS, byte_level, corpus, gguf_of, peer, small
from tokenizers import pre_tokenizers

from minia3.checkpoints.tokenizer import Tokenizer

few = settings(deadline=None, max_examples=60)

# Hugging Face's own rules, in the tokenizer.json of GPT-2 and SmolLM2
PEER_RULES = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
}


# With scores


def test_a_vocabulary_with_scores_has_the_ids_of_its_sentencepiece_file():
    tokenizer = Tokenizer.from_gguf(gguf_of("llama"))
    for text in TEXTS:
        ids = small("llama").encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == small("llama").decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_metadata_may_leave_out_bos_ask_for_eos_and_name_a_pad_token():
    the = peer("llama").encode("the")
    settings = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.padding_token_id": 0}
    bare = Tokenizer.from_gguf(gguf_of("llama") | settings)
    assert bare.encode("the") == the
    assert bare.pad_id == 0
    ended = Tokenizer.from_gguf(gguf_of("llama") | {"tokenizer.ggml.add_eos_token": True})
    assert ended.encode("the") == [1, *the, 2]


def test_a_vocabulary_without_a_space_prefix_has_the_ids_of_such_a_file():
    metadata = gguf_of("llama-no-prefix") | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *peer("llama-no-prefix").encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_tokens_that_were_added_after_the_training_change_no_other_ids():
    """llama.cpp lists those of a fine-tune, and unused ones up to the size of the embedding."""
    metadata = gguf_of("llama")
    metadata["tokenizer.ggml.tokens"] += ["<|im_end|>", "<|tool|>", "[PAD362]"]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] += [3, 4, 5]
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        assert tokenizer.encode(text) == small("llama").encode(text)
    n_pieces = peer("llama").get_piece_size()
    assert tokenizer.encode("<|im_end|><|tool|>") == [1, n_pieces, n_pieces + 1]


# Over bytes


@pytest.mark.slow
@pytest.mark.parametrize("rule", PEER_RULES)
def test_a_bpe_over_bytes_has_the_ids_of_the_tokenizer_it_was_made_from(rule):
    theirs, metadata = byte_level()
    theirs.pre_tokenizer = PEER_RULES[rule]
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": rule})

    @few
    @given(st.text() | st.text("ab 12½'st\n") | st.sampled_from(corpus()))
    @example("tom's  305 hats\n\n  12")
    @example("the<|end|> hats")
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text.replace("<|end|>", "").replace("<|pad|>", "")

    check()


def test_llama_3_has_its_own_words_keeps_words_that_are_tokens_and_begins_with_bos():
    _, metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] += ["Ġzebra", "zeb"]  # no merge makes them
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    metadata["tokenizer.ggml.bos_token_id"] = 1
    llama3 = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    gpt2 = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "gpt-2"})
    zebra = metadata["tokenizer.ggml.tokens"].index("Ġzebra")
    assert llama3.encode("a zebra") == [1, *gpt2.encode("a"), zebra]
    assert zebra not in gpt2.encode("a zebra")
    words = ["I", "'LL", "Ġpay", "Ġ", "123", "45", "Ġdollars", "!!ĊĊ"]
    words += ["Ġ", "Ġfoo", "Ġ(", "x", ").Ċ", "ĉtab", "Ġwe", "'RE", "st"]
    text = "I'LL pay 12345 dollars!!\n\n  foo (x).\n\ttab we'REst"
    found = llama3.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in found] == words


def test_qwen2_has_the_ids_of_the_tokenizer_that_transformers_makes():
    from transformers.convert_slow_tokenizer import Qwen2Converter

    _, metadata = byte_level()
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Converter(None).converted(vocabulary, merges)
    ours = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "qwen2"})

    @few
    @given(st.text() | st.text("ab 12½'stÉe\u0301\n") | st.sampled_from(corpus()))
    @example("I'LL pay 12345 dollars!!\n\n  cafe\u0301")
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == unicodedata.normalize("NFC", text)

    check()


@pytest.mark.parametrize("has_bos", [False, True])
def test_a_target_continues_the_prompt_also_if_texts_end_in_eos(has_bos):
    """No model in a GGUF file that we read has an encoder."""
    _, plain = byte_level()
    plain |= {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.bos_token_id": 1}
    plain |= {"tokenizer.ggml.add_bos_token": has_bos}
    ended = Tokenizer.from_gguf(plain | {"tokenizer.ggml.add_eos_token": True})
    assert ended.encode("the hats")[-1] == ended.eos_id
    assert not ended.has_separate_targets
    for end in (False, True):
        expected = Tokenizer.from_gguf(plain).encode_target("hats", end)
        assert ended.encode_target("hats", end) == expected


@pytest.mark.parametrize(
    ("name", "first_name"),
    [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")],
)
def test_a_rule_may_have_several_names(name, first_name):
    _, metadata = byte_level()
    first = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": first_name})
    other = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name})
    assert first.backend.to_str() == other.backend.to_str()


# What is refused


def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name():
    _, metadata = byte_level()
    with pytest.raises(ValueError, match=r"^x.gguf: .*'tekken'.*llama-bpe"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "tekken"}, "x.gguf")
    with pytest.raises(ValueError, match=r"'bert'.*expected llama, or gpt2"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.model": "bert"})


def test_a_bpe_over_bytes_that_does_not_name_its_rule_for_words_is_refused():
    """Files from before May 2024 do not. Their rule is often Qwen2's or Llama 3's."""
    _, metadata = byte_level()
    # llama.cpp gives another rule to this name than GPT-2's.
    with pytest.raises(ValueError, match=r"pre 'default'; expected .*gpt-2"):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "default"})
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(ValueError, match=r"^x.gguf: .*cut into words.*use a newer conversion"):
        Tokenizer.from_gguf(metadata, "x.gguf")


NO_SCORES = r"^GGUF: the file has no scores of its pieces: .* with tokenizer.model beside it$"


def test_what_llama_cpp_makes_of_a_tokenizer_json_is_refused_for_its_scores(tmp_path):
    vocab = pytest.importorskip("gguf.vocab", reason="needs the extra: pip install 'minia3[gguf]'")
    small("llama").save(tmp_path)
    columns = zip(*vocab.LlamaHfVocab(tmp_path).all_tokens(), strict=True)
    tokens, scores, kinds = map(list, columns)
    assert set(scores) == {-1000.0}
    metadata = gguf_of("llama") | {
        "tokenizer.ggml.tokens": [token.decode() for token in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }
    with pytest.raises(ValueError, match=NO_SCORES):
        Tokenizer.from_gguf(metadata)


def test_equal_scores_are_refused_also_if_a_piece_stands_for_unknown_characters():
    metadata = gguf_of("llama")
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ValueError, match=NO_SCORES):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([("ab", -2.0, 1)], "the piece 'ab' has the character 'b', which is not a piece"),
        (
            [("b", -9.0, 1), ("ab", -2.0, 1), ("ba", -2.0, 1)],
            "the pieces 'ab' and 'ba' overlap and have the same score",
        ),
    ],
)
def test_scores_that_tokenizers_cannot_follow_are_refused_as_in_a_sentencepiece_file(
    pieces, problem
):
    columns = zip(*BASE, *pieces, strict=True)
    names = ("tokens", "scores", "token_type")
    lists = {f"tokenizer.ggml.{name}": list(x) for name, x in zip(names, columns, strict=True)}
    with pytest.raises(ValueError, match=f"^GGUF: {problem}"):
        Tokenizer.from_gguf(gguf_of("llama") | lists)


@pytest.mark.parametrize("key", ["model", "tokens", "merges", "token_type"])
def test_metadata_without_a_necessary_key_is_refused(key):
    _, metadata = byte_level()
    del metadata[f"tokenizer.ggml.{key}"]
    named = "None" if key == "model" else key
    with pytest.raises(ValueError, match=f"^GGUF: .*{named}"):
        Tokenizer.from_gguf(metadata)


def test_lists_that_do_not_fit_together_are_refused():
    _, metadata = byte_level()
    with pytest.raises(ValueError, match=r"^GGUF: "):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.token_type": [1]})
    with pytest.raises(ValueError, match=r"^GGUF: "):
        Tokenizer.from_gguf(gguf_of("llama") | {"tokenizer.ggml.scores": [1.0]})
    expected = r"^GGUF: damaged or cut short: .*`no thing` out of vocabulary$"
    with pytest.raises(ValueError, match=expected):
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.merges": ["Ġ no\nthing"]})
