"""Lines of the table: ranking, generation, and batches of several adapters.

Shapes: B batch, M source length, C choices, L target length, N = B * C, V vocabulary.
"""

import copy
import dataclasses

import numpy as np
import torch

import minia3
from minia3.inference.scoring import score_examples
from minia3.model.blocks import Unscaled
from minia3.model.ia3 import IA3
from tests.benchmarks.floors import memory_read_bytes_per_second
from tests.benchmarks.measure import ALL_KERNELS, record_kernels
from tests.benchmarks.pairs import batch_on, no_warnings, random_examples

RANKING_BATCH = 8


def ranking(bench, pair):
    """Compare rank classification. Theirs repeats the prompt for each choice, as users of PEFT do.

    Sources have lengths like RTE's, and on their side padding to the left of LLaMA's.
    """
    ours = pair.ours()
    theirs = pair.theirs().eval()

    def row(n_choices, n_target, n_rows):
        lengths = np.random.RandomState(0).choice(pair.lengths(like_rte=True), n_rows).tolist()
        examples = random_examples(lengths, n_choices, n_target, pair.vocab_size)

        def our_scores():
            return score_examples(ours, examples, batch_size=RANKING_BATCH)

        def their_scores():
            return score_as_peft_users(pair, theirs, examples)

        pair.check_same(our_scores(), their_scores())
        n_tokens = sum(lengths) + n_rows * n_choices * n_target
        return bench.time_below_roof(our_scores, their_scores, n_tokens)

    yield "rank evaluation, RTE (2 choices)", row(n_choices=2, n_target=2, n_rows=16)
    # One batch, because theirs takes half a minute for it.
    yield "rank evaluation, 10 choices", row(n_choices=10, n_target=4, n_rows=8)


@torch.no_grad()
def score_as_peft_users(pair, model, examples):
    """Return the scores (rows, C): mean log-probabilities of the choices."""
    scores = []
    for first in range(0, len(examples), RANKING_BATCH):
        batch = batch_on(pair.device, examples[first : first + RANKING_BATCH])
        target_NL = batch.target_BCL.flatten(0, 1)
        n_target = target_NL.shape[1]
        inputs = pair.their_inputs(batch, target_NL, padding_side="left")
        if not pair.is_t5:
            del inputs["labels"]
            inputs["logits_to_keep"] = n_target + 1  # the token before predicts
        logits_NLV = model(**inputs).logits[:, :n_target]
        logp_NLV = logits_NLV.float().log_softmax(-1)
        logp_NL = logp_NLV.gather(-1, target_NL[..., None])
        scores.append(logp_NL.view(batch.target_BCL.shape).mean(-1).cpu())
    return torch.cat(scores)


class Ids:
    """Stands in for a tokenizer: prompts are ids already, and a text is the ids that it has."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def generation(bench, pair):
    """Compare greedy generation, also with the kernels of ours alone (see `Kernels`).

    No token ends a text, so both sides write as many. Our weights are in huge pages, as `minia3
    generate` has them. The floor is what the products with weights must take: at batch 1, reading
    every weight once per token.
    """
    n_new = 4 if bench.quick else 32
    ours = pair.ours()
    minia3.move_to_huge_pages(ours)
    ours.config = dataclasses.replace(ours.config, eos_ids=())
    theirs = pair.theirs().eval()
    tokenizer = Ids()

    def row(batch_size):
        prompts = random_prompts(pair, batch_size)
        source_BM = torch.tensor(prompts, device=pair.device)

        def our_texts():
            return minia3.generate(
                ours, tokenizer, prompts, max_new_tokens=n_new, batch_size=batch_size
            )

        def their_texts():
            ids = write_as_peft_users(theirs, source_BM, n_new)
            return [tokenizer.decode(text) for text in ids[:, -n_new:].tolist()]

        found = our_texts()
        expected = their_texts()
        # In bfloat16, rounding decides between tokens that are nearly as likely as each other.
        if pair.dtype == torch.float32 and found != expected:
            raise AssertionError(f"the two sides write different texts: {found[0]}, {expected[0]}")
        kernels = record_kernels(our_texts, are_all=True)
        timed = bench.time(our_texts, their_texts, alone=kernels)
        timed.alone_of = ALL_KERNELS
        timed.tokens_per_second = batch_size * n_new / timed.ours
        if pair.device == "cpu":
            bandwidth = memory_read_bytes_per_second(n_rounds=bench.n_floor_rounds)
            timed.floor = kernels.least_seconds(bandwidth, timed.peak_flops)
            timed.floor_of = "products"
        return timed

    yield "greedy generation, batch 1", row(1)
    yield "greedy generation, batch 32", row(32)


def write_as_peft_users(model, source_BM, n_new):
    """Return (B, M + n_new) ids: prompts without padding, and what greedy generation adds.

    No token ends a text.
    """
    return model.generate(
        input_ids=source_BM,
        attention_mask=torch.ones_like(source_BM),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def mixed(bench, pair):
    """Compare a batch of 32 prompts for several adapters with the base alone, and with LoRA.

    Reading the prompts and one token is timed. In PEFT, LoRA can mix adapters and (IA)^3 cannot.
    Beside LoRA, the floor is the base alone. Beside the base, what runs alone is the base and then
    all multiplications by vectors.
    """
    n = 32
    ours = pair.ours(n_adapters=n)
    base = without_vectors(ours)
    source_BM = torch.tensor(random_prompts(pair, n), device=pair.device)

    @torch.no_grad()
    def read(model, adapter=None):
        state = model.start(source_BM, None, adapter)
        return model.step(state.start, state)

    def read_base():
        return read(base)

    def row(n_different):
        adapter = torch.arange(n) % n_different
        pair.check_same(read(ours, adapter), read(ours))  # every row is the same adapter
        multiply = multiplications(ours, lambda: read(ours, adapter))

        def read_base_and_multiply():
            read_base()
            multiply()

        timed = bench.time(lambda: read(ours, adapter), read_base, alone=read_base_and_multiply)
        timed.alone_of = "the base, multiplications"
        return timed

    for n_different in (1, 8, 32):
        title = f"mixed batch of {n}, {n_different} adapters, against the base alone (ours)"
        yield title, row(n_different)

    names = ["default", *(f"task{i}" for i in range(1, n))]
    lora = pair.their_lora(names).eval()
    inputs = {"input_ids": source_BM, "adapter_names": names}
    if pair.is_t5:
        inputs["labels"] = torch.zeros_like(source_BM[:, :1])
    else:
        inputs["logits_to_keep"] = 1

    @torch.no_grad()
    def read_with_lora():
        with no_warnings():
            return lora(**inputs)

    def read_ours():
        return read(ours, torch.arange(n))

    row_against_lora = bench.time(read_ours, read_with_lora, floor=read_base)
    row_against_lora.floor_of = "the base alone"
    yield f"mixed batch of {n}, {n} adapters, against LoRA with adapter_names", row_against_lora


def multiplications(model, run):
    """Return a function that makes all multiplications by vectors that `run()` makes.

    It multiplies zeros, because other numbers would become denormal, which takes longer.
    """
    zeros = {}  # by shape, because all of them at once would take too much memory
    calls = []

    def note(module, args):
        x_BLD, adapter_B = args
        x_BLD = zeros.setdefault(x_BLD.shape, torch.zeros_like(x_BLD))
        calls.append((module, x_BLD, adapter_B))

    modules = [module for module in model.modules() if isinstance(module, IA3)]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    run()
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def multiply():
        for module, x_BLD, adapter_B in calls:
            module(x_BLD, adapter_B)

    return multiply


class NoVector(Unscaled):
    """Stands where the model had a vector."""

    scale = None


def without_vectors(model):
    """Return a model of the same weights that multiplies by no vector: the base alone."""
    base = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for module in list(base.modules()):
        for name, child in module.named_children():
            if isinstance(child, IA3):
                setattr(module, name, NoVector())
    return base


def random_prompts(pair, n):
    """Return n prompts of one length, as lists of ids."""
    lengths = pair.lengths()[:1] * n
    return [example.source for example in random_examples(lengths, 1, 2, pair.vocab_size)]
