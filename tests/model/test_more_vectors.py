"""Guards the vectors beside the paper's three: they compute, learn and write what PEFT's do, each example is scaled by
its own row wherever the rows of a batch go, and a model that nobody asked for them has none."""

import functools
import json
import re
import signal
import warnings

import pytest
import running
import torch
from batches import batch_of, gradients, same
from conftest import (
    Peer,
    at_once,
    double,
    logits,
    make,
    off,
    randomize,
    their_logits,
    tokens,
    with_peft,
)
from running import at_line, kill_self, last_vectors, metrics, run, train, words
from safetensors.torch import load_file
from test_compile import compile_blocks
from torch.testing import assert_close
from words import word_tokenizer

import minia3
from minia3.adapters.lora import add_lora
from minia3.adapters.merge import merge, merge_files
from minia3.adapters.mix import mix
from minia3.adapters.named_rows import Adapters
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import row_of, save_adapter
from minia3.adapters.vector_names import PEFT
from minia3.checkpoints.tensor_names import expand, name_table
from minia3.model.blocks import Block
from minia3.model.more_vectors import add_vectors, choose_vectors, possible_vectors
from minia3.model.recompute import recompute_blocks
from minia3.training.prepare import prepare_model

ALL, PLAIN = "k,v,ff,q,o,up,gate", "k,v,ff,q,o,gate"  # the latter where no feed-forward is gated
SOURCE, TARGET = tokens(4, 7), tokens(4, 5, seed=1)
MASK = torch.tensor(
    [[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3, [True] + [False] * 6]
)
ATTENTION = ["q", "k", "v", "o"]
SEVEN = {  # PEFT's names of all linears of the blocks; the last scales its input
    "t5-v1.0": [*ATTENTION, "wi", "wo"],
    "t5-v1.1": [*ATTENTION, "wi_0", "wi_1", "wo"],
    "t5-wide": [*ATTENTION, "wi", "wo"],
    "mt5": [*ATTENTION, "wi_0", "wi_1", "wo"],
    "llama-gqa": [f"{x}_proj" for x in (*ATTENTION, "gate", "up", "down")],
}


def all_of(name):
    return PLAIN if name in ("t5-v1.0", "t5-wide", "t5") else ALL


THREE = ["t5-v1.0", "t5-v1.1", "llama-gqa"]


@pytest.fixture
def scaled(loaded):
    """name -> a model of ours with vectors in all places, random ones."""

    def get(name, n_adapters=1, seed=0, sites=None, **options):
        model = loaded(name, n_adapters, **options)
        choose_vectors(model, sites or all_of(name), "0-", True)
        return randomize(model, seed)

    return get


@pytest.fixture
def peft_folder(tmp_path):
    """name -> PEFT's model with random vectors in all places (or `targets`), and the folder where it has saved them."""

    def get(name, targets=None, inputs=None):
        targets = targets or SEVEN[name]
        inputs = [x for x in targets if x == SEVEN[name][-1]] if inputs is None else inputs
        model = with_peft(name, target_modules=targets, feedforward_modules=inputs)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return get


def alone(model, row, loaded, name, **options):
    """A model of ours in which this row is the only one."""
    one = loaded(name, **options)
    add_vectors(one, minia3.vectors(model))
    for n, table in minia3.vectors(one).items():
        table.data[0] = minia3.vectors(model)[n][row]
    return one


# One, and none


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ones_are_the_base_bit_for_bit(loaded, name, dtype):
    model = loaded(name, n_adapters=2, dtype=dtype)
    before = minia3.vectors(model).keys()
    expected = logits(model, SOURCE, MASK, TARGET)
    choose_vectors(model, all_of(name), "0-", True)
    assert torch.equal(logits(model, SOURCE, MASK, TARGET), expected)
    added = {n: v for n, v in minia3.vectors(model).items() if n not in before}
    assert added.keys() == possible_vectors(model).keys()
    assert all(v.dtype == torch.float32 and len(v) == 2 and (v == 1).all() for v in added.values())


@pytest.mark.parametrize("name", THREE)
def test_a_model_has_none_that_nobody_asked_for(loaded, name):
    model, expected = loaded(name), [n for n, _ in loaded(name).named_parameters()]
    choose_vectors(model, "k,v,ff", "0-", True)
    assert [n for n, _ in model.named_parameters()] == expected
    assert all(type(x) is Block for x in model.modules() if isinstance(x, Block))
    assert {n.rsplit(".l_")[1] for n in minia3.vectors(model)} == {"k", "v", "ff"}


COUNTS = {
    "t5-v1.0": [("q", 6), ("o", 6), ("wi", 4)],
    "llama-gqa": [("q", 2), ("o", 2), ("up", 2), ("gate", 2)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_has_room_for_what_its_linears_give(loaded, name):
    found = possible_vectors(loaded(name))
    kinds = [n.rsplit(".l_")[1] for n in found]
    assert sorted((kind, kinds.count(kind)) for kind in {*kinds}) == sorted(COUNTS[name])
    assert {found[n] for n in found if n.endswith(("l_q", "l_o"))} == {24}
    assert {found[n] for n in found if not n.endswith(("l_q", "l_o"))} == {40}


# As PEFT


@pytest.mark.parametrize("name", SEVEN)
def test_logits_and_gradients_of_a_padded_batch_equal_peft(loaded, peft_folder, name):
    theirs, folder = peft_folder(name)
    ours = loaded(name, n_adapters=3, seed=1)
    others = {n: v.detach().clone() for n, v in minia3.vectors(ours).items()}
    minia3.load_adapter(ours, folder, adapter=1)
    for n, vector in minia3.vectors(ours).items():
        assert torch.equal(
            vector[[0, 2]], others[n][[0, 2]] if n in others else torch.ones_like(vector[:2])
        ), n
    theirs, ours = double(theirs), ours.double()
    minia3.freeze(ours)
    expected = their_logits(theirs, SOURCE, MASK, TARGET)
    state = ours.start(SOURCE, MASK, torch.tensor([1, 1, 1, 1]))
    found = ours.step(torch.cat((state.start, TARGET), dim=1), state)
    assert off(found, expected) < 1e-11
    for x in (expected, found):
        x.log_softmax(-1)[..., 5].mean().backward()
    table = expand(PEFT, 3)
    learnt = {
        table[n.replace(".default", "")]: p.grad.flatten()
        for n, p in theirs.named_parameters()
        if "ia3_l" in n
    }
    assert learnt.keys() == minia3.vectors(ours).keys()
    largest = max(gradient.abs().max() for gradient in learnt.values())
    for n, gradient in learnt.items():
        assert gradient.abs().max() > 1e-6 * largest, n
        assert off(minia3.vectors(ours)[n].grad[1], gradient) < 1e-9, n
        assert not minia3.vectors(ours)[n].grad[[0, 2]].any()


@pytest.mark.parametrize("name", SEVEN)
def test_our_folder_is_what_peft_itself_writes_and_gives_the_same_logits_there(
    loaded, peft_folder, tmp_path, name
):
    import peft

    _, folder = peft_folder(name)
    model = loaded(name)
    minia3.load_adapter(model, folder)
    save_adapter(model, tmp_path / "ours")
    found, expected = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "ours", folder)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    ours, raw = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path / "ours", folder)
    )
    assert sorted(ours["target_modules"]) == sorted(raw["target_modules"])
    assert ours["feedforward_modules"] == raw["feedforward_modules"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing.*"
        )  # transformers' and PEFT's own affair
        again = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert len([n for n, _ in again.named_parameters() if "ia3_l" in n]) == len(
        minia3.vectors(model)
    )
    expected = Peer(name, None, again).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


PARTIAL = [
    ("t5-v1.0", ["q", "wi"]),
    ("t5-v1.0", r".*EncDecAttention\.(q|o)"),
    ("t5-v1.1", ["wi_0"]),
    (
        "t5-v1.1",
        r"encoder\..*wi_1|decoder\.block\.1\..*wo|decoder\..*\.wi_1",
    ),  # wi_1 alone, and with wo
    ("llama-gqa", ["up_proj", "o_proj"]),
    ("llama-gqa", r".*\.1\..*(gate|down)_proj"),
]


@pytest.mark.parametrize(("name", "targets"), PARTIAL)
def test_any_subset_of_places_comes_in_and_goes_out(loaded, peft_folder, tmp_path, name, targets):
    import peft

    inputs = rf".*\.{SEVEN[name][-1]}" if isinstance(targets, str) else []
    theirs, folder = peft_folder(name, targets, inputs)
    model = loaded(name, seed=1)
    minia3.load_adapter(model, folder)
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5
    write_adapter(tmp_path / "ours", *read_adapter(folder))
    ours = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert off(Peer(name, None, ours).logits(SOURCE, MASK, TARGET), expected) < 1e-5
    again, found = read_adapter(tmp_path / "ours").vectors, read_adapter(folder).vectors
    assert {n: x.tolist() for n, x in again.items()} == {n: x.tolist() for n, x in found.items()}


def test_l_up_alone_is_l_ff_and_beside_it_is_itself(peft_folder):
    _, folder = peft_folder(
        "t5-v1.1", r"encoder\..*wi_1|decoder\.block\.1\..*wo|decoder\..*\.wi_1", r".*\.wo"
    )
    assert sorted(read_adapter(folder).vectors) == [
        *("decoder.blocks.0.ffn.l_ff", "decoder.blocks.1.ffn.l_ff", "decoder.blocks.1.ffn.l_up"),
        *("encoder.blocks.0.ffn.l_ff", "encoder.blocks.1.ffn.l_ff"),
    ]


def test_an_adapter_with_places_that_the_model_lacks_is_refused_and_adds_nothing(
    loaded, peft_folder
):
    for name, other, message in (
        ("t5-v1.1", "t5-v1.0", "encoder.blocks.0.ffn.l_gate of 40, expected none"),
        ("t5-v1.0", "t5-v1.1", "encoder.blocks.0.ffn.l_wi of 40, expected none"),
        ("llama-gqa", "t5-v1.0", "blocks.0.attn.l_q of 24, expected none"),
        ("t5-v1.0", "t5-wide", "encoder.blocks.0.attn.l_q of 24, expected 40"),
    ):
        _, folder = peft_folder(name)
        model = loaded(other)
        before = [n for n, _ in model.named_parameters()]
        with pytest.raises(ValueError, match=re.escape(message)):
            minia3.load_adapter(model, folder)
        assert [n for n, _ in model.named_parameters()] == before


def test_the_output_of_the_down_projection_has_no_vector_and_is_refused_by_name(
    loaded, peft_folder
):
    _, folder = peft_folder("llama-gqa", inputs=[])
    with pytest.raises(
        ValueError, match=r"down_proj.ia3_l is torch.float32 \(24, 1\), expected floats \(1, 24\)"
    ):
        minia3.load_adapter(loaded("llama-gqa"), folder)


@pytest.mark.parametrize("name", ["t5-v1.0", "mt5", "llama-gqa"])
def test_what_is_saved_comes_back_bit_for_bit(scaled, loaded, tmp_path, name):
    model, again = scaled(name, n_adapters=2, seed=3), loaded(name, n_adapters=3)
    save_adapter(model, tmp_path, adapter=1)
    minia3.load_adapter(again, tmp_path, adapter=2)
    assert minia3.vectors(again).keys() == minia3.vectors(model).keys()
    for n, vector in minia3.vectors(again).items():
        assert torch.equal(vector[2], minia3.vectors(model)[n][1])
        assert (vector[:2] == 1).all()


def test_a_vector_that_an_adapter_lacks_becomes_one_and_is_one_in_a_mixture(
    scaled, loaded, tmp_path
):
    model = scaled("llama-gqa", seed=3)
    save_adapter(loaded("llama-gqa", seed=4), tmp_path / "three")
    save_adapter(model, tmp_path / "seven")
    parts = [(read_adapter(tmp_path / name).vectors, 0.5) for name in ("three", "seven")]
    mixed = mix(parts)
    name = "blocks.1.ffn.l_gate"
    assert torch.equal(mixed[name], 1 + 0.5 * (parts[1][0][name] - 1))
    minia3.load_adapter(model, tmp_path / "three")
    assert {n for n, x in row_of(model, 0).items() if (x == 1).all()} == possible_vectors(
        model
    ).keys()


def test_vectors_join_a_float64_model_in_float64_and_a_used_one_in_all_rows(
    scaled, loaded, tmp_path
):
    save_adapter(scaled("t5-v1.1", seed=3), tmp_path / "all" / "a")
    save_adapter(loaded("t5-v1.1", seed=4), tmp_path / "all" / "b")
    model = loaded("t5-v1.1", n_adapters=2).double()
    adapters = Adapters(model)
    adapters.load("b", tmp_path / "all" / "b")
    adapters.load_folder(tmp_path / "all")
    assert {(v.dtype, len(v)) for v in minia3.vectors(model).values()} == {(torch.float64, 4)}
    for name in "ab":
        for n, x in row_of(model, adapters.rows([name]).item()).items():
            expected = read_adapter(tmp_path / "all" / name).vectors
            assert torch.equal(x.float(), expected.get(n, torch.ones_like(x).float()))
    adapters.remove("a")
    assert all((x == 1).all() for row in (0, 2) for x in row_of(model, row).values())


def test_vectors_join_a_model_that_needs_no_gradient_without_one(scaled, loaded, tmp_path):
    save_adapter(scaled("t5-v1.1", seed=3), tmp_path)
    model = loaded("t5-v1.1").requires_grad_(False)
    minia3.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_an_adapter_with_more_vectors_may_be_loaded_within_a_block_s_call(scaled, loaded, tmp_path):
    """As another thread might: the call that is under way has none of them, and goes on as the base."""
    save_adapter(scaled("llama-gqa", seed=3), tmp_path / "more")
    logits(
        scaled("llama-gqa", n_adapters=2), SOURCE, MASK, TARGET, 1
    )  # its rows are not those of another's call
    model = loaded("llama-gqa", n_adapters=2)
    expected, adapters = logits(model, SOURCE, MASK, TARGET), Adapters(model)
    hook = model.blocks[0].attn_norm.register_forward_hook(
        lambda *_: None if adapters else adapters.load("more", tmp_path / "more")
    )
    assert torch.equal(logits(model, SOURCE, MASK, TARGET), expected)
    hook.remove()
    row = adapters.rows(["more"]).item()
    alone = logits(scaled("llama-gqa", seed=3), SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET, row), alone) < 1e-5


def test_vectors_may_be_added_to_recomputed_blocks(loaded):
    model = loaded("llama-gqa")
    prepare_model(model, train.Config(recompute=True))
    choose_vectors(model, "q", "0-")
    randomize(model, seed=3)
    plain = loaded("llama-gqa")
    choose_vectors(plain, "q", "0-")
    randomize(plain, seed=3)
    batch = batch_of((7, 3, 5))
    same(gradients(model, batch), gradients(plain, batch), rtol=0, atol=0)


# Each example by its own row


@torch.no_grad()
def test_threads_that_share_a_model_each_get_their_own_rows(scaled):
    model, wrong = scaled("llama-gqa", n_adapters=3), []
    expected = [logits(model, SOURCE, MASK, TARGET, adapter) for adapter in range(3)]

    @torch.no_grad()
    def work(adapter):
        wrong.extend(
            1
            for _ in range(60)
            if off(logits(model, SOURCE, MASK, TARGET, adapter), expected[adapter]) > 1e-5
        )

    at_once(work, [(adapter,) for adapter in range(3)])
    assert wrong == []


@pytest.mark.parametrize("name", THREE)
def test_mixed_is_each_alone_padded_or_not_with_cache_choices_beams_and_samples(
    scaled, loaded, name
):
    model, rows = scaled(name, n_adapters=5, seed=3), torch.tensor([4, 0, 2, 4])
    tokenizer = word_tokenizer(ends=name != "llama-gqa")
    prompts = ["w3 w4 w5", "w9", "w6 w7 w8 w9 w10", "w11 w12"]
    choices = [["w3", "w4 w5", "w6"], ["w7 w8 w9", "w4"], ["w5"], ["w3 w4", "w8", "w9"]]
    drawn = {"temperature": 1.0, "samples": 2, "seed": 3}
    found = {
        "padded": logits(model, SOURCE, MASK, TARGET, rows),
        "not": logits(model, SOURCE, None, TARGET, rows),
        "rank": minia3.rank(model, tokenizer, prompts, choices, adapter=rows, batch_size=4),
        "greedy": minia3.generate(
            model, tokenizer, prompts, adapter=rows, max_new_tokens=5, batch_size=4
        ),
        "beams": minia3.generate(
            model, tokenizer, prompts, adapter=rows, max_new_tokens=4, beams=3, batch_size=16
        ),
        "drawn": minia3.generate(
            model, tokenizer, prompts, adapter=rows, max_new_tokens=4, batch_size=16, **drawn
        ),
    }
    with torch.no_grad():  # a token at a time
        state = model.start(SOURCE, MASK, rows)
        steps = [
            model.step(x, state) for x in torch.cat((state.start, TARGET), dim=1).split(1, dim=1)
        ]
    assert off(torch.cat(steps, dim=1), found["padded"]) < 1e-5
    for i, row in enumerate(rows.tolist()):
        one, own = alone(model, row, loaded, name), slice(i, i + 1)
        assert off(found["padded"][own], logits(one, SOURCE[own], MASK[own], TARGET[own])) < 1e-5
        assert off(found["not"][own], logits(one, SOURCE[own], None, TARGET[own])) < 1e-5
        expected = minia3.rank(one, tokenizer, prompts[own], choices[own])
        assert_close(found["rank"][own, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
        assert found["greedy"][own] == minia3.generate(
            one, tokenizer, prompts[own], max_new_tokens=5
        )
        assert found["beams"][own] == minia3.generate(
            one, tokenizer, prompts[own], max_new_tokens=4, beams=3
        )
        own_drawn = minia3.generate(
            model, tokenizer, prompts, adapter=row, max_new_tokens=4, batch_size=16, **drawn
        )
        assert found["drawn"][2 * i : 2 * i + 2] == own_drawn[2 * i : 2 * i + 2]
    assert off(found["not"][:1], found["not"][3:]) > 1e-2
    for n, table in minia3.vectors(
        model
    ).items():  # every vector takes part, of row 2 in the third example alone
        was = table.data[2].clone()
        table.data[2] += 0.5
        moved = (logits(model, SOURCE, MASK, TARGET, rows) - found["padded"]).abs().amax((1, 2))
        assert (moved > 1e-4).tolist() == [False, False, True, False], n
        table.data[2] = was


def test_gradients_of_choices_that_share_a_source_are_those_of_sources_repeated(scaled):
    model, rows = scaled("t5-v1.1", n_adapters=3, seed=3).double(), torch.tensor([2, 0, 1, 2])
    target = tokens(12, 4, seed=5)
    results = []
    for states in (
        lambda: model.start(SOURCE, MASK, rows).repeat(3),
        lambda: model.start(*(x.repeat_interleave(3, dim=0) for x in (SOURCE, MASK, rows))),
        lambda: model.start(SOURCE, MASK, rows).repeat(3).select(torch.arange(12)),
    ):
        model.zero_grad()
        logp = minia3.logprobs(model, states(), target)
        (logp * torch.arange(12)[:, None]).sum().backward()
        results.append([logp.detach(), *(v.grad for v in minia3.vectors(model).values())])
    same(results[1], results[0], rtol=1e-9, atol=1e-9)
    same(results[2], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", THREE)
def test_checkpointed_blocks_give_the_same_bits_under_dropout(scaled, name):
    model, batch = scaled(name, seed=0).train(), batch_of((30, 12, 25))
    minia3.freeze(model)
    expected = gradients(model, batch)
    assert all(gradient.any() for gradient in expected[1:])
    for block in (module for module in model.modules() if isinstance(module, Block)):
        recompute_blocks([block])
    same(gradients(model, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["t5-v1.1", "llama-gqa"])
def test_compiled_is_plain_and_other_lengths_compile_nothing_anew(scaled, name):
    model, graphs = scaled(name, seed=0), []
    minia3.freeze(model)
    first, lengths = (15, 5, 9, 16, 13), [(18,) * 7, (4, 9, 2, 2), (8, 8), (30, 1, 1, 1, 1, 2, 9)]
    expected = gradients(model, batch_of(first))
    compile_blocks(model, lambda graph, _: graphs.append(graph) or graph.forward)
    same(gradients(model, batch_of(first)), expected)
    gradients(model, batch_of(lengths[0]))
    n = len(graphs)
    assert n > 0
    for own in lengths[1:]:
        gradients(model, batch_of(own))
    assert len(graphs) == n
    torch.compiler.reset()


# Merging


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_merged_row_is_the_row_applied_and_has_no_vectors_but_the_paper_s(
    scaled, loaded, name, dtype
):
    model = scaled(name, n_adapters=2, seed=3, dtype=dtype)
    expected = logits(model, SOURCE, MASK, TARGET, adapter=1)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    merged = merge(model, 1)
    bound = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.1}[
        dtype
    ]  # vectors are float32
    assert off(logits(merged, SOURCE, MASK, TARGET), expected) < bound
    assert [(n, type(x)) for n, x in merged.named_modules()] == [
        (n, type(x)) for n, x in loaded(name).named_modules()
    ]
    assert all((v == 1).all() and len(v) == 1 for v in minia3.vectors(merged).values())
    weights = dict(model.named_parameters())
    for n, p in merged.named_parameters():
        if weights[n].dim() == 2 and "blocks" in n and not n.endswith(".scale"):
            assert p.data_ptr() != weights[n].data_ptr(), n
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert torch.equal(logits(model, SOURCE, MASK, TARGET, adapter=1), expected)
    assert off(logits(merged, SOURCE, MASK, TARGET), logits(model, SOURCE, MASK, TARGET)) > 1e-2
    add_vectors(merged, possible_vectors(merged))
    assert len(minia3.vectors(merged)) == len(minia3.vectors(model))


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_merging_files_gives_the_bits_of_merging_in_memory(scaled, peer, tmp_path, name):
    model = scaled(name, seed=3)
    save_adapter(model, tmp_path / "adapter")
    merge_files(peer(name).folder, tmp_path / "adapter", tmp_path / "merged")
    minia3.save_model(merge(model), tmp_path / "saved")
    found, expected = (load_file(tmp_path / x / "model.safetensors") for x in ("merged", "saved"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], x) for n, x in expected.items())
    again = minia3.load_model(tmp_path / "merged")
    assert off(logits(again, SOURCE, MASK, TARGET), logits(model, SOURCE, MASK, TARGET)) < 1e-5


@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_the_saved_model_is_the_base_and_nothing_else(scaled, loaded, tmp_path, name):
    minia3.save_model(scaled(name), tmp_path / "scaled")
    minia3.save_model(loaded(name), tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "scaled" / path.name).read_bytes()


def test_lora_and_a_vector_may_share_a_linear_and_merge(loaded):
    """The vector scales what the linear with its LoRA gives, so LoRA is added before it."""
    model = loaded("llama-gqa", dtype=torch.float64)
    choose_vectors(model, "q,o", "0-")
    randomize(model, seed=3)
    for parameter in add_lora(model, where=("q", "v")).values():
        parameter.data = 0.3 * torch.randn_like(parameter)
    expected = logits(model, SOURCE, MASK, TARGET)
    assert off(logits(merge(model), SOURCE, MASK, TARGET), expected) < 1e-6  # vectors are float32


# Which are trained


@pytest.mark.parametrize(
    ("name", "sites", "layers", "cross", "chosen", "added"),
    [
        ("t5-v1.1", ALL, "0-", True, ".*", ".*"),
        (
            "t5-v1.1",
            "q,gate",
            "1",
            False,
            r".*\.1\.(attn\.l_q|ffn\.l_gate)",
            r".*\.1\.(attn\.l_q|ffn\.l_gate)",
        ),
        ("t5-v1.0", "k,gate", "0", True, r".*\.0\..*l_(k|wi)", r".*\.0\..*l_wi"),
        ("llama-gqa", "o,up", "0,1", True, r".*l_(o|up)", r".*l_(o|up)"),
        ("llama-gqa", "ff,k", "0-", True, r".*l_(ff|k)", "none"),
    ],
)
def test_what_is_chosen_is_added_and_alone_requires_a_gradient(
    loaded, name, sites, layers, cross, chosen, added
):
    model = loaded(name, n_adapters=2)
    paper, room = {*minia3.vectors(model)}, {*possible_vectors(model)}
    found = choose_vectors(model, sites, layers, cross)
    ours = minia3.vectors(model)
    assert ours.keys() == paper | {n for n in room if re.fullmatch(added, n)}
    assert found.keys() == {n for n in ours if re.fullmatch(chosen, n)}
    assert all(found[n] is ours[n] for n in found)
    assert {n for n, v in ours.items() if v.requires_grad} == found.keys()
    choose_vectors(model, "k", "0-", True)
    assert {n for n, v in minia3.vectors(model).items() if v.requires_grad} == {
        n for n in ours if n.endswith("l_k")
    }
    assert minia3.vectors(model).keys() == ours.keys()


@pytest.mark.parametrize("sites", ["x", "k,wi", "k,", "down", "", "up"])
def test_sites_that_are_none_or_of_another_model_are_refused_and_add_nothing(loaded, sites):
    model = loaded("t5-v1.0")
    with pytest.raises(
        ValueError, match="has no vectors for .* expected sites from k,v,ff,q,o,up,gate, and layers"
    ):
        choose_vectors(model, sites, "0-", True)
    assert minia3.vectors(model).keys() == minia3.vectors(loaded("t5-v1.0")).keys()


EXACT = {"dtype": "float64", "dropout": 0, "lr": 0.01, "steps": 8}


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("recipe", [[], ["--recompute"]])
def test_two_seeds_together_are_each_apart_with_all_sites(name, recipe, tmp_path):
    flags = {
        "model": running.model(name),
        "task": running.task((2, 3)),
        "sites": all_of(name),
        **EXACT,
    }
    assert run(words(tmp_path / "grid", *recipe, seed="0,3", **flags)) == 0
    together = last_vectors(tmp_path / "grid")
    base = minia3.load_model(running.model(name))
    expected = minia3.vectors(base).keys() | possible_vectors(base).keys()
    assert together.keys() == expected
    for i, seed in enumerate((0, 3)):
        assert run(words(tmp_path / str(seed), seed=seed, **flags)) == 0
        apart = last_vectors(tmp_path / str(seed))
        for n, l_D in apart.items():
            assert_close(together[n][i], l_D[0], rtol=1e-9, atol=1e-9)
            assert (l_D != 1).any(), n
        final = metrics(tmp_path / str(seed))[-1]
        assert final["trainable"] == sum(v.numel() for v in apart.values())
        assert final["total"] == sum(
            p.numel() for n, p in base.named_parameters() if not n.endswith(".scale")
        )
        saved = read_adapter(tmp_path / "grid" / "adapters" / f"s{seed}").vectors
        assert saved.keys() == expected
        again = minia3.load_model(running.model(name))
        minia3.load_adapter(again, tmp_path / str(seed) / "adapter")
        for n, v in minia3.vectors(again).items():
            assert_close(saved[n], v[0].detach(), rtol=1e-6, atol=1e-6)


def test_a_run_with_all_sites_is_measured_again_and_stopped_goes_on_bit_for_bit(tmp_path):
    flags = {"sites": PLAIN, "lr": 0.05, "save_every": 4}
    assert run(words(tmp_path / "three", lr=0.1)) == 0
    flags["adapter"] = tmp_path / "three" / "adapter"  # which has fewer
    with at_line(0, None) as ran:
        assert run(words(tmp_path / "whole", **flags)) == 0
    assert {n.rsplit(".l_")[1] for n in last_vectors(tmp_path / "whole")} == {
        *"kvqo",
        "ff",
        "wi",
    }
    with at_line(len(ran) * 2 // 3, functools.partial(kill_self, signal.SIGINT)):
        assert run(words(tmp_path / "stopped", **flags)) == 130
    assert running.resume(tmp_path / "stopped") == 0
    assert running.outcome(tmp_path / "stopped") == running.outcome(tmp_path / "whole")
    assert (
        run(words(tmp_path / "again", "--eval-only", adapter=tmp_path / "whole" / "adapter")) == 0
    )
    assert (
        metrics(tmp_path / "again")[-1]["accuracy"] == metrics(tmp_path / "whole")[-1]["accuracy"]
    )


def test_the_vectors_of_a_model_are_at_peft_s_names_of_its_linears(loaded):
    for name in SEVEN:
        model = loaded(name)
        ours = minia3.vectors(model).keys() | possible_vectors(model).keys()
        theirs = {n for n, place in expand(PEFT, 3).items() if place in ours}
        weights = {
            n
            for n, own in name_table(model).items()
            if own and ".blocks" in f".{own}" and "norm" not in own
        }
        assert {
            n.removeprefix("base_model.model.").replace("ia3_l", "weight") for n in theirs
        } == weights
