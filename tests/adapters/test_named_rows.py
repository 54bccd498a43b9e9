"""Guards names for rows. A name is its row and never another. A batch in which each example has its
own adapter is each example alone. A load that fails changes nothing."""

import copy
import json
import math
import operator
import re
from collections.abc import MutableMapping

import pytest
import torch
from conftest import at_once, equal_tensors, logits, off, randomize, tokens
from safetensors.torch import load_file, save_file
from words import word_tokenizer

import minia3
from minia3.adapters.named_rows import Adapters, grow
from minia3.adapters.peft_files import read_adapter, write_adapter
from minia3.adapters.rows import fill_row, row_of, save_adapter
from minia3.cli.info import info
from minia3.model.adapter_rows import GENERATION, find_row, give_up
from minia3.model.more_vectors import add_vectors, possible_vectors

BOTH = ["t5-v1.1", "llama-gqa"]

# What makes the numbers of "a0" invalid: the adapters, and another file for the name
CHANGES = {
    "remove": lambda adapters, path: adapters.remove("a0"),
    "del": lambda adapters, path: operator.delitem(adapters, "a0"),
    "replace": lambda adapters, path: adapters.load("a0", path),
}
SOURCE = tokens(4, 7)
TARGET = tokens(4, 5, seed=1)
MASK = torch.tensor(
    [[True] * 7, [False, False] + [True] * 5, [True] * 4 + [False] * 3, [True] + [False] * 6]
)
A = "blocks.0.attn.l_k"


@pytest.fixture
def folders(loaded, tmp_path):
    """Return a function that writes n random adapters of a model, a0, a1 ..., into a folder."""

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
    assert (len(adapters), list(adapters)) == (5, ["a0", "a1", "a2", "a3", "a4"])
    assert "a0" in adapters
    assert "b" not in adapters
    assert None not in adapters
    assert model.n_adapters == 8
    assert sorted(adapters.rows(adapters).tolist()) == [1, 2, 3, 4, 5]
    assert adapters.rows([]).dtype == adapters.rows([None, "a1"]).dtype == torch.long
    assert adapters.rows([None, "a1", None]).tolist() == [0, adapters.rows(["a1"]).item(), 0]
    for a in adapters:
        assert equal_tensors(
            row_of(model, adapters.rows([a]).item()), read_adapter(folder / a).vectors
        )
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


def test_an_adapter_that_a_killed_process_had_written_is_loaded_with_the_others(loaded, folders):
    """All of its files are still in .written."""
    folder = folders("t5-v1.0", 2)
    expected = read_adapter(folder / "a0").vectors
    (folder / "a0").rename(folder / "moved")
    (folder / "a0").mkdir()
    (folder / "moved").rename(folder / "a0" / ".written")
    adapters = Adapters(loaded("t5-v1.0"))
    adapters.load_folder(folder)
    assert list(adapters) == ["a0", "a1"]
    assert equal_tensors(row_of(adapters.model, adapters["a0"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growing_keeps_the_parameters_and_their_values_dtype_and_requires_grad(
    loaded, folders, dtype
):
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
def test_an_adapter_trains_on_while_others_are_loaded(loaded, folders, name):
    """The model has rows for all of them: an optimizer cannot follow a table that grows."""
    folder = folders(name, 4)
    trained = {}
    for loads_others in (False, True):
        model = loaded(name, n_adapters=5)
        minia3.freeze(model)
        adapters = Adapters(model)
        adapters.load("mine", folder / "a0")
        optimizer = minia3.Adafactor(minia3.vectors(model).values(), lr=0.1)
        for seed in (1, 2, 3):
            state = model.start(SOURCE, MASK, adapters["mine"])
            loss = minia3.logprobs(model, state, tokens(4, 5, seed=seed)).sum()
            if loads_others:
                adapters.load(f"a{seed}", folder / f"a{seed}")
            loss.backward()
            optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
        trained[loads_others] = copy.deepcopy(row_of(model, adapters["mine"]))
    assert equal_tensors(trained[True], trained[False])
    for other in ("a1", "a2", "a3"):
        expected = read_adapter(folder / other).vectors
        assert equal_tensors(row_of(model, adapters[other]), expected)


@pytest.mark.parametrize("name", BOTH)
def test_what_is_loaded_in_inference_mode_can_change_and_train_outside_of_it(loaded, name):
    """A tensor that is made in this mode cannot."""
    with torch.inference_mode():
        model = loaded(name)
        adapters = Adapters(model)
        add_vectors(model, possible_vectors(model))
        grow(model, 3)
        merged = minia3.merge(model, 2)
    for model_here in (model, merged):
        minia3.freeze(model_here)
        for vector in minia3.vectors(model_here).values():
            assert not vector.is_inference()
        fill_row(model_here, 0, {})
        state = model_here.start(SOURCE)
        minia3.logprobs(model_here, state, TARGET).sum().backward()
    assert adapters.rows([None]).tolist() == [0]


@pytest.mark.parametrize("name", BOTH)
def test_a_state_that_has_started_is_not_disturbed_by_names_that_come_and_go(loaded, folders, name):
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


def test_a_name_can_be_replaced_and_removed_and_its_row_is_used_again(loaded, folders):
    folder = folders("t5-v1.0", 4)
    model = loaded("t5-v1.0", n_adapters=4)
    adapters = Adapters(model)
    for a in ("a0", "a1", "a2"):
        adapters.load(a, folder / a)
    row = adapters.rows(["a1"]).item()
    adapters.load("a1", folder / "a3")
    assert (adapters["a1"] % GENERATION, len(adapters), model.n_adapters) == (row, 3, 4)
    assert equal_tensors(row_of(model, adapters["a1"]), read_adapter(folder / "a3").vectors)
    adapters.remove("a1")
    assert list(adapters) == ["a0", "a2"]
    assert all((vector[row] == 1).all() for vector in minia3.vectors(model).values())
    with pytest.raises(ValueError, match="no adapter 'a1'"):
        adapters.rows(["a1"])
    adapters.load("new", folder / "a1")
    assert (adapters.rows(["new"]).item() % GENERATION, model.n_adapters) == (row, 4)
    assert equal_tensors(row_of(model, adapters["new"]), read_adapter(folder / "a1").vectors)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BOTH)
def test_rows_that_were_asked_for_before_a_name_changed_are_refused(loaded, folders, name, change):
    """They would give the answers of whoever has the row now."""
    folder = folders(name, 3)
    model = loaded(name)
    adapters = Adapters(model)
    adapters.load_folder(folder)
    names = ["a0", None, "a1", "a2"]
    old_rows = adapters.rows(names)
    expected = logits(model, SOURCE, MASK, TARGET, old_rows)
    CHANGES[change](adapters, folder / "a1")
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.start(SOURCE, MASK, old_rows)
    adapters.load("a0", folder / "a0")  # into the same row
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.start(SOURCE, MASK, old_rows)
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        row_of(model, old_rows[0].item())
    assert torch.equal(logits(model, SOURCE, MASK, TARGET, adapters.rows(names)), expected)
    model.start(SOURCE, MASK, old_rows[[1, 1, 2, 3]])  # the others are where they were


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BOTH)
def test_an_adapter_that_changes_while_it_answers_is_an_error(loaded, folders, name, change):
    """The layers after the change would have the vectors of another adapter."""
    folder = folders(name, 2)
    model = loaded(name)
    adapters = Adapters(model)
    adapters.load_folder(folder)
    state = model.start(SOURCE, MASK, adapters.rows(["a0", None, "a0", None]))
    block = (model.decoder.blocks if hasattr(model, "decoder") else model.blocks)[0]
    hook = block.register_forward_hook(lambda *_: CHANGES[change](adapters, folder / "a1"))
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.step(state.start, state)
    hook.remove()


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_changes_while_it_is_copied_is_an_error(
    loaded, folders, tmp_path, monkeypatch, change
):
    """A folder or a merged model would have vectors of both."""
    folder = folders("t5-v1.0", 2)
    model = loaded("t5-v1.0")
    adapters = Adapters(model)

    def row_of_and_change(model, adapter):
        row = row_of(model, adapter)
        CHANGES[change](adapters, folder / "a1")
        return row

    monkeypatch.setattr("minia3.adapters.rows.row_of", row_of_and_change)
    copies = {
        "folder": lambda row: save_adapter(model, tmp_path / "copy", row),
        "merged model": lambda row: minia3.merge(model, row),
    }
    for make_copy in copies.values():
        adapters.load("a0", folder / "a0")
        with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
            make_copy(adapters["a0"])
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_given_up_before_its_vectors_change(loaded, folders, monkeypatch, change):
    """Otherwise a batch could read new vectors, and look before the number is invalid."""
    folder = folders("t5-v1.0", 2)
    model = loaded("t5-v1.0")
    adapters = Adapters(model)
    adapters.load("a0", folder / "a0")
    number = adapters["a0"]
    filled_rows = []

    def fill_row(model, row, new_vectors):
        with pytest.raises(ValueError, match="was removed or replaced"):
            find_row(number, model)
        filled_rows.append(row)

    monkeypatch.setattr("minia3.adapters.named_rows.fill_row", fill_row)
    CHANGES[change](adapters, folder / "a1")
    assert filled_rows == [number]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", BOTH)
def test_a_replacement_that_is_interrupted_removes_the_name_and_nothing_else(
    loaded, folders, monkeypatch, name, error
):
    """Its old number stayed, and no adapter could be loaded or removed any more."""
    folder = folders(name, 3)
    model = loaded(name)
    adapters = Adapters(model)
    adapters.load("a0", folder / "a0")
    adapters.load("a1", folder / "a1")
    old_rows = adapters.rows(["a0", "a1", "a0", "a1"])

    def interrupt(model, row, new_vectors):
        fill_row(model, row, dict([*new_vectors.items()][:1]))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("minia3.adapters.named_rows.fill_row", interrupt)
        with pytest.raises(error):
            adapters.load("a0", folder / "a2")
        with pytest.raises(error):
            adapters.load("new", folder / "a2")
    assert list(adapters) == ["a1"]
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.start(SOURCE, MASK, old_rows)
    adapters.load("a2", folder / "a2")
    adapters.load("a0", folder / "a0")
    adapters.remove("a2")
    assert list(adapters) == ["a1", "a0"]
    for a in adapters:
        assert equal_tensors(row_of(model, adapters[a]), read_adapter(folder / a).vectors)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_interrupted_before_it_begins_gives_up_its_row(
    change, loaded, folders, monkeypatch
):
    """Whoever has the old number must not read the next adapter of the row."""
    folder = folders("t5-v1.0", 2)
    model = loaded("t5-v1.0")
    adapters = Adapters(model)
    adapters.load("a0", folder / "a0")
    old_rows = adapters.rows(["a0"])
    ended = []

    def interrupt_first(row, model):
        if not ended:
            ended.append(row)
            raise KeyboardInterrupt
        give_up(row, model)

    monkeypatch.setattr("minia3.adapters.named_rows.give_up", interrupt_first)
    with pytest.raises(KeyboardInterrupt):
        CHANGES[change](adapters, folder / "a1")
    adapters.load("a1", folder / "a1")
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.start(SOURCE[:1], MASK[:1], old_rows)


def test_nothing_but_its_methods_changes_it(loaded, folders):
    """What a dict does to a name would leave the row to the next adapter without giving it up."""
    adapters = Adapters(loaded("t5-v1.0"))
    adapters.load("a0", folders("t5-v1.0", 1) / "a0")
    assert not isinstance(adapters, dict | MutableMapping)
    for method in ("pop", "popitem", "clear", "update", "setdefault", "__setitem__"):
        assert not hasattr(adapters, method)
    assert adapters.get("a0") == adapters["a0"] == 1


def test_a_second_one_takes_the_rows_of_the_first(loaded, folders):
    folder = folders("t5-v1.0", 2)
    model = loaded("t5-v1.0")
    first = Adapters(model)
    first.load("a0", folder / "a0")
    second = Adapters(model)
    second.load("a1", folder / "a1")
    assert second["a1"] % GENERATION == first["a0"]
    assert equal_tensors(row_of(model, second["a1"]), read_adapter(folder / "a1").vectors)
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        model.start(SOURCE[:1], None, first.rows(["a0"]))
    with pytest.raises(ValueError, match="the adapter of row 1 was removed or replaced"):
        first.load("a0", folder / "a0")
    assert second.rows([None]).tolist() == [0]
    model.start(SOURCE[:2], None, second.rows(["a1", None]))


def test_a_partial_adapter_in_a_used_row_leaves_nothing_of_the_old_one(loaded, folders, tmp_path):
    folder = folders("llama-gqa", 1)
    model = loaded("llama-gqa", n_adapters=2)
    adapters = Adapters(model)
    adapters.load("x", folder / "a0")
    write_adapter(tmp_path / "partial", {A: torch.full((12,), 2.0)})
    adapters.load("x", tmp_path / "partial")
    found = row_of(model, adapters.rows(["x"]).item())
    assert {n for n, x in found.items() if (x != 1).any()} == {A}


def test_an_unknown_name_is_an_error_that_tells_the_nearest(loaded, folders):
    adapters = Adapters(loaded("t5-v1.0"))
    with pytest.raises(ValueError, match=r"no adapter 'rte'; the nearest of 0 names: none"):
        adapters.rows(["rte"])
    adapters.load_folder(folders("t5-v1.0", 2))
    adapters.load("superglue-rte", folders("t5-v1.0", 1) / "a0")
    for call in (
        lambda: adapters.rows([None, "superglue-rt"]),
        lambda: adapters.remove("superglue-rt"),
        lambda: adapters.get("superglue-rt"),
        lambda: adapters.get("superglue-rt", 0),
        lambda: operator.delitem(adapters, "superglue-rt"),
    ):
        with pytest.raises(
            ValueError, match=r"no adapter 'superglue-rt'; the nearest of 3 names: superglue-rte$"
        ):
            call()
    for name in (0, "", ("a0",)):
        with pytest.raises(ValueError, match="there is no adapter"):
            adapters.rows([name])
    with pytest.raises(ValueError, match="found 'a0', expected a list of names: one for each"):
        adapters.rows("a0")
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
        assert equal_tensors(dict(minia3.vectors(model)), before)


def test_names_are_copied_with_their_model(loaded, folders):
    adapters = Adapters(loaded("llama-gqa"))
    adapters.load("a0", folders("llama-gqa", 1) / "a0")
    other = copy.deepcopy(adapters)
    other.remove("a0")
    assert ([*adapters], [*other]) == (["a0"], [])
    assert not all((x == 1).all() for x in row_of(adapters.model, 1).values())


def test_names_may_come_and_go_while_they_are_listed(loaded, folders):
    path = folders("t5-v1.1", 1) / "a0"
    adapters = Adapters(loaded("t5-v1.1"))
    adapters.load("a", path)
    adapters.load("b", path)
    names = iter(adapters)
    found = [next(names)]
    adapters.load("c", path)
    adapters.remove("a")
    assert [*found, *names] == ["a", "b"]
    assert list(adapters) == ["b", "c"]


def test_each_of_several_threads_that_load_gets_its_row(loaded, folders):
    folder = folders("llama-gqa", 6)
    model = loaded("llama-gqa")
    adapters = Adapters(model)
    expected = {f"a{i}": read_adapter(folder / f"a{i}").vectors for i in range(6)}
    at_once(adapters.load, [(name, folder / name) for name in expected])
    assert sorted(adapters.values()) == [1, 2, 3, 4, 5, 6]
    for name, vectors in expected.items():
        assert equal_tensors(row_of(model, adapters[name]), vectors)


def test_adapters_of_another_base_are_one_warning_of_the_line_that_loads_them(loaded, folders):
    folder = folders("t5-v1.0", 4)
    name_base(folder / "a1", "t5-large")
    name_base(folder / "a2", "t5-large")
    name_base(folder / "a3", "t5-small")
    model = loaded("t5-v1.0")
    adapters = Adapters(model)
    with pytest.warns(UserWarning, match="trained on") as of_folder:
        adapters.load_folder(folder)
    with pytest.warns(UserWarning, match="trained on") as of_one:
        adapters.load("one", folder / "a1")
    ending = f", and this model is {model.name_or_path}"
    assert [str(warning.message) for warning in of_folder] == [
        f"{folder / 'a1'} and 1 more were trained on t5-large{ending}",
        f"{folder / 'a3'} was trained on t5-small{ending}",
    ]
    assert [str(warning.message) for warning in of_one] == [
        f"{folder / 'a1'} was trained on t5-large{ending}"
    ]
    assert {warning.filename for warning in [*of_folder, *of_one]} == {__file__}
    assert list(adapters) == ["a0", "a1", "a2", "a3", "one"]


def name_base(folder, name):
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"base_model_name_or_path": name}))


# Mixed batches


@pytest.fixture(scope="module")
def crowd(loaded):
    """Return a dict from a model's name to the model with 1,000 random adapters."""

    def get(name):
        model = randomize(loaded(name, n_adapters=1001), 3)
        for table in minia3.vectors(model).values():
            table.data[0] = 1.0
        return model

    return {name: get(name) for name in BOTH}


@pytest.mark.parametrize("name", BOTH)
def test_with_1000_adapters_a_batch_of_several_has_the_logits_scores_and_texts_of_each_alone(
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
        only = slice(i, i + 1)
        assert off(found[only], logits(alone, source[only], mask[only], target[only])) < 1e-5
        expected = minia3.rank(alone, tokenizer, prompts[only], choices[only])
        assert torch.allclose(scores[only], expected, atol=1e-5)
        assert texts[only] == minia3.generate(alone, tokenizer, prompts[only], max_new_tokens=5)
        expected = minia3.generate(alone, tokenizer, prompts[only], max_new_tokens=4, beams=3)
        assert beams[only] == expected
    base = slice(1, 2)
    assert off(found[base], logits(loaded(name), source[base], mask[base], target[base])) < 1e-5


@pytest.mark.slow
def test_150_adapters_are_loaded_and_each_has_the_bytes_that_info_tells(peer, loaded, tmp_path):
    model = loaded("t5-v1.0")
    d = {n: v.shape[1] for n, v in minia3.vectors(model).items()}
    first = {n: torch.full((width,), 2.0) for n, width in d.items()}
    write_adapter(tmp_path / "all" / "0", first)
    for i in range(1, 150):
        (tmp_path / "all" / str(i)).symlink_to(tmp_path / "all" / "0")
    adapters = Adapters(model)
    adapters.load_folder(tmp_path / "all")
    assert (len(adapters), model.n_adapters) == (150, 256)
    numbers = int(
        re.match(r"[\d,]+", dict(info(peer("t5-v1.0").folder))["adapter"])[0].replace(",", "")
    )
    assert sum(v.nbytes for v in minia3.vectors(model).values()) == 256 * 4 * numbers
    assert sum(v[1].nbytes for v in minia3.vectors(model).values()) == 4 * sum(d.values())
