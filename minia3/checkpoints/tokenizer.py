"""Turn a text into token ids and back, with the tokenizer of a checkpoint.

    tokenizer = load_tokenizer("t5-base")
    tokenizer.encode("Hello world")         [8774, 296, 1]
    tokenizer.decode([8774, 296, 1])        "Hello world"

A backend of the package `tokenizers` does the work. It is built from the files of a checkpoint's
folder (tokenizer_files.py), or from the metadata of a GGUF file (gguf_tokenizer.py).
"""

import re
from pathlib import Path

from tokenizers import processors

from minia3.checkpoints import config_t5
from minia3.checkpoints.added_tokens import mark_special, text_of
from minia3.checkpoints.chat import (
    EncodedChat,
    by_name,
    check_turns,
    choose_template,
    render_chat,
)
from minia3.checkpoints.chat_contents import check_contents
from minia3.checkpoints.chat_spans import find_end_of_turn, render_conversation, within_spans
from minia3.checkpoints.gguf import read_metadata
from minia3.checkpoints.gguf_tokenizer import read_gguf_tokenizer
from minia3.checkpoints.hub import find
from minia3.checkpoints.layout import STALE_TOKENIZER_FILES, TOKENIZER_FILES
from minia3.checkpoints.sentencepiece import SPACE
from minia3.checkpoints.tokenizer_files import read_backend, read_settings, tokenizer_file
from minia3.files.home import expand_home
from minia3.files.read import reading
from minia3.files.write import write_new_json, writing_folder

N_IDS = 2**32  # the backend stores an id in 32 bits, and raises an error if an id is larger
UNKNOWN_CHARACTER = "\U0010fffd"  # a character for private use, which no vocabulary has

# Settings that only other programs read. A tokenizer that is saved keeps them.
KEPT = ("model_max_length", "padding_side", "truncation_side")
# The classes of transformers for a LLaMA's tokenizer. They follow add_bos_token (see `_add_frame`),
# and pad on the left if no setting says where. PreTrainedTokenizerFast, which `save` names in their
# place, pads on the right, and then a LLaMA continues the padding.
CLASSES_OF_LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")


class Tokenizer:
    """Text to ids and back.

    backend: the tokenizer of the package `tokenizers` that does the work.
    bos_id, eos_id: the ids of the special tokens, or None if the files name none.
    pad_id: the id of the pad token, or else eos_id, or else 0. It is always an int. Because padding
        is masked, any id will do.
    special_tokens: {"bos_token": "<s>", ...}, the texts of the special tokens that the files name.
    chat_template: the template for `chat`, or a dict of templates by name, from which "tool_use" is
        for conversations with tools and "default" for others, or None.
    has_separate_targets: True if a target is a sequence of its own, as for T5's decoder; False if
        it continues the prompt, as for LLaMA.
    kept: the settings that `save` hands on to other programs.
    """

    def __init__(self, backend, settings):
        """Add the special tokens that the settings name to a backend.

        settings: the content of the JSON files beside the tokenizer, in one dict.
        Raise an exception of any type if the backend or the settings are damaged.
        """
        self.backend = backend
        self.chat_template = by_name(settings.get("chat_template"))
        # A tokenizer.json may ask to cut or pad every text, because it keeps the settings of the
        # moment when it was saved.
        backend.no_truncation()
        backend.no_padding()
        self._find_special_tokens(settings)
        self.kept = kept_settings(settings, backend)
        self._add_frame(settings)
        # If the backend cannot encode an unknown character, fail now, not at the first such text.
        self.has_separate_targets = has_encoder(settings, self._adds_eos_alone())
        self._ends_prompts = self._adds_eos() and not self.has_separate_targets

    def _find_special_tokens(self, settings):
        """Set the ids and the texts of the special tokens, and tell the backend about them."""
        self.bos_id = special_id(self.backend, settings, "bos")
        self.eos_id = special_id(self.backend, settings, "eos")
        pad_id = special_id(self.backend, settings, "pad")
        if pad_id is None:
            pad_id = self.eos_id
        self.pad_id = pad_id or 0

        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": pad_id}
        special_ids = {i for name, i in ids.items() if self._is_special(i, name, settings)}
        self.special_tokens = {
            name: self.backend.id_to_token(i) for name, i in ids.items() if i in special_ids
        }
        mark_special(self.backend, self.special_tokens.values())

    def _is_special(self, i, name, settings):
        """Return whether a token is in no text. name: what it is for, such as "eos_token".

        The id in a config may be that of any word: many configs say 1 and 2, the defaults of LLaMA,
        beside any vocabulary. If such a word became special, decode would drop it from texts.
        """
        if i is None:
            return False
        if settings.get(name) or i in self.backend.get_added_tokens_decoder():
            return True
        # Any token can pad, also <unk>, which is in texts.
        return name != "pad_token" and is_special_form(self.backend.id_to_token(i))

    def _add_frame(self, settings):
        """Let the backend put bos and eos around a text, if the settings say so and it does not.

        A post-processor of the backend counts more than the settings. But that of DeepSeek's
        R1-Distill adds nothing, and bos came from LlamaTokenizerFast of transformers 4, which
        follows the settings. transformers 5 has lost this bos.
        """
        backend = self.backend
        is_asked = settings.get("add_bos_token") is True and is_of_llama(settings)
        if backend.post_processor is None:
            backend.post_processor = self._frame(settings)
        elif is_asked and backend.encode("").ids == []:
            both = [backend.post_processor, self._frame(settings)]
            backend.post_processor = processors.Sequence(both)

    def _frame(self, settings):
        """Return a post-processor that puts bos and eos around a text if the settings say so.

        It does the same with each of two texts, which only other programs encode together.
        """
        frame = ["$A"]
        if settings.get("add_bos_token") and "bos_token" in self.special_tokens:
            frame.insert(0, self.special_tokens["bos_token"])
        if settings.get("add_eos_token") and "eos_token" in self.special_tokens:
            frame.append(self.special_tokens["eos_token"])
        ids = [(token, self.backend.token_to_id(token)) for token in self.special_tokens.values()]
        second = [part.replace("$A", "$B") for part in frame]
        return processors.TemplateProcessing(frame, frame + second, ids)

    def _adds_eos_alone(self):
        """Return whether `encode` ends a text with eos, and does not begin it with bos."""
        ids = self.encode(UNKNOWN_CHARACTER)
        return ids[-1:] == [self.eos_id] and ids[:1] != [self.bos_id]

    def _adds_eos(self):
        """Return whether `encode` ends a text with eos."""
        plain = self.encode(UNKNOWN_CHARACTER, special=False)
        if plain[-1:] in ([], [self.eos_id]):
            return False  # nobody can see which eos was added: it may even be the bos
        return self.encode(UNKNOWN_CHARACTER)[-1:] == [self.eos_id]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of `text`, with the special tokens that the files ask for.

        T5 ends a text with `</s>`, LLaMA begins it with `<s>`, and SmolLM2 adds nothing.
        special: False leaves out these tokens. Raise ValueError if `text` is not a text, or cannot
        be encoded.
        """
        expect_text(text)
        # This may fail, because a str may hold half a surrogate pair, which is not Unicode, and
        # because some damage to the files shows only now.
        damage = "it is not Unicode, or the tokenizer is damaged"
        with reading(f"text {text[:40]!r}", damage):
            return self.backend.encode(text, add_special_tokens=special).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that the model is to continue, or that T5's encoder reads.

        They are encode(text), but without the eos at the end if a LLaMA's tokenizer adds one (it
        was saved with add_eos_token=True): nothing follows after the end of a text. Raise
        ValueError as `encode` does.
        """
        ids = self.encode(text)
        return ids[:-1] if self._ends_prompts else ids

    def encode_target(self, text: str, end: bool) -> list[int]:
        """Return the ids of `text` as a target.

        "True" and " True" are the same target, but not for ByT5 and CodeT5, which keep the space.

        T5: encode(text), because the decoder reads the target as a sequence of its own. If that
        does not end in eos, as with a tokenizer.json that adds no special tokens, eos is added.
        LLaMA: the ids of the text after one space, so that

            encode_prompt(prompt) + encode_target(text, end=False)
                == encode_prompt(prompt + " " + text)

        for a prompt that is not empty and does not end in white space. A prompt that ends in a
        special token is an exception with tokenizers that put a space of their own before the text
        after it (older files of LLaMA-2): the target lacks this space.
        end: True adds eos, for LLaMA only; a T5's targets always end in it. Raise ValueError if
        there is no eos to add.
        """
        expect_text(text)
        must_end = end or self.has_separate_targets
        if must_end and self.eos_id is None:
            raise ValueError("a target cannot be ended: the tokenizer's files name no eos token")
        if self.has_separate_targets:
            ids = self.encode(text)
            if ids[-1:] == [self.eos_id]:
                return ids
            return [*self.encode(text, special=False), self.eos_id]
        # Encode the text after a prompt, here "a", and cut off the prompt. encode(" " + text) is
        # wrong, because LLaMA-2 puts another space before any text.
        prompt = self.encode("a", special=False)
        joined = self.encode("a " + text.removeprefix(" "), special=False)
        target = joined[len(prompt) :]
        if end:
            target.append(self.eos_id)
        return target

    def chat(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """Return the ids of a conversation up to the place where the answer begins.

        messages: [{"role": "user", "content": "Hello"}, ...]
        tools: descriptions of functions, as JSON schemas, if the template offers them to the model.

        They equal the ids of transformers' apply_chat_template, with two exceptions: a
        tokenizer.json of LLaMA-2, whose normalizer transformers 5 replaces, and thinking, null
        contents and texts as the arguments of calls (see `template_message` and `render_chat`).

        Raise ValueError if `messages` is not such a list, if there is no template or no jinja2, or
        if the template fails, refuses the messages, or leaves out a message or a call of a tool
        (see `check_contents`).
        """
        check_turns(messages)
        template = self.template_for(tools)
        with reading("chat_template", extra="chat"):
            rendered = render_chat(template, messages, self.special_tokens, tools)
            check_contents(rendered.text, template, messages, self.special_tokens, tools)
            # The template has written the special tokens.
            return self.encode(rendered.text, special=False)

    def conversation(self, messages: list[dict], tools: list | None = None) -> EncodedChat:
        """Return the ids of a whole conversation, and which of them the assistant wrote.

        The assistant's part includes the token that ends its turn, so that a model learns to stop.
        Ids and mask equal those of transformers' apply_chat_template, with the exceptions that
        `chat` names, and with another: a message with the weight 0 is left out of our mask. The
        mask there needs a template with {% generation %} blocks; this one does not (see
        `render_conversation`).

        Raise ValueError as `chat` does, if a turn cannot be found in the text, and for the
        tokenizer of a T5, whose decoder does not continue what its encoder reads.
        """
        check_turns(messages)
        template = self.template_to_train_on(tools)
        with reading("chat_template", extra="chat"):
            text, spans = render_conversation(template, messages, self.special_tokens, tools)
            check_contents(
                text, template, messages, self.special_tokens, tools, ends_with_prompt=False
            )
            encoding = self.backend.encode(text, add_special_tokens=False)
        return EncodedChat(encoding.ids, within_spans(encoding.offsets, spans))

    def count_chat(self, messages: list[dict], tools: list | None = None) -> int:
        """Return how many ids `conversation` would return, without looking for the assistant.

        The errors are those of `conversation`, but a template that changes turns or leaves
        something out goes unnoticed.
        """
        template = self.template_to_train_on(tools)
        with reading("chat_template", extra="chat"):
            rendered = render_chat(
                template, messages, self.special_tokens, tools, ends_with_prompt=False
            )
            return len(self.encode(rendered.text, special=False))

    def end_of_turn(self) -> str:
        """Return what a turn of the assistant ends with in the chat template, without white space.

        It is often a special token, such as <|im_end|>. It is empty if the template has none, or
        refuses such a conversation.
        """
        try:
            return find_end_of_turn(self.template_for(), self.special_tokens)
        except (ValueError, ImportError):
            return ""

    def template_to_train_on(self, tools: list | None = None):
        """Return the template for a conversation to learn from.

        Raise ValueError if a model cannot learn from conversations with this tokenizer.
        """
        if self.has_separate_targets:
            raise ValueError(
                "only models that continue a text learn from rows with 'messages', and this "
                "model has an encoder: give rows with 'input' and 'target'"
            )
        return self.template_for(tools)

    def template_for(self, tools: list | None = None):
        """Return the chat template for a conversation. Raise ValueError if there is none."""
        template = choose_template(self.chat_template, tools)
        if template is None:
            raise ValueError(
                "the tokenizer's files have no chat template: give one with --chat-template FILE "
                "(a flag of train.py and generate; in Python: tokenizer.chat_template = ...), or "
                "give the whole prompt as a text"
            )
        return template

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens and without ids that are not tokens.

        (A model can generate ids that are not tokens: T5's embedding has 28 rows to spare.)
        """
        possible_ids = [i for i in ids if 0 <= i < N_IDS]
        # Some damage to a tokenizer.json shows only when certain ids are decoded.
        with reading("the tokenizer's decoder"):
            return self.backend.decode(possible_ids)

    def decode_continuation(self, ids: list[int]) -> str:
        """Return the text of `ids` that continue another text. T5: decode(ids).

        LLaMA-2 puts a space before any text, so `decode` drops it, although it stands between a
        text and its continuation. Here, a piece for another space is dropped in its place.
        """
        space_id = self.backend.token_to_id(SPACE)
        is_dropped = space_id is not None and self.decode([space_id]) == ""
        if is_dropped and not self.has_separate_targets:
            ids = [space_id, *ids]
        return self.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        With these files, AutoTokenizer of transformers has the same ids. Files of old chat
        templates, special tokens and added tokens are removed.
        """
        # A null, or else an id in config.json would become the bos of a tokenizer that has none.
        config = {"bos_token": None} | self.special_tokens | self.kept
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in self.chat_template.items()
            ]
        elif self.chat_template:
            config["chat_template"] = self.chat_template
        if self.has_separate_targets != self._adds_eos_alone():
            # The special tokens would mislead `has_encoder` if no config.json is beside them:
            # CodeT5 adds bos, too.
            config["is_encoder_decoder"] = self.has_separate_targets
        # transformers' LlamaTokenizer would replace our normalizer.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Without this, transformers 4 returns token_type_ids too, which generate() refuses.
        config["model_input_names"] = ["input_ids", "attention_mask"]
        # Without this, transformers 4 takes spaces out of texts: "do n't ." becomes "don't."
        config["clean_up_tokenization_spaces"] = False
        with reading("the tokenizer"):
            content = self.backend.to_str(pretty=True)
        with writing_folder(expand_home(folder), replaces=STALE_TOKENIZER_FILES) as hidden:
            (hidden / "tokenizer.json").write_text(content, encoding="utf-8")
            write_new_json(hidden / "tokenizer_config.json", config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Return the tokenizer of a checkpoint's folder.

        Raise ValueError if the folder has no tokenizer, or if a file is damaged.
        """
        folder = Path(folder)
        file = tokenizer_file(folder)
        if file is None:
            expected = ", ".join(TOKENIZER_FILES)
            raise ValueError(f"{folder}: no tokenizer; expected one of {expected}")
        settings = read_settings(folder)
        with reading(file):
            return cls(*read_backend(file, settings))

    @classmethod
    def from_gguf(cls, metadata: dict, origin: str | Path = "GGUF") -> "Tokenizer":
        """Return the tokenizer in the metadata of a GGUF file.

        metadata: {"tokenizer.ggml.tokens": [...], ...}, as `read_metadata` returns it.
        origin: the name of the file in error messages.

        Raise ValueError if the metadata is damaged, or the tokenizer is of an unknown kind.
        """
        with reading(origin):
            backend, settings = read_gguf_tokenizer(metadata)
            return cls(backend, settings)


def kept_settings(settings, backend):
    """Return the settings that `save` hands on, with what the class of the tokenizer stands for.

    The unknown token is left out if it is not special here, because transformers would make it so.
    """
    kept = {key: settings[key] for key in KEPT if key in settings}
    if is_of_llama(settings):
        kept.setdefault("padding_side", "left")
    unknown = text_of(settings.get("unk_token"))
    added = backend.get_added_tokens_decoder().values()
    if unknown in [token.content for token in added if token.special]:
        kept["unk_token"] = unknown
    return kept


def is_of_llama(settings):
    """Return whether the settings name a class that transformers has for a LLaMA's tokenizer."""
    return settings.get("tokenizer_class", "").removesuffix("Fast") in CLASSES_OF_LLAMA


def expect_text(text):
    """Raise ValueError if this is not a text, such as the NaN of an empty cell in pandas."""
    if not isinstance(text, str):
        raise ValueError(f"found {text!r:.40}, expected a text")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Return the tokenizer of a known model, a hub id, a folder or a .gguf file.

    Raise ValueError if there is no tokenizer, or if it is damaged.
    """
    name_or_path = expand_home(name_or_path)
    path = find(name_or_path, weights=False)
    if path.is_file():
        return Tokenizer.from_gguf(read_metadata(path), path)
    is_downloaded = not Path(name_or_path).exists()
    if is_downloaded and tokenizer_file(path) is None:
        raise ValueError(
            f"{name_or_path}: no tokenizer in the hub's cache ({path}): if the hub could not be "
            "reached, try again with a network; otherwise, the repository has none"
        )
    return Tokenizer.from_folder(path)


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a model's folder or .gguf file, or None if the folder has none."""
    has_tokenizer = path.is_file() or tokenizer_file(path) is not None
    return load_tokenizer(path) if has_tokenizer else None


def has_encoder(settings, adds_eos_alone):
    """Return whether the model of a tokenizer has an encoder, as T5 does.

    Its config says so. Without a config, we go by the special tokens: a T5 adds eos alone.
    """
    if "is_encoder_decoder" in settings:
        return bool(settings["is_encoder_decoder"])
    if "model_type" in settings:
        return settings["model_type"] in config_t5.DEFAULTS
    return adds_eos_alone


def is_special_form(text):
    """Return whether a token looks as only special tokens do: </s>, <|end|> or [SEP]."""
    return re.fullmatch(r"<\S+>|\[\S+\]", text) is not None


def special_id(backend, settings, kind):
    """Return the id of the bos, eos or pad token, or None if the backend has no such token.

    kind: "bos", "eos" or "pad". The settings may give the token's text, as `{kind}_token` (a text,
        or a dict with the text as "content"), or its id, as `{kind}_token_id` (an id, or a list
        whose first id counts). The text wins.

    Raise ValueError if the vocabulary lacks the text of a bos or eos token. The id that a config
    gives may then be that of any token. (A pad token may be missing, because any id can pad.)
    """
    text = text_of(settings.get(f"{kind}_token", ""))
    named_id = backend.token_to_id(text)
    if named_id is not None:
        return named_id
    if text and kind != "pad":
        raise ValueError(
            f"{kind}_token is {text!r:.60}, which the vocabulary lacks: add this token to the "
            "tokenizer, or name another one in tokenizer_config.json"
        )
    given = settings.get(f"{kind}_token_id")
    ids = given if isinstance(given, list) else [given]
    for i in ids[:1]:
        is_id = type(i) is int and 0 <= i < N_IDS  # True is an instance of int
        if is_id and backend.id_to_token(i) is not None:
            return i
    return None
