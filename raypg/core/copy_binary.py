"""PostgreSQL's binary COPY format as Arrow record batches.

Each row begins with the number of its columns, each value with its length, so that a row can only be found from the end
of the one before it. That is a loop over all values; to do without, the first column of each row is a key of our own
(:func:`raypg.core.copy_text.copy_query`), which is looked for as a pattern of bytes. What is found is proven: the rows
must follow upon each other without a gap. Where they do not, since some value looks like a key, they are walked.

Source: PostgreSQL manual, COPY, "Binary Format"; protocol flow, "COPY Operations": one message holds one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import numpy as np
import pyarrow as pa

from raypg.core.arrow_columns import Column, schema_of
from raypg.core.arrow_decode import NotInArrow, Numbers, Slices, gather
from raypg.errors import ArrowValueError, RaypgError

__all__ = ["KEY_ENDS_WITH", "CopyDecoder"]

SIGNATURE = b"PGCOPY\n\xff\r\n\0"
HEADER = len(SIGNATURE) + 8
TRAILER = b"\xff\xff"

KEY_ENDS_WITH = 0xF9
"""Last byte of a key: rare in numbers, and not in any UTF-8 text."""

PIECE = 1 << 17
"""Bytes that are searched at a time: they stay in the processor's cache."""

_COUNT = Struct(">h")
_LENGTH = Struct(">i")


class CopyDecoder:
    """Decodes what ``COPY (…) TO STDOUT (FORMAT binary)`` sends, piece by piece.

    Args:
        columns: those of the result, without the key.
        key: a number whose last byte is ``KEY_ENDS_WITH``: the first column of each row.
    """

    def __init__(self, columns: Sequence[Column], key: int) -> None:
        self.columns = list(columns)
        self.schema: pa.Schema = schema_of(self.columns)
        self._row = _COUNT.pack(len(self.columns) + 1) + _LENGTH.pack(4) + _LENGTH.pack(key)
        self._begun = False

    def decode(self, data: bytes) -> pa.RecordBatch | None:
        """The rows in *data*, which holds whole messages; ``None`` without any.

        Raises:
            ArrowValueError: a value has no equal in Arrow; names the column.
            RaypgError: this is no binary COPY, or of something else.
        """
        begin = 0
        if not self._begun:
            if data[: len(SIGNATURE)] != SIGNATURE:
                raise RaypgError("the server did not answer COPY in its binary format")
            begin = HEADER + _LENGTH.unpack_from(data, HEADER - 4)[0]
            self._begun = True
        if data[begin:] in (b"", TRAILER):
            return None
        slices = self._columns(data, begin, self._found(data, begin))
        if slices is None:
            slices = self._columns(data, begin, self._walked(data, begin))
        if slices is None:
            raise RaypgError("what the server sent for COPY is not made of whole rows")
        return self._batch(slices)

    def _found(self, data: bytes, begin: int) -> Numbers:
        """Where something looks like the beginning of a row."""
        everything = np.frombuffer(data, np.uint8)
        last = len(self._row) - 1
        found = [
            np.flatnonzero(everything[place : place + PIECE] == KEY_ENDS_WITH) + (place - last)
            for place in range(begin + last, len(data), PIECE)
        ]
        places = np.concatenate(found) if found else np.empty(0, np.int64)
        places = places[gather(data, "u8", places + 2) == int.from_bytes(self._row[2:])]
        return places[gather(data, "i2", places) == len(self.columns) + 1]

    def _walked(self, data: bytes, begin: int) -> Numbers:
        """Where rows begin, from one to the next."""
        starts, place = [], begin
        while data.startswith(self._row, place):
            starts.append(place)
            place += len(self._row)
            for _ in self.columns:
                if place + 4 > len(data):
                    break
                place += 4 + max(_LENGTH.unpack_from(data, place)[0], 0)
        return np.array(starts, np.int64)

    def _columns(self, data: bytes, begin: int, starts: Numbers) -> list[Slices] | None:
        """The values of the rows that begin at *starts*, by column; ``None`` if these are not all rows, and only
        rows."""
        if not len(starts) or starts[0] != begin:
            return None
        places = starts + len(self._row)
        slices = []
        for _ in self.columns:
            if places.max() + 4 > len(data):
                return None
            lengths = gather(data, "i4", places)
            found = Slices(data, places + 4, lengths)
            slices.append(found)
            places = found.ends
        if places[-1] > len(data):
            return None
        rest = data[int(places[-1]) :]
        # The trailer may look like the length of a NULL: it is one if the last row ends before it.
        return slices if np.array_equal(places[:-1], starts[1:]) and rest in (b"", TRAILER) else None

    def _batch(self, slices: list[Slices]) -> pa.RecordBatch:
        arrays = []
        for column, values in zip(self.columns, slices, strict=True):
            try:
                arrays.append(column.decode(values, column.arrow))
            except NotInArrow as error:
                raise ArrowValueError(column.name, column.type_name, str(column.arrow), str(error)) from None
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
