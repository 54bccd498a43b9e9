"""Guards `merge`, `convert` and `mix`: each writes what the function of its name makes, and LoRA
and T-Few's files are read, too."""

import json
import shutil

import pytest
import running
import torch
from command_line import answered, failure, output, save_adapters, write_tfew_file
from safetensors.torch import load_file
from torch import nn

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.adapters.merge import merge
from minia3.adapters.mix import mix
from minia3.adapters.peft_files import read_adapter
from minia3.cli.main import main
from minia3.files import write


@pytest.fixture
def adapters(tmp_path):
    save_adapters(tmp_path)
    return tmp_path


def run(*words):
    assert main([str(word) for word in words]) == 0


def vectors_of(folder):
    return read_adapter(folder).vectors


def have_same_values(tensors, others):
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensors[name], others[name]) for name in tensors)


def have_same_parameters(model, other):
    return have_same_values(dict(model.named_parameters()), dict(other.named_parameters()))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


# merge


def test_merge_writes_what_the_function_returns(adapters):
    run("merge", "tiny-t5", adapters / "one" / "adapter", adapters / "merged")
    model = minia3.load_model("tiny-t5")
    minia3.load_adapter(model, adapters / "one" / "adapter")
    assert have_same_parameters(minia3.load_model(adapters / "merged"), merge(model))
    assert minia3.load_tokenizer(adapters / "merged").encode("same colour ?")


def test_lora_generates_predicts_and_merges_too(tmp_path, capsys):
    model = minia3.load_model("tiny-t5")
    tokenizer = minia3.load_tokenizer("tiny-t5")
    texts = ["anna has a red ball .", "tom has a blue cup ."]
    base_outputs = minia3.generate(model, tokenizer, texts, max_new_tokens=5)
    torch.manual_seed(0)
    for name, p in add_lora(model, where=("q", "v", "gate")).items():
        nn.init.normal_(p, std=0.3 if name.endswith("lora_B.weight") else 0.1)
    folder = tmp_path / "lora"
    save_lora(model, folder)
    expected = minia3.generate(model, tokenizer, texts, max_new_tokens=5)
    assert expected != base_outputs

    flags = ["--adapter", folder, "--max-new-tokens", "5"]
    out = output(capsys, "generate", "tiny-t5", *texts, *flags, "--json")
    assert [json.loads(line)["output"] for line in out.splitlines()] == expected

    rows = "".join(json.dumps({"input": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    out = answered(capsys, "predict", "tiny-t5", tmp_path / "rows.jsonl", *flags)
    assert [json.loads(line)["output"] for line in out.splitlines()] == expected

    output(capsys, "merge", "tiny-t5", folder, tmp_path / "merged")
    assert have_same_parameters(minia3.load_model(tmp_path / "merged"), merge(model))
    assert minia3.load_tokenizer(tmp_path / "merged").encode(texts[0]) == tokenizer.encode(texts[0])
    output(capsys, "merge", "tiny-t5", folder, tmp_path / "narrow", "--dtype", "bfloat16")
    assert minia3.load_model(tmp_path / "narrow").embed.weight.dtype == torch.bfloat16


def test_a_merged_model_remembers_the_model_that_it_was_made_of(adapters):
    model = minia3.load_model("tiny-t5")
    add_lora(model)
    save_lora(model, adapters / "lora")
    run("merge", "tiny-t5", adapters / "one" / "adapter", adapters / "merged")
    run("merge", "tiny-t5", adapters / "lora", adapters / "merged lora")
    minia3.save_model(merge(merge(model)), adapters / "merged twice")
    for name in ("merged", "merged lora", "merged twice"):
        config = json.loads((adapters / name / "config.json").read_text())
        assert config["_name_or_path"] == "tiny-t5"


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_tokenizer_that_is_refused_is_found_before_weights_are_read(
    tmp_path, capsys, monkeypatch, command
):
    def load_model(*args, **options):
        raise AssertionError("the weights are read first")

    minia3.save_model(minia3.load_model("tiny-t5"), tmp_path / "base")
    model = minia3.load_model("tiny-t5")
    add_lora(model)
    save_lora(model, tmp_path / "lora")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    monkeypatch.setattr("minia3.checkpoints.load.load_model", load_model)
    words = [tmp_path / "base", tmp_path / "out"]
    if command == "merge":
        words.insert(1, tmp_path / "lora")
    error = failure(capsys, command, *words)
    assert "tiktoken format, which is not supported: put the model's tokenizer.json and" in error
    (tmp_path / "base" / "tokenizer.model").unlink()
    with pytest.raises(AssertionError, match="read first"):
        main([command, *map(str, words)])


# convert


def test_a_file_of_t_few_becomes_a_peft_folder_without_the_base(tmp_path, loaded):
    file = tmp_path / "finish.pt"
    write_tfew_file(file)
    run("convert", file, tmp_path / "out")
    assert files_in(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]
    model = loaded("t5-v1.1")
    minia3.load_adapter(model, tmp_path / "out")
    vectors = minia3.vectors(model)
    raw = torch.load(file, weights_only=True)
    n_entries = sum(tensor.numel() for tensor in raw.values())
    assert sum(vector.numel() for vector in vectors.values()) == n_entries
    for module in ("2.DenseReluDense.wi_1", "1.EncDecAttention.v"):
        value_D = raw[f"decoder.block.1.layer.{module}.multi_lora_b"][:, 0]
        n_equal = sum(torch.equal(vector[0], value_D) for vector in vectors.values())
        assert n_equal == 1


def test_a_model_without_a_tokenizer_converts(adapters, copy):
    run("convert", copy("t5-v1.0"), adapters / "out")
    expected = ["config.json", "generation_config.json", "model.safetensors"]
    assert files_in(adapters / "out") == expected


def test_any_form_of_an_adapter_converts_to_the_same_folder(adapters):
    folder = adapters / "one" / "adapter"
    run("convert", folder, adapters / "a")
    run("convert", folder / "adapter_model.safetensors", adapters / "b")
    assert have_same_values(vectors_of(folder), vectors_of(adapters / "a"))
    assert have_same_values(vectors_of(folder), vectors_of(adapters / "b"))
    assert read_adapter(adapters / "a").base == read_adapter(folder).base


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_model_becomes_a_folder_in_the_hugging_face_layout(name, tmp_path):
    source = running.model(name)
    out = tmp_path / "out"
    shutil.copytree(source, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    run("convert", tmp_path / "bin", out, "--dtype", "bfloat16")
    found = minia3.load_model(out)
    assert found.embed.weight.dtype == torch.bfloat16
    assert have_same_parameters(found, minia3.load_model(source, dtype=torch.bfloat16))
    expected = minia3.load_tokenizer(source).encode("w3 w9")
    assert minia3.load_tokenizer(out).encode("w3 w9") == expected


def test_a_model_keeps_its_task_file(adapters):
    """The words of its rows, which `merge` and full fine-tuning have written beside the model."""
    task = json.dumps({"prompts": [{"text": "{input}"}], "labels": ["no", "yes"]})
    (adapters / "one" / "adapter" / "task.json").write_text(task)
    run("merge", "tiny-t5", adapters / "one" / "adapter", adapters / "merged")
    run("convert", adapters / "merged", adapters / "out")
    assert (adapters / "out" / "task.json").read_text() == task
    assert files_in(adapters / "out") == files_in(adapters / "merged")


def test_a_task_file_in_another_encoding_of_json_is_copied(adapters):
    """PowerShell writes UTF-16. All that read the file take it."""
    task = json.dumps({"prompts": [{"text": "{input}"}], "labels": ["no", "yes"]}).encode("utf-16")
    (adapters / "one" / "adapter" / "task.json").write_bytes(task)
    run("merge", "tiny-t5", adapters / "one" / "adapter", adapters / "merged")
    assert (adapters / "merged" / "task.json").read_bytes() == task


def test_a_model_is_converted_on_the_cpu_unless_another_device_is_asked_for(
    tmp_path, capsys, monkeypatch
):
    """Nothing is computed, and a GPU may have too little memory."""
    devices = []

    def load_model(*args, device, **options):
        devices.append(device.type)
        raise ValueError("stop")

    best = torch.device("meta")  # for commands that compute
    monkeypatch.setattr("minia3.training.device.best_device", lambda: (best, "it is there"))
    monkeypatch.setattr("minia3.checkpoints.load.load_model", load_model)
    failure(capsys, "convert", "tiny-t5", tmp_path / "out")
    assert devices == ["cpu"]
    error = failure(capsys, "convert", "tiny-t5", tmp_path / "out", "--device", "nosuch")
    assert "--device is 'nosuch'" in error
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "mps, xpu ... (default: cpu)" in " ".join(capsys.readouterr().out.split())


def write_gguf(path, monkeypatch):
    """Write a small LLaMA."""
    pytest.importorskip("gguf", reason="needs the extra gguf")
    monkeypatch.syspath_prepend(running.ROOT / "tests" / "checkpoints")
    import test_gguf

    tensors = test_gguf.gguf_tensors(test_gguf.hf_tensors(test_gguf.make_model()))
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": [2, 3, 1]}
    test_gguf.write(path, tensors, tokens)


def test_a_model_in_a_file_does_not_take_the_task_that_lies_beside_it(tmp_path, monkeypatch):
    write_gguf(tmp_path / "small.gguf", monkeypatch)
    (tmp_path / "task.json").write_text(json.dumps({"prompts": [{"text": "{input}"}]}))
    run("convert", tmp_path / "small.gguf", tmp_path / "out")
    assert "task.json" not in files_in(tmp_path / "out")


@pytest.mark.parametrize("name", ["Small.GGUF", "sha256-0a1b2c"])
def test_a_gguf_file_may_have_another_name(tmp_path, monkeypatch, name):
    """Ollama names its files by their sums."""
    write_gguf(tmp_path / name, monkeypatch)
    run("convert", tmp_path / name, tmp_path / "out")
    model, written = minia3.load_model(tmp_path / name), minia3.load_model(tmp_path / "out")
    assert have_same_parameters(model, written)
    assert minia3.load_tokenizer(tmp_path / name).pad_id == 2


def test_an_adapter_that_a_killed_process_had_written_is_not_taken_for_a_model(adapters):
    """All of its files are still in .written."""
    folder = adapters / "one" / "adapter"
    expected = vectors_of(folder)
    folder.rename(adapters / ".written")
    folder.mkdir()
    (adapters / ".written").rename(folder / ".written")
    run("convert", folder, adapters / "out")
    assert have_same_values(vectors_of(adapters / "out"), expected)


@pytest.mark.parametrize(
    "flags", [("--dtype", "bfloat16"), ("--device", "cpu"), ("--check-weights",)]
)
def test_flags_of_models_are_refused_for_an_adapter(adapters, capsys, flags):
    folder = adapters / "one" / "adapter"
    for kind in ([], ["--to", "dora"]):
        message = failure(capsys, "convert", folder, adapters / "out", *flags, *kind)
        assert message == f"minia3: {flags[0]} is for a model, and {folder} is not one\n"


def test_the_base_of_an_adapter_is_refused_for_a_model(adapters, capsys):
    message = failure(capsys, "convert", "tiny-t5", adapters / "out", "--base", "t5-base")
    assert message == "minia3: --base is for an adapter, and tiny-t5 is not one\n"


# mix


@pytest.mark.parametrize("how", ["average", "product", "power"])
def test_mix_writes_what_the_function_returns(how, adapters):
    for name in ("one", "other"):
        model = minia3.load_model("tiny-t5")
        minia3.load_adapter(model, adapters / name / "adapter")
        for vector in minia3.vectors(model).values():
            vector.data.abs_().add_(0.1)  # powers need positive entries
        minia3.save_adapter(model, adapters / name / "positive")
    one = adapters / "one" / "positive"
    other = adapters / "other" / "positive"
    flags = [] if how == "average" else ["--how", how]
    run("mix", adapters / "out", *flags, f"{one}:0.25", f"{other}:-1.5")
    expected = mix([(vectors_of(one), 0.25), (vectors_of(other), -1.5)], how)
    assert have_same_values(vectors_of(adapters / "out"), expected)
    assert read_adapter(adapters / "out").base == read_adapter(one).base == "tiny-t5"


def test_an_adapter_is_not_taken_for_the_forgotten_folder_of_a_mixture(
    adapters, capsys, monkeypatch
):
    monkeypatch.chdir(adapters)
    message = failure(capsys, "mix", "one/adapter:0.5", "other/adapter:0.5")
    assert "expected the folder to write first, as in minia3 mix mixed" in message
    assert files_in(adapters / "one") == ["adapter"]
    (adapters / "mine:1").mkdir()  # whoever makes such a folder means it
    assert output(capsys, "mix", "mine:1", "one/adapter:1").startswith("mixed 1 adapter: mine:1: ")


def name_base(folder, base):
    """Let the files of an adapter name this base; None: none."""
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": base}))


def mixed_base(adapters, capsys, base, other_base):
    """Return the base that a mixture of adapters of two bases names, and what is printed."""
    name_base(adapters / "one", base)
    name_base(adapters / "other", other_base)
    weights = [f"{adapters / name / 'adapter'}:0.5" for name in ("one", "other")]
    run("mix", adapters / "out", *weights)
    return read_adapter(adapters / "out").base, capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "other_base", "expected"),
    [
        ("models/t5", "models/t5/", "models/t5"),
        ("models/t5", "t5", "models/t5"),  # the last part of an absolute path
        ("t5-base", "google-t5/t5-base", "google-t5/t5-base"),
        (None, None, None),
    ],
)
def test_a_mixture_names_the_model_of_its_adapters_however_it_is_spelled(
    adapters, capsys, base, other_base, expected
):
    assert mixed_base(adapters, capsys, base, other_base) == (expected, "")


@pytest.mark.parametrize(
    ("base", "other_base", "names"),
    [
        ("models/t5", "other/t5", "models/t5, other/t5"),
        (None, "tiny-t5", "tiny-t5, an unknown model"),
        ("", "tiny-t5", "tiny-t5, an unknown model"),
    ],
)
def test_a_mixture_of_adapters_that_may_be_of_different_models_names_none_and_says_so(
    adapters, capsys, base, other_base, names
):
    found, err = mixed_base(adapters, capsys, base, other_base)
    assert found is None
    expected = f"the adapters may be of different models ({names}), so the mixture names none"
    assert err == f"minia3: {expected}\n"


# Commands that write in several steps


@pytest.mark.parametrize("command", ["merge", "convert", "convert a model", "mix"])
def test_a_command_that_fails_before_its_last_file_leaves_nothing(adapters, monkeypatch, command):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minia3.tasks.task_file.copy_task_file", fail)
    adapter = adapters / "one" / "adapter"
    out = adapters / "out"
    words = {
        "merge": ("merge", "tiny-t5", adapter, out),
        "convert": ("convert", adapter, out),
        "convert a model": ("convert", "tiny-t5", out),
        "mix": ("mix", out, f"{adapter}:1"),
    }
    assert main(list(map(str, words[command]))) == 1
    assert not out.exists()
    monkeypatch.undo()
    run(*words[command])


@pytest.mark.parametrize("command", ["merge", "convert", "mix"])
def test_a_command_does_not_mix_its_files_with_those_of_another_one_that_was_faster(
    command, adapters, capsys, monkeypatch
):
    """It had looked for files when it began, and replaced those that were written since."""
    adapter = adapters / "one" / "adapter"
    out = adapters / "out"
    words = {
        "merge": ("tiny-t5", adapter, out),
        "convert": ("tiny-t5", out),
        "mix": (out, f"{adapter}:1"),
    }
    lock_folder = write.lock_folder

    def lock_later(folder, name):
        if folder == out and not (out / "task.json").exists():
            (out / "task.json").write_text("{}")
        return lock_folder(folder, name)

    monkeypatch.setattr(write, "lock_folder", lock_later)
    message = failure(capsys, command, *words[command])
    assert f"{out} exists and is not empty: give a new folder" in message
    assert files_in(out) == ["task.json"]


def test_a_command_does_not_mix_its_files_with_those_that_a_killed_one_had_completed(
    adapters, capsys
):
    adapter = adapters / "one" / "adapter"
    (adapter / "task.json").write_text("{}")
    run("mix", adapters / "out", f"{adapter}:1")
    expected = running.contents(adapters / "out")
    (adapters / "out").rename(adapters / "complete")
    (adapters / "out").mkdir()
    (adapters / "complete").rename(adapters / "out" / ".written")
    message = failure(capsys, "convert", "tiny-t5", adapters / "out")
    assert "exists and is not empty: give a new folder" in message
    assert running.contents(adapters / "out") == expected
