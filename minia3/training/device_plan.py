"""Plan before a run: what one of several devices holds while (IA)^3 trains, without weights.

    weights       all of the base; or, if it is divided, a share of the rows of each block, and the
                  whole of what belongs to no block: the embedding, the head, the last norm. With
                  --offload, only the latter
    vectors       float32, with their gradients and the moments of the optimizer
    activations   what a step keeps and computes
    unsharded     what is there for a moment only: blocks of a divided or offloaded base while they
                  run, and a weight of a quantized base while it is multiplied with

The sum is slightly too large, because the parts do not peak at the same moment.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

from minia3.checkpoints.load import build_model
from minia3.model.quantized import NF4_BLOCK, is_quantizable
from minia3.training.config import Config
from minia3.training.memory_fit import USABLE_SHARE
from minia3.training.memory_plan import TARGET_LENGTH, StepShape, dtype_of_parameter
from minia3.training.step_memory import TRAINED_BYTES, planned_activations

# While a group of weights is gathered, it is there twice: it is gathered into one flat tensor, and
# gloo gathers into a copy of that. NCCL needs no copy.
WHILE_GATHERED = 2

VECTOR_BYTES = 4 + TRAINED_BYTES  # of an entry: the float32, its gradient and two moments

# The parameters of a block are gathered together, except for those that make the keys and values of
# cross-attention: they are needed before the block runs.
BLOCK = re.compile(r".*blocks\.\d+\.")
CROSS_KV = re.compile(r"cross\.[kv]\.")

MANY = 8  # examples: from a step with 1 and one with this many, larger steps are extrapolated


class DevicePlan(NamedTuple):
    """The bytes that a device holds, by what they are for."""

    weights: int
    vectors: int
    activations: int
    unsharded: int

    @property
    def total(self):
        return sum(self)

    def fits(self, memory):
        """Return whether a device of `memory` bytes is enough.

        A tenth must stay free, for PyTorch itself and for the gaps that an allocator leaves.
        """
        return self.total <= USABLE_SHARE * memory


class Plan:
    """Plans for a model whose base is kept in one way, on any number of devices.

    model_config: a T5Config or LlamaConfig. dtype: that of the weights that are not quantized.
    quantize: None, "int8" or "nf4". config: the flags of a run, because --dropout and --recompute
    change what a step keeps; None: the recipe with --recompute. packed: names of the weights that
    are stored in nf4, and stay in it unless `quantize` is given.
    """

    def __init__(self, model_config, dtype, quantize=None, config=None, packed=frozenset()):
        self.model_config = model_config
        self.dtype = dtype
        self.quantize = quantize
        self.config = config or Config(recompute=True)
        self.base = Base(model_config, dtype, quantize, packed)
        self.planned = {}  # StepShape -> activations, because planning them takes seconds

    def on_device(self, n_shards, shape, offload=False):
        """Return the DevicePlan for a step of a StepShape, whose examples are on this device.

        n_shards: how many devices divide the base; with 1, the device holds all of it. offload:
        whether the rows of the blocks are kept in the memory of the CPU (`on_cpu`).
        """
        weights = self.base.n_whole if offload else self.base.share(n_shards)
        vectors = VECTOR_BYTES * self.base.n_vectors
        unsharded = self.unsharded(n_shards, offload)
        return DevicePlan(weights, vectors, self.activations(shape), unsharded)

    def unsharded(self, n_shards, offload):
        """Return the bytes of what is there for a moment: see the top of this file."""
        dequantized = self.base.largest_dequantized
        if n_shards == 1 and not offload:
            return dequantized
        copied = self.copied_rows(n_shards) if offload else 0
        if n_shards == 1:  # one weight after the other is copied, and no other block is there
            return max(self.base.groups.values()) + max(copied, dequantized)
        sizes = []
        for group, neighbor in self.base.neighbors():  # one runs while the other is gathered
            gathering = WHILE_GATHERED * max(group, neighbor) + min(group, neighbor)
            sizes += [gathering + copied, group + neighbor + dequantized]
        return max(sizes)

    def copied_rows(self, n_shards):
        """Return the bytes of the rows that --offload copies to the device at a time."""
        if n_shards == 1:
            return max(n_rows * row for n_rows, row in self.base.rows)
        return math.ceil(max(self.base.groups.values()) / n_shards)

    def on_cpu(self, n_shards, is_pinned=False):
        """Return the bytes that --offload keeps in the memory of the CPU for one device.

        is_pinned: whether they are copied to a GPU. Then torch pins the rows of each weight, in a
        block of memory whose size it rounds up to a power of two.
        """
        total = 0
        for n_rows, row in self.base.rows:
            n_bytes = math.ceil(n_rows / n_shards) * row
            if is_pinned:
                n_bytes = 1 << (n_bytes - 1).bit_length()
            total += n_bytes
        return total

    def activations(self, shape):
        if shape not in self.planned:
            self.planned[shape] = planned_activations(
                self.model_config, self.dtype, shape, self.config
            )
        return self.planned[shape]

    def largest_batch(self, n_shards, shape, memory, offload=False):
        """Return how many examples fit on one device of `memory` bytes, or 0 if not even 1 does.

        shape: the StepShape of the examples; how many there are does not matter.
        """
        first = shape._replace(n_examples=1)
        plan = self.on_device(n_shards, first, offload)
        if not plan.fits(memory):
            return 0
        growth = self.activations(shape._replace(n_examples=MANY)) - self.activations(first)
        room = USABLE_SHARE * memory - plan.total
        return 1 + int(room * (MANY - 1) / growth)


class Base:
    """The parameters of a model but for the vectors: their bytes, from their shapes.

    rows: (number of rows, bytes of a row) of each parameter in a block; of its codes and its scales
    if it is quantized. groups: the bytes of the parameters that are gathered together. n_whole:
    bytes of what belongs to no block.
    """

    def __init__(self, model_config, dtype, quantize, packed=frozenset()):
        self.n_vectors = 0  # entries of an adapter
        self.n_whole = 0
        self.largest_dequantized = 0
        self.rows = []
        self.groups = {}
        model = model_of_shapes(model_config)
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                self.n_vectors += parameter.numel()
                continue
            n_rows = len(parameter)
            rows = row_bytes(parameter, dtype_of_parameter(name, dtype), None)
            stored_kind = "nf4" if name in packed else None
            kind = quantize or stored_kind
            if kind and is_quantizable(model, name):
                self.largest_dequantized = max(self.largest_dequantized, n_rows * sum(rows))
                rows = row_bytes(parameter, dtype, kind)
            for row in rows:
                self.add(name, n_rows, row)

    def add(self, name, n_rows, row):
        block = BLOCK.match(name)
        if block is None:
            self.n_whole += n_rows * row
            return
        is_cross_kv = CROSS_KV.search(name) is not None
        group = (block.group(), is_cross_kv)
        self.groups[group] = self.groups.get(group, 0) + n_rows * row
        self.rows.append((n_rows, row))

    def neighbors(self):
        """Return the bytes of each two groups that run one after the other, as pairs."""
        sizes = []
        for block in dict.fromkeys(name for name, _ in self.groups):
            # The keys and values of cross-attention come just before the rest of their block.
            for group in ((block, True), (block, False)):
                if group in self.groups:
                    sizes.append(self.groups[group])
        if len(sizes) == 1:
            sizes *= 2  # as if there were another block
        return list(itertools.pairwise(sizes))

    @property
    def n_bytes(self):
        return self.n_whole + sum(self.groups.values())

    def share(self, n_shards):
        """Return the bytes on the first of `n_shards` devices, which has the most rows of each."""
        return self.n_whole + sum(math.ceil(n_rows / n_shards) * row for n_rows, row in self.rows)


@functools.lru_cache(maxsize=1)  # for all kinds of base: a model of 126 layers takes seconds
def model_of_shapes(model_config):
    """Return a model without values, which nobody changes."""
    return build_model(model_config)


def row_bytes(parameter, dtype, quantize):
    """Return the bytes of a row of a parameter, or of its codes and of its scales, as a tuple."""
    n_entries = parameter[0].numel()
    if quantize == "int8":
        return n_entries, 4
    if quantize == "nf4":
        return n_entries // 2, 4 * (n_entries // NF4_BLOCK)
    return (n_entries * dtype.itemsize,)


def recipe_shape(n_examples, length):
    """Return the StepShape of sources of `length` tokens with one short target each."""
    return StepShape(n_examples, length, 1, TARGET_LENGTH)


def fits_one_device(model_config, dtype, config, memory, packed=frozenset()):
    """Return whether a device of `memory` bytes holds a whole model while an example trains.

    config: the flags of the run. packed: see `Plan`. One example of --max-length tokens is planned,
    because a batch that is too large is a matter for --micro-batch-size, and no reason to divide
    the base.
    """
    plan = Plan(model_config, dtype, config.quantize, config, packed)
    return plan.on_device(1, recipe_shape(1, config.max_length)).fits(memory)
