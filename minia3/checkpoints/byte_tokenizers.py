"""Tokenizers over the bytes of a text: ByT5's, and the BPE of CodeT5.

ByT5      a token per byte. There is no file, because the id of a byte is its value + 3.
CodeT5    vocab.json and merges.txt: the BPE of GPT-2 and RoBERTa, over visible stand-ins for
          bytes. Published CodeT5s have no tokenizer.json.
"""

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minia3.checkpoints.layout import MERGES_FILE, VOCABULARY_FILE

# The values of `tokenizer_class` in a checkpoint's settings
BYT5_CLASS = "ByT5Tokenizer"
BYTE_BPE_CLASSES = ("RobertaTokenizer", "RobertaTokenizerFast")

# ByT5's ids: 3 special tokens, whose texts the files may change, 256 bytes, then the sentinels
BYT5_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
BYT5_SENTINELS = 125
MAX_SENTINELS = 1000

# CodeT5's special tokens, if its files do not say
BYTE_BPE_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}


def byt5_backend(settings):
    """Return the backend and the default settings of a ByT5.

    A special token takes the spaces around it, unless the settings describe it in a dict, as in
    transformers. If bytes are not UTF-8, `decode` puts U+FFFD in their place, as everywhere in
    minia3; transformers leaves them out.
    Raise ValueError if the settings ask for too many sentinels.
    """
    n_sentinels = settings.get("extra_ids", BYT5_SENTINELS)
    # transformers 4 writes 0 or leaves the key out if it lists the sentinels.
    sentinels = settings.get("additional_special_tokens")
    if not sentinels:
        if n_sentinels not in range(MAX_SENTINELS + 1):
            raise ValueError(f"extra_ids is {n_sentinels!r}, expected 0 to {MAX_SENTINELS}")
        sentinels = [f"<extra_id_{i}>" for i in range(n_sentinels)]
    special = BYT5_SPECIAL | {key: settings[key] for key in BYT5_SPECIAL if key in settings}
    tokens = []
    for token in special.values():
        if isinstance(token, str):
            token = {"content": token, "lstrip": True, "rstrip": True}
        tokens.append(added_token(token))
    texts = [token.content for token in tokens]
    vocabulary = {text: i for i, text in enumerate([*texts, *stand_ins()])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokens += [added_token(sentinel) for sentinel in sentinels]
    backend.add_special_tokens(tokens)
    return backend, special


def stand_ins():
    """Return the character that stands for each byte in the package `tokenizers`, as in GPT-2.

    A byte that is a visible character of Latin-1 stands for itself. The others get the characters
    from 256 on, in their order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("ÿ") + 1)} - {0xAD}
    hidden = sorted(set(range(256)) - visible)
    characters = [chr(byte) for byte in range(256)]
    for i, byte in enumerate(hidden):
        characters[byte] = chr(256 + i)
    return characters


def byte_bpe_backend(folder, settings):
    """Return the backend and the default settings of a CodeT5's folder.

    A text begins with cls_token and ends in sep_token, which are `<s>` and `</s>`. Raise ValueError
    if the settings name another class than RoBERTa's, because these cut texts in other ways.
    """
    kind = settings.get("tokenizer_class")
    if kind not in BYTE_BPE_CLASSES:
        expected = (
            f"expected {BYTE_BPE_CLASSES[0]}; for others, save the tokenizer as tokenizer.json"
        )
        raise ValueError(f"tokenizer_class is {kind!r}, {expected}")
    vocabulary, merges = models.BPE.read_file(
        str(folder / VOCABULARY_FILE), str(folder / MERGES_FILE)
    )
    has_prefix = settings.get("add_prefix_space", False)
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    backend.decoder = decoders.ByteLevel()
    special = BYTE_BPE_SPECIAL | {key: settings[key] for key in BYTE_BPE_SPECIAL if key in settings}
    backend.add_special_tokens([added_token(token) for token in special.values()])
    begin, end = (text_of(special[key]) for key in ("cls_token", "sep_token"))
    backend.post_processor = processors.RobertaProcessing(
        (end, backend.token_to_id(end)), (begin, backend.token_to_id(begin))
    )
    return backend, special


def added_token(token):
    """Return an AddedToken for a text, or for a dict with the text and how it is found."""
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
    return AddedToken(token["content"], special=True, normalized=False, **flags)


def text_of(token):
    """Return the text of a token, which files give as it is, or in a dict with how it is found."""
    return token["content"] if isinstance(token, dict) else token
