"""Where in PostgreSQL's binary COPY the rows and their values lie, without a loop over them.

Each row begins with the number of its columns, each value with its length, so that a row can only be found from the
end of the one before it. To do without that, the beginning of a row is looked for as a pattern of bytes: the number of
columns, and the length of the first value, if all values of its type have the same. If not, the first column of each
row is a key of our own (:func:`raypg.core.copy_text.copy_query`). What is found is proven: the rows must follow upon
each other without a gap. What only looks like a beginning is nobody's end, and goes.

Values of a fixed width that stand beside each other have the same places in every row in which none of them is NULL.
So they are taken out of all rows at once, as one record of a row; rows with a NULL are brought into that form first.

Source: PostgreSQL manual, COPY, "Binary Format".
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np

from raypg.core.arrow_decode import Numbers, Records, Slices, Values, numbers_in, overlapping

__all__ = ["KEY_ENDS_WITH", "TRAILER", "RowFinder"]

TRAILER = b"\xff\xff"

KEY_ENDS_WITH = 0xF9
"""Last byte of a key: rare in numbers, and not in any UTF-8 text."""

PIECE = 1 << 17
"""Bytes that are searched at a time: they stay in the processor's cache."""

ROUNDS = 3
"""In which what only looks like a row is sorted out for all rows at once."""

FEW = 500
"""Gaps that are leapt over in the time of such a round."""

_COUNT = Struct(">h")
_LENGTH = Struct(">i")
_NULL = -1


class _Layout(NamedTuple):
    """A part of each row: values of a fixed width that stand beside each other, and the length of the one behind them.

    Attributes:
        head: bytes in front of the first of them.
        fields: (place, width) of each, without its length, which stands in front of it.
        size: bytes of the part.
        is_open: whether a value of any length follows, so that the part ends with its length.
    """

    head: int
    fields: tuple[tuple[int, int], ...]
    size: int
    is_open: bool


class _Part(NamedTuple):
    """A part of some rows.

    Attributes:
        records: what stands there, of type ``V`` and the layout's size.
        missing: which of the rows have NULL, by place of the field; fields without NULL are not in it.
        ends: where the part ends in each row; beyond the data in what is no row.
        lengths: of the values behind it, if the layout is open.
    """

    layout: _Layout
    records: Numbers
    missing: dict[int, Numbers]
    ends: Numbers
    lengths: Numbers | None

    def of(self, rows: Numbers) -> _Part:
        """The part of some of the rows."""
        missing = {place: which[rows] for place, which in self.missing.items()}
        lengths = None if self.lengths is None else self.lengths[rows]
        return _Part(self.layout, self.records[rows], missing, self.ends[rows], lengths)

    def values(self, data: memoryview) -> list[Values]:
        """Those of its fields, and of the column behind it."""
        found: list[Values] = [Records(self.records, place, self.missing.get(place)) for place, _ in self.layout.fields]
        return found if self.lengths is None else [*found, Slices(data, self.ends, self.lengths)]


class RowFinder:
    """Finds the rows of a COPY and their values.

    Args:
        widths: bytes of the values of each column, ``None`` where they differ; without the key.
        key: a number whose last byte is ``KEY_ENDS_WITH``: the first column of each row, if the first of *widths* is
            ``None``.
    """

    def __init__(self, widths: Sequence[int | None], key: int) -> None:
        first = widths[0]
        self._marks: list[tuple[int, tuple[int, ...]]]
        if first is None:
            self._head = _COUNT.pack(len(widths) + 1) + _LENGTH.pack(4) + _LENGTH.pack(key)
            self._marks = [(9, (KEY_ENDS_WITH,))]
        else:
            self._head = _COUNT.pack(len(widths))
            # The last byte of its length. NULL is looked for where it has been met: most first columns are keys.
            self._marks = [(5, (first,)), (5, (first, 0xFF))]
        self._layouts = _layouts(len(self._head), widths)

    def find(self, data: memoryview, begin: int) -> list[Values] | None:
        """The values by column of all rows from *begin* on; ``None`` if *data* is not made of rows, and only rows."""
        found = self._find(data, begin)
        while found is None and len(self._marks) > 1:
            del self._marks[0]
            found = self._find(data, begin)
        return found

    def _find(self, data: memoryview, begin: int) -> list[Values] | None:
        starts = self._candidates(data, begin)
        if not len(starts):
            return None
        parts = [_read(data, starts, self._layouts[0])]
        rows = self._looks(parts[0].records) & (parts[0].ends <= len(data))
        if not rows.all():
            starts, parts = starts[rows], [parts[0].of(rows)]
            if not len(starts):
                return None
        for layout in self._layouts[1:]:
            parts.append(_read(data, _behind(parts[-1]), layout))
        ends = _behind(parts[-1])
        if not np.array_equal(ends[:-1], starts[1:]):
            rows = _chained(starts, ends, begin)
            starts, ends, parts = starts[rows], ends[rows], [part.of(rows) for part in parts]
        if not len(starts) or starts[0] != begin or ends[-1] > len(data):
            return None
        # The trailer may look like the length of a NULL: it is one if the last row ends before it.
        if data[int(ends[-1]) :] not in (b"", TRAILER):
            return None
        return [values for part in parts for values in part.values(data)]

    def _candidates(self, data: memoryview, begin: int) -> Numbers:
        """Where two bytes are those of the beginning of a row: the last of the number of columns, and the mark."""
        everything = np.frombuffer(data, np.uint8)
        mark, values = self._marks[0]
        end = len(data) - mark
        found = []
        for place in range(begin, end, PIECE):
            stop = min(place + PIECE, end)
            marked = everything[place + mark : stop + mark]
            hits = marked == values[0]
            for value in values[1:]:
                hits |= marked == value
            hits &= everything[place + 1 : stop + 1] == self._head[1]
            found.append(np.flatnonzero(hits) + place)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _looks(self, records: Numbers) -> Numbers:
        """Which of *records* have the head of a row."""
        looks: Numbers = numbers_in(records, "u2", 0) == int.from_bytes(self._head[:2])
        if len(self._head) > 2:
            looks &= numbers_in(records, "u8", 2) == int.from_bytes(self._head[2:])
        return looks


def _layouts(head: int, widths: Sequence[int | None]) -> list[_Layout]:
    """The parts of a row that begins with *head* bytes."""
    layouts = []
    fields: list[tuple[int, int]] = []
    begin = size = head
    for width in widths:
        size += 4
        if width is None:
            layouts.append(_Layout(begin, tuple(fields), size, True))
            fields, begin, size = [], 0, 0
        else:
            fields.append((size, width))
            size += width
    if fields:
        layouts.append(_Layout(begin, tuple(fields), size, False))
    return layouts


def _behind(part: _Part) -> Numbers:
    """Where the values behind *part* end."""
    return part.ends if part.lengths is None else part.ends + np.maximum(part.lengths, 0)


def _read(data: memoryview, places: Numbers, layout: _Layout) -> _Part:
    """The part of *layout* that begins at *places*."""
    last = len(data) - layout.size
    if last >= 0:
        records = overlapping(data, f"V{layout.size}")[np.minimum(places, last)]
        fits = places <= last
        for place, width in layout.fields:
            fits &= numbers_in(records, "i4", place - 4) == width
    else:
        records, fits = np.zeros(len(places), f"V{layout.size}"), np.zeros(len(places), bool)
    ends = places + layout.size
    missing: dict[int, Numbers] = {}
    if not fits.all():
        others = np.flatnonzero(~fits)
        records[others], nulls, ends[others] = _spread(data, places[others], layout)
        for place, which in nulls.items():
            missing[place] = np.zeros(len(places), bool)
            missing[place][others] = which
    lengths = numbers_in(records, "i4", layout.size - 4) if layout.is_open else None
    return _Part(layout, records, missing, ends, lengths)


def _spread(data: memoryview, places: Numbers, layout: _Layout) -> tuple[Numbers, dict[int, Numbers], Numbers]:
    """The same of rows in which some values are NULL, or which are none: (records, missing, ends)."""
    spread = np.zeros((len(places), layout.size), np.uint8)
    missing: dict[int, Numbers] = {}
    wrong = np.zeros(len(places), bool)

    def take(where: Numbers, width: int, wanted: Numbers | bool = True) -> Numbers:
        last = len(data) - width
        nonlocal wrong
        wrong |= (where > last) & wanted
        if last < 0:
            return np.zeros((len(places), width), np.uint8)
        return overlapping(data, f"V{width}")[np.minimum(where, last)].view(np.uint8).reshape(-1, width)

    if layout.head:
        spread[:, : layout.head] = take(places, layout.head)
    places = places + layout.head
    for place, width in layout.fields:
        lengths = take(places, 4).view(">i4")[:, 0]
        there = lengths != _NULL
        wrong |= there & (lengths != width)
        places = places + 4
        spread[:, place : place + width] = take(places, width, there)
        if not there.all():
            missing[place] = ~there
        places = places + np.where(there, width, 0)
    if layout.is_open:
        spread[:, -4:] = take(places, 4)
        places = places + 4
    places[wrong] = len(data) + 1
    return spread.view(f"V{layout.size}")[:, 0], missing, places


def _chained(starts: Numbers, ends: Numbers, begin: int) -> Numbers:
    """Which of what lies from *starts* to *ends* is reached from *begin* on, from the end of one to the next.

    Where there are many gaps, what nothing ends at goes, for all at once; that sorts out whatever does not go on. Few
    gaps are leapt over one by one, however many things that look like rows lie within one value.
    """
    left = np.arange(len(starts))
    for _ in range(ROUNDS):
        if np.count_nonzero(ends[:-1] != starts[1:]) < FEW:
            break
        reached = starts == begin
        where = np.minimum(np.searchsorted(starts, ends), len(starts) - 1)
        reached[where[starts[where] == ends]] = True
        left, starts, ends = left[reached], starts[reached], ends[reached]
    if not len(left) or starts[0] != begin:
        return left[:0]
    kept = np.ones(len(left), bool)
    row = 0
    for gap in np.flatnonzero(ends[:-1] != starts[1:]).tolist():
        if gap >= row:  # not within what was leapt over
            row = int(np.searchsorted(starts, ends[gap]))
            kept[gap + 1 : row] = False
            if row == len(starts) or starts[row] != ends[gap]:
                kept[row:] = False
                break
    return left[kept]
