"""Chapter 7, part two: what a task is, the table of them, and how a task's files get here.

To add a task, add a row, and its prompts in prompts.py.
"""

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from tqdm import tqdm

from minia3 import prompts
from minia3.prompts import Prompt

TIMEOUT = 30  # seconds without a byte
INFLATED = 100  # a zip's member may be so many times the archive; texts become four times as long
SHIPPED = Path(__file__).resolve().parent.parent / "data"  # what comes with the repository, whatever --data-dir says


class Archive(NamedTuple):
    address: str  # of a zip
    size: int  # bytes
    sha256: str
    members: dict[str, str]  # all that is taken out: train, val, test -> name inside the zip


class Spec(NamedTuple):
    """A row of the table. It has an `archive` and `labels`, or it is `shipped`: own rows, such as a user brings."""

    prompts: tuple[Prompt, ...]
    archive: Archive | None = None
    labels: tuple[str, ...] = ()  # as they stand in the file, str(...).lower(), in the order of the prompts' choices
    shipped: str = ""  # folder below SHIPPED
    seen: tuple[str, ...] = ()  # families whose pre-training had the task's labels: their numbers are not few-shot


class Task(NamedTuple):
    """What `load_task` gives. Rows have their file's fields, and as integers `label` (-1: unlabelled) and `idx`."""

    name: str
    train: list[dict]
    validation: list[dict]
    test: list[dict]
    prompts: tuple[Prompt, ...]
    metric: str  # "accuracy", or of own rows with targets "exact_match"
    seen: tuple[str, ...]
    checksums: dict[str, str]  # file name -> sha256
    notes: list[str]  # lines that a run should print

    @property
    def evaluation(self) -> tuple[str, list[dict]]:
        """Name and rows of the split to report on: test where every row of it has a label, else validation."""
        labelled = self.test and all(row["label"] >= 0 for row in self.test)
        return ("test", self.test) if labelled else ("validation", self.validation)


def _superglue(name, size, sha256, texts, labels):
    """SuperGLUE was in the mixtures that T5 v1.0 and Flan-T5 were pre-trained on."""
    address = f"https://dl.fbaipublicfiles.com/glue/superglue/data/v2/{name}.zip"
    members = {split: f"{name}/{split}.jsonl" for split in ("train", "val", "test")}
    return Spec(texts, Archive(address, size, sha256, members), labels, seen=("t5-v1.0", "flan-t5"))


TASKS = {
    "same-colour": Spec(prompts.OWN, shipped="same-colour"),  # the embedded one: see data/README.md
    "rte": _superglue("RTE", 750920, "6310aab3f000424c9d0318a1ff20692e07c7f4aa15e8f17a5972ea0a35c398b9",
                      prompts.RTE, ("entailment", "not_entailment")),
    "cb": _superglue("CB", 75482, "8d641383298d54554066ba1c93f56ae7410af75df621b90c63028806bbbbb535",
                     prompts.CB, ("entailment", "contradiction", "neutral")),
    "copa": _superglue("COPA", 43986, "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f",
                       prompts.COPA, ("0", "1")),
}  # fmt: skip


def download(archive, folder):
    """Put the members of `archive` into `folder`. Raises ValueError, and leaves nothing, whatever goes wrong."""
    content, bar = bytearray(), {"total": archive.size, "desc": archive.address, "disable": None}
    try:
        with urlopen(archive.address, timeout=TIMEOUT) as file, tqdm.wrapattr(file, "read", **bar) as body:
            while len(content) <= archive.size and (chunk := body.read(1 << 16)):
                content += chunk
        expected = f"{archive.size} bytes of sha256 {archive.sha256}"
        if (found := f"{len(content)} bytes of sha256 {hashlib.sha256(content).hexdigest()}") != expected:
            raise ValueError(f"found {found}, expected {expected}")
        file, most = zipfile.ZipFile(io.BytesIO(content)), INFLATED * archive.size
        if bad := [member for member in archive.members.values() if file.getinfo(member).file_size >= most]:
            raise ValueError(f"found {most} bytes or more in the zip's {', '.join(bad)}, expected less")
        folder.mkdir(parents=True, exist_ok=True)
        # Only whole files leave this process's own folder, by a rename: nothing half-written is ever seen.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            for name, member in reversed(archive.members.items()):  # train is last: where it is, the others are
                if not (target := folder / f"{name}.jsonl").exists():  # what somebody put there stays
                    os.replace(file.extract(member, scratch), target)
    except Exception as error:  # the network's, the disk's, a zip's: of many kinds
        what = " ".join(str(error).split()) or type(error).__name__  # one line, whatever a server answered
        wanted = ", ".join(f"{name}.jsonl" for name in archive.members)
        raise ValueError(f"{archive.address}: {what:.300}; or put {wanted} into {folder} by hand") from error
