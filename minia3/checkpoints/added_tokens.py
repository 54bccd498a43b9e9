"""Tokens that are added to the vocabulary of a tokenizer: special ones, and those of fine-tunes.

Files describe such a token by its text, or by a dict with the text as "content" and with how it is
found in a text: whether it takes the spaces around it, for example.
"""

from tokenizers import AddedToken

from minia3.checkpoints.layout import ADDED_TOKENS_FILE
from minia3.files.read import read_json

MAX_SENTINELS = 1000
# The special tokens that transformers adds before the listed ones, in its order
ENDS = ("bos_token", "eos_token")
NAMED = (*ENDS, "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def added_token(token):
    """Return an AddedToken for a text, or for a dict with the text and how it is found."""
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
    return AddedToken(token["content"], special=True, normalized=False, **flags)


def text_of(token):
    """Return the text of a token, which files give as it is, or in a dict with how it is found."""
    return token["content"] if isinstance(token, dict) else token


def sentinels(settings, default):
    """Return the texts of T5's sentinels: `<extra_id_0>` and so on.

    The settings say how many there are, or else it is `default`. Raise ValueError if they ask for
    too many.
    """
    n_sentinels = settings.get("extra_ids", default)
    if n_sentinels not in range(MAX_SENTINELS + 1):
        raise ValueError(f"extra_ids is {n_sentinels!r}, expected 0 to {MAX_SENTINELS}")
    return [f"<extra_id_{i}>" for i in range(n_sentinels)]


def added_tokens(folder, settings):
    """Return the tokens that a fine-tune added to a tokenizer, whose own file may not have changed.

    They are a dict from ids to descriptions. Older checkpoints have token -> id in
    added_tokens.json, and newer checkpoints have id -> description of the token in
    tokenizer_config.json. Without a description, a token is special if the settings list it as an
    additional special token, such as the sentinels of CodeT5.
    """
    special = [text_of(token) for token in settings.get("additional_special_tokens", [])]
    added = {}
    if (folder / ADDED_TOKENS_FILE).is_file():
        for token, i in read_json(folder / ADDED_TOKENS_FILE).items():
            added[i] = {"content": token, "special": token in special}
    for i, description in settings.get("added_tokens_decoder", {}).items():
        added[int(i)] = description
    return added


def add_tokens(backend, added):
    """Add tokens (see `added_tokens`). Raise ValueError if their ids do not follow the others."""
    ids = sorted(added)
    backend.add_tokens([AddedToken(**added[i]) for i in ids])
    wrong_ids = [i for i in ids if backend.token_to_id(added[i]["content"]) != i]
    if wrong_ids:
        raise ValueError(
            f"added tokens have the ids {wrong_ids!r:.60}, but these do not follow the vocabulary"
        )


def add_missing_tokens(backend, added):
    """Add those tokens that a tokenizer.json lacks. It describes the others itself."""
    missing = {}
    for i, description in added.items():
        if backend.token_to_id(description["content"]) is None:
            missing[i] = description
    add_tokens(backend, missing)


def add_listed_tokens(backend, settings):
    """Add the special tokens that the settings list without an id, as transformers does.

    They get the next ids, in the order of the list, if the vocabulary lacks them. If there are any,
    the missing ones of NAMED come first. (Otherwise, nothing is added for these, because any id can
    pad.) transformers 4 lists them under the second name, and may leave the first one empty. Raise
    ValueError if they are not in a list.
    """
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens", [])
    if isinstance(listed, dict):  # from what a token is for to the token
        listed = list(listed.values())
    if not isinstance(listed, list):
        raise ValueError(f"expected a list of special tokens, found {listed!r:.60}")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [added_token(token) for token in listed if text_of(token) not in known]
    if lacking(backend, new):
        named = {key: added_token(settings[key]) for key in NAMED if key in settings}
        new_texts = {token.content for token in new}
        for key in ENDS:  # one that is not even listed is refused later
            if key in named and named[key].content not in new_texts:
                del named[key]
        backend.add_tokens(lacking(backend, named.values()))
    backend.add_tokens(new)


def lacking(backend, tokens):
    """Return those tokens that the vocabulary lacks."""
    return [token for token in tokens if backend.token_to_id(token.content) is None]


def mark_special(backend, texts):
    """Mark tokens as special, because decode drops only marked tokens, and not every file does it.

    A token that a file describes keeps its description, such as whether it takes spaces around it.
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in texts:
        token = added.get(text, AddedToken(text, normalized=False))
        token.special = True
        backend.add_special_tokens([token])
