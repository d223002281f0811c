"""A webhook: a real HTTP server that keeps what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Attributes:
    url: where to POST.
    status: what it answers.
    told: (path, what it answered, body) of each request, in order.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hook?key=not-to-be-shown"
        self.status = 200
        self.told: list[tuple[str, int, dict[str, Any]]] = []

    def heard(self, state: str, status: int = 200) -> list[dict[str, Any]]:
        """What it was told of alerts in this state, and answered so."""
        return [body for _, answered, body in self.told if answered == status and body["state"] == state]


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Run one while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = here.status
            here.told.append((self.path, status, body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Receiver(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
