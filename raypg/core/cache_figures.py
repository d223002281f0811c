"""What the caches of all routers of one pool have told: their counters added up once each, and what they hold now."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Final

__all__ = ["CACHE_COUNTERS", "CACHE_LEVELS", "CacheFigures"]

CACHE_COUNTERS: Final = ("cache_hits", "cache_misses", "cache_invalidations", "cache_evictions")
"""Reads that caches have answered, and those that they might have; results that a write, or the want of room, ended."""

CACHE_LEVELS: Final = ("cache_entries", "cache_bytes")

SILENT_AFTER: Final = 5.0
"""Seconds without a word after which a cache counts as gone."""

MOST_KNOWN: Final = 4096
"""Caches that are remembered, so that nothing they tell twice is counted twice."""


class CacheFigures:
    """Adds up what caches tell: totals since each began, so that a message may be lost, or come twice."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[dict[str, int], float]] = OrderedDict()

    def told(self, who: str, totals: Mapping[str, int], now: float) -> Counter[str]:
        """What has happened in the cache *who* since it told last."""
        before, _ = self._known.pop(who, ({}, 0.0))
        after = {name: int(totals.get(name, 0)) for name in (*CACHE_COUNTERS, *CACHE_LEVELS)}
        self._known[who] = after, now
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return Counter({name: max(0, after[name] - before.get(name, 0)) for name in CACHE_COUNTERS})

    def levels(self, now: float) -> dict[str, int]:
        """What all that were heard of lately hold together, and how many those are (``caches``)."""
        here = [known for known, heard_at in self._known.values() if now - heard_at < SILENT_AFTER]
        return {"caches": len(here), **{name: sum(known[name] for known in here) for name in CACHE_LEVELS}}
