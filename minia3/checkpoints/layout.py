"""The files of a checkpoint's folder, in the layout of Hugging Face.

    config.json                     sizes and features of the model (config.py)
    generation_config.json          token ids that end a text; these win over config.json's
    model.safetensors               all weights, or
    model.safetensors.index.json    the names of the shards, model-00001-of-00002.safetensors ...
    tokenizer.json                  the tokenizer; some of its settings are in other files

A folder with params.json and consolidated.*.pth is in Meta's layout instead (meta.py).
"""

import os
import warnings
from pathlib import Path

from minia3.files.read import broken_link, problem_of_file, read_json, reading

# A folder with either file holds a model: in Hugging Face's layout, or in Meta's.
CONFIG_FILES = ("config.json", "params.json")

# The first file that exists holds the weights. Safetensors come first, because they cannot hold
# code.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

META_WEIGHTS = "consolidated.*.pth"  # the shards in Meta's layout

# The first file that exists holds the vectors of an adapter.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# The vocabulary of a BPE over bytes. Its merges are in a file beside it.
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

# The first file that exists holds the tokenizer. The second and the third are in sentencepiece's
# format: T5's and LLaMA's. The last is CodeT5's. (ByT5 has none of these.)
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", VOCABULARY_FILE)

# The texts of the special tokens, as transformers 4 writes them.
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

# Settings of the tokenizer. If two files disagree, the later one wins. The last file is not always
# read (see `read_settings` in tokenizer_files.py).
SETTINGS_FILES = ("generation_config.json", "tokenizer_config.json", SPECIAL_TOKENS_FILE)

# Chat templates in files of their own, as transformers 5 stores them: the default, and those with
# another name.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
OTHER_TEMPLATES = "additional_chat_templates/*.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"

# Token -> id. In older tokenizers, this file holds the tokens that were added to sentencepiece's
# pieces.
ADDED_TOKENS_FILE = "added_tokens.json"

# Files whose content stands in tokenizer.json and tokenizer_config.json if we write a tokenizer.
# If they stayed, transformers would read some of them first.
STALE_TOKENIZER_FILES = (
    CHAT_TEMPLATE_FILE,
    OTHER_TEMPLATES,
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
)


# What takes part in a run of train.py, and in no model: its folder has a config.json, too.
RUN_FILES = ("metrics.jsonl", "checkpoint.pt")

# What files of other programs are, by their endings. None of them is read.
FOREIGN_FILES = {
    ".onnx": "a model in ONNX's format",
    ".h5": "weights of TensorFlow",
    ".msgpack": "weights of Flax",
    ".tflite": "a model of TensorFlow Lite",
    ".ckpt": "a checkpoint of PyTorch Lightning or TensorFlow",
    ".pkl": "a pickle, which could run code",
    ".pickle": "a pickle, which could run code",
    ".joblib": "a pickle, which could run code",
}
WEIGHTS_ALONE = (".safetensors", ".bin", ".pt", ".pth")
EXPECTED_MODEL = "expected a folder with config.json and model.safetensors, or a .gguf file"
N_NAMES_SHOWN = 5  # files of a folder that a message names


# What a path leads to, if not to a model or an adapter


def is_gguf(path):
    """Return whether a file is a GGUF. The names of Ollama's files do not say it, but the bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with reading(path), open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def refuse_file(path):
    """Raise ValueError about a file that was given as a model, and is not a .gguf file."""
    if path.suffix in WEIGHTS_ALONE:
        found = "weights without the config of a model"
        if (path.parent / "config.json").exists():
            raise ValueError(f"{path}: found {found}: give the folder {path.parent}")
        raise ValueError(f"{path}: found {found}, {EXPECTED_MODEL}")
    found = FOREIGN_FILES.get(path.suffix, "a file that is not a model")
    raise ValueError(f"{path}: found {found}, {EXPECTED_MODEL}")


def check_model_folder(folder):
    """Raise ValueError if a folder that was given as a model holds something else."""
    if (folder / "adapter_config.json").exists() and not has_config(folder):
        remedy = "give it as the adapter, and its base as the model"
        raise ValueError(f"{folder}: found an adapter, expected a model: {remedy}")
    if is_run(folder):
        remedy = "it trained no model"
        if (folder / "model").exists():
            remedy = f"give {folder / 'model'}"
        elif trained_adapters(folder):
            remedy = f"give the model that it trained on, and {trained_adapters(folder)[0]}"
            remedy += " as the adapter"
        raise ValueError(f"{folder}: found the folder of a run, expected a model: {remedy}")
    if not has_config(folder):
        raise ValueError(f"{folder}: found {describe_content(folder)}, {EXPECTED_MODEL}")


def check_adapter_folder(folder):
    """Raise ValueError if a folder that was given as an adapter holds something else."""
    if (folder / "adapter_config.json").exists():
        return
    expected = "expected an adapter (adapter_config.json and adapter_model.safetensors)"
    if is_run(folder):
        trained = trained_adapters(folder)
        remedy = f"give {trained[0]}" if trained else "it has not saved an adapter yet"
        if (folder / "model").exists():
            remedy = f"give {folder / 'model'} as the model"
        raise ValueError(f"{folder}: found the folder of a run, {expected}: {remedy}")
    if has_config(folder):
        raise ValueError(f"{folder}: found a model, {expected}: give it as the model")
    adapters = sorted(folder.glob("[!.]*/adapter_config.json"))
    if adapters:
        remedy = f"give one of them, such as {adapters[0].parent}"
        raise ValueError(f"{folder}: found a folder of adapters, {expected}: {remedy}")
    raise ValueError(f"{folder}: found {describe_content(folder)}, {expected}")


def check_new_model(folder):
    """Raise ValueError if a model in this folder would take something else's place, or be spoiled.

    transformers applies an adapter to a model in the same folder, also to a merged one.
    """
    if (folder / "adapter_config.json").exists():
        refuse_to_save(
            folder, "an adapter, which transformers would apply to a model in the same folder"
        )
    if (folder / "config.json").exists() and is_run(folder):
        refuse_to_save(folder, "the folder of a run, whose config.json a model would replace")


def check_new_adapter(folder):
    """Raise ValueError if an adapter in this folder would be applied to a model that is there.

    transformers would do so, also if the model holds the adapter already.
    """
    if any((folder / name).exists() for name in WEIGHT_FILES):
        refuse_to_save(
            folder, "a model, to which transformers would apply an adapter in the same folder"
        )
    if (folder / "config.json").exists() and is_run(folder):
        reason = "whose config.json transformers would take for that of a model"
        refuse_to_save(folder, f"the folder of a run, {reason}")


def refuse_to_save(folder, found):
    raise ValueError(f"{folder}: found {found}: give another folder")


def warn_of_task_file(folder):
    """Warn that the task.json of a folder stays beside what was saved there.

    It may be of what was there before. `predict` would then put rows into the words of another
    task, and nothing would show it.
    """
    path = Path(folder, "task.json")
    if path.exists():
        warnings.warn(
            f"{path} was left as it is, and `predict` will put rows into words as it says: remove "
            "it if it belongs to another task",
            stacklevel=3,
        )


def has_config(folder):
    return any((folder / name).exists() for name in CONFIG_FILES)


def is_run(folder):
    """Return whether a folder is one that train.py wrote.

    Such a folder has no weights beside its config.json. A model may have a metrics.jsonl, too.
    """
    has_weights = any((folder / name).exists() for name in WEIGHT_FILES)
    return not has_weights and any((folder / name).exists() for name in RUN_FILES)


def trained_adapters(folder):
    """Return the paths of the adapters that a run has saved."""
    if (folder / "adapter").exists():
        return [folder / "adapter"]
    return sorted((folder / "adapters").glob("*"))


def describe_content(folder):
    """Return in a few words what is in a folder."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if broken_link(path) and not path.name.startswith("."):  # as Emacs's locks
            return f"{path.name}, {broken_link(path)}"
    names = [path.name for path in paths]
    if not names:
        return "an empty folder"
    shown = ", ".join(names[:N_NAMES_SHOWN])
    if len(names) > N_NAMES_SHOWN:
        shown += f" and {len(names) - N_NAMES_SHOWN} more"
    return f"a folder with {shown}"


# Weights


def weight_files(folder):
    """Return the paths of the files that hold a checkpoint's weights.

    Raise ValueError if the folder holds no weights, or lacks a shard that the index names.
    """
    existing = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not existing:
        refuse_weights(folder)
    first = existing[0]
    paths = [folder / name for name in shard_names(first)]
    # os.path.exists, because Path.exists raises OSError if a name is too long for the file system.
    missing = [path.name for path in paths if not os.path.exists(path)]
    if missing:
        shown_names = [name if name.isprintable() else repr(name) for name in missing]
        names = ", ".join(shown_names)
        raise ValueError(f"{first}: names shards that are not there: {names:.300}")
    return paths


def has_all_weights(path):
    """Return whether a path is a folder with weights in Hugging Face's layout, and all shards.

    An empty file and a Git LFS pointer are not weights.
    """
    try:
        return path.is_dir() and not any(map(problem_of_file, weight_files(path)))
    except ValueError:  # a download may have broken off
        return False


def local_weights(name_or_path):
    """Return the paths of the weights of a model, or none if it is not a path on this machine.

    Raise the errors of `weight_files`.
    """
    path = Path(name_or_path)
    if path.is_file():
        return [path]
    if (path / "config.json").exists():
        return weight_files(path)
    return sorted(path.glob(META_WEIGHTS))


def refuse_weights(folder):
    """Raise ValueError about a folder without weights that can be read."""
    expected = "expected model.safetensors or pytorch_model.bin, whole or in shards"
    for path in sorted(folder.iterdir()):
        if path.suffix in FOREIGN_FILES:
            found = f"{FOREIGN_FILES[path.suffix]} ({path.name})"
            remedy = "download or save the model in that form"
            raise ValueError(f"{folder}: found {found}, {expected}: {remedy}")
    raise ValueError(f"{folder}: found {describe_content(folder)}, {expected}")


def shard_names(first):
    """Return the names of all files that hold weights. first: the path of an index, or of the only
    file.

    Raise ValueError if the index is damaged, or names a file outside of its folder.
    """
    if first.suffix != ".json":
        return [first.name]
    weight_map = read_json(first).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    wrong = [name for name in names if not is_plain_file_name(name)]
    if wrong or not names:
        expected = "a weight_map from tensors to files of this folder"
        raise ValueError(f"{first}: expected {expected}, found {wrong or weight_map!r:.200}")
    return sorted(set(names))


def is_plain_file_name(name):
    return isinstance(name, str) and name == Path(name).name and name not in ("", "..")
