"""Read the tokenizer in a checkpoint's folder, from the first of these files that it has:

    tokenizer.json       the format of the package `tokenizers`
    spiece.model         a sentencepiece model: T5's
    tokenizer.model      a sentencepiece model: LLaMA-2's
    vocab.json           a BPE over bytes, with merges.txt: CodeT5's

ByT5 needs no file: its settings say that it reads bytes.

Small JSON files beside it, the settings, name the special tokens: bos (the beginning of a text),
eos (its end) and pad.
"""

from tokenizers import Tokenizer as Backend

from minia3.checkpoints.added_tokens import (
    add_listed_tokens,
    add_missing_tokens,
    add_tokens,
    added_tokens,
    sentinels,
)
from minia3.checkpoints.byte_tokenizers import BYT5_CLASS, byt5_backend, byte_bpe_backend
from minia3.checkpoints.chat import read_template_files
from minia3.checkpoints.layout import (
    SETTINGS_FILES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILES,
    VOCABULARY_FILE,
)
from minia3.checkpoints.sentencepiece import read_sentencepiece
from minia3.files.read import read_json

N_SENTINELS = 100  # <extra_id_0> ... <extra_id_99> of every published T5
# Every text of a T5 or a ByT5 ends in eos: transformers does not read these settings there.
T5_FRAME = {"add_bos_token": False, "add_eos_token": True}


def tokenizer_file(folder):
    """Return the first of TOKENIZER_FILES, or the file that names ByT5's class, or None."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in ("config.json", *SETTINGS_FILES):
        path = folder / name
        if path.is_file() and read_json(path).get("tokenizer_class") == BYT5_CLASS:
            return path
    return None


def read_settings(folder):
    """Return the content of the JSON files beside a tokenizer. The last file with a key wins.

    As in transformers, special_tokens_map.json wins over tokenizer_config.json, unless the latter
    has added_tokens_decoder: then a newer program wrote it, and nobody reads the former.

    A null counts as no key, except for bos_token: Qwen's says that there is no bos, although
    config.json has an id. Such a null wins over the files before it. An empty special token counts
    as a null (the first LLaMAs on the hub name such tokens). Chat templates in files of their own
    win over those in the JSON files.
    """
    settings = {}
    for name in ("config.json", *SETTINGS_FILES):
        if name == SPECIAL_TOKENS_FILE and "added_tokens_decoder" in settings:
            continue
        if (folder / name).is_file():
            content = read_json(folder / name)
            if "bos_token" in content and is_absent("bos_token", content["bos_token"]):
                settings.pop("bos_token_id", None)
                settings.pop("bos_token", None)
            if is_empty(content.get("eos_token")) and not (folder / "tokenizer.json").is_file():
                settings.pop("eos_token_id", None)  # as wrong; a sentencepiece file has its own
            settings |= {key: value for key, value in content.items() if not is_absent(key, value)}
    templates = read_template_files(folder)
    if templates is not None:
        settings["chat_template"] = templates
    return settings


def is_absent(key, value):
    """Return whether a value of the settings is as good as none: a null, or an empty token."""
    return value is None or (key.endswith("_token") and is_empty(value))


def is_empty(token):
    text = token.get("content") if isinstance(token, dict) else token
    return text == ""


def read_backend(file, settings):
    """Return the backend of a tokenizer's file, and the settings with what follows from the file.

    Raise an exception of any type if the file is damaged.
    """
    added = added_tokens(file.parent, settings)
    if file.name == "tokenizer.json":
        backend = Backend.from_buffer(file.read_bytes())
        add_missing_tokens(backend, added)
        add_listed_tokens(backend, settings)
        return backend, settings
    frame = {}
    if file.name == VOCABULARY_FILE:
        backend, defaults = byte_bpe_backend(file.parent, settings)
    elif file.suffix == ".json":
        backend, defaults = byt5_backend(settings)
        frame = T5_FRAME
    elif file.name == "spiece.model":
        backend, defaults = read_sentencepiece(file.read_bytes())
        # The file lacks T5's sentinels. They come after the pieces, and <extra_id_0> is the last.
        backend.add_special_tokens(sentinels(settings, N_SENTINELS)[::-1])
        frame = T5_FRAME
    else:
        backend, defaults = llama_backend(file, settings)
    # normalized=False: look for the tokens in the text itself, before it is normalized.
    add_tokens(backend, {i: token | {"normalized": False} for i, token in added.items()})
    add_listed_tokens(backend, settings)
    return backend, defaults | settings | frame


def llama_backend(file, settings):
    """Return the backend and the default settings of a LLaMA's tokenizer.model.

    The settings decide which texts get a space at their start, as in transformers 5. (There, T5's
    tokenizer does not look at them.)
    """
    is_prefix_for_all = settings.get("legacy") is True  # otherwise none after an added token
    has_prefix = settings.get("add_prefix_space") is not False
    content = file.read_bytes()
    backend, special = read_sentencepiece(content, is_prefix_for_all, has_prefix)
    return backend, {"add_bos_token": True, **special}
