"""Guards minia3/checkpoints/nf4_files.py: a checkpoint that bitsandbytes has quantized to
nf4 loads as it is, with the weights that bitsandbytes makes of it."""

import json

import pytest
import torch
from checkpoint_folders import refusal
from conftest import logits, make, off, randomize, tokens
from optional import require_bitsandbytes
from safetensors.torch import load_file, save_file
from torch import nn

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.adapters.merge import merge_files
from minia3.cli.device_lines import Devices
from minia3.cli.info import find_model, info
from minia3.cli.main import main
from minia3.cli.terminal import format_size
from minia3.model.linear import Linear
from minia3.model.more_vectors import add_vectors, possible_vectors
from minia3.model.quantized import NF4Linear, dequantize, quantized_linears
from minia3.training.config import Config
from minia3.training.device_plan import Plan, recipe_shape
from minia3.training.methods import trainable_parameters
from minia3.training.shards import is_enough_memory

functional = require_bitsandbytes()

WIDE = {
    "llama-gqa": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},  # with biases
    "t5-v1.1": {"d_model": 64, "d_kv": 16, "d_ff": 128},
}
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}
SOURCE = tokens(2, 7)
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
TARGET = tokens(2, 5, seed=1)


def is_of_block(name, weight):
    kinds = ("_proj.", "SelfAttention.", "EncDecAttention.", "DenseReluDense.")
    is_linear = any(kind in name for kind in kinds) and "relative" not in name
    return weight.dim() == 2 and is_linear


def write_quantized(name, folder, double_quant, plain="none", also=(), dtype=torch.float32):
    """Write a random model in nf4, as transformers does, and return its dequantized weights.

    plain: part of the names of linears that stay as they are, as llm_int8_skip_modules says. also:
    names of weights outside of the blocks that become nf4, too. dtype: of all weights before.
    """
    make(name, **WIDE[name]).to(dtype).save_pretrained(folder)
    tensors = {}
    dequantized = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        tensors[key] = weight
        dequantized[key] = weight
        is_packed = is_of_block(key, weight) and plain not in key
        if is_packed or key in also:
            codes, state = functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=double_quant
            )
            parts = state.as_dict(packed=True)
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
            tensors[key] = codes
            dequantized[key] = functional.dequantize_4bit(codes, state)
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config=QUANTIZATION)
    return dequantized


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_it_loads_as_it_is_with_the_weights_of_bitsandbytes(tmp_path, name, double_quant):
    quantized_folder = tmp_path / "quantized"
    dequantized = write_quantized(name, quantized_folder, double_quant)
    plain_folder = tmp_path / "plain"
    make(name, **WIDE[name]).save_pretrained(plain_folder)
    save_file(dequantized, plain_folder / "model.safetensors")

    model = minia3.load_model(quantized_folder)
    linears = quantized_linears(model)
    assert len(linears) > 10
    assert {type(linear) for linear in linears.values()} == {NF4Linear}
    expected = logits(minia3.load_model(plain_folder), SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama-gqa", "t5-v1.1"])
def test_a_head_in_nf4_becomes_a_plain_matrix(tmp_path, name):
    """transformers leaves the head as it is, unless one says which modules to leave."""
    folder = tmp_path / "quantized"
    dequantized = write_quantized(name, folder, double_quant=False, also=["lm_head.weight"])
    model = minia3.load_model(folder)
    assert "head" not in quantized_linears(model)
    assert torch.equal(model.head_weight, dequantized["lm_head.weight"])
    assert logits(model, SOURCE, MASK, TARGET).isfinite().all()


def test_it_may_be_loaded_in_int8(tmp_path):
    write_quantized("llama-gqa", tmp_path, double_quant=False)
    packed = logits(minia3.load_model(tmp_path), SOURCE, MASK, TARGET)
    model = minia3.load_model(tmp_path, quantize="int8")
    assert off(logits(model, SOURCE, MASK, TARGET), packed) < 0.05


@pytest.mark.parametrize("plain", ["q_proj", "layers.0.mlp"])
def test_vectors_fold_into_linears_that_stay_plain(tmp_path, plain):
    write_quantized("llama-gqa", tmp_path, double_quant=False, plain=plain)
    model = minia3.load_model(tmp_path)
    n_linears = sum(type(module) is Linear for module in model.modules())
    assert n_linears > int(model.head is not None)
    add_vectors(model, possible_vectors(model))
    randomize(model, seed=1)
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(logits(minia3.merge(model), SOURCE, MASK, TARGET), expected) < 1e-5


def test_merging_from_file_to_file_writes_plain_weights(tmp_path):
    write_quantized("llama-gqa", tmp_path / "base", double_quant=True)
    model = minia3.load_model(tmp_path / "base")
    minia3.save_adapter(model, tmp_path / "ones")
    merge_files(tmp_path / "base", tmp_path / "ones", tmp_path / "merged")
    merged = minia3.load_model(tmp_path / "merged")
    assert not quantized_linears(merged)
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("kind", [None, "int8"])
def test_weights_are_never_rounded_to_the_dtype_that_they_had_before(tmp_path, kind):
    """A merge, a model that is loaded, and one that runs have the weights that the codes mean."""
    base = tmp_path / "base"
    options = {"also": ["lm_head.weight"], "dtype": torch.bfloat16}
    write_quantized("llama-gqa", base, double_quant=False, **options)
    model = minia3.load_model(base, dtype=torch.float32, quantize=kind)
    assert (model.head_weight != model.head_weight.bfloat16()).any()
    randomize(model, seed=1)
    minia3.save_adapter(model, tmp_path / "adapter")
    dequantize(model, torch.float32)
    folders = (base, tmp_path / "adapter", tmp_path / "merged")
    merge_files(*folders, dtype=torch.float32, quantize=kind)
    merged = minia3.load_model(tmp_path / "merged")
    for name, parameter in minia3.merge(model).named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name

    if kind == "int8":  # which is made of the same weights
        plain = minia3.load_model(base, dtype=torch.float32)
        dequantize(plain, torch.float32)
        codes = quantized_linears(minia3.load_model(base, dtype=torch.float32, quantize=kind))
        for name, linear in codes.items():
            expected = linear.from_weight(plain.get_submodule(name).weight)
            assert torch.equal(linear.codes, expected.codes), name
            assert torch.equal(linear.scales, expected.scales), name


@pytest.fixture
def little_activations(monkeypatch):
    """Let the base take nearly all of the memory that a plan asks for."""

    def planned_activations(config, dtype, shape, flags):
        return 1000 * shape.n_examples

    target = "minia3.training.device_plan.planned_activations"
    monkeypatch.setattr(target, planned_activations)


def write_both(folder):
    """Write a model in nf4, and with plain weights. Return the two folders as texts."""
    folders = (folder / "stored", folder / "plain")
    write_quantized("llama-gqa", folders[0], double_quant=False)
    make("llama-gqa", **WIDE["llama-gqa"]).save_pretrained(folders[1])
    return [str(path) for path in folders]


@pytest.mark.usefixtures("little_activations")
@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize(
    ("n_devices", "megabytes", "answer"), [(2, 0.15, "yes"), (1, 0.08, "no"), (1, 0.01, "no")]
)
def test_it_is_planned_in_nf4_without_a_flag(
    tmp_path, capsys, has_weights, n_devices, megabytes, answer
):
    stored, plain = write_both(tmp_path)
    if not has_weights:
        (tmp_path / "stored" / "model.safetensors").unlink()
    sizes = ["--devices", str(n_devices), "--memory", str(megabytes / 1e3), "--batch", "2"]
    assert main(["info", stored, *sizes]) == 0
    found = capsys.readouterr().out
    assert "MB: nf4 base, whole on each\n" in found
    assert f"\nfits              {answer}: " in found
    assert main(["info", plain, *sizes, "--quantize", "nf4"]) == 0
    expected = capsys.readouterr().out.replace(plain, stored)
    assert found == expected.replace(" --quantize nf4", "")


def test_without_devices_a_note_says_that_it_takes_less(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.training.memory_plan.planned_memory", lambda *_, **options: 0)
    found = []
    for folder in write_both(tmp_path):
        notes = [text for title, text in info(folder) if not title]
        found.append("The blocks are stored in nf4, and take less than this: " in notes[-1])
    assert found == [True, False]


@pytest.mark.usefixtures("little_activations")
def test_a_run_divides_it_only_if_it_does_not_fit_in_nf4(tmp_path):
    stored, plain = write_both(tmp_path)
    memory = 105_000
    assert is_enough_memory(Config(model=stored), torch.bfloat16, memory)
    assert is_enough_memory(Config(model=plain, quantize="nf4"), torch.bfloat16, memory)
    assert not is_enough_memory(Config(model=plain), torch.bfloat16, memory)
    assert not is_enough_memory(Config(model=stored, quantize="int8"), torch.bfloat16, memory)
    assert not is_enough_memory(Config(model=stored), torch.bfloat16, memory // 2)


@pytest.mark.usefixtures("little_activations")
@pytest.mark.parametrize(
    ("name", "plain", "modules"),
    [
        ("llama-gqa", "q_proj", ["q_proj"]),
        ("llama-gqa", "layers.0.mlp", ["lm_head", "model.layers.0.mlp"]),
        ("t5-v1.1", "DenseReluDense.wo", None),  # transformers leaves it plain, and says nothing
    ],
)
def test_linears_that_stay_plain_are_planned_so(tmp_path, name, plain, modules):
    write_quantized(name, tmp_path, double_quant=False, plain=plain)
    quantization = QUANTIZATION | {"llm_int8_skip_modules": modules}
    change_config(tmp_path, quantization_config=quantization)
    model = minia3.load_model(tmp_path, dtype=torch.bfloat16)
    vectors = set(minia3.vectors(model).values())
    n_bytes = sum(p.nbytes for p in model.parameters() if p not in vectors)

    planned = dict(info(tmp_path, 1, 32, Devices(1, 1e9, None, None, False)))
    assert planned["weights"] == f"{format_size(n_bytes)} (the base)"
    _, _, packed = find_model(tmp_path)
    assert packed == {f"{linear}.weight" for linear in quantized_linears(model)}
    plan = Plan(model.config, torch.bfloat16, packed=packed)
    assert plan.base.n_bytes == n_bytes
    memory = plan.on_device(1, recipe_shape(1, 32)).total / 0.9
    run = Config(model=str(tmp_path), max_length=32)
    assert is_enough_memory(run, torch.bfloat16, memory + 10)
    assert not is_enough_memory(run, torch.bfloat16, memory - 10)

    (tmp_path / "model.safetensors").unlink()
    _, _, packed_by_config = find_model(tmp_path)
    assert packed_by_config == packed


def test_the_command_that_converts_names_the_one_that_writes_plain_weights(
    tmp_path, capsys, monkeypatch
):
    """It reads no weight before."""
    write_quantized("llama-gqa", tmp_path / "base", double_quant=False)
    monkeypatch.delattr("minia3.checkpoints.load.load_model")
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "converted")]) == 2
    message = "base is stored in nf4, and has no plain weights: `minia3 merge --dequantize` writes"
    assert message in capsys.readouterr().err


def test_a_lora_needs_plain_weights_and_the_message_says_how_to_get_them(tmp_path):
    write_quantized("llama-gqa", tmp_path / "base", double_quant=False)
    model = minia3.load_model(tmp_path / "base")
    with pytest.raises(ValueError, match=r"call minia3\.model\.quantized\.dequantize first$"):
        add_lora(model)
    expected = logits(model, SOURCE, MASK, TARGET)
    dequantize(model, torch.float32)
    for parameter in add_lora(model).values():
        nn.init.normal_(parameter, std=0.1)
    applied = logits(model, SOURCE, MASK, TARGET)
    assert off(applied, expected) > 0.01
    minia3.save_model(minia3.merge(model), tmp_path / "merged")
    assert off(logits(minia3.load_model(tmp_path / "merged"), SOURCE, MASK, TARGET), applied) < 1e-5


@pytest.mark.parametrize("command", ["generate", "predict"])
@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("stored in nf4", "a LoRA needs plain weights, and this base is quantized: load it"),
        ("quantized", "a LoRA needs plain weights, and this base is quantized: load it"),
        ("divided", "a LoRA needs a whole base, and this one is divided (--shard, --offload)\n"),
    ],
)
def test_commands_refuse_a_base_for_a_lora_before_they_read_its_weights(
    tmp_path, capsys, monkeypatch, command, cause, message
):
    base, lora, rows = [str(tmp_path / name) for name in ("base", "lora", "rows.jsonl")]
    make("llama-gqa", **WIDE["llama-gqa"]).save_pretrained(base)
    add_lora(model := minia3.load_model(base))
    save_lora(model, lora)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n')
    words = [command, base, rows, "--adapter", lora]
    if cause == "stored in nf4":
        write_quantized("llama-gqa", tmp_path / "base", double_quant=False)
    elif cause == "quantized":
        words += ["--quantize", "int8"]
    else:
        monkeypatch.setattr("minia3.training.shards.make_shards", lambda *_: "some processes")
    monkeypatch.setattr("minia3.checkpoints.load.load_model", lambda *_, **options: 0 / 0)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_full_fine_tuning_needs_plain_weights_and_the_message_says_how_to_get_them(tmp_path):
    write_quantized("llama-gqa", tmp_path, double_quant=False)
    model = minia3.load_model(tmp_path)
    config = Config(model=str(tmp_path), method="full")
    message = refusal(trainable_parameters, model, config)
    assert message == (
        f"--method full trains plain weights, and {tmp_path} is stored in nf4: give the model that "
        "it was made from"
    )
    dequantize(model, torch.float32)
    assert len(trainable_parameters(model, config)) > 10


@pytest.mark.parametrize(
    ("quantize", "flags"),
    [
        (None, []),
        (None, ["--dequantize"]),
        ("int8", ["--dequantize", "--quantize", "int8"]),
        ("nf4", ["--dequantize", "--quantize", "nf4"]),
    ],
)
def test_a_lora_folds_into_the_weights_that_a_quantized_base_stands_for(tmp_path, quantize, flags):
    """Without --quantize, the base is stored in nf4; with it, as plain weights."""
    folders = [str(tmp_path / name) for name in ("base", "lora", "merged")]
    if quantize is None:
        write_quantized("llama-gqa", tmp_path / "base", double_quant=True)
    else:
        make("llama-gqa", **WIDE["llama-gqa"]).save_pretrained(folders[0])
    model = minia3.load_model(folders[0], quantize=quantize)
    dequantize(model, torch.float32)
    before = logits(model, SOURCE, MASK, TARGET)
    torch.manual_seed(0)
    for parameter in add_lora(model, where=("q", "down")).values():
        nn.init.normal_(parameter, std=0.1)
    save_lora(model, folders[1])
    assert off(logits(model, SOURCE, MASK, TARGET), before) > 0.01

    assert main(["merge", *folders, *flags]) == 0
    merged = minia3.load_model(folders[2])
    dtype = torch.bfloat16 if flags else torch.float32
    for name, parameter in minia3.merge(model).to(dtype).named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_method": "gptq"}, "expected quant_method='bitsandbytes'"),
        ({"bnb_4bit_quant_type": "fp4"}, "expected bnb_4bit_quant_type='nf4'"),
    ],
)
def test_another_quantization_is_refused_by_name(tmp_path, change, expected):
    write_quantized("llama-gqa", tmp_path, double_quant=False)
    change_config(tmp_path, quantization_config=QUANTIZATION | change)
    with pytest.raises(ValueError, match=rf"\A[^\n]*quantization_config=[^\n]*{expected}\Z"):
        minia3.load_model(tmp_path)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax"])
def test_scales_that_are_not_finite_are_found_if_one_asks(tmp_path, part):
    write_quantized("llama-gqa", tmp_path, double_quant=part == "nested_absmax")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[f"{key}.{part}"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    assert minia3.load_model(tmp_path) is not None
    message = refusal(minia3.load_model, tmp_path, check_finite=True)
    assert f"{tmp_path}: {key}.absmax has " in message
    assert "numbers that are NaN or infinite" in message


STATES = {
    "blocks": {"blocksize": 32},
    "half a block in each row": {"shape": [64, 32]},
    "a number as shape": {"shape": 64},
    "words as shape": {"shape": ["a", "b"]},
}
COUNTS = ("half", "blocks", "half a block in each row")  # found before any weight is read


@pytest.mark.parametrize(
    "damage", ["half", "codes", "state", "scales", "fewer scales", "a float as state", *STATES]
)
def test_parts_that_do_not_fit_are_refused_in_one_line(tmp_path, damage):
    write_quantized("llama-gqa", tmp_path, double_quant=False)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.weight"
    state = key + ".quant_state.bitsandbytes__nf4"
    if damage == "half":
        tensors[key] = tensors[key][:100].clone()
    elif damage == "codes":
        del tensors[key]
    elif damage == "scales":
        del tensors[key + ".absmax"]
    elif damage == "fewer scales":
        tensors[key + ".absmax"] = tensors[key + ".absmax"][:-1].clone()
    elif damage == "state":
        tensors[state] = tensors[state][:20].clone()
    elif damage == "a float as state":
        tensors[state] = torch.tensor([0.5])
    else:
        content = json.loads(bytes(tensors[state].tolist())) | STATES[damage]
        tensors[state] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    reason = "expected half as many codes as entries" if damage in COUNTS else ""
    with pytest.raises(ValueError, match=rf"\A[^\n]*{key}[^\n]*{reason}[^\n]*\Z"):
        minia3.load_model(tmp_path)
