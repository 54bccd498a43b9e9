"""Scenes of misfortune that need more than one deed: pipes, locales, huge rows, servers, threads.

Each case of a scene runs in its own process and raises AssertionError if minia3 misbehaves. A case
is named by (seed, scene, number).
"""

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import minia3
import train
from minia3.cli.main import main
from minia3.inference.scoring import rank
from minia3.tasks import download as download_module
from minia3.tasks.splits import load_task
from tests.hostile.campaign import Tally
from tests.hostile.deeds import DEEDS, know_task
from tests.hostile.kills import results_in
from tests.hostile.processes import last_line, run_process

ROOT = Path(__file__).resolve().parents[2]
CHINESE = "一只猫坐在垫子上"
ODD_NAMES = ["a b", "né e", CHINESE, "-x", "a'b\"c", "%s{x}", "x" * 200]


# Pipes


def close_pipes(rng, number, inputs, folder):
    """The reader of standard output is gone, or there is none, or its disk is full."""
    deed = list(DEEDS)[number % len(DEEDS)]
    streams = [1] if rng.random() < 0.7 else [1, 2]
    for stream in streams:
        match rng.randrange(3):
            case 0:
                reading, writing = os.pipe()
                os.close(reading)
            case 1:
                writing = os.open("/dev/full", os.O_WRONLY)
            case 2:
                writing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(writing, stream)
    code = 141
    if DEEDS[deed].begin:
        DEEDS[deed].begin(inputs, folder)
    with contextlib.suppress(SystemExit):
        code = DEEDS[deed].run(inputs, folder)
    # 141 says, as a shell does, that the reader is gone. A training goes on without it.
    allowed = (0,) if "run" in results_in(folder) else (0, 1, 141)
    assert code in allowed, f"{deed}: exit code {code}"


# Locales


def change_locale(rng, number, inputs, folder):
    """Rows in Chinese and files with odd names, in a process that believes in ASCII."""
    name = ODD_NAMES[(1 + number) % len(ODD_NAMES)]  # those with other letters first
    (folder / name).mkdir()
    rows = folder / name / "rows.jsonl"
    lines = []
    for n in range(9):
        row = {"input": f"{CHINESE} é {n}", "choices": ["w4", "对"], "label": n % 2}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    rows.write_text("".join(lines), encoding="utf-8")
    environ = {"LC_ALL": rng.choice(["C", "POSIX"]), "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    environ |= {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
    if rng.random() < 0.5:
        environ["PYTHONCOERCECLOCALE"] = "0"
    flags = ["--model", inputs / "t5", "--task", rows, "--steps", 1, "--device", "cpu"]
    words = ["train", *flags, "--out", folder / name / "run"]
    if number % 2:
        words = ["predict", inputs / "t5", rows, "--out", folder / f"{name}.csv"]
    command = [sys.executable, "-m", "minia3", *map(str, words)]
    done = subprocess.run(command, env=environ, capture_output=True, timeout=100)
    printed = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, printed[-300:]
    if number % 2:
        assert "对" in (folder / f"{name}.csv").read_text(encoding="utf-8")


# Rows


def thrice(row):
    """Return the content of a file of JSON lines that has a row three times."""
    return (json.dumps(row) + "\n") * 3


def list_huge_rows():
    """Return (function that makes the content, suffix) of files with too much of something.

    A case makes its own content, because all of them take a hundred megabytes.
    """
    words = "w5 " * 50_000
    good = {"input": "w5", "choices": ["w4", "w6"], "label": 0}
    rows = [
        {"input": words, "target": "w4"},
        {"input": "w5", "target": words},
        {"input": "w5", "choices": [words, "w4"], "label": 0},
        good | {"choices": [f"w{n} w{m}" for n in range(3, 23) for m in range(3, 23)]},
        good | {"choices": ["w4"] * 100_000},
        good | {f"column {n}": n for n in range(50_000)},
        good | {"label": 10**400},
        good | {"input": "x" * 20_000_000},
        good | {"input": "\u0000" * 100_000},
        good | {"input": "e" + "\u0301" * 100_000},
        good | {"idx": -(2**63)},
        {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": words}]},
        {"messages": [{"role": "user", "content": "w5"}] * 20_000},
    ]
    contents = []
    for row in rows:
        contents.append((partial(thrice, row), ".jsonl"))
    deep = '{"input": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    texts = [(deep * 3, ".jsonl"), ("[" + deep + "]", ".json"), ("\n" * 1_000_000, ".jsonl")]
    texts += [("input,target\n" + "a," * 100_000 + "\n", ".csv"), ('input\n"' + words, ".csv")]
    texts += [("input,target\n" + "w5,w4\n" * 600, ".csv"), ("w5\tw4\n" * 9, ".tsv")]
    for text, suffix in texts:
        contents.append((partial(str, text), suffix))
    return contents


HUGE_ROWS = list_huge_rows()


def read_huge_rows(rng, number, inputs, folder):
    """Too long, too many, too deep: one line, or the right thing, in bounded memory."""
    make_content, suffix = HUGE_ROWS[number % len(HUGE_ROWS)]
    file = folder / f"rows{suffix}"
    file.write_text(make_content())
    model = rng.choice(["t5", "llama"])
    flags = ["--model", inputs / model, "--task", file, "--steps", 1, "--out", folder / "run"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = train.main([*map(str, flags), "--device", "cpu"], is_program=True)
    assert code in (0, 1, 2), f"exit code {code}"
    n_megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert n_megabytes < 3000, f"{n_megabytes} MB"


# Servers


def answer_badly(rng, connection, content, port):
    """Answer one request in a way that no good server does."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    cut = rng.randrange(len(whole))
    redirect = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/T.zip\r\n\r\n".encode()
    changed = bytearray(whole)
    changed[-rng.randrange(1, len(content))] ^= 1 << rng.randrange(8)
    answers = [
        whole[:cut],
        bytes(changed),
        redirect,
        whole + b"more",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + content,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + content[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + content,
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3_000_000),
        b"HTTP/1.1 %d x\r\n\r\n" % rng.choice([204, 206, 304, 401, 404, 429, 500, 999]),
        b"HTTP/1.1 301 x\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"HTTP/1.1 301 x\r\nLocation: \xff\xfe\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + rng.randbytes(50),
        b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"",
        None,
    ]
    answer = rng.choice(answers)
    if answer is None:  # a byte at a time
        for byte in whole:
            time.sleep(0.02)
            connection.sendall(bytes([byte]))
    else:
        connection.sendall(answer)


def misbehave(rng, number, inputs, folder):
    """No answer leaves a wrong file, or a part of one, or keeps the process for long."""
    content = (inputs / "T.zip").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            while True:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(10_000)
                        answer_badly(rng, connection, content, port)

        threading.Thread(target=serve, daemon=True).start()
        know_task(inputs, f"http://127.0.0.1:{port}/T.zip")
        download_module.TIMEOUT = 1
        download_module.GRACE = 1
        data = folder / "data"
        began = time.monotonic()
        try:
            load_task("served", data)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 1000, f"{len(message)} characters"
            left = [path.name for path in data.rglob("*") if path.is_file()]
            assert left == [], f"left behind: {left}"
        assert time.monotonic() - began < 20, "it took too long"
    know_task(inputs)
    assert len(load_task("served", data).train) == 2


# Threads


def answer_in_threads(rng, number, inputs, folder):
    """Every answer is that of the adapter which the caller named, whatever comes and goes."""
    model = minia3.load_model(inputs / "t5")
    tokenizer = minia3.load_tokenizer(inputs / "t5")
    adapters = minia3.Adapters(model)
    prompts = ["w5 w9 w11", "w7"]
    choices = ["w4 w5", "w8", "w30"]
    expected = {}
    for i in range(2):
        adapters.load(f"a{i}", inputs / f"adapter{i}")
        row = adapters.rows([f"a{i}"] * 2)
        expected[f"a{i}"] = rank(model, tokenizer, prompts, choices, adapter=row)
    assert not torch.equal(expected["a0"], expected["a1"])
    failures = []
    is_over = threading.Event()

    def answer(name):
        while not is_over.is_set():
            try:
                rows = adapters.rows([name] * 2)
                found = rank(model, tokenizer, prompts, choices, adapter=rows)
            except ValueError:  # the name is not there, or the row was given up meanwhile
                time.sleep(0.001)  # otherwise this thread keeps the others from Python
                continue
            if not torch.equal(found, expected[name]):
                failures.append(name)

    def change(name, path):
        for _ in range(150):
            adapters.load(name, path)
            time.sleep(random.random() / 1000)
            adapters.remove(name)
        is_over.set()

    threads = []
    for i in range(2):
        threads.append(threading.Thread(target=answer, args=(f"a{i}",)))
        threads.append(threading.Thread(target=change, args=(f"a{i}", inputs / f"adapter{i}")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, f"{len(failures)} answers of another adapter: {set(failures)}"


def write_in_odd_places(rng, number, inputs, folder):
    """A folder may have any name."""
    deed = list(DEEDS)[number % len(DEEDS)]
    place = folder / rng.choice([*ODD_NAMES, "a\nb", "\udcff"])
    place.mkdir()
    if DEEDS[deed].begin:
        DEEDS[deed].begin(inputs, place)
    code = DEEDS[deed].run(inputs, place)
    # safetensors reads no path that is not UTF-8, and says so.
    allowed = (0, 2) if place.name == "\udcff" else (0,)
    assert code in allowed, f"{deed} in {place}: exit code {code}"


def forget_arguments(rng, number, inputs, folder):
    """A command line of random words ends in one line."""
    words = ["merge", "predict", "mix", "convert", "info", "table", "generate", "plot", "train"]
    words += ["--out", "--model", "--task", "--adapter", "-h", "--", "", "x", "@t5", "=a", "a:0.5"]
    words += ["@rows.jsonl", "@adapter0", "@lora", "@finish.pt", "@", "--steps", "1", "-1", "nan"]
    os.chdir(folder)
    command = [rng.choice(words[:9])]
    command += rng.choices(words, k=rng.randrange(6))
    typed = []
    for word in command:
        typed.append(word.replace("@", f"{inputs}/").replace("=", f"{folder}/"))
    code = 0
    try:
        code = main([*typed, *(["--steps", "1"] if command[0] == "train" else [])])
    except SystemExit as end:
        code = end.code or 0
    assert code in (0, 1, 2), f"{command}: exit code {code}"


@dataclass(frozen=True)
class Scene:
    play: Callable  # (rng, number, inputs, folder)
    n_cases: int  # in a round


SCENES = {
    "pipes": Scene(close_pipes, len(DEEDS)),
    "locale": Scene(change_locale, 2),  # a training and a prediction
    "odd names": Scene(write_in_odd_places, len(DEEDS)),
    "huge rows": Scene(read_huge_rows, len(HUGE_ROWS)),
    "servers": Scene(misbehave, 40),
    "threads": Scene(answer_in_threads, 2),
    "command lines": Scene(forget_arguments, 60),
}


def play(campaign, name, number, seed):
    """Play a case of a scene. Return what went wrong, or None."""
    campaign.clear()
    rng = random.Random(f"{seed} {name} {number}")
    code, printed = run_process(
        lambda: SCENES[name].play(rng, number, campaign.inputs, campaign.scratch)
    )
    if code or "Traceback" in printed:
        return f"exit code {code}: {last_line(printed)}"
    return None


def play_scenes(campaign, names, seed, n_rounds, show):
    """Play all scenes, and return a Tally for each."""
    tallies = []
    for name in names:
        tally = Tally(name, n_rounds * SCENES[name].n_cases)
        began = time.monotonic()
        for number in range(tally.n_cases):
            wrong = play(campaign, name, number, seed)
            if wrong:
                tally.failures.append(f"{number}: {wrong}")
            else:
                tally.n_read += 1
        tally.seconds = time.monotonic() - began
        show(tally)
        tallies.append(tally)
    return tallies
