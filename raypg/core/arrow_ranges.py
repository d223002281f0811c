"""Which values of an Arrow type PostgreSQL's type has, for types that hold more than it, or count in other units."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

NUMBER: Final = "22003"  # numeric_value_out_of_range
TIME: Final = "22008"  # datetime_field_overflow

TEXT: Final = "22001"  # string_data_right_truncation

LONGEST: Final = {"name": 63, "char": 1}
"""Types whose casts from text cut it, even in an assignment → bytes that they hold."""

_FIRST_DAY: Final = -2_440_588
"""Of ``date`` and ``timestamp``: 4714-11-24 BC, in days since 1970. Of ``timestamp`` the last moment is behind what
Arrow's microseconds can tell. https://www.postgresql.org/docs/18/datatype-datetime.html"""

_LAST_DAY: Final = 2_145_042_905
"""Of ``date``: 5874897-12-31."""

_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY: Final = 86_400


def limits(given: pa.DataType, to: pa.DataType) -> tuple[int, int] | None:
    """(lowest, highest) value of *given* that there is in *to*, as the whole number that Arrow stores; ``None`` if all
    are.

    Args:
        to: a type that :func:`raypg.core.arrow_types.way` names for *given*.
    """
    allowed = _allowed(given, to)
    if allowed is None:
        return None
    least, most = _whole(given)
    low, high = max(allowed[0], least), min(allowed[1], most)
    return None if (low, high) == (least, most) else (low, high)


def sqlstate(to: pa.DataType) -> str:
    """What the server says of a value that is out of the range of *to*, or too long for its text."""
    if pa.types.is_temporal(to):
        return TIME
    return NUMBER if pa.types.is_primitive(to) else TEXT


def _allowed(given: pa.DataType, to: pa.DataType) -> tuple[int, int] | None:
    types = pa.types
    if types.is_integer(given) and types.is_integer(to):
        return _whole(to)
    if types.is_date32(given):
        return _FIRST_DAY, _LAST_DAY
    if types.is_date64(given):
        return _FIRST_DAY * _DAY * 1000, (_LAST_DAY + 1) * _DAY * 1000 - 1
    if types.is_time(given):
        return 0, _DAY * _PER_SECOND[given.unit]
    least, most = _whole(pa.int64())
    if types.is_timestamp(given):
        least = _FIRST_DAY * _DAY * _PER_SECOND["us"]
    elif not types.is_duration(given):
        return None
    # Microseconds as they are stored, in the units of *given*.
    there, here = _PER_SECOND["us"], _PER_SECOND[given.unit]
    return -(-least * here // there), most * here // there


def _whole(kind: pa.DataType) -> tuple[int, int]:
    bits = kind.bit_width
    return (0, 2**bits - 1) if pa.types.is_unsigned_integer(kind) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
