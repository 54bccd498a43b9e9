"""Guards the reader of Meta's files.

Its inverse, `take_apart`, writes a LLaMA as Meta's files, in any number of shards. The model that
is read from them computes what transformers computes. Files that do not belong together end in a
ValueError of one line.
"""

import base64
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LLAMA3_ROPE, LLAMA_SIZES, Peer, logits, off, tokens

import minia3
from minia3.checkpoints.hub import find
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import read_checkpoint
from minia3.checkpoints.meta import read_meta
from minia3.checkpoints.tensor_names import name_table
from minia3.files.tensors import Entry

SOURCE = tokens(2, 7)
TARGET = tokens(2, 4, seed=1)
SIZES = {
    **LLAMA_SIZES,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-3,
}
# Hugging Face's modules -> Meta's. Shards split the first by rows, the second by columns, and hold
# the third whole.
ROWS = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "gate_proj": "feed_forward.w1",
    "up_proj": "feed_forward.w3",
    "lm_head": "output",
}
COLUMNS = {"o_proj": "attention.wo", "down_proj": "feed_forward.w2"}
WHOLE = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "norm": "norm",
}


def make(n_kv_heads=8, **differs):
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": n_kv_heads, **differs})
    with torch.random.fork_rng():
        torch.manual_seed(n_kv_heads)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def neighbors(weight, n_heads):
    """Return the rows of each head in Meta's order: 0, d/2, 1, d/2 + 1 ..."""
    d_head = len(weight) // n_heads
    order = []
    for head in range(n_heads):
        for i in range(d_head // 2):
            first = head * d_head + i
            order += [first, first + d_head // 2]
    return weight[order]


def target_of(kind, llama3):
    """Return Meta's name of a module of Hugging Face, and the axis on which shards split it."""
    if kind == "embed_tokens":
        return "tok_embeddings", 0 if llama3 else 1
    if kind in ROWS:
        return ROWS[kind], 0
    if kind in COLUMNS:
        return COLUMNS[kind], 1
    return WHOLE[kind], None


def take_apart(model, folder, n_shards=1, llama3=False, freqs=True, **params):
    """Write `model` as Meta's files."""
    c = model.config
    shards = [{} for _ in range(n_shards)]
    for name, x in model.state_dict().items():
        *where, kind, _ = name.removeprefix("model.").split(".")
        prefix = f"layers.{where[1]}." if where else ""
        if kind == "q_proj":
            x = neighbors(x, c.num_attention_heads)
        if kind == "k_proj":
            x = neighbors(x, c.num_key_value_heads)
        target, axis = target_of(kind, llama3)
        parts = [x] * n_shards if axis is None else x.chunk(n_shards, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[f"{prefix}{target}.weight"] = part.clone()
            if freqs:
                shard["rope.freqs"] = torch.rand(c.hidden_size // c.num_attention_heads // 2)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    known = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "vocab_size": -1,
    }
    known |= {"multiple_of": 8, "norm_eps": c.rms_norm_eps}
    if c.num_key_value_heads != c.num_attention_heads:
        known["n_kv_heads"] = c.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(known | params))
    return folder


def rewrite(folder, **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps(params))


def refusal(folder):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at it)
        minia3.load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("n_kv_heads", [8, 4])
@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("llama3", [False, True])
def test_joined_shards_compute_what_transformers_computes(tmp_path, n_kv_heads, n_shards, llama3):
    theirs = make(n_kv_heads)
    model = minia3.load_model(take_apart(theirs, tmp_path, n_shards, llama3))
    expected = Peer("", None, theirs).logits(SOURCE, None, TARGET)
    assert off(logits(model, SOURCE, None, TARGET), expected) < 1e-5
    assert model.config.own_head
    assert (model.config.bos_id, model.config.eos_ids) == (1, (2,))


def test_bfloat16_is_read_bit_for_bit(tmp_path):
    theirs = make(4).bfloat16()
    take_apart(theirs, tmp_path, 2)
    model = minia3.load_model(tmp_path)
    table = name_table(model)
    for name, x in theirs.state_dict().items():
        assert torch.equal(model.get_parameter(table[name]), x)


def test_one_tensor_is_joined_when_it_is_read_and_no_other(tmp_path, monkeypatch):
    entries = read_meta(take_apart(make(), tmp_path, 4))[1]
    assert len(entries) == 2 * 9 + 3
    assert {entry.shape for entry in entries.values()} == {
        (64, 32),
        (32, 32),
        (40, 32),
        (32, 40),
        (32,),
    }
    joined_axes = []
    original = torch.cat

    def cat(parts, axis):
        joined_axes.append(axis)
        return original(parts, axis)

    monkeypatch.setattr(torch, "cat", cat)
    assert entries["model.layers.1.mlp.down_proj.weight"].read().shape == (32, 40)
    assert joined_axes == [1]


def test_a_folder_with_params_json_is_metas_unless_it_has_a_config_json(tmp_path, monkeypatch):
    take_apart(make(4), tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    tmp_path.rename("llama-2-7b")
    assert find("llama-2-7b") == Path("llama-2-7b"), "not the known model of that name"
    folder = find("llama-2-7b")
    assert read_checkpoint(folder, weights=False)[0].n_kv_heads == 4
    minia3.save_model(minia3.load_model(folder), folder)
    model = minia3.load_model(folder)
    assert len(list(folder.glob("consolidated*"))) == 1
    rewrite(folder, n_heads="nobody reads this now")
    assert read_checkpoint(folder, weights=False)[0] == model.config


def test_a_model_of_meta_is_saved_in_the_layout_of_hugging_face(tmp_path):
    theirs = make(4)
    minia3.save_model(minia3.load_model(take_apart(theirs, tmp_path, 2)), tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, x in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)


# What params.json says, and what the tensors must tell


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize(
    ("tied", "scaled", "factor"),
    [(True, True, 32.0), (False, True, 8.0), (True, False, None), (False, False, None)],
)
def test_a_tied_head_tells_llama_3_2_from_3_1(tmp_path, n_shards, tied, scaled, factor):
    rope = {
        **LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "factor": factor,
        "original_max_position_embeddings": 8192,
    }
    rope = rope if scaled else {"rope_type": "default", "rope_theta": 500000.0}
    theirs = make(4, tie_word_embeddings=tied, rope_parameters=rope)
    take_apart(
        theirs,
        tmp_path,
        n_shards,
        llama3=True,
        freqs=False,
        rope_theta=500000.0,
        use_scaled_rope=scaled,
    )
    model = minia3.load_model(tmp_path)
    assert model.config.rope_scaling == ((factor, 1.0, 4.0, 8192) if scaled else None)
    assert (
        read_checkpoint(tmp_path, weights=False)[0].own_head == model.config.own_head == (not tied)
    )
    assert (model.head is None) == tied
    source_BM = tokens(2, 40)
    expected = Peer("", None, theirs).logits(source_BM, None, TARGET)
    assert off(logits(model, source_BM, None, TARGET), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama-2-7b", {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}),
        (
            "llama-2-70b",
            {
                "multiple_of": 4096,
                "ffn_dim_multiplier": 1.3,
                "n_kv_heads": 8,
                "norm_eps": 1e-5,
                "vocab_size": -1,
            },
        ),
        (
            "llama-3-8b",
            {
                "multiple_of": 1024,
                "ffn_dim_multiplier": 1.3,
                "n_kv_heads": 8,
                "norm_eps": 1e-5,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
            },
        ),
        (
            "llama-3.1-8b",
            {
                "multiple_of": 1024,
                "ffn_dim_multiplier": 1.3,
                "n_kv_heads": 8,
                "norm_eps": 1e-5,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
                "use_scaled_rope": True,
            },
        ),
        (
            "llama-3.2-1b",
            {
                "multiple_of": 256,
                "ffn_dim_multiplier": 1.5,
                "n_kv_heads": 8,
                "norm_eps": 1e-5,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
                "use_scaled_rope": True,
            },
        ),
    ],
)
def test_the_params_that_meta_published_lead_to_the_config_on_the_hub(
    tmp_path, monkeypatch, name, params
):
    """The entries have the published shapes, but reading one gives three numbers: equal ones in the
    embedding and the head of a tied model.
    """
    expected = KNOWN_MODELS[name].config
    c = expected
    zeros = torch.zeros(3)
    head = torch.ones(3) if c.own_head else zeros

    def entry(shape, content):
        return Entry(shape, torch.bfloat16, lambda: content)

    entries = {
        "tok_embeddings.weight": entry((c.vocab_size, c.d_model), zeros),
        "output.weight": entry((c.vocab_size, c.d_model), head),
        "layers.0.attention.wq.weight": entry((c.d_model, c.d_model), zeros),
        "layers.0.feed_forward.w1.weight": entry((c.d_ff, c.d_model), zeros),
    }
    monkeypatch.setattr("minia3.checkpoints.meta.read_tensors", lambda path: entries)
    (tmp_path / "consolidated.00.pth").write_text("")
    sizes = {"dim": c.d_model, "n_layers": c.n_layers, "n_heads": c.n_heads}
    (tmp_path / "params.json").write_text(json.dumps(params | sizes))
    found = read_checkpoint(tmp_path, weights=False)[0]
    if c.vocab_size == 128256:
        assert found.eos_ids == (128001, 128008, 128009)
        expected = dataclasses.replace(expected, eos_ids=found.eos_ids)
    assert found == expected


# Files that do not belong together


def test_a_missing_shard_is_reported(tmp_path):
    take_apart(make(4), tmp_path, 4)
    for removed, n_shards, n_rows in ((1, 3, 24), (3, 2, 16), (2, 1, 8)):
        (tmp_path / f"consolidated.{removed:02d}.pth").unlink()
        found = f"{n_shards} shards join to {n_rows} rows of attention.wq.weight"
        message = f"{tmp_path}: {found}, expected dim=32: is a shard missing?"
        assert refusal(tmp_path) == message
    (tmp_path / "consolidated.00.pth").unlink()
    assert refusal(tmp_path) == f"{tmp_path / 'consolidated.00.pth'}: not found"


def change(path, act):
    loaded = torch.load(path)
    act(loaded)
    torch.save(loaded, path)


@pytest.mark.parametrize(
    "act",
    [
        lambda shard: shard.update({"layers.0.attention.wo.weight": torch.ones(32, 9)}),
        lambda shard: shard.update({"norm.weight": torch.ones(32, dtype=torch.float16)}),
        lambda shard: shard.update({"layers.2.attention.wo.weight": torch.ones(32, 8)}),
        lambda shard: shard.pop("layers.1.ffn_norm.weight"),
    ],
)
def test_shards_of_other_models_are_refused(tmp_path, act):
    change(take_apart(make(4), tmp_path, 4) / "consolidated.02.pth", act)
    expected = "expected the names, shapes and dtypes of consolidated.00.pth"
    assert refusal(tmp_path) == f"{tmp_path / 'consolidated.02.pth'}: {expected}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "1 shards join to 32 rows of attention.wq.weight, expected dim=64"),
        ({"dim": None}, "expected dim=None"),
        ({"n_layers": 1}, "model.layers.1.input_layernorm.weight is left over"),
        ({"n_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        (
            {"n_layers": 10**9},
            "num_hidden_layers is 1000000000, expected a whole number from 1 to 1024",
        ),
        (
            {"n_heads": 4},
            "model.layers.0.self_attn.q_proj.weight has shape (32, 32), expected (16, 32)",
        ),
        (
            {"n_heads": 16},
            "model.layers.0.self_attn.q_proj.weight has shape (32, 32), expected (64, 32)",
        ),
        ({"n_heads": "8"}, "num_attention_heads is '8', expected a whole number"),
        (
            {"n_kv_heads": 8},
            "model.layers.0.self_attn.k_proj.weight has shape (16, 32), expected (32, 32)",
        ),
        ({"n_kv_heads": 3}, "3 key/value heads must divide 8 heads"),
        ({"n_kv_heads": 0}, "num_key_value_heads is 0"),
        ({"vocab_size": 65}, "model.embed_tokens.weight has shape (64, 32), expected (65, 32)"),
        ({"norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        (
            {"sliding_window": 4096, "moe": {}},
            "params.json asks for what minia3 does not support: ['moe', 'sliding_window']",
        ),
    ],
)
def test_params_of_another_model_are_refused(tmp_path, changes, message):
    rewrite(take_apart(make(4), tmp_path), **changes)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "act",
    [
        lambda shard: shard.clear(),
        lambda shard: shard.update({"output.weight": torch.ones(())}),
        lambda shard: shard.update({"tok_embeddings.weight": torch.ones(64)}),
        lambda shard: shard.update({"layers.0.attention.wo.weight": torch.ones(3, 3, 3)}),
        lambda shard: shard.update(
            {"layers.0.attention.wk.weight": torch.ones(16, 32, dtype=torch.int8)}
        ),
        lambda shard: shard.update({"layers.{}.attention.wk.weight": torch.ones(16, 32)}),
        lambda shard: shard.update({"rope.freqs": torch.ones(())}),
        lambda shard: shard.pop("tok_embeddings.weight"),
        lambda shard: shard.pop("layers.0.feed_forward.w1.weight"),
        lambda shard: shard.update({"norm.weight": torch.ones(1).expand(32)}),
        lambda shard: shard.update({"norm.weight": "text"}),
    ],
)
@pytest.mark.parametrize("n_shards", [1, 2])
def test_damaged_shards_are_refused_with_their_file_or_folder(tmp_path, act, n_shards):
    take_apart(make(4), tmp_path, n_shards)
    for i in range(n_shards):
        change(tmp_path / f"consolidated.{i:02d}.pth", act)
    assert refusal(tmp_path).startswith(str(tmp_path))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_shard_does_not_run_and_a_shard_that_is_cut_short_is_refused(tmp_path):
    take_apart(make(4), tmp_path, 2)
    file = tmp_path / "consolidated.01.pth"
    marker = tmp_path / "it ran"
    whole = file.read_bytes()
    torch.save({"norm.weight": Hostile(str(marker))}, file)
    assert refusal(tmp_path).startswith(f"{file}: damaged, or more than tensors")
    assert not marker.exists()
    file.write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path).startswith(f"{file}: damaged, ")


def test_the_tokenizer_of_llama_3_is_refused_and_the_error_says_what_to_use(tmp_path):
    lines = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
    take_apart(make(), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(
        ValueError,
        match=r"tokenizer\.model: this is Llama 3's tiktoken format.*the model's tokenizer\.json",
    ):
        minia3.load_tokenizer(tmp_path)


@pytest.mark.skipif(
    "MINIA3_TEST_DATA" not in os.environ, reason="MINIA3_TEST_DATA is not set: no real tokenizers"
)
def test_the_tokenizer_beside_the_files_of_llama_2_is_read(tmp_path):
    real = Path(os.environ["MINIA3_TEST_DATA"], "tokenizers", "llama2", "tokenizer.model")
    shutil.copy(real, take_apart(make(), tmp_path))
    tokenizer = minia3.load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]
