"""Guards adapters: PEFT's folders come in and go out with the same logits on both sides, what is no (IA)^3 adapter of
the model is refused, and a row folded into the weights computes what the row applied computes."""

import json
import warnings

import pytest
import torch
from conftest import PEERS, T5_PEERS, Peer, logits, make, off, randomize, rms, tokens, with_peft
from safetensors.torch import load_file, save_file

import minia3
from minia3.adapters import load_adapter, merge, peft_table, save_adapter

SOURCE, TARGET = tokens(3, 7), tokens(3, 5, seed=1)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
WITH_ALL = ["t5-v1.0", "t5-v1.1", "t5-wide", "t5-deep-decoder", "llama-gqa", "llama3", "mistral"]


@pytest.fixture
def peft_folder(tmp_path):
    """name -> PEFT's model with random vectors, and the folder where it has saved them."""

    def get(name, **options):
        model = with_peft(name, **options)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return get


def change(folder, edit):
    """Apply `edit` to the tensors of an adapter's folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


# PEFT's folders


@pytest.mark.parametrize("name", [*WITH_ALL, "mt5"])
def test_an_adapter_of_peft_gives_the_logits_of_peft(loaded, peft_folder, name):
    theirs, folder = peft_folder(name)
    model = loaded(name, n_adapters=3, seed=1)
    others = {n: v.detach().clone() for n, v in minia3.vectors(model).items()}
    load_adapter(model, folder, adapter=1)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=1), expected) < 1e-5
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=0), expected) > 1e-2
    for n, vector in minia3.vectors(model).items():
        assert torch.equal(vector[[0, 2]], others[n][[0, 2]]), "other rows stay as they are"


@pytest.mark.parametrize("name", [*WITH_ALL, "mt5"])
def test_our_adapter_gives_the_same_logits_in_peft_without_a_warning(loaded, tmp_path, name):
    import peft

    model = loaded(name, n_adapters=3, seed=2)
    save_adapter(model, tmp_path, adapter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # transformers' and PEFT's own affair
        theirs = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
    assert len([n for n, _ in theirs.named_parameters() if "ia3_l" in n]) == len(minia3.vectors(model))
    found = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=2), found) < 1e-5


@pytest.mark.parametrize("name", WITH_ALL)
def test_our_folder_is_what_peft_itself_writes(loaded, tmp_path, peft_folder, name):
    _, folder = peft_folder(name)
    theirs = load_file(folder / "adapter_model.safetensors")
    model = loaded(name)
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    expected = json.loads((folder / "adapter_config.json").read_text())
    for key in ("peft_type", "task_type", "fan_in_fan_out", "inference_mode", "init_ia3_weights", "modules_to_save"):
        assert config[key] == expected[key]
    for key in ("target_modules", "feedforward_modules"):
        assert sorted(config[key]) == sorted(expected[key])


@pytest.mark.parametrize("name", ["t5-v1.1", "t5-wide", "llama-odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_back_bit_for_bit_whatever_the_dtype_of_the_base(loaded, tmp_path, name, dtype):
    model, again = loaded(name, n_adapters=2, seed=3, dtype=dtype), loaded(name, n_adapters=2, dtype=dtype)
    save_adapter(model, tmp_path, adapter=0)
    load_adapter(again, tmp_path, adapter=1)
    for n, vector in minia3.vectors(again).items():
        assert torch.equal(vector[1], minia3.vectors(model)[n][0])
        assert torch.equal(vector[0], torch.ones_like(vector[0]))


def test_vectors_on_the_output_of_wi_1_are_those_on_the_input_of_wo(loaded, peft_folder):
    """T-Few's place on a gated T5, and PEFT's default for mT5."""
    options = {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []}
    theirs, folder = peft_folder("t5-v1.1", **options)
    assert any(n.endswith("wi_1.ia3_l") for n in load_file(folder / "adapter_model.safetensors"))
    model = loaded("t5-v1.1")
    load_adapter(model, folder)
    expected = Peer("t5-v1.1", None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5-v1.0", {"target_modules": ["k", "v"], "feedforward_modules": []}),
        ("t5-v1.0", {"target_modules": ["EncDecAttention.v", "wo"], "feedforward_modules": ["wo"]}),
        ("llama-gqa", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
def test_vectors_that_an_adapter_does_not_have_become_ones(loaded, peft_folder, name, options):
    theirs, folder = peft_folder(name, **options)
    model = loaded(name, seed=1)
    load_adapter(model, folder)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_an_adapter_is_read_from_its_folder_a_bin_or_its_file_alone(loaded, peft_folder, name):
    _, folder = peft_folder(name)
    expected = loaded(name)
    load_adapter(expected, folder)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    from_file, from_bin, from_bin_folder = loaded(name), loaded(name), loaded(name)
    load_adapter(from_file, str(file))
    load_adapter(from_bin, folder / "adapter_model.bin")
    file.unlink()
    load_adapter(from_bin_folder, folder)
    for model in (from_file, from_bin, from_bin_folder):
        assert all(torch.equal(v, minia3.vectors(expected)[n]) for n, v in minia3.vectors(model).items())


def test_the_tables_have_one_name_of_peft_for_each_vector_and_one_more_for_a_gated_ones_hidden_units(loaded):
    for name in PEERS:
        model = loaded(name)
        values = list(peft_table(model).values())
        assert set(values) == set(minia3.vectors(model))
        twice = {n for n in values if values.count(n) == 2}
        gated = name in T5_PEERS and model.config.gated
        assert twice == {n for n in minia3.vectors(model) if gated and n.endswith("l_ff")}


# What is refused


def refused(model, path, **options):
    before = {n: v.detach().clone() for n, v in minia3.vectors(model).items()}
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at it)
        load_adapter(model, path, **options)
    assert all(torch.equal(v, before[n]) for n, v in minia3.vectors(model).items()), "nothing is half loaded"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_named_all_at_once(loaded, peft_folder):
    _, folder = peft_folder("t5-v1.0")
    prefix = "base_model.model.encoder.block"

    def edit(tensors):
        tensors[f"{prefix}.0.layer.0.SelfAttention.k.ia3_l"] = torch.ones(1, 24)
        tensors[f"{prefix}.1.layer.0.SelfAttention.v.ia3_l"] = torch.ones(25, 1)
        tensors[f"{prefix}.1.layer.1.DenseReluDense.wo.ia3_l"] = torch.ones(40, 1)
        tensors[f"{prefix}.2.layer.0.SelfAttention.k.ia3_l"] = torch.ones(24, 1)
        tensors[f"{prefix}.0.layer.0.SelfAttention.q.ia3_l"] = torch.ones(24, 1)
        tensors[f"{prefix}.0.layer.1.DenseReluDense.wi_1.ia3_l"] = torch.ones(40, 1)
        tensors[f"{prefix}.0.layer.0.SelfAttention.v.ia3_l"][3] = float("nan")
        tensors[f"{prefix}.1.layer.0.SelfAttention.k.ia3_l"][3] = float("inf")

    change(folder, edit)
    message = refused(loaded("t5-v1.0", seed=1), folder)
    assert "0.layer.0.SelfAttention.k.ia3_l has shape (1, 24), expected (24, 1)" in message
    assert "1.layer.0.SelfAttention.v.ia3_l has shape (25, 1), expected (24, 1)" in message
    assert "1.layer.1.DenseReluDense.wo.ia3_l has shape (40, 1), expected (1, 40)" in message
    assert "2.layer.0.SelfAttention.k.ia3_l (24, 1) has no place in this model" in message
    assert "0.layer.0.SelfAttention.q.ia3_l (24, 1) has no place" in message
    assert "wi_1.ia3_l (40, 1) has no place in this model" in message, "T5 v1.0 has no wi_1"
    assert "0.layer.0.SelfAttention.v.ia3_l has entries that are not finite" in message
    assert "1.layer.0.SelfAttention.k.ia3_l has entries that are not finite" in message


def test_vectors_for_both_sides_of_one_place_are_refused(loaded, peft_folder):
    _, folder = peft_folder("t5-v1.1")
    change(
        folder,
        lambda x: x.update({"base_model.model.encoder.block.0.layer.1.DenseReluDense.wi_1.ia3_l": torch.ones(40, 1)}),
    )
    assert "scales what another vector of the file scales already" in refused(loaded("t5-v1.1"), folder)


def test_an_adapter_of_another_architecture_or_size_is_refused(loaded, peft_folder):
    _, folder = peft_folder("llama-gqa")
    assert "has no place in this model" in refused(loaded("t5-v1.0"), folder)
    assert "k_proj.ia3_l has shape (12, 1), expected (24, 1)" in refused(loaded("llama-mha"), folder)


def test_other_kinds_of_adapters_are_refused(loaded, tmp_path):
    import peft

    lora = peft.get_peft_model(make("llama-gqa"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]))
    lora.save_pretrained(tmp_path)
    assert "expected a PEFT adapter of type IA3, found 'LORA'" in refused(loaded("llama-gqa"), tmp_path)
    assert "lora_A.weight" in refused(loaded("llama-gqa"), tmp_path / "adapter_model.safetensors")


def test_whole_modules_beside_the_vectors_are_refused(loaded, peft_folder):
    _, folder = peft_folder("t5-v1.1", modules_to_save=["lm_head"])
    assert "modules_to_save=['lm_head']" in refused(loaded("t5-v1.1"), folder)


def test_what_is_no_adapter_is_refused(loaded, tmp_path, peft_folder):
    model = loaded("t5-v1.0")
    assert refused(model, tmp_path) == f"{tmp_path / 'adapter_config.json'}: not found"
    assert "not found; expected a PEFT adapter" in refused(model, tmp_path / "nowhere")
    _, folder = peft_folder("t5-v1.0")
    (folder / "adapter_config.json").write_text("{}")
    assert "of type IA3, found None" in refused(model, folder)
    save_file({}, folder / "adapter_model.safetensors")
    assert "there are no vectors in it" in refused(model, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    assert "damaged" in refused(model, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: not found" in refused(model, folder)


@pytest.mark.parametrize("adapter", [-1, 2])
def test_a_row_that_is_not_there_is_refused(loaded, tmp_path, adapter):
    model = loaded("t5-v1.0", n_adapters=2)
    for call in (lambda: save_adapter(model, tmp_path / "x", adapter), lambda: merge(model, adapter)):
        with pytest.raises(ValueError, match="out of range: the model has rows 0 to 1"):
            call()
    assert "out of range" in refused(model, tmp_path, adapter=adapter)
    assert not (tmp_path / "x").exists()


def test_another_name_of_the_base_is_a_warning_and_another_spelling_is_none(loaded, tmp_path):
    model = loaded("t5-v1.0")
    for saved, name, warns in (
        ("t5-base", "t5-large", True),
        ("t5-base", "t5-base", False),
        ("google-t5/t5-base", "t5-base", False),
        (str(model.name_or_path), str(model.name_or_path), False),
        ("tiny-t5", "tiny-t5", False),
    ):
        model.name_or_path = saved
        save_adapter(model, tmp_path)
        model.name_or_path = name
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load_adapter(model, tmp_path)
        assert [str(w.message) for w in seen] == (
            [f"{tmp_path} was trained on google-t5/t5-base, and this model is t5-large"] if warns else []
        )


def test_the_name_that_peft_needs_to_find_the_base_is_written(loaded, tmp_path):
    model = loaded("t5-v1.0")
    for name, expected in (("flan-t5-base", "google/flan-t5-base"), ("some/one", "some/one"), ("/a/b", "/a/b")):
        model.name_or_path = name
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


# Merging


def extreme(model):
    """Vectors with zeros, negative, huge and tiny entries, other ones in each row."""
    with torch.no_grad():
        for i, vector in enumerate(minia3.vectors(randomize(model, 5)).values()):
            for row in range(len(vector)):
                vector[row, (i + row) % 3 :: 3] *= torch.tensor([0.0, -1.0, 30.0, 1e-4])[(i + row) % 4]
    return model


@pytest.mark.parametrize("name", PEERS)
def test_a_merged_row_is_the_row_applied(loaded, name):
    model = loaded(name, n_adapters=3, seed=5)
    for adapter in (2, 0):
        merged = merge(model, adapter)
        assert merged.n_adapters == 1
        expected = logits(model, SOURCE, MASK, TARGET, adapter=adapter)
        assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-5
        assert all(torch.equal(v, torch.ones_like(v[:1])) for v in minia3.vectors(merged).values())
    assert off(logits(merge(model), SOURCE, MASK, TARGET), expected) < 1e-5, "row 0, if none is named"


@pytest.mark.parametrize("name", PEERS)
def test_merging_is_exact_whatever_the_entries(loaded, name):
    """In float64, since huge entries make huge scores, whose rounding in float32 the softmax would show."""
    model = extreme(loaded(name, n_adapters=2).double())
    for adapter in (0, 1):
        expected = logits(model, SOURCE, MASK, TARGET, adapter=adapter)
        assert off(logits(merge(model, adapter), SOURCE, MASK, TARGET), expected) < 1e-11


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_a_merged_row_is_rounded_once_in_bfloat16(loaded, name):
    """Applied or merged, the distance to the exact logits of the same bfloat16 weights is that of rounding."""
    model = randomize(loaded(name, n_adapters=2, dtype=torch.bfloat16), 5)
    exact = randomize(loaded(name, n_adapters=2, dtype=torch.bfloat16).double(), 5)
    expected = logits(exact, SOURCE, MASK, TARGET, adapter=1)
    applied = rms(logits(model, SOURCE, MASK, TARGET, adapter=1) - expected)
    merged = rms(logits(merge(model, 1), SOURCE, MASK, TARGET) - expected)
    assert 0 < merged < 1.5 * applied
    assert merged < 0.05 * rms(expected)
    block, folded = ((m if name == "llama-gqa" else m.encoder).blocks[0] for m in (model, merge(model, 1)))
    assert torch.equal(
        folded.attn.k.weight, (block.attn.k.weight.float() * block.attn.l_k.scale[1][:, None]).bfloat16()
    )
    assert torch.equal(
        folded.attn.v.weight, (block.attn.v.weight.float() * block.attn.l_v.scale[1][:, None]).bfloat16()
    )
    assert torch.equal(folded.ffn.down.weight, (block.ffn.down.weight.float() * block.ffn.l_ff.scale[1]).bfloat16())


@pytest.mark.parametrize("name", ["t5-deep-decoder", "llama-tied"])
def test_merging_leaves_the_model_as_it_is_and_shares_what_does_not_change(loaded, name):
    model = randomize(loaded(name, n_adapters=2), 5)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    merged = merge(model, 1)
    assert model.n_adapters == 2
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    changed = (".k.weight", ".v.weight", ".down.weight", ".scale")
    ours = dict(model.named_parameters())
    for n, parameter in merged.named_parameters():
        assert (parameter.data_ptr() == ours[n].data_ptr()) == (not n.endswith(changed)), n
        assert parameter is not ours[n]
    with torch.no_grad():
        for n, parameter in merged.named_parameters():
            if n.endswith(changed):
                parameter.zero_()
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-mha"])
def test_merging_keeps_the_mode_and_what_is_frozen(loaded, name):
    model = loaded(name)
    minia3.freeze(model)
    for mode in (True, False):
        merged = merge(model.train(mode))
        assert {module.training for module in merged.modules()} == {mode}
    trains = {n for n, p in merged.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.scale" for n in minia3.vectors(merged)}
    assert {n for n, p in merge(loaded(name)).named_parameters() if not p.requires_grad} == set()


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "t5-wide", "llama-gqa", "llama3"])
def test_a_merged_model_is_saved_and_loaded_as_any_other_and_transformers_agrees(loaded, tmp_path, name):
    import transformers

    model = randomize(loaded(name, n_adapters=2), 5)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=1)
    minia3.save_model(merge(model, 1), tmp_path)
    assert off(logits(minia3.load_model(tmp_path), SOURCE, MASK, TARGET), expected) < 1e-5
    kind = transformers.AutoModelForSeq2SeqLM if name in T5_PEERS else transformers.AutoModelForCausalLM
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert off(Peer(name, None, theirs.eval()).logits(SOURCE, MASK, TARGET), expected) < 1e-5


def test_merging_ones_changes_no_bit(loaded):
    model = loaded("t5-v1.1", dtype=torch.bfloat16)
    merged = merge(model)
    assert all(torch.equal(value, merged.state_dict()[n]) for n, value in model.state_dict().items())


def test_a_merged_model_can_be_tuned_and_merged_again(loaded):
    model = randomize(loaded("llama-gqa"), 5)
    twice = randomize(merge(model), 6)
    expected = logits(twice, SOURCE, MASK, TARGET)
    assert off(logits(merge(twice), SOURCE, MASK, TARGET), expected) < 1e-5
