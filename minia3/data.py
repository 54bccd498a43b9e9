"""Chapter 7, part three: from a task's name, or a user's file, to batches of token ids.

    task    = load_task("rte", shots=32)                            download, check, read, split
    text, _ = fit(prompt, row, n_tokens, max_length)                see prompts.py
    example = encode_example(text, tokenizer, end)                  texts -> ids
    batch   = collate([example, ...])                               ids -> padded tensors and their masks
    rows    = order(len(task.train), batch_size, seed)(step)        which rows make up the batch of a step

Shapes: B batch, M source length, C choices, L target length.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minia3 import tasks
from minia3.prompts import Rendered, render
from minia3.tasks import SHIPPED, Spec, Task

SPLITS = {  # -> names of the file; the last ones are RAFT's and StoryCloze's
    "train": ("train", "cloze_test_val__spring2016 - cloze_test_ALL_val"),
    "validation": ("validation", "val", "dev"),
    "test": ("test", "test_unlabeled", "cloze_test_test__spring2016 - cloze_test_ALL_test"),
}
FORMS = {".csv": {"strict": True}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
FOLDS = 5  # of RAFT's train rows: it hides the labels of the test rows
N_SHOWN = 5  # bad rows that are written out; the others are counted
MOST = 1 << 24  # bytes of a row
WINDOW = 32  # steps


def load_task(name_or_path: str, data_dir: str = "data", shots: int | None = None, seed: int = 0) -> Task:
    """A known task by its name, or a user's own rows: a .jsonl or .csv file, or a folder with train, validation, test.

    A known task is read from `<data_dir>/<name>`, and downloaded to there first if need be; where that fails, T-Few's
    published splits are read from `<data_dir>/few_shot`. Own rows are {"input", "target"} or {"input", "choices",
    "label"}; train alone is split in three. `shots`: train is T-Few's few-shot split, the first `shots` rows (of SST-2,
    of each class) after a shuffle by `seed`. RAFT's test labels are hidden: a fifth of its 50 train rows is held out,
    another for each of five seeds in a row, or with shots=50 none. Raises ValueError, in one line.
    """
    name, notes = str(name_or_path), []
    spec = tasks.table().get(name, Spec())
    files = _files(name, spec, data_dir, seed, notes)
    known, split = bool(spec.labels), "T-Few's other splits" if seed in files else "validation"
    rows = _read({split: files[split] for split in files if split != "validation" or not spec.dev_ids}, spec)
    checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()}
    if seed in files:
        drawn = {row["idx"] for row in rows[seed]}
        others = {row["idx"]: row for part in rows.values() for row in part if row["idx"] not in drawn}
        rows = {"train": rows[seed], "validation": list(others.values())}
    elif not known and list(rows) == ["train"]:
        rows = _split(rows["train"], files["train"])
        notes.append(f"{files['train']} is split into train, validation and test, the same way each time")
    train, validation, test = (rows.get(split, []) for split in SPLITS)
    own = [] if known else [*train, *validation, *test]
    metric = "exact_match" if own and "target" in own[0] else spec.metric
    name = name if known else os.path.basename(os.path.abspath(name)).removesuffix(".jsonl").removesuffix(".csv")
    if n := sum(row["input"] != row["input"].rstrip() for row in own):
        notes.append(f"{n} inputs end in white space: leave it out, the tokenizer puts a space before the answer")
    n_hidden = sum(row["label"] < 0 for row in test)
    if spec.dev_ids:
        ids = {tuple(line.split()) for line in files["validation"].read_text("utf-8").splitlines()}
        validation = [row for row in train if tuple(map(row.get, spec.dev_ids)) in ids]
    elif known and n_hidden and not validation and shots != len(train):
        validation = [train[i] for i in np.random.RandomState(0).permutation(len(train))[seed % FOLDS :: FOLDS]]
        notes.append(f"fold {seed % FOLDS + 1} of {FOLDS} is held out: {FOLDS} seeds in a row report on each row once")
    if not rows.get("validation"):  # then they are rows of train
        held = {row["idx"] for row in validation}
        train = [row for row in train if row["idx"] not in held]
    if n_hidden and validation:
        notes.append(f"{n_hidden} of {len(test)} test rows have no label: results are on validation")
    if shots is not None:
        labels = range(len(spec.labels)) if spec.per_class else ()
        parts = [[row for row in train if row["label"] == label] for label in labels] or [train]
        if not (n := min(map(len, parts))) >= shots >= 1:
            raise ValueError(f"{name}: expected 1 to {n} shots{' of a label' * bool(labels)}, found {shots}")
        # T-Few's `np.random.seed(seed); np.random.shuffle(rows)`: the same stream, but the global state stays as it is.
        for part in [] if seed in files else parts:
            np.random.RandomState(seed).shuffle(part)
        train = [row for part in parts for row in part[:shots]]
    task = Task(name, train, validation, test, spec.prompts, metric, spec.seen, checksums, notes, split)
    _ = known or task.evaluation  # raises where there is nothing to report on
    return task


def _files(name, spec, data_dir, seed, notes):
    """Paths by split, of a known task or of a user's file or folder; or by seed, of T-Few's published splits."""
    path, suffixes = Path(SHIPPED, spec.shipped) if spec.shipped else Path(name), (".jsonl", ".csv")
    if spec.sources:
        path, names = Path(data_dir, name), [Path(file) for source in spec.sources for file in source.files]
        suffixes = {file.suffix for file in names}
        needed = {"train", "validation" if {file.stem for file in names} & {*SPLITS["validation"]} else "test"}
        try:
            if not needed <= _find(path, suffixes).keys():
                tasks.download(spec.sources, path)
        except ValueError as error:
            folder = Path(data_dir, "few_shot", spec.few_shot or name, f"{spec.shots}_shot")
            files = {int(file.stem.removesuffix("_seed")): file for file in sorted(folder.glob("*_seed.jsonl"))}
            if seed not in files:
                raise ValueError(f"{error}{'; published are seeds ' * bool(files)}{sorted(files) or ''}") from None
            notes.append(f"{error}; so this is T-Few's published split, evaluated on those of the other seeds")
            return files
    elif not (spec.shipped or os.path.exists(name)):
        hint = "".join(f"did you mean {x!r}? " for x in difflib.get_close_matches(name.lower(), tasks.table(), n=1))
        raise ValueError(f"{name!r} is no task, file or folder: {hint}Known tasks: {', '.join(tasks.table())}")
    if files := _find(path, suffixes) if path.is_dir() else {"train": path} if path.suffix in suffixes else {}:
        return files
    raise ValueError(f"{path}: expected a .jsonl or .csv file, or a folder of train, validation (val, dev) and test")


def _find(folder, suffixes):
    files = {}
    for split, names in SPLITS.items():
        for path in (folder / (name + suffix) for name in names for suffix in suffixes):
            if path.is_file() and files.setdefault(split, path) != path:
                raise ValueError(f"{folder} has {files[split].name} and {path.name}: keep one of them as {split}")
    return files


def read_rows(path: str | Path, column: str | None = "input") -> Iterator[tuple[int, dict | ValueError]]:
    """Each row of a .jsonl, .csv or .tsv file: the number of its first line, and a dict or what is wrong with it.

    Streamed; a row of more than 16 MB, or that is not UTF-8, is the last to be read. A byte order mark, CRLF and blank
    lines are passed over. csv: commas, and a header; one that has `column`, and then an empty cell is as good as none,
    and `choices` is a JSON list, or texts with | between. tsv: tabs, no quotes. Raises ValueError where the file cannot
    be opened, or its header is wrong.
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
            if form := FORMS.get(Path(path).suffix):
                records = csv.reader(records, **form)
                header = next(filter(None, records), [])
                if column not in (None, *header) or len(set(header)) < len(header) or not header:
                    raise ValueError(f"expected a header with {column or 'names'!r}, none twice; found {header!r:.80}")
            while True:
                number, n_bytes = n_lines + 1, 0
                try:
                    if (record := next(records, None)) is None:  # also after an error of `lines`
                        return
                    if any(map(str.strip, record)):
                        yield number, _from_csv(header, record, column) if header else _json(dict, record)
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


def _from_csv(header, cells, column):
    if cells == header or len(cells) != len(header):
        raise ValueError(f"expected {len(header)} cells, other than the header's; found {len(cells)}: {cells!r:.80}")
    row = {name: cell for name, cell in zip(header, cells, strict=True) if cell or column is None}
    if choices := row.get("choices"):
        row["choices"] = _json(list, choices) if choices[0] == "[" else [text.strip() for text in choices.split("|")]
    return row


def _read(files, spec):
    """Rows by split. Whatever is wrong with any row of any file is in one ValueError."""
    rows, bad = {split: [] for split in files}, []
    for split, path in files.items():
        number = 0
        for number, row in read_rows(path, None if spec.labels else "input"):
            try:
                rows[split].append(check_row(row, spec, split, len(rows[split])))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
        bad += [] if number else [f"{path}: no rows"]
    targets = ["target" in row for part in rows.values() for row in part]
    if not spec.labels and 0 < sum(targets) < len(targets):
        where = ", ".join(map(str, files.values()))
        bad.append(f"{where}: {sum(targets)} rows have 'target', the others 'choices': a task has rows of one kind")
    if bad:
        raise ValueError("; ".join(bad[:N_SHOWN] + [f"and {len(bad) - N_SHOWN} more"] * (len(bad) > N_SHOWN)))
    return rows


def check_row(row, spec, split, number):
    """`row` with an integer `label` and `idx`. Raises ValueError for what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    row = {spec.fields.get(name, name): value for name, value in row.items()}
    if spec.spans:
        tasks.fix_spans(row, spec.spans)
    labels, value = spec.labels, row.get(spec.label)
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
    lower, label = [label.lower() for label in labels], str(value).lower()  # files have 1, true, "true" and "True"
    if label not in lower and type(value) is int and 0 <= value < len(labels):
        label = lower[value]  # in T-Few's published splits it is an index
    if label not in lower and not (split == "test" and label in ("none", "-1", "")):
        raise ValueError(f"{spec.label!r} is {value!r:.40}, expected one of {', '.join(labels):.80}")
    row["label"] = lower.index(label) if label in lower else -1
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


def encode_example(rendered: Rendered, tokenizer, end: bool, source: list[int] | None = None) -> Example:
    """Texts to ids. `end`: whether a LLaMA's targets get the end token (T5's always have it). `source`: if known."""
    targets = [tokenizer.encode_target(choice, end=end) for choice in rendered.choices]
    return Example(source or tokenizer.encode(rendered.input), targets, rendered.label)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples as tensors. Raises ValueError where one has nothing to read, or nothing to score: all is masked."""
    if bad := [n for n, one in enumerate(examples) if not (one.source and one.targets and all(one.targets))]:
        raise ValueError(f"example {bad[0]} of the batch has no target, or a source or target of no tokens")
    n_choices = max(len(example.targets) for example in examples)
    source_BM, mask_BM = pad([example.source for example in examples])
    targets, masks = pad([t for e in examples for t in e.targets + [[]] * (n_choices - len(e.targets))])
    target_BCL, target_mask_BCL = (x.view(len(examples), n_choices, -1) for x in (targets, masks))
    return Batch(source_BM, mask_BM, target_BCL, target_mask_BCL, torch.tensor([example.label for example in examples]))


def pad(lists):
    """(N, longest) ids, padded on the right, and their mask. Any id would do: a pad token may have no embedding."""
    length = max(map(len, lists))
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids in lists])
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in lists]), mask


def order(n_rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> Callable[[int], list[int]]:
    """step -> indices of its batch's rows: a function of (seed, step) and nothing else, so resuming needs no state.

    Every epoch is a new permutation, and batches run on over its end: each has `batch_size` rows, and all rows come
    equally often. (T-Few's loader shuffles too, but drops an epoch's last batch if it is not full, even the only one.)
    lengths: of the rows; then WINDOW steps share their rows out by length, and come in a random order.
    """
    of = lru_cache(2)(lambda epoch: np.random.RandomState([seed, epoch]).permutation(n_rows))  # numpy froze its streams

    def rows(step):
        window, nth = divmod(step, n_steps := 1 if lengths is None else WINDOW)
        places = [divmod(window * n_steps * batch_size + i, n_rows) for i in range(n_steps * batch_size)]
        drawn = sorted((int(of(epoch)[n]) for epoch, n in places), key=lambda row: lengths[row] if lengths else 0)
        nth = np.random.RandomState([seed, 2, window]).permutation(n_steps)[nth]
        return drawn[nth * batch_size : (nth + 1) * batch_size]

    return rows
