"""Counts over the last seconds, in fixed memory."""

from __future__ import annotations

import math

__all__ = ["RateWindow"]

BUCKETS = 10
"""Parts of the window that are forgotten one at a time."""


class RateWindow:
    """How many calls there were lately, how many of them failed, and how many were slow.

    Adding is O(1) and allocates nothing; a tenth of the window is forgotten at a time, so counts cover between nine
    tenths and the whole of it.

    Args:
        seconds: length of the window.
        now: the time.

    Attributes:
        calls, failed, slow: counts in the window, as of the last :meth:`add` or :meth:`advance`.
    """

    __slots__ = ("_calls", "_end", "_failed", "_index", "_slow", "_width", "calls", "failed", "slow")

    def __init__(self, seconds: float, now: float) -> None:
        self._width = seconds / BUCKETS
        self._calls = [0] * BUCKETS
        self._failed = [0] * BUCKETS
        self._slow = [0] * BUCKETS
        self._index = 0
        self._end = now + self._width
        self.calls = self.failed = self.slow = 0

    def add(self, now: float, failed: int, slow: int, calls: int = 1) -> None:
        """Count *calls*, of which so many *failed* and so many were *slow*."""
        if now >= self._end:
            self.advance(now)
        index = self._index
        self._calls[index] += calls
        self.calls += calls
        if failed:
            self._failed[index] += failed
            self.failed += failed
        if slow:
            self._slow[index] += slow
            self.slow += slow

    def advance(self, now: float) -> None:
        """Forget what is older than the window."""
        if now < self._end:
            return
        steps = math.floor((now - self._end) / self._width) + 1
        self._end += steps * self._width
        if self._end <= now:  # rounding
            self._end = now + self._width
        for _ in range(min(steps, BUCKETS)):
            self._index = index = (self._index + 1) % BUCKETS
            self.calls -= self._calls[index]
            self.failed -= self._failed[index]
            self.slow -= self._slow[index]
            self._calls[index] = self._failed[index] = self._slow[index] = 0

    def clear(self, now: float) -> None:
        """Forget all."""
        if self.calls:
            self._calls = [0] * BUCKETS
            self._failed = [0] * BUCKETS
            self._slow = [0] * BUCKETS
            self.calls = self.failed = self.slow = 0
        self._end = now + self._width
