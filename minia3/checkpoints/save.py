"""To be written."""

from huggingface_hub import split_state_dict_into_shards_factory as split
from safetensors.torch import save_file

from minia3.checkpoints.config import to_hf
from minia3.checkpoints.known_models import base_of, known_model
from minia3.checkpoints.tensor_names import name_table
from minia3.files.write import write_json, writing_folder

SHARD_BYTES = 5 * 10**9
STALE = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "chat_template.jinja",
)  # what an older checkpoint may have left


def save_model(model, folder, tokenizer=None):
    """Write the base weights (no vectors) in the Hugging Face layout, as transformers reads it.

    Weights go in shards of 5 GB at most; with `tokenizer`, its files too. See `files.writing_folder` for what is there.
    """
    theirs = {ours: name for name, ours in name_table(model).items()}
    parts = [
        (theirs[ours], p.nbytes, p.detach) for ours, p in model.named_parameters() if ours in theirs
    ]
    with writing_folder(folder, replaces=STALE) as temporary:
        save_others(temporary, model, model.embed.weight.dtype, tokenizer)
        save_tensors(temporary, parts)


def save_others(folder, model, dtype, tokenizer):
    """Write config.json, generation_config.json and the files of a tokenizer, which may be None."""
    raw, name = (
        to_hf(model.config, dtype),
        getattr(model, "name_or_path", getattr(model, "made_of", None)),
    )
    if name and known_model(
        base := base_of(name)
    ):  # so that it is asked in the words that the base knows
        raw["_name_or_path"] = str(base)
    ids = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
    write_json(folder / "config.json", raw)
    write_json(
        folder / "generation_config.json",
        {key: raw[key] for key in ids if raw.get(key) is not None},
    )
    if tokenizer is not None:
        tokenizer.save(folder)


def save_tensors(folder, parts):
    """Write parts (name, number of bytes, function -> tensor) in shards, of which one at a time is in memory."""

    parts = {name: (n_bytes, read) for name, n_bytes, read in parts}
    options = {
        "filename_pattern": "model{suffix}.safetensors",
        "get_storage_size": lambda part: part[0],
    }
    shards = split(parts, max_shard_size=SHARD_BYTES, **options)
    for file, shard in shards.filename_to_tensors.items():
        save_file(
            {name: parts[name][1]().contiguous() for name in shard}, folder / file, {"format": "pt"}
        )
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
