"""python -m minia3 info NAME_OR_PATH: what a model is, what an adapter of it weighs, and what it takes to run it."""

import sys

from minia3.flags import Parser

EXAMPLE = "for example: python -m minia3 info t5-base"


def info(name_or_path, batch=8, length=128, target=8):
    """Yield (title, text) lines about a model from its config alone; a known name needs no network.

    batch, length, target: of the training step whose memory is estimated. Raises ValueError for a name that leads
    nowhere, and for a model that minia3 does not run.
    """
    import torch
    from safetensors.torch import save

    from minia3 import files
    from minia3.adapters import adapter_tensors
    from minia3.ia3 import vectors
    from minia3.load import build, place, read_config
    from minia3.models import known
    from minia3.t5 import T5Config

    row = known(name_or_path)
    c = row.config if row else read_config(files.find(name_or_path, weights=False))
    model = build(c)
    adapter = sum(vector.numel() for vector in vectors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapter
    is_t5 = isinstance(c, T5Config)
    heads = f"{c.n_heads} heads" + ("" if is_t5 else f", {c.n_kv_heads} of keys and values,")
    forward = (f"gated {c.activation}" if c.gated else c.activation) if is_t5 else "gated silu"
    yield "model", row.repo if row else str(name_or_path)
    yield (
        "architecture",
        ("T5, encoder-decoder" if is_t5 else "LLaMA, decoder-only")
        + (", a head of its own" if c.own_head else ", its embedding is its head"),
    )
    yield "layers", f"{c.n_layers} encoder, {c.n_decoder_layers} decoder" if is_t5 else str(c.n_layers)
    yield "widths", f"model {c.d_model}, {heads} of {c.d_head}, feed-forward {c.d_ff} ({forward})"
    yield "tokens", f"{c.vocab_size:,}"
    yield "parameters", f"{base:,}"
    yield "adapter", f"{adapter:,} numbers, {adapter / base:.3%} of the base"
    for name, vector in vectors(model).items():
        place(model, f"{name}.scale", torch.ones(vector.shape))
    yield "its file", size(len(save(adapter_tensors(model))))
    for dtype in (torch.float32, torch.bfloat16):
        weights = base * dtype.itemsize
        serve = weights + 4 * adapter
        train = weights + 3 * 4 * adapter + kept_for_backward(c, dtype, batch, length, target)
        yield str(dtype).removeprefix("torch."), f"{size(serve)} to serve, {size(train)} to train"
    yield (
        "",
        "to serve: the weights and an adapter, no caches; to train, at most: also its gradient, Adafactor's state,",
    )
    yield "", f"and what backward needs of {batch} sources of {length} tokens with targets of {target}"


def size(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


def kept_for_backward(config, dtype, batch, length, target):
    """Bytes that autograd keeps of a training step's forward pass, counted on the meta device: nothing is computed.

    Attention is counted with its (B, H, L, M) weights; a fused kernel, where there is one, does not keep them.
    """
    import torch

    from minia3.generation import logprobs
    from minia3.ia3 import freeze
    from minia3.load import build

    model = build(config).to("meta")
    for name, parameter in model.named_parameters():
        if not name.endswith(".scale"):  # vectors stay float32
            parameter.data = parameter.data.to(dtype)
    freeze(model)
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        state = model.start(torch.zeros(batch, length, dtype=torch.long, device="meta"))
        logprobs(model, state, torch.zeros(batch, target, dtype=torch.long, device="meta"))
    return sum(storage.nbytes() for storage in kept.values())


def main(argv=None):
    """-> the exit code: 0, or 2 for a mistake in what was given."""
    parser = Parser(prog="python -m minia3", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what a model is, and what it takes to run it", epilog=EXAMPLE)
    command.add_argument("model", help="known name (t5-base ...), hub id, folder or .gguf file")
    try:
        for title, text in info(parser.parse_args(argv).model):
            print(f"{title:<14}{text}")
    except ValueError as error:
        print(f"minia3: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
