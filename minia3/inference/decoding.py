"""To be written."""

import secrets
from itertools import chain
from math import inf

import numpy as np
import torch

from minia3.inference.beam_search import beam_search
from minia3.inference.scoring import batches_by_length
from minia3.tasks.batches import pad


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
    pieces = generate_pieces(
        model,
        tokenizer,
        prompts,
        adapter,
        max_new_tokens,
        how,
        stop,
        seed,
        search,
        samples,
        batch_size,
    )
    for n, piece in pieces:
        texts[n] += piece
    return texts


def stream(model, tokenizer, prompt, *, adapter=None, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0,
           stop=(), seed=None):  # fmt: skip
    """An iterator of the pieces of the text that goes on from one prompt, as they come; joined, they are `generate`'s.

    What may be the beginning of a stop text waits, as do the parts of a character that is split over tokens.
    """
    pieces = generate_pieces(
        model, tokenizer, [prompt], adapter, max_new_tokens, (temperature, top_k, top_p), stop, seed
    )
    return (piece for _, piece in pieces if piece)


def generate_pieces(
    model,
    tokenizer,
    prompts,
    adapter,
    n_tokens,
    how,
    stop,
    seed,
    search=(1, 1.0),
    samples=1,
    batch_size=1,
):
    """An iterator of (index of a text, a piece of it)."""
    (temperature, top_k, top_p), (beams, length_penalty) = how, search
    counts = (n_tokens, beams, samples, batch_size)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    no_list = isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts)
    for wrong, found, expected in (
        (no_list, f"prompts {prompts!r:.40}", "a list of texts, or of lists of ids"),
        (min(counts) < 1, f"max_new_tokens, beams, samples, batch_size {counts}", "1 or more"),
        (
            not 0 <= temperature < inf or top_k < 0,
            f"temperature, top_k {temperature, top_k}",
            "0 or more, and finite",
        ),
        (not 0 < top_p <= 1, f"top_p {top_p}", "above 0, and at most 1"),
        (not abs(length_penalty) <= 10, f"length_penalty {length_penalty}", "-10 to 10"),
        (
            seed is not None and (type(seed) is not int or not 0 <= seed < 2**32),
            f"seed {seed!r}",
            "0 to 2**32 - 1",
        ),
        ("" in stops, f"stop {stop!r:.40}", "texts that are not empty"),
        (
            beams > 1 and temperature,
            f"beams {beams} at temperature {temperature}",
            "temperature 0: none are drawn",
        ),
        (
            samples > beams and not temperature,
            f"samples {samples}",
            "a temperature, or as many beams",
        ),
    ):
        if wrong:
            raise ValueError(f"{found}: expected {expected}")
    n_ids, device = model.embed.num_embeddings, model.embed.weight.device
    sources = [
        tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    if bad := [
        i
        for i, source in enumerate(sources)
        if not source or min(source) < 0 or max(source) >= n_ids
    ]:
        raise ValueError(f"prompts {bad} have no tokens, or ids that are not 0 to {n_ids - 1}")
    seed = secrets.randbits(32) if seed is None else seed

    def run():
        for read, own in batches_by_length(
            list(map(len, sources)), adapter, max(1, batch_size // max(beams, samples))
        ):
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
                written = decode_tokens(model, state.repeat(samples), n_tokens, done, streams, *how)
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
        text = self.decode(
            self.ids
        )  # all of it: what a token is depends on those before, and a step takes far longer
        if self.done or (token is not None and text.endswith("\ufffd")):
            return ""
        for at in range(self.length, len(text) + 1):
            self.done = text.startswith(self.stops, at)
            if self.done or (
                token is not None and any(stop.startswith(text[at:]) for stop in self.stops)
            ):
                break
        piece, self.length = text[self.length : at], at
        return piece


@torch.no_grad()
def decode_tokens(
    model, state, max_new_tokens, done, streams=None, temperature=0.0, top_k=0, top_p=1.0
):
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
            uniform_B1 = torch.tensor(
                [[streams[row].random_sample()] for row in rows], dtype=torch.float64
            )
            tokens_B1 = draw_tokens(
                logits_BV, uniform_B1.to(logits_BV.device), temperature, top_k, top_p
            )
        else:
            tokens_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        for row, token in zip(rows, tokens_B1[:, 0].tolist(), strict=True):
            if token in model.config.eos_ids:
                done.add(row)
            else:
                yield row, token


def draw_tokens(logits_BV, uniform_B1, temperature, top_k=0, top_p=1.0):
    """(B, 1): the token at which the sum of the probabilities, in the order of ids, passes a number from [0, 1).

    The probabilities are softmax(logits / temperature) of the `top_k` most likely tokens (0: of all), and of these of
    the fewest whose sum reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751). In the order of ids, rounding, which
    differs from batch to batch, moves each bound by little.
    """
    if 0 < top_k < logits_BV.shape[1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -inf)
    logits_BV = logits_BV.double() - logits_BV.amax(
        dim=-1, keepdim=True
    )  # at most 0: no temperature makes it inf
    p_BV = (logits_BV / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(descending=True)
        p_BV = p_BV.scatter(
            1, order_BV, sorted_BV.masked_fill(sorted_BV.cumsum(-1) - sorted_BV >= top_p, 0.0)
        )
    sum_BV = p_BV.cumsum(dim=-1)
    return torch.searchsorted(sum_BV, uniform_B1 * sum_BV[:, -1:], right=True)
