"""PostgreSQL's values as JSON."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import ip_address
from typing import Any

import pytest
from asyncpg import BitString, Box, Circle, Path, Point, Range

from raypg.json_values import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (2**63 - 1, 9223372036854775807),
        (1.5, 1.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (Decimal("12345678901234567890.10"), "12345678901234567890.10"),
        (Decimal("1E+3"), "1000"),
        (Decimal("NaN"), "NaN"),
        ("text", "text"),
        (date(2020, 1, 2), "2020-01-02"),
        (time(1, 2, 3), "01:02:03"),
        (datetime(2020, 1, 2, 3, 4, 5, 6, UTC), "2020-01-02T03:04:05.000006+00:00"),
        (timedelta(0), "PT0S"),
        (timedelta(3), "P3D"),
        (timedelta(3, 4, 500_000), "P3DT4.5S"),
        (timedelta(seconds=-1), "-PT1S"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (ip_address("10.0.0.1"), "10.0.0.1"),
        (b"\x00\xff", "AP8="),
        ([1, [Decimal("2.5"), None]], [1, ["2.5", None]]),
        ({"a": Decimal(1)}, {"a": "1"}),
        (Range(1, 5, lower_inc=True, upper_inc=False), {"lower": 1, "upper": 5, "bounds": "[)"}),
        (Range(None, Decimal("2")), {"lower": None, "upper": "2", "bounds": "()"}),
        (Range(empty=True), {"lower": None, "upper": None, "bounds": "empty"}),
        (BitString("1010 1"), "10101"),
        (Point(1, 2), [1.0, 2.0]),
        (Box(Point(1, 2), Point(0, 0)), [[1.0, 2.0], [0.0, 0.0]]),
        (Circle(Point(1, 2), 3), [[1.0, 2.0], 3.0]),
        (Path(Point(1, 2), Point(3, 4)), [[1.0, 2.0], [3.0, 4.0]]),
    ],
)
def test_values(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)
