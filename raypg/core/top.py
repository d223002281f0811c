"""The statements that take most time, found in fixed memory, each with a bound of what may be missing.

A form of *Space-Saving* (Metwally, Agrawal and El Abbadi, 2005) in which nobody inherits the figures of whom he
replaces: what is shown of a statement was measured of it, and what it may have taken unwatched is said beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raypg.core.sketch import Sketch

__all__ = ["Entry", "Group", "TopStatements"]


class Group(NamedTuple):
    """What statements of one fingerprint did in a time, as it travels.

    Attributes:
        fingerprint: of libpg_query; of what it cannot parse a word.
        command: kind of statement: SELECT, INSERT …
        text: without literals.
        buckets, seconds: how long they took, see :class:`Sketch`.
        errors: how many failed.
    """

    fingerprint: str
    command: str
    text: str
    buckets: dict[int, int]
    seconds: float
    errors: int


@dataclass
class Entry:
    """One fingerprint.

    Attributes:
        times: of those seen, in seconds.
        missed: seconds that it may have taken beside these.
    """

    fingerprint: str
    command: str
    text: str
    times: Sketch = field(default_factory=Sketch)
    errors: int = 0
    missed: float = 0.0

    @property
    def at_most(self) -> float:
        """No less than the seconds it has really taken."""
        return self.times.total + self.missed


class TopStatements:
    """At most *size* fingerprints: those with most total time.

    Attributes:
        floor: no fingerprint that is not listed has taken more seconds than this. At most twice the time of all
            statements divided by *size*.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[str, Entry] = {}
        self.floor = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, groups: Iterable[Group], floor: float = 0.0) -> None:
        """Take in what was measured.

        Args:
            floor: seconds that any fingerprint may have taken beside that.
        """
        entries = self._entries
        for group in groups:
            entry = entries.get(group.fingerprint)
            if entry is None:
                entry = entries[group.fingerprint] = Entry(
                    group.fingerprint, group.command, group.text, missed=self.floor
                )
            entry.times.merge(group.buckets, group.seconds)
            entry.errors += group.errors
        if floor:
            self.floor += floor
            for entry in entries.values():
                entry.missed += floor
        for entry in self.top(len(entries))[self._size :]:
            del entries[entry.fingerprint]
            self.floor = max(self.floor, entry.at_most)

    def top(self, count: int) -> list[Entry]:
        """The *count* first, by the time they may have taken."""
        return sorted(self._entries.values(), key=lambda entry: -entry.times.total - entry.missed)[:count]

    def notable(self, count: int) -> list[Entry]:
        """The *count* first by time, by mean time and by number, each once: those by time come first."""
        entries = self._entries.values()
        slowest = sorted(entries, key=lambda entry: -entry.times.total / max(entry.times.count, 1))[:count]
        frequent = sorted(entries, key=lambda entry: -entry.times.count)[:count]
        return list({entry.fingerprint: entry for entry in (*self.top(count), *slowest, *frequent)}.values())

    def __getstate__(self) -> Any:
        return self._size, self._entries, self.floor

    def __setstate__(self, state: Any) -> None:
        self._size, self._entries, self.floor = state
