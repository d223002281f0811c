"""Values and errors of asyncpg in a form that crosses process boundaries, and back.

asyncpg's ``Record`` cannot be pickled at all, its geometric types pickle but do not unpickle, and its errors carry
attributes that Ray would lose (tests/contract). Messages between actors therefore hold plain tuples, and errors travel
as ``(kind, name, message or args, attributes)``.
"""

from __future__ import annotations

import builtins
import copyreg
from collections.abc import Sequence
from typing import Any, TypeAlias

import asyncpg
from asyncpg import exceptions as pg_errors

from raypg import errors
from raypg.row import row_type

PortableError: TypeAlias = tuple[str, str, Any, dict[str, Any] | None]


# --- geometric types -------------------------------------------------------------------------------------------------


def _reduce_sequence(value: Any) -> tuple[Any, ...]:
    """For types whose constructor takes what iterating over them gives."""
    return type(value), tuple(value)


def _reduce_path(value: Any) -> tuple[Any, ...]:
    return _make_path, (type(value).__name__, tuple(value.points), bool(getattr(value, "is_closed", False)))


def _make_path(kind: str, points: tuple[Any, ...], closed: bool) -> Any:
    return asyncpg.Path(*points, is_closed=closed) if kind == "Path" else asyncpg.Polygon(*points)


for _kind in (asyncpg.Point, asyncpg.Line, asyncpg.Box, asyncpg.LineSegment, asyncpg.Circle):
    copyreg.pickle(_kind, _reduce_sequence)
for _kind in (asyncpg.Path, asyncpg.Polygon):
    copyreg.pickle(_kind, _reduce_path)


# --- rows ------------------------------------------------------------------------------------------------------------


def plain_rows(records: Sequence[asyncpg.Record]) -> list[tuple[Any, ...]]:
    """The values of *records* as plain tuples; composite values inside them become :class:`raypg.Row`."""
    rows = list(map(tuple, records))
    if not rows:
        return rows
    composite = [column for column in range(len(rows[0])) if _holds_records(rows, column)]
    if composite:
        rows = [tuple(_plain(v) if i in composite else v for i, v in enumerate(row)) for row in rows]
    return rows


def _holds_records(rows: Sequence[tuple[Any, ...]], column: int) -> bool:
    """Whether a column is of a composite type (or an array of one): its first value that says anything decides."""
    for row in rows:
        verdict = _is_composite(row[column])
        if verdict is not None:
            return verdict
    return False


def _is_composite(value: Any) -> bool | None:
    """True or False if *value* settles the question for its whole column, None if it does not (NULL, empty array)."""
    if value is None:
        return None
    if isinstance(value, asyncpg.Record):
        return True
    if type(value) is tuple:
        # An anonymous record: the next one of its column may be made of other types.
        return True if any(map(_is_composite, value)) else None
    if type(value) is list:
        for item in value:
            verdict = _is_composite(item)
            if verdict is not None:
                return verdict
        return None
    if isinstance(value, asyncpg.Range):
        if value.isempty or (value.lower is None and value.upper is None):
            return None
        return _is_composite(value.upper if value.lower is None else value.lower)
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, asyncpg.Record):
        return row_type(tuple(value.keys()))(_plain(item) for item in value.values())
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, asyncpg.Range) and not value.isempty:
        return asyncpg.Range(
            _plain(value.lower),
            _plain(value.upper),
            lower_inc=value.lower_inc,
            upper_inc=value.upper_inc,
        )
    return value


# --- errors ----------------------------------------------------------------------------------------------------------


def pack_error(error: BaseException) -> PortableError:
    """*error* as a plain tuple that :func:`unpack_error` turns back into an equal error of the same class."""
    name = type(error).__name__
    if isinstance(error, errors.RaypgError) and getattr(errors, name, None) is type(error):
        return ("raypg", name, error.args, None)
    if getattr(pg_errors, name, None) is type(error):
        attributes = {k: v for k, v in vars(error).items() if v is not None and k != "query" and _is_plain(v)}
        return ("asyncpg", name, str(error.args[0]) if error.args else "", attributes)
    if getattr(builtins, name, None) is type(error):
        return ("builtin", name, error.args if all(map(_is_plain, error.args)) else (str(error),), None)
    return ("other", f"{type(error).__module__}.{name}", str(error), None)


def unpack_error(packed: PortableError) -> BaseException:
    """The error that :func:`pack_error` packed. Errors of unknown classes come back as :class:`RaypgError`."""
    kind, name, payload, attributes = packed
    if kind == "raypg":
        return getattr(errors, name)(*payload)  # type: ignore[no-any-return]
    if kind == "asyncpg":
        error = getattr(pg_errors, name)(payload)
        error.__dict__.update(attributes or {})
        return error  # type: ignore[no-any-return]
    if kind == "builtin":
        try:
            return getattr(builtins, name)(*payload)  # type: ignore[no-any-return]
        except TypeError:  # some want what does not travel: UnicodeDecodeError its bytes
            payload = ", ".join(map(str, payload))
    return errors.RaypgError(f"{name}: {payload}")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
