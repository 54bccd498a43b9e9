"""A fixture: a server on 127.0.0.1 that replaces the network.

A test file gets it by `pytest_plugins = ["served_task"]`.
"""

import threading

import pytest
from task_files import FILES, Server, serve, zipped


@pytest.fixture
def server(monkeypatch):
    """Return a server that has the archive of the task `served`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        serve(server, monkeypatch, zipped(FILES))
        yield server
        server.shutdown()
        thread.join()
