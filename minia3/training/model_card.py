"""The model card: the README.md in the folder of a trained adapter or model.

The hub reads the lines between `---` at the beginning. People read the rest: what was trained, how
well it does, how it was made, and the code that loads it.
"""

import dataclasses
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from minia3 import __version__
from minia3.checkpoints.known_models import hub_name, public_name
from minia3.files.messages import part_of, plural
from minia3.files.write import replacing
from minia3.tasks.download import HUB
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.split_files import HUB_PREFIX
from minia3.training.choices import DTYPES, TRAINED_ALONE
from minia3.training.doubts import notes_on_texts, notes_on_ties
from minia3.training.flags import as_tuple
from minia3.training.report import before_after, figure_of, format_value
from minia3.training.shown_commands import training_command

# The class of transformers for each of our architectures
AUTO_CLASSES = {"T5": "AutoModelForSeq2SeqLM", "Llama": "AutoModelForCausalLM"}


# What a vector scales, by the names of --sites
SCALED = {
    "k": "the keys",
    "v": "the values",
    "ff": "the inner activations of the feed-forward network",
    "q": "the queries",
    "o": "the outputs of attention",
    "up": "the outputs of the feed-forward network's up projection",
    "gate": "the outputs of the feed-forward network's gate projection",
}


@dataclass
class Facts:
    """What a card says: texts that are ready to be inserted."""

    model: str  # the base, as minia3 finds it
    base_code: str  # the lines of code with which transformers loads the base
    tasks: str
    n_trainable: str
    n_base: str
    share: str
    front_matter: str  # lines that the hub reads, whatever the method
    results: str  # a Markdown table, and what limits its figures
    origin: str  # how it was made, and from which files
    auto_class: str
    place: str  # a comment beside the base, if the reader must put it there
    scaled: str  # what the vectors of (IA)^3 scale
    layers: str  # in which layers
    further: str  # the command that trains a LoRA further


def write_card(folder, config, finals, checksums):
    """Write README.md into a folder. The other arguments are those of `card`."""
    with replacing(folder / "README.md") as temporary:
        # A path may hold bytes that are not UTF-8, and the card must be.
        temporary.write_text(card(config, finals, checksums), encoding="utf-8", errors="replace")


def card(config, finals, checksums):
    """Return the text of a card.

    config: the flags of the run (train.py's Config). finals: the final lines of metrics.jsonl for
    this adapter, one per task of a mixture. checksums: a dict from each data file to its sha256.
    """
    facts = collect_facts(config, finals, checksums)
    if config.method == "lora":
        return lora_card(facts)
    if config.method == "full":
        return full_card(facts)
    return ia3_card(facts)


def ia3_card(facts):
    return f"""\
---
{facts.front_matter}library_name: peft
tags: [ia3, peft]
---

# (IA)^3 for {facts.tasks}, on {facts.model}

{facts.n_trainable} parameters ({facts.share} of the base's {facts.n_base}) that rescale
{facts.scaled}, in {facts.layers} of {facts.model},
whose own parameters are unchanged: Liu et al. 2022, https://arxiv.org/abs/2205.05638.

{facts.results}

{facts.origin}

```python
import minia3

model = minia3.load_model({facts.model!r}){facts.place}
tokenizer = minia3.load_tokenizer({facts.model!r})
minia3.load_adapter(model, ".")  # this folder, or the name of this repository
```

```python
from peft import PeftModel
from transformers import {facts.auto_class}

{facts.base_code}
model = PeftModel.from_pretrained(base, ".")
```
"""


def lora_card(facts):
    return f"""\
---
{facts.front_matter}library_name: peft
tags: [lora, peft]
---

# LoRA for {facts.tasks}, on {facts.model}

{facts.n_trainable} parameters ({facts.share} of the base's {facts.n_base}): two thin matrices A and
B beside some of the weights W of {facts.model}, whose own parameters are unchanged. W x becomes
W x + alpha / r B A x: Hu et al. 2021, https://arxiv.org/abs/2106.09685. The file
adapter_config.json has alpha and r, and names these weights.

{facts.results}

{facts.origin}

```python
import minia3
from minia3.adapters.lora import load_lora

model = minia3.load_model({facts.model!r}){facts.place}
tokenizer = minia3.load_tokenizer({facts.model!r})
load_lora(model, ".")  # this folder, or the name of this repository
```

```sh
{facts.further}  # trains this LoRA further
```

```python
from peft import PeftModel
from transformers import {facts.auto_class}

{facts.base_code}
model = PeftModel.from_pretrained(base, ".")
```
"""


def full_card(facts):
    return f"""\
---
{facts.front_matter}library_name: transformers
---

# {facts.model}, fine-tuned for {facts.tasks}

All {facts.n_trainable} parameters of {facts.model}, trained further. This is a whole model, which
needs no other files.

{facts.results}

{facts.origin}

```python
import minia3

model = minia3.load_model(".")  # this folder, or the name of this repository
tokenizer = minia3.load_tokenizer(".")
```

```python
from transformers import AutoTokenizer, {facts.auto_class}

model = {facts.auto_class}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


def collect_facts(config, finals, checksums):
    final = finals[0]  # what does not depend on the task is the same in all of them
    base = hub_name(config.model)
    auto_class = AUTO_CLASSES[final["architecture"]]
    tasks = [final["task"] for final in finals]

    front_matter = ""
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    if is_on_hub:
        front_matter += f"base_model: {base}\n"
    data_sets = hub_data_sets(config)
    if data_sets:
        front_matter += f"datasets: {json.dumps(data_sets)}\n"  # a JSON list is valid YAML
    place = ""
    if os.path.isabs(base):
        place = "  # the base, which is not in this folder: put it here"

    model = shown_model(config.model)
    further = ["minia3", "train", "--model", model, "--task", "rows.jsonl", "--method", "lora"]
    return Facts(
        model=model,
        base_code=code_of_base(config.model, auto_class),
        tasks=", ".join(tasks),
        n_trainable=f"{final['trainable']:,}",
        n_base=f"{final['total']:,}",
        share=f"{final['trainable'] / final['total']:.3%}",
        front_matter=front_matter,
        results=describe_results(config, finals),
        origin=describe_origin(config, final, checksums),
        auto_class=auto_class,
        place=place,
        scaled=scaled_places(config),
        layers=scaled_layers(config, final["architecture"]),
        further=shlex.join([*further, "--adapter", "."]),
    )


def describe_origin(config, final, checksums):
    """Return how the adapter or the model was made, and what the command does not repeat."""
    dtype = final.get("dtype")  # which depends on the device if there was no --dtype
    if dtype in DTYPES:  # and not one dtype after the other
        config = dataclasses.replace(config, dtype=dtype)
    command = shlex.join(training_command(config))
    length = f"{final['steps']:,} {plural(final['steps'], 'step')}"
    origin = f"Trained for {length} by {code_span(command)}, finished with minia3 {__version__}"
    origin += ", on files with these SHA-256 checksums:\n\n"
    origin += "\n".join(f"- {name} `{checksum}`" for name, checksum in checksums.items())
    if final.get("best_step") is not None:
        origin += (
            f"\n\nThe parameters are those after step {final['best_step']:,}, the best ones on"
        )
        origin += " held-out rows (`--eval-every`)."
    is_of_grid = "adapter" in final and config.method not in TRAINED_ALONE
    if is_of_grid and config.dropout != 0:
        origin += "\n\nIt trained in one pass with the other adapters of a grid. If the base has"
        origin += (
            " dropout, they shared its draws, so the command gives a slightly different result."
        )
    if "extended_from" in final:
        steps = " and ".join(f"{step:,}" for step in final["extended_from"])
        origin += f"\n\nThe run was extended (`--resume`) after step {steps}. Until then, the"
        origin += " learning rate was that of a shorter run, so the command gives another result."
    return origin


def scaled_places(config):
    """Return what the trained vectors scale, as in "the keys, the values and the queries"."""
    sites = config.sites.split(",")
    *first, last = [text for site, text in SCALED.items() if site in sites]
    text = f"{', '.join(first)} and {last}" if first else last
    if config.no_cross:
        text += ", but not in cross-attention"
    return text


def scaled_layers(config, architecture):
    """Return in which layers the vectors train. architecture: a key of AUTO_CLASSES."""
    if config.layers == "0-":
        return "each layer"
    place = ", of the encoder and of the decoder" if architecture == "T5" else ""
    noun = "layer" if config.layers.isdecimal() else "the layers"
    return f"{noun} {config.layers} (counted from 0{place})"


def hub_data_sets(config):
    """Return the data sets of a run that are on the hub, by their names there.

    The hub makes links of them, so files, and tasks that come from elsewhere, are left out.
    """
    names = []
    for task in as_tuple(config.task):
        if task in known_tasks():
            addresses = [source.address for source in known_tasks()[task].sources]
            names += [text.removeprefix(HUB) for text in addresses if text.startswith(HUB)]
        elif task.startswith(HUB_PREFIX):
            name = task.removeprefix(HUB_PREFIX).partition(":")[0]
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists():
                names.append(name)
    return list(dict.fromkeys(names))


def code_span(text):
    """Return a text as code in a line of Markdown: between more backticks than it has in a row."""
    runs = re.findall("`+", text)
    if not runs:
        return f"`{text}`"
    longest = max(runs, key=len)
    fence = f"`{longest}"
    return f"{fence} {text} {fence}"


def shown_model(name):
    """Return the base as the user named it, but only the last part of an absolute path."""
    if os.path.isabs(name):
        return public_name(name)
    return name


def code_of_base(name, auto_class):
    """Return the lines of code that load the base with transformers.

    transformers does not find the embedded model, and reads no GGUF file as it stands and no
    folder in Meta's layout: `minia3 convert` makes a folder that it reads.
    """
    base = public_name(name)
    comment = ""
    is_folder = os.path.isdir(name)
    is_meta = is_folder and not os.path.exists(os.path.join(name, "config.json"))
    is_gguf = os.path.isfile(name) or name.endswith(".gguf")  # no other model is a single file
    if base == "tiny-t5" or is_meta or is_gguf:
        folder = f"{os.path.splitext(os.path.basename(base))[0]}-converted"
        command = shlex.join(["minia3", "convert", base, folder])
        comment = f"# transformers reads a folder that this command makes: {command}\n"
        base = folder
    return f"{comment}base = {auto_class}.from_pretrained({base!r})"


def describe_results(config, finals):
    """Return the table of the results, and a paragraph for each limit and each doubt."""
    paragraphs = [results_table(finals)]
    for final in finals:
        prefix = f"{final['task']}: " if len(finals) > 1 else ""
        paragraphs += [f"**Note:** {prefix}{text}." for text in notes_on_inputs(config, final)]
        paragraphs += [f"**Warning:** {prefix}{text}." for text in final.get("warnings", ())]
    return "\n\n".join(paragraphs)


def notes_on_inputs(config, final):
    """Return what limits a result: what the run has noted, and how many inputs were cut."""
    result = final | {"n": final["rows"]}
    notes = notes_on_texts(final["metric"], result, config.max_new_tokens)
    notes += notes_on_ties(result, final.get("dtype"))
    if final["rows_cut"]:
        inputs = part_of(final["rows_cut"], final["rows"], "input")
        verb = "was" if final["rows_cut"] == 1 else "were"
        notes.append(f"{inputs} {verb} cut to {config.max_length} tokens (--max-length)")
    return notes


def results_table(finals):
    """Return a Markdown table of the metrics before and after training, with a title per task."""
    title = ""
    if len(finals) == 1:
        title = format_rows(finals[0])
    lines = [f"| {title} | before | after |", "|---|---|---|"]
    for final in finals:
        prefix = ""
        if len(finals) > 1:
            prefix = f"{final['task']}, {format_rows(final)}: "
        metric, key, form = figure_of(final["metric"])
        name = prefix + metric
        if "accuracies" in final:
            # Of an even number of prompts, the median of the perplexity would be another one.
            median = "from the median of its inverse" if key == "perplexity" else "median"
            name += f", {median} over {len(final['accuracies'])} prompts"
        lines.append(format_line(name, before_after(final, key, form)))
        if final["auc"] is not None:
            lines.append(format_line(f"{prefix}AUC", before_after(final, "auc", ".2f")))
        if final.get("commonest") is not None:
            share = format_value(final["commonest"], ".1%")
            name = f"{prefix}{metric} of always giving the commonest label"
            lines.append(format_line(name, [share, share]))
    return "\n".join(lines)


def format_rows(final):
    return f"{final['rows']:,} {plural(final['rows'], 'row')} of {final['split']}"


def format_line(name, figures):
    return f"| {' | '.join([name, *figures])} |"
