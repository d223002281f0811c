"""The same metrics through ``ray.util.metrics``, so that the Prometheus and Grafana of a Ray cluster have them.

Ray puts ``ray_`` before each name. It knows neither summaries nor histograms that were counted elsewhere: their
quantiles go as gauges, their counts and sums as counters, their buckets not at all.
"""

from __future__ import annotations

import math
from typing import Any

from ray.util.metrics import Counter, Gauge

from raypg.exposition import ALERT_FIRING, Snapshots, families


class RayMetrics:
    """Hands figures over to Ray."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._firing: list[dict[str, str]] = []

    def export(self, snapshots: Snapshots) -> None:
        """Tell Ray how things stand: gauges as they are, of counters what has been added."""
        for family in families(snapshots):
            if family.name == ALERT_FIRING:
                self._end_alerts([sample.labels for sample in family.samples if sample.value])
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    continue
                counts = family.type == "counter" or (family.type != "gauge" and sample.name != family.name)
                kind = Counter if counts else Gauge
                metric = self._metrics.get(sample.name)
                if metric is None:
                    name = sample.name.removesuffix("_total")  # which Ray adds
                    metric = self._metrics[sample.name] = kind(name, family.documentation, tuple(sample.labels))
                if not counts:
                    if not math.isnan(sample.value):
                        metric.set(sample.value, tags=sample.labels)
                    continue
                key = sample.name, tuple(sample.labels.items())
                added = sample.value - self._told.get(key, 0.0)
                self._told[key] = sample.value
                if added > 0:
                    metric.inc(added, tags=sample.labels)

    def _end_alerts(self, firing: list[dict[str, str]]) -> None:
        """Ray goes on telling what it was told last: that an alert is over must be said, also if its rule is gone."""
        for labels in self._firing:
            if labels not in firing:
                self._metrics[ALERT_FIRING].set(0.0, tags=labels)
        self._firing = firing
