"""To be written."""

import csv
import io
import json
from itertools import chain, groupby, islice

from minia3.files.lock import lock_folder
from minia3.files.read import reading
from minia3.inference.decoding import generate
from minia3.inference.scoring import score_examples
from minia3.tasks.examples import encode_rows
from minia3.tasks.rows import check_row, read_rows

CHUNK = 256  # rows that are read, sorted by length and answered at a time
COLUMNS = ("idx", "label", "choice", "scores", "output")  # of a csv


def read_inputs(path, tokenizer, spec, prompt, adapters, default=None, max_length=512):
    """Yield (row, Rendered, Example) for each row of a .jsonl or .csv file, checked and in the words of `prompt`.

    spec: of the task (see tasks.py). A row that is to be continued has no choices in its Rendered. Its "adapter" is one
    of `adapters`; where it has none, `default`. Raises ValueError, "path:line: reason", at the first row that is wrong.
    """
    for n, (number, row) in enumerate(read_rows(path, None if spec.labels else "input")):
        with reading(f"{path}:{number}"):
            if (
                isinstance(row, dict) and not spec.labels
            ):  # own rows: what they should come to does not matter
                row = row | {"label": None} | ({} if "choices" in row else {"target": "?"})
            row = check_row(row, spec, "test", n)
            name = row.get("adapter")
            name = row["adapter"] = (
                default if name is None or (spec.labels and name == "") else name
            )
            if name is not None and not (isinstance(name, str) and name in adapters):
                raise ValueError(
                    f"'adapter' is {name!r:.40}, expected one of {', '.join(adapters)}"
                )
            (text,), (example,), _ = encode_rows([(row, prompt)], tokenizer, max_length, end=False)
            text = text if prompt.choices or "choices" in row else text._replace(choices=[])
            if not example.source or (text.choices and not all(example.targets)):
                raise ValueError(
                    f"no tokens in the input or in a choice: {text.input!r:.40}, {text.choices!r:.80}"
                )
        yield row, text, example


def predict(model, tokenizer, rows, adapters, *, batch_size=16, max_new_tokens=64):
    """Yield (row, result) in order: {"idx", "label", "choice", "scores"}, or without choices {"idx", "output"}.

    rows: of `read`. scores: the mean log-probability per token of each choice. adapters: see adapters.Adapters.
    """
    while chunk := list(islice(rows, CHUNK)):
        for scored, part in groupby(chunk, lambda one: bool(one[1].choices)):
            some, texts, examples = zip(*part, strict=True)
            options = {
                "adapter": adapters.rows([row["adapter"] for row in some]),
                "batch_size": batch_size,
            }
            if scored:
                answers = score_examples(model, examples, **options).tolist()
                for row, text, scores in zip(some, texts, answers, strict=True):
                    scores = scores[: len(text.choices)]  # -inf where another row has more
                    label = scores.index(max(scores))
                    yield (
                        row,
                        {
                            "idx": row["idx"],
                            "label": label,
                            "choice": text.choices[label],
                            "scores": scores,
                        },
                    )
            else:
                sources = [example.source for example in examples]
                answers = generate(
                    model, tokenizer, sources, max_new_tokens=max_new_tokens, **options
                )
                for row, answer in zip(some, answers, strict=True):
                    yield row, {"idx": row["idx"], "output": answer}


def csv_line(cells):
    text = io.StringIO()
    csv.writer(text).writerow(
        "" if x is None else x if isinstance(x, str) else json.dumps(x) for x in cells
    )
    return text.getvalue()


def write_results(path, lines, to_csv):
    """Bring a file of results to its end. lines: a row's number -> an iterator of the lines from there on.

    Of what is there, the last chunk is made anew and compared. Raises ValueError where it differs, where the file has
    more, and where another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(path.parent, path.name), path.open("a+b") as file:
        first = start = end = n_quotes = file.seek(0)
        n = -to_csv  # the row of a line, after csv's header
        for line in file:
            n_quotes += line.count(b'"')
            if line.endswith(b"\n") and not (
                to_csv and n_quotes % 2
            ):  # a quoted text may have several lines
                if n > 0 and n % CHUNK == 0:
                    first, start = n, end
                n, end = n + 1, file.tell()
        file.seek(start)
        for line in chain(map(str.encode, lines(first)), [b""]):  # at last, nothing
            there = file.read(len(line) or 1)
            if there != line[: len(there)]:
                raise ValueError(
                    f"{path} holds other results than these: give another --out, or remove it"
                )
            file.write(line[len(there) :])
            file.flush()
