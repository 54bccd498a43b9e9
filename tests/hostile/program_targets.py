"""More files that the fuzz damages: chat templates, task files, LoRA adapters, generation configs.

What reading them must give is said by transformers, PEFT, and jinja2 as transformers uses it. If
such a peer cannot read a damaged file that minia3 reads, minia3 reads more, which is no failure.
"""

import functools
import json
import re
import tempfile

import torch
from chat_templates import CHATML, LLAMA2, LLAMA3, MISTRAL_V3
from conftest import make

import minia3
from minia3.adapters.lora import add_lora, load_lora, save_lora
from minia3.checkpoints.chat import read_template, render_chat
from minia3.checkpoints.load import read_checkpoint
from minia3.files.tensors import read_tensors
from minia3.tasks.prompts import render
from minia3.tasks.splits import load_task

MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b\nc "},
    {"role": "user", "content": "<é>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


# Chat templates


def make_templates(folder):
    for i, template in enumerate((CHATML, LLAMA2, LLAMA3, MISTRAL_V3)):
        (folder / f"{i}.jinja").write_text(template)


def read_chat_templates(folder):
    """The text is what transformers renders. The first template that cannot be read is refused."""
    for path in sorted(folder.iterdir()):
        template = read_template(path)
        found = render_chat(template, MESSAGES, SPECIAL).text
        assert found == their_text(template), path.name


def their_text(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"add_generation_prompt": True, **SPECIAL}
    texts, _ = render_jinja_template([MESSAGES], chat_template=template, **options)
    return texts[0]


# Task files


TASK = {
    "files": {"train": "rows.jsonl", "validation": "more.jsonl"},
    "fields": {"text": "body"},
    "label_field": "class",
    "labels": ["bad", "good"],
    "choices": ["No", "Yes"],
    "prompts": [
        {"text": "{title}: {body} Good?"},
        {"text": "Is {body} good?", "choices": ["false", "true"]},
    ],
    "metric": "accuracy",
}


def make_task(folder):
    (folder / "task.json").write_text(json.dumps(TASK))
    lines = []
    for n in range(6):
        row = {"title": f"t{n}", "text": f"{{x}} {n}", "class": ["bad", "good"][n % 2]}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "more.jsonl").write_text("".join(lines[:2]))


def read_task(folder):
    """The first prompt has the words that a plain reading of the file puts together."""
    task = load_task(folder)
    path = folder / "task.json"
    raw = json.loads(path.read_bytes()) if path.is_file() else {}
    if "prompts" not in raw:  # then the rows have the usual columns, which is another target
        return
    texts = {name: field for field, name in raw.get("fields", {}).items()}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_bytes().splitlines()]
    if raw.get("files", {}).get("train") != "rows.jsonl" or len(task.train) != len(rows):
        return
    for prompt, raw_prompt in zip(task.prompts, raw["prompts"], strict=True):
        for row, raw_row in zip(task.train, rows, strict=True):
            rendered = render(prompt, row)
            assert rendered.input == plain_text(raw_prompt["text"], raw_row, texts)
            if raw.get("labels") and "target" not in raw and "target" not in raw_prompt:
                choices = raw_prompt.get("choices") or raw.get("choices") or raw["labels"]
                assert rendered.choices == choices
                label = raw["labels"].index(label_of(raw_row, raw))
                assert rendered.label == label


def label_of(row, raw):
    columns = {column.lower(): value for column, value in row.items()}
    return columns[raw.get("label_field", "label").lower()]


def plain_text(template, row, fields):
    """Put columns in the place of braces, in upper or lower case. What is not there is empty."""
    columns = {column.lower(): value for column, value in row.items()}

    def value(match):
        name = match[1]
        found = columns.get(fields.get(name, name).lower())
        return "" if found is None or found != found else str(found)  # NaN is no text

    return re.sub(r"\{(\w+)\}", value, template)


# LoRA


@functools.cache
def base_folder():
    folder = tempfile.mkdtemp()
    make("llama-gqa").save_pretrained(folder)
    return folder


def make_lora(folder):
    model = minia3.load_model(base_folder())
    torch.manual_seed(0)
    for parameter in add_lora(model, rank=2, where=("q", "v", "down")).values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, folder)


def read_lora(folder):
    """The logits are those of the same files in PEFT, if PEFT reads them."""
    model = minia3.load_model(base_folder())
    load_lora(model, folder)
    weights = folder / "adapter_model.safetensors"
    source = torch.tensor([[5, 9, 30, 11]])
    with torch.no_grad():
        state = model.start(source)
        found = model.step(state.start, state)[:, 0]
        expected = their_lora_logits(folder, source)
        largest = max(entry.read().abs().max() for entry in read_tensors(weights).values())
    # Beyond that, the logits are nothing but rounding.
    if expected is not None and largest < 1e4:
        size = expected.abs().max()
        assert (found - expected).abs().max() <= 1e-4 * size, "other logits than PEFT's"


def their_lora_logits(folder, source):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder())
    try:
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    except Exception:  # whatever a damaged file raises there
        return None
    return theirs(input_ids=source).logits[:, -1]


# Generation configs


def make_generation_config(folder):
    config = {
        **{"model_type": "t5", "vocab_size": 61, "d_model": 8, "d_kv": 4, "d_ff": 12},
        **{"num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, "eos_token_id": 1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {
        **{"eos_token_id": [1, 5], "decoder_start_token_id": 0, "pad_token_id": 0},
        **{"max_length": 20, "temperature": 0.7, "do_sample": True, "num_beams": 1},
        **{"repetition_penalty": 1.0, "suppress_tokens": None, "forced_eos_token_id": None},
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))


def read_generation_config(folder):
    """The tokens that begin and end a text are those with which transformers generates."""
    import transformers

    config = read_checkpoint(folder, weights=False)[0]
    if not (folder / "generation_config.json").is_file():
        return
    try:
        theirs = transformers.GenerationConfig.from_pretrained(folder)
    except Exception:  # whatever a damaged file raises there
        return
    ends = theirs.eos_token_id
    if ends is not None:
        assert list(config.eos_ids) == (ends if isinstance(ends, list) else [ends]), "eos_ids"
    if theirs.decoder_start_token_id is not None:
        assert config.start_id == theirs.decoder_start_token_id, "start_id"
    nothing = {"suppress_tokens": (None, []), "forced_eos_token_id": (None,)}
    for key, values in nothing.items():
        assert getattr(theirs, key, None) in values, f"{key} is passed over"
