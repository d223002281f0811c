"""Which PostgreSQL type takes which Arrow type, and by what way: the one table of types.

The binary form of a value in COPY is that of PostgreSQL's ``…_recv`` functions; many types share one. A column goes
*direct* if Arrow's values can be written in the form of its very type; otherwise they are staged under a type that has
such a form, and the server casts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from raypg.errors import IncompatibleDataError

Convert = Literal["", "uuid", "json", "interval", "array"]
"""What has to be done to the values beyond a cast of Arrow's."""


class Column(NamedTuple):
    """A column of a table, as the catalogue tells.

    Attributes:
        name: as it is, not quoted.
        type: name of its type without length; of a domain, of the type below it.
        kind: ``pg_type.typtype`` of that.
        element: of an array, the name of its elements' type.
        shown: its type as users write it, with length or precision.
        cast: its type as text for a cast, without length, and of a domain the type below it: a cast would cut what is
            too long, for the domain too; an assignment refuses it.
        needed: NOT NULL and without a default.
        identity: ``a`` (always), ``d`` (by default) or nothing.
        generated: whether it is computed from others.
    """

    name: str
    type: str
    kind: str
    element: str
    shown: str
    cast: str
    needed: bool
    identity: str
    generated: bool


class Way(NamedTuple):
    """How the values of a column travel.

    Attributes:
        to: the Arrow type to cast them to first.
        type: the PostgreSQL type whose binary form they then have.
        direct: whether the column itself takes that form.
        convert: see :data:`Convert`.
    """

    to: pa.DataType
    type: str
    direct: bool = True
    convert: Convert = ""


INTEGERS = {"int2": pa.int16(), "int4": pa.int32(), "int8": pa.int64()}
FLOATS = {"float4": pa.float32(), "float8": pa.float64()}
TEXTS = frozenset({"text", "varchar", "bpchar", "name", "citext", "json", "xml"})
"""Types whose binary form is the text itself; so it is for every enum."""
DOCUMENTS = frozenset({"json", "jsonb"})
CASTS_FROM_INTEGER = frozenset({"oid", "money"})
CASTS_FROM_ARRAY = frozenset({"vector", "halfvec"})
NAIVE, ZONED = "timestamp", "timestamptz"
MOST_DIGITS = 38
"""Of a decimal128."""


def plain(kind: pa.DataType) -> pa.DataType:
    """*kind* without its encoding: of a dictionary, the type of what it holds."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def parts(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types that values of the nested type *kind* are made of; of any other, nothing."""
    if pa.types.is_map(kind):
        yield from (kind.key_type, kind.item_type)
    elif pa.types.is_struct(kind) or pa.types.is_union(kind):
        yield from (kind.field(i).type for i in range(kind.num_fields))
    elif _is_nested(kind):
        yield kind.value_type


def without_json(kind: pa.DataType) -> pa.DataType | None:
    """The first type inside of *kind* that has no JSON: bytes; ``None`` if there is none."""
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid":
        return None  # Python shows it as text
    kind = plain(kind)
    return kind if is_bytes(kind) else next(filter(None, map(without_json, parts(kind))), None)


def way(given: pa.DataType, column: Column) -> Way:
    """How values of the Arrow type *given* get into *column*.

    Raises:
        IncompatibleDataError: they cannot; names both types, and what would do.
    """
    kind = plain(given)
    if pa.types.is_null(kind):
        return Way(pa.string(), "text")  # NULL looks the same in every type
    found = _scalar(kind, column.type, column.kind) if not _is_list(kind) else _list(kind, column)
    if found is None and column.type in DOCUMENTS and _is_nested(kind) and without_json(kind) is None:
        found = Way(pa.string(), column.type if column.type == "jsonb" else "text", True, "json")
    if found is None and is_text(kind) and column.kind != "c":
        found = Way(pa.large_string() if _is_large(kind) else pa.string(), "text", False)
    if found is None:
        raise IncompatibleDataError(
            f"column {column.name!r}: Arrow type {given} does not fit PostgreSQL type {column.shown}; "
            f"{_advice(kind, column)}",
            column.name,
            str(given),
            column.shown,
        )
    return found


def _scalar(kind: pa.DataType, type_: str, typtype: str) -> Way | None:
    """The way into a type that is no array, if there is one better than text."""
    types = pa.types
    if type_ in TEXTS or typtype == "e":
        if is_text(kind):
            return Way(pa.large_string() if _is_large(kind) else pa.string(), "text")
        return None
    if types.is_integer(kind):
        return _integer(kind, type_)
    if types.is_floating(kind):
        if type_ in FLOATS:
            return Way(FLOATS[type_], type_)
        return Way(pa.float64(), "float8", False) if type_ == "numeric" else None
    if types.is_decimal(kind):
        return _decimal(kind, type_)
    if types.is_boolean(kind):
        return Way(kind, "bool") if type_ == "bool" else None
    if is_text(kind):
        if type_ == "jsonb":
            return Way(pa.large_string() if _is_large(kind) else pa.string(), "jsonb")
        return Way(pa.binary(16), "uuid", True, "uuid") if type_ == "uuid" else None
    if is_bytes(kind):
        if type_ == "uuid" and kind == pa.binary(16):
            return Way(kind, "uuid")
        to = kind if types.is_fixed_size_binary(kind) or types.is_large_binary(kind) else pa.binary()
        return Way(to, "bytea") if type_ == "bytea" else None
    return _time(kind, type_)


def _integer(kind: pa.DataType, type_: str) -> Way | None:
    if type_ in INTEGERS:
        return Way(INTEGERS[type_], type_)
    if type_ in FLOATS:
        return Way(FLOATS[type_], type_)
    if type_ == "numeric":
        return Way(kind, "numeric") if kind == pa.uint64() else Way(pa.decimal128(19, 0), "numeric")
    return Way(pa.int64(), "int8", False) if type_ in CASTS_FROM_INTEGER else None


def _decimal(kind: pa.DataType, type_: str) -> Way | None:
    if type_ not in ("numeric", "money"):
        return None
    scale = max(kind.scale, 0)
    digits = kind.precision + scale - kind.scale
    if digits > MOST_DIGITS:
        return Way(pa.string(), "text", False)
    return Way(pa.decimal128(digits, scale), "numeric", type_ == "numeric")


def _time(kind: pa.DataType, type_: str) -> Way | None:
    types = pa.types
    if types.is_date(kind):
        return Way(pa.date32(), "date") if type_ == "date" else None
    if types.is_time(kind):
        return Way(pa.time64("us"), "time") if type_ == "time" else None
    if types.is_timestamp(kind):
        zoned = kind.tz is not None
        return Way(pa.timestamp("us", kind.tz), type_) if type_ == (ZONED if zoned else NAIVE) else None
    if types.is_duration(kind):
        return Way(pa.duration("us"), "interval") if type_ == "interval" else None
    if types.is_interval(kind):
        return Way(pa.string(), "text", False, "interval") if type_ == "interval" else None
    return None


def _list(kind: pa.DataType, column: Column) -> Way | None:
    inner = plain(kind.value_type)
    if column.type in CASTS_FROM_ARRAY:
        return Way(pa.list_(pa.float32()), "float4[]", False) if pa.types.is_floating(inner) else None
    if not column.element or (_is_nested(inner) and not _is_list(inner)):
        return None
    if _is_list(inner):
        while _is_list(inner):
            inner = plain(inner.value_type)
        if is_bytes(inner) and column.element in TEXTS:
            return None
        return Way(pa.string(), "text", False, "array")
    found = _scalar(inner, column.element, "b")
    if found is None:
        return Way(pa.list_(pa.string()), "text[]", False) if is_text(inner) else None
    if found.convert or found.type in (ZONED, "jsonb", "uuid"):
        return Way(pa.string(), "text", False, "array")
    return Way(pa.list_(found.to), f"{found.type}[]", found.direct and found.type == column.element)


def _advice(kind: pa.DataType, column: Column) -> str:
    if pa.types.is_timestamp(kind) and column.type in (NAIVE, ZONED):
        if kind.tz is None:
            return "it has no time zone, and none is guessed: pyarrow.compute.assume_timezone(…) gives it one"
        return "pyarrow.compute.local_timestamp(…) takes its time zone away"
    if column.kind == "c":
        return "composite types are not written; use jsonb, or one column for each part"
    if column.type in DOCUMENTS and (part := without_json(kind)) is not None:
        return f"JSON has no bytes: make a string of what is {part}, in hexadecimal or base64"
    if _is_nested(kind):
        return "nested values go into json, jsonb and arrays"
    return f"cast it: table.set_column(…, {column.name!r}, table[{column.name!r}].cast(…)), or write it as a string"


def is_text(kind: pa.DataType) -> bool:
    """Whether its values are texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view())


def is_bytes(kind: pa.DataType) -> bool:
    """Whether its values are bytes."""
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or kind == pa.binary_view()
    )


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_nested(kind: Any) -> bool:
    return bool(pa.types.is_nested(kind))
