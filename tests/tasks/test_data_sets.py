"""Every form of file that a known task has, as its authors wrote it: from the download to the checked rows."""

import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from task_files import SPLIT_NAMES, Handler, Server, lines, zipped

from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import render
from minia3.tasks.splits import load_task
from minia3.tasks.task import Source

pytest_plugins = ["task_files"]


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
