"""The JSON of nested Arrow values: decimals are numbers with all of their digits, maps with texts as keys are objects.

What is no value of JSON is refused: NaN and infinity, bytes, a key that is twice in a map.
"""

from __future__ import annotations

import decimal
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from raypg.core.arrow_types import is_text, parts, plain

Write = Callable[[Any], str]


def writer(kind: pa.DataType) -> Write:
    """What makes the JSON of a Python value of the Arrow type *kind*.

    It raises ValueError for a value that JSON does not have.
    """
    if not _needs_care(kind):
        return _text
    kind = plain(kind)
    if pa.types.is_union(kind):
        return _text  # what a value is, only it says
    if pa.types.is_decimal(kind):
        return _or_null(lambda value: format(value, "f"))
    if pa.types.is_struct(kind):
        return _or_null(_struct([(kind.field(i).name, writer(kind.field(i).type)) for i in range(kind.num_fields)]))
    if pa.types.is_map(kind):
        return _or_null((_object if is_text(plain(kind.key_type)) else _pairs)(kind))
    item = writer(kind.value_type)
    return _or_null(lambda values: f"[{', '.join(map(item, values))}]")


def _needs_care(kind: pa.DataType) -> bool:
    """Whether Python's own writer would bend something in it."""
    kind = plain(kind)
    return bool(pa.types.is_decimal(kind) or pa.types.is_map(kind)) or any(map(_needs_care, parts(kind)))


def _text(value: Any) -> str:
    try:
        return _ENCODER.encode(value)
    except ValueError as error:
        raise ValueError(f"JSON has no such value ({error})") from None


def _other(value: Any) -> str:
    if isinstance(value, bytes | decimal.Decimal):  # of a union
        raise ValueError(f"{type(value).__name__} in a union")
    return str(value)


_ENCODER = json.JSONEncoder(default=_other, ensure_ascii=False, allow_nan=False)


def _or_null(write: Write) -> Write:
    return lambda value: "null" if value is None else write(value)


def _struct(fields: list[tuple[str, Write]]) -> Write:
    named = [(name, f"{_text(name)}: ", write) for name, write in fields]
    return lambda value: "{" + ", ".join(begin + write(value[name]) for name, begin, write in named) + "}"


def _object(kind: pa.DataType) -> Write:
    item = writer(kind.item_type)

    def write(pairs: list[tuple[str, Any]]) -> str:
        found: dict[str, str] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is twice in a map")
            found[key] = f"{_text(key)}: {item(value)}"
        return "{" + ", ".join(found.values()) + "}"

    return write


def _pairs(kind: pa.DataType) -> Write:
    key, item = writer(kind.key_type), writer(kind.item_type)
    return lambda pairs: f"[{', '.join(f'[{key(each)}, {item(value)}]' for each, value in pairs)}]"
