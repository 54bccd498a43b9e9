"""Guards minia3/tasks/messages.py and the examples that are made of conversations."""

import itertools
import json
import re

import pytest
import torch

from minia3.checkpoints.chat import EncodedChat
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example, encode_chat, encode_question, encode_rows
from minia3.tasks.messages import check_messages, fit_chat, in_openai_form, question, shorten
from minia3.tasks.prompts import OWN_PROMPTS
from minia3.tasks.rows import normalize_row
from minia3.tasks.task import TaskSpec


def turns(*texts, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text, role in zip(texts, itertools.cycle(["user", "assistant"])):
        messages.append({"role": role, "content": text})
    return messages


class Letters:
    """A tokenizer of letters: each message is its role's first letter, its content and a dot."""

    def template_to_train_on(self, tools=None):
        return ""

    def conversation(self, messages, tools=None):
        ids = []
        is_scored = []
        for message in messages:
            text = message["role"][0] + message["content"] + "."
            ids += map(ord, text)
            is_answer = message["role"] == "assistant" and message.get("weight") != 0
            is_scored += [False] + [is_answer] * (len(text) - 1)
        return EncodedChat(ids, is_scored)

    def count_chat(self, messages, tools=None):
        return len(self.conversation(messages).ids)

    def chat(self, messages, tools=None):
        return [*self.conversation(messages).ids, ord("a")]

    def decode(self, ids):
        return "".join(map(chr, ids))


def row(messages, **others):
    return {"messages": messages, "idx": 7, "label": 0, **others}


@pytest.mark.parametrize(
    "messages",
    [
        turns("q", "a"),
        turns("q", "a", "r", "b", system="S"),
        turns("q", "a", "r"),
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"id": 1}]}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "name": "x"}],
    ],
)
def test_a_conversation_with_an_answer_is_accepted(messages):
    check_messages(row(messages))
    check_messages(row(messages, tools=[{"type": "function"}]))
    check_messages(row(messages, tools=None))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"'messages' is \[\], expected a list"),
        (
            "hi",
            r"'messages' is 'hi', expected a list of .*, and not its text \(a .csv keeps no lists",
        ),
        (None, "'messages' is None, expected a list"),
        ({"role": "user"}, "expected a list"),
        (["hi"], "message 0 is 'hi', expected {'role': 'user', 'content': 'a text'}"),
        ([{"content": "a"}], "message 0 is {'content': 'a'}, expected"),
        ([{"role": 1, "content": "a"}], "message 0 is"),
        ([{"role": "user"}], "the content of message 0 is None, expected a text"),
        ([{"role": "user", "content": 5}], "the content of message 0 is 5, expected a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "the content of message 0"),
        ([{"role": "assistant", "content": None}], "the content of message 0 is None"),
        (
            turns("q"),
            "no message of the role 'assistant', so there is nothing to learn: found user",
        ),
        ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], "found human, gpt"),
    ],
)
def test_what_is_no_conversation_is_named_in_one_line(messages, problem):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        check_messages(row(messages))
    assert caught.match(problem)


@pytest.mark.parametrize("content", [None, "", "I will look."])
def test_the_older_form_of_a_call_is_refused(content):
    """No template writes it, so with a text beside it, only the text was learned."""
    call = {"name": "weather", "arguments": "{}"}
    messages = turns("q", content)
    messages[1]["function_call"] = call
    problem = "message 1 has the older 'function_call': write it as 'tool_calls': [{'type': 'func"
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_messages(row(messages))
    messages = turns("q", "a")
    for empty in (None, {}, ""):  # as in exports of chats
        messages[1]["function_call"] = empty
        check_messages(row(messages))


def test_a_call_in_sharegpt_s_form_is_refused():
    messages = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    spec = TaskSpec(messages="messages")
    problem = "message 1 has the role 'function_call': write it as a message of the role 'assistant"
    with pytest.raises(ValueError, match=problem):
        normalize_row({"messages": messages}, spec, "train", 0)
    del messages[1]
    assert normalize_row({"messages": messages}, spec, "train", 0)["messages"][1] == {
        "role": "observation",
        "content": "sunny",
    }


def test_a_message_of_sharegpt_s_files_without_a_text_is_named():
    spec = TaskSpec(messages="messages")
    for message in ({"from": "gpt"}, {"from": "gpt", "value": 5}):
        with pytest.raises(ValueError, match=r"the content of message 0 is (None|5), expected"):
            normalize_row({"messages": [message]}, spec, "train", 0)
    for message in ({"from": 1, "value": "a"}, "from", None):
        assert in_openai_form(message) is message


def weighted(messages, *weights):
    """Return the messages with weights for those of the assistant, as OpenAI's files have them."""
    rest = iter(weights)
    return [
        message | {"weight": next(rest)} if message["role"] == "assistant" else message
        for message in messages
    ]


@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0.0, 1.0), (None, 0), (0, None)])
def test_some_answers_may_have_the_weight_0(weights):
    check_messages(row(weighted(turns("q", "a", "r", "b"), *weights)))


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ((0, 0), "all messages of the role 'assistant' have weight 0, so there is nothing.*"),
        ((1, 0.5), "the weight of message 3 is 0.5, expected 0 or 1"),
        (("0", 1), "the weight of message 1 is '0', expected 0 or 1"),
    ],
)
def test_weights_from_which_nothing_is_learned_are_refused(weights, problem):
    messages = weighted(turns("q", "a", "r", "b"), *weights)
    with pytest.raises(ValueError, match=f"\\A{problem}\\Z"):
        check_messages(row(messages))


def test_a_long_conversation_keeps_the_last_answer_that_is_learned():
    """The messages after it were kept, and it was said to have the tokens of all of them."""
    messages = turns("q1", "a1", "q2", "a2", "q3", "a3")
    for weights, limit, expected in [
        ((1, 1, 0), 24, slice(None)),
        ((1, 1, 0), 23, slice(4)),
        ((1, 1, 0), 15, slice(2, 4)),
        ((1, 0, 0), 23, slice(2)),
        ((1, 0, 0), 8, slice(2)),
        ((0, 1, 0), 8, slice(2, 4)),
        ((0, 0, 1), 23, slice(2, None)),
    ]:
        marked = weighted(messages, *weights)
        encoded, was_cut = fit_chat(row(marked), Letters(), limit)
        assert encoded == Letters().conversation(marked[expected])
        assert was_cut == (expected.start is not None)
    message = "row 7 does not fit into max_length 7: its last learned exchange alone has 8 tokens"
    for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        with pytest.raises(ValueError, match=message):
            fit_chat(row(weighted(messages, *weights)), Letters(), 7)


def test_rows_to_predict_need_no_answer_and_lose_theirs():
    check_messages(row(turns("q")), needs_answer=False)
    assert question(turns("q")) == question(turns("q", "a")) == turns("q")
    assert question(turns("q", "a", "r")) == turns("q", "a", "r")


@pytest.mark.parametrize("tools", ["{}", [1], {"a": 1}])
def test_tools_are_a_list_of_objects(tools):
    with pytest.raises(ValueError, match=r"'tools' is .*, expected a list of JSON objects"):
        check_messages(row(turns("q", "a"), tools=tools))


TOOLS = [{"type": "function", "function": {"name": "é", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [TOOLS, []])
def test_tools_may_be_a_text_of_json(tools):
    conversation = {"messages": turns("q", "a"), "tools": json.dumps(tools)}
    checked = normalize_row(conversation, TaskSpec(messages="messages"), "train", 0)
    assert checked["tools"] == tools


def test_an_empty_text_is_no_tools():
    conversation = {"messages": turns("q", "a"), "tools": " "}
    checked = normalize_row(conversation, TaskSpec(messages="messages"), "train", 0)
    assert checked["tools"] is None


@pytest.mark.parametrize("tools", ["{}", "[1]", '[{"a": 1}', "null", "no tools", '"[]"'])
def test_a_text_that_is_no_list_of_tools_is_refused(tools):
    conversation = {"messages": turns("q", "a"), "tools": tools}
    with pytest.raises(ValueError, match=r"'tools' is .*, expected a list of JSON objects"):
        normalize_row(conversation, TaskSpec(messages="messages"), "train", 0)


# Examples


def test_the_source_ends_where_the_assistant_begins_and_the_target_where_it_ends():
    rendered, example, was_cut = encode_chat(row(turns("q", "hi", "r", "ho", "s")), Letters(), 99)
    letters = Letters()
    assert letters.decode(example.source) == "uq.a"
    assert letters.decode(example.targets[0]) == "hi.ur.aho."
    scored = [
        i for i, is_scored in zip(example.targets[0], example.is_scored, strict=True) if is_scored
    ]
    assert letters.decode(scored) == "hi.ho."
    assert (example.label, was_cut) == (0, False)
    assert rendered == ("uq.a", ["hi.ur.aho."], 0)


def test_a_token_before_which_nothing_comes_is_not_predicted():
    class Answers(Letters):
        def conversation(self, messages, tools=None):
            return EncodedChat([5, 6, 7], [True, True, False])

    _, example, _ = encode_chat(row(turns("q", "a")), Answers(), 99)
    assert example == Example([5], [[6]], 0, [True])


def test_rows_of_messages_and_rows_of_text_are_encoded_by_their_kind():
    class Both(Letters):
        def encode_prompt(self, text):
            return list(map(ord, text))

        def encode_target(self, text, end):
            return [1]

    plain = {"input": "x", "target": "y", "label": 0, "idx": 0}
    pairs = [(plain, OWN_PROMPTS[0]), (row(turns("q", "a")), OWN_PROMPTS[0])]
    _, examples, n_cut = encode_rows(pairs, Both(), 99, end=True)
    assert [example.is_scored is None for example in examples] == [True, False]
    assert n_cut == 0


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_its_instructions():
    messages = turns("q1", "a1", "q2", "a2", "q3", "a3", system="S")
    shorter = [messages[:1] + messages[3:], messages[:1] + messages[5:]]
    n_tokens = [len(Letters().conversation(part).ids) for part in [messages, *shorter]]
    for limit, expected in [
        (n_tokens[0], messages),
        (n_tokens[0] - 1, shorter[0]),
        (n_tokens[1], shorter[0]),
        (n_tokens[1] - 1, shorter[1]),
        (n_tokens[2], shorter[1]),
    ]:
        encoded, was_cut = fit_chat(row(messages), Letters(), limit)
        assert encoded == Letters().conversation(expected)
        assert was_cut == (expected is not messages)
    message = "row 7 does not fit into max_length 10: its last learned exchange alone has 11 tokens"
    with pytest.raises(ValueError, match=message):
        fit_chat(row(messages), Letters(), n_tokens[2] - 1)


def test_a_shorter_conversation_must_have_an_answer():
    messages = turns("q1", "a1", "q2")
    with pytest.raises(ValueError, match="its last learned exchange alone has 8 tokens"):
        fit_chat(row(messages), Letters(), 7)


def test_the_oldest_turns_of_an_endless_conversation_are_dropped_at_once():
    """In a few renderings, and without a copy for each of its turns."""
    n_calls = 0

    class Counting(Letters):
        def count_chat(self, messages, tools=None):
            nonlocal n_calls
            n_calls += 1
            return super().count_chat(messages, tools)

    messages = turns(*["q", "a"] * 20_000)
    encoded, was_cut = fit_chat(row(messages), Counting(), 60)
    assert (len(encoded.ids), was_cut) == (60, True)
    assert n_calls < 20


def test_a_template_that_leaves_out_the_assistant_is_refused():
    class Silent(Letters):
        def conversation(self, messages, tools=None):
            return EncodedChat([5, 6], [False, False])

    with pytest.raises(ValueError, match="row 7: the chat template leaves out"):
        fit_chat(row(turns("q", "a")), Silent(), 99)


def test_what_is_wrong_with_the_template_names_the_row():
    class Refusing(Letters):
        def conversation(self, messages, tools=None):
            raise ValueError("chat_template: message 0 changes")

        def count_chat(self, messages, tools=None):
            return 3

    with pytest.raises(ValueError, match=r"\Arow 7: chat_template: message 0 changes\Z"):
        fit_chat(row(turns("q", "a")), Refusing(), 99)

    class RefusingCount(Letters):
        def count_chat(self, messages, tools=None):
            raise ValueError("chat_template: message 0 changes")

    with pytest.raises(ValueError, match=r"\Arow 7: chat_template: message 0 changes\Z"):
        fit_chat(row(turns("q", "a")), RefusingCount(), 99)

    class RefusingLong(Refusing):
        def count_chat(self, messages, tools=None):
            return len(messages)

    problem = r"\Arow 7, the turns that fit into max_length: chat_template: message 0 changes\Z"
    with pytest.raises(ValueError, match=problem):
        fit_chat(row(turns("q", "a", "r", "b")), RefusingLong(), 2)


def test_a_question_is_encoded_up_to_its_answer_within_the_limit():
    letters = Letters()
    messages = turns("q1", "a1", "q2", "a2", system="S")
    rendered, example, was_cut = encode_question(row(messages), letters, 99)
    assert letters.decode(example.source) == "sS.uq1.aa1.uq2.a"
    assert (rendered.choices, example.targets, was_cut) == ([], [], False)
    _, example, was_cut = encode_question(row(messages), letters, 10)
    assert was_cut
    assert letters.decode(example.source) == "sS.uq2.a"
    with pytest.raises(ValueError, match="the last question has 8 tokens"):
        encode_question(row(messages), letters, 7)
    with pytest.raises(ValueError, match="holds only an answer"):
        encode_question(row([{"role": "assistant", "content": "a"}]), letters, 7)


# Masks with holes


def test_a_mask_has_holes_between_the_turns_that_are_scored():
    examples = [
        Example([1, 2], [[3], [4, 5]], 1),
        Example([6], [[7, 8, 9, 10]], 0, [True, False, False, True]),
    ]
    batch = collate(examples)
    assert batch.target_BCL.tolist() == [[[3, 0, 0, 0], [4, 5, 0, 0]], [[7, 8, 9, 10], [0] * 4]]
    assert batch.target_mask_BCL.int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 0, 0, 1], [0, 0, 0, 0]],
    ]
    assert batch.target_mask_BCL.dtype == torch.bool


def test_instructions_of_a_developer_stay_too():
    messages = [{"role": role} for role in ("developer", "user", "assistant", "user", "assistant")]
    shorter = shorten(messages, 4, len, max_length=3)
    assert [message["role"] for message in shorter] == ["developer", "user", "assistant"]
