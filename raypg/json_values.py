"""What PostgreSQL's values become in JSON: exact, or as text.

| PostgreSQL | JSON |
|---|---|
| smallint, integer, bigint, boolean, text, null | number, boolean, string, null |
| real, double precision | number; NaN and infinities are strings |
| numeric, money | string with all digits |
| date, time, timestamp (with time zone) | string of ISO 8601 |
| interval | string of ISO 8601, as ``P3DT4.5S`` or ``-PT1S``; a month counts as 30 days |
| uuid, inet, cidr, macaddr, bit | string |
| json, jsonb | string with the document |
| bytea | string of base64 |
| array | array |
| composite | object |
| range, multirange | object with ``lower``, ``upper``, ``bounds``; array of them |
| geometric types | array of numbers and points |
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """*value*, as JSON can hold it."""
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else str(value)
    if kind is dict or isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if kind is list or kind is tuple:
        return [plain(part) for part in value]
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    return _other(value)


def _duration(value: timedelta) -> str:
    if value < timedelta():
        return f"-{_duration(-value)}"
    seconds = Decimal(value.seconds) + Decimal(value.microseconds) / 1_000_000
    days = f"{value.days}D" if value.days else ""
    return f"P{days}" if days and not seconds else f"P{days}T{seconds:f}S"


def _other(value: Any) -> Any:
    """Types of asyncpg's own, by what they have: it is not imported here."""
    if hasattr(value, "items") and hasattr(value, "keys"):  # a row, or a composite
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple):  # geometry: a point is a tuple of two numbers, a circle one of a point and a number
        return [plain(part) for part in value]
    if hasattr(value, "points"):  # path, polygon
        return [plain(point) for point in value.points]
    if hasattr(value, "lower_inc"):
        if value.isempty:
            return {"lower": None, "upper": None, "bounds": "empty"}
        bounds = ("[" if value.lower_inc else "(") + ("]" if value.upper_inc else ")")
        return {"lower": plain(value.lower), "upper": plain(value.upper), "bounds": bounds}
    if hasattr(value, "as_string"):  # bits
        return str(value.as_string()).replace(" ", "")
    return str(value)
