"""The text form of PostgreSQL's arrays, read and written as asyncpg does it.

https://www.postgresql.org/docs/18/arrays.html#ARRAYS-IO
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, Final

__all__ = ["parse", "render"]

MOST_DIMENSIONS: Final = 6  # MAXDIM of the server

_BOUNDS = re.compile(r"(?:\[[+-]?\d+(?::[+-]?\d+)?\])+=")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_TO_ESCAPE = re.compile(r'(["\\])')


def parse(text: str, decode: Callable[[str], Any] | None = None, delimiter: str = ",") -> list[Any]:
    """The (nested) list that *text*, in the server's own spelling, stands for. Lower bounds are dropped.

    Args:
        decode: makes a value of the text of an element; None keeps the text.
        delimiter: between elements; ``pg_type.typdelim`` of their type.

    Raises:
        ValueError: it is no array.
    """
    bounds = _BOUNDS.match(text)
    position = bounds.end() if bounds else 0
    token = _token(delimiter)
    outermost: list[Any] | None = None
    open_lists: list[list[Any]] = []
    while match := token.match(text, position):
        kind = match.lastgroup
        if not open_lists and (outermost is not None or kind != "open"):
            break
        position = match.end()
        if kind == "open":
            inner: list[Any] = []
            if open_lists:
                open_lists[-1].append(inner)
            else:
                outermost = inner
            open_lists.append(inner)
        elif kind == "close":
            open_lists.pop()
        elif kind != "delimiter":
            value = match[kind or ""]
            if kind == "quoted" and "\\" in value:
                value = _ESCAPED.sub(r"\1", value)
            is_null = kind == "plain" and value.upper() == "NULL"
            open_lists[-1].append(None if is_null else value if decode is None else decode(value))
    if outermost is None or open_lists or position != len(text):
        raise ValueError(f"malformed array literal at position {position + 1}: {text[:100]!r}")
    return outermost


@functools.lru_cache(maxsize=16)
def _token(delimiter: str) -> re.Pattern[str]:
    mark = re.escape(delimiter)
    # Only ASCII's white space is quoted by the server: \s would be more.
    return re.compile(
        rf"(?P<open>\{{)|(?P<close>\}})|(?P<delimiter>{mark})"
        rf'|"(?P<quoted>[^"\\]*(?:\\.[^"\\]*)*)"|(?P<plain>[^{{}}"\\ \t\n\r\v\f{mark}]+)',
        re.DOTALL,
    )


def render(items: Any, encode: Callable[[Any], str] | None = None, delimiter: str = ",") -> str:
    """*items* as text that the server reads as an array. A list inside is a dimension, a tuple an element.

    Args:
        encode: makes a text of an element; None takes strings only.
        delimiter: see :func:`parse`.

    Raises:
        TypeError, ValueError: they are no array; in asyncpg's words.
    """
    if not _is_array(items):
        raise TypeError(f"a sized iterable container expected (got type {type(items).__name__!r})")
    return _render(items, _depth(items), encode, delimiter)


def _render(items: Iterable[Any], depth: int, encode: Callable[[Any], str] | None, delimiter: str) -> str:
    if depth > 1:
        return "{" + delimiter.join(_render(item, depth - 1, encode, delimiter) for item in items) + "}"
    return "{" + delimiter.join("NULL" if item is None else _quoted(item, encode) for item in items) + "}"


def _quoted(item: Any, encode: Callable[[Any], str] | None) -> str:
    try:
        text = item if encode is None else encode(item)
        if not isinstance(text, str):
            raise TypeError(f"expected str, got {type(text).__name__}")
    except TypeError as error:
        raise ValueError(f"invalid array element: {error}") from None
    return '"' + _TO_ESCAPE.sub(r"\\\1", text) + '"'


def _is_array(value: Any) -> bool:
    return (
        isinstance(value, Iterable)
        and isinstance(value, Sized)
        and not isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    )


def _depth(items: Any, above: int = 0) -> int:
    """How many dimensions *items* has, as its first element shows; the others must be like it."""
    if above >= MOST_DIMENSIONS:
        raise ValueError(f"number of array dimensions ({above + 1}) exceed the maximum expected ({MOST_DIMENSIONS})")
    depth, length = 1, None
    for number, item in enumerate(items):
        nested = _is_array(item) and not isinstance(item, tuple)
        if number == 0:
            length = len(item) if nested else None
            depth += _depth(item, above + 1) if nested else 0
        elif (len(item) if nested else None) != length:
            raise ValueError("non-homogeneous array")
    return depth
