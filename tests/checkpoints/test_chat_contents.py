"""Guards minia3/checkpoints/chat_contents.py: what a chat template leaves out is an error.

It was trained without, and the model learned to answer nothing in place of a call.
"""

import re
import warnings

import pytest
from chat_templates import MISTRAL_V3, QWEN25, TEMPLATES, chat

from minia3.checkpoints.chat import render_chat
from minia3.checkpoints.chat_contents import check_contents
from minia3.checkpoints.chat_spans import render_conversation

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
OTHER = {"type": "function", "function": {"name": "time", "arguments": {"city": "Paris"}}}


def check(template, messages, tools=None):
    """Check the text of a whole conversation, and that of its question."""
    text, _ = render_conversation(template, messages, SETTINGS, tools)
    check_contents(text, template, messages, SETTINGS, tools, ends_with_prompt=False)
    text, _ = render_chat(template, messages[:-1], SETTINGS, tools)
    check_contents(text, template, messages[:-1], SETTINGS, tools)


def problems(template, messages, tools=None):
    """Return the errors about a whole conversation, and about its question."""
    found = []
    for part, ends_with_prompt in ((messages, False), (messages[:-1], True)):
        text, _ = render_chat(template, part, SETTINGS, tools, ends_with_prompt)
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            check_contents(text, template, part, SETTINGS, tools, ends_with_prompt)
        found.append(str(caught.value))
    return found


def with_role(role):
    if role == "developer":
        return [{"role": role, "content": "Be brief."}, *chat("q", "a")], 0
    return [*chat("q", "a"), {"role": role, "content": "sunny\n"}, chat("", "b")[1]], 2


@pytest.mark.parametrize("role", ["developer", "function", "observation"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "zephyr"])
def test_a_message_of_a_role_that_the_template_does_not_know_is_refused(name, role):
    messages, place = with_role(role)
    expected = f"message {place} (role '{role}') is not in the text that the template writes: give"
    for problem in problems(TEMPLATES[name], messages):
        assert expected in problem


@pytest.mark.parametrize("role", ["developer", "function", "observation"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "zephyr"])
def test_such_a_message_is_refused_although_its_words_stand_elsewhere(name, role):
    messages, place = with_role(role)
    messages[1]["content"] += f" {messages[place]['content'].strip()}"
    for problem in problems(TEMPLATES[name], messages):
        assert f"message {place} (role '{role}') is not in the text that the template" in problem


@pytest.mark.parametrize("role", ["developer", "observation"])
def test_a_message_without_words_may_be_left_out(role):
    messages, place = with_role(role)
    messages[place]["content"] = " \n"
    check(QWEN25, messages)


@pytest.mark.parametrize("role", ["developer", "function", "observation"])
@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3"])
def test_a_template_that_writes_every_role_is_used_with_any(name, role):
    messages, _ = with_role(role)
    check(TEMPLATES[name], messages)


@pytest.mark.parametrize("word", ["Alpha.", "omega!", "be brief."])
@pytest.mark.parametrize(
    "system",
    [
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ raise_exception('no') if m.content != word else '' }}",
    ],
)
def test_a_message_in_other_words_is_in_the_text(system, word):
    template = (
        f"{{% set word = '{word}' %}}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{system}{{% else %}}[{{{{ m.content }}}}]{{% endif %}}"
        "{% endfor %}"
    )
    text, _ = render_chat(template, chat("q", system=word), {})
    check_contents(text, template, chat("q", system=word), {})


def calling(content, *calls):
    """Return a conversation in which the assistant calls tools. content: what it says besides."""
    messages = chat("Weather?", content, "sunny", "It is sunny.")
    messages[1]["tool_calls"] = list(calls)
    messages[2]["role"] = "tool"
    return messages


@pytest.mark.parametrize(
    ("name", "content"),
    [("llama3", None), ("llama3", ""), ("chatml", ""), ("smollm2", "I look."), ("zephyr", "")],
)
def test_a_call_that_the_template_does_not_write_is_refused(name, content):
    messages = calling(content, CALL)
    expected = "message 1 calls a tool, and the template does not write the call ({'name': 'weather"
    problem, _ = problems(TEMPLATES[name], messages[:2] + chat("Thanks.", "b"))
    assert expected in problem
    if name != "zephyr":  # it does not know the role of the result, either
        assert all(expected in problem for problem in problems(TEMPLATES[name], messages))


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_calls_that_the_template_writes_are_used(content):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(QWEN25, calling(content, CALL, CALL, OTHER), [TOOL])


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_name_in_the_list_of_tools_is_no_call(tools):
    template = "{{ tools | tojson }}" + TEMPLATES["chatml"]
    for problem in problems(template, calling("", CALL), tools):
        assert "message 1 calls a tool" in problem


def test_each_of_several_calls_must_be_in_the_text():
    only_first = QWEN25.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    assert only_first != QWEN25
    for problem in problems(only_first, calling("", CALL, OTHER)):
        assert "does not write the call ({'name': 'time'" in problem
    check(only_first, calling("", CALL))


def test_words_beside_a_call_need_not_be_in_the_text():
    """Llama 3.1's template writes the calls alone."""
    calls_alone = re.sub(r"\{%- if message\.content %\}", "{%- if false %}", QWEN25)
    assert calls_alone != QWEN25
    check(calls_alone, calling("I look.", CALL))


@pytest.mark.parametrize("words", ["Be brief.", "Weather?"])  # the user asks the second, too
def test_a_warning_says_that_a_message_is_not_read_after_the_result_of_a_tool(words):
    """Mistral's template writes the system message into the last message, if it is the user's."""
    calls_tools = MISTRAL_V3.replace(
        '{%- elif message["role"] == "assistant" %}',
        '{%- elif message["role"] == "tool" %}{{ "[TOOL_RESULTS]" + message["content"] }}'
        '{%- elif message["tool_calls"] is defined %}{{ message["tool_calls"] | tojson }}'
        '{%- elif message["role"] == "assistant" %}',
    )
    question = [*chat(words, "Weather?"), *calling("", CALL)[1:3]]
    question[0]["role"], question[1]["role"] = "system", "user"
    text, _ = render_chat(calls_tools, question, SETTINGS)
    assert f"{words}\n\n" not in text
    with pytest.warns(UserWarning, match="does not write the system message after the result"):
        check_contents(text, calls_tools, question, SETTINGS)
    without_system = calls_tools.replace('system_message + "', '"')
    text, _ = render_chat(without_system, question, SETTINGS)
    with pytest.raises(ValueError, match=r"message 0 \(role 'system'\) is not in the text"):
        check_contents(text, without_system, question, SETTINGS)


@pytest.mark.parametrize(("name", "n_warnings"), [("qwen2.5", 0), ("llama3", 2)])
def test_a_warning_says_that_the_template_does_not_write_the_tools(name, n_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(TEMPLATES[name], chat("q", "a"), [TOOL])
        check(TEMPLATES[name], chat("q", "a"), [])
    found = [str(warning.message) for warning in caught]
    assert len(found) == n_warnings
    assert all("does not write the tools of a conversation" in message for message in found)
