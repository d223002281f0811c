"""What keeps results apart and safe in a cache: keys by value *and* type, sizes, and values that callers may change."""

from __future__ import annotations

import copy
import datetime
import decimal
import ipaddress
import sys
import uuid
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import asyncpg

from raypg.core.sql import CLOCK_WORDS

__all__ = ["kept", "key_of", "names_the_clock", "size_of"]

# Equal means the same to PostgreSQL, once the type is the same too.
_PLAIN: Final = frozenset((int, str, bytes, bool, type(None)))

_AS_TEXT: Final[dict[type, Callable[[Any], str]]] = {
    float: repr,  # 0.0 and -0.0; NaN is not equal to itself
    decimal.Decimal: str,  # 1.0 and 1.00
    datetime.date: str,
    datetime.time: str,
    datetime.datetime: str,  # of the same moment in two zones
    datetime.timedelta: repr,
    uuid.UUID: str,
}
"""Types of which equal values may mean different things; their texts do not."""

_UNCHANGEABLE: Final = frozenset(
    {
        *_PLAIN,
        *_AS_TEXT,
        asyncpg.BitString,
        asyncpg.Box,
        asyncpg.Circle,
        asyncpg.Line,
        asyncpg.LineSegment,
        asyncpg.Path,
        asyncpg.Point,
        asyncpg.Polygon,
        ipaddress.IPv4Address,
        ipaddress.IPv4Interface,
        ipaddress.IPv4Network,
        ipaddress.IPv6Address,
        ipaddress.IPv6Interface,
        ipaddress.IPv6Network,
    }
)

_NESTED: Final = 16
"""Levels of lists in a parameter; PostgreSQL's arrays have 6 at most."""


def key_of(query: str, arguments: tuple[Any, ...], settings: Hashable) -> Hashable:
    """The key of a statement with its parameters and settings; ``None`` if one cannot be told apart from others."""
    types = tuple(map(type, arguments))
    if _PLAIN.issuperset(types):
        return query, arguments, types, settings
    parts = [_part(value, 0) for value in arguments]
    return None if None in parts else (query, tuple(parts), types, settings)


def _part(value: Any, depth: int) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in _AS_TEXT:
        return kind, _AS_TEXT[kind](value)
    if kind in (list, tuple) and depth < _NESTED:
        parts = tuple(_part(item, depth + 1) for item in value)
        return None if None in parts else (kind, parts)
    return None  # of a class that we do not know, equality may mean anything


def names_the_clock(arguments: Sequence[Any]) -> bool:
    """Whether a parameter may mean another time each time: PostgreSQL reads ``now`` and ``today`` as dates."""
    return any(
        CLOCK_WORDS.search(value) is not None if type(value) is str else names_the_clock(value)
        for value in arguments
        if type(value) in (str, list, tuple)
    )


def size_of(value: Any) -> int:
    """Bytes that a value takes, with all that is in it; no less than it is, as what is shared is counted each time."""
    size = sys.getsizeof(value)
    if type(value) in _UNCHANGEABLE:
        return size
    if isinstance(value, list | tuple | set | frozenset):
        return size + sum(map(size_of, value))
    if isinstance(value, dict):
        return size + sum(size_of(key) + size_of(item) for key, item in value.items())
    attributes = getattr(value, "__dict__", None)
    return size + (size_of(attributes) if attributes else 0) + getattr(value, "nbytes", 0)


def kept(rows: Sequence[tuple[Any, ...]] | None) -> tuple[list[tuple[Any, ...]], bool] | None:
    """Rows as they can be kept: (rows of our own, whether there are values in them that who gets them may change, so
    that each gets copies); ``None`` if such values cannot be copied."""
    if not rows:
        return [], False
    if all(_UNCHANGEABLE.issuperset(map(type, row)) for row in rows):
        return [tuple(row) for row in rows], False
    try:
        return copy.deepcopy([tuple(row) for row in rows]), True
    except Exception:  # a class of a codec may do anything
        return None
