"""Chapter 7, part four: scoring, rank classification and decoding, over `start` and `step` alone, for both models.

Shapes: B batch, M source length, L target length, V vocabulary, C choices, N prompts.
"""

import torch

from minia3.data import collate, encode_example
from minia3.losses import choice_scores
from minia3.prompts import Rendered


def logprobs(model, state, target):
    """(B, L) float32: log p(target_t | source, target_<t). Carries gradients, and moves `state`.

    target (B, L): right-padded with any valid id; the caller masks. (A float64 model's are float64.)
    """
    tokens_BL = torch.cat((state.start, target[:, :-1]), dim=1)
    logits_BLV = model.step(tokens_BL, state)
    logits_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    return logits_BLV.log_softmax(dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def choice_logprobs(model, batch, adapter=None):
    """(B, C, L): the log-probabilities of every choice's tokens; the source is read once. `batch`: see data.py."""
    mask_BM = None if batch.mask_BM.all() else batch.mask_BM
    state = model.start(batch.source_BM, mask_BM, adapter)
    n_choices = batch.target_BCL.shape[1]
    logp = logprobs(model, state.repeat(n_choices) if n_choices > 1 else state, batch.target_BCL.flatten(0, 1))
    return logp.view(batch.target_BCL.shape)


@torch.no_grad()
def score(model, examples, pad_id, *, adapter=None, length_norm=True, batch_size=16):
    """(N, C) float32: the score of each choice of N examples (see `rank`), read in batches of similar lengths."""
    scores_NC = torch.full((len(examples), max(len(e.targets) for e in examples)), float("-inf"))
    for rows, adapter_B in _batches([len(e.source) for e in examples], adapter, batch_size):
        batch = collate([examples[i] for i in rows], pad_id)
        batch = batch._make(x.to(model.embed.weight.device) for x in batch)
        scores = choice_scores(choice_logprobs(model, batch, adapter_B), batch.target_mask_BCL, length_norm)
        scores_NC[rows, : scores.shape[1]] = scores.float().cpu()  # a batch may have fewer than C
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
    if len(lists) != len(prompts) or not all(lists) or any(isinstance(texts, str) for texts in (choices, *lists)):
        raise ValueError(
            f"expected one list of choices for all of the {len(prompts)} prompts, or one for each, and none empty: "
            f"found {choices!r:.80}"
        )
    rows = [Rendered(prompt, list(texts), 0) for prompt, texts in zip(prompts, lists, strict=True)]
    examples = [encode_example(row, tokenizer, end=False) for row in rows]
    return score(model, examples, tokenizer.pad_id, adapter=adapter, length_norm=length_norm, batch_size=batch_size)


@torch.no_grad()
def generate(model, tokenizer, prompts, *, adapter=None, max_new_tokens=64, temperature=0.0, batch_size=16):
    """A list of N texts which go on from N prompts, each to its end token or for `max_new_tokens`.

    temperature: 0 takes the most likely token; otherwise one is drawn from softmax(logits / temperature), by torch's
    own generator. adapter: None, an int, or (N,) long. Raises ValueError for a prompt without tokens, and for a
    temperature or max_new_tokens that is out of range.
    """
    if temperature < 0 or max_new_tokens < 1 or isinstance(prompts, str):
        found = f"found {prompts!r:.40}, {temperature}, {max_new_tokens}"
        raise ValueError(f"expected a list of prompts, temperature >= 0 and max_new_tokens >= 1: {found}")
    sources, texts = [tokenizer.encode(prompt) for prompt in prompts], [""] * len(prompts)
    if empty := [i for i, source in enumerate(sources) if not source]:
        raise ValueError(f"prompts {empty} have no tokens")
    device = model.embed.weight.device
    ends = torch.tensor(model.config.eos_ids, device=device)
    for rows, adapter_B in _batches([len(source) for source in sources], adapter, batch_size):
        length = max(len(sources[i]) for i in rows)
        source_BM = torch.tensor([sources[i] + [tokenizer.pad_id] * (length - len(sources[i])) for i in rows])
        mask_BM = torch.arange(length) < torch.tensor([[len(sources[i])] for i in rows])
        state = model.start(source_BM.to(device), None if mask_BM.all() else mask_BM.to(device), adapter_B)
        tokens_B1, written = state.start, []
        done_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
        while len(written) < max_new_tokens and not done_B.all():
            logits_BV = model.step(tokens_B1, state)[:, -1].float()
            if temperature:
                tokens_B1 = torch.multinomial((logits_BV / temperature).softmax(dim=-1), 1)
            else:
                tokens_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            done_B |= torch.isin(tokens_B1[:, 0], ends)
            written.append(tokens_B1[:, 0].masked_fill(done_B, -1))
        for i, ids in zip(rows, torch.stack(written, dim=1).tolist(), strict=True):
            texts[i] = tokenizer.decode([token for token in ids if token >= 0])
    return texts


def _batches(lengths, adapter, batch_size):
    """Rows in batches of similar lengths, longest first (memory runs out at once if it does), with their adapters."""
    if adapter is not None and not isinstance(adapter, int):
        adapter = torch.as_tensor(adapter)
        if adapter.dim() and len(adapter) != len(lengths):
            raise ValueError(f"expected an adapter for each of {len(lengths)} rows, found {len(adapter)}")
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(by_length), batch_size):
        rows = by_length[first : first + batch_size]
        yield rows, adapter[rows] if isinstance(adapter, torch.Tensor) and adapter.dim() else adapter
