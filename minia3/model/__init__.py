"""The models: everything that runs when a model runs, and nothing else.

Read in this order: `ia3` (the method), `blocks` (attention, feed-forward and block, with (IA)^3 in
its three places), `attend` (attention itself), `sequence_state` (the masks, caches and positions of
a running sequence), `t5` and `llama` (how blocks become a model). The other files can wait: without
padding, `packing` returns what it is given, and `Linear` computes what nn.Linear does.

    save memory or time                activations, linear, packing, recompute, gated_hidden,
                                       plain_attention, exact_products, target_logprobs,
                                       single_row, huge_pages, static_state, to_device, processor
    keep a base in less memory         quantized, shard
    choose and add vectors             more_vectors, site_names
    check that a row kept its adapter  adapter_rows
    count what a model costs           costs

A tensor's name ends in its shape: x_BLD has axes of the sizes B, L and D, and a 1 is an axis of
size one (cos_B1LK). The top of each file explains its letters. A letter may also be 1 if one value
serves all: adapter_B is (1,) if the whole batch uses one adapter. The *head* of a model makes
logits; the *heads* (H, G) are those of attention.

This folder imports nothing else of minia3.
"""
