"""Published models in and out.

A checkpoint is a model on disk. `hub` finds it by a name, a folder or a hub id. `load`, `gguf` and
`meta` read it tensor by tensor from the files of Hugging Face, llama.cpp or Meta, `config` and
`tensor_names` translate its names into ours, and `save` writes a model in the layout of Hugging
Face. `tokenizer` is the tokenizer that comes with a checkpoint, `tokenizer_files` and
`gguf_tokenizer` read it, and `chat` writes conversations for it. `known_models` lists published
models by short names.
"""
