"""The models: everything that runs when a model runs, and nothing else.

Read in this order: `ia3` (the method), `blocks` (attention, feed-forward and block, with (IA)^3 in
its three places), `attend` (attention itself), `t5` and `llama` (how blocks become a model),
`sequence_state` (the masks, caches and positions of a running sequence). You can read these without
the other files, which do one of the following:

    save memory or time            packing, recompute, target_logprobs, single_row, static_state,
                                   to_device
    change how a base is kept      quantized, shard
    choose and add vectors         more_vectors, site_names
    tell adapters in a row apart   adapter_rows
    count what a model costs       costs

This folder imports nothing else of minia3.
"""
