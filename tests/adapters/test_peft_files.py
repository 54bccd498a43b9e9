"""Guards adapters on disk. PEFT's folders are read and written with the same logits on both sides,
T-Few's files are read, and a file that is not an (IA)^3 adapter, or does not fit the model, is
refused with what was found."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import T5_PEERS, Peer, logits, make, off, tokens, with_peft
from safetensors.torch import load_file, save_file

import minia3
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import load_adapter, save_adapter
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model

SOURCE = tokens(3, 7)
TARGET = tokens(3, 5, seed=1)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
WITH_ALL = ["t5-v1.0", "t5-v1.1", "t5-wide", "t5-deep-decoder", "llama-gqa", "llama3", "mistral"]


@pytest.fixture
def peft_folder(tmp_path):
    """Return a function that makes PEFT's model with random vectors, and saves them in a folder."""

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
    before = {n: v.detach().clone() for n, v in minia3.vectors(model).items()}
    load_adapter(model, folder, adapter=1)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=1), expected) < 1e-5
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=0), expected) > 1e-2
    for n, vector in minia3.vectors(model).items():
        assert torch.equal(vector[[0, 2]], before[n][[0, 2]]), "other rows stay as they are"


@pytest.mark.parametrize("name", [*WITH_ALL, "mt5"])
def test_our_adapter_gives_the_same_logits_in_peft_without_a_warning(loaded, tmp_path, name):
    import peft

    model = loaded(name, n_adapters=3, seed=2)
    save_adapter(model, tmp_path, adapter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing.*"
        )  # transformers' and PEFT's own affair
        theirs = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
    assert len([n for n, _ in theirs.named_parameters() if "ia3_l" in n]) == len(
        minia3.vectors(model)
    )
    found = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=2), found) < 1e-5


@pytest.mark.parametrize("name", WITH_ALL)
def test_our_folder_equals_the_folder_that_peft_writes(loaded, tmp_path, peft_folder, name):
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
    for key in (
        "peft_type",
        "task_type",
        "fan_in_fan_out",
        "inference_mode",
        "init_ia3_weights",
        "modules_to_save",
    ):
        assert config[key] == expected[key]
    for key in ("target_modules", "feedforward_modules"):
        assert sorted(config[key]) == sorted(expected[key])


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "mt5", "llama-gqa"])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"safe_serialization": False}, {"selected_adapters": ["ours"]}]
)
def test_our_adapter_can_be_trained_further_in_peft_and_comes_back(
    loaded, tmp_path, name, partial, options
):
    import peft

    vectors = {
        n: v[0]
        for n, v in minia3.vectors(loaded(name, seed=2)).items()
        if not (partial and "1.attn" in n)
    }
    write_adapter(tmp_path / "ours", vectors)
    adapter = "ours" if "selected_adapters" in options else "default"
    theirs = peft.PeftModel.from_pretrained(
        make(name), tmp_path / "ours", adapter_name=adapter, is_trainable=True
    )
    learning = [p for p in theirs.parameters() if p.requires_grad]
    assert len(learning) == len(vectors)
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(3):
        labels = {"labels": TARGET} if name in T5_PEERS else {"labels": SOURCE}
        theirs(input_ids=SOURCE, **labels).loss.backward()
        optimizer.step()
    expected = Peer(name, None, theirs.eval()).logits(SOURCE, MASK, TARGET)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    folder = tmp_path / "theirs" / ("ours" if "selected_adapters" in options else "")
    files = {path.name for path in folder.iterdir()}
    assert ("adapter_model.bin" in files) == ("safe_serialization" in options)
    model = loaded(name, n_adapters=2)
    load_adapter(model, tmp_path / "ours", adapter=0)
    load_adapter(model, folder, adapter=1)
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=1), expected) < 1e-5
    assert off(logits(model, SOURCE, MASK, TARGET, adapter=0), expected) > 1e-3, "it has learned"
    peft.PeftModel.from_pretrained(make(name), folder)  # what PEFT wrote of ours, PEFT reads


def test_a_large_partial_adapter_is_read_from_what_peft_saves_of_it(tmp_path):
    """Older versions of PEFT shorten a list of many linears, but no expression: its issue 2429."""
    import peft

    vectors = {}
    for i in range(12):
        vectors[f"blocks.{i}.ffn.l_ff"] = torch.full((40,), 1.5)
        if i != 5:
            vectors[f"blocks.{i}.attn.l_k"] = torch.full((12,), 0.5)
            vectors[f"blocks.{i}.attn.l_v"] = torch.full((12,), 2.0)
    write_adapter(tmp_path / "ours", vectors)
    raw = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert isinstance(raw["target_modules"], str)

    def load(folder):
        base = make("llama-gqa", num_hidden_layers=12)
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)

    load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = read_adapter(tmp_path / "theirs").vectors
    assert {n: v.tolist() for n, v in again.items()} == {n: v.tolist() for n, v in vectors.items()}
    n_vectors = sum("ia3_l" in name for name in load(tmp_path / "theirs").state_dict())
    assert n_vectors == len(vectors)


def test_keys_that_peft_writes_hold_no_name_of_an_adapter(peft_folder):
    theirs, folder = peft_folder("t5-v1.0")
    assert any(".ia3_l.default" in n for n in theirs.state_dict())
    assert not [n for n in load_file(folder / "adapter_model.safetensors") if "default" in n]


@pytest.mark.parametrize("name", [*WITH_ALL, "mt5"])
@pytest.mark.parametrize(
    "changes",
    [
        {"feedforward_modules": None, "target_modules": None},
        {
            "target_modules": ".*(k|v|wo|wi_1|proj)",
            "auto_mapping": {"a": []},
            "peft_version": "9",
            "inference_mode": False,
        },
        {"base_model_name_or_path": ["no", "text"]},
    ],
)
def test_nothing_in_a_config_matters_but_the_kind_and_the_modules(
    loaded, peft_folder, name, changes
):
    """Old PEFT left feedforward_modules out, a regex stands for a list, new PEFT says more."""
    theirs, folder = peft_folder(name)
    raw = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in raw.items() if value is not None})
    )
    model = loaded(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, folder)
    assert (
        off(
            logits(model, SOURCE, MASK, TARGET),
            Peer(name, None, theirs).logits(SOURCE, MASK, TARGET),
        )
        < 1e-5
    )


def test_vectors_on_the_output_of_wi_1_are_those_on_the_input_of_wo(loaded, peft_folder):
    """T-Few's place on a gated T5, and PEFT's default for mT5."""
    options = {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []}
    theirs, folder = peft_folder("t5-v1.1", **options)
    assert any(n.endswith("wi_1.ia3_l") for n in load_file(folder / "adapter_model.safetensors"))
    model = loaded("t5-v1.1")
    load_adapter(model, folder)
    expected = Peer("t5-v1.1", None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


PARTIAL = [
    ("t5-v1.0", ["k", "v"], []),
    ("t5-v1.0", ["EncDecAttention.v", "wo"], ["wo"]),
    ("t5-v1.0", r".*\.block\.1\..*\.(k|v)", []),
    ("t5-wide", r"encoder\..*\.(k|wo)", ["wo"]),
    ("mt5", r".*\.1\.layer\.\d\..*(k|wi_1)", []),
    ("llama-gqa", ["down_proj"], ["down_proj"]),
    ("llama-gqa", r".*\.layers\.1\..*(k_proj|down_proj)", r".*down_proj"),
]


@pytest.mark.parametrize(("name", "targets", "inputs"), PARTIAL)
def test_vectors_that_an_adapter_does_not_have_become_ones(
    loaded, peft_folder, name, targets, inputs
):
    theirs, folder = peft_folder(name, target_modules=targets, feedforward_modules=inputs)
    model = loaded(name, seed=1)
    load_adapter(model, folder)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize(("name", "targets", "inputs"), PARTIAL)
def test_an_adapter_without_some_vectors_is_written_without_them(
    peft_folder, tmp_path, name, targets, inputs
):
    import peft

    theirs, folder = peft_folder(name, target_modules=targets, feedforward_modules=inputs)
    adapter = read_adapter(folder)
    write_adapter(tmp_path / "ours", *adapter)
    again = read_adapter(tmp_path / "ours")
    assert {n: v.tolist() for n, v in again.vectors.items()} == {
        n: v.tolist() for n, v in adapter.vectors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        ours = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert len([n for n in ours.state_dict() if "ia3_l" in n]) == len(
        [n for n in theirs.state_dict() if "ia3_l" in n]
    )
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(Peer(name, None, ours).logits(SOURCE, MASK, TARGET), expected) < 1e-5


# T-Few's files


def t_few(n_layers, d_kv, d_ff, seed=0):
    """Return what T-Few's finish.pt holds for a gated T5: vectors (d, 1)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for stack, attentions in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        for i in range(n_layers):
            widths = {}
            for j, attention in enumerate(attentions):
                widths |= {f"layer.{j}.{attention}.k": d_kv, f"layer.{j}.{attention}.v": d_kv}
            widths[f"layer.{len(attentions)}.DenseReluDense.wi_1"] = d_ff
            for site, d in widths.items():
                vector = 1 + 0.5 * torch.randn(d, 1, generator=generator)
                tensors[f"{stack}.block.{i}.{site}.multi_lora_b"] = torch.nn.Parameter(vector)
    return tensors


@pytest.mark.parametrize("base", ["models/base", Path("models/base")])
def test_the_base_of_an_adapter_may_be_a_path(base, tmp_path):
    write_adapter(tmp_path, {"blocks.0.attn.l_k": torch.ones(4)}, base)
    assert read_adapter(tmp_path).base == "models/base"


def test_t0_3b_s_vectors_are_converted_without_the_model(tmp_path):
    tensors = t_few(24, 2048, 5120)
    assert (len(tensors), sum(x.numel() for x in tensors.values())) == (192, 540_672)
    torch.save(tensors, tmp_path / "finish.pt")
    vectors, base = read_adapter(tmp_path / "finish.pt")
    assert base is None
    write_adapter(tmp_path / "peft", vectors, "t0-3b")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert (len(written), sum(x.numel() for x in written.values())) == (192, 540_672)
    for theirs, x in tensors.items():
        name = f"base_model.model.{theirs.replace('multi_lora_b', 'ia3_l').replace('wi_1', 'wo')}"
        expected = x.T if "wi_1" in theirs else x
        assert torch.equal(written[name], expected)
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "bigscience/T0_3B"
    assert (raw["target_modules"], raw["feedforward_modules"]) == (["k", "v", "wo"], ["wo"])
    model = build_model(KNOWN_MODELS["t0-3b"].config)
    assert {n: tuple(v[0].shape) for n, v in minia3.vectors(model).items()} == {
        n: tuple(v.shape) for n, v in read_adapter(tmp_path / "peft").vectors.items()
    }


def test_t_few_s_vectors_scale_what_t_few_scaled(loaded, tmp_path):
    """By hand, on the outputs of k, v and wi_1. PEFT agrees about the converted folder."""
    import peft

    tensors = t_few(2, 24, 40)
    torch.save(tensors, tmp_path / "finish.pt")
    scaled = make("t5-v1.1")
    for name, x in tensors.items():
        module = scaled.get_submodule(name.removesuffix(".multi_lora_b"))
        module.register_forward_hook(lambda module, inputs, out, x=x: out * x.flatten())
    expected = Peer("t5-v1.1", None, scaled).logits(SOURCE, MASK, TARGET)
    write_adapter(tmp_path / "peft", read_adapter(tmp_path / "finish.pt").vectors)
    for path in (tmp_path / "finish.pt", tmp_path / "peft"):
        model = loaded("t5-v1.1")
        load_adapter(model, path)
        assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5
    theirs = peft.PeftModel.from_pretrained(make("t5-v1.1"), tmp_path / "peft").eval()
    assert off(Peer("t5-v1.1", None, theirs).logits(SOURCE, MASK, TARGET), expected) < 1e-5


def test_a_file_of_t_few_that_holds_more_than_vectors_is_refused(tmp_path):
    for name, value, message in (
        (
            "encoder.block.0.layer.0.SelfAttention.k.multi_lora_a",
            torch.ones(1, 8),
            r"multi_lora_a \(1, 8\) has no place",
        ),
        (
            "encoder.block.0.layer.1.DenseReluDense.wi_1.multi_lora_b",
            torch.ones(1, 8),
            r"wi_1.multi_lora_b \(1, 8\) scales the inputs of its linear, not the outputs",
        ),
        (
            "encoder.block.0.layer.1.DenseReluDense.wi_0.multi_lora_b",
            torch.ones(8, 1),
            "has no place",
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.k.multi_lora_b",
            print,
            "damaged, or more than tensors",
        ),
    ):
        torch.save({name: value}, tmp_path / "finish.pt")
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "finish.pt")


# What is read and written


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_an_adapter_is_read_from_a_folder_a_bin_file_or_a_safetensors_file(
    loaded, peft_folder, name
):
    _, folder = peft_folder(name)
    expected = loaded(name)
    load_adapter(expected, folder)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    from_file = loaded(name)
    from_bin = loaded(name)
    from_bin_folder = loaded(name)
    load_adapter(from_file, str(file))
    load_adapter(from_bin, folder / "adapter_model.bin")
    file.unlink()
    load_adapter(from_bin_folder, folder)
    for model in (from_file, from_bin, from_bin_folder):
        assert all(
            torch.equal(v, minia3.vectors(expected)[n]) for n, v in minia3.vectors(model).items()
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_vectors_of_any_float_are_read_as_float32(loaded, tmp_path, dtype):
    save_adapter(loaded("llama-gqa", seed=1), tmp_path)
    change(tmp_path, lambda tensors: tensors.update({n: x.to(dtype) for n, x in tensors.items()}))
    expected = minia3.vectors(loaded("llama-gqa", seed=1))
    found = read_adapter(tmp_path).vectors
    assert found.keys() == expected.keys()
    for name, vector in found.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, expected[name][0].to(dtype).float())


def test_finite_entries_with_an_infinite_sum_are_read(tmp_path):
    vectors = {
        "blocks.0.attn.l_k": torch.full((4,), 3e38),
        "blocks.0.attn.l_v": torch.tensor([3e38, -3e38] * 2),
    }
    write_adapter(tmp_path, vectors)
    assert {n: x.tolist() for n, x in read_adapter(tmp_path).vectors.items()} == {
        n: x.tolist() for n, x in vectors.items()
    }


# What is refused


def refused(model, path, **options):
    before = {n: v.detach().clone() for n, v in minia3.vectors(model).items()}
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at it)
        load_adapter(model, path, **options)
    assert all(torch.equal(v, before[n]) for n, v in minia3.vectors(model).items()), (
        "nothing is half loaded"
    )
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_that_are_not_vectors_are_counted_and_the_first_are_named(
    loaded, peft_folder, monkeypatch
):
    _, folder = peft_folder("t5-v1.0")
    prefix = "base_model.model.encoder.block"

    def edit(tensors):
        tensors[f"{prefix}.0.layer.0.SelfAttention.k.ia3_l"] = torch.ones(1, 24)
        tensors[f"{prefix}.0.layer.1.DenseReluDense.wo.ia3_l"] = torch.ones(40, dtype=torch.int64)[
            None
        ]
        tensors[f"{prefix}.1.layer.1.DenseReluDense.wo.ia3_l"] = torch.ones(40, 1)
        tensors[f"{prefix}.0.layer.0.SelfAttention.r.ia3_l"] = torch.ones(24, 1)
        tensors[f"{prefix}.0.layer.1.DenseReluDense.wi_2.ia3_l"] = torch.ones(40, 1)
        tensors[f"{prefix}.01.layer.0.SelfAttention.v.ia3_l"] = torch.ones(24, 1)
        tensors[f"{prefix}.0.layer.0.SelfAttention.v.ia3_l"][3:] = float("nan")
        tensors[f"{prefix}.1.layer.0.SelfAttention.k.ia3_l"][5] = float("-inf")
        tensors[f"{prefix}.1.layer.0.SelfAttention.v.ia3_l"] = torch.full(
            (24, 1), 1e300, dtype=torch.float64
        )

    change(folder, edit)
    message = refused(loaded("t5-v1.0", seed=1), folder)
    assert message.startswith(f"{folder / 'adapter_model.safetensors'}: not an (IA)^3 adapter: ")
    assert message.endswith("; and 7 more")
    assert message.count(prefix) == 2
    monkeypatch.setattr("minia3.adapters.peft_files.N_SHOWN", 9)
    message = refused(loaded("t5-v1.0", seed=1), folder)
    assert sorted(message.partition("adapter: ")[2].split("; ")) == [
        f"{prefix}.{problem}"
        for problem in (
            "0.layer.0.SelfAttention.k.ia3_l (1, 24) scales the inputs of its linear, "
            "not the outputs",
            "0.layer.0.SelfAttention.r.ia3_l (24, 1) has no place in T5 or LLaMA",
            "0.layer.0.SelfAttention.v.ia3_l is nan at 3",
            "0.layer.1.DenseReluDense.wi_2.ia3_l (40, 1) has no place in T5 or LLaMA",
            "0.layer.1.DenseReluDense.wo.ia3_l is I64 (1, 40), expected floats (1, 40)",
            "01.layer.0.SelfAttention.v.ia3_l (24, 1) has no place in T5 or LLaMA",
            "1.layer.0.SelfAttention.k.ia3_l is -inf at 5",
            "1.layer.0.SelfAttention.v.ia3_l is inf at 0",
            "1.layer.1.DenseReluDense.wo.ia3_l (40, 1) scales the outputs of its linear, "
            "not the inputs",
        )
    ]


def test_vectors_that_have_no_place_here_are_refused_by_name(loaded, peft_folder):
    _, folder = peft_folder("t5-v1.1", target_modules=["k", "lm_head"], feedforward_modules=[])
    message = refused(loaded("t5-v1.1"), folder)
    assert "base_model.model.lm_head.ia3_l (61, 1) has no place in T5 or LLaMA" in message
    assert ".k.ia3_l" not in message


@pytest.mark.parametrize("inputs", [["k"], ["v", "wo"]])
def test_vectors_on_the_other_side_of_a_linear_are_refused(loaded, peft_folder, inputs):
    """The input of k, or the output of wo, is another function. The shape alone tells."""
    options = {"target_modules": ["k", "v", "wo"], "feedforward_modules": inputs}
    _, folder = peft_folder("t5-wide", **options)
    message = refused(loaded("t5-wide"), folder)
    found = f"0.SelfAttention.{inputs[0]}.ia3_l (1, 24) scales the inputs of its linear"
    assert f"{found}, not the outputs" in message


def test_a_file_that_scales_one_place_twice_is_refused(loaded, tmp_path):
    name = "encoder.block.0.layer.0.SelfAttention.k"
    tensors = {
        f"base_model.model.{name}.ia3_l": torch.ones(24, 1),
        f"{name}.multi_lora_b": torch.ones(24, 1),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    message = refused(loaded("t5-v1.1"), tmp_path / "adapter_model.safetensors")
    assert "scales the same place as another vector of the file" in message


LLAMA_WIDTHS = {"attn.l_k": 12, "attn.l_v": 12, "ffn.l_ff": 40}


def test_an_adapter_of_another_base_is_refused_with_what_was_found_and_expected(
    loaded, peft_folder, tmp_path
):
    _, folder = peft_folder("llama-gqa")
    model = loaded("t5-v1.0")
    start, _, end = refused(model, folder).partition(": 6 vectors do not fit, such as ")
    found = f"trained on an unknown base, and the model is {model.name_or_path}"
    assert start == f"{folder}: an adapter of another base: {found}"
    misfits = []
    for site, d in LLAMA_WIDTHS.items():
        misfits += [f"blocks.{i}.{site} of {d}, expected none" for i in (0, 1)]
    assert end in misfits
    message = refused(loaded("llama-mha"), folder)
    assert "4 vectors do not fit, such as blocks.0.attn.l_" in message
    assert message.endswith(" of 12, expected 24")
    save_adapter(loaded("t5-wide"), tmp_path / "deep")
    message = refused(model, tmp_path / "deep")
    base = Path(loaded("t5-wide").name_or_path).name
    assert f"trained on {base}, and the model is" in message
    assert message.endswith(", expected none") or message.endswith(" of 40, expected 24")


def test_the_message_about_an_adapter_of_another_base_is_short(loaded, peft_folder):
    """It names both bases, and one vector instead of all."""
    _, folder = peft_folder("llama-gqa")
    model = loaded("t5-v1.0")
    model.name_or_path = "t5-base"
    assert len(refused(model, folder)) - len(str(folder)) < 200


def test_other_kinds_of_adapters_are_refused(loaded, tmp_path):
    import peft

    lora = peft.get_peft_model(
        make("llama-gqa"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"])
    )
    lora.save_pretrained(tmp_path)
    expected = f"{tmp_path}: expected plain (IA)^3, found peft_type 'LORA'"
    assert refused(loaded("llama-gqa"), tmp_path) == expected
    file = tmp_path / "adapter_model.safetensors"
    remedy = "give the folder with its adapter_config.json, which has its scale"
    expected = f"{file}: found LoRA's tensors, expected an (IA)^3 adapter: {remedy}"
    assert refused(loaded("llama-gqa"), file) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["k"]},
        {"target_modules": ["k", "v", "o"]},
        {"target_modules": r"encoder\..*\.(k|v|wo)"},
        {"target_modules": []},
        {"exclude_modules": ["wo"]},
        {"exclude_modules": r"decoder\..*"},
    ],
)
def test_vectors_that_peft_would_leave_out_are_refused(loaded, peft_folder, changes):
    """PEFT takes only the modules that the config names, whatever tensors there are."""
    _, folder = peft_folder("t5-v1.0")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (key,) = changes
    assert refused(loaded("t5-v1.0"), folder).startswith(f"{folder}: expected {key} ")


def test_an_adapter_of_a_model_without_a_name_names_no_base(peft_folder):
    _, folder = peft_folder("t5-v1.0")
    path = folder / "adapter_config.json"
    for name in (None, ""):  # as new and as older versions of PEFT write it
        config = json.loads(path.read_text()) | {"base_model_name_or_path": name}
        path.write_text(json.dumps(config))
        assert read_adapter(folder).base is None


def test_whole_modules_beside_the_vectors_are_refused(loaded, peft_folder):
    _, folder = peft_folder("t5-v1.1", modules_to_save=["lm_head"])
    found = refused(loaded("t5-v1.1"), folder)
    assert "expected plain (IA)^3, found modules_to_save ['lm_head']" in found
    assert "lm_head.weight (61, 24) has no place" in refused(
        loaded("t5-v1.1"), folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "embedding"), [("t5-v1.1", "shared"), ("llama-gqa", "embed_tokens")]
)
def test_an_embedding_beside_the_vectors_is_refused_with_what_to_do(
    loaded, tmp_path, name, embedding
):
    """PEFT saves it if the vocabulary was resized, which it can only see of a model of the hub."""
    model = with_peft(name)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    found = refused(loaded(name), tmp_path / "peft")
    assert (
        f".{embedding}.weight (61, 24) has no place beside vectors: PEFT saves it if the" in found
    )
    assert "if it was not trained, save with save_embedding_layers=False" in found
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    load_adapter(loaded(name), tmp_path / "again")


def test_a_file_that_is_not_an_adapter_is_refused(loaded, tmp_path, peft_folder):
    model = loaded("t5-v1.0")
    assert refused(model, tmp_path).startswith(f"{tmp_path}: found an empty folder, expected an ")
    assert "not found; expected the folder or file of an adapter" in refused(
        model, tmp_path / "nowhere"
    )
    _, folder = peft_folder("t5-v1.0")
    found = refused(model, folder.parent)
    assert found.startswith(f"{folder.parent}: found a folder of adapters, expected an adapter")
    assert found.endswith(f": give one of them, such as {folder}")
    (folder / "adapter_config.json").write_text("{}")
    assert "found peft_type None" in refused(model, folder)
    config = folder / "adapter_config.json"
    assert refused(model, config).endswith(f".safetensors, .bin or .pt file: give {folder}")
    save_file({}, folder / "adapter_model.safetensors")
    assert "there are no vectors in it" in refused(model, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    assert "damaged" in refused(model, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: " in refused(model, folder)
