"""What ends a turn of a chat ends an answer of a chat, and no other text. The files of a model that
has learned to chat say how, for programs that do not know task.json."""

import json
import sys
from dataclasses import replace

import pytest
import running
from conftest import randomize
from tokenizers import AddedToken

import minia3
from minia3.adapters.lora import add_lora, save_lora
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


# A token that is not special is text, and so is the space before it.
@pytest.mark.parametrize(("is_special", "space"), [(True, ""), (False, " ")])
def test_an_answer_in_python_ends_with_the_turn_if_its_end_is_a_stop_text(
    chatting, is_special, space, tmp_path, capsys
):
    """docs/python-api.md says so. Otherwise the model goes on and asks itself."""
    folder, end = chatting
    model = minia3.load_model(folder)
    tokenizer = minia3.load_tokenizer(folder)
    tokenizer.backend.add_tokens([AddedToken(end, single_word=True, special=is_special)])
    tokenizer.save(folder)
    messages = [{"role": "user", "content": PROMPT}]
    (expected,) = predicted(capsys, folder, tmp_path / "rows.jsonl", [{"messages": messages}])
    prompts = [tokenizer.chat(messages)]
    stop = tokenizer.end_of_turn() or ()
    assert stop == end
    (answer,) = minia3.generate(model, tokenizer, prompts, max_new_tokens=6, stop=stop)
    (endless,) = minia3.generate(model, tokenizer, prompts, max_new_tokens=6)
    assert answer == expected + space
    assert endless != answer


def saved_apart(chatting, folder):
    """Write the model without its template to a folder. Return the template."""
    model, _ = chatting
    tokenizer = minia3.load_tokenizer(model)
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    minia3.save_model(minia3.load_model(model), folder, tokenizer)
    return template


def files_chat(folder, template, end):
    """Return whether a model's files have the template, and what ends a turn as an end token."""
    tokenizer = minia3.load_tokenizer(folder)
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return tokenizer.chat_template == template and ids == [1, *tokenizer.encode(end)]


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_what_is_merged_with_a_chat_adapter_chats_in_other_programs(chatting, tmp_path, method):
    transformers = pytest.importorskip("transformers", reason="another program")
    base = tmp_path / "base"
    template = saved_apart(chatting, base)
    model = minia3.load_model(base)
    if method == "lora":
        add_lora(model)
        save_lora(model, tmp_path / "adapter")
    else:
        minia3.save_adapter(model, tmp_path / "adapter")
    learned = {"messages": "messages", "metric": "perplexity", "chat_template": template}
    (tmp_path / "adapter" / "task.json").write_text(json.dumps(learned))
    words = ["merge", base, tmp_path / "adapter", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 0

    assert files_chat(tmp_path / "merged", template, chatting[1])
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    ids = peer.generate(**inputs, do_sample=False, max_new_tokens=6)[0]
    assert tokenizer.decode(ids).split()[-1] == chatting[1]


def test_without_jinja2_a_chat_adapter_is_not_merged(chatting, tmp_path, monkeypatch, capsys):
    """Nobody knows then what ends a turn. The merged model would never stop in other programs."""
    model = minia3.load_model(chatting[0])
    minia3.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "task.json").write_text(json.dumps({"messages": "messages"}))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    words = ["merge", chatting[0], tmp_path / "adapter", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 2
    assert "pip install 'minia3[chat]'" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_model_that_was_trained_as_a_whole_chats_in_other_programs(chatting, tmp_path):
    template = saved_apart(chatting, tmp_path / "base")
    (tmp_path / "form.jinja").write_text(template)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "w7"}]
    (tmp_path / "chats.jsonl").write_text(3 * (json.dumps({"messages": messages}) + "\n"))
    minia3.train(
        tmp_path / "base",
        tmp_path / "chats.jsonl",
        method="full",
        chat_template=tmp_path / "form.jinja",
        steps=1,
        device="cpu",
        out=tmp_path / "run",
    )
    assert files_chat(tmp_path / "run" / "model", template, chatting[1])


def base_with_other_end(folder):
    """Write a LLaMA whose files name another end token than its tokenizer. Return the folder."""
    model = minia3.load_model(running.model("llama"))
    model.config = replace(model.config, eos_ids=(7,))
    minia3.save_model(model, folder)
    minia3.load_tokenizer(running.model("llama")).save(folder)
    return folder


def ends_of(folder):
    """Return the end tokens that the two configs of a model name."""
    found = []
    for name in ("config.json", "generation_config.json"):
        found.append(json.loads((folder / name).read_text())["eos_token_id"])
    return found


def test_what_was_trained_as_a_whole_ends_its_targets_in_other_programs(tmp_path):
    """Targets end with the tokenizer's eos. Other programs stop at what the files name."""
    base = base_with_other_end(tmp_path / "base")
    assert ends_of(base) == [7, 7]
    minia3.train(
        base, running.task((0,)), method="full", steps=1, device="cpu", out=tmp_path / "run"
    )
    assert ends_of(tmp_path / "run" / "model") == [[7, 1], [7, 1]]


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_python_and_the_command_merge_to_the_same_files(tmp_path, method):
    """Both name the tokenizer's eos as an end token, because the adapter may have learned it."""
    base = base_with_other_end(tmp_path / "base")
    adapter = tmp_path / "adapter"
    model = minia3.load_model(base)
    if method == "lora":
        add_lora(model)
        save_lora(model, adapter)
    else:
        minia3.save_adapter(randomize(model), adapter)
    words = ["merge", base, adapter, tmp_path / "by command"]
    assert main([str(word) for word in words]) == 0
    minia3.save_model(minia3.merge(model), tmp_path / "by python", minia3.load_tokenizer(base))
    written = {}
    for name in ("by command", "by python"):
        written[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert written["by command"] == written["by python"]
    assert ends_of(tmp_path / "by python") == [[7, 1], [7, 1]]
    assert minia3.load_tokenizer(tmp_path / "by python").eos_id == 1
