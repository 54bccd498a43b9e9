"""Guards the order of rows in W_q and W_k. If it is wrong, texts stay fluent but logits change."""

import numpy as np
import pytest
import torch

from minia3.checkpoints.rotation_layout import neighbors_to_halves
from minia3.files.tensors import Entry


def entry_of(weight):
    return Entry(tuple(weight.shape), weight.dtype, lambda: weight)


def rotate(first, second, angles):
    """Turn each pair of an entry of `first` and an entry of `second` by its angle."""
    cos = np.cos(angles)
    sin = np.sin(angles)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    return turned_first, turned_second


def rotate_neighbors(x, angles):
    pairs = rotate(x[0::2], x[1::2], angles)
    return np.stack(pairs, axis=1).ravel()


def rotate_halves(x, angles):
    first, second = np.split(x, 2)
    pairs = rotate(first, second, angles)
    return np.concatenate(pairs)


def test_the_rows_of_each_head_change_from_neighbors_to_halves():
    first_head = torch.arange(0, 6)
    second_head = torch.arange(10, 16)
    rows = torch.cat((first_head, second_head))[:, None]
    entries = {
        "model.layers.0.self_attn.q_proj.weight": entry_of(rows),
        "model.layers.0.self_attn.q_proj.bias": entry_of(rows[:, 0]),
        "model.layers.0.self_attn.k_proj.weight": entry_of(rows[:6]),
        "model.layers.0.self_attn.v_proj.weight": entry_of(rows),
    }
    q, q_bias, k, v = neighbors_to_halves(entries, n_heads=2, n_kv_heads=1).values()
    q_rows = q.read().flatten().tolist()
    k_rows = k.read().flatten().tolist()
    assert q_rows == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]
    assert q_bias.read().tolist() == q_rows
    assert k_rows == [0, 2, 4, 1, 3, 5]
    assert v is entries["model.layers.0.self_attn.v_proj.weight"]


def test_nothing_is_read_before_it_is_asked_for():
    entry = Entry((4, 3), torch.float32, lambda: pytest.fail("read too early"))
    (permuted,) = neighbors_to_halves({"q_proj.weight": entry}, 1, 1).values()
    assert (permuted.shape, permuted.dtype) == ((4, 3), torch.float32)


def test_permuted_rows_with_rotated_halves_have_the_scores_of_rotated_neighbors():
    d_head = 8
    exponents = -np.arange(0, d_head, 2) / d_head
    angles = 7 * 50000.0**exponents
    w_q, w_k = np.random.default_rng(0).normal(size=(2, d_head, 3))
    x, y = np.random.default_rng(1).normal(size=(2, 3))
    entries = {
        "q_proj.weight": entry_of(torch.from_numpy(w_q)),
        "k_proj.weight": entry_of(torch.from_numpy(w_k)),
    }
    permuted = neighbors_to_halves(entries, 1, 1)
    q = permuted["q_proj.weight"].read().numpy()
    k = permuted["k_proj.weight"].read().numpy()
    expected = rotate_neighbors(w_q @ x, angles) @ (w_k @ y)
    rotated = rotate_halves(q @ x, angles)
    found = rotated @ (k @ y)
    rotated_unpermuted = rotate_halves(w_q @ x, angles)
    unpermuted = rotated_unpermuted @ (w_k @ y)
    assert np.isclose(found, expected)
    assert not np.isclose(unpermuted, expected)
