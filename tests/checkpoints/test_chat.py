"""Guards minia3/checkpoints/chat.py and `Tokenizer.chat`: with a checkpoint's template, we have the
ids of transformers.

The template may be in tokenizer_config.json, in .jinja files or in a GGUF file. It survives saving,
it runs in a sandbox, and if it fails, the message is one line.
"""

import datetime
import functools
import json
import os
from pathlib import Path

import pytest
from chat_templates import MISTRAL_V3, QWEN3, QWEN25, SPECIAL, TAGGED, TEMPLATES, chat
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

import minia3
from minia3.checkpoints.chat import read_template, render_chat
from minia3.checkpoints.chat_spans import Conversation, probe_turn, render_conversation
from minia3.checkpoints.layout import TOOL_TEMPLATE_FILE
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
# Only the last question and what follows it
FORGETFUL = (
    "{% for m in messages[-3 if messages[-1].role == 'user' else -2:] %}"
    "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
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
MADE = {"chatml": CHATML, "strict": STRICT, "blocks": BLOCKS}
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
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Backend(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
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


def theirs(folder, messages, tools=None):
    """Return the ids of transformers' apply_chat_template."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True
    )
    return batch["input_ids"]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", MADE)
def test_a_chat_has_the_ids_of_transformers_before_and_after_saving(tmp_path, name, chat):
    folder = folder_with(tmp_path / "a", MADE[name])
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


SEVERAL = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML, "rag": STRICT}


def save_as_transformers_does(folder, templates):
    """Save a tokenizer with several templates, of which each gets a file of its own."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), **SETTINGS)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert (folder / TOOL_TEMPLATE_FILE).is_file()


def test_templates_in_files_of_their_own_are_read_and_stay_when_saved(tmp_path):
    first = tmp_path / "a"
    second = tmp_path / "b"
    save_as_transformers_does(first, SEVERAL)
    load_tokenizer(first).save(second)
    for folder in (first, second):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.chat_template == their_tokenizer(folder).chat_template == SEVERAL
        for tools in (None, TOOLS):
            ids = tokenizer.chat(CHATS["turns"], tools)
            assert ids == theirs(folder, CHATS["turns"], tools)
        assert tokenizer.chat(CHATS["turns"]) != ids


def test_saving_over_several_templates_leaves_none_of_them(tmp_path):
    save_as_transformers_does(tmp_path, SEVERAL)
    tokenizer_with(STRICT).save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == STRICT
    assert their_tokenizer(tmp_path).chat_template == STRICT


def test_the_template_of_a_gguf_file_is_in_its_metadata():
    vocabulary = backend().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 8 + [1] * (len(tokens) - 8),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": CHATML})
    assert tokenizer.chat(CHATS["turns"]) == tokenizer_with(CHATML).chat(CHATS["turns"])
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.from_gguf(metadata).chat(CHATS["turns"])
    several = {"tokenizer.chat_template": CHATML, "tokenizer.chat_template.tool_use": STRICT}
    several["tokenizer.chat_templates"] = ["tool_use"]
    templates = Tokenizer.from_gguf(metadata | several).chat_template
    assert templates == {"default": CHATML, "tool_use": STRICT}


def test_a_template_writes_no_bos_if_the_settings_say_that_there_is_none(tmp_path):
    """As in Qwen2.5-Instruct, whose config.json has an id for it all the same."""
    folder = folder_with(tmp_path / "a", "{{ bos_token }}" + CHATML)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": None}))
    saved = tmp_path / "b"
    tokenizer = load_tokenizer(folder)
    tokenizer.save(saved)
    for place in (folder, saved):
        config = {"model_type": "qwen2", "bos_token_id": 0}
        (place / "config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(place)
        ids = tokenizer.chat(CHATS["question"])
        assert ids == theirs(place, CHATS["question"])
        assert 0 not in ids
        assert tokenizer.bos_id is None


def refused(tokenizer, messages):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", [None, [{"name": "rag", "template": CHATML}]])
def test_without_a_default_template_the_error_says_what_to_do(template):
    message = refused(tokenizer_with(template), [])
    assert "no chat template: give one with --chat-template FILE" in message


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
        ("{% for i in range(10**9) %}x{% endfor %}", "SecurityError"),
        (17, "expected a text, found int"),
        ("\ud800", "TypeError"),
    ],
)
def test_a_damaged_or_hostile_template_is_refused_in_one_line(template, word):
    message = refused(tokenizer_with(template), CHATS["question"])
    assert message.startswith("chat_template: ")
    assert word in message


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user", "content": "hi"}, ["hi"], [{"content": "hi"}], None]
)
def test_what_is_no_list_of_messages_is_refused(messages):
    """A template would write nothing of it, and the model would answer."""
    tokenizer = tokenizer_with(CHATML)
    for use in (tokenizer.chat, tokenizer.conversation):
        with pytest.raises(ValueError, match=r"^(a message|messages) is .*, expected a list of"):
            use(messages)


def test_messages_that_are_no_json_are_not_called_a_damaged_template():
    messages = [{"role": "user", "content": "hi", "date": datetime.date(2024, 2, 29)}]
    message = refused(tokenizer_with(CHATML), messages)
    assert "the messages have a value that JSON does not have: Object of type date" in message
    assert "damaged" not in message


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
    def render_chat(*_):
        raise ImportError("No module named 'jinja2'")

    monkeypatch.setattr("minia3.checkpoints.tokenizer.render_chat", render_chat)
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


# Whole conversations, and what the assistant wrote in them

TURNS = {
    "one": chat("What is <b>? ", "It is é."),
    "two": chat("q1 ", "a1", "q2", "a2 中国 🎉", system="Be brief."),
    "space": chat(" q\n", " a\n\n", "\nq ", "  a  "),
    "open": chat("q1", "a1", "q2"),  # ends with a question
}


def their_tokenizer(folder):
    """Return transformers' tokenizer of a folder."""
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install 'minia3[test]'"
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


def their_mask(folder, template, messages, tools=None):
    """Return the ids and the mask of transformers for a template with {% generation %} blocks."""
    return ids_and_mask(their_tokenizer(folder), template, messages, tools)


def ids_and_mask(theirs, template, messages, tools=None):
    """Return what `their_mask` returns, for a tokenizer that is loaded already."""
    batch = theirs.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return batch["input_ids"], [bool(value) for value in batch["assistant_masks"]]


def supported(name, messages):
    """Return the messages as the template allows them."""
    return messages[1:] if name == "mistral" and messages[0]["role"] == "system" else messages


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_of_a_conversation_are_those_of_transformers(tmp_path, name, turns):
    """With {% generation %} blocks as without them: there, transformers has no mask."""
    folder = folder_with(tmp_path, TEMPLATES[name])
    messages = supported(name, TURNS[turns])
    ids, mask = their_mask(folder, TAGGED[name], messages)
    assert any(mask)
    assert not all(mask)
    for template in (TEMPLATES[name], TAGGED[name]):
        encoded = tokenizer_with(template).conversation(messages)
        assert encoded.ids == ids
        assert encoded.is_scored == mask


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("templates", [TEMPLATES, TAGGED])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_with_the_weight_0_is_read_and_not_learned(name, templates, place):
    """The weight was passed over, and such answers were trained on."""
    tokenizer = tokenizer_with(templates[name])
    messages = [dict(message) for message in supported(name, TURNS["two"])]
    ids, is_scored = tokenizer.conversation(messages)
    end_of_first = is_scored.index(False, is_scored.index(True))
    parts = [is_scored[:end_of_first], is_scored[end_of_first:]]
    parts[place] = [False] * len(parts[place])
    answers = [message for message in messages if message["role"] == "assistant"]
    answers[place]["weight"] = 0
    answers[1 - place]["weight"] = 1
    assert tokenizer.conversation(messages) == (ids, parts[0] + parts[1])


def test_a_weight_needs_a_block_for_each_answer():
    template = ""
    for block in ("m.role", "m.content"):
        template += f"{{% generation %}}{{{{ {block} }}}}{{% endgeneration %}}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{template}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    )
    messages = chat("q", "a", "r", "b")
    assert any(tokenizer_with(template).conversation(messages).is_scored)
    messages[1]["weight"] = 0
    expected = "the template has 4 {% generation %} blocks for 2 messages of the assistant"
    assert expected in cannot_train(template, messages)


def test_white_space_of_an_answer_counts_if_its_tokens_have_no_characters(tmp_path):
    """A tokenizer.json that trims offsets says so of each token that is a space."""
    trimming = backend()
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming.save(str(folder_with(tmp_path, None) / "tokenizer.json"))
    messages = chat("q  r", "a    b", "  s", "c  ")
    expected = their_mask(tmp_path, TAGGED["chatml"], messages)
    for template in (TEMPLATES["chatml"], TAGGED["chatml"]):
        tokenizer = Tokenizer(trimming, {**SETTINGS, "chat_template": template})
        ids, is_scored = tokenizer.conversation(messages)
        assert (ids, is_scored) == expected
        scored = [i for i, is_answer in zip(ids, is_scored, strict=True) if is_answer]
        assert tokenizer.decode(scored) == "a    bc  "


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_turn_follows_the_prompt_of_generation_and_ends_with_the_end_of_turn(name):
    """What is trained is what `generate --chat` asks for, and the model learns to stop."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = supported(name, TURNS["two"])
    ids, is_scored = tokenizer.conversation(messages)
    n_before = is_scored.index(True)
    question = messages[: messages.index({"role": "assistant", "content": "a1"})]
    assert ids[:n_before] == tokenizer.chat(question)
    turn = ids[n_before : is_scored.index(False, n_before)]
    assert tokenizer.end_of_turn() in ("</s>", "<|im_end|>", "<|eot_id|>")
    assert turn[-1] == tokenizer.backend.token_to_id(tokenizer.end_of_turn())
    assert tokenizer.decode(turn).strip() == "a1"


THINKING = {
    "earlier": chat("q", "<think>\nhm\n</think>\n\na", "r", "<think>\nso\n</think>\n\nb"),
    "dropped": chat("q", "<think>\n\n</think>\n\na", "r", "b", "s", "\n\nc\n", system="S"),
    "same words": chat("a", "a", "a", "a", "a", "a"),
    "probes": chat("Alpha.", "omega!", "omega!", "Alpha.", "Alpha.", ""),
    "empty": chat("", "", "", "a"),
    "template": chat("q<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>", "a<|im_end|>\n"),
    "tools": [
        *chat("q", "<think>\none\n</think>\n\nlook", system="S"),
        {"role": "user", "content": "<tool_response>\n3\n</tool_response>"},
        *chat("r", "<think>\ntwo\n</think>\n\nb", "s", "c")[1:],
    ],
}


@pytest.mark.parametrize("turns", THINKING)
def test_turns_are_found_in_a_text_that_is_rewritten_as_the_conversation_goes_on(turns, tmp_path):
    """Qwen3's template drops the thinking of earlier turns."""
    folder = folder_with(tmp_path, QWEN3)
    tokenizer = load_tokenizer(folder)
    messages = THINKING[turns]
    assert tuple(tokenizer.conversation(messages)) == their_mask(folder, TAGGED["qwen3"], messages)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_replacing_contents_finds_the_same_turns_as_comparing_the_text_before_and_after(
    name, turns
):
    messages = supported(name, TURNS[turns])
    conversation = Conversation(TEMPLATES[name], messages, SETTINGS, None)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(probe_turn(conversation, i))
    assert spans == render_conversation(TEMPLATES[name], messages, SETTINGS).spans


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    """A function from a folder of LLaMA-2's tokenizer to ours and transformers', both made once."""
    if "MINIA3_TEST_DATA" not in os.environ:
        pytest.skip("MINIA3_TEST_DATA is not set")

    @functools.cache
    def get(name):
        ours = load_tokenizer(Path(os.environ["MINIA3_TEST_DATA"], "tokenizers", name))
        # As a PreTrainedTokenizerFast. LlamaTokenizer of transformers 5 replaces the file's
        # normalizer, and then "[INST]" after "<s>" is not what Meta's code makes of it
        # (518 25580 29962).
        folder = tmp_path_factory.mktemp(name)
        ours.save(folder)
        return ours, their_tokenizer(folder)

    return get


@pytest.mark.parametrize("folder", ["llama2", "llama2-hf"])
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", ["llama2", "mistral", "zephyr", "chatml"])
def test_sentencepiece_has_the_ids_and_the_mask_too(name, turns, folder, llama2, monkeypatch):
    """LLaMA-2's tokenizer puts spaces before texts, and breaks rare characters into bytes."""
    ours, theirs = llama2(folder)
    messages = supported(name, TURNS[turns])
    ids, mask = ids_and_mask(theirs, TAGGED[name], messages)
    for template in (TEMPLATES[name], TAGGED[name]):
        monkeypatch.setattr(ours, "chat_template", template)
        encoded = ours.conversation(messages)
        assert encoded.ids == ids
        assert encoded.is_scored == mask


TEXT = st.text(st.sampled_from("ab é中🎉\n\t.<|>[/INST]"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def plain_peer(tmp_path_factory):
    """Transformers' tokenizer, which has no template of its own."""
    return their_tokenizer(folder_with(tmp_path_factory.mktemp("plain"), None))


kept_tokenizer = functools.cache(tokenizer_with)


@pytest.mark.slow
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(TEXT, min_size=2, max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_conversation_has_the_ids_and_the_mask_of_transformers(plain_peer, name, texts, has):
    messages = supported(name, chat(*texts, system="S" if has else None))
    expected = ids_and_mask(plain_peer, TAGGED[name], messages)
    for template in (TEMPLATES[name], TAGGED[name]):
        assert tuple(kept_tokenizer(template).conversation(messages)) == expected


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def test_a_call_of_a_tool_is_a_turn_of_the_assistant_and_its_result_is_not(tmp_path):
    messages = [
        {"role": "user", "content": "1 + 2 ?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]
    folder = folder_with(tmp_path, QWEN25)
    tokenizer = load_tokenizer(folder)
    ids, is_scored = tokenizer.conversation(messages, TOOLS)
    assert ids == their_mask(folder, QWEN25, messages, TOOLS)[0]
    scored = [i for i, is_answer in zip(ids, is_scored, strict=True) if is_answer]
    assert tokenizer.backend.decode(scored, skip_special_tokens=False) == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
        "Three.<|im_end|>"
    )


# Others write the call as QWEN25 does. (The forms are Llama 3's, Mistral's, Qwen3-Coder's, Qwen3's
# and DeepSeek's.)
ALL_CALLS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
END = "{% endfor %}{% endfor %}"
ASKS = "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson"
CALL_TEMPLATES = {
    "the arguments as JSON": ALL_CALLS + "{{ c.function.arguments | tojson }}" + END,
    "the whole call as JSON": ALL_CALLS + "{{ c.function | tojson }}" + END,
    "each argument": ALL_CALLS
    + "{{ c.function.name }}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};"
    + "{% endfor %}"
    + END,
    "either": ALL_CALLS + "{{ " + ASKS + " }}" + END,
}


@pytest.mark.parametrize("name", ["qwen2.5", *CALL_TEMPLATES])
def test_arguments_that_are_a_text_of_json_are_written_like_the_object(name):
    """OpenAI's files have such texts. A template quoted them a second time."""

    def conversation(make_arguments):
        function = {"name": "add", "arguments": make_arguments({"a": 1, "b": 'é "2"'})}
        empty = {"name": "now", "arguments": make_arguments({})}
        calls = [{"id": "c1", "type": "function", "function": function}, {"function": empty}]
        return [
            {"role": "user", "content": "1 + 2 ?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "Three."},
        ]

    for ensure_ascii in (True, False):
        texts = conversation(functools.partial(json.dumps, ensure_ascii=ensure_ascii))
        before = json.dumps(texts)
        objects = conversation(lambda arguments: arguments)
        tokenizer = tokenizer_with({**TEMPLATES, **CALL_TEMPLATES}[name])
        if name == "either" and ensure_ascii:  # the text is what the model is to write
            continue
        assert tokenizer.conversation(texts) == tokenizer.conversation(objects)
        assert tokenizer.chat(texts[:3]) == tokenizer.chat(objects[:3])
        assert json.dumps(texts) == before


@pytest.mark.parametrize("content", ["", '"{\\"a\\": 1}"'])
def test_a_template_that_joins_texts_gets_the_arguments_as_a_text(content):
    # DeepSeek's. It also does if the text occurs in quotes for another reason.
    template = ALL_CALLS + "{{ '[' + c['function']['arguments'] + ']' }}" + END
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    messages[1]["tool_calls"] = [call]
    tokenizer = tokenizer_with(template)
    assert tokenizer.backend.decode(tokenizer.chat(messages)) == content + '[{"a": 1}]'


@pytest.mark.parametrize("text", ["[1]", "a", '{"a": ', "", "{'a': 1}", "[" * 100_000])
def test_arguments_that_spell_no_object_stay_a_text(text):
    tokenizer = tokenizer_with(CALL_TEMPLATES["the arguments as JSON"])
    call = {"function": {"name": "add", "arguments": text}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call, "no call"]}]
    with pytest.raises(ValueError, match="'str object' has no attribute 'function'"):
        tokenizer.chat(messages)
    messages[0]["tool_calls"].pop()
    assert tokenizer.backend.decode(tokenizer.chat(messages)) == json.dumps(text)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[q][]"),
        ("{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}", "[q][]"),
        ("{% for m in messages if 'tool_calls' in m %}[{{ m.role }}]{% endfor %}", "[assistant]"),
        # DeepSeek's
        (
            "{% for m in messages if m['content'] is none %}[{{ m.role }}]{% endfor %}",
            "[assistant]",
        ),
        ("{{ messages[1].tool_calls[0] | tojson }}", '{"id": null}'),
    ],
)
def test_nulls_of_a_message_do_not_reach_the_template(template, expected):
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": None}]},
    ]
    assert render_chat(template, messages, {}).text == expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_reaches_the_template_under_any_of_its_names(name):
    answer = {"role": "assistant", "content": "Five.", "reasoning_content": None, name: "2 + 3"}
    messages = [{"role": "user", "content": "2 + 3 ?"}, answer]
    tokenizer = tokenizer_with(QWEN3)
    ids, is_scored = tokenizer.conversation(messages)
    scored = [i for i, is_answer in zip(ids, is_scored, strict=True) if is_answer]
    assert "<think>\n2 + 3\n</think>\n\nFive." in tokenizer.backend.decode(scored)


@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_tools_take_the_template_for_them_as_in_transformers(tmp_path, tools):
    several = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML},
    ]
    folder = folder_with(tmp_path / "a", several)
    load_tokenizer(folder).save(tmp_path / "b")
    messages = CHATS["turns"]
    for place in (folder, tmp_path / "b"):
        tokenizer = load_tokenizer(place)
        ids = tokenizer.chat(messages, tools)
        assert ids == theirs(place, messages, tools)
        encoded = tokenizer.conversation(messages[:2], tools)
        assert tokenizer.count_chat(messages[:2], tools) == len(encoded.ids)
        assert tokenizer.chat(messages[:1], tools) == encoded.ids[: encoded.is_scored.index(True)]
    tokenizer.chat_template = CHATML
    if tools:
        with pytest.warns(UserWarning, match="does not write the tools"):
            assert tokenizer.chat(messages, tools) != ids
    else:
        assert (tokenizer.chat(messages, tools) == ids) == (tools is None)


def cannot_train(template, messages):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        tokenizer_with(template).conversation(messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("zephyr", {"role": "tool"}, "message 1 (role 'tool') is not in the text"),
        ("llama3", {"tool_calls": [CALL]}, "message 1 calls a tool, and the template does not"),
    ],
)
def test_what_a_template_leaves_out_is_neither_learned_nor_answered(name, change, problem):
    messages = chat("1 + 2 ?", "3", "So?", "Three.")
    messages[1] |= change
    assert problem in cannot_train(TEMPLATES[name], messages)
    assert problem in refused(tokenizer_with(TEMPLATES[name]), messages[:3])


def test_qwen3_is_trained_on_one_answer_with_its_thinking():
    tokenizer = tokenizer_with(QWEN3)
    ids, is_scored = tokenizer.conversation(chat("q", "<think>\nhm\n</think>\n\na"))
    scored = [i for i, is_answer in zip(ids, is_scored, strict=True) if is_answer]
    text = tokenizer.backend.decode(scored, skip_special_tokens=False)
    assert text == "<think>\nhm\n</think>\n\na<|im_end|>"


OTHER_PLACE = "put the system message into the question, or give a template with"


@pytest.mark.parametrize(
    ("template", "messages", "was", "becomes", "advice"),
    [
        (MISTRAL_V3, chat("q", "a", "r", "b", system="S"), "'S", "'q[/INST]", OTHER_PLACE),
        # There is one answer, at the end, already.
        (MISTRAL_V3, chat("q", "a", system="S"), "'S", "'q[/INST]", OTHER_PLACE),
        (FORGETFUL, chat("q", "a", "r", "b"), "'q", "'r", "give conversations with one answer at"),
        (MISTRAL_V3, chat("q", "a", system=""), "'", "'", "give a template whose prompt"),
    ],
)
def test_a_template_that_moves_or_drops_what_was_said_before_is_refused(
    template, messages, was, becomes, advice
):
    """Mistral's moves the system message to the last question, if that ends the conversation."""
    message = cannot_train(template, messages)
    assert "changes when the conversation goes on" in message
    assert f"{was}" in message.split("becomes")[0]
    assert becomes in message.split("becomes")[1]
    assert f"trained on: {advice}" in message
    assert "{% generation %} blocks (--chat-template FILE)" in message


def test_a_prompt_that_the_conversation_does_not_repeat_is_refused():
    template = TEMPLATES["chatml"].replace(
        "assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"
    )
    for system in (None, "S"):
        message = cannot_train(template, chat("q", "a", system=system))
        assert "('<think>' becomes 'a<|im_end|" in message
        assert (
            "trained on: give a template whose prompt the conversation repeats, or a template"
            in message
        )


def test_a_conversation_that_begins_with_the_assistant_needs_blocks(tmp_path):
    messages = [{"role": "assistant", "content": "Hi."}, *chat("q", "a")]
    message = cannot_train(TEMPLATES["chatml"], messages)
    assert "begins with the assistant" in message
    tokenizer = tokenizer_with(TAGGED["chatml"])
    expected = their_mask(folder_with(tmp_path, None), TAGGED["chatml"], messages)
    assert tuple(tokenizer.conversation(messages)) == expected


def test_without_an_end_token_the_turn_ends_in_text_which_ends_an_answer():
    template = (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n### end\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    tokenizer = tokenizer_with(template)
    assert tokenizer.end_of_turn() == "### end"
    ids, is_scored = tokenizer.conversation(chat("q", "a"))
    scored = [i for i, is_answer in zip(ids, is_scored, strict=True) if is_answer]
    assert tokenizer.decode(scored) == "a\n### end"
    assert tokenizer_with("{{ raise_exception('no') }}").end_of_turn() == ""
    assert tokenizer_with("{{ messages[-1].content }}").end_of_turn() == ""
    assert tokenizer_with(None).end_of_turn() == ""


@pytest.mark.parametrize("answer", ["yes", "A", "t", "an", "Assistant: ", "", " a\n"])
def test_without_an_end_token_the_line_break_ends_a_turn_whatever_the_answer(answer):
    """The role stands in the turn, because the template passes over `add_generation_prompt`."""
    template = "{% for m in messages %}{{ m.role.capitalize() }}: {{ m.content }}\n{% endfor %}"
    text, ((first, end), _) = render_conversation(template, chat("q", answer, "r", "b"), {})
    assert text[first:end] == f"Assistant: {answer}\n"


@pytest.mark.parametrize("answer", ["yes", ">", "im", "assistant", ""])
def test_the_line_break_after_an_end_token_is_not_scored_whatever_the_answer(answer):
    text, ((first, end), _) = render_conversation(
        TEMPLATES["chatml"], chat("q", answer, "r", "b"), {}
    )
    assert text[first:end] == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    "ending", ["</answer>", "### End of answer", "Hello!", "Alpha.", "<|im_end|>"]
)
def test_the_end_of_a_turn_is_found_whatever_words_the_template_has(ending):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nHi.<answer>"
        f"{{% else %}}{{{{ m.content }}}}{ending}\n{{% endif %}}{{% endfor %}}"
    )
    assert tokenizer_with(template).end_of_turn() == ending


def test_the_end_of_a_turn_is_what_the_blocks_of_a_template_say():
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }} END{% endgeneration %}\n###\n"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert tokenizer_with(template).end_of_turn() == "END"
    assert tokenizer_with("{{ messages[0].content }}").end_of_turn() == ""


def test_a_t5_says_which_rows_it_learns_from(loaded):
    from words import word_tokenizer

    tokenizer = word_tokenizer(ends=True)
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="has an encoder: give rows with 'input' and 'target'"):
        tokenizer.conversation(chat("w3", "w4"))


def test_a_template_file_is_read_as_text(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(CHATML, encoding="utf-8")
    assert read_template(path) == CHATML
    path.write_text(CHATML, encoding="utf-8-sig")  # as editors of Windows do
    assert read_template(path) == CHATML
    path.write_text("  \n")
    with pytest.raises(ValueError, match=r"template.jinja: the file is empty"):
        read_template(path)
    with pytest.raises(ValueError, match=r"nowhere: not found"):
        read_template(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="directory"):
        read_template(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UnicodeDecodeError"):
        read_template(path)
