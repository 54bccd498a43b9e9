"""Chapter 7, part three: from a task's name, or a user's file, to batches of token ids.

    task    = load_task("rte", shots=32)                            download, check, read, split
    text, _ = fit(prompt, row, n_tokens, max_length)                see prompts.py
    example = encode_example(text, tokenizer, end)                  texts -> ids
    batch   = collate([example, ...], pad_id)                       ids -> padded tensors and their masks
    rows    = order(len(task.train), batch_size, seed)(step)        which rows make up the batch of a step

Shapes: B batch, M source length, C choices, L target length.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minia3.prompts import OWN, Rendered, render
from minia3.tasks import SHIPPED, TASKS, Spec, Task, download

SPLITS = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}  # -> names of the file
N_SHOWN = 5  # bad rows that are written out; the others are counted
MOST = 1 << 24  # bytes of a row


def load_task(name_or_path: str, data_dir: str = "data", shots: int | None = None, seed: int = 0) -> Task:
    """A known task by its name, or a user's own rows: a .jsonl or .csv file, or a folder with train, validation, test.

    A known task is read from `<data_dir>/<name>/{train,val,test}.jsonl`, and downloaded to there first if need be. Own
    rows are {"input", "target"} or {"input", "choices", "label"}; train alone is split in three. `shots`: train is
    T-Few's few-shot split, the first `shots` rows after a shuffle by `seed`. Raises ValueError, in one line.
    """
    name, notes = str(name_or_path), []
    spec = TASKS.get(name, Spec(OWN))
    files = _files(name, spec, data_dir)
    rows, checksums = _read(files, spec)
    name = os.path.basename(os.path.abspath(name)).removesuffix(".jsonl").removesuffix(".csv")
    if list(rows) == ["train"]:
        rows = _split(rows["train"], files["train"])
        notes.append(f"{files['train']} is split into train, validation and test, the same way each time")
    train, validation, test = (rows.get(split, []) for split in SPLITS)
    own = [] if spec.labels else [*train, *validation, *test]
    metric = "exact_match" if own and "target" in own[0] else "accuracy"
    if n := sum(row["input"] != row["input"].rstrip() for row in own):
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


def _files(name, spec, data_dir):
    """Paths by split: of a known task, downloaded if need be, or of a user's file or folder."""
    if spec.archive:
        folder = Path(data_dir, name)
        if not {"train", "validation"} <= _find(folder, ".jsonl").keys():
            download(spec.archive, folder)
        return _find(folder, ".jsonl")
    path, suffixes = Path(SHIPPED, spec.shipped) if spec.shipped else Path(name), (".jsonl", ".csv")
    if not (spec.shipped or os.path.exists(name)):
        hint = "".join(f"did you mean {near!r}? " for near in difflib.get_close_matches(name.lower(), TASKS, n=1))
        raise ValueError(f"{name!r} is no task, file or folder: {hint}Known tasks: {', '.join(sorted(TASKS))}")
    files = _find(path, *suffixes) if path.is_dir() else {"train": path} if path.suffix in suffixes else {}
    if not files:
        raise ValueError(
            f"{path}: expected a .jsonl or .csv file, or a folder of train, validation (val, dev) and test"
        )
    return files


def _find(folder, *suffixes):
    files = {}
    for split, names in SPLITS.items():
        for path in (folder / (name + suffix) for name in names for suffix in suffixes):
            if path.is_file() and files.setdefault(split, path) != path:
                raise ValueError(f"{folder} has {files[split].name} and {path.name}: keep one of them as {split}")
    return files


def read_rows(path: str | Path, column: str | None = "input") -> Iterator[tuple[int, dict | ValueError]]:
    """Each row of a .jsonl or .csv file: the number of its first line, and a dict or what is wrong with it.

    Streamed; a row of more than 16 MB, or that is not UTF-8, is the last to be read. A byte order mark, CRLF and blank
    lines are passed over. csv: commas, and a header that has `column`; an empty cell is as good as none, `choices` is a
    JSON list, or texts with | between. Raises ValueError where the file cannot be opened, or its header is wrong.
    """
    n_lines = n_bytes = 0

    def lines(file):
        nonlocal n_lines, n_bytes
        while line := file.readline(MOST + 1):  # ended by \n alone: JSON's texts may hold Unicode's separators
            n_lines, n_bytes = n_lines + 1, n_bytes + len(line)
            if n_bytes > MOST:
                raise ValueError(f"a row of more than {MOST} bytes")
            yield line.decode("utf-8-sig" if n_lines == 1 else "utf-8")

    try:
        with Path(path).open("rb") as file:
            records, header = lines(file), None
            if Path(path).suffix == ".csv":
                records = csv.reader(records, strict=True)
                header = next(filter(None, records), [])
                if column not in (None, *header) or len(set(header)) < len(header) or not header:
                    raise ValueError(
                        f"expected a header with {column or 'columns'!r}, none twice; found {header!r:.80}"
                    )
            while True:
                number, n_bytes = n_lines + 1, 0
                try:
                    if (record := next(records, None)) is None:  # also after an error of `lines`
                        return
                    if any(map(str.strip, record)):
                        yield number, _from_csv(header, record) if header else _json(dict, record)
                except (ValueError, csv.Error) as error:
                    yield number, ValueError(str(error))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', error)}") from None


def _json(kind, text):
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}: {text[:40]!r}") from None
    if not isinstance(value, kind):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value


def _from_csv(header, cells):
    if cells == header or len(cells) != len(header):
        raise ValueError(f"expected {len(header)} cells, other than the header's; found {len(cells)}: {cells!r:.80}")
    row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    if choices := row.get("choices"):
        row["choices"] = _json(list, choices) if choices[0] == "[" else [text.strip() for text in choices.split("|")]
    return row


def _read(files, spec):
    """Rows by split, checksums by file name. Whatever is wrong with any row of any file is in one ValueError."""
    rows, checksums, bad = {split: [] for split in files}, {}, []
    for split, path in files.items():
        number = 0
        for number, row in read_rows(path):
            try:
                rows[split].append(check_row(row, spec, split, len(rows[split])))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
        bad += [] if number else [f"{path}: no rows"]
        checksums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    targets = ["target" in row for part in rows.values() for row in part]
    if not spec.labels and 0 < sum(targets) < len(targets):
        where = ", ".join(map(str, files.values()))
        bad.append(f"{where}: {sum(targets)} rows have 'target', the others 'choices': a task has rows of one kind")
    if bad:
        raise ValueError("; ".join(bad[:N_SHOWN] + [f"and {len(bad) - N_SHOWN} more"] * (len(bad) > N_SHOWN)))
    return rows, checksums


def check_row(row, spec, split, number):
    """`row` with an integer `label` and `idx`. Raises ValueError for what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    labels, value = spec.labels, row.get("label")
    if not labels:  # a user's row: it has choices of its own, or a target, which is the only choice, and right
        if ("target" in row) == ("choices" in row):
            raise ValueError(f"expected either 'target', or 'choices' and 'label'; found {list(row)!r:.100}")
        kind, choices = ("choices", row["choices"]) if "choices" in row else ("target", [row["target"]])
        for key, texts in (("input", [row.get("input")]), (kind, choices)):
            good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
            if not good or len(set(texts)) < len(texts):
                expected = "a list of texts, none twice and none" if key == "choices" else "a text that is not"
                raise ValueError(f"{key!r} is {row.get(key)!r:.80}, expected {expected} empty")
        labels, value = [str(i) for i in range(len(choices))], value if kind == "choices" else 0
    label = str(value).lower()  # the files have "entailment", 1, true and "true"
    if label not in labels and not (split == "test" and label in ("none", "-1")):
        raise ValueError(f"'label' is {value!r:.40}, expected one of {', '.join(labels):.80}")
    row["label"] = labels.index(label) if label in labels else -1
    row["idx"] = row["idx"] if type(row.get("idx")) is int else number
    render(spec.prompts[0], row)  # names the field that is missing in a known task's row
    return row


def _split(rows, path):
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
    if bad := [n for n, one in enumerate(examples) if not (one.source and one.targets and all(one.targets))]:
        raise ValueError(f"example {bad[0]} of the batch has no target, or a source or target of no tokens")
    n_choices = max(len(example.targets) for example in examples)
    source_BM, mask_BM = _pad([example.source for example in examples], pad_id)
    targets, masks = _pad([t for e in examples for t in e.targets + [[]] * (n_choices - len(e.targets))], pad_id)
    target_BCL, target_mask_BCL = (x.view(len(examples), n_choices, -1) for x in (targets, masks))
    return Batch(source_BM, mask_BM, target_BCL, target_mask_BCL, torch.tensor([example.label for example in examples]))


def _pad(lists, pad_id):
    """(N, longest) ids, padded on the right, and their mask."""
    length = max(map(len, lists))
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids in lists])
    return torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in lists]), mask


def order(n_rows: int, batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """step -> indices of its batch's rows: a function of (seed, step) and nothing else, so resuming needs no state.

    Every epoch is a new permutation, and batches run on over its end: each has `batch_size` rows, and all rows come
    equally often. (T-Few's loader shuffles too, but drops an epoch's last batch if it is not full, even the only one.)
    """

    def rows(step):
        places = [divmod(i, n_rows) for i in range(step * batch_size, (step + 1) * batch_size)]
        # RandomState: numpy has frozen its streams; default_rng's may change from one version to the next.
        epochs = {epoch: np.random.RandomState([seed, epoch]).permutation(n_rows) for epoch in {e for e, _ in places}}
        return [int(epochs[epoch][n]) for epoch, n in places]

    return rows
