"""Chapter 7, part three: from a task's name, or a user's file, to batches of token ids.

    task    = load_task("rte", shots=32)                            download, check, read, split
    text, _ = fit(prompt, row, n_tokens, max_length)                see prompts.py
    example = encode_example(text, tokenizer, end)                  texts -> ids
    batch   = collate([example, ...], pad_id)                       ids -> padded tensors and their masks
    rows    = order(len(task.train), batch_size, seed)(step)        which rows make up the batch of a step

Shapes: B batch, M source length, C choices, L target length.
"""

import difflib
import hashlib
import http.client
import json
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minia3 import prompts
from minia3.prompts import Rendered, render
from minia3.tasks import SHIPPED, TASKS, Archive, Spec, Task

SPLITS = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}  # -> names of the file
TIMEOUT = 30  # seconds without a byte
N_SHOWN = 5  # bad rows that are written out; the others are counted


def load_task(name_or_path: str, data_dir: str = "data", shots: int | None = None, seed: int = 0) -> Task:
    """A known task by its name, or a user's own rows: a .jsonl file, or a folder with train, validation and test.

    A known task is read from `<data_dir>/<name>/{train,val,test}.jsonl`, and downloaded to there first if need be. Own
    rows are {"input", "target"} or {"input", "choices", "label"}; train alone is split into train, validation and test.
    `shots`: train is T-Few's few-shot split, the first `shots` rows after a shuffle by `seed`.
    Raises ValueError, in one line, for whatever is wrong with the name, the files, a row or the transfer.
    """
    name, notes = str(name_or_path), []
    spec = TASKS.get(name)
    if spec is None:
        spec, files = Spec(prompts.OWN), _own_files(name)
        name = os.path.basename(os.path.abspath(name)).removesuffix(".jsonl")
    elif spec.archive:
        files = _known_files(spec.archive, Path(data_dir, name))
    else:
        files = _own_files(SHIPPED / spec.shipped)
    rows, checksums = _read(files, spec)
    if list(rows) == ["train"]:
        rows = _split(rows["train"], files["train"])
        sizes = ", ".join(f"{len(part)} {split}" for split, part in rows.items())
        notes.append(f"{files['train']} is split, the same way each time: {sizes}")
    train, validation, test = (rows.get(split, []) for split in SPLITS)
    metric = spec.metric if spec.labels or "choices" in next(iter(rows.values()))[0] else "exact_match"
    if n := sum(row["input"] != row["input"].rstrip() for part in rows.values() for row in part if not spec.labels):
        notes.append(f"{n} inputs end in white space: leave it out, the tokenizer puts a space before the answer")
    if n := sum(row["label"] < 0 for row in test):
        notes.append(f"{n} of {len(test)} test rows have no label: results are on validation")
    if shots is not None:
        if not 1 <= shots <= len(train):
            raise ValueError(f"{name}: expected 1 to {len(train)} shots, the rows to train on; found {shots}")
        # T-Few's `np.random.seed(seed); np.random.shuffle(rows)`: the same stream, but the global state stays as it is.
        np.random.RandomState(seed).shuffle(train)
        train = train[:shots]
    task = Task(name, train, validation, test, spec.prompts, metric, spec.seen, checksums, notes)
    if not task.evaluation[1]:
        raise ValueError(f"{name}: no labelled rows to report on: add validation.jsonl, or labels to test.jsonl")
    return task


# Files: where they are, and how they get there


def _find(folder: Path) -> dict[str, Path]:
    """The files of a folder by split."""
    files = {}
    for split, names in SPLITS.items():
        for path in (folder / f"{name}.jsonl" for name in names):
            if path.is_file() and files.setdefault(split, path) != path:
                raise ValueError(f"{folder} has {files[split].name} and {path.name}: keep one of them as {split}")
    return files


def _own_files(path: str | Path) -> dict[str, Path]:
    if not os.path.exists(path):
        hint = "".join(f"did you mean {name!r}? " for name in difflib.get_close_matches(str(path).lower(), TASKS, n=1))
        raise ValueError(f"{str(path)!r} is no task, file or folder: {hint}Known tasks: {', '.join(sorted(TASKS))}")
    path = Path(path)
    if not path.is_dir() and path.suffix != ".jsonl":
        raise ValueError(f"{path}: expected a .jsonl file, with one JSON object a line, or a folder of such files")
    files = _find(path) if path.is_dir() else {"train": path}
    if not files:
        raise ValueError(f"{path} has none of train.jsonl, validation.jsonl (or val, dev), test.jsonl")
    return files


def _known_files(archive: Archive, folder: Path) -> dict[str, Path]:
    if {"train", "validation"} <= _find(folder).keys():
        return _find(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All is made in a folder of this process's own, which goes whatever happens, and only whole files leave it, by
        # a rename: nothing half-written is ever seen or left behind, and two processes at once do not meet.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            _download(archive, Path(scratch, "archive.zip"))
            _unpack(Path(scratch, "archive.zip"), archive.members, folder)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, ValueError) as error:
        wanted = ", ".join(f"{name}.jsonl" for name in archive.members)
        what = " ".join(str(error).split())  # one line, whatever a server answered
        raise ValueError(f"{archive.address}: {what:.300}; or put {wanted} into {folder} by hand") from error
    return _find(folder)


def _download(archive: Archive, path: Path) -> None:
    with (
        urllib.request.urlopen(archive.address, timeout=TIMEOUT) as response,
        path.open("wb") as file,
        tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.address, disable=None) as bar,
    ):
        while file.tell() <= archive.size and (chunk := response.read(1 << 16)):
            bar.update(file.write(chunk))
        came, promised = file.tell(), int(response.headers.get("Content-Length", file.tell()))
    if came < min(promised, archive.size):
        raise ValueError(f"the connection was closed after {came} of {promised} bytes: try again")
    if came != archive.size:
        raise ValueError(f"expected {archive.size} bytes, but the file there has {max(came, promised)}")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != archive.sha256:
        raise ValueError(f"expected sha256 {archive.sha256}, but the file there has {found}")


def _unpack(path: Path, members: dict[str, str], folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if climbs := [name for name in names if {"", ".."} & set(name.rstrip("/").split("/"))]:
            raise ValueError(f"the zip has an entry that climbs out of its folder, {climbs[0]!r}")
        if missing := [name for name in members.values() if name not in names]:
            raise ValueError(f"the zip has no {', '.join(missing)}")
        for name, member in reversed(members.items()):  # train is last: where it is, the others are
            whole, target = path.with_name(f"{name}.jsonl"), folder / f"{name}.jsonl"
            whole.write_bytes(archive.read(member))
            if not target.exists():  # what somebody put there stays
                os.replace(whole, target)


# Rows: read, checked, split


def _read(files: dict[str, Path], spec: Spec) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Rows by split, checksums by file name. Whatever is wrong with any row of any file is in one ValueError."""
    rows, checksums, bad = {}, {}, []
    for split, path in files.items():
        rows[split], digest, n_bad = [], hashlib.sha256(), len(bad)
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):  # ended by \n alone: JSON's texts may hold Unicode's separators
                    digest.update(line)
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                        if text.strip():
                            rows[split].append(_parse(text, spec, split, len(rows[split])))
                    except UnicodeDecodeError:
                        bad.append(f"{path}:{number}: not UTF-8 text")
                        break  # the file's other lines would say the same
                    except ValueError as error:
                        bad.append(f"{path}:{number}: {error}")
        except OSError as error:
            bad.append(f"{path}: {error.strerror}")
        if not rows[split] and len(bad) == n_bad:
            bad.append(f"{path}: no rows")
        checksums[path.name] = digest.hexdigest()
    n_targets = sum("target" in row for part in rows.values() for row in part)
    if not spec.labels and 0 < n_targets < sum(map(len, rows.values())):
        where = ", ".join(map(str, files.values()))
        bad.append(f"{where}: {n_targets} rows have 'target', the others 'choices': a task has rows of one kind")
    if bad:
        more = f"; and {len(bad) - N_SHOWN} more" if len(bad) > N_SHOWN else ""
        raise ValueError("; ".join(bad[:N_SHOWN]) + more)
    return rows, checksums


def _parse(line: str, spec: Spec, split: str, number: int) -> dict:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails for half a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {row!r:.40}")
    if not spec.labels:
        row["label"] = _own_label(row, split)
    elif "label" not in row and split == "test":
        row["label"] = -1
    elif (label := str(row.get("label")).lower()) in spec.labels:  # the files have "entailment", 1, true and "true"
        row["label"] = spec.labels.index(label)
    else:
        raise ValueError(f"'label' is {row.get('label')!r:.40}, expected one of {', '.join(spec.labels)}")
    row["idx"] = row["idx"] if type(row.get("idx")) is int else number
    render(spec.prompts[0], row)  # names the field that is missing in a known task's row
    return row


def _own_label(row: dict, split: str) -> int:
    """The label of a user's row, when all of the row has been checked."""
    if ("target" in row) == ("choices" in row):
        raise ValueError(f"expected either 'target', or 'choices' and 'label'; found {', '.join(map(repr, row))}"[:200])
    kind, label = ("target" if "target" in row else "choices"), row.get("label")
    choices = [row["target"]] if kind == "target" else row["choices"]
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"'choices' is {choices!r:.40}, expected a list of one text or more")
    for key, text in [("input", row.get("input")), *((kind, choice) for choice in choices)]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key!r}: expected a text that is not empty, found {text!r:.40}")
    if len(set(choices)) < len(choices):
        raise ValueError(f"'choices' has the same text twice: {choices!r:.80}")
    if kind == "target":
        return 0
    if split == "test" and (label is None or label == -1):
        return -1
    if type(label) is not int or not 0 <= label < len(choices):  # bool is an int to isinstance
        raise ValueError(f"'label' is {label!r:.40}, expected the right choice's number: 0 to {len(choices) - 1}")
    return label


def _split(rows: list[dict], path: Path) -> dict[str, list[dict]]:
    """80/10/10, at least one row each, in the file's order; not by the run's seed: all seeds test on the same rows."""
    if len(rows) < 3:
        raise ValueError(f"{path}: too few rows to split ({len(rows)}): give a folder with train, validation, test")
    shuffled, n = np.random.RandomState(0).permutation(len(rows)), max(1, len(rows) // 10)
    parts = {"train": shuffled[2 * n :], "validation": shuffled[:n], "test": shuffled[n : 2 * n]}
    return {split: [rows[i] for i in sorted(part)] for split, part in parts.items()}


class Example(NamedTuple):
    source: list[int]
    targets: list[list[int]]
    label: int


class Batch(NamedTuple):
    source_BM: torch.Tensor  # long, padded on the right
    mask_BM: torch.Tensor  # bool, False on padding
    target_BCL: torch.Tensor  # long, padded on the right
    target_mask_BCL: torch.Tensor  # bool, False on padding and on choices that a row does not have
    label_B: torch.Tensor  # long, -1 where there is none


def encode_example(rendered: Rendered, tokenizer, end: bool) -> Example:
    """Texts to ids. `end`: whether a decoder-only model's targets get the end token (T5's always have it)."""
    targets = [tokenizer.encode_target(choice, end=end) for choice in rendered.choices]
    return Example(tokenizer.encode(rendered.input), targets, rendered.label)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Examples as tensors. Raises ValueError where one has nothing to read, or nothing to score: all is masked."""
    for n, example in enumerate(examples):
        if not (example.source and example.targets and all(example.targets)):
            raise ValueError(f"example {n} of the batch has no target, or a source or target of no tokens: {example}")
    n_choices = max(len(example.targets) for example in examples)
    source_BM, mask_BM = _pad([example.source for example in examples], pad_id)
    targets, masks = _pad([t for e in examples for t in e.targets + [[]] * (n_choices - len(e.targets))], pad_id)
    target_BCL, target_mask_BCL = (x.view(len(examples), n_choices, -1) for x in (targets, masks))
    return Batch(source_BM, mask_BM, target_BCL, target_mask_BCL, torch.tensor([example.label for example in examples]))


def _pad(lists: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, longest) ids, padded on the right, and their mask."""
    length = max(map(len, lists))
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids in lists])
    return torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in lists]), mask


def order(n_rows: int, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """step -> indices of its batch's rows: a function of (seed, step) and nothing else, so resuming needs no state.

    Every epoch is a new permutation, and batches run on over its end: each has `batch_size` rows, and all rows come
    equally often. (T-Few's loader shuffles too, but drops an epoch's last batch if it is not full, even the only one.)
    """
    if n_rows < 1:
        raise ValueError("no rows to train on: add train.jsonl")

    def rows(step: int) -> list[int]:
        epoch, first = divmod(step * batch_size, n_rows)
        epochs = range(epoch, epoch + (first + batch_size - 1) // n_rows + 1)
        # RandomState: numpy has frozen its streams; default_rng's may change from one version to the next.
        stream = [i for e in epochs for i in np.random.RandomState([seed, e]).permutation(n_rows).tolist()]
        return stream[first : first + batch_size]

    return rows
