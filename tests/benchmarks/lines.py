"""The lines of the table. Each is a function of a `Bench` that gives rows (name, measured); what a pair computes is
compared before it is timed.

Shapes: B batch, M source length, C choices, L target length, N all choices of all rows.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import minia3
from minia3.data import Example, collate
from minia3.generation import choice_logprobs, score
from minia3.losses import total_loss
from minia3.t5 import T5
from tests.benchmarks.measure import alternate, child, compare, kept_for_backward
from tests.benchmarks.pairs import Pair, quiet

IGNORED = -100  # transformers' label of a position without a loss
RTE = (40, 46, 52, 58, 66, 77, 95, 180)  # lengths like RTE's: the middles of the eighths of its rows, about


class Bench(NamedTuple):
    t5: Pair
    llama: Pair
    scratch: Path
    quick: bool
    rounds: int

    @property
    def batch(self):
        return 2 if self.quick else 8

    def lengths(self, like_rte):
        lengths = RTE if like_rte else (128,) * 8
        return [n // 16 for n in lengths[-self.batch :]] if self.quick else list(lengths)

    def time(self, ours, theirs, rounds=None):
        return alternate(ours, theirs, min(self.rounds, rounds or self.rounds), warm_up=1 if self.quick else 2)


def examples(lengths, n_choices, n_target, vocab_size, seed=0):
    """Random rows: sources of these lengths, each with `n_choices` targets of `n_target` tokens, ended by 1."""
    draw = np.random.RandomState(seed).randint
    return [
        Example(
            draw(3, vocab_size, length).tolist(),
            [[*draw(3, vocab_size, n_target - 1).tolist(), 1] for _ in range(n_choices)],
            int(draw(n_choices)),
        )
        for length in lengths
    ]


def right_targets(batch):
    return batch.target_BCL[torch.arange(len(batch.label_B)), batch.label_B]


def their_inputs(pair, batch, target_NL, padding_side="right"):
    """What transformers takes: every source with its targets (N = B, or B times the choices), padded."""
    n = len(target_NL) // len(batch.source_BM)
    source_NM, mask_NM = (x.repeat_interleave(n, dim=0) for x in (batch.source_BM, batch.mask_BM))
    if pair.is_t5:
        return {"input_ids": source_NM, "attention_mask": mask_NM.long(), "labels": target_NL}
    texts = [torch.cat((s[keep], t)) for s, keep, t in zip(source_NM, mask_NM, target_NL, strict=True)]
    labels = [torch.cat((torch.full_like(x[: -len(t)], IGNORED), t)) for x, t in zip(texts, target_NL, strict=True)]

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side)

    real = pad([torch.ones_like(x) for x in texts], 0)
    return {"input_ids": pad(texts, 0), "attention_mask": real, "labels": pad(labels, IGNORED)}


def training_step(pair, loss, model):
    """A step of AdamW over what `model` trains."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)

    def step():
        loss().backward()
        adam.step()
        adam.zero_grad()

    return step


def losses(pair, ours, theirs, lengths, adapter=None):
    """(our loss, their loss) of a batch with one target of 8 tokens each."""
    batch = collate(examples(lengths, 1, 8, pair.vocab_size), 0)
    inputs = their_inputs(pair, batch, right_targets(batch))

    def our_loss():
        logp_BCL = choice_logprobs(ours, batch, adapter)
        return total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B, ("lm",))

    def their_loss():
        return theirs(**inputs).loss

    with torch.no_grad():
        pair.same(our_loss(), their_loss())
    return our_loss, their_loss


# Start, adapters, export


def start(bench):
    """A process from nothing to a model that is ready to train."""
    ours = f"import minia3; model = minia3.load_model({str(bench.t5.folder)!r}); minia3.freeze(model); model.train()"
    theirs = (
        "import peft, transformers; from transformers import AutoModelForSeq2SeqLM as M; "
        f"model = M.from_pretrained({str(bench.t5.folder)!r}, dtype='auto'); "
        "peft.get_peft_model(model, peft.IA3Config(task_type='SEQ_2_SEQ_LM')).train()"
    )
    yield "process start to ready to train, t5-base", bench.time(lambda: child(ours), lambda: child(theirs))


def adapters(bench):
    pair = bench.t5
    ours, theirs = pair.ours(n_adapters=2), pair.theirs()

    def reload():
        theirs.load_adapter(pair.adapter, "other")
        theirs.delete_adapter("other")

    yield "load an adapter from disk", bench.time(lambda: minia3.load_adapter(ours, pair.adapter, 1), reload)
    theirs.load_adapter(pair.adapter, "other")
    names, source_BM = ["default", "other"], torch.zeros(8, 1, dtype=torch.long)

    def switch_ours():  # an argument: what `start` does with it
        from minia3.state import check_start

        check_start(source_BM, None, 1, 2)

    def switch_theirs():
        names.reverse()
        theirs.set_adapter(names[0])

    yield "switch to another adapter", bench.time(switch_ours, switch_theirs)


def export(bench):
    pair = bench.t5

    def ours():
        model = pair.ours()
        minia3.save_model(minia3.merge(model), bench.scratch / "ours")
        shutil.rmtree(bench.scratch / "ours")

    def theirs():
        pair.theirs().merge_and_unload().save_pretrained(bench.scratch / "theirs")
        shutil.rmtree(bench.scratch / "theirs")

    yield "load, merge and export, t5-base", bench.time(ours, theirs)


# Training


def steps(bench):
    for pair, name in ((bench.t5, "T5"), (bench.llama, "LLaMA")):
        ours, theirs = pair.ours().train(), pair.theirs().train()
        for like_rte, what in ((False, f"no padding ({bench.batch} x 128 -> 8)"), (True, "RTE-like lengths")):
            pairs = losses(pair, ours, theirs, bench.lengths(like_rte))
            sides = [training_step(pair, loss, model) for loss, model in zip(pairs, (ours, theirs), strict=True)]
            yield f"{name} training step, {what}", bench.time(*sides)


def choices(bench):
    """T-Few's three losses over four choices; theirs with the inputs repeated, or the encoder's output."""
    pair, n = bench.t5, 4
    ours, theirs = pair.ours().train(), pair.theirs().train()
    batch = collate(examples(bench.lengths(False), n, 8, pair.vocab_size), 0)
    target_NL = batch.target_BCL.flatten(0, 1)
    repeated = their_inputs(pair, batch, target_NL)

    def loss(logits):
        logp_NL = logits.float().log_softmax(-1).gather(-1, target_NL[..., None])
        return total_loss(logp_NL.view(batch.target_BCL.shape), batch.target_mask_BCL, batch.label_B)

    def our_loss():
        return total_loss(choice_logprobs(ours, batch), batch.target_mask_BCL, batch.label_B)

    def encoded_once():
        source = {"input_ids": batch.source_BM, "attention_mask": batch.mask_BM.long()}
        memory = theirs.base_model.model.encoder(**source).last_hidden_state.repeat_interleave(n, dim=0)
        rest = {name: repeated[name] for name in ("attention_mask", "labels")}
        return loss(theirs(encoder_outputs=(memory,), **rest).logits)

    for their_loss, what in (
        (lambda: loss(theirs(**repeated).logits), "repeated inputs"),
        (encoded_once, "one encoding"),
    ):
        with torch.no_grad():
            pair.same(our_loss(), their_loss())
        sides = training_step(pair, our_loss, ours), training_step(pair, their_loss, theirs)
        yield f"T-Few's loss, {n} choices, against {what}", bench.time(*sides)


def many_tasks(bench):
    """A batch of one example for each of its tasks: one pass, against a pass for each adapter."""
    pair, n = bench.t5, bench.batch
    ours, theirs = pair.ours(n_adapters=n).train(), pair.theirs().train()
    names = ["default"] + [f"task{i}" for i in range(1, n)]
    for name in names[1:]:
        theirs.load_adapter(pair.adapter, name, is_trainable=True)
    our_loss, _ = losses(pair, ours, theirs, bench.lengths(False), torch.arange(n))
    batch = collate(examples(bench.lengths(False), 1, 8, pair.vocab_size), 0)
    inputs = their_inputs(pair, batch, right_targets(batch))
    for p in theirs.parameters():
        p.requires_grad_(False)
    for name in names:
        theirs.set_adapter(name)
    adam = torch.optim.AdamW([p for n, p in theirs.named_parameters() if "ia3_l" in n], lr=1e-9)

    def theirs_step():
        for i, name in enumerate(names):
            theirs.set_adapter(name)
            theirs(**{key: x[i : i + 1] for key, x in inputs.items()}).loss.backward()
        adam.step()
        adam.zero_grad()

    yield (
        f"{n} tasks in one batch of {n}, trained in one pass",
        bench.time(training_step(pair, our_loss, ours), theirs_step),
    )


def kept(bench):
    for pair, name in ((bench.t5, "T5"), (bench.llama, "LLaMA")):
        ours, theirs = pair.ours().train(), pair.theirs().train()
        our_loss, their_loss = losses(pair, ours, theirs, bench.lengths(False))
        found = kept_for_backward(our_loss, ours)
        yield (
            f"{name}, bytes kept for backward, against (IA)^3",
            compare(found, kept_for_backward(their_loss, theirs), "B"),
        )
        lora = pair.lora().train()
        batch = collate(examples(bench.lengths(False), 1, 8, pair.vocab_size), 0)
        inputs = their_inputs(pair, batch, right_targets(batch))
        yield (
            f"{name}, bytes kept for backward, against LoRA r8 (q, v)",
            compare(found, kept_for_backward(lambda m=lora, x=inputs: m(**x).loss, lora), "B"),
        )


PEAK = """
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from tests.benchmarks.lines import Bench, one_loss, training_step
from tests.benchmarks.pairs import Pair
torch.set_num_threads({threads})
pair = Pair("t5", Path({folder!r}), {quick}, {dtype})
model = pair.{side}().train()
loss = one_loss(pair, model, Bench(pair, pair, None, {quick}, 1).lengths(False))
step = training_step(pair, loss, model)
step(), step()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)  # ru_maxrss would begin with the parent's
"""


def one_loss(pair, model, lengths):
    batch = collate(examples(lengths, 1, 8, pair.vocab_size), 0)
    if isinstance(model, T5):
        mask, label = batch.target_mask_BCL, batch.label_B
        return lambda: total_loss(choice_logprobs(model, batch), mask, label, ("lm",))
    inputs = their_inputs(pair, batch, right_targets(batch))
    return lambda: model(**inputs).loss


def peak(bench):
    """The largest resident set of a process that trains (mapped weights are in it). Linux alone."""
    given = {"threads": torch.get_num_threads(), "folder": str(bench.t5.folder.parent), "quick": bench.quick}
    sides = (int(child(PEAK.format(side=side, dtype=bench.t5.dtype, **given))) for side in ("ours", "theirs"))
    yield "T5, peak resident memory of training", compare(*sides, "B")


# Inference


def ranking(bench):
    """Rank classification: theirs repeats the prompt for each choice, as PEFT's users do."""
    for pair, name in ((bench.t5, "T5"), (bench.llama, "LLaMA")):
        ours, theirs = pair.ours(), pair.theirs().eval()
        for n_choices, n_target, n_rows in ((2, 2, 32), (10, 4, 16)):
            lengths = np.random.RandomState(0).choice(bench.lengths(True), 4 if bench.quick else n_rows).tolist()
            rows = examples(lengths, n_choices, n_target, pair.vocab_size)

            def our_scores(ours=ours, rows=rows):
                return score(ours, rows, 0, batch_size=8)

            @torch.no_grad()
            def their_scores(pair=pair, theirs=theirs, rows=rows, n_target=n_target):
                scores = []
                for first in range(0, len(rows), 8):
                    batch = collate(rows[first : first + 8], 0)
                    target_NL = batch.target_BCL.flatten(0, 1)
                    inputs = their_inputs(pair, batch, target_NL, "left")
                    if pair.is_t5:
                        logits = theirs(**inputs).logits
                    else:
                        inputs.pop("labels")
                        logits = theirs(**inputs, logits_to_keep=n_target + 1).logits[:, :-1]
                    logp_NL = logits.float().log_softmax(-1).gather(-1, target_NL[..., None])
                    scores.append(logp_NL.view(batch.target_BCL.shape).mean(-1))
                return torch.cat(scores)

            pair.same(our_scores(), their_scores())
            what = "RTE (2 choices)" if n_choices == 2 else "10 choices"
            yield f"{name}, rank evaluation, {what}", bench.time(our_scores, their_scores, rounds=7)


def generation(bench):
    """Greedy, for as many tokens on both sides: no token ends a text."""
    n_new = 4 if bench.quick else 32
    for pair, name in ((bench.t5, "t5-base"), (bench.llama, "SmolLM2-135M")):
        ours, theirs = pair.ours(), pair.theirs().eval()
        ours.config = dataclasses.replace(ours.config, eos_ids=())
        how = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": n_new}
        for batch in (1, 32):
            rows = examples([8 if bench.quick else 64] * batch, 1, 2, pair.vocab_size)
            prompts = [row.source for row in rows]
            inputs = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(batch, len(prompts[0])).long()}

            def our_texts(ours=ours, prompts=prompts, batch=batch):
                return minia3.generate(ours, Ids(), prompts, max_new_tokens=n_new, batch_size=batch)

            def their_texts(theirs=theirs, inputs=inputs, how=how):
                return [Ids().decode(ids) for ids in theirs.generate(**inputs, **how)[:, -n_new:].tolist()]

            found, expected = our_texts(), their_texts()
            if pair.dtype == torch.float32 and found != expected:  # in bfloat16 near ties go either way
                raise AssertionError(f"the two sides write different texts: {found[0]}, {expected[0]}")
            yield f"{name}, greedy, {n_new} tokens, batch {batch}", bench.time(our_texts, their_texts)


class Ids:
    """Stands for a tokenizer where prompts are ids."""

    pad_id = 0

    def decode(self, ids):
        return " ".join(map(str, ids))


def mixed(bench):
    """A batch of 32 prompts whose adapters are 1, 8 or 32 different ones: against the base alone, then LoRA's."""
    pair = bench.t5
    n = 4 if bench.quick else 32
    ours = pair.ours(n_adapters=n)
    source_BM = torch.tensor([row.source for row in examples([8 if bench.quick else 64] * n, 1, 2, pair.vocab_size)])

    @torch.no_grad()
    def forward(model, adapter):
        state = model.start(source_BM, None, adapter)
        return model.step(state.start, state)

    for different in (1, 8, n):
        rows = torch.arange(n) % different
        pair.same(forward(ours, rows), forward(ours, None))  # all rows are the same adapter
        result = bench.time(lambda: forward(ours, None), lambda r=rows: forward(ours, r))
        yield f"mixed batch of {n}, {different} adapters, against one for all (the price of mixing)", result
    names = ["default"] + [f"task{i}" for i in range(1, n)]
    lora = pair.lora(names).eval()
    target = torch.zeros(n, 1, dtype=torch.long)

    @torch.no_grad()
    def forward_lora():
        with quiet():
            return lora(input_ids=source_BM, labels=target, adapter_names=names)

    yield (
        f"mixed batch of {n}, {n} adapters, against LoRA with adapter_names",
        bench.time(lambda: forward(ours, torch.arange(n)), forward_lora),
    )


LINES = {
    f.__name__: f for f in (start, adapters, export, steps, choices, many_tasks, kept, peak, ranking, generation, mixed)
}
