"""Messages as bytes: what travels as it is, what travels by value, and what must not spoil the rest."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import subprocess
import sys
import uuid
import zoneinfo
from typing import Any

import asyncpg
import pytest

from raypg.packing import Unsendable, pack, unpack

PLAIN: list[Any] = [
    None,
    True,
    1,
    1.5,
    "ä",
    b"\0",
    bytearray(b"x"),
    [1, [None, "x"]],
    {"a": 1},
    {1, 2},
    frozenset({1}),
    decimal.Decimal("1.50"),
    uuid.uuid4(),
    ipaddress.ip_network("10.0.0.0/8"),
    datetime.date(2026, 1, 2),
    datetime.timedelta(1),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    asyncpg.Range(1, 5),
    asyncpg.BitString("101"),
    asyncpg.Point(1, 2),
    asyncpg.Box((1, 2), (3, 4)),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_values_arrive_as_they_are(value: Any) -> None:
    arrived = unpack(pack(value))
    assert arrived == value
    assert type(arrived) is type(value)


def test_a_memoryview_arrives_as_bytes() -> None:
    assert unpack(pack(memoryview(b"abc"))) == b"abc"


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("not this one")


@pytest.mark.parametrize(
    "value", [sys._getframe(), (i for i in ()), lambda: 1, Unpicklable()], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_sent_is_replaced_and_its_neighbours_arrive(value: Any) -> None:
    first, stand_in, last = unpack(pack(("first", value, "last")))
    assert (first, last) == ("first", "last")
    assert isinstance(stand_in, Unsendable)
    assert "cannot be sent" in repr(stand_in)


def test_a_class_of_the_callers_main_module_travels_by_value() -> None:
    class Color(enum.StrEnum):
        RED = "red"

    # In another process, which knows no such class.
    script = "import sys; from raypg.packing import unpack; print(*unpack(sys.stdin.buffer.read()))"
    data = pack((Color.RED, "and red"))
    answer = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True).stdout
    assert answer.decode().split() == ["red", "and", "red"]
