"""Serves the metrics of all pools of a Ray cluster by HTTP, for Prometheus to scrape."""

from __future__ import annotations

import asyncio
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray
from prometheus_client.core import GaugeMetricFamily

from raypg import background
from raypg.errors import RaypgError, UnavailableError
from raypg.exposition import CONTENT_TYPE, families, text
from raypg.metrics_access import snapshots

__all__ = ["serve"]

logger = logging.getLogger(__name__)

SCRAPED_WITHIN = 5.0
"""Seconds in which the Metrics actor must answer a scrape; else what it said last is served."""


class _AllPools:
    """What the Metrics actor says now; while it does not answer, what it said last, and ``raypg_metrics_up`` is 0."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def text(self) -> str:
        up = GaugeMetricFamily("raypg_metrics_up", "Whether raypg's Metrics actor answered this scrape.")
        asking = asyncio.run_coroutine_threadsafe(snapshots(in_detail=False, fresh=False), background.loop())
        try:
            self._known = asking.result(SCRAPED_WITHIN)
            up.add_metric((), 1)
        except (RaypgError, ray.exceptions.RayError, TimeoutError) as error:
            asking.cancel()
            logger.warning("the Metrics actor does not answer: %s", error)
            up.add_metric((), 0)
        return text([*families(self._known), up])


class _Handler(BaseHTTPRequestHandler):
    pools: _AllPools
    timeout = 30  # seconds that a client may take to ask

    def do_GET(self) -> None:
        if self.path.split("?")[0] not in ("/metrics", "/"):
            self.send_error(HTTPStatus.NOT_FOUND, "the metrics are at /metrics")
            return
        body = self.pools.text().encode()
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
    handler = type("Handler", (_Handler,), {"pools": _AllPools()})
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        why = error.strerror or error
        raise UnavailableError(f"cannot listen on {host}:{port} ({why}); choose another --port") from None
    thread = threading.Thread(target=server.serve_forever, name="raypg-metrics", daemon=True)
    thread.start()
    return server, thread
