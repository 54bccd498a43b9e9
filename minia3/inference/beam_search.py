"""To be written."""

from math import inf

import torch


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
    sum_B1 = torch.tensor(
        [[0.0], *[[-inf]] * (beams - 1)] * len(rows), device=device
    )  # at first all are the same
    for length in range(1, max_new_tokens + 1):
        logp_BV = model.step(tokens_B1, state)[:, -1].float().log_softmax(dim=-1)
        n_vocab, penalty, last, kept, going = (
            logp_BV.shape[1],
            length**length_penalty,
            length == max_new_tokens,
            [],
            [],
        )
        best = (sum_B1 + logp_BV).view(len(rows), -1).topk(min(1 + len(ends), n_vocab) * beams)
        for n, (row, sums, ways) in enumerate(
            zip(rows, best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            ways = [
                (total, n * beams + i // n_vocab, i % n_vocab)
                for total, i in zip(sums, ways, strict=True)
            ]
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
        sum_B1, order_B1, tokens_B1 = (
            torch.tensor(x, device=device)[:, None] for x in zip(*going, strict=True)
        )
        state = state.select(order_B1[:, 0])
    return [[[token for token in ids if token not in ends] for _, ids in texts] for texts in ended]
