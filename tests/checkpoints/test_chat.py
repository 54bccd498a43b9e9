"""Guards `Tokenizer.chat`: a checkpoint's template, wherever it stands (tokenizer_config.json, chat_template.jinja,
GGUF), gives the ids of transformers' apply_chat_template, also once saved; it runs in a sandbox; what fails is one
line."""

import json
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

import minia3
from minia3.checkpoints.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

CHATML = (  # SmolLM2's, shortened
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (  # as LLaMA-2's: bos and eos by name, and roles that must take turns
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must take\n turns') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system ~ ' ' if loop.first and system else '') + message['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS = """{# Line ends behind blocks and spaces before them are left out. #}
{%- for message in messages %}
    {% if message.role == "tool" %}
        {% continue %}
    {% endif %}
    {{ message | tojson }} <{{ pad_token }}{{ unk_token }}>
{% endfor %}
    {% if tools is none and documents is none and not strftime is defined %}
{{ strftime_now("%Y") | length }}
    {% endif %}
"""
TEMPLATES = {"chatml": CHATML, "strict": STRICT, "blocks": BLOCKS}
CHATS = {
    "question": [{"role": "user", "content": "What is <b>? "}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi's\n<|im_end|>"},
    ],
    "turns": [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "é b"), ("user", " c"))
    ],
}


def backend():
    """Bytes, each a token, with <s> in front: which a chat must not get a second time."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    found = Backend(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    found.pre_tokenizer, found.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    found.add_special_tokens(special)
    found.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return found


SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def folder_with(folder, template, jinja=None):
    folder.mkdir(exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    config = {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


def theirs(folder, messages):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_transformers_from_the_checkpoint_and_from_what_is_saved_of_it(
    tmp_path, name, chat
):
    folder, messages = folder_with(tmp_path / "a", TEMPLATES[name]), CHATS[chat]
    tokenizer = load_tokenizer(folder)
    expected = theirs(folder, messages)
    assert len(expected) > 10
    assert tokenizer.chat(messages) == expected
    tokenizer.save(tmp_path / "b")
    assert (
        load_tokenizer(tmp_path / "b").chat(messages)
        == theirs(tmp_path / "b", messages)
        == expected
    )


def test_special_tokens_in_the_text_are_found_and_none_is_added(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, CHATML))
    ids = tokenizer.chat(CHATS["question"])
    assert (ids[0], ids.count(0), ids.count(3), ids.count(4)) == (3, 0, 3, 2)
    assert load_tokenizer(folder_with(tmp_path, STRICT)).chat(CHATS["question"])[0] == 0
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhat is <b>? <|im_end|>\n<|im_start|>assistant\n"
    )


def test_of_several_templates_the_default_is_taken_and_a_file_of_its_own_goes_before_all(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    folder, messages = folder_with(tmp_path / "a", several), CHATS["system"]
    expected = load_tokenizer(folder_with(tmp_path / "b", CHATML)).chat(messages)
    assert load_tokenizer(folder).chat(messages) == theirs(folder, messages) == expected
    folder_with(folder, several, jinja=STRICT)
    other = load_tokenizer(folder_with(tmp_path / "b", STRICT)).chat(messages)
    assert load_tokenizer(folder).chat(messages) == theirs(folder, messages) == other != expected


def test_saving_over_a_checkpoint_leaves_no_other_template_behind(tmp_path):
    folder_with(tmp_path / "a", None, jinja=STRICT)
    tokenizer = load_tokenizer(folder_with(tmp_path / "b", CHATML))
    tokenizer.save(tmp_path / "a")
    assert theirs(tmp_path / "a", CHATS["turns"]) == tokenizer.chat(CHATS["turns"])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_gguf_keeps_its_template_in_the_metadata():
    vocab = sorted(backend().get_vocab().items(), key=lambda item: item[1])
    kinds = [3 if i < 5 else 1 for _, i in vocab]
    meta = {
        "model": "gpt2",
        "tokens": [token for token, _ in vocab],
        "token_type": kinds,
        "merges": [],
    }
    meta |= {"bos_token_id": 0, "eos_token_id": 1}
    meta = {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    tokenizer = Tokenizer.from_gguf(meta | {"tokenizer.chat_template": CHATML})
    expected = Tokenizer(backend(), {**SETTINGS, "chat_template": CHATML}).chat(CHATS["turns"])
    assert tokenizer.chat(CHATS["turns"]) == expected
    with pytest.raises(ValueError, match="no chat_template"):
        Tokenizer.from_gguf(meta).chat(CHATS["turns"])


def refused(tokenizer, messages):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_template_or_one_by_default_the_way_out_is_named():
    for settings in (
        SETTINGS,
        {**SETTINGS, "chat_template": [{"name": "rag", "template": CHATML}]},
    ):
        assert "no chat_template: give the whole prompt as a text" in refused(
            Tokenizer(backend(), settings), []
        )


def test_what_a_template_raises_is_passed_on_in_one_line():
    tokenizer = Tokenizer(backend(), {**SETTINGS, "chat_template": STRICT})
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert refused(tokenizer, messages) == "chat_template: Roles must take turns"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% for message in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% include 'a' %}", "TypeError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        (17, "TypeError"),
        ("\ud800", "TypeError"),
    ],
)
def test_a_damaged_or_hostile_template_is_one_line(template, word):
    message = refused(
        Tokenizer(backend(), {**SETTINGS, "chat_template": template}), CHATS["question"]
    )
    assert message.startswith("chat_template: ")
    assert word in message


@pytest.mark.parametrize("template", [[1], [{"name": "default"}], ["default"]])
def test_a_list_of_templates_that_is_none_is_refused_when_it_is_loaded(tmp_path, template):
    with pytest.raises(ValueError, match=r"^[^\n]*tokenizer.json: damaged or cut short[^\n]*$"):
        load_tokenizer(folder_with(tmp_path, template))


def test_a_template_file_that_is_no_text_is_refused_when_it_is_loaded(tmp_path):
    folder = folder_with(tmp_path, None)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^[^\n]*UnicodeDecodeError[^\n]*$"):
        load_tokenizer(folder)


def test_without_jinja2_only_a_chat_fails_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    tokenizer = Tokenizer(backend(), {**SETTINGS, "chat_template": CHATML})
    assert tokenizer.encode("a")[0] == 0
    with pytest.raises(ValueError, match=r"pip install 'minia3\[chat\]'"):
        tokenizer.chat(CHATS["question"])


def test_an_exported_model_keeps_its_template(tmp_path, loaded, peer):
    """save_model writes the tokenizer with the model: the folder is what transformers chats with."""
    tokenizer = Tokenizer(backend(), {**SETTINGS, "chat_template": CHATML})
    folder_with(tmp_path / "out", None, jinja=STRICT)  # of the checkpoint that it replaces
    minia3.save_model(loaded("llama-gqa"), tmp_path / "out", tokenizer)
    assert theirs(tmp_path / "out", CHATS["system"]) == tokenizer.chat(CHATS["system"])
