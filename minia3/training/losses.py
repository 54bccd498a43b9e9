"""To be written."""

import torch
import torch.nn.functional as F

from minia3.inference.scoring import choice_scores

UNLIKELY_EPS = 1e-2  # T-Few's code adds it inside of the logarithm; the paper does not have it


def right_tokens(mask_BCL, label_B):
    """(B, C, L) bool: the tokens of the right choice."""
    return (
        mask_BCL
        & (torch.arange(mask_BCL.shape[1], device=label_B.device) == label_B[:, None])[:, :, None]
    )


def lm_loss(logp_BCL, mask_BCL, label_B):
    return -logp_BCL.masked_fill(~right_tokens(mask_BCL, label_B), 0.0).sum()


def unlikelihood_loss(logp_BCL, mask_BCL, label_B):
    # T-Few's code has padding and the right choice in this sum too, each as log p = -100: a constant, no gradient.
    wrong_BCL = mask_BCL & ~right_tokens(mask_BCL, label_B)
    return -torch.log(1 - logp_BCL.exp() + UNLIKELY_EPS).masked_fill(~wrong_BCL, 0.0).sum()


def length_normalised_loss(logp_BCL, mask_BCL, label_B):
    return F.cross_entropy(choice_scores(logp_BCL, mask_BCL), label_B, reduction="sum")


LOSSES = {"lm": lm_loss, "ul": unlikelihood_loss, "ln": length_normalised_loss}


def counts(mask_BCL, label_B):
    """What each loss is a mean over: right choices' tokens and wrong ones' (the batch's, as T-Few has it), and rows."""
    n_right = int(right_tokens(mask_BCL, label_B).sum())
    return {"lm": n_right, "ul": int(mask_BCL.sum()) - n_right, "ln": len(label_B)}


def total_loss(logp_BCL, mask_BCL, label_B, which=("lm", "ul", "ln"), n=None):
    """The sum of the losses named in `which` (all weights are one, as in T-Few): a scalar with gradients.

    n: the `counts` of the batch that these rows are a part of; the parts' losses then add up to the whole's.
    """
    n = n or counts(mask_BCL, label_B)
    mask_BCL, label_B = mask_BCL.to(logp_BCL.device), label_B.to(logp_BCL.device)
    return sum(LOSSES[name](logp_BCL, mask_BCL, label_B) / max(n[name], 1) for name in which)
