"""Which Arrow type a column of PostgreSQL is read as, how it is asked for, and how it is decoded.

What Arrow has no type for (numeric without a precision, enums, ranges, inet, types of extensions …) is asked for as
text: exact, and the same for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from raypg.core.arrow_decode import (
    EPOCH_DAYS,
    EPOCH_MICROSECONDS,
    Decoder,
    NotInArrow,
    Values,
    blobs,
    booleans,
    fixed,
    intervals,
    lists_of,
    since_1970,
    uuids,
)

__all__ = ["NATIVE", "NUMERIC", "Column", "column_of", "decimal_type", "schema_of"]

NUMERIC = 1700
TEXT = 25
"""OIDs of types."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result.

    Attributes:
        name: its name.
        oid: of its type.
        type_name: of its type, for errors.
        arrow: what it is read as.
        decode: makes Arrow's array of its values.
    """

    name: str
    oid: int
    type_name: str
    arrow: pa.DataType
    decode: Decoder

    @property
    def field(self) -> pa.Field:
        """The column in an Arrow schema; what PostgreSQL calls its type is in its metadata."""
        return pa.field(self.name, self.arrow, metadata={"postgresql.type": self.type_name})


@dataclass(frozen=True, slots=True)
class _Kind:
    arrow: pa.DataType
    decode: Decoder
    width: int | None = None


_TEXT = _Kind(pa.string(), blobs())
_JSON = _Kind(pa.string(), blobs(skip=1))
_TIMESTAMP = fixed("i8", since_1970(EPOCH_MICROSECONDS))

_KINDS = {
    16: _Kind(pa.bool_(), booleans, 1),
    17: _Kind(pa.binary(), blobs()),
    19: _TEXT,  # name
    20: _Kind(pa.int64(), fixed("i8"), 8),
    21: _Kind(pa.int16(), fixed("i2"), 2),
    23: _Kind(pa.int32(), fixed("i4"), 4),
    25: _TEXT,
    26: _Kind(pa.uint32(), fixed("u4"), 4),  # oid
    114: _TEXT,  # json
    700: _Kind(pa.float32(), fixed("f4"), 4),
    701: _Kind(pa.float64(), fixed("f8"), 8),
    1042: _TEXT,  # char(n)
    1043: _TEXT,  # varchar
    1082: _Kind(pa.date32(), fixed("i4", since_1970(EPOCH_DAYS)), 4),
    1083: _Kind(pa.time64("us"), fixed("i8"), 8),
    1114: _Kind(pa.timestamp("us"), _TIMESTAMP, 8),
    1184: _Kind(pa.timestamp("us", "UTC"), _TIMESTAMP, 8),
    1186: _Kind(pa.month_day_nano_interval(), intervals, 16),
    2950: _Kind(pa.string(), uuids, 16),
    3802: _JSON,  # jsonb
}

_ARRAYS = {
    1000: 16,
    1001: 17,
    1003: 19,
    1005: 21,
    1007: 23,
    1009: 25,
    1014: 1042,
    1015: 1043,
    1016: 20,
    1021: 700,
    1022: 701,
    1028: 26,
    1115: 1114,
    1182: 1082,
    1183: 1083,
    1185: 1184,
    1187: 1186,
    199: 114,
    2951: 2950,
    3807: 3802,
}
"""OID of an array type → OID of its elements (pg_type, which never changes these)."""


NATIVE: dict[int, int | None] = {oid: kind.width for oid, kind in _KINDS.items()} | dict.fromkeys(_ARRAYS)
"""OIDs of the types that are decoded as the server sends them (it is asked to cast all others to text), with the bytes
of a value if all have the same."""


def column_of(name: str, oid: int, type_name: str, is_array: bool, decimal: tuple[int, int] | None = None) -> Column:
    """How to read a column.

    Args:
        name, oid, type_name: as the server describes it.
        is_array: whether its type is an array.
        decimal: precision and scale of a numeric, if they are known.
    """
    if oid == NUMERIC and decimal is not None and (arrow := decimal_type(*decimal)) is not None:
        return Column(name, oid, f"numeric({decimal[0]},{decimal[1]})", arrow, _decimals)
    kind = _KINDS.get(oid)
    if kind is None and is_array:
        element = _KINDS[_ARRAYS.get(oid, TEXT)]
        kind = _Kind(pa.list_(element.arrow), lists_of(element.decode, element.width))
    kind = kind or _TEXT
    return Column(name, oid, type_name, kind.arrow, kind.decode)


def decimal_type(precision: int, scale: int) -> pa.DataType | None:
    """Arrow's type for numeric(precision, scale); ``None`` if it has none."""
    if not 0 <= scale <= precision:
        return None
    if precision <= 38:
        return pa.decimal128(precision, scale)
    return pa.decimal256(precision, scale) if precision <= 76 else None


def _decimals(column: Values, arrow: pa.DataType) -> pa.Array:
    written = _TEXT.decode(column, pa.string())
    try:
        return written.cast(arrow)
    except pa.ArrowInvalid:
        unusual = written.filter(pc.match_substring_regex(written, "[^0-9.-]"))
        raise NotInArrow(str(unusual[0]) if len(unusual) else "a number of too many digits") from None


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """The Arrow schema of *columns*."""
    return pa.schema([column.field for column in columns])
