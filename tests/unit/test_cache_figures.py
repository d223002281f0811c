"""What caches tell is counted once, and they are gone when they are silent."""

from __future__ import annotations

from raypg.core.cache_figures import MOST_KNOWN, CacheFigures
from raypg.core.figures_by_name import FIGURES
from raypg.core.pool_metrics import PoolMetrics

ONE = {"cache_hits": 8, "cache_misses": 2, "cache_invalidations": 1, "cache_entries": 3, "cache_bytes": 900}


def test_totals_are_counted_once_however_often_they_come() -> None:
    figures = CacheFigures()
    assert figures.told("a", ONE, 0.0)["cache_hits"] == 8
    assert figures.told("a", ONE, 1.0)["cache_hits"] == 0
    assert figures.told("b", ONE, 1.0)["cache_hits"] == 8
    assert figures.told("a", {**ONE, "cache_hits": 11}, 2.0)["cache_hits"] == 3
    assert figures.told("a", {**ONE, "cache_hits": 9}, 3.0)["cache_hits"] == 0  # a message that was overtaken
    assert figures.levels(3.0) == {"caches": 2, "cache_entries": 6, "cache_bytes": 1800}
    assert figures.levels(7.0) == {"caches": 1, "cache_entries": 3, "cache_bytes": 900}
    assert figures.levels(70.0) == {"caches": 0, "cache_entries": 0, "cache_bytes": 0}


def test_those_that_are_remembered_are_bounded() -> None:
    figures = CacheFigures()
    for number in range(MOST_KNOWN + 100):
        figures.told(str(number), ONE, 0.0)
    assert len(figures._known) == MOST_KNOWN


def test_they_are_figures_of_the_pool() -> None:
    metrics = PoolMetrics(60, 0.0)
    snapshot = metrics.snapshot(0.0)
    assert snapshot["counters"]["cache_hits"] == 0
    assert str(FIGURES["cache_hit_rate"].of(snapshot)) == "nan"
    metrics.told_by_cache("a", ONE, 5.0)
    snapshot = metrics.snapshot(6.0)
    assert snapshot["counters"]["cache_hits"] == 8
    assert snapshot["window"]["cache_misses"] == 2
    assert snapshot["caches"] == {"caches": 1, "cache_entries": 3, "cache_bytes": 900}
    assert FIGURES["cache_hit_rate"].of(snapshot) == 0.8
    assert FIGURES["cache_invalidations_total"].of(snapshot) == 1
    assert FIGURES["cache_entries"].of(snapshot) == 3
