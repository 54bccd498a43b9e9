"""T-Few's three losses (Liu et al. 2022, arXiv 2205.05638, section 3.2), added with equal weights.

    lm    L_LM = - mean over tokens t of the correct choice of log p(y_t | x, y_<t)
    ul    L_UL = - mean over tokens t of the wrong choices of log(1 - p(y_t | x, y_<t))     (eq. 1)
    ln    L_LN = - mean over rows of log softmax(s) at the correct choice, where s_c is     (eq. 2)
                   the mean over tokens t of choice c of log p(y_t | x, y_<t)

lm is the likelihood, ul the unlikelihood, ln the length-normalized likelihood. A mean is over the
whole batch of an adapter, as in T-Few's code, so long answers weigh more. The loss functions return
one sum per example, because the examples of a batch may belong to several adapters, and
`losses_of_examples` divides by the number of terms.

Shapes: B rows, C choices, L tokens of a choice. Padding, and choices that a row does not have, are
False in the mask.
"""

import torch
import torch.nn.functional as F

from minia3.inference.scoring import choice_scores
from minia3.model.to_device import to_device

# T-Few's code adds this inside the logarithm, so that a wrong choice of probability 1 has a finite
# loss. The paper does not mention it.
UNLIKELY_EPS = 1e-2


def correct_tokens(mask_BCL, label_B):
    """Return (B, C, L) bool: which tokens belong to the correct choice."""
    choice_C = torch.arange(mask_BCL.shape[1], device=label_B.device)
    is_correct_BC = choice_C == label_B[:, None]
    return mask_BCL & is_correct_BC[:, :, None]


def lm_loss(logp_BCL, mask_BCL, label_B):
    """Return (B,): the sum of -log p over the tokens of the correct choice."""
    is_correct_BCL = correct_tokens(mask_BCL, label_B)
    return -logp_BCL.masked_fill(~is_correct_BCL, 0.0).sum(dim=(1, 2))


def unlikelihood_loss(logp_BCL, mask_BCL, label_B):
    """Return (B,): the sum of -log(1 - p + eps) over the tokens of the wrong choices."""
    # T-Few's code also sums over padding and over the correct choice, as log p = -100. Each adds
    # the constant -log(1 + eps), which has no gradient. We leave them out, so our value is larger.
    is_wrong_BCL = mask_BCL & ~correct_tokens(mask_BCL, label_B)
    unlikely_BCL = torch.log(1 - logp_BCL.exp() + UNLIKELY_EPS)
    return -unlikely_BCL.masked_fill(~is_wrong_BCL, 0.0).sum(dim=(1, 2))


def length_normalized_loss(logp_BCL, mask_BCL, label_B):
    """Return (B,): the cross entropy of the choices, whose scores are means of log p."""
    return F.cross_entropy(choice_scores(logp_BCL, mask_BCL), label_B, reduction="none")


LOSSES = {"lm": lm_loss, "ul": unlikelihood_loss, "ln": length_normalized_loss}


def terms_of_losses(n_tokens, n_correct, n_rows):
    """Return a dict from each loss to the number of terms of its mean, or 1 if there are none.

    n_tokens: of all choices. n_correct: those of the correct choices.
    """
    n_terms = {"lm": n_correct, "ul": n_tokens - n_correct, "ln": n_rows}
    # Rows with a target have no wrong choices: 0 / 1 instead of 0 / 0.
    return {name: max(n, 1) for name, n in n_terms.items()}


def count_terms(mask_BCL, label_B):
    """Return the `terms_of_losses` of a batch."""
    n_correct = correct_tokens(mask_BCL, label_B).sum()
    return terms_of_losses(int(mask_BCL.sum()), int(n_correct), len(label_B))


def count_terms_of(examples, names=("lm", "ul", "ln")):
    """Return what `count_terms` would return for examples (tasks/examples.py), without tensors."""
    n_tokens = 0
    n_correct = 0
    for example in examples:
        lengths = [len(target) for target in example.targets]
        if example.is_scored is not None:
            lengths = [sum(example.is_scored)]
        n_tokens += sum(lengths)
        n_correct += lengths[example.label]
    n_terms = terms_of_losses(n_tokens, n_correct, len(examples))
    return {name: n for name, n in n_terms.items() if name in names}


def total_loss(logp_BCL, mask_BCL, label_B, names=("lm", "ul", "ln"), n_terms=None):
    """Return the sum of the losses in `names` for one adapter: a scalar that carries gradients.

    logp_BCL: see `choice_logprobs`. n_terms: if these rows are part of a larger batch, the
    `count_terms` of that batch; then the losses of the parts add up to the loss of the batch.
    Raise ValueError unless `names` are those of losses.
    """
    # A single text is not a list of names: its parts would be letters.
    if not names or any(name not in LOSSES for name in names):
        raise ValueError(f"names is {names!r:.80}, expected a list of some of {', '.join(LOSSES)}")
    if n_terms is None:
        n_terms = count_terms(mask_BCL, label_B)
    mask_BCL = to_device(mask_BCL, logp_BCL.device)
    label_B = to_device(label_B, logp_BCL.device)
    n_terms = {name: n_terms[name] for name in names}
    return losses_of_examples(logp_BCL, mask_BCL, label_B, n_terms).sum()


def losses_of_examples(logp_BCL, mask_BCL, label_B, n_terms):
    """Return (B,): what each example adds to the `total_loss` of its adapter.

    n_terms: a dict from the name of each loss to the `count_terms` of the adapter's batch: (B,), or
    an int if all examples have the same adapter.
    """
    return sum(LOSSES[name](logp_BCL, mask_BCL, label_B) / n for name, n in n_terms.items())
