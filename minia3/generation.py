"""Chapter 7, part four: scoring, rank classification and decoding, over `start` and `step` (scoring: its halves).

Shapes: B batch, M source length, L target length, D model, V vocabulary, C choices, N prompts, R rows selected,
T real tokens of a batch's targets, P parts of the vocabulary of I ids each.
"""

import secrets
from functools import partial
from itertools import chain
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minia3.backward import Recomputed
from minia3.data import collate, encode_example, pad
from minia3.losses import choice_scores
from minia3.prompts import Rendered

PIECE = 1 << 24  # logits at once in scoring: 64 MB of float32; more are made by the quarter, which malloc has at hand
TOKENS = 1 << 12  # of all choices of a batch that are scored at once: more of them, as of 77 intents, take turns
SIDE_BY_SIDE = 1 << 9  # of these, of one source: a LLaMA reads them as one row, each with a score for every other


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
        x_TD, n = x_TD.to(wide), max(1, PIECE // 4 // len(x_TD))  # wide: the parts' gradients of x add up in it
        parts = enumerate(weight_VD.split(n))
        parts = [Recomputed.apply(part, None, x_TD, weight, target_T - i * n) for i, weight in parts]
        lse_PT, own_PT = torch.stack(parts, dim=1)
        logp_T = own_PT.sum(0) - lse_PT.logsumexp(0)
    logp = logp_T if mask is None else logp_T.new_zeros(target.numel()).index_put((real_T,), logp_T)
    return logp.view(target.shape)


def choice_logprobs(model, batch, adapter=None):
    """(B, C, L): the log-probabilities of every choice's tokens; the source is read once. `batch`: see data.py.

    Masks stay on the CPU, where what they say is known without waiting for a GPU.
    """
    device, (n_rows, n_choices, length) = model.embed.weight.device, batch.target_BCL.shape
    state = model.start(batch.source_BM.to(device), None if batch.mask_BM.all() else batch.mask_BM, adapter)

    def some(target_BCL, mask_BCL):
        mask = None if mask_BCL.all() else mask_BCL.flatten(0, 1)
        own = state.repeat(target_BCL.shape[1]) if n_choices > 1 else state
        return masked_logprobs(model, own, target_BCL.flatten(0, 1), mask).view(target_BCL.shape)

    n = max(1, min(TOKENS // n_rows, SIDE_BY_SIDE) // length)
    pieces = zip(batch.target_BCL.to(device).split(n, dim=1), batch.target_mask_BCL.split(n, dim=1), strict=True)
    if n_choices > n and torch.is_grad_enabled():  # the backward keeps the source alone, and scores a piece again
        some = partial(checkpoint, some, use_reentrant=False)
    return torch.cat([some(*piece) for piece in pieces], dim=1)


@torch.no_grad()
def score(model, examples, *, adapter=None, length_norm=True, batch_size=16):
    """(N, C) float32: the score of each choice of N examples (see `rank`), read in batches of similar lengths."""
    scores_NC = torch.full((len(examples), max(len(e.targets) for e in examples)), float("-inf"))
    for rows, own in _batches([len(e.source) for e in examples], adapter, batch_size):
        batch = collate([examples[i] for i in rows])
        scores = choice_scores(choice_logprobs(model, batch, own).cpu(), batch.target_mask_BCL, length_norm)
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
    if len(lists) != len(prompts) or not all(lists) or any(isinstance(texts, str) for texts in (choices, *lists)):
        expected = f"one list of choices, none empty, for all of {len(prompts)} prompts or for each"
        raise ValueError(f"expected {expected}: found {choices!r:.80}")
    examples = [encode_example(Rendered(*row, 0), tokenizer, end=False) for row in zip(prompts, lists, strict=True)]
    if bad := [i for i, example in enumerate(examples) if not (example.source and all(example.targets))]:
        raise ValueError(f"prompts {bad} have no tokens, or a choice of none")
    return score(model, examples, adapter=adapter, length_norm=length_norm, batch_size=batch_size)


def generate(model, tokenizer, prompts, *, adapter=None, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
             beams=1, length_penalty=1.0, samples=1, stop=(), seed=None, batch_size=16):  # fmt: skip
    """N * samples texts that go on from N prompts: all samples of the first, then of the second.

    prompts: N texts or lists of ids. adapter: None, an int, or (N,) long. A text ends before an end token, before the
    first of `stop` (a text or several), or after `max_new_tokens`. temperature, top_k, top_p: see `draw`; 0 takes the
    likeliest token. beams, length_penalty: more than one are a `beam_search`, and the samples are its best.
    seed: what is drawn depends on it (None: a new one), on the prompt's index and the sample's, and not on the rest of
    the batch, of `batch_size` rows (or one prompt's samples or beams, where these are more).
    Raises ValueError for a value out of its range, and for a prompt with no tokens or with ids that are none.
    """
    how, search = (temperature, top_k, top_p), (beams, length_penalty)
    texts = [""] * (len(prompts) * samples)
    pieces = _pieces(model, tokenizer, prompts, adapter, max_new_tokens, how, stop, seed, search, samples, batch_size)
    for n, piece in pieces:
        texts[n] += piece
    return texts


def stream(model, tokenizer, prompt, *, adapter=None, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
           stop=(), seed=None):  # fmt: skip
    """An iterator of the pieces of the text that goes on from one prompt, as they come; joined, they are `generate`'s.

    What may be the beginning of a stop text waits, as do the parts of a character that is split over tokens.
    """
    pieces = _pieces(model, tokenizer, [prompt], adapter, max_new_tokens, (temperature, top_k, top_p), stop, seed)
    return (piece for _, piece in pieces if piece)


def _pieces(model, tokenizer, prompts, adapter, n_tokens, how, stop, seed, search=(1, 1.0), samples=1, batch_size=1):
    """An iterator of (index of a text, a piece of it)."""
    (temperature, top_k, top_p), (beams, length_penalty) = how, search
    counts = (n_tokens, beams, samples, batch_size)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    no_list = isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts)
    for wrong, found, expected in (
        (no_list, f"prompts {prompts!r:.40}", "a list of texts, or of lists of ids"),
        (min(counts) < 1, f"max_new_tokens, beams, samples, batch_size {counts}", "1 or more"),
        (not 0 <= temperature < inf or top_k < 0, f"temperature, top_k {temperature, top_k}", "0 or more, and finite"),
        (not 0 < top_p <= 1, f"top_p {top_p}", "above 0, and at most 1"),
        (not abs(length_penalty) <= 10, f"length_penalty {length_penalty}", "-10 to 10"),
        (seed is not None and (type(seed) is not int or not 0 <= seed < 2**32), f"seed {seed!r}", "0 to 2**32 - 1"),
        ("" in stops, f"stop {stop!r:.40}", "texts that are not empty"),
        (beams > 1 and temperature, f"beams {beams} at temperature {temperature}", "temperature 0: none are drawn"),
        (samples > beams and not temperature, f"samples {samples}", "a temperature, or as many beams"),
    ):
        if wrong:
            raise ValueError(f"{found}: expected {expected}")
    n_ids, device = model.embed.num_embeddings, model.embed.weight.device
    sources = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if bad := [i for i, source in enumerate(sources) if not source or min(source) < 0 or max(source) >= n_ids]:
        raise ValueError(f"prompts {bad} have no tokens, or ids that are not 0 to {n_ids - 1}")
    seed = secrets.randbits(32) if seed is None else seed

    def run():
        for read, own in _batches(list(map(len, sources)), adapter, max(1, batch_size // max(beams, samples))):
            source_BM, mask_BM = pad([sources[i] for i in read])
            with torch.no_grad():
                state = model.start(source_BM.to(device), None if mask_BM.all() else mask_BM, own)
            done, which = set(), [i * samples + sample for i in read for sample in range(samples)]
            if beams > 1:
                best = beam_search(model, state, beams, n_tokens, length_penalty)
                best = enumerate(ids for texts in best for ids in texts[:samples])
                written = ((row, token) for row, ids in best for token in ids)
            else:
                streams = [np.random.RandomState([seed, *divmod(n, samples)]) for n in which]
                written = tokens(model, state.repeat(samples), n_tokens, done, streams, *how)
            texts = [Text(tokenizer.decode, stops) for _ in which]
            for row, token in chain(written, enumerate([None] * len(which))):
                yield which[row], texts[row].add(token)
                if texts[row].done:
                    done.add(row)

    return run()


class Text:
    """One row's text in pieces that are final: parts of a character, or of a stop text, wait for what follows."""

    def __init__(self, decode, stops):
        self.decode, self.stops, self.ids, self.length, self.done = decode, stops, [], 0, False

    def add(self, token):
        """The piece that `token` makes final, often an empty one; None: nothing follows."""
        self.ids += [] if token is None else [token]
        text = self.decode(self.ids)  # all of it: what a token is depends on those before, and a step takes far longer
        if self.done or (token is not None and text.endswith("\ufffd")):
            return ""
        for at in range(self.length, len(text) + 1):
            self.done = text.startswith(self.stops, at)
            if self.done or (token is not None and any(stop.startswith(text[at:]) for stop in self.stops)):
                break
        piece, self.length = text[self.length : at], at
        return piece


@torch.no_grad()
def tokens(model, state, max_new_tokens, done, streams=None, temperature=0.0, top_k=0, top_p=1.0):
    """Yield (row, token), step by step: the most likely token, or one drawn by a number of the row's stream.

    A row that comes to an end token, which is not yielded, is put into the set `done`, as the caller may do with any
    row: from the next step on it is not in the batch and costs nothing.
    """
    rows, tokens_B1 = list(range(len(state.start))), state.start
    for _ in range(max_new_tokens):
        kept = [i for i, row in enumerate(rows) if row not in done]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, kept_R = [rows[i] for i in kept], torch.tensor(kept, device=tokens_B1.device)
            state, tokens_B1 = state.select(kept_R), tokens_B1[kept_R]
        logits_BV = model.step(tokens_B1, state)[:, -1].float()
        if temperature:
            uniform_B1 = torch.tensor([[streams[row].random_sample()] for row in rows], dtype=torch.float64)
            tokens_B1 = draw(logits_BV, uniform_B1.to(logits_BV.device), temperature, top_k, top_p)
        else:
            tokens_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        for row, token in zip(rows, tokens_B1[:, 0].tolist(), strict=True):
            if token in model.config.eos_ids:
                done.add(row)
            else:
                yield row, token


def draw(logits_BV, uniform_B1, temperature, top_k=0, top_p=1.0):
    """(B, 1): the token at which the sum of the probabilities, in the order of ids, passes a number from [0, 1).

    The probabilities are softmax(logits / temperature) of the `top_k` most likely tokens (0: of all), and of these of
    the fewest whose sum reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751). In the order of ids, rounding, which
    differs from batch to batch, moves each bound by little.
    """
    if 0 < top_k < logits_BV.shape[1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -inf)
    logits_BV = logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)  # at most 0: no temperature makes it inf
    p_BV = (logits_BV / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(descending=True)
        p_BV = p_BV.scatter(1, order_BV, sorted_BV.masked_fill(sorted_BV.cumsum(-1) - sorted_BV >= top_p, 0.0))
    sum_BV = p_BV.cumsum(dim=-1)
    return torch.searchsorted(sum_BV, uniform_B1 * sum_BV[:, -1:], right=True)


@torch.no_grad()
def beam_search(model, state, beams, max_new_tokens, length_penalty=1.0):
    """For each row of `state` its `beams` best texts, best first: lists of ids without the end token.

    A text's score is the sum of log p / length ** length_penalty, the end token counted. As transformers'
    `generate(num_beams=beams, early_stopping=False)`: of all ways to go on by one token, the `beams` likeliest may end,
    and the `beams` likeliest that do not end go on. A row is done when `beams` have ended, none of them with a lower
    score than the best of those that go on has so far.
    """
    ends, rows, ended = model.config.eos_ids, range(len(state.start)), [[] for _ in state.start]
    state, written = state.repeat(beams), [[]] * len(rows) * beams
    tokens_B1, device = state.start, state.start.device
    sum_B1 = torch.tensor([[0.0], *[[-inf]] * (beams - 1)] * len(rows), device=device)  # at first all are the same
    for length in range(1, max_new_tokens + 1):
        logp_BV = model.step(tokens_B1, state)[:, -1].float().log_softmax(dim=-1)
        n_vocab, penalty, last, kept, going = logp_BV.shape[1], length**length_penalty, length == max_new_tokens, [], []
        best = (sum_B1 + logp_BV).view(len(rows), -1).topk(min(1 + len(ends), n_vocab) * beams)
        for n, (row, sums, ways) in enumerate(zip(rows, best.values.tolist(), best.indices.tolist(), strict=True)):
            ways = [(total, n * beams + i // n_vocab, i % n_vocab) for total, i in zip(sums, ways, strict=True)]
            end = [way for way in ways[:beams] if last or way[2] in ends]
            ended[row] += [(total / penalty, [*written[beam], token]) for total, beam, token in end]
            ended[row] = sorted(ended[row], key=lambda text: -text[0])[:beams]
            ways = [way for way in ways if not last and way[2] not in ends][:beams]
            if ways and (len(ended[row]) < beams or ways[0][0] / penalty > ended[row][-1][0]):
                kept.append(row)
                going += ways
        if not going:
            break
        rows, written = kept, [[*written[beam], token] for _, beam, token in going]
        sum_B1, order_B1, tokens_B1 = (torch.tensor(x, device=device)[:, None] for x in zip(*going, strict=True))
        state = state.select(order_B1[:, 0])
    return [[[token for token in ids if token not in ends] for _, ids in texts] for texts in ended]


def _batches(lengths, adapter, batch_size):
    """Rows in batches of similar lengths, longest first (memory runs out at once if it does), with their adapters."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    adapter = torch.as_tensor(0 if adapter is None else adapter)
    if adapter.dim() and len(adapter) != len(lengths):
        raise ValueError(f"expected an adapter for each of {len(lengths)} rows, found {len(adapter)}")
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(by_length), batch_size):
        rows = by_length[first : first + batch_size]
        yield rows, adapter[rows] if adapter.dim() else adapter
