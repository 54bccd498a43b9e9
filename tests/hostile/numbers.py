"""Random models of every family and random adapters: the same numbers as transformers and PEFT.

A case follows from (seed, number): a family (they take turns), its sizes (odd widths, depths,
heads), padding on any side, and vectors with zeros, negatives and large entries. In float32,
bfloat16 and float64,

    logits, and gradients of the vectors      ours = PEFT's
    merged                                    ours = applied

No tolerance is chosen. The truth is PEFT's model in float64. The errors of ours may be FACTOR times
what rounding does to this model: the errors of theirs, or those of the truth when its weights are
changed in their last place (a random model may be ill-conditioned, and then theirs is lucky at
times). In float64, theirs are those in float32, times the ratio of the two precisions.
"""

import copy
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import torch
from conftest import double, their_logits

import minia3
from minia3.files.read import one_line
from tests.hostile.campaign import Tally
from tests.hostile.processes import last_line, run_process

FACTOR = 4
FLOOR = 8  # units of the last place, for what theirs happens to compute without an error
N_CHANGED = 3  # copies of the truth with other last places
CASES_PER_PROCESS = 50
WRONG = "wrong: "  # how the line about a case begins
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# Name: (model_type, is it an encoder-decoder, what its config has besides sizes)
FAMILIES = {
    "T5": ("t5", {}),
    "T5 v1.1": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "UL2": ("t5", {"feed_forward_proj": "gated-silu"}),
    "mT5": ("mt5", {"feed_forward_proj": "gated-gelu"}),
    "umT5": ("umt5", {"feed_forward_proj": "gated-gelu"}),
    "LLaMA": ("llama", {}),
    "LLaMA 3.1": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 5}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
}


def draw_config(rng, number):
    """Return the name of a family, which take turns, and a random config of transformers."""
    import transformers

    name = list(FAMILIES)[number % len(FAMILIES)]
    model_type, differences = FAMILIES[name]
    sizes = draw_t5_sizes(rng) if model_type.endswith("t5") else draw_llama_sizes(rng)
    if name == "LLaMA 3.1":
        sizes["rope_parameters"] = draw_scaling(rng)
    config = transformers.AutoConfig.for_model(model_type, **sizes, **differences)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    return name, config


def draw_t5_sizes(rng):
    return {
        "vocab_size": rng.randrange(40, 99),
        "d_model": rng.randrange(5, 33),
        "d_kv": rng.randrange(2, 12),
        "d_ff": rng.randrange(3, 50),
        "num_layers": rng.randrange(1, 4),
        "num_decoder_layers": rng.randrange(1, 4),
        "num_heads": rng.randrange(1, 6),
        "relative_attention_num_buckets": rng.choice([4, 8, 32]),
        "relative_attention_max_distance": rng.choice([17, 20, 128]),
        "layer_norm_epsilon": rng.choice([1e-6, 1e-3]),
    }


def draw_llama_sizes(rng):
    n_groups = rng.randrange(1, 4)
    n_heads = n_groups * rng.randrange(1, 4)
    return {
        "vocab_size": rng.randrange(40, 99),
        "hidden_size": n_heads * rng.randrange(3, 9),
        "intermediate_size": rng.randrange(3, 50),
        "num_hidden_layers": rng.randrange(1, 5),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_groups,
        "head_dim": 2 * rng.randrange(1, 8),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
        "max_position_embeddings": 64,
    }


def draw_scaling(rng):
    return {
        "rope_type": "llama3",
        "rope_theta": rng.choice([50.0, 500.0, 10_000.0, 500_000.0]),
        "factor": rng.choice([2.0, 8.0, 31.7]),
        "low_freq_factor": rng.choice([0.5, 1.0]),
        "high_freq_factor": rng.choice([2.0, 4.0]),
        "original_max_position_embeddings": rng.choice([8, 16, 63]),
    }


def make_theirs(rng, config):
    """Return a random model, in which norms and biases are random, too."""
    import transformers

    is_t5 = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "relative_attention_bias" in name else 0.15
            parameter.add_(std * torch.randn(parameter.shape))
    if is_t5 and rng.random() < 0.5:  # a head of its own, as in v1.1
        head = torch.randn(config.vocab_size, config.d_model)
        model.lm_head.weight = torch.nn.Parameter(head)
    return model.eval()


def add_theirs(rng, model):
    """Add PEFT's (IA)^3 with strange vectors."""
    import peft

    is_t5 = model.config.is_encoder_decoder
    modules = ["k", "v", "wo"] if is_t5 else ["k_proj", "v_proj", "down_proj"]
    options = {"target_modules": modules, "feedforward_modules": modules[2:]}
    kind = "SEQ_2_SEQ_LM" if is_t5 else "CAUSAL_LM"
    model = peft.get_peft_model(model, peft.IA3Config(task_type=kind, **options))
    strangeness = rng.choice(["small", "zeros", "large"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape))  # some are negative
                chosen = torch.rand(parameter.shape) < 0.1
                if strangeness == "zeros":
                    parameter[chosen] = 0.0
                if strangeness == "large":
                    parameter[chosen] *= 20
    return model.eval()


def draw_batch(rng, n_ids):
    """Return sources, a mask with padding on the left, the right or both sides, and targets."""
    n_rows = rng.randrange(1, 5)
    n_tokens = rng.randrange(1, 24)
    source_BM = torch.randint(3, n_ids, (n_rows, n_tokens))
    mask_BM = torch.zeros(n_rows, n_tokens, dtype=torch.bool)
    for row_M in mask_BM:
        n_real = rng.randrange(1, n_tokens + 1)
        first = rng.choice([0, n_tokens - n_real, rng.randrange(n_tokens - n_real + 1)])
        row_M[first : first + n_real] = True
    target_BL = torch.randint(3, n_ids, (n_rows, rng.randrange(1, 9)))
    return source_BM, mask_BM, target_BL


def their_numbers(model, batch, weight_BLV):
    """Return the logits, and name -> the gradient of each vector, in the dtype of the model."""
    logits_BLV = their_logits(model, *batch)
    return logits_BLV.detach(), gradients(their_vectors(model), logits_BLV, weight_BLV)


def their_vectors(model):
    found = {}
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            found[name.replace(".default", "")] = parameter
    return found


def our_numbers(model, batch, weight_BLV, vectors):
    logits_BLV = our_logits(model, batch)
    return logits_BLV.detach(), gradients(vectors, logits_BLV, weight_BLV)


def our_logits(model, batch):
    source_BM, mask_BM, target_BL = batch
    state = model.start(source_BM, mask_BM)
    return model.step(torch.cat((state.start, target_BL), dim=1), state)


def gradients(vectors, logits_BLV, weight_BLV):
    loss = (logits_BLV.double() * weight_BLV).sum()
    found = torch.autograd.grad(loss, list(vectors.values()), allow_unused=True)
    result = {}
    for (name, vector), gradient in zip(vectors.items(), found, strict=True):
        result[name] = torch.zeros_like(vector) if gradient is None else gradient
    return result


def our_names(folder, model):
    """Return PEFT's name -> our vector: each is told by its values."""
    from safetensors.torch import load_file

    vectors = minia3.vectors(model)
    found = {}
    for theirs, values in load_file(folder / "adapter_model.safetensors").items():
        for vector in vectors.values():
            is_equal = vector.shape[1] == values.numel() and torch.equal(
                vector[0].detach().float(), values.flatten()
            )
            if is_equal:
                found[theirs] = vector
    assert len(found) == len(vectors), f"{len(found)} of {len(vectors)} vectors are told apart"
    return found


def errors(found, truth):
    """Return the largest error of the logits, and of all gradients, relative to the largest."""
    logits_BLV, found_gradients = found
    true_BLV, true_gradients = truth
    differences = []
    sizes = []
    for name, gradient in true_gradients.items():
        difference = found_gradients[name].flatten().double() - gradient.flatten().double()
        differences.append(difference.abs().max())
        sizes.append(gradient.double().abs().max())
    size = max(sizes).clamp(min=1e-30)
    off = (logits_BLV.double() - true_BLV.double()).abs().max() / true_BLV.double().abs().max()
    return off.item(), (max(differences) / size).item()


def check_case(seed, number, folder):
    """Compare a random model. Raise AssertionError if a number is wrong."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng = random.Random(f"{seed} numbers {number}")
    torch.manual_seed(rng.randrange(2**31))
    name, config = draw_config(rng, number)
    theirs = make_theirs(rng, config)
    theirs.save_pretrained(folder / "model")
    theirs = add_theirs(rng, theirs)
    theirs.save_pretrained(folder / "adapter")
    batch = draw_batch(rng, config.vocab_size)
    n_logits = batch[2].shape[1] + 1
    weight_BLV = torch.randn(len(batch[0]), n_logits, config.vocab_size, dtype=torch.float64)

    their_results = {}
    for dtype in (torch.float32, torch.bfloat16):
        their_results[dtype] = their_numbers(in_dtype(theirs, dtype), batch, weight_BLV)
    true_model = double(in_dtype(theirs, torch.float32))
    truth = their_numbers(true_model, batch, weight_BLV)
    for dtype in their_results:
        their_errors = [errors(their_results[dtype], truth)]
        for _ in range(N_CHANGED):
            changed = change_last_place(true_model, dtype)
            their_errors.append(errors(their_numbers(changed, batch, weight_BLV), truth))
        their_results[dtype] = [max(values) for values in zip(*their_errors, strict=True)]
    for dtype in DTYPES:
        model = minia3.load_model(folder / "model", dtype=dtype)
        minia3.load_adapter(model, folder / "adapter")
        check_model(model, dtype, folder, (batch, weight_BLV), (truth, their_results), name)


def in_dtype(model, dtype):
    """Return a copy of their model in another dtype. The vectors stay float32, as PEFT has them."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.requires_grad_(True)
        else:
            parameter.data = parameter.data.to(dtype)
    return model


def change_last_place(model, dtype):
    """Return a copy whose weights differ by up to one unit of the last place of a dtype."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            change = 2 * torch.rand(parameter.shape, dtype=parameter.dtype) - 1
            parameter.mul_(1 + torch.finfo(dtype).eps * change)
    return model


def check_model(model, dtype, folder, inputs, results, name):
    batch, weight_BLV = inputs
    truth, their_results = results
    found = our_numbers(model, batch, weight_BLV, our_names(folder / "adapter", model))
    their_errors = their_results[their_dtype(dtype)]
    ratio = torch.finfo(dtype).eps / torch.finfo(their_dtype(dtype)).eps
    merged = minia3.merge(model)
    with torch.no_grad():
        merged_results = (our_logits(merged, batch), found[1])
    for what, ours in (("applied", found), ("merged", merged_results)):
        for kind, error, theirs in zip(
            ("logits", "gradients"), errors(ours, truth), their_errors, strict=True
        ):
            # The vectors, and so their gradients, are float32 whatever the dtype of the model.
            stored = torch.float32 if kind == "gradients" else dtype
            eps = max(torch.finfo(dtype).eps, torch.finfo(stored).eps)
            limit = FACTOR * theirs * ratio + FLOOR * eps
            message = f"{name} {dtype}: {what}: {kind}: {error:.2e}, expected at most {limit:.2e}"
            assert error <= limit, message


def their_dtype(dtype):
    return torch.float32 if dtype == torch.float64 else dtype


def check_cases(seed, numbers, folder):
    """Check several cases in one process, because it takes seconds to import the peers."""
    signal.alarm(0)
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                check_case(seed, number, Path(scratch))
            except Exception as error:
                print(f"{WRONG}{number}: {one_line(error)}")


def run_numbers(n_cases, seed, folder):
    """Return the Tally of the cases 0, 1, 2 ..."""
    tally = Tally("numbers", n_cases)
    began = time.monotonic()
    for first in range(0, n_cases, CASES_PER_PROCESS):
        numbers = range(first, min(first + CASES_PER_PROCESS, n_cases))
        code, printed = run_process(lambda numbers=numbers: check_cases(seed, numbers, folder))
        assert code == 0, last_line(printed)
        wrong = re.findall(f"^{WRONG}(.*)$", printed, re.MULTILINE)
        tally.failures += wrong
        tally.n_read += len(numbers) - len(wrong)
    tally.seconds = time.monotonic() - began
    return tally
