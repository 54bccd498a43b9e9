"""Chapter 7, part two: what a task is, and how a task's files get here.

The table of tasks is tasks.json, data and not code: to add a task, add a row, of what `Spec` has. A row may be `like`
another, and say only what differs; its `choices` are those of its prompts that have none (by default, the labels).
"""

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from tqdm import tqdm

from minia3.prompts import OWN, Prompt

TIMEOUT = 30  # seconds without a byte
INFLATED = 100  # a zip's member may be so many times the archive; texts become four times as long
HUB = "https://huggingface.co/datasets/"
TABLE = Path(__file__).with_suffix(".json")
SHIPPED = Path(__file__).resolve().parent.parent / "data"  # what comes with the repository, whatever --data-dir says


class Source(NamedTuple):
    """Where files of a task come from. Without a sha256 it is a data set of the hub, or where to ask for them."""

    address: str
    files: dict[str, str]  # all that is taken: name in the task's folder -> name in the zip or data set, if it is one
    bytes: int = 0
    sha256: str = ""


class Spec(NamedTuple):
    """A row of the table. It has `sources` and `labels`, or it is `shipped`: own rows, such as a user brings."""

    prompts: tuple[Prompt, ...] = OWN
    sources: Sequence[Source] = ()
    labels: Sequence[str] = ()  # as they stand in the file, in the order of the prompts' choices
    label: str = "label"  # the field of them
    fields: Mapping[str, str] = {}  # column of the file -> what it is called here
    spans: str = ""  # of WSC: the field that holds its spans
    dev_ids: Sequence[str] = ()  # of MRPC: the file for validation has these fields, unnamed, of some rows of train
    metric: str = "accuracy"
    shots: int | None = None  # T-Few's
    per_class: bool = False  # shots are so many of each label
    few_shot: str = ""  # folder of T-Few's published splits, where it has another name
    seen: Sequence[str] = ()  # families whose pre-training had the task's labels: their numbers are not few-shot
    shipped: str = ""  # folder below SHIPPED


class Task(NamedTuple):
    """What `load_task` gives. Rows have their file's fields, and as integers `label` (-1: unlabelled) and `idx`."""

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    prompts: tuple[Prompt, ...]
    metric: str  # "accuracy", "macro_f1", or of own rows with targets "exact_match"
    seen: Sequence[str]
    checksums: dict[str, str]  # file name -> sha256
    notes: list[str]  # lines that a run should print
    split: str = "validation"  # what `validation` is

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """Name and rows of the split to report on: test if all of it is labelled, else validation. ValueError: none."""
        if self.test and all(row["label"] >= 0 for row in self.test):
            return "test", self.test
        if not self.validation:
            raise ValueError(f"{self.name}: no labelled rows to report on: add a validation file, or labels to test's")
        return self.split, self.validation


@cache
def table(path=TABLE):
    """Name -> Spec of a file such as tasks.json. Raises ValueError, in one line, for a key that no task has."""
    rows, tasks = json.loads(Path(path).read_text("utf-8")), {}
    for name, row in rows.items():
        try:
            row = (rows[row.pop("like")] if "like" in row else {}) | row
            choices, texts = row.pop("choices", row.get("labels")), row.pop("prompts", [])
            prompts = tuple(Prompt(**text | {"choices": tuple(text.get("choices", choices))}) for text in texts) or OWN
            tasks[name] = Spec(prompts, [Source(**source) for source in row.pop("sources", [])], **row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return tasks


def download(sources, folder):
    """Put the files of `sources` into `folder`. Raises ValueError, and leaves no part of one, whatever goes wrong."""
    wanted = ", ".join(name for source in sources for name in source.files)
    for source in reversed(sources):  # train is last, here and below: where it is, the others are
        try:
            contents = _fetch(source)
            folder.mkdir(parents=True, exist_ok=True)
            # Only whole files leave this process's own folder, by a rename: nothing half-written is ever seen.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
                for name, content in reversed(contents.items()):
                    if not (target := folder / name).exists():  # what somebody put there stays
                        Path(scratch, name).write_bytes(content)
                        os.replace(Path(scratch, name), target)
        except Exception as error:  # the network's, the disk's, a zip's: of many kinds
            what = " ".join(str(error).split()) or type(error).__name__  # one line, whatever a server answered
            raise ValueError(f"{source.address}: {what:.300}; or put {wanted} into {folder} by hand") from error


def _fetch(source):
    """The content of each file of a source, by its name in the folder."""
    if source.address.startswith(HUB):
        from huggingface_hub import hf_hub_download

        repo, get = source.address.removeprefix(HUB), hf_hub_download
        return {name: Path(get(repo, file, repo_type="dataset")).read_bytes() for name, file in source.files.items()}
    if not source.sha256:
        raise ValueError("the authors give these files to those who ask there")
    content, bar = bytearray(), {"total": source.bytes, "desc": source.address, "disable": None}
    with urlopen(source.address, timeout=TIMEOUT) as file, tqdm.wrapattr(file, "read", **bar) as body:
        while len(content) <= source.bytes and (chunk := body.read(1 << 16)):
            content += chunk
    expected = f"{source.bytes} bytes of sha256 {source.sha256}"
    if (found := f"{len(content)} bytes of sha256 {hashlib.sha256(content).hexdigest()}") != expected:
        raise ValueError(f"found {found}, expected {expected}")
    if not source.address.endswith(".zip"):
        return dict.fromkeys(source.files, content)
    file, most = zipfile.ZipFile(io.BytesIO(content)), INFLATED * source.bytes
    if bad := [member for member in source.files.values() if file.getinfo(member).file_size >= most]:
        raise ValueError(f"found {most} bytes or more in the zip's {', '.join(bad)}, expected less")
    return {name: file.read(member) for name, member in source.files.items()}


def fix_spans(row, field):
    """WSC's spans become fields, as in its "fixed" variant: one that is not in the text is spelled as at its index."""
    try:
        row |= row.pop(field, {})
        for n in (1, 2):
            text, index, span = row["text"], row[f"span{n}_index"], row[f"span{n}_text"].rstrip(".").replace("\n", " ")
            there = " ".join(text.split()[index:])[: len(span)]
            if row[f"span{n}_text"] not in text and there.lower() == span.lower():
                row[f"span{n}_text"] = there
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"'text' and {field!r} are not as expected: {error}") from None
