"""What the local servers in place of the hub share: how they refuse, and which commit they have."""

from http.server import BaseHTTPRequestHandler

COMMIT = "0123456789" * 4


class HubHandler(BaseHTTPRequestHandler):
    """A handler of requests that prints nothing."""

    def fail(self, status, code=None):
        """Refuse a request. code: the hub's own name of the reason."""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass
