"""Guards the tokenizers of ByT5 and CodeT5: their ids and texts are those of transformers."""

import json
import random
import shutil
import warnings

import pytest
from conftest import make
from tokenizers import AddedToken

import minia3
from minia3.checkpoints.tokenizer import Tokenizer, find_tokenizer
from minia3.files.write import write_json

CODE = "def add(first, second):\n    return first + second  # naïve 漢字 😀\n"
PARTS = (
    *("a", "b ", " ", "\n", "  ", "é", "漢", "😀", "e\u0301", "\x00", "<", "def ", "return", "\t"),
    *("</s>", "<pad>", "<unk>", "<s>", "<mask>", "<extra_id_0>", "<extra_id_9>", "<0x41>"),
)


def random_texts(n, seed=0):
    generator = random.Random(seed)
    texts = ["", " ", "a"]
    for _ in range(n):
        texts.append("".join(generator.choices(PARTS, k=generator.randint(1, 9))))
    return texts


# ByT5


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    """The folder that transformers writes for a ByT5, and its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("byt5")
    theirs = transformers.ByT5Tokenizer()
    theirs.save_pretrained(folder)
    return folder, theirs


def their_ids(theirs, text):
    """Return the ids of transformers' ByT5, with an end even if the text ends in one.

    A text that is followed by </s> twice is what T5's tokenizer makes, here and in transformers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*theirs(text, add_special_tokens=False).input_ids, theirs.eos_token_id]


def test_the_ids_of_byt5_are_those_of_transformers(byt5):
    folder, theirs = byt5
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("hé") == [107, 198, 172, 1]
    for text in random_texts(300):
        ids = ours.encode(text)
        assert ids == their_ids(theirs, text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (1, 0, None)
    assert ours.has_separate_targets
    assert ours.encode_target("x", end=True) == [123, 1]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_the_name_of_its_class_is_all_that_byt5_needs(tmp_path, byt5, file):
    write_json(tmp_path / file, {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})
    ours = minia3.load_tokenizer(tmp_path)
    for text in random_texts(50, seed=1):
        assert ours.encode(text) == their_ids(byt5[1], text)
    assert find_tokenizer(tmp_path).encode("a") == [100, 1]


def test_a_text_of_a_byt5_ends_in_eos_whatever_the_settings_say(tmp_path, byt5):
    config = {"tokenizer_class": "ByT5Tokenizer", "add_eos_token": False}
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a") == their_ids(byt5[1], "a") == [100, 1]
    assert ours.has_separate_targets


def test_a_saved_byt5_has_the_same_ids_here_and_in_transformers(tmp_path, byt5):
    import transformers

    ours = Tokenizer.from_folder(byt5[0])
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(50, seed=2):
        assert again.encode(text) == theirs(text).input_ids == ours.encode(text)


@pytest.mark.parametrize(
    "eos", [{"content": "</s>"}, {"content": "</s>", "rstrip": True}, {"content": "<end>"}, "<end>"]
)
def test_a_special_token_of_byt5_in_a_dict_takes_the_spaces_that_the_dict_says(tmp_path, eos):
    import transformers

    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": eos}
    write_json(tmp_path / "tokenizer_config.json", config)
    token = eos if isinstance(eos, str) else AddedToken(**eos)
    theirs = transformers.ByT5Tokenizer(eos_token=token)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.eos_id, ours.encode("a")) == (1, [100, 1])
    for text in ["a </s> b", "a <end> b", *random_texts(50, seed=4)]:
        assert ours.encode(text) == their_ids(theirs, text), text


def test_sentinels_of_byt5_may_be_described_in_dicts(tmp_path, byt5):
    sentinels = [{"content": f"<extra_id_{i}>", "special": True} for i in range(125)]
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}
    write_json(tmp_path / "config.json", config | {"additional_special_tokens": sentinels})
    ours = Tokenizer.from_folder(tmp_path)
    for text in random_texts(50, seed=5):
        assert ours.encode(text) == their_ids(byt5[1], text), text


def test_bytes_that_are_no_text_are_decoded_with_a_mark_and_do_not_fail(byt5):
    ours = Tokenizer.from_folder(byt5[0])
    assert ours.decode([100, 198, 100, 383, 384, 1]) == "a\ufffda"


def test_a_byt5_runs_from_text_to_text(peer, tmp_path):
    folder = tmp_path / "byt5"
    theirs = make("byt5", vocab_size=384)
    theirs.save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    model = minia3.load_model(folder)
    tokenizer = minia3.load_tokenizer(folder)
    (text,) = minia3.generate(model, tokenizer, ["aé"], max_new_tokens=9)
    scores = minia3.rank(model, tokenizer, ["aé"], ["ja", "nein"])
    assert isinstance(text, str)
    assert scores.shape == (1, 2)


def test_too_many_sentinels_are_refused(tmp_path):
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10**9}
    write_json(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match=r"extra_ids is 1000000000, expected 0 to 1000$"):
        Tokenizer.from_folder(tmp_path)


# CodeT5


@pytest.fixture(scope="module")
def codet5(tmp_path_factory):
    """A folder with the files of a published CodeT5, and the tokenizer of transformers."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("codet5")
    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([CODE] * 9, vocab_size=320, special_tokens=special)
    trained.save_model(str(folder))
    n_tokens = len(json.loads((folder / "vocab.json").read_text()))
    sentinels = {f"<extra_id_{i}>": n_tokens + 9 - i for i in range(10)}
    write_json(folder / "added_tokens.json", sentinels)
    settings = {
        "tokenizer_class": "RobertaTokenizer",
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True},
        "additional_special_tokens": sorted(sentinels, reverse=True),
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": "t5", "is_encoder_decoder": True})
    return folder, transformers.RobertaTokenizer.from_pretrained(folder)


def test_the_ids_of_codet5_are_those_of_transformers(codet5):
    folder, theirs = codet5
    ours = Tokenizer.from_folder(folder)
    for text in [CODE, *random_texts(300)]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ids[0] == ours.bos_id == 1
        assert ids[-1] == ours.eos_id == 2
    assert ours.decode(ours.encode(CODE)) == CODE
    assert ours.pad_id == 0


def test_a_space_before_the_text_is_added_if_the_settings_say_so(tmp_path, codet5):
    import transformers

    folder = shutil.copytree(codet5[0], tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"add_prefix_space": True})
    theirs = transformers.RobertaTokenizer.from_pretrained(folder)
    ids = Tokenizer.from_folder(folder).encode("x = 1")
    assert ids == theirs("x = 1").input_ids
    assert ids != codet5[1]("x = 1").input_ids


def test_codet5_that_is_saved_without_a_config_still_has_an_encoder(codet5, tmp_path):
    """Its special tokens do not say so: it adds bos, too."""
    import transformers

    ours = Tokenizer.from_folder(codet5[0])
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.has_separate_targets
    assert again.encode_target("x = 1", end=False) == ours.encode_target("x = 1", end=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(CODE).input_ids == ours.encode(CODE)
    again.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).has_separate_targets


def test_decode_drops_the_sentinels_of_codet5_as_transformers_does(codet5):
    folder, theirs = codet5
    ids = theirs("a <extra_id_0> b<extra_id_9>").input_ids
    text = theirs.decode(ids, skip_special_tokens=True)
    assert "extra_id" not in text
    assert Tokenizer.from_folder(folder).decode(ids) == text


def test_special_tokens_that_codet5_describes_in_dicts_are_special_too(codet5, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(codet5[0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = settings["additional_special_tokens"][:-1]  # without <extra_id_0>
    described = [{"content": token, "lstrip": True} for token in listed]
    settings["additional_special_tokens"] = described
    write_json(folder / "tokenizer_config.json", settings)
    ours = Tokenizer.from_folder(folder)
    assert ours.decode(ours.encode("a<extra_id_0>b<extra_id_9>")) == "a<extra_id_0>b"


def test_a_target_of_codet5_is_a_sequence_of_its_own(codet5):
    ours = Tokenizer.from_folder(codet5[0])
    assert ours.has_separate_targets
    assert ours.encode_target("return", end=True) == ours.encode("return")


def test_a_saved_codet5_has_the_same_ids_here_and_in_transformers(tmp_path, codet5):
    import transformers

    ours = Tokenizer.from_folder(codet5[0])
    ours.save(tmp_path)
    shutil.copy(codet5[0] / "config.json", tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.has_separate_targets
    for text in [CODE, *random_texts(50, seed=3)]:
        assert again.encode(text) == theirs(text).input_ids == ours.encode(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class is 'Qwen2Tokenizer', expected Ro"),
        ({"tokenizer_class": None}, "tokenizer_class is None, expected RobertaTokenizer"),
        ({"bos_token": 5}, "damaged or cut short"),
        ({"sep_token": {}}, "damaged or cut short"),
    ],
)
def test_files_of_another_tokenizer_are_refused_in_one_line(tmp_path, codet5, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(codet5[0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | damage
    write_json(folder / "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", ["", "{", "[]", "a b c\n", None])
def test_damaged_files_are_refused_in_one_line(tmp_path, codet5, file, content):
    folder = tmp_path / "copy"
    shutil.copytree(codet5[0], folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    if file == "merges.txt" and content == "":
        return  # a BPE without merges is one of single bytes
    with pytest.raises(ValueError, match=r"copy") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)
