"""Guards merging. Weights with a row folded in compute what the row applied computes, whatever its
entries and dtype, before and after export. From file to file, merging gives the same bits in the
memory of one shard, all of them or none."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from anonymous_memory import anonymous, sampling
from conftest import LLAMA_PEERS, PEERS, Peer, logits, off, randomize, rms, tokens
from running import in_new_process
from safetensors.torch import load_file, save_file

import minia3
from minia3.adapters import fold
from minia3.adapters.merge import merge, merge_files
from minia3.adapters.peft_files import write_adapter
from minia3.adapters.rows import row_of, save_adapter
from minia3.checkpoints import load
from minia3.checkpoints import save as save_module
from minia3.checkpoints.save import save_tensors

SOURCE = tokens(3, 7)
TARGET = tokens(3, 5, seed=1)
MASK = torch.tensor([[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3])
SMALL_SHARD = 40_000  # bytes, so that a tiny model has several


def extreme(model):
    """Return the model with zero, negative, huge and tiny entries in its vectors."""
    with torch.no_grad():
        for i, vector in enumerate(minia3.vectors(randomize(model, 5)).values()):
            for row in range(len(vector)):
                vector[row, (i + row) % 3 :: 3] *= torch.tensor([0.0, -1.0, 1e4, 1e-4])[
                    (i + row) % 4
                ]
    return model


@pytest.mark.parametrize("name", PEERS)
def test_a_merged_row_equals_the_applied_row(loaded, name):
    model = loaded(name, n_adapters=3, seed=5)
    for adapter in (2, 0):
        merged = merge(model, adapter)
        assert merged.n_adapters == 1
        expected = logits(model, SOURCE, MASK, TARGET, adapter=adapter)
        assert off(logits(merged, SOURCE, MASK, TARGET), expected) < 1e-5
        assert all(torch.equal(v, torch.ones_like(v[:1])) for v in minia3.vectors(merged).values())
    assert off(logits(merge(model), SOURCE, MASK, TARGET), expected) < 1e-5, (
        "row 0, if none is named"
    )


@pytest.mark.parametrize("name", PEERS)
def test_merging_is_exact_whatever_the_entries(loaded, name):
    """In float64, because huge entries make huge scores, and a softmax shows their rounding."""
    model = extreme(loaded(name, n_adapters=2).double())
    for adapter in (0, 1):
        expected = logits(model, SOURCE, MASK, TARGET, adapter=adapter)
        assert off(logits(merge(model, adapter), SOURCE, MASK, TARGET), expected) < 1e-11


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_a_merged_row_is_rounded_once_in_bfloat16(loaded, name):
    """Merged logits are as far from the exact logits of the same weights as applied ones."""
    model = randomize(loaded(name, n_adapters=2, dtype=torch.bfloat16), 5)
    exact = randomize(loaded(name, n_adapters=2, dtype=torch.bfloat16).double(), 5)
    expected = logits(exact, SOURCE, MASK, TARGET, adapter=1)
    applied = rms(logits(model, SOURCE, MASK, TARGET, adapter=1) - expected)
    merged = rms(logits(merge(model, 1), SOURCE, MASK, TARGET) - expected)
    assert 0 < merged < 1.5 * applied
    assert merged < 0.05 * rms(expected)


@pytest.mark.parametrize("name", ["t5-wide", "mt5", "llama-odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_at_once", [1, 100, fold.N_AT_ONCE])
def test_every_weight_is_its_product_rounded_once(loaded, name, dtype, n_at_once, monkeypatch):
    """Also if a weight is folded row by row, or in parts, the last of which has fewer rows."""
    monkeypatch.setattr(fold, "N_AT_ONCE", n_at_once)
    model = extreme(loaded(name, n_adapters=2, dtype=dtype))
    before = dict(model.named_parameters())
    merged = dict(merge(model, 1).named_parameters())
    changed = set()
    for n, vector in minia3.vectors(model).items():
        place, _, kind = n.rpartition(".l_")
        weight = f"{place}.{'down' if kind == 'ff' else kind}.weight"
        factors = vector[1].to(max(dtype, torch.float32, key=lambda x: x.itemsize))
        product = before[weight].to(factors.dtype) * (factors if kind == "ff" else factors[:, None])
        assert torch.equal(merged[weight], product.to(dtype)), weight
        changed |= {weight, f"{n}.scale"}
    assert all(torch.equal(merged[n], p) for n, p in before.items() if n not in changed)


@pytest.mark.parametrize("weight", [8, -8])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-mha"])
def test_a_product_beyond_the_range_of_the_dtype_is_refused_by_name(loaded, name, weight):
    model = loaded(name, dtype=torch.bfloat16)
    minia3.vectors(model)[
        "encoder.blocks.1.ffn.l_ff" if name not in LLAMA_PEERS else "blocks.1.ffn.l_ff"
    ].data[0, 2] = 3e38
    parameters = dict(model.named_parameters())
    next(p for n, p in parameters.items() if n.endswith("1.ffn.down.weight")).data[:, 2] = weight
    with pytest.raises(
        ValueError, match=r"blocks\.1\.ffn\.down\.weight with .* not finite in torch.bfloat16"
    ):
        merge(model)


@pytest.mark.parametrize("adapter", [-1, 1])
def test_a_row_that_is_not_there_is_refused(loaded, adapter):
    with pytest.raises(ValueError, match="out of range: the model has rows 0 to 0"):
        merge(loaded("t5-v1.0"), adapter)


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
def test_merging_keeps_the_mode_and_which_parameters_are_frozen(loaded, name):
    model = loaded(name)
    minia3.freeze(model)
    for mode in (True, False):
        merged = merge(model.train(mode))
        assert {module.training for module in merged.modules()} == {mode}
    trains = {n for n, p in merged.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.scale" for n in minia3.vectors(merged)}
    assert {n for n, p in merge(loaded(name)).named_parameters() if not p.requires_grad} == set()


@pytest.mark.parametrize("name", PEERS)
def test_a_merged_model_is_saved_and_loaded_like_any_other_and_transformers_agrees(
    loaded, tmp_path, name
):
    import transformers

    model = randomize(loaded(name, n_adapters=2), 5)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=1)
    minia3.save_model(merge(model, 1), tmp_path)
    assert off(logits(minia3.load_model(tmp_path), SOURCE, MASK, TARGET), expected) < 1e-5
    kind = (
        transformers.AutoModelForSeq2SeqLM
        if name not in LLAMA_PEERS
        else transformers.AutoModelForCausalLM
    )
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert off(Peer(name, None, theirs.eval()).logits(SOURCE, MASK, TARGET), expected) < 1e-5


def test_merging_ones_changes_no_bit(loaded):
    model = loaded("t5-v1.1", dtype=torch.bfloat16)
    merged = merge(model)
    assert all(
        torch.equal(value, merged.state_dict()[n]) for n, value in model.state_dict().items()
    )


def test_an_adapter_that_is_trained_on_a_merged_model_does_not_name_the_base(loaded, tmp_path):
    model = loaded("t5-v1.0")
    for trained, named in ((model, True), (merge(model), False)):
        save_adapter(trained, tmp_path)
        base = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert (base is not None) == named


def test_a_model_that_is_merged_twice_still_tells_its_known_model(tmp_path):
    minia3.save_model(merge(merge(minia3.load_model("tiny-t5"))), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_name_or_path"] == "tiny-t5"


def test_a_merged_model_can_be_tuned_and_merged_again(loaded):
    model = randomize(loaded("llama-gqa"), 5)
    twice = randomize(merge(model), 6)
    expected = logits(twice, SOURCE, MASK, TARGET)
    assert off(logits(merge(twice), SOURCE, MASK, TARGET), expected) < 1e-5


# From file to file


def tree(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_memory(source, adapter, out):
    """Return what merge_files must write: name -> bytes."""
    model = minia3.load_model(source)
    minia3.load_adapter(model, adapter)
    tokenizer = (
        minia3.load_tokenizer(source)
        if source.is_file() or (source / "tokenizer.json").exists()
        else None
    )
    minia3.save_model(merge(model), out, tokenizer)
    return tree(out)


@pytest.fixture
def adapter(loaded, tmp_path):
    """Return a function that writes a random adapter of a model, without some vectors."""

    def get(name, without="nothing"):
        vectors = row_of(randomize(loaded(name), 5), 0)
        write_adapter(tmp_path / "adapter", {n: x for n, x in vectors.items() if without not in n})
        return tmp_path / "adapter"

    return get


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_file_to_file_the_bits_equal_merge_and_save_model(
    peer, adapter, tmp_path, name, dtype
):
    folder = shutil.copytree(peer(name).folder, tmp_path / name)
    stored = load_file(folder / "model.safetensors")
    save_file({n: x.to(dtype) for n, x in stored.items()}, folder / "model.safetensors")
    expected = in_memory(folder, adapter(name), tmp_path / "expected")
    merge_files(folder, adapter(name), tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    dtypes = {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()}
    is_widened = name not in LLAMA_PEERS and dtype == torch.float16  # a T5 would overflow
    assert dtypes == {torch.float32 if is_widened else dtype}


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_a_checkpoint_of_several_shards_is_merged_with_absent_vectors_and_its_tokenizer(
    loaded, copy, adapter, tmp_path, name, monkeypatch, word_tokenizer
):
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", 9000)
    folder = copy(name)
    vectors = adapter(name, without=".1.")
    minia3.save_model(minia3.load_model(folder), folder, word_tokenizer)
    expected = in_memory(folder, vectors, tmp_path / "expected")
    assert len(expected) > 6
    assert "tokenizer.json" in expected
    merge_files(str(folder), str(vectors), str(tmp_path / "out"))
    assert tree(tmp_path / "out") == expected


@pytest.fixture
def word_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    return minia3.load_tokenizer(tmp_path / "words")


def test_a_quantised_gguf_becomes_float32_with_its_tokenizer(tmp_path):
    pytest.importorskip("gguf", reason="needs the extra: pip install 'minia3[gguf]'")
    path = write_gguf(tmp_path / "a.gguf")
    write_adapter(tmp_path / "adapter", row_of(randomize(minia3.load_model(path)), 0))
    expected = in_memory(path, tmp_path / "adapter", tmp_path / "expected")
    merge_files(path, tmp_path / "adapter", tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.float32
    }
    assert "tokenizer.json" in expected


def write_gguf(path):
    """Write a random LLaMA of one layer and four words, with its weights in Q8_0."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_types([2, 3, 3, 1])
    writer.add_token_scores([0.0] * 4)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (4, 32),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (32, 32),
        "blk.0.attn_v": (32, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
        "output_norm": (32,),
        "output": (4, 32),
    }
    rng = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType
    for name, shape in shapes.items():
        kind = kinds.F32 if len(shape) == 1 else kinds.Q8_0
        x = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-unscaled", "llama-tied"])
def test_a_head_that_is_a_copy_of_the_embedding_is_left_out(copy, adapter, tmp_path, name):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["shared.weight" if name not in LLAMA_PEERS else "model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed.clone()}, folder / "model.safetensors")
    expected = in_memory(folder, adapter(name), tmp_path / "expected")
    merge_files(folder, adapter(name), tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_files_that_cannot_be_merged_are_refused_and_nothing_is_left(
    loaded, copy, adapter, tmp_path
):
    folder = copy("t5-v1.0")
    vectors = adapter("t5-v1.0")
    out = tmp_path / "out"
    for arguments, message in (
        ((folder, tmp_path / "none"), "not found"),
        ((tmp_path / "none", vectors), "no such folder"),
        ((folder, folder), "found a model, expected an adapter"),
        ((vectors, vectors), "found an adapter, expected a model"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_files(*arguments, out)
        assert not out.exists()
    other = adapter("llama-mha")
    with pytest.raises(ValueError, match="an adapter of another base"):
        merge_files(folder, other, out)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_files(folder, adapter("t5-v1.0"), out)
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_files(folder, adapter("t5-v1.0"), out / "notes.txt")
    assert tree(out) == {"notes.txt": b"mine"}


def test_another_name_of_the_base_is_a_warning_from_file_to_file_too(copy, adapter, tmp_path):
    folder = copy("t5-v1.0")
    vectors = adapter("t5-v1.0")
    raw = json.loads((vectors / "adapter_config.json").read_text())
    (vectors / "adapter_config.json").write_text(
        json.dumps(raw | {"base_model_name_or_path": "t5-large"})
    )
    with pytest.warns(UserWarning, match=f"trained on t5-large, and this model is {folder}"):
        merge_files(folder, vectors, tmp_path / "out")


@pytest.mark.parametrize(
    "tensor", ["encoder.block.0.layer.0.SelfAttention.k.weight", "shared.weight"]
)
def test_a_file_that_is_read_back_with_another_bit_is_refused_and_removed(
    copy, adapter, tmp_path, monkeypatch, tensor
):
    folder = copy("t5-v1.0")
    vectors = adapter("t5-v1.0")
    save = save_tensors

    def on_a_bad_disk(temporary, parts):
        save(temporary, parts)
        tensors = load_file(temporary / "model.safetensors")
        tensors[tensor].view(torch.int32)[3, 2] ^= 1
        save_file(tensors, temporary / "model.safetensors")

    monkeypatch.setattr("minia3.adapters.merge.save_tensors", on_a_bad_disk)
    with pytest.raises(ValueError, match=f"{tensor} was read back with different bits"):
        merge_files(folder, vectors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_checkpoint_or_a_whole_one(
    copy, adapter, tmp_path, monkeypatch
):
    """The kills happen in a process of their own, because a fork must not inherit threads."""
    monkeypatch.setattr("minia3.checkpoints.save.SHARD_BYTES", SMALL_SHARD)
    folder = copy("t5-v1.0")
    vectors = adapter("t5-v1.0")
    expected = in_memory(folder, vectors, tmp_path / "expected")
    found = in_new_process(merge_and_be_killed, folder, vectors, tmp_path / "out")
    for error, files in found:
        # From the rename that completes it on, the checkpoint counts: loading finishes the rest.
        if error is None:
            assert files == expected
        else:
            assert re.search(r"expected a folder with|no such folder", error)
    assert len(found) > 20
    assert files == expected, "the last child is not killed"


def merge_and_be_killed(folder, vectors, out):
    """Merge in children until one is not killed, and return what each of them left.

    A child is killed at its first operation on a file of `out`, the next at its second ... What it
    left is the error of loading it and None, or None and its files.
    """
    save_module.SHARD_BYTES = SMALL_SHARD
    found = []
    for moment in range(1, 500):
        child = os.fork()
        if child == 0:
            left = moment

            def kill(event, arguments):
                nonlocal left
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
                    left -= str(out) in str(arguments[0])
                    if left == 0:
                        os.kill(os.getpid(), 9)

            sys.addaudithook(kill)
            try:
                merge_files(folder, vectors, out)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        error = loading_error(out)
        files = None
        if error is None:
            (out / ".lock").unlink(missing_ok=True)
            files = tree_of_files(out)
        found.append((error, files))
        if status == 0:
            break
        shutil.rmtree(out, ignore_errors=True)
    return found


def loading_error(folder):
    try:
        minia3.load_model(folder)
    except ValueError as error:
        return str(error)
    return None


def tree_of_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_after_a_kill_the_same_command_succeeds(copy, adapter, tmp_path):
    folder = copy("t5-v1.0")
    vectors = adapter("t5-v1.0")
    (tmp_path / "out" / ".writing").mkdir(parents=True)
    (tmp_path / "out" / ".writing" / "config.json").write_text("{}")
    merge_files(folder, vectors, tmp_path / "out")
    assert tree(tmp_path / "out") == in_memory(folder, vectors, tmp_path / "expected")


def peak_of_merging(folder, adapter, out):
    """Return by how many bytes the memory of this process grows while it merges files."""
    save_module.SHARD_BYTES = 4_000_000
    config, _ = load.read_checkpoint(folder, weights=False)
    load.build_model(config)  # what torch imports on first use does not count
    before = anonymous()
    with sampling() as samples:
        merge_files(folder, adapter, out)
    return max(samples) - before


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_files_takes_the_memory_of_a_few_shards_and_not_of_the_model(tmp_path, dtype):
    """64 MB of weights in shards of 4 MB; float16 T5 becomes float32 on the way."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 4,
    }
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).to(
        dtype
    ).save_pretrained(tmp_path / "in")
    model = minia3.load_model(tmp_path / "in")
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 55e6
    save_adapter(randomize(model), tmp_path / "adapter")
    folders = [tmp_path / name for name in ("in", "adapter", "out")]
    assert 0 < in_new_process(peak_of_merging, *folders) < 3 * 4_000_000
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 12
