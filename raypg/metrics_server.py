"""Serves the metrics of all pools of a Ray cluster by HTTP, for Prometheus to scrape."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable
from typing import Any

import ray
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from raypg import background
from raypg.errors import RaypgError, UnavailableError
from raypg.exposition import families
from raypg.metrics_access import snapshots

logger = logging.getLogger(__name__)

SCRAPED_WITHIN = 5.0
"""Seconds in which the Metrics actor must answer a scrape; else what it said last is served."""


class AllPools(Collector):
    """What the Metrics actor says now; while it does not answer, what it said last, and ``raypg_metrics_up`` is 0."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("raypg_metrics_up", "Whether raypg's Metrics actor answered this scrape.")
        with self._lock:
            try:
                asking = asyncio.run_coroutine_threadsafe(snapshots(), background.loop())
                self._known = asking.result(SCRAPED_WITHIN)
                up.add_metric((), 1)
            except (RaypgError, ray.exceptions.RayError, TimeoutError) as error:
                logger.warning("the Metrics actor does not answer: %s", error)
                up.add_metric((), 0)
            return [*families(self._known), up]

    def describe(self) -> Iterable[Metric]:
        return ()


def serve(host: str, port: int) -> tuple[Any, threading.Thread]:
    """Serve ``/metrics`` from now on, in a thread; the server and its thread.

    Raises:
        UnavailableError: the address cannot be had.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(AllPools())
    try:
        return start_http_server(port, host, registry)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from None
