"""What can be written: Arrow data in any form, as batches of equal size.

Rows are divided by their count alone, however they came: the same rows in the same order make the same batches, which
is what the ledger knows them by. Objects in Ray's store are not divided: each is a batch.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import ray


class Piece(NamedTuple):
    """A batch on its way.

    Attributes:
        number: from 0.
        data: Table or RecordBatch, or a reference to one.
        first: number of its first row within all data; of what comes behind references, within its own batch.
        rows: how many it has; ``None`` if that is not known.
    """

    number: int
    data: Any
    first: int
    rows: int | None


def put(data: pa.Table | pa.RecordBatch) -> ray.ObjectRef[Any]:
    """A reference to *data* in Ray's object store. Blocks while that is full."""
    table = _as_table(data)
    for index, field in enumerate(table.schema):
        to = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(field.type)
        if to is not None:  # Ray 2.60 cannot serialise views
            table = table.set_column(index, field.name, table.column(index).cast(to))
    return ray.put(table)


def total_rows(data: Any) -> int | None:
    """How many rows *data* has, if that is known before it is read."""
    return data.num_rows if isinstance(data, pa.Table | pa.RecordBatch) else None


async def pieces(data: Any, batch_rows: int, ordered: bool = False) -> AsyncGenerator[Piece, None]:
    """*data* as batches of *batch_rows* rows; the last may have less. One without rows if there are none.
    *ordered*: a Dataset gives its blocks always in the same order.

    Raises:
        TypeError: it is nothing that can be written.
    """
    number = first = 0
    waiting: list[pa.Table] = []
    count = 0
    async for item in _items(data, batch_rows, ordered):
        if isinstance(item, ray.ObjectRef):
            if count:
                yield Piece(number, pa.concat_tables(waiting), first, count)
                number, first, waiting, count = number + 1, first + count, [], 0
            yield Piece(number, item, 0, None)
            number += 1
            continue
        table = _as_table(item)
        if waiting and not waiting[0].schema.equals(table.schema):
            if count:
                yield Piece(number, pa.concat_tables(waiting), first, count)
                number, first = number + 1, first + count
            waiting, count = [], 0
        position = 0
        while count + table.num_rows - position >= batch_rows:
            take = batch_rows - count
            whole = pa.concat_tables([*waiting, table.slice(position, take)])
            yield Piece(number, whole, first, batch_rows)
            number, first, position = number + 1, first + batch_rows, position + take
            waiting, count = [], 0
        if position < table.num_rows or not waiting:
            waiting.append(table.slice(position))
            count += table.num_rows - position
    if count or (waiting and not number):
        yield Piece(number, pa.concat_tables(waiting), first, count)


async def _items(data: Any, batch_rows: int, ordered: bool) -> AsyncIterator[Any]:
    if isinstance(data, pa.Table | pa.RecordBatch | ray.ObjectRef):
        yield data
        return
    if _is_dataset(data):
        options = data.context.execution_options
        was = options.preserve_order
        options.preserve_order = was or ordered
        try:
            async for item in _taken(data.iter_batches(batch_size=batch_rows, batch_format="pyarrow")):
                yield item
        finally:
            options.preserve_order = was  # the Dataset is the caller's
        return
    if hasattr(data, "__arrow_c_stream__") and not isinstance(data, pa.RecordBatchReader):
        data = pa.RecordBatchReader.from_stream(data)  # polars, pandas, DuckDB …
    if hasattr(data, "__aiter__"):
        async for item in data:
            yield item
        return
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
        raise _not_arrow(data)
    async for item in _taken(data):
        yield item


async def _taken(data: Iterable[Any]) -> AsyncIterator[Any]:
    """What *data* has, each taken by another thread: it may have to be waited for."""
    iterator = iter(data)
    while (item := await asyncio.to_thread(next, iterator, _END)) is not _END:
        yield item


_END = object()


def _as_table(item: Any) -> pa.Table:
    if isinstance(item, pa.Table):
        return item
    if isinstance(item, pa.RecordBatch):
        return pa.Table.from_batches([item])
    raise _not_arrow(item)


def _not_arrow(item: Any) -> TypeError:
    return TypeError(
        f"{type(item).__module__}.{type(item).__name__} is no Arrow data: give a pyarrow Table, RecordBatch or "
        "RecordBatchReader, an iterator of batches, ObjectRefs of these, a Ray Dataset, or anything with "
        "__arrow_c_stream__ (polars, pandas); rows of Python values become a table by pyarrow.Table.from_pylist(…)"
    )


def _is_dataset(data: Any) -> bool:
    module = sys.modules.get("ray.data")
    return module is not None and isinstance(data, module.Dataset)
