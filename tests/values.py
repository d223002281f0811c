"""Random values of PostgreSQL's types, as asyncpg takes them, and what it takes to compare what came back."""

from __future__ import annotations

import datetime
import decimal
import ipaddress
import math
import struct
import uuid
from collections.abc import Callable
from typing import Any

import asyncpg
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# PostgreSQL takes any character but NUL; half a surrogate is none.
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
word = st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True)


def integers(bits: int) -> SearchStrategy[int]:
    """Integers of that many bits, with sign."""
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


doubles = st.floats(width=64)
singles = st.floats(width=32)
finite = st.floats(-1e6, 1e6)

numerics = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False),
    st.builds(lambda digits, scale: decimal.Decimal(digits).scaleb(-scale), st.integers(), st.integers(-200, 300)),
    st.sampled_from([decimal.Decimal(text) for text in ("NaN", "Infinity", "-Infinity", "0E-20", "-0", "1E+400")]),
)

zones = st.one_of(
    st.just(datetime.UTC),
    st.integers(-15 * 60 + 1, 15 * 60 - 1).map(lambda m: datetime.timezone(datetime.timedelta(minutes=m))),
)
dates = st.one_of(st.dates(), st.sampled_from([datetime.date.min, datetime.date.max]))
times = st.times()
zoned_times = st.times(timezones=zones)
timestamps = st.one_of(st.datetimes(), st.sampled_from([datetime.datetime.min, datetime.datetime.max]))
# Away from the ends of datetime's range: there a zone would lead out of it.
zoned_timestamps = st.one_of(
    st.datetimes(datetime.datetime(2, 1, 1), datetime.datetime(9998, 1, 1), timezones=zones),
    st.sampled_from([datetime.datetime.min, datetime.datetime.max]).map(lambda end: end.replace(tzinfo=datetime.UTC)),
)
intervals = st.timedeltas(datetime.timedelta(days=-(10**6)), datetime.timedelta(days=10**6))

inets = st.one_of(
    st.ip_addresses(),
    st.builds(
        lambda address, bits: ipaddress.ip_interface(f"{address}/{bits}"), st.ip_addresses(v=4), st.integers(0, 32)
    ),
    st.builds(
        lambda address, bits: ipaddress.ip_interface(f"{address}/{bits}"), st.ip_addresses(v=6), st.integers(0, 128)
    ),
)
cidrs = inets.map(lambda address: ipaddress.ip_network(address, strict=False))
macs = st.binary(min_size=6, max_size=6).map(lambda data: data.hex(":"))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)

points = st.builds(asyncpg.Point, finite, finite)
pairs = st.tuples(finite, finite)
geometry: dict[str, SearchStrategy[Any]] = {
    "point": points,
    "box": st.builds(asyncpg.Box, pairs, pairs),
    "line": st.builds(asyncpg.Line, st.floats(0.001, 1e6), finite, finite),
    "lseg": st.builds(asyncpg.LineSegment, pairs, pairs),
    "path": st.builds(
        lambda points, closed: asyncpg.Path(*points, is_closed=closed),
        st.lists(pairs, min_size=1, max_size=5),
        st.booleans(),
    ),
    "polygon": st.lists(pairs, min_size=1, max_size=5).map(lambda points: asyncpg.Polygon(*points)),
    "circle": st.builds(asyncpg.Circle, pairs, st.floats(0, 1e6)),
}

bits = st.text("01", max_size=40).map(asyncpg.BitString)


def bits_of(length: int) -> SearchStrategy[asyncpg.BitString]:
    """Bit strings of one length."""
    return st.text("01", min_size=length, max_size=length).map(asyncpg.BitString)


def ranges(values: SearchStrategy[Any]) -> SearchStrategy[asyncpg.Range[Any]]:
    """Ranges: empty, with and without bounds, inclusive and not."""
    ends = st.tuples(values, values).map(sorted)

    def build(bounds: list[Any], low: bool, high: bool, low_inc: bool, high_inc: bool) -> asyncpg.Range[Any]:
        lower, upper = bounds
        return asyncpg.Range(lower if low else None, upper if high else None, lower_inc=low_inc, upper_inc=high_inc)

    flags = [st.booleans()] * 4
    return st.one_of(st.just(asyncpg.Range(empty=True)), st.builds(build, ends, *flags))


def multiranges(values: SearchStrategy[Any]) -> SearchStrategy[list[asyncpg.Range[Any]]]:
    """Multiranges, as the lists that asyncpg takes; the server sorts and joins them."""
    return st.lists(ranges(values), max_size=4)


def arrays(values: SearchStrategy[Any]) -> SearchStrategy[list[Any]]:
    """Arrays: empty, with NULLs, of one to three dimensions."""
    item = st.none() | values
    flat = st.lists(item, max_size=4)

    def boxes(shape: tuple[int, ...]) -> SearchStrategy[list[Any]]:
        inner = item if len(shape) == 1 else boxes(shape[1:])
        return st.lists(inner, min_size=shape[0], max_size=shape[0])

    shapes = st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple)
    return flat | shapes.flatmap(boxes)


SCALARS: dict[str, SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int2": integers(16),
    "int4": integers(32),
    "int8": integers(64),
    "numeric": numerics,
    "numeric(20,5)": st.decimals(-(10**14), 10**14, places=5),
    "float4": singles,
    "float8": doubles,
    "text": text,
    "varchar(20)": text,
    "char(5)": st.text("abc", max_size=5),
    '"char"': st.characters(min_codepoint=1, max_codepoint=127).map(str.encode),
    "name": word,
    "bytea": st.binary(max_size=40),
    "uuid": st.uuids(),
    "date": dates,
    "time": times,
    "timetz": zoned_times,
    "timestamp": timestamps,
    "timestamptz": zoned_timestamps,
    "timestamptz(2)": zoned_timestamps.filter(lambda value: 1 < value.year < 9999),
    "interval": intervals,
    "inet": inets,
    "cidr": cidrs,
    "macaddr": macs,
    "macaddr8": st.binary(min_size=8, max_size=8).map(lambda data: data.hex(":")),
    "bit(7)": bits_of(7),
    "varbit": bits,
    "money": st.decimals(-(10**12), 10**12, places=2).map(str),
    "tsvector": st.lists(word, max_size=4).map(" ".join),
    "tsquery": st.lists(word, max_size=4).map(" & ".join),
    "pg_lsn": st.integers(0, 2**63 - 1),
    "oid": st.integers(0, 2**32 - 1),
    "regclass": st.sampled_from(["pg_class", "pg_type"]),
    "jsonpath": word.map("$.{}".format),
    "xid8": st.integers(0, 2**62),
    **geometry,
}


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in type and content: NaN is NaN, -0.0 is not 0.0, 1.0 is not 1.00, nor 1 True."""
    if isinstance(one, asyncpg.Record):
        # The one thing that may differ: asyncpg's rows cannot travel, raypg's can.
        from raypg import Row

        return (
            isinstance(other, Row)
            and list(one.keys()) == list(other.keys())
            and _all_same(one.values(), other.values())
        )
    if type(one) is not type(other):
        return False
    comparison: Callable[[Any, Any], bool] | None = _COMPARISONS.get(type(one))
    return bool(comparison(one, other) if comparison else one == other)


def _all_same(ones: Any, others: Any) -> bool:
    ones, others = list(ones), list(others)
    return len(ones) == len(others) and all(map(same, ones, others))


def _same_range(one: Any, other: Any) -> bool:
    flags = ("isempty", "lower_inc", "upper_inc", "lower_inf", "upper_inf")
    if any(getattr(one, flag) != getattr(other, flag) for flag in flags):
        return False
    return same(one.lower, other.lower) and same(one.upper, other.upper)


_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    float: lambda one, other: (
        struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    ),
    decimal.Decimal: lambda one, other: one.as_tuple() == other.as_tuple(),
    datetime.datetime: lambda one, other: one == other and one.utcoffset() == other.utcoffset(),
    datetime.time: lambda one, other: one == other and one.utcoffset() == other.utcoffset(),
    asyncpg.pgproto.pgproto.UUID: lambda one, other: one == other and isinstance(one, uuid.UUID),
    asyncpg.Range: _same_range,
    asyncpg.Path: lambda one, other: one == other and one.is_closed == other.is_closed,
    asyncpg.BitString: lambda one, other: one == other and len(one) == len(other),
    list: _all_same,
    tuple: _all_same,
    dict: lambda one, other: list(one) == list(other) and _all_same(one.values(), other.values()),
}
