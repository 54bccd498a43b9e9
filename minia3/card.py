"""Chapter 9, the model card: the README.md in the folder of a run's adapter, for people and for the hub (card.md)."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

from minia3 import flags
from minia3.models import hub_name

AUTO = {"T5": "AutoModelForSeq2SeqLM", "Llama": "AutoModelForCausalLM"}  # class of ours -> of transformers
WHERE = ("model", "task", "out", "data_dir", "resume", "device")  # these say where something is; the others, what to do


def card(config, final):
    """The text of README.md. config: the run's flags, train.py's Config.

    final: the run's result, and `architecture`, the name of the model's class, and `data`, the files' checksums.
    """
    base = hub_name(config.model)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    differ = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    words = flags.words(config, ["model", "task", *(name for name in differ if name not in WHERE)])
    figures = [(final["metric"], "accuracy", ".1%")] + [("AUC", "auc", ".2f")] * (final["auc"] is not None)
    rows = [f"| {title} | {final[f'{key}_before']:{form}} | {final[key]:{form}} |" for title, key, form in figures]
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return text.format(
        **final,
        front=f"base_model: {base}\n" if on_hub else "",
        base="data/tiny-t5" if base == "tiny-t5" else base,  # in this project's repository
        dataset=json.dumps(final["task"]),
        share=final["trainable"] / final["total"],
        figures="\n".join(rows),
        command=shlex.join(["python", "train.py", *words]),
        checksums="\n".join(f"- {name} `{digest}`" for name, digest in final["data"].items()),
        auto=AUTO[final["architecture"]],
    )
