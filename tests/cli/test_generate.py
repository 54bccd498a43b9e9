"""Guards `generate`: it prints what minia3.generate returns, for prompts of the command line, of a
pipe and of a conversation, as text and as JSON."""

import fcntl
import importlib.util
import io
import json
import os
import pty
import subprocess
import sys
import termios
import time
from dataclasses import replace
from functools import partial

import pytest
import running
import torch
from command_line import answered, failure, output, python, read_until
from conftest import randomize

import minia3
from minia3.cli.generate import options_of, typed_lines
from minia3.cli.main import main, parse
from minia3.files.program import CtrlC
from minia3.inference import decoding
from minia3.model import huge_pages
from minia3.training import device

PROMPTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]


def expected(prompts=PROMPTS, adapter=None, name="t5", **options):
    model = minia3.load_model(running.model(name))
    tokenizer = minia3.load_tokenizer(running.model(name))
    if adapter:
        minia3.load_adapter(model, adapter)
    return minia3.generate(model, tokenizer, prompts, **options)


def as_lines(texts):
    return "".join(f"{text}\n" for text in texts)


# Prompts of the command line


@pytest.mark.parametrize(
    ("flags", "n_copies", "is_moved"),
    [
        ("--dtype bfloat16", None, False),
        ("--dtype bfloat16", 2, False),
        ("--dtype bfloat16", 3, True),
        ("--dtype float32", 3, False),
        ("--dtype bfloat16 --quantize int8", 3, False),
    ],
)
def test_plain_bfloat16_moves_into_huge_pages_if_half_of_the_free_memory_is_enough(
    flags, n_copies, is_moved, capsys, monkeypatch
):
    model = minia3.load_model(running.model("t5"), dtype=torch.bfloat16)
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(device, "free_memory_of_system", lambda: n_copies and n_copies * n_bytes)
    moved = []
    monkeypatch.setattr(huge_pages, "move_to_huge_pages", moved.append)
    assert output(capsys, "generate", running.model("t5"), "w3", *flags.split())
    assert len(moved) == is_moved


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--beams", "3", "--length-penalty", "0.5"], {"beams": 3, "length_penalty": 0.5}),
        (["--temperature", "2", "--seed", "5"], {"temperature": 2.0, "seed": 5}),
        (
            ["--temperature", "2", "--seed", "5", "--top-k", "4"],
            {"temperature": 2.0, "seed": 5, "top_k": 4},
        ),
        (
            ["--temperature", "2", "--seed", "5", "--top-p", "0.5"],
            {"temperature": 2.0, "seed": 5, "top_p": 0.5},
        ),
        (["--stop", "w1", "--stop", "w2"], {"stop": ["w1", "w2"]}),
        (["--max-new-tokens", "2"], {"max_new_tokens": 2}),
    ],
)
def test_the_command_prints_what_the_function_returns(words, options, capsys):
    """Three prompts at once; one prompt, which is streamed; and as JSON."""
    model = running.model("t5")
    if "max_new_tokens" not in options:
        words = [*words, "--max-new-tokens", "8"]
        options = {**options, "max_new_tokens": 8}
    texts = expected(**options)
    assert output(capsys, "generate", model, *PROMPTS, *words) == as_lines(texts)
    assert output(capsys, "generate", model, *words, PROMPTS[0]) == f"{texts[0]}\n"
    lines = output(capsys, "generate", *words, "--json", model, *PROMPTS).splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["prompt"] for answer in answers] == PROMPTS
    assert [answer["output"] for answer in answers] == texts


def test_a_text_to_stop_at_may_have_line_breaks():
    """As people type them in --input."""
    args = parse(["generate", "m", "--stop", r"\n\nQ:", "--stop", "w1"])
    assert options_of(args)["stop"] == ["\n\nQ:", "w1"]


def test_a_compiled_step_prints_the_same(capsys, monkeypatch):
    compiled = []

    def compile_step(model, state):
        compiled.append(model)
        return model.step

    monkeypatch.setattr(decoding, "compile_step", compile_step)
    found = output(capsys, "generate", running.model("t5"), *PROMPTS, "--compile")
    assert found == as_lines(expected())
    assert compiled


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--top-k", "4"], "give a temperature above 0"),
        (["--top-p", "0.5", "--seed", "5"], "give a temperature above 0"),
        (["--length-penalty", "2"], "give 2 beams or more"),
        (["--temperature", "1", "--top-k", "4", "--top-p", "0.5"], None),
        (["--beams", "2", "--length-penalty", "2"], None),
    ],
)
def test_an_option_without_the_one_that_it_needs_is_a_warning(words, remedy, capsys):
    assert main(["generate", str(running.model("t5")), "w3", *words]) == 0
    error = capsys.readouterr().err
    assert ("no effect" in error) == (remedy is not None)
    assert (remedy or "") in error


def test_samples_follow_their_prompt(capsys):
    words = ["--temperature", "3", "--seed", "1", "--samples", "2", "--max-new-tokens", "4"]
    words = ["generate", running.model("t5"), *PROMPTS, *words]
    texts = expected(temperature=3.0, seed=1, samples=2, max_new_tokens=4)
    assert len(set(texts)) > 3
    assert output(capsys, *words) == as_lines(texts)
    answers = [json.loads(line) for line in output(capsys, *words, "--json").splitlines()]
    assert [answer["outputs"] for answer in answers] == [texts[0:2], texts[2:4], texts[4:6]]


def test_the_adapter_is_used(tmp_path, capsys):
    minia3.save_adapter(randomize(minia3.load_model(running.model("llama"))), tmp_path)
    words = ["generate", running.model("llama"), *PROMPTS, "--max-new-tokens", "6"]
    texts = expected(adapter=tmp_path, name="llama", max_new_tokens=6)
    assert output(capsys, *words, "--adapter", tmp_path).splitlines() == texts
    base_texts = expected(name="llama", max_new_tokens=6)
    assert output(capsys, *words).splitlines() == base_texts != texts


def test_one_prompt_is_streamed_piece_by_piece(capsys, monkeypatch):
    seen = []

    def generate_pieces(model, tokenizer, prompts, adapter, options, cut):
        for piece in ("one", " two", " three"):
            seen.append(capsys.readouterr().out)
            yield 0, piece

    monkeypatch.setattr("minia3.inference.decoding.generate_pieces", generate_pieces)
    assert output(capsys, "generate", running.model("t5"), "w3") == " three\n"
    assert seen == ["", "one", " two"]


@pytest.mark.parametrize("is_shown", [True, False])
def test_an_answer_that_is_cut_is_marked_on_a_terminal_and_not_in_a_pipe(
    is_shown, capsys, monkeypatch
):
    """Only those of a conversation were marked."""
    monkeypatch.setattr("minia3.cli.generate.is_terminal", lambda stream: is_shown)
    mark = " [cut after 1 tokens: --max-new-tokens]" if is_shown else ""
    out = output(capsys, "generate", "tiny-t5", "same colour ?", "--max-new-tokens", "1")
    assert out == f"yes{mark}\n"
    out = output(capsys, "generate", "tiny-t5", "same colour ?", "--max-new-tokens", "9")
    assert "cut after" not in out


def test_a_prompt_of_the_command_line_is_taken_as_it_is(capsys):
    prompt = " w3 w4 \n"
    words = ["--max-new-tokens", "3", "--json"]
    answer = json.loads(output(capsys, "generate", running.model("t5"), prompt, *words))
    assert answer["prompt"] == prompt
    out = output(capsys, "generate", running.model("t5"), "", *words[:2])
    assert out == as_lines(expected([""], max_new_tokens=3))
    message = failure(capsys, "generate", running.model("llama"), "")
    assert "prompts [0] have no tokens" in message


# A pipe


def pipe(content, monkeypatch):
    """Let standard input hold these bytes, in a locale in which Python would misread them."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))


def test_each_line_of_a_pipe_is_a_prompt(capsys, monkeypatch):
    prompts = [f"w{3 + i % 50} w{4 + i % 7}" for i in range(40)]
    pipe("\n\n".join(prompts).encode(), monkeypatch)
    words = ["generate", running.model("t5"), "--max-new-tokens", "3", "--json"]
    answers = [json.loads(line) for line in output(capsys, *words).splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["output"] for answer in answers] == expected(prompts, max_new_tokens=3)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_size_of_a_batch_changes_no_text(batch_size, capsys, monkeypatch):
    prompts = [f"w{3 + i}" for i in range(20)]
    texts = expected(prompts, temperature=3.0, seed=1, max_new_tokens=4)
    sizes = []
    original = decoding.generate_texts

    def counting(model, tokenizer, prompts, *rest):
        sizes.append(len(prompts))
        return original(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(decoding, "generate_texts", counting)
    pipe("\n".join(prompts).encode(), monkeypatch)
    words = ["--json", "--temperature", "3", "--seed", "1", "--max-new-tokens", "4"]
    words += ["--batch-size", str(batch_size)]
    lines = output(capsys, "generate", running.model("t5"), *words).splitlines()
    assert [json.loads(line)["output"] for line in lines] == texts
    assert max(sizes) == min(batch_size, 20)


def test_a_line_of_a_pipe_loses_only_its_end_and_blank_lines_are_skipped(capsys, monkeypatch):
    pipe(b"  w3 w4 \n\n   \nw5", monkeypatch)
    words = ["generate", running.model("t5"), "--max-new-tokens", "1", "--json"]
    answers = [json.loads(line) for line in output(capsys, *words).splitlines()]
    assert [answer["prompt"] for answer in answers] == ["  w3 w4 ", "w5"]


@pytest.mark.parametrize(
    "content", [b"w3 w4\r\nw5 \xc3\xa9\r\n", b"\xef\xbb\xbfw3 w4\nw5 \xc3\xa9"]
)
def test_a_pipe_is_utf8_and_may_come_from_windows(content, capsys, monkeypatch):
    pipe(content, monkeypatch)
    words = ["generate", running.model("t5"), "--max-new-tokens", "1", "--json"]
    answers = [json.loads(line) for line in output(capsys, *words).splitlines()]
    assert [answer["prompt"] for answer in answers] == ["w3 w4", "w5 é"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"w3 w4\n\nw5 \xe9\n", "3: not UTF-8: byte 0xe9 after 'w5 '"),
        ("w3 w4\n".encode("utf-16"), "1: not UTF-8, but UTF-16: save the file as UTF-8"),
    ],
)
def test_a_line_of_a_pipe_that_is_not_utf8_is_named(content, reason, capsys, monkeypatch):
    pipe(content, monkeypatch)
    message = failure(capsys, "generate", running.model("t5"))
    assert message.startswith(f"minia3: standard input, line {reason}")


@pytest.mark.parametrize("samples", [1, 2])
def test_equal_lines_of_a_pipe_have_random_numbers_of_their_own(samples, capsys, monkeypatch):
    """Also in the second batch, and in the third one, a single prompt that is streamed."""
    prompts = ["w3 w4"] * 33
    pipe("\n".join(prompts).encode(), monkeypatch)
    words = ["--temperature", "3", "--seed", "1", "--samples", samples, "--max-new-tokens", "4"]
    options = {"temperature": 3.0, "seed": 1, "samples": samples, "max_new_tokens": 4}
    texts = expected(prompts, **options)
    assert len(set(texts)) > 30 * samples
    assert output(capsys, "generate", running.model("t5"), *words) == as_lines(texts)


@pytest.mark.slow
def test_a_closed_standard_input_counts_as_empty():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python("generate", "tiny-t5", preexec_fn=lambda: os.close(0), **pipes)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 0


def test_without_standard_input_a_conversation_is_empty(tmp_path, capsys, monkeypatch):
    (tmp_path / "words.jinja").write_text(WORDS)
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    words = ["tiny-t5", "--chat", "--chat-template", tmp_path / "words.jinja"]
    assert output(capsys, "generate", *words) == ""


# A conversation

# Each message is its words and an end. A word model knows the ends as words.
WORDS = (
    "{% for m in messages %}{{ m.content }} {{ 'w59' if m.role == 'assistant' else 'w60' }} "
    "{% endfor %}"
)


class Terminal:
    """A standard input where `lines` are typed, and then Ctrl-D."""

    def __init__(self, monkeypatch, *lines):
        self.lines = list(lines)
        monkeypatch.setattr("sys.stdin", self)
        monkeypatch.setattr("builtins.input", self.input)

    def isatty(self):
        return True

    def input(self, prompt):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_chat_wraps_a_prompt_and_a_conversation_keeps_its_messages(capsys, monkeypatch, tmp_path):
    (tmp_path / "words.jinja").write_text(WORDS)
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja", "--max-new-tokens", "3"]
    words = ["generate", running.model("llama"), *flags]
    options = {"name": "llama", "max_new_tokens": 3, "stop": ["w59"]}
    out = output(capsys, *words, "w3 w4", "w5")
    assert out.splitlines() == expected(["w3 w4 w60", "w5 w60"], **options)

    Terminal(monkeypatch, "w3", "  ", "w4 ", "/reset", "w4", "/exit", "w5")
    first, second, third = output(capsys, *words).splitlines()
    dialog = [f"w3 w60 {first} w59 w4 w60"]
    assert [first, second, third] == [
        *expected(["w3 w60"], **options),
        *expected(dialog, **options),
        *expected(["w4 w60"], **options),
    ]
    assert second != third


def said(*turns):
    """Return messages of the user and of the assistant, in turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


# The last one is a message of the user, although it is JSON.
ROWS_OF_MESSAGES = [
    {"messages": said("w3", "w4", "w5 w6")},
    {"messages": said("w7", "w8"), "idx": 5},  # the answer is left out
    {"conversations": [{"from": "human", "value": "w9"}], "system": "w10 w11"},
    {"text": "w12"},
]


def test_a_row_of_messages_is_a_conversation_as_in_predict(capsys, monkeypatch, tmp_path):
    """It was put into the template as a message that the user says, with its braces."""
    tokenizer = minia3.load_tokenizer(running.model("llama"))
    tokenizer.chat_template = WORDS
    minia3.save_model(minia3.load_model(running.model("llama")), tmp_path / "model", tokenizer)
    lines = [json.dumps(row) for row in ROWS_OF_MESSAGES]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-1]))
    flags = ["--max-new-tokens", "3"]
    words = ["predict", tmp_path / "model", tmp_path / "rows.jsonl", *flags]
    predicted = [json.loads(line)["output"] for line in answered(capsys, *words).splitlines()]
    chats = ["w3 w60 w4 w59 w5 w6 w60", "w7 w60", "w10 w11 w60 w9 w60", f"{lines[-1]} w60"]
    texts = expected(chats, name="llama", max_new_tokens=3, stop=["w59"])
    assert texts[:-1] == predicted
    words = ["generate", tmp_path / "model", "--chat", "--json", *flags]
    answers = [{"prompt": line, "output": text} for line, text in zip(lines, texts, strict=True)]
    pipe("\n".join(lines).encode(), monkeypatch)
    assert [json.loads(line) for line in output(capsys, *words).splitlines()] == answers
    assert [json.loads(line) for line in output(capsys, *words, *lines).splitlines()] == answers


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [{"role": "user"}]}', "the content of message 0 is None, expected a text"),
        ('{"messages": [{"role": "us', "not JSON: Unterminated string"),
        ('{"conversations": [{"from": "human", "value": "w3"}]},', "not JSON: Extra data"),
        (json.dumps({"messages": said("bad")}), "chat_template: No."),
        ("a bad one", "chat_template: No."),  # a message of the user
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named(line, reason, capsys, monkeypatch, tmp_path):
    template = (
        WORDS + "{% if 'bad' in messages[-1].content %}{{ raise_exception('No.') }}{% endif %}"
    )
    (tmp_path / "words.jinja").write_text(template)
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja"]
    words = ["generate", running.model("llama"), *flags]
    pipe(f"w3\n\n{line}\n".encode(), monkeypatch)
    message = failure(capsys, *words)
    assert message.startswith(f"minia3: standard input, line 3: {reason}")
    assert failure(capsys, *words, "w3", line).startswith(f"minia3: prompt 1: {reason}")


@pytest.mark.parametrize("text", ['{ w3 "messages": w4 }', "5", '[{"messages": "w3"}]'])
def test_a_prompt_that_is_no_row_of_messages_is_a_message(text, capsys, tmp_path):
    (tmp_path / "words.jinja").write_text(WORDS)
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja", "--max-new-tokens", "3"]
    out = output(capsys, "generate", running.model("llama"), *flags, text)
    assert out.splitlines() == expected(
        [f"{text} w60"], name="llama", max_new_tokens=3, stop=["w59"]
    )


def test_without_chat_each_line_that_is_typed_stands_alone(capsys, monkeypatch):
    Terminal(monkeypatch, "w3", "w4")
    out = output(capsys, "generate", running.model("t5"), "--max-new-tokens", "3")
    assert out.splitlines() == expected(["w3", "w4"], max_new_tokens=3)


def test_all_compiled_batches_of_a_pipe_have_the_same_number_of_rows(capsys, monkeypatch):
    """Also the last one, a single prompt that is streamed. A conversation has one row at a time."""
    n_rows = []

    def compile_step(model, state):
        n_rows.append(len(state.start))
        return model.step

    monkeypatch.setattr(decoding, "compile_step", compile_step)
    prompts = [f"w{3 + i}" for i in range(5)]
    texts = as_lines(expected(prompts, max_new_tokens=4))
    words = ["generate", running.model("t5"), "--compile", "--max-new-tokens", "4"]
    pipe("\n".join(prompts).encode(), monkeypatch)
    assert output(capsys, *words, "--batch-size", "2") == texts
    assert n_rows == [2, 2, 2]
    Terminal(monkeypatch, *prompts)
    assert output(capsys, *words) == texts
    assert n_rows == [2, 2, 2] + [1] * 5


def test_equal_messages_have_random_numbers_of_their_own(capsys, monkeypatch):
    Terminal(monkeypatch, "w3", "w3")
    words = ["--temperature", "3", "--seed", "1", "--max-new-tokens", "4"]
    texts = expected(["w3", "w3"], temperature=3.0, seed=1, max_new_tokens=4)
    assert texts[0] != texts[1]
    assert output(capsys, "generate", running.model("t5"), *words) == as_lines(texts)


@pytest.mark.parametrize("flags", [[], ["--beams", "4"], ["--json"]])
def test_an_answer_that_ctrl_c_ends_before_it_is_printed_is_stopped(flags, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate_pieces", interrupt)
    Terminal(monkeypatch, "w3")
    assert output(capsys, "generate", running.model("t5"), *flags) == "[stopped]\n"


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_answer_that_ends_in_an_error_of_torch_after_ctrl_c_is_stopped(
    error, capsys, monkeypatch
):
    """And the conversation continues: an error of the next message is an error."""
    errors = [error("could not determine the shape"), ValueError("too long")]

    def fail(*_):
        monkeypatch.setattr(CtrlC, "has_come", len(errors) == 2)
        raise errors.pop(0)

    monkeypatch.setattr(decoding, "generate_pieces", fail)
    Terminal(monkeypatch, "w3", "w4")
    out = output(capsys, "generate", running.model("t5"))
    assert out.splitlines() == ["[stopped]", "[too long]"]


def test_ctrl_c_in_an_answer_is_no_excuse_for_a_later_error(capsys, monkeypatch):
    """A message without an answer forgets it, so what fails afterwards is told."""

    def fail(*_):
        raise ValueError("too long")

    monkeypatch.setattr(decoding, "generate_pieces", fail)
    monkeypatch.setattr(CtrlC, "has_come", True)
    Terminal(monkeypatch, "w3")
    assert output(capsys, "generate", running.model("t5")) == "[too long]\n"


def test_a_message_that_cannot_be_answered_is_forgotten(capsys, monkeypatch, tmp_path):
    """The template refuses it, so the next message follows what was said before it."""
    template = (
        WORDS + "{% if 'bad' in messages[-1].content %}{{ raise_exception('No.') }}{% endif %}"
    )
    (tmp_path / "words.jinja").write_text(template)
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja", "--max-new-tokens", "3"]
    Terminal(monkeypatch, "bad", "w3")
    lines = output(capsys, "generate", running.model("llama"), *flags).splitlines()
    assert lines[0] == "[chat_template: No.]"
    assert lines[1:] == expected(["w3 w60"], name="llama", max_new_tokens=3, stop=["w59"])


def test_a_model_without_a_template_says_how_to_give_one(capsys):
    message = failure(capsys, "generate", running.model("llama"), "--chat", "w3")
    assert "no chat template: give one with --chat-template FILE" in message
    message = failure(capsys, "generate", running.model("llama"), "--chat-template", "x", "w3")
    assert "give --chat, too" in message
    flags = ["--chat", "--chat-template", "nowhere.jinja"]
    message = failure(capsys, "generate", running.model("llama"), *flags, "w3")
    assert message == "minia3: nowhere.jinja: not found\n"


def test_the_template_of_the_adapter_is_used_unless_a_file_is_given(capsys, tmp_path):
    minia3.save_adapter(minia3.load_model(running.model("llama")), tmp_path / "a")
    (tmp_path / "a" / "task.json").write_text(json.dumps({"chat_template": WORDS}))
    (tmp_path / "other.jinja").write_text(WORDS.replace("w60", "w58"))
    words = ["generate", running.model("llama"), "--adapter", tmp_path / "a", "--chat"]
    words += ["--max-new-tokens", "3"]
    options = {"name": "llama", "max_new_tokens": 3, "stop": ["w59"]}
    assert output(capsys, *words, "w3").splitlines() == expected(["w3 w60"], **options)
    out = output(capsys, *words, "--chat-template", tmp_path / "other.jinja", "w3")
    assert out.splitlines() == expected(["w3 w58"], **options)
    (tmp_path / "a" / "task.json").write_text(json.dumps({"chat_template": None}))
    assert "no chat template" in failure(capsys, *words, "w3")


@pytest.mark.parametrize("is_special", [True, False])
def test_the_end_of_a_turn_ends_an_answer(is_special, capsys, tmp_path):
    """As a special token it is an end token of the model, and otherwise a text to stop at."""
    model = minia3.load_model(running.model("llama"))
    tokenizer = minia3.load_tokenizer(running.model("llama"))
    (text,) = expected(["w3 w60"], name="llama", max_new_tokens=6)
    words = text.split()
    end = next(word for word in words[1:] if word != words[0])
    if is_special:
        tokenizer.backend.add_special_tokens([end])
    minia3.save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "words.jinja").write_text(WORDS.replace("w59", end))
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja", "--max-new-tokens", "6"]
    out = output(capsys, "generate", tmp_path / "model", *flags, "w3")
    assert out.split() == words[: words.index(end)]


class Chat:
    """A conversation with a command on a terminal of its own."""

    def __init__(self, *words):
        self.ours, theirs = pty.openpty()
        files = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        # The terminal is that of the process, so that Ctrl-C reaches it.
        self.process = python(
            "generate", *words, preexec_fn=partial(take_terminal, theirs), **files
        )
        os.close(theirs)

    def read(self, mark):
        text = read_until(self.ours, mark)
        assert mark in text, text
        return text.decode()

    def type(self, text):
        os.write(self.ours, text.encode())

    def end(self):
        code = self.process.wait(60)
        os.close(self.ours)
        return code


def take_terminal(file_number):
    os.setsid()
    fcntl.ioctl(file_number, termios.TIOCSCTTY, 0)


@pytest.fixture
def slow_chat(tmp_path):
    """A conversation with a model that would write 100,000 words."""
    (tmp_path / "words.jinja").write_text(WORDS.replace("'w59'", "''"))
    flags = ["--chat", "--chat-template", tmp_path / "words.jinja", "--max-new-tokens", "100000"]
    conversation = Chat(endless_model(tmp_path / "model"), *flags)
    yield conversation
    conversation.process.kill()


def endless_model(folder):
    """Write a LLaMA that writes neither its end token nor that of the tokenizer."""
    model = minia3.load_model(running.model("llama"))
    model.config = replace(model.config, eos_ids=(0,))
    with torch.no_grad():
        model.head.weight[:2] = 0  # of 61 random words, one is always likelier
    minia3.save_model(model, folder, minia3.load_tokenizer(running.model("llama")))
    return folder


@pytest.mark.slow
def test_a_conversation_on_a_terminal_can_be_edited_and_says_how_to_leave():
    conversation = Chat("tiny-t5", "--max-new-tokens", "1")
    text = conversation.read(b"> ")
    assert "(every line is a new prompt; /help shows the commands, Ctrl-D leaves)" in text
    conversation.type("same colour ?\n")
    text = conversation.read(b"\n> ")
    assert "\nyes [cut after 1 tokens: --max-new-tokens]\n" in text
    conversation.type("/helx\x7fp\n")
    assert "Ctrl-C   end the answer" in conversation.read(b"\n> ")
    if importlib.util.find_spec("readline"):
        conversation.type("\x1b[A\n")  # arrow up brings the line back
        assert "Ctrl-C   end the answer" in conversation.read(b"\n> ")
    conversation.type("/reset\n")
    assert "(what was said is forgotten)" in conversation.read(b"\n> ")
    time.sleep(0.5)  # readline loses a signal between its prompt and its wait for keys
    conversation.type("\x03")
    assert "(Ctrl-D leaves)" in conversation.read(b"\n> ")
    conversation.type("\x04")
    assert conversation.end() == 0


def test_a_typed_line_that_is_not_utf8_does_not_end_a_conversation(monkeypatch, capsys):
    typed = iter([UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end of data"), " w3 "])

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(typed_lines()) == ["w3"]
    assert "(this line is not UTF-8: type it again)" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_program(slow_chat):
    assert "(a conversation; /help shows" in slow_chat.read(b"> ")
    slow_chat.type("w3\n")
    slow_chat.read(b"\nw")  # the answer has begun
    slow_chat.type("\x03")
    assert " [stopped]\n" in slow_chat.read(b"\n> ")
    slow_chat.type("/exit\n")
    assert slow_chat.end() == 0


# Adapters that have learned to rank


@pytest.mark.parametrize(
    ("name", "n_choices", "is_warned"),
    [
        ("llama", (2,), True),
        ("llama", (0,), False),
        ("llama", (2, 0), False),  # one adapter for both, which has learned to stop
        ("t5", (2,), False),
    ],
)
def test_an_adapter_for_ranking_says_that_it_was_not_trained_to_stop(
    name, n_choices, is_warned, tmp_path, capsys
):
    task = ",".join(str(running.task((n,))) for n in n_choices)
    flags = {"model": running.model(name), "task": task, "steps": 1, "max_new_tokens": 1}
    if len(n_choices) > 1:
        flags["adapters"] = "one"
    assert running.run(running.words(tmp_path / "run", **flags)) == 0
    adapter = tmp_path / "run" / "adapter"
    words = [str(running.model(name)), "w5 w6", "--max-new-tokens", "2", "--device", "cpu"]
    capsys.readouterr()
    assert main(["generate", *words, "--adapter", str(adapter)]) == 0
    err = capsys.readouterr().err
    assert (
        "was trained to rank choices, and not to stop: a text goes on until" in err
    ) == is_warned
    assert err.count("\n") == is_warned
    (adapter / "task.json").unlink()  # of an older version
    assert main(["generate", *words, "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().err == ""
