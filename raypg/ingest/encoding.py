"""Arrow columns in the form that COPY BINARY takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pgpq import ArrowToPostgresBinaryEncoder
from pgpq.encoders import LargeStringEncoderBuilder, StringEncoderBuilder
from pgpq.schema import Jsonb

from raypg.core import arrow_ranges, json_text
from raypg.core.array_text import render
from raypg.core.arrow_types import CASTS_FROM_ARRAY, plain
from raypg.core.write_plan import ROW, Field, WritePlan
from raypg.errors import IncompatibleDataError

CHUNK_ROWS = 8_192
"""Rows that are encoded at a time; other threads stand still for some milliseconds."""

CHUNK_BYTES = 4_000_000
"""Bytes that these may have, about: rows may be wide."""

MOST_BYTES = 2**31 - 1
"""Of the values in one array of a type that is not large."""

_LARGE = {
    pa.string(): pa.large_string(),
    pa.string_view(): pa.large_string(),
    pa.binary(): pa.large_binary(),
    pa.binary_view(): pa.large_binary(),
}

KEEP_BYTES = 32_000_000
"""Encoded batches up to this size are kept until they are written; larger ones are encoded again when needed."""

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

NOT_OF_TYPE = "22P02"


class Normal:
    """A batch in the types of its plan.

    Attributes:
        batch: one column for each field of the plan.
        bad: rows whose values no server need be asked about: number → (SQLSTATE, what is wrong). They are NULL there.
    """

    def __init__(self, batch: pa.RecordBatch, bad: dict[int, tuple[str, str]]) -> None:
        self.batch = batch
        self.bad = bad


def one_batch(data: Any, most: int = MOST_BYTES) -> pa.RecordBatch:
    """A Table or RecordBatch, or a list of these, as one RecordBatch, with all of its rows.

    Args:
        most: bytes of a text or binary column above which it gets the type of large ones.

    Raises:
        TypeError: it is none of these.
        IncompatibleDataError: those of a list have different columns; or a column, lists of texts for instance, is too
            large to be one array.
    """
    if isinstance(data, pa.RecordBatch):
        return data
    if isinstance(data, list | tuple) and data and all(isinstance(each, pa.Table | pa.RecordBatch) for each in data):
        tables = [each if isinstance(each, pa.Table) else pa.Table.from_batches([each]) for each in data]
        if any(not each.schema.equals(tables[0].schema) for each in tables):
            raise IncompatibleDataError("the tables of one reference have different columns: write each for itself")
        data = pa.concat_tables(tables)
    if not isinstance(data, pa.Table):
        raise TypeError(f"a pyarrow Table or RecordBatch is needed, not {type(data).__module__}.{type(data).__name__}")
    try:
        columns = [_one_array(column, most) for column in data.columns]
    except pa.ArrowInvalid as error:
        raise IncompatibleDataError(
            f"a batch of {data.num_rows} rows is too large: {error}; write it in smaller ones (batch_rows=…)"
        ) from error
    if any(len(column) != data.num_rows for column in columns):
        raise AssertionError(f"of {data.num_rows} rows there are {[len(column) for column in columns]} in the columns")
    return pa.RecordBatch.from_arrays(columns, names=data.schema.names)


def _one_array(column: pa.ChunkedArray, most: int) -> pa.Array:
    """All chunks of *column* as one; raises ``pyarrow.ArrowInvalid`` if they are too large for that."""
    if column.num_chunks == 1:
        return column.chunk(0)
    if column.nbytes > most:
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        # An array of the smaller types ends at 2 GiB; combine_chunks() then gives several, and no error.
        if (large := _LARGE.get(column.type)) is not None:
            column = column.cast(large)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def normalise(batch: pa.RecordBatch, plan: WritePlan) -> Normal:
    """*batch* in the types of *plan*."""
    bad: dict[int, tuple[str, str]] = {}
    columns = []
    for index, field in enumerate(plan.fields):
        column, wrong = _normal(batch.column(index), field)
        bad = {**wrong, **bad}
        columns.append(column)
    names = [field.column.name for field in plan.fields]
    return Normal(pa.RecordBatch.from_arrays(columns, names=names), bad)


_Found = tuple[pa.Array, dict[int, tuple[str, str]]]
"""(values, row → (SQLSTATE, what is wrong with it))."""


def _normal(column: pa.Array, field: Field) -> _Found:
    column = _decoded(column)
    to = field.way.to
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), to), {}
    if field.way.convert:
        return _CONVERT[field.way.convert](column, field)
    if pa.types.is_list(to):
        return _lists(column, field)
    values, wrong = _cast(column, to, arrow_ranges.LONGEST.get(field.column.type))
    return values, {} if wrong is None else dict.fromkeys(pc.indices_nonzero(wrong).to_pylist(), _range(field, to))


def _decoded(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    return pc.run_end_decode(column) if pa.types.is_run_end_encoded(column.type) else column


def _range(field: Field, to: pa.DataType) -> tuple[str, str]:
    state = arrow_ranges.sqlstate(to)
    what = "too long" if state == arrow_ranges.TEXT else "out of range"
    return state, f"value {what} for type {field.column.shown} in column {field.column.name!r}"


def _cast(column: pa.Array, to: pa.DataType, longest: int | None, may_vanish: bool = False) -> tuple[pa.Array, Any]:
    """(*column* as *to*, which of its values are out of the range of that or have more than *longest* bytes, and so
    are NULL, or ``None``). *may_vanish*: what is too small for a float4 becomes 0."""
    if longest is not None:
        column = pc.cast(column, to)
        wrong = pc.greater(pc.binary_length(column), longest)
    else:
        wrong = _out_of_range(column, to, may_vanish)
    if wrong is not None:
        if not pc.any(wrong).as_py():
            wrong = None
        else:
            column = pc.if_else(wrong, pa.scalar(None, column.type), column)
    # What falls away is less than PostgreSQL keeps: nanoseconds, the last bits of a float4.
    lossy = pa.types.is_temporal(to) or pa.types.is_floating(to)
    return column if column.type == to else pc.cast(column, to, safe=not lossy), wrong


def _out_of_range(column: pa.Array, to: pa.DataType, may_vanish: bool) -> Any:
    if pa.types.is_float64(column.type) and pa.types.is_float32(to):
        near = pc.cast(column, to, safe=False)
        above = pc.and_(pc.is_inf(near), pc.is_finite(column))
        return above if may_vanish else pc.or_(above, pc.and_(pc.equal(near, 0), pc.not_equal(column, 0)))
    if (limits := arrow_ranges.limits(column.type, to)) is None:
        return None
    if pa.types.is_temporal(column.type):
        column = column.view(pa.int64() if column.type.bit_width == 64 else pa.int32())
    low, high = (pa.scalar(limit, column.type) for limit in limits)
    return pc.or_(pc.less(column, low), pc.greater(column, high))


def _lists(column: pa.Array, field: Field) -> _Found:
    to = field.way.to
    longest = arrow_ranges.LONGEST.get(field.column.element)
    is_vector = field.column.type in CASTS_FROM_ARRAY  # pgvector makes 0 of what is too small
    values, wrong = _cast(_decoded(pc.list_flatten(column)), to.value_type, longest, is_vector)
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    rows: list[int] = []
    if wrong is not None:  # not by list_parent_indices: it counts what lies behind a null, and list_flatten does not
        rows = pa.array(np.repeat(np.arange(len(column)), lengths)).filter(wrong).to_pylist()
    null = pc.is_null(column)
    if column.type != to or rows:
        ends = pc.cast(pc.cumulative_sum(lengths), pa.int32())
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        if rows:
            null = pc.or_(null, pc.is_in(_numbers(column), pa.array(rows, pa.int64())))
        column = pa.ListArray.from_arrays(offsets, values, mask=null)
    return column, dict.fromkeys(rows, _range(field, to.value_type))


def _uuids(column: pa.Array, field: Field) -> _Found:
    if not pa.types.is_large_string(column.type):
        column = pc.cast(column, pa.string())
    digits = pc.replace_substring_regex(column, "[-{}]", "")
    right = pc.match_substring_regex(digits, "^[0-9a-fA-F]{32}$")
    text = f"invalid input syntax for type uuid in column {field.column.name!r}"
    bad = dict.fromkeys(pc.indices_nonzero(pc.invert(right)).to_pylist(), (NOT_OF_TYPE, text))
    zero = pa.scalar("0" * 32, digits.type)
    right = pc.fill_null(right, False)
    padded = pc.if_else(right, digits, zero)
    values = bytes.fromhex("".join(padded.to_pylist()))
    raw = pa.Array.from_buffers(pa.binary(16), len(column), [None, pa.py_buffer(values)])
    return pc.if_else(right, raw, pa.scalar(None, pa.binary(16))), bad


def _each(column: pa.Array, field: Field, convert: Callable[[Any], str]) -> _Found:
    """The text of each value; those that have none are bad."""
    given: Sequence[Any] = column
    with contextlib.suppress(ValueError, OverflowError):  # some value is none of Python's: they are made one by one
        given = column.to_pylist()
    bad: dict[int, tuple[str, str]] = {}
    values: list[str | None] = []
    for row, value in enumerate(given):
        try:
            if isinstance(value, pa.Scalar):
                value = value.as_py()
            values.append(None if value is None else convert(value))
        except (ValueError, OverflowError) as error:
            values.append(None)
            state = arrow_ranges.TIME if isinstance(error, OverflowError) else NOT_OF_TYPE
            text = f"no value of type {field.column.shown} in column {field.column.name!r}: {error}"
            bad[row] = state, text
    return pa.array(values, pa.large_string()), bad


def _documents(column: pa.Array, field: Field) -> _Found:
    return _each(column, field, json_text.writer(column.type))


def _intervals(column: pa.Array, field: Field) -> _Found:
    return _each(column, field, lambda v: f"{v.months} mons {v.days} days {v.nanoseconds // 1000} microseconds")


def _arrays(column: pa.Array, field: Field) -> _Found:
    form = bytes.hex if field.column.element == "uuid" else _bytea
    return _each(column, field, lambda value: render(value, lambda v: form(v) if isinstance(v, bytes) else str(v)))


def _bytea(value: bytes) -> str:
    return "\\x" + value.hex()


_CONVERT: dict[str, Callable[[pa.Array, Field], _Found]] = {
    "uuid": _uuids,
    "json": _documents,
    "interval": _intervals,
    "array": _arrays,
}


def _numbers(of: pa.Array | pa.RecordBatch, first: int = 0) -> pa.Array:
    import numpy as np

    return pa.array(np.arange(first, first + len(of), dtype="int64"))


def with_rows(batch: pa.RecordBatch, first: int = 0) -> pa.RecordBatch:
    """*batch* with the numbers of its rows as its last column."""
    return pa.RecordBatch.from_arrays([*batch.columns, _numbers(batch, first)], names=[*batch.schema.names, ROW])


class Encoder:
    """Makes the bytes of COPY BINARY of batches of one plan."""

    def __init__(self, plan: WritePlan) -> None:
        self._jsonb = {field.column.name for field in plan.fields if field.way.type == "jsonb"}

    def chunks(self, batch: pa.RecordBatch) -> Iterator[bytes]:
        """The bytes of *batch*, in portions."""
        # pgpq names columns in a dictionary: a name of theirs may occur once, and any will do.
        names = [str(index) for index in range(batch.num_columns)]
        schema = pa.schema([pa.field(name, each.type, True) for name, each in zip(names, batch.schema, strict=True)])
        encoders = {}
        for name, given, field in zip(names, batch.schema.names, schema, strict=True):
            if given in self._jsonb:
                large = pa.types.is_large_string(field.type)
                builder = LargeStringEncoderBuilder if large else StringEncoderBuilder
                encoders[name] = builder.new_with_output(field, Jsonb())
            else:
                encoders[name] = ArrowToPostgresBinaryEncoder.infer_encoder(field)
        encoder = ArrowToPostgresBinaryEncoder.new_with_encoders(schema, encoders)
        yield encoder.write_header()
        rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            yield encoder.write_batch(pa.RecordBatch.from_arrays(part.columns, schema=schema))
        yield encoder.finish()

    def digest(self, batch: pa.RecordBatch, about: str) -> tuple[bytes, list[bytes] | None]:
        """(hash of the values of *batch* and of *about*, its bytes if they are not too many)."""
        sum_ = xxhash.xxh3_128(about.encode())
        kept: list[bytes] | None = []
        size = 0
        for chunk in self.chunks(batch):
            sum_.update(chunk)
            size += len(chunk)
            if kept is not None:
                kept.append(chunk)
                if size > KEEP_BYTES:
                    kept = None
        return sum_.digest(), kept


def row_as_json(batch: pa.RecordBatch, row: int) -> str:
    """Row *row* of *batch* as a JSON text, for people to look at."""
    values = {name: _python(column, row) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    text = json.dumps(values, default=_shown)
    return json.dumps(json.loads(text, parse_constant=str)) if "NaN" in text or "Infinity" in text else text


def _python(column: pa.Array, row: int) -> Any:
    try:
        return column[row].as_py()
    except (ValueError, OverflowError):  # a time that Python does not have
        return column.slice(row, 1).to_string(skip_new_lines=True)


def _shown(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


__all__ = ["Encoder", "Normal", "normalise", "one_batch", "plain", "row_as_json", "with_rows"]
