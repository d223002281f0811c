"""PostgreSQL's binary COPY format as Arrow record batches.

Source: PostgreSQL manual, COPY, "Binary Format"; protocol flow, "COPY Operations": one message holds one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

import pyarrow as pa

from raypg.core.arrow_columns import NATIVE, Column, schema_of
from raypg.core.arrow_decode import NotInArrow, Values
from raypg.core.copy_rows import TRAILER, RowFinder
from raypg.errors import ArrowValueError, RaypgError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CopyDecoder"]

SIGNATURE = b"PGCOPY\n\xff\r\n\0"
HEADER = len(SIGNATURE) + 8

_LENGTH = Struct(">i")


class CopyDecoder:
    """Decodes what ``COPY (…) TO STDOUT (FORMAT binary)`` sends, piece by piece.

    Args:
        columns: those of the result, without the key.
        key: see :class:`raypg.core.copy_rows.RowFinder`.
    """

    def __init__(self, columns: Sequence[Column], key: int) -> None:
        self.columns = list(columns)
        self.schema: pa.Schema = schema_of(self.columns)
        self._begun = False
        self._finder = RowFinder([NATIVE.get(column.oid) for column in self.columns], key)

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
        found = self._finder.find(data, begin)
        if found is None:
            raise RaypgError("what the server sent for COPY is not made of whole rows")
        return self._batch(found)

    def _batch(self, found: list[Values]) -> pa.RecordBatch:
        arrays = []
        for column, values in zip(self.columns, found, strict=True):
            try:
                arrays.append(column.decode(values, column.arrow))
            except NotInArrow as error:
                raise ArrowValueError(column.name, column.type_name, str(column.arrow), str(error)) from None
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
