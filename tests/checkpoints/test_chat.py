"""Guards minia3/checkpoints/chat.py and `Tokenizer.chat`: with a checkpoint's template, we have the
ids of transformers.

The template may be in tokenizer_config.json, in chat_template.jinja or in a GGUF file. It survives
saving, it runs in a sandbox, and if it fails, the message is one line.
"""

import json
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

import minia3
from minia3.checkpoints.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

# SmolLM2's template, shortened
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like LLaMA-2's template: bos and eos by name, and roles that must take turns
STRICT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must take\n turns') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system ~ ' ' if loop.first and system else '') }}"
    "{{ message['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
BLOCKS = """{# Line ends after blocks and spaces before them are left out. #}
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
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "é b"},
        {"role": "user", "content": " c"},
    ],
}


def backend():
    """Return a tokenizer over bytes. It begins a text with <s>, which a chat must not get twice."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Backend(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return tokenizer


SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def tokenizer_with(template):
    return Tokenizer(backend(), {**SETTINGS, "chat_template": template})


def folder_with(folder, template, jinja=None):
    """Write a tokenizer with a template in its settings, and another in chat_template.jinja."""
    folder.mkdir(exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    config = {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


def theirs(folder, messages):
    """Return the ids of transformers' apply_chat_template."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return batch["input_ids"]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_ids_of_transformers_before_and_after_saving(tmp_path, name, chat):
    folder = folder_with(tmp_path / "a", TEMPLATES[name])
    messages = CHATS[chat]
    tokenizer = load_tokenizer(folder)
    expected = theirs(folder, messages)
    assert len(expected) > 10
    assert tokenizer.chat(messages) == expected
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").chat(messages) == expected
    assert theirs(tmp_path / "b", messages) == expected


def test_special_tokens_of_the_template_are_found_and_none_is_added(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, CHATML))
    ids = tokenizer.chat(CHATS["question"])
    assert (ids[0], ids.count(0), ids.count(3), ids.count(4)) == (3, 0, 3, 2)
    assert load_tokenizer(folder_with(tmp_path, STRICT)).chat(CHATS["question"])[0] == 0
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>user\nWhat is <b>? <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_default_of_several_templates_is_used_and_a_template_file_wins_over_all(tmp_path):
    messages = CHATS["system"]
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    folder = folder_with(tmp_path, several)
    chatml = tokenizer_with(CHATML).chat(messages)
    assert load_tokenizer(folder).chat(messages) == theirs(folder, messages) == chatml
    folder_with(folder, several, jinja=STRICT)
    strict = tokenizer_with(STRICT).chat(messages)
    assert load_tokenizer(folder).chat(messages) == theirs(folder, messages) == strict
    assert strict != chatml


def test_saving_over_a_checkpoint_removes_its_template_file(tmp_path):
    folder_with(tmp_path / "a", None, jinja=STRICT)
    tokenizer = load_tokenizer(folder_with(tmp_path / "b", CHATML))
    tokenizer.save(tmp_path / "a")
    assert theirs(tmp_path / "a", CHATS["turns"]) == tokenizer.chat(CHATS["turns"])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_template_of_a_gguf_file_is_in_its_metadata():
    vocabulary = backend().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (len(tokens) - 5),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": CHATML})
    assert tokenizer.chat(CHATS["turns"]) == tokenizer_with(CHATML).chat(CHATS["turns"])
    with pytest.raises(ValueError, match="no chat_template"):
        Tokenizer.from_gguf(metadata).chat(CHATS["turns"])


def refused(tokenizer, messages):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", [None, [{"name": "rag", "template": CHATML}]])
def test_without_a_default_template_the_error_says_what_to_do(template):
    message = refused(tokenizer_with(template), [])
    assert "no chat_template: give the whole prompt as a text" in message


def test_an_error_that_a_template_raises_is_passed_on_in_one_line():
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert refused(tokenizer_with(STRICT), messages) == "chat_template: Roles must take turns"


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
def test_a_damaged_or_hostile_template_is_refused_in_one_line(template, word):
    message = refused(tokenizer_with(template), CHATS["question"])
    assert message.startswith("chat_template: ")
    assert word in message


@pytest.mark.parametrize("template", [[1], [{"name": "default"}], ["default"]])
def test_a_list_that_does_not_hold_templates_is_refused_when_it_is_loaded(tmp_path, template):
    with pytest.raises(ValueError, match=r"^[^\n]*tokenizer.json: damaged or cut short[^\n]*$"):
        load_tokenizer(folder_with(tmp_path, template))


def test_a_template_file_that_is_not_text_is_refused_when_it_is_loaded(tmp_path):
    folder = folder_with(tmp_path, None)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^[^\n]*UnicodeDecodeError[^\n]*$"):
        load_tokenizer(folder)


def test_without_jinja2_only_a_chat_fails_and_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    tokenizer = tokenizer_with(CHATML)
    assert tokenizer.encode("a")[0] == 0
    with pytest.raises(ValueError, match=r"pip install 'minia3\[chat\]'"):
        tokenizer.chat(CHATS["question"])


def test_an_exported_model_keeps_its_template(tmp_path, loaded):
    """save_model writes the tokenizer with the model, and transformers can chat with the folder."""
    tokenizer = tokenizer_with(CHATML)
    folder_with(tmp_path / "out", None, jinja=STRICT)  # the checkpoint that is replaced
    minia3.save_model(loaded("llama-gqa"), tmp_path / "out", tokenizer)
    assert theirs(tmp_path / "out", CHATS["system"]) == tokenizer.chat(CHATS["system"])
