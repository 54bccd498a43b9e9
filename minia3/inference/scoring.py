"""To be written."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minia3.model.recompute import Recomputed
from minia3.tasks.batches import collate
from minia3.tasks.examples import encode_example
from minia3.tasks.prompts import Rendered

PIECE = (
    1 << 24
)  # logits at once in scoring: 64 MB of float32; more are made by the quarter, which malloc has at hand
TOKENS = (
    1 << 12
)  # of all choices of a batch that are scored at once: more of them, as of 77 intents, take turns
SIDE_BY_SIDE = (
    1 << 9
)  # of these, of one source: a LLaMA reads them as one row, each with a score for every other


def logprobs(model, state, target):
    """(B, L) float32: log p(target_t | source, target_<t). Carries gradients, and moves `state`.

    target (B, L): right-padded with any valid id; the caller masks. (A float64 model's are float64.)
    """
    return masked_logprobs(model, state, target, None)


def masked_logprobs(model, state, target, mask):
    """`logprobs` where mask (B, L) is True, and 0 elsewhere: no logits are made for what nobody asks. None: all."""
    weight_VD = (model.head or model.embed).weight
    wide = torch.promote_types(weight_VD.dtype, torch.float32)

    def part(x_TD, weight_ID, at_T):
        """(2, T): the logsumexp of I ids' logits, and the logit of the target if it is one of them, or else 0."""
        logits_TI = model.logits(x_TD.to(weight_ID.dtype), weight_ID).to(wide)
        near_T = at_T.clamp(0, len(weight_ID) - 1)
        own_T = logits_TI.gather(1, near_T[:, None])[:, 0] * (near_T == at_T)
        return torch.stack((logits_TI.logsumexp(1), own_T))

    x_TD = model.read(torch.cat((state.start, target[:, :-1]), dim=1), state).flatten(0, 1)
    target_T = target.flatten()
    if mask is not None:
        real_T = mask.flatten().nonzero()[:, 0].to(target.device)
        x_TD, target_T = x_TD[real_T], target_T[real_T]
    if len(x_TD) * len(weight_VD) <= PIECE:
        logp_T = -F.cross_entropy(model.logits(x_TD).to(wide), target_T, reduction="none")
    else:  # a part's logits are gone before the next one's are made, and are made again for the backward
        x_TD, n = (
            x_TD.to(wide),
            max(1, PIECE // 4 // len(x_TD)),
        )  # wide: the parts' gradients of x add up in it
        parts = enumerate(weight_VD.split(n))
        parts = [
            Recomputed.apply(part, None, x_TD, weight, target_T - i * n) for i, weight in parts
        ]
        lse_PT, own_PT = torch.stack(parts, dim=1)
        logp_T = own_PT.sum(0) - lse_PT.logsumexp(0)
    logp = logp_T if mask is None else logp_T.new_zeros(target.numel()).index_put((real_T,), logp_T)
    return logp.view(target.shape)


def choice_logprobs(model, batch, adapter=None):
    """(B, C, L): the log-probabilities of every choice's tokens; the source is read once. `batch`: see data.py.

    Masks stay on the CPU, where what they say is known without waiting for a GPU.
    """
    device, (n_rows, n_choices, length) = model.embed.weight.device, batch.target_BCL.shape
    state = model.start(
        batch.source_BM.to(device), None if batch.mask_BM.all() else batch.mask_BM, adapter
    )

    def some(target_BCL, mask_BCL):
        mask = None if mask_BCL.all() else mask_BCL.flatten(0, 1)
        own = state.repeat(target_BCL.shape[1]) if n_choices > 1 else state
        return masked_logprobs(model, own, target_BCL.flatten(0, 1), mask).view(target_BCL.shape)

    n = max(1, min(TOKENS // n_rows, SIDE_BY_SIDE) // length)
    pieces = zip(
        batch.target_BCL.to(device).split(n, dim=1),
        batch.target_mask_BCL.split(n, dim=1),
        strict=True,
    )
    if (
        n_choices > n and torch.is_grad_enabled()
    ):  # the backward keeps the source alone, and scores a piece again
        some = partial(checkpoint, some, use_reentrant=False)
    return torch.cat([some(*piece) for piece in pieces], dim=1)


def choice_scores(logp_BCL, mask_BCL, length_norm=True):
    """(B, C): the mean (or the sum) of each choice's log-probabilities; -inf where a row has no such choice."""
    n_BC = mask_BCL.sum(dim=-1)
    total_BC = logp_BCL.masked_fill(~mask_BCL, 0.0).sum(dim=-1)
    score_BC = total_BC / n_BC.clamp(min=1) if length_norm else total_BC
    return score_BC.masked_fill(n_BC == 0, float("-inf"))


@torch.no_grad()
def score_examples(model, examples, *, adapter=None, length_norm=True, batch_size=16):
    """(N, C) float32: the score of each choice of N examples (see `rank`), read in batches of similar lengths."""
    scores_NC = torch.full((len(examples), max(len(e.targets) for e in examples)), float("-inf"))
    for rows, own in batches_by_length([len(e.source) for e in examples], adapter, batch_size):
        batch = collate([examples[i] for i in rows])
        scores = choice_scores(
            choice_logprobs(model, batch, own).cpu(), batch.target_mask_BCL, length_norm
        )
        scores_NC[rows, : scores.shape[1]] = scores.float()  # a batch may have fewer than C
    return scores_NC


def rank(model, tokenizer, prompts, choices, *, adapter=None, length_norm=True, batch_size=16):
    """(N, C) float32: each choice's mean log-probability per token (`length_norm=False`: the sum); higher is better.

    prompts: N texts. choices: one list for all of them, or a list for each; -inf where a row has fewer than C.
    adapter: None, an int, or (N,) long. T5's choices end in `</s>`, which counts; LLaMA's have no end token.
    Raises ValueError where prompts or a row's choices are empty, or their numbers differ.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of prompts, one or more: found {prompts!r:.80}")
    lists = [choices] * len(prompts) if choices and isinstance(choices[0], str) else choices
    if (
        len(lists) != len(prompts)
        or not all(lists)
        or any(isinstance(texts, str) for texts in (choices, *lists))
    ):
        expected = f"one list of choices, none empty, for all of {len(prompts)} prompts or for each"
        raise ValueError(f"expected {expected}: found {choices!r:.80}")
    examples = [
        encode_example(Rendered(*row, 0), tokenizer, end=False)
        for row in zip(prompts, lists, strict=True)
    ]
    if bad := [
        i for i, example in enumerate(examples) if not (example.source and all(example.targets))
    ]:
        raise ValueError(f"prompts {bad} have no tokens, or a choice of none")
    return score_examples(
        model, examples, adapter=adapter, length_norm=length_norm, batch_size=batch_size
    )


def batches_by_length(lengths, adapter, batch_size):
    """Rows in batches of similar lengths, longest first (memory runs out at once if it does), with their adapters."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    adapter = torch.as_tensor(0 if adapter is None else adapter)
    if adapter.dim() and len(adapter) != len(lengths):
        raise ValueError(
            f"expected an adapter for each of {len(lengths)} rows, found {len(adapter)}"
        )
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(by_length), batch_size):
        rows = by_length[first : first + batch_size]
        yield rows, adapter[rows] if adapter.dim() else adapter
