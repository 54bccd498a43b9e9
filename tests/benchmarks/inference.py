"""Lines of the table: ranking, generation, and batches of several adapters.

Shapes: B batch, M source length, C choices, L target length, N all choices of all rows.
"""

import dataclasses

import numpy as np
import torch

import minia3
from minia3.inference.scoring import score_examples
from minia3.tasks.batches import collate
from tests.benchmarks.measure import products
from tests.benchmarks.pairs import examples, quiet


def ranking(bench, pair):
    """Rank classification: theirs repeats the prompt for each choice, as PEFT's users do."""
    ours, theirs = pair.ours(), pair.theirs().eval()
    for what, n_choices, n_target, n_rows in (
        ("RTE (2 choices)", 2, 2, 32),
        ("10 choices", 10, 4, 16),
    ):
        lengths = np.random.RandomState(0).choice(pair.lengths(like_rte=True), n_rows).tolist()
        rows = examples(lengths, n_choices, n_target, pair.vocab_size)

        def our_scores(rows=rows):
            return score_examples(ours, rows, batch_size=8)

        @torch.no_grad()
        def their_scores(rows=rows, n_target=n_target):
            scores = []
            for first in range(0, len(rows), 8):
                batch = collate(rows[first : first + 8])
                batch = batch._make(x.to(pair.device) for x in batch)
                target_NL = batch.target_BCL.flatten(0, 1)
                inputs = pair.their_inputs(batch, target_NL, "left")
                if not pair.is_t5:
                    inputs = inputs | {"labels": None, "logits_to_keep": n_target + 1}
                logits_NLV = theirs(**inputs).logits[:, :n_target]
                logp_NL = logits_NLV.float().log_softmax(-1).gather(-1, target_NL[..., None])
                scores.append(logp_NL.view(batch.target_BCL.shape).mean(-1).cpu())
            return torch.cat(scores)

        pair.same(our_scores(), their_scores())
        yield f"rank evaluation, {what}", bench.time(our_scores, their_scores)


class Ids:
    """Stands for a tokenizer where prompts are ids."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def generation(bench, pair):
    """Greedy, for as many tokens on both sides (no token ends a text), beside our matrix products alone."""
    n_new, ids = 4 if bench.quick else 32, Ids()
    ours, theirs = pair.ours(), pair.theirs().eval()
    ours.config = dataclasses.replace(ours.config, eos_ids=())
    how = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": n_new}
    for batch in (1, 32):
        prompts = [
            row.source for row in examples(pair.lengths()[:1] * batch, 1, 2, pair.vocab_size)
        ]
        source_BM = torch.tensor(prompts, device=pair.device)
        inputs = {"input_ids": source_BM, "attention_mask": torch.ones_like(source_BM)}

        def our_texts(prompts=prompts):
            return minia3.generate(
                ours, ids, prompts, max_new_tokens=n_new, batch_size=len(prompts)
            )

        def their_texts(inputs=inputs):
            return [
                ids.decode(text) for text in theirs.generate(**inputs, **how)[:, -n_new:].tolist()
            ]

        found, expected = our_texts(), their_texts()
        if pair.dtype == torch.float32 and found != expected:  # in bfloat16 near ties go either way
            raise AssertionError(f"the two sides write different texts: {found[0]}, {expected[0]}")
        row = bench.time(our_texts, their_texts, tokens=batch * n_new, products=products(our_texts))
        yield f"greedy generation, batch {batch}", row


def mixed(bench, pair):
    """A batch of 32 prompts whose adapters are 1, 8 or 32 different ones: against the base alone, then LoRA's."""
    n = 32
    ours = pair.ours(n_adapters=n)
    sources = [row.source for row in examples(pair.lengths()[:1] * n, 1, 2, pair.vocab_size)]
    source_BM = torch.tensor(sources, device=pair.device)

    @torch.no_grad()
    def forward(adapter=None):
        state = ours.start(source_BM, None, adapter)
        return ours.step(state.start, state)

    for different in (1, 8, 32):
        rows = torch.arange(n) % different
        pair.same(forward(rows), forward())  # all rows are the same adapter
        row = bench.time(lambda rows=rows: forward(rows), forward)
        yield f"mixed batch of {n}, {different} adapters, against the base alone (ours)", row
    names = ["default"] + [f"task{i}" for i in range(1, n)]
    lora = pair.lora(names).eval()
    inputs = {"labels": torch.zeros_like(source_BM[:, :1])} if pair.is_t5 else {"logits_to_keep": 1}

    @torch.no_grad()
    def forward_lora():
        with quiet():
            return lora(input_ids=source_BM, adapter_names=names, **inputs)

    row = bench.time(lambda: forward(torch.arange(n)), forward_lora)
    yield f"mixed batch of {n}, {n} adapters, against LoRA with adapter_names", row
