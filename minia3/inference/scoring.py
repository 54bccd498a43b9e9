"""To be written."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minia3.model.recompute import recompute
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
    """Return `logprobs` if mask (B, L) is True, and 0 if not. mask=None: every token is scored.

    Tokens that nobody asks for get no logits. If there are many logits, they are made for some
    tokens at a time, and made again for the backward pass, so that they never all exist at once.
    """
    read_BL = torch.cat((state.start, target[:, :-1]), dim=1)
    x_TD = model.run_blocks(read_BL, state).flatten(0, 1)
    target_T = target.flatten()
    if mask is not None:
        real_T = mask.flatten().nonzero()[:, 0].to(target.device)
        x_TD = x_TD[real_T]
        target_T = target_T[real_T]

    n_vocab = len(model.head_weight)
    if len(x_TD) * n_vocab <= PIECE:
        logp_T = token_logprobs(model, x_TD, target_T)
    else:
        n_tokens = max(1, PIECE // 4 // n_vocab)
        score = partial(token_logprobs, model)
        parts = []
        for x, targets in zip(x_TD.split(n_tokens), target_T.split(n_tokens), strict=True):
            parts.append(recompute(score, x, targets, parameters=[model.head_weight]))
        logp_T = torch.cat(parts)

    if mask is None:
        return logp_T.view(target.shape)
    logp_N = logp_T.new_zeros(target.numel()).index_put((real_T,), logp_T)
    return logp_N.view(target.shape)


def token_logprobs(model, x_TD, target_T):
    """Return (T,): the log-probability of each target, in float32 at least."""
    logits_TV = model.logits(x_TD)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return -F.cross_entropy(logits_TV.to(wide), target_T, reduction="none")


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
