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
        failed, slow: counts in the window, as of the last :meth:`add` or :meth:`advance`.
        good: good calls that the caller has added itself, before ``end``: ``window.good += 1`` is the quickest way to
            count the call that nearly all are.
        end: the time from which :meth:`add` has to be called instead.
    """

    __slots__ = ("_calls", "_failed", "_index", "_known", "_slow", "_width", "end", "failed", "good", "slow")

    def __init__(self, seconds: float, now: float) -> None:
        self._width = seconds / BUCKETS
        self._calls = [0] * BUCKETS
        self._failed = [0] * BUCKETS
        self._slow = [0] * BUCKETS
        self._index = 0
        self.end = now + self._width
        self._known = self.good = self.failed = self.slow = 0

    @property
    def calls(self) -> int:
        """All calls in the window."""
        return self._known + self.good

    def add(self, now: float, failed: int, slow: int, calls: int = 1) -> None:
        """Count *calls*, of which so many *failed* and so many were *slow*."""
        if now >= self.end:
            self.advance(now)
        index = self._index
        self._calls[index] += calls
        self._known += calls
        if failed:
            self._failed[index] += failed
            self.failed += failed
        if slow:
            self._slow[index] += slow
            self.slow += slow

    def advance(self, now: float) -> None:
        """Forget what is older than the window."""
        if now < self.end:
            return
        self._calls[self._index] += self.good
        self._known += self.good
        self.good = 0
        steps = math.floor((now - self.end) / self._width) + 1
        self.end += steps * self._width
        if self.end <= now:  # rounding
            self.end = now + self._width
        for _ in range(min(steps, BUCKETS)):
            self._index = index = (self._index + 1) % BUCKETS
            self._known -= self._calls[index]
            self.failed -= self._failed[index]
            self.slow -= self._slow[index]
            self._calls[index] = self._failed[index] = self._slow[index] = 0

    def clear(self, now: float) -> None:
        """Forget all."""
        if self.calls:
            self._calls = [0] * BUCKETS
            self._failed = [0] * BUCKETS
            self._slow = [0] * BUCKETS
            self._known = self.good = self.failed = self.slow = 0
        self.end = now + self._width
