"""Guards many adapters on one model: a mixture is its equation, a name is its row and never another, a batch in which
each example has its own adapter is each alone, and a load that fails changes nothing."""

import copy
import json
import math
import re

import pytest
import torch
from conftest import at_once, logits, off, randomize, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from words import word_tokenizer

import minia3
from minia3.adapters.mix import mix
from minia3.adapters.named_rows import Adapters
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import row_of, save_adapter
from minia3.cli.info import info

BOTH = ["t5-v1.1", "llama-gqa"]
SOURCE = tokens(4, 7)
TARGET = tokens(4, 5, seed=1)
MASK = torch.tensor(
    [[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3, [True] + [False] * 6]
)
A = "blocks.0.attn.l_k"
B = "blocks.1.ffn.l_ff"

# Mixtures

entries = st.lists(st.floats(0.125, 8.0, width=32), min_size=3, max_size=3)
weights = st.floats(-2.0, 2.0)


@given(
    parts=st.lists(st.tuples(entries, weights), min_size=1, max_size=4),
    how=st.sampled_from(["average", "product", "power"]),
)
@settings(deadline=None, max_examples=60)
def test_a_mixture_is_its_equation(parts, how):
    mixed = mix([({A: torch.tensor(l_D)}, w) for l_D, w in parts], how)
    for i, found in enumerate(mixed[A].tolist()):
        pairs = [(l_D[i], w) for l_D, w in parts]
        expected = {
            "average": 1 + sum(w * (x - 1) for x, w in pairs),
            "product": math.prod(1 + w * (x - 1) for x, w in pairs),
            "power": math.prod(x**w for x, w in pairs),
        }[how]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert mixed[A].dtype == torch.float32


@pytest.mark.parametrize("how", ["average", "product", "power"])
def test_one_changes_nothing_and_is_what_an_absent_vector_counts_as(how):
    a = {A: torch.tensor([0.3, 2.0, 1.1])}
    b = {B: torch.tensor([0.7, 5.0])}
    ones = {name: torch.ones_like(x) for name, x in (a | b).items()}
    assert same(mix([(a, 1.0)], how), a)
    assert same(mix([(a, 1.0), (b, 1.0)], how), a | b)
    assert same(mix([(a, 1.0), (ones, 0.7)], how), ones | a)
    assert same(mix([(a, 0.0), (b, 0.0)], how), ones)
    assert same(mix([(ones, 0.3), (ones, -2.0)], how), ones)
    assert same(mix([(a, 0.5), (b, 0.25)], how), mix([(b, 0.25), (a, 0.5)], how))
    assert mix([(a, 0.5), (b, 0.25)], how)[A].tolist() == mix([(a, 0.5)], how)[A].tolist()


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(x, expected[name]) for name, x in found.items()
    )


def test_the_default_is_the_average_and_halves_of_one_adapter_are_it():
    a = {A: torch.tensor([-0.3, 0.0, 1.1])}
    assert same(mix([(a, 0.5), (a, 0.5)]), a)
    assert mix([(a, 2.0)])[A].tolist() == pytest.approx([-1.6, -1.0, 1.2])


@pytest.mark.parametrize(
    ("parts", "how", "message"),
    [
        ([({A: torch.tensor([1.0, -0.5])}, 1.0)], "power", f"{A} at 1: the power of [-0.5]"),
        (
            [({A: torch.tensor([1.0, 2.0])}, 1.0), ({A: torch.tensor([0.0, 2.0])}, 1.0)],
            "power",
            f"{A} at 0: ",
        ),
        ([({A: torch.tensor([1.0, 3e38])}, 9.0)], "average", f"{A} at 1: the average of [3"),
        ([({A: torch.tensor([1.0])}, float("nan"))], "product", f"{A} at 0: "),
        (
            [({A: torch.ones(2)}, 1.0), ({A: torch.ones(3)}, 1.0)],
            "average",
            f"do not mix: {A}, and {A} of [2, 3]",
        ),
        (
            [({A: torch.ones(2)}, 1.0), ({A: torch.ones(1)}, 1.0)],
            "average",
            f"do not mix: {A}, and {A} of [1, 2]",
        ),
        (
            [({A: torch.ones(2)}, 1.0), ({f"encoder.{A}": torch.ones(2)}, 1.0)],
            "average",
            f"do not mix: {A}, and encoder.{A}",
        ),
        (
            [({A: torch.ones(2)}, 1.0)],
            "mean",
            "average, product, power, found 1 adapters and 'mean'",
        ),
        ([], "average", "found 0 adapters"),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_where(parts, how, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        mix(parts, how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BOTH)
def test_a_mixture_of_files_loads_here_and_in_peft(loaded, peer, tmp_path, name):
    import peft
    from conftest import Peer, make

    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        save_adapter(loaded(name, seed=seed), folder)
    mixed = mix([(read_adapter(folder).vectors, 0.5) for folder in folders])
    write_adapter(tmp_path / "mixed", mixed)
    model = loaded(name)
    minia3.load_adapter(model, tmp_path / "mixed")
    assert same({n: v[0] for n, v in minia3.vectors(model).items()}, mixed)
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "mixed").eval()
    expected = Peer(name, None, theirs).logits(SOURCE, MASK, TARGET)
    assert off(logits(model, SOURCE, MASK, TARGET), expected) < 1e-5


# Names for rows


@pytest.fixture
def folders(loaded, tmp_path):
    """name of a model, number -> a folder of random adapters a0, a1 ..."""

    def get(name, n):
        model = loaded(name)
        for seed in range(n):
            save_adapter(randomize(model, seed + 1), tmp_path / "adapters" / f"a{seed}")
        return tmp_path / "adapters"

    return get


@pytest.mark.parametrize("name", BOTH)
def test_a_row_has_the_vectors_of_its_name_and_row_0_is_the_base(loaded, folders, name):
    folder = folders(name, 5)
    model = loaded(name, n_adapters=2, seed=9)
    adapters = Adapters(model)
    assert (len(adapters), list(adapters), "a0" in adapters) == (0, [], False)
    adapters.load_folder(folder)
    assert (len(adapters), list(adapters), "a0" in adapters, "b" in adapters, None in adapters) == (
        *(5, [f"a{i}" for i in range(5)], True, False, False),
    )
    assert model.n_adapters == 8
    assert sorted(adapters.rows(adapters).tolist()) == [1, 2, 3, 4, 5]
    assert adapters.rows([]).dtype == adapters.rows([None, "a1"]).dtype == torch.long
    assert adapters.rows([None, "a1", None]).tolist() == [0, adapters.rows(["a1"]).item(), 0]
    for a in adapters:
        assert same(row_of(model, adapters.rows([a]).item()), read_adapter(folder / a).vectors)
    for row in (0, 6, 7):
        assert all((x == 1).all() for x in row_of(model, row).values())


def test_a_folder_of_adapters_may_hold_other_things(loaded, folders):
    folder = folders("t5-v1.0", 2)
    (folder / "notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "a0").rename(folder / ".writing")
    adapters = Adapters(loaded("t5-v1.0"))
    adapters.load_folder(str(folder))
    assert list(adapters) == ["a1"]
    with pytest.raises(
        ValueError, match=r"empty: expected sub-folders with an adapter_config.json"
    ):
        adapters.load_folder(folder / "empty")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growing_keeps_values_dtype_gradients_and_the_tables_themselves(loaded, folders, dtype):
    folder = folders("llama-gqa", 4)
    model = loaded("llama-gqa", n_adapters=2).to(dtype)
    minia3.freeze(model)
    minia3.vectors(model)[A].requires_grad_(False)
    before = dict(minia3.vectors(model))
    adapters = Adapters(model)
    adapters.load("a0", folder / "a0")
    kept = {n: v.detach().clone() for n, v in before.items()}
    sizes = []
    for a in ("a1", "a2", "a3"):
        adapters.load(a, folder / a)
        sizes.append(model.n_adapters)
        for n, v in minia3.vectors(model).items():
            assert v is before[n]
            assert (len(v), v.dtype, v.requires_grad) == (model.n_adapters, dtype, n != A)
            assert torch.equal(v[:2], kept[n])
    assert sizes == [4, 4, 8]


@pytest.mark.parametrize("name", BOTH)
def test_a_started_state_goes_on_undisturbed_while_names_come_and_go(loaded, folders, name):
    folder = folders(name, 4)
    model = loaded(name, n_adapters=2)
    adapters = Adapters(model)
    adapters.load("mine", folder / "a0")
    expected = logits(
        model, SOURCE, MASK, TARGET, adapter=adapters.rows(["mine", None, "mine", None])
    )
    with torch.no_grad():
        state = model.start(SOURCE, MASK, adapters.rows(["mine", None, "mine", None]))
        parts = [model.step(state.start, state)]
        adapters.load("other", folder / "a1")
        adapters.load("third", folder / "a2")
        parts.append(model.step(TARGET[:, :2], state))
        adapters.load("other", folder / "a3")
        adapters.remove("third")
        parts.append(model.step(TARGET[:, 2:], state))
    assert off(torch.cat(parts, dim=1), expected) < 1e-5


def test_a_name_is_replaced_removed_and_its_row_used_again(loaded, folders):
    folder = folders("t5-v1.0", 4)
    model = loaded("t5-v1.0", n_adapters=4)
    adapters = Adapters(model)
    for a in ("a0", "a1", "a2"):
        adapters.load(a, folder / a)
    row = adapters.rows(["a1"]).item()
    adapters.load("a1", folder / "a3")
    assert (adapters.rows(["a1"]).item(), len(adapters), model.n_adapters) == (row, 3, 4)
    assert same(row_of(model, row), read_adapter(folder / "a3").vectors)
    adapters.remove("a1")
    assert list(adapters) == ["a0", "a2"]
    assert all((x == 1).all() for x in row_of(model, row).values())
    with pytest.raises(ValueError, match="no adapter 'a1'"):
        adapters.rows(["a1"])
    adapters.load("new", folder / "a1")
    assert (adapters.rows(["new"]).item(), model.n_adapters) == (row, 4)


def test_a_partial_adapter_in_a_used_row_leaves_nothing_of_what_was_there(
    loaded, folders, tmp_path
):
    folder = folders("llama-gqa", 1)
    model = loaded("llama-gqa", n_adapters=2)
    adapters = Adapters(model)
    adapters.load("x", folder / "a0")
    write_adapter(tmp_path / "partial", {A: torch.full((12,), 2.0)})
    adapters.load("x", tmp_path / "partial")
    found = row_of(model, adapters.rows(["x"]).item())
    assert {n for n, x in found.items() if (x != 1).any()} == {A}


def test_a_name_that_is_not_there_is_an_error_with_the_nearest(loaded, folders):
    adapters = Adapters(loaded("t5-v1.0"))
    with pytest.raises(ValueError, match=r"no adapter 'rte'; the nearest of 0 names: none"):
        adapters.rows(["rte"])
    adapters.load_folder(folders("t5-v1.0", 2))
    adapters.load("superglue-rte", folders("t5-v1.0", 1) / "a0")
    for call in (
        lambda: adapters.rows([None, "superglue-rt"]),
        lambda: adapters.remove("superglue-rt"),
    ):
        with pytest.raises(
            ValueError, match=r"no adapter 'superglue-rt'; the nearest of 3 names: superglue-rte$"
        ):
            call()
    for name in (0, "", ("a0",)):
        with pytest.raises(ValueError, match="there is no adapter"):
            adapters.rows([name])
    with pytest.raises(ValueError, match="name"):
        adapters.load(None, folders("t5-v1.0", 1) / "a0")
    with pytest.raises(ValueError, match="no adapter None"):
        adapters.remove(None)
    assert all((x == 1).all() for x in row_of(adapters.model, 0).values())


def test_a_load_that_fails_leaves_everything_as_it_was(loaded, folders, tmp_path):
    folder = folders("t5-v1.0", 3)
    model = loaded("t5-v1.0", n_adapters=2)
    save_adapter(loaded("llama-gqa"), tmp_path / "llama")
    adapters = Adapters(model)
    adapters.load("a0", folder / "a0")
    file = folder / "a2" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[1] = math.inf
    save_file(tensors, file)
    before = {n: v.detach().clone() for n, v in minia3.vectors(model).items()}
    for call in (
        lambda: adapters.load_folder(folder),
        lambda: adapters.load("a0", folder / "a2"),
        lambda: adapters.load("b", tmp_path / "llama"),
        lambda: adapters.load("b", tmp_path / "nowhere"),
    ):
        with pytest.raises(ValueError, match=r"is inf at 1|another base|not found"):
            call()
        assert (list(adapters), model.n_adapters) == (["a0"], 2)
        assert same(dict(minia3.vectors(model)), before)


def test_names_are_copied_with_their_model(loaded, folders):
    adapters = Adapters(loaded("llama-gqa"))
    adapters.load("a0", folders("llama-gqa", 1) / "a0")
    other = copy.deepcopy(adapters)
    other.remove("a0")
    assert ([*adapters], [*other]) == (["a0"], [])
    assert not all((x == 1).all() for x in row_of(adapters.model, 1).values())


def test_threads_that_load_each_get_a_row_of_their_own(loaded, folders):
    folder = folders("llama-gqa", 6)
    model = loaded("llama-gqa")
    adapters = Adapters(model)
    expected = {f"a{i}": read_adapter(folder / f"a{i}").vectors for i in range(6)}
    at_once(adapters.load, [(name, folder / name) for name in expected])
    assert sorted(adapters.values()) == [1, 2, 3, 4, 5, 6]
    for name, vectors in expected.items():
        assert same(row_of(model, adapters[name]), vectors)


def test_an_adapter_of_a_base_of_another_name_is_a_warning(loaded, folders):
    folder = folders("t5-v1.0", 1)
    raw = json.loads((folder / "a0" / "adapter_config.json").read_text())
    (folder / "a0" / "adapter_config.json").write_text(
        json.dumps(raw | {"base_model_name_or_path": "t5-large"})
    )
    adapters = Adapters(loaded("t5-v1.0"))
    with pytest.warns(UserWarning, match="a0 was trained on t5-large, and this model is "):
        adapters.load_folder(folder)
    assert list(adapters) == ["a0"]


# Mixed batches


@pytest.fixture(scope="module")
def crowd(loaded):
    """name -> a model with 1,000 resident adapters, as Adapters would hold them, and their rows."""

    def get(name):
        model = randomize(loaded(name, n_adapters=1001), 3)
        for table in minia3.vectors(model).values():
            table.data[0] = 1.0
        return model

    return {name: get(name) for name in BOTH}


@pytest.mark.parametrize("name", BOTH)
def test_with_1000_resident_rows_mixed_is_each_alone_in_forward_scores_and_text(
    crowd, loaded, name
):
    model = crowd[name]
    tokenizer = word_tokenizer(ends=name == "t5-v1.1")
    rows = torch.tensor([1000, 0, 517, 1, 1000, 2])
    mask = torch.cat((MASK, MASK[:2]))
    source = tokens(6, 7, seed=5)
    target = tokens(6, 4, seed=6)
    found = logits(model, source, mask, target, adapter=rows)
    prompts = ["w3 w4 w5", "w9", "w6 w7 w8 w9 w10", "w11 w12", "w13 w14", "w20 w21 w22"]
    choices = [["w3", "w4 w5", "w6"]] * 6
    scores = minia3.rank(model, tokenizer, prompts, choices, adapter=rows, batch_size=4)
    texts = minia3.generate(model, tokenizer, prompts, adapter=rows, max_new_tokens=5, batch_size=4)
    beams = minia3.generate(
        model, tokenizer, prompts, adapter=rows, max_new_tokens=4, beams=3, batch_size=4
    )
    for i, row in enumerate(rows.tolist()):
        alone = loaded(name)
        for n, table in minia3.vectors(alone).items():
            table.data[0] = minia3.vectors(model)[n][row]
        one = slice(i, i + 1)
        assert off(found[one], logits(alone, source[one], mask[one], target[one])) < 1e-5
        expected = minia3.rank(alone, tokenizer, prompts[one], choices[one])
        assert torch.allclose(scores[one], expected, atol=1e-5)
        assert texts[one] == minia3.generate(alone, tokenizer, prompts[one], max_new_tokens=5)
        assert beams[one] == minia3.generate(
            alone, tokenizer, prompts[one], max_new_tokens=4, beams=3
        )
    base = slice(1, 2)
    assert off(found[base], logits(loaded(name), source[base], mask[base], target[base])) < 1e-5


def test_1000_adapters_are_loaded_and_each_weighs_what_info_says(peer, loaded, tmp_path):
    model = loaded("t5-v1.0")
    d = {n: v.shape[1] for n, v in minia3.vectors(model).items()}
    first = {n: torch.full((width,), 2.0) for n, width in d.items()}
    write_adapter(tmp_path / "all" / "0", first)
    for i in range(1, 1000):
        (tmp_path / "all" / str(i)).symlink_to(tmp_path / "all" / "0")
    adapters = Adapters(model)
    adapters.load_folder(tmp_path / "all")
    assert (len(adapters), model.n_adapters) == (1000, 1024)
    numbers = int(
        re.match(r"[\d,]+", dict(info(peer("t5-v1.0").folder))["adapter"])[0].replace(",", "")
    )
    assert sum(v.nbytes for v in minia3.vectors(model).values()) == 1024 * 4 * numbers
    assert sum(v[1].nbytes for v in minia3.vectors(model).values()) == 4 * sum(d.values())
