"""What is written is divided by its rows alone; and what becomes of its values."""

from __future__ import annotations

import decimal
import json
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypg.core.arrow_types import Column, way
from raypg.core.write_plan import Field, Table, WritePlan
from raypg.errors import ConfigError, IncompatibleDataError
from raypg.ingest import encoding
from raypg.ingest.inputs import pieces
from raypg.ledger import parse_age

S = pa.timestamp("s")
INNER = pa.map_(pa.string(), pa.decimal128(5, 2))


def rows(count: int, first: int = 0) -> pa.Table:
    return pa.table({"id": pa.array(range(first, first + count), pa.int64())})


async def divided(data: Any, batch_rows: int) -> list[tuple[int, int, list[int]]]:
    return [(p.number, p.first, p.data["id"].to_pylist()) async for p in pieces(data, batch_rows)]


async def test_how_rows_come_makes_no_difference() -> None:
    whole = rows(10)
    expected = [(0, 0, [0, 1, 2, 3]), (1, 4, [4, 5, 6, 7]), (2, 8, [8, 9])]
    assert await divided(whole, 4) == expected
    assert await divided(iter(whole.to_batches(3)), 4) == expected
    assert await divided(pa.RecordBatchReader.from_batches(whole.schema, whole.to_batches(1)), 4) == expected
    assert await divided([rows(7), rows(3, 7).to_batches()[0]], 4) == expected

    async def later() -> Any:
        yield rows(9)
        yield rows(1, 9)

    assert await divided(later(), 4) == expected


async def test_a_batch_without_rows_is_checked_too() -> None:
    assert await divided(rows(0), 4) == [(0, 0, [])]
    assert await divided([rows(0), rows(0)], 4) == [(0, 0, [])]
    assert await divided(rows(4), 4) == [(0, 0, [0, 1, 2, 3])]
    assert await divided([], 4) == []


async def test_another_schema_is_another_batch() -> None:
    other = pa.table({"id": pa.array([7], pa.int32())})
    assert await divided([rows(3), other, rows(2)], 10) == [(0, 0, [0, 1, 2]), (1, 3, [7]), (2, 4, [0, 1])]


async def test_anything_with_an_arrow_stream() -> None:
    class Frame:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return rows(3).__arrow_c_stream__(requested_schema)

    assert await divided(Frame(), 2) == [(0, 0, [0, 1]), (1, 2, [2])]


@pytest.mark.parametrize("data", ["table", {"id": [1]}, [[1, 2]], 7, b"x", [{"id": 1}]])
async def test_what_is_no_arrow_data(data: Any) -> None:
    with pytest.raises(TypeError, match="is no Arrow data"):
        await divided(data, 4)


def normal(values: pa.Array, type_: str) -> encoding.Normal:
    column = Column("c", type_, "b", type_.removesuffix("[]") if "[" in type_ else "", type_, type_, False, "", False)
    table = Table("s", "t", "r", False, False, True, True, (column,), ())
    plan = WritePlan(table, (Field(column, way(values.type, column)),), "append", False, (), False, False)
    return encoding.normalise(pa.record_batch({"c": values}), plan)


@pytest.mark.parametrize(
    ("values", "type_", "bad"),
    [
        (pa.array([1, 40_000, None, -40_000], pa.int32()), "int2", [1, 3]),
        (pa.array([1, 2**63, None], pa.uint64()), "int8", [1]),
        (pa.array([2**31 - 1, -(2**31), 2**31]), "int4", [2]),
        (pa.array([255, 0], pa.uint8()), "int2", []),
        (
            pa.array(["3b241101-e2bb-4255-8caf-4136c566a962", None, "x", "3B241101E2BB42558CAF4136C566A962"]),
            "uuid",
            [2],
        ),
        (pa.array([1.1, 1e300, None, -1e300, 1e-300, float("inf"), float("nan"), 0.0, 3.4e38]), "float4", [1, 3, 4]),
        (pa.array([2**62, 0, None, -(2**62), -210_866_803_201, -210_866_803_200], S), "timestamp", [0, 3, 4]),
        (pa.array([2**62, 0, None], pa.timestamp("ms", "UTC")), "timestamptz", [0]),
        (pa.array([-(2**63) + 1, -210_866_803_200_000_000, 2**63 - 1], pa.timestamp("us")), "timestamp", [0]),
        (pa.array([-(2**63) + 1, 2**63 - 1], pa.timestamp("ns")), "timestamp", []),
        (pa.array([-(2**31), 2**31 - 1, 2_145_042_905, 2_145_042_906, -2_440_588], pa.date32()), "date", [0, 1, 3]),
        (pa.array([2**62, -(2**62), 86_400_000], pa.int64()).view(pa.date64()), "date", [0, 1]),
        (pa.array([2**62, 5], pa.duration("s")), "interval", [0]),
        (pa.array([-1, 0, 86_400], pa.int32()).view(pa.time32("s")), "time", [0]),
        (pa.array([[1], [2**31, 1], None, [], [None, -(2**40)]]), "int4[]", [1, 4]),
        (pa.array([[2**40], [1], None, [2**40]], pa.large_list(pa.int64())).slice(1), "int4[]", [2]),
        (pa.array([[1, 2], None, [2**31, 3]], pa.list_(pa.int64(), 2)), "int4[]", [2]),
        (pa.ListArray.from_arrays([0, 1, 2], pa.array([2**40, 1]), mask=pa.array([True, False])), "int4[]", []),
        (pa.array([[1.0], [1e300]]), "float4[]", [1]),
        (pa.array([[2**62], [1]], pa.list_(S)), "timestamp[]", [0]),
        (pa.array([[1001], []], pa.list_(pa.timestamp("ns"))), "timestamp[]", []),
        (pa.array([[-(2**31)], [1]], pa.list_(pa.date32())), "date[]", [0]),
        (pa.array([[2**62], [1]], pa.list_(pa.timestamp("s", "UTC"))), "timestamptz[]", [0]),
        (pa.array([[["a"], ["b"]], [["a"], []]]), "text[]", [1]),
    ],
)
def test_values_out_of_range_are_found_row_by_row(values: pa.Array, type_: str, bad: list[int]) -> None:
    found = normal(values, type_)
    assert sorted(found.bad) == bad
    kept = found.batch.column(0)
    assert [index for index, valid in enumerate(kept.is_valid().to_pylist()) if not valid] == [
        index for index, valid in enumerate(values.is_valid().to_pylist()) if not valid or index in bad
    ]
    for row in bad:
        assert json.loads(encoding.row_as_json(pa.record_batch({"c": values}), row))["c"] is not None


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (pa.array([[1, None], None, []], pa.list_(pa.int64())).slice(1), [None, []]),
        (pa.array([[0, 1], None, [2, 3]], pa.list_(pa.int64(), 2)), [[0, 1], None, [2, 3]]),
        (pa.array([[0], None, [2, 3]], pa.large_list(pa.int16())), [[0], None, [2, 3]]),
    ],
)
def test_lists_keep_their_rows(values: pa.Array, kept: list[Any]) -> None:
    assert normal(values, "int4[]").batch.column(0).to_pylist() == kept


def test_uuids_in_lists_are_told_in_their_form() -> None:
    found = normal(pa.array([[b"0123456789abcdef", None]], pa.list_(pa.binary(16))), "uuid[]")
    assert found.batch.column(0).to_pylist() == ['{"30313233343536373839616263646566",NULL}']
    found = normal(pa.array([[[b"01"], [b"23"]]], pa.list_(pa.list_(pa.binary()))), "bytea[]")
    assert found.batch.column(0).to_pylist() == [r'{{"\\x3031"},{"\\x3233"}}']


D = decimal.Decimal


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (
            pa.array([{"a": D("12345678901234567890.10"), "b": ["ä", None]}, None]),
            ['{"a": 12345678901234567890.10, "b": ["ä", null]}', None],
        ),
        (pa.array([[D("1E+2"), None], []], pa.list_(pa.decimal128(3, -2))), ["[100, null]", "[]"]),
        (
            pa.array([[("a", 1), ('"', None)], [], None], pa.map_(pa.string(), pa.int64())),
            ['{"a": 1, "\\"": null}', "{}", None],
        ),
        (
            pa.array([{"m": [("k", [("x", D("0.5"))])]}], pa.struct([("m", pa.map_(pa.string(), INNER))])),
            ['{"m": {"k": {"x": 0.50}}}'],
        ),
        (pa.array([[(1, "a"), (2, None)]], pa.map_(pa.int64(), pa.string())), ['[[1, "a"], [2, null]]']),
        (pa.array([[("a", 1), ("a", 2)], [("a", 1)]], pa.map_(pa.string(), pa.int64())), [ValueError, '{"a": 1}']),
        (pa.array([{"x": float("nan")}, {"x": -float("inf")}, {"x": 0.5}]), [ValueError, ValueError, '{"x": 0.5}']),
        (pa.array([{"x": float("nan"), "d": D(1)}, {"x": 1.0, "d": None}]), [ValueError, '{"x": 1.0, "d": null}']),
        (pa.array([{"t": 2**62}, {"t": 0}], pa.struct([("t", S)])), [ValueError, '{"t": "1970-01-01 00:00:00"}']),
    ],
)
def test_nested_values_as_json(values: pa.Array, texts: list[Any]) -> None:
    """ValueError: there is no JSON for it, and the row is a bad one."""
    found = normal(values, "jsonb")
    assert found.batch.column(0).to_pylist() == [None if text is ValueError else text for text in texts]
    assert sorted(found.bad) == [row for row, text in enumerate(texts) if text is ValueError]
    for row, text in enumerate(texts):
        if isinstance(text, str):
            json.loads(text)
        shown = encoding.row_as_json(pa.record_batch({"c": values}), row)
        json.loads(shown, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([("a", pa.binary())]),
        pa.list_(pa.struct([("a", pa.list_(pa.large_binary()))])),
        pa.map_(pa.string(), pa.binary(4)),
        pa.struct([("a", pa.dictionary(pa.int8(), pa.binary()))]),
    ],
)
def test_bytes_are_no_json(kind: pa.DataType) -> None:
    for type_ in ("json", "jsonb"):
        with pytest.raises(IncompatibleDataError, match=r"'c'.*JSON has no bytes.*hexadecimal"):
            normal(pa.nulls(1, kind), type_)
    identified = pa.array([uuid.UUID(int=7)], pa.uuid())
    found = normal(pa.StructArray.from_arrays([identified], ["id"]), "jsonb")
    assert found.batch.column(0).to_pylist() == ['{"id": "00000000-0000-0000-0000-000000000007"}']


def test_the_hash_is_of_the_values_and_of_what_they_are_for() -> None:
    plan = WritePlan(Table("s", "t", "r", False, False, True, True, (), ()), (), "append", False, (), False, False)
    encoder = encoding.Encoder(plan)

    def digest(table: pa.Table, about: str = "") -> bytes:
        return encoder.digest(encoding.one_batch(table), about)[0]

    whole = rows(20_000)
    assert digest(whole) == digest(pa.concat_tables([whole.slice(0, 7), whole.slice(7)]))
    assert digest(whole) == digest(rows(20_010).slice(0, 20_000))
    assert len({digest(whole), digest(whole, "upsert"), digest(rows(19_999)), digest(rows(20_000, 1))}) == 4


def test_a_vector_makes_zero_of_what_is_too_small() -> None:
    for type_, bad in (("vector", []), ("float4[]", [0])):
        found = normal(pa.array([[1e-50, 1.0], [1.0, 2.0]]), type_)
        assert sorted(found.bad) == bad
    assert sorted(normal(pa.array([[1e300, 1.0], [1.0, 2.0]]), "vector").bad) == [0]


def test_what_lies_behind_a_null_list_does_not_count() -> None:
    lists = pa.ListArray.from_arrays(
        [0, 2, 4, 6], pa.array([1, 2, 3, 4, 2**40, 6]), mask=pa.array([True, False, False])
    )
    found = normal(lists, "int4[]")
    assert sorted(found.bad) == [2]
    assert found.batch.column(0).to_pylist() == [None, [3, 4], None]


def test_a_union_is_written_as_python_writes_it() -> None:
    types = pa.array([0, 1], pa.int8())
    union = pa.UnionArray.from_sparse(types, [pa.array([1, 2]), pa.array([decimal.Decimal("1.5")] * 2)])
    found = normal(union, "jsonb")
    assert found.batch.column(0).to_pylist() == ["1", None]
    assert sorted(found.bad) == [1]


def test_wide_rows_are_encoded_few_at_a_time() -> None:
    plan = WritePlan(Table("s", "t", "r", False, False, True, True, (), ()), (), "append", False, (), False, False)
    chunks = list(encoding.Encoder(plan).chunks(pa.record_batch({"text": ["x" * 1_000_000] * 20})))
    assert max(map(len, chunks)) <= encoding.CHUNK_BYTES * 1.1
    assert sum(map(len, chunks)) > 20_000_000
    (_, one, _) = encoding.Encoder(plan).chunks(pa.record_batch({"text": ["x" * 2 * encoding.CHUNK_BYTES]}))
    assert len(one) > 2 * encoding.CHUNK_BYTES


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string(), pa.string_view()])
def test_a_batch_has_all_rows_however_large_its_columns(kind: pa.DataType) -> None:
    """Above 2 GiB pyarrow gives several arrays for one column; here above 100 bytes."""
    texts = pa.chunked_array([pa.array([f"{i} {j}" for j in range(20)]).cast(kind) for i in range(7)])
    numbers = pa.chunked_array([pa.array(range(100)), pa.array(range(100, 140))])
    table = pa.table({"text": texts, "number": numbers})
    for most in (100, encoding.MOST_BYTES):
        batch = encoding.one_batch(table, most)
        assert batch.to_pylist() == table.to_pylist()
    small = encoding.one_batch(table.slice(5, 3), 100)
    assert small.to_pylist() == table.slice(5, 3).to_pylist()
    nothing = encoding.one_batch(table.slice(0, 0))
    assert (nothing.num_rows, nothing.schema) == (0, table.schema)


def test_lists_that_are_too_large_for_one_batch_are_refused() -> None:
    zeros = pa.py_buffer(np.zeros(2**29, "uint8"))  # nobody touches them: they take no memory
    one = pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(np.array([0, 2**29], "int32")), zeros])
    lists = pa.chunked_array([pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), one)] * 5)
    with pytest.raises(IncompatibleDataError, match=r"5 rows is too large.*batch_rows"):
        encoding.one_batch(pa.table({"v": lists}))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("36h", 129_600), ("30d", 2_592_000), ("2w", 1_209_600)])
def test_ages(text: str, seconds: int) -> None:
    assert parse_age(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ConfigError, match="is no age"):
        parse_age(text)
