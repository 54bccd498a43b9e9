"""Beam search: keep the few likeliest texts at each step, rather than the likeliest token.

The texts and their order equal those of transformers' generate(num_beams=n, early_stopping=False).

Shapes: B batch (of beams), S sources, W ways to continue a source (its beams times the vocabulary),
N the best of these ways, V vocabulary.
"""

from dataclasses import dataclass
from math import inf, isnan

import torch

from minia3.inference.scoring import NotFiniteError
from minia3.model.to_device import to_device


@dataclass
class Hypothesis:
    """A text, as its last token and the text before it, which several texts may share."""

    total: float  # the sum of its tokens' log-probabilities
    row: int = 0  # the row of the state that has read all tokens but the last
    token: int | None = None  # None: the empty text, with which the search begins
    parent: "Hypothesis | None" = None

    def ids(self):
        """Return the ids of the text, from its first token on."""
        tokens = []
        hypothesis = self
        while hypothesis.parent is not None:
            tokens.append(hypothesis.token)
            hypothesis = hypothesis.parent
        return tokens[::-1]


class Search:
    """The search from one source: the texts that have ended, and those that are being continued."""

    def __init__(self, n_beams, end_ids, length_penalty):
        self.n_beams = n_beams
        self.end_ids = end_ids
        self.length_penalty = length_penalty
        self.ended = []  # (score, Hypothesis), best first
        # All beams begin with the same empty text, so only the first one counts in the first step.
        self.live = [Hypothesis(0.0)]
        self.live += [Hypothesis(-inf)] * (n_beams - 1)

    def advance(self, candidates, length, is_last):
        """Sort the likeliest texts of this length, best first, into `ended` and `live`.

        Only the best n_beams of them may end, and the best n_beams that do not end are continued.
        The search is over (`live` is empty) if n_beams texts have ended, and no text that has not
        ended has a higher score so far than the worst of them.
        """
        divisor = length**self.length_penalty
        for candidate in candidates[: self.n_beams]:
            if is_last or candidate.token in self.end_ids:
                self.ended.append((candidate.total / divisor, candidate))
        self.ended.sort(key=lambda pair: -pair[0])
        del self.ended[self.n_beams :]

        self.live = []
        unended = [candidate for candidate in candidates if candidate.token not in self.end_ids]
        if is_last or not unended:
            return
        is_full = len(self.ended) == self.n_beams
        if not is_full or unended[0].total / divisor > self.ended[-1][0]:
            self.live = unended[: self.n_beams]

    def texts(self):
        """Return the ids of the texts that have ended, best first, without the end token."""
        texts = []
        for _, hypothesis in self.ended:
            ids = hypothesis.ids()
            if ids[-1] in self.end_ids:
                ids.pop()
            texts.append(ids)
        return texts


@torch.no_grad()
def beam_search(model, state, n_beams, max_new_tokens, length_penalty=1.0, end_ids=None):
    """Return the `n_beams` best texts for each row of `state`, best first: lists of ids.

    The score of a text is the sum of its log-probabilities, divided by length ** length_penalty,
    and its end token counts. The lists do not hold the end token. end_ids: the end tokens; None:
    those of the model. `state` stays as it is. Raise NotFiniteError, with the row of `state`, if
    the model's scores are not finite.
    """
    end_ids = model.config.eos_ids if end_ids is None else end_ids
    searches = [Search(n_beams, end_ids, length_penalty) for _ in state.start]
    active = searches
    state = state.repeat(n_beams)
    tokens_B1 = state.start
    for length in range(1, max_new_tokens + 1):
        logits_BV = model.step(tokens_B1, state)[:, -1].float()
        logp_BV = logits_BV.log_softmax(dim=-1)
        # Each beam has at most len(end_ids) ways to end, so at least n_beams of the n_best ways do
        # not end.
        n_best = n_beams * min(1 + len(end_ids), logp_BV.shape[1])
        for search, candidates in zip(active, best_ways(logp_BV, active, n_best), strict=True):
            # NaN is the largest number to `topk`, and a row is NaN if its best logit is not finite.
            if isnan(candidates[0].total):
                index = searches.index(search)
                raise NotFiniteError(f"prompt {index}", index)
            search.advance(candidates, length, is_last=length == max_new_tokens)

        active = [search for search in active if search.live]
        if not active:
            break
        live = live_hypotheses(active)
        state = state.select(torch.tensor([hypothesis.row for hypothesis in live]))
        tokens = torch.tensor([[hypothesis.token] for hypothesis in live])
        tokens_B1 = to_device(tokens, tokens_B1.device)
    return [search.texts() for search in searches]


def best_ways(logp_BV, searches, n_best):
    """Return, for each search, the `n_best` likeliest ways to continue by one token, best first.

    logp_BV: the log-probabilities of the next token, for the live hypotheses of all searches.
    """
    totals = [[hypothesis.total] for hypothesis in live_hypotheses(searches)]
    total_B1 = torch.tensor(totals, dtype=logp_BV.dtype)
    total_BV = to_device(total_B1, logp_BV.device) + logp_BV
    total_SW = total_BV.view(len(searches), -1)

    n_vocab = logp_BV.shape[1]
    ways_of_searches = []
    first_row = 0
    for search, pairs in zip(searches, read_best(total_SW, n_best), strict=True):
        ways = []
        for total, index in pairs:
            beam, token = divmod(index, n_vocab)
            ways.append(Hypothesis(total, first_row + beam, token, search.live[beam]))
        ways_of_searches.append(ways)
        first_row += len(search.live)
    return ways_of_searches


def read_best(total_SW, n_best):
    """Return, for each row, the `n_best` largest totals (float32) as pairs (total, column).

    This is all that a step reads from a GPU, and it reads once, because the GPU waits meanwhile: so
    the bits of the totals travel as integers, beside the columns.
    """
    best = total_SW.topk(n_best)
    bits_SN = best.values.view(torch.int32).long()
    bits_SN, columns_SN = torch.stack((bits_SN, best.indices)).cpu()
    totals_SN = bits_SN.int().view(torch.float32)
    pairs_of_rows = []
    for totals, columns in zip(totals_SN.tolist(), columns_SN.tolist(), strict=True):
        pairs_of_rows.append(list(zip(totals, columns, strict=True)))
    return pairs_of_rows


def live_hypotheses(searches):
    """Return the live hypotheses of all searches, in the order of the state's rows."""
    hypotheses = []
    for search in searches:
        hypotheses += search.live
    return hypotheses
