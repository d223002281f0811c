"""What a scrape of Prometheus gets, wherever it asks: by ``raypg metrics serve`` or on the dashboard's port."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from prometheus_client.core import GaugeMetricFamily

from raypg import cluster
from raypg.errors import RaypgError, UnavailableError
from raypg.exposition import families, text
from raypg.metrics_access import snapshots

__all__ = ["Scrape"]

logger = logging.getLogger(__name__)

WITHIN = 5.0
"""Seconds in which the Metrics actor must answer a scrape; else what it said last is served."""


class Scrape:
    """What the Metrics actor says now; while it does not answer, what it said last, and ``raypg_metrics_up`` is 0."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    async def text(self) -> str:
        """The figures of all pools in Prometheus' format."""
        up = GaugeMetricFamily("raypg_metrics_up", "Whether raypg's Metrics actor answered this scrape.")
        try:
            if await asyncio.to_thread(cluster.find_metrics) is None:  # while it is restarted it is found
                raise UnavailableError("there is none, as no pool has run yet")
            self._known = await asyncio.wait_for(snapshots(in_detail=False, fresh=False), WITHIN)
            up.add_metric((), 1)
        except (RaypgError, ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("the Metrics actor does not answer: %s", error)
            up.add_metric((), 0)
        return text([*families(self._known), up])
