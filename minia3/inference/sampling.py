"""Draw random tokens with the probabilities that a model gives them.

Shapes: B batch, V vocabulary.
"""

from math import inf

import torch

from minia3.model.to_device import to_device

# Kinds of devices that have no float64: Apple's GPUs, and some of Intel's, such as the Arc A770
WITHOUT_FLOAT64 = ("mps", "xpu")


class Sampler:
    """Draws tokens. Each row has its own random numbers, so other rows do not influence it."""

    def __init__(self, streams, options):
        self.streams = streams
        self.options = options

    def draw(self, logits_BV, rows):
        """Return the next tokens (B, 1) of these rows."""
        uniform = [[self.streams[row].random_sample()] for row in rows]
        device = logits_BV.device
        if device.type in WITHOUT_FLOAT64:
            logits_BV = logits_BV.cpu()
        uniform_B1 = to_device(torch.tensor(uniform, dtype=torch.float64), logits_BV.device)
        given = self.options
        tokens_B1 = draw_tokens(logits_BV, uniform_B1, given.temperature, given.top_k, given.top_p)
        return to_device(tokens_B1, device)


def draw_tokens(logits_BV, uniform_B1, temperature, top_k=0, top_p=1.0):
    """Return the tokens (B, 1) that the random numbers uniform_B1, each from [0, 1), select.

    The probabilities are softmax(logits / temperature) of the `top_k` likeliest tokens (0: of all
    tokens). If top_p is below 1, only the likeliest of these tokens remain: the fewest whose sum
    reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751).

    Laid end to end, the probabilities divide the interval from 0 to 1 into a part for each token.
    The random number lies in one part, and selects its token. The parts are in the order of ids,
    not of size, because logits differ by rounding from batch to batch: in the order of size, two
    tokens that are almost equally likely could change places, and the number would select the
    other one. In the order of ids, the bounds move by no more than the rounding.
    """
    if 0 < top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -inf)
    # The largest becomes 0, so that no division by a small temperature gives inf.
    logits_BV = logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)
    p_BV = (logits_BV / temperature).softmax(dim=-1)
    if top_p < 1:
        p_BV = keep_top_p(p_BV, top_p)
    end_BV = p_BV.cumsum(dim=-1)  # where each token's interval ends
    total_B1 = end_BV[:, -1:]  # 1 except for rounding; less after keep_top_p
    tokens_B1 = torch.searchsorted(end_BV, uniform_B1 * total_B1, right=True)
    # If a logit is NaN, no interval is found. Any token will do: see `read_tokens`.
    return tokens_B1.clamp(max=end_BV.shape[1] - 1)


def keep_top_p(p_BV, top_p):
    """Keep the largest probabilities, the fewest whose sum reaches top_p, and set others to 0."""
    sorted_BV, order_BV = p_BV.sort(descending=True)
    sum_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = sorted_BV.masked_fill(sum_before_BV >= top_p, 0.0)
    return p_BV.scatter(1, order_BV, kept_BV)
