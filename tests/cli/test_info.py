"""Guards `python -m minia3 info`: its numbers agree with the model that is loaded and with the
files that are written, and it needs neither a network nor weights."""

import argparse
import contextlib
import functools
import io
import json
import os
import shlex
import shutil
import socket
import sys
from dataclasses import replace

import pytest
import running
import torch
from command_line import output
from conftest import LLAMA_PEERS, T5_PEERS

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.cli.info import (
    add_arguments,
    count_parameters,
    devices_of,
    find_model,
    info,
    parameters_of,
)
from minia3.cli.main import main
from minia3.training import memory_plan
from minia3.training.device_plan import Base, Plan, recipe_shape

# The parameters of an adapter (the paper's equation) and of its base (as published; None: unknown)
PUBLISHED = {
    "t5-small": (43_008, 60_506_624),
    "t5-base": (129_024, 222_903_552),
    "t5-large": (344_064, None),
    "t5-v1.1-base": (104_448, None),
    "flan-t5-base": (104_448, 247_577_856),
    "t0-3b": (540_672, None),
    "t0-11b": (1_081_344, None),
    "llama-2-7b": (614_400, 6_738_415_616),
    "llama-3-8b": (524_288, 8_030_261_248),
    "llama-3.2-1b": (147_456, 1_235_814_400),
    "tinyllama-1.1b": (135_168, 1_100_048_384),
    "smollm2-135m": (57_600, 134_515_008),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_here(self, address):
        is_path = isinstance(address, str)  # of the server that forks processes
        assert is_path, "a network is asked"
        connect(self, address)

    monkeypatch.setattr("socket.socket.connect", connect_here)


def n_bytes(text):
    number, unit = text.replace(",", "").split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def base_parameters(model):
    n_vectors = sum(vector.numel() for vector in minia3.vectors(model).values())
    return sum(p.numel() for p in model.parameters()) - n_vectors


def cells(name):
    """Return the lines before the plan of the memory, which takes a while."""
    found = {}
    for title, text in info(name):
        found[title] = text
        if title == "adapter file":
            return found


@pytest.mark.slow
def test_t5_small_is_described_on_the_command_line_without_a_network(tmp_path):
    """All of it, with the plan of the memory, which takes a larger model longer."""
    code, out, err = running.in_new_process(run_offline, tmp_path, "info", "t5-small")
    assert (code, err) == (0, "")
    for number in ("43,008", "60,506,624", "0.071%"):
        assert number in out
    assert list(tmp_path.iterdir()) == []


def run_offline(home, *words):
    """Return the exit code of a command without a network, and what it prints.

    Nothing has imported huggingface_hub in this process, so it reads the environment now.
    """
    assert "huggingface_hub" not in sys.modules
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    os.environ["HF_HOME"] = str(home)
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_known_name_has_its_numbers_without_a_network(name, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", lambda *args: 0 / 0)
    found = cells(name)
    adapter = int(found["adapter"].split()[0].replace(",", ""))
    base = int(found["parameters"].replace(",", ""))
    expected_adapter, expected_base = PUBLISHED[name]
    assert adapter == expected_adapter
    if expected_base is not None:
        assert base == expected_base
    assert found["adapter"] == f"{adapter:,} parameters, {adapter / base:.3%} of the base"
    assert found["model"] == KNOWN_MODELS[name].repo
    assert n_bytes(found["adapter file"]) == pytest.approx(4 * adapter, rel=0.1, abs=2e4)


def test_the_embedded_model_is_what_its_entry_says():
    model = minia3.load_model("tiny-t5")
    assert cells("tiny-t5")["parameters"] == f"{base_parameters(model):,}"


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "t5-base",
            [
                "T5: encoder-decoder",
                "n_decoder_layers  12",
                "n_heads           12",
                "activation        relu",
            ],
        ),
        ("t5-3b", ["n_heads           32", "d_head            128", "d_model           1024"]),
        (
            "flan-t5-base",
            ["own_head          True", "d_ff              2048", "gated             True"],
        ),
        ("llama-3-8b", ["LLaMA: decoder-only", "own_head          True", "n_kv_heads        8"]),
        ("llama-3.2-1b", ["own_head          False", "rope_scaling      (32.0, 1.0, 4.0, 8192)"]),
        ("google-t5/t5-base", ["google-t5/t5-base", "129,024"]),
        ("google/t5-base", ["google-t5/t5-base", "129,024"]),
        ("umt5-small", ["own_positions     True", "306,601,984"]),
        ("byt5-small", ["n_layers          12", "n_decoder_layers  4"]),
        ("HuggingFaceTB/SmolLM2-135M", ["134,515,008"]),
    ],
)
def test_a_model_is_described(name, texts, capsys, monkeypatch):
    monkeypatch.setattr("minia3.training.memory_plan.planned_memory", lambda *args, **options: 0)
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    for text in texts:
        assert text in out


@pytest.mark.parametrize("name", [*T5_PEERS, *LLAMA_PEERS])
def test_a_folder_is_described_from_its_config_as_the_model_that_is_loaded(
    name, peer, loaded, tmp_path
):
    shutil.copy(peer(name).folder / "config.json", tmp_path)
    model = loaded(name)
    adapter = sum(vector.numel() for vector in minia3.vectors(model).values())
    found = cells(tmp_path)
    if name not in ("t5-v1.1", "t5-unscaled", "t5-deep-decoder", "mt5"):
        # For these the files decide whether there is a head, not the config.
        assert found["parameters"] == f"{base_parameters(model):,}"
    assert found["adapter"].startswith(f"{adapter:,} parameters, ")
    minia3.save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["adapter file"] == f"{size / 1e6:.2f} MB"


@pytest.mark.parametrize("name", ["t5-v1.1", "t5-v1.0", "llama-gqa"])
def test_weights_that_are_there_say_whether_the_head_is_the_embedding(name, peer, loaded, tmp_path):
    """transformers 5 writes "tie_word_embeddings": true into the config of each T5."""
    model = loaded(name)
    found = cells(peer(name).folder)
    assert found["parameters"] == f"{base_parameters(model):,}"
    assert found["own_head"] == str(model.config.own_head)
    # Half a download says as much as none, and so does a clone without its large files.
    for file in peer(name).folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert cells(tmp_path)["own_head"] == str(not raw["tie_word_embeddings"])
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert cells(tmp_path)["own_head"] == str(not raw["tie_word_embeddings"])


def test_a_gguf_file_is_described(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the extra gguf")
    monkeypatch.syspath_prepend(running.ROOT / "tests" / "checkpoints")
    import test_gguf

    tensors = test_gguf.gguf_tensors(test_gguf.hf_tensors(test_gguf.make_model()))
    path = test_gguf.write(tmp_path / "small.gguf", tensors)
    found = cells(path)
    assert found["parameters"] == f"{base_parameters(minia3.load_model(path)):,}"


def test_all_known_models_are_listed_without_a_network(capsys):
    header, *lines = output(capsys, "info", "--list").splitlines()
    assert header.split() == ["name", "parameters", "adapter", "on", "the", "hub"]
    names = [line.split()[0] for line in lines]
    assert names == list(KNOWN_MODELS)
    assert lines[names.index("t5-base")].split() == [
        "t5-base",
        "222,903,552",
        "129,024",
        "google-t5/t5-base",
    ]
    assert lines[0].endswith("(in this package)")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    "flags", ["--batch 4", "--devices 8 --memory 80", "--quantize int8", "--shard", "--offload"]
)
def test_the_list_takes_no_flags_that_are_for_one_model(flags, capsys):
    words = flags.split()
    message = f"{words[0]} is for one model, and --list describes all of them"
    assert_refused(["info", "--list", *words], capsys, message)


def test_the_list_is_json_too_and_agrees_with_the_description_of_each_model(capsys):
    rows = json.loads(output(capsys, "info", "--list", "--json"))
    assert len(rows) == len(KNOWN_MODELS)
    for row in rows[:4]:
        found = cells(row["name"])
        assert found["parameters"] == f"{row['parameters']:,}"
        assert found["adapter"].startswith(f"{row['adapter']:,} parameters")


@pytest.mark.parametrize(
    "name", ["t5-small", "umt5-small", "mt0-small", "smollm2-135m", "qwen3-0.6b"]
)
def test_parameters_are_counted_without_building_all_layers(name):
    config = KNOWN_MODELS[name].config
    layers = {"n_layers": 3}
    if hasattr(config, "n_decoder_layers"):
        layers["n_decoder_layers"] = 4
    config = replace(config, **layers)
    assert count_parameters(config) == parameters_of(config)


def assert_refused(arguments, capsys, *parts):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minia3: ")
    assert err.count("\n") == 1
    for part in parts:
        assert str(part) in err, err


@pytest.fixture
def plans(monkeypatch):
    """Let each plan be made once, however often a test asks for it."""
    plan = functools.cache(memory_plan.planned_memory)
    monkeypatch.setattr(memory_plan, "planned_memory", plan)
    return plan


@pytest.mark.slow
def test_the_command_plans_for_the_batch_and_length_that_are_given(plans, capsys):
    config = KNOWN_MODELS["tiny-t5"].config
    assert main(["info", "tiny-t5", "--batch", "3", "--length", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for dtype in (torch.float32, torch.bfloat16):
        serving = plans(config, dtype, 3, 50, is_training=False) / 1e6
        training = plans(config, dtype, 3, 50, is_training=True) / 1e6
        expected = f"{serving:.2f} MB to serve, {training:.2f} MB to train"
        assert found[str(dtype).removeprefix("torch.")] == expected


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert_refused(["info", "t5-bsae"], capsys, "t5-bsae", "did you mean t5-base?")
    assert_refused(["info", str(tmp_path / "nowhere")], capsys, "nowhere", "prints the known names")
    assert_refused(["info", str(tmp_path)], capsys, "config.json", "an empty folder")
    assert_refused(["inof", "t5-base"], capsys, "inof", "did you mean info?")
    assert_refused(["info", "t5-base", "--length", "0"], capsys, "--length: 0 is not")
    assert_refused(["info"], capsys, "expected either a model or --list")
    assert_refused(["info", "t5-base", "--list"], capsys, "expected either a model or --list")
    assert_refused(["info", "t5-base", "t5-large"], capsys, "t5-large")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    assert_refused(["info", str(tmp_path)], capsys, "bert")
    (tmp_path / "config.json").write_text("{")
    assert_refused(["info", str(tmp_path)], capsys, "config.json")


@pytest.mark.slow
def test_an_unknown_hub_id_needs_the_network_and_says_so(tmp_path):
    code, _, err = running.in_new_process(run_offline, tmp_path, "info", "some/model")
    assert code == 2
    assert err.startswith(
        "minia3: some/model: config.json is not in the cache, and the hub cannot be reached"
    )
    assert err.count("\n") == 1


def test_the_note_says_what_was_planned(monkeypatch):
    monkeypatch.setattr("minia3.training.memory_plan.planned_memory", lambda *args, **options: 0)
    note = " ".join(text for title, text in info("tiny-t5", batch=3, length=50) if not title)
    assert "for 3 sources of 50 tokens" in note
    assert "one step with targets of 8 tokens" in note


# The plan for devices


def plan_of(model, *arguments):
    """Return title -> text of `info` for these flags, without the description of the model."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([model, *map(str, arguments)])
    return {title: text for title, text in info(model, args.batch, args.length, devices_of(args))}


@pytest.fixture(scope="module")
def bases():
    """A function that makes each Base once, because llama-3.1-405b has 126 layers."""
    return functools.cache(Base)


@pytest.fixture
def no_activations(monkeypatch, bases):
    """Let activations take a megabyte per example, because planning them takes seconds."""
    monkeypatch.setattr("minia3.training.device_plan.Base", bases)
    monkeypatch.setattr(
        "minia3.training.device_plan.planned_activations",
        lambda config, dtype, shape, flags: 10**6 * shape.n_examples,
    )


def test_the_plan_for_devices_answers_what_fits_and_how_to_run_it(no_activations):
    found = plan_of("llama-2-70b", "--devices", 8, "--memory", 80, "--length", 512)
    assert found["devices"] == "8 of 80.00 GB: bfloat16 base, divided among them"
    assert found["fits"] == "yes: 23.34 GB for 1 x 512 tokens"
    assert found["weights"].startswith("18.16 GB")
    assert found["unsharded"].startswith("5.13 GB")
    assert found["largest batch"].startswith("389,320 (48,665 on each")
    assert found["command"] == (
        "torchrun --nproc-per-node 8 -m minia3 train --model llama-2-70b --task TASK "
        "--dtype bfloat16 --recompute --shard --batch-size 8 --max-length 512"
    )


def test_the_base_is_divided_only_if_it_must_be_or_if_that_is_asked_for(no_activations):
    found = plan_of("t5-3b", "--devices", 4, "--memory", 24)
    assert found["devices"].endswith("whole on each")
    assert "--shard" not in found["command"]
    divided = plan_of("t5-3b", "--devices", 4, "--memory", 24, "--shard")
    assert divided["devices"].endswith("divided among them")
    assert "--shard" in divided["command"]
    assert n_bytes(divided["weights"].split(" (")[0]) < n_bytes(found["weights"].split(" (")[0]) / 3


def test_groups_of_devices_may_hold_a_copy_each(no_activations):
    flags = ["--devices", 8, "--memory", 80, "--length", 512]
    found = plan_of("llama-2-70b", *flags, "--shard", 4)
    assert found["devices"] == "8 of 80.00 GB: bfloat16 base, a copy for every 4"
    alone = plan_of("llama-2-70b", *flags[2:], "--devices", 4)
    assert found["weights"] == alone["weights"]
    assert "torchrun --nproc-per-node 8 " in found["command"]
    assert "--shard 4 --batch-size 8" in found["command"]
    whole = plan_of("llama-2-70b", *flags, "--shard", 1)
    assert whole["devices"].endswith("whole on each")
    assert whole["fits"].startswith("no: ")
    assert whole["instead"].startswith("--shard fits; ")
    assert "--shard 1 " in plan_of("t5-3b", *flags, "--shard", 1)["command"]


def test_offloading_needs_little_of_a_device_and_says_what_the_cpu_has(no_activations):
    flags = ["llama-2-70b", "--memory", 24, "--length", 512, "--offload"]
    alone = plan_of(*flags, "--devices", 1)
    assert alone["devices"] == "1 of 24.00 GB: bfloat16 base, whole for each, on the CPU"
    assert alone["weights"] == "1.05 GB (what belongs to no block)"
    assert alone["on the CPU"] == "153.01 GB for each device, 153.01 GB for all of them"
    assert "--recompute --offload --batch-size 8" in alone["command"]
    assert alone["command"].startswith("minia3 train --model")
    several = plan_of(*flags, "--devices", 4)  # divided, as in a run
    assert several["devices"].endswith("divided among them, on the CPU")
    assert several["on the CPU"] == "38.25 GB for each device, 153.01 GB for all of them"
    assert "--shard --offload" in several["command"]


def test_one_device_needs_no_torchrun_and_a_large_batch_needs_micro_batches(no_activations):
    found = plan_of("t5-3b", "--devices", 1, "--memory", 7, "--batch", 9000, "--quantize", "int8")
    assert found["fits"].startswith("no: ")
    largest = int(found["largest batch"].split()[0].replace(",", ""))
    assert 1 < largest < 9000
    assert found["command"] == (
        "minia3 train --model t5-3b --task TASK --dtype bfloat16 --recompute --quantize int8 "
        f"--batch-size 9000 --max-length 128 --micro-batch-size {largest}"
    )


def test_a_model_whose_path_has_a_space_is_one_word_of_the_command(tmp_path, no_activations):
    folder = tmp_path / "my models" / "t5"
    shutil.copytree(running.model("t5"), folder)
    found = plan_of(str(folder), "--devices", 1, "--memory", 7)
    words = shlex.split(found["command"])
    assert words[words.index("--model") + 1] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["llama-2-70b", "--devices", 1, "--memory", 80], "--quantize int8 fits"),
        (["llama-2-70b", "--devices", 1, "--memory", 48], "--quantize nf4 fits"),
        (["llama-3.1-405b", "--devices", 8, "--memory", 40], "--devices 16 --quantize nf4 fits"),
        (["llama-3.1-405b", "--devices", 8, "--memory", 40], "; --offload fits, and is slow"),
        (["llama-2-70b", "--devices", 4, "--memory", 80, "--shard", 2], "--shard fits"),
        # A base that is divided would need more: blocks that are gathered ahead of time.
        (["llama-2-70b", "--devices", 4, "--memory", 5, "--shard", 1], "--offload fits"),
        (["llama-2-70b", "--devices", 1, "--memory", 3, "--offload"], "--quantize int8 fits"),
        (["llama-2-70b", "--devices", 128, "--memory", 6], "--quantize int8 fits"),
        (["llama-3.1-405b", "--devices", 8, "--memory", 5], "more memory, or a smaller model"),
    ],
)
def test_what_does_not_fit_comes_with_advice(arguments, expected, no_activations):
    found = plan_of(*arguments)
    assert found["fits"].startswith("no: ")
    assert "command" not in found
    assert expected in found["instead"]


def test_a_base_that_a_run_would_refuse_is_refused_by_its_plan(capsys, monkeypatch):
    """Both say the same, and no weight is read before."""
    monkeypatch.delattr("minia3.checkpoints.load.read_as")
    message = "nf4 of a weight with 24 inputs: expected a multiple of 64, so that no two rows share"
    words = [str(running.model("t5")), "--quantize", "nf4"]
    assert_refused(["generate", *words, "w3"], capsys, message)
    assert_refused(["info", *words, "--devices", "1", "--memory", "1"], capsys, message)


@pytest.mark.parametrize(("name", "is_offered"), [("t5", False), ("t5-wide", True)])
def test_the_advice_has_no_base_that_a_run_would_refuse(name, is_offered, no_activations):
    folder = str(running.model(name))
    _, model, _ = find_model(folder)
    totals = []
    for kind in ("int8", "nf4"):
        plan = Plan(model.config, torch.bfloat16, kind)
        totals.append(plan.on_device(1, recipe_shape(1, 128)).total)
    assert totals[0] > totals[1]
    memory = sum(totals) / 2 / 0.9  # too little for int8, and enough for nf4
    found = plan_of(folder, "--devices", 1, "--memory", memory / 1e9)
    assert found["fits"].startswith("no: ")
    assert ("--quantize nf4 fits" in found["instead"]) == is_offered


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "Figures are per device, in bfloat16 except for the vectors. A tenth"),
        (
            ("--quantize", "int8"),
            "per device, with blocks in int8, vectors in float32, the rest in bfloat16. A tenth",
        ),
    ],
)
def test_the_note_says_in_which_dtypes_the_base_is(flags, expected, no_activations, capsys):
    lines = output(capsys, "info", "t5-base", "--devices", 1, "--memory", 80, *flags)
    assert expected in " ".join(lines.split())


def test_half_a_question_about_devices_is_one_line(capsys):
    both = "expected both --devices and --memory"
    assert_refused(["info", "t5-base", "--devices", "8"], capsys, both)
    assert_refused(["info", "t5-base", "--memory", "80"], capsys, both)
    assert_refused(["info", "t5-base", "--shard"], capsys, "give --devices and --memory, too")
    assert_refused(["info", "t5-base", "--quantize", "nf4"], capsys, "give --devices")
    for n_devices, memory in (("0", "80"), ("8", "0"), ("8", "nan"), ("8", "inf"), ("8", "-1")):
        arguments = ["info", "t5-base", "--devices", n_devices, "--memory", memory]
        assert_refused(arguments, capsys, "expected at least 1 device and more than 0 GB")
    assert_refused(["info", "t5-base", "--offload"], capsys, "give --devices and --memory, too")
    arguments = ["info", "t5-base", "--devices", "1", "--memory", "8", "--shard"]
    assert_refused(arguments, capsys, "--devices is 1")
    for n_per_copy in ("3", "-1", "16"):
        arguments = ["info", "t5-base", "--devices", "8", "--memory", "8", "--shard", n_per_copy]
        assert_refused(arguments, capsys, "expected a number that divides --devices")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"]])
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "minia3 info t5-base" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_command_prints_the_lines_and_json_has_those_with_a_title(plans, capsys):
    lines = list(info("tiny-t5"))
    text = output(capsys, "info", "tiny-t5")
    assert text == "".join(f"{title:<18}{line}\n" for title, line in lines)
    json_line = output(capsys, "info", "tiny-t5", "--json")
    assert json_line.count("\n") == 1
    assert json.loads(json_line) == {title: line for title, line in lines if title}
