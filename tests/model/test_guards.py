"""Guards what minia3 costs by what can be counted, and so is the same in every run, as times are not.

Where a number comes out smaller, that is progress: write it down here.

Shapes: B batch, M source length, C choices, L target length.
"""

import re

import pytest
import torch
from conftest import tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import minia3
from minia3.checkpoints.known_models import known_models
from minia3.checkpoints.load import build_model
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import Batch
from minia3.training.losses import total_loss
from tests.benchmarks.measure import kept_for_backward

aten = torch.ops.aten
B, M, L = 3, 7, 5
NAMES = ["t5-v1.0", "llama-gqa"]


def batch_of(lengths=(M,) * B, n_choices=1):
    """Sources of these lengths, each with choices of L tokens."""
    source_BM, target_BCL = (
        tokens(len(lengths), max(lengths)),
        tokens(len(lengths), n_choices, L, seed=1),
    )
    mask_BM = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    label_B = torch.arange(len(lengths)) % n_choices
    return Batch(
        source_BM, mask_BM, target_BCL, torch.ones_like(target_BCL, dtype=torch.bool), label_B
    )


def loss_of(model, batch):
    return total_loss(choice_logprobs(model, batch), batch.target_mask_BCL, batch.label_B)


def step(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()


@pytest.fixture
def frozen(loaded):
    """name -> a model whose vectors alone are trained; without dropout."""

    def get(name, **options):
        model = loaded(name, seed=0, **options)
        minia3.freeze(model)
        return model

    return get


# Matrix products


def weight_flops(function):
    """FLOPs of the products with weights; attention's depend on the kernel that torch has for it."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_flop_counts()["Global"][aten.mm]


def t5_flops(read, written, d=24, inner=24, ff=40, layers=2, vocab=61):
    """-> FLOPs of a forward pass, and those which its backward pass to the vectors has no use for.

    read, written: tokens of the sources and of the targets.
    """
    encoder = read * (4 * d * inner + 2 * d * ff)
    decoder = (
        written * (6 * d * inner + 2 * d * ff) + read * 2 * d * inner
    )  # keys and values of the encoder's output
    embedded = (
        (read + written) * 3 * d * inner
    )  # the first layers' queries, keys and values are of embeddings
    return 2 * (layers * (encoder + decoder) + written * d * vocab), 2 * embedded


def llama_flops(read, written, d=24, inner=24, kv=12, ff=40, layers=2, vocab=61):
    layer, kv, q = 2 * d * inner + 2 * d * kv + 3 * d * ff, 2 * d * kv, d * inner
    source = read * (
        (layers - 1) * layer + kv
    )  # of its last layer, nothing but keys and values is used
    return 2 * (source + written * (layers * layer + d * vocab)), 2 * (read + written) * (kv + q)


# A LLaMA's source is read up to its last token, which then asks for the first of the target.
FLOPS = {"t5-v1.0": t5_flops(B * M, B * L), "llama-gqa": llama_flops(B * (M - 1), B * L)}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_the_products_of_forward_and_of_the_gradients_of_activations_and_no_others(
    frozen, name
):
    model, batch, (forward, unused) = frozen(name), batch_of(), FLOPS[name]
    assert weight_flops(lambda: loss_of(model, batch)) == forward
    assert weight_flops(lambda: step(model, batch)) == 2 * forward - unused


@pytest.mark.parametrize("name", NAMES)
def test_full_fine_tuning_has_those_of_the_gradients_of_weights_too(frozen, name):
    model, batch, (forward, _) = frozen(name).requires_grad_(True), batch_of(), FLOPS[name]
    assert weight_flops(lambda: step(model, batch)) == 3 * forward


@pytest.mark.parametrize(
    ("name", "ours", "full"),
    [
        ("t5-base", 433_707_810_816, 656_337_272_832),
        ("llama-2-7b", 27_215_093_825_536, 40_985_715_277_824),
    ],
)
def test_in_the_size_of_real_models_that_is_two_thirds(name, ours, full):
    """A step of 8 sources of 128 tokens and targets of 8, counted on the meta device: nothing is computed."""
    model = build_model(known_models()[name].config).to("meta").eval()
    source_BM, target_BL = (torch.zeros(8, n, dtype=torch.long, device="meta") for n in (128, 8))

    def step():
        minia3.logprobs(model, model.start(source_BM), target_BL).sum().backward()

    assert weight_flops(step) == full
    minia3.freeze(model)
    assert weight_flops(step) == ours
    assert 0.660 < ours / full < 0.668


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_in_no_product(frozen, name):
    lengths = (M, 2, 4)
    count, read = {
        "t5-v1.0": (t5_flops, sum(lengths)),
        "llama-gqa": (llama_flops, sum(lengths) - B),
    }[name]
    model, batch, (forward, unused) = frozen(name), batch_of(lengths), count(read, B * L)
    assert weight_flops(lambda: step(model, batch)) == 2 * forward - unused


# What gets a gradient


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_the_vectors_and_nothing_that_is_frozen(frozen, name):
    model = frozen(name)
    step(model, batch_of())
    found = [parameter for parameter, p in model.named_parameters() if p.grad is not None]
    assert found == [f"{vector}.scale" for vector in minia3.vectors(model)]


ENCODER = ["encoder", "encoder.blocks.0", "encoder.blocks.1"]


@pytest.mark.parametrize(
    ("name", "trained", "below"),
    [
        ("t5-v1.0", "", ["embed"]),
        ("t5-v1.0", "encoder.blocks.1.", ["embed", "encoder.blocks.0"]),
        ("t5-v1.0", "decoder.", ["embed", *ENCODER]),
        ("t5-v1.0", "decoder.blocks.1.", ["embed", *ENCODER, "decoder.blocks.0"]),
        ("llama-gqa", "", ["embed"]),
        ("llama-gqa", "blocks.1.", ["embed", "blocks.0"]),
    ],
)
def test_below_the_lowest_vector_that_is_trained_autograd_records_nothing(
    frozen, name, trained, below
):
    model, recorded = frozen(name), {}
    for vector, rows in minia3.vectors(model).items():
        rows.requires_grad_(vector.startswith(trained))
    for part, module in model.named_modules():
        if re.fullmatch(r"embed|encoder|decoder|.*blocks\.\d", part):
            recorded[part] = []
            module.register_forward_hook(
                lambda _, __, x, part=part: recorded[part].append(x is not None and x.requires_grad)
            )
    step(model, batch_of())
    assert sorted(part for part, outputs in recorded.items() if not any(outputs)) == sorted(below)


# Memory


@pytest.mark.parametrize(
    ("name", "dtype", "n_bytes"),
    [
        ("t5-v1.0", torch.float32, 142_312),
        ("t5-v1.0", torch.bfloat16, 76_984),
        ("llama-gqa", torch.float32, 86_552),
        ("llama-gqa", torch.bfloat16, 48_216),
    ],
)
def test_a_step_keeps_so_many_bytes_for_its_backward_pass(frozen, name, dtype, n_bytes):
    model, batch = frozen(name, dtype=dtype), batch_of(n_choices=2)
    assert kept_for_backward(lambda: loss_of(model, batch), model) == n_bytes


@pytest.mark.parametrize("name", NAMES)
def test_they_grow_in_proportion_to_length(frozen, name):
    """T5's scores have a bias for each pair of positions and head, once for all layers: it is taken off."""
    model, heads = frozen(name), 4 if name.startswith("t5") else 0
    kept = [
        kept_for_backward(lambda n=n: loss_of(model, batch_of((n,) * B)), model)
        for n in (64, 128, 192)
    ]
    kept = [n_bytes - 4 * heads * n * n for n_bytes, n in zip(kept, (64, 128, 192), strict=True)]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0


def storages(tree):
    return {x.untyped_storage()._cdata for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class Made(TorchDispatchMode):
    """Counts the tensors that are made with memory of their own, and the operations that make any out of `tables`."""

    def __init__(self, tables=()):
        super().__init__()
        self.n, self.n_reads = 0, 0
        self.tables = storages(list(tables))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = storages((args, kwargs)), storages(out)
        self.n += len(made - given)
        self.n_reads += bool(made - given and self.tables & given)
        return out


@pytest.mark.parametrize(("name", "n_tensors"), [("t5-v1.0", 104), ("llama-gqa", 96)])
def test_a_decoded_token_makes_so_many_tensors_whatever_the_length_of_the_text(
    frozen, name, n_tensors
):
    """Twice in 130 tokens all caches are moved, keys and values of two layers, to where there is room for 64 more."""
    model, made = frozen(name), []
    with torch.no_grad():
        state = model.start(tokens(B, M))
        for _ in range(130):
            with Made() as counted:
                model.step(state.start, state)
            made.append(counted.n)
    assert [n for n in made if n != n_tensors] == [n_tensors + 4] * 2


# Once for all


@pytest.mark.parametrize("n_choices", [1, 4])
def test_the_source_is_read_once_for_all_choices(frozen, n_choices):
    """By the encoder, and by the layers that make the decoder's keys and values of it."""
    model, lengths, seen = frozen("t5-v1.0"), (M, 2, 4), []
    readers = [
        model.encoder,
        *(module for block in model.decoder.blocks for module in (block.cross.k, block.cross.v)),
    ]
    for module in readers:
        module.register_forward_hook(
            lambda module, args, _: seen.append((module, args[0].shape[:-1].numel()))
        )
    step(model, batch_of(lengths, n_choices))
    assert seen == [(module, sum(lengths)) for module in readers]


@pytest.mark.parametrize("n_choices", [1, 4])
def test_a_decoder_reads_the_source_once_for_all_choices(frozen, n_choices):
    model, lengths, seen = frozen("llama-gqa"), (M, 2, 4), []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    step(model, batch_of(lengths, n_choices))
    assert (
        seen == [sum(lengths) - B] + [B * n_choices * L] * 2
    )  # the last layer's keys and values are all that is asked


@pytest.mark.parametrize(("name", "n_reads"), [("t5-v1.0", 16), ("llama-gqa", 11)])
def test_each_vector_is_looked_up_once_for_a_batch(frozen, name, n_reads):
    """Three to a layer, five in T5's decoder; a LLaMA's twice, but for its last l_ff, unasked by the source."""
    model = frozen(name, n_adapters=4)
    with Made(minia3.vectors(model).values()) as counted:
        choice_logprobs(model, batch_of(n_choices=2), torch.tensor([3, 0, 1]))
    assert counted.n_reads == n_reads


@pytest.mark.parametrize("name", NAMES)
def test_loading_an_adapter_goes_over_the_model_twice(loaded, name, tmp_path, monkeypatch):
    """Each time over all modules by name, which is most of what it costs."""
    model, walked, walk = loaded(name, n_adapters=2), [], torch.nn.Module.named_modules
    minia3.save_adapter(model, tmp_path)
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda x, *args: walked.append(x) or walk(x, *args)
    )
    minia3.load_adapter(model, tmp_path, 1)
    assert sum(x is model for x in walked) == 2
