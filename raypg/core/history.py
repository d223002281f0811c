"""What happened when: rows of figures by time, in rings of fixed size, with gaps where nobody has looked.

Three rings: seconds for the last two minutes, tens of seconds for the last twenty, minutes for as long as is wanted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, Final

from raypg.core.cache_figures import CACHE_COUNTERS
from raypg.core.sketch import Sketch
from raypg.core.sqlstate import CATEGORIES

__all__ = ["COUNTS", "LEVELS", "QUANTILES", "SERIES", "History", "Times", "bytes_needed"]

COUNTS: Final = (
    "queries",
    "calls",
    "errors",
    "exhausted",
    "execution_seconds",
    "wait_seconds",
    "acquired",
    "rows",  # that statements have written
    "rows_fetched",
    *CACHE_COUNTERS[:3],
    *(f"errors_{category}" for category in CATEGORIES),
)
"""Series that add up within a slot."""

LEVELS: Final = ("active", "idle", "total", "waiting")
"""Series of which a slot keeps the last value."""

TIMED: Final = ("execution", "wait")
"""What takes time: statements on the server, and callers until they have a connection."""

QUANTILES: Final = {
    "p50_ms": ("execution", 0.5),
    "p95_ms": ("execution", 0.95),
    "p99_ms": ("execution", 0.99),
    "wait_p50_ms": ("wait", 0.5),
    "wait_p95_ms": ("wait", 0.95),
    "wait_p99_ms": ("wait", 0.99),
}
"""Series of times, in milliseconds: of what, and which quantile of it."""

Times = Mapping[str, "list[tuple[dict[int, int], float]]"]
"""What took how long, by the names of :data:`TIMED`; see :meth:`raypg.core.sketch.Sketch.take`."""

SERIES: Final = (*COUNTS, *LEVELS, *QUANTILES)

_STEPS: Final = ((1, 120), (10, 120))
"""(seconds of a slot, most slots); and minutes for the whole time."""

_SECONDS_OF_A_GAP: Final = 3.0
"""What comes later than this is counted, but belongs to no slot any more."""


def _sizes(minutes: float) -> list[tuple[int, int]]:
    slots = [(step, min(most, math.ceil(minutes * 60 / step))) for step, most in _STEPS]
    return [*slots, (60, math.ceil(minutes))]


def bytes_needed(minutes: float) -> int:
    """Memory that the history of one pool takes."""
    return sum(slots * 8 * (len(SERIES) + 1) for _, slots in _sizes(minutes))


class _Ring:
    """Slots of *step* seconds, the last *size* of them. A slot exists from its first figure on."""

    def __init__(self, step: int, size: int) -> None:
        self.step = step
        self.size = size
        self._slots = array("q", [-1]) * size
        self._columns = [array("d", [math.nan]) * size for _ in SERIES]
        self._newest = -1
        self._open = -1  # the slot whose times are still coming in
        self._times = {name: Sketch() for name in TIMED}

    def touch(self, slot: int) -> int:
        """Index of *slot*, which is there from now on."""
        index = slot % self.size
        if self._slots[index] != slot:
            self._slots[index] = slot
            for number, column in enumerate(self._columns):
                column[index] = 0.0 if number < len(COUNTS) else math.nan
        return index

    def add(
        self,
        now: float,
        seconds: float,
        counts: Mapping[str, float],
        levels: Mapping[str, float],
        times: Times,
    ) -> None:
        slot = int(now // self.step)
        if slot <= self._newest - self.size:
            return  # its place is taken by a later one
        self._newest = max(self._newest, slot)
        first = int((now - seconds) // self.step)
        for earlier in range(max(first, slot - self.size + 1), slot):
            self.touch(earlier)  # it was looked at, and nothing has happened
        if slot > self._open:
            self._open = slot
            self._times = {name: Sketch() for name in TIMED}
        index = self.touch(slot)
        for number, name in enumerate(SERIES):
            if name in counts:
                self._columns[number][index] += counts[name]
            elif name in levels:
                self._columns[number][index] = levels[name]
        if slot == self._open:
            self._add_times(index, times)

    def _add_times(self, index: int, times: Times) -> None:
        for name in TIMED:
            if not times.get(name):
                continue
            for buckets, total in times[name]:
                self._times[name].merge(buckets, total)
            wanted = [series for series, (of, _) in QUANTILES.items() if of == name]
            values = self._times[name].quantiles([QUANTILES[series][1] for series in wanted])
            for series, value in zip(wanted, values, strict=True):
                self._columns[SERIES.index(series)][index] = value * 1000

    def resized(self, size: int) -> _Ring:
        """The same with another size: of its slots the newest that fit."""
        other = _Ring(self.step, size)
        for old, slot in enumerate(self._slots):
            if slot >= 0 and slot > self._newest - size:
                new = other.touch(slot)
                for own, theirs in zip(self._columns, other._columns, strict=True):
                    theirs[new] = own[old]
        other._newest, other._open, other._times = self._newest, self._open, self._times
        return other

    def values(self, series: int, first: int, last: int) -> list[tuple[int, float]]:
        """(slot, value) from *first* to *last*; NaN for a gap."""
        column = self._columns[series]
        indexes = ((slot, slot % self.size) for slot in range(max(first, last - self.size + 1), last + 1))
        return [(slot, column[index] if self._slots[index] == slot else math.nan) for slot, index in indexes]


class History:
    """The figures of one pool by time.

    Args:
        minutes: how long they are kept.
    """

    def __init__(self, minutes: float) -> None:
        self.series = SERIES
        self.minutes = minutes
        self._rings = [_Ring(step, size) for step, size in _sizes(minutes)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("series") != SERIES:
            raise ValueError("a history with other series cannot be taken over")
        self.__dict__.update(state)

    def resize(self, minutes: float) -> None:
        """Keep it for so long from now on."""
        if minutes != self.minutes:
            self.minutes = minutes
            sizes = _sizes(minutes)
            self._rings = [ring.resized(size) for ring, (_, size) in zip(self._rings, sizes, strict=True)]

    def add(
        self,
        now: float,
        seconds: float,
        counts: Mapping[str, float],
        levels: Mapping[str, float],
        times: Times,
    ) -> bool:
        """Take in what happened in the last *seconds* before *now* (seconds since the epoch).

        Returns:
            Whether it has a place here: not if nobody has looked for so long that only the sum is known.
        """
        if seconds > _SECONDS_OF_A_GAP:
            return False
        for ring in self._rings:
            ring.add(now, seconds, counts, levels, times)
        return True

    def rate(self, series: str, now: float, seconds: int) -> float:
        """Events per second over the last *seconds* (at most 119) that were looked at; 0 if none was."""
        ring, slot = self._rings[0], int(now)
        found = ring.values(SERIES.index(series), slot - seconds, slot)
        known = {slot: value for slot, value in found if not math.isnan(value)}
        covered = len(known) - 1 + now - slot if slot in known else len(known)
        return sum(known.values()) / max(covered, 1.0)

    def values(self, series: str, seconds: float, now: float) -> tuple[int, list[tuple[int, float]]]:
        """What is known of the last *seconds*, in the finest steps that reach so far back.

        Returns:
            (seconds of a step, [(seconds since the epoch at which the step begins, value; NaN in a gap)]).

        Raises:
            KeyError: there is no such series.
        """
        if series not in SERIES:
            raise KeyError(series)
        ring, first, last = self._reach(seconds, now)
        found = ring.values(SERIES.index(series), first, last)
        return ring.step, [(slot * ring.step, value) for slot, value in found]

    def all_values(self, seconds: float, now: float) -> tuple[int, int, dict[str, list[float]]]:
        """The same of every series: (seconds of a step, when the first step begins, series → values)."""
        ring, first, last = self._reach(seconds, now)
        first = max(first, last - ring.size + 1)
        columns = {name: ring.values(number, first, last) for number, name in enumerate(SERIES)}
        return ring.step, first * ring.step, {name: [value for _, value in of] for name, of in columns.items()}

    def newest(self, now: float) -> tuple[int, dict[str, float]]:
        """The last second that is over: (when it began, series → value)."""
        slot = int(now) - 1
        values = {name: self._rings[0].values(number, slot, slot) for number, name in enumerate(SERIES)}
        return slot, {name: found[0][1] for name, found in values.items()}

    def _reach(self, seconds: float, now: float) -> tuple[_Ring, int, int]:
        """The finest ring that reaches so far back, and the first and last of its slots in that time."""
        ring = next((ring for ring in self._rings if ring.step * ring.size >= seconds), self._rings[-1])
        return ring, int((now - seconds) // ring.step) + 1, int(now // ring.step)
