"""Guards minia3/checkpoints/tokenizer.py: special tokens are added as the files ask, targets join
prompts, saving keeps the ids, and damage is refused.

test_sentencepiece.py, test_gguf_tokenizer.py and test_published_tokenizers.py compare the ids with
other programs.
"""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    BASE,
    OPTIONS,
    TEXTS,
    byte_level,
    check_join,
    check_refused,
    check_saved,
    file_name,
    gguf_of,
    peer,
    sentencepiece_file,
    small,
    write,
    write_beside,
)
from tokenizers import models, pre_tokenizers, processors

from minia3.checkpoints.layout import TOKENIZER_FILES
from minia3.checkpoints.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

few = settings(deadline=None, max_examples=60)


# Special tokens


@pytest.mark.parametrize(
    ("name", "config", "before", "after"),
    [
        ("t5", {}, [], [1]),
        # T5's tokenizer in transformers does not read these keys
        ("t5", {"add_bos_token": True, "bos_token": "<unk>", "add_eos_token": False}, [], [1]),
        ("llama", {}, [1], []),
        ("llama", {"add_bos_token": None}, [1], []),
        ("llama", {"add_bos_token": False}, [], []),
        ("llama", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_special_tokens_stand_where_the_files_ask_for_them(tmp_path, name, config, before, after):
    tokenizer = Tokenizer.from_folder(write(tmp_path, name, tokenizer_config=config))
    for text in ("the red hats", ""):
        assert tokenizer.encode(text) == before + peer(name).encode(text) + after
        assert tokenizer.encode(text, special=False) == peer(name).encode(text)


T5_IDS = (None, 1, 0)
LLAMA_IDS = (1, 2, 2)


@pytest.mark.parametrize(
    ("name", "beside", "expected"),
    [
        # From the sentencepiece file itself; without a pad token, eos pads
        ("t5", {}, T5_IDS),
        ("llama", {}, LLAMA_IDS),
        # By id
        ("llama", {"config": {"pad_token_id": 0, "eos_token_id": 5}}, (1, 5, 0)),
        # generation_config.json wins over config.json, and the first of several ids counts
        (
            "llama",
            {"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 5]}},
            (1, 6, 6),
        ),
        # A text wins over an id
        (
            "llama",
            {"config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<s>"}},
            (1, 1, 1),
        ),
        # A text may be in a dict
        (
            "llama",
            {"special_tokens_map": {"pad_token": {"content": "<unk>", "lstrip": False}}},
            (1, 2, 0),
        ),
        # An empty text wins over an id
        (
            "llama",
            {
                "config": {"bos_token_id": 0, "eos_token_id": 5},
                "tokenizer_config": {"bos_token": "", "eos_token": {"content": ""}},
            },
            (1, 2, 2),
        ),
        (
            "llama",
            {"special_tokens_map": {"pad_token": "<s>"}, "tokenizer_config": {"pad_token": None}},
            (1, 2, 1),
        ),
        # A text and ids that are not in the vocabulary
        ("llama", {"tokenizer_config": {"pad_token": "[PAD]"}}, LLAMA_IDS),
        ("llama", {"config": {"pad_token_id": -1, "bos_token_id": 10**6}}, (None, 2, 2)),
        # True is no id, although Python takes it for 1
        ("llama", {"config": {"pad_token_id": True}}, LLAMA_IDS),
    ],
)
def test_the_ids_of_special_tokens_come_from_the_files(tmp_path, name, beside, expected):
    tokenizer = Tokenizer.from_folder(write(tmp_path, name, **beside))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == expected


FIRST_LLAMAS = {"bos_token": "", "eos_token": ""}  # the settings of the first ones on the hub
USUAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("added", [{}, {"added_tokens_decoder": {}}])
@pytest.mark.parametrize("config", [FIRST_LLAMAS, USUAL])
@pytest.mark.parametrize(
    "named", [{"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<unk>"}, {"eos_token": "a"}]
)
def test_two_files_of_special_tokens_are_read_in_the_order_of_transformers(
    tmp_path, named, config, added
):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    config = config | added | {"tokenizer_class": "LlamaTokenizer"}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    beside = {"config": {"model_type": "llama"} | ids, "tokenizer_config": config}
    write(tmp_path, "llama", special_tokens_map=named, **beside)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ours = tokenizer.special_tokens
    for kind in ("bos_token", "eos_token"):
        if getattr(theirs, kind):  # otherwise it is the empty text, and ours is from config.json
            assert ours[kind] == getattr(theirs, kind)
    assert (theirs.pad_token is None) == (tokenizer.pad_id == tokenizer.eos_id)


def test_the_sentinels_of_t5_follow_the_pieces_in_reverse_order(tmp_path):
    n_pieces = peer("t5").get_piece_size()
    tokenizer = small("t5")
    for i in range(100):
        assert tokenizer.encode(f"<extra_id_{i}>")[0] == n_pieces + 99 - i
    *before, sentinel, _ = tokenizer.encode("the <extra_id_7>")
    assert [*before, sentinel] == [*peer("t5").encode("the"), n_pieces + 92]
    assert tokenizer.decode(tokenizer.encode("a <extra_id_0> hat")) == "a hat"
    ten = Tokenizer.from_folder(write(tmp_path, "t5", tokenizer_config={"extra_ids": 10}))
    assert ten.encode("<extra_id_0>") == [n_pieces + 9, 1]
    assert ten.encode("<extra_id_10>")[0] < n_pieces


def test_tokens_of_a_fine_tune_follow_in_the_order_of_their_ids(tmp_path):
    descriptions = {"1": {"content": "<s>", "special": True}}
    for i in (10, 9, 8, 7, 6):
        descriptions[str(i)] = {"content": f"<{i}>", "normalized": True, "special": i != 6}
    config = {"added_tokens_decoder": descriptions, "pad_token": "<9>"}
    write_beside(tmp_path, tokenizer_config=config)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(BASE))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<6><7><8><9><10>") == [1, 3, 4, 6, 7, 8, 9, 10]
    assert tokenizer.decode([1, 3, 4, 6, 7, 8, 9, 10]) == "a<6>"
    assert tokenizer.pad_id == 9


def test_tokens_of_an_older_fine_tune_are_in_added_tokens_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(BASE))
    added = {"<7>": 7, "<6>": 6}
    write_beside(tmp_path, added_tokens=added, special_tokens_map={"pad_token": "<7>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<6><7>") == [1, 3, 4, 6, 7]
    assert (tokenizer.pad_id, tokenizer.decode([4, 6, 7])) == (7, "a<6>")
    write_beside(tmp_path, added_tokens={"<6>": 6, "<8>": 8})
    check_refused(tmp_path, "added tokens have the ids [8], but these do not follow the vocabulary")


def test_a_word_whose_id_pads_is_still_decoded(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(BASE))
    write_beside(tmp_path, config={"pad_token_id": 5})
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.decode(tokenizer.encode("a aa")) == "a aa"
        tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path).pad_id == 5


def test_a_word_whose_id_pads_for_lack_of_eos_is_still_decoded_when_saved(tmp_path):
    """The pad id is then 0. If it were saved as the pad token, decode would drop the word."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path / "one"))
    tokenizer.save(tmp_path / "two")
    again = Tokenizer.from_folder(tmp_path / "two")
    assert again.pad_id == tokenizer.pad_id == 0
    assert again.decode(again.encode("a")) == "a"


# tokenizer.json


def word_level():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def save_json(backend, folder, **beside):
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_beside(folder, **beside)
    return folder


def test_a_tokenizer_json_wins_over_other_files_and_keeps_its_special_tokens(tmp_path):
    backend = word_level()
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 3)])
    config = {"eos_token": "</s>", "add_eos_token": False}
    folder = save_json(backend, write(tmp_path, "llama"), tokenizer_config=config)
    assert Tokenizer.from_folder(folder).encode("a b") == [1, 2, 3]


def test_a_tokenizer_json_without_special_tokens_gets_the_tokens_of_the_settings(tmp_path):
    config = {"eos_token": "</s>", "add_eos_token": True}
    folder = save_json(word_level(), tmp_path, tokenizer_config=config)
    assert Tokenizer.from_folder(folder).encode("a b") == [1, 2, 3]


@pytest.mark.parametrize(
    ("tokenizer_class", "adds_bos", "content", "before"),
    [
        # DeepSeek's R1-Distill
        ("LlamaTokenizerFast", True, "$A", [1]),
        ("LlamaTokenizer", True, "$A", [1]),
        # No setting asks for bos, or not for a class that follows it, or the file adds it already
        ("LlamaTokenizerFast", False, "$A", []),
        ("PreTrainedTokenizerFast", True, "$A", []),
        ("LlamaTokenizerFast", True, "<|pad|> $A", [1]),
    ],
)
def test_bos_is_added_for_a_class_of_llama_also_if_a_post_processor_adds_nothing(
    tmp_path, tokenizer_class, adds_bos, content, before
):
    """transformers 4 does so for the first two. transformers 5 adds none (design.md says it)."""
    backend = byte_level()[0]
    plain = backend.encode("the red hats").ids
    target = backend.encode(" hall").ids
    template = processors.TemplateProcessing(content, None, [("<|pad|>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": adds_bos}
    config |= {"bos_token": "<|pad|>", "eos_token": "<|end|>"}
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path, tokenizer_config=config))
    assert tokenizer.encode("the red hats") == before + plain
    assert tokenizer.encode("the red hats", special=False) == plain
    assert tokenizer.encode_target("hall", end=False) == target
    tokenizer.save(tmp_path / "saved")
    check_saved(tokenizer, tmp_path / "saved", ["the red hats", ""])


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    backend = word_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    folder = save_json(backend, tmp_path)
    assert Tokenizer.from_folder(folder).encode("a b a") == [1, 2, 1]
    assert Tokenizer.from_folder(folder).encode("a") == [1]


def test_a_token_that_only_the_config_names_is_special_too(tmp_path):
    tokenizer = Tokenizer.from_folder(save_json(word_level(), tmp_path, config={"eos_token_id": 3}))
    assert tokenizer.eos_id == 3
    assert tokenizer.decode([1, 3, 2]) == "a b"


def test_a_word_whose_id_is_in_the_config_stays_in_texts(tmp_path):
    """A config may have LLaMA's default ids, 1 and 2, beside any vocabulary."""
    backend = word_level()
    config = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path, config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    ids = tokenizer.encode("b aa a b")
    assert ids == backend.encode("b aa a b").ids == [2, 0, 1, 2]
    assert tokenizer.decode([2, 1, 2]) == "b a b"
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.eos_id == 2
    assert again.decode(again.encode("b a b")) == "b a b"


def theirs(folder):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    write_beside(folder, config={"model_type": "llama", "eos_token_id": 1})
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "beside",
    [
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "5": {"content": "<|end|>", "special": True, "lstrip": True},
                    "4": {"content": "<more>", "special": False},
                    "0": {"content": "<unk>", "special": True},
                }
            }
        },
        {"added_tokens": {"<|end|>": 5, "<more>": 4}, "tokenizer_config": {}},
    ],
)
def test_tokens_that_a_fine_tune_added_beside_a_tokenizer_json_are_found(tmp_path, beside):
    config = beside["tokenizer_config"] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    beside = beside | {"tokenizer_config": config | {"eos_token": "<|end|>"}}
    peer = theirs(save_json(word_level(), tmp_path, **beside))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "a <more>b <|end|> a"
    assert tokenizer.encode(text) == peer(text)["input_ids"] == [1, 4, 2, 5, 1]
    assert tokenizer.eos_id == peer.eos_token_id == 5
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").encode(text) == tokenizer.encode(text)
    Tokenizer.from_folder(save_json(word_level(), tmp_path / "other")).save(tmp_path)
    assert "<more>" not in Tokenizer.from_folder(tmp_path).backend.get_vocab()


LISTED = ["<more>", "<|end|>"]


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": LISTED},
        {"extra_special_tokens": ["a", *LISTED]},
        {"extra_special_tokens": {"more_token": "<more>", "end_token": "<|end|>"}},
        {"extra_special_tokens": {}, "additional_special_tokens": LISTED},
    ],
)
def test_special_tokens_that_are_only_listed_are_added(tmp_path, config):
    config = config | {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    peer = theirs(save_json(word_level(), tmp_path, tokenizer_config=config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("a <more>b <|end|> a")
    assert ids == peer("a <more>b <|end|> a")["input_ids"] == [1, 4, 2, 5, 1]
    assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").decode(ids) == tokenizer.decode(ids)


def test_special_tokens_with_a_name_come_before_those_that_are_only_listed(tmp_path):
    config = {"mask_token": "<m>", "pad_token": {"content": "[PAD]", "__type": "AddedToken"}}
    config |= {"unk_token": "<unk>", "sep_token": "a", "additional_special_tokens": LISTED}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    peer = theirs(save_json(word_level(), tmp_path, tokenizer_config=config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "a <|end|> [PAD] <more> <m> b"
    ids = tokenizer.encode(text)
    assert ids == peer(text)["input_ids"] == [1, 7, 4, 6, 5, 2]
    assert tokenizer.pad_id == peer.pad_token_id == 4
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").encode(text) == ids
    config["eos_token"] = "<|end|>"
    peer = theirs(save_json(word_level(), tmp_path, tokenizer_config=config))
    ids = Tokenizer.from_folder(tmp_path).encode(text)
    assert ids == peer(text)["input_ids"] == [1, 4, 5, 7, 6, 2]


def test_listed_special_tokens_follow_those_that_have_ids(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(BASE))
    special = {"additional_special_tokens": ["<6>", "</s>", {"content": "<7>"}]}
    write_beside(tmp_path, added_tokens={"<6>": 6}, special_tokens_map=special)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<6><7></s>") == [1, 3, 4, 6, 7, 2]
    assert tokenizer.decode([4, 6, 7]) == "a"
    write_beside(tmp_path, special_tokens_map={"additional_special_tokens": "<6>"})
    check_refused(tmp_path, "expected a list of special tokens, found '<6>'")


def test_added_tokens_that_do_not_follow_a_tokenizer_json_are_refused(tmp_path):
    save_json(word_level(), tmp_path, added_tokens={"<new>": 9})
    check_refused(tmp_path, "added tokens have the ids [9], but these do not follow the vocab")
    save_json(word_level(), tmp_path, added_tokens={f"<{i}>": i for i in range(900, 1200)})
    check_refused(tmp_path, "added tokens have the ids [900, 901, ")
    save_json(word_level(), tmp_path, added_tokens={"b": 2, "a": 7})  # it has these already
    assert Tokenizer.from_folder(tmp_path).encode("a b") == [1, 2]


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_a_special_token_that_the_vocabulary_lacks_is_not_taken_for_another(tmp_path, kind):
    beside = {"config": {f"{kind}_token_id": 1}, "tokenizer_config": {f"{kind}_token": "<|end|>"}}
    save_json(word_level(), tmp_path, **beside)
    check_refused(
        tmp_path, f"{kind}_token is '<|end|>', which the vocabulary lacks: add this token"
    )


# Targets


def test_without_eos_the_pad_id_is_zero_and_a_target_cannot_be_ended(tmp_path):
    tokenizer = Tokenizer.from_folder(save_json(word_level(), tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, 0)
    assert tokenizer.encode_target("a", end=False) == [1]
    with pytest.raises(ValueError, match="name no eos token"):
        tokenizer.encode_target("a", end=True)


def test_the_target_of_a_llama_that_ends_its_texts_still_follows_a_prompt(tmp_path):
    folder = write(tmp_path, "llama", tokenizer_config={"add_eos_token": True})
    ended = Tokenizer.from_folder(folder)
    plain = small("llama")
    assert ended.encode("the red hats") == [*plain.encode("the red hats"), 2]
    for end in (False, True):
        assert ended.encode_target("red hats", end) == plain.encode_target("red hats", end)
    assert 1 not in ended.encode_target("red hats", True)


def test_a_prompt_has_no_end_if_a_text_follows_it(tmp_path):
    """The model would continue a text that has ended."""
    folder = write(tmp_path, "llama", tokenizer_config={"add_eos_token": True})
    ended = Tokenizer.from_folder(folder)
    for text in ("the red hats", "", "the </s>", "</s>"):
        assert ended.encode_prompt(text) == small("llama").encode(text)
        assert small("llama").encode_prompt(text) == small("llama").encode(text)
        assert small("t5").encode_prompt(text) == small("t5").encode(text)
    prompt = ended.encode_prompt("the red")
    assert prompt + ended.encode_target("hats", end=True) == ended.encode("the red hats")


@pytest.mark.parametrize("content", ["<s> $A", "<s> $A <s>", "$A <s>", "$A"])
def test_a_prompt_keeps_a_bos_that_is_the_eos(tmp_path, content):
    backend = byte_level()[0]
    backend.add_special_tokens(["<s>"])
    plain = backend.encode("<s>").ids
    backend.post_processor = processors.TemplateProcessing(content, None, [("<s>", plain[0])])
    beside = {"config": {"model_type": "llama"}, "tokenizer_config": {"bos_token": "<s>"}}
    beside["tokenizer_config"]["eos_token"] = "<s>"
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path, **beside))
    n_before = content.startswith("<s>")
    assert tokenizer.encode_prompt("") == plain * n_before
    assert tokenizer.encode_prompt("<s>") == plain * (n_before + 1)


PROMPTS = st.text(min_size=1).filter(lambda text: text.strip() and text[-1] == text.rstrip()[-1])
ANSWERS = ["True", " True", "  two", "", "12", "not entailment", "'s", "\nx"]


@pytest.mark.parametrize("name", ["llama", "llama-no-prefix", "gpt-2", "smollm", "llama-bpe"])
def test_prompt_and_target_encoded_separately_equal_the_joined_text(name):
    if name in OPTIONS:
        tokenizer = small(name)
    else:
        tokenizer = Tokenizer.from_gguf(byte_level()[1] | {"tokenizer.ggml.pre": name})
    prompts = st.sampled_from(["the red hats :", "é", "12", "Answer:"])

    @few
    @given(PROMPTS | prompts, st.sampled_from(ANSWERS) | st.text())
    def check(prompt, text):
        check_join(tokenizer, prompt, text)

    check()


def test_prompt_and_target_join_at_a_colon_even_if_pieces_have_spaces_inside():
    """Such pieces may swallow the seam of other prompts. (No published LLaMA has any.)"""

    @few
    @given(st.sampled_from(ANSWERS) | st.text())
    def check(text):
        check_join(small("llama-spaces-inside"), "Answer:", text.removeprefix(" "))

    check()


@pytest.mark.parametrize("name", ["llama", "llama-no-prefix", "gpt-2"])
def test_a_text_and_its_continuation_join_to_the_whole_text(name):
    tokenizer = small(name) if name in OPTIONS else Tokenizer.from_gguf(byte_level()[1])
    for text in ("the red hats  of  anna", " a\n b", "12 305, tom's"):
        ids = tokenizer.encode(text, special=False)
        for n in range(1, len(ids)):
            joined = tokenizer.decode(ids[:n]) + tokenizer.decode_continuation(ids[n:])
            assert joined == tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_a_t5_continues_no_text(name):
    ids = small(name).encode("red hats")
    assert small(name).decode_continuation(ids) == small(name).decode(ids) == "red hats"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_target_is_the_same_with_and_without_its_space(name):
    tokenizer = small(name)
    assert tokenizer.encode_target("hall", end=False) == tokenizer.encode_target(" hall", end=False)


def test_the_target_of_a_t5_is_a_sequence_of_its_own():
    t5 = small("t5")
    assert t5.has_separate_targets
    assert t5.encode_target("hall", end=False) == t5.encode("hall")
    assert t5.encode_target("hall", end=True) == t5.encode("hall")


def test_the_target_of_a_llama_continues_the_prompt():
    assert not small("llama").has_separate_targets
    assert small("llama").encode_target("hall", end=False) == peer("llama").encode("hall")


@pytest.mark.parametrize(
    ("config", "is_separate"),
    [
        ({"model_type": "qwen2"}, False),
        ({"model_type": "t5"}, True),
        ({"model_type": "t5", "is_encoder_decoder": True}, True),
        ({}, True),  # nothing is known but that it is like a T5's
    ],
)
def test_the_config_decides_about_the_targets_of_a_tokenizer_that_adds_only_eos(
    tmp_path, config, is_separate
):
    backend = word_level()
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 3)])
    beside = {"config": config, "tokenizer_config": {"eos_token": "</s>"}}
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path, **beside))
    assert tokenizer.encode("a") == [1, 3]
    assert tokenizer.has_separate_targets == is_separate
    expected = [1, 3] if is_separate else [1]
    assert tokenizer.encode_target("a", end=False) == expected


@pytest.mark.parametrize("content", ["$A", "<s> $A"])
def test_a_target_of_a_t5_ends_in_eos_also_if_its_tokenizer_adds_none(tmp_path, content):
    backend = byte_level()[0]
    backend.add_special_tokens(["<s>"])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(content, None, [bos])
    beside = {"config": {"model_type": "t5"}, "tokenizer_config": {"eos_token": "<|end|>"}}
    tokenizer = Tokenizer.from_folder(save_json(backend, tmp_path, **beside))
    for end in (True, False):
        ids = tokenizer.encode_target("hall", end)
        assert ids == [*tokenizer.encode("hall", special=False), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hall"  # without a space before it, as in a continued text


def test_null_as_bos_means_that_there_is_none_whatever_the_files_before_say(tmp_path):
    import transformers

    config = {"bos_token": None, "eos_token": "</s>", "added_tokens_decoder": {}}
    beside = {"special_tokens_map": {"bos_token": "a"}, "tokenizer_config": config}
    folder = save_json(word_level(), tmp_path, config={"bos_token_id": 1}, **beside)
    assert Tokenizer.from_folder(folder).bos_id is None
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.bos_token is None


# Decoding and saving


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_that_are_not_tokens_are_left_out(name):
    ids = small(name).encode("red hats")
    assert small(name).decode([-100, *ids, 10**6, 2**32, 2**70]) == "red hats"
    assert small(name).decode([]) == ""


def test_decode_keeps_spaces_that_transformers_takes_out(tmp_path):
    settings = {"clean_up_tokenization_spaces": True, "tokenizer_class": "T5Tokenizer"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, "t5", tokenizer_config=settings))
    text = "the red , 12 !"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == "the red, 12!"


@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("name", [*OPTIONS, "gpt-2", "llama-bpe"])
def test_transformers_has_the_same_ids_with_a_saved_tokenizer(tmp_path, name, model_type):
    if name in OPTIONS:
        tokenizer = small(name)
    else:
        named = {"tokenizer.ggml.pre": name, "tokenizer.ggml.bos_token_id": 1}
        tokenizer = Tokenizer.from_gguf(byte_level()[1] | named)
    folder = tmp_path / "deep" / "folder"
    tokenizer.save(folder)
    config = {"model_type": model_type, "is_encoder_decoder": tokenizer.has_separate_targets}
    write_beside(folder, config=config)
    check_saved(tokenizer, folder, TEXTS)
    # Without this, transformers 4 returns token_type_ids too, and its generate() refuses them.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    # Without this, its texts lose spaces before punctuation, which `decode` keeps.
    assert config["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_saving_replaces_the_special_tokens_of_a_checkpoint_of_transformers_4(tmp_path, name):
    """Nothing would say that its special_tokens_map.json is of another tokenizer."""
    old = {"bos_token": "<s>", "eos_token": {"content": "<eos>"}, "pad_token": "<unk>"}
    write_beside(tmp_path, special_tokens_map=old)
    small(name).save(tmp_path)
    check_saved(small(name), tmp_path, ["the red hats"])


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_transformers_puts_special_tokens_around_each_of_two_texts(tmp_path, name):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = small(name)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("the red hats", "a hall")["input_ids"]
    assert ids == tokenizer.encode("the red hats") + tokenizer.encode("a hall")


ENDLESS = int(1e30)  # what transformers takes for the length if no file says it


@pytest.mark.parametrize(
    ("name", "settings", "side", "length"),
    [
        # transformers' class of a LLaMA pads on the left, which the saved class would not
        ("llama", {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 40}, "left", 40),
        ("llama", {"tokenizer_class": "LlamaTokenizer", "padding_side": "right"}, "right", ENDLESS),
        ("llama", {"padding_side": "left"}, "left", ENDLESS),
        ("t5", {"tokenizer_class": "T5Tokenizer", "model_max_length": 12}, "right", 12),
    ],
)
def test_transformers_pads_and_cuts_as_with_the_files_that_were_read(
    tmp_path, name, settings, side, length
):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = Tokenizer.from_folder(write(tmp_path, name, tokenizer_config=settings))
    tokenizer.save(tmp_path / "once")
    Tokenizer.from_folder(tmp_path / "once").save(tmp_path / "twice")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "twice")
    assert theirs.padding_side == side
    assert theirs.truncation_side == "right"
    assert theirs.model_max_length == length


def special_word_level():
    backend = word_level()
    backend.add_special_tokens(["<unk>"])
    return backend


def saved_twice(tokenizer, folder):
    """Return what transformers makes of what we save of what we saved."""
    tokenizer.save(folder / "once")
    Tokenizer.from_folder(folder / "once").save(folder / "twice")
    return theirs(folder / "twice")


def test_transformers_finds_the_unknown_token_of_a_saved_tokenizer(tmp_path):
    """A sentencepiece or GGUF file says which it is. Beside a tokenizer.json, the settings do."""
    config = {"unk_token": {"content": "<unk>"}}
    folder = save_json(special_word_level(), tmp_path / "json", tokenizer_config=config)
    from_gguf = Tokenizer.from_gguf(gguf_of("llama"))
    for tokenizer in (small("t5"), small("llama"), from_gguf, Tokenizer.from_folder(folder)):
        peer = saved_twice(tokenizer, tmp_path)
        assert peer.unk_token == "<unk>"
        assert peer.unk_token_id == tokenizer.backend.token_to_id("<unk>")


@pytest.mark.parametrize(
    ("backend", "unknown"),
    [(special_word_level(), "<none>"), (word_level(), "<unk>"), (word_level(), "b")],
)
def test_no_token_becomes_special_because_the_settings_call_it_unknown(tmp_path, backend, unknown):
    """transformers would add it, or find it in texts."""
    folder = save_json(backend, tmp_path / "json", tokenizer_config={"unk_token": unknown})
    tokenizer = Tokenizer.from_folder(folder)
    peer = saved_twice(tokenizer, tmp_path)
    assert peer.unk_token is None
    assert len(peer) == 4
    text = "a b <unk> <none>"
    ids = tokenizer.encode(text)
    assert peer(text)["input_ids"] == ids
    assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


# Finding


def write_gguf(path):
    gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'minia3[gguf]'")
    metadata = gguf_of("llama")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_load_tokenizer_reads_a_folder_and_a_gguf_file(tmp_path):
    folder = write(tmp_path / "llama", "llama")
    write_gguf(tmp_path / "x.gguf")
    expected = small("llama").encode("the red  hats")
    for path in (folder, str(folder), tmp_path / "x.gguf"):
        assert load_tokenizer(path).encode("the red  hats") == expected


def test_find_tokenizer_returns_none_for_a_model_without_one(tmp_path):
    assert find_tokenizer(tmp_path) is None
    found = find_tokenizer(write(tmp_path / "llama", "llama"))
    assert found.encode("the") == small("llama").encode("the")


def test_a_model_whose_tokenizer_may_be_on_the_hub_is_refused_with_what_to_do(
    tmp_path, monkeypatch
):
    """Without a network, the cache may hold the config only."""
    monkeypatch.setattr("minia3.checkpoints.tokenizer.find", lambda name, weights: tmp_path)
    with pytest.raises(ValueError, match=r"^org/name: no tokenizer in .*try again with a network"):
        load_tokenizer("org/name")


# Damage


def test_a_folder_without_a_tokenizer_is_refused_with_what_was_expected(tmp_path):
    check_refused(tmp_path, "no tokenizer", "tokenizer.json", "spiece.model", "tokenizer.model")


@pytest.mark.parametrize("form", TOKENIZER_FILES)
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "LFS"),
        (b"\n<!DOCTYPE html>\n<html></html>", "HTML"),
        (b"{\n", None),
        (b"\xff\xfe\x00", None),
        (b"plain words\n" * 9, None),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, form, content, word):
    (tmp_path / form).write_bytes(content)
    check_refused(tmp_path, word or form)


def test_the_settings_beside_a_tokenizer_must_be_json(tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "tokenizer_config.json").write_text("<html>")
    check_refused(tmp_path, "tokenizer_config.json", "HTML")


def test_a_unigram_without_an_unknown_piece_is_refused_when_it_is_loaded(tmp_path):
    """It would otherwise fail at the first text with an unknown character."""
    save_json(tokenizers.Tokenizer(models.Unigram([("a", -1.0)])), tmp_path)
    check_refused(tmp_path, "unk_id")


def test_half_a_surrogate_pair_is_a_value_error():
    with pytest.raises(ValueError, match=r"^text 'a\\ud83d': it is not Unicode, or the tokenizer"):
        small("llama").encode("a\ud83d")


def damaged(rng, content):
    """Return `content` cut, changed, or with bytes taken out, put in or repeated."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    other = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            del data[at:]
        case 1:
            for _ in range(rng.choice([1, 3, 30])):
                byte = rng.choice([0, 10, 127, 128, 255, rng.randrange(256)])
                data[rng.randrange(len(data))] = byte
        case 2:
            del data[at : at + rng.choice([1, 2, 50])]
        case 3:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 50]))
        case 4:
            data[at:at] = data[other : other + 60]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama", "json", "json-t5"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_end_in_a_value_error_or_a_tokenizer(tmp_path, name):
    """A tokenizer that still loads must encode, or say in one line that it cannot."""
    if name.startswith("json"):
        trained_name = "t5" if name == "json-t5" else "llama"
        small(trained_name).save(tmp_path)
        path = tmp_path / "tokenizer.json"
    else:
        path = write(tmp_path, name) / file_name(name)
    content = path.read_bytes()
    rng = random.Random(name)
    texts = [*TEXTS[-15:], "".join(map(chr, range(32, 0x3000, 7)))]
    n_loaded = 0
    for _ in range(150):
        path.write_bytes(damaged(rng, content))
        try:
            tokenizer = Tokenizer.from_folder(tmp_path)
            n_loaded += 1
            for text in texts:
                assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert n_loaded < 150


def test_a_decoder_that_fails_for_some_ids_is_one_line(tmp_path):
    """The Rust code panics, and the exception of a panic is not even an Exception."""
    small("llama").save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["decoder"] = {"type": "Strip", "content": "a", "start": 3, "stop": 3}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = [tokenizer.backend.token_to_id("a")]
    with pytest.raises(ValueError, match=r"^the tokenizer's decoder: damaged or cut short: Panic"):
        tokenizer.decode(ids)
