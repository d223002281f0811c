"""PostgreSQL's binary COPY format as Arrow record batches.

Each row begins with the number of its columns, each value with its length, so that a row can only be found from the
end of the one before it. That is a loop over all values; to do without, the beginning of a row is looked for as a
pattern of bytes: the number of columns, and the length of the first value, if all values of its type have the same. If
not, the first column of each row is a key of our own (:func:`raypg.core.copy_text.copy_query`). What is found is
proven: the rows must follow upon each other without a gap. What only looks like a beginning is nobody's end, and goes.

Source: PostgreSQL manual, COPY, "Binary Format"; protocol flow, "COPY Operations": one message holds one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypg.core.arrow_columns import NATIVE, Column, schema_of
from raypg.core.arrow_decode import NotInArrow, Numbers, Slices, gather
from raypg.errors import ArrowValueError, RaypgError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["KEY_ENDS_WITH", "CopyDecoder"]

SIGNATURE = b"PGCOPY\n\xff\r\n\0"
HEADER = len(SIGNATURE) + 8
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


class CopyDecoder:
    """Decodes what ``COPY (…) TO STDOUT (FORMAT binary)`` sends, piece by piece.

    Args:
        columns: those of the result, without the key.
        key: a number whose last byte is ``KEY_ENDS_WITH``: the first column of each row, unless that of the result is
            of a fixed width.
    """

    def __init__(self, columns: Sequence[Column], key: int) -> None:
        self.columns = list(columns)
        self.schema: pa.Schema = schema_of(self.columns)
        self._begun = False
        width = NATIVE.get(self.columns[0].oid)
        if width is None:
            self._beginnings = [_COUNT.pack(len(self.columns) + 1) + _LENGTH.pack(4) + _LENGTH.pack(key)]
            self._rare, self._skip = 9, 10
        else:
            self._beginnings = [_COUNT.pack(len(self.columns)) + _LENGTH.pack(length) for length in (width, -1)]
            self._rare, self._skip = 1, 2
        self._byte = self._beginnings[0][self._rare]
        # The last eight bytes of each, as a number; those that may be anything are masked out.
        self._from = max(0, len(self._beginnings[0]) - 8)
        self._mask = _number(b"\xff" * len(self._beginnings[0][self._from :]))
        self._looks = [_number(each[self._from :]) for each in self._beginnings]

    def decode(self, data: Buffer) -> pa.RecordBatch | None:
        """The rows in *data*, which holds whole messages; ``None`` without any.

        Raises:
            ArrowValueError: a value has no equal in Arrow; names the column.
            RaypgError: this is no binary COPY, or of something else.
        """
        data = memoryview(data)
        begin = 0
        if not self._begun:
            if data[: len(SIGNATURE)] != SIGNATURE:
                raise RaypgError("the server did not answer COPY in its binary format")
            begin = HEADER + _LENGTH.unpack_from(data, HEADER - 4)[0]
            self._begun = True
        if data[begin:] in (b"", TRAILER):
            return None
        slices = self._rows(data, begin)
        if slices is None:
            raise RaypgError("what the server sent for COPY is not made of whole rows")
        return self._batch(slices)

    def _found(self, data: memoryview, begin: int) -> Numbers:
        """Where something looks like the beginning of a row."""
        everything = np.frombuffer(data, np.uint8)
        found = [
            np.flatnonzero(everything[place : place + PIECE] == self._byte) + (place - self._rare)
            for place in range(begin + self._rare, len(data), PIECE)
        ]
        places = np.concatenate(found) if found else np.empty(0, np.int64)
        inside = places + self._from <= len(data) - 8
        most, last = places[inside], places[~inside]
        seen = gather(data, "u8", most + self._from) & np.uint64(self._mask)
        looks = seen == self._looks[0]
        for other in self._looks[1:]:
            looks |= seen == other
        end = [place for place in last.tolist() if data[place : place + len(self._beginnings[0])] in self._beginnings]
        return np.concatenate([most[looks], np.array(end, np.int64)])

    def _rows(self, data: memoryview, begin: int) -> list[Slices] | None:
        """The values by column; ``None`` if *data* is not made of rows, and only rows."""
        starts = self._found(data, begin)
        places, values = starts + self._skip, []
        for _ in self.columns:
            try:
                lengths = gather(data, "i4", places)
            except IndexError:  # something that only looks like a row goes beyond the end, and must be seen to
                beyond = places > len(data) - 4
                places = np.minimum(places, len(data) - 4)
                lengths = gather(data, "i4", places)
                lengths[beyond] = len(data)
            places = places + 4
            values.append((places, lengths))
            places = places + (np.maximum(lengths, 0) if lengths.min(initial=0) < 0 else lengths)
        if not np.array_equal(places[:-1], starts[1:]):
            rows = _chained(starts, places, begin)
            starts, places = starts[rows], places[rows]
            values = [(at[rows], lengths[rows]) for at, lengths in values]
        if not len(starts) or starts[0] != begin or places[-1] > len(data):
            return None
        # The trailer may look like the length of a NULL: it is one if the last row ends before it.
        if data[int(places[-1]) :] not in (b"", TRAILER):
            return None
        return [Slices(data, at, lengths) for at, lengths in values]

    def _batch(self, slices: list[Slices]) -> pa.RecordBatch:
        arrays = []
        for column, values in zip(self.columns, slices, strict=True):
            try:
                arrays.append(column.decode(values, column.arrow))
            except NotInArrow as error:
                raise ArrowValueError(column.name, column.type_name, str(column.arrow), str(error)) from None
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _number(begin: bytes) -> int:
    """The number whose eight bytes begin with *begin*."""
    return int.from_bytes(begin.ljust(8, b"\0"))


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
