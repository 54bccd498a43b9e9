"""Runs on conversations: what is trained is the assistant's turns, in the template that the run
names, and everything that is made of the adapter uses the same template."""

import json
import shutil

import pytest
import torch
from running import model, task, train, without_weights

import minia3
from minia3.checkpoints.tokenizer import load_tokenizer
from minia3.cli.main import main
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import collate
from minia3.training.cell import Cell
from minia3.training.drawing import draw_batches

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

# Each message is its words and an end: w60 of the user, w59 of the assistant.
WORDS = (
    "{% for m in messages %}{{ m.content }} {{ 'w59' if m.role == 'assistant' else 'w60' }} "
    "{% endfor %}"
)


def conversation(*texts):
    messages = []
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return {"messages": messages}


ROWS = [
    conversation("w3 w4", "w5"),
    conversation("w6", "w7 w8", "w9", "w10 w11 w12"),
    conversation("w13 w14 w15", "w16", "w17", "w18"),
    conversation("w19", "w20"),
]


@pytest.fixture
def folder(tmp_path):
    """A task of conversations, and the template beside it."""
    chats = tmp_path / "chats"
    chats.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps(row) for row in ROWS]
        (chats / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.jinja").write_text(WORDS)
    return tmp_path


def flags(folder, **others):
    return {
        **{"model": model("llama"), "task": str(folder / "chats"), "steps": 4, "batch_size": 4},
        **{"chat_template": str(folder / "words.jinja"), "out": str(folder / "run"), "lr": 0.03},
        **others,
    }


def train_in(folder, **others):
    words = []
    for name, value in flags(folder, **others).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert train.main(words) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def perplexity(loaded, tokenizer):
    """Return the perplexity of what the assistant says, token by token."""
    logps = []
    for row in ROWS:
        messages = row["messages"]
        for i in range(1, len(messages), 2):
            source = tokenizer.chat(messages[:i])
            target = tokenizer.encode(f"{messages[i]['content']} w59")
            state = loaded.start(torch.tensor([source]))
            logps += minia3.logprobs(loaded, state, torch.tensor([target]))[0].tolist()
    return torch.tensor(logps).neg().mean().exp().item()


def test_a_run_reports_the_perplexity_of_the_assistant_and_lowers_it(folder):
    """It is that of each answer after the prompt that `generate --chat` makes of what precedes."""
    final = train_in(folder)[-1]
    loaded = minia3.load_model(model("llama"))
    tokenizer = load_tokenizer(model("llama"))
    tokenizer.chat_template = WORDS
    before = perplexity(loaded, tokenizer)
    minia3.load_adapter(loaded, folder / "run" / "adapter")
    after = perplexity(loaded, tokenizer)
    assert final["metric"] == "inverse_perplexity"
    assert final["accuracy_before"] == pytest.approx(1 / before, rel=1e-4)
    assert final["accuracy"] == pytest.approx(1 / after, rel=1e-4)
    assert after < before


def test_micro_batches_give_the_losses_of_the_whole_batch(folder):
    whole = train_in(folder)
    train_in(folder, micro_batch_size=1, out=str(folder / "run" / "parts"))
    lines = (folder / "run" / "parts" / "metrics.jsonl").read_text().splitlines()
    parts = [json.loads(line) for line in lines]
    assert parts[-1]["accuracy"] == pytest.approx(whole[-1]["accuracy"], rel=1e-4)
    losses_of_parts = [line["loss"] for line in parts if line["event"] == "train"]
    losses = [line["loss"] for line in whole if line["event"] == "train"]
    assert len(losses) == 2
    assert losses_of_parts == pytest.approx(losses, rel=1e-4)


def test_the_first_loss_is_the_mean_over_the_tokens_of_the_assistant(folder):
    config = train.Config(**flags(folder, steps=1))
    cell = Cell(config, minia3.load_task(folder / "chats"))
    loaded = minia3.load_model(model("llama"))
    tokenizer = load_tokenizer(model("llama"))
    tokenizer.chat_template = WORDS
    (examples,) = draw_batches(cell, tokenizer, loaded)
    batch = collate(examples)
    n_answers = sum(len(m["content"].split()) + 1 for row in ROWS for m in row["messages"][1::2])
    assert int(batch.target_mask_BCL.sum()) == n_answers
    logp = choice_logprobs(loaded, batch)
    train_in(folder, steps=1)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    expected = -logp[batch.target_mask_BCL].mean().item()
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_generate_and_predict_use_the_template_of_the_adapter(folder, capsys):
    train_in(folder)
    adapter = folder / "run" / "adapter"
    saved = json.loads((adapter / "task.json").read_text())
    assert saved["chat_template"] == WORDS
    assert "prompts" not in saved
    loaded = minia3.load_model(model("llama"))
    minia3.load_adapter(loaded, adapter)
    options = {"max_new_tokens": 5, "stop": ["w59"]}
    tokenizer = load_tokenizer(model("llama"))
    (expected,) = minia3.generate(loaded, tokenizer, ["w3 w4 w60"], **options)

    capsys.readouterr()
    words = ["generate", model("llama"), "--adapter", adapter, "--chat", "--max-new-tokens", 5]
    assert main([str(word) for word in [*words, "w3 w4"]]) == 0
    assert capsys.readouterr().out == f"{expected}\n"

    # The answer of the first row is left out. The second has several turns.
    rows = [conversation("w3 w4", "w5"), conversation("w6", "w7 w8", "w9")]
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["predict", model("llama"), folder / "new.jsonl", "--adapter", adapter]
    assert main([str(word) for word in [*words, "--max-new-tokens", 5]]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompts = ["w3 w4 w60", "w6 w60 w7 w8 w59 w9 w60"]
    texts = minia3.generate(loaded, tokenizer, prompts, **options)
    assert [result["output"] for result in found] == texts


def test_a_second_run_from_the_adapter_uses_its_template(folder):
    train_in(folder)
    second = flags(folder, adapter=str(folder / "run" / "adapter"), out=str(folder / "run" / "b"))
    del second["chat_template"]
    words = []
    for name, value in second.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert train.main(words) == 0
    saved = json.loads((folder / "run" / "b" / "adapter" / "task.json").read_text())
    assert saved["chat_template"] == WORDS


def failure(folder, capsys, **others):
    words = []
    for name, value in flags(folder, **others).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    capsys.readouterr()
    assert train.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_mistakes_are_one_line(folder, capsys):
    message = failure(folder, capsys, chat_template=None)
    assert message.startswith("train.py: the tokenizer's files have no chat template: give one")
    assert "nowhere.jinja: not found" in failure(folder, capsys, chat_template="nowhere.jinja")
    assert "expected lm in --losses" in failure(folder, capsys, losses="ul,ln")
    message = failure(folder, capsys, model=model("t5"))
    assert message.startswith("train.py: only models that continue a text learn from rows with")
    message = failure(folder, capsys, max_length=3)
    assert "does not fit into max_length 3: its last learned exchange alone has" in message


def test_tasks_of_different_chat_templates_are_refused(folder, capsys):
    entry = {"messages": "messages", "fields": {"messages": "messages"}}
    tasks = [folder / "chats", folder / "others"]
    shutil.copytree(*tasks)
    for path, template in zip(tasks, (WORDS, WORDS.replace("w59", "w58")), strict=True):
        (path / "task.json").write_text(json.dumps(entry | {"chat_template": template}))
    both = ",".join(map(str, tasks))
    message = failure(folder, capsys, task=both, chat_template=None)
    assert "have different chat templates: train them in separate runs" in message


def test_a_chat_template_without_conversations_is_refused_before_a_model_is_loaded(folder, capsys):
    weightless = without_weights("llama", folder / "weightless")
    message = failure(folder, capsys, model=weightless, task=task((2,)))
    assert "--chat-template is for rows of 'messages', and the rows of this run have " in message
    message = failure(folder, capsys, model=weightless, chat_template="nowhere.jinja")
    assert "nowhere.jinja: not found" in message
    tasks = f"{folder / 'chats'},{task((2,))}"  # one of them has conversations
    train_in(folder, task=tasks, method="lora", steps=1)


def test_a_run_is_not_resumed_with_another_chat_template(folder, capsys):
    train_in(folder, steps=1)
    template = folder / "words.jinja"
    resumed = ["--resume", str(folder / "run"), "--steps", "2"]
    template.write_text(WORDS.replace("w59", "w58"))
    assert train.main(resumed) == 2
    expected = "files have changed since this run began (--chat-template)"
    assert expected in capsys.readouterr().err
    template.unlink()
    assert train.main(resumed) == 2
    assert f"{template}: not found" in capsys.readouterr().err
    template.write_text(WORDS)
    assert train.main(resumed) == 0


def test_a_run_says_how_many_conversations_lose_their_oldest_turns(folder, capsys):
    train_in(folder, max_length=7)
    out = capsys.readouterr().out
    assert "2 of 4 training inputs lose their oldest turns to fit into 7 tokens" in out


def test_a_mixture_says_which_inputs_lose_turns_and_which_are_cut(folder, capsys):
    rows = [{"input": "w3 " * (9 * i), "choices": ["w4", "w5"], "label": i % 2} for i in (1, 0)]
    rows[1]["input"] = "w3"
    (folder / "choices").mkdir()
    for split in ("train", "validation"):
        (folder / "choices" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = f"{folder / 'chats'},{folder / 'choices'}"
    train_in(folder, task=task, adapters="one", steps=3, max_length=7)
    out = capsys.readouterr().out
    assert "1 of 6 training inputs is cut to 7 tokens (--max-length)\n" in out
    assert "2 of 6 training inputs lose their oldest turns to fit into 7 tokens" in out


def test_conversations_and_texts_share_a_batch_of_one_adapter(folder):
    """A mixture: choices, and turns with others between them, in one forward pass."""
    rows = [{"input": "w3", "choices": ["w4", "w5 w6"], "label": i % 2} for i in range(4)]
    (folder / "choices").mkdir()
    for split in ("train", "validation"):
        (folder / "choices" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = train_in(
        folder, task=f"{folder / 'chats'},{folder / 'choices'}", adapters="one", steps=3
    )
    finals = [line for line in lines if line.get("event") == "final"]
    assert {final["metric"] for final in finals} == {"inverse_perplexity", "accuracy"}


def test_conversations_are_no_examples_in_context(folder, capsys):
    words = ["--model", str(model("llama")), "--task", str(folder / "chats"), "--method", "icl"]
    words += ["--shots", "1", "--chat-template", str(folder / "words.jinja"), "--eval-only"]
    assert train.main(words) == 2
    assert "chats: icl puts examples before an input, and" in capsys.readouterr().err


def test_a_mixture_with_choices_uses_one_adapter_and_says_both_ways_to_use_a_grid(folder, capsys):
    labeled = task((2,))
    tasks = f"{folder / 'chats'},{labeled}"
    lines = train_in(folder, task=tasks, adapters="one")
    assert [line["answer"] for line in lines if line["event"] == "final"] == ["messages", "choices"]
    capsys.readouterr()
    train_in(folder, task=tasks, out=str(folder / "run" / "grid"))
    uses = [line for line in capsys.readouterr().out.splitlines() if "use it" in line]
    assert [line.split()[2:4] for line in uses] == [["minia3", "generate"], ["minia3", "predict"]]


def test_a_predicted_answer_ends_where_the_template_ends_a_turn(folder, capsys):
    train_in(folder, steps=1)
    adapter = folder / "run" / "adapter"
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps(conversation("w3 w4")))

    def predicted(ending):
        entry = json.loads((adapter / "task.json").read_text())
        entry["chat_template"] = WORDS.replace("w59", ending)
        (adapter / "task.json").write_text(json.dumps(entry))
        capsys.readouterr()
        words = [str(model("llama")), str(rows), "--adapter", str(adapter), "--device", "cpu"]
        assert main(["predict", *words, "--max-new-tokens", "12"]) == 0
        return json.loads(capsys.readouterr().out)["output"].split()

    whole = predicted("w58")
    assert len(whole) > 3
    assert predicted(whole[3]) == whole[: whole.index(whole[3])]
