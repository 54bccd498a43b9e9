"""A divided model has the bits of the whole one, from every form of file, and each process reads
only its rows.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed
from anonymous_memory import anonymous, sampling
from checkpoint_folders import FORMS, refusal, write_weights
from conftest import make
from optional import require_bitsandbytes
from ranks import my_shards, on_ranks
from safetensors.torch import load_file, save_file
from torch_version import divides_a_base, divides_a_quantized_base

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.model.shard import gathered, is_divided


def bits_of_divided(cases):
    """Return name -> tensor of divided models, gathered, and the names of what is divided."""
    found = []
    for folder, options in cases:
        model = minia3.load_model(folder, shards=my_shards(), n_adapters=2, **options)
        assert not model.training
        divided = [name for name, p in model.named_parameters() if is_divided(p)]
        tensors = {name: gathered(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            assert p.requires_grad == name.endswith(".scale")
        found.append((tensors | dict(model.named_buffers()), divided))
    return found


def check_bits(cases, n_processes=2):
    """Compare divided models with whole ones."""
    for found in on_ranks(n_processes, bits_of_divided, cases):
        for (path, options), (tensors, divided) in zip(cases, found, strict=True):
            whole = minia3.load_model(path, n_adapters=2, **options)
            expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), (path, options, name)
                is_in_block = "blocks." in name and not name.endswith(".scale")
                assert (name in divided) == is_in_block


@divides_a_quantized_base
@pytest.mark.slow
def test_every_form_of_file_is_read_to_the_same_bits(peer, tmp_path):
    cases = []
    for name in ("t5-deep-decoder", "qwen2"):
        tensors = load_file(peer(name).folder / "model.safetensors")
        for form in FORMS:
            folder = tmp_path / f"{name} {form}"
            folder.mkdir()
            for file in peer(name).folder.glob("*.json"):
                (folder / file.name).write_bytes(file.read_bytes())
            write_weights(folder, tensors, form)
            cases.append((folder, {}))
    cases += [(cases[0][0], {"dtype": torch.bfloat16}), (cases[5][0], {"quantize": "int8"})]
    check_bits(cases)


@divides_a_quantized_base
@pytest.mark.slow
def test_gguf_metas_files_and_nf4_are_read_to_the_same_bits_by_three_processes(peer, tmp_path):
    require_bitsandbytes()
    # Late, because the processes import this module, too, and these take seconds.
    test_gguf = pytest.importorskip("test_gguf")
    import test_meta
    import test_nf4_files

    tensors = test_gguf.gguf_tensors(test_gguf.hf_tensors(test_gguf.make_model()), test_gguf.Q8_0)
    gguf = test_gguf.write(tmp_path / "model.gguf", tensors)
    meta = tmp_path / "meta"
    meta.mkdir()
    test_meta.take_apart(test_meta.make(), meta, n_shards=2)
    nf4 = tmp_path / "nf4"
    test_nf4_files.write_quantized("llama-gqa", nf4, double_quant=True)
    wide = tmp_path / "wide"
    make("t5-v1.1", d_model=64, d_kv=16, d_ff=192).save_pretrained(wide)
    cases = [(gguf, {}), (meta, {}), (wide, {"quantize": "nf4"})]
    cases += [(nf4, {}), (nf4, {"quantize": "int8"})]
    narrow = tmp_path / "narrow"
    options = {"also": ["lm_head.weight"], "dtype": torch.bfloat16}
    test_nf4_files.write_quantized("llama-gqa", narrow, double_quant=True, **options)
    cases += [(narrow, {"dtype": torch.float32, "quantize": "int8"})]
    check_bits(cases, 3)


def refusal_of_divided(folder):
    return refusal(minia3.load_model, folder, shards=my_shards(), check_finite=True)


@divides_a_quantized_base
@pytest.mark.slow
def test_scales_of_nf4_that_are_not_finite_are_found_by_every_process(tmp_path):
    require_bitsandbytes()
    import test_nf4_files  # late: see above

    test_nf4_files.write_quantized("llama-gqa", tmp_path, double_quant=False)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = "model.layers.0.self_attn.k_proj.weight.absmax"
    tensors[scales][:] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    for message in on_ranks(2, refusal_of_divided, tmp_path):
        assert f"{scales} has " in message


# Memory


def memory_of_loading(tiny, cases):
    """Return the bytes of (the peak while loading, what this process holds, the largest tensor, all
    tensors)."""
    minia3.load_model(tiny, dtype=torch.bfloat16, shards=my_shards())  # imports what it needs
    found = []
    for folder, dtype in cases:
        torch.distributed.barrier()
        before = anonymous()
        with sampling() as samples:
            model = minia3.load_model(folder, dtype=dtype, shards=my_shards())
        share = 0
        largest = 0
        total = 0
        for p in model.parameters():
            local = p.to_local() if is_divided(p) else p
            share += local.nbytes
            largest = max(largest, p.nbytes)
            total += p.nbytes
        found.append((max(samples) - before, share, largest, total))
    return found


ALLOWANCE = 8 * 2**20  # for the sampling thread's stack, the model's modules, the allocator's slack


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a checkpoint of ones in two forms. The whole is larger than what is allowed."""
    from test_load import write_model

    folder = tmp_path_factory.mktemp("large")
    config = KNOWN_MODELS["smollm2-135m"].config
    config = replace(config, n_layers=8, vocab_size=1_500, own_head=True)
    for form in ("safetensors", "bin"):
        write_model(folder / form, config, torch.float32, form)
    return folder


@divides_a_base
@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc"
)
@pytest.mark.parametrize("n_processes", [2, 4])
def test_loading_takes_the_memory_of_a_share_and_of_the_largest_tensor(n_processes, peer, large):
    cases = [
        (large / "safetensors", torch.bfloat16),
        (large / "bin", torch.bfloat16),
        (large / "safetensors", torch.float32),
    ]
    tiny = peer("llama-mha").folder
    for found in on_ranks(n_processes, memory_of_loading, tiny, cases):
        for (_, dtype), (peak, share, largest, total) in zip(cases, found, strict=True):
            print([f"{n / 2**20:.1f} MiB" for n in (peak, share, largest, total)])
            assert peak <= share + largest + ALLOWANCE < total
            if dtype == torch.float32:
                assert peak <= ALLOWANCE, "rows that keep their dtype are mapped"
