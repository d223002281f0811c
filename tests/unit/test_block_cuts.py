"""Rows are divided into tables at the same places, however they come."""

from __future__ import annotations

import datetime
import itertools
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.block_cuts import compact, content_bytes, cut

SCHEMA = pa.schema(
    {
        "number": pa.int64(),
        "flag": pa.bool_(),
        "text": pa.string(),
        "bytes": pa.binary(),
        "texts": pa.list_(pa.string()),
        "price": pa.decimal128(9, 2),
        "lasts": pa.month_day_nano_interval(),
        "at": pa.timestamp("us", "UTC"),
    }
)
ROW = st.fixed_dictionaries(
    {
        "number": st.none() | st.integers(0, 9),
        "flag": st.none() | st.booleans(),
        "text": st.none() | st.text(max_size=30),
        "bytes": st.none() | st.binary(max_size=30),
        "texts": st.none() | st.lists(st.none() | st.text(max_size=5), max_size=4),
        "price": st.none() | st.just(Decimal("1.25")),
        "lasts": st.none() | st.just(pa.MonthDayNano([1, 2, 3])),
        "at": st.none() | st.just(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)),
    }
)
RANGES = st.lists(st.lists(ROW, max_size=30), max_size=4)
"""Rows of some ranges."""


def batches(ranges: list[list[Any]], sizes: list[int]) -> list[tuple[int, pa.RecordBatch]]:
    """Each range in batches of those sizes, over and over."""
    found = []
    for number, rows in enumerate(ranges):
        lengths = itertools.cycle(sizes)
        begin = 0
        while begin < len(rows):
            end = begin + next(lengths)
            found.append((number, pa.RecordBatch.from_pylist(rows[begin:end], schema=SCHEMA)))
            begin = end
    return found


def compacted(ranges: list[list[Any]], sizes: list[int], most: int) -> list[pa.Table]:
    return [compact(pa.Table.from_batches(table)) for table in cut(batches(ranges, sizes), most)]


def tables(ranges: list[list[Any]], sizes: list[int], most: int) -> list[list[Any]]:
    """The rows of each table."""
    return [table.to_pylist() for table in compacted(ranges, sizes, most)]


def memory(array: pa.Array) -> list[int | None]:
    """Bytes of each of its buffers."""
    return [None if buffer is None else buffer.size for buffer in array.buffers()]


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(RANGES, SIZES, SIZES, st.integers(1, 3000))
def test_how_rows_come_does_not_divide_them(
    ranges: list[list[Any]], some: list[int], others: list[int], most: int
) -> None:
    found = tables(ranges, some, most)
    assert found == tables(ranges, others, most)
    assert [row for table in found for row in table] == [row for rows in ranges for row in rows]


@given(RANGES, SIZES, SIZES, st.integers(1, 3000))
def test_nor_does_it_change_their_bytes(ranges: list[list[Any]], some: list[int], others: list[int], most: int) -> None:
    """Ray Data counts them to make its blocks."""
    for one, other in zip(compacted(ranges, some, most), compacted(ranges, others, most), strict=True):
        assert one.schema == SCHEMA
        assert one.nbytes == other.nbytes
        for column in SCHEMA.names:
            (first,), (second,) = one.column(column).chunks, other.column(column).chunks
            assert first.offset == second.offset == 0
            assert [size is None for size in memory(first)] == [size is None for size in memory(second)]
            assert (first.buffers()[0] is None) == (first.null_count == 0)


@given(RANGES, SIZES, st.integers(1, 3000))
def test_a_table_is_as_large_as_it_may_be(ranges: list[list[Any]], sizes: list[int], most: int) -> None:
    def size(rows: list[Any]) -> int:
        return content_bytes(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))

    left = [list(rows) for rows in ranges if rows]
    for table in tables(ranges, sizes, most):
        assert len(table) == 1 or size(table) <= most
        rest = left[0] = left[0][len(table) :]
        assert not rest or size(table + rest[:1]) > most
        if not rest:
            left.pop(0)
    assert not left


@given(RANGES, SIZES)
def test_bytes_add_up(ranges: list[list[Any]], sizes: list[int]) -> None:
    for rows in ranges:
        whole = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        assert content_bytes(whole) == sum(content_bytes(batch) for _, batch in batches([rows], sizes))


def test_bytes_are_those_of_values_and_ends() -> None:
    batch = pa.RecordBatch.from_pylist(
        [
            {"number": 1, "flag": True, "text": "abc", "texts": ["a", "bc", None], "price": Decimal("1.25")},
            {"number": None, "flag": None, "text": None, "texts": None, "price": None},
        ],
        schema=SCHEMA,
    )
    number, flag, text, none, texts = 2 * 8, 2, 2 * 4 + 3, 2 * 4, 2 * 4 + 3 * 4 + 3
    price, lasts, at = 2 * 16, 2 * 16, 2 * 8
    assert content_bytes(batch) == number + flag + text + none + texts + price + lasts + at
    assert content_bytes(batch.slice(1)) == 8 + 1 + 4 + 4 + 4 + 16 + 16 + 8
