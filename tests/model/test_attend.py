"""A single query on a CPU gets our own attention, in 16 bits or with many rows. PyTorch computes
everything else, and a padded batch of long rows row by row. On a GPU, it is asked for nothing that
it would not fuse.
"""

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of, gradients, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_version import TORCH

from minia3.inference.scoring import choice_logprobs
from minia3.model import attend as attend_module
from minia3.model import packing
from minia3.model.attend import LEAST_ROWS, attend
from minia3.model.packing import LEAST_COLUMNS, Packing
from minia3.model.sequence_state import Context, mask_to_bias
from minia3.model.static_state import Room, StaticState

HEADS_AND_BIASES = [
    (4, 4, None),
    (4, 4, "per head"),
    (4, 4, "per row"),
    (6, 2, None),
    (6, 2, "per row"),
    (3, 1, None),
    (3, 1, "per row"),
]


def attend_with(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, dropout=0.0, scale=1.0):
    context = Context(torch.tensor([0]), bias_BHLM=bias_BHLM)
    return attend(q_BHLK, k_BGMK, v_BGMK, context, dropout=dropout, scale=scale)


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch):
    """Let these tests run as on a processor without tiles, whatever this one has."""
    monkeypatch.setattr(attend_module, "HAS_TILES", False)


@pytest.fixture
def pytorch_is_forbidden(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


def make_inputs(n_heads, n_kv_heads, bias_kind, dtype, n_rows=5):
    """Return one query for each of the rows, and 31 columns of a longer cache."""
    torch.manual_seed(0)
    q_BHLK = torch.randn(n_rows, n_heads, 1, 16).to(dtype)
    k_BGMK = torch.randn(n_rows, n_kv_heads, 40, 16).to(dtype)[:, :, :31]
    v_BGMK = torch.randn(n_rows, n_kv_heads, 40, 16).to(dtype)[:, :, :31]
    is_seen_B11M = torch.rand(n_rows, 1, 1, 31) < 0.7
    biases = {
        None: None,
        "per head": torch.randn(1, n_heads, 1, 31).to(dtype),
        "per row": mask_to_bias(is_seen_B11M, dtype),
    }
    return q_BHLK, k_BGMK, v_BGMK, biases[bias_kind]


@pytest.mark.parametrize(
    ("n_rows", "dtype"),
    [
        (5, torch.bfloat16),
        (1, torch.bfloat16),
        (5, torch.float16),
        (1, torch.float16),
        (LEAST_ROWS, torch.float32),
    ],
)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "bias_kind"), HEADS_AND_BIASES)
def test_one_query_is_as_close_to_float64_as_with_pytorch(
    n_heads, n_kv_heads, bias_kind, n_rows, dtype, request
):
    inputs = make_inputs(n_heads, n_kv_heads, bias_kind, dtype, n_rows)
    options = {"scale": 0.7, "enable_gqa": n_heads != n_kv_heads}
    wide_inputs = [x if x is None else x.double() for x in inputs]
    exact = F.scaled_dot_product_attention(*wide_inputs, **options)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    request.getfixturevalue("pytorch_is_forbidden")
    with torch.no_grad():
        ours = attend_with(*inputs, scale=0.7)
    assert ours.dtype == dtype
    assert ours.shape == inputs[0].shape
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, False), (torch.float16, True), (torch.float32, True)],
)
def test_with_tiles_one_query_of_bfloat16_is_left_to_pytorch(dtype, expected, monkeypatch):
    q_BHLK = torch.zeros(LEAST_ROWS, 4, 1, 16, dtype=dtype)
    with torch.no_grad():
        assert attend_module.is_decoding_on_cpu(q_BHLK, dropout=0.0)
        monkeypatch.setattr(attend_module, "HAS_TILES", True)
        assert attend_module.is_decoding_on_cpu(q_BHLK, dropout=0.0) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_query_with_dropout_is_left_to_pytorch(dtype, monkeypatch):
    inputs = make_inputs(4, 4, None, dtype, n_rows=LEAST_ROWS)
    original = F.scaled_dot_product_attention
    rates = []

    def spy(*qkv, dropout_p, **options):
        rates.append(dropout_p)
        return original(*qkv, dropout_p=dropout_p, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        plain = attend_with(*inputs)
        assert rates == []
        dropped = attend_with(*inputs, dropout=0.9)
    assert rates == [0.9]
    assert (dropped - plain).norm() > plain.norm()


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2)])
def test_attention_equals_the_equation(n_heads, n_kv_heads, n_queries):
    torch.manual_seed(1)
    q_BHLK = torch.randn(2, n_heads, n_queries, 8, dtype=torch.float64)
    k_BGMK = torch.randn(2, n_kv_heads, 5, 8, dtype=torch.float64)
    v_BGMK = torch.randn(2, n_kv_heads, 5, 8, dtype=torch.float64)
    bias_BHLM = torch.randn(2, n_heads, n_queries, 5, dtype=torch.float64)
    n_sharing = n_heads // n_kv_heads
    k_BHMK = k_BGMK.repeat_interleave(n_sharing, dim=1)
    v_BHMK = v_BGMK.repeat_interleave(n_sharing, dim=1)
    weights_BHLM = (0.3 * q_BHLK @ k_BHMK.mT + bias_BHLM).softmax(-1)
    found = attend_with(q_BHLK, k_BGMK, v_BGMK, bias_BHLM, scale=0.3)
    torch.testing.assert_close(found, weights_BHLM @ v_BHMK)


LENGTHS = [40, 1, 64, 0, 6]  # a prompt of one token leaves a LLaMA nothing to read
MASK_BL = torch.arange(LEAST_COLUMNS) < torch.tensor(LENGTHS)[:, None]


WINDOW_LM = torch.ones(LEAST_COLUMNS, LEAST_COLUMNS, dtype=torch.bool).tril().triu(-8)


def pack(mask_BL, device="cpu"):
    return Packing(mask_BL, torch.device(device), nn.Identity())


def end_to_end(n_heads, n_kv_heads, bias_kind):
    """Return queries, keys and values of the rows of a batch, end to end, and its Context."""
    torch.manual_seed(0)
    qkv = []
    for n in (n_heads, n_kv_heads, n_kv_heads):
        qkv.append(torch.randn(1, n, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True))
    biases = {
        "causal": None,
        "per head": torch.randn(1, n_heads, LEAST_COLUMNS, LEAST_COLUMNS, dtype=torch.float64),
        "window": mask_to_bias(WINDOW_LM[None, None], torch.float64),
    }
    is_causal = bias_kind == "causal"
    return qkv, Context(torch.tensor([0]), pack(MASK_BL), biases[bias_kind], is_causal)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("bias_kind", ["causal", "per head", "window"])
def test_each_row_of_a_padded_batch_is_attention_of_that_row_alone(n_heads, n_kv_heads, bias_kind):
    qkv, context = end_to_end(n_heads, n_kv_heads, bias_kind)
    found = attend(*qkv, context, dropout=0.0, scale=0.3)
    grad = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, qkv, grad)
    first = 0
    for n in LENGTHS:
        of_row = slice(first, first + n)
        first += n
        alone = [x[:, :, of_row] for x in qkv]
        bias = context.bias_BHLM
        if bias is not None:
            bias = bias[:, :, :n, :n]
        context_alone = Context(torch.tensor([0]), bias_BHLM=bias, is_causal=context.is_causal)
        expected = attend(*alone, context_alone, dropout=0.0, scale=0.3)
        torch.testing.assert_close(found[:, :, of_row], expected)

        expected_gradients = torch.autograd.grad(expected, alone, grad[:, :, of_row])
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient[:, :, of_row], expected_gradient)
    assert first == found.shape[2]


def test_a_padded_batch_has_dropout():
    qkv, context = end_to_end(4, 4, "per head")
    plain = attend(*qkv, context, dropout=0.0, scale=1.0)
    dropped = attend(*qkv, context, dropout=0.9, scale=1.0)
    assert (dropped - plain).norm() > plain.norm()


def test_a_padded_batch_is_computed_without_its_padding(monkeypatch):
    qkv, context = end_to_end(4, 4, "per head")
    original = F.scaled_dot_product_attention
    computed = []

    def spy(q_BHLK, k_BGMK, *args, **kwargs):
        computed.append((q_BHLK.shape[2], k_BGMK.shape[2]))
        return original(q_BHLK, k_BGMK, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(*qkv, context, dropout=0.0, scale=1.0)
    assert computed == [(n, n) for n in LENGTHS]


def test_rows_that_lie_end_to_end_are_the_rows_of_the_batch(monkeypatch):
    packed = pack(MASK_BL)
    monkeypatch.setattr(packing, "LEAST_COLUMNS", LEAST_COLUMNS + 1)
    unpacked = pack(MASK_BL)
    assert unpacked.lengths is None

    x_T1D = torch.randn(sum(LENGTHS), 1, 6)
    for of_batch in (packed, unpacked):
        rows = of_batch.for_attention(x_T1D)
        torch.testing.assert_close(of_batch.from_attention(rows), x_T1D, rtol=0, atol=0)
        heads = rows.unflatten(2, (2, 3)).transpose(1, 2)
        k_BGLK, v_BGLK = of_batch.padded_kv((heads, -heads))
        expected = unpacked.unpack(x_T1D).unflatten(2, (2, 3)).transpose(1, 2)
        torch.testing.assert_close(k_BGLK, expected, rtol=0, atol=0)
        torch.testing.assert_close(v_BGLK, -expected, rtol=0, atol=0)

    position_L = torch.arange(LEAST_COLUMNS)
    expected = torch.cat([position_L[:n] for n in LENGTHS])[None]
    assert torch.equal(packed.positions_for_attention(position_L[None]), expected)
    assert torch.equal(unpacked.positions_for_attention(position_L[None]), position_L[None])


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "llama-gqa"])
def test_a_model_has_the_same_gradients_row_by_row_and_at_once(name, loaded, monkeypatch):
    model = loaded(name).double()
    batch = batch_of((9, 5, 1))
    lengths = []

    def spy(q_1HTK, k_1GTK, v_1GTK, context, dropout, scale):
        lengths.append(context.packing.lengths)
        return within_rows(q_1HTK, k_1GTK, v_1GTK, context, dropout, scale)

    within_rows = attend_module.attend_within_rows
    monkeypatch.setattr(attend_module, "attend_within_rows", spy)
    at_once = gradients(model, batch)
    assert lengths == []
    monkeypatch.setattr(packing, "LEAST_COLUMNS", 1)
    same(gradients(model, batch), at_once, rtol=1e-10, atol=1e-12)
    assert len(lengths) > 0


@pytest.mark.parametrize(
    ("mask_BL", "device"),
    [
        (MASK_BL.flip(1), "cpu"),  # the padding comes first
        (torch.ones_like(MASK_BL), "cpu"),  # there is none
        (MASK_BL[:, :-1], "cpu"),  # the rows are short
        (MASK_BL, "meta"),  # a GPU does all rows at once
    ],
)
def test_other_batches_are_computed_at_once(mask_BL, device):
    assert pack(mask_BL, device).lengths is None


def test_compiled_code_computes_all_rows_at_once():
    compiled = nn.Identity()
    compiled.compile()
    assert Packing(MASK_BL, torch.device("cpu"), compiled).lengths is None


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_batch_is_packed_and_unpacked_by_operators_that_apple_s_gpus_have():
    """In torch 2.5, `index_copy_` is the only operator of training and decoding that they lack."""
    of_batch = pack(MASK_BL)
    x_BLD = torch.randn(*MASK_BL.shape, 4, requires_grad=True)
    with Operators() as operators:
        of_batch.unpack(of_batch.pack(x_BLD)).sum().backward()
    assert "index_put_" in operators.names
    assert not any(name.startswith("index_copy") for name in operators.names)


# On a GPU


def is_fused(q_BHLK, k_BGMK, v_BGMK, attn_mask, enable_gqa, **_):
    """Return whether all releases of PyTorch fuse this on CUDA, and read the bias where it is.

    In the older ones, only flash attention has groups of heads, and it takes neither a bias nor
    float32. The others need a bias with contiguous rows, and copy it unless rows begin at multiples
    of 8.
    """
    if attn_mask is None:
        return not (enable_gqa and q_BHLK.dtype == torch.float32)
    *strides, last_stride = attn_mask.stride()
    return not enable_gqa and last_stride == 1 and all(stride % 8 == 0 for stride in strides)


@pytest.fixture
def fused_or_not(monkeypatch):
    """Whether each call of PyTorch's attention is fused on a GPU."""
    found = []
    original = F.scaled_dot_product_attention

    def spy(*qkv, **options):
        found.append(is_fused(*qkv, **options))
        return original(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_choices", [1, 2])
@pytest.mark.parametrize("name", ["t5-v1.0", "umt5", "llama-gqa", "mistral"])
def test_on_a_gpu_every_call_in_training_is_fused(name, n_choices, dtype, loaded, fused_or_not):
    model = loaded(name, dtype=dtype).to("meta").train()
    for lengths in ((9, 5, 1), (7, 7, 7)):
        choice_logprobs(model, batch_of(lengths, n_choices)).sum().backward()
    assert set(fused_or_not) == {True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_on_a_gpu_every_call_in_decoding_is_fused(name, dtype, loaded, fused_or_not):
    model = loaded(name, dtype=dtype).to("meta")
    batch = batch_of((9, 5, 1))
    with torch.no_grad():
        for mask_BM in (batch.mask_BM, None):
            state = model.start(batch.source_BM.to("meta"), mask_BM).repeat(2)
            for _ in range(3):
                model.step(state.start, state)
            state = StaticState.make(state, 3, Room())
            model.step(state.start, state)
    assert set(fused_or_not) == {True}


@pytest.fixture
def meta_is_cuda(monkeypatch):
    monkeypatch.setattr(attend_module, "prefers_cudnn", lambda device: device.type == "meta")


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("name", ["t5-v1.0", "llama-gqa"])
def test_on_a_gpu_no_call_may_be_left_to_cudnn(name, was_on, loaded, monkeypatch, meta_is_cuda):
    is_on = torch.backends.cuda.cudnn_sdp_enabled
    original = F.scaled_dot_product_attention
    found = []

    def spy(*qkv, **options):
        found.append((is_on(), torch.backends.cuda.flash_sdp_enabled()))
        return original(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = loaded(name).to("meta").train()
    before = is_on()
    torch.backends.cuda.enable_cudnn_sdp(was_on)
    try:
        for n_choices in (1, 2):
            choice_logprobs(model, batch_of((9, 5, 1), n_choices)).sum().backward()
        assert is_on() == was_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert set(found) == {(False, True)}


@pytest.mark.slow  # importing the compiler takes seconds
@pytest.mark.skipif(TORCH < (2, 9), reason="older releases do not prefer cuDNN")
def test_compiled_attention_is_not_left_to_cudnn_either(monkeypatch):
    """Without a break, because a graph that is broken is no CUDA graph."""
    is_on = torch.backends.cuda.cudnn_sdp_enabled
    found = []

    class Spy(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is F.scaled_dot_product_attention:
                found.append(is_on())
            return super().call_function(target, args, kwargs)

    def backend(graph, _):
        return Spy(graph).run

    monkeypatch.setattr(attend_module, "prefers_cudnn", lambda device: True)
    compiled = torch.compile(attend_module.fused, backend=backend, fullgraph=True)
    q_BHLK = torch.randn(2, 6, 5, 8)
    given = (q_BHLK, q_BHLK, q_BHLK, None, True, 0.0, 1.0)
    torch.testing.assert_close(compiled(*given), attend_module.fused(*given))
    assert (found, is_on()) == ([False], True)
    torch.compiler.reset()


def test_only_newer_releases_prefer_cudnn_and_only_on_cuda():
    assert attend_module.prefers_cudnn(torch.device("cuda:1")) == (TORCH >= (2, 9))
    assert not attend_module.prefers_cudnn(torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "n_kv_heads"), [(torch.bfloat16, 2), (torch.float32, 6)])
def test_on_a_gpu_a_kernel_for_groups_of_heads_gets_keys_that_are_not_repeated(
    dtype, n_kv_heads, monkeypatch
):
    q_BHLK = torch.empty(2, 6, 5, 8, dtype=dtype, device="meta")
    k_BGMK = torch.empty(2, 2, 5, 8, dtype=dtype, device="meta")
    found = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **_: found.extend([k, v])
    )
    attend_module.fused(q_BHLK, k_BGMK, k_BGMK, None, True, 0.0, 1.0)
    assert [x.shape[1] for x in found] == [n_kv_heads] * 2


@pytest.mark.parametrize(("n_queries", "is_causal"), [(1, False), (3, False), (5, True)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(6, 2), (3, 1)])
def test_heads_without_groups_have_the_same_results(n_heads, n_kv_heads, n_queries, is_causal):
    torch.manual_seed(2)
    options = {"dtype": torch.float64, "requires_grad": True}
    q_BHLK = torch.randn(2, n_heads, n_queries, 8, **options)
    k_BGMK = torch.randn(2, n_kv_heads, 5, 8, **options)
    v_BGMK = torch.randn(2, n_kv_heads, 5, 8, **options)
    bias_B1LM = None
    if not is_causal:
        bias_B1LM = torch.randn(2, 1, n_queries, 5, dtype=torch.float64)
    qkv = (q_BHLK, k_BGMK, v_BGMK)
    results = []
    for function in (attend_module.ungrouped, attend_module.fused):
        torch.manual_seed(3)  # so that dropout leaves out the same weights
        results.append(function(*qkv, bias_B1LM, is_causal, 0.2, 0.3))
    found, expected = results
    torch.testing.assert_close(found, expected)
    grad = torch.randn(found.shape, dtype=torch.float64)
    same(torch.autograd.grad(found, qkv, grad), torch.autograd.grad(expected, qkv, grad))
