"""The models: everything that runs when a model runs, and nothing else.

Read in this order: `ia3` (the method), `blocks` (attention, feed-forward and block, with (IA)^3 in
its three places), `attend` (attention itself), `sequence_state` (the masks, caches and positions of
a running sequence), `t5` and `llama` (how blocks become a model). The other files can wait: without
padding, `packing` returns what it is given, and recompute(f, x) returns f(x).

    save memory or time                linear, packing, recompute, target_logprobs, single_row,
                                       static_state, to_device, processor
    keep a base in less memory         quantized, shard
    choose and add vectors             more_vectors, site_names
    find out whose adapter a row has   adapter_rows
    count what a model costs           costs

This folder imports nothing else of minia3.
"""
