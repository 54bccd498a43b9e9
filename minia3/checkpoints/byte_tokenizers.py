"""Tokenizers over the bytes of a text: ByT5's, and the BPE of CodeT5.

ByT5      a token per byte. There is no file, because the id of a byte is its value + 3.
CodeT5    vocab.json and merges.txt: the BPE of GPT-2 and RoBERTa, over visible stand-ins for
          bytes. Published CodeT5s have no tokenizer.json.
"""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from minia3.checkpoints.added_tokens import added_token, sentinels, text_of
from minia3.checkpoints.layout import MERGES_FILE, VOCABULARY_FILE

# The values of `tokenizer_class` in a checkpoint's settings
BYT5_CLASS = "ByT5Tokenizer"
BYTE_BPE_CLASSES = ("RobertaTokenizer", "RobertaTokenizerFast")

# ByT5's ids: 3 special tokens, whose texts the files may change, 256 bytes, then the sentinels
BYT5_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
BYT5_SENTINELS = 125

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
    # transformers 4 writes no number of sentinels, or 0, if it lists them.
    listed = settings.get("additional_special_tokens") or sentinels(settings, BYT5_SENTINELS)
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
    tokens += [added_token(sentinel) for sentinel in listed]
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
