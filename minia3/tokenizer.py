"""Chapter 6, tokenizers: text to ids and back, from every form in which T5's and LLaMA's are published.

    tokenizer.json         Hugging Face's own form
    spiece.model           T5's sentencepiece file: pieces and scores; a text is the pieces of the highest sum (Unigram)
    tokenizer.model        LLaMA's: neighbours merge to the piece of the best score, leftmost first, until none do (BPE)
    .gguf                  the same pieces and scores ("llama"), or bytes and merges and the name of a rule ("gpt2")

The library `tokenizers` does the work. Ids are sentencepiece's, with three exceptions of the library, and so of T5's
published tokenizer.json: scores are summed in float64, not float32, so of two cuts that tie the other may win; a mark
that combines with a letter that is replaced may be lost; what follows a token that is added or user-defined begins like
a text, with a space of its own. A GGUF that names no rule is cut by GPT-2's (llama.cpp has one of its own). Sources:
google/sentencepiece (its .proto file, normalizer.cc, unigram_model.cc, bpe_model.cc) and ggml-org/llama.cpp
(llama-vocab.cpp).
"""

import json
import re
import struct
from datetime import datetime
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minia3.files import ADDED, BESIDE, FORMS, TEMPLATE, find, read_json, reading, write_json, writing_folder
from minia3.gguf_file import metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, in sentencepiece and GGUF alike
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
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
        several = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {"default": template}
        self.backend, self.chat_template = backend, several.get("default")
        ids = {f"{kind}_token": special_id(backend, settings, kind) for kind in ("bos", "eos", "pad")}
        ids["pad_token"] = ids["eos_token"] if ids["pad_token"] is None else ids["pad_token"]
        self.bos_id, self.eos_id, self.pad_id = ids["bos_token"], ids["eos_token"], ids["pad_token"] or 0
        self.special = {name: backend.id_to_token(i) for name, i in ids.items() if i is not None}
        known = {ids["eos_token"], *backend.get_added_tokens_decoder()}
        if not settings.get("pad_token") and ids["pad_token"] not in known:
            self.special.pop("pad_token", None)  # a config may name any id: what is a word stays one
        backend.add_special_tokens([*self.special.values()])  # not every file marks them; decode drops only what is
        if backend.post_processor is None:
            bos, eos = (settings.get(f"add_{name}") and self.special.get(name) for name in ("bos_token", "eos_token"))
            form, tokens = [*filter(None, (bos, "$A", eos))], [(self.special[name], ids[name]) for name in self.special]
            backend.post_processor = processors.TemplateProcessing(form, None, tokens)
        one = self.encode("\U0010fffd")  # fails now where an unknown character would later
        self.ends = one[-1:] == [self.eos_id] and one[:1] != [self.bos_id]  # T5's; a LLaMA may ask for both

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text` with the files' special tokens: T5 `</s>` behind, LLaMA `<s>` in front, SmolLM2 none."""
        with reading(f"text {text[:40]!r}"):  # half a surrogate pair; or what loading did not see of a damage
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
        prompt, joined = (self.encode(t, special=False) for t in ("a", "a " + text.removeprefix(" ")))
        return joined[len(prompt) :] + [self.eos_id] * end

    def chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "Hello"}, ...], up to where the answer begins.

        The checkpoint's chat_template, rendered in jinja2's sandbox as transformers' apply_chat_template does it.
        ValueError without jinja2 or a template, and where the template fails or refuses the messages.
        """

        def refuse(message):
            raise ValueError(message)

        if self.chat_template is None:
            raise ValueError("the tokenizer's files have no chat_template: give the whole prompt as a text")
        values = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None, **self.special}
        values |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
        with reading("chat_template", extra="chat"):
            from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

            sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own is made for HTML
            return self.encode(sandbox.from_string(self.chat_template).render(values), special=False)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens, and without ids that are none (T5's embedding has 28 rows more)."""
        return self.backend.decode([i for i in ids if 0 <= i < 2**32])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, by which transformers' AutoTokenizer gives the same ids."""
        config = {**self.special, **({"chat_template": self.chat_template} if self.chat_template else {})}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # LlamaTokenizer would make a normaliser of its own
        config["model_input_names"] = ["input_ids", "attention_mask"]  # not token_type_ids, which generate refuses
        with writing_folder(folder, replaces=[TEMPLATE]) as new:
            self.backend.save(str(new / "tokenizer.json"))
            write_json(new / "tokenizer_config.json", config)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The first of FORMS in the folder, with the small JSON files beside it. ValueError if none or damaged."""
        file = next((Path(path, name) for name in FORMS if Path(path, name).is_file()), None)
        if file is None:
            raise ValueError(f"{path}: no tokenizer; expected one of {', '.join(FORMS)}")
        beside = [read_json(Path(path, name)) for name in ("config.json", *BESIDE) if Path(path, name).is_file()]
        settings = {key: value for raw in beside for key, value in raw.items() if value is not None}
        with reading(file):
            if (template := Path(path, TEMPLATE)).is_file():
                settings["chat_template"] = template.read_text(encoding="utf-8")
            if file.suffix == ".json":
                return cls(Backend.from_buffer(file.read_bytes()), settings)
            (backend, ids), t5 = read_sentencepiece(file.read_bytes()), file.name == "spiece.model"
            if t5:  # its sentinels are not in the file: <extra_id_99> ... <extra_id_0> come behind the pieces
                if (n := settings.get("extra_ids", 100)) not in range(1001):
                    raise ValueError(f"extra_ids is {n!r}, expected 0 to 1000")
                backend.add_special_tokens([f"<extra_id_{i}>" for i in range(n)][::-1])
            older = read_json(Path(path, ADDED)) if Path(path, ADDED).is_file() else {}
            added = {i: {"content": token} for token, i in older.items()}
            added |= {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
            backend.add_tokens([AddedToken(**{**added[i], "normalized": False}) for i in sorted(added)])
            if wrong := [i for i in added if backend.token_to_id(added[i]["content"]) != i]:
                raise ValueError(f"added tokens have the ids {wrong}, but these do not follow the pieces")
            return cls(backend, {"add_bos_token": not t5, "add_eos_token": t5, **ids, **settings})

    @classmethod
    def from_gguf(cls, metadata: dict, where: str | Path = "GGUF") -> "Tokenizer":
        """The tokenizer in a GGUF file's metadata ("tokenizer.ggml.tokens" ...). ValueError for a kind not known."""
        meta = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in metadata.items()}
        model, pre = meta.get("model"), meta.get("pre", "default")
        with reading(where):
            if model == "llama":
                prefix, bos = meta.get("add_space_prefix", True), True
                backend = sentencepiece(meta["tokens"], meta["scores"], meta["token_type"], dummy_prefix=prefix)
            elif model == "gpt2" and pre in PRE:
                cut, gpt2_words, whole_words, bos = PRE[pre]
                vocab = {token: i for i, token in enumerate(meta["tokens"])}
                merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
                backend = Backend(models.BPE(vocab, merges, ignore_merges=whole_words))
                steps = [pre_tokenizers.Split(Regex(cut), "isolated")] if cut else []
                steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)]
                backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
                add_tokens(backend, zip(meta["tokens"], meta["token_type"], strict=True))
            else:
                raise ValueError(f"tokenizer {model!r}, pre {pre!r}; expected llama, or gpt2 with {', '.join(PRE)}")
            return cls(backend, {"add_bos_token": bos, "pad_token_id": meta.get("padding_token_id"), **meta})


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a known model, a hub id, a folder or a .gguf file. ValueError where there is none."""
    path = find(name_or_path, weights=False)
    return Tokenizer.from_gguf(metadata(path), path) if path.is_file() else Tokenizer.from_folder(path)


def tokenizer_at(path: Path) -> Tokenizer | None:
    """`load_tokenizer` of a path, which may be of a model that has none."""
    return load_tokenizer(path) if path.is_file() or any((path / name).exists() for name in FORMS) else None


def special_id(backend, settings, kind):
    """The id of `{kind}_token`, a text or a dict with it, else `{kind}_token_id`, one or several; None if no token."""
    token, i = settings.get(f"{kind}_token", ""), settings.get(f"{kind}_token_id")
    named = backend.token_to_id(token["content"] if isinstance(token, dict) else token)
    i = named if named is not None else i[0] if isinstance(i, list) and i else i
    return i if isinstance(i, int) and 0 <= i < 2**32 and backend.id_to_token(i) is not None else None


def add_tokens(backend, tokens):
    special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}  # what is found in a text before all else
    backend.add_tokens([AddedToken(t, special=special[k], normalized=False) for t, k in tokens if k in special])


def read_sentencepiece(data):
    """A sentencepiece file -> backend and special ids. Fields have their numbers from sentencepiece_model.proto."""
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", data):
        raise ValueError("this is Llama 3's tiktoken form, which is not read; use the model's tokenizer.json")
    model = list(fields(data))
    trainer, normalizer = (dict(fields(dict(model).get(number, b""))) for number in (2, 3))
    unigram = {1: True, 2: False}[trainer.get(3, 1)]  # the types WORD and CHAR are not read
    if trainer.get(24):
        raise ValueError("treat_whitespace_as_suffix is not read")
    pieces = [dict(fields(value)) for number, value in model if number == 1]
    pieces = [(p[1].decode(), *struct.unpack("<f", p.get(2, bytes(4))), p.get(3, NORMAL)) for p in pieces]
    ids = {"bos_token_id": trainer.get(41, 1), "eos_token_id": trainer.get(42, 2), "pad_token_id": trainer.get(43)}
    options = {"charsmap": normalizer.get(2), "dummy_prefix": normalizer.get(3, 1), "one_space": normalizer.get(4, 1)}
    return sentencepiece(*zip(*pieces, strict=True), unigram, **options), ids


def fields(data):
    """(number, value) of each field of a protobuf message: an int for a varint, bytes for any other."""
    at = 0

    def varint():
        nonlocal at
        first, at = at, re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]").match(data, at).end()
        return sum((byte & 127) << 7 * n for n, byte in enumerate(data[first:at]))

    while at < len(data):
        key = varint()
        value = varint() if key & 7 in (0, 2) else {1: 8, 5: 4}[key & 7]
        if key & 7:  # then this is the length
            value, at = data[at : at + value], at + value
        if at > len(data):
            raise ValueError("a field is cut")
        yield key >> 3, value


def sentencepiece(names, scores, kinds, unigram=False, charsmap=None, dummy_prefix=True, one_space=False):
    """Pieces in the order of their ids, and how a text is normalised -> a backend that gives sentencepiece's ids."""
    if UNKNOWN not in kinds or not all(abs(score) < float("inf") for score in scores):
        raise ValueError("damaged: no piece stands for the unknown, or a score is no number")
    unknown, has_bytes = kinds.index(UNKNOWN), BYTE in kinds
    if unigram:
        backend = Backend(models.Unigram(list(zip(names, scores, strict=True)), unknown, has_bytes))
    else:
        score = {name: score for name, score, kind in zip(names, scores, kinds, strict=True) if kind == NORMAL}
        lengths = sorted({len(name) for name in score})
        merges = [(name[:n], name[n:]) for name in score for n in lengths if name[:n] in score and name[n:] in score]
        # Ways to one piece tie, as do LLaMA-2's runs of spaces: the leftmost wins if the longest left half comes first.
        merges.sort(key=lambda halves: (-score[halves[0] + halves[1]], -len(halves[0])))
        vocab = {name: i for i, name in enumerate(names)}
        backend = Backend(models.BPE(vocab, merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=has_bytes))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), "")] if one_space else []
    prefix, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if dummy_prefix else ([], [])
    backend.normalizer = normalizers.Sequence([*steps, *prefix, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    add_tokens(backend, zip(names, kinds, strict=True))
    return backend
