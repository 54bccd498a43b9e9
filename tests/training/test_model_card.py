"""Guards the model card: the hub accepts its first lines, its figures come from the run, its
command repeats the run, and its code loads the adapter or the model, here and in PEFT or
transformers."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import running
import torch
from conftest import logits, off, randomize
from running import train

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.checkpoints.known_models import EMBEDDED
from minia3.cli.main import main
from minia3.inference.evaluation import over_prompts
from minia3.training.command_line import complete, parse_flags
from minia3.training.model_card import card, write_card
from minia3.training.run_folder import read_run_config

FINAL = {
    "model": "tiny-t5",
    "task": "same-colour",
    "method": "ia3",
    "architecture": "T5",
    "metric": "accuracy",
    "split": "test",
    "rows": 1024,
    "rows_cut": 0,
    "accuracy_before": 0.513,
    "accuracy": 0.9995,
    "auc_before": 0.554,
    "auc": 0.999,
    "trainable": 1536,
    "total": 218112,
    "steps": 1000,
    "seconds": 16.2,
    "peak_memory_bytes": 10**8,
}
CHECKSUMS = {"train.jsonl": "ab" * 32, "test.jsonl": "cd" * 32}
ARCHITECTURES = {"t5": "T5", "llama": "Llama"}


def make_card(config=None, *changes):
    """Return the card of a run with final lines that differ from FINAL by `changes`."""
    config = config or train.Config()
    shared = {"model": config.model, "method": config.method}
    finals = [FINAL | shared | change for change in changes or ({},)]
    return card(config, finals, CHECKSUMS)


def front(text):
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_of(text):
    (command,) = re.findall("`(minia3 train .*?)`", text)
    return shlex.split(command)


# What the hub reads


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("t5-base", "google-t5/t5-base"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_hub_reads_base_library_tags_and_data(model, base):
    text = make_card(train.Config(model=model, task="hf:user/name"), {"task": "user/name"})
    assert front(text) == {
        "base_model": base,
        "library_name": "peft",
        "tags": ["ia3", "peft"],
        "datasets": ["user/name"],
    }


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("hf:nyu-mll/glue:sst2", ["nyu-mll/glue"]),
        ("hf:imdb", ["imdb"]),
        ("raft/overruling", ["ought/raft"]),
        (("hf:a/b:c", "rows.csv", "hf:a/b:d", "rte", "raft/overruling"), ["a/b", "ought/raft"]),
        ("hf:mine/rows", None),
        ("hf:/home/me/rows", None),
        ("reviews.csv", None),
        ("rte", None),
        ("same-colour", None),
    ],
)
@pytest.mark.parametrize("method", ["ia3", "lora", "full"])
def test_the_hub_reads_only_data_sets_that_it_has(task, names, method, tmp_path, monkeypatch):
    """It would make a link of the name of any task."""
    (tmp_path / "mine" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = make_card(train.Config(task=task, method=method, adapters="one"))
    assert front(text).get("datasets") == names
    assert "\n\n" not in text[: text.index("\n---\n")]


def test_a_base_that_is_a_path_is_not_named_to_the_hub(tmp_path, monkeypatch):
    (tmp_path / "my" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(make_card(train.Config(model="my/base")))
    assert "base_model" not in front(make_card())


@pytest.mark.parametrize(
    ("method", "library", "tags", "title"),
    [
        ("ia3", "peft", ["ia3", "peft"], "# (IA)^3 for rte, on t5-base"),
        ("lora", "peft", ["lora", "peft"], "# LoRA for rte, on t5-base"),
        ("full", "transformers", None, "# t5-base, fine-tuned for rte"),
    ],
)
def test_each_method_has_its_title_and_its_library(method, library, tags, title):
    text = make_card(train.Config(model="t5-base", task="rte", method=method), {"task": "rte"})
    found = front(text)
    assert found["base_model"] == "google-t5/t5-base"
    assert (found["library_name"], found.get("tags")) == (library, tags)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [title]
    assert "| accuracy | 51.3% | 100.0% |" in text
    assert ("--method" in command_of(text)) == (method != "ia3")
    assert len(blocks(text)) == 2


# What people read


def test_results_counts_and_checksums_come_from_the_run():
    text = make_card()
    for part in (
        "| 1,024 rows of test | before | after |",
        "| accuracy | 51.3% | 100.0% |",
        "| AUC | 0.55 | 1.00 |",
        "1,536 parameters (0.704% of the base's 218,112)",
        "1,000 steps",
        "- train.jsonl `" + "ab" * 32 + "`",
        "- test.jsonl `" + "cd" * 32 + "`",
    ):
        assert part in text
    other = make_card(None, {"metric": "exact_match", "auc": None, "auc_before": None})
    assert "| exact_match | 51.3% | 100.0% |" in other
    assert "AUC" not in other


def test_a_card_says_which_vectors_train():
    usual = "the keys, the values and the inner activations of the feed-forward network"
    assert f" that rescale\n{usual}, in each layer of tiny-t5,\n" in make_card()
    text = make_card(train.Config(sites="q,k", layers="0-1,3-", no_cross=True))
    layers = "the layers 0-1,3- (counted from 0, of the encoder and of the decoder)"
    assert f"\nthe keys and the queries, but not in cross-attention, in {layers} of tiny-t5" in text
    text = make_card(train.Config(sites="ff", layers="2"), {"architecture": "Llama"})
    assert f"\n{usual.partition(' and ')[2]}, in layer 2 (counted from 0) of" in text


def test_the_command_that_trains_a_lora_further_trains_it(tmp_path, monkeypatch):
    first = running.words(tmp_path / "run", method="lora", steps=1)
    assert running.run(first) == 0
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    text = Path("README.md").read_text()
    (command,) = re.findall("```sh\n(.*)  # trains this LoRA further\n```", text)
    words = shlex.split(command)
    assert words[:2] == ["minia3", "train"]
    # The card names neither the folder of the model nor the rows of the reader.
    Path(running.model("t5").name).symlink_to(running.model("t5"))
    Path("rows.jsonl").write_text((running.task() / "train.jsonl").read_text())
    out = tmp_path / "further"
    assert running.run([*words[2:], "--out", out, "--steps", "1"]) == 0
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_the_card_of_a_mixture_names_its_tasks_and_has_the_figures_of_each():
    config = train.Config(task=("rte", "a/b.jsonl"), adapters="one")
    unlabeled = {"task": "b", "rows": 7, "accuracy": None, "auc": None}
    text = make_card(config, {"task": "rte"}, unlabeled)
    assert "# (IA)^3 for rte, b, on tiny-t5" in text
    lines = text[text.index("| ") :].splitlines()
    assert lines[:5] == [
        "|  | before | after |",
        "|---|---|---|",
        "| rte, 1,024 rows of test: accuracy | 51.3% | 100.0% |",
        "| rte, 1,024 rows of test: AUC | 0.55 | 1.00 |",
        "| b, 7 rows of test: accuracy | 51.3% | - |",
    ]
    assert "--task rte,a/b.jsonl --adapters one" in text


def test_a_median_over_prompts_is_called_a_median():
    text = make_card(train.Config(eval_prompt="all"), {"accuracies": [0.5, 0.9995, 1.0]})
    assert "| accuracy, median over 3 prompts | 51.3% | 100.0% |" in text


def test_a_perplexity_over_several_prompts_is_that_of_the_median_of_its_inverse():
    first, second = ({"accuracy": 1 / x, "auc": None, "n": 1, "perplexity": x} for x in (2.0, 6.0))
    combined = over_prompts([first, second])
    text = make_card(None, combined | {"metric": "inverse_perplexity", "perplexity_before": 9.0})
    assert "| perplexity, from the median of its inverse over 2 prompts | 9.00 | 3.00 |" in text


def test_the_card_of_a_run_that_was_made_longer_says_so():
    text = make_card(None, {"extended_from": [500, 1500]})
    assert "The run was extended (`--resume`) after step 500 and 1,500. Until then" in text
    assert "was extended" not in make_card()


def test_a_card_says_which_step_was_the_best_and_which_minia3_finished():
    text = make_card(train.Config(eval_every=10), {"best_step": 1040, "steps": 2000})
    best = "The parameters are those after step 1,040, the best ones on held-out rows"
    assert f"\n\n{best} (`--eval-every`).\n" in text
    assert "Trained for 2,000 steps by `minia3 train" in text
    assert f"`, finished with minia3 {minia3.__version__}, on files with these SHA-256" in text
    assert "The parameters are those after" not in make_card()


def test_a_card_says_that_a_grid_shares_the_draws_of_dropout():
    """Alone, the adapter of the second seed draws other dropout than among two."""
    shared = "It trained in one pass with the other adapters of a grid. If the base has dropout"
    of_grid = {"adapter": "s1"}
    assert shared in make_card(train.Config(seed=1), of_grid)
    assert shared not in make_card(train.Config(seed=1))
    assert shared not in make_card(train.Config(seed=1, dropout=0.0), of_grid)
    assert shared not in make_card(train.Config(seed=1, method="lora"), of_grid)  # one at a time


def test_a_card_is_written_in_utf_8_beside_the_other_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, train.Config(), [FINAL | {"task": "Grüße"}], {"train.jsonl": "ab"})
    assert "# (IA)^3 for Grüße, on tiny-t5" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "README.md"}


def test_the_commonest_label_and_the_doubts_stand_beside_the_result():
    text = make_card(None, {"commonest": 0.6, "warnings": ["the first", "the second"]})
    assert "| accuracy of always giving the commonest label | 60.0% | 60.0% |" in text
    assert "\n\n**Warning:** the first.\n\n**Warning:** the second.\n" in text
    assert "**Warning:**" not in make_card()


def test_a_doubt_about_a_task_of_a_mixture_names_it():
    text = make_card(None, {"task": "a"}, {"task": "b", "warnings": ["the result is worse"]})
    assert "\n\n**Warning:** b: the result is worse.\n\n" in text


def test_what_limits_a_figure_stands_beside_it():
    """The run printed it, and the card had the figure alone."""
    config = train.Config(max_length=512, max_new_tokens=64)
    cut = {"rows": 12, "rows_cut": 3}
    text = make_card(config, cut | {"metric": "exact_match", "n_lossy": 0, "n_too_long": 2})
    too_long = "2 of 12 targets have more than 64 tokens (--max-new-tokens), which cannot be"
    was_cut = "3 of 12 inputs were cut to 512 tokens (--max-length)"
    assert f"|\n\n**Note:** {too_long} matched.\n\n**Note:** {was_cut}.\n\n" in text
    text = make_card(config, cut | {"task": "a", "rows_cut": 1}, {"task": "b", "n_equal": 4})
    assert "**Note:** a: 1 of 12 inputs was cut to 512 tokens (--max-length).\n" in text
    assert "**Note:** b: 4 of 1024 rows have two choices that are the same text" in text
    text = make_card(config, {"n_tied": 2, "dtype": "bfloat16"})
    assert "**Note:** 2 of 1024 rows have two best choices with equal scores, and" in text
    assert "**Note:**" not in make_card(config, {"n_lossy": 0, "n_equal": 0, "n_tied": 0})


def test_a_perplexity_is_shown_as_such():
    values = {"metric": "inverse_perplexity", "perplexity_before": 12.5, "perplexity": 2.25}
    text = make_card(None, {**values, "auc": None})
    assert "| perplexity | 12.50 | 2.25 |" in text


# What others must not see


@pytest.mark.parametrize("method", ["ia3", "lora", "full"])
def test_no_file_beside_an_adapter_names_a_folder_of_this_machine(method, tmp_path):
    start = tmp_path / "start"
    rest = {"method": method, "steps": 2, "lr": 0.1}
    if method == "ia3":
        minia3.save_adapter(minia3.load_model(running.model("t5")), start)
        rest["adapter"] = start
    assert running.run(running.words(tmp_path / "run", **rest)) == 0
    saved = tmp_path / "run" / ("model" if method == "full" else "adapter")
    for path in saved.iterdir():
        if path.suffix in (".md", ".json"):
            text = path.read_text(encoding="utf-8")
            for place in (str(tmp_path), running.home().name, str(running.model("t5").parent)):
                assert place not in text, path.name
    text = (saved / "README.md").read_text()
    assert f"--model {running.model('t5').name} --task {running.task().name}" in text


# The command


@pytest.mark.parametrize("values", [{"seed": 1}, {"lr": 1.0}, {"shots": 1, "save_every": 1}])
def test_a_value_of_one_is_not_taken_for_a_switch(values):
    config = train.Config(**values)
    words = command_of(make_card(config))
    assert train.Config(**parse_flags(words[2:])) == config


def test_the_command_makes_the_same_run_again_and_names_no_place():
    places = {"out": "/home/me/runs/1", "data_dir": "/home/me/data", "device": "cuda:3"}
    config = train.Config(
        model="t5-small",
        task="my rows.jsonl",
        shots=32,
        lr=1e-4,
        deterministic=True,
        dropout=0.0,
        **places,
    )
    words = command_of(make_card(config))
    assert words[:2] == ["minia3", "train"]
    found = train.Config(**parse_flags(words[2:]))
    assert found == dataclasses.replace(config, out=None, data_dir="data", device=None)


def test_the_command_has_the_dtype_of_the_base():
    """On another device, the same command has another one."""
    words = command_of(make_card(None, {"dtype": "bfloat16"}))
    assert train.Config(**parse_flags(words[2:])) == train.Config(dtype="bfloat16")
    words = command_of(make_card(None, {"dtype": "bfloat16 then float32"}))
    assert "--dtype" not in words


def test_the_command_of_a_run_of_epochs_has_its_epochs_and_not_its_steps():
    config = train.Config(epochs=3.0, steps=30)  # as the run has worked them out
    words = command_of(make_card(config))
    assert complete(parse_flags(words[2:])) == train.Config(epochs=3.0)


def test_a_slash_or_a_dash_at_the_beginning_of_a_prompt_stays():
    texts = {"input": "/no_think {q}", "target": "- {a}", "labels": "-1,/1"}
    words = command_of(make_card(train.Config(**texts, task="/home/me/rows.csv")))
    assert train.Config(**parse_flags(words[2:])) == train.Config(**texts, task="rows.csv")


def test_a_prompt_with_line_breaks_and_backticks_stays_in_a_line_of_code():
    texts = {"input": "{q}\nIn `code`, or ``?", "target": "{a}\\n"}
    text = make_card(train.Config(**texts))
    (command,) = re.findall("``` (minia3 train .*) ```, finished", text)
    found = parse_flags(shlex.split(command)[2:])
    assert (found["input"], found["target"]) == ("{q}\\nIn `code`, or ``?", "{a}\\n")


def test_the_flags_and_the_result_of_a_run_make_its_card(tmp_path):
    out = tmp_path / "run"
    assert running.run(running.words(out, steps=3)) == 0
    final = running.metrics(out)[-1]
    raw = read_run_config(out)
    fields = dataclasses.fields(train.Config)
    config = train.Config(**{field.name: raw[field.name] for field in fields})
    text = card(config, [final], raw["data"])
    assert text == (out / "adapter" / "README.md").read_text()
    assert "datasets" not in front(text)
    for checksum in raw["data"].values():
        assert checksum in text
    assert str(EMBEDDED) not in text


# The code


def run_blocks(text, folder, monkeypatch, base=None):
    """Run the two pieces of code of a card in its folder, and yield the names that they define.

    base: the path of a local model. The card says to put it into the folder.
    """
    monkeypatch.chdir(folder)
    if base is not None:
        assert "# the base, which is not in this folder: put it here" in text
        Path(folder, base.name).symlink_to(base)
    for block in blocks(text):
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        yield names


SOURCE, TARGET = torch.tensor([[5, 9, 7, 4]]), torch.tensor([[3, 8, 6]])


@torch.no_grad()
def theirs(model, name):
    """Logits of transformers, or PEFT, for SOURCE and TARGET."""
    if name == "t5":
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        return model(input_ids=SOURCE, decoder_input_ids=torch.cat([start, TARGET], 1)).logits
    return model(input_ids=torch.cat([SOURCE, TARGET], 1)).logits[:, SOURCE.shape[1] - 1 :]


def change(parameters):
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_code_for_lora_and_for_a_model_loads_them_here_and_there(
    name, method, tmp_path, monkeypatch
):
    config = train.Config(model=str(running.model(name)), task="rows.jsonl", method=method)
    model = minia3.load_model(config.model)
    tokenizer = minia3.load_tokenizer(config.model)
    if method == "lora":
        change(add_lora(model).values())
        save_lora(model, tmp_path, config.model)
    else:
        change(p for key, p in model.named_parameters() if not key.endswith(".scale"))
        minia3.save_model(model, tmp_path, tokenizer)
    text = make_card(config, {"architecture": ARCHITECTURES[name]})
    base = running.model(name) if method == "lora" else None
    ours, peer = run_blocks(text, tmp_path, monkeypatch, base)
    expected = logits(model, SOURCE, None, TARGET)
    assert torch.equal(logits(ours["model"], SOURCE, None, TARGET), expected)
    assert off(theirs(peer["model"].eval(), name), expected) < 1e-5
    assert off(logits(minia3.load_model(config.model), SOURCE, None, TARGET), expected) > 1e-2
    tokenizers = [ours["tokenizer"]]
    if method == "full":
        tokenizers.append(peer["tokenizer"])
    for loaded in tokenizers:
        assert loaded.decode(loaded.encode("w7 w9"))[:5] == "w7 w9"


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_code_for_an_adapter_loads_it_here_and_in_peft(name, tmp_path, monkeypatch):
    config = train.Config(model=str(running.model(name)), task="rows.jsonl")
    model = randomize(minia3.load_model(config.model))
    minia3.save_adapter(model, tmp_path)
    text = make_card(config, {"architecture": ARCHITECTURES[name]})
    ours, peer = run_blocks(text, tmp_path, monkeypatch, running.model(name))
    for key, vector in minia3.vectors(model).items():
        assert torch.equal(minia3.vectors(ours["model"])[key], vector)
    assert ours["tokenizer"].decode(ours["tokenizer"].encode("w7 w9")) == "w7 w9"
    expected = logits(model, SOURCE, None, TARGET)
    assert off(theirs(peer["model"].eval(), name), expected) < 1e-5
    assert off(logits(minia3.load_model(config.model), SOURCE, None, TARGET), expected) > 1e-2


def test_the_code_for_the_embedded_model_runs(tmp_path, monkeypatch):
    """After the command that it shows, because an installed minia3 has no folder data/."""
    minia3.save_adapter(minia3.load_model("tiny-t5"), tmp_path)
    (command,) = re.findall(r"that this command makes: (.*)", make_card())
    assert command == "minia3 convert tiny-t5 tiny-t5-converted"
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert len(list(run_blocks(make_card(), tmp_path, monkeypatch))) == 2


def test_a_gguf_base_may_have_any_name(tmp_path):
    for name in ("Small.GGUF", "sha256-12ab"):
        (tmp_path / name).write_bytes(b"GGUF")
        text = make_card(train.Config(model=str(tmp_path / name)), {"architecture": "Llama"})
        assert f"minia3 convert {name} " in text


@pytest.mark.slow
def test_the_code_for_a_gguf_base_runs_after_the_command_that_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the extra gguf")
    monkeypatch.syspath_prepend(running.ROOT / "tests" / "checkpoints")
    import test_gguf

    base = tmp_path / "models" / "small.gguf"
    base.parent.mkdir()
    tensors = test_gguf.gguf_tensors(test_gguf.hf_tensors(test_gguf.make_model()))
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": [2, 3, 1]}
    test_gguf.write(base, tensors, tokens)
    folder = tmp_path / "adapter"
    model = randomize(minia3.load_model(base))
    minia3.save_adapter(model, folder)
    text = make_card(train.Config(model=str(base)), {"architecture": "Llama"})
    assert str(tmp_path) not in text
    (command,) = re.findall(r"that this command makes: (.*)", text)
    assert command == "minia3 convert small.gguf small-converted"
    (folder / "small.gguf").symlink_to(base)
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)[1:]) == 0
    (folder / "small.gguf").unlink()
    ours, peer = run_blocks(text, folder, monkeypatch, base)
    expected = logits(model, SOURCE, None, TARGET)
    assert off(logits(ours["model"], SOURCE, None, TARGET), expected) < 1e-5
    assert off(theirs(peer["model"].eval(), "llama"), expected) < 1e-5
