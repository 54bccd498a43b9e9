"""Time attention on a CPU as PyTorch has it and as minia3 writes it, as a Markdown table.

python -m tests.benchmarks.attention --threads 1
python -m tests.benchmarks.attention --threads 1 --dtype float32 --dropout 0.1

Each row is the self-attention of one layer, or the cross-attention of a T5, on eight texts: a
forward and a backward pass, or only one of them. The two take turns, and the table has medians. The
forward pass is PyTorch's own on both sides if there is no dropout and the products would be slower
on this processor. A forward pass on its own records no gradients.
"""

import argparse
import statistics
import time

import torch

from minia3.model import attend, plain_attention

N_TEXTS = 8
# name: query heads, key/value heads, their width, queries, tokens that are seen
SHAPES = {
    "t5-base, 64 tokens": (12, 12, 64, 64, 64),
    "t5-base, 128": (12, 12, 64, 128, 128),
    "t5-base, 180": (12, 12, 64, 180, 180),
    "t5-base, 256": (12, 12, 64, 256, 256),
    "t5-base, 512": (12, 12, 64, 512, 512),
    "t5-base, 8 queries to 128": (12, 12, 64, 8, 128),
    "SmolLM2, 64 tokens": (9, 3, 64, 64, 64),
    "SmolLM2, 135": (9, 3, 64, 135, 135),
    "SmolLM2, 200": (9, 3, 64, 200, 200),
    "SmolLM2, 256": (9, 3, 64, 256, 256),
}


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch chooses)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--only", choices=["forward", "backward"], help="time one pass alone")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"| eight texts, {args.dtype} | PyTorch | plain products | share |")
    print("|---|---|---|---|")
    for name, shape in SHAPES.items():
        inputs = make_inputs(shape, getattr(torch, args.dtype))
        theirs, ours = compare(inputs, args)
        print(f"| {name} | {theirs * 1e3:.1f} ms | {ours * 1e3:.1f} ms | {ours / theirs:.2f} |")


def make_inputs(shape, dtype):
    """Return queries, keys, values, a bias as T5 has it (None for a LLaMA), and is_causal."""
    n_heads, n_kv_heads, d_head, n_queries, n_columns = shape
    torch.manual_seed(0)

    def heads(n_tokens, n):
        x_BLHK = torch.randn(N_TEXTS, n_tokens, n, d_head).to(dtype)
        return x_BLHK.transpose(1, 2).requires_grad_()

    qkv = [heads(n_queries, n_heads), heads(n_columns, n_kv_heads), heads(n_columns, n_kv_heads)]
    is_llama = n_kv_heads < n_heads
    bias = None
    if not is_llama:
        bias = torch.randn(1, n_heads, n_queries, n_columns).to(dtype)
    return *qkv, bias, is_llama


def compare(inputs, args):
    """Return the seconds of PyTorch and of minia3: medians over the rounds."""
    scale = inputs[0].shape[-1] ** -0.5
    options = (args.dropout, scale)
    seconds = {}
    for _ in range(1 + args.rounds):
        for function in (by_pytorch, plain_attention.attend_by_products):
            n = time_passes(function, (*inputs, *options), args.only)
            seconds.setdefault(function, []).append(n)
    return [statistics.median(times[1:]) for times in seconds.values()]


def by_pytorch(*args):
    """Return what `fused` returns without our own attention."""
    chosen = attend.products_are_faster
    attend.products_are_faster = lambda *_: False
    try:
        return attend.fused(*args)
    finally:
        attend.products_are_faster = chosen


def time_passes(attention, inputs, only):
    """Return the seconds of a forward and a backward pass. only: "forward", "backward" or None."""
    start = time.perf_counter()
    with torch.set_grad_enabled(only != "forward"):
        out_BHLK = attention(*inputs)
    if only == "forward":
        return time.perf_counter() - start
    if only == "backward":
        start = time.perf_counter()
    torch.autograd.grad(out_BHLK, inputs[:3], torch.ones_like(out_BHLK))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
