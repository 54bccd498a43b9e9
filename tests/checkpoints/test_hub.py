"""Guards the way from a hub id to a folder, against a server on the loopback that speaks as much of the hub's language
as huggingface_hub listens to: only what is needed is fetched, what is cached needs no network, each failure is one
clear line. Loads are made by children, since huggingface_hub reads its environment when it is imported."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make
from safetensors.torch import load_file

from minia3.checkpoints.hub import find_adapter

COMMIT = "0123456789" * 4
CHILD = """
    import json, sys, time
    waits = []
    time.sleep = waits.append  # huggingface_hub waits longer and longer between its tries
    import minia3
    from minia3.checkpoints import hub

    def outcome(call, name):
        try:
            if call == "find without weights":
                return sorted(path.name for path in hub.find(name, weights=False).iterdir())
            if call == "find adapter":
                return {path.name: path.read_text() for path in hub.find_adapter(name).iterdir()}
            value = minia3.load_model(name)
        except ValueError as error:
            return "ValueError: " + str(error)
        return sum(p.double().sum().item() for n, p in value.named_parameters() if not n.endswith(".scale"))

    print(json.dumps([[outcome(call, name) for call, name in json.loads(sys.argv[1])], sum(waits)]))
"""


def ask(cache, endpoint, calls, **environment):
    """What each call came to in a child: a list of files, a sum of weights, or a ValueError's message."""
    settings = {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "",
    }
    env = {
        key: value
        for key, value in os.environ.items()
        if "PROXY" not in key.upper() and not key.startswith("HF_")
    }
    child = [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps(calls)]
    done = subprocess.run(
        child, capture_output=True, text=True, env=env | settings | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    outcomes, waited = json.loads(done.stdout)
    assert waited < 60, (
        "where the hub cannot be reached, it is tried again for one file of a repository, not for each"
    )
    return outcomes


class Hub(ThreadingHTTPServer):
    """Repositories as dicts from file names to bytes; `requests` lists what was asked for."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requests = repositories, []

    def take(self, method="GET"):
        """Repository -> the files asked for since the last call."""
        taken = {}
        for asked, repository, file in self.requests:
            if asked == method:
                taken.setdefault(repository, []).append(file)
        self.requests.clear()
        return taken


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        if "/resolve/" not in self.path:  # what huggingface_hub asks for its own ends
            return self.fail(404, None)
        _, owner, name, _, revision, file = self.path.split("/", 5)
        self.server.requests.append((self.command, f"{owner}/{name}", file))
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.fail(404, "RepoNotFound")
        if "private" in name:
            return self.fail(401, "RepoNotFound")
        if "gated" in name:
            return self.fail(403, "GatedRepo")
        assert revision in ("main", COMMIT)
        if file not in repository:
            return self.fail(404, "EntryNotFound")
        content = repository[file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content + file.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(
                content[: len(content) // 2] if "broken" in name and "model" in file else content
            )
            self.close_connection = "broken" in name

    do_HEAD = do_GET = answer

    def fail(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The files of a small T5, whole and in shards, as bytes."""
    folder, shards = tmp_path_factory.mktemp("hub-t5"), tmp_path_factory.mktemp("hub-t5-shards")
    make("t5-v1.0").save_pretrained(folder)
    make("t5-v1.0").save_pretrained(shards, max_shard_size="30KB")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    return [
        {path.name: path.read_bytes() for path in where.iterdir()} for where in (folder, shards)
    ]


@pytest.fixture(scope="module")
def hub(contents):
    whole, shards = contents
    junk = {
        "README.md": b"#",
        "tf_model.h5": b"x" * 999,
        "flax_model.msgpack": b"x",
        "onnx/model.onnx": b"x",
        "spiece.model": b"x",
    }

    def without(*names):
        return {name: content for name, content in whole.items() if name not in names}

    server = Hub(
        {
            "org/both": whole | junk,
            "org/bin": without("model.safetensors", "tokenizer.json"),
            "org/others": without("model.safetensors", "tokenizer.json"),
            "org/shards": shards,
            "org/no-weights": without("model.safetensors", "pytorch_model.bin"),
            "org/no-config": without("config.json"),
            "org/lost-shard": {n: x for n, x in shards.items() if "00002" not in n},
            "org/gated": whole,
            "org/private": whole,
            "org/broken": whole,
            "google-t5/t5-small": whole | {"chat_template.jinja": b"{{ messages }}"},
            "user/adapter": {
                "adapter_config.json": b"{}",
                "adapter_model.safetensors": b"a",
                "adapter_model.bin": b"b",
            },
            "user/old-adapter": {
                "adapter_config.json": b"{}",
                "adapter_model.bin": b"b",
                "README.md": b"#",
            },
            "user/gated-adapter": {},
            "user/empty-adapter": {"adapter_config.json": b"{}"},
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def loads():
    """The calls that load each of the forms, and what comes of them."""
    total = sum(p.double().sum().item() for p in make("t5-v1.0").parameters())
    calls = [("load", name) for name in ("org/both", "org/bin", "org/shards")]
    return calls, [pytest.approx(total, abs=1e-9)] * len(calls)


@pytest.fixture(scope="module")
def cached(hub, loads, tmp_path_factory):
    """A cache filled by our loads, by looking for a tokenizer, and by another program; and what we asked for."""
    cache, (calls, sums) = tmp_path_factory.mktemp("cache"), loads
    found = ask(cache, hub.address, [*calls, ("find without weights", "t5-small")])
    assert found == [
        *sums,
        ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"],
    ]
    asked = hub.take()
    for file in ("config.json", "pytorch_model.bin"):
        huggingface_hub.hf_hub_download(
            "org/others", file, cache_dir=cache / "hub", endpoint=hub.address
        )
    hub.take()
    return cache, asked


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_only_what_is_needed_is_fetched(hub, cached):
    common = ["config.json", "generation_config.json"]
    shards = sorted(
        name for name in hub.repositories["org/shards"] if name.endswith(".safetensors")
    )
    assert len(shards) > 2
    assert cached[1] == {
        "org/both": [*common, "tokenizer.json", "spiece.model", "model.safetensors"],
        "org/bin": [*common, "pytorch_model.bin"],
        "org/shards": [*common, "model.safetensors.index.json", *shards],
        "google-t5/t5-small": [
            *common,
            "tokenizer.json",
            "chat_template.jinja",
        ],  # a known name, without its weights
    }


def test_the_second_load_asks_only_whether_the_repository_has_moved_on(hub, cached, loads):
    assert ask(cached[0], hub.address, loads[0]) == loads[1]
    assert hub.take("HEAD") == {name: ["config.json"] for _, name in loads[0]}


def test_offline_what_is_cached_is_enough_and_what_is_not_is_named(hub, cached, loads):
    calls = [*loads[0], ("load", "org/others"), ("load", "t5-small"), ("load", "org/else")]
    found = ask(cached[0], hub.address, calls, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert found[:4] == [*loads[1], loads[1][0]], (
        "whoever filled the cache: it may know nothing of files we look for"
    )
    assert "google-t5/t5-small: model.safetensors or model.safetensors.index.json or" in found[4]
    for message in found[4:]:
        assert "is not in the cache, and the hub cannot be reached" in message
        assert message.endswith("Without a network, give the path of a folder")
    assert found[5].startswith("ValueError: org/else: config.json is not in the cache")


def test_where_the_network_is_down_what_is_cached_is_enough(cached, loads):
    address = f"http://127.0.0.1:{free_port()}"
    found = ask(cached[0], address, [*loads[0], ("load", "org/others"), ("load", "org/else")])
    assert found[:4] == [*loads[1], loads[1][0]]
    assert found[4].startswith(
        "ValueError: org/else: config.json is not in the cache, and the hub cannot be reached ("
    )
    assert "\n" not in found[4]


def test_each_failure_is_one_clear_line(hub, tmp_path):
    names = {
        "org/gated": "org/gated: gated. Accept its terms at https://huggingface.co/org/gated and set HF_TOKEN",
        "org/private": "org/private: the hub has no such repository, or it is private and needs a token",
        "org/nowhere": "org/nowhere: the hub has no such repository, or it is private and needs a token",
        "google/flan-t5-bas": "needs a token; did you mean google/flan-t5-base?",
        "org/no-weights": "org/no-weights: this hub repository has no model.safetensors or",
        "org/no-config": "org/no-config: this hub repository has no config.json",
        "org/lost-shard": "org/lost-shard: this hub repository has no model-00002-of-",
        "org/broken": "org/broken: not a hub id, or the download failed: ",
        "org/a name": "org/a name: not a hub id, or ",
    }
    for (name, message), found in zip(
        names.items(), ask(tmp_path, hub.address, [("load", name) for name in names]), strict=True
    ):
        assert message in found, name
        assert found.startswith(f"ValueError: {name}: ")
        assert "\n" not in found
        assert len(found) < 500


def test_an_adapter_is_fetched_with_its_config_and_its_best_weights_alone(hub, tmp_path):
    names = ("user/adapter", "user/old-adapter")
    expected = [
        {"adapter_config.json": "{}", "adapter_model.safetensors": "a"},
        {"adapter_config.json": "{}", "adapter_model.bin": "b"},
    ]
    calls = [("find adapter", name) for name in names]
    hub.requests.clear()
    assert ask(tmp_path, hub.address, calls) == expected
    assert hub.take() == {name: list(files) for name, files in zip(names, expected, strict=True)}
    assert ask(tmp_path, hub.address, calls, HF_HUB_OFFLINE="1") == expected
    assert hub.requests == []


def test_an_adapter_that_cannot_be_fetched_is_refused_as_a_model_is(hub, tmp_path):
    names = {
        "user/gated-adapter": "user/gated-adapter: gated. Accept its terms at https://huggingface.co/user/gated-adapter",
        "user/nowhere": "user/nowhere: the hub has no such repository, or it is private and needs a token",
        "user/empty-adapter": "user/empty-adapter: this hub repository has no adapter_model.safetensors or adapter_mod",
        "org/both": "org/both: this hub repository has no adapter_config.json",
        "nothing": "nothing: not found; expected the folder or file of an adapter, or a hub id (user/name)",
        "./user/name": "user/name: not found; expected",
        "user/a name": "user/a name: not a hub id, or ",
    }
    found = ask(tmp_path, hub.address, [("find adapter", name) for name in names])
    for message, expected in zip(found, names.values(), strict=True):
        assert message.startswith(f"ValueError: {expected}")
        assert "\n" not in message


def test_an_adapter_that_is_here_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", lambda *_: 0 / 0)
    (tmp_path / "user" / "name").mkdir(parents=True)
    (tmp_path / "finish.pt").write_text("")
    assert find_adapter("user/name") == Path("user/name")
    assert find_adapter(tmp_path / "finish.pt") == tmp_path / "finish.pt"
