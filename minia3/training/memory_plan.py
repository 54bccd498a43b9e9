"""Plan the memory that a model's tensors take to serve or to train it, without loading weights.

The model runs on fake tensors: they have a shape and a dtype, but no storage. A counter watches
which of them are alive. Only tensors are planned. Python, PyTorch, temporary buffers inside
kernels, and what the allocator keeps of freed memory come on top.

Shapes: B batch, M source length, C choices, L target length, or any length, S length of a text, R =
S - 1, T tokens of all targets, D model.
"""

import weakref
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import choices_at_once, logprobs, masked_logprobs
from minia3.model.costs import LAYER_FIELDS
from minia3.model.ia3 import freeze, vectors
from minia3.model.llama import Llama
from minia3.model.target_logprobs import target_logprobs

TARGET_LENGTH = 8  # tokens of a target in training


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive: `now`, and the most so far, `peak`.

    `peaks` has the most bytes of each part, if `begin_part` divides what runs into parts.

    It sees every tensor that an operation returns, fake or real, and is told by the garbage
    collector when its storage is freed. Views share a storage, which counts once.
    """

    def __init__(self):
        super().__init__()
        self.finalizers = {}  # address of a storage -> what runs when it is freed
        self.now = 0
        self.peaks = [0]

    @property
    def peak(self):
        return max(self.peaks)

    def begin_part(self):
        self.peaks.append(self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].device  # which a fake tensor knows at once, and is asked most often
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        n_bytes = storage.nbytes()
        if key not in self.finalizers:
            self.finalizers[key] = weakref.finalize(storage, self.remove, key, n_bytes)
            self.now += n_bytes
            self.peaks[-1] = max(self.peaks[-1], self.now)

    def remove(self, key, n_bytes):
        del self.finalizers[key]
        self.now -= n_bytes


def planned_memory(config, dtype, batch, length, is_training):
    """Return the most bytes that tensors take at once, weights included.

    Serving reads `batch` sources of `length` tokens and writes one token. Training is a step of the
    (IA)^3 recipe on such sources, with targets of TARGET_LENGTH tokens, once the optimizer has its
    moments. The kernels are PyTorch's for a CPU; other devices need about as much. (On short texts
    in bfloat16, attention without dropout keeps less on a CPU: see plain_attention.py.)
    """
    with FakeTensorMode():
        model = model_without_values(config, dtype)
        tokens_BL = torch.zeros(batch, max(length, TARGET_LENGTH), dtype=torch.long)
        return measure_peak(model, tokens_BL, length, is_training)


def model_without_values(config, dtype):
    """Return a model whose parameters are fake tensors. Call this within FakeTensorMode."""
    model = build_model(config)
    for name, p in list(model.named_parameters()):
        place_parameter(model, name, torch.empty(p.shape, dtype=dtype_of_parameter(name, dtype)))
    return model


def dtype_of_parameter(name, dtype):
    """Return the dtype of a parameter: vectors are float32 whatever the dtype of the model."""
    return torch.float32 if name.endswith(".scale") else dtype


def measure_peak(model, tokens_BL, length, is_training):
    """Run one step and return the most bytes that were alive. The tensors may be fake or real."""
    counter = MemoryCounter()
    freeze(model)
    model.train(is_training)
    for tensor in (*model.parameters(), tokens_BL):
        counter.add(tensor)
    with counter, torch.set_grad_enabled(is_training):
        source_BM = tokens_BL[:, :length]
        if is_training:
            # Adafactor keeps one moment per entry of a vector, from its first step on.
            moments = [torch.zeros_like(vector) for vector in vectors(model).values()]
            planned_logprobs(model, source_BM, tokens_BL[:, :TARGET_LENGTH]).sum().backward()
            del moments
            model.zero_grad()
        else:
            state = model.start(source_BM)
            model.step(state.start, state)
    return counter.peak


def planned_logprobs(model, source_BM, target_BL, keeps_kv=False):
    """Return the log-probabilities (B, L) of one target per source, as training computes them.

    This is `choice_logprobs` without masks: fake tensors have no values, so nothing can tell where
    their padding is. keeps_kv: see `Llama.run_blocks`.
    """
    if not isinstance(model, Llama):
        return logprobs(model, model.start(source_BM), target_BL)
    text_BS = torch.cat((source_BM, target_BL), dim=1)
    state = model.start(text_BS[:, :1])
    x_BRD = model.run_blocks(text_BS[:, :-1], state, keeps_kv=keeps_kv)
    x_TD = x_BRD[:, -target_BL.shape[1] :].flatten(0, 1)
    logp_T = target_logprobs(x_TD, model.head_weight, target_BL.flatten())
    return logp_T.view(target_BL.shape)


# The steps and the evaluations of a run


class StepShape(NamedTuple):
    """The sizes of one forward pass: of a micro-batch, or of the whole batch."""

    n_examples: int
    source_length: int  # in tokens, as is target_length
    n_choices: int
    target_length: int

    @property
    def n_tokens(self):
        return self.n_examples * (self.source_length + self.n_choices * self.target_length)


def peaks_beyond_weights(function, model, shape):
    """Return an array: the most bytes that tensors take in each part of function(source_BM,
    target_BCL), which runs the model. `count_in_parts` says what the parts are.

    Call this within FakeTensorMode. The parameters of the model and the ids do not count.
    """
    source_BM = torch.zeros(shape.n_examples, shape.source_length, dtype=torch.long)
    target_shape = (shape.n_examples, shape.n_choices, shape.target_length)
    target_BCL = torch.zeros(target_shape, dtype=torch.long)
    counter = MemoryCounter()
    for tensor in (*model.parameters(), source_BM, target_BCL):
        counter.add(tensor)
    n_before = counter.now
    count_in_parts(model, counter)
    with counter:
        function(source_BM, target_BCL)
    return np.array(counter.peaks) - n_before


def count_in_parts(model, counter):
    """Let `counter` begin a part when some blocks of each stack begin, and when the last one ends.

    In the forward pass these are the first block, the second and the last; in the backward pass,
    the last, the one before it, and the first. So models with three layers or more have the same
    parts, and with each further layer the peak of a part grows by the same number of bytes. The
    peak of the whole need not, because it may move from one part to another.
    """

    def begin_part(*_):
        counter.begin_part()

    def begin_part_in_backward(block, arguments, out):
        if isinstance(out, torch.Tensor) and out.requires_grad:  # unlike keys and values alone
            out.register_hook(begin_part)

    stacks = [module.blocks for module in model.modules() if hasattr(module, "blocks")]
    for blocks in stacks:
        for block in {*blocks[:2], blocks[-1]}:
            block.register_forward_pre_hook(begin_part)
        for block in {blocks[0], *blocks[-2:]}:
            block.register_forward_hook(begin_part_in_backward)
        blocks[-1].register_forward_hook(begin_part)


def score_without_padding(model, source_BM, target_BCL, sharded=False, keeps_kv=False):
    """Return a scalar to call `backward` on: the sum of what `choice_logprobs` returns.

    sharded: whether processes share one copy of the base. keeps_kv: whether a LLaMA keeps the keys
    and values of texts with a single target.
    """
    n_examples, n_choices, length = target_BCL.shape
    if n_choices == 1:
        return planned_logprobs(model, source_BM, target_BCL[:, 0], keeps_kv).sum()
    state = model.start(source_BM)

    def score(target_BCL):
        repeated = state.repeat(target_BCL.shape[1])
        return masked_logprobs(model, repeated, target_BCL.flatten(0, 1), None)

    n_at_once = choices_at_once(n_examples, length)
    if n_choices <= n_at_once or sharded:
        return score(target_BCL).sum()
    state.ensure_all_cross_kv()  # once for all chunks, as in `choice_logprobs`
    total = 0.0
    for part in target_BCL.split(n_at_once, dim=1):
        total = total + checkpoint(score, part, use_reentrant=False).sum()
    return total


def extrapolate_depth(count, model_config):
    """Return count(model_config), extrapolated from stacks with three and four layers.

    count: a function from the config of a model to a number, or to an array of numbers. Each of
    them grows by the same amount with each layer of a stack after the third.
    """
    depths = {}
    for name in LAYER_FIELDS:
        if hasattr(model_config, name):
            depths[name] = getattr(model_config, name)
    shallow = replace(model_config, **{name: min(depth, 3) for name, depth in depths.items()})
    first_layers = count(shallow)
    total = first_layers
    for name, depth in depths.items():
        if depth > 3:
            fourth_layer = count(replace(shallow, **{name: 4})) - first_layers
            total = total + (depth - 3) * fourth_layer
    return total
