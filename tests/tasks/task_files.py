"""What the tests of this folder share: rows and files of tasks, the path of real data sets, and a
server on 127.0.0.1 that replaces the network. A task `served` in the table is downloaded from it.
"""

import hashlib
import http.server
import io
import json
import os
import zipfile
from pathlib import Path

import pytest

from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import Prompt
from minia3.tasks.task import Source, TaskSpec

REAL = os.environ.get("MINIA3_TEST_DATA")
needs_real_data = pytest.mark.skipif(
    not REAL, reason="MINIA3_TEST_DATA is not set: no real data sets to read"
)

# A user's rows


def lines(*rows):
    """Return the content of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def target(n, **more):
    return {"input": f"question {n}", "target": f"answer {n}", **more}


def choice(n, label=0, **more):
    return {"input": f"question {n}", "choices": ["yes", "no"], "label": label, **more}


# A known task, and the archive that it comes in

SPLIT_NAMES = ("train", "val", "test")
PARTS = {f"{name}.jsonl": f"T/{name}.jsonl" for name in SPLIT_NAMES}
FILES = {
    "T/train.jsonl": lines({"text": "a", "label": "no"}, {"text": "b", "label": "yes", "idx": 9}),
    "T/val.jsonl": lines({"text": "c", "label": "YES"}),
    "T/test.jsonl": lines({"text": "d"}),
    "T/README": b"not taken out",
}
YES_OR_NO = (Prompt("{text}?", ("No", "Yes")),)


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """A server of one file, `content`, or of several files, `pages`. The other attributes make it
    misbehave.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.pages = None  # path -> content
        self.status = 200
        # A false Content-Length. None: the true length is sent. 0: no length is sent.
        self.promised_length = None
        self.wait = lambda: None  # called before the content is sent
        self.n_requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.n_requests += 1
        if server.pages is not None:
            server.content = server.pages.get(self.path, b"")
            server.status = 200 if self.path in server.pages else 404
        self.send_response(server.status)
        if server.promised_length != 0:
            length = server.promised_length or len(server.content)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        server.wait()
        self.wfile.write(server.content)

    def log_message(self, *args):
        pass


def serve(server, monkeypatch, content, address=None, **changes):
    """Give the server `content`, and add the task `served` to the table, with the server as its
    source. `changes` replace fields of the source.
    """
    server.content = content
    address = address or f"http://127.0.0.1:{server.server_port}/T.zip"
    source = Source(address, PARTS, len(content), hashlib.sha256(content).hexdigest())
    spec = TaskSpec(YES_OR_NO, [source._replace(**changes)], labels=("no", "yes"))
    monkeypatch.setitem(known_tasks(), "served", spec)


def files_below(folder):
    """Return all paths below a data folder, except the folder of the task `served`."""
    return [path for path in Path(folder).rglob("*") if path != Path(folder, "served")]
