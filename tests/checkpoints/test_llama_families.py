"""Guards what "supported" means for the LLaMA family. For a random small model of each member:

    logits                  ours = transformers', with padding on either side, in four dtypes
    gradients of vectors    ours = PEFT's
    generation              ours = transformers', greedy, with a cache, beyond the window
    adapters                PEFT reads ours, we read PEFT's: its default modules, and the paper's
    merging                 merged = applied = merged by PEFT
    export                  transformers reads what we write, as the same class

All weights are random, also the norms and the biases, which transformers starts at one and zero.
"""

import json

import peft
import pytest
import torch
import transformers
from checkpoint_folders import have_the_same_bits
from conftest import double, logits, off, randomize, tokens
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as MODULES
from safetensors.torch import load_file

import minia3
from minia3.adapters.lora import load_lora
from minia3.adapters.merge import merge_files
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import load_adapter, save_adapter
from minia3.inference.decoding import decode_tokens
from minia3.model.more_vectors import add_vectors, possible_vectors

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALL_WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}

# model: (model_type, what differs from SIZES)
FAMILIES = {
    "Llama 1": ("llama", {}),
    "Llama 2 70B": ("llama", {**GROUPED, "rms_norm_eps": 1e-5}),
    "Llama 3": ("llama", {**GROUPED, "rope_parameters": {"rope_theta": 500000.0}}),
    "Llama 3.1 to 3.3": ("llama", {**GROUPED, "rope_parameters": LLAMA_3_1}),
    "Llama 3.2": ("llama", {**GROUPED, **TIED, "rope_parameters": LLAMA_3_1}),
    "Mistral 0.1": ("mistral", {**GROUPED, "sliding_window": 5}),
    "Mistral 0.2 and 0.3": ("mistral", {**GROUPED, "sliding_window": None}),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen2.5": ("qwen2", {**GROUPED, **TIED, "rms_norm_eps": 1e-5}),
    "Qwen2 with a window": ("qwen2", {**GROUPED, **ALL_WINDOWED}),
    "Qwen3": ("qwen3", {**GROUPED, "head_dim": 10}),  # wider than hidden_size / heads
    "Qwen3 with a window": ("qwen3", {**TIED, "head_dim": 6, **ALL_WINDOWED}),
    "SmolLM2": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, **TIED}),
    "TinyLlama": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
}
OURS = ["k_proj", "v_proj", "down_proj"]

SOURCE = tokens(4, 11)
TARGET = tokens(4, 7, seed=1)
# No padding, on the left, on the right, and on both sides
MASK = torch.tensor(
    [
        [True] * 11,
        [False] * 4 + [True] * 7,
        [True] * 8 + [False] * 3,
        [False] * 2 + [True] * 7 + [False] * 2,
    ]
)

each_family = pytest.mark.parametrize("name", FAMILIES)
each_set = pytest.mark.parametrize("is_default", [True, False], ids=["default", "k,v,down"])


def make_theirs(name):
    """Return a random model of transformers. Its norms and biases are random, too."""
    model_type, differences = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **differences})
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function from a name to the folder in which transformers saved its model."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("family")
            make_theirs(name).save_pretrained(folders[name])
        return folders[name]

    return get


def with_vectors(name, is_default):
    """Return transformers' model with PEFT's (IA)^3 and random vectors."""
    options = {}
    if not is_default:
        options = {"target_modules": OURS, "feedforward_modules": ["down_proj"]}
    config = peft.IA3Config(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(make_theirs(name), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "ia3_l" in parameter_name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def their_logits(model):
    """Return the logits of the last token of SOURCE and of TARGET, each row without its padding."""
    rows = []
    for source, mask, target in zip(SOURCE, MASK, TARGET, strict=True):
        text = torch.cat((source[mask], target))
        rows.append(model(input_ids=text[None]).logits[:, -8:])
    return torch.cat(rows)


def our_logits(model):
    return logits(model, SOURCE, MASK, TARGET)


@each_family
def test_logits_are_those_of_transformers(folder_of, name):
    expected = their_logits(make_theirs(name))
    assert off(our_logits(minia3.load_model(folder_of(name))), expected) < 1e-5
    model = minia3.load_model(folder_of(name), dtype=torch.float64)
    assert off(our_logits(model), their_logits(double(make_theirs(name)))) < 1e-12


@each_family
def test_a_text_that_is_read_token_by_token_has_the_logits_of_the_whole_text(folder_of, name):
    """The text grows across the window, with all its tokens in the cache."""
    model = minia3.load_model(folder_of(name))
    with torch.no_grad():
        state = model.start(SOURCE[:, :1])
        found = [model.step(token_B1, state) for token_B1 in SOURCE.split(1, dim=1)]
        expected = make_theirs(name)(input_ids=SOURCE).logits
    assert off(torch.cat(found, dim=1), expected) < 1e-5


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits_are_as_near_the_exact_ones_as_those_of_transformers(
    folder_of, name, dtype
):
    theirs = make_theirs(name).to(dtype)
    model = minia3.load_model(folder_of(name), dtype=dtype)
    rounded = {key: value.float() for key, value in theirs.state_dict().items()}
    exact = make_theirs(name)
    exact.load_state_dict(rounded)
    expected = their_logits(exact)
    their_error = (their_logits(theirs).float() - expected).square().mean().sqrt()
    our_error = (our_logits(model).float() - expected).square().mean().sqrt()
    assert 0 < our_error < 1.5 * their_error


@each_family
@each_set
def test_an_adapter_of_peft_has_its_logits_gradients_and_merged_weights(
    folder_of, tmp_path, name, is_default
):
    theirs = with_vectors(name, is_default)
    theirs.save_pretrained(tmp_path)
    model = minia3.load_model(folder_of(name))
    load_adapter(model, tmp_path)
    expected = their_logits(theirs)
    assert off(our_logits(model), expected) < 1e-5

    # The same file again, for example by `minia3 convert`
    write_adapter(tmp_path / "again", read_adapter(tmp_path).vectors)
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    read = load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[tensor_name], read[tensor_name]) for tensor_name in read)

    # Gradients of the mean square of all logits
    minia3.freeze(model)
    state = model.start(SOURCE, MASK)
    model.step(torch.cat((state.start, TARGET), dim=1), state).square().mean().backward()
    expected.square().mean().backward()
    found = {}
    for vector_name, vector in minia3.vectors(model).items():
        if vector_name.endswith(("l_q", "l_k", "l_v", "l_ff")):
            found[vector_name] = vector.grad.flatten()
    n_compared = 0
    for parameter_name, parameter in theirs.named_parameters():
        if "ia3_l" in parameter_name:
            layer, part, linear = parameter_name.split(".")[4:7]
            place = {"self_attn": "attn", "mlp": "ffn"}[part]
            site = linear.removesuffix("_proj").replace("down", "ff")
            ours = found[f"blocks.{layer}.{place}.l_{site}"]
            assert off(ours, parameter.grad.flatten()) < 1e-4
            n_compared += 1
    assert n_compared == 3 * 3

    merged = minia3.merge(model)
    assert off(our_logits(merged), expected.detach()) < 1e-5
    by_peft = theirs.merge_and_unload().state_dict()
    minia3.save_model(merged, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for tensor_name, x in by_peft.items():
        assert off(again[tensor_name], x) < 1e-6


@each_family
@each_set
def test_our_adapter_has_its_logits_in_peft(folder_of, tmp_path, name, is_default):
    model = minia3.load_model(folder_of(name))
    if is_default and MODULES[FAMILIES[name][0]] != OURS:
        queries = [vector for vector in possible_vectors(model) if vector.endswith("l_q")]
        add_vectors(model, queries)
    randomize(model, seed=4)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_theirs(name), tmp_path).eval()
    with torch.no_grad():
        assert off(our_logits(model), their_logits(theirs)) < 1e-5


@each_family
def test_merging_from_file_to_file_has_the_bits_of_merging_in_memory(folder_of, tmp_path, name):
    model = randomize(minia3.load_model(folder_of(name)), seed=5)
    save_adapter(model, tmp_path / "adapter")
    minia3.save_model(minia3.merge(model), tmp_path / "in memory")
    merge_files(folder_of(name), tmp_path / "adapter", tmp_path / "files")
    in_memory = minia3.load_model(tmp_path / "in memory")
    assert have_the_same_bits(minia3.load_model(tmp_path / "files"), in_memory)


@each_family
def test_an_exported_model_is_the_same_class_with_the_same_bits_in_transformers(
    folder_of, tmp_path, name
):
    minia3.save_model(minia3.load_model(folder_of(name)), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs = make_theirs(name)
    raw = json.loads((tmp_path / "config.json").read_text())
    model_type = FAMILIES[name][0]
    if name == "Mistral 0.2 and 0.3":  # without a window, it is a LLaMA
        model_type = "llama"
    assert (raw["model_type"], again.config.model_type) == (model_type, model_type)
    assert have_the_same_bits(again, theirs)
    with torch.no_grad():
        assert torch.equal(their_logits(again), their_logits(theirs))


@each_family
def test_greedy_texts_are_those_of_transformers(folder_of, name):
    """The window is 5 and the texts have up to 11 + 6 tokens."""
    theirs = make_theirs(name)
    model = minia3.load_model(folder_of(name))
    state = model.start(SOURCE, MASK)
    found = [[] for _ in SOURCE]
    for row, token in decode_tokens(model, state, 6, set()):
        found[row].append(token)
    for row, (source, mask) in enumerate(zip(SOURCE, MASK, strict=True)):
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        alone = source[mask][None]
        expected = theirs.generate(alone, attention_mask=torch.ones_like(alone), **options)
        new = expected[0, alone.shape[1] :].tolist()
        end = new.index(2) if 2 in new else len(new)
        assert found[row] == new[:end]


@each_family
def test_choices_that_share_a_prompt_see_it_and_their_own_tokens_alone(folder_of, name):
    """Three choices per prompt, in two steps. The second step begins beyond the window."""
    model = minia3.load_model(folder_of(name))
    theirs = make_theirs(name)
    choices = tokens(12, 7, seed=7)
    with torch.no_grad():
        state = model.start(SOURCE, MASK).repeat(3)
        parts = [model.step(torch.cat((state.start, choices[:, :4]), dim=1), state)]
        parts.append(model.step(choices[:, 4:], state))
        found = torch.cat(parts, dim=1)
        for row, choice in enumerate(choices):
            text = torch.cat((SOURCE[row // 3][MASK[row // 3]], choice))
            assert off(found[row], theirs(input_ids=text[None]).logits[0, -8:]) < 1e-5


@each_family
def test_a_lora_of_peft_has_its_logits_and_its_merged_weights(folder_of, tmp_path, name):
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=kinds, r=2, init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(8)
        theirs = peft.get_peft_model(make_theirs(name), options).eval()
    theirs.save_pretrained(tmp_path)
    model = minia3.load_model(folder_of(name))
    load_lora(model, tmp_path)
    expected = their_logits(theirs)
    assert off(our_logits(model), expected) < 1e-5
    assert off(our_logits(minia3.merge(model)), expected) < 1e-5
