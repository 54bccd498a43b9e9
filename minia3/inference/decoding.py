"""Decoding: a model continues prompts, token by token.

    generate         whole texts, for many prompts
    stream           the text for one prompt, in pieces, as they come
    decode_tokens    the loop itself: token ids

Both public functions run the same generator of pieces. Rows that have ended leave the batch, a few
at a time. Tokens are drawn in sampling.py, and become text in pieces.py.

Shapes: B batch (of rows that are still being written), M source length, R rows that stay in the
batch, V vocabulary.
"""

import math
import operator
import secrets
import warnings
from contextlib import contextmanager

import numpy as np
import torch

from minia3.files.processes import combine, from_first, share_of_copy
from minia3.inference.beam_search import beam_search
from minia3.inference.options import Options, expect
from minia3.inference.pieces import Text
from minia3.inference.sampling import Sampler
from minia3.inference.scoring import NotFiniteError, batches_by_length, has_order
from minia3.model.adapter_rows import adapter_numbers, find_rows
from minia3.model.shard import is_sharded
from minia3.model.single_row import fast_products
from minia3.model.static_state import Room, StaticState
from minia3.model.to_device import cpu_as_default, to_device
from minia3.tasks.batches import pad

LIST_OF_PROMPTS = "a list of texts, or of lists of ids"

NOT_FINITE = -1  # in place of a token, if a model's scores are NaN or infinite

# Rows that have ended leave the batch together, once they are this share of it. Each time, the
# caches of the other rows are copied, which takes about as long as a few steps of those that leave.
LEAVES_AT = 1 / 8


def generate(  # noqa: PLR0913 (the contract)
    model,
    tokenizer,
    prompts,
    *,
    adapter=None,
    max_new_tokens=64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    beams=1,
    length_penalty=1.0,
    samples=1,
    stop=(),
    seed=None,
    batch_size=16,
    compile=False,
):
    """Return `samples` texts for each of N prompts: all texts of the first prompt, then the second.

    prompts: texts, or lists of ids. Instead of a list, it may be a tensor (without padding, because
    all its ids are read), an array of NumPy or a column of pandas. adapter: None (row 0), an int,
    or (N,) long. A text ends before an end token (see `end_ids_of`), before the first of the `stop`
    texts (one or several), or after `max_new_tokens`. A stop text may be a special token, but not a
    special token and other text. `decoder_after` says when a text may begin with a space.

    temperature 0 takes the likeliest token at each step. Above 0, tokens are drawn: see
    `draw_tokens` (sampling.py), also for top_k and top_p. What is drawn depends on `seed` (None: a
    new one), on the index of the prompt and on the index of the sample, but not on the batch.

    beams: if there are more than 1, a beam search finds the texts, and its best texts are the
    samples. See `beam_search`, also for length_penalty.

    batch_size: rows per step. The samples or beams of one prompt always stay together, so a batch
    has more rows if a single prompt has more samples or beams.

    compile: compile a step of the whole model, for a GPU (see `decode_compiled`). This takes a
    minute for each new shape of a batch (its rows, and its tokens, rounded up), and writes the same
    tokens. The memory of the largest batch stays with the model for the next ones.

    Raise ValueError if an option is out of its range, if `prompts` is a single text, a set, a dict
    or a table, if a prompt has no tokens or an id that the model does not know, if the model's
    scores are not finite, or if a step of a divided model (shard.py) is to be compiled.
    """
    expect(has_order(prompts), "prompts", prompts, LIST_OF_PROMPTS)
    prompts = list(prompts)  # they are read several times, and may come from a generator
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        length_penalty=length_penalty,
        samples=samples,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        compile=compile,
    )
    return generate_texts(model, tokenizer, prompts, adapter, options)


def generate_texts(model, tokenizer, prompts, adapter, options, cut=None):
    """Return what `generate` returns. options: an Options. cut: see `generate_pieces`."""
    # This checks the options.
    pieces = generate_pieces(model, tokenizer, prompts, adapter, options, cut)
    n_texts = len(prompts) * options.samples
    texts = [""] * n_texts
    for i, piece in pieces:
        texts[i] += piece
    if cut is not None:
        cut.update(combine(set.union, cut))  # those that other processes have cut
    return combine(join_texts, texts)


def join_texts(texts, other_texts):
    """Return each of N texts from the process that has written it. Others have an empty one."""
    return [text or other for text, other in zip(texts, other_texts, strict=True)]


def stream(  # noqa: PLR0913 (the contract)
    model,
    tokenizer,
    prompt,
    *,
    adapter=None,
    max_new_tokens=64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    stop=(),
    seed=None,
    compile=False,
):
    """Return an iterator of the pieces of the text for one prompt, as they come.

    Joined, they are the text that `generate` returns; arguments and errors are the same. A piece is
    final: text that may be the beginning of a stop text is held back, and so is a character whose
    bytes are split over several tokens, until all of them have come.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        seed=seed,
        compile=compile,
    )
    pieces = generate_pieces(model, tokenizer, [prompt], adapter, options)
    return (piece for _, piece in pieces if piece)


def generate_pieces(model, tokenizer, prompts, adapter, options, cut=None):
    """Check the arguments now, and return an iterator of (index of a text, a piece of it).

    The pieces of each text come in order; pieces of different texts alternate.

    cut: a set to which this adds the index of each text that `max_new_tokens` has cut. (A beam
    search does not tell which of its texts were cut, so the set is not for beams.)
    """
    options.check()
    if options.first_prompt == 0:  # once, however many batches the command answers
        options.warn_of_idle()
    if options.compile and is_sharded(model):
        raise ValueError(
            "compile cannot be combined with --shard or --offload, because compiled code would "
            "gather the blocks again and again: leave out one of them"
        )
    sources = encode_prompts(prompts, tokenizer, model.embed.num_embeddings, options.first_prompt)
    find_rows(adapter_numbers(adapter, len(sources)), model)
    cut = set() if cut is None else cut
    decoders = []
    for prompt, source in zip(prompts, sources, strict=True):
        decoders.append(decoder_after(prompt, source, tokenizer))
    end_ids = end_ids_of(model, tokenizer, options.stops)
    warn_of_hidden_stops(tokenizer, options.stops, end_ids)
    pieces = generate_in_batches(model, sources, decoders, end_ids, adapter, options, cut)
    return made_on_cpu(pieces)


def made_on_cpu(pieces):
    """Yield from `pieces` with the CPU as torch's default device.

    Between two pieces, the default device is the user's.
    """
    while True:
        with cpu_as_default():
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def encode_prompts(prompts, tokenizer, n_ids, first_prompt=0):
    """Return the ids of each prompt, which is a text or ids already.

    Raise ValueError if a prompt is neither, has no tokens, or has an id that is not one of the
    model's. first_prompt: see `Options`.
    """
    is_one_prompt = any(isinstance(prompt, int) for prompt in prompts)
    expect(not is_one_prompt, "prompts", prompts, LIST_OF_PROMPTS)
    sources = []
    wrong = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            # A tokenizer of another package has only `encode`.
            encode = getattr(tokenizer, "encode_prompt", tokenizer.encode)
            ids = encode(prompt)
        else:
            ids = as_ids(prompt, first_prompt + i)
        if not ids or min(ids) < 0 or max(ids) >= n_ids:
            wrong.append(first_prompt + i)
        sources.append(ids)
    if wrong:
        raise ValueError(f"prompts {wrong} have no tokens, or ids outside 0 to {n_ids - 1}")
    return sources


def as_ids(prompt, index):
    """Return the ids of a prompt that is not a text. Raise ValueError if they are not integers."""
    try:
        if not isinstance(prompt, bytes):  # whose numbers are not ids
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise ValueError(f"prompt {index} is {prompt!r:.40}, expected a text or a list of ids")


def end_ids_of(model, tokenizer, stops=()):
    """Return the ids that end a text: those that the model's files name, the tokenizer's eos, and
    those of the stop texts that are special tokens.

    The first two may differ, such as in a merge of a base and a chat model. A model that has
    learned targets ends its texts with the eos of the tokenizer, because the targets end with it.
    A special token is in no text, because `decode` drops it, so it is found by its id. White space
    around it does not count: people copy "<|im_end|>\\n" from a chat template.
    """
    end_ids = list(model.config.eos_ids)
    eos_id = getattr(tokenizer, "eos_id", None)  # prompts of ids need only its `decode`
    if eos_id is not None:
        end_ids.append(eos_id)
    names = {*stops, *map(str.strip, stops)}
    if stops:
        end_ids += [i for i, name in special_tokens_of(tokenizer).items() if name in names]
    return tuple(dict.fromkeys(end_ids))


def special_tokens_of(tokenizer):
    """Return a dict from the id of each special token to its name. Texts never contain them.

    A tokenizer of another package may have nothing but `decode`. Then the dict is empty.
    """
    backend = getattr(tokenizer, "backend", None)
    if not hasattr(backend, "get_added_tokens_decoder"):  # transformers has a text of this name
        return {}
    tokens = backend.get_added_tokens_decoder()
    return {i: token.content for i, token in tokens.items() if token.special and token.content}


def warn_of_hidden_stops(tokenizer, stops, end_ids):
    """Warn of stop texts that are never found: those with a special token and other text."""
    for stop in stops:
        for i, name in special_tokens_of(tokenizer).items():
            if name in stop and i not in end_ids:
                warnings.warn(
                    f"stop is {stop!r:.80}, but {name!r} is a special token, which is in no text: "
                    f"give {name!r} alone, and texts end before it",
                    stacklevel=1,
                )


def decoder_after(prompt, source, tokenizer):
    """Return the function that makes a text of the ids that follow a prompt.

    A text is continued, so that it and what `generate` returns are one text when they are joined.
    A list of ids is often a chat, whose answer is a text of its own, without a space before it.
    source: the ids of the prompt.
    """
    is_continued = isinstance(prompt, str) and tokenizer.decode(source) != ""
    if is_continued:  # a tokenizer of another package has only `decode`
        return getattr(tokenizer, "decode_continuation", tokenizer.decode)
    return tokenizer.decode


def generate_in_batches(model, sources, decoders, end_ids, adapter, options, cut):
    """Yield (index of a text, a piece of it), one batch of sources after the other.

    decoders: for each source, see `decoder_after`.
    """
    device = model.embed.weight.device
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if is_sharded(model):  # its processes must write the same texts, because they compute together
        seed = from_first(seed)
    n_sources = max(1, options.batch_size // max(options.beams, options.samples))
    lengths = [len(source) for source in sources]
    # A step is compiled for a number of rows, so the last batch gets that of those before it.
    is_filled = options.compile and (options.first_prompt > 0 or len(sources) > n_sources)
    for batch, adapters in batches_by_length(lengths, adapter, n_sources, share_of_copy):
        n_rows = len(batch) * options.samples
        if is_filled:
            batch, adapters = with_copies(batch, adapters, n_sources)
        source_BM, mask_BM = pad([sources[i] for i in batch])
        if mask_BM.all():
            mask_BM = None
        # Row r of the batch writes the text with the index numbers[r].
        numbers = []
        for i in batch:
            numbers += range(i * options.samples, (i + 1) * options.samples)
        texts = [Text(decoders[i // options.samples], options.stops) for i in numbers]
        ended = set(range(n_rows, len(numbers)))  # those of the copies
        with decoding_modes():
            state = model.start(to_device(source_BM, device), mask_BM, adapters)
        tokens = generate_tokens(model, state, numbers, seed, ended, end_ids, options)
        del state  # or its keys and values would stay in memory beside the copies of them
        try:
            for row, token in tokens:
                yield numbers[row], texts[row].add(token)
                if texts[row].is_stopped:
                    ended.add(row)
        except NotFiniteError as error:
            index = numbers[error.index] // options.samples
            raise NotFiniteError(f"prompt {options.first_prompt + index}", index) from None
        cut.update(number for row, number in enumerate(numbers) if row not in ended)
        for number, text in zip(numbers, texts, strict=True):
            yield number, text.finish()  # that of a copy is empty


def with_copies(batch, adapters, n_sources):
    """Return a batch of sources and their adapters, with copies of the last source at its end.

    n_sources: how many sources the batch has then. adapters: one for all, or (N,).
    """
    n_copies = n_sources - len(batch)
    places = [*range(len(batch)), *[len(batch) - 1] * n_copies]
    if adapters.dim() > 0:
        adapters = adapters[places]
    return [batch[i] for i in places], adapters


def generate_tokens(model, state, numbers, seed, ended, end_ids, options):
    """Return an iterator of (row, token) for a batch, by a beam search, greedily or by drawing.

    state: the state of the batch's sources; each source becomes options.samples rows. numbers: the
    index of the text of each row. ended: the set of rows that are no longer continued.
    """
    if options.beams > 1:
        return search_tokens(model, state, end_ids, options)
    sampler = None
    if options.temperature > 0:
        # NumPy's streams, because NumPy keeps them the same in all versions.
        streams = []
        for number in numbers:
            prompt, sample = divmod(number, options.samples)
            index = options.first_prompt + prompt
            streams.append(np.random.RandomState([seed, index, sample]))
        sampler = Sampler(streams, options)
    rows = state.repeat(options.samples)
    decode = decode_compiled if options.compile else decode_tokens
    return decode(model, rows, options.max_new_tokens, ended, sampler, end_ids)


def search_tokens(model, state, end_ids, options):
    """Yield (row, token) of the best texts of a beam search, one text after the other."""
    try:
        searched = beam_search(
            model, state, options.beams, options.max_new_tokens, options.length_penalty, end_ids
        )
    except NotFiniteError as error:
        row = error.index * options.samples  # the first text of this prompt
        raise NotFiniteError(f"text {row}", row) from None
    row = 0
    for texts in searched:
        for ids in texts[: options.samples]:
            for token in ids:
                yield row, token
            row += 1


def decode_tokens(model, state, max_new_tokens, ended, sampler=None, end_ids=None):
    """Yield (row, token) for all rows of `state`, step by step.

    sampler: a Sampler; None: take the likeliest token. end_ids: the end tokens; None: those of the
    model. An end token is not yielded; instead, its row is added to the set `ended`. The caller may
    add rows, too. Rows in `ended` yield nothing, and once they are an eighth of the batch, they
    leave it.
    """
    end_ids = model.config.eos_ids if end_ids is None else end_ids
    rows = list(range(len(state.start)))
    tokens_B1 = state.start
    for _ in range(max_new_tokens):
        kept = [i for i, row in enumerate(rows) if row not in ended]
        if not kept:
            return
        with decoding_modes():
            n_ended = len(rows) - len(kept)
            if n_ended > 0 and n_ended >= LEAVES_AT * len(rows):
                rows = [rows[i] for i in kept]
                kept_R = torch.tensor(kept)
                state = state.select(kept_R)
                tokens_B1 = tokens_B1[to_device(kept_R, tokens_B1.device)]

            with fast_products(len(rows), model.embed.weight):
                logits_BV = model.step(tokens_B1, state)[:, -1].float()
            tokens_B1 = choose_tokens(logits_BV, rows, sampler)
            pairs = read_tokens(tokens_B1, logits_BV, rows, ended)
        yield from without_end_tokens(pairs, end_ids, ended)


@contextmanager
def decoding_modes():
    """Run a step without gradients, and outside of inference mode.

    The caller of a generator may be in another mode at each step, and a tensor that was made in
    inference mode cannot be changed outside of it. So a generator enters these modes for each step.
    Decorators of the generator would keep its arguments until it ends, and with them the keys and
    values of rows that have left the batch.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def decode_compiled(model, state, max_new_tokens, ended, sampler=None, end_ids=None):
    """Yield what `decode_tokens` yields, from a compiled step with static shapes (static_state.py).

    Rows that have ended stay in the batch, because its shape must not change. The next batch uses
    the same memory (see `Room`).
    """
    end_ids = model.config.eos_ids if end_ids is None else end_ids
    max_length = getattr(model.config, "max_length", math.inf)  # beyond which a LLaMA warns
    rows = list(range(len(state.start)))
    numbers = state.adapter_numbers
    step = model.step
    tokens_B1 = state.start
    with Room.borrow(model) as room:
        for n_written in range(max_new_tokens):
            if len(ended) == len(rows):
                return
            with decoding_modes():
                if n_written == 1:  # the first step was a plain one, and has made the caches
                    state = StaticState.make(state, max_new_tokens - 1, room, max_length)
                    step = compile_step(model, state)

                logits_BV = step(tokens_B1, state)[:, -1].float()
                find_rows(numbers, model)  # another thread may have removed an adapter meanwhile
                tokens_B1 = choose_tokens(logits_BV, rows, sampler)
                if n_written > 0:
                    state.advance()
                pairs = read_tokens(tokens_B1, logits_BV, rows, ended)
            yield from without_end_tokens(pairs, end_ids, ended)


def compile_step(model, state, backend="inductor"):
    """Return `model.step`, compiled for a StaticState. On CUDA, it is a CUDA graph."""
    import torch._dynamo  # imported late, because it takes seconds

    # torch compiles a step for each shape of a batch. Beyond a limit, it compiles no more.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for x in state.tensors_that_stay():
        # Otherwise torch would copy them before each step, or not use a CUDA graph at all.
        # Another batch has others, for which the step need not be compiled again.
        torch._dynamo.mark_static_address(x, guard=False)
    options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    return torch.compile(model.step, backend=backend, dynamic=False, **options)


def choose_tokens(logits_BV, rows, sampler):
    """Return the next tokens (B, 1): the likeliest ones, or those that `sampler` draws."""
    if sampler is None:
        # argmax returns the same, but takes 1.6 times as long on a CPU.
        return logits_BV.max(dim=-1, keepdim=True).indices
    return sampler.draw(logits_BV, rows)


def read_tokens(tokens_B1, logits_BV, rows, ended):
    """Return (row, token) for the rows of the batch that are not in `ended`.

    Raise NotFiniteError if the best logit of one of them is not finite. It is NaN if any logit is.
    (A logit of -inf alone is a token that a model rules out.)

    This is all that a step reads from a GPU, and it reads once, because the GPU waits meanwhile. So
    a mark in place of the token says that the logit is not finite.
    """
    is_finite_B1 = logits_BV.amax(dim=-1, keepdim=True).isfinite()
    tokens = tokens_B1.masked_fill(~is_finite_B1, NOT_FINITE)[:, 0].tolist()
    found = []
    for row, token in zip(rows, tokens, strict=True):
        if row in ended:
            continue
        if token == NOT_FINITE:
            raise NotFiniteError(f"text {row}", row)
        found.append((row, token))
    return found


def without_end_tokens(pairs, end_ids, ended):
    """Yield the pairs (row, token) without end tokens, and add the rows that end to `ended`."""
    for row, token in pairs:
        if token in end_ids:
            ended.add(row)
        else:
            yield row, token
