"""What ends a turn of a chat ends an answer of a chat, and no other text."""

import json

import pytest
import running
from tokenizers import AddedToken

import minia3
from minia3.cli.main import main

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

PROMPT = "w9 w5"


@pytest.fixture
def chatting(tmp_path):
    """The random LLaMA with a chat template, and the token that ends its turns.

    The token is a word that the model writes after PROMPT.
    """
    model = minia3.load_model(running.model("llama"))
    tokenizer = minia3.load_tokenizer(running.model("llama"))
    (text,) = minia3.generate(model, tokenizer, [PROMPT], max_new_tokens=6)
    end = text.split()[2]
    tokenizer.backend.add_tokens([AddedToken(end, single_word=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        f"{{{{ ' {end} ' if m.role == 'assistant' else ' ' }}}}"
        "{% endfor %}"
    )
    minia3.save_model(model, tmp_path / "model", tokenizer)
    return tmp_path / "model", end


def predicted(capsys, model, path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    words = ["predict", str(model), str(path), "--max-new-tokens", "6", "--device", "cpu"]
    assert main(words) == 0
    return [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]


def test_a_plain_row_has_the_same_answer_before_and_after_a_conversation(
    chatting, tmp_path, capsys
):
    model, end = chatting
    plain = {"input": PROMPT}
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    (alone,) = predicted(capsys, model, tmp_path / "plain.jsonl", [plain])
    before, answer, after = predicted(capsys, model, tmp_path / "rows.jsonl", [plain, chat, plain])
    assert before == after == alone
    assert end in alone.split()
    assert end not in answer.split()
    assert alone.startswith(answer)
