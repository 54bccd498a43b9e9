"""Guards the tables of tensor names: each parameter has one name, and each line is used."""

import pytest
from checkpoint_folders import read_weights
from conftest import PEERS

from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.checkpoints.tensor_names import LLAMA, T5, T5_GATED, T5_PLAIN, expand, name_table


def base_parameters(model):
    names = [name for name, _ in model.named_parameters()]
    return sorted(name for name in names if not name.endswith(".scale"))


@pytest.mark.parametrize("name", PEERS)
def test_the_table_names_every_parameter_once_and_every_tensor_of_transformers(loaded, peer, name):
    model = loaded(name)
    table = {theirs: ours for theirs, ours in name_table(model).items() if ours is not None}
    assert sorted(table.values()) == base_parameters(model)
    assert table.keys() == read_weights(peer(name).folder).keys()


@pytest.mark.parametrize(
    "name", ["t5-base", "flan-t5-small", "t0-11b", "llama-2-7b", "llama-3.2-1b", "smollm2-135m"]
)
def test_the_table_names_every_parameter_of_the_known_models(name):
    model = build_model(KNOWN_MODELS[name].config)
    ours = [ours for ours in name_table(model).values() if ours is not None]
    assert sorted(ours) == base_parameters(model)


def test_every_line_of_the_tables_is_used_by_a_model(loaded):
    used = set()
    for name in PEERS:
        used |= name_table(loaded(name)).keys()
    for table in (T5, T5_PLAIN, T5_GATED, LLAMA):
        assert expand(table, 1).keys() <= used


def test_a_line_becomes_one_line_per_layer_in_the_order_of_the_table():
    table = {"a.{}.x": "b.{}.y", "c": "d", "e.{}": None}
    expected = {"a.0.x": "b.0.y", "a.1.x": "b.1.y", "c": "d", "e.0": None, "e.1": None}
    assert list(expand(table, 2).items()) == list(expected.items())
