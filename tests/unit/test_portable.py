"""Values and errors of asyncpg on their way to another process."""

from __future__ import annotations

import builtins
import inspect
import pickle
from typing import Any

import asyncpg
import pytest
from asyncpg import exceptions as pg_errors
from hypothesis import given
from hypothesis import strategies as st

from raypg.errors import RaypgError
from raypg.portable import pack_error, unpack_error

ASYNCPG_CLASSES = sorted(
    name
    for name, value in vars(pg_errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__.startswith("asyncpg")
)
BUILTIN_CLASSES = sorted(
    name
    for name, value in vars(builtins).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__name__ == name
)


def through_a_message(error: BaseException) -> BaseException:
    return unpack_error(pickle.loads(pickle.dumps(pack_error(error))))


def server_error(cls: type[Any]) -> Any:
    """An error with fields such as the server sends."""
    error = cls("said the server")
    error.__dict__.update(
        severity="ERROR", severity_en="ERROR", detail="Key (id)=(1) already exists.", hint="do not",
        schema_name="s", table_name="t", column_name="c", constraint_name="t_pkey", data_type_name=None,
        position="12", server_source_function="f", context="COPY t, line 2",
    )  # fmt: skip
    return error


@pytest.mark.parametrize("name", ASYNCPG_CLASSES)
def test_every_error_of_asyncpg_arrives_as_itself(name: str) -> None:
    cls = getattr(pg_errors, name)
    error = server_error(cls)
    back = through_a_message(error)
    assert type(back) is cls
    assert str(back) == str(error)
    assert getattr(back, "sqlstate", None) == getattr(error, "sqlstate", None)
    for field in ("detail", "hint", "constraint_name", "table_name", "schema_name", "column_name", "severity"):
        assert getattr(back, field) == getattr(error, field)


def test_a_code_of_the_users_own_is_kept() -> None:
    error = pg_errors.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": "ZZ001", "M": "own"})
    back = through_a_message(error)
    assert (type(back), getattr(back, "sqlstate", None)) == (type(error), "ZZ001")


def test_the_statement_does_not_travel_with_the_error() -> None:
    """It may hold literals, and its owner has it anyway."""
    error = server_error(asyncpg.UniqueViolationError)
    error.query = "insert into t values ('secret')"
    assert "secret" not in repr(pack_error(error))


SPECIAL: dict[str, BaseException] = {
    "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "UnicodeEncodeError": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"),
    "UnicodeTranslateError": UnicodeTranslateError("x", 0, 1, "why"),
    "ExceptionGroup": ExceptionGroup("two", [ValueError("a"), ValueError("b")]),
}


@pytest.mark.parametrize("name", BUILTIN_CLASSES)
def test_every_error_of_python_arrives(name: str) -> None:
    error = SPECIAL.get(name) or getattr(builtins, name)("what")
    back = through_a_message(error)
    assert type(back) is type(error) or isinstance(back, RaypgError)
    if name not in ("UnicodeDecodeError", "ExceptionGroup"):  # hold what does not travel: their text does
        assert type(back) is type(error)
        assert back.args == error.args
    assert name in type(back).__name__ or name in str(back)


def test_os_errors_keep_number_and_text() -> None:
    for error in (
        FileNotFoundError(2, "No such file", "/x"),
        ConnectionRefusedError(111, "refused"),
        OSError("a", "b"),
    ):
        back = through_a_message(error)
        assert (type(back), str(back)[:20]) == (type(error), str(error)[:20])


class Foreign(Exception):
    """An error of somebody else's library, which the other side may not have."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Imitation(RaypgError):
    """Named by a user."""


@pytest.mark.parametrize("error", [Foreign(code=5), Imitation("x"), KeyError("k"), ValueError(object(), 5)])
def test_any_error_arrives_as_something_that_says_what_it_was(error: BaseException) -> None:
    back = through_a_message(error)
    assert isinstance(back, Exception)
    assert isinstance(back, type(error) | RaypgError)
    assert str(error) in str(back) or str(5) in str(back)


@given(st.tuples(st.text(), st.integers(), st.booleans(), st.none()))
def test_plain_arguments_are_kept(arguments: tuple[Any, ...]) -> None:
    assert through_a_message(ValueError(*arguments)).args == arguments


POINTS = [asyncpg.Point(1, 2), asyncpg.Point(-1.5, 1e300), asyncpg.Point(0, 0)]
GEOMETRY = [
    *POINTS,
    asyncpg.Line(1, 2, 3),
    asyncpg.Box(POINTS[0], POINTS[2]),
    asyncpg.LineSegment(POINTS[0], POINTS[1]),
    asyncpg.Circle(POINTS[0], 5),
    asyncpg.Path(*POINTS, is_closed=True),
    asyncpg.Path(*POINTS, is_closed=False),
    asyncpg.Polygon(*POINTS),
]


@pytest.mark.parametrize("value", GEOMETRY, ids=str)
@pytest.mark.parametrize("protocol", [2, 5])
def test_geometry_arrives_as_itself(value: Any, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(value, protocol))
    assert type(back) is type(value)
    assert back == value
    assert getattr(back, "is_closed", None) == getattr(value, "is_closed", None)
