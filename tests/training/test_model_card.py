"""Guards the model card: the hub accepts its first lines, its numbers are the run's, its command makes the same run
again, and the code that it shows loads the adapter or the model, here and in PEFT or transformers.
"""

import dataclasses
import re
import shlex

import pytest
import running
import torch
from conftest import logits, off, randomize
from running import train

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.checkpoints.known_models import EMBEDDED
from minia3.training.flags import parse_flags
from minia3.training.model_card import card, write_card
from minia3.training.run_folder import read_run_config

FINAL = {
    **{
        "model": "tiny-t5",
        "task": "same-colour",
        "method": "ia3",
        "metric": "accuracy",
        "split": "test",
    },
    **{
        "rows": 1024,
        "rows_cut": 0,
        "accuracy_before": 0.513,
        "accuracy": 0.9995,
        "auc_before": 0.554,
        "auc": 0.999,
    },
    **{
        "trainable": 1536,
        "total": 218112,
        "steps": 1000,
        "seconds": 16.2,
        "peak_memory_bytes": 10**8,
    },
    "architecture": "T5",
    "data": {"train.jsonl": "ab" * 32, "test.jsonl": "cd" * 32},
}


def front(text):
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("t5-base", "google-t5/t5-base"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_hub_reads_base_library_tags_and_data(model, base):
    text = card(train.Config(model=model, task="rte"), FINAL | {"model": model, "task": "rte"})
    expected = {
        "base_model": base,
        "library_name": "peft",
        "tags": ["ia3", "peft"],
        "datasets": ["rte"],
    }
    assert front(text) == expected


def test_a_base_that_is_a_path_is_not_named_to_the_hub(tmp_path, monkeypatch):
    (tmp_path / "my" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(
        card(train.Config(model="my/base"), FINAL | {"model": "my/base"})
    )
    assert "base_model" not in front(card(train.Config(), FINAL))


@pytest.mark.parametrize("task", ['it\'s: "mine" # 1', "no", "[x"])
def test_any_name_of_a_task_is_read_back(task):
    assert front(card(train.Config(task=f"{task}.jsonl"), FINAL | {"task": task}))["datasets"] == [
        task
    ]


def test_figures_counts_and_checksums_are_the_run_s():
    text = card(train.Config(), FINAL)
    for part in (
        "| accuracy | 51.3% | 100.0% |",
        "| AUC | 0.55 | 1.00 |",
        "1,024 rows of test",
        "1,536",
        "218,112",
    ):
        assert part in text
    for part in (
        "0.704%",
        "- train.jsonl `" + "ab" * 32 + "`",
        "- test.jsonl `" + "cd" * 32 + "`",
        "1,000 steps",
    ):
        assert part in text
    other = card(train.Config(), FINAL | {"metric": "exact_match", "auc": None, "auc_before": None})
    assert "| exact_match | 51.3% | 100.0% |" in other
    assert "AUC" not in other


def test_a_mixture_s_card_names_its_tasks_and_has_the_figures_of_each():
    config = train.Config(task=("rte", "a/b.jsonl"), adapters="one")
    finals = [
        FINAL | {"task": "rte"},
        FINAL | {"task": "b", "rows": 7, "accuracy": None, "auc": None},
    ]
    text = card(config, *finals)
    assert "# (IA)^3 for rte, b, on tiny-t5" in text
    assert front(text)["datasets"] == ["rte", "b"]
    table = text[text.index("| ") :].splitlines()[2:5]
    assert table[0] == "| rte, 1,024 rows of test: accuracy | 51.3% | 100.0% |"
    assert table[1] == "| rte, 1,024 rows of test: AUC | 0.55 | 1.00 |"
    assert table[2] == "| b, 7 rows of test: accuracy | 51.3% | - |"
    assert "--task rte,a/b.jsonl --adapters one" in text


@pytest.mark.parametrize("values", [{"seed": 1}, {"lr": 1.0}, {"shots": 1, "save_every": 1}])
def test_a_value_of_one_is_no_switch(values):
    (command,) = re.findall(
        "`(python train.py .*?)`", card(config := train.Config(**values), FINAL)
    )
    assert parse_flags(train.Config, shlex.split(command)[2:], "") == config


def test_a_card_tells_that_its_figure_is_a_median_over_prompts():
    text = card(train.Config(eval_prompt="all"), FINAL | {"accuracies": [0.5, 0.9995, 1.0]})
    assert "| accuracy, median over 3 prompts | 51.3% | 100.0% |" in text


def test_a_card_is_written_in_utf_8_beside_what_is_there(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, train.Config(), [FINAL | {"task": "Grüße"}], {"train.jsonl": "ab"})
    assert "# (IA)^3 for Grüße, on tiny-t5" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "README.md"}


def test_the_command_makes_the_same_run_again_and_tells_no_place():
    config = train.Config(
        **{
            "model": "t5-small",
            "task": "my rows.jsonl",
            "shots": 32,
            "lr": 1e-4,
            "deterministic": True,
            "dropout": 0.0,
        },
        **{"out": "/home/me/runs/1", "data_dir": "/home/me/data", "device": "cuda:3"},
    )
    (command,) = re.findall("`(python train.py .*?)`", card(config, FINAL))
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    found = parse_flags(train.Config, words[2:], "")
    assert found == dataclasses.replace(config, out=None, data_dir="data", device=None)


@pytest.mark.parametrize(
    ("method", "library", "tags", "word"),
    [
        ("ia3", "peft", ["ia3", "peft"], "# (IA)^3 for rte, on t5-base"),
        ("lora", "peft", ["lora", "peft"], "# LoRA for rte, on t5-base"),
        ("full", "transformers", None, "# t5-base, fine-tuned for rte"),
    ],
)
def test_each_method_has_its_own_title_and_names_its_own_library(method, library, tags, word):
    config = train.Config(model="t5-base", task="rte", method=method)
    text = card(config, FINAL | {"model": "t5-base", "task": "rte", "method": method})
    found = front(text)
    assert (found["base_model"], found["library_name"], found.get("tags")) == (
        "google-t5/t5-base",
        library,
        tags,
    )
    assert [line for line in text.splitlines() if line.startswith("# ")] == [word]
    assert "| accuracy | 51.3% | 100.0% |" in text
    assert f"--method {method}" in text or method == "ia3"
    assert len(blocks(text)) == 2
    assert "<!--" not in text


def run_blocks(text, folder, monkeypatch):
    """What the two pieces of code of a card define, run in the folder that it lies in."""
    monkeypatch.chdir(folder)
    for block in blocks(text):
        found = {}
        exec(compile(block, "README.md", "exec"), found)
        yield found


SOURCE, TARGET = torch.tensor([[5, 9, 7, 4]]), torch.tensor([[3, 8, 6]])


@torch.no_grad()
def theirs(model, name):
    """Logits of transformers, or PEFT, for SOURCE and TARGET."""
    if name == "t5":
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        return model(input_ids=SOURCE, decoder_input_ids=torch.cat([start, TARGET], 1)).logits
    return model(input_ids=torch.cat([SOURCE, TARGET], 1)).logits[:, SOURCE.shape[1] - 1 :]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_code_of_lora_and_of_a_model_loads_what_was_trained_here_and_there(
    name, method, tmp_path, monkeypatch
):
    config = train.Config(model=str(running.model(name)), task="rows.jsonl", method=method)
    changes = {
        "model": config.model,
        "method": method,
        "architecture": {"t5": "T5", "llama": "Llama"}[name],
    }
    model, tokenizer = minia3.load_model(config.model), minia3.load_tokenizer(config.model)
    if method == "lora":
        randomize_all(add_lora(model).values())
        save_lora(model, tmp_path, config.model)
    else:
        randomize_all(p for n, p in model.named_parameters() if not n.endswith(".scale"))
        minia3.save_model(model, tmp_path, tokenizer)
    ours, peer = run_blocks(card(config, FINAL | changes), tmp_path, monkeypatch)
    expected, found = (logits(m, SOURCE, None, TARGET) for m in (model, ours["model"]))
    assert torch.equal(found, expected)
    assert off(theirs(peer["model"].eval(), name), expected) < 1e-5
    assert off(logits(minia3.load_model(config.model), SOURCE, None, TARGET), expected) > 1e-2
    for one in (ours, peer) if method == "full" else (ours,):
        assert one["tokenizer"].decode(one["tokenizer"].encode("w7 w9"))[:5] == "w7 w9"


def randomize_all(parameters):
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_code_loads_the_adapter_here_and_in_peft(name, tmp_path, monkeypatch):
    config = train.Config(model=str(running.model(name)), task="rows.jsonl")
    text = card(
        config,
        FINAL | {"model": config.model, "architecture": {"t5": "T5", "llama": "Llama"}[name]},
    )
    model = randomize(minia3.load_model(config.model))
    minia3.save_adapter(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    ours, theirs = blocks(text)
    found = {}
    exec(compile(ours, "README.md", "exec"), found)
    for name, vector in minia3.vectors(model).items():
        assert torch.equal(minia3.vectors(found["model"])[name], vector)
    assert found["tokenizer"].decode(found["tokenizer"].encode("w7 w9")) == "w7 w9"
    exec(compile(theirs, "README.md", "exec"), found)
    factors = [p for name, p in found["model"].named_parameters() if "ia3_l" in name]
    assert sum(p.numel() for p in factors) == sum(v.numel() for v in minia3.vectors(model).values())
    assert sum(p.double().sum() for p in factors) == pytest.approx(
        sum(v.double().sum().item() for v in minia3.vectors(model).values())
    )


def test_the_code_for_the_embedded_model_runs(tmp_path, monkeypatch):
    minia3.save_adapter(minia3.load_model("tiny-t5"), tmp_path)
    (tmp_path / "data").symlink_to(running.ROOT / "data")
    monkeypatch.chdir(tmp_path)
    for block in blocks(card(train.Config(), FINAL)):
        exec(compile(block, "README.md", "exec"), {})


def test_a_run_s_own_flags_and_result_make_a_card(tmp_path):
    out = tmp_path / "run"
    assert running.run(running.words(out, steps=3)) == 0
    final = running.metrics(out)[-1] | {"data": read_run_config(out)["data"], "architecture": "T5"}
    raw = read_run_config(out)
    config = train.Config(
        **{field.name: raw[field.name] for field in dataclasses.fields(train.Config)}
    )
    text = card(config, final)
    assert front(text)["datasets"] == [running.task().name]
    for digest in read_run_config(out)["data"].values():
        assert digest in text
    assert str(EMBEDDED) not in text
