"""Binary COPY becomes Arrow: rows are found whatever their values look like, and values are those of PostgreSQL."""

from __future__ import annotations

import itertools
import struct
import time
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.arrow_columns import NATIVE, Column, column_of
from raypg.core.copy_binary import HEADER, SIGNATURE, CopyDecoder
from raypg.core.copy_rows import KEY_ENDS_WITH, TRAILER
from raypg.errors import ArrowValueError, RaypgError

KEY = 0x123400 | KEY_ENDS_WITH
BEGIN = SIGNATURE + bytes(8)
INT8 = column_of("n", 20, "int8", False)
TEXT = column_of("t", 25, "text", False)
BYTES = column_of("b", 17, "bytea", False)


def message(values: list[bytes | None], key: int | None = KEY) -> bytes:
    """One row as the server sends it."""
    fields = values if key is None else [struct.pack(">i", key), *values]
    sent = struct.pack(">h", len(fields))
    for field in fields:
        sent += struct.pack(">i", -1) if field is None else struct.pack(">i", len(field)) + field
    return sent


def number(value: int | None) -> bytes | None:
    return None if value is None else struct.pack(">q", value)


def decoded(columns: list[Column], rows: list[list[bytes | None]], cuts: list[int] = []) -> list[dict[str, Any]]:  # noqa: B006
    """*rows*, cut into pieces before those numbers, decoded."""
    decoder = CopyDecoder(columns, KEY)
    key = KEY if NATIVE.get(columns[0].oid) is None else None
    messages = [BEGIN, *(message(row, key) for row in rows), TRAILER]
    edges = [0, *sorted({min(cut, len(messages)) for cut in cuts}), len(messages)]
    batches = [decoder.decode(b"".join(messages[a:b])) for a, b in itertools.pairwise(edges) if a < b]
    return pa.Table.from_batches([batch for batch in batches if batch is not None], decoder.schema).to_pylist()


# What looks like a key, a header, a trailer or a length, and parts of that.
tricky = st.sampled_from(
    [
        *(message([None, b"x"]), message([])[2:], TRAILER, b"\xf9", struct.pack(">i", KEY), b"\0\0\0\4"),
        *(message([number(1), b"y"], None), message([None, b"z"], None), b"\0\2\0\0\0\x08", b"\0\2\xff\xff\xff\xff"),
    ]
)
blob = st.lists(st.one_of(st.binary(max_size=12), tricky), max_size=4).map(b"".join)


@given(
    st.lists(st.tuples(st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | blob), max_size=40),
    st.lists(st.integers(1, 40), max_size=3),
)
def test_rows_are_found_whatever_is_in_them(rows: list[tuple[int | None, bytes | None]], cuts: list[int]) -> None:
    found = decoded([INT8, BYTES], [[number(n), b] for n, b in rows], cuts)
    assert found == [{"n": n, "b": b} for n, b in rows]


@given(
    st.lists(st.tuples(st.none() | blob, st.none() | st.integers(-(2**63), 2**63 - 1)), max_size=40),
    st.lists(st.integers(1, 40), max_size=3),
)
def test_and_by_a_key_where_the_first_column_has_any_width(
    rows: list[tuple[bytes | None, int | None]], cuts: list[int]
) -> None:
    found = decoded([BYTES, INT8], [[b, number(n)] for b, n in rows], cuts)
    assert found == [{"b": b, "n": n} for b, n in rows]


def test_a_whole_copy_within_a_value_takes_no_longer() -> None:
    inner = b"".join(message([number(n), b"inner"], None) for n in range(20_000))
    rows = [[number(1), inner], [number(2), b"outer"], [None, inner], [number(4), None]]
    started = time.process_time()
    found = decoded([INT8, BYTES], rows)
    assert time.process_time() - started < 2, "it was walked through a row in each round"
    assert found == [{"n": n, "b": b} for n, b in zip([1, 2, None, 4], [inner, b"outer", inner, None], strict=True)]


@given(st.lists(st.tuples(*[st.sampled_from([None, 0, 4, 8, 0x400000008, 0x4FFFFFFFF, -1])] * 4), max_size=40))
def test_numbers_that_look_like_the_beginning_of_a_row(rows: list[tuple[int | None, ...]]) -> None:
    """Four columns of eight bytes, and the values that their headers are made of."""
    columns = [column_of(name, 20, "int8", False) for name in "abcd"]
    assert decoded(columns, [list(map(number, row)) for row in rows]) == [
        dict(zip("abcd", row, strict=True)) for row in rows
    ]


EVERY = [
    (column_of("id", 20, "int8", False), st.integers(-(2**63), 2**63 - 1), struct.Struct(">q")),
    (column_of("small", 21, "int2", False), st.integers(-(2**15), 2**15 - 1), struct.Struct(">h")),
    (column_of("label", 17, "bytea", False), blob, None),
    (column_of("more", 17, "bytea", False), blob, None),
    (column_of("count", 23, "int4", False), st.integers(-(2**31), 2**31 - 1), struct.Struct(">i")),
    (column_of("score", 701, "float8", False), st.floats(allow_nan=False), struct.Struct(">d")),
    (column_of("so", 16, "bool", False), st.booleans(), struct.Struct(">?")),
]


@given(
    st.data(),
    st.lists(st.sampled_from(range(len(EVERY))), min_size=1, max_size=7, unique=True),
    st.sampled_from([0, 1, 10]),
    st.lists(st.integers(1, 60), max_size=3),
)
def test_values_of_fixed_and_other_widths_side_by_side(
    data: st.DataObject, which: list[int], nulls: int, cuts: list[int]
) -> None:
    """Columns in any order, and no, few or many NULLs among them."""
    columns = [EVERY[number] for number in which]
    null = st.integers(0, 19).map(lambda drawn: drawn < nulls)
    rows = data.draw(
        st.lists(
            st.tuples(
                *(st.tuples(null, values).map(lambda drawn: None if drawn[0] else drawn[1]) for _, values, _ in columns)
            ),
            max_size=60,
        )
    )
    sent: list[list[bytes | None]] = [
        [
            value if value is None or packed is None else packed.pack(value)
            for value, (_, _, packed) in zip(row, columns, strict=True)
        ]
        for row in rows
    ]
    named = [column for column, _, _ in columns]
    names = [column.name for column in named]
    assert decoded(named, sent, cuts) == [dict(zip(names, row, strict=True)) for row in rows]


def test_a_null_in_the_first_column_after_many_rows_without() -> None:
    rows: list[list[bytes | None]] = [[number(n), b"x"] for n in range(100)]
    rows += [[None, b"y"], [number(1), None], [None, None]]
    assert [row["n"] for row in decoded([INT8, BYTES], rows, [50])] == [*range(100), None, 1, None]


@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=30))
def test_texts(values: list[str | None]) -> None:
    rows = [[None if value is None else value.encode()] for value in values]
    assert decoded([TEXT], rows) == [{"t": value} for value in values]


def test_a_last_value_that_looks_like_the_trailer() -> None:
    for last in (None, b"", b"\xff\xff", b"\xff\xff\xff\xff"):
        assert decoded([BYTES], [[b"a"], [last]]) == [{"b": b"a"}, {"b": last}]
        assert decoded([BYTES], [[b"a"], [last]], [3]) == [{"b": b"a"}, {"b": last}]  # the trailer comes by itself


def test_no_rows() -> None:
    assert decoded([INT8, TEXT], []) == []
    assert decoded([INT8, TEXT], [], [1]) == []


def array(*elements: bytes | None, dimensions: int = 1) -> bytes:
    """An array in PostgreSQL's format; without dimensions it is empty."""
    head = struct.pack(">iii", dimensions, any(e is None for e in elements), 25)
    head += struct.pack(">ii", len(elements), 1) * dimensions
    return head + b"".join(struct.pack(">i", -1) if e is None else struct.pack(">i", len(e)) + e for e in elements)


@given(st.lists(st.none() | st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=50), max_size=80))
def test_arrays_of_numbers(rows: list[list[int | None] | None]) -> None:
    sent = [[None if row is None else array(*map(number, row), dimensions=bool(row))] for row in rows]
    assert decoded([column_of("a", 1016, "int8[]", True)], sent) == [{"a": row} for row in rows]


@given(st.lists(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=80))
def test_arrays_of_texts(rows: list[list[str | None]]) -> None:
    sent = [[array(*(e if e is None else e.encode() for e in row), dimensions=bool(row))] for row in rows]
    assert decoded([column_of("a", 1009, "text[]", True)], sent) == [{"a": row} for row in rows]


@pytest.mark.parametrize(
    ("oid", "value", "said"),
    [
        (1114, struct.pack(">q", 2**63 - 1), "infinity"),
        (1184, struct.pack(">q", -(2**63)), "infinity"),
        (1114, struct.pack(">q", 2**63 - 2), "after 294246"),
        (1082, struct.pack(">i", 2**31 - 1), "infinity"),
        (1186, struct.pack(">qii", 2**63 - 1, 2**31 - 1, 2**31 - 1), "292 years"),
        (1007, array(b"\0\0\0\1", dimensions=2), "2 dimensions"),
    ],
)
def test_what_arrow_cannot_express_is_an_error_that_names_the_column(oid: int, value: bytes, said: str) -> None:
    column = column_of("when", oid, "its type", oid == 1007)
    with pytest.raises(ArrowValueError, match=f"'when' .its type.*{said}"):
        decoded([column], [[value]])
    assert decoded([column], [[None]]) == [{"when": None}]


@pytest.mark.parametrize("text", ["NaN", "-Infinity"])
def test_numbers_that_are_none_do_not_become_a_decimal(text: str) -> None:
    column = column_of("price", 1700, "numeric", False, (10, 2))
    assert column.arrow == pa.decimal128(10, 2)
    with pytest.raises(ArrowValueError, match=rf"'price' .numeric\(10,2\).* holds {text}"):
        decoded([column], [[b"1.50"], [text.encode()], [None]])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PGCOPY",
        b"a text\n" * 10,
        BEGIN + message([b"1"])[:-1],
        BEGIN + message([b"1"], key=KEY + 1),
        BEGIN + b"x",
        BEGIN + message([number(1)], None) + message([b"1"], None),
        BEGIN + message([number(0), b""], None)[:-4],
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    for columns in ([BYTES], [INT8], [INT8, BYTES]):
        with pytest.raises(RaypgError, match=r"binary format|whole rows"):
            CopyDecoder(columns, KEY).decode(data)


def test_a_header_may_be_longer() -> None:
    decoder = CopyDecoder([BYTES], KEY)
    batch = decoder.decode(SIGNATURE + struct.pack(">ii", 0, 3) + b"abc" + message([b"x"]) + TRAILER)
    assert batch is not None
    assert batch.to_pylist() == [{"b": b"x"}]
    assert len(BEGIN) == HEADER
