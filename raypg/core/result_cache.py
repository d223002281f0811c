"""Results that are kept for who asks the same again: bounded in number and in bytes, dropped by table, by age, and else
those first that were used longest ago.

Pure: what a key and a value are is the caller's business, and times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

__all__ = ["Entry", "How", "ResultCache"]

Value = TypeVar("Value")

How: TypeAlias = Literal["invalidated", "evicted", "expired", "replaced"]
"""How an entry ended."""

OVERHEAD: Final = 500
"""Bytes that an entry takes beside its key and its value: itself, its places in the tables of the cache (measured)."""

LARGEST_SHARE: Final = 8
"""No entry takes more than this part of the cache's bytes: one large result must not drive out all small ones."""


class Entry(Generic[Value]):
    """One result.

    Attributes:
        key, value: what was asked, and what came of it.
        tables: those that it came from.
        size: bytes, its key and ``OVERHEAD`` included.
        began: when it was asked for: it is no older than that.
        expires: from when on it is not used any more.
        uses: how often it was used.
    """

    __slots__ = ("began", "expires", "key", "size", "tables", "uses", "value")

    def __init__(
        self, key: Hashable, value: Value, tables: frozenset[str], size: int, began: float, expires: float
    ) -> None:
        self.key = key
        self.value = value
        self.tables = tables
        self.size = size
        self.began = began
        self.expires = expires
        self.uses = 0


class ResultCache(Generic[Value]):
    """The results of one process.

    All that happens to one entry takes the same time however many there are; :meth:`drop` takes time for each entry
    that it drops, and for no other.

    Args:
        most: entries.
        most_bytes: bytes, as far as who stores knows them.
        ttl: seconds for which an entry is used.
        on_end: told of each entry that ends, and how.

    Attributes:
        counts: hits, misses, stored, refused (too large to be kept), and how entries ended.
        bytes: that all take.
    """

    def __init__(
        self, most: int, most_bytes: int, ttl: float, on_end: Callable[[Entry[Value], How], None] | None = None
    ) -> None:
        self.most = most
        self.most_bytes = most_bytes
        self.ttl = ttl
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        self._on_end = on_end
        self._entries: OrderedDict[Hashable, Entry[Value]] = OrderedDict()
        self._by_table: dict[str, dict[Hashable, Entry[Value]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, now: float) -> Entry[Value] | None:
        """The entry of that key if it is not too old; that it was used is said by :meth:`used`."""
        entry = self._entries.get(key)
        if entry is None or now < entry.expires:
            return entry
        self._remove(entry, "expired")
        return None

    def used(self, entry: Entry[Value]) -> None:
        """A caller was given *entry*."""
        entry.uses += 1
        self.counts["hits"] += 1
        if entry.key in self._entries:
            self._entries.move_to_end(entry.key)

    def missed(self) -> None:
        """A caller was given none."""
        self.counts["misses"] += 1

    def keep(self, key: Hashable, value: Value, tables: frozenset[str], size: int, began: float) -> bool:
        """Keep a result, if it is not too large.

        Args:
            tables: without any it could never be dropped.
            size: bytes of key and value.
            began: when it was asked for.
        """
        size += OVERHEAD
        if not tables or not self.most or size * LARGEST_SHARE > self.most_bytes:
            self.counts["refused"] += 1
            return False
        known = self._entries.get(key)
        if known is not None:
            if known.began > began:
                return False  # who asked later has seen no less
            self._remove(known, "replaced")
        entry = self._entries[key] = Entry(key, value, tables, size, began, began + self.ttl)
        for table in tables:
            self._by_table.setdefault(table, {})[key] = entry
        self.bytes += size
        self.counts["stored"] += 1
        while len(self._entries) > self.most or self.bytes > self.most_bytes:
            self._remove(next(iter(self._entries.values())), "evicted")
        return True

    def drop(self, tables: Iterable[str] | None) -> int:
        """Forget what came from any of *tables*, or all of it; how many those were."""
        if tables is None:
            gone = list(self._entries.values())
        else:
            gone = list({key: entry for t in tables for key, entry in self._by_table.get(t, {}).items()}.values())
        for entry in gone:
            self._remove(entry, "invalidated")
        return len(gone)

    def statistics(self) -> dict[str, Any]:
        """What there is and was: rates and means of nothing are None."""
        counts = self.counts
        asked = counts["hits"] + counts["misses"]
        uses = counts["hits"]
        return {
            "total_entries": len(self._entries),
            "total_usage": uses,
            "hit_rate": uses / asked if asked else None,
            "avg_usage_per_entry": uses / counts["stored"] if counts["stored"] else None,
            "cache_size_bytes": self.bytes,
            **{name: counts[name] for name in ("hits", "misses", "stored", "refused")},
            "invalidations": counts["invalidated"],
            "evictions": counts["evicted"],
            "expired": counts["expired"],
        }

    def _remove(self, entry: Entry[Value], how: How) -> None:
        del self._entries[entry.key]
        for table in entry.tables:
            of_table = self._by_table[table]
            del of_table[entry.key]
            if not of_table:
                del self._by_table[table]
        self.bytes -= entry.size
        self.counts[how] += 1
        if self._on_end is not None:
            self._on_end(entry, how)
