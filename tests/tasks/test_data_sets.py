"""The files of known tasks are downloaded, read and checked in the forms of their authors."""

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

pytest_plugins = ["served_task"]


def serve_official(monkeypatch, server, name, contents):
    """Move the addresses of a known task to the server.

    contents: a dict from the last part of an address to the content of its file.
    """
    server.pages = {f"/{end}": content for end, content in contents.items()}
    sources = []
    for source in known_tasks()[name].sources:
        end = source.address.rsplit("/", 1)[1]
        address = f"http://127.0.0.1:{server.server_port}/{end}"
        digest = hashlib.sha256(contents[end]).hexdigest()
        sources.append(Source(address, source.files, len(contents[end]), digest))
    monkeypatch.setitem(known_tasks(), name, known_tasks()[name]._replace(sources=sources))


def test_a_round_of_anli_comes_from_the_zip_of_all_rounds_and_is_reported_on_test(
    server, tmp_path, monkeypatch
):
    row = {"uid": "u", "context": "c", "hypothesis": "h", "model_label": "n"}
    names = ("train", "dev", "test")
    parts = {}
    for number, label in ((1, "e"), (2, "n"), (3, "c")):
        for name in names:
            parts[f"anli_v0.1/R{number}/{name}.jsonl"] = lines({**row, "label": label})
    serve_official(monkeypatch, server, "anli-r2", {"anli_v0.1.zip": zipped(parts)})
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


def test_hellaswag_has_three_plain_files_and_its_rows_hold_their_choices(
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
    serve_official(monkeypatch, server, "hellaswag", contents)
    task = load_task("hellaswag", tmp_path)
    text = "Topic: Running\nText: A man"
    assert render(task.prompts[0], task.train[0]) == (text, ["a", "b", "c", "d"], 3)
    assert task.evaluation == ("validation", [{**row, "idx": 0}])
    assert [row["label"] for row in task.test] == [-1]
    (tmp_path / "hellaswag" / "val.jsonl").write_bytes(
        lines({**row, "endings": ["a", "b"]}, {**row, "endings": 7})
    )
    words = r"the row has no such item as '{endings\[\d\]}' needs \("
    with pytest.raises(ValueError, match=rf"val\.jsonl:1: {words}.*val\.jsonl:2: {words}"):
        load_task("hellaswag", tmp_path)


def test_train_is_downloaded_last_so_that_the_next_run_fetches_what_is_missing(
    server, tmp_path, monkeypatch
):
    row = {"ctx": "A man", "activity_label": "Running", "endings": ["a", "b", "c", "d"], "label": 3}
    contents = {f"hellaswag_{name}.jsonl": lines(row) for name in SPLIT_NAMES}
    serve_official(monkeypatch, server, "hellaswag", contents)
    train = server.pages.pop("/hellaswag_train.jsonl")
    words = r"_train\.jsonl: HTTP Error 404.*put train\.jsonl, val\.jsonl, test\.jsonl "
    with pytest.raises(ValueError, match=words):
        load_task("hellaswag", tmp_path)
    names = {path.name for path in (tmp_path / "hellaswag").iterdir()}
    assert names == {"test.jsonl", "val.jsonl"}
    server.pages["/hellaswag_train.jsonl"] = train
    assert len(load_task("hellaswag", tmp_path).train) == 1


def test_the_answer_of_winogrande_is_its_label_and_is_empty_in_test(server, tmp_path, monkeypatch):
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
    serve_official(monkeypatch, server, "winogrande", {"winogrande_1.1.zip": zipped(parts)})
    task = load_task("winogrande", tmp_path)
    assert task.train == task.validation == [{**row, "label": 1, "idx": 0}]
    assert task.test == [{**row, "answer": "", "label": -1, "idx": 0}]
    assert render(task.prompts[0], task.train[0])[1:] == (["cat", "dog"], 1)


def test_sst2_has_tabs_and_no_quotes_and_its_shots_are_drawn_from_each_class(
    server, tmp_path, monkeypatch
):
    texts = [f'a "film {i} ' for i in range(9)]
    train = "sentence\tlabel\n" + "".join(f"{text}\t{i % 3 // 2}\n" for i, text in enumerate(texts))
    parts = {"SST-2/train.tsv": train, "SST-2/dev.tsv": "sentence\tlabel\ngood \t1\n"}
    parts["SST-2/test.tsv"] = 'index\tsentence\n0\t" bad\n'
    serve_official(monkeypatch, server, "sst2", {"SST-2.zip": zipped(parts)})
    task = load_task("sst2", tmp_path)
    assert [row["sentence"] for row in task.train] == texts
    assert [row["label"] for row in task.train] == [0, 0, 1] * 3
    assert task.test == [{"index": "0", "sentence": '" bad', "label": -1, "idx": 0}]
    few = load_task("sst2", tmp_path, shots=2, seed=5).train
    classes = [[row for row in task.train if row["label"] == label] for label in (0, 1)]
    for rows in classes:
        np.random.RandomState(5).shuffle(rows)
    assert few == classes[0][:2] + classes[1][:2]
    with pytest.raises(ValueError, match="1 to 3 shots of each label, found 4"):
        load_task("sst2", tmp_path, shots=4)


def test_the_validation_rows_of_mrpc_are_the_rows_of_train_that_its_list_names(
    server, tmp_path, monkeypatch
):
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f'{i % 2}\t{i}\t{i + 10}\tone "{i}\ttwo {i}\r\n' for i in range(5)]
    ids = b"1\t11\n3\t13\n4\t9\n"
    contents = {
        "msr_paraphrase_train.txt": (head + "".join(rows)).encode(),
        "mrpc_dev_ids.tsv": ids,
        "msr_paraphrase_test.txt": (head + rows[1]).encode(),
    }
    serve_official(monkeypatch, server, "mrpc", contents)
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


def test_mrpc_may_be_the_folder_of_glue(tmp_path):
    folder = tmp_path / "mrpc"
    folder.mkdir()
    names = "#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f'{i % 2}\t{i}\t{i + 10}\tone "{i}\ttwo {i}\n' for i in range(8)]
    (folder / "train.tsv").write_text(f"\ufeffQuality\t{names}\n" + "".join(rows[:5]))
    (folder / "dev.tsv").write_text(f"\ufeffQuality\t{names}\n" + "".join(rows[5:]))
    test_rows = [f"{n}{row[1:]}" for n, row in enumerate(rows[:2])]  # a number, and no label
    (folder / "test.tsv").write_text(f"index\t{names}\n" + "".join(test_rows))
    task = load_task("mrpc", tmp_path)
    assert [row["label"] for row in task.train] == [0, 1, 0, 1, 0]
    assert [(row["id1"], row["label"]) for row in task.validation] == [("5", 1), ("6", 0), ("7", 1)]
    assert task.validation[0]["sentence1"] == 'one "5'
    assert [row["label"] for row in task.test] == [-1, -1]
    assert task.evaluation == ("validation", task.validation)
    assert task.notes == ["2 of 2 test rows have no label: results are on validation"]
    for row in [*task.train, *task.validation, *task.test]:
        assert len(set(render(task.prompts[0], row).choices)) == 2


def test_the_spans_of_wsc_are_fields_and_spelled_as_in_the_text(server, tmp_path, monkeypatch):
    text = "The cat saw it . the end"
    spelling = {  # (index, span) -> the span of our row
        (0, "the cat"): "The cat",
        (1, "Cat."): "cat",
        (1, "cat\nsaw"): "cat saw",
        (2, "cat"): "cat",
        (1, "X"): "X",
        (0, "the"): "the",  # this span occurs in the text, at its end
    }
    rest = {"span2_text": "it", "span2_index": 3}
    rows = []
    for index, span in spelling:
        spans = {"span1_index": index, "span1_text": span, **rest}
        rows.append({"text": text, "target": spans, "label": True})
    parts = {f"WSC/{name}.jsonl": lines(*rows) for name in SPLIT_NAMES}
    serve_official(monkeypatch, server, "wsc", {"WSC.zip": zipped(parts)})
    task = load_task("wsc", tmp_path)
    assert [row["span1_text"] for row in task.train] == list(spelling.values())
    assert task.train[0] == {
        "text": text,
        "span1_text": "The cat",
        "span1_index": 0,
        **rest,
        "label": 1,
        "idx": 0,
    }
    bad_spans = (None, [1], {**rows[0]["target"], "span1_index": "0"}, {})
    bad_rows = [{**rows[0], "target": spans} for spans in bad_spans]
    (tmp_path / "wsc" / "val.jsonl").write_bytes(lines(*bad_rows))
    with pytest.raises(ValueError, match="expected 'text', and 'target' with span1_text") as error:
        load_task("wsc", tmp_path)
    for number in (1, 2, 3, 4):
        assert f"val.jsonl:{number}: expected 'text', " in str(error.value)


def test_storycloze_is_given_on_request_and_read_from_its_two_files(tmp_path):
    val = "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"
    test = "cloze_test_test__spring2016 - cloze_test_ALL_test.csv"
    folder = tmp_path / "storycloze"
    words = r"https://cs\.rochester\.edu\S+: the authors give .* on request only.*; or put "
    with pytest.raises(ValueError, match=words) as error:
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
        "input_sentence_1": "One, two.",
        "input_sentence_2": "Two.",
        "input_sentence_3": "Three.",
        "input_sentence_4": "Four.",
    }
    quiz = {"sentence_quiz1": "Good.", "sentence_quiz2": "Bad.", "answer_right_ending": "1"}
    assert task.train == [{"story_id": "id", **sentences, **quiz, "label": 0, "idx": 0}]
    (plain,) = (prompt for prompt in task.prompts if prompt.text.endswith("{input_sentence_4}"))
    assert render(plain, task.test[0]) == ("One. Two. Three. Four.", ["Bad.", "Good."], 1)


@pytest.mark.slow
def test_raft_is_downloaded_by_the_client_of_the_hub(tmp_path, monkeypatch):
    """In a child process, because huggingface_hub reads its environment when it is imported."""
    train = "Tweet text,Label,ID\n"
    for i in range(50):
        label = "no complaint" if i % 2 else "complaint"
        train += f"t{i},{label},{i}\n"
    files = {"train.csv": train.encode(), "test_unlabeled.csv": b"Tweet text,ID\n,50\nx,51\n"}
    prefix = "/datasets/ought/raft/resolve/main/data/twitter_complaints/"
    requests = []

    def answer(self):
        requests.append(self.path)
        content = files.get(self.path.removeprefix(prefix), b"")
        status = 200 if content else 404
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    monkeypatch.setattr(Handler, "do_GET", answer)
    monkeypatch.setattr(Handler, "do_HEAD", answer, raising=False)
    code = (
        "import sys\n"
        "from minia3 import load_task\n"
        "task = load_task('raft/twitter_complaints', sys.argv[1])\n"
        "print(len(task.train), len(task.validation), task.test)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    env = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    env = {name: value for name, value in env.items() if not name.startswith("HF_")}
    with Server() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
        env["HF_HOME"] = str(tmp_path / "hub")
        outputs = []
        for _ in range(2):
            done = subprocess.run(
                command, capture_output=True, text=True, env=env, timeout=120, check=False
            )
            outputs.append(done.stdout)
            assert done.returncode == 0, done.stderr
        hub.shutdown()
        thread.join()
    test = [
        {"Tweet text": "", "ID": "50", "label": -1, "idx": 0},
        {"Tweet text": "x", "ID": "51", "label": -1, "idx": 1},
    ]
    assert outputs == [f"40 10 {test}\n"] * 2
    folder = tmp_path / "data" / "raft" / "twitter_complaints"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    n_requests = sum(path.startswith(prefix) for path in requests)
    assert n_requests == 4, "HEAD and GET of each file, and none the second time"
