"""How the rows of a range become tables: always the same ones, to the byte, however the rows came.

Ray makes a block that it has lost by running its read task again, and takes the block of the same number. If the second
run divided its rows elsewhere, some would be lost and others come twice. So nothing of how rows arrive may decide: not
where a batch ends, nor whether it has a bitmap of nulls; only what is in the rows. Ray Data (2.60) makes its blocks of
tables by their ``nbytes`` (``BlockOutputBuffer``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

__all__ = ["compact", "content_bytes", "cut"]

_END_BYTES = 4
"""Of the number that says where a text or list ends."""


def compact(table: pa.Table) -> pa.Table:
    """The same rows, in memory in the one way that follows from their values: one piece for each column, and a bitmap
    of nulls only where there is one."""
    return pa.table([_compact(column) for column in table.columns], schema=table.schema)


def content_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of its values, in Arrow's format without bitmaps of nulls: the sum of those of its rows."""
    return sum(map(_array_bytes, batch.columns))


def cut(batches: Iterable[tuple[int, pa.RecordBatch]], most: int) -> Iterator[list[pa.RecordBatch]]:
    """The tables of some ranges of rows: each of one range, with as many rows as *most* bytes hold, at least one.

    Args:
        batches: (number of its range, some of its rows), in the order of the ranges and their rows.
        most: as counted by :func:`content_bytes`.

    Yields:
        The batches of one table; slices of them where it ends within one.
    """
    gathered: list[pa.RecordBatch] = []
    size, last = 0, -1
    for number, batch in batches:
        if gathered and number != last:
            yield gathered
            gathered, size = [], 0
        last = number
        while size + (added := content_bytes(batch)) > most:
            rows = _rows_within(batch, most - size)
            if not rows and not gathered:
                rows = 1
            if rows:
                gathered.append(batch.slice(0, rows))
            yield gathered
            gathered, size = [], 0
            batch = batch.slice(rows)
        if batch.num_rows:
            gathered.append(batch)
            size += added
    if gathered:
        yield gathered


def _compact(column: pa.ChunkedArray) -> pa.Array:
    for chunk in column.chunks:
        chunk.null_count  # noqa: B018 - where Arrow does not know it yet, it would keep a bitmap without nulls
    # With an empty one, since a single array would not be copied, and might begin in the middle of a byte.
    whole = pa.concat_arrays([*column.chunks, pa.array([], column.type)])
    if not pa.types.is_nested(column.type):
        return whole
    # Of what is in lists Arrow keeps any bitmap; its format for messages does not.
    message = pa.record_batch([whole], ["values"]).serialize()
    return pa.ipc.read_record_batch(message, pa.schema({"values": column.type})).column(0)


def _rows_within(batch: pa.RecordBatch, most: int) -> int:
    """How many of its first rows have at most that many bytes."""
    counts = range(1, batch.num_rows + 1)
    return bisect.bisect_right(counts, most, key=lambda count: content_bytes(batch.slice(0, count)))


def _array_bytes(array: pa.Array) -> int:
    kind, count = array.type, len(array)
    if pa.types.is_list(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind):
        if not count:
            return 0
        ends = np.frombuffer(array.buffers()[1], np.int32)
        first, last = int(ends[array.offset]), int(ends[array.offset + count])
        inner = _array_bytes(array.values.slice(first, last - first)) if pa.types.is_list(kind) else last - first
        return _END_BYTES * count + inner
    width: int = max(1, kind.bit_width // 8)  # a row of booleans counts one byte
    return count * width
