"""To be written."""

import json
from datetime import datetime
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minia3.checkpoints.gguf import read_metadata
from minia3.checkpoints.hub import find
from minia3.checkpoints.layout import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    SETTINGS_FILES,
    TOKENIZER_FILES,
)
from minia3.checkpoints.sentencepiece import add_tokens, read_sentencepiece, sentencepiece_backend
from minia3.files.read import read_json, reading
from minia3.files.write import write_json, writing_folder

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
)
PRE = {  # tokenizer.ggml.pre: where text is cut; then into GPT-2's words too; a word that is a token stays whole; bos
    "default": (None, True, False, False),
    "gpt-2": (None, True, False, False),
    "smollm": (r"\p{N}", True, False, False),  # each digit by itself
    "llama-bpe": (WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+", False, True, True),  # Llama 3
}


class Tokenizer:
    """Text to ids and back. `bos_id` and `eos_id` may be None; `pad_id` is the pad token of the files, or eos, or 0."""

    def __init__(self, backend, settings):  # settings: what config.json and BESIDE say, in one dict
        backend.no_truncation()  # a tokenizer.json may hold what was set when it was saved, and cut or pad every text
        backend.no_padding()
        template = settings.get("chat_template")  # a text, or a list of several with names
        several = (
            {t["name"]: t["template"] for t in template}
            if isinstance(template, list)
            else {"default": template}
        )
        self.backend, self.chat_template = backend, several.get("default")
        ids = {
            f"{kind}_token": special_id(backend, settings, kind) for kind in ("bos", "eos", "pad")
        }
        ids["pad_token"] = ids["eos_token"] if ids["pad_token"] is None else ids["pad_token"]
        self.bos_id, self.eos_id, self.pad_id = (
            ids["bos_token"],
            ids["eos_token"],
            ids["pad_token"] or 0,
        )
        self.special = {name: backend.id_to_token(i) for name, i in ids.items() if i is not None}
        known = {ids["eos_token"], *backend.get_added_tokens_decoder()}
        if not settings.get("pad_token") and ids["pad_token"] not in known:
            self.special.pop(
                "pad_token", None
            )  # a config may name any id: what is a word stays one
        backend.add_special_tokens(
            [*self.special.values()]
        )  # not every file marks them; decode drops only what is
        if backend.post_processor is None:
            bos, eos = (
                settings.get(f"add_{name}") and self.special.get(name)
                for name in ("bos_token", "eos_token")
            )
            form, tokens = (
                [*filter(None, (bos, "$A", eos))],
                [(self.special[name], ids[name]) for name in self.special],
            )
            backend.post_processor = processors.TemplateProcessing(form, None, tokens)
        one = self.encode("\U0010fffd")  # fails now where an unknown character would later
        self.ends = one[-1:] == [self.eos_id] and one[:1] != [
            self.bos_id
        ]  # T5's; a LLaMA may ask for both

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text` with the files' special tokens: T5 `</s>` behind, LLaMA `<s>` in front, SmolLM2 none."""
        with reading(
            f"text {text[:40]!r}"
        ):  # half a surrogate pair; or what loading did not see of a damage
            return self.backend.encode(text, add_special_tokens=special).ids

    def encode_target(self, text: str, end: bool) -> list[int]:
        """The ids of `text` as what follows a prompt and one space; "True" and " True" are the same.

        Where `encode` ends in eos, with no bos in front (T5): `encode(text)`. Else encode(prompt) +
        encode_target(text, False) == encode(prompt + " " + text) for a prompt that is not empty and does not end in
        white space (where encode adds no eos); `end` adds eos.
        """
        if self.ends:
            return self.encode(text)
        if end and self.eos_id is None:
            raise ValueError("a target cannot be ended: the tokenizer's files name no eos token")
        # "a" is the prompt: LLaMA-2 puts a space of its own before any text, a byte-level tokenizer does not.
        prompt, joined = (
            self.encode(t, special=False) for t in ("a", "a " + text.removeprefix(" "))
        )
        return joined[len(prompt) :] + [self.eos_id] * end

    def chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "Hello"}, ...], up to where the answer begins.

        The checkpoint's chat_template, rendered in jinja2's sandbox as transformers' apply_chat_template does it.
        ValueError without jinja2 or a template, and where the template fails or refuses the messages.
        """

        def refuse(message):
            raise ValueError(message)

        if self.chat_template is None:
            raise ValueError(
                "the tokenizer's files have no chat_template: give the whole prompt as a text"
            )
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self.special,
        }
        values |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
        with reading("chat_template", extra="chat"):
            from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

            sandbox = Sandbox(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            sandbox.filters["tojson"] = partial(
                json.dumps, ensure_ascii=False
            )  # jinja2's own is made for HTML
            return self.encode(
                sandbox.from_string(self.chat_template).render(values), special=False
            )

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens, and without ids that are none (T5's embedding has 28 rows more)."""
        return self.backend.decode([i for i in ids if 0 <= i < 2**32])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, by which transformers' AutoTokenizer gives the same ids."""
        config = {
            **self.special,
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }
        config["tokenizer_class"] = (
            "PreTrainedTokenizerFast"  # LlamaTokenizer would make a normaliser of its own
        )
        config["model_input_names"] = [
            "input_ids",
            "attention_mask",
        ]  # not token_type_ids, which generate refuses
        with writing_folder(folder, replaces=[CHAT_TEMPLATE_FILE]) as new:
            self.backend.save(str(new / "tokenizer.json"))
            write_json(new / "tokenizer_config.json", config)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The first of FORMS in the folder, with the small JSON files beside it. ValueError if none or damaged."""
        file = next(
            (Path(path, name) for name in TOKENIZER_FILES if Path(path, name).is_file()), None
        )
        if file is None:
            raise ValueError(f"{path}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
        beside = [
            read_json(Path(path, name))
            for name in ("config.json", *SETTINGS_FILES)
            if Path(path, name).is_file()
        ]
        settings = {key: value for raw in beside for key, value in raw.items() if value is not None}
        with reading(file):
            if (template := Path(path, CHAT_TEMPLATE_FILE)).is_file():
                settings["chat_template"] = template.read_text(encoding="utf-8")
            if file.suffix == ".json":
                return cls(Backend.from_buffer(file.read_bytes()), settings)
            (backend, ids), t5 = read_sentencepiece(file.read_bytes()), file.name == "spiece.model"
            if t5:  # its sentinels are not in the file: <extra_id_99> ... <extra_id_0> come behind the pieces
                if (n := settings.get("extra_ids", 100)) not in range(1001):
                    raise ValueError(f"extra_ids is {n!r}, expected 0 to 1000")
                backend.add_special_tokens([f"<extra_id_{i}>" for i in range(n)][::-1])
            older = (
                read_json(Path(path, ADDED_TOKENS_FILE))
                if Path(path, ADDED_TOKENS_FILE).is_file()
                else {}
            )
            added = {i: {"content": token} for token, i in older.items()}
            added |= {
                int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()
            }
            backend.add_tokens(
                [AddedToken(**{**added[i], "normalized": False}) for i in sorted(added)]
            )
            if wrong := [i for i in added if backend.token_to_id(added[i]["content"]) != i]:
                raise ValueError(
                    f"added tokens have the ids {wrong}, but these do not follow the pieces"
                )
            return cls(backend, {"add_bos_token": not t5, "add_eos_token": t5, **ids, **settings})

    @classmethod
    def from_gguf(cls, metadata: dict, where: str | Path = "GGUF") -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata ("tokenizer.ggml.tokens" ...). ValueError for a kind not known."""
        meta = {
            key.removeprefix("tokenizer.").removeprefix("ggml."): value
            for key, value in metadata.items()
        }
        model, pre = meta.get("model"), meta.get("pre", "default")
        with reading(where):
            if model == "llama":
                prefix, bos = meta.get("add_space_prefix", True), True
                backend = sentencepiece_backend(
                    meta["tokens"], meta["scores"], meta["token_type"], dummy_prefix=prefix
                )
            elif model == "gpt2" and pre in PRE:
                cut, gpt2_words, whole_words, bos = PRE[pre]
                vocab = {token: i for i, token in enumerate(meta["tokens"])}
                merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
                backend = Backend(models.BPE(vocab, merges, ignore_merges=whole_words))
                steps = [pre_tokenizers.Split(Regex(cut), "isolated")] if cut else []
                steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)]
                backend.pre_tokenizer, backend.decoder = (
                    pre_tokenizers.Sequence(steps),
                    decoders.ByteLevel(),
                )
                add_tokens(backend, zip(meta["tokens"], meta["token_type"], strict=True))
            else:
                raise ValueError(
                    f"tokenizer {model!r}, pre {pre!r}; expected llama, or gpt2 with {', '.join(PRE)}"
                )
            return cls(
                backend,
                {"add_bos_token": bos, "pad_token_id": meta.get("padding_token_id"), **meta},
            )


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a known model, a hub id, a folder or a .gguf file. ValueError where there is none."""
    path = find(name_or_path, weights=False)
    return (
        Tokenizer.from_gguf(read_metadata(path), path)
        if path.is_file()
        else Tokenizer.from_folder(path)
    )


def find_tokenizer(path: Path) -> Tokenizer | None:
    """`load_tokenizer` of a path, which may be of a model that has none."""
    return (
        load_tokenizer(path)
        if path.is_file() or any((path / name).exists() for name in TOKENIZER_FILES)
        else None
    )


def special_id(backend, settings, kind):
    """The id of `{kind}_token`, a text or a dict with it, else `{kind}_token_id`, one or several; None if no token."""
    token, i = settings.get(f"{kind}_token", ""), settings.get(f"{kind}_token_id")
    named = backend.token_to_id(token["content"] if isinstance(token, dict) else token)
    i = named if named is not None else i[0] if isinstance(i, list) and i else i
    return (
        i if isinstance(i, int) and 0 <= i < 2**32 and backend.id_to_token(i) is not None else None
    )
