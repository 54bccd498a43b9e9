"""Checks that compute the same in two ways on a device. Each returns its figures, as a dict.

Shapes: B batch, L query length, M memory length, H query heads, G key/value heads, K head width.
"""

import functools
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import minia3
from minia3.inference.decoding import generate
from minia3.model.attend import attend
from minia3.model.blocks import Block
from minia3.model.sequence_state import Context
from minia3.model.to_device import side_stream, to_device
from minia3.training.optimizer import Adafactor
from tests.benchmarks.inference import Ids
from tests.gpu.place import expect_at_most, off

NAMES = ("t5-base", "smollm2-135m")
LENGTHS = (40, 77, 128, 300)
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def precision(place):
    """bfloat16's losses and gradients are float32's up to rounding, and those are the CPU's."""
    figures = {}
    for name in NAMES:
        single = place.model(name, torch.float32)
        batch = place.batch(single, LENGTHS)
        loss, gradient = place.gradients(single, batch)
        on_cpu = single.to("cpu")
        loss_of_cpu, gradient_of_cpu = place.gradients(on_cpu, batch)
        half = place.model(name, torch.bfloat16)
        loss_of_half, gradient_of_half = place.gradients(half, batch)
        figures[name] = {
            "loss": loss,
            "loss in bfloat16": loss_of_half,
            "float32 against the CPU": off(gradient, gradient_of_cpu),
            "bfloat16 against float32": off(gradient_of_half, gradient),
        }
        expect_at_most(abs(loss - loss_of_cpu) / abs(loss), 1e-4, f"{name}, float32 loss")
        expect_at_most(off(gradient, gradient_of_cpu), 1e-3, f"{name}, float32 gradients")
        expect_at_most(abs(loss - loss_of_half) / abs(loss), 0.02, f"{name}, bfloat16 loss")
        expect_at_most(off(gradient_of_half, gradient), 0.15, f"{name}, bfloat16 gradients")
    return figures


def training(place):
    """Forty steps in bfloat16 end where forty steps in float32 end, up to rounding."""
    figures = {}
    n_steps = 4 if place.is_dry else 40
    for name in NAMES:
        losses = {}
        for title, dtype in DTYPES.items():
            model = place.model(name, dtype)
            batch = place.batch(model, LENGTHS)
            optimizer = Adafactor(minia3.vectors(model).values(), lr=3e-3)
            first, _ = place.gradients(model, batch)
            for _ in range(n_steps):
                last, _ = place.gradients(model, batch)
                optimizer.step()
            losses[title] = {"first": first, "last": last}
        figures[name] = losses
        fall = losses["float32"]["first"] - losses["float32"]["last"]
        difference = abs(losses["float32"]["last"] - losses["bfloat16"]["last"])
        expect_at_most(0.0, fall, f"{name}: the loss rises, and its fall")
        expect_at_most(difference, 0.1 * fall + 0.02, f"{name}: bfloat16's last loss")
    return figures


def waiting(place):
    """A whole step of training runs while CUDA refuses every operation that waits for it."""
    for name in NAMES:
        model = place.model(name, torch.bfloat16)
        batch = place.batch(model, LENGTHS)
        rows = torch.zeros(len(LENGTHS), dtype=torch.long)
        optimizer = Adafactor(minia3.vectors(model).values(), lr=3e-3)
        place.gradients(model, batch)  # the first step sets up kernels, and may wait
        if place.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            logp_BCL = minia3.choice_logprobs(model, batch, rows)
            minia3.total_loss(
                logp_BCL, batch.target_mask_BCL, batch.label_B, n_terms={"lm": 9, "ul": 9, "ln": 4}
            ).backward()
            optimizer.step()
        finally:
            if place.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {"steps that waited": 0}


def copies(place):
    """Copies arrive while the device computes, and none is overwritten before it was read."""
    n_copies = 8 if place.is_dry else 200
    width = 64 if place.is_dry else 4096
    x_WW = torch.ones(width, width, device=place.device)
    is_right = []
    for i in range(n_copies):
        x_WW = x_WW @ x_WW / width  # so that the device is busy when the next copy is asked for
        copy = to_device(torch.full((1 << 16,), i), x_WW.device)
        is_right.append((copy == i).all())
        del copy  # from here on, another copy may get its memory
    arrived_first = None
    if place.device.type == "cuda":
        side_stream(x_WW.device).synchronize()
        arrived_first = not torch.cuda.current_stream(x_WW.device).query()
        if not arrived_first:
            raise AssertionError("the copies were made after what was computed before them")
    n_wrong = n_copies - int(torch.stack(is_right).sum())
    expect_at_most(n_wrong, 0, "copies with wrong values")
    return {"copies": n_copies, "all of them before the last product": arrived_first}


def attention(place):
    """Every kernel gives the numbers of the plain one, with T5's bias, LLaMA's mask, and dropout.

    A kernel may refuse a case (flash refuses every bias). Then PyTorch takes another one.
    """
    figures = {}
    for title, arguments in cases(place).items():
        expected = outputs("math", arguments, dropout=0.0)
        figures[title] = {}
        for kernel in KERNELS:
            for dropout in (0.0, 0.1):
                label = f"{kernel}, dropout {dropout}"
                try:
                    found = outputs(kernel, arguments, dropout)
                except RuntimeError:
                    figures[title][label] = "refused"
                    continue
                difference = max(map(off, found, expected))
                figures[title][label] = difference
                # 64 draws of dropout, whose mean is the value without it
                most = 0.15 if dropout else 0.03
                expect_at_most(difference, most, f"attention, {title}, {label}")
    return figures


def fused(place):
    """Training and decoding call no attention that PyTorch does not fuse.

    An unfused one keeps the scores of all pairs of tokens, in float32.
    """
    kernels = list(KERNELS.values())
    if not place.is_dry:  # a CPU fuses less
        kernels.remove(SDPBackend.MATH)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7]]
    with sdpa_kernel(kernels):
        for name in NAMES:
            for dtype in DTYPES.values():
                model = place.model(name, dtype)
                for n_choices in (1, 2):
                    place.gradients(model, place.batch(model, LENGTHS, n_choices))
                generate(model, Ids(), prompts, max_new_tokens=4)
    return {"calls that are not fused": 0}


def cases(place):
    """Return name -> the arguments of `attend`, at lengths that suit no kernel especially."""
    generator = torch.Generator(place.device).manual_seed(0)

    def random(*shape):
        values = torch.empty(shape, device=place.device).normal_(generator=generator)
        return values.to(torch.bfloat16).requires_grad_()

    mask_B11M = torch.arange(93, device=place.device) < 70
    bias_BHLM = random(1, 12, 77, 93).detach().masked_fill(~mask_B11M, float("-inf"))
    q_BHLK = random(4, 12, 77, 64)
    memory = (random(4, 12, 93, 64), random(4, 12, 93, 64))
    shared = (random(4, 3, 77, 64), random(4, 3, 77, 64))
    return {
        "T5's bias": {"qkv": (q_BHLK, *memory), "bias": bias_BHLM, "scale": 1 / 8},
        "LLaMA's causal mask": {"qkv": (q_BHLK, *shared), "is_causal": True, "scale": 1 / 8},
    }


def outputs(kernel, arguments, dropout):
    """Return the output of a kernel and the gradients of its inputs; with dropout, means of 64."""
    arguments = dict(arguments)
    qkv = arguments.pop("qkv")
    bias = arguments.pop("bias", None)
    is_causal = arguments.pop("is_causal", False)
    context = Context(None, bias_BHLM=bias, is_causal=is_causal)
    n_draws = 64 if dropout else 1
    total = None
    for draw in range(n_draws):
        torch.manual_seed(draw)
        with sdpa_kernel(KERNELS[kernel]):
            out_BHLK = attend(*qkv, context, dropout=dropout, **arguments)
            gradients = torch.autograd.grad(out_BHLK.float().sin().sum(), qkv)
        # The gradients of a sine have no simple mean under dropout, so they are only compared
        # without it.
        found = [out_BHLK.detach().float()]
        if not dropout:
            found += [gradient.float() for gradient in gradients]
        sums = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        total = sums
    return [x / n_draws for x in total]


def compiled(place):
    """Blocks that torch.compile has compiled have the gradients of plain ones."""
    names = NAMES[:1] if place.is_dry else NAMES  # because even a dry run traces for seconds
    return {name: compiled_model(name, place) for name in names}


def compiled_model(name, place):
    model = place.model(name, torch.bfloat16)
    if place.is_dry:
        for module in model.modules():
            if hasattr(module, "blocks"):
                module.blocks = module.blocks[:1]  # each block is traced by itself, in seconds
    batch = place.batch(model, LENGTHS)

    def step():
        return place.gradients(model, batch)

    n_steps = 1 if place.is_dry else 10
    loss, gradient = step()
    seconds = {"plain": seconds_of(step, place, n_steps)}
    # The compiler takes three times as long for a graph that is for all lengths.
    options = {"dynamic": True}
    if place.is_dry:
        options = {"dynamic": False, "backend": "eager"}
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(**options)
    loss_of_compiled, gradient_of_compiled = step()
    seconds["compiled"] = seconds_of(step, place, n_steps)
    torch.compiler.reset()

    difference = off(gradient_of_compiled, gradient)
    expect_at_most(difference, 0.15, f"{name}, gradients of compiled blocks")
    expect_at_most(abs(loss - loss_of_compiled) / abs(loss), 0.02, f"{name}, compiled loss")
    return {"seconds of a step": seconds, "gradients": difference}


def cuda_graphs(place):
    """Decoding with static shapes, as a CUDA graph, writes the tokens of plain decoding."""
    return {name: decoded_as_graph(name, place) for name in NAMES}


def decoded_as_graph(name, place):
    from torch._dynamo.utils import counters

    model = place.model(name, torch.float32)
    prompt = [5, 6, 7, 8, 9] * 5
    shorter = [9, 8, 7] * 7  # its columns are as many, because they are rounded up
    n_tokens = 8 if place.is_dry else 64
    texts = {}
    tokens_per_second = {}
    n_recorded = []
    counters.clear()
    for title, is_compiled in {"plain": False, "compiled": not place.is_dry}.items():
        options = {"max_new_tokens": n_tokens, "compile": is_compiled}
        write = functools.partial(generate, model, Ids(), **options)
        texts[title] = write([prompt])  # compiles
        n_recorded.append(counters["inductor"]["cudagraph_recorded_non_static_inputs"])
        texts[title] += write([shorter])
        n_written = len(texts[title][0].split())
        seconds = seconds_of(functools.partial(write, [prompt]), place, 3)
        tokens_per_second[title] = n_written / seconds
    # Only the tokens are no static input, so this counts the graphs.
    n_again = counters["inductor"]["cudagraph_recorded_non_static_inputs"] - n_recorded[-1]
    n_skipped = counters["inductor"]["cudagraph_skips"]
    torch.compiler.reset()

    if texts["compiled"] != texts["plain"]:
        raise AssertionError(f"{name}: {texts}")
    if place.device.type == "cuda":
        expect_at_most(n_skipped, 0, f"{name}: steps that were not a CUDA graph")
        expect_at_most(n_again, 0, f"{name}: graphs that were recorded again")
    return {
        "tokens/s": tokens_per_second,
        "graphs that were skipped": n_skipped,
        "graphs that were recorded again": n_again,
    }


def seconds_of(function, place, n_calls):
    """Return the seconds of a call."""
    place.finish()
    start = time.perf_counter()
    for _ in range(n_calls):
        function()
    place.finish()
    return (time.perf_counter() - start) / n_calls
