"""Published models in and out.

A checkpoint is found here by its name, folder or hub id (`hub`), read tensor by tensor from Hugging
Face's, llama.cpp's or Meta's files (`load`, `gguf`, `meta`), given our names (`tensor_names`,
`config`) and put into a model. The way back is `save`. The tokenizer that belongs to a model is
read here, too. `known_models` lists models by short names.
"""
