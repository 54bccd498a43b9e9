"""Guards minia3/adapters/merge_quantized.py: merged = applied for a quantized base, without new
codes."""

import pytest
import torch
from conftest import logits, make, off, randomize, tokens
from optional import require_bitsandbytes

import minia3
from minia3.adapters.merge import merge_files
from minia3.cli.main import main
from minia3.model.more_vectors import add_vectors, possible_vectors
from minia3.model.quantized import dequantize, quantized_linears

SOURCE = tokens(3, 7)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
TARGET = tokens(3, 5, seed=1)


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa", "qwen2", "qwen3"])
def test_merged_is_applied(tmp_path, name):
    make(name).save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, dtype=torch.float64, n_adapters=3, quantize="int8")
    randomize(model, seed=1)
    before = logits(model, SOURCE, MASK, TARGET, adapter=0)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=2)
    merged = minia3.merge(model, adapter=2)
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-6  # scales are float32
    assert off(before, expected) > 0.1
    assert torch.equal(logits(model, SOURCE, MASK, TARGET, adapter=0), before)

    linears = quantized_linears(model)
    for linear_name, linear in quantized_linears(merged).items():
        assert linear.codes.data_ptr() == linears[linear_name].codes.data_ptr()
    kept = [n for n, vector in minia3.vectors(merged).items() if not (vector == 1).all()]
    is_gated = name != "t5-v1.0"
    assert {vector_name.rpartition(".")[2] for vector_name in kept} == (
        set() if is_gated else {"l_ff"}
    )
    assert merged.n_adapters == 1
    assert all(len(vector) == 1 for vector in minia3.vectors(merged).values())


@pytest.mark.parametrize(
    "plain",
    [{"q", "o"}, {"k", "v", "gate"}, {"up"}, {"down"}, {"up", "down"}],
    ids=lambda kinds: "-".join(sorted(kinds)),
)
@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa", "qwen2"])
def test_merged_is_applied_if_some_linears_are_plain(tmp_path, name, plain):
    """As in a checkpoint of bitsandbytes that names them in llm_int8_skip_modules."""
    make(name).save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, dtype=torch.float64, quantize="int8")
    for linear_name, linear in quantized_linears(model).items():
        place, _, kind = linear_name.rpartition(".")
        if kind in plain:
            setattr(model.get_submodule(place), kind, linear.to_linear(torch.float64))
    add_vectors(model, possible_vectors(model))
    randomize(model, seed=1)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    expected = logits(model, SOURCE, MASK, TARGET)
    merged = minia3.merge(model)
    assert quantized_linears(merged).keys() == quantized_linears(model).keys()
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-6
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    kept = {n for n, vector in minia3.vectors(merged).items() if not (vector == 1).all()}
    has_place = "down" in plain or (name != "t5-v1.0" and "up" not in plain)
    assert {n.rpartition(".")[2] for n in kept} == (set() if has_place else {"l_ff"})


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_merged_model_trains_what_the_model_trains(tmp_path, is_frozen):
    """The biases that a vector scales are new parameters."""
    make("qwen2").save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, quantize="int8")
    if is_frozen:
        minia3.freeze(model)
    merged = minia3.merge(model)
    for name, parameter in merged.named_parameters():
        assert parameter.requires_grad == model.get_parameter(name).requires_grad, name


@pytest.mark.parametrize(
    ("kind", "scale", "bias"),
    [("weight", 2.0, 0.0), ("weight", 0.5, 0.0), ("bias", 1e-6, 2.0), ("bias", 1e-6, -2.0)],
)
def test_a_product_beyond_the_range_is_refused_by_name(tmp_path, kind, scale, bias):
    """Of a scale and its entry, of the new scale and a code, and of the bias."""
    make("qwen2").save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, quantize="int8")
    minia3.vectors(model)["blocks.1.attn.l_k"].data[0, 2] = 3e38
    linear = model.blocks[1].attn.k
    linear.scales.data[2] = scale
    linear.bias.data[2] = bias
    expected = rf"blocks\.1\.attn\.k\.{kind} with the adapter .* not finite in torch.float32"
    with pytest.raises(ValueError, match=expected):
        minia3.merge(model)
    linear.scales.data[2] = 1e-6
    linear.bias.data[2] = 1e-6
    assert quantized_linears(minia3.merge(model))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
def test_names_for_the_rows_leave_the_merged_model_as_it_is(tmp_path, name):
    """Row 0 becomes ones, and an l_ff that could not be folded is there."""
    make(name).save_pretrained(tmp_path)
    model = minia3.load_model(tmp_path, dtype=torch.float64, quantize="int8")
    assert minia3.Adapters(minia3.merge(model)).rows([None]).tolist() == [0]
    expected = logits(randomize(model, seed=1), SOURCE, MASK, TARGET)
    merged = minia3.merge(model)
    if name == "t5-v1.0":
        advice = r"holds l_ff.* call minia3\.model\.quantized\.dequantize and then minia3\.merge$"
        minia3.save_adapter(randomize(minia3.load_model(tmp_path), seed=2), tmp_path / "other")
        with pytest.raises(ValueError, match=advice):
            minia3.Adapters(merged)
        with pytest.raises(ValueError, match=advice):
            minia3.load_adapter(merged, tmp_path / "other")
        assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-6
        dequantize(merged, torch.float64)
        merged = minia3.merge(merged)
    adapters = minia3.Adapters(merged)
    found = logits(merged, SOURCE, MASK, TARGET, adapter=adapters.rows([None] * len(SOURCE)))
    assert off(found, expected) < 1e-6


# From file to file, with plain weights


def adapter_and_base(folder, name, quantize):
    """Write a checkpoint and an adapter, and return the model to which both belong."""
    wide = {"t5-v1.0": {"d_model": 64, "d_kv": 16, "d_ff": 128}}
    make(name, **wide.get(name, {"hidden_size": 64, "intermediate_size": 128})).save_pretrained(
        folder / "base"
    )
    model = minia3.load_model(folder / "base", dtype=torch.float64, quantize=quantize)
    randomize(model, seed=1)
    minia3.save_adapter(model, folder / "adapter")
    minia3.load_adapter(model, folder / "adapter")
    return model


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa", "qwen2"])
def test_what_is_dequantized_and_merged_is_what_was_trained(tmp_path, name, quantize):
    if quantize == "nf4":
        require_bitsandbytes()
    model = adapter_and_base(tmp_path, name, quantize)
    expected = logits(model, SOURCE, MASK, TARGET)
    options = {"dtype": torch.float64, "quantize": quantize}
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", **options)
    merged = minia3.load_model(tmp_path / "merged")
    assert not quantized_linears(merged)
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-6
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain", dtype=torch.float64)
    plain = minia3.load_model(tmp_path / "plain")
    assert off(logits(plain, SOURCE, MASK, TARGET), expected) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_writes_in_bfloat16_what_a_run_in_another_dtype_has_trained(
    tmp_path, monkeypatch, dtype
):
    """The files are in float32, which is the default. The result has several shards."""
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 60_000)
    adapter_and_base(tmp_path, "t5-v1.0", "int8")
    run_dtype = getattr(torch, dtype)
    trained = minia3.load_model(tmp_path / "base", dtype=run_dtype, quantize="int8")
    minia3.load_adapter(trained, tmp_path / "adapter")
    dequantize(trained, run_dtype)
    minia3.save_model(minia3.merge(trained).bfloat16(), tmp_path / "expected")

    folders = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    flags = [] if dtype == "float32" else ["--dtype", dtype]
    assert main(["merge", *folders, "--quantize", "int8", "--dequantize", *flags]) == 0
    expected_files = sorted((tmp_path / "expected").iterdir())
    assert len(expected_files) > 5
    assert len(list((tmp_path / "merged").iterdir())) == len(expected_files)
    for path in expected_files:
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_quantized_checkpoint_is_not_written(tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *folders, "--quantize", "int8"]) == 2
    assert "add --dequantize, which writes bfloat16" in capsys.readouterr().err


def test_a_plain_base_is_not_dequantized(tmp_path, capsys):
    """Without the --quantize of the run, the adapter was silently folded into other weights."""
    adapter_and_base(tmp_path, "llama-gqa", "int8")
    folders = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *folders, "--dequantize"]) == 2
    found = f"merge --dequantize: {folders[0]} is not stored in nf4: add the --quantize of the run"
    assert found in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_what_saving_a_quantized_model_advises_keeps_all_vectors(tmp_path, name):
    model = adapter_and_base(tmp_path, name, "int8")
    expected = logits(model, SOURCE, MASK, TARGET)
    merged = minia3.merge(model)
    with pytest.raises(ValueError, match=r"quantized\.dequantize and then minia3\.merge$"):
        minia3.save_model(merged, tmp_path / "saved")
    dequantize(merged, torch.float64)
    minia3.save_model(minia3.merge(merged), tmp_path / "saved")
    found = logits(minia3.load_model(tmp_path / "saved"), SOURCE, MASK, TARGET)
    assert off(found, expected) < 1e-6
