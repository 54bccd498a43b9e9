"""Read and write trained vectors, put them into rows of a model, merge and mix them.

Words: an *adapter* is one row of all vectors of a model; a *vector* is one (IA)^3 parameter, whose
rows belong to the adapters. In a file there is one adapter: an `AdapterFile`, whose `vectors` are a
dict from our name of each vector to its entries (D,).

`vector_names` has the tables of names, `peft_files` reads and writes files, `rows` moves them into
and out of a model, `named_rows` gives the rows names, `merge` folds a row into the weights, `mix`
makes one adapter out of several, and `lora` is the baseline that (IA)^3 is compared with. This
folder imports `model`, `files` and `checkpoints`.
"""
