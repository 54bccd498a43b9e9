"""To be written."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

from minia3.checkpoints.known_models import hub_name
from minia3.files.write import replacing
from minia3.training.flags import flag_words
from minia3.training.report import before_after

AUTO = {
    "T5": "AutoModelForSeq2SeqLM",
    "Llama": "AutoModelForCausalLM",
}  # class of ours -> of transformers
WHERE = (
    "model",
    "task",
    "out",
    "data_dir",
    "resume",
    "device",
)  # these say where something is; the others, what to do


def write_card(folder, config, finals, checksums):
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(
            card(config, *(final | {"data": checksums} for final in finals)), encoding="utf-8"
        )


def card(config, *finals):
    """The text of README.md. config: the run's flags, train.py's Config.

    finals: the run's result, for each task of a mixture; with `data`, the checksums of its files.
    """
    final, base, tasks = finals[0], hub_name(config.model), [final["task"] for final in finals]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    differ = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    words = flag_words(config, ["model", "task", *(name for name in differ if name not in WHERE)])
    rows = []
    for one in finals:
        of = f"{one['task']}, {one['rows']:,} rows of {one['split']}: " if len(finals) > 1 else ""
        over = f", median over {len(one['accuracies'])} prompts" if "accuracies" in one else ""
        rows.append([of + one["metric"] + over, *before_after(one, "accuracy", ".1%")])
        rows += [[of + "AUC", *before_after(one, "auc", ".2f")]] if one["auc"] is not None else []
    _, *parts = re.split(
        "<!-- (.*) -->\n", Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    )
    text = "".join(
        x
        for methods, x in zip(parts[::2], parts[1::2], strict=True)
        if final["method"] in methods.split()
    )
    return text.format(
        **final | {"task": ", ".join(tasks)},
        measured=f"{final['rows']:,} rows of {final['split']}" if len(finals) == 1 else "",
        front=f"base_model: {base}\n" if on_hub else "",
        base="data/tiny-t5" if base == "tiny-t5" else base,  # in this project's repository
        datasets=json.dumps(tasks),
        share=final["trainable"] / final["total"],
        figures="\n".join(f"| {' | '.join(row)} |" for row in rows),
        command=shlex.join(["python", "train.py", *words]),
        checksums="\n".join(f"- {name} `{digest}`" for name, digest in final["data"].items()),
        auto=AUTO[final["architecture"]],
    )
