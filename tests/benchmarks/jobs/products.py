"""How many FLOPs the matrix products of a job take, and how long they would take alone.

The rule of Kaplan et al. 2020 (arXiv 2001.08361): a token takes a multiplication and an addition
for each weight that it meets. The products of attention, which have no weights, are left out.
"""

import statistics
from dataclasses import dataclass

import torch

import minia3
from tests.benchmarks.measure import Roof, seconds

TRAINING = 2  # passes: forward, and backward as far as the activations; weights have no gradient


@dataclass(frozen=True)
class Weights:
    """How many weights a token of each kind meets."""

    source: int  # in the encoder of a T5, or in all blocks of a LLaMA
    memory: int  # a source token in the decoder of a T5: its keys and values
    target: int  # a token in the blocks that write
    head: int  # a token whose logits are needed

    def flops(self, n_source, n_target):
        """Return the FLOPs of a forward pass over tokens. All logits of targets are needed."""
        weights_met = n_source * (self.source + self.memory)
        weights_met += n_target * (self.target + self.head)
        return 2 * weights_met


def count_weights(folder):
    """Return the Weights of a model."""
    model = minia3.load_model(folder)
    counts = {"encoder": 0, "memory": 0, "blocks": 0}
    for name, parameter in model.named_parameters():
        is_matrix = ".blocks." in f".{name}" and name.endswith(".weight") and parameter.dim() == 2
        if not is_matrix:
            continue
        if name.startswith("encoder."):
            counts["encoder"] += parameter.numel()
        elif name.endswith((".cross.k.weight", ".cross.v.weight")):
            counts["memory"] += parameter.numel()
        else:
            counts["blocks"] += parameter.numel()
    source = counts["encoder"] or counts["blocks"]
    return Weights(source, counts["memory"], counts["blocks"], model.head_weight.numel())


def roof_flops(setting):
    """Return the FLOP/s of a product of two large matrices on as many threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    roof = Roof(getattr(torch, setting.dtype), 256 if setting.quick else 4096)
    times = [seconds(roof) for _ in range(5)]
    torch.set_num_threads(n_threads)
    return roof.flops / statistics.median(times)
