"""The models: everything that runs when a model runs, and nothing else.

Read in this order: `ia3` (the method), `blocks` (attention, feed-forward and block, with (IA)^3 in
its three places), `t5` and `llama` (how blocks become a model), `sequence_state` (the masks, caches
and positions of a running sequence). The other files save memory or time (`packing`, `attend`,
`recompute`), add vectors beyond the paper's (`more_vectors`), or count what a model costs
(`costs`). This folder imports nothing else of minia3.
"""
