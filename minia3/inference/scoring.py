"""Scoring: how likely a model finds given texts.

    logprobs          the log-probability of each token of a target
    choice_logprobs   the same for all choices of a batch, whose sources are read once
    choice_scores     one number per choice: the mean log-probability of its tokens
    rank              the scores of choices, from texts
    total_logprobs    the log-probability of a whole target, for perplexities

Training, evaluation and prediction all go through these. Whatever is large is computed in parts:
the logits of many tokens (target_logprobs.py), and the choices of a task with many of them.

Shapes: B batch, M source length, C choices, L target length, S length of a text (a source and its
target), R = S - 1 tokens of it that are read, D model, V vocabulary, P all tokens of a batch, T
those of them that are scored, N all examples.
"""

import warnings
from collections.abc import Iterable, Mapping, Set
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from minia3.files.ahead import one_ahead
from minia3.files.processes import combine, share
from minia3.files.progress import progress
from minia3.files.read import one_line
from minia3.inference.options import expect, is_integer
from minia3.model.adapter_rows import as_numbers
from minia3.model.llama import Llama
from minia3.model.packing import NO_PACKING, Packing, spread, true_places
from minia3.model.sequence_state import check_mask
from minia3.model.shard import compare_passes, is_sharded
from minia3.model.target_logprobs import target_logprobs
from minia3.model.to_device import cpu_as_default, start_reading, to_device
from minia3.tasks.batches import collate, join
from minia3.tasks.examples import encode_example
from minia3.tasks.limits import check_ids, equal_choices
from minia3.tasks.prompts import Rendered

# Tokens of choices, padding included, that are scored at once, because their activations all exist
# at once. A batch with more of them, such as 77 intents for each of 8 sources, scores its choices
# in chunks.
MAX_CHOICE_TOKENS = 1 << 12

# Tokens of one source's choices that are scored at once. A LLaMA reads them side by side in one row
# (sequence_state.py), so their attention grows with the square of this number.
MAX_SIDE_BY_SIDE = 1 << 9


class NotFiniteError(ValueError):
    """The model's scores for a row are NaN or infinite, so that they have no order.

    name: what to call the first such row. index: its place among those that were given.
    """

    def __init__(self, name, index):
        super().__init__(
            f"{name}: the model's scores are not finite: its weights or the adapter may hold NaN "
            "(--check-weights looks for it, or check_finite=True in Python), or their dtype is too "
            "narrow (try --dtype float32, or dtype=torch.float32)"
        )
        self.name = name
        self.index = index

    def __reduce__(self):
        return NotFiniteError, (self.name, self.index)  # for other processes


@contextmanager
def naming_rows(rows):
    """Let a NotFiniteError in the block name the `idx` of the row. rows: those that it scores."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"row {rows[error.index]['idx']}", error.index) from None


def logprobs(model, state, target):
    """Return (B, L): log p(target_t | source, target_<t), in float32 (float64 for a float64 model).

    target: (B, L) ids, padded on the right with any valid id; the caller masks the padding.
    Gradients flow to the vectors. `state` advances: it then has read all of the target but its last
    token. The errors are those of `model.step`, and a ValueError if the state has read tokens
    before. To score several targets for a source, give each its `state.repeat(1)`.
    """
    state.check_tokens(target)
    state.check_at_start()
    return masked_logprobs(model, state, target, None)


def masked_logprobs(model, state, target, mask):
    """Return `logprobs` for tokens whose mask (B, L) is True, and 0 for others. None: all are True.

    Only tokens that are asked for get logits.
    """
    read_BL = torch.cat((state.start, target[:, :-1]), dim=1)
    x_PD = model.run_blocks(read_BL, state).flatten(0, 1)
    target_P = target.flatten().long()
    if mask is None:
        logp = target_logprobs(x_PD, model.head_weight, target_P).view(target.shape)
    else:
        place_T = true_places(mask, target.device)
        x_TD = x_PD.index_select(0, place_T)
        logp_T = target_logprobs(x_TD, model.head_weight, target_P[place_T])
        logp = spread(logp_T, place_T, mask.shape)
    state.end_step()
    return logp


def choice_logprobs(model, batch, adapter=None):
    """Return (B, C, L): the log-probabilities of the tokens of every choice, 0 for padding.

    batch: a Batch (tasks/batches.py). Its sources are read once, and the choices continue them. If
    the choices are scored in chunks, only the sources' keys and values are kept for the backward
    pass, which scores each chunk again. adapter: None (row 0), an int, or (B,) long.

    Raise ValueError if an adapter does not exist, if a source is empty, or if a text is too long.
    """
    if reads_texts_in_one_pass(model, batch):
        return text_logprobs(model, batch, adapter)

    device = model.embed.weight.device
    # Masks stay on the CPU, so that asking whether there is padding does not wait for a GPU.
    # A sharded LLaMA always gets the mask. Without it, sources of one token would skip a pass for
    # which other processes wait (see shard.py).
    mask_BM = batch.mask_BM
    if mask_BM.all() and not is_sharded(model):
        mask_BM = None
    state = model.start(to_device(batch.source_BM, device), mask_BM, adapter)

    target_BCL = to_device(batch.target_BCL, device)
    n_rows, n_choices, length = target_BCL.shape
    if n_choices == 1:
        # A single choice may advance `state` itself, because no other choice continues it.
        return logprobs_of_choices(model, state, target_BCL, batch.target_mask_BCL)

    n_at_once = choices_at_once(n_rows, length)
    if is_sharded(model):  # because every chunk would gather the whole model again
        n_at_once = n_choices

    def score_repeated(target_BCL, mask_BCL):
        return logprobs_of_choices(model, state.repeat(target_BCL.shape[1]), target_BCL, mask_BCL)

    score = score_repeated
    if n_choices > n_at_once and torch.is_grad_enabled():
        state.ensure_all_cross_kv()  # once for all chunks
        score = partial(checkpoint, score_repeated, use_reentrant=False)
    targets = target_BCL.split(n_at_once, dim=1)
    masks = batch.target_mask_BCL.split(n_at_once, dim=1)
    parts = [score(target, mask) for target, mask in zip(targets, masks, strict=True)]
    return torch.cat(parts, dim=1)


def choices_at_once(n_rows, length):
    """Return how many choices of `length` tokens are scored at once for each of `n_rows` sources.

    The memory plan of a step asks, too (training/memory_plan.py).
    """
    return max(1, min(MAX_CHOICE_TOKENS // n_rows, MAX_SIDE_BY_SIDE) // length)


def reads_texts_in_one_pass(model, batch):
    """Return whether sources and targets are read together.

    A LLaMA does so if there is one target per source, because it would have no other use for the
    keys and values of the source. Processes that share a copy of the model must make equally many
    passes (see shard.py). So they ask each other, and if any has several choices, all make two.
    """
    if not isinstance(model, Llama):
        return False
    n_choices = batch.target_BCL.shape[1]
    if is_sharded(model):
        n_choices = max(compare_passes(model.shards, model.n_passes, n_choices))
    return n_choices == 1


def text_logprobs(model, batch, adapter):
    """Return (B, 1, L): what `choice_logprobs` returns, in one pass through a LLaMA.

    The CPU then launches half as many operators on a GPU as it would for two passes.
    """
    device = model.embed.weight.device
    check_mask(batch.mask_BM, tuple(batch.source_BM.shape))  # because `start` gets no mask below
    texts = join(batch)
    ids_BS = to_device(texts.ids_BS, device)
    is_read_BR = texts.is_real_BS[:, 1:]  # nothing reads the last token
    packing = NO_PACKING
    if not is_read_BR.all():
        packing = Packing(is_read_BR, device, model.blocks[0])

    state = model.start(ids_BS[:, :1], None, adapter)  # reads nothing: it leaves out the last token
    x_PD = model.run_blocks(ids_BS[:, :-1], state, packing, keeps_kv=False).flatten(0, 1)

    place_T = true_places(texts.is_scored_BS[:, 1:], device)
    next_T = ids_BS[:, 1:].flatten()[place_T]
    logp_T = target_logprobs(x_PD.index_select(0, place_T), model.head_weight, next_T)
    target_place_T = true_places(batch.target_mask_BCL, device)
    return spread(logp_T, target_place_T, batch.target_mask_BCL.shape)


def logprobs_of_choices(model, state, target_BCL, mask_BCL):
    """Return (B, C, L): the log-probabilities of choices, 0 for padding. `state` has B * C rows."""
    mask = None if mask_BCL.all() else mask_BCL.flatten(0, 1)
    logp = masked_logprobs(model, state, target_BCL.flatten(0, 1), mask)
    return logp.view(target_BCL.shape)


def choice_scores(logp_BCL, mask_BCL, length_norm=True):
    """Return (B, C): the mean of each choice's log-probabilities; their sum without length_norm.

    A choice without tokens does not exist in the row, and its score is -inf.
    """
    n_BC = mask_BCL.sum(dim=-1)
    score_BC = logp_BCL.masked_fill(~mask_BCL, 0.0).sum(dim=-1)
    if length_norm:
        score_BC = score_BC / n_BC.clamp(min=1)
    return score_BC.masked_fill(n_BC == 0, float("-inf"))


@cpu_as_default()
@torch.no_grad()
def score_examples(model, examples, *, adapter=None, length_norm=True, batch_size=16):
    """Return (N, C) float32: the scores of the choices of N examples; -inf for missing choices.

    examples: see tasks/examples.py. adapter: None, an int, or (N,) long. The examples
    are read in batches of similar lengths. Raise NotFiniteError if a choice has no finite score.
    """
    n_choices = max(len(example.targets) for example in examples)
    scores_NC = torch.full((len(examples), n_choices), float("-inf"), dtype=torch.float32)
    for rows, batch, logp in scored_batches(model, examples, adapter, batch_size):
        scores = choice_scores(logp, batch.target_mask_BCL, length_norm)
        scores_NC[rows, : scores.shape[1]] = scores.float()  # the batch may have fewer than C
    scores_NC = combine(torch.maximum, scores_NC)  # what a process has not read is -inf
    n_choices_N1 = torch.tensor([[len(example.targets)] for example in examples])
    is_choice_NC = torch.arange(n_choices) < n_choices_N1
    check_finite(scores_NC.masked_fill(~is_choice_NC, 0.0))
    return scores_NC


@cpu_as_default()
@torch.no_grad()
def total_logprobs(model, examples, *, adapter=None, batch_size=16):
    """Return (N,) float64 and (N,) long: for the target of each example, the sum of its tokens'
    log-probabilities, and the number of its tokens.

    The arguments and the errors are those of `score_examples`. Each example has a single target.
    """
    total_N = torch.zeros(len(examples), dtype=torch.float64)
    n_tokens_N = torch.zeros(len(examples), dtype=torch.long)
    for rows, batch, logp_BCL in scored_batches(model, examples, adapter, batch_size):
        mask_BCL = batch.target_mask_BCL
        total_N[rows] = logp_BCL.double().masked_fill(~mask_BCL, 0.0).sum(dim=(1, 2))
        n_tokens_N[rows] = mask_BCL.sum(dim=(1, 2))
    # What a process has not read is 0, and log-probabilities are at most 0. A sum over processes
    # would be wrong, because two of them may have read the same row.
    total_N = combine(torch.minimum, total_N)
    n_tokens_N = combine(torch.maximum, n_tokens_N)
    check_finite(total_N[:, None])
    return total_N, n_tokens_N


def scored_batches(model, examples, adapter, batch_size):
    """Yield (indices of rows, Batch, log-probabilities (B, C, L) on the CPU) for all examples.

    Reading log-probabilities waits for a GPU, so the GPU gets the next batch before that. Their
    copy to the CPU is queued even before the next batch, because a GPU does everything in order.
    """

    def compute():
        lengths = [len(example.source) for example in examples]
        for rows, adapters in batches_by_length(lengths, adapter, batch_size):
            batch = collate([examples[row] for row in rows])
            yield rows, batch, start_reading(choice_logprobs(model, batch, adapters))

    for rows, batch, read in one_ahead(compute()):
        yield rows, batch, read()


def check_finite(scores_NC):
    """Raise NotFiniteError for the first row with a score that is NaN or infinite."""
    is_bad_N = ~scores_NC.isfinite().all(dim=1)
    if is_bad_N.any():
        index = int(is_bad_N.nonzero()[0])
        raise NotFiniteError(f"prompt {index}", index)


def rank(model, tokenizer, prompts, choices, *, adapter=None, length_norm=True, batch_size=16):
    """Return (N, C) float32: the score of each choice for each prompt. Higher is better.

    A score is the mean log-probability per token; the sum without length_norm. prompts: N texts.
    choices: one list of texts for all prompts, or a list for each; -inf if a list has fewer than C.
    Instead of lists, these may be arrays of NumPy, or columns of pandas.
    adapter: None (row 0), an int, or (N,) long. T5's choices end in `</s>`, which counts; LLaMA's
    have no end token.

    Raise ValueError if there are no prompts, if a prompt has no choices, if the numbers of prompts,
    lists and adapters differ, if a text has no tokens, if the model has no embedding for a token,
    or if a score is not finite. Warn if two choices of a prompt have the same tokens.
    """
    sources = as_list(prompts)
    if not sources:
        found = one_line(repr(prompts))  # that of a table has several lines
        raise ValueError(f"expected a list of prompts, one or more: found {found:.80}")
    examples = []
    without_tokens = []
    for i, texts in enumerate(choices_of_prompts(choices, len(sources))):
        try:
            example = encode_example(Rendered(sources[i], texts, 0), tokenizer, end=False)
            check_example(example, model, tokenizer)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        examples.append(example)
        warn_of_equal_choices(example, texts)
        if not (example.source and all(example.targets)):
            without_tokens.append(i)
    if without_tokens:
        raise ValueError(f"prompts {without_tokens} have no tokens, or a choice without tokens")
    return score_examples(
        model, examples, adapter=adapter, length_norm=length_norm, batch_size=batch_size
    )


def check_example(example, model, tokenizer):
    """Raise ValueError if the model cannot read an example: an unknown id, or far too many."""
    check_ids(example, model.embed.num_embeddings, tokenizer)
    model.check_lengths(len(example.source), [len(target) for target in example.targets])


def check_examples(rows, examples, model, tokenizer):
    """Raise the errors of `check_example` with the `idx` of the row."""
    for row, example in zip(rows, examples, strict=True):
        try:
            check_example(example, model, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {row['idx']}: {error}") from None


def warn_of_equal_choices(example, texts):
    """Warn if two of the choices `texts` have the same tokens."""
    places = equal_choices(example)
    if places:
        first, second = (texts[place] for place in places)
        warnings.warn(
            f"the choices {first!r:.40} and {second!r:.40} are the same text to the tokenizer: "
            "their scores are equal, and the first always wins",
            stacklevel=3,
        )


def choices_of_prompts(choices, n_prompts):
    """Return a list of choices for each prompt. Raise ValueError if `choices` is neither form."""
    expected = f"one non-empty list of choices for all {n_prompts} prompts, or one for each"
    message = f"expected {expected}: found {choices!r:.80}"
    given = as_list(choices)
    if given and isinstance(given[0], str):
        return [given] * n_prompts
    lists = [as_list(texts) for texts in given]
    if len(lists) != n_prompts or not all(lists):
        raise ValueError(message)
    return lists


def as_list(texts):
    """Return texts, which may be in an array, as a list; an empty list if they are in no order."""
    return list(texts) if has_order(texts) else []


def has_order(texts):
    """Return whether these are texts in an order, and neither a single text nor a table."""
    is_table = hasattr(texts, "columns")  # of pandas, which would give the names of its columns
    is_single = isinstance(texts, str) or getattr(texts, "ndim", 1) == 0
    has_none = isinstance(texts, Set | Mapping)
    return isinstance(texts, Iterable) and not (is_table or is_single or has_none)


def batches_by_length(lengths, adapter, batch_size, choose_share=share):
    """Yield (rows, adapters): indices of rows of similar lengths, and their adapters.

    The longest come first: if memory runs out, it does so at once. lengths: of N rows. adapter:
    None, an int, or (N,) long. choose_share: the function that returns this process's share of the
    batches (processes.py). Raise ValueError if there is not one adapter for each row.
    """
    expect(is_integer(batch_size), "batch_size", batch_size, "an integer")
    expect(batch_size >= 1, "batch_size", batch_size, "1 or more")
    if adapter is None:
        adapter = 0
    adapters = as_numbers(adapter)
    is_per_row = adapters.dim() > 0
    if is_per_row and len(adapters) != len(lengths):
        expected = f"expected an adapter for each of {len(lengths)} rows"
        raise ValueError(f"{expected}, found {len(adapters)}")
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    for first in range(0, len(longest_first), batch_size):
        batches.append(longest_first[first : first + batch_size])
    batches = choose_share(batches)
    n_rows = sum(map(len, batches))
    for rows in progress(batches, total=n_rows, size=len):
        yield rows, adapters[rows] if is_per_row else adapters
