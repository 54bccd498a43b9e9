"""Guards the way from a name or a file to a batch: that a download is whole or leaves nothing, that every bad row is
reported by file and line, that few-shot splits are T-Few's own, that padding, masks and the order of rows are exact.

Real files are read where MINIA3_TEST_DATA says they are; the network is a server on 127.0.0.1.
"""

import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minia3.tasks.batches import WINDOW, collate, order
from minia3.tasks.examples import Example, encode_example
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import OWN_PROMPTS, Prompt, Rendered, fit, render
from minia3.tasks.rows import read_rows
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source, TaskSpec

REAL = os.environ.get("MINIA3_TEST_DATA")
needs_real_data = pytest.mark.skipif(
    not REAL, reason="MINIA3_TEST_DATA is not set: no real data sets to read"
)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def target(n, **more):
    return {"input": f"question {n}", "target": f"answer {n}", **more}


def choice(n, label=0, **more):
    return {"input": f"question {n}", "choices": ["yes", "no"], "label": label, **more}


# Real files


@needs_real_data
@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        ("rte", (2490, 277, 3000), ({0: 1249, 1: 1241}, {0: 146, 1: 131})),
        ("cb", (250, 56, 250), ({0: 115, 1: 119, 2: 16}, {0: 23, 1: 28, 2: 5})),
        ("copa", (400, 100, 500), ({0: 195, 1: 205}, {0: 55, 1: 45})),
    ],
)
def test_the_real_files_are_read_whole(name, sizes, labels):
    folder = Path(REAL, "data")
    task = load_task(name, folder)
    parts = (task.train, task.validation, task.test)
    assert tuple(map(len, parts)) == sizes
    assert tuple(Counter(row["label"] for row in part) for part in parts) == (
        *labels,
        {-1: sizes[2]},
    )
    assert all([row["idx"] for row in part] == list(range(len(part))) for part in parts)
    assert task.evaluation == ("validation", task.validation)
    assert (task.name, task.metric, task.prompts, task.seen) == (
        name,
        "accuracy",
        known_tasks()[name].prompts,
        known_tasks()[name].seen,
    )
    names = ("train.jsonl", "val.jsonl", "test.jsonl")
    sums = {file: hashlib.sha256((folder / name / file).read_bytes()).hexdigest() for file in names}
    assert task.checksums == sums
    assert task.notes == [
        f"{sizes[2]} of {sizes[2]} test rows have no label: results are on validation"
    ]
    for prompt in task.prompts:
        for row in (row for part in parts for row in part):
            rendered = render(prompt, row)
            assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label
            assert rendered.input == rendered.input.rstrip()


# Folder of the published splits -> the task, and how many rows its train file has. Where the file is not to be had, the
# published idx are still those of the shuffle.
SPLITS = {
    **{
        "rte": ("rte", 2490),
        "cb": ("cb", 250),
        "copa": ("copa", 400),
        "wsc": ("wsc", 554),
        "wic": ("wic", 5428),
    },
    **{"boolq": ("boolq", 9427), "anli-r1": ("anli-r1", 16946), "anli-r2": ("anli-r2", 45460)},
    **{
        "anli-r3": ("anli-r3", 100459),
        "h-swag": ("hellaswag", 39905),
        "winogrande": ("winogrande", 40398),
    },
    **{"storycloze": ("storycloze", 1871), "sst2": ("sst2", 67349)},
}
SST2 = (29780, 37569)  # rows of each class


def published():
    for folder, (task, n) in SPLITS.items() if REAL else ():
        for file in sorted(Path(REAL, "data", "few_shot", folder).glob("*_shot/*_seed.jsonl")):
            shots, seed = (
                int(file.parent.name.removesuffix("_shot")),
                int(file.stem.removesuffix("_seed")),
            )
            yield pytest.param(task, n, shots, seed, file, id=f"{task}-{shots}-{seed}")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(
        "minia3.tasks.download.urlopen",
        lambda *args, **options: (_ for _ in ()).throw(OSError("no network")),
    )


@needs_real_data
def test_all_published_splits_are_looked_at():
    assert {path.name for path in Path(REAL, "data", "few_shot").iterdir()} == set(SPLITS)
    assert (
        len(list(published())) == len(list(Path(REAL, "data", "few_shot").rglob("*.jsonl"))) >= 65
    )


@needs_real_data
@pytest.mark.parametrize(("name", "n", "shots", "seed", "file"), list(published()))
def test_few_shot_splits_are_the_published_ones(name, n, shots, seed, file, offline):
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    task = load_task(name, Path(REAL, "data"), shots=shots, seed=seed)
    assert task.train == rows, "order, idx, label and texts"
    assert known_tasks()[name].shots == shots
    whole = Path(REAL, "data", name, "train.jsonl").exists()
    assert len(load_task(name, Path(REAL, "data"), seed=seed).train) == (n if whole else len(rows))
    assert whole == (not any("published split" in note for note in task.notes))
    split, others = task.evaluation
    assert split == ("validation" if whole else "T-Few's other splits")
    if not whole:
        assert not {row["idx"] for row in others} & {row["idx"] for row in rows}
        assert len({row["idx"] for row in others}) == len(others) > 2 * len(rows)
    for part in (task.train, others):
        for prompt in task.prompts:
            for row in part:
                rendered = render(prompt, row)
                assert len(set(rendered.choices)) == len(rendered.choices) > rendered.label >= 0
                assert rendered.input == rendered.input.strip()


@needs_real_data
@pytest.mark.parametrize(("name", "n", "shots", "seed", "file"), list(published()))
def test_the_published_indices_are_those_of_our_shuffle(
    name, n, shots, seed, file, tmp_path, monkeypatch
):
    """Of SST-2 it is each class that is shuffled: only that its places are in the order of the idx can be seen here."""
    n_rows, per_class = (sum(SST2), True) if name == "sst2" else (n, False)
    monkeypatch.setattr(
        "minia3.tasks.splits.find_files", lambda *_: {"train": tmp_path, "validation": tmp_path}
    )
    monkeypatch.setattr(
        "minia3.tasks.splits.read_splits",
        lambda *_: {"train": [dict(row) for row in rows], "validation": rows[:1]},
    )
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"")
    monkeypatch.setitem(
        known_tasks(), "served", TaskSpec(labels=["no", "yes"], per_class=per_class)
    )
    rows = [{"label": int(per_class and i >= SST2[0]), "idx": i} for i in range(n_rows)]
    ours = [row["idx"] for row in load_task("served", shots=shots, seed=seed).train]
    theirs = [json.loads(line)["idx"] for line in file.read_text("utf-8").splitlines()]
    if not per_class:
        assert ours == theirs
    for one, other in ((ours[:shots], theirs[:shots]), (ours[shots:], theirs[shots:])):
        assert np.argsort(one).tolist() == np.argsort(other).tolist()


@needs_real_data
@pytest.mark.parametrize("name", [name for name in known_tasks() if name.startswith("raft/")])
def test_every_row_of_raft_is_held_out_by_one_of_five_seeds_in_a_row(name):
    folds = [load_task(name, Path(REAL, "data"), seed=seed) for seed in range(7, 12)]
    assert sorted(row["idx"] for task in folds for row in task.validation) == list(range(50))
    for seed, task in enumerate(folds, 7):
        assert (len(task.train), len(task.validation), task.metric, task.name) == (
            40,
            10,
            "macro_f1",
            name,
        )
        assert sorted(row["idx"] for row in task.train + task.validation) == list(range(50))
        assert task.evaluation == ("validation", task.validation)
        assert (
            task.notes[0]
            == f"fold {seed % 5 + 1} of 5 is held out: 5 seeds in a row report on each row once"
        )
    assert load_task(name, Path(REAL, "data"), seed=2).validation == folds[0].validation
    task = folds[0]
    assert all(known_tasks()[name].labels[row["label"]] == row["Label"] for row in task.train)
    assert [row["ID"] for row in task.test] == [str(50 + i) for i in range(len(task.test))], (
        "what the leaderboard wants"
    )
    assert {row["label"] for row in task.test} == {-1}
    for prompt in task.prompts:
        for row in [*task.train, *task.test[::10]]:
            rendered = render(prompt, row)
            assert (
                len(set(rendered.choices))
                == len(rendered.choices)
                == len(known_tasks()[name].labels)
            )


@needs_real_data
def test_all_rows_of_raft_can_be_trained_on_and_then_there_are_none_to_report_on():
    task = load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=50, seed=3)
    assert sorted(row["idx"] for row in task.train) == list(range(50))
    with pytest.raises(ValueError, match="raft/ade_corpus_v2: no labelled rows to report on"):
        _ = task.evaluation
    assert len(load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=40, seed=3).train) == 40
    with pytest.raises(ValueError, match="1 to 40 shots, found 45"):
        load_task("raft/ade_corpus_v2", Path(REAL, "data"), shots=45)


@needs_real_data
def test_each_span_of_wsc_stands_in_its_text():
    task = load_task("wsc", Path(REAL, "data"))
    assert tuple(map(len, (task.train, task.validation, task.test))) == (554, 104, 146)
    rows = [*task.train, *task.validation, *task.test]
    gaps = [row["idx"] for row in rows for n in (1, 2) if row[f"span{n}_text"] not in row["text"]]
    assert gaps == [80, 82], "Kamenev and Zinoviev: two names with other words between them"
    assert all("target" not in row for row in rows)
    assert task.train[16]["span1_text"] == "the demonstrators"


@needs_real_data
def test_a_seed_that_was_not_published_is_an_error_and_a_failed_download_is_a_note(offline):
    with pytest.raises(
        ValueError,
        match=r"WiC\.zip: no network; or put .* published are seeds \[0, 1, 32, 42, 100, 1024\]",
    ):
        load_task("wic", Path(REAL, "data"), shots=32, seed=7)
    (note,) = load_task("wic", Path(REAL, "data"), shots=8).notes
    assert "WiC.zip: no network; or put" in note
    assert note.endswith(
        "so this is T-Few's published split, evaluated on those of the other seeds"
    )
    with pytest.raises(ValueError, match="1 to 32 shots"):
        load_task("wic", Path(REAL, "data"), shots=33)


@needs_real_data
@pytest.mark.parametrize("name", ["t5-base-hf", "llama2-hf"])
def test_long_real_rows_fit_under_a_real_tokenizer_and_keep_their_question(name):
    tokenizer = tokenizers.Tokenizer.from_file(
        str(Path(REAL, "tokenizers", name, "tokenizer.json"))
    )

    def n_tokens(text):
        return len(tokenizer.encode(text).ids)

    rows = sorted(load_task("rte", Path(REAL, "data")).train, key=lambda row: -len(row["premise"]))[
        :40
    ]
    for prompt in known_tasks()["rte"].prompts:
        for row in rows:
            cut, was_cut = fit(prompt, row, n_tokens, 100)
            assert was_cut
            assert 80 < n_tokens(cut.input) <= 100
            before, after = prompt.text.split("{premise}")
            assert cut.input.startswith(before + row["premise"].split()[0])
            assert cut.input.endswith(row["premise"].split()[-1] + after.format_map(row))


# Few shots


def test_the_few_shot_stream_is_that_of_numpys_global_generator_which_stays_untouched(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(57))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    for seed in (0, 1, 100, 2**32 - 1):
        rows = load_task(str(tmp_path)).train
        np.random.seed(seed)
        np.random.shuffle(rows)
        np.random.seed(12345)
        before = np.random.get_state()
        assert load_task(str(tmp_path), shots=9, seed=seed).train == rows[:9]
        assert load_task(str(tmp_path), shots=57, seed=seed).train == rows
        after = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert [row["idx"] for row in load_task(str(tmp_path)).train] == list(range(57))


@pytest.mark.parametrize("shots", [-1, 0, 4])
def test_shots_that_cannot_be_drawn_are_an_error(tmp_path, shots):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(n) for n in range(3))))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=rf"1 to 3 shots.* found {shots}$"):
        load_task(str(tmp_path), shots=shots)


# Download

SPLIT_NAMES = ("train", "val", "test")
PARTS = {f"{name}.jsonl": f"T/{name}.jsonl" for name in SPLIT_NAMES}
FILES = {
    "T/train.jsonl": lines({"text": "a", "label": "no"}, {"text": "b", "label": "yes", "idx": 9}),
    "T/val.jsonl": lines({"text": "c", "label": "YES"}),
    "T/test.jsonl": lines({"text": "d"}),
    "T/README": b"not taken out",
}


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`. `status`, `promise` (the length named) and `wait` (before the body) make it misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.promise, self.wait, self.n_requests = (
            b"",
            200,
            None,
            lambda: None,
            0,
        )
        self.pages = None  # path -> content, in place of `content` alone


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.n_requests += 1
        if server.pages is not None:
            server.content, server.status = (
                server.pages.get(self.path, b""),
                200 if self.path in server.pages else 404,
            )
        self.send_response(server.status)
        if server.promise != 0:
            self.send_header("Content-Length", str(server.promise or len(server.content)))
        self.end_headers()
        server.wait()
        self.wfile.write(server.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server, and in the table the task `served` of which it has the archive."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        serve(server, monkeypatch, zipped(FILES))
        yield server
        server.shutdown()
        thread.join()


def serve(server, monkeypatch, content, address=None, **changes):
    server.content = content
    address = address or f"http://127.0.0.1:{server.server_port}/T.zip"
    source = Source(address, PARTS, len(content), hashlib.sha256(content).hexdigest())._replace(
        **changes
    )
    spec = TaskSpec((Prompt("{text}?", ("No", "Yes")),), [source], labels=("no", "yes"))
    monkeypatch.setitem(known_tasks(), "served", spec)


def left(folder):
    """What a failed download left behind, folders of the task itself apart."""
    return [path for path in Path(folder).rglob("*") if path != Path(folder, "served")]


def failure(folder):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_task("served", folder)
    assert left(folder) == []
    message = str(error.value)
    assert message.startswith(known_tasks()["served"].sources[0].address + ": ")
    assert message.endswith(
        f"put train.jsonl, val.jsonl, test.jsonl into {Path(folder, 'served')} by hand"
    )
    return message


def test_a_row_of_the_table_is_enough_for_a_new_task(server, tmp_path, capsys):
    task = load_task("served", tmp_path / "new" / "data")
    assert task.train == [{"text": "a", "label": 0, "idx": 0}, {"text": "b", "label": 1, "idx": 9}]
    assert task.validation == [{"text": "c", "label": 1, "idx": 0}]
    assert task.test == [{"text": "d", "label": -1, "idx": 0}]
    assert render(task.prompts[0], task.train[1]) == ("b?", ["No", "Yes"], 1)
    folder = tmp_path / "new" / "data" / "served"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[f"T/{name}"] for name in ("train.jsonl", "val.jsonl", "test.jsonl")
    }
    assert capsys.readouterr().err == "", "no progress bar where nobody looks at a terminal"


def test_a_downloaded_file_is_as_readable_as_any_other(server, tmp_path):
    load_task("served", tmp_path)
    (tmp_path / "plain").touch()
    assert (tmp_path / "served" / "train.jsonl").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode


def test_files_that_are_there_are_not_downloaded_again(server, tmp_path):
    load_task("served", tmp_path)
    server.shutdown()
    assert load_task("served", tmp_path).train == load_task("served", str(tmp_path)).train
    assert server.n_requests == 1


def test_train_and_val_are_enough(server, tmp_path):
    load_task("served", tmp_path)
    (tmp_path / "served" / "test.jsonl").unlink()
    (tmp_path / "served" / "val.jsonl").rename(tmp_path / "served" / "validation.jsonl")
    task = load_task("served", tmp_path)
    assert (len(task.train), len(task.validation), task.test, task.notes) == (2, 1, [], [])
    assert server.n_requests == 1


def test_a_file_that_somebody_put_there_is_not_overwritten(server, tmp_path):
    (tmp_path / "served").mkdir()
    mine = lines({"text": "mine", "label": "no"})
    (tmp_path / "served" / "train.jsonl").write_bytes(mine)
    task = load_task("served", tmp_path)
    assert (task.train[0]["text"], len(task.train), len(task.validation)) == ("mine", 1, 1)
    assert (tmp_path / "served" / "train.jsonl").read_bytes() == mine


def test_a_terminal_gets_a_progress_bar(server, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    load_task("served", tmp_path)
    assert "100%" in sys.stderr.getvalue()


def test_a_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    content = zipped(FILES)
    changed = bytes([content[0], content[1] ^ 1]) + content[2:]
    wrong, right = (hashlib.sha256(x).hexdigest() for x in (changed, content))
    serve(server, monkeypatch, changed, sha256=right)
    n = len(content)
    assert f"found {n} bytes of sha256 {wrong}, expected {n} bytes of sha256 {right};" in failure(
        tmp_path
    )


@pytest.mark.parametrize("change", [-1, 1, 100_000])
def test_a_wrong_length_is_refused(server, tmp_path, monkeypatch, change):
    content = zipped(FILES)
    other = content[:change] if change < 0 else content + b"x" * change
    serve(server, monkeypatch, other, bytes=len(content))
    assert f", expected {len(content)} bytes of sha256 " in failure(tmp_path)
    server.promise = 0  # a server that does not name the length
    assert f", expected {len(content)} bytes of sha256 " in failure(tmp_path)


def test_no_more_is_read_than_the_file_should_have(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, b"x" * 10_000_000, bytes=1000)
    found = int(re.search(r"found (\d+) bytes", failure(tmp_path))[1])
    assert 1000 < found < 200_000


def test_a_transfer_that_breaks_off_is_refused(server, tmp_path):
    n = server.promise = len(server.content)
    server.content = server.content[:100]
    assert re.search(rf"found 100 bytes of sha256 \w+, expected {n} bytes", failure(tmp_path))


def test_a_server_that_hangs_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.tasks.download.TIMEOUT", 0.2)
    done = threading.Event()
    server.wait = lambda: done.wait(10)
    try:
        assert "timed out" in failure(tmp_path)
    finally:
        done.set()


@pytest.mark.parametrize(
    ("status", "words"), [(404, "HTTP Error 404: Not Found"), (410, "HTTP Error 410"), (503, "503")]
)
def test_an_address_that_is_gone_is_named(server, tmp_path, status, words):
    server.status = status
    assert words in failure(tmp_path)


def test_no_network_is_said(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, zipped(FILES), address="http://data.example/T.zip")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def no_network(*args, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert "Temporary failure in name resolution" in failure(tmp_path)


def test_a_server_that_is_not_there_is_said(server, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/T.zip"
    serve(server, monkeypatch, zipped(FILES), address=address)
    assert "Connection refused" in failure(tmp_path)


def test_an_answer_that_is_not_http_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"\x00\x01\n\n"))
    failure(tmp_path)


def test_a_zip_whose_member_blows_up_is_refused_before_it_is_read(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, zipped({**FILES, "T/val.jsonl": bytes(2_000_000)}))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    assert re.search(
        r"found \d+ bytes or more in the zip's T/val\.jsonl, expected less", failure(tmp_path)
    )


@pytest.mark.parametrize("name", ["../evil.jsonl", "T/../../evil.jsonl", "/evil.jsonl"])
def test_a_zip_entry_that_climbs_out_is_not_taken_out(server, tmp_path, monkeypatch, name):
    serve(server, monkeypatch, zipped({**FILES, name: b"evil"}))
    folder = tmp_path / "a" / "b"
    assert len(load_task("served", folder).train) == 2
    assert {path.name for path in tmp_path.rglob("*.jsonl")} == {
        "train.jsonl",
        "val.jsonl",
        "test.jsonl",
    }
    assert not Path("/evil.jsonl").exists()


@pytest.mark.parametrize("name", ["../val.jsonl", "T/../../val.jsonl", "/val.jsonl"])
def test_a_member_of_such_a_name_stays_in_the_folder(server, tmp_path, monkeypatch, name):
    files = {name if path == "T/val.jsonl" else path: content for path, content in FILES.items()}
    serve(server, monkeypatch, zipped(files), files={**PARTS, "val.jsonl": name})
    assert len(load_task("served", tmp_path).validation) == 1
    assert sorted(path.name for path in left(tmp_path)) == [
        "test.jsonl",
        "train.jsonl",
        "val.jsonl",
    ]


def test_a_zip_without_a_member_is_refused(server, tmp_path, monkeypatch):
    serve(
        server,
        monkeypatch,
        zipped({name: content for name, content in FILES.items() if "val" not in name}),
    )
    assert "no item named 'T/val.jsonl'" in failure(tmp_path)


def test_what_is_no_zip_is_refused(server, tmp_path, monkeypatch):
    serve(server, monkeypatch, b"<html>moved</html>")
    assert "not a zip file" in failure(tmp_path)


def test_a_data_folder_that_cannot_be_written_is_said(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"T\.zip: .*(Not a directory|File exists)"):
        load_task("served", tmp_path / "file")


def test_two_processes_at_once_do_not_break_each_other(server, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=60)
    server.wait = both.wait  # neither gets its file before both are under way
    code = (
        "import sys; from minia3.data import load_task; from minia3.tasks import *; from minia3.prompts import Prompt\n"
        f"from minia3.tasks import table; table()['served'] = {known_tasks()['served']!r}\n"
        f"print(len(load_task('served', {str(tmp_path)!r}).train))"
    )
    run = [sys.executable, "-c", code]
    both_runs = [
        subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    assert [process.communicate() for process in both_runs] == [(b"2\n", b"")] * 2
    assert server.n_requests == 2
    assert sorted(path.name for path in left(tmp_path)) == [
        "test.jsonl",
        "train.jsonl",
        "val.jsonl",
    ]


def test_what_a_killed_process_left_does_no_harm(server, tmp_path):
    (tmp_path / "served" / ".part-killed").mkdir(parents=True)
    (tmp_path / "served" / ".part-killed" / "train.jsonl").write_bytes(b"{")
    (tmp_path / "served" / "test.jsonl").write_bytes(FILES["T/test.jsonl"])
    (tmp_path / "served" / "val.jsonl").write_bytes(FILES["T/val.jsonl"])
    assert len(load_task("served", tmp_path).train) == 2


@pytest.mark.parametrize("n_moved", [0, 1, 2])
def test_an_unpacking_that_stops_halfway_is_taken_up_by_the_next_run(
    server, tmp_path, monkeypatch, n_moved
):
    moved = []

    def move(source, to):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(to.name)
        os.rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            load_task("served", tmp_path)
    assert sorted(path.name for path in left(tmp_path)) == sorted(moved)
    load_task("served", tmp_path)
    assert sorted(path.name for path in left(tmp_path)) == [
        "test.jsonl",
        "train.jsonl",
        "val.jsonl",
    ]


# Every form of file that a known task has, as its authors wrote it


def official(monkeypatch, server, name, contents):
    """The task `name` of the table, with its addresses on the server, which has `contents`: address's end -> bytes."""
    server.pages, sources = {f"/{end}": content for end, content in contents.items()}, []
    for source in known_tasks()[name].sources:
        end = source.address.rsplit("/", 1)[1]
        address, digest = (
            f"http://127.0.0.1:{server.server_port}/{end}",
            hashlib.sha256(contents[end]).hexdigest(),
        )
        sources.append(Source(address, source.files, len(contents[end]), digest))
    monkeypatch.setitem(known_tasks(), name, known_tasks()[name]._replace(sources=sources))


def test_anlis_rounds_are_taken_from_one_zip_and_reported_on_test(server, tmp_path, monkeypatch):
    row = {"uid": "u", "context": "c", "hypothesis": "h", "model_label": "n"}
    names = ("train", "dev", "test")
    parts = {
        f"anli_v0.1/R{r}/{name}.jsonl": lines({**row, "label": "enc"[r - 1]})
        for r in (1, 2, 3)
        for name in names
    }
    official(monkeypatch, server, "anli-r2", {"anli_v0.1.zip": zipped(parts)})
    task = load_task("anli-r2", tmp_path)
    expected = {
        "uid": "u",
        "premise": "c",
        "hypothesis": "h",
        "model_label": "n",
        "label": 1,
        "idx": 0,
    }
    assert task.train == task.validation == task.test == [expected]
    assert (task.name, task.evaluation) == ("anli-r2", ("test", [expected]))
    assert {path.stem for path in (tmp_path / "anli-r2").iterdir()} == set(names)


def test_hellaswags_three_files_are_no_zip_and_have_their_choices_in_the_row(
    server, tmp_path, monkeypatch
):
    row = {
        "ctx": "A man",
        "activity_label": "Running",
        "endings": ["a", "b", "c", "d "],
        "label": 3,
    }
    contents = {f"hellaswag_{name}.jsonl": lines(row) for name in ("train", "val")}
    contents["hellaswag_test.jsonl"] = lines(
        {key: row[key] for key in ("ctx", "activity_label", "endings")}
    )
    official(monkeypatch, server, "hellaswag", contents)
    task = load_task("hellaswag", tmp_path)
    assert render(task.prompts[0], task.train[0]) == (
        "Topic: Running\nText: A man",
        ["a", "b", "c", "d"],
        3,
    )
    assert task.evaluation == ("validation", [{**row, "idx": 0}])
    assert [row["label"] for row in task.test] == [-1]
    (tmp_path / "hellaswag" / "val.jsonl").write_bytes(
        lines({**row, "endings": ["a", "b"]}, {**row, "endings": 7})
    )
    with pytest.raises(
        ValueError, match=r"val\.jsonl:1: no such item \(.*val\.jsonl:2: no such item \("
    ):
        load_task("hellaswag", tmp_path)


def test_of_several_files_train_comes_last_so_that_the_next_run_takes_up_what_is_missing(
    server, tmp_path, monkeypatch
):
    row = {"ctx": "A man", "activity_label": "Running", "endings": ["a", "b", "c", "d"], "label": 3}
    official(
        monkeypatch,
        server,
        "hellaswag",
        {f"hellaswag_{x}.jsonl": lines(row) for x in ("train", "val", "test")},
    )
    gone = server.pages.pop("/hellaswag_train.jsonl")
    with pytest.raises(
        ValueError,
        match=r"_train\.jsonl: HTTP Error 404.*put train\.jsonl, val\.jsonl, test\.jsonl ",
    ):
        load_task("hellaswag", tmp_path)
    assert sorted(path.name for path in (tmp_path / "hellaswag").iterdir()) == [
        "test.jsonl",
        "val.jsonl",
    ]
    server.pages["/hellaswag_train.jsonl"] = gone
    assert len(load_task("hellaswag", tmp_path).train) == 1


def test_winograndes_answer_is_its_label_and_is_empty_in_test(server, tmp_path, monkeypatch):
    row = {
        "qID": "q",
        "sentence": "The _ is red.",
        "option1": "cat",
        "option2": "dog",
        "answer": "2",
    }
    parts = {f"winogrande_1.1/{name}.jsonl": lines(row) for name in ("train_xl", "dev")}
    parts |= {
        "winogrande_1.1/train_xs.jsonl": b"",
        "winogrande_1.1/test.jsonl": lines({**row, "answer": ""}),
    }
    official(monkeypatch, server, "winogrande", {"winogrande_1.1.zip": zipped(parts)})
    task = load_task("winogrande", tmp_path)
    assert task.train == task.validation == [{**row, "label": 1, "idx": 0}]
    assert task.test == [{**row, "answer": "", "label": -1, "idx": 0}]
    assert render(task.prompts[0], task.train[0])[1:] == (["cat", "dog"], 1)


def test_sst2_is_tabs_without_quotes_and_has_so_many_shots_of_each_class(
    server, tmp_path, monkeypatch
):
    texts = [f'a "film {i} ' for i in range(9)]
    train = "sentence\tlabel\n" + "".join(f"{text}\t{i % 3 // 2}\n" for i, text in enumerate(texts))
    parts = {"SST-2/train.tsv": train, "SST-2/dev.tsv": "sentence\tlabel\ngood \t1\n"}
    parts["SST-2/test.tsv"] = 'index\tsentence\n0\t" bad\n'
    official(monkeypatch, server, "sst2", {"SST-2.zip": zipped(parts)})
    task = load_task("sst2", tmp_path)
    assert [row["sentence"] for row in task.train] == texts
    assert [row["label"] for row in task.train] == [0, 0, 1] * 3
    assert task.test == [{"index": "0", "sentence": '" bad', "label": -1, "idx": 0}]
    few = load_task("sst2", tmp_path, shots=2, seed=5).train
    classes = [[row for row in task.train if row["label"] == label] for label in (0, 1)]
    for rows in classes:
        np.random.RandomState(5).shuffle(rows)
    assert few == classes[0][:2] + classes[1][:2]
    with pytest.raises(ValueError, match="1 to 3 shots"):
        load_task("sst2", tmp_path, shots=4)


def test_mrpcs_validation_rows_are_those_of_train_that_a_list_names(server, tmp_path, monkeypatch):
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f'{i % 2}\t{i}\t{i + 10}\tone "{i}\ttwo {i}\r\n' for i in range(5)]
    ids = b"1\t11\n3\t13\n4\t9\n"
    contents = {
        "msr_paraphrase_train.txt": (head + "".join(rows)).encode(),
        "mrpc_dev_ids.tsv": ids,
    }
    official(
        monkeypatch,
        server,
        "mrpc",
        contents | {"msr_paraphrase_test.txt": (head + rows[1]).encode()},
    )
    task = load_task("mrpc", tmp_path)
    assert [row["idx"] for row in task.train] == [0, 2, 4]
    row = {
        "Quality": "1",
        "id1": "1",
        "id2": "11",
        "sentence1": 'one "1',
        "sentence2": "two 1",
        "label": 1,
    }
    assert task.validation[0] == {**row, "idx": 1}
    assert [row["idx"] for row in task.validation] == [1, 3]
    assert task.evaluation == ("test", [{**row, "idx": 0}])
    assert task.checksums["dev.tsv"] == hashlib.sha256(ids).hexdigest()
    assert set(task.checksums) == {"train.tsv", "dev.tsv", "test.tsv"}
    (tmp_path / "mrpc" / "test.tsv").unlink()
    assert load_task("mrpc", tmp_path).evaluation == ("validation", task.validation)


def test_wscs_spans_are_fields_and_spelled_as_in_the_text(server, tmp_path, monkeypatch):
    text = "The cat saw it . the end"
    spans = [
        (0, "the cat"),
        (1, "Cat."),
        (1, "cat\nsaw"),
        (2, "cat"),
        (1, "X"),
        (0, "the"),
    ]  # the last one is in it
    rest = {"span2_text": "it", "span2_index": 3}
    rows = [
        {"text": text, "target": {"span1_index": i, "span1_text": x, **rest}, "label": True}
        for i, x in spans
    ]
    official(
        monkeypatch,
        server,
        "wsc",
        {"WSC.zip": zipped({f"WSC/{x}.jsonl": lines(*rows) for x in SPLIT_NAMES})},
    )
    task = load_task("wsc", tmp_path)
    assert [row["span1_text"] for row in task.train] == [
        "The cat",
        "cat",
        "cat saw",
        "cat",
        "X",
        "the",
    ]
    assert task.train[0] == {
        "text": text,
        "span1_text": "The cat",
        "span1_index": 0,
        **rest,
        "label": 1,
        "idx": 0,
    }
    bad = [
        {**rows[0], "target": target}
        for target in (None, [1], {**rows[0]["target"], "span1_index": "0"}, {})
    ]
    (tmp_path / "wsc" / "val.jsonl").write_bytes(lines(*bad))
    with pytest.raises(ValueError, match="'text' and 'target' are not as expected") as error:
        load_task("wsc", tmp_path)
    assert all(f"val.jsonl:{n}: " in str(error.value) for n in (1, 2, 3, 4))


def test_storycloze_is_asked_for_and_read_from_the_two_files_that_come(tmp_path):
    val, test = (
        f"cloze_test_{name}__spring2016 - cloze_test_ALL_{name}.csv" for name in ("val", "test")
    )
    folder = tmp_path / "storycloze"
    with pytest.raises(
        ValueError, match=r"https://cs\.rochester\.edu\S+: the authors give .*; or put "
    ) as error:
        load_task("storycloze", tmp_path)
    assert str(error.value).endswith(f"put {val}, {test} into {folder} by hand")
    head = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    head += "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
    folder.mkdir()
    (folder / val).write_text(head + 'id,"One, two.",Two.,Three.,Four.,Good.,Bad.,1\n')
    with pytest.raises(ValueError, match="by hand"):
        load_task("storycloze", tmp_path)
    (folder / test).write_text(head + "id,One.,Two.,Three.,Four.,Bad.,Good.,2\n")
    task = load_task("storycloze", tmp_path)
    assert task.evaluation == ("test", task.test)
    sentences = {
        f"input_sentence_{i}": f"{word}."
        for i, word in enumerate(("One, two", "Two", "Three", "Four"), 1)
    }
    quiz = {"sentence_quiz1": "Good.", "sentence_quiz2": "Bad.", "answer_right_ending": "1"}
    assert task.train == [{"story_id": "id", **sentences, **quiz, "label": 0, "idx": 0}]
    (plain,) = (prompt for prompt in task.prompts if prompt.text.endswith("{input_sentence_4}"))
    assert render(plain, task.test[0]) == ("One. Two. Three. Four.", ["Bad.", "Good."], 1)


def test_raft_comes_from_the_hub_through_its_own_client(tmp_path, monkeypatch):
    """In a child: huggingface_hub reads its environment when it is imported."""
    train = "Tweet text,Label,ID\n" + "".join(
        f"t{i},{'no ' * (i % 2)}complaint,{i}\n" for i in range(50)
    )
    files = {"train.csv": train.encode(), "test_unlabeled.csv": b"Tweet text,ID\n,50\nx,51\n"}
    prefix, asked = "/datasets/ought/raft/resolve/main/data/twitter_complaints/", []

    def answer(self):
        asked.append(self.path)
        content = files.get(self.path.removeprefix(prefix))
        self.send_response(404 if content is None else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET" and content:
            self.wfile.write(content)

    monkeypatch.setattr(Handler, "do_GET", answer)
    monkeypatch.setattr(Handler, "do_HEAD", answer, raising=False)
    code = (
        "import sys; from minia3 import load_task; task = load_task('raft/twitter_complaints', sys.argv[1])\n"
        "print(len(task.train), len(task.validation), task.test)"
    )
    env = {
        key: value
        for key, value in os.environ.items()
        if "PROXY" not in key.upper() and not key.startswith("HF_")
    }
    with Server() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
        }
        run = [sys.executable, "-c", code, str(tmp_path / "data")]
        done = [
            subprocess.run(run, capture_output=True, text=True, env=env, timeout=120, check=False)
            for _ in "12"
        ]
        hub.shutdown()
        thread.join()
    hidden = {"label": -1}
    test = [
        {"Tweet text": "", "ID": "50", **hidden, "idx": 0},
        {"Tweet text": "x", "ID": "51", **hidden, "idx": 1},
    ]
    assert [one.stdout for one in done] == [f"40 10 {test}\n"] * 2, done[0].stderr
    folder = tmp_path / "data" / "raft" / "twitter_complaints"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert sum(path.startswith(prefix) for path in asked) == 4, (
        "HEAD and GET of each file, and none the second time"
    )


# A known task's files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "a", "label": "maybe"}, "'label' is 'maybe', expected one of no, yes"),
        ({"text": "a"}, "'label' is None, expected one of no, yes"),
        ({"label": "no"}, "no 'text'"),
        (["text"], r"expected a JSON object, found '\[\"text\"\]"),
    ],
)
def test_a_bad_row_of_a_known_task_is_reported_like_any_other(tmp_path, monkeypatch, line, words):
    monkeypatch.setitem(
        known_tasks(),
        "served",
        TaskSpec((Prompt("{text}?", ("No", "Yes")),), [Source("", PARTS)], ("no", "yes")),
    )
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "train.jsonl").write_bytes(lines({"text": "a", "label": "no"}, line))
    (tmp_path / "served" / "val.jsonl").write_bytes(lines({"text": "a", "label": "no"}))
    with pytest.raises(ValueError, match=rf"served/train\.jsonl:2: {words}"):
        load_task("served", tmp_path)


def test_labels_may_be_texts_numbers_and_truth_values(tmp_path, monkeypatch):
    prompt = (Prompt("{text}?", ("a", "b")),)
    (tmp_path / "served").mkdir()
    for labels, in_file in {
        ("false", "true"): [False, "true", "False", True],
        ("0", "1"): [0, "1", "0", 1],
    }.items():
        monkeypatch.setitem(known_tasks(), "served", TaskSpec(prompt, [Source("", PARTS)], labels))
        rows = lines(*({"text": "a", "label": label} for label in in_file))
        for name in ("train", "val", "test"):
            (tmp_path / "served" / f"{name}.jsonl").write_bytes(rows)
        task = load_task("served", tmp_path)
        assert [row["label"] for row in task.train] == [0, 1, 0, 1]
        assert all(type(row["label"]) is int for row in task.train)
        assert task.evaluation == ("test", task.test), "labelled throughout, so it is what counts"


def test_a_shipped_task_is_own_rows_under_a_name(tmp_path, monkeypatch):
    (tmp_path / "colours").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "colours" / f"{split}.jsonl").write_bytes(lines(choice(1), choice(2, label=1)))
    monkeypatch.setattr("minia3.tasks.splits.SHIPPED", tmp_path)
    monkeypatch.setitem(known_tasks(), "colour", TaskSpec(OWN_PROMPTS, shipped="colours"))
    task = load_task("colour", tmp_path / "elsewhere")
    assert (task.name, task.metric, task.evaluation) == ("colour", "accuracy", ("test", task.test))
    assert render(task.prompts[0], task.train[1]) == ("question 2", ["yes", "no"], 1)


# Own rows


def test_a_folder_of_own_rows(tmp_path):
    mine = tmp_path / "mine.v1"
    mine.mkdir()
    (mine / "train.jsonl").write_bytes(
        lines(choice(0, extra=[1]), choice(1, label=1, idx=70), choice(2, idx=True))
    )
    three = {"input": "x", "choices": ["a", "b", "c"], "label": 2, "idx": "k"}
    (mine / "dev.jsonl").write_bytes(lines(three))
    (mine / "test.jsonl").write_bytes(
        lines({"input": "x", "choices": ["a"]}, {**three, "label": -1})
    )
    task = load_task(mine)
    assert task.train == [choice(0, extra=[1], idx=0), choice(1, label=1, idx=70), choice(2, idx=2)]
    assert task.validation == [{**three, "idx": 0}]
    assert [row["label"] for row in task.test] == [-1, -1]
    assert task.evaluation == ("validation", task.validation)
    assert (task.name, task.metric, task.prompts, task.seen) == (
        "mine.v1",
        "accuracy",
        OWN_PROMPTS,
        (),
    )
    assert set(task.checksums) == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    assert task.notes == ["2 of 2 test rows have no label: results are on validation"]


def test_rows_with_targets_are_matched_exactly_and_have_label_0(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(target(0, label="x"), target(1)))
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert task.metric == "exact_match"
    assert task.train == [target(0, label=0, idx=0), target(1, label=0, idx=1)]
    assert task.evaluation == ("test", task.test)


def test_a_folder_may_hold_what_is_to_be_evaluated_alone(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(lines(target(2)))
    task = load_task(str(tmp_path))
    assert (task.train, task.validation, len(task.test)) == ([], [], 1)


@pytest.mark.parametrize(
    ("n", "sizes"), [(3, (1, 1, 1)), (9, (7, 1, 1)), (20, (16, 2, 2)), (109, (89, 10, 10))]
)
def test_one_file_is_split_80_10_10_the_same_way_whatever_the_seed(tmp_path, n, sizes):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(lines(*(target(i) for i in range(n))))
    task = load_task(str(file))
    parts = (task.train, task.validation, task.test)
    indices = [[row["idx"] for row in part] for part in parts]
    assert tuple(map(len, parts)) == sizes
    assert sorted(chain(*indices)) == list(range(n))
    assert all(part == sorted(part) for part in indices), "in the order of the file"
    assert load_task(str(file), seed=5) == task
    assert task.notes == [
        f"{file} is split into train, validation and test, the same way each time"
    ]
    assert (task.name, list(task.checksums)) == ("mine", ["mine.jsonl"])


def test_the_split_does_not_depend_on_the_machine_or_the_version(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(*(target(i) for i in range(20))))
    task = load_task(str(tmp_path / "mine.jsonl"))
    assert [[row["idx"] for row in part] for part in (task.validation, task.test)] == [
        [1, 18],
        [8, 19],
    ]


def test_a_folder_with_train_alone_is_split_like_a_file(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*(target(i) for i in range(20))))
    assert len(load_task(str(tmp_path)).validation) == 2


def test_two_rows_cannot_be_split(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(target(0), target(1)))
    with pytest.raises(ValueError, match=r"too few rows to split \(2\): give a folder"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_byte_order_mark_windows_line_ends_blank_lines_and_a_missing_last_line_end_are_read(
    tmp_path,
):
    rows = [target(0), target(1), target(2, note="\u2028 é 漢 🙂")]
    text = "\ufeff\n" + "\r\n \t\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    (tmp_path / "val.jsonl").write_bytes(text.encode())
    assert load_task(str(tmp_path)).train == [
        {**row, "label": 0, "idx": n} for n, row in enumerate(rows)
    ]


def test_inputs_that_end_in_white_space_are_counted(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(
        lines(target(0), {**target(1), "input": "Answer: "}, {**target(2), "input": "a\n"})
    )
    assert load_task(str(tmp_path)).notes == [
        "2 inputs end in white space: leave it out, the tokenizer puts a space before the answer"
    ]


BAD_LINES = [
    (b'{"input": "a",', "not JSON: "),
    (b'{"input": "a", "target": "b"} x', "not JSON: Extra data"),
    (b"[" * 100_000, "not JSON: "),
    (b'{"input": "a", "target": "\\ud83d"}', "not JSON: .*surrogates"),
    (b'{"input": "a", "target": "b", "n": ' + b"9" * 5000 + b"}", "not JSON: "),
    (b'["input"]', r"expected a JSON object, found '\[\"input\"\]"),
    (b"null", "expected a JSON object, found 'null"),
    (
        b'{"input": "a", "choices": ' + b"[" * 600 + b'"b"' + b"]" * 600 + b', "label": 0}',
        r"'choices' is \[\[.*, expected a list of texts, none twice and none empty",
    ),
    (lines({"target": "b"}), "'input' is None, expected a text that is not empty"),
    (lines({"input": "", "target": "b"}), "'input' is '', expected a text that is not empty"),
    (
        lines({"input": " \n", "target": "b"}),
        r"'input' is ' \\n', expected a text that is not empty",
    ),
    (
        lines({"input": ["a"], "target": "b"}),
        r"'input' is \['a'\], expected a text that is not empty",
    ),
    (
        lines({"input": "a"}),
        r"expected either 'target', or 'choices' and 'label'; found \['input'\]",
    ),
    (
        lines({"input": "a", "target": "b", "choices": ["b"], "label": 0}),
        "expected either 'target', or",
    ),
    (lines({"input": "a", "target": " "}), "'target' is ' ', expected a text that is not empty"),
    (lines({"input": "a", "target": 4}), "'target' is 4, expected a text that is not empty"),
    (lines({"input": "a", "choices": [], "label": 0}), r"'choices' is \[\], expected a list"),
    (lines({"input": "a", "choices": "bc", "label": 0}), "'choices' is 'bc', expected a list"),
    (lines({"input": "a", "choices": None, "label": 0}), "'choices' is None, expected a list"),
    (
        lines({"input": "a", "choices": ["b", ""], "label": 0}),
        r"'choices' is \['b', ''\], expected a list",
    ),
    (
        lines({"input": "a", "choices": ["b", 1], "label": 0}),
        r"'choices' is \['b', 1\], expected a list",
    ),
    (
        lines({"input": "a", "choices": ["b", "c", "b"], "label": 0}),
        r"'choices' is \['b', 'c', 'b'\], expected a list of texts, none twice",
    ),
    (lines({"input": "a", "choices": ["b", "c"]}), "'label' is None, expected one of 0, 1"),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": 2}),
        "'label' is 2, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": -1}),
        "'label' is -1, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": "b"}),
        "'label' is 'b', expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": True}),
        "'label' is True, expected one of 0, 1",
    ),
    (
        lines({"input": "a", "choices": ["b", "c"], "label": 1.0}),
        "'label' is 1.0, expected one of 0, 1",
    ),
    ('{"input": "café", "target": "b"}'.encode("latin-1"), "'utf-8' codec can't decode byte"),
    ('{"input": "a", "target": "b"}'.encode("utf-16"), "'utf-8' codec can't decode byte"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=[words for _, words in BAD_LINES])
def test_a_bad_row_is_reported_with_file_line_and_what_is_wrong(tmp_path, line, words):
    good = lines(choice(0) if b"choices" in line and b"target" not in line else target(0))
    (tmp_path / "train.jsonl").write_bytes(good + b"\n" + line.rstrip() + b"\n" + good)
    (tmp_path / "val.jsonl").write_bytes(good)
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/train\.jsonl:3: {words}[^\n]*\Z") as error:
        load_task(str(tmp_path))
    assert len(str(error.value)) < len(str(tmp_path)) + 250
    assert str(error.value).count(str(tmp_path)) == 1, "one bad row, one report"


def test_a_choice_may_lack_its_label_in_test_only(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(choice(0)))
    (tmp_path / "test.jsonl").write_bytes(
        lines({**choice(0), "label": True}, {**choice(0), "label": 2}, choice(0, label=-1))
    )
    with pytest.raises(
        ValueError, match=r"test\.jsonl:1: 'label' is True.*test\.jsonl:2: 'label' is 2[^;]*\Z"
    ):
        load_task(str(tmp_path))


def test_bad_rows_of_all_files_are_in_one_error_five_written_out_and_the_rest_counted(tmp_path):
    bad = [{"input": "a"}] * 3
    (tmp_path / "train.jsonl").write_bytes(lines(*bad, target(0)))
    (tmp_path / "val.jsonl").write_bytes(lines(target(0), *bad))
    with pytest.raises(ValueError, match=r"; and 1 more\Z") as error:
        load_task(str(tmp_path))
    places = [part.split(": ")[0] for part in str(error.value).split(f"{tmp_path}/")[1:]]
    assert places == [
        "train.jsonl:1",
        "train.jsonl:2",
        "train.jsonl:3",
        "val.jsonl:2",
        "val.jsonl:3",
    ]
    (tmp_path / "val.jsonl").write_bytes(lines(target(0), *bad[:2]))
    with pytest.raises(ValueError, match="expected either") as error:
        load_task(str(tmp_path))
    assert "more" not in str(error.value)


def test_a_file_in_another_encoding_is_one_report_and_not_one_for_each_line(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"input": "é", "target": "é"}\n'.encode("latin-1") * 9)
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(
        ValueError, match=r"train\.jsonl:1: 'utf-8' codec can't decode byte 0xe9[^;]*\Z"
    ):
        load_task(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\n \r\n", "\ufeff".encode()])
def test_an_empty_file_is_an_error_beside_those_of_other_files(tmp_path, content):
    (tmp_path / "train.jsonl").write_bytes(lines({"input": "a"}))
    (tmp_path / "val.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.jsonl:1: expected .*val\.jsonl: no rows\Z"):
        load_task(str(tmp_path))


def test_a_file_that_may_not_be_read_is_an_error_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "val.jsonl").touch()

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # and not chmod, which root ignores
    with pytest.raises(ValueError, match=r"val\.jsonl: Permission denied\Z"):
        load_task(str(tmp_path))


def test_both_kinds_of_rows_are_an_error_in_one_file_and_across_files(tmp_path):
    (tmp_path / "one.jsonl").write_bytes(lines(target(0), choice(1), target(2)))
    with pytest.raises(ValueError, match=r"one\.jsonl: 2 rows have 'target', the others 'choices'"):
        load_task(str(tmp_path / "one.jsonl"))
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "val.jsonl").write_bytes(lines(choice(0)))
    with pytest.raises(ValueError, match=r"train\.jsonl, .*val\.jsonl: 1 rows have 'target'"):
        load_task(str(tmp_path))


def test_a_folder_with_no_known_file(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"a folder of train, validation \(val, dev\) and test\Z"):
        load_task(str(tmp_path))


def test_a_folder_with_two_files_for_one_split(tmp_path):
    (tmp_path / "val.jsonl").write_bytes(lines(target(0)))
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has val\.jsonl and dev\.jsonl: keep one"):
        load_task(str(tmp_path))


def test_a_folder_with_nothing_to_report_on(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(choice(0)))
    (tmp_path / "test.jsonl").write_bytes(lines({"input": "a", "choices": ["b"]}, choice(0)))
    with pytest.raises(ValueError, match="no labelled rows to report on"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("name", ["mine.CSV", "mine.json", "mine"])
def test_an_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"expected a \.jsonl or \.csv file, or a folder"):
        load_task(str(tmp_path / name))


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    for name in ("rtee", "RTE"):
        with pytest.raises(
            ValueError, match=rf"'{name}' .*did you mean 'rte'\? Known tasks: .*cb, .*copa, .*rte"
        ):
            load_task(name)
    for name in ("no/such/file.jsonl", "", "zzzzzz", "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="is no task, file or folder: Known tasks: "):
            load_task(name)


# Rows of files


def read(path, content):
    """What read_rows makes of a file: errors as their messages."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (number, str(row) if isinstance(row, ValueError) else row)
        for number, row in read_rows(path)
    ]


def test_rows_of_jsonl_have_the_number_of_their_line_and_errors_do_not_stop_the_reading(tmp_path):
    content = '\ufeff{"input": "é"}\r\n\r\n{"inp\n[1]\n  {"n": [1, null]}'
    rows = read(tmp_path / "a.jsonl", content)
    assert [number for number, _ in rows] == [1, 3, 4, 5]
    assert (rows[0][1], rows[3][1]) == ({"input": "é"}, {"n": [1, None]})
    assert rows[1][1].startswith("not JSON: ")
    assert rows[2][1] == r"expected a JSON object, found '[1]\n'"
    assert read(tmp_path / "b.jsonl", b"") == []


def test_rows_of_csv_are_the_rows_of_jsonl(tmp_path):
    content = (
        "\ufeffinput,choices,label,adapter,idx\r\n"
        'a,"[""x|y"", ""z""]",1,,7\r\n'
        "\r\n"
        '"two\nlines, ""quoted""",yes | no,0,b,\r\n'
        "é \u2028,one,-1,1,x\r\n"
        ",,,,\r\n"
        "1,,,,"
    )
    assert read(tmp_path / "a.csv", content) == [
        (2, {"input": "a", "choices": ["x|y", "z"], "label": "1", "idx": "7"}),
        (
            4,
            {
                "input": 'two\nlines, "quoted"',
                "choices": ["yes", "no"],
                "label": "0",
                "adapter": "b",
            },
        ),
        (6, {"input": "é \u2028", "choices": ["one"], "label": "-1", "adapter": "1", "idx": "x"}),
        (8, {"input": "1"}),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a", r"expected 2 cells, .*found 1: \['a'\]"),
        ("a,b,c", r"expected 2 cells, .*found 3: "),
        ("input,choices", ".*other than the header's; found 2"),
        ('a,"[""x"""', "not JSON: "),
        ("a,[x]|y", "not JSON: "),
        ('a,"b" c', "',' expected after '\"'"),
        ("a" * 200_000 + ",b", "field larger than field limit"),
    ],
)
def test_a_bad_row_of_csv_is_an_error_at_its_place(tmp_path, line, words):
    (before, first), (at, message), (after, last) = read(
        tmp_path / "a.csv", f'input,choices\n"1\n",b\n{line}\n2,b\n'
    )
    assert (before, at, after) == (2, 4, 5)
    assert (first["input"], last["input"]) == ("1\n", "2")
    assert re.match(words, message)
    assert len(message) < 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"expected a header with 'input', none twice; found \[\]"),
        ("a question,an answer\nb,c\n", "found .'a question', 'an answer'"),
        ("input;target\na;b\n", "found .'input;target'"),
        ("input,target,target\na,b,c\n", "found .'input', 'target', 'target'"),
        ('"input\n', "unexpected end of data"),
        (b"\xff\xfei\0n\0", "codec can't decode"),
    ],
)
def test_a_csv_file_without_a_header_is_an_error(tmp_path, content, words):
    with pytest.raises(ValueError, match=rf"\A{tmp_path}/a\.csv: [^\n]*{words}[^\n]*\Z"):
        read(tmp_path / "a.csv", content)


def test_what_cannot_be_opened_is_an_error(tmp_path):
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no.csv", "No such file or directory"),
    ):
        with pytest.raises(ValueError, match=rf"\A{path}: {words}\Z"):
            next(read_rows(path))


@pytest.mark.parametrize(("name", "header"), [("a.jsonl", b""), ("a.csv", b"input,n\n")])
def test_reading_ends_where_a_row_is_too_long_or_no_text(tmp_path, monkeypatch, name, header):
    monkeypatch.setattr("minia3.tasks.rows.MOST", 50)
    good = b"a,1\n" if header else b'{"input": "a"}\n'
    for bad, words in (
        (b"x" * 51, "a row of more than 50 bytes"),
        (b"\xff", "'utf-8' codec can't decode byte"),
    ):
        (_, first), error = read(tmp_path / name, header + good + bad + b"\n" + good)
        assert first["input"] == "a"
        assert error[0] == (3 if header else 2)
        assert error[1].startswith(words)
    rows = read(tmp_path / name, header + good + b" " * 49 + b"\n" + good)
    assert [row["input"] for _, row in rows] == ["a", "a"]


def test_cells_with_line_ends_do_not_add_up_to_a_row_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("minia3.tasks.rows.MOST", 1000)
    assert read(tmp_path / "a.csv", 'input\n"a' + '\n","' * 1000) == [
        (2, "a row of more than 1000 bytes")
    ]


@pytest.mark.parametrize("name", ["big.jsonl", "big.csv"])
def test_reading_takes_the_memory_of_one_row(tmp_path, name):
    row = (
        b'{"input": "' + b"a" * 10_000 + b'"}\n'
        if name.endswith("l")
        else b'"' + b"a" * 10_000 + b'"\n'
    )
    (tmp_path / name).write_bytes(b"input\n" * name.endswith("v") + row * 2000)
    tracemalloc.start()
    try:
        assert sum(len(row["input"]) for _, row in read_rows(tmp_path / name)) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_line_of_a_gigabyte_is_refused_before_it_is_in_memory(tmp_path):
    with (tmp_path / "big.jsonl").open("wb") as file:
        file.truncate(1 << 30)  # a hole, which takes no disk
    tracemalloc.start()
    try:
        assert [str(row) for _, row in read_rows(tmp_path / "big.jsonl")] == [
            f"a row of more than {1 << 24} bytes"
        ]
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["target", "choices"])
def test_a_task_in_csv_is_the_task_in_jsonl(tmp_path, kind):
    rows = [(target if kind == "target" else choice)(n) for n in range(12)]
    names = list(rows[0])
    csv_lines = [
        ",".join("yes|no" if name == "choices" else str(row[name]) for name in names)
        for row in rows
    ]
    (tmp_path / "mine.jsonl").write_bytes(lines(*rows))
    (tmp_path / "mine.csv").write_text("\n".join([",".join(names), *csv_lines]))
    one, other = (load_task(tmp_path / name) for name in ("mine.jsonl", "mine.csv"))
    assert (one.name, one.train, one.validation, one.test, one.metric) == (
        *(other.name, other.train, other.validation, other.test, other.metric),
    )
    assert other.checksums == {
        "mine.csv": hashlib.sha256((tmp_path / "mine.csv").read_bytes()).hexdigest()
    }


def test_a_folder_may_hold_csv_files_but_one_file_for_a_split(tmp_path):
    (tmp_path / "train.csv").write_text("input,target\na,b\n")
    (tmp_path / "dev.jsonl").write_bytes(lines(target(0)))
    task = load_task(tmp_path)
    assert task.train == [{"input": "a", "target": "b", "label": 0, "idx": 0}]
    assert list(task.checksums) == ["train.csv", "dev.jsonl"]
    (tmp_path / "train.jsonl").write_bytes(lines(target(0)))
    with pytest.raises(ValueError, match=r"has train\.jsonl and train\.csv: keep one"):
        load_task(tmp_path)


def test_known_tasks_are_jsonl(server, tmp_path):
    (tmp_path / "served").mkdir()
    for name in ("train", "val"):
        (tmp_path / "served" / f"{name}.csv").write_text("input\n")
    assert len(load_task("served", tmp_path).train) == 2
    assert server.n_requests == 1


# Ids and batches


class Letters:
    """A tokenizer of one id a letter; 1 ends whatever has an end."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def encode_target(self, text, end):
        return [ord(letter) for letter in text] + [1] * end


@pytest.mark.parametrize("end", [False, True])
def test_an_example_is_the_ids_of_its_texts(end):
    example = encode_example(Rendered("ab", ["c", "de"], 1), Letters(), end=end)
    assert example == Example([97, 98], [[99] + [1] * end, [100, 101] + [1] * end], 1)


def test_a_batch_is_padded_on_the_right_and_missing_choices_are_masked():
    examples = [Example([7, 8, 9], [[1], [2, 3]], 1), Example([5], [[4, 5, 6]], -1)]
    batch = collate(examples)
    assert batch.source_BM.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.mask_BM.tolist() == [[True, True, True], [True, False, False]]
    assert batch.target_BCL.tolist() == [[[1, 0, 0], [2, 3, 0]], [[4, 5, 6], [0, 0, 0]]]
    assert batch.target_mask_BCL.int().tolist() == [[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]]
    assert batch.label_B.tolist() == [1, -1]
    assert [x.dtype for x in batch] == [torch.long, torch.bool, torch.long, torch.bool, torch.long]


IDS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
EXAMPLES = st.lists(
    st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4), st.integers(-1, 3)),
    min_size=1,
    max_size=5,
).map(lambda rows: [Example(*row) for row in rows])


@settings(deadline=None, max_examples=60)
@given(EXAMPLES)
def test_masks_give_back_exactly_what_went_in_even_if_the_padding_is_a_real_id(examples):
    batch = collate(examples)
    for b, example in enumerate(examples):
        assert batch.source_BM[b][batch.mask_BM[b]].tolist() == example.source
        targets = [
            batch.target_BCL[b, c][batch.target_mask_BCL[b, c]].tolist()
            for c in range(batch.target_BCL.shape[1])
        ]
        assert targets == example.targets + [[]] * (len(targets) - len(example.targets))
        assert (batch.source_BM[b][~batch.mask_BM[b]] == 0).all()
        assert (batch.target_BCL[b][~batch.target_mask_BCL[b]] == 0).all()
    assert batch.source_BM.shape[1] == max(len(example.source) for example in examples)
    assert batch.target_BCL.shape[1] == max(len(example.targets) for example in examples)
    assert batch.label_B.tolist() == [example.label for example in examples]


@pytest.mark.parametrize(
    "bad",
    [Example([], [[1]], 0), Example([1], [], 0), Example([1], [[]], 0), Example([1], [[2], []], 0)],
)
def test_a_batch_with_nothing_to_read_or_to_score_is_an_error(bad):
    with pytest.raises(ValueError, match="example 1 of the batch"):
        collate([Example([1], [[1]], 0), bad])


# The order of rows


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_batches_are_a_stream_of_permutations_and_every_step_can_be_asked_for_alone(
    n_rows, batch_size, seed
):
    n_steps = 3 * n_rows // batch_size + 2
    batches = [order(n_rows, batch_size, seed)(step) for step in reversed(range(n_steps))][::-1]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = list(chain(*batches))
    for epoch in range(len(stream) // n_rows):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
    same = order(n_rows, batch_size, seed)
    assert [same(step) for step in range(n_steps)] == batches
    smaller = order(n_rows, 1, seed)
    assert [smaller(step)[0] for step in range(len(stream))] == stream, (
        "the stream does not depend on the batch size"
    )


def test_epochs_and_seeds_have_permutations_of_their_own():
    epochs = [tuple(order(100, 100, seed)(epoch)) for seed in (0, 1, 2) for epoch in range(3)]
    assert len(set(epochs)) == 9


def test_the_order_does_not_depend_on_the_machine_or_the_version():
    assert [order(5, 2, 7)(step) for step in (0, 1, 2, 1000)] == [[4, 1], [2, 3], [0, 3], [3, 4]]
    similar = order(5, 2, 7, [3, 1, 4, 1, 5])
    assert [similar(step) for step in (0, 1, 2, 1000)] == [[4, 4], [1, 3], [0, 0], [2, 2]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_batches_of_similar_lengths_hold_the_same_rows_in_as_many_steps(
    n_rows, batch_size, seed, key
):
    lengths = np.random.RandomState(key).randint(1, 500, n_rows).tolist()
    plain, similar = order(n_rows, batch_size, seed), order(n_rows, batch_size, seed, lengths)
    for window in (0, 3):
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        batches = [similar(step) for step in steps]
        assert sorted(chain(*batches)) == sorted(chain(*map(plain, steps)))
        ranges = sorted(
            (min(map(lengths.__getitem__, rows)), max(map(lengths.__getitem__, rows)))
            for rows in batches
        )
        assert all(high <= low for (_, high), (low, _) in pairwise(ranges))  # they do not overlap


def test_batches_of_similar_lengths_come_in_another_order_each_time():
    similar = order(320, 10, 0, list(range(320)))
    first, second = ([similar(step)[0] for step in range(n, n + WINDOW)] for n in (0, WINDOW))
    assert first != sorted(first)
    assert np.argsort(first).tolist() != np.argsort(second).tolist()
