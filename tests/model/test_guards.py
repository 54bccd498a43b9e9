"""The cost of minia3 in things that can be counted, because a count is the same in every run and a
time is not.

If a number here becomes smaller, that is progress: write it down.

Shapes: B batch, M source length, C choices, L target length.
"""

import functools
import re

import pytest
import torch
from batches import loss_of
from conftest import tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch_version import counted_with_this_torch

import minia3
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.checkpoints.load import build_model
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import Batch
from minia3.training.memory_plan import extrapolate_depth
from tests.benchmarks.measure import kept_for_backward

aten = torch.ops.aten
B = 3
M = 7
L = 5
NAMES = ["t5-v1.0", "llama-gqa"]


def batch_of(lengths=(M,) * B, n_choices=1):
    """Return a batch of sources of these lengths, each with choices of L tokens."""
    target_BCL = tokens(len(lengths), n_choices, L, seed=1)
    return Batch(
        source_BM=tokens(len(lengths), max(lengths)),
        mask_BM=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        target_BCL=target_BCL,
        target_mask_BCL=torch.ones_like(target_BCL, dtype=torch.bool),
        label_B=torch.arange(len(lengths)) % n_choices,
    )


def run_step(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()


@pytest.fixture
def frozen(loaded):
    """A function from a name to a model without dropout. Only its vectors train."""

    def get(name, **options):
        model = loaded(name, seed=0, **options)
        minia3.freeze(model)
        return model

    return get


# Matrix products


def weight_flops(function):
    """Return the FLOPs of the products with weights (attention's depend on PyTorch's kernel)."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_flop_counts()["Global"][aten.mm]


D_MODEL = 24
D_INNER = 24  # n_heads * d_head
D_KV = 12  # of llama-gqa: n_kv_heads * d_head
D_FF = 40
N_LAYERS = 2
N_VOCAB = 61


def t5_flops(n_read, n_written):
    """Return the FLOPs of a forward pass, and the FLOPs that no gradient of a vector needs.

    n_read, n_written: tokens of the sources and of the targets.
    """
    attention = 4 * D_MODEL * D_INNER
    cross_queries = 2 * D_MODEL * D_INNER
    cross_memory = 2 * D_MODEL * D_INNER  # keys and values of the encoder's output
    ffn = 2 * D_MODEL * D_FF
    encoder = n_read * (attention + ffn)
    decoder = n_written * (attention + cross_queries + ffn) + n_read * cross_memory
    head = n_written * D_MODEL * N_VOCAB
    # The first layer makes its queries, keys and values from embeddings, which need no gradient.
    of_embeddings = (n_read + n_written) * 3 * D_MODEL * D_INNER
    return 2 * (N_LAYERS * (encoder + decoder) + head), 2 * of_embeddings


def llama_flops(n_read, n_written):
    """Return the same for LLaMA."""
    keys_and_values = 2 * D_MODEL * D_KV
    queries = D_MODEL * D_INNER
    layer = 2 * D_MODEL * D_INNER + keys_and_values + 3 * D_MODEL * D_FF
    n_tokens = n_read + n_written
    blocks = n_tokens * N_LAYERS * layer
    head = n_written * D_MODEL * N_VOCAB
    of_embeddings = n_tokens * (keys_and_values + queries)
    return 2 * (blocks + head), 2 * of_embeddings


def expected_flops(name, lengths):
    """Return the two numbers for sources of these lengths, with one target of L tokens each."""
    n_written = len(lengths) * L
    if name == "t5-v1.0":
        return t5_flops(sum(lengths), n_written)
    # The last token of a source is the first that writes the target; the target's last one is not
    # read.
    return llama_flops(sum(lengths) - len(lengths), n_written)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_multiplies_only_for_the_forward_pass_and_for_activation_gradients(frozen, name):
    model = frozen(name)
    batch = batch_of()
    forward, unused = expected_flops(name, (M,) * B)
    with torch.no_grad():
        assert weight_flops(lambda: loss_of(model, batch)) == forward
    assert weight_flops(lambda: run_step(model, batch)) == 2 * forward - unused


@pytest.mark.parametrize("name", NAMES)
def test_full_fine_tuning_multiplies_for_weight_gradients_too(frozen, name):
    model = frozen(name).requires_grad_(True)
    forward, _ = expected_flops(name, (M,) * B)
    assert weight_flops(lambda: run_step(model, batch_of())) == 3 * forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_ours", "n_full"),
    [
        ("t5-base", 433_707_810_816, 656_337_272_832),
        ("llama-2-7b", 27_215_093_825_536, 40_985_715_277_824),
    ],
)
def test_a_step_of_a_real_model_costs_two_thirds_of_full_fine_tuning(name, n_ours, n_full):
    """8 sources of 128 tokens and targets of 8 tokens: 66% of full fine-tuning.

    On the meta device nothing is computed.
    """
    source_BM = torch.zeros(8, 128, dtype=torch.long, device="meta")
    target_BL = torch.zeros(8, 8, dtype=torch.long, device="meta")

    def flops(config, is_frozen):
        model = build_model(config).to("meta").eval()
        if is_frozen:
            minia3.freeze(model)
        return weight_flops(
            lambda: minia3.logprobs(model, model.start(source_BM), target_BL).sum().backward()
        )

    # Every layer after the third one costs what the fourth one costs.
    config = KNOWN_MODELS[name].config
    assert extrapolate_depth(functools.partial(flops, is_frozen=False), config) == n_full
    assert extrapolate_depth(functools.partial(flops, is_frozen=True), config) == n_ours


@pytest.mark.parametrize("name", NAMES)
def test_padding_takes_part_in_no_product(frozen, name):
    lengths = (M, 2, 4)
    model = frozen(name)
    forward, unused = expected_flops(name, lengths)
    assert weight_flops(lambda: run_step(model, batch_of(lengths))) == 2 * forward - unused


# What gets a gradient


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_the_vectors_and_nothing_that_is_frozen(frozen, name):
    model = frozen(name)
    run_step(model, batch_of())
    found = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert found == [f"{vector}.scale" for vector in minia3.vectors(model)]


ENCODER = ["encoder", "encoder.blocks.0", "encoder.blocks.1"]


@pytest.mark.parametrize(
    ("name", "trained", "expected"),
    [
        ("t5-v1.0", "", ["embed"]),
        ("t5-v1.0", "encoder.blocks.1.", ["embed", "encoder.blocks.0"]),
        ("t5-v1.0", "decoder.", ["embed", *ENCODER]),
        ("t5-v1.0", "decoder.blocks.1.", ["embed", *ENCODER, "decoder.blocks.0"]),
        ("llama-gqa", "", ["embed"]),
        ("llama-gqa", "blocks.1.", ["embed", "blocks.0"]),
    ],
)
def test_autograd_records_nothing_below_the_lowest_vector_that_trains(
    frozen, name, trained, expected
):
    model = frozen(name)
    for vector_name, vector in minia3.vectors(model).items():
        vector.requires_grad_(vector_name.startswith(trained))
    recorded = set()
    seen = set()

    def note(part, out):
        seen.add(part)
        # A block that stops after its keys and values returns a pair.
        tensors = out if isinstance(out, tuple) else (out,)
        if any(tensor.requires_grad for tensor in tensors):
            recorded.add(part)

    for part, module in model.named_modules():
        if re.fullmatch(r"embed|encoder|decoder|.*blocks\.\d", part):
            module.register_forward_hook(lambda _, __, out, part=part: note(part, out))
    run_step(model, batch_of())
    assert seen - recorded == set(expected)


# Memory


@counted_with_this_torch
@pytest.mark.parametrize(
    ("name", "dtype", "n_bytes"),
    [
        ("t5-v1.0", torch.float32, 110_364),
        ("t5-v1.0", torch.bfloat16, 46_860),
        ("llama-gqa", torch.float32, 81_196),
        ("llama-gqa", torch.bfloat16, 36_764),
    ],
)
def test_a_step_keeps_this_many_bytes_for_its_backward_pass(frozen, name, dtype, n_bytes):
    model = frozen(name, dtype=dtype)
    batch = batch_of(n_choices=2)
    assert kept_for_backward(lambda: loss_of(model, batch), model) == n_bytes


@counted_with_this_torch
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_that_a_step_keeps_grow_in_proportion_to_length(frozen, name):
    """T5 has a bias per head and pair of positions, once for all layers. It is subtracted here."""
    model = frozen(name)
    n_heads = 4 if name.startswith("t5") else 0
    kept = []
    for length in (64, 128, 192):
        batch = batch_of((length,) * B)
        n_bytes = kept_for_backward(lambda batch=batch: loss_of(model, batch), model)
        kept.append(n_bytes - 4 * n_heads * length * length)
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0


@pytest.mark.parametrize(("name", "n_choices"), [("t5-v1.0", 1), ("t5-v1.0", 2), ("llama-gqa", 1)])
def test_padding_keeps_nothing_for_the_backward_pass(frozen, name, n_choices):
    """On a CPU, a batch of long rows keeps about as much as its rows would keep one by one.

    A LLaMA also keeps once what its head reads. (With several choices, it keeps padded prompts.)
    """
    model = frozen(name)

    def kept(*lengths):
        batch = batch_of(lengths, n_choices)
        return kept_for_backward(lambda: loss_of(model, batch), model)

    assert kept(64, 20, 7) < 1.06 * (kept(64) + kept(20) + kept(7))


def storages(tree):
    found = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.add(leaf.untyped_storage()._cdata)
    return found


class CountTensors(TorchDispatchMode):
    """Count the tensors that get new memory, and the operations that make them from `tables`."""

    def __init__(self, tables=()):
        super().__init__()
        self.n_made = 0
        self.n_reads = 0
        self.tables = storages(list(tables))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = storages((args, kwargs))
        made = storages(out) - inputs
        self.n_made += len(made)
        self.n_reads += bool(made and self.tables & inputs)
        return out


@counted_with_this_torch
@pytest.mark.parametrize(("name", "n_tensors"), [("t5-v1.0", 97), ("llama-gqa", 85)])
def test_decoding_a_token_makes_this_many_tensors_whatever_the_length_of_the_text(
    frozen, name, n_tensors
):
    """Twice in 130 tokens, the keys and values of the two layers move to larger tensors.

    Before the first token, those of a T5's source become contiguous. Three of the tensors stay on
    the CPU: they say which row a column belongs to.
    """
    model = frozen(name)
    made = []
    with torch.no_grad():
        state = model.start(tokens(B, M))
        for _ in range(130):
            with CountTensors() as counter:
                model.step(state.start, state)
            made.append(counter.n_made)
    n_moves = 2
    if name.startswith("t5"):
        assert made[0] == n_tensors + 4
        n_moves = 3
    assert [n for n in made if n != n_tensors] == [n_tensors + 4] * n_moves


# What is done only once


@pytest.mark.parametrize("n_choices", [1, 4])
def test_the_source_is_read_once_for_all_choices(frozen, n_choices):
    """The encoder and the layers for cross-attention's keys and values see each token once."""
    model = frozen("t5-v1.0")
    lengths = (M, 2, 4)
    readers = [model.encoder]
    for block in model.decoder.blocks:
        readers += [block.cross.k, block.cross.v]
    seen = []
    for module in readers:
        module.register_forward_hook(
            lambda module, args, _: seen.append((module, args[0].shape[:-1].numel()))
        )
    run_step(model, batch_of(lengths, n_choices))
    assert seen == [(module, sum(lengths)) for module in readers]


@pytest.mark.parametrize("n_choices", [1, 4])
def test_a_llama_reads_the_source_once_for_all_choices(frozen, n_choices):
    model = frozen("llama-gqa")
    lengths = (M, 2, 4)
    seen = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    run_step(model, batch_of(lengths, n_choices))
    n_source = sum(lengths) - B
    n_targets = B * n_choices * L
    if n_choices == 1:  # one pass for both
        assert seen == [n_source + n_targets] * N_LAYERS
    else:  # the last layer of a source stops after its keys and values
        assert seen == [n_source, n_targets, n_targets]


@pytest.mark.parametrize(("name", "n_reads"), [("t5-v1.0", 16), ("llama-gqa", 11)])
def test_each_vector_is_looked_up_once_for_a_batch(frozen, name, n_reads):
    """A layer has three vectors, and in T5's decoder five. LLaMA looks them up twice, for the
    prompt and for its two choices.

    LLaMA's last l_ff is looked up only once, because the last layer of a prompt stops after its
    keys and values.
    """
    model = frozen(name, n_adapters=4)
    with CountTensors(minia3.vectors(model).values()) as counter:
        choice_logprobs(model, batch_of(n_choices=2), torch.tensor([3, 0, 1]))
    assert counter.n_reads == n_reads
