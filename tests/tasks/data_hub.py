"""A hub of data sets on 127.0.0.1, which speaks the part of its protocol that `datasets` uses."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_handler import COMMIT, HubHandler


class DataHub(ThreadingHTTPServer):
    """Repositories as dicts from file names to bytes. A gated one is None."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repositories):
    hub = DataHub(repositories)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(HubHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        n_bytes = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(n_bytes) or "null")
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if path.startswith("/api/datasets/"):
            return self.answer_api(path.removeprefix("/api/datasets/"), asked)
        if path.startswith("/datasets/") and "/resolve/" in path:
            return self.answer_file(path.removeprefix("/datasets/"))
        return self.fail(404)

    do_GET = do_HEAD = do_POST = answer

    def repository(self, path):
        """Return the files of a repository, or None after an answer that there is none."""
        name = "/".join(path.split("/")[:2])
        if name not in self.server.repositories:
            self.fail(401, "RepoNotFound")
            return None
        if self.server.repositories[name] is None:
            self.fail(403, "GatedRepo")
            return None
        return self.server.repositories[name]

    def answer_api(self, path, asked):
        files = self.repository(path)
        if files is None:
            return
        owner, name, *rest = path.split("/")
        entries = [describe(file, content) for file, content in files.items()]
        if rest and rest[0] == "tree":
            return self.send_json(entries_below(entries, "/".join(rest[2:])))
        if rest and rest[0] == "paths-info":
            wanted = asked["paths"]
            known = [entry for entry in entries if entry["path"] in wanted]
            return self.send_json(known + folders_among(entries, wanted))
        siblings = [{"rfilename": file} for file in files]
        self.send_json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})

    def answer_file(self, path):
        files = self.repository(path)
        if files is None:
            return
        file = path.split("/resolve/")[1].split("/", 1)[1]
        if file not in files:
            return self.fail(404, "EntryNotFound")
        self.send(files[file], ETag=f'"{checksum(files[file])}"', **{"X-Repo-Commit": COMMIT})

    def send_json(self, value):
        self.send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def send(self, content, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def checksum(content):
    return hashlib.sha1(content).hexdigest()


def describe(file, content):
    return {"type": "file", "path": file, "size": len(content), "oid": checksum(content)}


def entries_below(entries, folder):
    """Return all files below a folder, and the folders between."""
    prefix = f"{folder}/" if folder else ""
    found = [entry for entry in entries if entry["path"].startswith(prefix)]
    folders = {entry["path"].rpartition("/")[0] for entry in found} - {"", folder}
    return found + [folder_entry(name) for name in sorted(folders)]


def folders_among(entries, names):
    parents = {entry["path"].rpartition("/")[0] for entry in entries}
    return [folder_entry(name) for name in names if name in parents]


def folder_entry(name):
    return {"type": "directory", "path": name, "oid": checksum(name.encode())}
