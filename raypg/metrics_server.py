"""Serves the metrics of all pools of a Ray cluster by HTTP, for Prometheus to scrape."""

from __future__ import annotations

import asyncio
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raypg import background
from raypg.errors import UnavailableError
from raypg.exposition import CONTENT_TYPE
from raypg.scrape import Scrape

__all__ = ["serve"]


class _Handler(BaseHTTPRequestHandler):
    scrape: Scrape
    timeout = 30  # seconds that a client may take to ask

    def do_GET(self) -> None:
        if self.path.split("?")[0] not in ("/metrics", "/"):
            self.send_error(HTTPStatus.NOT_FOUND, "the metrics are at /metrics")
            return
        body = asyncio.run_coroutine_threadsafe(self.scrape.text(), background.loop()).result().encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each scrape."""


def serve(host: str, port: int) -> tuple[ThreadingHTTPServer, threading.Thread]:
    """Serve ``/metrics`` from now on, in a thread; the server and its thread.

    Raises:
        UnavailableError: the address cannot be had.
    """
    handler = type("Handler", (_Handler,), {"scrape": Scrape()})
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        why = error.strerror or error
        raise UnavailableError(f"cannot listen on {host}:{port} ({why}); choose another --port") from None
    thread = threading.Thread(target=server.serve_forever, name="raypg-metrics", daemon=True)
    thread.start()
    return server, thread
