"""Read and write trained vectors, put them into rows of a model, merge and mix them.

Words: an *adapter* is one row of all vectors of a model; a *vector* is one (IA)^3 parameter, whose
rows belong to the adapters. In a file there is one adapter: an `AdapterFile`, whose `vectors` are a
dict from our name of each vector to its entries (D,).

    files        peft_files reads and writes them; vector_names, peft_config: their names and keys
    rows         rows moves them into and out of a model; named_rows gives them names
    weights      merge folds a row into the weights; fold, merge_quantized: one weight at a time
    others       mix makes one adapter out of several; dora writes an adapter as a DoRA
    baseline     lora: what (IA)^3 is compared with

This folder imports `model`, `files` and `checkpoints`.
"""
