"""Guards minia3/checkpoints/hub.py: only what is needed is downloaded, what is cached needs no
network, and each failure is one clear line.

The hub is a server on 127.0.0.1 that speaks the part of the hub's protocol that huggingface_hub
uses. Processes of their own do the downloads, because huggingface_hub reads its environment when it
is imported (hub_calls.py).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import hub_calls
import huggingface_hub
import pytest
import torch
from checkpoint_folders import refusal
from conftest import make
from hub_handler import COMMIT, HubHandler
from ports import reserved_port
from safetensors.torch import load_file

import minia3
from minia3.checkpoints import hub as checkpoint_hub
from minia3.checkpoints.hub import LONGEST_WAIT, NEWS, Transfer, find, find_adapter, why_unreachable
from minia3.checkpoints.known_models import EMBEDDED, known_model
from minia3.cli.info import info


def ask(cache, endpoint, calls, longest_wait=None, **environment):
    """Run the calls in a process of their own. Return the result of each call: the files that it
    found, the sum of the weights that it loaded, or the message of a ValueError.
    """
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
    with tempfile.TemporaryDirectory() as folder:
        outcomes, waited = hub_calls.ask(
            Path(folder), env | settings | environment, calls, longest_wait
        )
    assert waited < 60, "if the hub cannot be reached, it is tried again for one file, not for each"
    return outcomes


TEMPLATES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")


class Hub(ThreadingHTTPServer):
    """Repositories as dicts from file names to bytes; `requests` lists what was asked for."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests = []

    def take(self, method="GET"):
        """Return a dict from repositories to the files that were asked for since the last call."""
        taken = {}
        for request_method, repository, file in self.requests:
            if request_method == method:
                taken.setdefault(repository, []).append(file)
        self.requests.clear()
        return taken


class Handler(HubHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        if "/resolve/" not in self.path:  # other requests of huggingface_hub
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
        # The first file decides the commit, and somebody may push to the repository after it.
        # (Another program has downloaded the files of org/others.)
        decides = file in ("config.json", "adapter_config.json") or name == "others"
        assert revision == COMMIT or (revision == "main" and decides)
        if file not in repository:
            return self.fail(404, "EntryNotFound")
        if "flaky" in name and file == "tokenizer_config.json":
            return self.fail(503)
        content = repository[file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content + file.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            if "broken" in name and "model" in file:
                content = content[: len(content) // 2]
            if "slow" in name and "model" in file:
                return self.send_slowly(content)
            self.wfile.write(content)
            self.close_connection = "broken" in name

    do_HEAD = do_GET = answer

    def send_slowly(self, content):
        """Send a byte ten times a second, until the other side is gone."""
        with contextlib.suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                threading.Event().wait(0.1)
        self.close_connection = True


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The files of a small T5 as bytes: with whole weights, and with weights in shards."""
    folder = tmp_path_factory.mktemp("hub-t5")
    shards = tmp_path_factory.mktemp("hub-t5-shards")
    make("t5-v1.0").save_pretrained(folder)
    make("t5-v1.0").save_pretrained(shards, max_shard_size="30KB")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    return content_of(folder), content_of(shards)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
            "org/flaky": whole | {"tokenizer_config.json": b"{}"},
            "org/slow": whole,
            "google-t5/t5-small": whole | {file: b"{{ messages }}" for file in TEMPLATES},
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
    """The calls that load each form of the weights, and their expected results."""
    total = sum(p.double().sum().item() for p in make("t5-v1.0").parameters())
    calls = [("load", name) for name in ("org/both", "org/bin", "org/shards")]
    return calls, [pytest.approx(total, abs=1e-9)] * len(calls)


@pytest.fixture(scope="module")
def cached(hub, loads, tmp_path_factory):
    """A cache that our loads, a search for a tokenizer and another program have filled, and the
    files that we asked for.
    """
    cache = tmp_path_factory.mktemp("cache")
    calls, sums = loads
    found = ask(cache, hub.address, [*calls, ("find without weights", "t5-small")])
    assert found == [
        *sums,
        [
            "additional_chat_templates",
            *("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"),
        ],
    ]
    asked = hub.take()
    for file in ("config.json", "pytorch_model.bin"):
        huggingface_hub.hf_hub_download(
            "org/others", file, cache_dir=cache / "hub", endpoint=hub.address
        )
    hub.take()
    return cache, asked


@pytest.mark.slow
def test_only_files_that_are_needed_are_downloaded(hub, cached):
    common = ["config.json", "generation_config.json"]
    shards = sorted(
        name for name in hub.repositories["org/shards"] if name.endswith(".safetensors")
    )
    assert len(shards) > 2
    assert cached[1] == {
        "org/both": [*common, "tokenizer.json", "spiece.model", "model.safetensors"],
        "org/bin": [*common, "pytorch_model.bin"],
        "org/shards": [*common, "model.safetensors.index.json", *shards],
        # a known name, without its weights
        "google-t5/t5-small": [*common, "tokenizer.json", *TEMPLATES],
    }


@pytest.mark.slow
def test_the_second_load_asks_only_whether_there_is_a_newer_commit(hub, cached, loads):
    assert ask(cached[0], hub.address, loads[0]) == loads[1]
    assert hub.take("HEAD") == {name: ["config.json"] for _, name in loads[0]}


@pytest.mark.slow
def test_the_cache_is_enough_in_offline_mode_and_missing_files_are_named(hub, cached, loads):
    calls = [*loads[0], ("load", "org/others"), ("load", "t5-small"), ("load", "org/else")]
    found = ask(cached[0], hub.address, calls, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    # Another program filled the cache of org/others, so the cache does not know which optional
    # files are missing.
    assert found[:4] == [*loads[1], loads[1][0]]
    assert "google-t5/t5-small: model.safetensors or model.safetensors.index.json or" in found[4]
    for message in found[4:]:
        assert "is not in the cache, and the hub cannot be reached" in message
        assert message.endswith("Without a network, give the path of a folder")
    assert found[5].startswith("ValueError: org/else: config.json is not in the cache")


@pytest.mark.slow
def test_the_cache_is_enough_without_a_network(cached, loads):
    calls = [*loads[0], ("load", "org/else")]
    with reserved_port() as port:
        found = ask(cached[0], f"http://127.0.0.1:{port}", calls)
    assert found[:3] == loads[1]
    assert found[3].startswith(
        "ValueError: org/else: config.json is not in the cache, and the hub cannot be reached ("
    )
    assert "\n" not in found[3]


def is_unreachable(message, name, file):
    """Return whether a message says that the hub cannot be reached for a file that may exist."""
    unknown = f"and the cache does not say whether there is a {file}. Try again, or set HF_HUB_OFF"
    begins = message.startswith(f"ValueError: {name}: the hub cannot be reached (")
    return begins and unknown in message and "\n" not in message


@pytest.mark.slow
def test_a_file_for_which_the_hub_cannot_be_reached_is_not_taken_for_one_that_is_not_there(
    hub, tmp_path
):
    """Without its settings, a tokenizer would have other ids."""
    calls = [("find without weights", "org/flaky")] * 2
    for message in ask(tmp_path, hub.address, calls):  # also if a part of it is in the cache
        assert is_unreachable(message, "org/flaky", "tokenizer_config.json")
    (found,) = ask(tmp_path, hub.address, calls[:1], HF_HUB_OFFLINE="1")
    assert found == ["config.json", "generation_config.json"]


@pytest.mark.slow
def test_a_cache_that_another_program_filled_is_enough_only_if_the_user_says_so(cached, loads):
    calls = [("load", "org/others")]
    with reserved_port() as port:
        address = f"http://127.0.0.1:{port}"
        (message,) = ask(cached[0], address, calls)
        assert ask(cached[0], address, calls, HF_HUB_OFFLINE="1") == loads[1][:1]
    assert is_unreachable(message, "org/others", "generation_config.json")


NOWHERE = "the hub has no such repository, or it is private and needs a token"


def gated(name):
    return f"{name}: gated. Accept its terms at https://huggingface.co/{name}"


@pytest.mark.slow
def test_each_failure_is_one_clear_line(hub, tmp_path):
    messages = {
        "org/gated": f"{gated('org/gated')} and set HF_TOKEN",
        "org/private": f"org/private: {NOWHERE}",
        "org/nowhere": f"org/nowhere: {NOWHERE}",
        "google/flan-t5-bas": f"{NOWHERE}; did you mean google/flan-t5-base?",
        "org/no-weights": "org/no-weights: this hub repository has no model.safetensors or",
        "org/no-config": "org/no-config: this hub repository has no config.json: if it holds .gguf "
        "files, download one and give its path; if it holds an adapter, give it as the adapter",
        "org/lost-shard": "org/lost-shard: this hub repository has no model-00002-of-",
        "org/broken": "org/broken: the download failed: ",
        "org/a name": "org/a name: not a hub id: ",
    }
    outcomes = ask(tmp_path, hub.address, [("load", name) for name in messages])
    for (name, message), found in zip(messages.items(), outcomes, strict=True):
        assert message in found, name
        assert found.startswith(f"ValueError: {name}: ")
        assert "\n" not in found
        assert len(found) < 500


@pytest.mark.slow
def test_only_the_config_and_the_safest_weights_of_an_adapter_are_downloaded(hub, tmp_path):
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


@pytest.mark.slow
def test_an_adapter_that_cannot_be_downloaded_is_refused_like_a_model(hub, tmp_path):
    no_adapter = "not found; expected the folder or file of an adapter, or a hub id (user/name)"
    no_weights = "this hub repository has no adapter_model.safetensors or adapter_model.bin"
    messages = {
        "user/gated-adapter": gated("user/gated-adapter"),
        "user/nowhere": f"user/nowhere: {NOWHERE}",
        "user/empty-adapter": f"user/empty-adapter: {no_weights}",
        "org/both": "org/both: this hub repository has no adapter_config.json",
        "nothing": f"nothing: {no_adapter}",
        "./user/name": f"user/name: {no_adapter}",
        "user/a name": "user/a name: not a hub id: ",
    }
    found = ask(tmp_path, hub.address, [("find adapter", name) for name in messages])
    for message, expected in zip(found, messages.values(), strict=True):
        assert message.startswith(f"ValueError: {expected}")
        assert "\n" not in message


@pytest.fixture
def trained(hub, tmp_path):
    """The folder of a model that was made from t5-base and has learned a task. The repository
    user/trained has the same files.
    """
    folder = tmp_path / "trained"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "t5-base"}))
    task = {"labels": ["no", "yes"], "prompts": [{"text": "compare . {input}"}]}
    (folder / "task.json").write_text(json.dumps(task))
    hub.repositories["user/trained"] = content_of(folder)
    return folder


@pytest.mark.slow
def test_a_trained_model_is_on_the_hub_what_its_folder_is_here(hub, trained, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"input": "anna has a red ball ."}\n')
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"premise": "anna has a red ball .", "hypothesis": "tom has a cup ."}\n')

    def commands(model, out):
        return [
            ("command", ["predict", model, str(texts)]),
            ("command", ["predict", model, str(pairs), "--task", "rte"]),
            ("command", ["convert", model, str(out)]),
        ]

    calls = commands(str(trained), tmp_path / "here") + commands("user/trained", tmp_path / "hub")
    found = ask(tmp_path / "cache", hub.address, calls)
    assert json.loads(found[0])["choice"] in ("no", "yes")  # the learned labels
    assert found[3:5] == found[:2]
    assert content_of(tmp_path / "hub") == content_of(tmp_path / "here")
    assert (tmp_path / "hub" / "task.json").exists()
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["_name_or_path"] == "t5-base"

    # The cache is enough, and without it the message is the one of a model that cannot be loaded.
    offline = [calls[3], ("load", "user/trained")]
    assert ask(tmp_path / "cache", hub.address, offline, HF_HUB_OFFLINE="1")[0] == found[0]
    command, load = ask(tmp_path / "empty", hub.address, offline, HF_HUB_OFFLINE="1")
    assert command == load.replace("ValueError", "minia3") + "\n"


@pytest.mark.slow
def test_a_run_evaluates_a_trained_model_of_the_hub_on_what_it_has_learned(hub, trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "anna has a red ball .", "label": "no"}\n' * 20)
    words = ["train", "--model", "user/trained", "--task", str(rows), "--eval-only"]
    (shown,) = ask(tmp_path / "cache", hub.address, [("command", words)])
    assert "the rows get the learned prompt and words (task.json)" in shown


@pytest.mark.slow
def test_a_server_that_sends_a_byte_now_and_then_is_given_up_with_the_reason(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    (message,) = ask(tmp_path, endpoint, [("load", "org/slow")], longest_wait=1.5)
    assert message.startswith("ValueError: org/slow: ")
    assert "the server is too slow: less than 10 MB in 1.5 seconds" in message
    assert "If another process is downloading this file, try again when it is done" in message


def download_with_a_bar(repo, name, tqdm_class):
    """Stands in for hf_hub_download, which takes this argument in newer releases only."""


def test_a_download_by_another_process_is_waited_for_while_its_file_grows(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(checkpoint_hub, "time", clock)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "models--org--name" / "blobs" / "abc.incomplete"
    file.parent.mkdir(parents=True)
    now = 0.0
    transfer = Transfer(download_with_a_bar, "org/name", "model.safetensors")
    for n_bytes in (NEWS, 2 * NEWS, 3 * NEWS, 0):  # at last, another file begins
        file.touch()
        os.truncate(file, n_bytes)
        now += LONGEST_WAIT + 1
        assert not transfer.is_too_slow()
    os.truncate(file, NEWS - 1)  # a byte now and then
    assert not transfer.is_too_slow()
    now += LONGEST_WAIT + 1
    assert transfer.is_too_slow()


@pytest.mark.parametrize(
    ("proxies", "is_told"),
    [
        ({}, True),
        ({"no": "localhost"}, True),
        ({"https": "http://p"}, False),
        ({"all": "p"}, False),
    ],
)
def test_without_a_network_it_is_told_at_once_unless_a_proxy_resolves_names(
    monkeypatch, proxies, is_told
):
    """getproxies() lists no_proxy, too, which is not a proxy."""

    def resolve(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("minia3.checkpoints.hub.getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    expected = "huggingface.co: Name or service not known" if is_told else None
    assert why_unreachable() == expected


def test_an_address_of_the_hub_without_https_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "mirror.example")
    expected = "HF_ENDPOINT is 'mirror.example', expected one like https://huggingface.co"
    assert why_unreachable() == expected
    assert f"the hub cannot be reached ({expected})" in refusal(find, "org/nowhere-at-all")


def test_a_full_disk_is_not_called_a_wrong_name(monkeypatch):
    def download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("minia3.checkpoints.hub.why_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    expected = "org/x: the download failed: [Errno 28] No space left on device"
    assert refusal(find, "org/x") == expected


def test_an_adapter_on_this_machine_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", lambda *_: 0 / 0)
    (tmp_path / "user" / "name").mkdir(parents=True)
    (tmp_path / "user" / "name" / "adapter_config.json").write_text("{}")
    (tmp_path / "finish.pt").write_text("")
    assert find_adapter("user/name") == Path("user/name")
    assert find_adapter(tmp_path / "finish.pt") == tmp_path / "finish.pt"


def test_a_name_that_leads_nowhere_is_refused_with_the_nearest_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "or known name; did you mean t5-base?" in refusal(minia3.load_model, "t5-bse")
    assert "did you mean llama-3.2-1b?" in refusal(minia3.load_model, "llama3.2-1b")
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "weights.pt"
    file.write_text("")
    expected = "no such folder, .gguf file, hub id (org/name) or known name. `minia3 info --list`"
    for name in ("xyzzy", "./not/there", tmp_path / "model.gguf", "sub/Small.GGUF"):
        assert refusal(minia3.load_model, name).startswith(f"{name}: {expected}")
    for name in (file, "sub/weights.pt"):
        message = refusal(minia3.load_model, name)
        assert message.startswith(f"{name}: found weights without the config of a model, expected")


@pytest.mark.parametrize("name", [5, None, 1.5, ["t5-base"], ""])
def test_what_is_no_name_is_refused(name):
    assert f"found {name!r}, expected the name or the path of a model" in refusal(find, name)
    assert f"found {name!r}, expected the name or the path of an" in refusal(find_adapter, name)


def fake_fetch(repo, config, optional, weights):
    return repo, bool(weights)


def test_names_and_hub_ids_are_downloaded_with_or_without_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", fake_fetch)
    assert find("t5-base") == ("google-t5/t5-base", True)
    assert find("Flan-T5-Base", weights=False) == ("google/flan-t5-base", False)
    assert find("someone/model") == ("someone/model", True)
    (tmp_path / "t5-base").mkdir()
    # A folder of that name does not count if it is empty.
    assert find("t5-base") == ("google-t5/t5-base", True)


def test_a_folder_with_a_checkpoint_wins_over_a_known_name(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy("t5-v1.0").rename(tmp_path / "flan-t5-base")
    assert find("flan-t5-base") == Path("flan-t5-base")
    model = minia3.load_model("flan-t5-base")
    assert not model.config.gated
    assert model.name_or_path == "flan-t5-base"
    assert known_model("flan-t5-base") is None, "it is another model, whatever its name"
    assert dict(info("flan-t5-base"))["d_model"] == "24"
    minia3.save_model(model, "saved")
    assert "_name_or_path" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_file_name_is_not_a_known_name():
    assert known_model("params.json") is None
