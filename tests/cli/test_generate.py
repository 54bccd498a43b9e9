"""Guards `generate`: it prints what minia3.generate returns, for prompts of the command line, of a
pipe and of a conversation, as text and as JSON."""

import io
import json
import os
import pty
import subprocess

import pytest
import running
from command_line import output, python, read_until
from conftest import randomize

import minia3
from minia3.checkpoints.tokenizer import Tokenizer

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

    def stream(model, tokenizer, prompt, **options):
        for piece in ("one", " two", " three"):
            seen.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr("minia3.inference.decoding.stream", stream)
    assert output(capsys, "generate", running.model("t5"), "w3") == " three\n"
    assert seen == ["", "one", " two"]


# A pipe


def test_each_line_of_a_pipe_is_a_prompt(capsys, monkeypatch):
    prompts = [f"w{3 + i % 50} w{4 + i % 7}" for i in range(40)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(prompts)))
    words = ["generate", running.model("t5"), "--max-new-tokens", "3", "--json"]
    answers = [json.loads(line) for line in output(capsys, *words).splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["output"] for answer in answers] == expected(prompts, max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--chat"]])
def test_a_closed_standard_input_counts_as_empty(flags):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python("generate", "tiny-t5", *flags, preexec_fn=lambda: os.close(0), **pipes)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 0


# A conversation


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


def test_chat_wraps_a_prompt_and_a_conversation_keeps_its_messages(capsys, monkeypatch):
    heard = []

    def chat(self, messages):
        heard.append([(message["role"], message["content"]) for message in messages])
        return self.encode(" ".join(message["content"] for message in messages))

    monkeypatch.setattr(Tokenizer, "chat", chat)
    words = ["generate", running.model("t5"), "--chat", "--max-new-tokens", "3"]
    out = output(capsys, *words, "w3 w4", "w5")
    assert heard == [[("user", "w3 w4")], [("user", "w5")]]
    assert out.splitlines() == expected(["w3 w4", "w5"], max_new_tokens=3)

    heard.clear()
    Terminal(monkeypatch, "w3", "  ", "w4 ", "w5")
    first, second, _ = output(capsys, *words).splitlines()
    messages = [("user", "w3"), ("assistant", first), ("user", "w4"), ("assistant", second)]
    messages.append(("user", "w5"))
    assert heard == [messages[:1], messages[:3], messages]
    assert [first, second] == expected(["w3", f"w3 {first} w4"], max_new_tokens=3)


def test_without_chat_each_line_that_is_typed_stands_alone(capsys, monkeypatch):
    Terminal(monkeypatch, "w3", "w4")
    out = output(capsys, "generate", running.model("t5"), "--max-new-tokens", "3")
    assert out.splitlines() == expected(["w3", "w4"], max_new_tokens=3)


@pytest.mark.slow
def test_a_conversation_on_a_terminal_ends_with_ctrl_d():
    ours, theirs = pty.openpty()
    files = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = python("generate", "tiny-t5", "--max-new-tokens", "1", **files)
    os.close(theirs)
    assert read_until(ours, b"> ") == b"> "
    os.write(ours, b"same colour ?\n")
    assert read_until(ours, b"\n> ") == b"same colour ?\nyes\n> "
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)
