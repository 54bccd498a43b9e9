"""T-Few's three losses (Liu et al. 2022, arXiv 2205.05638, section 3.3), added with equal weights.

    likelihood         L_LM = - mean over tokens t of the right choice of log p(y_t | x, y_<t)
    unlikelihood       L_UL = - mean over tokens t of the wrong choices of log(1 - p(y_t | x, y_<t))
    length-normalized  L_LN = - mean over rows of the log softmax, over the choices and taken at the
                                right one, of (1/T) sum_t log p(y_t | x, y_<t)

A mean is over the whole batch of an adapter, as in T-Few's code: long answers weigh more.

Shapes: B rows, C choices, L tokens of a choice. Padding, and choices that a row does not have, are
False in the mask.
"""

import torch
import torch.nn.functional as F

from minia3.inference.scoring import choice_scores
from minia3.model.to_device import to_device

# T-Few's code adds this inside the logarithm, so that a certain wrong choice has a finite loss. The
# paper does not mention it.
UNLIKELY_EPS = 1e-2


def right_tokens(mask_BCL, label_B):
    """Return (B, C, L) bool: which tokens belong to the right choice."""
    choice_C = torch.arange(mask_BCL.shape[1], device=label_B.device)
    is_right_BC = choice_C == label_B[:, None]
    return mask_BCL & is_right_BC[:, :, None]


def lm_loss(logp_BCL, mask_BCL, label_B):
    is_right_BCL = right_tokens(mask_BCL, label_B)
    return -logp_BCL.masked_fill(~is_right_BCL, 0.0).sum()


def unlikelihood_loss(logp_BCL, mask_BCL, label_B):
    # T-Few's code also sums over padding and over the right choice, as log p = -100. Each adds the
    # constant -log(1 + eps), which has no gradient. We leave them out, so our value is larger.
    is_wrong_BCL = mask_BCL & ~right_tokens(mask_BCL, label_B)
    unlikely_BCL = torch.log(1 - logp_BCL.exp() + UNLIKELY_EPS)
    return -unlikely_BCL.masked_fill(~is_wrong_BCL, 0.0).sum()


def length_normalised_loss(logp_BCL, mask_BCL, label_B):
    return F.cross_entropy(choice_scores(logp_BCL, mask_BCL), label_B, reduction="sum")


LOSSES = {"lm": lm_loss, "ul": unlikelihood_loss, "ln": length_normalised_loss}  # sums, not means


def count_terms(mask_BCL, label_B):
    """Return how many terms each mean has: tokens of right choices, of wrong choices, and rows."""
    n_right = int(right_tokens(mask_BCL, label_B).sum())
    return {"lm": n_right, "ul": int(mask_BCL.sum()) - n_right, "ln": len(label_B)}


def total_loss(logp_BCL, mask_BCL, label_B, names=("lm", "ul", "ln"), n_terms=None):
    """Return the sum of the losses in `names`: a scalar that carries gradients.

    logp_BCL: see `choice_logprobs`. n_terms: if these rows are part of a larger batch, the
    `count_terms` of that batch; then the losses of the parts add up to the loss of the batch.
    """
    if n_terms is None:
        n_terms = count_terms(mask_BCL, label_B)
    mask_BCL = to_device(mask_BCL, logp_BCL.device)
    label_B = to_device(label_B, logp_BCL.device)
    loss = 0
    for name in names:
        # Rows with a target have no wrong choices: 0 / 1 instead of 0 / 0.
        loss = loss + LOSSES[name](logp_BCL, mask_BCL, label_B) / max(n_terms[name], 1)
    return loss
