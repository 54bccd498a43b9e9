"""Guards the LoRA baseline. It computes, learns and writes what PEFT's does, starts as the base bit
for bit, and merges to what it computes applied. Files that are more than LoRA, or do not fit, are
refused, and the model stays as it was."""

import json
import math
import re
import warnings

import pytest
import torch
from conftest import (
    PEERS,
    T5_PEERS,
    Peer,
    double,
    logits,
    make,
    off,
    randomize,
    rms,
    their_logits,
    tokens,
    with_peft,
    write_no_card,
)
from safetensors.torch import load_file, save_file

import minia3
from minia3.adapters.lora import LoRA, add_lora, load_lora, lora_parameters, save_lora
from minia3.adapters.merge import merge

SOURCE = tokens(3, 7)
TARGET = tokens(3, 5, seed=1)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
ATTENTION = ["q", "k", "v", "o"]
LLAMA_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = {  # PEFT's names of all linears of the blocks
    "t5-v1.0": [*ATTENTION, "wi", "wo"],
    "t5-v1.1": [*ATTENTION, "wi_0", "wi_1", "wo"],
    "llama-gqa": [*LLAMA_ATTENTION, "gate_proj", "up_proj", "down_proj"],
}
OURS = {
    "t5-v1.0": "q k v o gate down",
    "t5-v1.1": "q k v o gate up down",
    "llama-gqa": "q k v o gate up down",
}
QV = {"t5-v1.0": ["q", "v"], "t5-v1.1": ["q", "v"], "llama-gqa": ["q_proj", "v_proj"]}


def with_lora(name, targets, r=3, lora_alpha=5, **options):
    """PEFT's LoRA around `make(name)`, with random A and B, in eval mode."""
    import peft

    model = make(name)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    options |= {"r": r, "lora_alpha": lora_alpha, "target_modules": targets}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, **options))
    model.create_or_update_model_card = write_no_card
    fill({n: p for n, p in model.named_parameters() if ".lora_" in n})
    return model.eval()


def fill(parameters, seed=0):
    """Random numbers in A and B, such that their product is about half as large as W."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.data = 0.15 * torch.randn(p.shape, generator=generator)


@pytest.fixture
def peft_folder(tmp_path):
    """name, options -> PEFT's model, and the folder where it has saved its LoRA."""

    def get(name, targets=None, **options):
        model = with_lora(name, targets or QV[name], **options)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return get


@pytest.fixture
def applied(loaded):
    """name -> a model of ours with LoRA on all linears of its blocks, random numbers in it."""

    def get(name, **options):
        model = loaded(name, **options)
        fill(add_lora(model, rank=3, alpha=5, where=OURS[name].split()))
        return model

    return get


def in_peft(name, folder, **options):
    """What PEFT makes of a folder, without a warning."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing.*"
        )  # transformers' and PEFT's own affair
        return peft.PeftModel.from_pretrained(make(name), folder, **options).eval()


# As PEFT


@pytest.mark.parametrize("targets", [QV, ALL], ids=["qv", "all"])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients_of_a_padded_batch_equal_peft(loaded, peft_folder, name, targets):
    theirs, folder = peft_folder(name, targets[name])
    ours = loaded(name)
    load_lora(ours, folder)
    theirs = double(theirs)
    ours = ours.double()
    expected = their_logits(theirs, SOURCE, MASK, TARGET)
    state = ours.start(SOURCE, MASK)
    found = ours.step(torch.cat((state.start, TARGET), dim=1), state)
    assert off(found, expected) < 1e-11
    assert off(logits(loaded(name).double(), SOURCE, MASK, TARGET), expected) > 1e-2
    for x in (expected, found):
        x.log_softmax(-1)[..., 5].mean().backward()
    gradients = {
        n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if ".lora_" in n
    }
    parameters = lora_parameters(ours)
    assert gradients.keys() == parameters.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for n, p in parameters.items():
        assert gradients[n].abs().max() > 1e-6 * largest, n
        assert off(p.grad, gradients[n]) < 1e-9, n


def test_a_lora_of_rank_1_equals_peft(loaded, peft_folder):
    theirs, folder = peft_folder("t5-v1.0", r=1)
    ours = loaded("t5-v1.0")
    load_lora(ours, folder)
    expected = their_logits(theirs, SOURCE, MASK, TARGET)
    assert off(logits(ours, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_our_folder_gives_the_same_logits_in_peft_without_a_warning(applied, tmp_path, name):
    model = applied(name)
    save_lora(model, tmp_path)
    theirs = in_peft(name, tmp_path)
    assert len([n for n, _ in theirs.named_parameters() if ".lora_" in n]) == len(
        lora_parameters(model)
    )
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("targets", [QV, ALL], ids=["qv", "all"])
@pytest.mark.parametrize("name", ALL)
def test_our_folder_equals_the_folder_that_peft_writes(
    loaded, tmp_path, peft_folder, name, targets
):
    _, folder = peft_folder(name, targets[name])
    model = loaded(name)
    load_lora(model, folder)
    save_lora(model, tmp_path / "ours", "t5-base")
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "ours", folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path / "ours", folder)
    )
    theirs |= {
        "target_modules": sorted(theirs["target_modules"]),
        "base_model_name_or_path": "google-t5/t5-base",
    }
    assert ours == {key: theirs[key] for key in ours}
    assert {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias"} <= ours.keys()


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_lora_comes_back_bit_for_bit_whatever_the_dtype_of_the_base(
    applied, loaded, tmp_path, name, dtype
):
    model = applied(name, dtype=dtype)
    again = loaded(name, dtype=dtype)
    save_lora(model, tmp_path)
    load_lora(again, tmp_path)
    expected = lora_parameters(model)
    found = lora_parameters(again)
    assert found.keys() == expected.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[n]) for n, p in found.items())
    assert torch.equal(logits(again, SOURCE, MASK, TARGET), logits(model, SOURCE, MASK, TARGET))


def test_a_lora_that_is_loaded_in_inference_mode_trains_outside_of_it(applied, loaded, tmp_path):
    save_lora(applied("llama-gqa"), tmp_path)
    with torch.inference_mode():
        model = loaded("llama-gqa")
        load_lora(model, tmp_path)
    minia3.logprobs(model, model.start(SOURCE, MASK), TARGET).sum().backward()
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad.abs().max() > 0, name


def test_the_saved_lora_of_a_float64_model_is_float32(applied, tmp_path):
    save_lora(applied("t5-v1.0").double(), tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("name", ALL)
def test_our_lora_can_be_trained_further_in_peft_and_comes_back(applied, loaded, tmp_path, name):
    save_lora(applied(name), tmp_path / "ours")
    theirs = in_peft(name, tmp_path / "ours", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        labels = TARGET if name in T5_PEERS else SOURCE
        theirs(input_ids=SOURCE, labels=labels).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    model = loaded(name)
    load_lora(model, tmp_path / "theirs")
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5
    assert off(logits(applied(name), SOURCE, MASK, TARGET), expected) > 1e-3, "it has learned"


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"init_lora_weights": False}, {"targets": r".*\.[qv]"}]
)
def test_options_that_do_not_change_the_equation_are_ignored(loaded, peft_folder, options):
    theirs, folder = peft_folder("t5-v1.0", **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")  # as older ones wrote
    (folder / "adapter_model.safetensors").unlink()
    load_lora(model := loaded("t5-v1.0"), folder)
    assert (
        off(
            logits(model, SOURCE, MASK, TARGET),
            Peer("t5-v1.0", None, theirs).logits(SOURCE, MASK, TARGET),
        )
        < 1e-5
    )


@pytest.mark.parametrize("name", ALL)
def test_an_rslora_equals_peft_applied_merged_and_saved_again(loaded, peft_folder, tmp_path, name):
    theirs, folder = peft_folder(name, ALL[name], r=6, use_rslora=True)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    ours = loaded(name)
    load_lora(ours, folder)
    save_lora(ours, tmp_path / "ours")
    again = Peer(name, None, in_peft(name, tmp_path / "ours"))
    for found in (ours, merge(ours)):
        assert off(logits(found, SOURCE, MASK, TARGET), expected) < 1e-5
    assert off(again.logits(SOURCE, MASK, TARGET), expected) < 1e-5
    plain = json.loads((folder / "adapter_config.json").read_text()) | {"use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    load_lora(other := loaded(name), folder)
    assert off(logits(other, SOURCE, MASK, TARGET), expected) > 1e-2


# How it begins and what it trains


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_new_lora_is_the_base_bit_for_bit(loaded, name, dtype):
    base = loaded(name, dtype=dtype)
    model = loaded(name, dtype=dtype)
    add_lora(model, where=["q", "k", "v", "o", "gate", "down"])
    assert torch.equal(logits(model, SOURCE, MASK, TARGET), logits(base, SOURCE, MASK, TARGET))
    assert not any(module.training for module in model.modules())
    ours = dict(model.named_parameters())
    before = dict(base.named_parameters())
    assert [n for n in ours if n in before] == list(before), "names stay, and their order"
    assert {n.rpartition(".")[2] for n in ours if n not in before} == {"lora_A", "lora_B"}
    assert len(ours) - len(before) == len(lora_parameters(model))


@pytest.mark.parametrize(
    ("name", "n"), [("t5-v1.0", 12), ("t5-deep-decoder", 14), ("llama-gqa", 4)]
)
def test_lora_is_on_q_and_v_by_default_and_starts_as_in_peft(loaded, name, n):
    lora = {n: x for n, x in add_named(loaded(name)).items() if isinstance(x, LoRA)}
    assert len(lora) == n
    assert {n.rpartition(".")[2] for n in lora} == {"q", "v"}
    for x in lora.values():
        assert x.lora_A.shape == (8, x.in_features)
        assert x.lora_B.shape == (x.out_features, 8)
        assert not x.lora_B.any()
        assert 0.8 < x.lora_A.abs().max() * x.in_features**0.5 <= 1  # as nn.Linear begins: uniform
        assert abs(x.lora_A.std() * (3 * x.in_features) ** 0.5 - 1) < 0.2
        assert (x.alpha, x.scale) == (16, 2)


def add_named(model, **options):
    add_lora(model, **options)
    return dict(model.named_modules())


def test_a_new_lora_depends_only_on_the_seed(loaded):
    def begin(**options):
        torch.rand(3)  # the state of all others' random numbers
        return torch.cat(
            [p.flatten() for p in add_lora(loaded("t5-v1.0", **options), seed=seed).values()]
        )

    seed = 3
    first = begin()
    assert torch.equal(first, begin(dtype=torch.bfloat16))
    with torch.device("meta"):  # as after torch.set_default_device
        model = loaded("t5-v1.0")
        on_another_default = [p.flatten() for p in add_lora(model, seed=seed).values()]
    assert torch.equal(first, torch.cat(on_another_default))
    seed = 4
    assert not torch.equal(first, begin())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("where", ["q", "v", "down", "gate", None])
def test_only_a_and_b_get_gradients(loaded, name, where):
    model = loaded(name)
    minia3.freeze(model)  # the vectors train until there is LoRA
    linears = OURS[name].split() if where is None else [where]
    parameters = add_lora(model, where=linears)
    fill(parameters)
    state = model.start(SOURCE, MASK)
    scores = model.step(torch.cat((state.start, TARGET), dim=1), state)
    scores.log_softmax(-1).square().mean().backward()
    learning = {id(p) for p in parameters.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learning
    assert {id(p) for p in model.parameters() if p.grad is not None} == learning
    assert all(p.grad.any() for p in parameters.values())


def test_the_base_under_a_lora_can_be_saved(applied, loaded, tmp_path):
    minia3.save_model(applied("t5-v1.1"), tmp_path)
    expected = logits(loaded("t5-v1.1"), SOURCE, MASK, TARGET)
    assert torch.equal(logits(minia3.load_model(tmp_path), SOURCE, MASK, TARGET), expected)


# Merging


@pytest.mark.parametrize("name", ALL)
def test_a_merged_lora_equals_the_applied_lora(applied, loaded, tmp_path, name):
    model = randomize(applied(name).double(), 1)  # the vectors of (IA)^3 beside it, too
    merged = merge(model)
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-11
    assert not any(isinstance(x, LoRA) for x in merged.modules())
    assert [n for n, _ in merged.named_parameters()] == [
        n for n, _ in loaded(name).named_parameters()
    ]
    merged = merge(applied(name))
    minia3.save_model(merged, tmp_path)
    expected = logits(applied(name), SOURCE, MASK, TARGET)
    for x in (merged, minia3.load_model(tmp_path), merge(merged)):
        assert off(logits(x, SOURCE, MASK, TARGET), expected) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_sum_in_float32_rounded_once(applied, name, dtype):
    model = applied(name, dtype=dtype)
    merged = merge(model)
    for n, x in model.named_modules():
        if isinstance(x, LoRA):
            expected = (x.weight.float() + 5 / 3 * (x.lora_B @ x.lora_A)).to(dtype)
            assert torch.equal(merged.get_submodule(n).weight, expected), n


def test_a_merged_weight_in_bfloat16_is_as_near_as_rounding_allows(applied):
    model = applied("t5-v1.0", dtype=torch.bfloat16)
    expected = logits(applied("t5-v1.0", dtype=torch.bfloat16).double(), SOURCE, MASK, TARGET)
    error, applied_error = (
        rms(logits(x, SOURCE, MASK, TARGET) - expected) for x in (merge(model), model)
    )
    assert 0 < error < 1.5 * applied_error
    assert applied_error < 0.05 * rms(expected)


def test_merging_leaves_the_model_as_it_is_and_shares_what_does_not_change(applied):
    model = applied("t5-v1.1", n_adapters=2)
    for mode in (True, False):
        before = {n: value.clone() for n, value in model.state_dict().items()}
        merged = merge(model.train(mode))
        assert {x.training for x in merged.modules()} == {mode}
        ours = dict(model.named_parameters())
        changed = (*(f".{x}.weight" for x in OURS["t5-v1.1"].split()), ".scale")
        for n, p in merged.named_parameters():
            assert (p.data_ptr() == ours[n].data_ptr()) == (not n.endswith(changed)), n
            assert p is not ours[n]
        with torch.no_grad():
            for n, p in merged.named_parameters():
                p.zero_() if n.endswith(changed) else None
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
        assert all(p.requires_grad for p in lora_parameters(model).values())
        assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("entry", [1000.0, -1000.0])
def test_a_sum_beyond_the_range_of_the_dtype_is_refused_by_name(applied, entry):
    model = applied("llama-gqa", dtype=torch.float16)
    lora = model.blocks[1].attn.q
    lora.lora_A.data.fill_(100.0)
    lora.lora_B.data[2] = entry
    assert lora.merged().isfinite().all()
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn\.q\.weight with .* not finite in torch.float16"
    ):
        merge(model)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"a rank of 1 or more .* found 0"),
        ({"where": ()}, r"some of \['down', 'gate', 'k', 'o', 'q', 'v'\], found 8 and \(\)"),
        ({"where": ("q", "up")}, "some of .* found 8 and .'q', 'up'"),  # v1.0 has none
        ({"where": ("head",)}, "some of .* found 8 and .'head'"),
    ],
)
def test_a_lora_that_a_model_cannot_have_is_refused(loaded, options, message):
    model = loaded("t5-v1.0")
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert not lora_parameters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_lora_is_refused_and_so_is_saving_none(applied, loaded, tmp_path):
    save_lora(applied("t5-v1.0"), tmp_path / "one")
    for again in (add_lora, lambda model: load_lora(model, tmp_path / "one")):
        with pytest.raises(ValueError, match="expected no LoRA yet"):
            again(applied("t5-v1.0"))
    add_lora(model := loaded("t5-v1.0"), where=("q",))
    with pytest.raises(ValueError, match="expected no LoRA yet"):
        add_lora(model, where=("o",))
    with pytest.raises(ValueError, match="at least 1"):
        save_lora(loaded("t5-v1.0"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "expected plain LoRA, found peft_type 'LOHA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"bias": "all", "use_dora": True}, "bias 'all', use_dora True"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern {'q': 4}"),
        ({"use_rslora": True, "rank_pattern": {"q": 4}}, "rank_pattern {'q': 4}"),
        ({"alpha_pattern": {"q": 4}}, "alpha_pattern {'q': 4}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        (
            {"r": 4},
            r"expected finite .*\.q\.lora_A.weight', \(4, 24\)\)\]"
            r" \.\.\., found .*\.q\.lora_A.weight', \(3, 24\)",
        ),
        ({"r": None}, "r is None, expected a whole number of 1 or more"),
        ({"r": 0}, "r is 0, expected a whole number of 1 or more"),
        # More than any machine can allocate: r is compared with the file first.
        (
            {"r": 10**15},
            r"expected finite .*\(1000000000000000, 24\)\)\] \.\.\., found .*\(3, 24\)",
        ),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a finite number"),
        ({"lora_alpha": 10**310}, "lora_alpha is 1000.*, expected a finite number"),
        ({"lora_alpha": -(10**310)}, "lora_alpha is -1000.*, expected a finite number"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf, expected a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True, expected a finite number"),
    ],
)
def test_a_config_that_describes_more_than_lora_is_refused(loaded, peft_folder, changes, message):
    _, folder = peft_folder("t5-v1.0")
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | changes))
    refused(loaded("t5-v1.0"), folder, message)
    (folder / "adapter_config.json").write_text(
        json.dumps({key: x for key, x in raw.items() if key != "r"})
    )
    refused(loaded("t5-v1.0"), folder, "r is None")


def refused(model, folder, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: .*{message}") as error:
        load_lora(model, folder)
    assert "\n" not in str(error.value)
    assert not lora_parameters(model)
    assert all(p.requires_grad for p in model.parameters())


Q = "base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_"
QA = f"{Q}A.weight"
QB = f"{Q}B.weight"


def without_cross_attention(tensors):
    return {name: x for name, x in tensors.items() if "EncDec" not in name}


def with_nan(tensors):
    tensors[QA][1, 1] = torch.nan
    return tensors


def in_block_9(name):
    return name.replace("block.1", "block.9")


# What happens to the tensors of a file, and a part of the error.
DAMAGE = {
    "missing": (
        lambda x: {name: tensor for name, tensor in x.items() if name != QB},
        rf"expected finite \[\('{QB}', \(24, 3\)\)\] \.\.\., found \[\]",
    ),
    "wide": (lambda x: x | {QA: torch.ones(3, 25)}, rf"found \[\('{QA}', \(3, 25\)\)\]"),
    "integers": (lambda x: x | {QA: torch.ones(3, 24).int()}, rf"\[\('{QA}'.*found \[\]"),
    "nan": (with_nan, rf"\[\('{QA}'.*found \[\]"),
    "more": (
        lambda x: x | {f"{Q}B.bias": torch.ones(24)},
        rf"\[\] \.\.\., found \[\('{Q}B.bias', \(24,\)\)\] \.\.\.: a plain LoRA has A and B alone$",
    ),
    "deeper": (lambda x: x | {in_block_9(QA): torch.ones(3, 24)}, r"found \[.*block.9.layer"),
    "half": (without_cross_attention, "expected finite .*block.0.layer.1.EncDecAttention.q"),
    "nothing": (lambda x: {}, "this model's blocks: q, .*; found no tensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(loaded, peft_folder, damage):
    _, folder = peft_folder("t5-v1.0")
    edit, message = DAMAGE[damage]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(edit(tensors), folder / "adapter_model.safetensors")
    refused(loaded("t5-v1.0"), folder, message)


def test_an_adapter_of_another_model_or_method_is_refused(loaded, peft_folder, tmp_path):
    _, folder = peft_folder("llama-gqa")
    refused(loaded("t5-v1.0"), folder, "this model's blocks: q, .*; found q_proj, v_proj")
    _, folder = peft_folder("t5-v1.1", ["q", "lm_head"])
    refused(loaded("t5-v1.1"), folder, "this model's blocks: q, .*; found lm_head$")
    with_peft("t5-v1.0").save_pretrained(tmp_path / "ia3")
    refused(loaded("t5-v1.0"), tmp_path / "ia3", "expected plain LoRA, found peft_type 'IA3'")
    with pytest.raises(ValueError, match="not found"):
        load_lora(loaded("t5-v1.0"), tmp_path / "none")


def test_a_lora_of_some_layers_is_refused_with_the_reason(loaded, peft_folder):
    _, folder = peft_folder("llama-gqa", r".*layers\.0\..*\.q_proj")
    message = r"expected finite .*layers\.1\..*: a LoRA must be on the same linears in all layers"
    refused(loaded("llama-gqa"), folder, message)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ({"num_hidden_layers": 1}, "in all layers of this model"),  # fewer layers than the model's
        ({"num_hidden_layers": 3}, r"found \[.*layers\.2\..*\] \.\.\."),
        ({"hidden_size": 48}, r"found \[.*\] \.\.\."),
    ],
)
def test_a_lora_of_another_base_is_refused_with_its_name(loaded, tmp_path, difference, expected):
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=QV["llama-gqa"], r=3)
    other = peft.get_peft_model(make("llama-gqa", **difference), config)
    other.create_or_update_model_card = write_no_card
    other.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    changes = {"base_model_name_or_path": "llama-2-7b"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = loaded("llama-gqa")
    doubt = f"{tmp_path} was trained on llama-2-7b, and this model is {model.name_or_path}"
    refused(model, tmp_path, f"{expected}: {re.escape(doubt)}$")


def test_a_lora_that_names_another_base_is_a_warning(loaded, peft_folder, recwarn):
    _, folder = peft_folder("llama-gqa")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    model = loaded("llama-gqa")
    recwarn.clear()
    for base in (None, "", str(model.name_or_path)):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        load_lora(loaded("llama-gqa"), folder)
    assert not recwarn.list
    path.write_text(json.dumps(config | {"base_model_name_or_path": "llama-2-7b"}))
    expected = f"^{folder} was trained on llama-2-7b, and this model is {model.name_or_path}$"
    with pytest.warns(UserWarning, match=expected):
        load_lora(model, folder)


@pytest.mark.parametrize(
    "targets",
    [
        None,
        [],
        ["q_proj"],
        ["proj"],
        "q_proj",
        r".*\.[qv]",  # only the beginnings of the names
        "(",
        1,
        ["q_proj", "layers.0.v_proj"],
    ],
)
def test_tensors_that_peft_would_leave_out_are_refused(loaded, peft_folder, targets):
    """PEFT takes only the modules that `target_modules` names, whatever tensors there are."""
    _, folder = peft_folder("llama-gqa")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    refused(loaded("llama-gqa"), folder, "expected target_modules that name 'model.layers.0")


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]]
)
def test_the_other_forms_of_target_modules_are_read(loaded, peft_folder, targets):
    _, folder = peft_folder("llama-gqa")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    load_lora(loaded("llama-gqa"), folder)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize(
    "excluded", [["v_proj"], r".*\.v_proj", ["model.layers.0.self_attn.v_proj"]]
)
def test_tensors_of_modules_that_are_excluded_are_refused(loaded, peft_folder, targets, excluded):
    _, folder = peft_folder("llama-gqa")
    path = folder / "adapter_config.json"
    changes = {"target_modules": targets, "exclude_modules": excluded}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(loaded("llama-gqa"), folder, "expected exclude_modules without 'model.layers.0")
